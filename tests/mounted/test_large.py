"""Promises for many entries, many files, deep paths, long files, and lists that change.

The sizes are small here, so that they run with all tests; `--long` makes a directory of a million
entries and half a million files, which takes half an hour. Rates and memory are printed.
"""

import contextlib
import os
import resource
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.commands import run_command
from tests.conftest import FAILED, Mounted, mounted, require_success
from tests.sizes import HANG_SECONDS, sized

ENTRIES = sized(10_000, 1_000_000)
FILES = sized(6_000, 500_000)
PARTS = 10
# The last part of a million entries does not find all nodes in the cache; and the speed of the
# machines that run the tests varies.
SLOWDOWN_MAX = 8
# Growth of the daemon's memory since its start, with cache=16M and dirty=16M.
GROWTH_MIB_MAX = 250

pytestmark = [pytest.mark.mounted]

Record = Callable[[str, object], None]


@pytest.fixture
def folder(module_mount: Mounted, request: pytest.FixtureRequest) -> Path:
    """An empty directory on the mount."""
    place: Path = module_mount.path / request.node.name
    place.mkdir()
    return place


@pytest.fixture
def small(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Mounted]:
    """A mount with small caches."""
    with mounted(
        tmp_path / "cowfs",
        lambda: request.node.stash.get(FAILED, False),
        size="16G",
        mount_options=("-o", "cache=16M,dirty=16M"),
    ) as mount:
        yield mount


def memory_mib(mount: Mounted) -> float:
    pages = int(Path(f"/proc/{mount.daemon_pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / (1 << 20)


def busy_seconds(mount: Mounted) -> float:
    """CPU seconds of this process and the daemon: other load on the machine does not count."""
    busy = time.process_time()
    if mount.daemon_pid is not None:
        nanoseconds = 0
        for thread in Path(f"/proc/{mount.daemon_pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                nanoseconds += int((thread / "schedstat").read_text(encoding="ascii").split()[0])
        busy += nanoseconds / 1e9
    return busy


def rates(mount: Mounted, count: int, steps: Iterator[object]) -> list[float]:
    """Steps per second of CPU, for each tenth of `count` steps."""
    found = []
    start = busy_seconds(mount)
    done = 0
    for done, _ in enumerate(steps, 1):
        if not done % (count // PARTS):
            now = busy_seconds(mount)
            found.append(count // PARTS / max(now - start, 1e-9))
            start = now
    assert done == count, f"{done} instead of {count}"
    return found


def drop_kernel_caches() -> None:
    """As root, make the kernel drop its caches."""
    if os.getuid() == 0:
        Path("/proc/sys/vm/drop_caches").write_text("2", encoding="ascii")


# ------------------------------------------------------------------- many


def test_directory_of_many_entries_has_no_slow_part(
    mount: Mounted, record_property: Record
) -> None:
    """Promise: creating, listing, stat and deleting keep one rate, however many entries exist."""
    folder = mount.path / "many"
    folder.mkdir()
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    names = [f"file number {number}" for number in range(ENTRIES)]

    def make() -> Iterator[None]:
        for name in names:
            os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, dir_fd=directory))
            yield

    def listing() -> Iterator[str]:
        with os.scandir(directory) as entries:
            for entry in entries:
                listed.append(entry.name)
                yield entry.name

    def look() -> Iterator[None]:
        for name in names:
            assert os.stat(name, dir_fd=directory).st_size == 0
            yield

    def delete() -> Iterator[None]:
        for name in names:
            os.unlink(name, dir_fd=directory)
            yield

    listed: list[str] = []
    measured = {"create": rates(mount, ENTRIES, make())}
    drop_kernel_caches()
    measured["list"] = rates(mount, ENTRIES, listing())
    assert len(listed) == ENTRIES
    assert set(listed) == set(names)
    drop_kernel_caches()
    measured["stat"] = rates(mount, ENTRIES, look())
    measured["delete"] = rates(mount, ENTRIES, delete())
    assert os.listdir(directory) == []
    os.close(directory)
    for what, parts in measured.items():
        shown = " ".join(f"{rate:,.0f}" for rate in parts)
        record_property("summary", f"{ENTRIES:,} entries, {what}, entries/s by tenths: {shown}")
        assert min(parts) * SLOWDOWN_MAX > parts[0], f"{what} slows down: {shown}"
    if not mount.plain:
        record_property("summary", f"{ENTRIES:,} entries: daemon {memory_mib(mount):.0f} MiB")


@pytest.mark.needs_cowfs
def test_memory_of_the_daemon_is_bounded_with_many_files(
    small: Mounted, record_property: Record
) -> None:
    """Promise: the daemon's memory is bounded by its options, not by the number of files."""
    start = memory_mib(small)
    shown = []

    def make() -> Iterator[None]:
        for number in range(FILES):
            if not number % 1000:
                (small.path / f"{number // 1000}").mkdir()
            name = small.path / f"{number // 1000}" / f"{number}"
            descriptor = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            os.write(descriptor, b"contents %d" % number)
            os.close(descriptor)
            if not (number + 1) % (FILES // PARTS):
                shown.append(memory_mib(small))
            yield

    speeds = rates(small, FILES, make())
    words = " ".join(f"{mib:.0f}" for mib in shown)
    record_property("summary", f"{FILES:,} files: daemon {start:.0f} MiB, by tenths {words}")
    count = subprocess.run(["find", small.path, "-type", "f", "-size", "1"], capture_output=True)
    assert count.stdout.count(b"\n") == FILES
    found = memory_mib(small)
    drop_kernel_caches()
    after = memory_mib(small)
    record_property(
        "summary", f"{FILES:,} files: after find {found:.0f} MiB, after drop_caches {after:.0f} MiB"
    )
    assert max(*shown, found) - start < GROWTH_MIB_MAX, words
    # The caches reach their bounds in the first half; memory must not grow after that.
    assert shown[-1] - shown[PARTS // 2] < 40, words
    assert min(speeds) * SLOWDOWN_MAX > speeds[0], speeds


# ------------------------------------------------------------------- lists that change


def test_list_under_changes_shows_what_stayed_exactly_once(folder: Path) -> None:
    """Promise: while others change a directory, entries that stay are listed exactly once."""
    staying = {f"stays {number}" for number in range(3000)}
    for name in staying:
        (folder / name).touch()
    for number in range(1000):
        (folder / f"goes {number}").touch()
    program = """
import os, sys
os.chdir(sys.argv[1])
print("begun", flush=True)
number = 0
while True:
    number += 1
    for old in (f"goes {number % 1000}", f"new {number - 500}"):
        try:
            os.unlink(old)
        except FileNotFoundError:
            pass
    open(f"new {number}", "w").close()
    os.rename(f"new {number}", f"renamed {number % 700}")
"""
    with subprocess.Popen(
        [sys.executable, "-c", program, folder], stdout=subprocess.PIPE, text=True
    ) as busy:
        try:
            assert busy.stdout is not None
            assert busy.stdout.readline() == "begun\n"
            for _ in range(30):
                seen = []
                with os.scandir(folder) as entries:
                    for position, entry in enumerate(entries):
                        seen.append(entry.name)
                        if not position % 500:
                            time.sleep(0.002)
                # A name that was removed and made again may be listed twice: it is another entry.
                stayed = [name for name in seen if name.startswith("stays")]
                assert len(stayed) == len(set(stayed)) == 3000
            assert busy.poll() is None
        finally:
            busy.kill()
    assert staying <= set(os.listdir(folder))


LISTER = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
class Entry(ctypes.Structure):
    _fields_ = [("ino", ctypes.c_uint64), ("off", ctypes.c_int64), ("length", ctypes.c_uint16),
                ("kind", ctypes.c_uint8), ("name", ctypes.c_char * 256)]
libc.opendir.restype = ctypes.c_void_p
libc.readdir.restype = ctypes.POINTER(Entry)
libc.telldir.restype = ctypes.c_long
for function in (libc.readdir, libc.telldir, libc.rewinddir, libc.closedir):
    function.argtypes = [ctypes.c_void_p]
libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]
stream = libc.opendir(sys.argv[1].encode())

def read():
    entry = libc.readdir(stream)
    return bytes(entry.contents.name) if entry else None

places, names = [], []
while True:
    places.append(libc.telldir(stream))
    name = read()
    if name is None:
        break
    names.append(name)
assert len(set(names)) == len(names), "a name was met twice"
gone = [name for name in names if name not in (b".", b"..")][::3] if sys.argv[2] == "rw" else []
for name in gone:
    os.unlink(os.path.join(sys.argv[1].encode(), name))
left = [name for name in names if name not in gone]
# Backwards: each place leads to the first name from there on that is left.
for at in range(len(names) - 1, -1, -7):
    libc.seekdir(stream, places[at])
    expected = next((name for name in names[at:] if name not in gone), None)
    assert read() == expected, (at, expected)
libc.rewinddir(stream)
again = list(iter(read, None))
assert again == left, "another order, or other names"
libc.closedir(stream)

# The system call itself, with a buffer for one or two entries at a time
file = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECTORY)
getdents64 = 217 if os.uname().machine == "x86_64" else 61
for size in (64, 100, 300, 5000):
    os.lseek(file, 0, os.SEEK_SET)
    found, buffer = [], ctypes.create_string_buffer(size)
    while (count := libc.syscall(getdents64, file, buffer, size)):
        assert count > 0, ctypes.get_errno()
        at = 0
        while at < count:
            length = int.from_bytes(buffer.raw[at + 16:at + 18], "little")
            found.append(buffer.raw[at + 19:at + length].split(b"\\0")[0])
            at += length
    assert found == left, size
"""


def test_places_in_a_list_stay_valid_and_buffers_may_be_small(folder: Path) -> None:
    """Promise: telldir and seekdir lead back to the same entry while others are deleted."""
    for number in range(700):
        (folder / f"name {number}").touch()
    subprocess.run([sys.executable, "-c", LISTER, folder, "rw"], check=True, timeout=HANG_SECONDS)


@pytest.mark.needs_cowfs
def test_list_of_snapshots_behaves_as_one_of_files(mount: Mounted) -> None:
    """Promise: .snapshots lists in the same way while snapshots come and go."""
    names = {f"s{number}" for number in range(12)}
    for name in names:
        mount.snapshot(name)
    place = mount.path / ".snapshots"
    subprocess.run([sys.executable, "-c", LISTER, place, "ro"], check=True, timeout=HANG_SECONDS)
    with os.scandir(place) as entries:
        seen = [next(entries).name]
        gone = sorted(names - set(seen))[:5]
        require_success(run_command("snapshot", "delete", mount.path, *gone))
        mount.snapshot("late")
        seen += [entry.name for entry in entries]
    assert len(seen) == len(set(seen))
    assert names - set(gone) <= set(seen)


# ------------------------------------------------------------------- deep and long


def test_tree_of_great_depth_can_be_walked_renamed_and_removed(folder: Path) -> None:
    """Promise: only a path's length limits the depth; relative steps go deeper."""
    top = folder / "top"
    top.mkdir()
    program = """
import os, sys
os.chdir(sys.argv[1])
for depth in range(500):
    os.mkdir("directory")
    os.chdir("directory")
open("bottom", "w").close()
assert os.getcwd() == sys.argv[1] + 500 * "/directory"  # longer than any path given may be
# A directory cannot go below itself, however deep the place is.
try:
    os.rename(sys.argv[1] + "/directory", "below")
except OSError as error:
    assert error.errno == 22, error
else:
    sys.exit("a directory was moved below itself")
"""
    subprocess.run([sys.executable, "-c", program, top], check=True, timeout=HANG_SECONDS)
    found = subprocess.run(["find", top], capture_output=True, check=True, timeout=HANG_SECONDS)
    assert found.stdout.count(b"\n") == 502
    assert found.stdout.endswith(b"directory/bottom\n")
    moved = folder / "elsewhere" / "moved"
    moved.parent.mkdir()
    top.rename(moved)
    assert moved.parent.stat().st_nlink == 3
    found = subprocess.run(["find", moved, "-name", "bottom"], capture_output=True, check=True)
    assert found.stdout.count(b"/directory") == 500
    subprocess.run(["rm", "-r", moved], check=True, timeout=HANG_SECONDS)
    assert os.listdir(moved.parent) == []


def test_very_long_sparse_file_is_read_copied_and_cut(folder: Path) -> None:
    """Promise: 100 GiB with bytes at both ends and between take a few blocks, copies too."""
    file = folder / "long"
    size = 100 << 30
    places = {0: b"begin", 50 << 30: b"middle", size - 3: b"end"}
    with open(file, "w+b", buffering=0) as stream:
        for at, data in places.items():
            os.pwrite(stream.fileno(), data, at)
        os.fsync(stream.fileno())
        status = os.fstat(stream.fileno())
        assert status.st_size == size
        assert status.st_blocks * 512 <= 64 << 10
        for at, data in places.items():
            assert os.pread(stream.fileno(), len(data) + 4, at).rstrip(b"\0") == data
        assert os.pread(stream.fileno(), 1 << 20, 25 << 30) == bytes(1 << 20)
        stream.truncate((50 << 30) + 3)
        assert os.pread(stream.fileno(), 10, 50 << 30) == b"mid"
        stream.truncate(size)
        assert os.pread(stream.fileno(), 10, 50 << 30) == b"mid" + bytes(7)
        assert os.pread(stream.fileno(), 10, size - 5) == bytes(5)
    with open(folder / "source", "wb") as stream:
        stream.truncate(1 << 30)
        stream.seek(700 << 20)
        stream.write(b"island")
    subprocess.run(
        ["cp", "--sparse=always", folder / "source", folder / "copy"],
        check=True,
        timeout=HANG_SECONDS,
    )
    subprocess.run(["cmp", folder / "source", folder / "copy"], check=True, timeout=HANG_SECONDS)
    assert (folder / "copy").stat().st_blocks * 512 <= 1 << 20
    file.unlink()
    assert stat.S_ISREG((folder / "copy").stat().st_mode)
