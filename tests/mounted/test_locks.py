"""Promises of locks between processes: the kernel keeps them, for all users of one mount.

Another process takes or asks for each lock, so that none is tried against its own holder.
"""

import contextlib
import fcntl
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Mounted
from tests.sizes import HANG_SECONDS, wait_until

pytestmark = [pytest.mark.mounted, pytest.mark.xdist_group("locks")]

FLOCK = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length, pid
OTHER = """
import fcntl, os, struct, sys, time
kind, path, start, length = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
file = open(path, "r+b")
if kind == "flock":
    fcntl.flock(file, fcntl.LOCK_EX)
elif kind == "ofd":
    lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, start, length, 0)
    fcntl.fcntl(file, fcntl.F_OFD_SETLKW, lock)
else:
    fcntl.lockf(file, fcntl.LOCK_EX, length, start)
print("held", flush=True)
sys.stdin.readline()
if kind == "cross":
    try:
        fcntl.lockf(file, fcntl.LOCK_EX, length, 0)
    except OSError as error:
        print(error.errno, flush=True)
    else:
        print("got it", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def file(module_mount: Mounted, request: pytest.FixtureRequest) -> Path:
    """A file of 100 bytes."""
    path: Path = module_mount.path / request.node.name.replace("/", "_")
    path.write_bytes(bytes(100))
    return path


@contextlib.contextmanager
def other(
    kind: str, path: Path, start: int = 0, length: int = 10
) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a lock; a line on its input ends it."""
    with subprocess.Popen(
        [sys.executable, "-c", OTHER, kind, path, str(start), str(length)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def seen_by(
    stream: object, start: int, length: int, command: int = fcntl.F_GETLK
) -> tuple[int, ...]:
    """F_GETLK's answer about a write lock: type, whence, start, length, pid."""
    asked = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    return FLOCK.unpack(fcntl.fcntl(stream, command, asked))  # type: ignore[call-overload,no-any-return]


def test_record_locks_of_another_process_are_seen_and_respected(file: Path) -> None:
    """Promise: fcntl locks hold between processes, by ranges, and F_GETLK names the holder."""
    with open(file, "r+b") as stream, other("record", file, 20, 10) as process:
        with pytest.raises(BlockingIOError):
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB, 5, 25)
        with pytest.raises(BlockingIOError):
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB, 20, 0)
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 30)
        assert seen_by(stream, 0, 0) == (fcntl.F_WRLCK, os.SEEK_SET, 20, 10, process.pid)
        assert seen_by(stream, 40, 1)[0] == fcntl.F_UNLCK


def test_record_locks_end_with_any_descriptor_and_with_the_process(file: Path) -> None:
    """Promise: as in POSIX, closing any descriptor of the file, or exit, releases the locks."""
    with open(file, "r+b") as stream:
        with other("record", file) as process:
            process.send_signal(signal.SIGKILL)
            process.wait(timeout=HANG_SECONDS)
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(os.open(file, os.O_RDONLY))
        with other("record", file):  # would wait forever if our lock were still held
            pass


def test_open_file_locks_belong_to_the_open_file(file: Path) -> None:
    """Promise: OFD locks hold between two descriptors of a process; each survives other closes."""
    exclusive = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 50, 0)
    with open(file, "r+b") as one, open(file, "r+b") as two:
        fcntl.fcntl(one, fcntl.F_OFD_SETLK, exclusive)
        with pytest.raises(BlockingIOError):
            fcntl.fcntl(two, fcntl.F_OFD_SETLK, exclusive)
        os.close(os.open(file, os.O_RDONLY))
        assert seen_by(two, 0, 0, fcntl.F_OFD_GETLK)[:4] == (fcntl.F_WRLCK, os.SEEK_SET, 0, 50)
        duplicate = os.dup(one.fileno())
        one.close()
        with pytest.raises(BlockingIOError):
            fcntl.fcntl(two, fcntl.F_OFD_SETLK, exclusive)
        os.close(duplicate)
        fcntl.fcntl(two, fcntl.F_OFD_SETLK, exclusive)
    with open(file, "r+b") as stream, other("ofd", file), pytest.raises(BlockingIOError):
        fcntl.lockf(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_flock_holds_between_processes_and_is_shared_or_exclusive(file: Path) -> None:
    """Promise: flock(2) gives many shared locks or one exclusive, released at the last close."""
    with open(file, "rb") as one, open(file, "rb") as two:
        fcntl.flock(one, fcntl.LOCK_SH)
        fcntl.flock(two, fcntl.LOCK_SH | fcntl.LOCK_NB)
        with pytest.raises(BlockingIOError):
            fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
        one.close()
        fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with open(file, "rb") as stream, other("flock", file) as process:
        with pytest.raises(BlockingIOError):
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        process.kill()
        fcntl.flock(stream, fcntl.LOCK_EX)  # waits until the other process ends


def test_crossed_waits_are_refused_as_a_deadlock(file: Path) -> None:
    """Promise: if two processes wait for each other's locks, one gets EDEADLK and none hangs."""
    with open(file, "r+b") as stream:
        fcntl.lockf(stream, fcntl.LOCK_EX, 10, 0)
        with other("cross", file, 50, 10) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()  # it now waits for our first ten bytes
            waits = f"-> POSIX  ADVISORY  WRITE {process.pid} "
            wait_until(lambda: waits in Path("/proc/locks").read_text(), "it does not wait")
            with pytest.raises(OSError, match="deadlock"):
                fcntl.lockf(stream, fcntl.LOCK_EX, 10, 50)
            fcntl.lockf(stream, fcntl.LOCK_UN, 10, 0)
            assert process.stdout.readline() == "got it\n"


def test_lease_is_broken_by_another_open(file: Path) -> None:
    """Promise: a lease's holder is signalled before another process opens the file.

    If there are no leases, asking for one is EAGAIN: a lease that is granted is kept.
    """
    descriptor = os.open(file, os.O_RDONLY)
    told: list[int] = []
    before = signal.signal(signal.SIGIO, lambda number, frame: told.append(number))
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        assert fcntl.fcntl(descriptor, fcntl.F_GETLEASE) == fcntl.F_RDLCK
        with pytest.raises(BlockingIOError):
            os.open(file, os.O_WRONLY | os.O_NONBLOCK)
        assert told == [signal.SIGIO]
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        os.close(os.open(file, os.O_WRONLY | os.O_NONBLOCK))
    finally:
        signal.signal(signal.SIGIO, before)
        os.close(descriptor)
