"""The virtual drop: simulates the deletion of some roots on the refcounts, and writes nothing.

The result says which blocks the deletion would free, and for each of them which of the roots reach
it and in which files it is.

Nodes are visited level by level from the roots. Each pointer at a node is one hit on it. A node
with as many hits as its refcount would be freed. Only then its children are visited; by then all
roots that reach the node are known. Hits on data are compared with the refcounts at the end. So
only nodes are read that would be freed.

owners.py computes the same numbers by another algorithm, and the two must agree (C11).

A set of roots is an int here, a mask: bit i is set for root number i. All numbers are blocks, twins
of nodes included.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from cowfs.accounting.structure import Numbers, Progress, child_pointer, require_inside, spread
from cowfs.errors import CorruptError
from cowfs.files.items import INO_MAX, KEY_BYTES, TYPE_EXTENT, decode_extent, split_key
from cowfs.history.filesystem import Filesystem
from cowfs.history.records import RootRecord
from cowfs.storage.format import GROUP_BLOCKS, NODE_BLOCKS, Pointer
from cowfs.storage.spacemap import SpaceMap
from cowfs.storage.store import Store

PROGRESS_NODES = 256  # nodes read between two calls of the progress function


@dataclass(frozen=True, slots=True)
class Runs:
    """The data runs of the leaves that would be freed: one entry for each extent item.

    Attributes:
        masks: the distinct sets of roots.
        first, count: of each run its first block and number of blocks.
        mask: of each run the index in `masks` of the set of roots that reach its leaf.
        ino: of each run the inode number of its file.
    """

    masks: list[int]
    first: Numbers
    count: Numbers
    mask: Numbers
    ino: Numbers


@dataclass(frozen=True, slots=True)
class Freed:
    """What a deletion would free.

    Attributes:
        node_blocks: by set of roots, the blocks of the nodes that exactly these roots reach.
        runs: the data runs of all leaves that would be freed.
        piece_first, piece_count: the data blocks that would be freed, cut into pieces. All blocks
            of a piece are in the same runs.
        piece_from, piece_runs: the runs that contain piece i are
            `piece_runs[piece_from[i]:piece_from[i + 1]]`.
    """

    node_blocks: dict[int, int]
    runs: Runs
    piece_first: Numbers
    piece_count: Numbers
    piece_from: Numbers
    piece_runs: Numbers

    @property
    def blocks(self) -> int:
        """The number of blocks that would be freed, of nodes and data."""
        return sum(self.node_blocks.values()) + int(self.piece_count.sum())

    def masks_of_pieces(self) -> list[int]:
        """Of each piece the set of roots that reach it."""
        masks, mask = self.runs.masks, self.runs.mask
        numbers = mask[self.piece_runs]
        found: dict[bytes, int] = {}
        sets = []
        bounds = self.piece_from.tolist()
        for start, stop in pairwise(bounds):
            if stop - start == 1:
                sets.append(masks[numbers[start]])
                continue
            part = numbers[start:stop].tobytes()
            union = found.get(part)
            if union is None:
                union = 0
                for number in numbers[start:stop].tolist():
                    union |= masks[number]
                found[part] = union
            sets.append(union)
        return sets


def simulate_deletion(
    filesystem: Filesystem, records: Sequence[RootRecord], progress: Progress | None = None
) -> Freed:
    """Find what deleting exactly these roots would free.

    Args:
        records: root number i is `records[i]`.

    Raises:
        CorruptError: a node cannot be read, or a refcount is lower than the hits.
    """
    store = filesystem.store
    levels: dict[int, dict[int, _Hit]] = {}
    for number, record in enumerate(records):
        level = store.load(record.pointer, None).level
        _hit(levels.setdefault(level, {}), record.pointer, 1 << number)
    node_blocks: dict[int, int] = {}
    collected = _RunCollector(store)
    seen: set[int] = set()
    read = 0
    for level in range(max(levels, default=-1), -1, -1):
        for block, hit in levels.pop(level, {}).items():
            if block in seen:
                raise CorruptError("node", block, "is pointed at from two levels")
            seen.add(block)
            count = store.map.refcount(block)
            if hit.count > count:
                raise CorruptError("space map", block, "refcount is too low", count, hit.count)
            if hit.count < count:
                continue
            node = store.load(hit.pointer, level)
            read += 1
            if progress is not None and read % PROGRESS_NODES == 0:
                progress("reading metadata", read, 0)
            size = NODE_BLOCKS * (2 if hit.pointer.twin else 1)
            node_blocks[hit.mask] = node_blocks.get(hit.mask, 0) + size
            if level:
                below = levels.setdefault(level - 1, {})
                for child in node.values:
                    _hit(below, child_pointer(child), hit.mask)
            else:
                collected.add_leaf(node.keys, node.values, hit.mask)
    return _freed(store.map, node_blocks, collected.runs())


@dataclass(slots=True)
class _Hit:
    """The hits on a node: how many, and the set of roots that they come from."""

    pointer: Pointer
    count: int
    mask: int


def _hit(hits: dict[int, _Hit], pointer: Pointer, mask: int) -> None:
    """Count a hit on a node, in `hits` by block."""
    hit = hits.get(pointer.block)
    if hit is None:
        hits[pointer.block] = _Hit(pointer, 1, mask)
    else:
        hit.count += 1
        hit.mask |= mask


class _RunCollector:
    """Collects the data runs of leaves."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._numbers: dict[int, int] = {}
        self._masks: list[int] = []
        self._rows: list[tuple[int, int, int, int]] = []

    def add_leaf(self, keys: list[bytes], values: list[Any], mask: int) -> None:
        number = self._numbers.get(mask)
        if number is None:
            number = self._numbers[mask] = len(self._masks)
            self._masks.append(mask)
        for item, value in zip(keys, values, strict=True):
            if len(item) == KEY_BYTES and item[8] == TYPE_EXTENT:
                ino = split_key(item)[0]
                extent = decode_extent(ino, value)
                require_inside(self._store, extent.block, extent.count)
                if ino > INO_MAX:
                    raise CorruptError("extent", extent.block, "of an impossible inode", ino)
                self._rows.append((extent.block, extent.count, number, ino))

    def runs(self) -> Runs:
        table = np.array(self._rows, np.int64).reshape(-1, 4)
        return Runs(self._masks, table[:, 0], table[:, 1], table[:, 2], table[:, 3])


def _freed(space_map: SpaceMap, node_blocks: dict[int, int], runs: Runs) -> Freed:
    piece_first, piece_count, piece_from, piece_runs = pieces_of(runs.first, runs.count)
    source, at, length = _lost_parts(space_map, piece_first, piece_count, np.diff(piece_from))
    run_counts = np.diff(piece_from)[source]
    return Freed(
        node_blocks,
        runs,
        piece_first[source] + at,
        length,
        np.concatenate([[0], np.cumsum(run_counts)]),
        piece_runs[spread(piece_from[source], run_counts)],
    )


def _lost_parts(
    space_map: SpaceMap, first: Numbers, count: Numbers, hits: Numbers
) -> tuple[Numbers, Numbers, Numbers]:
    """The parts of pieces whose blocks lose their last reference.

    Refcounts may differ inside a piece, because other runs point at some of its blocks.

    Args:
        first, count: the blocks of the pieces, ascending; no piece lies in two groups of the space
            map.
        hits: of each piece how many references to each of its blocks are dropped.

    Returns:
        Of each part the number of its piece, its first block within the piece, and its length.
    """
    none = np.zeros(0, np.int64)
    sources, starts, lengths = [none], [none], [none]
    groups = first // GROUP_BLOCKS
    begins = np.flatnonzero(np.diff(groups, prepend=-1))
    for begin, stop in pairwise([*begins.tolist(), len(first)]):
        base = int(first[begin])
        counts = space_map.refcounts(base, int(first[stop - 1] + count[stop - 1]) - base)
        sizes = count[begin:stop]
        blocks = spread(first[begin:stop] - base, sizes)
        wanted = np.repeat(hits[begin:stop], sizes)
        found = counts[blocks]
        wrong = np.flatnonzero(found < wanted)
        if len(wrong):
            at = wrong[0]
            block = base + int(blocks[at])
            raise CorruptError(
                "space map", block, "refcount is too low", int(found[at]), int(wanted[at])
            )
        is_lost = found == wanted
        piece_begin = np.cumsum(sizes) - sizes
        is_begin = np.zeros(len(blocks), np.bool_)
        is_begin[piece_begin] = True
        follows = np.concatenate([[False], is_lost[:-1]]) & ~is_begin
        part_begin = np.flatnonzero(is_lost & ~follows)
        is_last = np.append(~follows[1:] | ~is_lost[1:], True)
        part_last = np.flatnonzero(is_lost & is_last)
        piece = np.searchsorted(piece_begin, part_begin, side="right") - 1
        sources.append(piece + begin)
        starts.append(part_begin - piece_begin[piece])
        lengths.append(part_last - part_begin + 1)
    return np.concatenate(sources), np.concatenate(starts), np.concatenate(lengths)


def pieces_of(first: Numbers, count: Numbers) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    """Cut runs into pieces wherever a run begins or ends, and at the bounds of groups.

    Returns:
        (first, count, from, runs): first block and number of blocks of each piece that is in a
        run, ascending; piece i is in the runs `runs[from[i]:from[i + 1]]`.
    """
    if not len(first):
        none = np.zeros(0, np.int64)
        return none, none, np.zeros(1, np.int64), none
    stops = first + count
    groups = np.unique(np.concatenate([first, stops - 1]) // GROUP_BLOCKS) * GROUP_BLOCKS
    cuts = np.unique(np.concatenate([first, stops, groups[groups > first.min()]]))
    start = np.searchsorted(cuts, first)
    counts = np.searchsorted(cuts, stops) - start
    piece = spread(start, counts)
    run = np.repeat(np.arange(len(first)), counts)
    order = np.argsort(piece, kind="stable")
    piece, run = piece[order], run[order]
    begins = np.flatnonzero(np.diff(piece, prepend=-1))
    which = piece[begins]
    return cuts[which], np.diff(cuts)[which], np.append(begins, len(piece)), run
