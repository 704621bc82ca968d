"""Mends what can be counted anew: the space map, the counters of roots and superblock, bad copies.

Reachability is counted by the checker's own walk; the allocator and the space map of the filesystem
are never asked. The result is written as one commit: new pages and nodes in blocks that nothing
reaches, neither the newest generation nor a retained one, then a flush, then the superblock in both
copies of the ring (the commit point), then a flush. Before that point the image is as it was; so a
crash leaves the one or the other. Only then bad copies of nodes are written again, in place, from
the good one, which stays as it is.

The new commit promises no earlier generation: theirs are the maps that were wrong.
What only files could tell (a lost name, a wrong link count, damaged data) is left alone and told.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace
from xxhash import xxh3_128_digest

from cowfs.care.check import Inspection, inspect_image
from cowfs.care.reader import MetadataReader, size_is_impossible
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
    """The image cannot be mended without losing something; the message says what else to do."""


@dataclass(frozen=True, slots=True)
class RepairReport:
    """What a repair did, or would do.

    Attributes:
        generation: the new commit; None when nothing was written.
        changes: what was (or would be) set right, in words; empty when there is nothing to mend.
        remaining: errors that a repair does not touch.
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
    """Mend the newest generation of an image that nobody else uses.

    Args:
        device: locked, unless `dry_run`.
        dry_run: only tell what would be done.
        accept_loss: go on although nodes are lost: blocks below them keep the refcounts they had where
            those can be read, and count as free where they cannot.
        data: verify the checksums of file data too, for `remaining`.

    Raises:
        RepairRefusedError: nodes are lost, or the trees contradict each other.
        NoSpaceError: there is no room for a new space map beside the old one.
        ImageError: not an image. DeviceError: it cannot be read or written; nothing was changed.
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
    changes = []
    if found.space_map.faults:
        changes.append(
            f"write the space map anew ({_count(found.space_map.faults, 'fault')} in it)"
        )
    for record in found.corrections.values():
        changes.append(
            f"set the counters of {record.name} right: {record.node_count} nodes, "
            f"{record.data_blocks} data blocks, {record.inode_count} inodes, "
            f"next inode {record.next_ino}"
        )
    if found.catalog_nodes and found.catalog_nodes != superblock.catalog_nodes:
        changes.append(f"count {_count(found.catalog_nodes, 'node')} of the catalog")
    if found.next_root_id != superblock.next_root_id:
        changes.append(f"set the next root id to {found.next_root_id}")
    if found.reader.bad_nodes:
        changes.append(
            f"write {_count(len(found.reader.bad_nodes), 'damaged copy', 'damaged copies')} of nodes "
            "again from the intact ones"
        )
    if any(finding.invariant == "I2" and finding.repairable for finding in found.report.errors):
        changes.append("no longer promise the earlier generations, which are not whole")
    return tuple(changes)


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _require_countable(device: Device, found: Inspection, *, accept_loss: bool) -> None:
    impossible = size_is_impossible(device, found.superblock)
    if impossible:
        raise RepairRefusedError(f"{impossible}; copy out what is left with cowfs salvage")
    if not found.sound:
        raise RepairRefusedError(
            "the trees contradict each other, so nobody knows whose blocks are whose; go back to an "
            "earlier commit (cowfs info --generations), or copy the files out with cowfs salvage"
        )
    if found.walk.incomplete and not accept_loss:
        raise RepairRefusedError(
            "nodes are lost in every copy, and with them what they led to; go back to an earlier "
            "commit (cowfs info --generations) or copy the files out with cowfs salvage first, then "
            "repair with --accept-loss"
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
        shown = References()
        for slot in found.slots:
            superblock = slot.superblock
            if superblock is None or superblock.uuid != self._old.uuid:
                continue
            if superblock.generation >= self._old.oldest_retained:
                _mark_shown(device, superblock, shown)
        self._room = _Room(self._total, [found.references, found.space_map.system, shown])
        for group, counts in self._counts.items():
            self._room.refuse(group, counts != 0)

    def _keep_unclaimed(
        self, group: int, counts: npt.NDArray[np.uint32], page: npt.NDArray[np.uint32]
    ) -> None:
        """What has no pointer may belong to a lost subtree: its refcounts stay."""
        inside = min(GROUP_BLOCKS, self._total - group * GROUP_BLOCKS)
        system = self._found.space_map.system.counts(group)
        kept = (page > counts) & (system == 0)
        kept[inside:] = False
        counts[kept] = page[kept]

    def run(self) -> int:
        """Write all of it; the number of the new generation."""
        catalog, catalog_nodes = self._old.catalog, self._found.catalog_nodes
        if self._found.corrections:
            catalog, catalog_nodes = self._catalog()
        space_map, pages = self._space_map()
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
            system_blocks=2 * RING_SLOTS + pages,
            next_root_id=self._found.next_root_id,
        )
        for block, image in self._writes:
            self._device.write(block * BLOCK_SIZE_BYTES, [image])
        self._device.flush()
        # All that the new superblock points at is durable; nothing in use was touched.
        slot = superblock.encode()
        for first in ring_blocks(self._total):
            self._device.write((first + superblock.slot()) * BLOCK_SIZE_BYTES, [slot])
        self._device.flush()
        # This is the commit point. The bad copies come last: until here the old map may lie there.
        for bad, good in self._found.reader.bad_nodes.items():
            data = self._device.read(good * BLOCK_SIZE_BYTES, NODE_SIZE_BYTES)
            self._device.write(bad * BLOCK_SIZE_BYTES, [data])
        self._device.flush()
        return self._generation

    # --- catalog ------------------------------------------------------------------------------------

    def _catalog(self) -> tuple[Pointer, int]:
        """The catalog anew, with the corrected records; its root, and its number of nodes."""
        for pointer in _nodes_below(self._found.reader, self._old, self._old.catalog):
            for block in filter(None, (pointer.block, pointer.twin)):
                self._add(block, NODE_BLOCKS, -1)
        right = {
            root_key(root_id): record.encode()
            for root_id, record in self._found.corrections.items()
        }
        entries = [
            (entry.key, right.get(entry.key, entry.value)) for entry in self._found.walk.catalog
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
        block = self._room.take(0, NODE_BLOCKS)
        twin = self._room.take(1, NODE_BLOCKS) if self._twins else 0
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

    # --- space map ----------------------------------------------------------------------------------

    def _space_map(self) -> tuple[Pointer, int]:
        """Every page anew; the pointer at the top, and how many blocks the pages take."""
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
        """What the allocator used the group for, else what is in it; a hint."""
        kind = self._found.space_map.kinds.get(group, 0)
        if KIND_DATA <= kind <= KIND_TWINS:
            return kind
        return KIND_NODES if self._found.references.holds(group, ROLE_NODE) else KIND_DATA

    def _page(self, image: bytes, checksum: bytes) -> Pointer:
        block = self._room.take(0, 1)
        twin = self._room.take(1, 1) if self._twins else 0
        self._writes += [(place, image) for place in (block, twin) if place]
        return Pointer(block, twin, self._generation, checksum)

    def _index_page(self, level: int, number: int, entries: npt.NDArray[np.void]) -> Pointer:
        block = self._room.take(0, 1)
        twin = self._room.take(1, 1) if self._twins else 0
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


class _Room:
    """Blocks that nothing reaches; originals come from even groups and twins from odd ones."""

    def __init__(self, total_blocks: int, used: list[References]) -> None:
        self._total = total_blocks
        self._used = used
        self._refused: dict[int, npt.NDArray[np.bool_]] = {}
        self._busy: dict[int, bytearray] = {}
        self._at = [0, 1]  # the group that each parity takes from

    def refuse(self, group: int, blocks: npt.NDArray[np.bool_]) -> None:
        self._refused[group] = blocks

    def take(self, parity: int, count: int) -> int:
        """The first of `count` free blocks that lie together in one group.

        Raises:
            NoSpaceError: there are none.
        """
        groups = group_count(self._total)
        free = bytes(count)
        start = self._at[parity]
        # When its own groups are full, those of the other parity serve too.
        for group in (*range(start, groups, 2), *range(1 - parity, groups, 2)):
            busy = self._group(group)
            found = busy.find(free)
            if found >= 0:
                busy[found : found + count] = b"\1" * count
                if group % 2 == parity:
                    self._at[parity] = group if count == 1 else start
                return int(group * GROUP_BLOCKS + found)
        raise NoSpaceError("there is no room for a new space map beside the old one")

    def _group(self, group: int) -> bytearray:
        busy = self._busy.get(group)
        if busy is None:
            taken = np.zeros(GROUP_BLOCKS, bool)
            for used in self._used:
                taken |= used.counts(group) != 0
            if group in self._refused:
                taken |= self._refused[group]
            numbers = np.arange(group * GROUP_BLOCKS, (group + 1) * GROUP_BLOCKS)
            taken |= (numbers < RING_SLOTS) | (numbers >= self._total - RING_SLOTS)
            busy = self._busy[group] = bytearray(taken.tobytes())
        return busy


# --- what a generation shows ------------------------------------------------------------------------


def _mark_shown(device: Device, superblock: Superblock, shown: References) -> None:
    """Count all blocks that a generation reaches, as far as it can be read."""
    reader = MetadataReader(device, superblock)
    end = ring_blocks(superblock.total_blocks)[1]
    for leaf_key, value in _leaf_entries(reader, superblock, superblock.catalog, shown):
        try:
            if leaf_key[:1] == b"R":
                root = decode_root(value).pointer
            elif leaf_key[:1] == b"D":
                root = decode_drop(value).path[0].pointer
            else:
                continue
        except CorruptError:
            continue  # nothing can be kept of it
        for item, content in _leaf_entries(reader, superblock, root, shown):
            if len(item) == KEY_BYTES and item[8] == TYPE_EXTENT:
                try:
                    extent = decode_extent(split_key(item)[0], content)
                except CorruptError:
                    continue
                if RING_SLOTS <= extent.block <= end - extent.count:
                    shown.add(extent.block, extent.count)
    waiting = [(superblock.space_map, len(index_shape(superblock.total_blocks)), 0)]
    while waiting:
        pointer, level, number = waiting.pop()
        if pointer_fault(pointer, 1, superblock.generation, superblock) is not None:
            continue
        for block in filter(None, (pointer.block, pointer.twin)):
            shown.add(block, 1)
        entries = reader.index_page(pointer, level, number, _ignore) if level else None
        if entries is not None:
            waiting += [
                (index_pointer(entries[at]), level - 1, number * INDEX_FANOUT + at)
                for at in np.flatnonzero(entries["block"]).tolist()
            ]


def _leaf_entries(
    reader: MetadataReader, superblock: Superblock, root: Pointer, shown: References
) -> Iterator[tuple[bytes, bytes]]:
    """The entries of all leaves below a root that are new to `shown`, whose nodes are counted."""
    waiting: list[tuple[Pointer, int | None]] = [(root, None)]
    while waiting:
        pointer, level = waiting.pop()
        if pointer_fault(pointer, NODE_BLOCKS, superblock.generation, superblock) is not None:
            continue
        if shown.count_of(pointer.block):
            continue
        for block in filter(None, (pointer.block, pointer.twin)):
            shown.add(block, NODE_BLOCKS)
        image = reader.node(pointer, level, _ignore)
        if image is None:
            continue
        if image.level:
            waiting += [(decode_pointer(value), image.level - 1) for value in image.values]
        else:
            yield from zip(image.keys, image.values, strict=True)


def _nodes_below(
    reader: MetadataReader, superblock: Superblock, root: Pointer
) -> Iterator[Pointer]:
    """Every node of a tree that is whole."""
    waiting: list[tuple[Pointer, int | None]] = [(root, None)]
    while waiting:
        pointer, level = waiting.pop()
        if pointer_fault(pointer, NODE_BLOCKS, superblock.generation, superblock) is not None:
            continue
        yield pointer
        image = reader.node(pointer, level, _ignore)
        if image is not None and image.level:
            waiting += [(decode_pointer(value), image.level - 1) for value in image.values]


def _pieces_of_nodes(entries: list[tuple[bytes, bytes]]) -> Iterator[list[tuple[bytes, bytes]]]:
    """The entries in as few nodes as hold them; one empty piece when there are none."""
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


def _ignore(_invariant: str, _what: str, _block: int) -> None:
    """For reads whose damage the check has told."""
