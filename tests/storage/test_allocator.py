"""Promises about the allocator: long runs, separate kinds, and only free blocks."""

import random

import pytest

from cowfs.errors import NoSpaceError
from cowfs.storage.allocator import Allocator
from cowfs.storage.format import (
    GROUP_BLOCKS,
    KIND_DATA,
    KIND_NODES,
    KIND_TWINS,
    NODE_BLOCKS,
    RING_SLOTS,
)
from cowfs.storage.repairs import Repairs
from cowfs.storage.spacemap import SpaceMap
from tests.model.devices import MemoryDevice

TOTAL = 20 * GROUP_BLOCKS


def make(total: int = TOTAL) -> tuple[SpaceMap, Allocator]:
    space_map = SpaceMap(MemoryDevice(total), total, 1, 2, Repairs(), writable=True)
    return space_map, Allocator(space_map)


def test_large_request_gets_long_runs() -> None:
    """Promise: a large write lies together, in one run per group of an empty image."""
    _, allocator = make()
    runs = allocator.allocate(KIND_DATA, 4 * GROUP_BLOCKS)
    assert sum(count for _, count in runs) == 4 * GROUP_BLOCKS
    assert len(runs) <= 5


def test_small_requests_in_sequence_lie_together() -> None:
    """Promise: files written one after the other get adjacent blocks."""
    _, allocator = make()
    runs = [allocator.allocate(KIND_DATA, 3)[0] for _ in range(100)]
    assert [first for first, _ in runs] == [runs[0][0] + 3 * at for at in range(100)]


def test_kinds_stay_apart_while_there_is_room() -> None:
    """Promise: data, nodes and twins live in separate groups."""
    choice = random.Random(1)
    _, allocator = make()
    groups: dict[int, set[int]] = {KIND_DATA: set(), KIND_NODES: set(), KIND_TWINS: set()}
    for _ in range(300):
        kind = choice.choice(sorted(groups))
        unit = 1 if kind == KIND_DATA else NODE_BLOCKS
        for first, count in allocator.allocate(kind, unit * choice.randrange(1, 8), unit):
            assert first // GROUP_BLOCKS == (first + count - 1) // GROUP_BLOCKS
            assert not count % unit
            groups[kind].add(first // GROUP_BLOCKS)
    assert not groups[KIND_DATA] & groups[KIND_NODES]
    assert not groups[KIND_DATA] & groups[KIND_TWINS]
    assert not groups[KIND_NODES] & groups[KIND_TWINS]


@pytest.mark.parametrize("seed", range(5))
def test_everything_is_handed_out_once_and_then_refused(seed: int) -> None:
    """Promise: each free block is given out once, and no other block is; then ENOSPC."""
    choice = random.Random(seed)
    total = 4096 + choice.randrange(3000)
    space_map, allocator = make(total)
    taken: set[int] = set()
    pending: set[int] = set()
    system: set[int] = set()
    while True:
        kind = choice.choice([KIND_DATA, KIND_NODES, KIND_TWINS])
        unit = choice.choice([1, 1, NODE_BLOCKS])
        own = choice.random() < 0.1
        try:
            runs = allocator.allocate(kind, unit * choice.randrange(1, 50), unit, system=own)
        except NoSpaceError:
            if unit == 1:
                break
            continue
        for first, count in runs:
            blocks = set(range(first, first + count))
            assert min(blocks) >= RING_SLOTS
            assert max(blocks) < total - RING_SLOTS
            assert not blocks & (taken | pending | system)
            (system if own else taken).update(blocks)
            if not own and choice.random() < 0.2:
                space_map.drop(first, count, 1)
                pending |= blocks
                taken -= blocks
    assert space_map.free_blocks == 0, "what was refused took all that was left"
    space_map.release(0)
    with pytest.raises(NoSpaceError):
        Allocator(space_map).allocate(KIND_DATA, 1)
    space_map.release(1)
    fresh, _ = make(total)
    assert space_map.pending_blocks == 0
    assert fresh.free_blocks == total - 2 * RING_SLOTS


def test_unit_of_four_is_found_behind_single_holes() -> None:
    """Promise: four free blocks for a node are found, wherever in the image they are."""
    space_map, allocator = make(4096)
    for block in range(RING_SLOTS, 4096 - RING_SLOTS):
        if block % 2 and not 3001 <= block <= 3003:
            space_map.take(block, 1, KIND_DATA)
    runs = allocator.allocate(KIND_NODES, NODE_BLOCKS, NODE_BLOCKS)
    assert len(runs) == 1
    assert 3000 <= runs[0][0] <= 3001
    with pytest.raises(NoSpaceError):
        allocator.allocate(KIND_NODES, NODE_BLOCKS, NODE_BLOCKS)
