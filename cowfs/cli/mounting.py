"""`cowfs mount` and `cowfs umount`.

mount returns when the mount answers requests. umount returns when the directory is unmounted, the
daemon has ended and the last commit is durable; otherwise an error says which of these failed.
"""

import contextlib
import os
import select
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from cowfs.cli.entry import warn
from cowfs.cli.output import json_option, print_json
from cowfs.errors import BusyError, ImageError, MountError
from cowfs.escapes import escaped_path, host_path

if TYPE_CHECKING:
    from cowfs.daemon.places import Mount

UMOUNT_WAIT_S_MAX = 600.0
HELD_AFTER_S = 1.0  # a daemon that lives longer: find out who keeps the mount in use
LOCK_POLL_INTERVAL_S = 0.05


def complete_options(context: click.Context, parameter: click.Parameter, text: str) -> list[str]:
    """List mount options that complete the last one in `text`, for the shell's completion."""
    from cowfs.cli.snapshots import complete_name
    from cowfs.daemon.options import option_words

    before, comma, last = text.rpartition(",")
    words = option_words()
    # While -o still lacks its value, click has not assigned the arguments to their names.
    image = context.params.get("image") or next(iter(context.args), None)
    if last.startswith("snapshot=") and image is not None:
        context.params["target"] = image
        names = complete_name(context, parameter, last.partition("=")[2])
        words = [f"snapshot={name}" for name in names]
    return [f"{before}{comma}{word}" for word in words if word.startswith(last)]


@click.command()
@click.argument("image", metavar="IMG", type=click.Path())
@click.argument("mountpoint", metavar="DIR", type=click.Path())
@click.option(
    "-o",
    "option_texts",
    metavar="NAME,NAME=VALUE",
    multiple=True,
    shell_complete=complete_options,
    help="See above.",
)
@click.option("-f", "--foreground", is_flag=True, help="Stay, and log to the terminal.")
def mount(image: str, mountpoint: str, option_texts: tuple[str, ...], foreground: bool) -> None:
    """Mount an image on an empty directory.

    \b
    -o ro, rw                  read-only, or not (rw)
    -o snapshot=NAME           mount the files of a snapshot, read-only
    -o generation=N            mount an earlier commit, read-only, for rescue
    -o commit=SECONDS          at most this much time is lost in a crash (5)
    -o snapshots=hidden        .snapshots is not listed but can be entered
       snapshots=visible       .snapshots is listed
       snapshots=disabled      .snapshots does not exist
    -o allow_other             let other users use the mount
    -o cache=SIZE              limit of the metadata cache (1/16 of memory, 128M to 1G)
    -o dirty=SIZE              limit of data in memory that waits for a commit (256M)
    -o discard, nodiscard      give free space back to the host, or not (discard)
    -o acl, noacl              keep and enforce POSIX ACLs, or not (acl)
    -o xattrs, noxattrs        keep extended attributes, or neither these nor ACLs (xattrs)
    -o relatime, noatime       keep access times, or not (relatime)
       strictatime,            update them at every read that reaches the daemon, or not
       nostrictatime
    -o writeback, nowriteback  write() returns before the daemon has the data, or not (nowriteback)
    -o log=stderr              the daemon's messages go to its log file
       log=journald            they go to the journal
    -o suid, dev, exec         as for any mount (nosuid,nodev,exec)
       nosuid, nodev, noexec
       setuid, devices,        other names for suid and dev: mount(8) and fstab do not pass those on
       nosetuid, nodevices

    Options that mount(8) has for every filesystem are accepted; unknown ones are refused.

    \b
    cowfs mount disk.img ~/data
    cowfs mount disk.img ~/data -o ro,snapshots=visible
    cowfs mount disk.img ~/then -o snapshot=monday

    In /etc/fstab: IMG DIR fuse.cowfs defaults,nofail 0 0
    """
    from cowfs.daemon.options import MountOptions, parse_options

    # The image's path is absolute because the daemon changes its directory; the mount point is
    # resolved as the kernel's table of mounts has it.
    options = MountOptions(
        image=os.path.abspath(image),
        mountpoint=os.path.realpath(mountpoint),
        foreground=foreground,
    )
    options = parse_options(",".join(option_texts), options)
    require_image(options.image)

    from cowfs.daemon.mount import mount as start

    start(options)


def require_image(image: str) -> None:
    """Check the path of an image before anything slow is imported.

    Raises:
        ImageMissingError: nothing is there.
        ImageError: it is a directory, or cannot be opened.
    """
    from cowfs.daemon.places import socket_name

    socket_name(image)
    if os.path.isdir(image):
        raise ImageError(f"{image} is a directory, and an image is a file")


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path())
@json_option
def umount(directory: str, as_json: bool) -> None:
    """Unmount, and wait until everything is durable in the image.

    Refused while programs have files open there or have their working directory there, and while
    the mount is in use elsewhere: by a bind mount, an overlay or another mount namespace. The error
    names them. A mount whose daemon was killed is unmounted too.

    \b
    cowfs umount ~/data
    """
    mount = end_mount("cowfs", directory)
    if as_json:
        print_json(
            "cowfs umount",
            {"mount_point": escaped_path(mount.mount_point), "image": escaped_path(mount.image)},
        )


def end_mount(program: str, directory: str, *, elsewhere: bool = False) -> "Mount":
    """Unmount a directory, and return when the daemon has ended and the image is clean.

    Args:
        program: the program's name, for warnings.
        elsewhere: unmount this directory even if the filesystem stays mounted elsewhere.

    Returns:
        The mount that was there.

    Raises:
        BusyError: a program has files open there, or the mount is in use elsewhere.
        StillMountedError: the directory is unmounted, but the filesystem is in use elsewhere.
        MountError: no cowfs is mounted there, the kernel refuses, or the daemon ended without its
            last commit.
    """
    from cowfs.daemon import places
    from cowfs.daemon.finding import UnreachableError, connect_mount
    from cowfs.daemon.mount_point import unmount
    from cowfs.daemon.processes import busy, users

    mount = places.find_mount(directory)
    if mount is None:
        raise MountError(f"{os.path.abspath(directory)} is not a cowfs mount point")
    cover = places.cover(mount)
    if cover is not None:
        raise MountError(
            f"{mount.mount_point} is covered by a mount of {cover.kind}; unmount that first"
        )
    try:
        client = connect_mount(mount)
    except UnreachableError as error:
        _refuse_elsewhere(mount, elsewhere)
        daemon = _Ending(mount, error.pid, is_safe=False)
        unmount(mount.mount_point)
        daemon.wait()
        _require_unmounted(program, mount, is_there=os.path.exists(mount.image))
        return mount
    if client is None:
        unmount(mount.mount_point, lazy=True)
        _warn_of_dead_daemon(program, mount)
        return mount
    with client:
        escaped_main = client.info().mount_point
        main = None if escaped_main is None else host_path(escaped_main)
        if main != mount.mount_point and _is_mounted_at(mount, main):
            unmount(mount.mount_point)  # a bind mount; the main mount stays
            warn(program, f"{mount.image} is still mounted on {main}")
            return mount
        _refuse_elsewhere(mount, elsewhere)
        daemon = _Ending(mount, client.daemon_pid, is_safe=True)
        if main == mount.mount_point:
            try:
                client.stop()
            except ConnectionAbortedError:
                pass  # the daemon ended; _require_unmounted checks whether it committed
            except BusyError:
                # The daemon may see fewer processes: as another user, or in another PID namespace.
                found = users(mount.device, mount.mount_point)
                if found:
                    raise busy(mount.mount_point, found) from None
                raise
        else:
            client.sync()
            unmount(mount.mount_point)  # the last bind mount; the main mount is gone already
        is_there = client.serves_image(mount.image)
    daemon.wait()
    _require_unmounted(program, mount, is_there=is_there)
    return mount


def _is_mounted_at(mount: "Mount", mount_point: str | None) -> bool:
    """Whether the same filesystem is mounted at another mount point."""
    from cowfs.daemon import places

    return any(
        each.device == mount.device and each.mount_point == mount_point for each in places.mounts()
    )


def _refuse_elsewhere(mount: "Mount", elsewhere: bool) -> None:
    from cowfs.daemon.processes import listed, other_mounts

    found = [] if elsewhere else other_mounts(mount.device, mount.mount_point)
    if found:
        raise BusyError(
            f"{mount.mount_point} is in use elsewhere too: {listed(found)}; unmount it there "
            f"first, or run umount {mount.mount_point}: the daemon then goes on for the others"
        )


def _warn_of_dead_daemon(program: str, mount: "Mount") -> None:
    """Warn that the daemon of a mount was gone, and say in which state the image is."""
    from cowfs.daemon import places
    from cowfs.daemon.processes import named
    from cowfs.storage.device import find_lock_holder, is_locked

    if not os.path.exists(mount.image):
        state = f"{mount.image} does not exist any more"
    elif not any(each.image == mount.image for each in places.mounts()) and not _wait_until(
        lambda: not is_locked(mount.image), HELD_AFTER_S
    ):
        # The FUSE connection can end before its daemon.
        pid = find_lock_holder(mount.image)
        who = named(pid) if pid else "another process"
        state = f"{who} still has {mount.image} open: wait until that process ends"
    else:
        state = f"{mount.image} holds its last commit"
    warn(program, f"the daemon of {mount.mount_point} was gone; {state}")


class _Ending:
    """Waits for the daemon of a mount to end.

    Args:
        pid: of the daemon; 0 if unknown, then the lock of the image shows whether it still runs.
        is_safe: whether the daemon has made everything durable.
    """

    def __init__(self, mount: "Mount", pid: int, *, is_safe: bool) -> None:
        self._mount, self._pid, self._is_safe = mount, pid, is_safe
        self._process: int | None = None
        if pid:
            with contextlib.suppress(ProcessLookupError):  # the daemon has ended already
                self._process = os.pidfd_open(pid)

    def wait(self) -> None:
        """Return when the daemon has ended.

        Raises:
            StillMountedError: a process or another mount, which the error names, keeps it alive.
            MountError: it still writes after UMOUNT_WAIT_S_MAX.
        """
        from cowfs.daemon.processes import still_mounted

        mount = self._mount
        try:
            if self._has_ended(HELD_AFTER_S):
                return
            error = still_mounted(
                mount.device, mount.mount_point, mount.image, self._pid, is_safe=self._is_safe
            )
            if error is not None:
                raise error
            # Nothing visible keeps the mount in use, so the daemon writes its last commit.
            if not self._has_ended(UMOUNT_WAIT_S_MAX):
                who = f" (process {self._pid})" if self._pid else ""
                raise MountError(
                    f"the daemon{who} still writes; wait until it ends before you copy or move "
                    f"{mount.image}"
                )
        finally:
            if self._process is not None:
                os.close(self._process)

    def _has_ended(self, wait_s: float) -> bool:
        from cowfs.storage.device import is_locked

        if self._process is not None:
            poll = select.poll()
            poll.register(self._process, select.POLLIN)
            return bool(poll.poll(wait_s * 1000))
        return bool(self._pid) or _wait_until(lambda: not is_locked(self._mount.image), wait_s)


def _wait_until(condition: Callable[[], bool], wait_s: float) -> bool:
    """Poll until the condition holds; False if it does not within `wait_s`."""
    deadline_s = time.monotonic() + wait_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(LOCK_POLL_INTERVAL_S)
    return True


def _require_unmounted(program: str, mount: "Mount", *, is_there: bool) -> None:
    """Check that the directory is unmounted and the image is marked clean.

    Args:
        is_there: whether the path of the image still leads to the file that was mounted.

    Raises:
        MountError: the directory is still mounted, or the last commit is missing.
    """
    from cowfs.daemon import places
    from cowfs.storage.device import FileDevice
    from cowfs.storage.format import FLAG_CLEAN
    from cowfs.storage.superblock import read_newest

    if not _wait_until(lambda: mount not in places.mounts(), 10):
        raise MountError(f"the daemon ended, but {mount.mount_point} is still mounted")
    if not is_there:
        warn(
            program,
            f"{mount.image} was moved, replaced or removed while it was mounted; the last commit "
            "is in the original file, which was not checked",
        )
        return
    if mount.read_only:
        return
    device = FileDevice(mount.image, writable=False)
    try:
        superblock = read_newest(device)
    finally:
        device.close()
    if not superblock.flags & FLAG_CLEAN:
        raise MountError(
            f"the daemon of {mount.mount_point} ended without its last commit: {mount.image} is at "
            f"generation {superblock.generation}; see the daemon's log for the reason"
        )
