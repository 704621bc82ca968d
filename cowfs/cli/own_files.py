"""Files that commands write for their user and read again: results, caches, reports.

Another user who can write to the directory may have put anything at the path. So a read accepts
only a regular file of this user: it does not block on a fifo, follows no symbolic link, and its
size is bounded. A write makes a new file and renames it over the path: the old file is never
written to, and the path always shows a whole file.
"""

import os
import stat
from collections.abc import Iterable
from pathlib import Path

Data = bytes | bytearray | memoryview


def own_directory(variable: str, root: str, home: str) -> Path:
    """The directory of this user's files of one kind.

    Args:
        variable: the XDG variable whose directory comes first, if it is absolute.
        root: the absolute directory for root, without the variable.
        home: the directory below the home for everybody else.
    """
    base = os.environ.get(variable, "")
    if os.geteuid() == 0 and not base:
        return Path(root) / "cowfs"
    return (Path(base) if base.startswith("/") else Path.home() / home) / "cowfs"


def read_own(path: Path, size_bytes_max: int) -> bytes | None:
    """Read a file that this user wrote.

    Returns:
        Its bytes; None if it cannot be opened, is no regular file, belongs to another user, or is
        larger than `size_bytes_max`.

    Raises:
        OSError: reading failed.
    """
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
    """Write a new file and rename it over `path`. Raises OSError."""
    fresh = path.with_name(f".{path.name[:200]}.{os.getpid()}")
    fresh.unlink(missing_ok=True)  # left by a killed process of the same number
    make_file(fresh, parts, mode=mode)
    try:
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def make_file(path: Path, parts: Iterable[Data], *, mode: int = 0o600) -> None:
    """Write a new file. Raises FileExistsError if anything is at `path`, even a link; OSError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, mode)
    try:
        with open(descriptor, "wb") as file:
            for part in parts:
                file.write(part)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
