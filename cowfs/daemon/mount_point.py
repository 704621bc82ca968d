"""The directory of a mount: whether it can be mounted on, the claim to it, and unmounting it.

`mount` (mount.py) checks the directory, claims it, and keeps the claim until it is mounted.
Commands unmount it from outside.
"""

import fcntl
import logging
import os
import shutil
import stat
import subprocess

from cowfs.daemon import places
from cowfs.daemon.options import MountOptions
from cowfs.daemon.processes import busy, users
from cowfs.errors import MountError

log = logging.getLogger(__name__)


def check_place(options: MountOptions) -> None:
    """Refuse a directory that cannot be mounted on; unmount a dead cowfs mount there first.

    Raises:
        MountError: the mount point is missing, not a directory, not empty, not ours or in use; FUSE
            is not available; the image would lie inside its own mount.
    """
    directory = options.mountpoint
    clear_dead_mount(directory)
    _require_no_mount(directory)
    try:
        status = os.stat(directory)
    except FileNotFoundError:
        raise MountError(f"the mount point {directory} does not exist; mkdir it first") from None
    except OSError as error:
        found = places.mount_at(directory)
        on_it = f" (a mount of {found.kind})" if found is not None else ""
        raise MountError(f"cannot use {directory}{on_it}: {error.strerror}") from None
    if not stat.S_ISDIR(status.st_mode):
        raise MountError(f"the mount point {directory} is not a directory")
    if os.getuid() and (status.st_uid != os.getuid() or not os.access(directory, os.W_OK)):
        raise MountError(f"the mount point {directory} does not belong to you")
    image = os.path.realpath(options.image)
    if os.path.commonpath([image, os.path.realpath(directory)]) == os.path.realpath(directory):
        raise MountError(f"the image {image} would lie inside its own mount {directory}")
    with os.scandir(directory) as listing:
        if next(listing, None) is not None:
            raise MountError(f"the mount point {directory} is not empty")
    if not os.path.exists("/dev/fuse"):
        raise MountError(
            "there is no /dev/fuse here; load the kernel's fuse module (modprobe fuse)"
        )
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise MountError(
            "you may not open /dev/fuse; root can allow it to everybody: chmod 666 /dev/fuse"
        )
    if os.getuid() and shutil.which("fusermount3") is None:
        raise MountError("fusermount3 is not installed; apt-get install fuse3")


def clear_dead_mount(directory: str) -> None:
    """Unmount what a killed cowfs daemon left behind, if the directory is such a mount."""
    mount = places.find_mount(directory)
    if mount is not None and places.cover(mount) is None and places.is_dead(mount):
        unmount(directory, lazy=True)


def _require_no_mount(directory: str) -> None:
    mount = places.find_mount(directory)
    if mount is not None:
        raise MountError(f"{directory} is a mount point already, of {mount.image}")


class Claim:
    """A lock on a mount point, held from the last check until it is mounted.

    Without it, two processes could mount on one directory at once, one mount hidden by the other.

    Attributes:
        descriptor: the open directory that holds the lock; -1 after `release`.

    Raises:
        MountError: another process holds the lock, or has mounted there since the check.
    """

    def __init__(self, directory: str) -> None:
        self.descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise MountError(
                f"{directory} is locked by another program, which may be mounting there just now; "
                "look, and try again"
            ) from None
        except OSError as error:
            # Some network filesystems have no flock: mounts there do without.
            log.debug("locking %s: %s", directory, error)
        try:
            _require_no_mount(directory)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Release the lock in this process. A child that was forked meanwhile still holds it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def unmount(directory: str, *, lazy: bool = False, force: bool = False) -> None:
    """Unmount a directory: with umount as root, else with fusermount3.

    Args:
        lazy: detach the mount at once; it ends when nothing uses it any more.
        force: also if the daemon does not answer. Only root can; ignored for others.

    Raises:
        BusyError: files there are in use.
        MountError: it failed for another reason.
    """
    command = ["umount", *(["-l"] if lazy else []), *(["-f"] if force else []), "-i", directory]
    if os.getuid():
        command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", directory]
    path = os.environ.get("PATH", "") + ":/usr/bin:/bin:/usr/sbin:/sbin"
    environment = {**os.environ, "PATH": path, "LC_ALL": "C"}  # the message is parsed below
    done = subprocess.run(
        command, capture_output=True, text=True, errors="surrogateescape", env=environment
    )
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["umount failed"]
        if "busy" in reason[0]:
            mount = places.find_mount(directory)
            found = users(mount.device, mount.mount_point) if mount is not None else []
            raise busy(directory, found)
        raise MountError(f"cannot unmount {directory}: {reason[0]}")
