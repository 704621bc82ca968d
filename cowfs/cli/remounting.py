"""`mount -o remount,ro` and `remount,rw` of a cowfs mount, for the helper of mount(8)."""

import ctypes
import errno
import os
from dataclasses import fields, replace
from typing import Any

from cowfs.daemon.options import MountOptions, parse_options
from cowfs.errors import BusyError, MountError, UsageError

_MS_RDONLY, _MS_REMOUNT = 1, 32  # linux/mount.h
# nosuid, nodev, noexec, noatime, nodiratime: the same bits for mount(2) and statvfs(3).
_KEPT_FLAGS = 0x2 | 0x4 | 0x8 | 0x400 | 0x800
# mount(8) repeats the options in the table of mounts; these are the kernel's own there.
_KERNEL_WORDS = ("user_id=", "group_id=", "rootmode=", "max_read=", "blksize=")


def remount(directory: str, words: list[str]) -> None:
    """Make a mount read-only or writable, as the last of `ro` and `rw` in `words` says.

    Returns when the last commit is durable and the image is marked clean (`ro`), or when the mount
    is writable (`rw`). A mount that was made read-only has its image open for reading only, so `rw`
    unmounts it and mounts it anew.

    Args:
        words: the mount options that mount(8) passed.

    Raises:
        UsageError: the words would change other options, or the mount shows a past state.
        BusyError: files are open.
        MountError: no cowfs is mounted there, or the kernel refuses.
    """
    from cowfs.daemon import places
    from cowfs.daemon.finding import connect_mount

    mount = places.find_mount(directory)
    client = None if mount is None else connect_mount(mount)
    if mount is None or client is None:
        raise MountError(
            f"{os.path.abspath(directory)} is not a cowfs mount point with a running daemon"
        )
    read_only = [word for word in words if word in ("ro", "rw")][-1:] == ["ro"]
    with client:
        settings = client.info().daemon_settings or {}
        options = _options(mount.image, mount.mount_point, settings)
        _require_same(options, words)
        is_reader = "commits" not in settings
        if read_only or not is_reader:
            _remount_in_kernel(mount.mount_point, read_only)
            client.follow_remount()
            return
    if options.generation is not None or options.snapshot is not None:
        raise UsageError(
            f"{mount.mount_point} shows a past state, which cannot be written; unmount it, and "
            "mount the image without generation and snapshot"
        )
    from cowfs.cli.mounting import end_mount
    from cowfs.daemon.mount import mount as start

    end_mount("mount", mount.mount_point)
    start(replace(options, read_only=False, foreground=False))


def _options(image: str, mountpoint: str, settings: dict[str, Any]) -> MountOptions:
    """Restore the options of a mount from the settings that its daemon reports."""
    known = {field.name for field in fields(MountOptions)}
    chosen = {name: value for name, value in settings.items() if name in known}
    return MountOptions(image=image, mountpoint=mountpoint, **chosen)


def _require_same(options: MountOptions, words: list[str]) -> None:
    """Refuse options other than ro and rw that would change the mount. Raises UsageError."""
    # The kernel shows relatime for every mount, whatever its options were.
    others = [word for word in words if word not in ("remount", "ro", "rw", "relatime")]
    asked = [word for word in others if not word.startswith(_KERNEL_WORDS)]
    wanted = replace(parse_options(",".join(asked), options), read_only=options.read_only)
    if wanted != options:
        raise UsageError(
            f"only ro and rw of {options.mountpoint} can be changed while it is mounted; for other "
            "options unmount it, and mount it again"
        )


def _remount_in_kernel(mountpoint: str, read_only: bool) -> None:
    kept = os.statvfs(mountpoint).f_flag & _KEPT_FLAGS
    flags = _MS_REMOUNT | kept | (_MS_RDONLY if read_only else 0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(None, os.fsencode(mountpoint), None, ctypes.c_ulong(flags), None) == -1:
        number = ctypes.get_errno()
        if number == errno.EBUSY:
            raise BusyError(
                f"{mountpoint} is busy: files are open for writing, or were deleted while open"
            )
        if number == errno.EPERM:
            raise MountError(f"cannot remount {mountpoint}: only root can")
        raise MountError(f"cannot remount {mountpoint}: {os.strerror(number)}")
