"""Reads both copies of everything that an image reaches, and hands bad copies to a repair.

Promises:

- The scrub reads and verifies both copies of every ring slot, space map page and node, and every
  block of file data, of one generation. The writer keeps that generation whole meanwhile.
- The scrub writes nothing. It hands each bad copy with a good twin to `repair`, which verifies both
  copies for itself.
- A block without a good copy is reported with all paths that lead to it, in the live volume and in
  each snapshot.
- Blocks that were read are marked in a bitmap. So an interrupted scrub can go on later, also at a
  later generation. A node is marked once everything below it was read and is good. A mark counts
  only for a block that was born before the scrub began; newer blocks are read again.

Like all of care/, this file depends on the formats and the device alone.
"""

import time
from collections.abc import Callable, Iterator

import numpy as np
from xxhash import xxh3_64_digest

from cowfs.care.names import paths_of
from cowfs.care.reader import MetadataReader, choose_superblock, ignore_damage, read_ring
from cowfs.care.references import index_pointer, pointer_fault
from cowfs.care.scrub_report import BadCopy, Damage, Marks, ScrubReport, State
from cowfs.errors import CorruptError, DeviceError
from cowfs.files.items import KEY_BYTES, TYPE_EXTENT, Extent, decode_extent, split_key
from cowfs.history.records import RootKind, decode_drop, decode_root
from cowfs.storage.device import Device
from cowfs.storage.format import (
    BLOCK_SIZE_BYTES,
    DATA_CHECKSUM_BYTES,
    INDEX_FANOUT,
    NODE_BLOCKS,
    RING_SLOTS,
    NodeImage,
    Pointer,
    decode_pointer,
    index_shape,
    ring_blocks,
)

DAMAGE_MAX = 1000  # entries of the report; the others are only counted
PATHS_MAX = 100  # inodes that are named for one lost node in one tree


class Scrub:
    """One scrub of one generation; call `run` once.

    Args:
        device: the image; only read from.
        generation: the one to read, which its writer keeps whole; None: the newest.
        marks: those of the scrub to go on with; None begins a new one.
        progress: called after each read; it may raise to stop the scrub.
        repair: called with each bad copy whose twin is good.

    Attributes:
        superblock: of the generation that is read.
        marks: what was read so far.
        done_blocks: blocks read so far, copies counted.
        bad_copies: the bad copies with a good twin.
        damage: blocks without a good copy, at most DAMAGE_MAX.
        damaged: how many of them there are in all.

    Raises:
        ImageError: the device holds no image, or not that generation.
        DeviceError: neither copy of the ring can be read.
    """

    def __init__(
        self,
        device: Device,
        *,
        generation: int | None = None,
        marks: Marks | None = None,
        progress: Callable[["Scrub"], None] | None = None,
        repair: Callable[[BadCopy], None] | None = None,
    ) -> None:
        self._slots = read_ring(device)
        self.superblock = choose_superblock(device, self._slots, generation)
        total = self.superblock.total_blocks
        self.marks = marks or Marks(total, self.superblock.generation)
        self.done_blocks = 0
        self.bad_copies: list[BadCopy] = []
        self.damage: list[Damage] = []
        self.damaged = 0
        self._device = device
        self._progress = progress
        self._repair = repair
        self._reader = MetadataReader(device, self.superblock)
        # What each data block or node without a good copy is: reported once paths are known.
        self._lost: dict[int, str] = {}
        # By block of a node: how many leading entries a half-done drop has dropped.
        self._dropped: dict[int, int] = {}

    def run(self) -> None:
        """Read everything, and report what was found in the attributes."""
        self._read_ring()
        self._read_space_map()
        roots = self._read_catalog()
        for _, pointer in roots:
            self._read_tree(pointer, None, self.superblock.generation)
        if self._lost:
            self._report_lost(roots)

    # --- two copies -------------------------------------------------------------------------------

    def _read_ring(self) -> None:
        for number in range(RING_SLOTS):
            copies = [slot for slot in self._slots if slot.number == number]
            good = [slot for slot in copies if slot.superblock is not None]
            for slot in copies:
                if slot.superblock is None and good and slot.problem:
                    other = good[0].superblock
                    assert other is not None
                    self._found("slot", slot.block, good[0].block, other.generation, b"")
        self._advance(2 * RING_SLOTS)

    def _read_space_map(self) -> None:
        top_level = len(index_shape(self.superblock.total_blocks))
        waiting = [(self.superblock.space_map, top_level, 0)]
        while waiting:
            pointer, level, number = waiting.pop()
            if pointer_fault(pointer, 1, self.superblock.generation, self.superblock):
                self._report(
                    Damage(
                        what="a page of the space map: its pointer is wrong", block=pointer.block
                    )
                )
                continue
            bad: list[int] = []
            entries = None
            if level:
                entries = self._reader.index_page(pointer, level, number, _collect(bad))
                good = entries is not None
            else:
                good = self._reader.refcounts(pointer, _collect(bad)) is not None
            self._handle_copies("page", pointer, bad, good, 1)
            if entries is None:
                continue
            for position in np.flatnonzero(entries["block"]).tolist():
                child = number * INDEX_FANOUT + position
                waiting.append((index_pointer(entries[position]), level - 1, child))

    def _handle_copies(
        self, kind: str, pointer: Pointer, bad: list[int], good: bool, blocks: int
    ) -> None:
        """Have the bad copies of a node or page repaired, or note that it is lost.

        Args:
            kind: "node" or "page".
            bad: the blocks of the bad copies.
            good: whether any copy is good.
            blocks: the size of one copy.
        """
        self._advance(blocks * (2 if pointer.twin else 1))
        if not good:
            if kind == "node":
                self._lost[pointer.block] = "a node: no copy is good"
            else:
                what = "a page of the space map: no copy is good"
                self._report(Damage(what=what, block=pointer.block))
            return
        for block in bad:
            other = pointer.twin if block == pointer.block else pointer.block
            self._found(kind, block, other, pointer.birth, pointer.checksum)

    def _found(self, kind: str, bad: int, good: int, birth: int, checksum: bytes) -> None:
        copy = BadCopy(
            kind=kind, bad_block=bad, good_block=good, birth=birth, checksum=checksum.hex()
        )
        self.bad_copies.append(copy)
        if self._repair is not None:
            self._repair(copy)

    def _report(self, damage: Damage) -> None:
        self.damaged += 1
        if len(self.damage) < DAMAGE_MAX:
            self.damage.append(damage)

    # --- trees ------------------------------------------------------------------------------------

    def _read_catalog(self) -> list[tuple[str, Pointer]]:
        """Read all nodes of the catalog.

        Returns:
            Of each root the path that its files are shown below, and its root node; volumes first.
        """
        roots: list[tuple[bool, int, str, Pointer]] = []
        generation = self.superblock.generation
        for image in self._leaves(self.superblock.catalog, None, generation):
            for key, value in zip(image.keys, image.values, strict=True):
                try:
                    if key[:1] == b"R":
                        record = decode_root(value)
                        is_snapshot = record.kind is RootKind.SNAPSHOT
                        shown = f"/.snapshots/{record.name}" if is_snapshot else ""
                        roots.append((is_snapshot, record.root_id, shown, record.pointer))
                    elif key[:1] == b"D":
                        drop = decode_drop(value)
                        self._dropped |= {step.pointer.block: step.done for step in drop.path}
                        shown = f"(deleted snapshot {drop.name})"
                        roots.append((True, drop.root_id, shown, drop.path[0].pointer))
                except CorruptError as error:
                    self._report(Damage(what=str(error), block=image.block))
        for block, what in list(self._lost.items()):
            self._report(Damage(what=f"{what}; it belongs to the catalog", block=block))
            del self._lost[block]
        roots.sort(key=lambda root: root[:2])
        return [(shown, pointer) for _, _, shown, pointer in roots]

    def _leaves(self, pointer: Pointer, level: int | None, birth: int) -> Iterator[NodeImage]:
        """The leaves below a node, read in both copies."""
        image = self._node(pointer, level, birth)
        if image is None:
            return
        if not image.level:
            yield image
            return
        for value in image.values:
            yield from self._leaves(decode_pointer(value), image.level - 1, image.birth)

    def _node(self, pointer: Pointer, level: int | None, birth: int) -> NodeImage | None:
        """Read both copies of a node; None if none is good."""
        if pointer_fault(pointer, NODE_BLOCKS, birth, self.superblock):
            self._lost[pointer.block] = "a node: its pointer is wrong"
            return None
        bad: list[int] = []
        image = self._reader.node(pointer, level, _collect(bad))
        self._handle_copies("node", pointer, bad, image is not None, NODE_BLOCKS)
        return image

    def _read_tree(self, pointer: Pointer, level: int | None, birth: int) -> None:
        """Read a node and everything below it that has no mark yet."""
        if self.marks.has(pointer.block, pointer.birth):
            return
        image = self._node(pointer, level, birth)
        whole = image is not None
        if image is not None:
            before = self.damaged + len(self._lost)
            for index in range(self._dropped.get(image.block, 0), len(image.keys)):
                if image.level:
                    self._read_tree(
                        decode_pointer(image.values[index]), image.level - 1, image.birth
                    )
                else:
                    self._read_item(image.keys[index], image.values[index], image)
            whole = self.damaged + len(self._lost) == before
        if whole:  # otherwise a scrub that goes on reads it again, and reports the damage again
            self.marks.add(pointer.block, pointer.birth)

    def _read_item(self, key: bytes, value: bytes, image: NodeImage) -> None:
        """Read the data of an item of a leaf, if it is an extent."""
        if len(key) != KEY_BYTES or key[8] != TYPE_EXTENT:
            return
        try:
            extent = decode_extent(split_key(key)[0], value)
        except CorruptError as error:
            self._report(Damage(what=str(error), block=image.block))
            return
        end = ring_blocks(self.superblock.total_blocks)[1]
        if not RING_SLOTS <= extent.block <= end - extent.count:
            self._report(Damage(what="an extent leaves the image", block=image.block))
            return
        for at, count in self._unread(extent):
            self._read_data(extent, at, count)

    def _unread(self, extent: Extent) -> Iterator[tuple[int, int]]:
        """The runs of an extent's blocks without a mark, as (first within the extent, count)."""
        at = 0
        marks = self.marks
        while at < extent.count:
            if marks.has(extent.block + at, extent.birth):
                at += 1
                continue
            stop = at + 1
            while stop < extent.count and not marks.has(extent.block + stop, extent.birth):
                stop += 1
            yield at, stop - at
            at = stop

    def _read_data(self, extent: Extent, at: int, count: int) -> None:
        """Read and verify `count` blocks of an extent, from its block number `at`."""
        first = extent.block + at
        try:
            data = self._device.read(first * BLOCK_SIZE_BYTES, count * BLOCK_SIZE_BYTES)
        except DeviceError:
            data = b""
        for index in range(count):
            piece = data[index * BLOCK_SIZE_BYTES : (index + 1) * BLOCK_SIZE_BYTES]
            if not data:
                piece = self._read_block(first + index)
            start = (at + index) * DATA_CHECKSUM_BYTES
            expected = extent.checksums[start : start + DATA_CHECKSUM_BYTES]
            if piece and xxh3_64_digest(piece, self.superblock.seed) == expected:
                self.marks.add(first + index, extent.birth)
            else:
                self._lost[first + index] = "file data"
        self._advance(count)

    def _read_block(self, block: int) -> bytes:
        try:
            return self._device.read(block * BLOCK_SIZE_BYTES, BLOCK_SIZE_BYTES)
        except DeviceError:
            return b""

    def _advance(self, blocks: int) -> None:
        self.done_blocks += blocks
        if self._progress is not None:
            self._progress(self)

    # --- paths of lost blocks ---------------------------------------------------------------------

    def _report_lost(self, roots: list[tuple[str, Pointer]]) -> None:
        """Report each lost block, with the paths that lead to it in all roots."""
        paths: dict[int, list[str]] = {block: [] for block in self._lost}
        sound: set[int] = set()  # nodes with no damage below
        for shown, pointer in roots:
            users: dict[int, set[int]] = {}  # by lost block the inodes that need it
            self._find_users(pointer, None, (0, 0), users, sound)
            if not users:
                continue
            wanted = set().union(*users.values())
            named = paths_of(self._tree_leaves(pointer, None), wanted)
            for block, inodes in users.items():
                found = [shown + named[ino] for ino in sorted(inodes) if ino in named]
                if not found:
                    found = [f"{shown or '/'} (names unknown, inodes {_range(inodes)})"]
                paths[block] += found
        for block, what in self._lost.items():
            self._report(Damage(what=what, block=block, paths=tuple(paths[block])))

    def _find_users(
        self,
        pointer: Pointer,
        level: int | None,
        bounds: tuple[int, int],
        users: dict[int, set[int]],
        sound: set[int],
    ) -> bool:
        """Find the lost blocks below a node, and the inodes that need them.

        Args:
            bounds: the first and last inode that the node may have items of; last 0: unknown.
            users: gets the inodes, by lost block.
            sound: nodes without a lost block below; grows.

        Returns:
            Whether anything below the node is lost.
        """
        if pointer.block in sound:
            return False
        if pointer.block in self._lost:
            first, last = bounds
            last = min(last, first + PATHS_MAX) if last else first + PATHS_MAX
            users.setdefault(pointer.block, set()).update(range(max(first, 1), last + 1))
            return True
        image = self._reader.node(pointer, level, ignore_damage)
        if image is None:
            return True
        found = False
        for index in range(self._dropped.get(image.block, 0), len(image.keys)):
            key, value = image.keys[index], image.values[index]
            if image.level:
                start = split_key(key)[0] if index and len(key) == KEY_BYTES else bounds[0]
                stop = bounds[1]
                if index + 1 < len(image.keys) and len(image.keys[index + 1]) == KEY_BYTES:
                    stop = split_key(image.keys[index + 1])[0]
                child = decode_pointer(value)
                found |= self._find_users(child, image.level - 1, (start, stop), users, sound)
            elif len(key) == KEY_BYTES and key[8] == TYPE_EXTENT:
                found |= self._find_data_user(key, value, users)
        if not found:
            sound.add(pointer.block)
        return found

    def _find_data_user(self, key: bytes, value: bytes, users: dict[int, set[int]]) -> bool:
        """Add the inode of an extent item to the users of its lost blocks; whether it has any."""
        ino = split_key(key)[0]
        try:
            extent = decode_extent(ino, value)
        except CorruptError:
            return True
        lost = [
            block
            for block in range(extent.block, extent.block + extent.count)
            if block in self._lost
        ]
        for block in lost:
            users.setdefault(block, set()).add(ino)
        return bool(lost)

    def _tree_leaves(self, pointer: Pointer, level: int | None) -> Iterator[NodeImage]:
        """The leaves of a tree that can be read; damage is not reported again."""
        image = self._reader.node(pointer, level, ignore_damage)
        if image is None:
            return
        if not image.level:
            yield image
            return
        for value in image.values[self._dropped.get(image.block, 0) :]:
            yield from self._tree_leaves(decode_pointer(value), image.level - 1)


def _collect(blocks: list[int]) -> Callable[[str, str, int], None]:
    def report(_invariant: str, _what: str, block: int) -> None:
        blocks.append(block)

    return report


def _range(inodes: set[int]) -> str:
    first, last = min(inodes), max(inodes)
    return str(first) if first == last else f"{first} to {last}"


def report_of(
    scrub: Scrub, image: str, state: State, started_ns: int, repaired: int
) -> ScrubReport:
    """The report of a scrub, which may still be running.

    Args:
        image: the path of the image.
        repaired: how many bad copies were repaired.
    """
    from uuid import UUID

    found = len(scrub.bad_copies)
    return ScrubReport(
        uuid=str(UUID(bytes=scrub.superblock.uuid)),
        image=image,
        state=state,
        generation=scrub.superblock.generation,
        started_ns=started_ns,
        ended_ns=0 if state == "running" else time.time_ns(),
        done_bytes=scrub.done_blocks * BLOCK_SIZE_BYTES,
        total_bytes=(scrub.superblock.used_blocks + scrub.superblock.system_blocks)
        * BLOCK_SIZE_BYTES,
        bad_copies=found,
        repaired=repaired,
        unrepaired=0 if state == "running" else found - repaired,
        damaged=scrub.damaged,
        damage=tuple(scrub.damage),
    )
