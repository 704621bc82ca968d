"""Counts the pointers at every block, and compares the space map with the counts (I1, I6).

The counts are kept in one array for each group of blocks that has any pointer. They take 7 bytes
for each block of such a group; groups that are not used take none.
"""

from bisect import bisect_right
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from cowfs.care.reader import MetadataReader
from cowfs.care.report import Findings
from cowfs.storage.format import (
    GROUP_BLOCKS,
    INDEX_FANOUT,
    KIND_TWINS,
    LOG_AREAS,
    RING_SLOTS,
    Pointer,
    Superblock,
    group_count,
    index_shape,
    ring_blocks,
)

ROLE_NODE = 1
ROLE_DATA = 2


class References:
    """Of each block: the number of pointers at it, its roles, whether its data was verified."""

    def __init__(self) -> None:
        self._counts: dict[int, npt.NDArray[np.uint32]] = {}
        self._roles: dict[int, npt.NDArray[np.uint8]] = {}
        self._tags: dict[int, npt.NDArray[np.uint16]] = {}

    def add(self, first: int, count: int) -> None:
        """Count one more pointer at each of `count` blocks."""
        for group, start, stop in _group_parts(first, count):
            counts = self._counts.get(group)
            if counts is None:
                counts = self._counts[group] = np.zeros(GROUP_BLOCKS, np.uint32)
            counts[start:stop] += 1

    def mark(self, first: int, count: int, role: int) -> tuple[int, bool]:
        """Record that blocks are used as ROLE_NODE or ROLE_DATA.

        Returns:
            How many of the blocks had no role before, and whether there is a clash: a block also
            has the other role, or belongs to two nodes.
        """
        fresh = 0
        clash = False
        for group, start, stop in _group_parts(first, count):
            roles = self._roles.get(group)
            if roles is None:
                roles = self._roles[group] = np.zeros(GROUP_BLOCKS, np.uint8)
            piece = roles[start:stop]
            unused = int(np.count_nonzero(piece == 0))
            fresh += unused
            if unused < stop - start:
                clash |= role == ROLE_NODE or bool((piece & ~np.uint8(role)).any())
            piece |= np.uint8(role)
        return fresh, clash

    def tags(self, group: int) -> npt.NDArray[np.uint16]:
        """For each block of a group, a nonzero digest of the checksum its data was compared with.

        0: not compared yet. The caller writes into the array.
        """
        tags = self._tags.get(group)
        if tags is None:
            tags = self._tags[group] = np.zeros(GROUP_BLOCKS, np.uint16)
        return tags

    def groups(self) -> list[int]:
        return sorted(self._counts)

    def counts(self, group: int) -> npt.NDArray[np.uint32]:
        counts = self._counts.get(group)
        return np.zeros(GROUP_BLOCKS, np.uint32) if counts is None else counts

    def holds(self, group: int, role: int) -> bool:
        """Whether any block of a group has a role."""
        roles = self._roles.get(group)
        return roles is not None and bool((roles & np.uint8(role)).any())

    def count_of(self, block: int) -> int:
        return int(self.counts(block // GROUP_BLOCKS)[block % GROUP_BLOCKS])

    def used_blocks(self) -> int:
        return sum(int(np.count_nonzero(counts)) for counts in self._counts.values())

    def data_blocks(self) -> int:
        return sum(int(np.count_nonzero(roles & ROLE_DATA)) for roles in self._roles.values())


def _group_parts(first: int, count: int) -> list[tuple[int, int, int]]:
    """Cut a run of blocks at the bounds of groups: (group, start, stop in the group)."""
    group, start = divmod(first, GROUP_BLOCKS)
    parts = []
    while count > 0:
        stop = min(start + count, GROUP_BLOCKS)
        parts.append((group, start, stop))
        count -= stop - start
        group, start = group + 1, 0
    return parts


def parts_by_group(first: int, count: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut a run of blocks at the bounds of groups.

    Yields:
        (number of blocks of the run before the part, group, start, stop in the group).
    """
    before = 0
    for group, start, stop in _group_parts(first, count):
        yield before, group, start, stop
        before += stop - start


def pointer_fault(
    pointer: Pointer, blocks: int, birth: int, superblock: Superblock
) -> tuple[str, str] | None:
    """Check a pointer before it is followed.

    Args:
        blocks: how many blocks it points at.
        birth: the birth of the node or page that contains the pointer, or the superblock's
            generation.

    Returns:
        The invariant that the pointer breaks, and what is wrong; None if nothing is.
    """
    end = ring_blocks(superblock.total_blocks)[1]
    for what, block in (("pointer", pointer.block), ("twin pointer", pointer.twin)):
        if what == "twin pointer" and not block:
            continue
        if not RING_SLOTS <= block <= end - blocks:
            return "I5", f"{what} leaves the image, found block {block}"
    if pointer.twin and abs(pointer.twin - pointer.block) < blocks:
        return "I5", f"a twin overlaps its original, found blocks {pointer.block}, {pointer.twin}"
    if bool(pointer.twin) != superblock.duplicates_metadata:
        if pointer.twin:
            return "I5", "the image keeps no twins of nodes and pages, but this pointer has one"
        return "I5", "the image keeps a twin of every node and page, but this pointer has none"
    if not 0 < pointer.birth <= birth:
        return (
            "I4",
            f"a child is newer than its parent, found birth {pointer.birth}, parent {birth}",
        )
    return None


def index_pointer(entry: np.void) -> Pointer:
    """The pointer in an entry of an index page."""
    return Pointer(
        int(entry["block"]), int(entry["twin"]), int(entry["birth"]), bytes(entry["checksum"])
    )


class SpaceMapCheck:
    """Walks the space map, and compares every page with the counted references.

    Args:
        incomplete: a subtree could not be read. A refcount above the count may then be right, so
            it is a warning and no error.

    Attributes:
        faults: how many errors the space map has; a repair fixes all of them.
        system: one reference to each block of the map's own pages and of the log.
        log_is_free: whether nothing else lies on the blocks of the log.
        kinds: by group, what the index page says that the group is used for.
        unclaimed: by group, the refcounts as they are stored; only filled if `incomplete`.
    """

    def __init__(
        self,
        reader: MetadataReader,
        superblock: Superblock,
        references: References,
        findings: Findings,
        *,
        incomplete: bool,
    ) -> None:
        self._reader = reader
        self._superblock = superblock
        self._references = references
        self._findings = findings
        self._incomplete = incomplete
        self._groups = group_count(superblock.total_blocks)
        self._shape = index_shape(superblock.total_blocks)
        self._unread: list[range] = []  # spans of groups: the image may claim a billion of them
        self._seen_groups: set[int] = set()
        self._unread_starts: list[int] | None = None
        self._system: list[int] = []
        self._used_in_map = 0
        self._unclaimed_blocks = 0
        self.faults = 0
        self.log_is_free = True
        self.system = References()
        self.kinds: dict[int, int] = {}
        self.unclaimed: dict[int, npt.NDArray[np.uint32]] = {}

    def run(self) -> int:
        """Check the whole map, once.

        Returns:
            The number of system blocks: those of the rings, the log and the map's own pages.
        """
        superblock, findings = self._superblock, self._findings
        self._index(superblock.space_map, len(self._shape), 0, superblock.generation)
        for group in self._references.groups():
            if group not in self._seen_groups and not self._is_unread(group):
                self._compare(group, np.zeros(GROUP_BLOCKS, np.uint32))
        self._log()
        system_blocks = 2 * RING_SLOTS + len(self._system)
        self._check_system_blocks()
        if self._unclaimed_blocks:
            findings.warning(
                "I6",
                f"{self._unclaimed_blocks} blocks have a refcount above their number of pointers; "
                "nodes that could not be read may point at them",
            )
        if self._unread:
            return system_blocks
        used = self._used_in_map
        if superblock.used_blocks != used:
            self._error(
                "I6", f"the superblock counts {superblock.used_blocks} used blocks, expected {used}"
            )
        if superblock.system_blocks != system_blocks:
            self._error(
                "I6",
                f"the superblock counts {superblock.system_blocks} system blocks, "
                f"expected {system_blocks}",
            )
        return system_blocks

    def _is_unread(self, group: int) -> bool:
        """Whether the page of a group could not be read. Only after the whole index was walked."""
        if self._unread_starts is None:
            self._unread.sort(key=lambda span: span.start)
            self._unread_starts = [span.start for span in self._unread]
        at = bisect_right(self._unread_starts, group) - 1
        return at >= 0 and group in self._unread[at]

    def _log(self) -> None:
        """Count the blocks of the log as system blocks, and check that nothing else lies there."""
        place = self._superblock.log
        if place is None:
            return
        pages = set(self._system)
        for copy in place.copies:
            blocks = range(copy, copy + LOG_AREAS * place.area_blocks)
            taken = [block for block in blocks if self._references.count_of(block)]
            if taken or not pages.isdisjoint(blocks):
                self.log_is_free = False
                where = taken[0] if taken else min(pages.intersection(blocks))
                self._error("I6", "the log lies on blocks in use", block=where)
            self.system.add(copy, len(blocks))
            self._system += blocks

    def _span(self, level: int, number: int) -> range:
        """The groups that page `number` of a level covers; at level 0 the group itself."""
        width: int = INDEX_FANOUT**level
        return range(min(number * width, self._groups), min((number + 1) * width, self._groups))

    def _blocks_inside(self, groups: range) -> int:
        start = groups.start * GROUP_BLOCKS
        stop = min(groups.stop * GROUP_BLOCKS, self._superblock.total_blocks)
        return max(0, stop - start)

    def _follow(self, pointer: Pointer, birth: int, groups: range, at: int) -> bool:
        """Check the pointer at a page, and count the page's blocks as system blocks.

        Args:
            groups: the groups that the page covers.
            at: the block of the page that contains the pointer, for findings.

        Returns:
            Whether the page may be read.
        """
        fault = pointer_fault(pointer, 1, birth, self._superblock)
        if fault is not None:
            self._error(*fault, block=at)
            if fault[0] != "I4":
                self._unread.append(groups)
                return False
        self._system.append(pointer.block)
        if pointer.twin:
            self._system.append(pointer.twin)
        for block in filter(None, (pointer.block, pointer.twin)):
            self.system.add(block, 1)
        return True

    def _report(self, invariant: str, what: str, block: int) -> None:
        self._error(invariant, what, block=block)

    def _error(self, invariant: str, what: str, *, block: int | None = None) -> None:
        """Record an error. All are repairable: a repair writes the whole map anew."""
        self.faults += 1
        self._findings.error(invariant, what, block=block, repairable=True)

    def _index(self, pointer: Pointer, level: int, number: int, birth: int) -> int | None:
        """Check an index page and all pages below it.

        Returns:
            The sum of its entries' free counts, as stored; None if the page cannot be read.
        """
        groups = self._span(level, number)
        if not self._follow(pointer, birth, groups, pointer.block):
            return None
        entries = self._reader.index_page(pointer, level, number, self._report)
        if entries is None:
            self._unread.append(groups)
            return None
        at = pointer.block
        for position in range(INDEX_FANOUT):
            entry = entries[position]
            child_number = number * INDEX_FANOUT + position
            below = self._span(level - 1, child_number)
            child = index_pointer(entry)
            free = int(entry["free"])
            name = f"entry {position} of the index page"
            if bytes(entry["reserved"]) != bytes(3) or entry["kind"] > KIND_TWINS:
                self._error("I5", f"{name} has an unknown kind or reserved bytes", block=at)
            if not child.block:
                if child.twin or child.birth or any(child.checksum) or free or entry["kind"]:
                    self._error("I5", f"{name} has no page, but is not all zero", block=at)
                continue
            expected: int | None = None
            if not below:
                self._error("I5", f"{name} lies beyond the last group", block=at)
                continue
            if level > 1:
                expected = self._index(child, level - 1, child_number, pointer.birth)
            else:
                self.kinds[child_number] = int(entry["kind"])
                expected = self._group(child, child_number, pointer.birth, at)
            if expected is not None and free != expected % (1 << 32):
                text = f"{name} counts {free} free blocks, expected {expected % (1 << 32)}"
                if level == 1:
                    self._error("I6", text, block=at)
                else:
                    self._findings.warning("I6", text, block=at)
        return int(entries["free"].sum(dtype=np.uint64))

    def _group(self, pointer: Pointer, group: int, birth: int, at: int) -> int | None:
        """Check the refcount page of a group.

        Returns:
            The number of free blocks that the page counts; None if it cannot be read.
        """
        if not self._follow(pointer, birth, range(group, group + 1), at):
            return None
        page = self._reader.refcounts(pointer, self._report)
        if page is None:
            self._unread.append(range(group, group + 1))
            return None
        self._seen_groups.add(group)
        self._compare(group, page)
        if self._incomplete:
            self.unclaimed[group] = page
        inside = self._blocks_inside(range(group, group + 1))
        used = int(np.count_nonzero(page[:inside]))
        self._used_in_map += used
        return inside - used

    def _compare(self, group: int, page: npt.NDArray[np.uint32]) -> None:
        """Compare a refcount page with the counts; equal faults of neighbours are one finding."""
        counts = self._references.counts(group)
        differing = np.flatnonzero(page != counts)
        inside = self._blocks_inside(range(group, group + 1))
        start = 0
        while start < len(differing):
            at = int(differing[start])
            found, expected = int(page[at]), int(counts[at])
            stop = start + 1
            while (
                stop < len(differing)
                and int(differing[stop]) == int(differing[stop - 1]) + 1
                and int(page[differing[stop]]) == found
                and int(counts[differing[stop]]) == expected
                and (int(differing[stop]) < inside) == (at < inside)
            ):
                stop += 1
            self._mismatch(group * GROUP_BLOCKS + at, stop - start, found, expected, at < inside)
            start = stop

    def _mismatch(self, block: int, count: int, found: int, expected: int, inside: bool) -> None:
        blocks = f"{count} block{'s' if count > 1 else ''}"
        if not inside:
            what = f"refcount {found} for {blocks} beyond the end of the image"
        elif not expected:
            if self._incomplete:
                self._unclaimed_blocks += count
                return
            what = f"leaked: {blocks} with refcount {found}, but nothing points at them"
        elif not found:
            what = f"{blocks} counted as free, but {expected} pointers point at them"
        else:
            what = f"refcount {found} for {blocks}, but {expected} pointers point at them"
            if found > expected and self._incomplete:
                self._unclaimed_blocks += count
                return
        self._error("I1", what, block=block)

    def _check_system_blocks(self) -> None:
        """Check that no page of the space map overlaps another page, a node or data."""
        if not self.log_is_free:
            return  # told already
        blocks, times = np.unique(np.array(self._system, np.uint64), return_counts=True)
        for block, count in zip(blocks.tolist(), times.tolist(), strict=True):
            if count > 1:
                self._error("I5", f"{count} pages of the space map are at one block", block=block)
            if self._references.count_of(block):
                self._error("I6", "a page of the space map lies on a node or on data", block=block)
