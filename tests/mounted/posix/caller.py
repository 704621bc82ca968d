"""One user who makes system calls on request, for tests that need several users at once.

Run as a program: `caller.py UID GID GROUP,GROUP...` (as root), or without arguments to keep the
present user. It reads requests from standard input and writes answers to standard output. Both are
a length of 4 bytes and then `marshal` data: a request is (name of the call, arguments), an answer
(errno or 0, value). The calls are those of Linux with Python's names; the program knows nothing of
cowfs.
"""

import ctypes
import errno
import marshal
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, BinaryIO

AT_FDCWD = -100
AT_SYMLINK_FOLLOW = 0x400
LIBC = ctypes.CDLL(None, use_errno=True)
STAT_FIELDS = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_ino", "st_dev", "st_rdev")
STAT_FIELDS += ("st_blocks", "st_blksize", "st_atime_ns", "st_mtime_ns", "st_ctime_ns")


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


def _told(result: int) -> int:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _fields(status: os.stat_result) -> dict[str, int]:
    return {name.removeprefix("st_"): getattr(status, name) for name in STAT_FIELDS}


def access(path: str, mode: int) -> None:
    """access(2); Python's os.access() hides the errno."""
    _told(LIBC.access(os.fsencode(path), mode))


def link_followed(old: str, new: str) -> None:
    """linkat(2) to the file that a symbolic link points at."""
    _told(LIBC.linkat(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), AT_SYMLINK_FOLLOW))


def rename_with_flags(old: str, new: str, flags: int) -> None:
    _told(LIBC.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags))


def utimens(path: str | int, times: list[tuple[int, int]] | None, flags: int = 0) -> None:
    """utimensat(2), or futimens(3) for a descriptor: (seconds, nanoseconds) of atime and mtime."""
    wanted = None if times is None else (_Timespec * 2)(*[_Timespec(*each) for each in times])
    if isinstance(path, int):
        _told(LIBC.futimens(path, wanted))
    else:
        _told(LIBC.utimensat(AT_FDCWD, os.fsencode(path), wanted, flags))


def make_socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)


def put(path: str, data: bytes, flags: int = os.O_WRONLY) -> int:
    """Open, write once, close."""
    descriptor = os.open(path, flags, 0o666)
    try:
        return os.write(descriptor, data)
    finally:
        os.close(descriptor)


def take(path: str, size: int = 1 << 20, flags: int = 0) -> bytes:
    """Open, read once, close."""
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        return os.read(descriptor, size)
    finally:
        os.close(descriptor)


def write_direct(path: str, size: int) -> int:
    """Write zeros once with O_DIRECT, from a buffer aligned as it requires."""
    descriptor = os.open(path, os.O_WRONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, size) as memory:
            return os.write(descriptor, memory)
    finally:
        os.close(descriptor)


def touch_open(path: str, flags: int, mode: int = 0o666) -> None:
    """Open and close."""
    os.close(os.open(path, flags, mode))


def open_fast(path: str, flags: int, mode: int = 0o666) -> int:
    return os.open(path, flags, mode)


def list_open(descriptor: int) -> list[str]:
    return sorted(os.listdir(descriptor))


def limit_file_size(size: int) -> None:
    """Set RLIMIT_FSIZE; -1 means no limit. Python ignores SIGXFSZ, so calls fail with EFBIG."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


_RUNNING: list[subprocess.Popen[bytes]] = []


def start_program(path: str, *arguments: str) -> None:
    """Execute a file. Raises the OSError of execve."""
    _RUNNING.append(subprocess.Popen([path, *arguments]))


def await_sleep() -> None:
    """Wait until the program that was started last has begun to sleep; 2 s if no one can tell."""
    for _ in range(2000):
        with open(f"/proc/{_RUNNING[-1].pid}/wchan", encoding="ascii") as place:
            if "sleep" in place.read():
                return
        time.sleep(0.001)


def end_program() -> None:
    program = _RUNNING.pop()
    program.send_signal(signal.SIGKILL)
    program.wait(10)


def unlisted(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: sorted(function(*arguments))


CALLS: dict[str, Callable[..., Any]] = {
    "access": access,
    "chdir": os.chdir,
    "chmod": os.chmod,
    "chown": os.chown,
    "close": os.close,
    "end_program": end_program,
    "fstat": lambda descriptor: _fields(os.fstat(descriptor)),
    "fsync": os.fsync,
    "getxattr": os.getxattr,
    "lchown": os.lchown,
    "limit_file_size": limit_file_size,
    "link": lambda old, new: os.link(old, new, follow_symlinks=False),
    "link_followed": link_followed,
    "listdir": unlisted(os.listdir),
    "list_open": list_open,
    "listxattr": unlisted(os.listxattr),
    "lseek": os.lseek,
    "lstat": lambda path: _fields(os.lstat(path)),
    "make_socket": make_socket,
    "mkdir": os.mkdir,
    "mkdir_at": lambda path, descriptor: os.mkdir(path, dir_fd=descriptor),
    "mkfifo": os.mkfifo,
    "mknod": os.mknod,
    "open": open_fast,
    "open_at": lambda path, flags, descriptor: os.open(path, flags, dir_fd=descriptor),
    "pread": os.pread,
    "put": put,
    "pwrite": os.pwrite,
    "read": os.read,
    "readlink": os.readlink,
    "removexattr": os.removexattr,
    "rename": os.rename,
    "rename_with_flags": rename_with_flags,
    "rmdir": os.rmdir,
    "setxattr": os.setxattr,
    "start_program": start_program,
    "await_sleep": await_sleep,
    "stat": lambda path: _fields(os.stat(path)),
    "statvfs": lambda path: tuple(os.statvfs(path)),
    "symlink": os.symlink,
    "take": take,
    "touch_open": touch_open,
    "truncate": os.truncate,
    "umask": os.umask,
    "unlink": os.unlink,
    "utimens": utimens,
    "write": os.write,
    "write_direct": write_direct,
}


def receive(stream: BinaryIO) -> Any:
    """The next message; None at the end."""
    head = stream.read(4)
    return marshal.loads(stream.read(int.from_bytes(head, "big"))) if len(head) == 4 else None


def send(stream: BinaryIO, message: Any) -> None:
    data = marshal.dumps(message)
    stream.write(len(data).to_bytes(4, "big") + data)
    stream.flush()


def main() -> None:
    if len(sys.argv) > 1:
        uid, gid = int(sys.argv[1]), int(sys.argv[2])
        os.setgroups([int(group) for group in sys.argv[3].split(",") if group])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    os.umask(0)
    os.chdir(tempfile.gettempdir())
    while (request := receive(sys.stdin.buffer)) is not None:
        name, arguments = request
        try:
            send(sys.stdout.buffer, (0, CALLS[name](*arguments)))
        except OSError as error:
            send(sys.stdout.buffer, (error.errno or errno.EIO, None))


if __name__ == "__main__":
    main()
