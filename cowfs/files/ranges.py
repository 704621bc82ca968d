"""Ranges of a file: find data and holes, zero a range, share its blocks (reflink).

A reflink copies no data: a second extent points at the same blocks, and their refcounts go up.
Source and destination may be in different trees of one image, so restoring a file from a snapshot
costs only its extents. A range that cannot be shared block by block is refused with EXDEV; the
kernel then copies it with read and write. Callers set times and touch the inode; sizes are set
here.
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

# Limits of one reflink call. 64 extents are 64 MiB if they are long, and take about a millisecond.
# 2^18 blocks, holes included, are 1 GiB: the answer to the kernel has 32 bits for the byte count.
SHARE_EXTENTS_MAX = 64
SHARE_BLOCKS_MAX = 1 << 18


class Zeroing(NamedTuple):
    """What `Ranges.zero` does: put `patch` at the edges, and punch the blocks [first, stop)."""

    patch: Patch
    first: int
    stop: int


@dataclass(frozen=True, slots=True)
class Pieces:
    """The extents that a reflink puts into a file.

    Attributes:
        extents: each with its first block in the destination; between them are holes.
        first, count: the blocks of the destination that extents and holes replace.
        size_bytes: bytes of the range that are shared; the last block may reach beyond them.
    """

    extents: list[tuple[int, Extent]]
    first: int
    count: int
    size_bytes: int

    def leaf_blocks(self, copies: int) -> int:
        """Upper bound of the blocks that the new items need, in leaves that are half full."""
        leaf_bytes = sum(EXTENT_BYTES + len(extent.checksums) for _, extent in self.extents)
        return (-(-2 * leaf_bytes // BLOCK_SIZE_BYTES) + NODE_BLOCKS) * copies


class Ranges:
    """Operations on ranges of the files of one tree.

    Attributes:
        has_reflinks: whether `reflink` was called since the tree was opened.
    """

    def __init__(self, data: Data) -> None:
        self._data = data
        self._extents = data.extents
        self.has_reflinks = False

    # --- looking ---------------------------------------------------------------------------------

    def next_data(self, inode: Inode, offset: int) -> int | None:
        """The first offset from `offset` on that is not in a hole; None if only holes follow."""
        for start, stop in self._runs(inode, offset):
            if stop > offset:
                return max(start, offset)
        return None

    def next_hole(self, inode: Inode, offset: int) -> int:
        """The first offset from `offset` on that is in a hole, or the end of the file."""
        at = offset
        for start, stop in self._runs(inode, offset):
            if start > at:
                break
            at = max(at, stop)
        return min(at, inode.size_bytes)

    def _runs(self, inode: Inode, offset: int) -> Iterator[tuple[int, int]]:
        """(start, end) in bytes of each run of data that ends behind `offset`, ascending."""
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
            for start, extent in self._extents.find(inode.ino, first, stop):
                yield start, extent.count

    # --- zeroing ---------------------------------------------------------------------------------

    def reach_zero(self, inode: Inode, offset: int, length: int) -> Zeroing | None:
        """Reach what `zero` changes. The file does not grow: the range is cut at its end.

        Returns:
            The argument for `zero`; None where there is nothing to zero.

        Raises:
            CorruptError, DeviceError: a block at the edges, or an extent, cannot be read (C9).
        """
        data = self._data
        end = min(offset + length, inode.size_bytes)
        if offset >= end:
            return None
        first, head = divmod(offset, BLOCK_SIZE_BYTES)
        stop = -(-end // BLOCK_SIZE_BYTES)
        edges: dict[int, tuple[int, int]] = {}  # blocks zeroed in part: their bytes [begin, finish)
        if head:
            edges[first] = (head, min(BLOCK_SIZE_BYTES, end - first * BLOCK_SIZE_BYTES))
        tail = end % BLOCK_SIZE_BYTES
        if tail and end < inode.size_bytes and stop - 1 not in edges:
            edges[stop - 1] = (0, tail)
        for edge in (first, stop - 1):
            data.reach(inode, edge, edge + 1)
        self._extents.reach_punch(inode, first, stop)
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
        """Zero the range that `reach_zero` prepared: whole blocks in it become a hole."""
        data = self._data
        patch, first, stop = zeroing
        if patch.blocks or patch.inline is not None:
            data.put(inode, patch)
        data.discard_dirty(inode, first, stop)
        if inode.data_blocks and first < stop:
            self._extents.punch(inode, first, stop)

    def missing_blocks(self, inode: Inode, offset: int, length: int) -> int:
        """Blocks that the file would gain if all of a range were written: those of its holes."""
        end = offset + length
        missing = -(-end // BLOCK_SIZE_BYTES) - offset // BLOCK_SIZE_BYTES
        for start, stop in self._runs(inode, offset):
            if start >= end:
                break
            missing -= (min(stop, end) - max(start, offset)) // BLOCK_SIZE_BYTES
        return max(0, missing)

    # --- sharing ---------------------------------------------------------------------------------

    def find_pieces(
        self,
        source: Data,
        source_inode: Inode,
        source_offset: int,
        inode: Inode,
        offset: int,
        length: int,
    ) -> Pieces | None:
        """Find what a reflink shares: whole blocks, and a last block that ends both files.

        Changes nothing. The source must be settled (`Data.settle`): its data is in extents or
        inline.

        Args:
            source: the data of the tree that `source_inode` is in.
            source_inode, source_offset: file and range to share from.
            inode, offset: destination, in this tree.
            length: bytes.

        Returns:
            None if the source has nothing at `source_offset`. The pieces may cover less than
            `length`: the caller then asks again for the rest.

        Raises:
            OSError: EXDEV where nothing can be shared; EINVAL where source and destination overlap;
                EFBIG.
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
            count = -(-length // BLOCK_SIZE_BYTES)  # the last block holds zeros behind both ends
        small = source_inode.size_bytes <= INLINE_BYTES_MAX and not source_inode.data_blocks
        if not count or small:
            raise posix_error(errno.EXDEV)
        count = min(count, SHARE_BLOCKS_MAX)
        begin, first = source_offset // BLOCK_SIZE_BYTES, offset // BLOCK_SIZE_BYTES
        extents, count = self._pieces(source, source_inode, begin, count, first)
        return Pieces(extents, first, count, min(count * BLOCK_SIZE_BYTES, length))

    def reach_reflink(self, inode: Inode, pieces: Pieces) -> Patch:
        """Reach what `reflink` changes. Returns its patch.

        Raises:
            CorruptError, DeviceError: a space map page of the shared blocks, or what they replace,
                cannot be read (C9).
        """
        data = self._data
        for _, extent in pieces.extents:
            data.store.map.require(extent.block, extent.count)
        data.reach(inode, pieces.first, pieces.first + pieces.count)
        return Patch(data.inline_block(inode), {})

    def reflink(self, inode: Inode, offset: int, pieces: Pieces, patch: Patch) -> None:
        """Replace a range of a file by the pieces that `find_pieces` found."""
        data = self._data
        if patch.inline is not None:
            data.put(inode, patch)
        self.has_reflinks = True
        for _, extent in pieces.extents:  # before the punch: it may drop the same blocks
            data.store.map.add(extent.block, extent.count)
        first, stop = pieces.first, pieces.first + pieces.count
        data.discard_dirty(inode, first, stop)
        if inode.data_blocks:
            self._extents.punch(inode, first, stop)
        self._extents.add(inode, pieces.extents)
        inode.size_bytes = max(inode.size_bytes, offset + pieces.size_bytes)

    def _pieces(
        self, source: Data, inode: Inode, begin: int, count: int, first: int
    ) -> tuple[list[tuple[int, Extent]], int]:
        """The extents in `count` blocks of a file from `begin`, at most SHARE_EXTENTS_MAX.

        Returns:
            The extents, each with the block it will have if `begin` becomes `first`; and how many
            of the `count` blocks were looked at.
        """
        pieces: list[tuple[int, Extent]] = []
        stop = begin + count
        for start, extent in source.extents.find(inode.ino, begin, stop):
            if len(pieces) == SHARE_EXTENTS_MAX:
                return pieces, start - begin
            cut_first, cut_stop = max(start, begin), min(start + extent.count, stop)
            part = extent.part(cut_first - start, cut_stop - cut_first)
            pieces.append((first + cut_first - begin, part))
        return pieces, count
