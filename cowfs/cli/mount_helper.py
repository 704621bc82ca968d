"""The helpers of mount(8), umount(8) and fstab for the type `fuse.cowfs`.

`mount.fuse.cowfs IMAGE DIR [-sfnv] [-o OPTIONS]` mounts; `umount.fuse.cowfs DIR [-flnrv]` unmounts
and waits for the last commit, as `cowfs umount` does. mount(8) and umount(8) look for them in
/sbin. umount(8) calls its helper only if it learns the whole type of the mount: when it is given
the image, or when mount(8) recorded an option of user space for the mount (`_netdev`, `user`,
`x-...`). Otherwise it unmounts by itself.

Both helpers work with the minimal environment that mount(8) passes. The exit status is that of
mount(8): 0 done; 1 wrong use, or not allowed; 2 system error; 4 internal error; 8 interrupted; 32
mount or unmount failed.
"""

import os
import sys
from collections.abc import Callable, Sequence
from getopt import GetoptError, gnu_getopt
from typing import NoReturn

from cowfs.escapes import printable

WRONG_USE, SYSTEM_FAULT, INTERNAL_FAULT, INTERRUPTED, FAILED = 1, 2, 4, 8, 32
MOUNT_HELPER, UMOUNT_HELPER = "mount.fuse.cowfs", "umount.fuse.cowfs"
MOUNT_USAGE = f"{MOUNT_HELPER} IMAGE DIRECTORY [-sfnv] [-o OPTIONS]"
UMOUNT_USAGE = f"{UMOUNT_HELPER} DIRECTORY [-flnrv]"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run `mount.fuse.cowfs`, and end the process with the status for mount(8)."""
    _run(MOUNT_HELPER, _mount, arguments)


def umount_main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run `umount.fuse.cowfs`, and end the process with the status for umount(8)."""
    _run(UMOUNT_HELPER, _umount, arguments)


def _run(
    name: str, action: Callable[[list[str]], None], arguments: Sequence[str] | None
) -> NoReturn:
    from cowfs.cli.entry import accept_any_text, warn
    from cowfs.errors import CowfsError, UsageError

    accept_any_text()
    os.environ["PATH"] = f"{os.environ['PATH']}:{_PATH}" if os.environ.get("PATH") else _PATH
    try:
        action(list(sys.argv[1:] if arguments is None else arguments))
        status = 0
    except (GetoptError, UsageError) as error:
        warn(name, str(error))
        status = WRONG_USE
    except CowfsError as error:
        warn(name, str(error))
        status = FAILED
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
        raise UsageError(f"usage: {MOUNT_USAGE}")
    names = {flag for flag, _ in flags}
    texts = [value for flag, value in flags if flag == "-o"]
    if "-r" in names:
        texts.append("ro")
    image, mountpoint = places
    if "remount" in ",".join(texts).split(","):
        from cowfs.cli.remounting import remount

        if "-f" not in names:
            remount(mountpoint, [word for word in ",".join(texts).split(",") if word])
        return
    # mount(8) passes rw whenever ro was not given, so here it says nothing.
    words = [word for word in ",".join(texts).split(",") if word != "rw"]
    options = MountOptions(image=os.path.abspath(image), mountpoint=os.path.realpath(mountpoint))
    options = parse_options(",".join(words), options, sloppy="-s" in names)
    if "-v" in names:
        print(printable(f"mounting {options.image} on {options.mountpoint}"))
    if "-f" in names:
        return  # -f is a dry run

    from cowfs.cli.mounting import require_image

    require_image(options.image)

    from cowfs.daemon.mount import mount

    mount(options)


def _umount(arguments: list[str]) -> None:
    from cowfs.errors import UsageError

    flags, places = gnu_getopt(arguments, "flnrvt:N:")
    if len(places) != 1:
        raise UsageError(f"usage: {UMOUNT_USAGE}")
    names = {flag for flag, _ in flags}
    if "-v" in names:
        print(printable(f"unmounting {places[0]}"))
    if names & {"-f", "-l"}:  # the user does not want to wait
        from cowfs.daemon.mount_point import unmount

        unmount(places[0], lazy="-l" in names, force="-f" in names)
        return

    from cowfs.cli.entry import warn
    from cowfs.cli.mounting import end_mount
    from cowfs.daemon.places import find_mount
    from cowfs.errors import BusyError, MountError, StillMountedError

    try:
        end_mount(UMOUNT_HELPER, places[0], elsewhere=True)
    except BusyError:
        raise
    except StillMountedError as error:
        warn(UMOUNT_HELPER, str(error))  # this directory is unmounted, as asked
    except MountError as error:
        # The last commit cannot be waited for (the image was moved, say). A shutdown must unmount
        # in spite of that.
        if find_mount(places[0]) is None:
            raise
        from cowfs.daemon.mount_point import unmount

        unmount(places[0])
        warn(UMOUNT_HELPER, f"{error}; unmounted without waiting for the last commit")
