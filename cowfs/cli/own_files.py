"""Files that commands write for their user and read again: results, caches, pages.

Whoever may write into a directory can put anything under a name there. So a read takes a regular file
of this user alone: it waits for no fifo, follows no link, and is bounded. A write makes a new file and
gives it the name: what had the name is replaced, never written into, and is whole at every moment.
"""

import os
import stat
from collections.abc import Iterable
from pathlib import Path

Data = bytes | bytearray | memoryview


def read_own(path: Path, size_bytes_max: int) -> bytes | None:
    """What a file holds; None where it cannot be one of ours, or not be opened. Raises OSError."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags)
    except OSError:
        return None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            return None
        if status.st_size > size_bytes_max:
            return None
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(status.st_size)
    finally:
        os.close(descriptor)


def replace_file(path: Path, parts: Iterable[Data], *, mode: int = 0o600) -> None:
    """Let a new file with these bytes have the name. Raises OSError as the host does."""
    fresh = path.with_name(f".{path.name[:200]}.{os.getpid()}")
    fresh.unlink(missing_ok=True)  # of a process that was killed
    make_file(fresh, parts, mode=mode)
    try:
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def make_file(path: Path, parts: Iterable[Data], *, mode: int = 0o600) -> None:
    """The same where nothing has the name, no link either. Raises FileExistsError, OSError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, mode)
    try:
        with open(descriptor, "wb") as file:
            for part in parts:
                file.write(part)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
