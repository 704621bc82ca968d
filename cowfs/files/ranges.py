"""Parts of files: which of them hold data, zeroing them, and sharing blocks between files.

Nothing is copied to share a range: another extent points at the same blocks, and their refcounts say
so. Source and destination may be of different trees of one image, so a file comes back out of a
snapshot for the price of its extents. What cannot be shared block by block is EXDEV: the kernel then
copies it through read and write. Callers set times and touch the inode; sizes are set here.
"""

import errno
from collections.abc import Iterator

from cowfs.errors import posix_error
from cowfs.files.data import ZERO_BLOCK, Data
from cowfs.files.items import (
    EXTENT_BYTES,
    FILE_SIZE_MAX,
    INLINE_BYTES_MAX,
    INODE_INLINE,
    Extent,
    Inode,
)
from cowfs.storage.admission import TIER_ADD, TIER_REMOVE
from cowfs.storage.format import BLOCK_SIZE_BYTES, NODE_BLOCKS

# What one call shares at the most. Extents: 64 MiB where they are long, about a millisecond. Blocks,
# which may be holes: 1 GiB; the answer to the kernel has 32 bits for the number of bytes.
SHARE_EXTENTS_MAX = 64
SHARE_BLOCKS_MAX = 1 << 18


class Ranges:
    """Operations on parts of the files of one tree."""

    def __init__(self, data: Data) -> None:
        self._data = data
        self.shared = (
            False  # since the tree was opened: some of its blocks have two parents by `share`
        )

    # --- looking ------------------------------------------------------------------------------------

    def next_data(self, inode: Inode, offset: int) -> int | None:
        """The first byte at or behind `offset` that is not in a hole; None if there is none."""
        for start, stop in self._runs(inode, offset):
            if stop > offset:
                return max(start, offset)
        return None

    def next_hole(self, inode: Inode, offset: int) -> int:
        """The first byte at or behind `offset` that is in a hole; the end of the file is one."""
        at = offset
        for start, stop in self._runs(inode, offset):
            if start > at:
                break
            at = max(at, stop)
        return min(at, inode.size_bytes)

    def _runs(self, inode: Inode, offset: int) -> Iterator[tuple[int, int]]:
        """(first byte, byte behind the last) of each run of data that ends behind `offset`."""
        dirty = self._data.dirty.get(inode.ino)
        if dirty is None and inode.flags & INODE_INLINE:
            yield 0, inode.size_bytes
            return
        first = offset // BLOCK_SIZE_BYTES
        waiting = iter(sorted(index for index in dirty if index >= first) if dirty else ())
        index = next(waiting, None)
        for start, count in self._extent_runs(inode, first):
            while index is not None and index < start:
                yield index * BLOCK_SIZE_BYTES, (index + 1) * BLOCK_SIZE_BYTES
                index = next(waiting, None)
            yield start * BLOCK_SIZE_BYTES, (start + count) * BLOCK_SIZE_BYTES
        while index is not None:
            yield index * BLOCK_SIZE_BYTES, (index + 1) * BLOCK_SIZE_BYTES
            index = next(waiting, None)

    def _extent_runs(self, inode: Inode, first: int) -> Iterator[tuple[int, int]]:
        if inode.data_blocks:
            stop = -(-inode.size_bytes // BLOCK_SIZE_BYTES)
            for start, extent in self._data.extents(inode.ino, first, stop):
                yield start, extent.count

    # --- zeroing ------------------------------------------------------------------------------------

    def zero(self, inode: Inode, offset: int, length: int) -> None:
        """Let a part of a file read as zeros, and give back the blocks that lie in it whole.

        Bytes behind the end of the file are none, and stay so.

        Raises:
            NoSpaceError: no room for the blocks at its edges.
        """
        data = self._data
        end = min(offset + length, inode.size_bytes)
        if offset >= end:
            return
        first, head = divmod(offset, BLOCK_SIZE_BYTES)
        stop = -(-end // BLOCK_SIZE_BYTES)
        edges: dict[int, tuple[int, int]] = {}  # block: which bytes of it
        if head:
            edges[first] = (head, min(BLOCK_SIZE_BYTES, end - first * BLOCK_SIZE_BYTES))
        tail = end % BLOCK_SIZE_BYTES
        if tail and end < inode.size_bytes and stop - 1 not in edges:
            edges[stop - 1] = (0, tail)
        data.store.admission.admit(len(edges), TIER_REMOVE)
        for edge in (first, stop - 1):
            data.reach(inode, edge, edge + 1)
        if inode.data_blocks:  # damage must stop us before anything is given back
            for _ in data.extents(inode.ino, first, stop):
                pass
        if inode.flags & INODE_INLINE:
            data.open_dirty(inode)
        changed = {}
        for index, (begin, finish) in edges.items():
            block = data.block(inode, index)
            if block is not ZERO_BLOCK:
                changed[index] = b"".join(
                    (block[:begin], bytes(finish - begin), block[finish:BLOCK_SIZE_BYTES])
                )
        if changed:
            dirty = data.open_dirty(inode)
            data.promise(len(changed.keys() - dirty.keys()))
            dirty.update(changed)
        whole_first = first + (first in edges)
        whole_stop = stop - (stop - 1 in edges)
        data.forget_dirty(inode, whole_first, whole_stop)
        if inode.data_blocks and whole_first < whole_stop:
            data.punch(inode, whole_first, whole_stop)

    def require_room(self, inode: Inode, offset: int, length: int) -> None:
        """See that writing a part of a file, holes included, would fit as things are now.

        Raises:
            OSError: EFBIG.
            NoSpaceError: it would not.
        """
        end = offset + length
        if end > FILE_SIZE_MAX:
            raise posix_error(errno.EFBIG)
        missing = -(-end // BLOCK_SIZE_BYTES) - offset // BLOCK_SIZE_BYTES
        for start, stop in self._runs(inode, offset):
            if start >= end:
                break
            missing -= (min(stop, end) - max(start, offset)) // BLOCK_SIZE_BYTES
        admission = self._data.store.admission
        admission.require_blocks(missing)  # the filesystem is not full for what is smaller
        admission.admit(max(0, missing), TIER_ADD)

    # --- sharing ------------------------------------------------------------------------------------

    def share(
        self,
        source: Data,
        source_inode: Inode,
        source_offset: int,
        inode: Inode,
        offset: int,
        length: int,
    ) -> int:
        """Let a part of a file be made of blocks of another: whole ones, and the last of both files.

        Args:
            source: the data of the tree of `source_inode`.

        Returns:
            How many bytes are shared; maybe less than `length`, then call again for the rest.

        Raises:
            OSError: EXDEV where nothing can be shared; EINVAL where a range overlaps itself; EFBIG.
            NoSpaceError: no room for the extents.
        """
        data = self._data
        length = min(length, source_inode.size_bytes - source_offset)
        if length <= 0:
            return 0
        if offset + length > FILE_SIZE_MAX:
            raise posix_error(errno.EFBIG)
        if source_offset % BLOCK_SIZE_BYTES or offset % BLOCK_SIZE_BYTES:
            raise posix_error(errno.EXDEV)
        if source_inode is inode and abs(source_offset - offset) < length:
            raise posix_error(errno.EINVAL)
        count = length // BLOCK_SIZE_BYTES
        if (
            source_offset + length == source_inode.size_bytes
            and offset + length >= inode.size_bytes
        ):
            count = -(-length // BLOCK_SIZE_BYTES)  # behind both ends there are zeros
        small = source_inode.size_bytes <= INLINE_BYTES_MAX and not source_inode.data_blocks
        if not count or small:
            raise posix_error(errno.EXDEV)
        source.settle(source_inode)
        count = min(count, SHARE_BLOCKS_MAX)
        begin, first = source_offset // BLOCK_SIZE_BYTES, offset // BLOCK_SIZE_BYTES
        pieces, count = self._pieces(source, source_inode, begin, count, first)
        store = data.store
        leaf_bytes = sum(EXTENT_BYTES + len(piece.checksums) for _, piece in pieces)
        leaf_blocks = -(-2 * leaf_bytes // BLOCK_SIZE_BYTES) + NODE_BLOCKS  # of leaves half full
        store.admission.admit(leaf_blocks * store.copies, TIER_ADD)
        for _, piece in pieces:
            store.map.require(piece.block, piece.count)
        data.reach(inode, first, first + count)
        if inode.flags & INODE_INLINE:
            data.open_dirty(inode)
        self.shared = True
        for _, piece in pieces:  # before the old ones go: they may be the same blocks
            store.map.add(piece.block, piece.count)
        data.forget_dirty(inode, first, first + count)
        if inode.data_blocks:
            data.punch(inode, first, first + count)
        data.add_extents(inode, pieces)
        shared = min(count * BLOCK_SIZE_BYTES, length)
        inode.size_bytes = max(inode.size_bytes, offset + shared)
        return shared

    def _pieces(
        self, source: Data, inode: Inode, begin: int, count: int, first: int
    ) -> tuple[list[tuple[int, Extent]], int]:
        """The extents in `count` blocks from `begin`, each with its place when that block is `first`.

        Also how many blocks they and the holes among them are: less than `count` if there are too
        many.
        """
        pieces: list[tuple[int, Extent]] = []
        stop = begin + count
        for start, extent in source.extents(inode.ino, begin, stop):
            if len(pieces) == SHARE_EXTENTS_MAX:
                return pieces, start - begin
            cut_first, cut_stop = max(start, begin), min(start + extent.count, stop)
            part = extent.part(cut_first - start, cut_stop - cut_first)
            pieces.append((first + cut_first - begin, part))
        return pieces, count
