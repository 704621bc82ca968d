"""What deleting some roots would free, block by block: which of the roots hold it, in which file.

The deletion is simulated on the refcounts and nothing is written: this is the *virtual drop*. Nodes
are visited level by level from the roots. A node is entered once all its references were dropped; by
then all roots that reach it are known. References to data are compared with the refcounts at the end.
The cost is that of what would be freed. owners.py computes the same numbers in another way, and the two
must agree (C11).

A set of roots is an int here, bit i for the root number i. All numbers are blocks, twins of nodes
included.
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

PROGRESS_NODES = 256


@dataclass(frozen=True, slots=True)
class Runs:
    """Data runs of leaves, an entry each.

    Attributes:
        first, count: blocks.
        mask: number of the set of roots that reach the leaf, in `masks`.
        ino: of the file.
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
        node_blocks: by the set of roots that reach the nodes.
        runs: of all leaves that would be freed.
        piece_first, piece_count: the data blocks that would be freed, cut so that all blocks of a
            piece are in the same runs.
        piece_from, piece_runs: of each piece the runs it is in: those from `piece_from` of this piece to
            that of the next.
    """

    node_blocks: dict[int, int]
    runs: Runs
    piece_first: Numbers
    piece_count: Numbers
    piece_from: Numbers
    piece_runs: Numbers

    @property
    def blocks(self) -> int:
        """All that would be freed."""
        return sum(self.node_blocks.values()) + int(self.piece_count.sum())

    def masks_of_pieces(self) -> list[int]:
        """The set of roots that reach each piece."""
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
    """What deleting exactly these roots would free. Root number i is `records[i]`.

    Raises:
        CorruptError: a node cannot be read, or refcounts cannot be right.
    """
    store = filesystem.store
    levels: dict[int, dict[int, _Met]] = {}
    for number, record in enumerate(records):
        level = store.load(record.pointer, None).level
        _meet(levels.setdefault(level, {}), record.pointer, 1 << number)
    node_blocks: dict[int, int] = {}
    gathered = _Gathered(store)
    seen: set[int] = set()
    read = 0
    for level in range(max(levels, default=-1), -1, -1):
        for block, met in levels.pop(level, {}).items():
            if block in seen:
                raise CorruptError("node", block, "is pointed at from two levels")
            seen.add(block)
            count = store.map.refcount(block)
            if met.hits > count:
                raise CorruptError("space map", block, "refcount is too low", count, met.hits)
            if met.hits < count:
                continue
            node = store.load(met.pointer, level)
            read += 1
            if progress is not None and read % PROGRESS_NODES == 0:
                progress("reading metadata", read, 0)
            size = NODE_BLOCKS * (2 if met.pointer.twin else 1)
            node_blocks[met.mask] = node_blocks.get(met.mask, 0) + size
            if level:
                below = levels.setdefault(level - 1, {})
                for child in node.values:
                    _meet(below, child_pointer(child), met.mask)
            else:
                gathered.add_leaf(node.keys, node.values, met.mask)
    return _freed(store.map, node_blocks, gathered.runs())


@dataclass(slots=True)
class _Met:
    pointer: Pointer
    hits: int
    mask: int


def _meet(nodes: dict[int, _Met], pointer: Pointer, mask: int) -> None:
    met = nodes.get(pointer.block)
    if met is None:
        nodes[pointer.block] = _Met(pointer, 1, mask)
    else:
        met.hits += 1
        met.mask |= mask


class _Gathered:
    """Runs as they are met."""

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

    Refcounts may differ inside a piece, by references from elsewhere.

    Args:
        first, count: blocks of the pieces, in order of place, none across groups of the space map.
        hits: how many references to each block of a piece are dropped.

    Returns:
        of each part the number of its piece, its first block there, and its length.
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
    """Cut runs where one of them begins or ends, and within a group of the space map.

    Returns:
        first and count of each piece that is in a run; of each piece its first entry in the last array,
        and one more; the runs that each piece is in.
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
