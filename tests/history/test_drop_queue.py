"""Promises about a long drop queue: the cost of one call does not grow with it; and damage."""

import stat
from collections import Counter
from collections.abc import Iterator

import pytest

from cowfs.errors import CorruptError
from cowfs.history.drops import RUNS_PER_WORK, DropQueue
from cowfs.history.edits import CreateSnapshot, DeleteSnapshots
from cowfs.history.filesystem import Filesystem
from cowfs.history.images import make_filesystem, open_filesystem
from cowfs.history.records import COUNTER_MAX, DropRecord
from cowfs.storage.format import BLOCK_SIZE_BYTES
from cowfs.storage.node import Node, NodeCache
from tests.model.devices import MemoryDevice
from tests.model.recount import recount

ROOT = 1
DELETED = 60


class Walked(dict):  # type: ignore[type-arg]
    """A dictionary that counts how many of its entries were iterated over."""

    def __init__(self, *words: object) -> None:
        super().__init__(*words)
        self.walked = 0

    def __iter__(self) -> Iterator[object]:
        for key in super().__iter__():
            self.walked += 1
            yield key

    def items(self) -> Iterator[tuple[object, object]]:  # type: ignore[override]
        for item in super().items():
            self.walked += 1
            yield item

    def values(self) -> Iterator[object]:  # type: ignore[override]
        for value in super().values():
            self.walked += 1
            yield value

    def keys(self) -> Iterator[object]:  # type: ignore[override]
        return iter(self)


def make(deleted: int = DELETED) -> tuple[MemoryDevice, Filesystem]:
    """An image with `deleted` snapshots deleted, and none of their space freed yet."""
    disk = MemoryDevice(8192)
    make_filesystem(disk)
    filesystem = open_filesystem(disk, writable=True)
    volume = filesystem.live
    for number in range(400):  # enough for the tree to have an inner node
        ino = volume.create(ROOT, b"file%d" % number, stat.S_IFREG | 0o644, 0, 0).ino
    for number in range(deleted):
        volume.write(ino, 0, b"%d" % number * 3000)
        filesystem.apply(CreateSnapshot(f"s{number:03d}"))
    filesystem.apply(DeleteSnapshots(tuple(f"s{number:03d}" for number in range(deleted))))
    return disk, filesystem


def test_a_turn_of_a_long_queue_walks_over_no_other_drops() -> None:
    """Promise: deleting many snapshots blocks the event loop no longer than deleting one."""
    disk, filesystem = make()
    drops = filesystem.drops
    parts = {
        name: Walked(value)
        for name, value in vars(drops).items()
        if isinstance(value, dict) and len(value) == DELETED
    }
    vars(drops).update(parts)
    assert parts
    for _ in range(DELETED):
        drops.next_number()
    assert drops.working
    drops.step(1)
    assert drops.changed
    filesystem.commit()
    assert sum(part.walked for part in parts.values()) <= 2
    filesystem.work_drops()
    filesystem.commit()
    recount(disk).require_exact()


def test_a_commit_saves_only_the_drops_that_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    _, filesystem = make()
    drops, catalog = filesystem.drops, filesystem.catalog
    before = len(drops)
    while len(drops) == before:
        drops.step(1)
    filesystem.commit()
    while len(drops) == before - 1:
        drops.step(1)
    gone = len(drops)
    drops.step(1)
    if len(drops) != gone:
        pytest.fail("the trees are too small to stop within one")
    saved: Counter[str] = Counter()
    for name in ("put_drop", "remove_drop"):
        original = getattr(catalog, name)

        def counted(*words: object, name: str = name, original: object = original) -> None:
            saved[name] += 1
            original(*words)  # type: ignore[operator]

        monkeypatch.setattr(catalog, name, counted)
    filesystem.commit()
    assert saved == {"put_drop": 1, "remove_drop": 1}


def test_sums_follow_the_queue_and_the_next_mount_goes_on() -> None:
    disk, filesystem = make()
    while filesystem.drops.working:
        progress = filesystem.drops.progress()
        assert filesystem.drops.freed_blocks == sum(each.freed_blocks for each in progress)
        assert filesystem.drops.referenced_blocks == sum(
            each.referenced_blocks for each in progress
        )
        filesystem.drops.step(5)
        if len(filesystem.drops) == DELETED // 2:
            break
    left = len(filesystem.drops)
    filesystem.close()  # commits, and does no work on the queue
    again = open_filesystem(disk, writable=True)
    assert len(again.drops) == left
    assert again.drops.freed_blocks == filesystem.drops.freed_blocks
    again.work_drops()
    assert (len(again.drops), again.drops.referenced_blocks) == (0, 0)
    recount(disk).require_exact()


def test_a_turn_ends_by_the_runs_of_a_leaf_not_only_by_its_nodes() -> None:
    """Promise: a turn takes a few milliseconds even where every leaf holds as many runs as fit."""
    disk = MemoryDevice(16384)
    make_filesystem(disk)
    filesystem = open_filesystem(disk, writable=True)
    volume = filesystem.live
    files = [
        volume.create(ROOT, b"%d" % number, stat.S_IFREG | 0o644, 0, 0).ino for number in range(8)
    ]
    for at in range(150):  # one block of each file in turn: no two blocks of a file lie together
        for ino in files:
            volume.write(ino, 2 * at * BLOCK_SIZE_BYTES, bytes([at]) * BLOCK_SIZE_BYTES)
        filesystem.commit()
    filesystem.apply(CreateSnapshot("s"))
    for ino in files:
        volume.write(ino, 0, b"x")
    for name in range(8):
        volume.unlink(ROOT, b"%d" % name)
    filesystem.apply(DeleteSnapshots(("s",)))
    space_map, most, runs = filesystem.store.map, 0, 0
    drop = space_map.drop

    def counted(first: int, count: int, generation: int) -> int:
        nonlocal runs
        runs += 1
        return drop(first, count, generation)

    space_map.drop = counted  # type: ignore[method-assign]
    while filesystem.drops.working:
        runs = 0
        filesystem.drops.step(8)
        most = max(most, runs)
    assert RUNS_PER_WORK * 8 < most <= 300, most  # one leaf, and no second one


def test_numbers_stay_apart_where_an_image_says_the_highest() -> None:
    """Promise C9: if an image claims the highest number, new ones neither repeat nor overflow."""
    _, filesystem = make(3)
    drops = filesystem.drops
    record = next(iter(filesystem.catalog.drops()))
    drops._take(DropRecord(COUNTER_MAX, 9, "lie", 0, 0, record.path))
    numbers = [drops.next_number() for _ in range(5)]
    assert len(set(numbers)) == 5
    assert max(numbers) <= COUNTER_MAX
    assert not {1, 2, 3, COUNTER_MAX} & set(numbers)


def test_what_was_reached_is_saved_whatever_is_lost_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise C9: once the queue's records were reached, saving them meets no damage."""
    disk, filesystem = make()
    filesystem.close()
    for reached in (True, False):
        again = open_filesystem(disk.copy(), writable=True)
        drops = again.drops
        while len(drops) > DELETED - 3:
            drops.step(1)
        drops.step(1)
        operation = again.catalog.operation.begin_admitted()
        if reached:
            drops.reach()
        again.store.cache = NodeCache()  # drop the cache, which had all of it

        def lost(*words: object) -> Node:
            raise CorruptError("node", 0, "lost")

        monkeypatch.setattr(again.store, "load", lost)
        if reached:
            operation.change_unlogged()
            drops.save()
            assert not drops.changed
        else:
            with pytest.raises(CorruptError):
                drops.reach()
            assert drops.changed
        monkeypatch.undo()


def test_queue_takes_several_at_once() -> None:
    disk, filesystem = make(4)
    records = filesystem.catalog.drops()
    copy = DropQueue(filesystem.store, filesystem.catalog)
    assert [each.name for each in copy.progress()] == [record.name for record in records]
    copy._drops.clear()
    with filesystem.catalog.operation.begin_admitted() as operation:
        operation.change_unlogged()
        copy.add_all(records[::-1])
    assert filesystem.catalog.drops() == records
    filesystem.work_drops()
    recount(disk).require_exact()
