"""From an image or a mount to its daemon: the control socket, wherever it is, or who lives without one.

Promises:
- A daemon is gone only if its mount says so (ENOTCONN) or nobody has its image locked; that there is
  no socket proves nothing. A daemon makes a lost socket again within a second, so that is waited for.
- The daemon of a mount is the one that serves its device. The path of the image is only the short
  way to it: the image may have been moved, replaced or removed.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from cowfs.daemon import places
from cowfs.daemon.client import Client
from cowfs.daemon.processes import has_fuse, named
from cowfs.errors import CowfsError, ImageError, LockedError, MountError
from cowfs.escapes import escaped_path
from cowfs.storage.device import find_lock_holder, is_locked

SOCKET_WAIT_S = 3.0
LOOK_INTERVAL_S = 0.1
LOOK_SILENCE_S_MAX = 2.0  # of daemons that are only asked what they serve


class UnreachableError(LockedError):
    """A daemon lives and no socket leads to it. `pid` is 0 where it cannot be told."""

    def __init__(self, what: str, pid: int) -> None:
        who = named(pid) if pid else "a process that cannot be seen"
        super().__init__(
            f"{what} is in use by {who}, whose control socket cannot be found; try again, or end "
            "that process by SIGTERM: it commits, then unmounts"
        )
        self.pid = pid


def connect(image: str) -> Client | None:
    """A connection to the daemon of an image; None when it has none.

    Raises:
        ImageMissingError: there is no such file.
        UnreachableError: it has one, and no socket.
        MountError: who serves there cannot be trusted, or does not answer.
    """
    client = _first(places.find_sockets(image))
    if client is not None:
        return client
    pid = _living(image)
    if pid is None:
        return None

    def look() -> Client | None:
        return _first([*places.find_sockets(image), *_of_process(pid, image)])

    return _wait_for(look, lambda: is_locked(image) is False, image, pid)


def connect_mount(mount: places.Mount) -> Client | None:
    """A connection to the daemon of a mount; None when it is gone.

    Raises:
        UnreachableError: it lives and has no socket.
        MountError: it is not ours.
    """
    if os.geteuid() not in (mount.user_id, 0):
        raise MountError(
            f"{mount.mount_point} was mounted by user {mount.user_id}; "
            "only that user and root can control it"
        )
    client = _of_mount(mount, None)
    if client is not None:
        return client
    if places.is_dead(mount):
        return None
    pid = find_lock_holder(mount.image)
    pid = pid if pid and has_fuse(pid) else 0
    return _wait_for(
        lambda: _of_mount(mount, pid), lambda: places.is_dead(mount), mount.mount_point, pid
    )


def serves(client: Client, mount: places.Mount) -> bool:
    """Whether a daemon is that of a mount."""
    info = client.info()
    device = (info.daemon_settings or {}).get("device")
    if device:
        return device == mount.device
    return info.mount_point == escaped_path(mount.mount_point)  # it is just starting


def _wait_for(
    look: Callable[[], Client | None], is_gone: Callable[[], bool], what: str, pid: int
) -> Client | None:
    deadline_s = time.monotonic() + SOCKET_WAIT_S
    while True:
        client = look()
        if client is not None:
            return client
        if is_gone():
            return None
        if time.monotonic() > deadline_s:
            raise UnreachableError(os.path.abspath(what), pid)
        time.sleep(LOOK_INTERVAL_S)


def _living(image: str) -> int | None:
    """The pid of the daemon that has an image, 0 if that cannot be told; None if there is no daemon.

    A command that works on the image has it locked too, and serves no mount. The daemon of another
    user has sockets that are not for us.
    """
    if not is_locked(image):
        return None
    pid = find_lock_holder(image)
    if pid:
        return pid if has_fuse(pid) else None
    resolved = os.path.realpath(image)
    ours = [
        mount
        for mount in places.mounts()
        if mount.image == resolved and os.geteuid() in (mount.user_id, 0)
    ]
    return 0 if any(not places.is_dead(mount) for mount in ours) else None


def _of_mount(mount: places.Mount, pid: int | None) -> Client | None:
    """The daemon of a mount by the sockets that are there now."""
    paths: list[Path] = []
    with contextlib.suppress(ImageError):  # moved or removed
        paths += places.find_sockets(mount.image)
        if pid:
            paths += _of_process(pid, mount.image)
    for path in paths:
        client = _first([path])
        if client is not None:
            if serves(client, mount):
                return client
            client.close()
    for path in places.sockets_of_users({os.geteuid(), mount.user_id}):
        # Of other images, which may be stopped or not to be trusted: none of it matters here.
        with contextlib.suppress(CowfsError, OSError):
            with Client(path, silence_s_max=LOOK_SILENCE_S_MAX) as client:
                is_found = serves(client, mount)
            if is_found:
                return Client(path)
    return None


def _of_process(pid: int, image: str) -> list[Path]:
    return places.sockets_of_process(pid, places.socket_name(image)) if pid else []


def _first(paths: Iterable[Path]) -> Client | None:
    """The first daemon that answers."""
    for path in paths:
        try:
            return Client(path)
        except (ConnectionRefusedError, FileNotFoundError):
            continue  # left behind by a daemon that is gone
    return None
