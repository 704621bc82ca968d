"""Repairs what can be counted anew: the space map, counters, and bad copies of nodes.

The references come from the checker's own walk, never from the allocator or the space map of the
filesystem. The repair writes one commit:

1. New pages and nodes, into blocks that neither the newest nor a retained generation reaches.
2. A flush.
3. The superblock, into both copies of the ring, and a flush: the commit point. A crash before it
   leaves the image as it was, a crash after it leaves the repaired image.
4. Only then each bad copy of a node is overwritten in place with the good one.

The new commit retains no earlier generation, because their space maps are the ones that were wrong.
What the counts cannot tell is reported and left alone: lost names, wrong link counts, damaged data.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace
from xxhash import xxh3_128_digest

from cowfs.care.check import Inspection, inspect_image
from cowfs.care.reader import MetadataReader, ignore_damage, size_is_impossible
from cowfs.care.references import ROLE_NODE, References, index_pointer, pointer_fault
from cowfs.care.report import CheckProgress, Finding
from cowfs.errors import CorruptError, CowfsError, NoSpaceError
from cowfs.files.items import KEY_BYTES, TYPE_EXTENT, decode_extent, split_key
from cowfs.history.records import decode_drop, decode_root, root_key
from cowfs.storage.device import Device
from cowfs.storage.format import (
    BLOCK_SIZE_BYTES,
    ENTRY_OVERHEAD_BYTES,
    FLAG_CLEAN,
    GROUP_BLOCKS,
    INCOMPAT_LOG,
    INDEX_FANOUT,
    KIND_DATA,
    KIND_NODES,
    KIND_TWINS,
    NODE_BLOCKS,
    NODE_CAPACITY_BYTES,
    NODE_SIZE_BYTES,
    RING_SLOTS,
    Pointer,
    Superblock,
    decode_pointer,
    encode_node,
    group_count,
    index_shape,
    require_generations,
    ring_blocks,
)
from cowfs.storage.index_pages import INDEX_ENTRY, encode_index_page


class RepairRefusedError(CowfsError):
    """The image cannot be repaired without losing something; the message says what else to do."""


@dataclass(frozen=True, slots=True)
class RepairReport:
    """What a repair did, or would do.

    Attributes:
        generation: of the new commit; None if nothing was written.
        changes: each change, worded to follow "would"; empty if there is nothing to repair.
        remaining: the errors that a repair cannot fix.
    """

    generation: int | None
    changes: tuple[str, ...]
    remaining: tuple[Finding, ...]


def repair_image(
    device: Device,
    *,
    dry_run: bool = False,
    accept_loss: bool = False,
    data: bool = False,
    progress: Callable[[CheckProgress], None] | None = None,
) -> RepairReport:
    """Repair the newest generation of an image that nobody else uses.

    Args:
        device: the image, locked unless `dry_run`.
        dry_run: only report what would be done.
        accept_loss: repair although nodes are lost. Blocks without a pointer then keep their
            refcounts if these can be read, since lost nodes may point at them; otherwise they
            become free.
        data: also compare file data with its checksums, for `remaining`.
        progress: called during the check, as by `check_image`.

    Raises:
        RepairRefusedError: nodes are lost, or the trees contradict each other.
        NoSpaceError: there is no room for a new space map beside the old one.
        ImageError: the device holds no image.
        DeviceError: the image cannot be read or written. Before the commit point nothing in use
            was changed.
    """
    found = inspect_image(device, progress=progress, data=data)
    changes = _changes(found)
    remaining = tuple(finding for finding in found.report.errors if not finding.repairable)
    if changes:
        _require_countable(device, found, accept_loss=accept_loss)
    if dry_run or not changes:
        return RepairReport(None, changes, remaining)
    generation = _Writer(device, found).run()
    return RepairReport(generation, changes, remaining)


def _changes(found: Inspection) -> tuple[str, ...]:
    superblock = found.superblock
    """What a repair changes, each worded to follow "would"."""
    changes = []
    if found.space_map.faults:
        changes.append(
            f"rewrite the space map, which has {_count(found.space_map.faults, 'fault')}"
        )
    for record in found.corrections.values():
        changes.append(
            f"correct the counters of {record.name}: {record.node_count} nodes, "
            f"{record.data_blocks} data blocks, {record.inode_count} inodes, "
            f"next inode {record.next_ino}"
        )
    if found.catalog_nodes and found.catalog_nodes != superblock.catalog_nodes:
        changes.append(f"correct the number of catalog nodes to {found.catalog_nodes}")
    if found.next_root_id != superblock.next_root_id:
        changes.append(f"set the next root id to {found.next_root_id}")
    if found.reader.bad_nodes:
        copies = _count(len(found.reader.bad_nodes), "damaged copy", "damaged copies")
        changes.append(f"overwrite {copies} of nodes with the intact ones")
    if any(finding.invariant == "I2" and finding.repairable for finding in found.report.errors):
        changes.append("stop retaining the earlier generations, which are not whole")
    return tuple(changes)


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _require_countable(device: Device, found: Inspection, *, accept_loss: bool) -> None:
    """Raise RepairRefusedError unless the counted references can be trusted."""
    impossible = size_is_impossible(device, found.superblock)
    if impossible:
        raise RepairRefusedError(f"{impossible}; copy out what is left with cowfs salvage")
    if not found.sound:
        raise RepairRefusedError(
            "the trees contradict each other, so the owner of some blocks is unknown; go back to "
            "an earlier commit (cowfs info --generations), or copy the files out with cowfs salvage"
        )
    if found.walk.incomplete and not accept_loss:
        raise RepairRefusedError(
            "no copy of some nodes is intact, and what is below them is lost; go back to an "
            "earlier commit (cowfs info --generations), or copy the files out with cowfs salvage "
            "and then repair with --accept-loss"
        )


class _Writer:
    """One commit that holds the counted refcounts and the corrected records."""

    def __init__(self, device: Device, found: Inspection) -> None:
        self._device = device
        self._found = found
        self._old = found.superblock
        require_generations(self._old)
        self._generation = self._old.generation + 1
        self._total = self._old.total_blocks
        self._twins = self._old.duplicates_metadata
        self._writes: list[tuple[int, bytes]] = []
        self._counts: dict[int, npt.NDArray[np.uint32]] = {
            group: found.references.counts(group).copy() for group in found.references.groups()
        }
        for group, page in found.space_map.unclaimed.items():
            counts = self._counts.setdefault(group, np.zeros(GROUP_BLOCKS, np.uint32))
            self._keep_unclaimed(group, counts, page)
        in_use = References()  # what the newest and the retained generations reach
        for slot in found.slots:
            superblock = slot.superblock
            if superblock is None or superblock.uuid != self._old.uuid:
                continue
            if superblock.generation >= self._old.oldest_retained:
                _mark_reached(device, superblock, in_use)
        self._free_blocks = _FreeBlocks(
            self._total, [found.references, found.space_map.system, in_use]
        )
        for group, counts in self._counts.items():
            self._free_blocks.exclude(group, counts != 0)

    def _keep_unclaimed(
        self, group: int, counts: npt.NDArray[np.uint32], page: npt.NDArray[np.uint32]
    ) -> None:
        """Keep stored refcounts above the count: nodes that are lost may point at these blocks."""
        inside = min(GROUP_BLOCKS, self._total - group * GROUP_BLOCKS)
        system = self._found.space_map.system.counts(group)
        kept = (page > counts) & (system == 0)
        kept[inside:] = False
        counts[kept] = page[kept]

    def run(self) -> int:
        """Write the commit and the good copies of nodes; the number of the new generation."""
        catalog, catalog_nodes = self._old.catalog, self._found.catalog_nodes
        if self._found.corrections:
            catalog, catalog_nodes = self._catalog()
        space_map, pages = self._space_map()
        place = self._old.log
        if place is not None:
            place = place.other_area() if self._found.space_map.log_is_free else None
        superblock = replace(
            self._old,
            generation=self._generation,
            flags=FLAG_CLEAN,
            committed_ns=time.time_ns(),
            oldest_retained=self._generation,
            catalog=catalog,
            space_map=space_map,
            used_blocks=sum(int(np.count_nonzero(counts)) for counts in self._counts.values()),
            catalog_nodes=catalog_nodes or self._old.catalog_nodes,
            system_blocks=2 * RING_SLOTS + pages + (place.blocks() if place else 0),
            next_root_id=self._found.next_root_id,
            log=place,
            incompat=self._old.incompat if place else self._old.incompat & ~INCOMPAT_LOG,
        )
        for block, image in self._writes:
            self._device.write(block * BLOCK_SIZE_BYTES, [image])
        self._device.flush()
        # Everything that the new superblock points at is durable; nothing in use was changed.
        slot = superblock.encode()
        for first in ring_blocks(self._total):
            self._device.write((first + superblock.slot()) * BLOCK_SIZE_BYTES, [slot])
        self._device.flush()
        # That was the commit point. The bad copies come last: pages of the old space map may lie in
        # their place, and until now these were needed.
        for bad, good in self._found.reader.bad_nodes.items():
            data = self._device.read(good * BLOCK_SIZE_BYTES, NODE_SIZE_BYTES)
            self._device.write(bad * BLOCK_SIZE_BYTES, [data])
        self._device.flush()
        return self._generation

    # --- catalog ----------------------------------------------------------------------------------

    def _catalog(self) -> tuple[Pointer, int]:
        """Build the catalog with the corrected records.

        Returns:
            The pointer at its root node, and its number of nodes.
        """
        for pointer in _nodes_below(self._found.reader, self._old, self._old.catalog):
            for block in filter(None, (pointer.block, pointer.twin)):
                self._add(block, NODE_BLOCKS, -1)
        corrected = {
            root_key(root_id): record.encode()
            for root_id, record in self._found.corrections.items()
        }
        entries = [
            (entry.key, corrected.get(entry.key, entry.value)) for entry in self._found.walk.catalog
        ]
        level = nodes = 0
        while True:
            pointers = []
            for piece in _pieces_of_nodes(entries):
                pointers.append((piece[0][0] if piece else b"", self._node(level, piece)))
                nodes += 1
            if len(pointers) == 1:
                return pointers[0][1], nodes
            entries = [(key, pointer.encode()) for key, pointer in pointers]
            level += 1

    def _node(self, level: int, entries: list[tuple[bytes, bytes]]) -> Pointer:
        block = self._free_blocks.take(0, NODE_BLOCKS)
        twin = self._free_blocks.take(1, NODE_BLOCKS) if self._twins else 0
        image, checksum = encode_node(
            level,
            self._generation,
            block,
            0,
            self._old.image_id,
            self._old.seed,
            [key for key, _ in entries],
            [value for _, value in entries],
        )
        for place in filter(None, (block, twin)):
            self._writes.append((place, image))
            self._add(place, NODE_BLOCKS, 1)
        return Pointer(block, twin, self._generation, checksum)

    def _add(self, first: int, count: int, by: int) -> None:
        for block in range(first, first + count):
            group, at = divmod(block, GROUP_BLOCKS)
            counts = self._counts.setdefault(group, np.zeros(GROUP_BLOCKS, np.uint32))
            counts[at] = int(counts[at]) + by

    # --- space map --------------------------------------------------------------------------------

    def _space_map(self) -> tuple[Pointer, int]:
        """Build every page of the space map.

        Returns:
            The pointer at the top index page, and the number of blocks that the pages take.
        """
        blocks = 0
        below: dict[int, tuple[Pointer, int, int]] = {}
        for group in sorted(self._counts):
            counts = self._counts[group]
            inside = min(GROUP_BLOCKS, self._total - group * GROUP_BLOCKS)
            used = int(np.count_nonzero(counts))
            if used:
                page = counts.astype("<u4").tobytes()
                pointer = self._page(page, xxh3_128_digest(page, self._old.seed))
                below[group] = (pointer, inside - used, self._kind(group))
                blocks += 1 + self._twins
        for level in range(1, len(index_shape(self._total)) + 1):
            here: dict[int, tuple[Pointer, int, int]] = {}
            numbers = sorted({number // INDEX_FANOUT for number in below})
            for number in numbers:
                entries = np.zeros(INDEX_FANOUT, INDEX_ENTRY)
                for at in range(INDEX_FANOUT):
                    child = below.get(number * INDEX_FANOUT + at)
                    if child is not None:
                        pointer, free, kind = child
                        entries[at] = (
                            pointer.block,
                            pointer.twin,
                            pointer.birth,
                            np.void(pointer.checksum),
                            free & 0xFFFFFFFF,
                            kind,
                            b"",
                        )
                pointer = self._index_page(level, number, entries)
                here[number] = (pointer, int(entries["free"].sum(dtype=np.uint64)), 0)
                blocks += 1 + self._twins
            below = here
        assert list(below) == [0], "the index has one page at the top"
        return below[0][0], blocks

    def _kind(self, group: int) -> int:
        """The kind of a group: as the allocator recorded it, else by what is in it; only a hint."""
        kind = self._found.space_map.kinds.get(group, 0)
        if KIND_DATA <= kind <= KIND_TWINS:
            return kind
        return KIND_NODES if self._found.references.holds(group, ROLE_NODE) else KIND_DATA

    def _page(self, image: bytes, checksum: bytes) -> Pointer:
        block = self._free_blocks.take(0, 1)
        twin = self._free_blocks.take(1, 1) if self._twins else 0
        self._writes += [(place, image) for place in (block, twin) if place]
        return Pointer(block, twin, self._generation, checksum)

    def _index_page(self, level: int, number: int, entries: npt.NDArray[np.void]) -> Pointer:
        block = self._free_blocks.take(0, 1)
        twin = self._free_blocks.take(1, 1) if self._twins else 0
        image, checksum = encode_index_page(
            level,
            number,
            self._generation,
            block,
            self._old.image_id,
            self._old.seed,
            entries.tobytes(),
        )
        self._writes += [(place, image) for place in (block, twin) if place]
        return Pointer(block, twin, self._generation, checksum)


class _FreeBlocks:
    """Hands out blocks that are not in use. Originals come from even groups, twins from odd ones.

    Args:
        used: blocks with any reference in one of these are in use.
    """

    def __init__(self, total_blocks: int, used: list[References]) -> None:
        self._total = total_blocks
        self._used = used
        self._excluded: dict[int, npt.NDArray[np.bool_]] = {}
        self._busy: dict[int, bytearray] = {}
        self._next_group = [0, 1]  # by parity, the group to take from

    def exclude(self, group: int, blocks: npt.NDArray[np.bool_]) -> None:
        """Also treat these blocks of a group as in use, given as a mask."""
        self._excluded[group] = blocks

    def take(self, parity: int, count: int) -> int:
        """Take `count` consecutive free blocks of one group.

        Args:
            parity: 0 takes from even groups, 1 from odd ones, as long as they have room.

        Returns:
            The first of the blocks.

        Raises:
            NoSpaceError: no group has that many consecutive free blocks.
        """
        groups = group_count(self._total)
        free = bytes(count)
        start = self._next_group[parity]
        for group in (*range(start, groups, 2), *range(1 - parity, groups, 2)):
            busy = self._group(group)
            found = busy.find(free)
            if found >= 0:
                busy[found : found + count] = b"\1" * count
                if group % 2 == parity:
                    self._next_group[parity] = group if count == 1 else start
                return int(group * GROUP_BLOCKS + found)
        raise NoSpaceError("there is no room for a new space map beside the old one")

    def _group(self, group: int) -> bytearray:
        """One byte for each block of a group: 0 if it is free."""
        busy = self._busy.get(group)
        if busy is None:
            taken = np.zeros(GROUP_BLOCKS, bool)
            for used in self._used:
                taken |= used.counts(group) != 0
            if group in self._excluded:
                taken |= self._excluded[group]
            numbers = np.arange(group * GROUP_BLOCKS, (group + 1) * GROUP_BLOCKS)
            taken |= (numbers < RING_SLOTS) | (numbers >= self._total - RING_SLOTS)
            busy = self._busy[group] = bytearray(taken.tobytes())
        return busy


# --- what a generation reaches --------------------------------------------------------------------


def _mark_reached(device: Device, superblock: Superblock, reached: References) -> None:
    """Add a reference to all blocks that a generation reaches, as far as it can be read."""
    reader = MetadataReader(device, superblock)
    end = ring_blocks(superblock.total_blocks)[1]
    for leaf_key, value in _leaf_entries(reader, superblock, superblock.catalog, reached):
        try:
            if leaf_key[:1] == b"R":
                root = decode_root(value).pointer
            elif leaf_key[:1] == b"D":
                root = decode_drop(value).path[0].pointer
            else:
                continue
        except CorruptError:
            continue  # nothing can be kept of it
        for item, content in _leaf_entries(reader, superblock, root, reached):
            if len(item) == KEY_BYTES and item[8] == TYPE_EXTENT:
                try:
                    extent = decode_extent(split_key(item)[0], content)
                except CorruptError:
                    continue
                if RING_SLOTS <= extent.block <= end - extent.count:
                    reached.add(extent.block, extent.count)
    waiting = [(superblock.space_map, len(index_shape(superblock.total_blocks)), 0)]
    while waiting:
        pointer, level, number = waiting.pop()
        if pointer_fault(pointer, 1, superblock.generation, superblock) is not None:
            continue
        for block in filter(None, (pointer.block, pointer.twin)):
            reached.add(block, 1)
        entries = reader.index_page(pointer, level, number, ignore_damage) if level else None
        if entries is not None:
            waiting += [
                (index_pointer(entries[at]), level - 1, number * INDEX_FANOUT + at)
                for at in np.flatnonzero(entries["block"]).tolist()
            ]


def _leaf_entries(
    reader: MetadataReader, superblock: Superblock, root: Pointer, reached: References
) -> Iterator[tuple[bytes, bytes]]:
    """The entries of all leaves below a root, except nodes that already have a reference.

    Adds a reference to the blocks of each node.
    """
    waiting: list[tuple[Pointer, int | None]] = [(root, None)]
    while waiting:
        pointer, level = waiting.pop()
        if pointer_fault(pointer, NODE_BLOCKS, superblock.generation, superblock) is not None:
            continue
        if reached.count_of(pointer.block):
            continue
        for block in filter(None, (pointer.block, pointer.twin)):
            reached.add(block, NODE_BLOCKS)
        image = reader.node(pointer, level, ignore_damage)
        if image is None:
            continue
        if image.level:
            waiting += [(decode_pointer(value), image.level - 1) for value in image.values]
        else:
            yield from zip(image.keys, image.values, strict=True)


def _nodes_below(
    reader: MetadataReader, superblock: Superblock, root: Pointer
) -> Iterator[Pointer]:
    """The pointers at all nodes of a tree."""
    waiting: list[tuple[Pointer, int | None]] = [(root, None)]
    while waiting:
        pointer, level = waiting.pop()
        if pointer_fault(pointer, NODE_BLOCKS, superblock.generation, superblock) is not None:
            continue
        yield pointer
        image = reader.node(pointer, level, ignore_damage)
        if image is not None and image.level:
            waiting += [(decode_pointer(value), image.level - 1) for value in image.values]


def _pieces_of_nodes(entries: list[tuple[bytes, bytes]]) -> Iterator[list[tuple[bytes, bytes]]]:
    """Cut entries into as few nodes as can hold them; no entries make one empty node."""
    piece: list[tuple[bytes, bytes]] = []
    used = 0
    for key, value in entries:
        size = ENTRY_OVERHEAD_BYTES + len(key) + len(value)
        if used + size > NODE_CAPACITY_BYTES:
            yield piece
            piece, used = [], 0
        piece.append((key, value))
        used += size
    yield piece
