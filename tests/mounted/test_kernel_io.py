"""Promises for unusual file I/O: direct I/O, pipes in the kernel, rings, handles, events.

The kernel serves each of these calls on any local filesystem; the bytes must be the same as read()
and write() would have moved.
"""

import ctypes
import errno
import mmap
import os
import random
import select
import shutil
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.conftest import Mounted
from tests.sizes import HANG_SECONDS, sized, wait_until

pytestmark = [pytest.mark.mounted, pytest.mark.xdist_group("kernel_io")]

LIBC = ctypes.CDLL(None, use_errno=True)
AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
BLOCK = 4096
SYS_OPENAT2 = 437
SYS_CLOSE_RANGE = 436
# The system calls of asynchronous I/O: setup, destroy, getevents, submit.
AIO_CALLS = (206, 207, 208, 209) if os.uname().machine == "x86_64" else (0, 1, 4, 2)
AIO_WRITE = 1  # IOCB_CMD_PWRITE
RESOLVE_NO_SYMLINKS, RESOLVE_BENEATH, RESOLVE_IN_ROOT, RESOLVE_NO_XDEV = 4, 8, 16, 1


@pytest.fixture
def folder(module_mount: Mounted, request: pytest.FixtureRequest) -> Path:
    """An empty directory on the mount."""
    place: Path = module_mount.path / request.node.name
    place.mkdir()
    return place


def call(name: str, *arguments: object) -> int:
    """Call a function of the C library; raises OSError when it returns -1."""
    result: int = getattr(LIBC, name)(*arguments)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def aligned(data: bytes) -> mmap.mmap:
    """A buffer that begins at a page, as direct I/O requires."""
    memory = mmap.mmap(-1, max(len(data), 1))
    memory[: len(data)] = data
    return memory


# ------------------------------------------------------------------- direct I/O


def test_direct_writes_and_reads_are_the_file(folder: Path) -> None:
    """Promise: aligned O_DIRECT reads what was written, also beyond the end; the file grows."""
    file = folder / "file"
    contents = os.urandom(64 * BLOCK)
    descriptor = os.open(file, os.O_CREAT | os.O_RDWR | os.O_DIRECT)
    try:
        for at in (0, 32 * BLOCK, 16 * BLOCK, 48 * BLOCK):
            part = aligned(contents[at : at + 16 * BLOCK])
            assert os.pwrite(descriptor, part, at) == 16 * BLOCK
        assert os.fstat(descriptor).st_size == 64 * BLOCK
        buffer = aligned(bytes(128 * BLOCK))
        assert os.preadv(descriptor, [buffer], 0) == 64 * BLOCK
        assert buffer[: 64 * BLOCK] == contents
        assert os.preadv(descriptor, [buffer], 64 * BLOCK) == 0
        os.ftruncate(descriptor, 63 * BLOCK + 10)
        assert os.preadv(descriptor, [aligned(bytes(2 * BLOCK))], 63 * BLOCK) == 10
    finally:
        os.close(descriptor)
    assert file.read_bytes() == contents[: 63 * BLOCK + 10]


def test_direct_io_of_any_size_and_place_is_whole_or_refused(folder: Path) -> None:
    """Promise: unaligned direct I/O either works to the byte or is EINVAL and changes nothing."""
    file = folder / "file"
    expected = bytearray(os.urandom(10 * BLOCK))
    file.write_bytes(expected)
    descriptor = os.open(file, os.O_RDWR | os.O_DIRECT)
    try:
        for at, size in ((1, 100), (BLOCK - 1, 2), (511, 5 * BLOCK), (9 * BLOCK + 5, 2 * BLOCK)):
            data = os.urandom(size)
            try:
                assert os.pwrite(descriptor, data, at) == size
            except OSError as error:
                assert error.errno == errno.EINVAL
                continue
            expected = expected.ljust(at + size, b"\0")
            expected[at : at + size] = data
            assert os.pread(descriptor, size, at) == data
    finally:
        os.close(descriptor)
    assert file.read_bytes() == expected


def test_direct_and_buffered_io_on_one_file_agree(folder: Path) -> None:
    """Promise: direct I/O, buffered I/O and mappings see each other's writes at once."""
    generator = random.Random(5)
    file = folder / "file"
    size = 64 * BLOCK
    expected = bytearray(size)
    file.write_bytes(expected)
    direct = os.open(file, os.O_RDWR | os.O_DIRECT)
    plain = os.open(file, os.O_RDWR)
    try:
        with mmap.mmap(plain, size) as memory:
            for _ in range(150):
                at = generator.randrange(60) * BLOCK
                data = generator.randbytes(generator.randint(1, 4) * BLOCK)
                how = generator.randrange(3)
                if how == 0:
                    assert os.pwrite(direct, aligned(data), at) == len(data)
                elif how == 1:
                    os.pwrite(plain, data, at)
                else:
                    memory[at : at + len(data)] = data
                expected[at : at + len(data)] = data
                at = generator.randrange(60) * BLOCK
                buffer = aligned(bytes(4 * BLOCK))
                assert os.preadv(direct, [buffer], at) == 4 * BLOCK
                assert buffer[:] == expected[at : at + 4 * BLOCK]
                assert os.pread(plain, 4 * BLOCK, at) == expected[at : at + 4 * BLOCK]
                assert memory[at : at + 4 * BLOCK] == expected[at : at + 4 * BLOCK]
    finally:
        os.close(direct)
        os.close(plain)
    assert file.read_bytes() == expected


def test_direct_appends_lose_nothing(folder: Path) -> None:
    """Promise: O_DIRECT with O_APPEND writes at the end, after what others wrote."""
    file = folder / "file"
    direct = os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_DIRECT)
    plain = os.open(file, os.O_WRONLY | os.O_APPEND)
    try:
        for number in range(20):
            os.write(direct if number % 2 else plain, aligned(bytes([number]) * BLOCK))
    finally:
        os.close(direct)
        os.close(plain)
    assert file.read_bytes() == b"".join(bytes([number]) * BLOCK for number in range(20))


# ------------------------------------------------------------------- pipes in the kernel, and rings


class AioBlock(ctypes.Structure):
    """struct iocb: one asynchronous read or write."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("key", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("operation", ctypes.c_uint16),
        ("priority", ctypes.c_int16),
        ("descriptor", ctypes.c_uint32),
        ("buffer", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("offset", ctypes.c_int64),
        ("rest", ctypes.c_uint64 * 2),
    )


def write_asynchronously(queue: ctypes.c_ulong, descriptor: int, pages: list[mmap.mmap]) -> None:
    """Write the pages at places 0, 1, 2... all at once; returns when all are written."""
    count = len(pages)
    blocks = (AioBlock * count)()
    for index, page in enumerate(pages):
        blocks[index].operation = AIO_WRITE
        blocks[index].descriptor = descriptor
        blocks[index].buffer = ctypes.addressof(ctypes.c_char.from_buffer(page))
        blocks[index].size, blocks[index].offset = BLOCK, index * BLOCK
    pointers = (ctypes.c_void_p * count)(*(ctypes.addressof(block) for block in blocks))
    submitted = 0
    while submitted < count:
        rest = ctypes.byref(pointers, submitted * ctypes.sizeof(ctypes.c_void_p))
        submitted += call("syscall", AIO_CALLS[3], queue, count - submitted, rest)
    events = (ctypes.c_int64 * (4 * count))()  # struct io_event: data, block, result, second result
    assert call("syscall", AIO_CALLS[2], queue, count, count, events, None) == count
    assert set(events[2::4]) == {BLOCK}


def test_asynchronous_direct_write_is_done_when_it_was_submitted(
    folder: Path, module_mount: Mounted
) -> None:
    """Promise: io_submit returns when the filesystem has the bytes, not before.

    Only then does every kernel drop pages that were read during the write: many do not when an
    asynchronous write ends (generic_file_direct_write does).
    """
    file = folder / "file"
    file.write_bytes(bytes(BLOCK))
    direct = os.open(file, os.O_RDWR | os.O_DIRECT)
    queue = ctypes.c_ulong(0)
    call("syscall", AIO_CALLS[0], 1, ctypes.byref(queue))
    submitted = threading.Thread(
        target=write_asynchronously, args=(queue, direct, [aligned(b"n" * BLOCK)])
    )
    pid = module_mount.daemon_pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        submitted.start()
        calls = Path(f"/proc/self/task/{submitted.native_id}/syscall")

        def running() -> str:
            return calls.read_text().split()[0]

        ends = {str(AIO_CALLS[2]), str(AIO_CALLS[3])}
        wait_until(lambda: running() in ends, "the write is not submitted")
        for _ in range(20):
            assert running() == str(AIO_CALLS[3]), "the write was on its way without its caller"
            time.sleep(0.02)
    finally:
        os.kill(pid, signal.SIGCONT)
        submitted.join()
        call("syscall", AIO_CALLS[1], queue)
        os.close(direct)
    assert file.read_bytes() == b"n" * BLOCK


def test_buffered_readers_see_what_asynchronous_direct_writes_wrote(folder: Path) -> None:
    """Promise: after an asynchronous O_DIRECT write is done, no reader gets the old bytes.

    Readers run beside the writes, and fill pages of the kernel's cache meanwhile.
    """
    count, rounds, readers_count = 128, sized(25, 60), 3
    file = folder / "file"
    file.write_bytes(bytes(count * BLOCK))
    direct = os.open(file, os.O_RDWR | os.O_DIRECT)
    buffered = os.open(file, os.O_RDONLY)
    ended = threading.Event()

    def read_on(start: int) -> None:
        place = start
        while not ended.is_set():
            os.pread(buffered, BLOCK, place % count * BLOCK)
            place += 7

    queue = ctypes.c_ulong(0)
    call("syscall", AIO_CALLS[0], count, ctypes.byref(queue))
    readers = [threading.Thread(target=read_on, args=(start,)) for start in range(readers_count)]
    try:
        os.posix_fadvise(buffered, 0, 0, os.POSIX_FADV_RANDOM)  # no readahead: page by page
        for reader in readers:
            reader.start()
        for version in range(1, rounds + 1):
            page = version.to_bytes(4, "little") * (BLOCK // 4)
            write_asynchronously(queue, direct, [aligned(page) for _ in range(count)])
            stale = [
                place for place in range(count) if os.pread(buffered, BLOCK, place * BLOCK) != page
            ]
            assert not stale, f"round {version}: {len(stale)} pages are those from before the write"
    finally:
        ended.set()
        for reader in readers:
            if reader.ident is not None:
                reader.join()
        call("syscall", AIO_CALLS[1], queue)
        os.close(direct)
        os.close(buffered)


def test_bytes_moved_inside_the_kernel_are_the_same(folder: Path) -> None:
    """Promise: sendfile, splice, tee, vmsplice and copies between files move what read() gives."""
    contents = os.urandom(300_001)
    (folder / "source").write_bytes(contents)
    source = os.open(folder / "source", os.O_RDONLY)
    target = os.open(folder / "target", os.O_CREAT | os.O_RDWR)
    reader, writer = os.pipe()
    try:
        at = 0
        while at < len(contents):
            at += os.sendfile(target, source, at, len(contents) - at)
        assert (folder / "target").read_bytes() == contents

        os.ftruncate(target, 0)
        at = 0
        while moved := os.splice(source, writer, 50_000, offset_src=at):
            left = moved
            while left:
                left -= os.splice(reader, target, left, offset_dst=at + moved - left)
            at += moved
        assert (folder / "target").read_bytes() == contents

        other_reader, other_writer = os.pipe()
        try:
            assert os.splice(source, writer, 20_000, offset_src=1234) == 20_000
            assert call("tee", reader, other_writer, 20_000, 0) == 20_000
            assert os.read(other_reader, 20_000) == contents[1234:21_234]
            assert os.splice(reader, target, 20_000, offset_dst=7) == 20_000
        finally:
            os.close(other_reader)
            os.close(other_writer)
        assert os.pread(target, 20_000, 7) == contents[1234:21_234]

        memory = aligned(b"from memory")
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        vector = (ctypes.c_size_t * 2)(address, 11)
        assert call("vmsplice", writer, vector, 1, 0) == 11
        assert os.splice(reader, target, 11, offset_dst=100_000) == 11
        assert os.pread(target, 11, 100_000) == b"from memory"
    finally:
        for descriptor in (source, target, reader, writer):
            os.close(descriptor)
    shutil.copyfile(folder / "source", folder / "copy")
    assert (folder / "copy").read_bytes() == contents


@pytest.mark.parametrize("engine", ["io_uring", "libaio", "sync", "mmap", "splice"])
@pytest.mark.parametrize("direct", [0, 1], ids=["buffered", "direct"])
def test_random_io_of_every_engine_reads_what_it_wrote(
    module_mount: Mounted, tmp_path: Path, engine: str, direct: int
) -> None:
    """Promise: fio verifies what it wrote by rings, asynchronous I/O, mappings and pipes."""
    if engine in ("mmap", "splice") and direct:
        engine = "psync"  # these two have no direct kind, so use another engine
    done = subprocess.run(
        [
            "fio",
            "--name=verify",
            f"--filename={module_mount.path}/fio-{engine}-{direct}",
            f"--ioengine={engine}",
            f"--direct={direct}",
            "--rw=randwrite",
            "--bsrange=4k-64k",
            "--size=8m",
            "--iodepth=8",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--randseed=3",
            "--end_fsync=1",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WRITE: " in done.stdout
    assert "READ: " in done.stdout


def test_flags_of_single_reads_and_writes_are_kept(folder: Path) -> None:
    """Promise: RWF_APPEND writes at the end, RWF_DSYNC works, RWF_NOWAIT gives bytes or none."""
    file = folder / "file"
    file.write_bytes(b"begin")
    descriptor = os.open(file, os.O_RDWR)
    try:
        assert os.pwritev(descriptor, [b"dsync"], 0, os.RWF_DSYNC) == 5
        assert os.pwritev(descriptor, [b"appended"], 0, os.RWF_APPEND) == 8
        buffer = bytearray(20)
        try:
            count = os.preadv(descriptor, [buffer], 0, os.RWF_NOWAIT)
        except BlockingIOError:
            pass  # allowed when the bytes are not in memory
        except OSError as error:
            assert error.errno == errno.EOPNOTSUPP
        else:
            assert bytes(buffer[:count]) == b"dsyncappended"
        assert os.pread(descriptor, 20, 0) == b"dsyncappended"
    finally:
        os.close(descriptor)


def test_advice_changes_no_bytes(folder: Path) -> None:
    """Promise: readahead and every posix_fadvise are accepted, and what was written stays."""
    file = folder / "file"
    contents = os.urandom(1 << 20)
    file.write_bytes(contents)
    descriptor = os.open(file, os.O_RDWR)
    try:
        for name in ("NORMAL", "SEQUENTIAL", "RANDOM", "WILLNEED", "NOREUSE", "DONTNEED"):
            os.posix_fadvise(descriptor, 0, 0, getattr(os, f"POSIX_FADV_{name}"))
            assert os.pread(descriptor, 5000, 300_000) == contents[300_000:305_000]
            os.pwrite(descriptor, contents[:100], 0)
        assert call("readahead", descriptor, ctypes.c_int64(0), ctypes.c_size_t(1 << 20)) == 0
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    assert file.read_bytes() == contents


# ------------------------------------------------------------------- programs


def test_programs_scripts_and_libraries_run_from_the_mount(folder: Path) -> None:
    """Promise: programs, scripts and libraries stored on the mount can be run and loaded."""
    program = folder / "program"
    shutil.copy(shutil.which("true") or "", program)
    assert subprocess.run([program], check=False).returncode == 0
    script = folder / "script"
    script.write_text("#!/bin/sh\necho script $1\n")
    script.chmod(0o755)
    assert (
        subprocess.run([script, "runs"], capture_output=True, check=True).stdout == b"script runs\n"
    )
    import _ctypes

    library = folder / "library.so"
    shutil.copy(_ctypes.__file__, library)
    loading = "import ctypes, sys; assert ctypes.CDLL(sys.argv[1]).PyInit__ctypes"
    subprocess.run([sys.executable, "-c", loading, library], check=True)
    script.chmod(0o644)
    with pytest.raises(PermissionError):
        subprocess.run([script], check=False)


def test_program_that_runs_is_not_written_to(folder: Path) -> None:
    """Promise: ETXTBSY for writing to a running program and for running one open for writing."""
    program = folder / "program"
    shutil.copy(shutil.which("sleep") or "", program)
    with subprocess.Popen([program, "60"]) as running:
        try:
            with pytest.raises(OSError) as caught:  # noqa: PT011  # the test checks errno
                os.open(program, os.O_WRONLY)
            assert caught.value.errno == errno.ETXTBSY
            (folder / "new").write_bytes(program.read_bytes())
            (folder / "new").replace(program)  # as package managers do
        finally:
            running.kill()
    program.chmod(0o755)
    with open(program, "r+b"), pytest.raises(OSError) as caught:  # noqa: PT011
        subprocess.run([program, "0"], check=False)
    assert caught.value.errno == errno.ETXTBSY
    subprocess.run([program, "0"], check=True)


@pytest.mark.needs_cowfs
@pytest.mark.needs_root  # only root can become another user to try it
def test_set_user_id_programs_give_nobody_rights(folder: Path, module_mount: Mounted) -> None:
    """Promise: by default (nosuid) a set-id program runs as its caller."""
    flags = os.statvfs(folder).f_flag
    assert flags & os.ST_NOSUID
    program = folder / "id"
    shutil.copy(shutil.which("id") or "", program)
    program.chmod(0o4755)
    os.chown(program, 12345, 12345)
    program.chmod(0o6755)
    shown = subprocess.run([program, "-u"], capture_output=True, check=True).stdout
    assert shown == b"0\n"


# ------------------------------------------------------------------- events


def test_inotify_tells_of_every_change(folder: Path) -> None:
    """Promise: a watcher of a directory sees what happens in it, in order."""
    names = {
        0x100: "create",
        0x2: "modify",
        0x8: "close",
        0x40: "from",
        0x80: "to",
        0x200: "delete",
    }
    watcher = call("inotify_init1", os.O_NONBLOCK)
    try:
        call("inotify_add_watch", watcher, os.fsencode(folder), sum(names))
        (folder / "one").write_bytes(b"x")
        (folder / "one").rename(folder / "two")
        (folder / "two").unlink()
        data = os.read(watcher, 65536)
        seen = []
        while data:
            _, mask, _, length = struct.unpack_from("iIII", data)
            seen.append((names[mask & 0xFFF], data[16 : 16 + length].rstrip(b"\0").decode()))
            data = data[16 + length :]
        assert seen == [
            ("create", "one"),
            ("modify", "one"),
            ("close", "one"),
            ("from", "one"),
            ("to", "two"),
            ("delete", "two"),
        ]
    finally:
        os.close(watcher)


@pytest.mark.needs_root  # the kernel lets only root watch a whole mount
def test_fanotify_watches_the_whole_mount(folder: Path, module_mount: Mounted) -> None:
    """Promise: a watcher of the mount sees opens and writes anywhere on it."""
    watcher = call("fanotify_init", 0x2, os.O_RDONLY)  # FAN_NONBLOCK
    try:
        mask = 0x2 | 0x20  # FAN_MODIFY, FAN_OPEN
        call(
            "fanotify_mark", watcher, 1 | 0x10, ctypes.c_uint64(mask), AT_FDCWD, os.fsencode(folder)
        )  # FAN_MARK_ADD, FAN_MARK_MOUNT
        with open(folder / "file", "wb") as file:
            file.write(b"x")
        events = 0
        paths = set()
        deadline = time.monotonic() + HANG_SECONDS
        while events != mask and time.monotonic() < deadline:
            if not select.select([watcher], [], [], 0.2)[0]:
                continue
            data = os.read(watcher, 65536)
            while data:
                length, _, _, _, found, descriptor, _ = struct.unpack_from("IBBHQii", data)
                path = os.readlink(f"/proc/self/fd/{descriptor}")
                os.close(descriptor)
                if path == str(folder / "file"):
                    events |= found & mask
                paths.add(path)
                data = data[length:]
        assert events == mask, paths
    finally:
        os.close(watcher)


@pytest.mark.needs_cowfs
def test_watchers_work_on_after_a_rollback(mount: Mounted) -> None:
    """Promise: a watcher of the root directory still gets events after a rollback."""
    (mount.path / "kept").write_bytes(b"1")
    mount.snapshot("s")
    (mount.path / "gone").write_bytes(b"2")
    watcher = call("inotify_init1", os.O_NONBLOCK)
    try:
        call("inotify_add_watch", watcher, os.fsencode(mount.path), 0x100)
        mount.rollback("s")
        (mount.path / "new").write_bytes(b"3")
        data = os.read(watcher, 65536)
        assert data[16:].rstrip(b"\0") == b"new"
    finally:
        os.close(watcher)
    assert sorted(os.listdir(mount.path)) == ["kept", "new"]


# ------------------------------------------------------------------- pipes and sockets by name


def test_fifo_without_waiting_says_when_nobody_reads(folder: Path) -> None:
    """Promise: O_NONBLOCK on a fifo: ENXIO without a reader, EAGAIN without bytes, else bytes."""
    fifo = folder / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(OSError) as caught:  # noqa: PT011  # the test checks errno
        os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    assert caught.value.errno == errno.ENXIO
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(BlockingIOError):
            os.read(reader, 1)
        assert os.write(writer, b"x" * 1000) == 1000
        fifo.unlink()
        assert os.read(reader, 2000) == b"x" * 1000
    finally:
        os.close(reader)
        os.close(writer)


# ------------------------------------------------------------------- descriptors and paths


class OpenHow(ctypes.Structure):
    """struct open_how of openat2(2)."""

    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def openat2(directory: int, path: bytes, resolve: int) -> int:
    how = OpenHow(os.O_RDONLY, 0, resolve)
    return call("syscall", SYS_OPENAT2, directory, path, ctypes.byref(how), ctypes.sizeof(how))


def test_resolving_under_rules_refuses_what_leaves(folder: Path) -> None:
    """Promise: openat2 on the mount obeys RESOLVE_BENEATH, IN_ROOT, NO_SYMLINKS and NO_XDEV."""
    (folder / "in").mkdir()
    (folder / "in" / "file").write_bytes(b"inside")
    (folder / "in" / "out").symlink_to("../secret")
    (folder / "in" / "root").symlink_to("/file")
    (folder / "in" / "link").symlink_to("file")
    (folder / "secret").write_bytes(b"outside")
    directory = os.open(folder / "in", os.O_RDONLY)
    try:
        for path, resolve, error in (
            (b"out", RESOLVE_BENEATH, errno.EXDEV),
            (b"../secret", RESOLVE_BENEATH, errno.EXDEV),
            (b"link", RESOLVE_NO_SYMLINKS, errno.ELOOP),
        ):
            with pytest.raises(OSError) as caught:  # noqa: PT011  # the test checks errno
                openat2(directory, path, resolve)
            assert caught.value.errno == error, path
        for path, resolve in (
            (b"link", RESOLVE_BENEATH),
            (b"root", RESOLVE_IN_ROOT),
            (b"file", RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV),
        ):
            descriptor = openat2(directory, path, resolve)
            assert os.read(descriptor, 10) == b"inside"
            os.close(descriptor)
    finally:
        os.close(directory)


def test_descriptor_of_a_path_reads_nothing_but_leads_on(folder: Path) -> None:
    """Promise: O_PATH gives attributes and a starting place, no contents; it follows renames."""
    file = folder / "file"
    file.write_bytes(b"12345")
    descriptor = os.open(file, os.O_PATH)
    directory = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        with pytest.raises(OSError) as caught:  # noqa: PT011  # the test checks errno
            os.read(descriptor, 1)
        assert caught.value.errno == errno.EBADF
        file.rename(folder / "moved")
        assert os.fstat(descriptor).st_size == 5
        assert os.readlink(f"/proc/self/fd/{descriptor}") == str(folder / "moved")
        assert Path(f"/proc/self/fd/{descriptor}").read_bytes() == b"12345"
        os.rename("moved", "again", src_dir_fd=directory, dst_dir_fd=directory)
        os.link("again", "link", src_dir_fd=directory, dst_dir_fd=directory)
        os.symlink("again", "symlink", dir_fd=directory)
        os.mkdir("directory", dir_fd=directory)
        os.mkfifo("fifo", dir_fd=directory)
        os.chmod("again", 0o600, dir_fd=directory)
        os.utime("again", ns=(1, 2), dir_fd=directory)
        assert os.readlink("symlink", dir_fd=directory) == "again"
        status = os.stat("link", dir_fd=directory)
        assert (status.st_nlink, status.st_mtime_ns, stat.S_IMODE(status.st_mode)) == (2, 2, 0o600)
        for name in ("link", "symlink", "fifo", "again"):
            os.unlink(name, dir_fd=directory)
        os.rmdir("directory", dir_fd=directory)
        assert os.fstat(descriptor).st_nlink == 0
    finally:
        os.close(descriptor)
        os.close(directory)
    assert os.listdir(folder) == []


@pytest.mark.needs_root  # opening by handle is for root
def test_file_handles_find_the_file_again_or_are_stale(folder: Path, module_mount: Mounted) -> None:
    """Promise: a file handle opens its file as long as that exists, even after caches are dropped.

    Afterwards the handle is stale, and never opens another file.
    """
    file = folder / "file"
    file.write_bytes(b"by handle")
    handle = ctypes.create_string_buffer(struct.pack("Ii", 128, 0) + bytes(128))
    mount_id = ctypes.c_int()
    name = os.fsencode(file)
    call("name_to_handle_at", AT_FDCWD, name, handle, ctypes.byref(mount_id), 0)
    directory = os.open(folder, os.O_RDONLY)
    try:
        file.rename(folder / "elsewhere")
        Path("/proc/sys/vm/drop_caches").write_text("2")
        descriptor = call("open_by_handle_at", directory, handle, os.O_RDONLY)
        assert os.read(descriptor, 20) == b"by handle"
        os.close(descriptor)
        (folder / "elsewhere").unlink()
        for number in range(20):
            (folder / f"other {number}").write_bytes(b"other")
        with pytest.raises(OSError) as caught:  # noqa: PT011  # the test checks errno
            call("open_by_handle_at", directory, handle, os.O_RDONLY)
        assert caught.value.errno == errno.ESTALE
    finally:
        os.close(directory)


def test_many_descriptors_closed_at_once_are_released(folder: Path) -> None:
    """Promise: close_range releases every file, and frees those that were unlinked while open."""
    program = """
import ctypes, os, sys
low = os.open(sys.argv[1], os.O_RDONLY)
for number in range(200):
    path = os.path.join(sys.argv[1], str(number))
    os.open(path, os.O_CREAT | os.O_RDWR)
    os.unlink(path)
assert ctypes.CDLL(None).syscall(436, low + 1, 0xFFFFFFFF, 0) == 0
assert len(os.listdir("/proc/self/fd")) <= low + 2
"""
    subprocess.run([sys.executable, "-c", program, folder], check=True, timeout=HANG_SECONDS)
    assert os.listdir(folder) == []


def test_working_directory_is_followed_and_missed(folder: Path) -> None:
    """Promise: getcwd follows renames of any directory above; a removed one is ENOENT."""
    (folder / "a" / "b").mkdir(parents=True)
    program = """
import os, sys
folder = sys.argv[1]
os.chdir(folder + "/a/b")
os.rename(folder + "/a", folder + "/moved")
assert os.getcwd() == folder + "/moved/b", os.getcwd()
open("file", "w").close()
assert os.path.exists(folder + "/moved/b/file")
os.unlink("file")
os.rmdir(folder + "/moved/b")
for attempt in (os.getcwd, lambda: open("file", "w"), lambda: os.mkdir("x")):
    try:
        attempt()
    except FileNotFoundError:
        continue
    sys.exit("a removed directory was used")
assert os.listdir(".") == []
os.chdir("..")
assert os.getcwd() == folder + "/moved"
"""
    subprocess.run([sys.executable, "-c", program, folder], check=True, timeout=HANG_SECONDS)


class Statx(ctypes.Structure):
    """The beginning of struct statx, padded to its 256 bytes."""

    _fields_ = (
        ("mask", ctypes.c_uint32),
        ("blksize", ctypes.c_uint32),
        ("attributes", ctypes.c_uint64),
        ("nlink", ctypes.c_uint32),
        ("uid", ctypes.c_uint32),
        ("gid", ctypes.c_uint32),
        ("mode", ctypes.c_uint16),
        ("spare", ctypes.c_uint16),
        ("ino", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("blocks", ctypes.c_uint64),
        ("attributes_mask", ctypes.c_uint64),
        (
            "times",
            ctypes.c_int64 * 8,
        ),  # of access, birth, change, modification: s, and ns in 32 bits
        ("device", ctypes.c_uint32 * 4),  # this file, as a device, and where it is: major, minor
        ("rest", ctypes.c_uint8 * 112),
    )

    def time_ns(self, index: int) -> int:
        """Nanoseconds of the time number `index`."""
        return self.times[2 * index] * 10**9 + (self.times[2 * index + 1] & 0xFFFFFFFF)


@pytest.mark.parametrize("sync", [0, 0x2000, 0x4000], ids=["as stat", "force", "do not"])
def test_statx_says_what_stat_says(folder: Path, sync: int) -> None:
    """Promise: statx gives the same numbers as stat, whatever its cache flags."""
    file = folder / "file"
    file.write_bytes(b"x" * 10_000)
    file.chmod(0o640)
    os.link(file, folder / "link")
    found = Statx()
    call("statx", AT_FDCWD, os.fsencode(file), sync, 0x7FF, ctypes.byref(found))
    status = file.stat()
    assert found.mask & 0x7FF == 0x7FF
    assert (found.nlink, found.uid, found.gid, found.mode, found.ino, found.size) == (
        2,
        status.st_uid,
        status.st_gid,
        status.st_mode,
        status.st_ino,
        10_000,
    )
    descriptor = os.open(file, os.O_RDONLY)
    call("statx", descriptor, b"", AT_EMPTY_PATH | sync, 0x7FF, ctypes.byref(found))
    os.close(descriptor)
    assert found.ino == status.st_ino


BIRTH = 0x800  # STATX_BTIME
KERNEL = tuple(map(int, os.uname().release.split("-")[0].split(".")[:2]))


def born(path: Path, sync: int = 0) -> Statx:
    """statx of a file with all its fields and the time of birth."""
    found = Statx()
    call("statx", AT_FDCWD, os.fsencode(path), sync | 0x100, 0x7FF | BIRTH, ctypes.byref(found))
    return found


if KERNEL >= (6, 6):

    @pytest.mark.needs_cowfs
    def test_time_of_birth_is_told_and_stays(mount: Mounted) -> None:
        """Promise: statx gives the time a file was made, always the same, in snapshots too."""
        before_ns = time.time_ns()
        file, folder = mount.path / "file", mount.path / "folder"
        file.write_bytes(b"x")
        folder.mkdir()
        (mount.path / "symlink").symlink_to("file")
        after_ns = time.time_ns()
        births = {}
        for name in ("file", "folder", "symlink"):
            found = born(mount.path / name)
            assert found.mask & (0x7FF | BIRTH) == 0x7FF | BIRTH
            births[name] = found.time_ns(1)
            assert before_ns - 10**7 <= births[name] <= after_ns
        file.write_bytes(b"y" * 10_000)
        file.chmod(0o600)
        os.utime(file, ns=(1, 2))
        file.rename(folder / "moved")
        os.link(folder / "moved", file)
        snapshot = mount.snapshot("monday")
        for path in (file, folder / "moved", snapshot / "file", snapshot / "folder" / "moved"):
            for sync in (0x2000, 0x4000, 0):  # from the server, from the cache, as stat
                assert born(path, sync).time_ns(1) == births["file"], (path, sync)
        mount.remount()
        for name, birth_ns in births.items():
            assert born(mount.path / name).time_ns(1) == birth_ns
        shown = subprocess.run(
            ["stat", "-c", "%W", mount.path / "folder"], capture_output=True, check=True
        )
        assert int(shown.stdout) == births["folder"] // 10**9

    @pytest.mark.needs_cowfs
    def test_statx_with_birth_says_what_stat_says(mount: Mounted) -> None:
        """Promise: statx with birth time gives the same numbers as stat, for every type of file."""
        file = mount.path / "file"
        file.write_bytes(b"x" * 10_000)
        os.chown(file, 1234, 5678)
        os.link(file, mount.path / "link")
        os.utime(file, ns=(-1_500_000_000, -(10**18) - 1))
        (mount.path / "symlink").symlink_to("file")
        os.mkfifo(mount.path / "fifo")
        if not os.geteuid():
            os.mknod(mount.path / "device", stat.S_IFCHR | 0o600, os.makedev(300, 70_000))
        mount.snapshot("monday")
        for name in (".", ".snapshots", ".snapshots/monday/file", *os.listdir(mount.path)):
            path = mount.path / name
            found, status = born(path, 0x2000), path.lstat()
            assert found.mask & 0x7FF == 0x7FF
            assert bool(found.mask & BIRTH) == (name != ".snapshots")
            assert (found.ino, found.mode, found.nlink, found.uid, found.gid) == (
                status.st_ino,
                status.st_mode,
                status.st_nlink,
                status.st_uid,
                status.st_gid,
            )
            assert (found.size, found.blocks, found.blksize) == (
                status.st_size,
                status.st_blocks,
                status.st_blksize,
            )
            assert os.makedev(*found.device[:2]) == status.st_rdev
            assert [found.time_ns(0), found.time_ns(2), found.time_ns(3)] == [
                status.st_atime_ns,
                status.st_ctime_ns,
                status.st_mtime_ns,
            ]
        with pytest.raises(OSError, match="No such file"):
            born(mount.path / "missing", 0x2000)
