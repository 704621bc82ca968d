"""The data of files: dirty blocks gather in memory and are written as long runs at the freeze.

Between freezes the changed blocks of a file are whole blocks in a dict, by their index in the file.
So a thousand small writes cost one allocation, one checksum loop and one extent per run. Small
files are inline items in the leaf. Blocks past the end of a file are never kept; the rest of its
last block is zero. Every block read from the device is verified against its extent's checksum (C9).
Extents in the tree are the work of extents.py. Callers set times and touch the inode; sizes are set
here. Keeps I1 and I7.
"""

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from cowfs.errors import CorruptError, posix_error
from cowfs.files.extents import Extents
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
    inode_key,
    key,
)
from cowfs.storage.admission import TIER_ADD, TIER_REMOVE
from cowfs.storage.btree import Tree
from cowfs.storage.device import Buffer
from cowfs.storage.format import BLOCK_SIZE_BYTES
from cowfs.storage.store import Store

ZERO_BLOCK = bytes(BLOCK_SIZE_BYTES)


@dataclass(slots=True)
class Reading:
    """What one read needs: bytes in memory, holes, and runs on the device.

    Attributes:
        skip_bytes: bytes of the first piece that come before the range.
        size_bytes: length of the range.
        pieces: whole blocks in order: bytes, an extent to read, or an int for a hole of that many
            blocks.
    """

    store: Store
    ino: int
    skip_bytes: int
    size_bytes: int
    pieces: list[Buffer | int | Extent]

    def fetch(self, *, wait: bool) -> Buffer | None:
        """The bytes of the range. May run in any thread.

        Args:
            wait: False to read only what the host has in its page cache.

        Returns:
            None if `wait` is false and the device would have to be waited for.

        Raises:
            CorruptError: a block does not match its checksum (EIO for this range only).
            DeviceError: the device failed.
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
    """New blocks of a file, complete, that `put` will make dirty.

    Attributes:
        inline: the first block of a file whose data is inline and not dirty yet, else None.
        blocks: whole blocks by their index in the file.
    """

    inline: Buffer | None
    blocks: dict[int, Buffer]


class Data:
    """The data of all files of one tree.

    Args:
        tree: the tree of the files.
        extents: the extents in that tree.

    Attributes:
        dirty: by inode number, the blocks of a file that no flush has taken yet, by their index.
            While a file has an entry here, even an empty one, its inline item is out of date.
    """

    def __init__(self, tree: Tree, extents: Extents) -> None:
        self._tree = tree
        self.extents = extents
        self.store = tree.store
        self.dirty: dict[int, dict[int, Buffer]] = {}

    # --- reading ---------------------------------------------------------------------------------

    def reading(self, inode: Inode, offset: int, size: int) -> Reading:
        """Plan the read of `size` bytes from `offset`; fewer at the end of the file.

        Raises:
            CorruptError, DeviceError: a node cannot be read, or an item is malformed.
        """
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
                pieces = list(self.extents.pieces(inode, first, stop, prefetch=True))
            else:
                pieces = self._dirty_pieces(inode, first, stop, dirty)
        return Reading(self.store, inode.ino, skip, size, pieces or [b""])

    def _dirty_pieces(
        self, inode: Inode, first: int, stop: int, dirty: dict[int, Buffer]
    ) -> list[Buffer | int | Extent]:
        """The pieces of [first, stop): dirty blocks from memory, the others from the tree."""
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
            pieces.extend(self.extents.pieces(inode, at, end))
            at = end
        return pieces

    def _inline(self, inode: Inode) -> bytes:
        value = self._tree.get(key(inode.ino, TYPE_INLINE, 0))
        if value is None or len(value) != inode.size_bytes:
            raise CorruptError(f"data of inode {inode.ino}", inode.ino, "inline data is missing")
        return value  # type: ignore[no-any-return]

    def inline_block(self, inode: Inode) -> Buffer | None:
        """`inline` of a `Patch` for this file.

        Raises:
            CorruptError: the inline item is missing.
        """
        if not inode.flags & INODE_INLINE or inode.ino in self.dirty:
            return None
        return self._inline(inode).ljust(BLOCK_SIZE_BYTES, b"\0")

    def block(self, inode: Inode, index: int) -> Buffer:
        """One whole block of the file as it is now; ZERO_BLOCK itself in a hole.

        Raises:
            CorruptError, DeviceError: it cannot be read.
        """
        dirty = self.dirty.get(inode.ino)
        if dirty is not None and index in dirty:
            return dirty[index]
        if index == 0 and (inline := self.inline_block(inode)) is not None:
            return inline
        piece = next(self.extents.pieces(inode, index, index + 1))
        if isinstance(piece, int):
            return ZERO_BLOCK
        data = self.store.read_data(piece.block, 1, piece.checksums, f"data of inode {inode.ino}")
        assert data is not None
        return data

    def allocated_blocks(self, inode: Inode) -> int:
        """Estimate the blocks that a file takes once its dirty blocks are written."""
        dirty = self.dirty.get(inode.ino)
        if not dirty:
            return inode.data_blocks
        if not inode.data_blocks:
            return len(dirty)
        return max(inode.data_blocks, len(dirty))

    # --- writing ---------------------------------------------------------------------------------

    def reach(self, inode: Inode, first: int, stop: int) -> None:
        """Reach what a change of the blocks [first, stop) changes in the tree at the flush (C9).

        That is the inode, its inline item and the extents.

        Raises:
            CorruptError, DeviceError: a node cannot be read, or an extent is damaged.
        """
        ino = inode.ino
        if ino not in self.dirty:
            self._tree.reach_range(inode_key(ino), key(ino, TYPE_INLINE, 0))
        self.extents.reach(inode, first, stop)

    def reach_write(self, inode: Inode, offset: int, data: Buffer) -> Patch:
        """Reach what a write of all of `data` at `offset` changes.

        Returns:
            The patch for `write`.

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
        ino = inode.ino  # as `reach`, without the call
        if ino not in self.dirty:
            self._tree.reach_range(inode_key(ino), key(ino, TYPE_INLINE, 0))
        self.extents.reach(inode, first, stop)
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
            elif index * BLOCK_SIZE_BYTES >= inode.size_bytes:  # past the end: no bytes to keep
                blocks[index] = bytes(head) + part.tobytes().ljust(BLOCK_SIZE_BYTES - head, b"\0")
            else:
                old = bytearray(self.block(inode, index))
                old[head : head + count] = part
                blocks[index] = bytes(old)
            at += count
            head = 0
        return Patch(inline, blocks)

    def write(self, inode: Inode, offset: int, data: Buffer, patch: Patch) -> None:
        """Write what `reach_write` prepared."""
        self.put(inode, patch)
        inode.size_bytes = max(inode.size_bytes, offset + len(data))

    def put(self, inode: Inode, patch: Patch) -> None:
        """Make the blocks of a patch dirty."""
        dirty = self.dirty.get(inode.ino)
        if dirty is None:
            dirty = self.dirty[inode.ino] = {}
            if patch.inline is not None:
                dirty[0] = patch.inline
                self._promise(1)
        before = len(dirty)
        dirty.update(patch.blocks)
        self._promise(len(dirty) - before)

    def truncation(self, inode: Inode, size: int) -> tuple[int, int]:
        """How to admit a change of the size: tier, and blocks of data."""
        if size < inode.size_bytes:
            return TIER_REMOVE, 1 if size % BLOCK_SIZE_BYTES else 0
        if size > inode.size_bytes and inode.flags & INODE_INLINE:
            return TIER_ADD, 1
        return TIER_REMOVE, 0

    def reach_truncate(self, inode: Inode, size: int) -> Patch | None:
        """Reach what a change of the size changes.

        Returns:
            The patch for `truncate`.

        Raises:
            OSError: EFBIG.
            CorruptError, DeviceError: the new last block, or an extent behind it, cannot be read
                (C9).
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
        self.extents.reach_punch(inode, stop, FILE_BLOCK_MAX + 1)
        inline = self.inline_block(inode)
        return Patch(inline, blocks) if blocks or inline is not None else None

    def truncate(self, inode: Inode, size: int, patch: Patch | None) -> None:
        """Set the size: drop the data behind it, or add a hole.

        Args:
            patch: what `reach_truncate` prepared.
        """
        if patch is not None:
            self.put(inode, patch)
        if size < inode.size_bytes:
            stop = -(-size // BLOCK_SIZE_BYTES)
            self.discard_dirty(inode, stop, FILE_BLOCK_MAX + 1)
            if inode.data_blocks:
                self.extents.punch(inode, stop, FILE_BLOCK_MAX + 1)
        inode.size_bytes = size

    def discard_dirty(self, inode: Inode, first: int, stop: int) -> None:
        """Discard the dirty blocks in [first, stop) of a file."""
        dirty = self.dirty.get(inode.ino)
        if not dirty:
            return
        if stop - first < len(dirty):
            gone = [index for index in range(first, stop) if index in dirty]
        else:
            gone = [index for index in dirty if first <= index < stop]
        for index in gone:
            del dirty[index]
        self._promise(-len(gone))

    def discard_all_dirty(self, ino: int) -> None:
        """Discard the dirty blocks of a file that is gone."""
        dirty = self.dirty.pop(ino, None)
        if dirty is not None:
            self._promise(-len(dirty))

    def drop_inline(self, inode: Inode) -> None:
        """Delete the inline item of a file, whose leaf was reached."""
        self._tree.delete(key(inode.ino, TYPE_INLINE, 0))
        inode.flags &= ~INODE_INLINE

    def _promise(self, blocks: int) -> None:
        """Promise admission that the next flush adds these blocks, with one item each."""
        self.store.admission.promise(blocks, blocks)

    # --- flushing --------------------------------------------------------------------------------

    def flush(self, inode_of: Callable[[int], Inode]) -> list[Inode]:
        """Allocate all dirty blocks, file after file, and put their extents into the tree.

        Args:
            inode_of: gives the inode of an inode number.

        Returns:
            The inodes that changed.
        """
        return self._flush_files([inode_of(ino) for ino in sorted(self.dirty)])

    def settle(self, inode: Inode) -> None:
        """Flush one file before the freeze: all its data is in extents or inline afterwards."""
        if inode.ino in self.dirty:
            self._flush_files([inode])

    def _flush_files(self, changed: list[Inode]) -> list[Inode]:
        extents_of_tree = self.extents
        old: set[int] = set()  # files that may have extents where new ones go
        inline: list[tuple[bytes, bytes]] = []
        extents: list[tuple[bytes, bytes]] = []
        owners: list[tuple[Inode, int]] = []  # file and index of each block to write
        blocks: list[Buffer] = []
        for inode in changed:
            ino = inode.ino
            dirty = self.dirty.pop(ino)
            self._promise(-len(dirty))
            if inode.size_bytes <= INLINE_BYTES_MAX and not inode.data_blocks:
                if dirty:
                    part = bytes(dirty[0][: inode.size_bytes])
                    inline.append((key(ino, TYPE_INLINE, 0), part))
                    inode.flags |= INODE_INLINE
                elif inode.flags & INODE_INLINE:
                    self.drop_inline(inode)
                continue
            if inode.flags & INODE_INLINE:
                self.drop_inline(inode)
            if inode.data_blocks:
                old.add(ino)
            for index in sorted(dirty):
                owners.append((inode, index))
                blocks.append(dirty[index])
        at = 0
        for first, count, checksums in self.store.write_data(blocks) if blocks else ():
            run = Extent(first, count, self.store.generation, checksums)
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
                extent = run.part(at - start_of_run, length)
                if inode.ino not in old or not extents_of_tree.replace(inode, start, extent):
                    if inode.ino in old:
                        extents_of_tree.punch(inode, start, start + length)
                    extents.append((key(inode.ino, TYPE_EXTENT, start), extent.encode()))
                inode.data_blocks += length
                extents_of_tree.data_blocks += length
                at += length
        self._tree.put_ascending(inline)
        self._tree.put_ascending(extents)
        return changed
