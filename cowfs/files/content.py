"""Content: the operations that read, write, allocate and reflink the data of files of one tree.

Every method is one operation, in the three steps that namespace.py describes.
"""

import errno
import os

from cowfs.errors import posix_error
from cowfs.files.calls import CALL_BYTES, Allocate, Reflink, Write
from cowfs.files.data import Reading
from cowfs.files.items import FILE_SIZE_MAX, Inode
from cowfs.files.parts import Parts
from cowfs.storage.admission import TIER_ADD, TIER_REMOVE
from cowfs.storage.device import Buffer
from cowfs.storage.format import BLOCK_SIZE_BYTES

KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 0x01, 0x02, 0x10  # FALLOC_FL_* of linux/falloc.h


class Content:
    """The operations on the data of the files of one tree.

    Attributes:
        root_id: of the volume or snapshot.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._inodes = parts.inodes
        self._data = parts.data
        self._ranges = parts.ranges
        self._begin = parts.begin
        self._touch = parts.touch
        self._regular = parts.regular
        self._written_ns = parts.written_ns
        self.root_id = parts.tree.owner

    def reading(self, ino: int, offset: int, size: int) -> Reading:
        """Plan a read; `fetch` of the result gives the bytes. Raises OSError EISDIR, EINVAL."""
        return self._data.reading(self._regular(ino), offset, size)

    def read(self, ino: int, offset: int, size: int) -> bytes:
        """Read, waiting for the device. Fewer bytes than `size` at the end of the file."""
        data = self.reading(ino, offset, size).fetch(wait=True)
        assert data is not None
        return bytes(data)

    def write(self, ino: int, offset: int, data: Buffer) -> Inode:
        """Write all of `data`.

        Raises:
            OSError: EISDIR, EINVAL, EFBIG.
            NoSpaceError: the image is full.
        """
        inode = self._regular(ino)
        if not data:
            self._parts.require_writable()
            return inode
        blocks = -(-(offset + len(data)) // BLOCK_SIZE_BYTES) - offset // BLOCK_SIZE_BYTES
        with self._begin(TIER_ADD, blocks) as operation:
            inode = self._regular(ino)
            patch = self._data.reach_write(inode, offset, data)
            now_ns = self._written_ns()
            operation.change(Write(ino, offset, data, now_ns), CALL_BYTES + len(data))  # type: ignore[arg-type]  # any buffer is encoded
            self._data.write(inode, offset, data, patch)
            self._written(inode, now_ns)
            return inode

    def seek(self, ino: int, offset: int, whence: int) -> int:
        """The offset that lseek(2) gives for SEEK_DATA or SEEK_HOLE.

        Raises:
            OSError: ENXIO at or behind the end, or if no data follows; EINVAL for another `whence`.
        """
        inode = self._regular(ino)
        if not 0 <= offset < inode.size_bytes:
            raise posix_error(errno.ENXIO)
        if whence == os.SEEK_HOLE:
            return self._ranges.next_hole(inode, offset)
        if whence != os.SEEK_DATA:
            raise posix_error(errno.EINVAL)
        found = self._ranges.next_data(inode, offset)
        if found is None or found >= inode.size_bytes:
            raise posix_error(errno.ENXIO)
        return found

    def allocate(self, ino: int, mode: int, offset: int, length: int) -> Inode:
        """fallocate(2).

        No block is allocated ahead, because a write never reuses the block that it replaces.
        Allocating checks that the data would fit now, and sets the size. Punching and zeroing free
        blocks.

        Args:
            mode: 0, KEEP_SIZE, PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE with or without KEEP_SIZE.

        Raises:
            OSError: EOPNOTSUPP for other modes; EINVAL, EFBIG.
            NoSpaceError: the data would not fit.
        """
        self._parts.require_writable()
        inode = self._regular(ino)
        if offset < 0 or length <= 0:
            raise posix_error(errno.EINVAL)
        if mode not in (0, KEEP_SIZE, PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE):
            raise posix_error(errno.EOPNOTSUPP)
        if offset + length > FILE_SIZE_MAX:
            raise posix_error(errno.EFBIG)
        end = offset + length
        zeroes = bool(mode & (PUNCH_HOLE | ZERO_RANGE))
        grows = not mode & KEEP_SIZE and end > inode.size_bytes
        if zeroes:
            tier, blocks = TIER_REMOVE, 2  # one at each edge, zeroed in part
        else:
            tier, blocks = TIER_ADD, self._ranges.missing_blocks(inode, offset, length)
            # Refused here, where no commit could help: the filesystem is not full for smaller
            # requests.
            self._parts.store.admission.require_blocks(blocks)
        if grows:
            more_tier, more = self._data.truncation(inode, end)
            tier, blocks = max(tier, more_tier), blocks + more
        with self._begin(tier, blocks) as operation:
            inode = self._regular(ino)
            self._inodes.reach(inode)
            zeroing = self._ranges.reach_zero(inode, offset, length) if zeroes else None
            patch = self._data.reach_truncate(inode, end) if grows else None
            now_ns = self._written_ns()
            operation.change(Allocate(ino, mode, offset, length, now_ns), CALL_BYTES)
            if zeroing is not None:
                self._ranges.zero(inode, zeroing)
            if grows:
                self._data.truncate(inode, end, patch)
            self._written(inode, now_ns)
            return inode

    def reflink(
        self,
        source: "Content",
        source_ino: int,
        source_offset: int,
        ino: int,
        offset: int,
        length: int,
    ) -> int:
        """Make a range of a file share the blocks of a range of another file (FICLONERANGE).

        Args:
            source: the content of any volume or snapshot of the image, this one included.

        Returns:
            Bytes that are shared now. Fewer than `length` if the source ends, or if the range has
            too many extents for one call: the caller then asks again for the rest.

        Raises:
            OSError: EXDEV where blocks cannot be shared; EINVAL, EFBIG.
            NoSpaceError: no room for the extents.
        """
        self._parts.require_writable()
        inode = self._regular(ino)
        source_inode = source._regular(source_ino)
        if source_offset < 0 or offset < 0 or length < 0:
            raise posix_error(errno.EINVAL)
        source.settle(source_ino)
        where = (source._data, source_inode, source_offset, inode, offset, length)
        pieces = self._ranges.find_pieces(*where)
        if pieces is None:
            return 0
        with self._begin(TIER_ADD, pieces.leaf_blocks(self._parts.store.copies)) as operation:
            self._inodes.reach(inode)
            patch = self._ranges.reach_reflink(inode, pieces)
            now_ns = self._written_ns()
            call = Reflink(
                source.root_id,
                source_ino,
                source_offset,
                ino,
                offset,
                pieces.size_bytes,
                now_ns,
            )
            operation.change(call, CALL_BYTES)
            self._ranges.reflink(inode, offset, pieces, patch)
            self._written(inode, now_ns)
            return pieces.size_bytes

    def settle(self, ino: int) -> None:
        """Flush the data of one file before the freeze, so that its blocks can be shared."""
        if ino in self._data.dirty:  # admitted and reached when it was written
            with self._parts.operation.begin_admitted() as operation:
                operation.change_unlogged()
                self._data.settle(self._inodes.get(ino))

    def _written(self, inode: Inode, now_ns: int | None) -> None:
        """Touch a file whose data changed, and set its times, unless the kernel does."""
        if now_ns is not None:
            inode.mtime_ns = inode.ctime_ns = now_ns
        self._touch(inode)
