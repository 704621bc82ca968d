"""The extents of files, as items of the tree: find, add, replace and punch them.

An extent maps consecutive blocks of a file to consecutive blocks of the image. Extents of one file
never overlap; what no extent covers is a hole. Blocks in memory that no commit has placed yet are
the work of data.py. Here `first` and `stop` are block indexes in a file, and a range is [first,
stop). Callers touch the inode. Keeps I1 and I7.
"""

from collections.abc import Iterator
from typing import NamedTuple

from cowfs.errors import CorruptError
from cowfs.files.items import (
    EXTENT_BLOCKS_MAX,
    FILE_BLOCK_MAX,
    TYPE_EXTENT,
    Extent,
    Inode,
    decode_extent,
    key,
    split_key,
)
from cowfs.storage.btree import Tree
from cowfs.storage.format import BLOCK_SIZE_BYTES, DATA_CHECKSUM_BYTES

TYPE_END = 9  # a key's inode and type end here, its offset follows
# How far a sequential read is prefetched beyond what the kernel asked for: the rest of the extent
# and one more.
PREFETCH_BLOCKS = 2 * EXTENT_BLOCKS_MAX


class Removal(NamedTuple):
    """The extents of a file that lie in one leaf: their keys are in [start, stop)."""

    start: bytes
    stop: bytes
    extents: list[Extent]


class Extents:
    """The extents of all files of one tree.

    Args:
        tree: the tree that holds them.
        data_blocks: the root record's count of data blocks.

    Attributes:
        data_blocks: blocks of all extents of the tree. It starts from an unverified count in the
            image, so subtracting stops at zero.
    """

    def __init__(self, tree: Tree, data_blocks: int) -> None:
        self._tree = tree
        self._store = tree.store
        self.data_blocks = data_blocks

    # --- looking ---------------------------------------------------------------------------------

    def find(
        self, ino: int, first: int, stop: int, begin: bytes | None = None
    ) -> Iterator[tuple[int, Extent]]:
        """(first file block, extent) of each extent that overlaps [first, stop).

        Args:
            begin: where the search starts, if the caller knows: no key of such an extent is below
                it.

        Raises:
            CorruptError: two extents overlap, or an extent is malformed.
        """
        begin = begin or self._key_of(ino, first)
        last = 0
        for item, value in self._tree.items(begin, key(ino, TYPE_EXTENT, stop)):
            start = split_key(item)[2]
            extent = decode_extent(ino, value)
            if start < last:
                raise CorruptError(f"extent of inode {ino}", extent.block, "overlaps another")
            last = start + extent.count
            if last > first:
                yield start, extent

    def pieces(
        self, inode: Inode, first: int, stop: int, *, prefetch: bool = False
    ) -> Iterator[int | Extent]:
        """What the tree holds for the blocks [first, stop), in order.

        Args:
            prefetch: have the host read ahead behind each extent, unless the range starts the file.

        Returns:
            Extents cut to the range, and an int for each hole: its length in blocks.
        """
        at = first
        if inode.data_blocks:
            for start, extent in self.find(inode.ino, first, stop):
                if start > at:
                    yield start - at
                skip = max(0, first - start)
                count = min(start + extent.count, stop) - max(start, first)
                yield extent.part(skip, count)
                at = start + skip + count
                ahead = extent.count - skip - count
                if prefetch and ahead and first:
                    self._store.device.prefetch(
                        (extent.block + skip + count) * BLOCK_SIZE_BYTES,
                        min(ahead + EXTENT_BLOCKS_MAX, PREFETCH_BLOCKS) * BLOCK_SIZE_BYTES,
                    )
        if at < stop:
            yield stop - at

    def _key_of(self, ino: int, block: int) -> bytes:
        """The key of the extent that covers a block; in a hole, a key for the block itself.

        One search, however many extents the file has.
        """
        wanted = key(ino, TYPE_EXTENT, block)
        below = self._tree.floor(wanted) if block else None
        if below is not None and below[0][:TYPE_END] == wanted[:TYPE_END]:
            start = split_key(below[0])[2]
            if start + decode_extent(ino, below[1]).count > block:
                return below[0]
        return wanted

    # --- reaching --------------------------------------------------------------------------------

    def reach(self, inode: Inode, first: int, stop: int) -> None:
        """Reach the places of new extents in [first, stop), and require the old ones there (C9).

        Raises:
            CorruptError, DeviceError: a node cannot be read, or an extent is damaged.
        """
        ino, tree = inode.ino, self._tree
        begin = reached = key(ino, TYPE_EXTENT, first)
        if inode.data_blocks:
            below = tree.floor(begin) if first else None
            if below is not None:
                reached = below[0]  # `_key_of` will look there
                if reached[:TYPE_END] == begin[:TYPE_END]:
                    begin = reached
            for _, extent in self.find(ino, first, stop, begin):
                self._store.map.require(extent.block, extent.count)
        tree.reach_range(reached, key(ino, TYPE_EXTENT, stop))

    def reach_punch(self, inode: Inode, first: int, stop: int) -> None:
        """Read all that `punch` will drop. The leaves at the edges are the business of `reach`.

        Raises:
            CorruptError, DeviceError: an extent or its space map page cannot be read (C9).
        """
        if inode.data_blocks:
            for _, extent in self.find(inode.ino, first, stop):
                self._store.map.require(extent.block, extent.count)

    def reach_removal(self, inode: Inode) -> Removal | None:
        """Reach the first leaf of extents of a deleted file; None if the file has no extents left.

        Raises:
            CorruptError, DeviceError: an extent or its space map page cannot be read (C9).
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
            self._store.map.require(extent.block, extent.count)
        return Removal(keys[first], stop, extents)

    # --- changing --------------------------------------------------------------------------------

    def add(self, inode: Inode, extents: list[tuple[int, Extent]]) -> None:
        """Put extents, each with its first file block, into holes of a file.

        Their blocks are counted in the file and in `data_blocks`; refcounts are for the caller.
        """
        ino = inode.ino
        self._tree.put_ascending(
            [(key(ino, TYPE_EXTENT, start), extent.encode()) for start, extent in extents]
        )
        blocks = sum(extent.count for _, extent in extents)
        inode.data_blocks += blocks
        self.data_blocks += blocks

    def replace(self, inode: Inode, first: int, extent: Extent) -> bool:
        """Put an extent at file block `first` over those that are there, if all lie in one leaf.

        Nearly always they do. The blocks replaced are dropped and no longer counted; the new ones
        are for the caller to count.

        Returns:
            Whether it was done; otherwise nothing was changed.
        """
        ino = inode.ino
        item = key(ino, TYPE_EXTENT, first)
        stop = first + extent.count
        gone: list[tuple[int, int]] = []

        def renew(keys: list[bytes], values: list[bytes]) -> list[tuple[bytes, bytes]]:
            before: list[tuple[bytes, bytes]] = []
            after: list[tuple[bytes, bytes]] = []
            for old_key, value in zip(keys, values, strict=True):
                if old_key[:TYPE_END] != item[:TYPE_END]:
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
                self._store.map.require(*run)
            return [*before, (item, extent.encode()), *after]

        if not self._tree.rewrite(item, key(ino, TYPE_EXTENT, stop), renew):
            return False
        for block, count in gone:
            self._store.map.drop(block, count, self._store.generation)
            inode.data_blocks = max(0, inode.data_blocks - count)  # the image may say any number
            self.data_blocks = max(0, self.data_blocks - count)
        return True

    def punch(self, inode: Inode, first: int, stop: int) -> None:
        """Make [first, stop) a hole: drop the extents in it, and cut those at its edges."""
        begin = self._key_of(inode.ino, first)
        # `data_blocks` may be wrong in the image: it only saves a search in a file without extents.
        while inode.data_blocks and self._punch_leaf(inode, begin, first, stop):
            begin = key(inode.ino, TYPE_EXTENT, first)  # an extent that begins before is cut by now

    def _punch_leaf(self, inode: Inode, begin: bytes, first: int, stop: int) -> bool:
        """Punch one leaf's extents, with keys from `begin`. Returns whether there were any."""
        ino, tree = inode.ino, self._tree
        stop_key = key(ino, TYPE_EXTENT, stop)
        # Only what was removed counts as progress: in a damaged tree a leaf may have keys that a
        # descent never reaches, and looking at the leaves would find them again and again.
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
            self._store.map.drop(extent.block + cut_first - start, gone, self._store.generation)
            inode.data_blocks = max(0, inode.data_blocks - gone)  # the image may say any number
            self.data_blocks = max(0, self.data_blocks - gone)
        return bool(removed)

    def remove(self, inode: Inode, removal: Removal) -> None:
        """Remove the items that `reach_removal` found, and drop their blocks."""
        self._tree.pop_from(removal.start, removal.stop)
        for extent in removal.extents:
            inode.data_blocks = max(0, inode.data_blocks - extent.count)
        self.drop(removal.extents)

    def drop(self, extents: list[Extent]) -> None:
        """Drop one reference to each block of extents whose items and inode are gone."""
        drop, generation = self._store.map.drop, self._store.generation
        for extent in extents:
            drop(extent.block, extent.count, generation)
            self.data_blocks = max(0, self.data_blocks - extent.count)


assert EXTENT_BLOCKS_MAX * DATA_CHECKSUM_BYTES <= 2048
