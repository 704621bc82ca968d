"""Promises that every block of an image is explained, checked by counting and walking by hand."""

import numpy as np
import pytest

from cowfs.accounting.blocks import BlockReport, explain_block
from cowfs.accounting.owners import survey
from cowfs.accounting.paths import resolve
from cowfs.errors import UsageError
from cowfs.history.edits import CreateSnapshot
from cowfs.history.images import open_filesystem
from cowfs.storage.format import BLOCK_SIZE_BYTES, NODE_BLOCKS, RING_SLOTS
from tests.accounting.test_accounting import key_of
from tests.model.histories import History
from tests.model.holdings import Holdings, holdings
from tests.model.recount import recount
from tests.sizes import seeds


@pytest.mark.parametrize("seed", seeds(2, 5))
def test_every_block_is_explained(seed: int) -> None:
    """Promise: a walk finds the same kind, references, birth, owners and files of each block."""
    history = History(seed, small_files=30, total_blocks=4096)
    for _ in range(2):
        history.run(50)
    filesystem = open_filesystem(history.disk, writable=False)
    found = holdings(history.disk)
    counted = recount(history.disk)
    surveyed = survey(filesystem)
    owners = found.owners()
    kinds = {}
    for block in range(4096):
        report = explain_block(filesystem, surveyed, block)
        kinds[block] = report.kind
        assert report.block == block
        assert report.references == counted.expected[block]
        assert {key_of(owner) for owner in report.owners} == owners.get(block, frozenset())
        require_report(found, report)
    ring = {*range(RING_SLOTS), *range(4096 - RING_SLOTS, 4096)}
    nodes = set().union(*(held.node_blocks for held in found.held.values()))
    data = set().union(*(held.data_blocks for held in found.held.values()))
    expected = dict.fromkeys(range(4096), "free")
    expected |= dict.fromkeys(counted.system, "space map")
    expected |= dict.fromkeys(ring, "superblock ring")
    expected |= dict.fromkeys(nodes, "node")
    expected |= dict.fromkeys(data, "data")
    wrong = {
        block: (kind, expected[block]) for block, kind in kinds.items() if kind != expected[block]
    }
    assert not wrong
    for block in (-1, 4096):
        with pytest.raises(UsageError):
            explain_block(filesystem, surveyed, block)


def require_report(found: Holdings, report: BlockReport) -> None:
    block = report.block
    nodes = {}
    for held in found.held.values():
        for first, (level, birth, twin) in held.node_at.items():
            nodes[first] = (level, birth, False)
            if twin:
                nodes[twin] = (level, birth, True)
    if report.kind == "node":
        first = report.first
        assert first is not None
        assert first <= block < first + NODE_BLOCKS
        assert nodes[first] == (report.level, report.birth, report.twin)
        assert not report.places
    elif report.kind == "data":
        births = {held.births[block] for held in found.held.values() if block in held.births}
        assert {report.birth} == births
        told = set()
        for place in report.places:
            held = found.held[key_of(place.root)]
            at, rest = divmod(place.offset_bytes, BLOCK_SIZE_BYTES)
            assert not rest
            assert held.extents[place.ino][at] == block, "it is not there"
            if place.path is None:
                assert not held.names.get(place.ino), "it has a name"
            else:
                assert held.paths()[place.path] == place.ino
            told.add((place.ino, at))
        # Every file that has the block is named, in the newest root that shares its leaf.
        expected = {
            (ino, at)
            for held in found.held.values()
            if held.kind != "drop"
            for ino, places in held.extents.items()
            for at, there in places.items()
            if there == block
        }
        assert told == expected
    else:
        assert (report.level, report.first, report.birth) == (None, None, None)
        assert not report.owners


def test_block_is_told_where_the_newest_root_shows_it() -> None:
    """Promise: of the roots that share a leaf, the live volume gives the path, else the newest."""
    history = History(0, small_files=0)
    live, filesystem = history.live, history.filesystem
    ino = live.create(1, b"file", 0o100644, 0, 0).ino
    live.write(ino, 0, b"1" * 4 * BLOCK_SIZE_BYTES)
    for name in ("one", "two"):
        filesystem.apply(CreateSnapshot(name))

    def told() -> list[tuple[str, bytes | None]]:
        surveyed = survey(open_filesystem(history.disk, writable=False))
        block = int(surveyed.structure.run_first[0])
        places = explain_block(filesystem, surveyed, block).places
        return [(place.root.name, place.path) for place in places]

    assert told() == [("main", b"file")]
    live.reclaim(live.unlink(1, b"file").ino)
    history.commit()
    assert told() == [("two", b"file")]


def test_block_of_more_files_than_are_told_has_some_of_them() -> None:
    """Promise: the list of a block's files has a limit, and every file in it is right."""
    history = History(0, small_files=0)
    live, filesystem = history.live, history.filesystem
    source = live.create(1, b"source", 0o100644, 0, 0).ino
    live.write(source, 0, b"1" * 4 * BLOCK_SIZE_BYTES)
    for number in range(120):
        ino = live.create(1, b"%d" % number, 0o100644, 0, 0).ino
        live.reflink(live, source, 0, ino, 0, 4 * BLOCK_SIZE_BYTES)
    history.commit()
    surveyed = survey(filesystem)
    block = int(surveyed.structure.run_first[0])
    report = explain_block(filesystem, surveyed, block)
    assert report.references == 121
    assert len(report.places) == 100
    for place in report.places:
        assert place.path is not None
        inode = resolve(live, place.path)
        assert inode is not None
        assert inode.ino == place.ino
    assert np.count_nonzero(surveyed.structure.run_first == block) == 121
