"""The image file or block device: the only file of cowfs that reads and writes it.

`Device` is the seam: tests inject faults with another class of the same methods, and other backends
would be such classes. All offsets and sizes are in bytes. A short read or write is repeated until
it is whole; a refusal of the host is a `DeviceError`. A writer holds an exclusive lock on the file
while it is open, a read-only mount a shared one. The kernel drops the lock when the process ends.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from typing import Protocol

from cowfs.errors import DeviceError, ImageError, ImageMissingError, LockedError

Buffer = bytes | bytearray | memoryview

_BLKGETSIZE64 = 0x80081272
_BLKDISCARD = 0x1277
_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2
# Size of one call to the host: 1 MiB takes 0.35 ms of CPU, 4 MiB six times as much for each MiB.
_WRITE_BYTES_MAX = 1 << 20
_IOV_MAX = 1024
# Longer runs leave the host's cache after a flush: the mount's own cache holds what was written.
_FORGET_BYTES_MIN = 1 << 20
_OFD_FLOCK = struct.Struct("hhqqi4x")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate64.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class Device(Protocol):
    """Durable bytes.

    One thread writes at a time. Reads may come from any thread, and so may discards of ranges that
    nobody writes.
    """

    size_bytes: int
    name: str

    def read(self, offset: int, size: int) -> bytes:
        """Read exactly `size` bytes. Raises DeviceError, also where the device ends before."""

    def read_cached(self, offset: int, size: int) -> Buffer | None:
        """Read `size` bytes if that needs no wait for the disk, else return None."""

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Write all buffers, one after the other, from `offset` on. Raises DeviceError."""

    def flush(self) -> None:
        """Make all writes that have returned durable. Raises DeviceError."""

    def discard(self, offset: int, size: int) -> bool:
        """Hint that the range has no content any more. Returns whether the host took it back."""

    def prefetch(self, offset: int, size: int) -> None:
        """Hint that the range will be read soon. Never fails."""

    def close(self) -> None: ...


class FileDevice:
    """A regular file or a block device, as a `Device`.

    Args:
        path: of the image.
        writable: take the exclusive lock and allow `write`.
        steady: without `writable`, take the shared lock, which keeps writers away.

    Attributes:
        is_file: whether it is a regular file.

    Raises:
        ImageMissingError: no such file.
        LockedError: another process has a lock; the message names its pid.
        ImageError: not a file or block device, or it cannot be opened.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, writable: bool, steady: bool = False
    ) -> None:
        self.name = os.path.abspath(os.fspath(path))
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
        try:
            status = os.stat(self.name)  # before open: opening a fifo would wait for its writer
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
                raise ImageError(f"{self.name} is not a regular file or a block device")
            self._fd = os.open(self.name, flags)
        except FileNotFoundError:
            raise ImageMissingError(
                f"there is no image {self.name}; cowfs mkfs makes one"
            ) from None
        except ImageError:
            raise
        except OSError as error:
            raise ImageError(f"cannot open {self.name}: {error.strerror}") from None
        self._to_forget: list[tuple[int, int]] = []  # long runs written since the last flush
        self.is_file = stat.S_ISREG(status.st_mode)
        try:
            if writable or steady:
                self._lock(fcntl.F_WRLCK if writable else fcntl.F_RDLCK)
            if self.is_file:
                self.size_bytes = os.fstat(self._fd).st_size
            else:
                reply = fcntl.ioctl(self._fd, _BLKGETSIZE64, bytes(8))
                self.size_bytes = int.from_bytes(reply, "little")
        except BaseException:
            os.close(self._fd)
            raise

    def _lock(self, kind: int) -> None:
        request = _OFD_FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0)
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, request)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise ImageError(f"cannot lock {self.name}: {error.strerror}") from None
            pid = lock_holder(self._fd)
            holder = f"process {pid}" if pid else "another process"
            raise LockedError(
                f"{self.name} is in use by {holder}; work on its mount point, or unmount it first"
            ) from None

    def read(self, offset: int, size: int) -> bytes:
        try:
            data = os.pread(self._fd, size, offset)
            while len(data) < size:
                more = os.pread(self._fd, size - len(data), offset + len(data))
                if not more:
                    raise DeviceError(
                        f"cannot read {self.name}: it ends at byte {offset + len(data)}, "
                        f"{size - len(data)} bytes too early; is it truncated?"
                    )
                data += more
        except DeviceError:
            raise
        except OverflowError:
            raise DeviceError(f"cannot read {self.name} at {offset}: no file is so long") from None
        except OSError as error:
            raise DeviceError(f"cannot read {self.name} at {offset}: {error.strerror}") from error
        return data

    def read_cached(self, offset: int, size: int) -> Buffer | None:
        buffer = bytearray(size)
        try:
            if os.preadv(self._fd, [buffer], offset, os.RWF_NOWAIT) == size:
                return buffer
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:  # the host cannot read without waiting
                return self.read(offset, size)
        return None

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        start = offset
        try:
            for batch in _batches(buffers):
                while batch:
                    written = os.pwritev(self._fd, batch, offset)
                    if not written:
                        raise OSError(errno.EIO, "nothing was written")
                    offset += written
                    batch = _rest(batch, written)
        except OSError as error:
            raise DeviceError(f"cannot write {self.name} at {offset}: {error.strerror}") from error
        if offset - start >= _FORGET_BYTES_MIN:
            self._to_forget.append((start, offset - start))

    def flush(self) -> None:
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise DeviceError(f"cannot flush {self.name}: {error.strerror}") from error
        for offset, size in self._to_forget:
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._fd, offset, size, os.POSIX_FADV_DONTNEED)
        self._to_forget.clear()

    def discard(self, offset: int, size: int) -> bool:
        if self.is_file:
            mode = _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE
            return bool(_libc.fallocate64(self._fd, mode, offset, size) == 0)
        try:
            fcntl.ioctl(self._fd, _BLKDISCARD, struct.pack("<QQ", offset, size))
        except OSError:
            return False
        return True

    def prefetch(self, offset: int, size: int) -> None:
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._fd, offset, size, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _batches(buffers: Sequence[Buffer]) -> Iterator[list[Buffer]]:
    """Group the buffers, in order, so that one call to the host takes each group."""
    batch: list[Buffer] = []
    size = 0
    for buffer in buffers:
        if batch and (size + len(buffer) > _WRITE_BYTES_MAX or len(batch) == _IOV_MAX):
            yield batch
            batch, size = [], 0
        batch.append(buffer)
        size += len(buffer)
    if batch:
        yield batch


def _rest(batch: list[Buffer], written: int) -> list[Buffer]:
    """The rest of `batch` after its first `written` bytes."""
    for index, buffer in enumerate(batch):
        size = len(buffer)
        if written < size:
            tail = memoryview(buffer)[written:] if written else buffer
            return [tail, *batch[index + 1 :]]
        written -= size
    return []


def lock_holder(fd: int) -> int | None:
    """The pid of a process that holds a lock on the file of `fd`, if one can be found.

    The kernel does not name the holder of an open-file-description lock, so /proc is searched.
    """
    wanted = os.fstat(fd)
    for pid in filter(str.isdigit, os.listdir("/proc")):
        if int(pid) == os.getpid():
            continue
        try:
            for name in os.listdir(f"/proc/{pid}/fd"):
                status = os.stat(f"/proc/{pid}/fd/{name}")
                if (status.st_dev, status.st_ino) != (wanted.st_dev, wanted.st_ino):
                    continue
                with open(f"/proc/{pid}/fdinfo/{name}") as info:
                    if "OFDLCK" in info.read():
                        return int(pid)
        except OSError:
            continue  # it ended, or belongs to another user
    return None


def is_locked(path: str | os.PathLike[str]) -> bool | None:
    """Whether a process has the image locked; None where that cannot be found out."""
    try:
        if not (stat.S_ISREG(os.stat(path).st_mode) or stat.S_ISBLK(os.stat(path).st_mode)):
            return None
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        request = _OFD_FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, request)
        return bool(_OFD_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def find_lock_holder(path: str | os.PathLike[str]) -> int | None:
    """The pid of a process that has the image locked, if one can be found."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return lock_holder(descriptor)
    finally:
        os.close(descriptor)


def create_file(path: str | os.PathLike[str], size_bytes: int) -> None:
    """Make a sparse file of `size_bytes`, or set the size of an existing file.

    Raises:
        ImageError: with the host's reason.
    """
    try:
        with open(path, "ab") as file:
            os.ftruncate(file.fileno(), size_bytes)
    except OSError as error:
        raise ImageError(f"cannot make {os.fspath(path)}: {error.strerror}") from None
