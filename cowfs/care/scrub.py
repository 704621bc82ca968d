"""Reads every copy of everything that an image reaches, and has bad copies repaired from good ones.

Promises:
- Both copies of every slot of the ring, every page of the space map and every node, and every block of
  file data, of one generation that is kept whole meanwhile, are read and compared with their checksums.
- Nothing is written here: a bad copy whose twin is good is handed to `repair`, which judges for itself.
- What no copy is good of is named by all paths at which it can be met: of the live volume and of each
  snapshot.
- What was read is marked in a map of blocks, so that a scrub that was interrupted goes on where it was,
  also at a later generation. A node is marked when all below it was read. A mark counts only for what
  was there when the scrub began (by its birth): what is newer is read again.

Depends on formats and device alone, as all of care/.
"""

import time
from collections.abc import Callable, Iterator

import numpy as np
from xxhash import xxh3_64_digest

from cowfs.care.names import paths_of
from cowfs.care.reader import MetadataReader, choose_superblock, read_ring
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

DAMAGE_MAX = 1000  # told one by one; the rest is counted
PATHS_MAX = 100  # of one lost node in one tree


class Scrub:
    """One scrub of one generation; `run` it once.

    Args:
        device: of the image.
        generation: to read, kept whole by its writer; None: the newest.
        marks: of a scrub that is to go on; None begins a new one.
        progress: called after each piece of work; it may raise, which stops the scrub.
        repair: gets each bad copy whose twin is good.
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
        self._lost: dict[int, str] = {}  # blocks of data and nodes without a good copy
        self._dropped: dict[int, int] = {}

    def run(self) -> None:
        """Read all.

        Raises:
            DeviceError: neither copy of the ring can be read.
        """
        self._ring()
        self._space_map()
        roots = self._roots()
        for _, pointer in roots:
            self._tree(pointer, None, self.superblock.generation)
        if self._lost:
            self._name(roots)

    # --- what is kept twice ---------------------------------------------------------------------------

    def _ring(self) -> None:
        for number in range(RING_SLOTS):
            copies = [slot for slot in self._slots if slot.number == number]
            good = [slot for slot in copies if slot.superblock is not None]
            for slot in copies:
                if slot.superblock is None and good and slot.problem:
                    other = good[0].superblock
                    assert other is not None
                    self._found("slot", slot.block, good[0].block, other.generation, b"")
        self._told(2 * RING_SLOTS)

    def _space_map(self) -> None:
        top_level = len(index_shape(self.superblock.total_blocks))
        waiting = [(self.superblock.space_map, top_level, 0)]
        while waiting:
            pointer, level, number = waiting.pop()
            if pointer_fault(pointer, 1, self.superblock.generation, self.superblock):
                self._lose("a page of the space map: its pointer is wrong", pointer.block)
                continue
            bad: list[int] = []
            entries = None
            if level:
                entries = self._reader.index_page(pointer, level, number, _collect(bad))
                good = entries is not None
            else:
                good = self._reader.refcounts(pointer, _collect(bad)) is not None
            self._copies("page", pointer, bad, good, 1)
            if entries is None:
                continue
            for position in np.flatnonzero(entries["block"]).tolist():
                child = number * INDEX_FANOUT + position
                waiting.append((index_pointer(entries[position]), level - 1, child))

    def _copies(self, kind: str, pointer: Pointer, bad: list[int], good: bool, blocks: int) -> None:
        """Act on the copies of a node or page that were found bad."""
        self._told(blocks * (2 if pointer.twin else 1))
        if not good:
            name = "a node" if kind == "node" else "a page of the space map"
            self._lose(f"{name}: no copy is good", pointer.block, note=kind == "node")
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

    def _lose(self, what: str, block: int, *, note: bool = False) -> None:
        if note:
            self._lost[block] = what
            return  # told by `_name`, with its paths
        self._tell_damage(Damage(what=what, block=block))

    def _tell_damage(self, damage: Damage) -> None:
        self.damaged += 1
        if len(self.damage) < DAMAGE_MAX:
            self.damage.append(damage)

    # --- trees ----------------------------------------------------------------------------------------

    def _roots(self) -> list[tuple[str, Pointer]]:
        """Where each root is shown, and its tree; the catalog's own nodes are read on the way."""
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
                    self._tell_damage(Damage(what=str(error), block=image.block))
        for block, what in list(self._lost.items()):
            self._tell_damage(Damage(what=f"{what}; it is of the catalog", block=block))
            del self._lost[block]
        roots.sort(key=lambda root: root[:2])
        return [(shown, pointer) for _, _, shown, pointer in roots]

    def _leaves(self, pointer: Pointer, level: int | None, birth: int) -> Iterator[NodeImage]:
        image = self._node(pointer, level, birth)
        if image is None:
            return
        if not image.level:
            yield image
            return
        for value in image.values:
            yield from self._leaves(decode_pointer(value), image.level - 1, image.birth)

    def _node(self, pointer: Pointer, level: int | None, birth: int) -> NodeImage | None:
        if pointer_fault(pointer, NODE_BLOCKS, birth, self.superblock):
            self._lose("a node: its pointer is wrong", pointer.block, note=True)
            return None
        bad: list[int] = []
        image = self._reader.node(pointer, level, _collect(bad))
        self._copies("node", pointer, bad, image is not None, NODE_BLOCKS)
        return image

    def _tree(self, pointer: Pointer, level: int | None, birth: int) -> None:
        if self.marks.has(pointer.block, pointer.birth):
            return
        image = self._node(pointer, level, birth)
        whole = image is not None
        if image is not None:
            before = self.damaged + len(self._lost)
            for index in range(self._dropped.get(image.block, 0), len(image.keys)):
                if image.level:
                    self._tree(decode_pointer(image.values[index]), image.level - 1, image.birth)
                else:
                    self._item(image.keys[index], image.values[index], image)
            whole = self.damaged + len(self._lost) == before
        if whole:  # what has damage below is read again, so that it is told again
            self.marks.add(pointer.block, pointer.birth)

    def _item(self, key: bytes, value: bytes, image: NodeImage) -> None:
        if len(key) != KEY_BYTES or key[8] != TYPE_EXTENT:
            return
        try:
            extent = decode_extent(split_key(key)[0], value)
        except CorruptError as error:
            self._tell_damage(Damage(what=str(error), block=image.block))
            return
        end = ring_blocks(self.superblock.total_blocks)[1]
        if not RING_SLOTS <= extent.block <= end - extent.count:
            self._tell_damage(Damage(what="an extent leaves the image", block=image.block))
            return
        for at, count in self._unread(extent):
            self._data(extent, at, count)

    def _unread(self, extent: Extent) -> Iterator[tuple[int, int]]:
        """The runs of an extent that were not read yet, as (first, count) in it."""
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

    def _data(self, extent: Extent, at: int, count: int) -> None:
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
        self._told(count)

    def _read_block(self, block: int) -> bytes:
        try:
            return self._device.read(block * BLOCK_SIZE_BYTES, BLOCK_SIZE_BYTES)
        except DeviceError:
            return b""

    def _told(self, blocks: int) -> None:
        self.done_blocks += blocks
        if self._progress is not None:
            self._progress(self)

    # --- names for what is lost -----------------------------------------------------------------------

    def _name(self, roots: list[tuple[str, Pointer]]) -> None:
        """Tell each lost block with the paths at which it is met, in all roots."""
        paths: dict[int, list[str]] = {block: [] for block in self._lost}
        sound: set[int] = set()  # nodes with no damage below
        for shown, pointer in roots:
            met: dict[int, set[int]] = {}  # inodes by lost block
            self._meet(pointer, None, (0, 0), met, sound)
            if not met:
                continue
            wanted = set().union(*met.values())
            named = paths_of(self._tree_leaves(pointer, None), wanted)
            for block, inodes in met.items():
                found = [shown + named[ino] for ino in sorted(inodes) if ino in named]
                if not found:
                    found = [f"{shown or '/'} (names unknown, inodes {_range(inodes)})"]
                paths[block] += found
        for block, what in self._lost.items():
            self._tell_damage(Damage(what=what, block=block, paths=tuple(paths[block])))

    def _meet(
        self,
        pointer: Pointer,
        level: int | None,
        bounds: tuple[int, int],
        met: dict[int, set[int]],
        sound: set[int],
    ) -> bool:
        """Find what is lost below a node. `bounds`: the first and last inode it may hold items of."""
        if pointer.block in sound:
            return False
        if pointer.block in self._lost:
            first, last = bounds
            last = min(last, first + PATHS_MAX) if last else first + PATHS_MAX
            met.setdefault(pointer.block, set()).update(range(max(first, 1), last + 1))
            return True
        image = self._reader.node(pointer, level, _ignore)
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
                found |= self._meet(child, image.level - 1, (start, stop), met, sound)
            elif len(key) == KEY_BYTES and key[8] == TYPE_EXTENT:
                found |= self._meet_data(key, value, met)
        if not found:
            sound.add(pointer.block)
        return found

    def _meet_data(self, key: bytes, value: bytes, met: dict[int, set[int]]) -> bool:
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
            met.setdefault(block, set()).add(ino)
        return bool(lost)

    def _tree_leaves(self, pointer: Pointer, level: int | None) -> Iterator[NodeImage]:
        image = self._reader.node(pointer, level, _ignore)
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


def _ignore(_invariant: str, _what: str, _block: int) -> None:
    """For reads whose damage was told."""


def _range(inodes: set[int]) -> str:
    first, last = min(inodes), max(inodes)
    return str(first) if first == last else f"{first} to {last}"


def report_of(
    scrub: Scrub, image: str, state: State, started_ns: int, repaired: int
) -> ScrubReport:
    """What a scrub has found so far. `repaired`: bad copies that are good now."""
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
