"""Promises about discards: all free space goes back to the host, and no block in use does."""

import random
import stat
import threading
from collections.abc import Callable, Sequence

import pytest

import cowfs.storage.discards as discards_module
from cowfs.errors import DeviceError
from cowfs.history.filesystem import Filesystem
from cowfs.history.images import make_filesystem, open_filesystem
from cowfs.storage.admission import DEFAULT_LIMITS
from cowfs.storage.device import Buffer
from cowfs.storage.discards import DISCARD_BLOCKS_MIN, Sweep
from cowfs.storage.format import BLOCK_SIZE_BYTES, GROUP_BLOCKS, KIND_DATA
from cowfs.storage.repairs import Repairs
from cowfs.storage.spacemap import SpaceMap
from cowfs.storage.superblock import read_newest
from tests.model.devices import MemoryDevice
from tests.model.recount import recount
from tests.sizes import HANG_SECONDS

TOTAL_BLOCKS = 8192
ROOT = 1


class SlowDevice(MemoryDevice):
    """Discards in another thread wait until `go` is set; `order` lists the events as they end."""

    def __init__(self, total_blocks: int) -> None:
        super().__init__(total_blocks)
        self.go = threading.Event()
        self.begun = threading.Event()
        self.order: list[tuple[str, int, int]] = []

    def discard(self, offset: int, size: int) -> bool:
        if threading.current_thread() is not threading.main_thread():
            self.begun.set()
            assert self.go.wait(HANG_SECONDS)
        taken = super().discard(offset, size)
        self.order.append(("discard", offset // BLOCK_SIZE_BYTES, size // BLOCK_SIZE_BYTES))
        return taken

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        super().write(offset, buffers)
        size = sum(map(len, buffers))
        self.order.append(("write", offset // BLOCK_SIZE_BYTES, size // BLOCK_SIZE_BYTES))


class RefusingDevice(MemoryDevice):
    def discard(self, offset: int, size: int) -> bool:
        return False


def make(device: MemoryDevice | None = None) -> tuple[MemoryDevice, Filesystem]:
    device = MemoryDevice(TOTAL_BLOCKS) if device is None else device
    make_filesystem(device)
    return device, open_filesystem(device, writable=True)


def create(filesystem: Filesystem, name: bytes, blocks: int) -> int:
    ino = filesystem.live.create(ROOT, name, stat.S_IFREG | 0o644, 0, 0).ino
    filesystem.live.write(ino, 0, b"x" * (blocks * BLOCK_SIZE_BYTES))
    return ino


def remove(filesystem: Filesystem, name: bytes) -> None:
    filesystem.live.reclaim(filesystem.live.unlink(ROOT, name).ino)


def pass_time(filesystem: Filesystem) -> None:
    """Commit until no generation retains what was freed before."""
    for number in range(DEFAULT_LIMITS.retained_generations + 1):
        filesystem.live.create(ROOT, b"time %d" % number, stat.S_IFREG, 0, 0)
        filesystem.commit()
        remove(filesystem, b"time %d" % number)


def kept_content(device: MemoryDevice) -> int:
    """Non-zero blocks of the device: the space that an image file would take of the host."""
    zeros = bytes(BLOCK_SIZE_BYTES)
    return sum(device.block(number) != zeros for number in range(device.total_blocks))


# --- what is found --------------------------------------------------------------------------------


def test_small_pieces_that_come_free_one_by_one_are_discarded_when_they_are_large_together() -> (
    None
):
    """Promise: blocks that a commit releases are joined with the free blocks around them."""
    device, filesystem = make()
    for number in range(64):
        create(filesystem, b"%d" % number, 16)
    filesystem.commit()
    choice = random.Random(3)
    for number in choice.sample(range(64), 64):
        remove(filesystem, b"%d" % number)
        filesystem.commit()
        Sweep.of_released(filesystem.store).run()
    pass_time(filesystem)
    Sweep.of_released(filesystem.store).run()
    lone = 2 * DISCARD_BLOCKS_MIN  # at the edges, between used blocks
    assert kept_content(device) < len(recount(device).reachable) + lone < 64 * 16


def test_free_run_across_a_group_edge_is_one_run() -> None:
    """Promise: free pieces too short alone are discarded together across a group edge."""
    space_map = SpaceMap(MemoryDevice(5000), 5000, 9, 7, Repairs(), writable=False)
    edge = 2 * GROUP_BLOCKS
    space_map.take(GROUP_BLOCKS, GROUP_BLOCKS - 150, KIND_DATA)
    space_map.take(edge + 200, GROUP_BLOCKS - 200, KIND_DATA)
    both = [(edge - 150, 350)]
    assert space_map.free_runs(1, 256) == space_map.free_runs(2, 256) == both
    assert space_map.free_runs(1, 1) == [(edge - 150, 150)]
    assert space_map.free_runs(1, 351) == []
    assert space_map.free_runs(4, 1)[0][1] < GROUP_BLOCKS  # the image and the ring end there


def test_released_groups_are_given_out_when_nothing_more_came_free_in_them() -> None:
    """Promise: a group is given out when no more comes free in it, and no group is forgotten."""
    space_map = SpaceMap(MemoryDevice(5000), 5000, 9, 7, Repairs(), writable=False)

    def free(number: int, generation: int) -> None:
        space_map.take(number * GROUP_BLOCKS + 10, 1, KIND_DATA)
        space_map.drop(number * GROUP_BLOCKS + 10, 1, generation)
        space_map.release(generation)

    free(1, 1)
    assert space_map.take_released(settled=True) == []
    free(2, 2)
    assert space_map.take_released(settled=True) == [1]
    free(2, 3)
    assert space_map.take_released(settled=True) == []
    assert space_map.take_released(settled=True) == [2]
    free(3, 4)
    assert space_map.take_released(settled=False) == [3]
    assert space_map.take_released(settled=False) == space_map.take_released(settled=True) == []


def test_group_whose_index_entry_lies_is_read_before_it_is_discarded() -> None:
    """Promise: if an index entry wrongly calls a group free, a sweep discards no used block."""
    device, filesystem = make()
    create(filesystem, b"file", 3000)
    filesystem.commit()
    reachable = recount(device).reachable
    filesystem.close()
    filesystem = open_filesystem(device, writable=True)
    store = filesystem.store
    store.map.free[:-1] = GROUP_BLOCKS
    device.kept = reachable
    Sweep.of_everything(store).run()
    assert filesystem.live.read(filesystem.live.lookup(ROOT, b"file").ino, 0, 10) == b"x" * 10


@pytest.mark.parametrize("seed", range(4))
def test_sweep_of_everything_leaves_what_is_in_use_and_nothing_else(seed: int) -> None:
    """Promise I2: the newest generation and the two before stay whole; all else is discarded."""
    device, filesystem = make()
    choice = random.Random(seed)
    for turn in range(12):
        for number in range(choice.randrange(8)):
            create(filesystem, b"%d.%d" % (turn, number), choice.randrange(1, 60))
        names = [entry.name for _, entry in filesystem.live.listing(ROOT)]
        for name in choice.sample(names, min(len(names), turn % 3)):
            remove(filesystem, name)
        filesystem.commit()
        newest = read_newest(device)
        kept: set[int] = set()
        for generation in range(max(1, newest.oldest_retained), newest.generation + 1):
            kept |= recount(device, generation).reachable
        device.kept = kept
        if choice.random() < 0.5:  # in the middle of a transaction
            create(filesystem, b"open %d" % turn, 5)
        Sweep.of_everything(filesystem.store).run()
        ring = 2 * 64
        assert kept_content(device) <= len(kept) + ring
        filesystem.commit()
        recount(device.crash(choice)).require_exact()


# --- what must never be ---------------------------------------------------------------------------


def in_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call)
    thread.start()
    return thread


def test_block_allocated_while_it_is_discarded_is_written_after_the_discard() -> None:
    """Promise: a commit that uses blocks which a sweep saw free waits for the discard under way.

    No later run of that sweep begins.
    """
    device = SlowDevice(TOTAL_BLOCKS)
    _, filesystem = make(device)
    for name, blocks in ((b"a", 600), (b"between", 100), (b"b", 600)):
        create(filesystem, name, blocks)
    filesystem.commit()
    for name in (b"a", b"b"):
        remove(filesystem, name)
    pass_time(filesystem)
    sweep = Sweep.of_everything(filesystem.store)
    discard = sweep.look()
    assert len(discard.runs) > 2
    sweeper = in_thread(discard.run)
    assert device.begun.wait(HANG_SECONDS)
    ino = create(filesystem, b"new", 2000)  # in the run that is being discarded
    device.order.clear()
    commit = filesystem.freeze()
    writer = in_thread(commit.write)
    writer.join(0.2)
    assert writer.is_alive(), "the commit wrote while the discard was under way"
    assert device.order == []
    device.go.set()
    writer.join(HANG_SECONDS)
    sweeper.join(HANG_SECONDS)
    filesystem.finish(commit)
    kinds = [kind for kind, _, _ in device.order]
    assert kinds.count("discard") == 1 == kinds.index("write")
    sweep.done_with(discard)
    assert filesystem.store.discard is None
    sweep.run()  # the rest, as it is now
    assert filesystem.live.read(ino, 0, 1 << 30) == b"x" * (2000 * BLOCK_SIZE_BYTES)
    recount(device.crash()).require_exact()
    again = open_filesystem(device.crash(), writable=False)
    assert again.live.read(ino, 0, 1 << 30) == b"x" * (2000 * BLOCK_SIZE_BYTES)


def test_discard_that_comes_after_the_commit_does_nothing() -> None:
    """Promise: a commit does not wait for a discard thread not yet started, nor lose data to it."""
    device, filesystem = make()
    sweep = Sweep.of_everything(filesystem.store)
    discard = sweep.look()
    create(filesystem, b"new", 2000)
    filesystem.commit()
    device.events.clear()
    in_thread(discard.run).join(HANG_SECONDS)
    assert device.events == []
    sweep.done_with(discard)
    assert (sweep.discarded_blocks, sweep.is_done) == (0, False)
    sweep.run()
    assert sweep.discarded_blocks > TOTAL_BLOCKS - 2500
    recount(device.crash()).require_exact()


@pytest.mark.parametrize("seed", range(3))
def test_sweeps_beside_allocations_and_commits_lose_nothing(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: files stay whole in any order of looks, allocations, commits and discards."""
    monkeypatch.setattr(discards_module, "STEP_BLOCKS_MAX", 700)
    monkeypatch.setattr(discards_module, "DISCARD_BLOCKS_MIN", 1)
    device, filesystem = make()
    choice = random.Random(seed)
    files: dict[bytes, int] = {}
    sweep, discard, thread = Sweep.of_everything(filesystem.store), None, None
    for turn in range(150):
        match choice.randrange(5):
            case 0:
                name = b"%d" % turn
                create(filesystem, name, files.setdefault(name, choice.randrange(1, 200)))
            case 1 if files:
                name = choice.choice(sorted(files))
                remove(filesystem, name)
                del files[name]
            case 2:
                filesystem.commit()
                recount(device.crash(choice)).require_exact()
            case 3 if discard is None:
                if sweep.is_done:
                    make_sweep = choice.choice([Sweep.of_everything, Sweep.of_released])
                    sweep = make_sweep(filesystem.store)
                else:
                    discard = sweep.look()
                    thread = in_thread(discard.run) if choice.random() < 0.7 else None
            case 4 if discard is not None:
                if thread is None:
                    discard.run()
                elif choice.random() < 0.5:
                    thread.join(HANG_SECONDS)
                sweep.done_with(discard)
                discard = None
        if sum(files.values()) > 4000:
            name, _ = files.popitem()
            remove(filesystem, name)
    filesystem.commit()
    for name, blocks in files.items():
        ino = filesystem.live.lookup(ROOT, name).ino
        assert filesystem.live.read(ino, 0, 1 << 30) == b"x" * (blocks * BLOCK_SIZE_BYTES)


def test_sweep_ends_where_writing_has_ended() -> None:
    """Promise C8: after a failed commit nothing changes the image, discards neither."""
    _, filesystem = make()
    filesystem.store.admission.closed = DeviceError("ended")
    with pytest.raises(DeviceError, match="ended"):
        Sweep.of_everything(filesystem.store).look()


def test_host_that_refuses_is_asked_once() -> None:
    """Promise: a sweep on a device that cannot discard ends at once, and says so."""
    _, filesystem = make(RefusingDevice(TOTAL_BLOCKS))
    sweep = Sweep.of_everything(filesystem.store)
    sweep.run()
    assert sweep.is_refused
    assert (sweep.discarded_blocks, filesystem.store.discard) == (0, None)


# --- at the end of a mount ------------------------------------------------------------------------


def test_close_gives_back_what_the_last_commits_freed() -> None:
    """Promise: after unmounting, an image takes of the host only the space that is in use."""
    device, filesystem = make()
    create(filesystem, b"large", 4000)
    filesystem.commit()
    remove(filesystem, b"large")
    filesystem.close()
    assert kept_content(device) < 600
    newest = read_newest(device)
    assert newest.flags, "marked clean"
    recount(device).require_exact()


def test_close_without_discards_makes_one_commit_and_discards_nothing() -> None:
    """Promise: with -o nodiscard, closing discards nothing either."""
    device = MemoryDevice(TOTAL_BLOCKS)
    make_filesystem(device)
    filesystem = open_filesystem(device, writable=True, discard=False)
    create(filesystem, b"large", 4000)
    filesystem.commit()
    generation = filesystem.store.superblock.generation
    remove(filesystem, b"large")
    filesystem.close()
    assert all(event.kind != "discard" for event in device.events)
    assert read_newest(device).generation == generation + 1


def test_close_after_little_came_free_makes_one_commit() -> None:
    """Promise: a close does not push out the generations kept for rescue to free a few blocks."""
    device, filesystem = make()
    create(filesystem, b"small", 100)
    filesystem.commit()
    generation = filesystem.store.superblock.generation
    remove(filesystem, b"small")
    filesystem.close()
    assert read_newest(device).generation == generation + 1


def test_close_whose_follow_up_fails_has_everything_durable(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: an unmount does not fail when only its discards fail."""
    device, filesystem = make()
    create(filesystem, b"large", 4000)
    filesystem.commit()
    remove(filesystem, b"large")
    filesystem.commit(clean=True)
    generation = filesystem.store.superblock.generation

    def refuse() -> None:
        raise DeviceError("the host is full")

    monkeypatch.setattr(device, "flush", refuse)
    filesystem.close()
    assert "free space was not given back to the host" in caplog.text
    again = open_filesystem(device.crash(), writable=False)
    assert again.store.superblock.generation == generation
