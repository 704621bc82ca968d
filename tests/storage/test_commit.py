"""Promises about the commit: what is written where, what a failure leaves, what may go on."""

import errno
import os
import random
import stat
import threading

import pytest

from cowfs.care.check import check_image
from cowfs.errors import DeviceError
from cowfs.history.edits import CreateSnapshot, DeleteSnapshots, HoldSnapshots, Plan, Rollback
from cowfs.history.filesystem import Filesystem
from cowfs.history.images import make_filesystem, open_filesystem
from cowfs.history.records import RootRecord
from cowfs.storage.admission import DEFAULT_LIMITS
from cowfs.storage.discards import Sweep
from cowfs.storage.format import BLOCK_SIZE_BYTES, RING_SLOTS
from cowfs.storage.superblock import read_newest
from tests.model.devices import Fault, FaultDevice, MemoryDevice
from tests.model.recount import recount
from tests.sizes import HANG_SECONDS

TOTAL_BLOCKS = 8192
ROOT = 1


@pytest.fixture(autouse=True)
def _discard_small_holes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cowfs.storage.discards.DISCARD_BLOCKS_MIN", 1)


def make() -> tuple[MemoryDevice, FaultDevice, Filesystem]:
    disk = MemoryDevice(TOTAL_BLOCKS)
    make_filesystem(disk)
    device = FaultDevice(disk)
    return disk, device, open_filesystem(device, writable=True, cache_bytes=1)


def work(filesystem: Filesystem, choice: random.Random) -> None:
    """Do some operations of every kind that moves blocks."""
    volume = filesystem.live
    for _ in range(choice.randrange(1, 12)):
        names = [entry.name for _, entry in volume.listing(ROOT)]
        if len(names) < 5 or choice.random() < 0.5:
            name = b"%d" % choice.randrange(1 << 30)
            ino = volume.create(ROOT, name, stat.S_IFREG | 0o644, 0, 0).ino
            data = choice.randbytes(choice.choice([0, 10, 5000, 150_000]))
            volume.write(ino, choice.choice([0, 3000]), data)
        elif choice.random() < 0.7:
            ino = volume.lookup(ROOT, choice.choice(names)).ino
            volume.write(ino, choice.randrange(100_000), choice.randbytes(9000))
        else:
            inode = volume.unlink(ROOT, choice.choice(names))
            volume.reclaim(inode.ino)


def contents(filesystem: Filesystem) -> dict[bytes, bytes]:
    volume = filesystem.live
    return {entry.name: volume.read(entry.ino, 0, 1 << 30) for _, entry in volume.listing(ROOT)}


def protect_what_is_retained(disk: MemoryDevice) -> None:
    """From here on the device refuses writes to blocks of the retained generations (I2)."""
    newest = read_newest(disk)
    blocks: set[int] = set()
    for generation in range(newest.generation, max(newest.oldest_retained, 1) - 1, -1):
        blocks |= recount(disk, generation).reachable
        if generation == newest.generation + 1 - DEFAULT_LIMITS.retained_generations:
            disk.kept = set(blocks)  # the next commit retains these blocks, once it is durable
    disk.protected = blocks


@pytest.mark.parametrize("seed", range(6))
def test_commit_never_writes_what_a_retained_generation_shows(seed: int) -> None:
    """Promise I2: no commit writes a retained block, over snapshots, drops, crashes, reopening."""
    choice = random.Random(seed)
    disk, device, filesystem = make()
    protected = 0
    for step in range(60):
        work(filesystem, choice)
        snapshots = filesystem.catalog.snapshots()
        kind = choice.random()
        if kind < 0.2 and len(snapshots) < 4:
            filesystem.apply(CreateSnapshot(f"s{step}"))
        elif kind < 0.35 and snapshots:
            name = choice.choice(snapshots).name
            filesystem.apply(DeleteSnapshots((name,)))
        elif kind < 0.4 and snapshots:
            filesystem.apply(Rollback(choice.choice(snapshots).name))
        elif kind < 0.5:
            disk = disk.crash(choice)
            device = FaultDevice(disk)
            filesystem = open_filesystem(device, writable=True, cache_bytes=1)
        else:
            filesystem.drops.step(choice.randrange(20))
            filesystem.commit()
        protect_what_is_retained(disk)
        protected += len(disk.protected)
    assert protected
    assert (
        read_newest(disk).generation - read_newest(disk).oldest_retained
        <= DEFAULT_LIMITS.retained_generations
    )
    recount(disk).require_exact()


def test_commit_keeps_promised_generations_over_reopening() -> None:
    """Promise I2: the next mount too retains the older generations that the superblock promises."""
    choice = random.Random(1)
    disk, _, filesystem = make()
    for _ in range(4):
        work(filesystem, choice)
        filesystem.commit()
    older = read_newest(disk).generation - 1
    disk = disk.crash()
    filesystem = open_filesystem(disk, writable=True)
    assert filesystem.store.oldest_retained() == older, "the open transaction makes older + 2"
    expected = contents(open_filesystem(disk, writable=False, generation=older))
    work(filesystem, choice)
    filesystem.commit()
    assert read_newest(disk).oldest_retained == older
    assert contents(open_filesystem(disk, writable=False, generation=older)) == expected
    assert check_image(disk).clean


def test_reopening_beside_a_damaged_older_generation_promises_less() -> None:
    """Promise: an older generation that is already lost does not prevent a mount."""
    disk, _, filesystem = make()
    for seed in range(3):
        work(filesystem, random.Random(seed))
        filesystem.commit()
    newest = read_newest(disk).generation
    for copy in (0, TOTAL_BLOCKS - RING_SLOTS):
        disk.damage(copy + (newest - 1) % RING_SLOTS, 100)
    disk = disk.crash()
    filesystem = open_filesystem(disk, writable=True)
    assert filesystem.store.oldest_held == newest
    work(filesystem, random.Random(9))
    filesystem.commit()
    assert read_newest(disk).oldest_retained == newest


@pytest.mark.parametrize("kind", ["write", "flush"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
@pytest.mark.parametrize("sticky", [False, True], ids=["once", "always"])
@pytest.mark.parametrize("short", [False, True], ids=["whole", "short"])
def test_commit_that_fails_at_any_call_ends_writing_and_loses_nothing(
    kind: str, number: int, sticky: bool, short: bool
) -> None:
    """Promise C8: EIO now and ever after, read-only, the last generation intact."""
    after = 0
    while True:
        disk, device, filesystem = make()
        choice = random.Random(3)
        work(filesystem, choice)
        filesystem.commit()
        expected = contents(filesystem)
        generation = filesystem.store.superblock.generation
        work(filesystem, choice)
        later = contents(filesystem)
        device.fault = Fault(kind, after, number, short=short, sticky=sticky)
        try:
            filesystem.commit()
        except DeviceError:
            pass
        else:
            assert not device.fault.fired
            assert after > (1 if kind == "flush" else 3), "too few faults were tried"
            return
        for _ in range(2):  # a retry must never look like a success
            with pytest.raises(DeviceError):
                filesystem.commit()
            with pytest.raises(DeviceError):
                filesystem.live.create(ROOT, b"new", stat.S_IFREG, 0, 0)
            with pytest.raises(DeviceError):
                filesystem.live.unlink(ROOT, next(iter(expected)))
        assert filesystem.store.failed is not None
        filesystem.close()
        for survived in (disk.crash(), disk.copy()):
            again = open_filesystem(survived, writable=True)
            found = contents(again)
            if again.store.superblock.generation == generation:
                assert found == expected
            else:  # the slot was written although its flush failed
                assert found == later
            assert check_image(survived).clean
            again.commit()
        after += 1


def test_commit_written_in_a_thread_lets_the_next_transaction_go_on() -> None:
    """Promise: a frozen commit is written as it was, whatever changes meanwhile; reads see both."""
    disk, device, filesystem = make()
    volume = filesystem.live
    names = [b"n%03d" % number for number in range(400)]
    for number, name in enumerate(names):
        ino = volume.create(ROOT, name, stat.S_IFREG | 0o644, 0, 0).ino
        volume.write(ino, 0, b"%04d" % number * (3000 if number % 5 == 0 else 100))
    for turn in range(6):
        gate = threading.Event()
        device.before_write = lambda gate=gate: gate.wait(HANG_SECONDS) and None
        frozen = contents(filesystem)
        commit = filesystem.freeze()
        thread = threading.Thread(target=commit.write, daemon=True)
        thread.start()
        assert contents(filesystem) == frozen, "nothing of it is on the disk yet"
        for number in range(turn, 390, 7):
            ino = volume.lookup(ROOT, names[number]).ino
            volume.write(ino, turn * 10, b"turn%d" % turn * 50)
        volume.unlink(ROOT, names[399 - turn])
        during = contents(filesystem)
        gate.set()
        thread.join()
        assert contents(filesystem) == during
        filesystem.finish(commit)
        assert contents(filesystem) == during
        assert contents(open_filesystem(disk.crash(), writable=False)) == frozen
    filesystem.commit()
    assert contents(open_filesystem(disk.crash(), writable=False)) == during
    assert check_image(disk).clean


def test_load_of_a_frozen_node_beats_an_older_node_of_that_place_in_the_cache() -> None:
    """Promise: when a place is reused, a load gives the new node at once, written or not."""
    disk = MemoryDevice(TOTAL_BLOCKS)
    make_filesystem(disk)
    device = FaultDevice(disk)
    filesystem = open_filesystem(device, writable=True)  # with a cache that evicts nothing
    volume = filesystem.live
    for number in range(600):
        volume.create(ROOT, b"%04d" % number + b"n" * 100, stat.S_IFREG, 0, 0)
    filesystem.commit()
    filesystem.apply(CreateSnapshot("s"))
    for turn in range(30):  # places come free and are reused
        ino = volume.lookup(ROOT, b"%04d" % (turn * 20) + b"n" * 100).ino
        volume.write(ino, 0, b"%d" % turn)
        reached = threading.Event()
        gate = threading.Event()

        def hold(reached: threading.Event = reached, gate: threading.Event = gate) -> None:
            reached.set()
            gate.wait(HANG_SECONDS)

        device.before_write = hold
        for kind in filesystem.store.allocator._cursors:  # reuse places at once
            filesystem.store.allocator._cursors[kind] = -1
        commit = filesystem.freeze()
        thread = threading.Thread(target=commit.write, daemon=True)
        thread.start()
        try:
            # The nodes are pointers then, but their bytes are not yet on disk.
            assert reached.wait(HANG_SECONDS)
            volume.inodes._clean.clear()
            for number in range(600):
                volume.lookup(ROOT, b"%04d" % number + b"n" * 100)
        finally:
            gate.set()
            thread.join()
        filesystem.finish(commit)


def test_freeze_that_fails_by_a_mistake_of_ours_ends_writing() -> None:
    """Promise: a half-closed transaction is never written, whatever bug interrupted it."""
    disk, _, filesystem = make()
    work(filesystem, random.Random(5))
    filesystem.commit()
    expected = contents(filesystem)
    work(filesystem, random.Random(6))

    class Broken(HoldSnapshots, frozen=True):
        def apply(self, filesystem: Filesystem, plan: Plan) -> list[RootRecord]:
            raise ValueError("a mistake")

    with pytest.raises(ValueError, match="a mistake"):
        filesystem.apply(Broken((), True))
    with pytest.raises(DeviceError):
        filesystem.commit()
    assert contents(open_filesystem(disk.crash(), writable=False)) == expected


def test_commit_of_nothing_is_not_needed_and_close_marks_the_image_clean() -> None:
    """Promise: an orderly close marks the image clean, and an idle filesystem writes nothing."""
    disk, _, filesystem = make()
    work(filesystem, random.Random(7))
    filesystem.commit()
    assert not filesystem.changed
    filesystem.close()
    assert read_newest(disk).flags
    writes = len(disk.events)
    filesystem = open_filesystem(disk, writable=True)
    filesystem.close()
    assert len(disk.events) == writes


def test_discard_never_meets_what_a_retained_generation_shows() -> None:
    """Promise I2: a discard, as a write, never touches a block of a retained generation."""
    disk, _, filesystem = make()
    volume = filesystem.live
    ino = volume.create(ROOT, b"file", stat.S_IFREG, 0, 0).ino
    discarded = 0
    for turn in range(12):
        volume.write(ino, 0, os.urandom(64 * BLOCK_SIZE_BYTES))
        filesystem.commit()
        protect_what_is_retained(disk)
        disk.kept = disk.protected
        Sweep.of_released(filesystem.store).run()
        discarded += sum(event.block_count for event in disk.events if event.kind == "discard")
        assert turn < 4 or discarded
