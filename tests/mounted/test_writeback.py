"""Promises with the kernel's write-back cache (`-o writeback`): no returned write() is lost.

The kernel then holds back pages that the daemon has not seen. Snapshots, fsync and sync must
include them all the same, and sizes, times and contents must be those of any other mount.
"""

import contextlib
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowfs.daemon import places
from cowfs.daemon.client import Client
from cowfs.history.edits import CreateSnapshot
from cowfs.history.requests import SnapshotsReply
from tests.commands import run_command
from tests.conftest import FAILED, Mounted, mounted, require_success, wait_for_end
from tests.mounted.counting_writer import SLOTS
from tests.sizes import HANG_SECONDS, wait_until

pytestmark = [pytest.mark.mounted, pytest.mark.needs_cowfs]

WRITERS = 2
SNAPSHOTS = 20


@pytest.fixture
def held(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Mounted]:
    """A mount with the write-back cache and a timer too slow to help."""
    with mounted(
        tmp_path / "cowfs",
        lambda: request.node.stash.get(FAILED, False),
        mount_options=("-o", "writeback,commit=3600"),
    ) as mount:
        yield mount


def close_of_a_dead_mount(file: int) -> None:
    """Close; the kernel may report that there were pages left to write."""
    with contextlib.suppress(OSError):
        os.close(file)


@pytest.mark.parametrize("how", ["quiet", "cut"])
def test_snapshot_holds_every_write_that_returned_before(
    held: Mounted, tmp_path: Path, how: str
) -> None:
    """Promise C6: this holds under load, also while the kernel holds pages back for a moment."""
    program = Path(__file__).with_name("counting_writer.py")
    shared = [tmp_path / f"done {number}" for number in range(WRITERS)]
    writers = []
    taken: list[list[int]] = []
    try:
        for number, done in enumerate(shared):
            done.write_bytes(bytes(8))
            words = [held.path / f"file {number}", done, how]
            writers.append(subprocess.Popen([sys.executable, program, *words]))
        for done in shared:
            wait_until(
                lambda done=done: int.from_bytes(done.read_bytes(), "little"),
                "the writers do not come to anything",
            )
        with Client(places.find_sockets(held.image)[0]) as client:
            for number in range(SNAPSHOTS):
                time.sleep(0.05)
                taken.append([int.from_bytes(done.read_bytes(), "little") for done in shared])
                client.ask(CreateSnapshot(f"s{number}"), SnapshotsReply)
    finally:
        for writer in writers:
            writer.kill()
            writer.wait(timeout=HANG_SECONDS)
    for number, before in enumerate(taken):
        for each, last in enumerate(before):
            data = (held.path / ".snapshots" / f"s{number}" / f"file {each}").read_bytes()
            numbers = struct.unpack_from(f"<{SLOTS}Q", data.ljust(8 * SLOTS, b"\0"))
            missed = [
                wanted
                for wanted in range(max(1, last - SLOTS // 2), last + 1)
                if numbers[wanted % SLOTS] < wanted
            ]
            assert not missed, f"s{number} misses of file {each} up to {last}: {missed[:5]}"


def test_snapshot_waits_for_pages_that_are_on_their_way(tmp_path: Path) -> None:
    """Promise C6: this holds also when there is more than the kernel sends at once."""
    options = ("-o", "writeback,commit=3600,dirty=1G")
    size, times = 60, []
    with mounted(tmp_path / "cowfs", mount_options=options) as mount:
        device = mount.path.stat().st_dev
        limits = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}")
        if os.getuid() == 0:  # otherwise the kernel collects a few MiB, and the test proves less
            (limits / "strict_limit").write_text("0")
            (limits / "max_ratio").write_text("100")
        file = os.open(mount.path / "file", os.O_CREAT | os.O_WRONLY)
        with Client(places.find_sockets(mount.image)[0]) as client:
            for number in range(6):
                for at in range(size):
                    os.pwrite(file, bytes([number + 1]) * (1 << 20), at << 20)
                times.append(os.fstat(file).st_mtime_ns)
                client.ask(CreateSnapshot(f"s{number}"), SnapshotsReply)
        os.close(file)
        for number in range(6):
            status = os.stat(mount.path / ".snapshots" / f"s{number}" / "file")
            assert status.st_mtime_ns == times[number], "a time is not that of write()"
            with open(mount.path / ".snapshots" / f"s{number}" / "file", "rb") as stream:
                found = [os.pread(stream.fileno(), 1, at << 20)[0] for at in range(size)]
            assert found == [number + 1] * size


def test_sync_makes_all_durable_and_fsync_its_file(held: Mounted) -> None:
    """Promise C2, weakened by this option: fsync covers its file, `cowfs sync` everything."""
    for round_number, how in enumerate(("fsync", "sync")):
        data = os.urandom(70_000)
        flags = os.O_CREAT | os.O_WRONLY
        files = [os.open(held.path / f"{round_number} {each}", flags) for each in range(5)]
        for file in files:
            os.write(file, data)
        if how == "fsync":
            os.fsync(files[3])
        else:
            require_success(run_command("sync", held.path))
        held.kill()
        for file in files:
            close_of_a_dead_mount(file)
        held.check()
        held.remount()
        for each in (3,) if how == "fsync" else range(5):
            assert (held.path / f"{round_number} {each}").read_bytes() == data, how


def test_timer_fetches_what_the_kernel_holds(tmp_path: Path) -> None:
    """Promise C5: a kill loses no more than the interval, though nobody called fsync."""
    options = ("-o", "writeback,commit=0.5")
    with mounted(tmp_path / "cowfs", mount_options=options) as mount:
        file = os.open(mount.path / "file", os.O_CREAT | os.O_WRONLY)
        os.write(file, b"old" * 10_000)
        mount.wait_for_commit()
        mount.kill()
        close_of_a_dead_mount(file)
        mount.check()
        mount.remount()
        assert (mount.path / "file").read_bytes() == b"old" * 10_000


@pytest.mark.parametrize("how", ["SIGTERM", "umount"])
def test_orderly_end_keeps_what_was_written(held: Mounted, how: str) -> None:
    """Promise: neither a signal nor an unmount loses pages of files, open ones included."""
    file = os.open(held.path / "file", os.O_CREAT | os.O_WRONLY)
    os.write(file, b"x" * 300_000)
    if how == "umount":
        os.close(file)
        subprocess.run(["umount", held.path], check=True)
    else:
        assert held.daemon_pid is not None
        os.kill(held.daemon_pid, signal.SIGTERM)
    assert held.daemon_pid is not None
    assert wait_for_end(held.daemon_pid)
    if how == "SIGTERM":
        close_of_a_dead_mount(file)
    held.remount()
    assert (held.path / "file").read_bytes() == b"x" * 300_000


def test_rollback_and_undo_keep_the_pages_of_the_state_they_leave(held: Mounted) -> None:
    """Promise C6: the state that a rollback leaves holds all writes through open files."""
    (held.path / "file").write_bytes(b"first" * 1000)
    held.snapshot("s")
    file = os.open(held.path / "file", os.O_RDWR)
    os.write(file, b"second")
    require_success(run_command("rollback", held.path, "s", "--force"))
    assert (held.path / "file").read_bytes() == b"first" * 1000
    os.write(file, b"too late")  # goes into the kernel's pages; an fsync would fail
    with pytest.raises(OSError, match="Stale"):
        os.fsync(file)
    with contextlib.suppress(OSError):
        os.close(file)
    require_success(run_command("undo", held.path))
    assert (held.path / "file").read_bytes()[:10] == b"secondirst"


def test_times_and_sizes_are_those_of_the_program(held: Mounted) -> None:
    """Promise: mtime and ctime are of write(), not of write-back; explicitly set ones stay."""
    file = held.path / "file"
    with open(file, "wb", buffering=0) as stream:
        stream.write(b"x" * 5000)
        written = os.fstat(stream.fileno())
        assert written.st_size == 5000
        time.sleep(0.1)
        os.fsync(stream.fileno())
        assert os.fstat(stream.fileno()) == written or (
            os.fstat(stream.fileno()).st_mtime_ns,
            os.fstat(stream.fileno()).st_ctime_ns,
        ) == (written.st_mtime_ns, written.st_ctime_ns)
        stream.write(b"y")
        os.utime(stream.fileno(), ns=(10**18, 10**18 + 1))
    explicit = held.path / "explicit"
    with open(explicit, "wb", buffering=0) as stream:
        stream.write(b"z" * 3000)
        os.utime(explicit, ns=(10**18, 10**18 + 1))
        stream.truncate(2000)
        os.utime(explicit, ns=(10**18, 10**18 + 1))
    wanted = {}
    for path in (file, explicit):
        wanted[path] = path.stat()
        assert wanted[path].st_mtime_ns == 10**18 + 1
    (held.path / "other name").hardlink_to(file)
    linked = file.stat().st_ctime_ns
    assert linked >= wanted[file].st_ctime_ns
    held.remount()
    assert file.stat().st_ctime_ns == linked
    for path in (file, explicit):
        now = path.stat()
        assert (now.st_mtime_ns, now.st_size) == (wanted[path].st_mtime_ns, wanted[path].st_size)
    assert explicit.stat().st_ctime_ns == wanted[explicit].st_ctime_ns


def test_data_that_has_not_come_yet_is_no_hole(held: Mounted) -> None:
    """Promise: SEEK_DATA skips no data that write() took, so copies of sparse files have it."""
    file = os.open(held.path / "file", os.O_CREAT | os.O_RDWR)
    os.ftruncate(file, 1 << 20)
    os.fsync(file)
    os.pwrite(file, b"data", 300_000)
    assert os.lseek(file, 0, os.SEEK_DATA) <= 300_000
    subprocess.run(["cp", "--sparse=auto", held.path / "file", held.path / "copy"], check=True)
    os.close(file)
    assert (held.path / "copy").read_bytes()[300_000:300_004] == b"data"


def test_full_filesystem_says_so_at_fsync(tmp_path: Path) -> None:
    """Promise: data that cannot be stored is an error of fsync or close, and the rest is whole."""
    options = ("-o", "writeback,commit=3600")
    with mounted(tmp_path / "cowfs", size="32M", mount_options=options) as mount:
        (mount.path / "kept").write_bytes(b"kept" * 1000)
        descriptor = os.open(mount.path / "large", os.O_CREAT | os.O_WRONLY)
        with contextlib.suppress(OSError):  # write() may already fail
            for _ in range(64):
                os.write(descriptor, bytes(1 << 20))
        with pytest.raises(OSError, match="space"):
            os.fsync(descriptor)
        with contextlib.suppress(OSError):
            os.close(descriptor)
        (mount.path / "large").unlink()
        require_success(run_command("sync", mount.path))
        assert (mount.path / "kept").read_bytes() == b"kept" * 1000
        (mount.path / "again").write_bytes(bytes(1 << 20))


def test_unmount_is_not_disturbed_by_the_fetching(tmp_path: Path) -> None:
    """Promise: fetching the kernel's pages keeps no mount busy."""
    options = ("-o", "writeback,commit=0.05")
    with mounted(tmp_path / "cowfs", mount_options=options) as mount:
        for _ in range(4):
            with open(mount.path / "file", "wb", buffering=0) as file:
                for _ in range(50):
                    file.write(os.urandom(10_000))
                    time.sleep(0.002)
            mount.remount()


def test_more_syncs_at_once_than_workers_end(tmp_path: Path) -> None:
    """Promise: however many programs sync, snapshots and the timer still get their pages."""
    program = """
import os, sys, time
file = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY)
for number in range(15):
    os.pwrite(file, os.urandom(30_000), number * 10_000)
    os.fsync(file)
"""
    options = ("-o", "writeback,commit=0.1")
    with mounted(tmp_path / "cowfs", mount_options=options) as mount:
        programs = [
            subprocess.Popen([sys.executable, "-c", program, mount.path / f"file {number}"])
            for number in range(24)
        ]
        try:
            for number in range(3):
                mount.snapshot(f"s{number}")
            for each in programs:
                assert each.wait(timeout=HANG_SECONDS) == 0
        finally:
            for each in programs:
                each.kill()
                each.wait(timeout=HANG_SECONDS)


@pytest.mark.needs_root  # only root can mount something on top
def test_snapshot_holds_the_pages_below_another_mount(held: Mounted) -> None:
    """Promise C6: this holds also where a mount on top hides the root of this one."""
    file = os.open(held.path / "file", os.O_CREAT | os.O_WRONLY)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", held.path], check=True)
    try:
        with Client(places.find_sockets(held.image)[0]) as client:
            os.write(file, b"below" * 100_000)
            client.ask(CreateSnapshot("s"), SnapshotsReply)
    finally:
        subprocess.run(["umount", held.path], check=True)
    os.close(file)
    found = (held.path / ".snapshots" / "s" / "file").read_bytes()
    assert found == b"below" * 100_000
