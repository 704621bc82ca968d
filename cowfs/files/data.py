"""The data of files: written blocks gather in memory and go out as long runs at the freeze.

Between freezes a file's changed blocks are whole blocks in a dict by index, so that a thousand small
writes cost one allocation, one checksum loop and one extent a run. Small files are inline items in the
leaf. Blocks past the end of a file are never kept; the rest of its last block is zero.
Every block read from the device is verified against its extent's checksum (C9). Keeps I1 and I7.
"""

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from cowfs.errors import CorruptError, posix_error
from cowfs.files.items import (
    EXTENT_BLOCKS_MAX,
    FILE_BLOCK_MAX,
    FILE_SIZE_MAX,
    INLINE_BYTES_MAX,
    INODE_INLINE,
    TYPE_EXTENT,
    TYPE_INLINE,
    Extent,
    Inode,
    decode_extent,
    inode_key,
    key,
    split_key,
)
from cowfs.storage.admission import TIER_ADD, TIER_REMOVE
from cowfs.storage.btree import Tree
from cowfs.storage.device import Buffer
from cowfs.storage.format import BLOCK_SIZE_BYTES, DATA_CHECKSUM_BYTES
from cowfs.storage.store import Store

_TYPE_END = 9  # of a key: inode and type are before it, the offset behind
ZERO_BLOCK = bytes(BLOCK_SIZE_BYTES)
# How much a file's reader is ahead of the kernel: the rest of the extent and one more.
PREFETCH_BLOCKS = 2 * EXTENT_BLOCKS_MAX


@dataclass(slots=True)
class Reading:
    """What a read needs: bytes at hand, zeros, and runs on the device. `fetch` may run in any thread."""

    store: Store
    ino: int
    skip_bytes: int
    size_bytes: int
    pieces: list[Buffer | int | Extent]  # an int stands for that many blocks of zeros

    def fetch(self, *, wait: bool) -> Buffer | None:
        """The bytes; None if the device would have to be waited for and `wait` is false.

        Raises:
            CorruptError: a block is not what was written (EIO for this range only).
            DeviceError: it cannot be read.
        """
        parts: list[Buffer] = []
        for piece in self.pieces:
            if isinstance(piece, Extent):
                data = self.store.read_data(
                    piece.block,
                    piece.count,
                    piece.checksums,
                    f"data of inode {self.ino}",
                    wait=wait,
                )
                if data is None:
                    return None
                parts.append(data)
            elif isinstance(piece, int):
                parts.append(bytes(piece * BLOCK_SIZE_BYTES))
            else:
                parts.append(piece)
        whole = parts[0] if len(parts) == 1 else b"".join(parts)
        if self.skip_bytes or len(whole) != self.size_bytes:
            return memoryview(whole)[self.skip_bytes : self.skip_bytes + self.size_bytes]
        return whole


class Patch(NamedTuple):
    """Blocks that are to take the place of a file's: read, put together, and not yet in it.

    `inline` is the first block of a file whose data is inline and not in memory yet, else None.
    `blocks` are whole blocks by their index in the file.
    """

    inline: Buffer | None
    blocks: dict[int, Buffer]


class Removal(NamedTuple):
    """The extents of a file that lie in one leaf: their keys are in [start, stop)."""

    start: bytes
    stop: bytes
    extents: list[Extent]


class Data:
    """The data of all files of one tree. Callers set times and touch the inode; sizes are set here."""

    def __init__(self, tree: Tree, data_blocks: int) -> None:
        self._tree = tree
        self.store = tree.store
        self.data_blocks = data_blocks  # of all files
        self.dirty: dict[int, dict[int, Buffer]] = {}

    # --- reading ------------------------------------------------------------------------------------

    def reading(self, inode: Inode, offset: int, size: int) -> Reading:
        """What to fetch for `size` bytes from `offset`; less at the end of the file."""
        size = max(0, min(size, inode.size_bytes - offset))
        first = offset // BLOCK_SIZE_BYTES
        skip = offset - first * BLOCK_SIZE_BYTES
        pieces: list[Buffer | int | Extent] = []
        if size:
            stop = -(-(offset + size) // BLOCK_SIZE_BYTES)
            dirty = self.dirty.get(inode.ino)
            if dirty is None and inode.flags & INODE_INLINE:
                pieces = [self._inline(inode).ljust(stop * BLOCK_SIZE_BYTES, b"\0")]
                skip = offset
            elif dirty is None:
                pieces = list(self._pieces(inode, first, stop, prefetch=True))
            else:
                pieces = self._mixed(inode, first, stop, dirty)
        return Reading(self.store, inode.ino, skip, size, pieces or [b""])

    def _mixed(
        self, inode: Inode, first: int, stop: int, dirty: dict[int, Buffer]
    ) -> list[Buffer | int | Extent]:
        pieces: list[Buffer | int | Extent] = []
        at = first
        while at < stop:
            block = dirty.get(at)
            if block is not None:
                pieces.append(block)
                at += 1
                continue
            end = at + 1
            while end < stop and end not in dirty:
                end += 1
            pieces.extend(self._pieces(inode, at, end))
            at = end
        return pieces

    def _pieces(
        self, inode: Inode, first: int, stop: int, *, prefetch: bool = False
    ) -> Iterator[int | Extent]:
        """The extents and holes of the blocks [first, stop) as the tree has them."""
        at = first
        if inode.data_blocks:
            for start, extent in self.extents(inode.ino, first, stop):
                if start > at:
                    yield start - at
                skip = max(0, first - start)
                count = min(start + extent.count, stop) - max(start, first)
                yield extent.part(skip, count)
                at = start + skip + count
                ahead = extent.count - skip - count
                if prefetch and ahead and first:
                    self.store.device.prefetch(
                        (extent.block + skip + count) * BLOCK_SIZE_BYTES,
                        min(ahead + EXTENT_BLOCKS_MAX, PREFETCH_BLOCKS) * BLOCK_SIZE_BYTES,
                    )
        if at < stop:
            yield stop - at

    def extents(
        self, ino: int, first: int, stop: int, begin: bytes | None = None
    ) -> Iterator[tuple[int, Extent]]:
        """(first file block, extent) of each extent that overlaps [first, stop).

        Args:
            begin: a key of the file below which there is none of them, if the caller knows one.
        """
        begin = begin or self._extent_key(ino, first)
        last = 0
        for item, value in self._tree.items(begin, key(ino, TYPE_EXTENT, stop)):
            start = split_key(item)[2]
            extent = decode_extent(ino, value)
            if start < last:
                raise CorruptError(f"extent of inode {ino}", extent.block, "overlaps another")
            last = start + extent.count
            if last > first:
                yield start, extent

    def _extent_key(self, ino: int, block: int) -> bytes:
        """The key of the extent that holds a block of the file; where none does, that of the block.

        One search, however many extents the file is in pieces of.
        """
        wanted = key(ino, TYPE_EXTENT, block)
        below = self._tree.floor(wanted) if block else None
        if below is not None and below[0][:_TYPE_END] == wanted[:_TYPE_END]:
            start = split_key(below[0])[2]
            if start + decode_extent(ino, below[1]).count > block:
                return below[0]
        return wanted

    def _inline(self, inode: Inode) -> bytes:
        value = self._tree.get(key(inode.ino, TYPE_INLINE, 0))
        if value is None or len(value) != inode.size_bytes:
            raise CorruptError(f"data of inode {inode.ino}", inode.ino, "inline data is missing")
        return value  # type: ignore[no-any-return]

    def block(self, inode: Inode, index: int) -> Buffer:
        """One whole block of the file, as it is now."""
        dirty = self.dirty.get(inode.ino)
        if dirty is not None and index in dirty:
            return dirty[index]
        if index == 0 and (inline := self.inline_block(inode)) is not None:
            return inline
        piece = next(self._pieces(inode, index, index + 1))
        if isinstance(piece, int):
            return ZERO_BLOCK
        data = self.store.read_data(piece.block, 1, piece.checksums, f"data of inode {inode.ino}")
        assert data is not None
        return data

    # --- writing ------------------------------------------------------------------------------------

    def reach_write(self, inode: Inode, offset: int, data: Buffer) -> Patch:
        """Reach what a write of all of `data` at `offset` changes.

        Returns:
            What `put` puts there.

        Raises:
            OSError: EFBIG.
            CorruptError, DeviceError: a block that is written in part cannot be read (C9).
        """
        size = len(data)
        end = offset + size
        if end > FILE_SIZE_MAX:
            raise posix_error(errno.EFBIG)
        first, head = divmod(offset, BLOCK_SIZE_BYTES)
        stop = -(-end // BLOCK_SIZE_BYTES)
        self.reach(inode, first, stop)
        inline = self.inline_block(inode)
        blocks: dict[int, Buffer] = {}
        if not head and not size % BLOCK_SIZE_BYTES:
            if size == BLOCK_SIZE_BYTES:
                blocks[first] = data
            else:
                view = memoryview(data)
                for at in range(0, size, BLOCK_SIZE_BYTES):
                    blocks[first] = view[at : at + BLOCK_SIZE_BYTES]
                    first += 1
            return Patch(inline, blocks)
        view = memoryview(data)
        at = 0
        for index in range(first, stop):
            count = min(BLOCK_SIZE_BYTES - head, size - at)
            part = view[at : at + count]
            if count == BLOCK_SIZE_BYTES:
                blocks[index] = part
            elif index * BLOCK_SIZE_BYTES >= inode.size_bytes:  # nothing of it to keep
                blocks[index] = bytes(head) + part.tobytes().ljust(BLOCK_SIZE_BYTES - head, b"\0")
            else:
                old = bytearray(self.block(inode, index))
                old[head : head + count] = part
                blocks[index] = bytes(old)
            at += count
            head = 0
        return Patch(inline, blocks)

    def put(self, inode: Inode, patch: Patch) -> None:
        """Let the blocks of a patch be those of the file, in memory."""
        dirty = self.dirty.get(inode.ino)
        if dirty is None:
            dirty = self.dirty[inode.ino] = {}
            if patch.inline is not None:
                dirty[0] = patch.inline
                self.promise(1)
        before = len(dirty)
        dirty.update(patch.blocks)
        self.promise(len(dirty) - before)

    def write(self, inode: Inode, offset: int, data: Buffer, patch: Patch) -> None:
        """Write what `reach_write` prepared."""
        self.put(inode, patch)
        inode.size_bytes = max(inode.size_bytes, offset + len(data))

    def truncation(self, inode: Inode, size: int) -> tuple[int, int]:
        """How to admit a change of the size: tier and blocks of data."""
        if size < inode.size_bytes:
            return TIER_REMOVE, 1 if size % BLOCK_SIZE_BYTES else 0
        if size > inode.size_bytes and inode.flags & INODE_INLINE:
            return TIER_ADD, 1
        return TIER_REMOVE, 0

    def reach_truncate(self, inode: Inode, size: int) -> Patch | None:
        """Reach what a change of the size changes.

        Returns:
            What `truncate` takes.

        Raises:
            OSError: EFBIG.
            CorruptError, DeviceError: the new last block, or an extent behind it, cannot be read (C9).
        """
        if size > FILE_SIZE_MAX:
            raise posix_error(errno.EFBIG)
        if size == inode.size_bytes:
            return None
        if size > inode.size_bytes:
            if not inode.flags & INODE_INLINE:
                self._tree.reach(inode_key(inode.ino))
                return None
            self.reach(inode, 0, 1)
            return Patch(self.inline_block(inode), {})
        stop, tail = divmod(size, BLOCK_SIZE_BYTES)
        self.reach(inode, stop, stop + 1)
        blocks: dict[int, Buffer] = {}
        if tail:
            block = self.block(inode, stop)
            if block is not ZERO_BLOCK:
                blocks[stop] = bytes(block[:tail]).ljust(BLOCK_SIZE_BYTES, b"\0")
        self.reach_punch(inode, stop, FILE_BLOCK_MAX + 1)
        inline = self.inline_block(inode)
        return Patch(inline, blocks) if blocks or inline is not None else None

    def truncate(self, inode: Inode, size: int, patch: Patch | None) -> None:
        """Set the size; what lies beyond is gone, what is added is a hole.

        Args:
            patch: that `reach_truncate` prepared.
        """
        if patch is not None:
            self.put(inode, patch)
        if size < inode.size_bytes:
            stop = -(-size // BLOCK_SIZE_BYTES)
            self.forget_dirty(inode, stop, FILE_BLOCK_MAX + 1)
            if inode.data_blocks:
                self.punch(inode, stop, FILE_BLOCK_MAX + 1)
        inode.size_bytes = size

    def allocated_blocks(self, inode: Inode) -> int:
        """Blocks that the file takes, or will take when it is written back."""
        dirty = self.dirty.get(inode.ino)
        if not dirty:
            return inode.data_blocks
        if not inode.data_blocks:
            return len(dirty)
        return max(inode.data_blocks, len(dirty))

    def reach_removal(self, inode: Inode) -> Removal | None:
        """Reach one leaf's extents of a file that is gone; None when it has no more.

        Raises:
            CorruptError, DeviceError: they cannot be given back (C9).
        """
        if not inode.data_blocks:
            return None
        start, stop = (
            key(inode.ino, TYPE_EXTENT, 0),
            key(inode.ino, TYPE_EXTENT, FILE_BLOCK_MAX + 1),
        )
        found = next(self._tree.leaf_slices(start, stop), None)
        if found is None:
            return None
        keys, values, first, last = found
        self._tree.reach(keys[first])
        extents = [decode_extent(inode.ino, value) for value in values[first:last]]
        for extent in extents:
            self.store.map.require(extent.block, extent.count)
        return Removal(keys[first], stop, extents)

    def remove(self, inode: Inode, removal: Removal) -> None:
        """Give back what `reach_removal` found."""
        self._tree.pop_from(removal.start, removal.stop)
        drop, generation = self.store.map.drop, self.store.generation
        for extent in removal.extents:
            drop(extent.block, extent.count, generation)
            inode.data_blocks = max(0, inode.data_blocks - extent.count)
            self.data_blocks = max(0, self.data_blocks - extent.count)

    def remove_memory(self, inode: Inode) -> None:
        """Give back what a file that is gone has in memory and in its leaf; that leaf was reached."""
        dirty = self.dirty.pop(inode.ino, None)
        if dirty is not None:
            self.promise(-len(dirty))
        if inode.flags & INODE_INLINE:
            self._tree.delete(key(inode.ino, TYPE_INLINE, 0))
            inode.flags &= ~INODE_INLINE

    def forget(self, inode: Inode, extents: list[Extent]) -> None:
        """A file is gone, and the items of these extents, all that it had, with it."""
        dirty = self.dirty.pop(inode.ino, None)
        if dirty is not None:
            self.promise(-len(dirty))
        drop, generation = self.store.map.drop, self.store.generation
        for extent in extents:
            drop(extent.block, extent.count, generation)
            self.data_blocks = max(0, self.data_blocks - extent.count)

    def flush(self, inode_of: Callable[[int], Inode]) -> list[Inode]:
        """Allocate all that is dirty, file after file, and put its extents into the trees.

        Args:
            inode_of: an inode number's inode.

        Returns:
            The inodes that changed.
        """
        return self._write_back([inode_of(ino) for ino in sorted(self.dirty)])

    def settle(self, inode: Inode) -> None:
        """The same for one file, before the freeze: all of it has blocks then, or is inline."""
        if inode.ino in self.dirty:
            self._write_back([inode])

    def _write_back(self, changed: list[Inode]) -> list[Inode]:
        old: set[int] = set()  # files that may have extents where new ones go
        inline: list[tuple[bytes, bytes]] = []
        extents: list[tuple[bytes, bytes]] = []
        owners: list[tuple[Inode, int]] = []  # file and index of each block to write
        blocks: list[Buffer] = []
        for inode in changed:
            ino = inode.ino
            dirty = self.dirty.pop(ino)
            self.promise(-len(dirty))
            if inode.size_bytes <= INLINE_BYTES_MAX and not inode.data_blocks:
                if dirty:
                    part = bytes(dirty[0][: inode.size_bytes])
                    inline.append((key(ino, TYPE_INLINE, 0), part))
                    inode.flags |= INODE_INLINE
                elif inode.flags & INODE_INLINE:
                    self._drop_inline(inode)
                continue
            if inode.flags & INODE_INLINE:
                self._drop_inline(inode)
            if inode.data_blocks:
                old.add(ino)
            for index in sorted(dirty):
                owners.append((inode, index))
                blocks.append(dirty[index])
        at = 0
        for first, count, checksums in self.store.write_data(blocks) if blocks else ():
            whole = Extent(first, count, self.store.generation, checksums)
            start_of_run, stop = at, at + count
            while at < stop:
                inode, start = owners[at]
                length = 1
                limit = min(stop - at, EXTENT_BLOCKS_MAX)
                while length < limit:
                    next_inode, index = owners[at + length]
                    if index != start + length or next_inode is not inode:
                        break
                    length += 1
                extent = whole.part(at - start_of_run, length)
                if inode.ino not in old or not self._overwrite(inode, start, extent):
                    if inode.ino in old:
                        self.punch(inode, start, start + length)
                    extents.append((key(inode.ino, TYPE_EXTENT, start), extent.encode()))
                inode.data_blocks += length
                self.data_blocks += length
                at += length
        self._tree.put_ascending(inline)
        self._tree.put_ascending(extents)
        return changed

    def _overwrite(self, inode: Inode, first: int, extent: Extent) -> bool:
        """Put an extent where others are, all in one leaf, as nearly always. Returns whether it was."""
        ino = inode.ino
        item = key(ino, TYPE_EXTENT, first)
        stop = first + extent.count
        gone: list[tuple[int, int]] = []

        def renew(keys: list[bytes], values: list[bytes]) -> list[tuple[bytes, bytes]]:
            before: list[tuple[bytes, bytes]] = []
            after: list[tuple[bytes, bytes]] = []
            for old_key, value in zip(keys, values, strict=True):
                if old_key[:_TYPE_END] != item[:_TYPE_END]:
                    before.append((old_key, value))  # the last item before the file's extents
                    continue
                start = split_key(old_key)[2]
                old = decode_extent(ino, value)
                end = start + old.count
                if end <= first:
                    before.append((old_key, value))
                    continue
                cut_first, cut_stop = max(start, first), min(end, stop)
                if start < cut_first:
                    before.append((old_key, old.part(0, cut_first - start).encode()))
                if cut_stop < end:
                    rest = old.part(cut_stop - start, end - cut_stop)
                    after.append((key(ino, TYPE_EXTENT, cut_stop), rest.encode()))
                gone.append((old.block + cut_first - start, cut_stop - cut_first))
            if len(after) > 1:
                raise CorruptError(f"extent of inode {ino}", extent.block, "overlaps another")
            for run in gone:
                self.store.map.require(*run)
            return [*before, (item, extent.encode()), *after]

        if not self._tree.rewrite(item, key(ino, TYPE_EXTENT, stop), renew):
            return False
        for block, count in gone:
            self.store.map.drop(block, count, self.store.generation)
            inode.data_blocks = max(0, inode.data_blocks - count)  # the image may say any number
            self.data_blocks = max(0, self.data_blocks - count)
        return True

    def inline_block(self, inode: Inode) -> Buffer | None:
        """The first block of a file whose data is inline and not in memory yet, for a `Patch`.

        Raises:
            CorruptError: the data is missing.
        """
        if not inode.flags & INODE_INLINE or inode.ino in self.dirty:
            return None
        return self._inline(inode).ljust(BLOCK_SIZE_BYTES, b"\0")

    def forget_dirty(self, inode: Inode, first: int, stop: int) -> None:
        """Let what waits in memory for the blocks [first, stop) of the file be nothing."""
        dirty = self.dirty.get(inode.ino)
        if not dirty:
            return
        if stop - first < len(dirty):
            gone = [index for index in range(first, stop) if index in dirty]
        else:
            gone = [index for index in dirty if first <= index < stop]
        for index in gone:
            del dirty[index]
        self.promise(-len(gone))

    def add_extents(self, inode: Inode, extents: list[tuple[int, Extent]]) -> None:
        """Put extents, by their first blocks in the file, where it has none; all are counted."""
        ino = inode.ino
        self._tree.put_ascending(
            [(key(ino, TYPE_EXTENT, start), extent.encode()) for start, extent in extents]
        )
        blocks = sum(extent.count for _, extent in extents)
        inode.data_blocks += blocks
        self.data_blocks += blocks

    def reach(self, inode: Inode, first: int, stop: int) -> None:
        """See to it that new data in [first, stop), and the inode, can be put into the tree (C9).

        Raises:
            CorruptError, DeviceError: it cannot be, and nothing was changed.
        """
        ino, tree = inode.ino, self._tree
        if ino not in self.dirty:
            tree.reach_range(inode_key(ino), key(ino, TYPE_INLINE, 0))
        begin = reached = key(ino, TYPE_EXTENT, first)
        if inode.data_blocks:
            below = tree.floor(begin) if first else None
            if below is not None:
                reached = below[0]  # `_extent_key` will look there
                if reached[:_TYPE_END] == begin[:_TYPE_END]:
                    begin = reached
            for _, extent in self.extents(ino, first, stop, begin):
                self.store.map.require(extent.block, extent.count)
        tree.reach_range(reached, key(ino, TYPE_EXTENT, stop))

    def promise(self, blocks: int) -> None:
        self.store.admission.promise(blocks, blocks)

    def _drop_inline(self, inode: Inode) -> None:
        self._tree.delete(key(inode.ino, TYPE_INLINE, 0))
        inode.flags &= ~INODE_INLINE

    def reach_punch(self, inode: Inode, first: int, stop: int) -> None:
        """Read all that `punch` gives back; the leaves at the edges are reached by `reach`.

        Raises:
            CorruptError, DeviceError: some of it cannot be given back (C9).
        """
        if inode.data_blocks:
            for _, extent in self.extents(inode.ino, first, stop):
                self.store.map.require(extent.block, extent.count)

    def punch(self, inode: Inode, first: int, stop: int) -> None:
        """Let the blocks [first, stop) of the file hold nothing; extents at the edges are cut."""
        begin = self._extent_key(inode.ino, first)
        # The number of blocks only saves a search where there is nothing.
        while inode.data_blocks and self._punch_some(inode, begin, first, stop):
            begin = key(
                inode.ino, TYPE_EXTENT, first
            )  # what lies before was not read, and need not be

    def _punch_some(self, inode: Inode, begin: bytes, first: int, stop: int) -> bool:
        """The same for one leaf's extents, with keys from `begin`. Returns whether there were any."""
        ino, tree = inode.ino, self._tree
        stop_key = key(ino, TYPE_EXTENT, stop)
        found = next(tree.leaf_slices(begin, stop_key), None)
        if found is None:
            return False
        removed = tree.pop_range(begin, stop_key)
        for item, value in removed:
            start = split_key(item)[2]
            extent = decode_extent(ino, value)
            end = start + extent.count
            cut_first, cut_stop = max(start, first), min(end, stop)
            if start < cut_first:
                left = extent.part(0, cut_first - start)
                tree.put(item, left.encode())
            if cut_stop < end:
                right = extent.part(cut_stop - start, end - cut_stop)
                tree.put(key(ino, TYPE_EXTENT, cut_stop), right.encode())
            gone = cut_stop - cut_first
            self.store.map.drop(extent.block + cut_first - start, gone, self.store.generation)
            inode.data_blocks = max(0, inode.data_blocks - gone)  # the image may say any number
            self.data_blocks = max(0, self.data_blocks - gone)
        return True


assert EXTENT_BLOCKS_MAX * DATA_CHECKSUM_BYTES <= 2048
