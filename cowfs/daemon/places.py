"""Where to find the cowfs mounts of this machine, and the control socket of an image's daemon.

A socket is in `<runtime directory>/cowfs/` and named after the device and inode of the image. So a
command finds it from any path of the image, and from the mount point, whose source in
/proc/self/mountinfo is an image path. The directory is 0700 and belongs to the user of the daemon.
Both ends check that, and go on with the descriptor that they checked.
"""

import contextlib
import errno
import os
import re
import select
import signal
import socket
import stat
import struct
from pathlib import Path
from typing import NamedTuple, Protocol

from cowfs.errors import ImageError, ImageMissingError, LockedError, MountError
from cowfs.storage.device import is_locked

MOUNT_TYPE = "fuse.cowfs"
MOUNTINFO = "/proc/self/mountinfo"
ANSWER_S_MAX = 3.0  # for the answer of a mount to statvfs(2)

_UNANSWERED = 255  # an exit status that is no errno
_ESCAPE = re.compile(rb"\\([0-7]{3})")
_CREDENTIALS = struct.Struct("3i")  # pid, user, group: the kernel's struct ucred
_USER_ID = re.compile(r"(?:^|,)user_id=(\d+)(?:,|$)")
_GROUP_ID = re.compile(r"(?:^|,)group_id=(\d+)(?:,|$)")


# --- mounts --------------------------------------------------------------------------------------


class MountEntry(NamedTuple):
    """One line of mountinfo, of any filesystem.

    Attributes:
        device: `major:minor`.
        root: the directory of the filesystem that is mounted.
        peers: number of the peer group, which shares mounts and unmounts below; None without one.
        master: number of the peer group that this mount follows; None without one.
    """

    mount_id: int
    parent_id: int
    device: str
    root: str
    mount_point: str
    options: str
    peers: int | None
    master: int | None
    kind: str
    source: str
    super_options: str


class Mount(NamedTuple):
    """A cowfs mount.

    Attributes:
        image: the mount source, which is the image path at the time of the mount.
        user_id, group_id: of the user who mounted it.
        device: `major:minor`, the same for all bind mounts of it.
    """

    mount_point: str
    image: str
    user_id: int
    read_only: bool
    device: str
    group_id: int


def parse_table(text: bytes) -> list[MountEntry]:
    """Parse a mountinfo table, in its order. Malformed lines are skipped.

    Source: proc(5): id parent major:minor root mount-point options tags... - type source options;
    space, tab, newline and backslash are octal escapes.
    """
    entries = []
    for line in text.split(b"\n"):
        before, separator, after = line.partition(b" - ")
        fields, rest = before.split(b" "), after.split(b" ")
        if not separator or len(fields) < 6 or len(rest) < 3:
            continue
        tags = dict(tag.split(b":", 1) for tag in fields[6:] if b":" in tag)
        try:
            entries.append(
                MountEntry(
                    mount_id=int(fields[0]),
                    parent_id=int(fields[1]),
                    device=fields[2].decode("ascii"),
                    root=_unescape(fields[3]),
                    mount_point=_unescape(fields[4]),
                    options=fields[5].decode("ascii"),
                    peers=int(tags[b"shared"]) if b"shared" in tags else None,
                    master=int(tags[b"master"]) if b"master" in tags else None,
                    kind=rest[0].decode("ascii"),
                    source=_unescape(rest[1]),
                    super_options=_unescape(rest[2]),
                )
            )
        except ValueError:
            continue
    return entries


def parse_mountinfo(text: bytes) -> list[Mount]:
    """The cowfs mounts of a mountinfo table, in its order."""
    mounts = []
    for entry in parse_table(text):
        if entry.kind != MOUNT_TYPE:
            continue
        user_id = _USER_ID.search(entry.super_options)
        group_id = _GROUP_ID.search(entry.super_options)
        words = f"{entry.options},{entry.super_options}".split(",")
        mounts.append(
            Mount(
                mount_point=entry.mount_point,
                image=entry.source,
                user_id=int(user_id[1]) if user_id else 0,
                read_only="ro" in words,
                device=entry.device,
                group_id=int(group_id[1]) if group_id else 0,
            )
        )
    return mounts


def _unescape(field: bytes) -> str:
    return os.fsdecode(_ESCAPE.sub(lambda match: bytes([int(match[1], 8) & 0xFF]), field))


def mounts() -> list[Mount]:
    """The cowfs mounts that this process sees."""
    with open(MOUNTINFO, "rb") as table:
        return parse_mountinfo(table.read())


def mount_table(pid: str = "self") -> list[MountEntry]:
    """All mounts that a process sees.

    Raises:
        OSError: the process ended, or may not be examined.
    """
    with open(f"/proc/{pid}/mountinfo", "rb") as table:
        return parse_table(table.read())


def mount_at(directory: str) -> MountEntry | None:
    """The mount exactly at a directory, the newest where several are stacked; None without one."""
    found = [entry for entry in mount_table() if entry.mount_point == directory]
    return found[-1] if found else None


def cover(mount: Mount) -> MountEntry | None:
    """Another filesystem that is mounted over a mount, at the same directory; None without one."""
    top = mount_at(mount.mount_point)
    return top if top is not None and top.device != mount.device else None


def is_dead(mount: Mount) -> bool:
    """Whether a mount has no daemon any more: its errno shows it, or its image is not locked.

    The lock of the image decides if the mount does not answer in time (its daemon may be stopped)
    or answers only the user who mounted it.
    """
    answer = _ask(mount)
    if answer is None:
        return is_locked(mount.image) is False
    # ECONNABORTED: the kernel is still ending the connection of a daemon that was just killed.
    return answer in (errno.ENOTCONN, errno.ECONNABORTED)


def _ask(mount: Mount) -> int | None:
    """Call statvfs(2) on a mount, as its user if possible.

    Unlike stat(2), statvfs(2) always asks the daemon. The call is made in a child process, which
    can be killed if it hangs.

    Returns:
        0 or an errno; None if there was no answer in time, or none for this user.
    """
    child = os.fork()
    if not child:
        answer = _UNANSWERED
        try:
            if os.geteuid() == 0:
                os.setresgid(mount.group_id, mount.group_id, mount.group_id)
                os.setresuid(mount.user_id, mount.user_id, mount.user_id)
            # Users who may not access the mount get an answer of the kernel, with no blocks.
            answer = 0 if os.statvfs(mount.mount_point).f_blocks else _UNANSWERED
        except OSError as error:
            answer = min(error.errno or _UNANSWERED, _UNANSWERED)
        finally:
            os._exit(answer)
    descriptor = os.pidfd_open(child)
    try:
        ended = select.poll()
        ended.register(descriptor, select.POLLIN)
        if not ended.poll(ANSWER_S_MAX * 1000):
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        os.close(descriptor)
    return status if 0 <= status < _UNANSWERED else None


def bind_mounts(mount_point: str) -> list[str]:
    """Mount points where directories below the root of a mount are mounted, in this namespace."""
    table = mount_table()
    devices = {entry.device for entry in table if entry.mount_point == mount_point}
    return [entry.mount_point for entry in table if entry.device in devices and entry.root != "/"]


def find_mount(path: str | os.PathLike[str], *, inside: bool = False) -> Mount | None:
    """The cowfs mount at a path, the newest where several are stacked; None without one.

    Does not access the mount itself, which may be dead or stopped, unless `path` is inside it.

    Args:
        path: of the mount point.
        inside: accept also a path below the mount point.
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
        ImageError: stat(2) of the image failed.
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
        return f"block-{status.st_rdev}.sock"  # a block device may have several device files
    return f"{status.st_dev}-{status.st_ino}.sock"


def runtime_directories(user_id: int) -> list[Path]:
    """The directories where sockets of a user's daemons may be, the best one first."""
    if user_id == 0:
        return [Path("/run/cowfs")]
    found = []
    # Not with platformdirs: its import would take a third of the time of a short command.
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if user_id == os.geteuid() and runtime.startswith("/"):
        found.append(Path(runtime) / "cowfs")
    found.append(Path(f"/run/user/{user_id}/cowfs"))
    found.append(Path(f"/tmp/cowfs-{user_id}"))
    return list(dict.fromkeys(found))


def find_sockets(image: str | os.PathLike[str]) -> list[Path]:
    """Sockets where the daemon of an image may serve. Who really serves there is not checked.

    The search covers our own directories; for root also those of the image's owner and of the users
    who mounted it.

    Raises:
        ImageMissingError, ImageError: as `socket_name`.
    """
    name = socket_name(image)
    users = {os.geteuid()}
    if os.geteuid() == 0:
        resolved = os.path.realpath(image)
        users |= {os.stat(image).st_uid}
        users |= {mount.user_id for mount in mounts() if mount.image == resolved}
    folders = [folder for user in sorted(users) for folder in runtime_directories(user)]
    return [folder / name for folder in folders if _is_socket(folder / name)]


def sockets_of_users(users: set[int]) -> list[Path]:
    """All control sockets of these users' daemons, as far as directories can be read."""
    found = []
    for user in sorted(users):
        for folder in runtime_directories(user):
            with contextlib.suppress(OSError):
                found += [path for path in folder.glob("*.sock") if _is_socket(path)]
    return found


def sockets_of_process(pid: int, name: str) -> list[Path]:
    """Sockets of that name in the directories as a daemon in another mount namespace sees them."""
    try:
        user = os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return []
    folders = [Path(f"/proc/{pid}/root{folder}") for folder in runtime_directories(user)]
    return [folder / name for folder in folders if _is_socket(folder / name)]


def _is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(os.lstat(path).st_mode)
    except OSError:
        return False  # does not exist, or may not be looked at


def open_directory(path: Path) -> tuple[int, int]:
    """Open a directory of sockets that only its owner can enter.

    Returns:
        The descriptor, and the owner's user id.

    Raises:
        MountError: it is a symlink, others can enter it, or it belongs to another user and we are
            not root.
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
    """The directory for the sockets of our own daemons: it is ours and 0700, and made if missing.

    Raises:
        MountError: no directory can be used; the reason is that of the last one.
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
    raise problem or MountError("there is no directory for the control socket; set XDG_RUNTIME_DIR")


def prepare_socket(image: str | os.PathLike[str]) -> Path:
    """The path at which the daemon of an image will serve. Removes stale sockets next to it.

    A socket listens from the moment it has its name (server.py). So a socket that refuses
    connections belonged to a daemon that is gone.

    Raises:
        LockedError: another daemon serves that image.
        MountError: no directory for sockets can be used.
        ImageMissingError, ImageError: as `socket_name`.
    """
    name = socket_name(image)
    directory = make_directory()
    for entry in os.listdir(directory):
        if not entry.endswith(".sock"):
            continue
        try:
            pid = server_pid(directory / entry)
        except ConnectionRefusedError:
            with contextlib.suppress(OSError):  # if it stays, making our socket reports why
                os.unlink(directory / entry)
            continue
        if pid is not None and entry == name:
            who = f"process {pid}" if pid else "a process of another PID namespace"
            raise LockedError(
                f"{os.path.abspath(os.fspath(image))} is in use by {who}; "
                "work on its mount point, or unmount it first"
            )
    return directory / name


def server_pid(path: Path) -> int | None:
    """The pid of the process that serves at a socket.

    Returns:
        0 if the pid is unknown: the server is busy, or in another PID namespace. None if the socket
        does not exist or may not be used.

    Raises:
        ConnectionRefusedError: the server is gone. Nothing else means that.
    """
    try:
        descriptor = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            probe.connect(socket_address(descriptor, path.name))
            return peer(probe)[0]
    except BlockingIOError:
        return 0  # its queue is full
    except ConnectionRefusedError:
        raise
    except OSError:
        return None  # removed meanwhile, or may not be used
    finally:
        os.close(descriptor)


class _Connected(Protocol):
    def getsockopt(self, level: int, name: int, size: int, /) -> bytes: ...


def peer(connection: _Connected) -> tuple[int, int]:
    """The pid and user id of the other end, from when it connected or began to listen.

    The pid is 0 for a process in another PID namespace.
    """
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, user_id, _ = _CREDENTIALS.unpack(data)
    return pid, user_id


def socket_address(directory: int, name: str) -> str:
    """The address of a socket in an open directory. It is short, however long the path is."""
    return f"/proc/self/fd/{directory}/{name}"
