"""Promise: whatever calls and mappings do to a file, in any order, it equals a plain array.

Random work goes on a few files, through several descriptors and a mapping, and each result is
compared with a model in memory; with and without the kernel's write-back cache. A failure names the
seed, and `--seed` repeats it.
"""

import ctypes
import errno
import mmap
import os
import random
from pathlib import Path

import pytest

from tests.conftest import FAILED, mounted
from tests.sizes import chosen_seed, sized

STEPS = sized(600, 1500)
SEED = chosen_seed(1)
SIZE_MAX = 1 << 20
PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)

pytestmark = [pytest.mark.mounted]


class File:
    """One file, opened several times, and the contents it should have."""

    def __init__(self, path: Path, choice: random.Random) -> None:
        self.path = path
        self.choice = choice
        self.expected = bytearray()
        self.mtime_ns = 0
        self.files = [self]  # the files that it may copy from
        flags = os.O_CREAT | os.O_RDWR
        self.plain = os.open(path, flags)
        self.appending = os.open(path, flags | os.O_APPEND)
        self.writing = os.open(path, os.O_WRONLY)
        self.direct = os.open(path, flags | os.O_DIRECT)

    def close(self) -> None:
        for descriptor in (self.plain, self.appending, self.writing, self.direct):
            os.close(descriptor)

    def step(self) -> None:
        """Make one random change and one random check."""
        getattr(self, self.choice.choice(self.CHANGES))()
        status = os.fstat(self.choice.choice((self.plain, self.writing)))
        assert status.st_size == len(self.expected), "size"
        if self.mtime_ns:
            assert status.st_mtime_ns == self.mtime_ns, "mtime"
        getattr(self, self.choice.choice(self.LOOKS))()

    def place(self) -> tuple[int, int]:
        """A random offset near existing data, and a size."""
        offset = self.choice.randrange(min(SIZE_MAX, len(self.expected) + 3 * PAGE))
        if self.choice.random() < 0.3:
            offset -= offset % PAGE
        return offset, self.choice.choice((1, 100, 511, PAGE - 1, PAGE, PAGE + 1, 20_000, 140_000))

    def put(self, offset: int, data: bytes) -> None:
        if len(self.expected) < offset:
            self.expected.extend(bytes(offset - len(self.expected)))
        self.expected[offset : offset + len(data)] = data
        self.mtime_ns = 0

    # --- changes

    def write(self) -> None:
        offset, size = self.place()
        data = self.choice.randbytes(size)
        descriptor = self.choice.choice((self.plain, self.writing))
        assert os.pwrite(descriptor, data, offset) == size
        self.put(offset, data)

    def write_direct(self) -> None:
        offset = self.place()[0] // PAGE * PAGE
        data = self.choice.randbytes(self.choice.randint(1, 8) * PAGE)
        with mmap.mmap(-1, len(data)) as buffer:
            buffer[:] = data
            assert os.pwrite(self.direct, buffer, offset) == len(data)
        self.put(offset, data)

    def append(self) -> None:
        data = self.choice.randbytes(self.place()[1])
        if len(self.expected) + len(data) < SIZE_MAX:
            assert os.write(self.appending, data) == len(data)
            self.put(len(self.expected), data)

    def cut(self) -> None:
        size = self.choice.randrange(min(SIZE_MAX, 2 * len(self.expected) + PAGE))
        os.ftruncate(self.choice.choice((self.plain, self.writing)), size)
        del self.expected[size:]
        self.expected.extend(bytes(size - len(self.expected)))
        self.mtime_ns = 0

    def cut_by_opening(self) -> None:
        if self.choice.random() < 0.1:
            os.close(os.open(self.path, os.O_WRONLY | os.O_TRUNC))
            self.expected.clear()
            self.mtime_ns = 0

    def store(self) -> None:
        if not self.expected:
            return
        with mmap.mmap(self.plain, len(self.expected)) as memory:
            for _ in range(self.choice.randint(1, 5)):
                offset = self.choice.randrange(len(self.expected))
                data = self.choice.randbytes(min(300, len(self.expected) - offset))
                memory[offset : offset + len(data)] = data
                self.put(offset, data)
            if self.choice.random() < 0.5:
                memory.flush()

    def sync(self) -> None:
        os.fsync(self.choice.choice((self.plain, self.direct)))

    def punch(self) -> None:
        """fallocate(2): PUNCH_HOLE | KEEP_SIZE."""
        offset, size = self.place()
        if LIBC.fallocate(self.plain, 3, ctypes.c_int64(offset), ctypes.c_int64(size)) == -1:
            raise OSError(ctypes.get_errno(), "fallocate")
        stop = min(len(self.expected), offset + size)
        if offset < stop:
            self.expected[offset:stop] = bytes(stop - offset)
        self.mtime_ns = 0

    def copy(self) -> None:
        """copy_file_range(2), from another file, or within the file, ahead or back."""
        origin = self.choice.choice(self.files)
        source, size = origin.place()
        target = self.place()[0]
        if self.choice.random() < 0.6:  # whole blocks may be shared
            source, target = source // PAGE * PAGE, target // PAGE * PAGE
        size = min(size, len(origin.expected) - source)
        if origin is self:
            size = min(size, abs(target - source))
        if size > 0:
            data = bytes(origin.expected[source : source + size])
            count = os.copy_file_range(origin.plain, self.plain, size, source, target)
            assert 0 < count <= size
            self.put(target, data[:count])

    def date(self) -> None:
        self.mtime_ns = self.choice.randrange(10**18, 2 * 10**18)
        os.utime(self.path, ns=(self.mtime_ns, self.mtime_ns))

    CHANGES = (
        *("write",) * 6,
        *("append", "cut", "store") * 2,
        *("write_direct", "cut_by_opening", "sync", "date", "punch", "copy", "copy"),
    )

    # --- looks

    def read(self) -> None:
        offset, size = self.place()
        found = os.pread(self.plain, size, offset)
        assert found == self.expected[offset : offset + size], f"read of {size} at {offset}"

    def read_direct(self) -> None:
        offset = self.place()[0] // PAGE * PAGE
        with mmap.mmap(-1, 16 * PAGE) as buffer:
            count = os.preadv(self.direct, [buffer], offset)
            assert buffer[:count] == self.expected[offset : offset + 16 * PAGE], (
                f"direct read at {offset}"
            )

    def read_again(self) -> None:
        """Read the whole file, after dropping the kernel's pages as far as it allows."""
        os.posix_fadvise(self.plain, 0, 0, os.POSIX_FADV_DONTNEED)
        self.read_whole()

    def read_whole(self) -> None:
        assert self.path.read_bytes() == self.expected, "contents"

    def seek(self) -> None:
        """Bytes that SEEK_DATA and SEEK_HOLE count as a hole must be zeros."""
        at = 0
        while at < len(self.expected):
            try:
                data = os.lseek(self.plain, at, os.SEEK_DATA)
            except OSError as error:
                assert error.errno == errno.ENXIO
                data = len(self.expected)
            assert not any(self.expected[at:data]), f"SEEK_DATA at {at} skips data"
            if data == len(self.expected):
                break
            at = os.lseek(self.plain, data, os.SEEK_HOLE)

    LOOKS = ("seek", "read", "read", "read", "read_direct", "read_again", "read_whole")


@pytest.mark.parametrize(
    "options", [pytest.param("nowriteback", id="off"), pytest.param("writeback", id="on")]
)
def test_random_work_on_files_gives_what_an_array_would(
    tmp_path: Path, request: pytest.FixtureRequest, options: str
) -> None:
    """Promise: sizes, times and contents are right at every step, in snapshots, after a remount."""
    with mounted(
        tmp_path / "cowfs",
        lambda: request.node.stash.get(FAILED, False),
        mount_options=("-o", f"{options},commit=0.3"),
    ) as mount:
        choice = random.Random(SEED)
        files = [File(mount.path / f"file {number}", choice) for number in range(3)]
        for file in files:
            file.files = files
        step = 0
        try:
            for step in range(STEPS):
                choice.choice(files).step()
                if step % 300 == 299:
                    snapshot = mount.snapshot(f"s{step}")
                    for file in files:
                        assert (snapshot / file.path.name).read_bytes() == file.expected, "snapshot"
        except (AssertionError, OSError) as error:
            raise AssertionError(f"seed {SEED}, step {step}: {error}") from error
        finally:
            for file in files:
                file.close()
        before = [os.stat(file.path) for file in files]
        mount.remount()
        for file, status in zip(files, before, strict=True):
            assert file.path.read_bytes() == file.expected, f"seed {SEED}, after the remount"
            now = os.stat(file.path)
            assert (now.st_size, now.st_mtime_ns, now.st_ctime_ns) == (
                status.st_size,
                status.st_mtime_ns,
                status.st_ctime_ns,
            ), f"seed {SEED}, after the remount"
