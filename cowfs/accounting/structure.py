"""What points at what in the trees of an image, as arrays: each distinct node once, nothing of files.

Reading and decoding nodes is what a look at all snapshots costs, so what was learned of a node is kept.
Its checksum names all that is below it (Merkle): a structure that was made of an earlier generation, or
of a copy of the image, gives each node of the same place, birth and checksum without a read.

Memory is that of the arrays: about 60 bytes for each distinct node, 4 for each pointer at a node, 12 for
each extent in a distinct leaf; it does not grow with the number of snapshots or the size of the image.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cowfs.errors import CorruptError
from cowfs.files.items import references
from cowfs.storage.format import (
    BLOCK_SIZE_BYTES,
    GENERATION_MAX,
    NODE_BLOCKS,
    NODE_SIZE_BYTES,
    POINTER_BYTES,
    RING_SLOTS,
    Pointer,
    check_pointer,
)
from cowfs.storage.node import Node
from cowfs.storage.store import Store

Numbers = npt.NDArray[np.int64]
Progress = Callable[[str, int, int], None]  # words, nodes read, nodes known to be there

# A pointer as it is stored in an inner node (FORMAT.md "Pointer"), its checksum as two numbers.
NODE = np.dtype(
    [("block", "<i8"), ("twin", "<i8"), ("birth", "<i8"), ("sum_low", "<u8"), ("sum_high", "<u8")]
)
assert NODE.itemsize == POINTER_BYTES
PREFETCHED_NODES = 128  # reads that the host is told of ahead
PROGRESS_NODES = 256


class Root(NamedTuple):
    """A tree to look at. `partly`: how many entries at the start of a node, by block, count no more."""

    pointer: Pointer
    partly: dict[int, int]


@dataclass(frozen=True, slots=True)
class Structure:
    """The nodes reachable from some roots, the highest level first, and by block within a level.

    Attributes:
        nodes: place and identity (NODE).
        level_from: index of the first node of each level, from level 0; a level ends where the one
            below it begins, level 0 at the end of `nodes`.
        child_from: of each node its first entry in `children`; one more than there are nodes.
        children: indices of nodes.
        run_from: of each node its first entry in the runs; one more than there are nodes.
        run_first, run_count: the data runs that leaves point at, as they stand in the leaf.
        whole: whether all entries of the node are here (not: the path of a half-done drop).
        tops: the index of each root's node, in the order of the roots.
    """

    nodes: npt.NDArray[Any]
    level_from: Numbers
    child_from: Numbers
    children: npt.NDArray[np.int32]
    run_from: Numbers
    run_first: Numbers
    run_count: npt.NDArray[np.int32]
    whole: npt.NDArray[np.bool_]
    tops: Numbers

    def level(self, level: int) -> slice:
        """The nodes of one level."""
        start = int(self.level_from[level])
        stop = len(self.nodes) if not level else int(self.level_from[level - 1])
        return slice(start, stop)

    @property
    def levels(self) -> int:
        return len(self.level_from)

    def level_of(self, index: int) -> int:
        """The level of a node."""
        return int(np.count_nonzero(self.level_from > index))

    def node_blocks(self) -> Numbers:
        """Blocks that each node takes, its twin included."""
        return np.where(self.nodes["twin"] != 0, 2 * NODE_BLOCKS, NODE_BLOCKS).astype(np.int64)

    def pointer(self, index: int) -> Pointer:
        """What points at a node."""
        return _pointer(self.nodes[index])


def empty_structure() -> Structure:
    """Nothing known yet."""
    none = np.zeros(0, np.int64)
    zero = np.zeros(1, np.int64)
    small = np.zeros(0, np.int32)
    return Structure(
        np.zeros(0, NODE), none, zero, small, zero, none, small, np.zeros(0, np.bool_), none
    )


def read_structure(
    store: Store,
    roots: Sequence[Root],
    known: Structure | None = None,
    progress: Progress | None = None,
) -> Structure:
    """The structure of the trees of these roots, at a generation that stays whole meanwhile.

    Args:
        known: of the same image, or a copy of it; its nodes are not read again.

    Raises:
        CorruptError: a node cannot be read; no number is better than a wrong one.
    """
    return _Reader(store, known or empty_structure(), progress).read(roots)


class _Found(NamedTuple):
    """The nodes of one level. Children are indices among the nodes of the level below."""

    nodes: npt.NDArray[Any]
    whole: npt.NDArray[np.bool_]
    child_counts: Numbers
    children: Numbers
    run_counts: Numbers
    run_first: Numbers
    run_count: npt.NDArray[np.int32]


class _Reader:
    def __init__(self, store: Store, known: Structure, progress: Progress | None) -> None:
        self._store = store
        self._known = known
        self._progress = progress
        self._order = np.argsort(known.nodes["block"])
        self._blocks = known.nodes["block"][self._order]
        self._read = 0
        self._met = 0

    def read(self, roots: Sequence[Root]) -> Structure:
        partly: dict[int, int] = {}
        for root in roots:
            partly |= root.partly
        waiting: dict[int, list[Pointer]] = {}
        total = self._store.superblock.total_blocks
        for pointer in dict.fromkeys(root.pointer for root in roots):
            check_pointer(pointer, total, self._store.generation, "root", pointer.block)
            waiting.setdefault(self._level_of(pointer), []).append(pointer)
        found: list[_Found] = []
        top = max(waiting, default=-1)
        nodes = np.zeros(0, NODE)
        for level in range(top, -1, -1):
            nodes = _distinct([nodes, _rows(waiting.get(level, []))])
            below = _rows(waiting.get(level - 1, []))
            here, nodes = self._level(nodes, level, partly, below)
            found.append(here)
        return _joined(found, [root.pointer.block for root in roots])

    def _level_of(self, pointer: Pointer) -> int:
        at = self._match(_rows([pointer]), slice(0, len(self._known.nodes)))
        if at[0] >= 0:
            return self._known.level_of(int(at[0]))
        return self._store.read_image(pointer, None).level

    def _match(self, nodes: npt.NDArray[Any], among: slice) -> Numbers:
        """The index of each node among those known there; -1 for none."""
        if not len(self._blocks):
            return np.full(len(nodes), -1)
        places = np.searchsorted(self._blocks, nodes["block"])
        places[places == len(self._blocks)] = 0
        indices = self._order[places]
        same = self._known.nodes[indices] == nodes
        same &= self._known.whole[indices] & (indices >= among.start) & (indices < among.stop)
        return np.where(same, indices, -1)

    def _level(
        self,
        nodes: npt.NDArray[Any],
        level: int,
        partly: dict[int, int],
        below: npt.NDArray[Any],
    ) -> tuple[_Found, npt.NDArray[Any]]:
        """What nodes of a level point at, and the nodes of the level below: those and `below`."""
        known = self._known
        among = known.level(level) if level < known.levels else slice(0, 0)
        matched = self._match(nodes, among)
        whole = ~np.isin(nodes["block"], list(partly))
        matched[~whole] = -1
        old = matched >= 0
        indices = matched[old]
        fresh = np.flatnonzero(~old)
        self._met += len(fresh)
        counts = np.zeros(len(nodes), np.int64)
        none = np.zeros(len(nodes), np.int64)
        if level:
            read = self._read_inner(nodes[fresh], level, partly)
            counts[old] = np.diff(known.child_from)[indices]
            counts[fresh] = [len(each) for each in read]
            new = np.concatenate([np.zeros(0, NODE), *read])
            taken = known.children[spread(known.child_from[indices], counts[old])]
            # Edges are many, so those that are known stay numbers: each node is looked at once.
            present = np.zeros(len(known.nodes), np.bool_)
            present[taken] = True
            there = np.flatnonzero(present)
            children = _distinct([known.nodes[there], new, below])
            number = np.zeros(len(known.nodes), np.int64)
            number[there] = np.searchsorted(children["block"], known.nodes["block"][there])
            edges = _interleave(
                counts, old, number[taken], np.searchsorted(children["block"], new["block"])
            )
            small = np.zeros(0, np.int32)
            return _Found(nodes, whole, counts, edges, none, none[:0], small), children
        runs = self._read_leaves(nodes[fresh], partly)
        counts[old] = np.diff(known.run_from)[indices]
        counts[fresh] = [len(each) for each in runs]
        flat = np.array([run for each in runs for run in each], np.int64).reshape(-1, 2)
        at = spread(known.run_from[indices], counts[old])
        first = _interleave(counts, old, known.run_first[at], flat[:, 0])
        count = _interleave(counts, old, known.run_count[at], flat[:, 1].astype(np.int32))
        return _Found(nodes, whole, none, none[:0], counts, first, count), nodes[:0]

    def _read_inner(
        self, nodes: npt.NDArray[Any], level: int, partly: dict[int, int]
    ) -> list[npt.NDArray[Any]]:
        """Of each node its children."""
        found = []
        for pointer in self._pointers(nodes):
            image = self._store.read_image(pointer, level)
            children = np.frombuffer(b"".join(image.values), NODE)[partly.get(pointer.block, 0) :]
            self._check(children, pointer.birth)
            found.append(children)
        return found

    def _read_leaves(
        self, nodes: npt.NDArray[Any], partly: dict[int, int]
    ) -> list[list[tuple[int, int]]]:
        """Of each node its data runs."""
        found = []
        for pointer in self._pointers(nodes):
            image = self._store.read_image(pointer, 0)
            skip = partly.get(pointer.block, 0)
            runs = references(image.keys[skip:], image.values[skip:])
            for first, count in runs:
                require_inside(self._store, first, count)
            found.append(runs)
        return found

    def _pointers(self, nodes: npt.NDArray[Any]) -> Iterator[Pointer]:
        """The pointers at these nodes, with the host told of the reads to come."""
        device = self._store.device
        for at, row in enumerate(nodes):
            if at % PREFETCHED_NODES == 0:
                for place in nodes["block"][at : at + PREFETCHED_NODES].tolist():
                    device.prefetch(place * BLOCK_SIZE_BYTES, NODE_SIZE_BYTES)
            yield _pointer(row)
            self._read += 1
            if self._progress is not None and self._read % PROGRESS_NODES == 0:
                self._progress("reading metadata", self._read, self._met)

    def _check(self, pointers: npt.NDArray[Any], birth: int) -> None:
        """Raise CorruptError unless all pointers are as `check_pointer` wants them."""
        last = self._store.superblock.total_blocks - RING_SLOTS - NODE_BLOCKS
        block, twin, born = pointers["block"], pointers["twin"], pointers["birth"]
        right = (block >= RING_SLOTS) & (block <= last) & (born > 0) & (born <= birth)
        apart = (twin >= RING_SLOTS) & (twin <= last) & (np.abs(twin - block) >= NODE_BLOCKS)
        right &= apart | (twin == 0)
        for row in pointers[~right][:1]:
            total = self._store.superblock.total_blocks
            check_pointer(_pointer(row), total, birth, "node", int(row["block"]))
            raise CorruptError("node", int(row["block"]), "pointer leaves the image")


def is_sound(structure: Structure, total_blocks: int) -> bool:
    """Whether arrays that were kept could be a structure of an image of that size.

    Nothing that reads them leaves them, then. That they tell the truth is another matter.
    """
    wanted: dict[str, npt.DTypeLike] = {
        **dict.fromkeys(("level_from", "child_from", "run_from", "run_first", "tops"), np.int64),
        **dict.fromkeys(("children", "run_count"), np.int32),
        "whole": np.bool_,
        "nodes": NODE,
    }
    for name, dtype in wanted.items():
        array: npt.NDArray[Any] = getattr(structure, name)
        if array.ndim != 1 or array.dtype != dtype:
            return False
    count = len(structure.nodes)
    runs = len(structure.run_first)
    if not (
        len(structure.whole) == count
        and len(structure.run_count) == runs
        and _is_partition(structure.child_from, count, len(structure.children))
        and _is_partition(structure.run_from, count, runs)
        and _is_partition(np.append(structure.level_from[::-1], count), structure.levels, count)
        and _within(structure.tops, 0, count - 1)
    ):
        return False
    nodes = structure.nodes
    last = total_blocks - RING_SLOTS - NODE_BLOCKS
    twins = nodes["twin"][nodes["twin"] != 0]
    if not (
        _within(nodes["block"], RING_SLOTS, last)
        and _within(twins, RING_SLOTS, last)
        and _within(nodes["birth"], 1, GENERATION_MAX)
        and len(np.unique(nodes["block"])) == count
        and _within(structure.run_first, 0, total_blocks)
        and bool((structure.run_count > 0).all())
        and _within(structure.run_first + structure.run_count, 0, total_blocks)
    ):
        return False
    for level in range(structure.levels):
        here = structure.level(level)
        edges = slice(structure.child_from[here.start], structure.child_from[here.stop])
        below = structure.level(level - 1) if level else slice(0, 0)
        if not _within(structure.children[edges], below.start, below.stop - 1):
            return False
        if level and structure.run_from[here.start] != structure.run_from[here.stop]:
            return False
    return True


def _is_partition(starts: Numbers, count: int, total: int) -> bool:
    """Whether `starts` cuts 0 to `total` into so many pieces; no piece is no pieces."""
    if len(starts) != count + 1:
        return False
    ends_right = starts[0] == 0 and starts[-1] == total
    return bool(ends_right and (starts[1:] >= starts[:-1]).all())


def _within(numbers: npt.NDArray[Any], first: int, last: int) -> bool:
    return bool(((numbers >= first) & (numbers <= last)).all())


def require_inside(store: Store, first: int, count: int) -> None:
    """Raise CorruptError for a data run that leaves the image; numbers of arrays end before 1 << 64."""
    if first + count > store.superblock.total_blocks:
        raise CorruptError("extent", first, "leaves the image")


def child_pointer(child: Node | Pointer) -> Pointer:
    """The pointer of an inner node's entry, also right after the commit that wrote its child."""
    return child.pointer() if isinstance(child, Node) else child


def covered(first: Numbers, count: Numbers) -> int:
    """How many distinct blocks some runs cover."""
    if not len(first):
        return 0
    order = np.argsort(first, kind="stable")
    starts, stops = first[order], (first + count)[order]
    reach = np.maximum.accumulate(stops)
    before = np.concatenate([starts[:1], reach[:-1]])
    return int(np.maximum(0, stops - np.maximum(starts, before)).sum())


def spread(starts: Numbers, counts: Numbers) -> Numbers:
    """start, start + 1, ... of each of the runs, one after the other."""
    total = int(counts.sum())
    ends = np.cumsum(counts)
    return np.arange(total) - np.repeat(ends - counts - starts, counts)


def _rows(pointers: Sequence[Pointer]) -> npt.NDArray[Any]:
    rows = np.zeros(len(pointers), NODE)
    if pointers:
        rows["block"] = [pointer.block for pointer in pointers]
        rows["twin"] = [pointer.twin for pointer in pointers]
        rows["birth"] = [pointer.birth for pointer in pointers]
        sums = b"".join([pointer.checksum for pointer in pointers])
        rows["sum_low"], rows["sum_high"] = np.frombuffer(sums, "<u8").reshape(-1, 2).T
    return rows


def _pointer(row: Any) -> Pointer:
    checksum = row["sum_low"].tobytes() + row["sum_high"].tobytes()
    return Pointer(int(row["block"]), int(row["twin"]), int(row["birth"]), checksum)


def _distinct(parts: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Each node once, by block. Raises CorruptError for two nodes at one place."""
    rows = np.concatenate(parts)
    blocks = rows["block"]
    order = np.argsort(blocks)
    blocks = blocks[order]
    begins = np.diff(blocks, prepend=-1) != 0
    first = order[begins]
    nodes: npt.NDArray[Any] = rows[first]
    if len(nodes) == len(rows):
        return nodes
    of_row = first[np.cumsum(begins) - 1]
    for name in ("sum_low", "sum_high", "birth", "twin"):
        column = rows[name]
        wrong = column[order] != column[of_row]
        if wrong.any():
            block = int(blocks[np.argmax(wrong)])
            raise CorruptError("node", block, "pointers at it differ from each other")
    return nodes


def _interleave(counts: Numbers, old: npt.NDArray[np.bool_], taken: Any, fresh: Any) -> Any:
    """Entries of all nodes in order, of which some are in `taken` and the others in `fresh`."""
    is_old = np.repeat(old, counts)
    result = np.zeros(len(is_old), taken.dtype)
    result[is_old] = taken
    result[~is_old] = fresh
    return result


def _joined(found: list[_Found], tops: list[int]) -> Structure:
    """One structure of all levels, the highest first."""
    if not found:
        return empty_structure()
    starts = np.cumsum([0, *(len(each.nodes) for each in found)])
    nodes = np.concatenate([each.nodes for each in found])
    children = [each.children + start for each, start in zip(found, starts[1:], strict=True)]
    by_block = np.argsort(nodes["block"])
    at = np.searchsorted(nodes["block"][by_block], np.array(tops, np.int64))
    return Structure(
        nodes=nodes,
        level_from=starts[:-1][::-1].copy(),
        child_from=np.cumsum(np.concatenate([[0], *(each.child_counts for each in found)])),
        children=np.concatenate(children).astype(np.int32),
        run_from=np.cumsum(np.concatenate([[0], *(each.run_counts for each in found)])),
        run_first=found[-1].run_first,
        run_count=found[-1].run_count,
        whole=np.concatenate([each.whole for each in found]),
        tops=by_block[at],
    )
