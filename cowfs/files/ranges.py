"""Parts of files: which of them hold data, zeroing them, and sharing blocks between files.

Nothing is copied to share a range: another extent points at the same blocks, and their refcounts say
so. Source and destination may be of different trees of one image, so a file comes back out of a
snapshot for the price of its extents. What cannot be shared block by block is EXDEV: the kernel then
copies it through read and write. Callers set times and touch the inode; sizes are set here.
"""

import errno
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from cowfs.errors import posix_error
from cowfs.files.data import ZERO_BLOCK, Data, Patch
from cowfs.files.items import (
    EXTENT_BYTES,
    FILE_SIZE_MAX,
    INLINE_BYTES_MAX,
    INODE_INLINE,
    Extent,
    Inode,
)
from cowfs.storage.device import Buffer
from cowfs.storage.format import BLOCK_SIZE_BYTES, NODE_BLOCKS

# What one call shares at the most. Extents: 64 MiB where they are long, about a millisecond. Blocks,
# which may be holes: 1 GiB; the answer to the kernel has 32 bits for the number of bytes.
SHARE_EXTENTS_MAX = 64
SHARE_BLOCKS_MAX = 1 << 18


class Zeroing(NamedTuple):
    """What `Ranges.zero` does: new blocks at the edges, and blocks [first, stop) that go."""

    patch: Patch
    first: int
    stop: int


@dataclass(frozen=True, slots=True)
class Pieces:
    """Extents that a file is to share, by their first blocks in it; holes lie between them.

    They stand for `count` blocks from `first`, of which `size_bytes` bytes are the file's.
    """

    extents: list[tuple[int, Extent]]
    first: int
    count: int
    size_bytes: int

    def leaf_blocks(self, copies: int) -> int:
        """Blocks that their items take in leaves that are half full."""
        leaf_bytes = sum(EXTENT_BYTES + len(extent.checksums) for _, extent in self.extents)
        return (-(-2 * leaf_bytes // BLOCK_SIZE_BYTES) + NODE_BLOCKS) * copies


class Ranges:
    """Operations on parts of the files of one tree."""

    def __init__(self, data: Data) -> None:
        self._data = data
        self.has_reflinks = (
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

    def reach_zero(self, inode: Inode, offset: int, length: int) -> Zeroing | None:
        """Reach what `zero` changes; None where there is nothing to zero.

        Bytes behind the end of the file are none, and stay so.

        Raises:
            CorruptError, DeviceError: a block at the edges, or an extent, cannot be read (C9).
        """
        data = self._data
        end = min(offset + length, inode.size_bytes)
        if offset >= end:
            return None
        first, head = divmod(offset, BLOCK_SIZE_BYTES)
        stop = -(-end // BLOCK_SIZE_BYTES)
        edges: dict[int, tuple[int, int]] = {}  # block: which bytes of it
        if head:
            edges[first] = (head, min(BLOCK_SIZE_BYTES, end - first * BLOCK_SIZE_BYTES))
        tail = end % BLOCK_SIZE_BYTES
        if tail and end < inode.size_bytes and stop - 1 not in edges:
            edges[stop - 1] = (0, tail)
        for edge in (first, stop - 1):
            data.reach(inode, edge, edge + 1)
        data.reach_punch(inode, first, stop)
        changed: dict[int, Buffer] = {}
        for index, (begin, finish) in edges.items():
            block = data.block(inode, index)
            if block is not ZERO_BLOCK:
                changed[index] = b"".join(
                    (block[:begin], bytes(finish - begin), block[finish:BLOCK_SIZE_BYTES])
                )
        patch = Patch(data.inline_block(inode), changed)
        return Zeroing(patch, first + (first in edges), stop - (stop - 1 in edges))

    def zero(self, inode: Inode, zeroing: Zeroing) -> None:
        """Let a part of a file read as zeros, and give back the blocks that lie in it whole."""
        data = self._data
        patch, first, stop = zeroing
        if patch.blocks or patch.inline is not None:
            data.put(inode, patch)
        data.forget_dirty(inode, first, stop)
        if inode.data_blocks and first < stop:
            data.punch(inode, first, stop)

    def missing_blocks(self, inode: Inode, offset: int, length: int) -> int:
        """Blocks that writing a part of a file, holes included, would add."""
        end = offset + length
        missing = -(-end // BLOCK_SIZE_BYTES) - offset // BLOCK_SIZE_BYTES
        for start, stop in self._runs(inode, offset):
            if start >= end:
                break
            missing -= (min(stop, end) - max(start, offset)) // BLOCK_SIZE_BYTES
        return max(0, missing)

    # --- sharing ------------------------------------------------------------------------------------

    def find_pieces(
        self,
        source: Data,
        source_inode: Inode,
        source_offset: int,
        inode: Inode,
        offset: int,
        length: int,
    ) -> Pieces | None:
        """What of a file another can share: whole blocks, and the last of both files.

        Looks only. The data of the source was settled before: all of it has blocks.

        Args:
            source: the data of the tree of `source_inode`.

        Returns:
            None where there is nothing; maybe less than `length`, then ask again for the rest.

        Raises:
            OSError: EXDEV where nothing can be shared; EINVAL where a range overlaps itself; EFBIG.
        """
        length = min(length, source_inode.size_bytes - source_offset)
        if length <= 0:
            return None
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
        count = min(count, SHARE_BLOCKS_MAX)
        begin, first = source_offset // BLOCK_SIZE_BYTES, offset // BLOCK_SIZE_BYTES
        extents, count = self._pieces(source, source_inode, begin, count, first)
        return Pieces(extents, first, count, min(count * BLOCK_SIZE_BYTES, length))

    def reach_reflink(self, inode: Inode, pieces: Pieces) -> Patch:
        """Reach what `share` changes.

        Raises:
            CorruptError, DeviceError: the blocks, or what they replace, cannot be read (C9).
        """
        data = self._data
        for _, extent in pieces.extents:
            data.store.map.require(extent.block, extent.count)
        data.reach(inode, pieces.first, pieces.first + pieces.count)
        return Patch(data.inline_block(inode), {})

    def reflink(self, inode: Inode, offset: int, pieces: Pieces, patch: Patch) -> None:
        """Let a part of a file be made of the blocks of another."""
        data = self._data
        if patch.inline is not None:
            data.put(inode, patch)
        self.has_reflinks = True
        for _, extent in pieces.extents:  # before the old ones go: they may be the same blocks
            data.store.map.add(extent.block, extent.count)
        first, stop = pieces.first, pieces.first + pieces.count
        data.forget_dirty(inode, first, stop)
        if inode.data_blocks:
            data.punch(inode, first, stop)
        data.add_extents(inode, pieces.extents)
        inode.size_bytes = max(inode.size_bytes, offset + pieces.size_bytes)

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
