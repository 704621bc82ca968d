"""Promises of the structure: it holds every node and pointer, and no node is read twice."""

import random

import numpy as np
import pytest

from cowfs.accounting.owners import Survey, survey
from cowfs.accounting.structure import Structure, covered, empty_structure, spread
from cowfs.files.items import references
from cowfs.history.edits import CreateSnapshot, DeleteSnapshots
from cowfs.history.images import open_filesystem
from cowfs.storage.device import Device
from cowfs.storage.format import (
    BLOCK_SIZE_BYTES,
    NODE_SIZE_BYTES,
    decode_node,
    decode_pointer,
)
from tests.accounting.test_accounting import table_of
from tests.model.devices import FaultDevice, MemoryDevice
from tests.model.histories import History
from tests.model.holdings import holdings
from tests.sizes import seeds

ARRAYS = (
    "nodes",
    "level_from",
    "child_from",
    "children",
    "run_from",
    "run_first",
    "run_count",
    "whole",
    "tops",
)


class RecordingDevice(FaultDevice):
    """Records the first block of each read."""

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self.reads: list[int] = []

    def read(self, offset: int, size: int) -> bytes:
        self.reads.append(offset // BLOCK_SIZE_BYTES)
        return super().read(offset, size)


def require_same(one: Survey, two: Survey) -> None:
    """Fail unless two surveys are equal, however they were made."""
    for name in ARRAYS:
        left, right = getattr(one.structure, name), getattr(two.structure, name)
        assert left.dtype == right.dtype, name
        assert np.array_equal(left, right), name
    assert np.array_equal(one.labels, two.labels)
    assert one.sets.owners == two.sets.owners
    assert table_of(one.sets) == table_of(two.sets)
    assert one.sets.retained == two.sets.retained


def require_true(structure: Structure, disk: MemoryDevice) -> None:
    """Fail unless it has every node, pointer and run of the newest generation, and no other."""
    found = holdings(disk)
    superblock = found.superblock
    expected = {
        block: facts for held in found.held.values() for block, facts in held.node_at.items()
    }
    done: dict[int, int] = {}
    for drop in open_filesystem(disk, writable=False).catalog.drops():
        done |= {step.pointer.block: step.done for step in drop.path}
    met = {}
    for index, row in enumerate(structure.nodes):
        block = int(row["block"])
        pointer = structure.pointer(index)
        met[block] = (structure.level_of(index), pointer.birth, pointer.twin)
        assert structure.node_blocks()[index] == (8 if pointer.twin else 4)
        data = disk.read(block * BLOCK_SIZE_BYTES, NODE_SIZE_BYTES)
        image = decode_node(data, pointer, superblock.image_id, superblock.seed, None)
        values = image.values[done.get(block, 0) :]
        children = structure.children[structure.child_from[index] : structure.child_from[index + 1]]
        assert structure.whole[index] == (block not in done)
        runs = slice(structure.run_from[index], structure.run_from[index + 1])
        first, count = structure.run_first[runs].tolist(), structure.run_count[runs].tolist()
        if image.level:
            pointers = [decode_pointer(value) for value in values]
            assert [structure.pointer(int(child)) for child in children] == pointers
            assert not first
        else:
            is_catalog = block in found.held["catalog", 0].node_at
            wanted = [] if is_catalog else references(image.keys, image.values)
            assert list(zip(first, count, strict=True)) == wanted
            assert not len(children)
    assert met == expected
    assert len(met) == len(structure.nodes)
    tops = {held.pointer.block for held in found.held.values()}
    assert set(structure.nodes["block"][structure.tops].tolist()) == tops
    for level in range(structure.levels):
        blocks = structure.nodes["block"][structure.level(level)]
        assert (np.diff(blocks) > 0).all(), "not by block"
        assert all(expected[block][0] == level for block in blocks.tolist())


@pytest.mark.parametrize("seed", seeds(3, 6))
def test_structure_is_what_the_nodes_say(seed: int) -> None:
    """Promise: each node is there once, with level, place, twin, birth and all its pointers."""
    history = History(seed)
    for _ in range(3):
        history.run(60)
        require_true(survey(history.filesystem).structure, history.disk)


def test_structure_of_three_levels_is_what_the_nodes_say() -> None:
    """Promise: the same for trees of three levels, surveyed at once or in steps."""
    history = History(4, small_files=1750)
    known = None
    for _ in range(3):
        history.run(25)
        surveyed = survey(history.filesystem, known)
        require_true(surveyed.structure, history.disk)
        require_same(surveyed, survey(history.filesystem))
        known = surveyed.structure
    assert known is not None
    assert known.levels == 3


@pytest.mark.parametrize("seed", seeds(3, 8, 20))
def test_what_is_known_changes_nothing(seed: int) -> None:
    """Promise: an older structure, or that of a diverged copy, does not change the survey."""
    history = History(seed)
    known = [empty_structure()]
    for moment in range(4):
        history.run(50)
        fresh = survey(history.filesystem)
        for structure in known:
            require_same(survey(history.filesystem, structure), fresh)
            require_same(survey(open_filesystem(history.disk, writable=False), structure), fresh)
        # A copy that went another way: the same places and births, but other nodes.
        other = history.fork(seed + 1000 + moment)
        other.run(30)
        known += [fresh.structure, survey(other.filesystem, fresh.structure).structure]


def test_places_that_were_freed_and_used_again_are_read_anew() -> None:
    """Promise: a place that was freed and reused is read anew, not taken from the old structure."""
    history = History(2, small_files=60, total_blocks=4096)
    live = history.live
    inos = [live.create(1, b"large %d" % number, 0o100644, 0, 0).ino for number in range(10)]
    known = []
    reused = 0
    for number in range(36):
        for ino in inos:
            live.write(ino, 0, history.choice.randbytes(20 * BLOCK_SIZE_BYTES))
        history.write_small()
        history.filesystem.apply(CreateSnapshot(f"n{number}"))
        if number > 3:
            history.filesystem.apply(DeleteSnapshots((f"n{number - 3}",)))
            history.filesystem.work_drops()
        fresh = survey(history.filesystem)
        for structure in known:
            reused += places_with_other_nodes(structure, fresh.structure)
        for structure in known[:1] + known[-1:]:
            require_same(survey(history.filesystem, structure), fresh)
        known.append(fresh.structure)
    assert reused > 20


def places_with_other_nodes(one: Structure, two: Structure) -> int:
    blocks, first, second = np.intersect1d(
        one.nodes["block"], two.nodes["block"], return_indices=True
    )
    return len(blocks) - int(np.count_nonzero(one.nodes[first] == two.nodes[second]))


def test_copy_that_diverged_has_other_nodes_of_the_same_birth_in_the_same_place() -> None:
    """Promise: nodes of the same place and birth are told apart by their checksums."""
    met = 0
    for seed in range(4):
        history = History(seed, small_files=20)
        history.run(30)
        left, right = history.fork(1), history.fork(2)
        for fork in (left, right):
            fork.run(12)
        known = survey(left.filesystem).structure
        fresh = survey(right.filesystem)
        require_same(survey(right.filesystem, known), fresh)
        _, first, second = np.intersect1d(
            known.nodes["block"], fresh.structure.nodes["block"], return_indices=True
        )
        one, two = known.nodes[first], fresh.structure.nodes[second]
        met += int(((one["birth"] == two["birth"]) & (one["sum_low"] != two["sum_low"])).sum())
    assert met


@pytest.mark.parametrize("seed", seeds(3, 6, 40))
def test_known_nodes_are_not_read_again(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise: a survey reads only new nodes: each once, and a new root at most twice."""
    monkeypatch.setattr("cowfs.accounting.owners._retained", lambda *_: None)
    history = History(seed, small_files=100)
    history.run(60)
    known = survey(history.filesystem).structure
    for _ in range(3):
        history.run(15)
        device = RecordingDevice(history.disk)
        filesystem = open_filesystem(device, writable=False)
        filesystem.catalog.snapshots()
        filesystem.catalog.drops()
        device.reads.clear()
        found = survey(filesystem, known).structure
        reads = [block for block in device.reads if block in set(found.nodes["block"].tolist())]
        identities = {tuple(row) for row in known.nodes[known.whole].tolist()}
        old = {row[0] for row in found.nodes[found.whole].tolist() if tuple(row) in identities}
        new = set(found.nodes["block"].tolist()) - old
        assert old, "nothing is as it was"
        assert old.isdisjoint(reads)
        tops = set(found.nodes["block"][found.tops].tolist())
        for block in new:
            assert reads.count(block) in ((1, 2) if block in tops else (1,))
        device.reads.clear()
        again = survey(filesystem, found).structure
        partly = set(again.nodes["block"][~again.whole].tolist())
        everything = set(again.nodes["block"].tolist())
        assert {block for block in device.reads if block in everything} <= partly
        known = found


def test_progress_is_told_of_what_is_read() -> None:
    """Promise: progress rises, and never exceeds the number of known nodes."""
    history = History(4, small_files=1750)
    history.run(10)
    told: list[tuple[str, int, int]] = []
    found = survey(history.filesystem, None, lambda *words: told.append(words)).structure
    assert told
    reads = [read for _, read, _ in told]
    assert reads == sorted(set(reads))
    assert all(0 < read <= met <= 2 * len(found.nodes) for _, read, met in told)
    told.clear()
    survey(history.filesystem, found, lambda *words: told.append(words))
    assert not told, "nothing new was read"


def test_runs_are_counted_and_spread() -> None:
    """Promise: `covered` counts distinct blocks, `spread` numbers runs one after the other."""
    choice = random.Random(1)
    for _ in range(300):
        runs = [(choice.randrange(60), choice.randrange(1, 20)) for _ in range(choice.randrange(9))]
        first = np.array([run[0] for run in runs], np.int64)
        count = np.array([run[1] for run in runs], np.int64)
        blocks = [block for start, size in runs for block in range(start, start + size)]
        assert covered(first, count) == len(set(blocks))
        assert spread(first, count).tolist() == blocks
