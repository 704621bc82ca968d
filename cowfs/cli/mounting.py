"""`cowfs mount` and `cowfs umount`: returned means that it is so.

mount returns when the mount answers. umount returns when the directory is free, the daemon has
ended and the last commit is durable, or says which of these is not so.
"""

import os
import select
import time
from typing import TYPE_CHECKING

import click

from cowfs.cli.entry import warn
from cowfs.cli.output import json_option, print_json
from cowfs.errors import ImageError, MountError
from cowfs.escapes import escaped_path

if TYPE_CHECKING:
    from cowfs.daemon.places import Mount

UMOUNT_WAIT_S_MAX = 600.0


def complete_options(context: click.Context, parameter: click.Parameter, text: str) -> list[str]:
    """Mount options that go on with the last of the words in `text`, for the shell."""
    from cowfs.cli.snapshots import complete_name
    from cowfs.daemon.options import option_words

    before, comma, last = text.rpartition(",")
    words = option_words()
    # Behind a -o that waits for its value click has not given the words their names yet.
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
    -o snapshot=NAME           the files of a snapshot, read-only
    -o generation=N            an earlier commit, read-only, for rescue
    -o commit=SECONDS          what a crash may lose at the most (5)
    -o snapshots=hidden        .snapshots is not listed but can be entered
       snapshots=visible       .snapshots is listed
       snapshots=disabled      .snapshots is not there
    -o allow_other             for other users too
    -o cache=SIZE              bound of the cache of metadata (1/16 of memory, 128M to 1G)
    -o dirty=SIZE              data in memory that waits for a commit (256M)
    -o discard, nodiscard      give free space back to the host, or not (discard)
    -o acl, noacl              POSIX ACLs are kept and enforced, or not (acl)
    -o xattrs, noxattrs        extended attributes, or none, nor ACLs (xattrs)
    -o relatime, noatime       keep access times, or not (relatime)
       strictatime,            keep them at every read that reaches the daemon, or not
       nostrictatime
    -o writeback, nowriteback  write() returns before the daemon has the data, or not (nowriteback)
    -o log=stderr              the daemon's messages go to its log file
       log=journald            they go to the journal
    -o suid, dev, exec         as for any mount (nosuid,nodev,exec)
       nosuid, nodev, noexec
       setuid, devices,        suid and dev, for mount(8) and fstab, which drop those words
       nosetuid, nodevices

    Words that mount(8) has for every filesystem are accepted; unknown ones are refused.

    \b
    cowfs mount disk.img ~/data
    cowfs mount disk.img ~/data -o ro,snapshots=visible
    cowfs mount disk.img ~/then -o snapshot=monday

    In /etc/fstab: IMG DIR fuse.cowfs defaults,nofail 0 0
    """
    from cowfs.daemon.options import MountOptions, parse_options

    # Absolute, because the daemon leaves this directory; resolved, because mountinfo is.
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
    """Say what is wrong with an image path, before anything heavy is imported.

    Raises:
        ImageMissingError, ImageError: there is none, or it is a directory.
    """
    from cowfs.daemon.places import socket_name

    socket_name(image)
    if os.path.isdir(image):
        raise ImageError(f"{image} is a directory, and an image is a file")


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path())
@json_option
def umount(directory: str, as_json: bool) -> None:
    """Unmount, and wait until everything is safe in the image.

    Refused while a program has files open there, or works in that directory. A mount whose daemon
    was killed is cleared away.

    \b
    cowfs umount ~/data
    """
    mount = end_mount("cowfs", directory)
    if as_json:
        print_json(
            "cowfs umount",
            {"mount_point": escaped_path(mount.mount_point), "image": escaped_path(mount.image)},
        )


def end_mount(program: str, directory: str) -> "Mount":
    """Unmount a directory, and return when the daemon has ended and the image is clean.

    Args:
        program: in whose name a warning is given.

    Raises:
        MountError: nothing is mounted there, it cannot be unmounted, or it did not end well.
        BusyError: a program has files open there.
    """
    from cowfs.cli.target import connect_mount
    from cowfs.daemon import places

    mount = places.find_mount(directory)
    if mount is None:
        raise MountError(f"{os.path.abspath(directory)} is not a cowfs mount point")
    client = connect_mount(mount)
    if client is None:
        from cowfs.daemon.mount import unmount

        unmount(mount.mount_point, lazy=True)
        warn(
            program,
            f"the daemon of {mount.mount_point} was gone; {mount.image} holds its last commit",
        )
    else:
        with client:
            ended = _watch(client.daemon_pid)
            try:
                client.stop()
            except ConnectionAbortedError:
                pass  # it ended while it answered; whether it ended well is looked at below
            _wait(ended, client.daemon_pid)
        _require_unmounted(mount)
    return mount


def _watch(pid: int) -> int | None:
    """A descriptor that becomes readable when the process ends; None when it has."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def _wait(ended: int | None, pid: int) -> None:
    if ended is None:
        return
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    try:
        if not poll.poll(UMOUNT_WAIT_S_MAX * 1000):
            raise MountError(
                f"the daemon (process {pid}) still writes; wait for it to end before you copy "
                "or move the image"
            )
    finally:
        os.close(ended)


def _require_unmounted(mount: "Mount") -> None:
    """The directory is free and the image clean, or an error says what is not so."""
    from cowfs.daemon import places
    from cowfs.storage.device import FileDevice
    from cowfs.storage.format import FLAG_CLEAN
    from cowfs.storage.superblock import read_newest

    deadline_s = time.monotonic() + 10
    while mount in places.mounts():
        if time.monotonic() > deadline_s:
            raise MountError(f"the daemon ended, but {mount.mount_point} is still mounted")
        time.sleep(0.01)
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
            f"generation {superblock.generation}; its log may tell why"
        )
