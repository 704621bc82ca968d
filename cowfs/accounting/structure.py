"""The structure of an image: which node points at which nodes and data runs, as flat arrays.

Each distinct node is in the arrays once. They hold nothing of files: neither names nor inodes.

Reading and decoding nodes is the main cost of a pass over all snapshots, so a structure is reused.
The checksum of a node covers everything below it, as in a Merkle tree. So a node with the block,
birth and checksum of a known one is not read again; the known structure may be that of an earlier
generation, or of a copy of the image.

The arrays take about 60 bytes for each distinct node, 4 for each pointer at a node, and 12 for each
extent in a distinct leaf. They do not grow with the number of snapshots or the size of the image.
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
Progress = Callable[[str, int, int], None]  # what is being done, nodes read, nodes found so far

# A pointer as an inner node stores it (FORMAT.md "Pointer"), its checksum as two numbers.
NODE = np.dtype(
    [("block", "<i8"), ("twin", "<i8"), ("birth", "<i8"), ("sum_low", "<u8"), ("sum_high", "<u8")]
)
assert NODE.itemsize == POINTER_BYTES
PREFETCHED_NODES = 128  # nodes that the host is asked to read ahead at once
PROGRESS_NODES = 256  # nodes read between two calls of the progress function


class Root(NamedTuple):
    """The root of a tree.

    Attributes:
        dropped_entries: maps a node's block to the number of leading entries already dropped, for
            the nodes on the path of a half-done drop.
    """

    pointer: Pointer
    dropped_entries: dict[int, int]


@dataclass(frozen=True, slots=True)
class Structure:
    """The nodes reachable from some roots, the highest level first, by block within a level.

    A node is named by its index in `nodes`.

    Attributes:
        nodes: the pointer at each node (NODE).
        level_from: by level, from 0, the index of its first node. A level ends where the one below
            it begins, level 0 at the end of `nodes`.
        child_from: the children of node i are `children[child_from[i]:child_from[i + 1]]`.
        children: indices of nodes.
        run_from: the data runs of node i are those from `run_from[i]` to `run_from[i + 1]`.
        run_first, run_count: first block and number of blocks of each data run, as in the leaf.
        whole: of each node, whether all its entries are here; false on the path of a half-done
            drop.
        tops: of each root the index of its root node.
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
        """The indices of the nodes of one level."""
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
        """The pointer at a node."""
        return _pointer(self.nodes[index])


def empty_structure() -> Structure:
    """The structure without any node."""
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
    """Read the structure of the trees of these roots.

    Args:
        store: at a generation whose blocks are not reused while this runs.
        known: a structure of the same image, or of a copy of it; its nodes are not read again.

    Raises:
        CorruptError: a node cannot be read, or its pointers are wrong.
    """
    return _Reader(store, known or empty_structure(), progress).read(roots)


class _Found(NamedTuple):
    """The nodes of one level; `children` are indices among the nodes of the level below."""

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
        self._read_count = 0
        self._found_count = 0

    def read(self, roots: Sequence[Root]) -> Structure:
        dropped: dict[int, int] = {}
        for root in roots:
            dropped |= root.dropped_entries
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
            here, nodes = self._level(nodes, level, dropped, below)
            found.append(here)
        return _joined(found, [root.pointer.block for root in roots])

    def _level_of(self, pointer: Pointer) -> int:
        at = self._match(_rows([pointer]), slice(0, len(self._known.nodes)))
        if at[0] >= 0:
            return self._known.level_of(int(at[0]))
        return self._store.read_image(pointer, None).level

    def _match(self, nodes: npt.NDArray[Any], among: slice) -> Numbers:
        """Of each node its index in the known structure, if it is in `among`, else -1."""
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
        dropped: dict[int, int],
        below: npt.NDArray[Any],
    ) -> tuple[_Found, npt.NDArray[Any]]:
        """Read the nodes of one level, as far as they are not known.

        Args:
            dropped: of a node's block the number of leading entries already dropped.
            below: root nodes on the level below.

        Returns:
            The level, and the nodes of the level below: its children and `below`.
        """
        known = self._known
        among = known.level(level) if level < known.levels else slice(0, 0)
        matched = self._match(nodes, among)
        whole = ~np.isin(nodes["block"], list(dropped))
        matched[~whole] = -1
        old = matched >= 0
        indices = matched[old]
        fresh = np.flatnonzero(~old)
        self._found_count += len(fresh)
        counts = np.zeros(len(nodes), np.int64)
        none = np.zeros(len(nodes), np.int64)
        if level:
            read = self._read_inner(nodes[fresh], level, dropped)
            counts[old] = np.diff(known.child_from)[indices]
            counts[fresh] = [len(each) for each in read]
            new = np.concatenate([np.zeros(0, NODE), *read])
            taken = known.children[spread(known.child_from[indices], counts[old])]
            # There are many more edges than nodes. So known edges are renumbered by one lookup for
            # each node, not for each edge.
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
        runs = self._read_leaves(nodes[fresh], dropped)
        counts[old] = np.diff(known.run_from)[indices]
        counts[fresh] = [len(each) for each in runs]
        flat = np.array([run for each in runs for run in each], np.int64).reshape(-1, 2)
        at = spread(known.run_from[indices], counts[old])
        first = _interleave(counts, old, known.run_first[at], flat[:, 0])
        count = _interleave(counts, old, known.run_count[at], flat[:, 1].astype(np.int32))
        return _Found(nodes, whole, none, none[:0], counts, first, count), nodes[:0]

    def _read_inner(
        self, nodes: npt.NDArray[Any], level: int, dropped: dict[int, int]
    ) -> list[npt.NDArray[Any]]:
        """Of each node the pointers at its children."""
        found = []
        for pointer in self._pointers(nodes):
            image = self._store.read_image(pointer, level)
            children = np.frombuffer(b"".join(image.values), NODE)[dropped.get(pointer.block, 0) :]
            self._check(children, pointer.birth)
            found.append(children)
        return found

    def _read_leaves(
        self, nodes: npt.NDArray[Any], dropped: dict[int, int]
    ) -> list[list[tuple[int, int]]]:
        """Of each leaf its data runs, as (first block, number of blocks)."""
        found = []
        for pointer in self._pointers(nodes):
            image = self._store.read_image(pointer, 0)
            skip = dropped.get(pointer.block, 0)
            runs = references(image.keys[skip:], image.values[skip:])
            for first, count in runs:
                require_inside(self._store, first, count)
            found.append(runs)
        return found

    def _pointers(self, nodes: npt.NDArray[Any]) -> Iterator[Pointer]:
        """The pointers at these nodes; the host is asked to read the next nodes ahead."""
        device = self._store.device
        for at, row in enumerate(nodes):
            if at % PREFETCHED_NODES == 0:
                for place in nodes["block"][at : at + PREFETCHED_NODES].tolist():
                    device.prefetch(place * BLOCK_SIZE_BYTES, NODE_SIZE_BYTES)
            yield _pointer(row)
            self._read_count += 1
            if self._progress is not None and self._read_count % PROGRESS_NODES == 0:
                self._progress("reading metadata", self._read_count, self._found_count)

    def _check(self, pointers: npt.NDArray[Any], birth: int) -> None:
        """Raise CorruptError unless `check_pointer` accepts all these pointers."""
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
    """Whether cached arrays have the types, shapes and ranges of a structure.

    Then no index in them leads out of an array, and no block lies outside the image. Whether they
    are true of the image is not checked.

    Args:
        total_blocks: the size of the image.
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
    """Whether `starts` cuts the range 0 to `total` into `count` pieces, some perhaps empty."""
    if len(starts) != count + 1:
        return False
    ends_right = starts[0] == 0 and starts[-1] == total
    return bool(ends_right and (starts[1:] >= starts[:-1]).all())


def _within(numbers: npt.NDArray[Any], first: int, last: int) -> bool:
    return bool(((numbers >= first) & (numbers <= last)).all())


def require_inside(store: Store, first: int, count: int) -> None:
    """Raise CorruptError for a data run that leaves the image, and might not fit into int64."""
    if first + count > store.superblock.total_blocks:
        raise CorruptError("extent", first, "leaves the image")


def child_pointer(child: Node | Pointer) -> Pointer:
    """The pointer in an inner node's entry, which may be the child itself if that is in memory."""
    return child.pointer() if isinstance(child, Node) else child


def covered(first: Numbers, count: Numbers) -> int:
    """How many distinct blocks these runs cover."""
    if not len(first):
        return 0
    order = np.argsort(first, kind="stable")
    starts, stops = first[order], (first + count)[order]
    reach = np.maximum.accumulate(stops)
    before = np.concatenate([starts[:1], reach[:-1]])
    return int(np.maximum(0, stops - np.maximum(starts, before)).sum())


def spread(starts: Numbers, counts: Numbers) -> Numbers:
    """Of each run the numbers start, start + 1, ... start + count - 1, one run after the other."""
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
    """Each node once, by block.

    Raises:
        CorruptError: pointers at one block differ from each other.
    """
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
    """Merge the entries of all nodes, in the order of the nodes.

    Args:
        counts: of each node how many entries it has.
        old: of each node, whether its entries are in `taken`; otherwise they are in `fresh`.
    """
    is_old = np.repeat(old, counts)
    result = np.zeros(len(is_old), taken.dtype)
    result[is_old] = taken
    result[~is_old] = fresh
    return result


def _joined(found: list[_Found], tops: list[int]) -> Structure:
    """Join the levels, the highest first, into one structure."""
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
