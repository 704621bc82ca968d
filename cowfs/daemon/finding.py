"""Find the daemon of an image or of a mount, and connect to its control socket.

Promises:
- A daemon counts as gone only if its mount answers ENOTCONN, or if nobody has its image locked. A
  missing socket proves nothing: a daemon makes a lost socket again within a second, and this waits
  for it.
- The daemon of a mount is the one that serves the mount's device. The image path is only a short
  cut: the image may have been moved, replaced or removed.
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
LOOK_SILENCE_S_MAX = 2.0  # for the answer of a daemon that is only asked what it serves


class UnreachableError(LockedError):
    """A daemon is alive but has no socket that can be found.

    Args:
        what: the image or mount point, for the message.
        pid: of the daemon, 0 if unknown.
    """

    def __init__(self, what: str, pid: int) -> None:
        who = named(pid) if pid else "a process that cannot be seen"
        super().__init__(
            f"{what} is in use by {who}, whose control socket cannot be found; try again, or end "
            "that process with SIGTERM: it commits, then unmounts"
        )
        self.pid = pid


def connect(image: str) -> Client | None:
    """Connect to the daemon of an image. None if the image has no daemon.

    Raises:
        ImageMissingError: there is no such file.
        UnreachableError: a daemon is alive, but its socket cannot be found.
        MountError: the server at the socket cannot be trusted, or does not answer.
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
    """Connect to the daemon of a mount. None if the daemon is gone.

    Raises:
        UnreachableError: the daemon is alive, but its socket cannot be found.
        MountError: the mount belongs to another user.
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
    """Whether a client is connected to the daemon of a mount."""
    info = client.info()
    device = (info.daemon_settings or {}).get("device")
    if device:
        return device == mount.device
    return info.mount_point == escaped_path(mount.mount_point)  # the mount is still starting


def _wait_for(
    look: Callable[[], Client | None], is_gone: Callable[[], bool], what: str, pid: int
) -> Client | None:
    """Call `look` until it finds a client or the daemon `is_gone`, for SOCKET_WAIT_S at most."""
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
    """The pid of the daemon that has an image locked, 0 if unknown; None if there is no daemon.

    A command that works on the image locks it too, but serves no mount. The sockets of another
    user's daemon are closed to us.
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
    """Connect to the daemon of a mount, if one of the sockets that exist now leads to it.

    Args:
        pid: of the daemon; None or 0 if unknown.
    """
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
        # These are daemons of other images too. One that is stopped or not trusted does not matter.
        with contextlib.suppress(CowfsError, OSError):
            with Client(path, silence_s_max=LOOK_SILENCE_S_MAX) as client:
                is_found = serves(client, mount)
            if is_found:
                return Client(path)
    return None


def _of_process(pid: int, image: str) -> list[Path]:
    """Sockets of a daemon that may be in another mount namespace; none if `pid` is 0."""
    return places.sockets_of_process(pid, places.socket_name(image)) if pid else []


def _first(paths: Iterable[Path]) -> Client | None:
    """Connect to the first of these sockets that a daemon serves."""
    for path in paths:
        try:
            return Client(path)
        except (ConnectionRefusedError, FileNotFoundError):
            continue  # a stale socket
    return None
