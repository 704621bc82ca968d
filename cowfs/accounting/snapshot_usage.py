"""The numbers of one snapshot: referenced, written, and what deleting it would free.

docs/design/accounting.md has the definitions. owners.py computes the same numbers for all roots at
once, by another algorithm; tests compare the two. All numbers are blocks, metadata and twins
included. The catalog and the space map belong to no root.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from cowfs.accounting.structure import child_pointer
from cowfs.accounting.virtual_drop import simulate_deletion
from cowfs.files.items import KEY_BYTES, TYPE_EXTENT, decode_extent, references, split_key
from cowfs.history.filesystem import Filesystem
from cowfs.history.records import RootRecord
from cowfs.history.reports import ReclaimReport
from cowfs.storage.format import BLOCK_SIZE_BYTES, GROUP_BLOCKS, NODE_BLOCKS, Pointer
from cowfs.storage.node import Node
from cowfs.storage.store import Store

Entry = tuple[Pointer, int | None]  # a node to visit, and its level if known


def reclaim_report(filesystem: Filesystem, names: Sequence[str]) -> ReclaimReport:
    """Find what deleting exactly the snapshots of these names would free (C11).

    Raises:
        SnapshotError: there is no snapshot of one of the names.
        CorruptError: a node cannot be read or a refcount is wrong, so no number would be right.
    """
    distinct = tuple(dict.fromkeys(names))
    records = [filesystem.catalog.snapshot(name) for name in distinct]
    blocks = simulate_deletion(filesystem, records).blocks
    return ReclaimReport(names=distinct, reclaim_bytes=blocks * BLOCK_SIZE_BYTES)


class _Blocks:
    """A set of data blocks. It takes one byte for each block of a group that has a member.

    So its memory does not grow with the image, which may have billions of blocks.
    """

    def __init__(self) -> None:
        self._groups: dict[int, np.ndarray] = {}

    def add(self, first: int, count: int) -> None:
        while count:
            group, start = divmod(first, GROUP_BLOCKS)
            here = min(count, GROUP_BLOCKS - start)
            blocks = self._groups.get(group)
            if blocks is None:
                blocks = self._groups[group] = np.zeros(GROUP_BLOCKS, np.bool_)
            blocks[start : start + here] = True
            first += here
            count -= here

    def without(self, other: "_Blocks") -> int:
        """How many blocks are in this set and not in the other."""
        total = 0
        for number, blocks in self._groups.items():
            others = other._groups.get(number)
            total += int(np.count_nonzero(blocks if others is None else blocks & ~others))
        return total


def referenced_blocks(filesystem: Filesystem, record: RootRecord) -> int:
    """The number of distinct blocks reachable from a root.

    The tree is read only if the record says that files in it may share blocks.
    """
    if not record.shares:
        return record.referenced_blocks(filesystem.store.copies)
    nodes = record.node_count * NODE_BLOCKS * filesystem.store.copies
    return nodes + _data_of(filesystem.store, record).without(_Blocks())


def _data_of(store: Store, record: RootRecord) -> _Blocks:
    """The data blocks reachable from a root."""
    blocks = _Blocks()
    for _, node in _nodes_since(store, record.pointer, 0):
        if not node.level:
            for first, count in references(node.keys, node.values):
                blocks.add(first, count)
    return blocks


def _nodes_since(store: Store, root: Pointer, since: int) -> Iterator[tuple[Pointer, Node]]:
    """The nodes of a tree that were born after generation `since`, each with its pointer.

    Each node comes once; only in a forged or damaged tree do two pointers lead to one node.
    """
    stack: list[Entry] = [(root, None)]
    visited = set()
    while stack:
        pointer, level = stack.pop()
        if pointer.birth <= since or pointer.block in visited:
            continue
        visited.add(pointer.block)
        node = store.load(pointer, level)
        yield pointer, node
        if node.level:
            stack.extend((child_pointer(child), node.level - 1) for child in node.values)


def written_blocks(filesystem: Filesystem, record: RootRecord) -> int:
    """The blocks that a snapshot reaches and its parent does not; all, if it has no parent.

    A block born after the parent's generation is not in the parent. A block born before and reached
    here is in the parent too, unless a file was made of blocks of another file. So subtrees born
    before are skipped. Where files share blocks, older blocks in newer leaves are looked up in the
    parent's tree, which is read for that.
    """
    parent = filesystem.catalog.root(record.parent_id) if record.parent_id else None
    if parent is None:
        return referenced_blocks(filesystem, record)
    since = parent.created_generation
    store = filesystem.store
    total = 0
    fresh, older = _Blocks(), _Blocks()
    for pointer, node in _nodes_since(store, record.pointer, since):
        total += NODE_BLOCKS * (2 if pointer.twin else 1)
        if node.level:
            continue
        for key, value in zip(node.keys, node.values, strict=True):
            if len(key) == KEY_BYTES and key[8] == TYPE_EXTENT:
                extent = decode_extent(split_key(key)[0], value)
                if not record.shares:
                    total += extent.count if extent.birth > since else 0
                elif extent.birth > since:
                    fresh.add(extent.block, extent.count)
                else:
                    older.add(extent.block, extent.count)
    if record.shares:
        total += fresh.without(_Blocks()) + older.without(_data_of(store, parent))
    return total
