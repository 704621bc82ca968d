"""Promises about the space map, compared with an array of counters."""

import random

import numpy as np
import pytest

from cowfs.errors import CorruptError
from cowfs.storage.allocator import Allocator
from cowfs.storage.format import (
    GROUP_BLOCKS,
    KIND_DATA,
    KIND_NODES,
    NODE_BLOCKS,
    REFCOUNT_MAX,
    RING_SLOTS,
)
from cowfs.storage.repairs import Repairs
from cowfs.storage.runs import merge_runs
from cowfs.storage.spacemap import SpaceMap
from tests.model.devices import MemoryDevice

SEED, IMAGE = 7, 9


def new_map(disk: MemoryDevice, total: int, *, writable: bool = False) -> SpaceMap:
    return SpaceMap(disk, total, IMAGE, SEED, Repairs(), writable=writable)


def make(total: int = 5000) -> tuple[MemoryDevice, SpaceMap]:
    disk = MemoryDevice(total)
    return disk, new_map(disk, total)


def commit(disk: MemoryDevice, space_map: SpaceMap, generation: int, release: int) -> SpaceMap:
    """Write the map as a commit does; returns the map as opened again."""
    allocator = Allocator(space_map)
    places = [
        (first, 0)
        for first, count in allocator.allocate(
            KIND_NODES, len(space_map.dirty_pages()), system=True
        )
        for first in range(first, first + count)
    ]
    frozen = space_map.freeze(generation, places)
    for block, _, page in frozen.encode(IMAGE, SEED):
        disk.write(block * 4096, [page])
    disk.flush()
    space_map.written(frozen)
    space_map.release(release)
    again = new_map(disk, space_map.total_blocks)
    again.open(frozen.top, space_map.used_blocks)
    return again


def counts(space_map: SpaceMap) -> list[int]:
    return space_map.refcounts(0, space_map.total_blocks).tolist()


@pytest.mark.parametrize("total", [4096, 5000, 200_000])
@pytest.mark.parametrize("seed", range(4))
def test_refcounts_equal_an_array_of_counters_over_commits(total: int, seed: int) -> None:
    """Promise I1, I6: counts, free and pending blocks are right, live and after reopening."""
    choice = random.Random(seed)
    disk, space_map = make(total)
    allocator = Allocator(space_map)
    model: dict[int, int] = {}
    pending: dict[int, int] = {}
    generation = 1
    for _ in range(400):
        kind = choice.random()
        if kind < 0.4:
            for first, count in allocator.allocate(KIND_DATA, choice.randrange(1, 20)):
                for block in range(first, first + count):
                    assert block not in model
                    assert block not in pending, "a pending block is handed out (I2)"
                    model[block] = 1
        elif kind < 0.9 and model:
            first = choice.choice(sorted(model))
            count = 1
            while count < choice.randrange(1, 40) and first + count in model:
                count += 1
            if kind < 0.6:
                space_map.add(first, count)
                for block in range(first, first + count):
                    model[block] += 1
            else:
                freed = space_map.drop(first, count, generation)
                for block in range(first, first + count):
                    model[block] -= 1
                    if not model[block]:
                        del model[block]
                        pending[block] = generation
                        freed -= 1
                assert not freed
        elif kind > 0.95 and space_map.dirty_groups:
            again = commit(disk, space_map, generation, generation - 2)
            pending = {block: born for block, born in pending.items() if born > generation - 2}
            generation += 1
            assert again.used_blocks == len(model)
            assert again.system_blocks == space_map.system_blocks - space_map.pending_system_blocks
            if total < 10_000:
                assert counts(again) == [model.get(block, 0) for block in range(total)]
            for number in range(again.group_count):
                free_on_disk = int(again.free[number])
                assert again.group(number).busy.count(0) == free_on_disk == int(again.free[number])
        assert space_map.used_blocks == len(model)
        assert space_map.pending_blocks == len(pending)
        assert int(space_map.free.sum()) == space_map.free_blocks
    for block in random.Random(seed).sample(sorted(model), min(50, len(model))):
        assert space_map.refcount(block) == model[block]


def test_count_of_zero_is_never_dropped_or_added_to() -> None:
    """Promise: a refcount that would go below zero is reported as damage."""
    _, space_map = make()
    space_map.take(100, 3, KIND_DATA)
    for call in (lambda: space_map.add(101, 5), lambda: space_map.drop(102, 2, 1)):
        with pytest.raises(CorruptError, match="refcount 0"):
            call()


def test_highest_count_stays_for_good() -> None:
    """Promise: a block whose count reached the maximum, or was lost, is never freed."""
    _, space_map = make()
    space_map.take(100, 3, KIND_DATA)
    space_map.group(0).references[100] = REFCOUNT_MAX
    space_map.group(0).references[101] = REFCOUNT_MAX - 1
    space_map.add(100, 3)
    assert space_map.refcounts(100, 3).tolist() == [REFCOUNT_MAX, REFCOUNT_MAX, 2]
    assert space_map.drop(100, 3, 1) == 0
    assert space_map.drop(100, 3, 1) == 1
    assert space_map.refcounts(100, 3).tolist() == [REFCOUNT_MAX, REFCOUNT_MAX, 0]


def test_lost_group_is_full_for_good_where_anything_can_be_written() -> None:
    """Promise C9: lost counts cost space, and nothing else; the sums stay right (I6)."""
    disk, space_map = make()
    for first, count in Allocator(space_map).allocate(KIND_DATA, 300):
        assert count
        assert first
    again = commit(disk, space_map, 1, 0)
    place = int(again.index.levels[0][0]["block"])
    disk.damage(place)
    lost = new_map(disk, 5000, writable=True)
    lost.open(again.index.pointer(len(again.index.levels) - 1, 0), space_map.used_blocks)
    free_elsewhere = lost.free_blocks - int(lost.free[0])
    assert lost.refcount(200) == REFCOUNT_MAX
    assert lost.free_blocks == free_elsewhere == int(lost.free.sum())
    assert lost.drop(200, 10, 2) == 0
    assert all(first >= GROUP_BLOCKS for first, _ in Allocator(lost).allocate(KIND_DATA, 2000))
    written = commit(disk, lost, 2, 0)
    assert written.refcount(200) == REFCOUNT_MAX
    assert written.free_blocks == lost.free_blocks + lost.pending_system_blocks


def test_runs_over_group_edges_are_counted_on_both_sides() -> None:
    """Promise: a run that crosses groups is counted in each of them."""
    _, space_map = make()
    edge = GROUP_BLOCKS
    space_map.take(edge - 2, 2, KIND_DATA)
    space_map.take(edge, 3, KIND_DATA)
    space_map.add(edge - 1, 3)
    assert space_map.refcounts(edge - 3, 7).tolist() == [0, 1, 2, 2, 2, 1, 0]
    assert space_map.drop(edge - 2, 5, 1) == 2
    assert space_map.pending_upto(1) == 2
    assert space_map.pending_upto(0) == 0
    space_map.release(1)
    assert space_map.pending_blocks == 0
    assert space_map.is_busy(edge)
    assert not space_map.is_busy(edge + 2)


def test_node_places_count_only_blocks_that_lie_together() -> None:
    """Promise C10: single free blocks do not count as room for nodes."""
    _, space_map = make(4096)
    everything = space_map.node_places(1 << 30)
    assert everything == sum(
        space_map.group(number).busy.count(bytes(NODE_BLOCKS)) for number in range(4)
    )
    for block in range(RING_SLOTS, 4096 - RING_SLOTS, 2):
        space_map.take(block, 1, KIND_DATA)
    assert space_map.free_blocks == (4096 - 2 * RING_SLOTS) // 2
    assert space_map.node_places(1) == 0


def test_damaged_page_is_read_from_its_twin_and_without_one_refused() -> None:
    """Promise C9: a damaged page is found, and its blocks are never taken for free space."""
    disk, space_map = make()
    for first, count in Allocator(space_map).allocate(KIND_DATA, 300):
        assert count
        assert first
    places = [(2000 + 2 * index, 2001 + 2 * index) for index in range(len(space_map.dirty_pages()))]
    for first, twin in places:
        space_map.take_system(first, 1, KIND_NODES)
        space_map.take_system(twin, 1, KIND_NODES)
    frozen = space_map.freeze(1, places)
    for block, twin, page in frozen.encode(IMAGE, SEED):
        disk.write(block * 4096, [page])
        disk.write(twin * 4096, [page])
    disk.flush()
    for first, _ in places:
        disk.damage(first, 200)
    again = new_map(disk, 5000)
    again.open(frozen.top, space_map.used_blocks)
    assert counts(again) == counts(space_map)
    disk.damage(places[0][1], 77)
    lost = new_map(disk, 5000)
    lost.open(frozen.top, space_map.used_blocks)
    with pytest.raises(CorruptError, match="space map page"):
        counts(lost)
    disk.damage(places[-1][1], 77)
    with pytest.raises(CorruptError):
        new_map(disk, 5000).open(frozen.top, space_map.used_blocks)


def test_merge_runs_joins_neighbours_only() -> None:
    """Promise: neighbouring runs are merged for discards, and no others."""
    assert merge_runs([(1, 2), (3, 1), (5, 1), (6, 4)]) == [(1, 3), (5, 5)]
    assert merge_runs([(1, 5), (2, 1), (4, 4), (9, 1)]) == [(1, 7), (9, 1)]
    assert merge_runs([]) == []
    assert np.uint32(REFCOUNT_MAX) == REFCOUNT_MAX
