"""Owner sets: how many blocks each set of roots reaches, and no other root. DESIGN.md section 6.

One pass over the distinct nodes, level by level from the roots, unites for each block the sets of roots
that reach it. Every question after that is a sum over sets: what deleting any snapshots would free, what
one references, what two share. A set is a number with a bit for each root: snapshots by age from bit 0,
then the drop queue, then volumes, so that "all up to this snapshot" is a range of bits.

All numbers are blocks, metadata and twins included; the catalog and the space map belong to no root.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from cowfs.files.items import references
from cowfs.history.filesystem import Filesystem
from cowfs.history.records import RootKind
from cowfs.storage.format import GROUP_BLOCKS, NODE_BLOCKS, Pointer
from cowfs.storage.node import Node


class OwnerKind(StrEnum):
    SNAPSHOT = "snapshot"
    DROP = "drop"
    VOLUME = "volume"


@dataclass(frozen=True, slots=True)
class Owner:
    """A root. `number` is its root id, or that of its entry in the drop queue.

    `parent` is the bit of the snapshot that it grew from, None for none.
    """

    kind: OwnerKind
    name: str
    number: int
    parent: int | None = None


class Blocks(NamedTuple):
    """Blocks of nodes, twins included, and of data."""

    nodes: int
    data: int

    @property
    def total(self) -> int:
        return self.nodes + self.data


class OwnerSets:
    """What every set of roots holds alone.

    Args:
        owners: by bit.
        blocks: of each set that reaches any.
    """

    def __init__(self, owners: tuple[Owner, ...], blocks: dict[int, Blocks]) -> None:
        self.owners = owners
        self.blocks = blocks

    def bit(self, kind: OwnerKind, number: int) -> int:
        """The bit of a root. Raises KeyError."""
        for bit, owner in enumerate(self.owners):
            if owner.kind == kind and owner.number == number:
                return bit
        raise KeyError(number)

    def exclusive(self, bits: Iterable[int]) -> Blocks:
        """What only these roots reach: what deleting exactly them would free."""
        chosen = 0
        for bit in bits:
            chosen |= 1 << bit
        return self._sum(blocks for owners, blocks in self.blocks.items() if not owners & ~chosen)

    def referenced(self, bit: int) -> Blocks:
        """What a root reaches."""
        return self._sum(blocks for owners, blocks in self.blocks.items() if owners >> bit & 1)

    def written(self, bit: int) -> Blocks:
        """What a root reaches, and the snapshot that it grew from does not."""
        parent = self.owners[bit].parent
        if parent is None:
            return self.referenced(bit)
        return self._sum(
            blocks
            for owners, blocks in self.blocks.items()
            if owners >> bit & 1 and not owners >> parent & 1
        )

    def total(self) -> Blocks:
        """All that roots hold."""
        return self._sum(self.blocks.values())

    @staticmethod
    def _sum(parts: Iterable[Blocks]) -> Blocks:
        nodes = data = 0
        for part in parts:
            nodes += part.nodes
            data += part.data
        return Blocks(nodes, data)


class _Interned:
    """Sets as small numbers, for the arrays, and their unions, remembered. Number 0 is the empty set."""

    def __init__(self) -> None:
        self.sets = [0]
        self._numbers = {0: 0}
        self._unions: dict[tuple[int, int], int] = {}

    def number(self, owners: int) -> int:
        found = self._numbers.get(owners)
        if found is None:
            found = self._numbers[owners] = len(self.sets)
            self.sets.append(owners)
        return found

    def union(self, one: int, other: int) -> int:
        if one == other or not other:
            return one
        if not one:
            return other
        pair = (one, other) if one < other else (other, one)
        found = self._unions.get(pair)
        if found is None:
            found = self._unions[pair] = self.number(self.sets[one] | self.sets[other])
        return found


def owner_sets(filesystem: Filesystem) -> OwnerSets:
    """The owner sets of every block: each distinct node is read once.

    Raises:
        CorruptError: a node cannot be read; no number is better than a wrong one.
    """
    store = filesystem.store
    owners, tops, partly = _roots(filesystem)
    interned = _Interned()
    levels: dict[int, dict[int, tuple[Pointer, int]]] = {}

    def reach(pointer: Pointer, level: int, owner: int) -> None:
        nodes = levels.setdefault(level, {})
        found = nodes.get(pointer.block)
        if found is None:
            nodes[pointer.block] = (pointer, owner)
        elif found[1] != owner:
            nodes[pointer.block] = (pointer, interned.union(found[1], owner))

    for bit, pointer in enumerate(tops):
        reach(pointer, store.load(pointer, None).level, interned.number(1 << bit))
    nodes: dict[int, int] = {}
    data = _Data(interned)
    for level in range(max(levels, default=-1), -1, -1):
        for pointer, owner in levels.pop(level, {}).values():
            node = store.load(pointer, level)
            nodes[owner] = nodes.get(owner, 0) + NODE_BLOCKS * (2 if pointer.twin else 1)
            if level:
                for child in node.values[partly.get(pointer.block, 0) :]:
                    reach(_pointer(child), level - 1, owner)
            else:
                for first, count in references(node.keys, node.values):
                    data.reach(first, count, owner)
    counts = data.counts()
    return OwnerSets(
        owners,
        {
            interned.sets[number]: Blocks(nodes.get(number, 0), counts.get(number, 0))
            for number in nodes.keys() | counts.keys()
        },
    )


def _roots(filesystem: Filesystem) -> tuple[tuple[Owner, ...], list[Pointer], dict[int, int]]:
    """Owners by bit, their root nodes; and of nodes in the drop queue, how many entries are done."""
    catalog = filesystem.catalog
    snapshots = catalog.snapshots()
    volumes = [record for record in catalog.roots() if record.kind == RootKind.VOLUME]
    bits = {record.root_id: bit for bit, record in enumerate(snapshots)}
    drops = catalog.drops()
    owners = [
        *(
            Owner(OwnerKind.SNAPSHOT, record.name, record.root_id, bits.get(record.parent_id))
            for record in snapshots
        ),
        *(Owner(OwnerKind.DROP, drop.name, drop.number) for drop in drops),
        *(
            Owner(OwnerKind.VOLUME, record.name, record.root_id, bits.get(record.parent_id))
            for record in volumes
        ),
    ]
    tops = [
        *(record.pointer for record in snapshots),
        *(drop.path[0].pointer for drop in drops),
        *(record.pointer for record in volumes),
    ]
    partly = {step.pointer.block: step.done for drop in drops for step in drop.path}
    return tuple(owners), tops, partly


class _Data:
    """The owners of data blocks: a number for each block of the groups that were touched."""

    def __init__(self, interned: _Interned) -> None:
        self._interned = interned
        self._groups: dict[int, np.ndarray] = {}

    def reach(self, first: int, count: int, owner: int) -> None:
        while count:
            group, start = divmod(first, GROUP_BLOCKS)
            here = min(count, GROUP_BLOCKS - start)
            owners = self._groups.get(group)
            if owners is None:
                owners = self._groups[group] = np.zeros(GROUP_BLOCKS, np.uint32)
            if here == 1:
                before = int(owners[start])
                if before != owner:
                    owners[start] = self._interned.union(before, owner)
            else:
                part = owners[start : start + here]
                before = int(part[0])
                if (part == before).all():
                    if before != owner:
                        part[:] = self._interned.union(before, owner)
                else:
                    for before in np.unique(part).tolist():
                        part[part == before] = self._interned.union(before, owner)
            first += here
            count -= here

    def counts(self) -> dict[int, int]:
        """Blocks by the number of their set."""
        counts: dict[int, int] = {}
        for owners in self._groups.values():
            numbers, found = np.unique(owners, return_counts=True)
            for number, count in zip(numbers.tolist(), found.tolist(), strict=True):
                if number:
                    counts[number] = counts.get(number, 0) + count
        return counts


def _pointer(child: Node | Pointer) -> Pointer:
    return child.pointer() if isinstance(child, Node) else child
