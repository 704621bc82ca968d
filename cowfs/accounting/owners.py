"""Owner sets: for each set of roots, how many blocks exactly these roots reach.

One pass over the distinct nodes, level by level from the roots, finds for each block the set of
roots that reach it: its owners. Every question after that is a sum over sets: what deleting some
snapshots would free, what a snapshot references, what two snapshots share.

A set is a row of bits, one for each root. Snapshots come first, the oldest at bit 0, then the drop
queue, volumes and the catalog. So "all snapshots up to this one" is a range of bits.

All numbers are blocks, metadata and twins included. The space map belongs to no root. Blocks that
only retained generations reach are in no set, since they will become free; `retained` counts them.

See docs/design/accounting.md.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cowfs.accounting.structure import (
    Numbers,
    Progress,
    Root,
    Structure,
    covered,
    read_structure,
    spread,
)
from cowfs.errors import CorruptError, DeviceError, ImageError
from cowfs.history.catalog import Catalog
from cowfs.history.filesystem import Filesystem
from cowfs.history.records import RootKind
from cowfs.storage.btree import Tree
from cowfs.storage.format import MAX_TOTAL_BLOCKS, Superblock
from cowfs.storage.store import Store
from cowfs.storage.superblock import read_earlier

Words = npt.NDArray[np.uint64]  # sets, each a row of 64-bit words

WORD_BITS = 64
UNION_WORDS_MAX = 1 << 22  # words of the sets united in one step: 32 MiB
COUNTED_CELLS_MAX = 1 << 23  # cells of the table (set, owner) made in one step: 8 MiB


class OwnerKind(StrEnum):
    SNAPSHOT = "snapshot"
    DROP = "drop"
    VOLUME = "volume"
    CATALOG = "catalog"


@dataclass(frozen=True, slots=True)
class Owner:
    """A root that may own blocks.

    Attributes:
        number: the root id; of an entry of the drop queue its number there.
        parent: the bit of the snapshot it was made from; None if there is none, or it is deleted.
    """

    kind: OwnerKind
    name: str
    number: int
    parent: int | None = None


class Blocks(NamedTuple):
    """Two numbers of blocks: those of nodes, twins included, and those of data."""

    nodes: int
    data: int

    @property
    def total(self) -> int:
        return self.nodes + self.data


class Retained(NamedTuple):
    """A retained generation, and the blocks that neither a root nor a newer generation reaches."""

    generation: int
    blocks: Blocks


class OwnerSets:
    """The sets, and the blocks that each set of roots owns alone.

    Args:
        owners: by bit.
        sets: array (sets, words) of uint64. Owner b is bit b % 64 of word b // 64. No row is empty,
            no two rows are equal.
        nodes, data: int64 arrays, the blocks of each set.
        retained: the newest generation first; None if one of them cannot be read.
    """

    def __init__(
        self,
        owners: tuple[Owner, ...],
        sets: Words,
        nodes: Numbers,
        data: Numbers,
        retained: tuple[Retained, ...] | None = (),
    ) -> None:
        self.owners = owners
        self.sets = sets
        self.nodes = nodes
        self.data = data
        self.retained = retained
        self._bits = {(owner.kind, owner.number): bit for bit, owner in enumerate(owners)}
        self._per_owner: dict[str, Numbers] = {}

    def bit(self, kind: OwnerKind, number: int) -> int:
        """The bit of a root; KeyError if it is unknown."""
        return self._bits[(kind, number)]

    @property
    def snapshot_count(self) -> int:
        """The number of snapshots; their bits are those below it."""
        return sum(owner.kind == OwnerKind.SNAPSHOT for owner in self.owners)

    # --- sums -------------------------------------------------------------------------------------

    def exclusive(self, bits: Iterable[int]) -> Blocks:
        """The blocks that only these roots reach: deleting exactly them would free these."""
        return self._sum(self.within(bits))

    def within(self, bits: Iterable[int]) -> npt.NDArray[np.bool_]:
        """A mask of the sets all of whose owners are among these."""
        outside = ~_row(bits, self.sets.shape[1])
        return np.logical_not((self.sets & outside).any(axis=1))

    def referenced(self, bit: int) -> Blocks:
        """The blocks that a root reaches."""
        return self._sum(self._has(bit))

    def written(self, bit: int) -> Blocks:
        """The blocks that a root reaches and the snapshot it was made from does not."""
        parent = self.owners[bit].parent
        mine = self._has(bit)
        return self._sum(mine if parent is None else mine & ~self._has(parent))

    def total(self) -> Blocks:
        """The blocks of volumes, snapshots and the drop queue, without those of the catalog."""
        return self._sum(~self._only(OwnerKind.CATALOG))

    def _only(self, kind: OwnerKind) -> npt.NDArray[np.bool_]:
        return self.within(bit for bit, owner in enumerate(self.owners) if owner.kind == kind)

    def _has(self, bit: int) -> npt.NDArray[np.bool_]:
        word, at = divmod(bit, WORD_BITS)
        return (self.sets[:, word] >> np.uint64(at) & np.uint64(1)).astype(np.bool_)

    def _sum(self, chosen: npt.NDArray[np.bool_]) -> Blocks:
        return Blocks(int(self.nodes[chosen].sum()), int(self.data[chosen].sum()))

    # --- every root at once -----------------------------------------------------------------------

    def each(self, what: str) -> Numbers:
        """One number of every root.

        Args:
            what: "referenced", "exclusive" or "written", as the methods of these names; or
                "cumulative": what deleting all snapshots up to this one would free, 0 for other
                roots.

        Returns:
            Rows of (blocks of nodes, blocks of data), by bit.
        """
        if not self._per_owner:
            self._count_all()
        return self._per_owner[what]

    def _count_all(self) -> None:
        count = len(self.owners)
        parents = np.array([-1 if owner.parent is None else owner.parent for owner in self.owners])
        grown = np.flatnonzero(parents >= 0)
        amounts = np.stack([self.nodes, self.data], axis=1).astype(np.float64)  # exact to 2**53
        referenced, exclusive, written, newest = (np.zeros((count, 2)) for _ in range(4))
        step = max(1, COUNTED_CELLS_MAX // max(1, count))
        for start in range(0, len(self.sets), step):
            table = members(self.sets[start : start + step], count)
            part = amounts[start : start + step]
            referenced += table.T.astype(np.float64) @ part
            last = count - 1 - np.argmax(table[:, ::-1], axis=1)
            alone = np.bitwise_count(self.sets[start : start + step]).sum(axis=1) == 1
            np.add.at(exclusive, last[alone], part[alone])
            np.add.at(newest, last, part)
            old = table[:, parents[grown]]
            table[:, grown] &= ~old
            written += table.T.astype(np.float64) @ part
        cumulative = np.cumsum(newest, axis=0)
        cumulative[self.snapshot_count :] = 0
        self._per_owner = {
            "referenced": referenced.astype(np.int64),
            "exclusive": exclusive.astype(np.int64),
            "written": written.astype(np.int64),
            "cumulative": cumulative.astype(np.int64),
        }

    def pairs(self) -> dict[tuple[int, int], int]:
        """Of each two snapshots the blocks that they own together and no other root reaches.

        Returns:
            Blocks by (bit of the older, bit of the newer); pairs without blocks are left out.
        """
        found = {}
        for row in np.flatnonzero(np.bitwise_count(self.sets).sum(axis=1) == 2).tolist():
            older, newer = np.flatnonzero(members(self.sets[row : row + 1], len(self.owners))[0])
            if newer < self.snapshot_count:
                found[(int(older), int(newer))] = int(self.nodes[row] + self.data[row])
        return found


def members(sets: Words, count: int) -> npt.NDArray[np.bool_]:
    """A table (sets, `count` owners): whether the owner is in the set."""
    flat = np.ascontiguousarray(sets.astype("<u8")).view(np.uint8)
    return np.unpackbits(flat, axis=1, count=count, bitorder="little").astype(np.bool_)


def _row(bits: Iterable[int], words: int) -> Words:
    row = np.zeros(words, np.uint64)
    for bit in bits:
        row[bit // WORD_BITS] |= np.uint64(1 << bit % WORD_BITS)
    return row


# --- the pass -------------------------------------------------------------------------------------


class Survey(NamedTuple):
    """The result of a pass over an image.

    Attributes:
        labels: of each node of the structure its row in `sets.sets`.
    """

    structure: Structure
    sets: OwnerSets
    labels: Numbers


def owner_sets(filesystem: Filesystem) -> OwnerSets:
    """The owner sets of an image. Each distinct node is read once.

    Raises:
        CorruptError: a node cannot be read, so no number would be right.
    """
    return survey(filesystem).sets


def survey(
    filesystem: Filesystem, known: Structure | None = None, progress: Progress | None = None
) -> Survey:
    """Read the structure of an image, and find the owners of its blocks.

    Args:
        filesystem: open read-only, or right after a commit.
        known: the structure from an earlier pass over this image; its nodes are not read again.
        progress: see `Progress`.

    Raises:
        CorruptError: a node cannot be read.
    """
    store = filesystem.store
    owners, roots = _roots(filesystem.catalog, store.superblock)
    structure = read_structure(store, roots, known, progress)
    table = _SetTable(len(owners))
    labels = _node_labels(structure, table)
    data = _data_blocks(structure, labels, table)
    sizes = len(table.rows)
    nodes = np.bincount(labels, structure.node_blocks(), sizes).astype(np.int64)
    data = np.pad(data, (0, sizes - len(data)))
    used = (nodes + data) > 0
    renumbered = np.cumsum(used) - 1
    sets = OwnerSets(
        owners, table.rows[used], nodes[used], data[used], _retained(filesystem, structure)
    )
    return Survey(structure, sets, renumbered[labels])


def owners_of(filesystem: Filesystem) -> tuple[Owner, ...]:
    """The owners by bit, read from the catalog.

    Raises:
        CorruptError: the catalog cannot be read.
    """
    return _roots(filesystem.catalog, filesystem.store.superblock)[0]


def are_sound(sets: OwnerSets) -> bool:
    """Whether cached arrays have the types, shapes and ranges of owner sets of their owners."""
    rows, count = sets.sets, len(sets.owners)
    shapes = (each.ndim == 1 and each.dtype == np.int64 for each in (sets.nodes, sets.data))
    if rows.ndim != 2 or rows.dtype != np.uint64 or not all(shapes):
        return False
    if rows.shape != (len(sets.nodes), -(-count // WORD_BITS)) or len(sets.data) != len(rows):
        return False
    amounts = np.concatenate([sets.nodes, sets.data])
    if not ((amounts >= 0) & (amounts <= MAX_TOTAL_BLOCKS)).all():
        return False
    outside = ~_row(range(count), rows.shape[1])
    return not (rows & outside).any() and bool(rows.any(axis=1).all())


def _roots(catalog: Catalog, superblock: Superblock) -> tuple[tuple[Owner, ...], list[Root]]:
    """The owners, and the root of each owner's tree, both by bit."""
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
        Owner(OwnerKind.CATALOG, "", 0),
    ]
    roots = [
        *(Root(record.pointer, {}) for record in snapshots),
        *(
            Root(drop.path[0].pointer, {step.pointer.block: step.done for step in drop.path})
            for drop in drops
        ),
        *(Root(record.pointer, {}) for record in volumes),
        Root(superblock.catalog, {}),
    ]
    return tuple(owners), roots


class _SetTable:
    """Numbers the distinct sets found so far. Set b, for each bit b, is the one of owner b alone.

    Attributes:
        rows: by number the words of the set.
    """

    def __init__(self, owner_count: int) -> None:
        words = -(-owner_count // WORD_BITS)
        self.rows: Words = np.zeros((owner_count, words), np.uint64)
        bits = np.arange(owner_count)
        self.rows[bits, bits // WORD_BITS] = np.uint64(1) << (bits % WORD_BITS).astype(np.uint64)
        self._random = np.random.default_rng(0)

    def unions(self, groups: Numbers, sets: Numbers) -> Numbers:
        """The number of the union of each group's sets.

        Args:
            groups: of each entry its group, ascending.
            sets: of each entry the number of a set.

        Returns:
            One number for each group that occurs, in order of the groups.
        """
        starts = np.flatnonzero(np.diff(groups, prepend=-1))
        counts = np.diff(starts, append=len(groups))
        result = sets[starts].copy()
        several = np.flatnonzero(counts > 1)
        words = self.rows.shape[1]
        step = max(1, UNION_WORDS_MAX // words)
        done = 0
        while done < len(several):
            # As many groups as UNION_WORDS_MAX allows, but at least one.
            ends = np.cumsum(counts[several[done:]])
            stop = done + max(1, int(np.searchsorted(ends, step, "right")))
            chosen = several[done:stop]
            entries = spread(starts[chosen], counts[chosen])
            firsts = np.concatenate([[0], np.cumsum(counts[chosen])[:-1]])
            rows = np.bitwise_or.reduceat(self.rows[sets[entries]], firsts, axis=0)
            result[chosen] = self._numbers(rows)
            done = stop
        return result

    def _numbers(self, rows: Words) -> Numbers:
        """The number of each of these sets; sets that are new get the next numbers."""
        known = len(self.rows)
        everything = np.concatenate([self.rows, rows])
        while True:
            # Sets are told apart by a random sum of their words. The comparison below proves that
            # no two different sets have the same sum; otherwise other factors are drawn.
            factors = self._random.integers(0, 1 << 64, (2, everything.shape[1]), np.uint64)
            mixed = everything * (factors[0] | np.uint64(1))
            mixed ^= mixed >> np.uint64(32)  # in a product, a bit changes only the bits above it
            sums = (mixed * (factors[1] | np.uint64(1))).sum(axis=1, dtype=np.uint64)
            _, first, where = np.unique(sums, return_index=True, return_inverse=True)
            if (everything[first[where]] == everything).all():
                break
        numbers = np.full(len(first), -1)
        old = first < known
        numbers[old] = first[old]
        fresh = np.flatnonzero(~old)
        fresh = fresh[np.argsort(first[fresh])]
        numbers[fresh] = known + np.arange(len(fresh))
        self.rows = np.concatenate([self.rows, everything[first[fresh]]])
        return numbers[where[known:]]


def _node_labels(structure: Structure, table: _SetTable) -> Numbers:
    """Of each node the number of its set: all roots that reach it."""
    labels = np.zeros(len(structure.nodes), np.int64)
    for level in range(structure.levels - 1, -1, -1):
        here = structure.level(level)
        tops = np.flatnonzero((structure.tops >= here.start) & (structure.tops < here.stop))
        targets, sets = [structure.tops[tops]], [tops.astype(np.int64)]
        if level + 1 < structure.levels:
            above = structure.level(level + 1)
            edges = slice(structure.child_from[above.start], structure.child_from[above.stop])
            counts = np.diff(structure.child_from[above.start : above.stop + 1])
            targets.append(structure.children[edges].astype(np.int64))
            sets.append(np.repeat(labels[above], counts))
        groups, of_group = _distinct_pairs(
            np.concatenate(targets), np.concatenate(sets), len(table.rows)
        )
        labels[here] = table.unions(groups, of_group)
    return labels


def _data_blocks(structure: Structure, labels: Numbers, table: _SetTable) -> Numbers:
    """The number of data blocks of each set, by the set's number."""
    if not len(structure.run_first):
        return np.zeros(0, np.int64)
    sets = np.repeat(labels, np.diff(structure.run_from))
    # All blocks between two neighbours in `cuts` are in the same runs.
    first, count = structure.run_first, structure.run_count.astype(np.int64)
    cuts = np.unique(np.concatenate([first, first + count]))
    start = np.searchsorted(cuts, first)
    pieces = np.searchsorted(cuts, first + count) - start
    groups, of_group = _distinct_pairs(
        spread(start, pieces), np.repeat(sets, pieces), len(table.rows)
    )
    numbers = table.unions(groups, of_group)
    which = groups[np.flatnonzero(np.diff(groups, prepend=-1))]
    lengths = np.diff(cuts)[which]
    counts: Numbers = np.bincount(numbers, lengths, len(table.rows)).astype(np.int64)
    return counts


def _distinct_pairs(targets: Numbers, sets: Numbers, set_count: int) -> tuple[Numbers, Numbers]:
    """The distinct pairs (target, set), sorted, as two arrays."""
    pairs = np.sort(targets * set_count + sets)
    pairs = pairs[np.diff(pairs, prepend=-1) != 0]
    groups, of_group = np.divmod(pairs, set_count)
    return groups, of_group


def _retained(filesystem: Filesystem, structure: Structure) -> tuple[Retained, ...] | None:
    """The retained generations, newest first, with the blocks that no newer one reaches.

    None if one of them cannot be read.
    """
    store, newest = filesystem.store, filesystem.store.superblock
    retained = store.admission.limits.retained_generations
    oldest = max(1, newest.oldest_retained, newest.generation - retained)
    nodes = [structure.nodes]
    first, count = structure.run_first, structure.run_count.astype(np.int64)
    held = covered(first, count)
    found = []
    for generation in range(newest.generation - 1, oldest - 1, -1):
        try:
            earlier = read_earlier(store.device, newest, generation)
            if earlier is None:
                return None
            reached = _structure_of(store, earlier, structure)
        except (CorruptError, DeviceError, ImageError):
            return None
        counted = np.concatenate([each["block"] for each in nodes])
        fresh = ~np.isin(reached.nodes["block"], counted)
        nodes.append(reached.nodes[fresh])
        first = np.concatenate([first, reached.run_first])
        count = np.concatenate([count, reached.run_count.astype(np.int64)])
        before, held = held, covered(first, count)
        blocks = Blocks(int(reached.node_blocks()[fresh].sum()), held - before)
        found.append(Retained(generation, blocks))
    return tuple(found)


def _structure_of(store: Store, superblock: Superblock, known: Structure) -> Structure:
    """The structure of an earlier generation, whose catalog is read first."""
    catalog = Catalog(
        Tree(store, superblock.catalog, 0, superblock.catalog_nodes), superblock.next_root_id
    )
    return read_structure(store, _roots(catalog, superblock)[1], known)
