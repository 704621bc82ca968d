"""Promises of mappings: what one process stores in mapped memory, all see in the file.

A test whose mapping ends in a signal runs it in a child process.
"""

import errno
import mmap
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.conftest import Mounted
from tests.sizes import HANG_SECONDS

pytestmark = [pytest.mark.mounted, pytest.mark.xdist_group("mmap")]

PAGE = mmap.PAGESIZE


@pytest.fixture
def folder(module_mount: Mounted, request: pytest.FixtureRequest) -> Path:
    """An empty directory on the mount."""
    place: Path = module_mount.path / request.node.name
    place.mkdir()
    return place


def run_child(program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a Python program in another process; the caller checks its exit."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )


def test_shared_mapping_is_one_memory_for_several_processes(folder: Path) -> None:
    """Promise: processes that map one file see each other's stores, and so does read()."""
    file = folder / "file"
    file.write_bytes(bytes(8 * PAGE))
    program = """
        import mmap, os, sys
        file, number = open(sys.argv[1], "r+b"), int(sys.argv[2])
        with mmap.mmap(file.fileno(), 0) as memory:
            for page in range(8):
                memory[page * mmap.PAGESIZE + number] = number + 1
            # the byte of the process before this one, stored by another process
            sys.exit(0 if number == 0 or memory[number - 1] == number else 1)
    """
    with open(file, "r+b") as stream, mmap.mmap(stream.fileno(), 0) as memory:
        for number in range(4):
            assert run_child(program, file, str(number)).returncode == 0
            assert memory[5 * PAGE + number] == number + 1
        assert bytes(memory[:5]) == b"\1\2\3\4\0"
        assert os.pread(stream.fileno(), 5, 7 * PAGE) == b"\1\2\3\4\0"
    assert file.read_bytes() == (b"\1\2\3\4".ljust(PAGE, b"\0")) * 8


def test_private_mapping_never_reaches_the_file(folder: Path) -> None:
    """Promise: stores in a private mapping stay with the process."""
    file = folder / "file"
    contents = os.urandom(3 * PAGE)
    file.write_bytes(contents)
    with open(file, "rb") as stream:
        memory = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        memory[PAGE : PAGE + 7] = b"private"
        memory.flush()
        assert file.read_bytes() == contents
        # an untouched page follows the file
        with open(file, "r+b") as writer:
            writer.write(b"written")
        assert memory[:7] == b"written"
        assert memory[PAGE : PAGE + 7] == b"private"
        memory.close()


@pytest.mark.needs_cowfs
def test_msync_is_durable_when_it_returns(mount: Mounted) -> None:
    """Promise C2: data covered by msync(MS_SYNC) survives an immediate kill of the daemon."""
    file = mount.path / "file"
    file.write_bytes(bytes(64 * PAGE))
    with open(file, "r+b") as stream:
        memory = mmap.mmap(stream.fileno(), 0)
        for page in range(64):
            memory[page * PAGE + 17] = page + 1
        memory.flush()
        mount.kill()
        with pytest.raises(OSError) as caught:  # noqa: PT011  # the kernel says the daemon is gone
            os.fstat(stream.fileno())
        # The second errno comes while the kernel is still ending the connection.
        assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
        memory.close()
    mount.check()
    mount.remount()
    found = file.read_bytes()
    assert [found[page * PAGE + 17] for page in range(64)] == list(range(1, 65))


def test_truncate_under_a_mapping_is_a_bus_error_beyond_the_end(folder: Path) -> None:
    """Promise: mapped pages beyond the new end give SIGBUS, those before it stay."""
    file = folder / "file"
    file.write_bytes(b"x" * 4 * PAGE)
    program = """
        import mmap, os, sys
        file = open(sys.argv[1], "r+b")
        memory = mmap.mmap(file.fileno(), 0)
        memory[3 * mmap.PAGESIZE] = 1
        os.truncate(sys.argv[1], mmap.PAGESIZE + 10)
        assert memory[mmap.PAGESIZE + 9] == ord("x")
        assert memory[mmap.PAGESIZE + 10] == 0  # the rest of the last page
        print("alive", flush=True)
        memory[2 * mmap.PAGESIZE]
    """
    done = run_child(program, file)
    assert done.stdout == "alive\n", done.stderr
    assert done.returncode == -signal.SIGBUS
    os.truncate(file, 4 * PAGE)
    assert file.read_bytes() == (b"x" * (PAGE + 10)).ljust(4 * PAGE, b"\0")


def test_rest_of_the_last_page_is_zero_and_never_stored(
    folder: Path, module_mount: Mounted
) -> None:
    """Promise: bytes stored beyond the end in the last page stay zero when the file grows."""
    file = folder / "file"
    file.write_bytes(b"y" * (PAGE + 100))
    with open(file, "r+b") as stream, mmap.mmap(stream.fileno(), PAGE + 100) as memory:
        memory[50] = 1
    # Python's mmap ends with the file; the C library's reaches the end of the page.
    program = """
        import ctypes, mmap, os, sys
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        file = os.open(sys.argv[1], os.O_RDWR)
        size = 2 * mmap.PAGESIZE
        at = libc.mmap(None, size, 3, 1, file, 0)
        memory = (ctypes.c_ubyte * size).from_address(at)
        assert bytes(memory[mmap.PAGESIZE + 100:]) == bytes(mmap.PAGESIZE - 100)
        memory[mmap.PAGESIZE + 100] = 7
        memory[mmap.PAGESIZE + 99] = 8
        libc.msync(ctypes.c_void_p(at), size, 4)
        assert os.fstat(file).st_size == mmap.PAGESIZE + 100
        libc.munmap(ctypes.c_void_p(at), size)
        os.fsync(file)
    """
    done = run_child(program, file)
    assert done.returncode == 0, done.stderr
    os.truncate(file, 2 * PAGE)
    expected = bytearray((b"y" * (PAGE + 100)).ljust(2 * PAGE, b"\0"))
    expected[50], expected[PAGE + 99] = 1, 8
    assert file.read_bytes() == expected
    module_mount.remount()
    assert file.read_bytes() == expected


def test_mapping_outlives_the_name_and_the_descriptor(folder: Path) -> None:
    """Promise: a mapped file without a name keeps its contents, also those written later."""
    file = folder / "file"
    contents = os.urandom(300_000)
    file.write_bytes(contents)
    with open(file, "r+b") as stream:
        memory = mmap.mmap(stream.fileno(), 0)
    file.unlink()
    file.write_bytes(b"another")
    memory[100_000:100_003] = b"new"
    memory.flush()
    memory.madvise(mmap.MADV_DONTNEED)  # read again, from the file without a name
    assert memory[:100_000] == contents[:100_000]
    assert memory[100_000:100_003] == b"new"
    assert memory[100_003:] == contents[100_003:]
    memory.close()
    assert file.read_bytes() == b"another"


def test_mapping_and_calls_see_each_other_at_every_step(folder: Path) -> None:
    """Promise: stores, write(), read(), truncate() and append on a file see each other in order."""
    file = folder / "file"
    size = 16 * PAGE
    file.write_bytes(bytes(size))
    expected = bytearray(size)
    with (
        open(file, "r+b", buffering=0) as stream,
        open(file, "ab", buffering=0) as appender,
        mmap.mmap(stream.fileno(), size) as memory,
    ):
        for step in range(200):
            at = (step * 7919) % (size - 100)
            value = bytes([step % 255 + 1]) * 100
            if step % 2:
                memory[at : at + 100] = value
            else:
                assert os.pwrite(stream.fileno(), value, at) == 100
            expected[at : at + 100] = value
            assert os.pread(stream.fileno(), 100, at) == value
            assert memory[at : at + 100] == value
            if step % 20 == 0:
                assert appender.write(b"tail") == 4
                expected += b"tail"
            if step % 50 == 0:
                memory.flush()
        assert memory[:] == expected[:size]
    assert file.read_bytes() == expected


def test_read_only_mapping_refuses_stores_and_protection_can_be_changed(folder: Path) -> None:
    """Promise: mprotect allows what the descriptor allows, and code can run from a mapping."""
    file = folder / "code"
    file.write_bytes(bytes.fromhex("b82a000000c3").ljust(PAGE, b"\x90"))  # mov eax, 42; ret
    program = """
        import ctypes, mmap, os, platform, sys
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        file = os.open(sys.argv[1], os.O_RDONLY)
        at = libc.mmap(None, mmap.PAGESIZE, 1, 1, file, 0)
        # write permission on a shared mapping of a descriptor for reading
        assert libc.mprotect(ctypes.c_void_p(at), mmap.PAGESIZE, 3) == -1
        assert ctypes.get_errno() == 13
        assert libc.mprotect(ctypes.c_void_p(at), mmap.PAGESIZE, 5) == 0
        if platform.machine() == "x86_64":
            assert ctypes.CFUNCTYPE(ctypes.c_int)(at)() == 42
        print("alive", flush=True)
        ctypes.memset(at, 0, 1)
    """
    done = run_child(program, file)
    assert done.stdout == "alive\n", done.stderr
    assert done.returncode == -signal.SIGSEGV
    assert file.read_bytes().startswith(bytes.fromhex("b82a000000c3"))


def test_mapping_of_a_hole_stores_only_what_was_touched(folder: Path) -> None:
    """Promise: a store into a hole fills only that page."""
    file = folder / "sparse"
    with open(file, "w+b") as stream:
        stream.truncate(1 << 30)
        with mmap.mmap(stream.fileno(), 1 << 30) as memory:
            memory[(1 << 29) + 5] = 9
            memory.flush()
            assert memory[(1 << 29) + 4 : (1 << 29) + 7] == b"\0\x09\0"
        os.fsync(stream.fileno())
        assert os.fstat(stream.fileno()).st_blocks * 512 <= 1 << 20
