"""The helper of mount(8) and fstab for the type `fuse.cowfs`: `helper SRC DIR [-sfnv] -o OPTIONS`.

Works with the minimal environment that mount(8) leaves. Exit status, as mount(8) has it: 0 mounted;
1 wrong use, or not allowed; 2 a fault of the system; 4 a fault in here; 8 interrupted; 32 not
mounted.
"""

import os
import sys
from collections.abc import Sequence
from getopt import GetoptError, gnu_getopt
from typing import NoReturn

WRONG_USE, SYSTEM_FAULT, INTERNAL_FAULT, INTERRUPTED, NOT_MOUNTED = 1, 2, 4, 8, 32
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Mount as asked, and end the process with the status for mount(8)."""
    from cowfs.cli.entry import warn
    from cowfs.errors import CowfsError, UsageError

    name = "mount.fuse.cowfs"
    os.environ["PATH"] = f"{os.environ['PATH']}:{_PATH}" if os.environ.get("PATH") else _PATH
    try:
        _mount(list(sys.argv[1:] if arguments is None else arguments))
        status = 0
    except (GetoptError, UsageError) as error:
        warn(name, str(error))
        status = WRONG_USE
    except CowfsError as error:
        warn(name, str(error))
        status = NOT_MOUNTED
    except KeyboardInterrupt:
        status = INTERRUPTED
    except (OSError, MemoryError) as error:
        warn(name, str(error))
        status = SYSTEM_FAULT
    except Exception as error:
        warn(name, f"internal error: {type(error).__name__}: {error}")
        status = INTERNAL_FAULT
    sys.exit(status)


def _mount(arguments: list[str]) -> None:
    from cowfs.daemon.options import MountOptions, parse_options
    from cowfs.errors import UsageError

    flags, places = gnu_getopt(arguments, "sfnvrwo:t:N:")
    if len(places) != 2:
        raise UsageError("used as: mount.fuse.cowfs IMAGE DIRECTORY [-sfnv] [-o OPTIONS]")
    names = {flag for flag, _ in flags}
    texts = [value for flag, value in flags if flag == "-o"]
    if "-r" in names:
        texts.append("ro")
    image, mountpoint = places
    options = MountOptions(image=os.path.abspath(image), mountpoint=os.path.realpath(mountpoint))
    options = parse_options(",".join(texts), options, sloppy="-s" in names)
    if "-v" in names:
        print(f"mounting {options.image} on {options.mountpoint}")
    if "-f" in names:
        return  # a rehearsal

    from cowfs.cli.mounting import require_image

    require_image(options.image)

    from cowfs.daemon.mount import mount

    mount(options)
