"""Where things are: the cowfs mounts of this machine, and the control socket of an image's daemon.

A socket lies in `<runtime directory>/cowfs/`, named after the image's device and inode, so a
command finds it from the image path, whatever name it is reached by, and from the mount point:
its source in /proc/self/mountinfo is the image path. The directory is 0700 and belongs to the user
whose daemon it is; both ends check that, through a descriptor that keeps naming what they checked.
"""

import contextlib
import os
import re
import socket
import stat
import struct
from pathlib import Path
from typing import NamedTuple, Protocol

from cowfs.errors import ImageError, ImageMissingError, LockedError, MountError

MOUNT_TYPE = "fuse.cowfs"
MOUNTINFO = "/proc/self/mountinfo"

_ESCAPE = re.compile(rb"\\([0-7]{3})")
_CREDENTIALS = struct.Struct("3i")  # pid, user, group: the kernel's struct ucred
_USER_ID = re.compile(r"(?:^|,)user_id=(\d+)(?:,|$)")


# --- mounts --------------------------------------------------------------------------------------


class Mount(NamedTuple):
    """One line of mountinfo, of a cowfs mount. `image` is its source, `user_id` who mounted it."""

    mount_point: str
    image: str
    user_id: int
    read_only: bool


def parse_mountinfo(text: bytes) -> list[Mount]:
    """The cowfs mounts of a mountinfo table, in its order. Lines not understood are skipped.

    Source: proc(5): id parent major:minor root mount-point options tags... - type source options;
    space, tab, newline and backslash are octal escapes.
    """
    mounts = []
    for line in text.split(b"\n"):
        before, separator, after = line.partition(b" - ")
        fields, rest = before.split(b" "), after.split(b" ")
        if not separator or len(fields) < 6 or len(rest) < 3 or rest[0] != MOUNT_TYPE.encode():
            continue
        options = rest[2].decode("ascii", "replace")
        user_id = _USER_ID.search(options)
        mounts.append(
            Mount(
                mount_point=_unescape(fields[4]),
                image=_unescape(rest[1]),
                user_id=int(user_id[1]) if user_id else 0,
                read_only=b"ro" in fields[5].split(b",") or "ro" in options.split(","),
            )
        )
    return mounts


def _unescape(field: bytes) -> str:
    return os.fsdecode(_ESCAPE.sub(lambda match: bytes([int(match[1], 8) & 0xFF]), field))


def mounts() -> list[Mount]:
    """The cowfs mounts that this process sees."""
    with open(MOUNTINFO, "rb") as table:
        return parse_mountinfo(table.read())


def find_mount(path: str | os.PathLike[str], *, inside: bool = False) -> Mount | None:
    """The cowfs mount at a path, the newest where several are stacked; None where there is none.

    Asks nothing of the mount itself, which may be dead or stopped, unless `path` lies inside.

    Args:
        path: of the mount point.
        inside: also of anything below it.
    """
    table = {mount.mount_point: mount for mount in mounts()}
    if not table:
        return None
    absolute = os.path.abspath(os.fspath(path))
    if absolute in table:
        return table[absolute]
    parent, name = os.path.split(absolute)
    resolved = os.path.join(os.path.realpath(parent), name)
    if resolved not in table:
        resolved = os.path.realpath(absolute)
    while inside and resolved not in table and resolved != "/":
        resolved = os.path.dirname(resolved)
    return table.get(resolved)


# --- control sockets -----------------------------------------------------------------------------


def socket_name(image: str | os.PathLike[str]) -> str:
    """The name of the control socket of an image's daemon.

    Raises:
        ImageMissingError: there is no such file.
        ImageError: it cannot be looked at.
    """
    try:
        status = os.stat(image)
    except (FileNotFoundError, NotADirectoryError):
        raise ImageMissingError(
            f"there is no image {os.path.abspath(os.fspath(image))}; cowfs mkfs makes one"
        ) from None
    except OSError as error:
        raise ImageError(f"cannot open {os.fspath(image)}: {error.strerror}") from None
    if stat.S_ISBLK(status.st_mode):
        return f"block-{status.st_rdev}.sock"  # the same device may have many nodes
    return f"{status.st_dev}-{status.st_ino}.sock"


def runtime_directories(user_id: int) -> list[Path]:
    """Where the sockets of a user's daemons may be, the best place first."""
    if user_id == 0:
        return [Path("/run/cowfs")]
    found = []
    # Not by platformdirs: it would be a third of the time that a short command takes.
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if user_id == os.geteuid() and runtime.startswith("/"):
        found.append(Path(runtime) / "cowfs")
    found.append(Path(f"/run/user/{user_id}/cowfs"))
    found.append(Path(f"/tmp/cowfs-{user_id}"))
    return list(dict.fromkeys(found))


def find_sockets(image: str | os.PathLike[str]) -> list[Path]:
    """Sockets of that image's name where its daemon may serve, whoever answers there.

    Our own places; for root also those of the image's owner and of the users who mounted it.

    Raises:
        ImageMissingError, ImageError: of the image.
    """
    name = socket_name(image)
    users = {os.geteuid(): None}
    if os.geteuid() == 0:
        users[os.stat(image).st_uid] = None
        resolved = os.path.realpath(image)
        users.update({mount.user_id: None for mount in mounts() if mount.image == resolved})
    found = []
    for user in users:
        for directory in runtime_directories(user):
            try:
                is_socket = stat.S_ISSOCK(os.lstat(directory / name).st_mode)
            except OSError:
                continue  # nothing there, or not for us to look into
            if is_socket:
                found.append(directory / name)
    return found


def open_directory(path: Path) -> tuple[int, int]:
    """A descriptor of a directory of sockets that nobody but its owner can enter, and the owner.

    Raises:
        MountError: it is a link, open to others, or belongs to another user and we are not root.
    """
    try:
        descriptor = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise MountError(f"cannot open the directory {path}: {error.strerror}") from None
    status = os.fstat(descriptor)
    problem = ""
    if os.geteuid() not in (status.st_uid, 0):
        problem = f"belongs to user {status.st_uid}"
    elif stat.S_IMODE(status.st_mode) & 0o077:
        problem = f"can be entered by others (mode {stat.S_IMODE(status.st_mode):o})"
    if problem:
        os.close(descriptor)
        raise MountError(f"the directory {path} {problem}; remove it, or make it 0700 and yours")
    return descriptor, status.st_uid


def make_directory() -> Path:
    """The directory for the sockets of our own daemons: made if need be, ours, and 0700.

    Raises:
        MountError: no place can be used; with the reason of the last.
    """
    problem: MountError | None = None
    for path in runtime_directories(os.geteuid()):
        if not path.parent.is_dir():
            continue
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, 0o700)
            descriptor, owner = open_directory(path)
            os.close(descriptor)
            if owner != os.geteuid():
                raise MountError(f"the directory {path} belongs to user {owner}; remove it")
            return path
        except MountError as error:
            problem = error
        except OSError as error:
            problem = MountError(f"cannot make the directory {path}: {error.strerror}")
    raise problem or MountError("there is no directory for the control socket: set XDG_RUNTIME_DIR")


def prepare_socket(image: str | os.PathLike[str]) -> Path:
    """The path at which the daemon of an image is to serve. Stale sockets around it are removed.

    A daemon's socket listens from the moment it has its name (server.py), so one that refuses is
    of a daemon that is gone.

    Raises:
        LockedError: another daemon serves that image.
        MountError: no place for sockets.
        ImageMissingError, ImageError: of the image.
    """
    name = socket_name(image)
    directory = make_directory()
    for entry in os.listdir(directory):
        if not entry.endswith(".sock"):
            continue
        pid = _server_pid(directory / entry)
        if pid == 0:
            with contextlib.suppress(OSError):  # gone, or no socket: making ours tells
                os.unlink(directory / entry)
        elif pid is not None and entry == name:
            raise LockedError(
                f"{os.path.abspath(os.fspath(image))} is in use by process {pid}; "
                "work on its mount point, or unmount it first"
            )
    return directory / name


def _server_pid(path: Path) -> int | None:
    """Who serves at a socket: 0 for nobody any more, None where that cannot be told."""
    descriptor = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            probe.connect(socket_address(descriptor, path.name))
            return peer(probe)[0]
    except ConnectionRefusedError:
        return 0
    except OSError:
        return None  # busy, or gone meanwhile
    finally:
        os.close(descriptor)


class _Connected(Protocol):
    def getsockopt(self, level: int, name: int, size: int, /) -> bytes: ...


def peer(connection: _Connected) -> tuple[int, int]:
    """The pid and the user of the other end, as they were when it connected or began to listen."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, user_id, _ = _CREDENTIALS.unpack(data)
    return pid, user_id


def socket_address(directory: int, name: str) -> str:
    """An address of a socket in an open directory, short enough whatever the directory's path."""
    return f"/proc/self/fd/{directory}/{name}"
