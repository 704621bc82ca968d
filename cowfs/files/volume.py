"""What a POSIX program meets: files and directories of one tree, without FUSE and without snapshots.

Names are in namespace.py, whose rules hold here too; this file adds attributes, data, and the life of
files between commits. Permissions are the kernel's business (default_permissions), ownership is given by
the caller. Changes stay in memory until `flush` puts them into the tree, at a commit's freeze. Keeps I7.
"""

import errno
import logging
import os
import stat
import time
from dataclasses import dataclass

from cowfs.errors import CorruptError, DeviceError, posix_error
from cowfs.files.acl import NAMES as ACL_NAMES
from cowfs.files.data import Reading
from cowfs.files.items import (
    FILE_SIZE_MAX,
    INODE_INLINE,
    SYMLINK_BYTES_MAX,
    TYPE_SYMLINK,
    Inode,
    key,
)
from cowfs.files.namespace import Namespace
from cowfs.storage.admission import TIER_ADD, TIER_REMOVE
from cowfs.storage.device import Buffer
from cowfs.storage.format import BLOCK_SIZE_BYTES

log = logging.getLogger(__name__)

CAPABILITY_XATTR = b"security.capability"
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 0x01, 0x02, 0x10  # FALLOC_FL_* of linux/falloc.h
RECLAIM_LEAVES = 64  # of an orphan's extents, at once: about 450 MiB of data, some milliseconds
RELATIME_NS = 24 * 3600 * 10**9


@dataclass(frozen=True, slots=True)
class Changes:
    """What `setattr` is to change; None leaves alone. Times in nanoseconds.

    `clear_bits` are bits of the mode to take away, whatever `mode` says. `clear_capability` removes what
    an execution of the file would gain by its xattr.
    """

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size_bytes: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    ctime_ns: int | None = None
    clear_bits: int = 0
    clear_capability: bool = False


class Volume(Namespace):
    """The files of one tree: names (`Namespace`), attributes, data, and their life between commits."""

    # --- looking --------------------------------------------------------------------------------------

    def stat_blocks(self, inode: Inode) -> int:
        """st_blocks: 512-byte units that the file's data takes in the image."""
        if inode.mode & 0o170000 == stat.S_IFREG:
            blocks = self.data.allocated_blocks(inode)
            if not blocks and inode.flags & INODE_INLINE:
                return -(-inode.size_bytes // 512)
            return blocks * (BLOCK_SIZE_BYTES // 512)
        return 0

    def readlink(self, ino: int) -> bytes:
        inode = self.get(ino)
        if not stat.S_ISLNK(inode.mode):
            raise posix_error(errno.EINVAL)
        target = self.tree.get(key(ino, TYPE_SYMLINK, 0))
        if target is None or not 0 < len(target) <= SYMLINK_BYTES_MAX:
            raise CorruptError(f"symlink {ino}", ino, "target is missing")
        return target  # type: ignore[no-any-return]

    # --- attributes ---------------------------------------------------------------------------------

    def setattr(self, ino: int, changes: Changes) -> Inode:
        """Change attributes. The caller decides who may, and which set-id bits go.

        A new mode changes the access ACL with it.

        Raises:
            OSError: EISDIR, EINVAL for the size of what has none; EFBIG.
        """
        size = changes.size_bytes
        tier, blocks = TIER_REMOVE, 0
        if size is not None:
            self._require_writable()
            inode = self.get(ino)
            if stat.S_ISDIR(inode.mode):
                raise posix_error(errno.EISDIR)
            if not stat.S_ISREG(inode.mode) or size < 0:
                raise posix_error(errno.EINVAL)
            tier, blocks = self.data.truncation(inode, size)
        with self._begin(tier, blocks) as operation:
            inode = self.get(ino)
            clear_capability = changes.clear_capability and bool(inode.xattr_count)
            if clear_capability:
                self.xattrs.reach_remove(inode, CAPABILITY_XATTR)
            access = None if changes.mode is None else self.acls.reach_mode(inode, changes.mode)
            patch = None if size is None else self.data.reach_truncate(inode, size)
            self.inodes.reach(inode)
            operation.change()
            if size is not None:
                self.data.truncate(inode, size, patch)
            self._set_attributes(inode, changes, access, clear_capability)
            return inode

    def _set_attributes(
        self, inode: Inode, changes: Changes, access: bytes | None, clear_capability: bool
    ) -> None:
        """Change all that `setattr` is to change but the size; the inode and its xattrs are reached."""
        now_ns = time.time_ns()
        if changes.size_bytes is not None:
            inode.mtime_ns = now_ns
        if changes.mode is not None:
            inode.mode = stat.S_IFMT(inode.mode) | changes.mode & 0o7777
            self.acls.put_access(inode, access)
        inode.mode &= ~changes.clear_bits
        if clear_capability:
            self.xattrs.remove(inode, CAPABILITY_XATTR)
        if changes.uid is not None:
            inode.uid = changes.uid
        if changes.gid is not None:
            inode.gid = changes.gid
        if changes.atime_ns is not None:
            inode.atime_ns = _time_range(changes.atime_ns)
        if changes.mtime_ns is not None:
            inode.mtime_ns = _time_range(changes.mtime_ns)
        inode.ctime_ns = now_ns if changes.ctime_ns is None else _time_range(changes.ctime_ns)
        self._touch(inode)

    def accessed(self, inode: Inode, *, strict: bool = False) -> None:
        """The file was read: relatime, as the kernel's own filesystems keep it by default.

        Args:
            strict: the time of every access is kept.

        Where there is no room the time stays: reading must not eat what deleting will need (C10).
        """
        now_ns = time.time_ns()
        stale = inode.atime_ns < inode.mtime_ns or inode.atime_ns < inode.ctime_ns
        stale = stale or strict or now_ns - inode.atime_ns > RELATIME_NS
        if not self.writable or not stale:
            return
        if self.store.admission.would_admit():
            with self.operation.begin_admitted() as operation:
                try:
                    self.inodes.reach(inode)
                except (CorruptError, DeviceError):
                    return  # what was read is good all the same
                operation.change()
                inode.atime_ns = now_ns
                self._touch(inode)

    def getxattr(self, ino: int, name: bytes) -> bytes:
        """Raises OSError ENODATA."""
        inode = self.get(ino)
        value = self.xattrs.get(inode, name)
        if value is None:
            raise posix_error(errno.ENODATA)
        if name in ACL_NAMES:
            self.acls.check(inode, name, value)
        return value

    def listxattr(self, ino: int) -> list[bytes]:
        return self.xattrs.names(self.get(ino))

    def setxattr(self, ino: int, name: bytes, value: bytes, *, keep_setgid: bool = True) -> None:
        """Set an attribute.

        An access ACL sets the mode too.

        Args:
            keep_setgid: False if an access ACL is set by one who may not leave that bit behind.

        Raises:
            OSError: ERANGE, E2BIG, ENOSPC; for an ACL as StoredAcls.set.
        """
        with self._begin(TIER_ADD) as operation:
            inode = self.get(ino)
            self.inodes.reach(inode)
            if name in ACL_NAMES:
                mode, encoded = self.acls.reach_set(inode, name, value)
                operation.change()
                self.acls.set(inode, name, encoded)
                inode.mode = mode if keep_setgid else mode & ~stat.S_ISGID
            else:
                self.xattrs.reach_set(inode, name, value)
                operation.change()
                self.xattrs.set(inode, name, value)
            inode.ctime_ns = time.time_ns()
            self._touch(inode)

    def removexattr(self, ino: int, name: bytes) -> None:
        """Raises OSError ENODATA; not for an ACL, which everything has or could have."""
        with self._begin(TIER_REMOVE) as operation:
            inode = self.get(ino)
            self.inodes.reach(inode)
            if not self.xattrs.reach_remove(inode, name):
                if name in ACL_NAMES:
                    return
                raise posix_error(errno.ENODATA)
            operation.change()
            self.xattrs.remove(inode, name)
            inode.ctime_ns = time.time_ns()
            self._touch(inode)

    # --- data ---------------------------------------------------------------------------------------

    def reading(self, ino: int, offset: int, size: int) -> Reading:
        """What to fetch for a read. Raises OSError EISDIR, EINVAL."""
        return self.data.reading(self._regular(ino), offset, size)

    def read(self, ino: int, offset: int, size: int) -> bytes:
        """The bytes themselves, waited for."""
        data = self.reading(ino, offset, size).fetch(wait=True)
        assert data is not None
        return bytes(data)

    def write(self, ino: int, offset: int, data: Buffer, *, keep_times: bool = False) -> Inode:
        """Write all of `data`; somebody else sees to its times if they are kept.

        Raises:
            OSError: EISDIR, EINVAL, EFBIG.
            NoSpaceError: no room.
        """
        inode = self._regular(ino)
        if not data:
            self._require_writable()
            return inode
        blocks = -(-(offset + len(data)) // BLOCK_SIZE_BYTES) - offset // BLOCK_SIZE_BYTES
        with self._begin(TIER_ADD, blocks) as operation:
            inode = self._regular(ino)
            patch = self.data.reach_write(inode, offset, data)
            operation.change()
            self.data.write(inode, offset, data, patch)
            if keep_times:
                self._touch(inode)
            else:
                self._written(inode)
            return inode

    def seek(self, ino: int, offset: int, whence: int) -> int:
        """SEEK_DATA and SEEK_HOLE. Raises OSError ENXIO behind the end or the last data; EINVAL."""
        inode = self._regular(ino)
        if not 0 <= offset < inode.size_bytes:
            raise posix_error(errno.ENXIO)
        if whence == os.SEEK_HOLE:
            return self.ranges.next_hole(inode, offset)
        if whence != os.SEEK_DATA:
            raise posix_error(errno.EINVAL)
        found = self.ranges.next_data(inode, offset)
        if found is None or found >= inode.size_bytes:
            raise posix_error(errno.ENXIO)
        return found

    def allocate(self, ino: int, mode: int, offset: int, length: int) -> Inode:
        """fallocate(2).

        Nothing in use is ever written over, so nothing is allocated ahead: to allocate is to see that
        the data would fit now, and to set the size. A hole that is punched is given back.

        Args:
            mode: 0, KEEP_SIZE, PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE with or without KEEP_SIZE.

        Raises:
            OSError: EOPNOTSUPP for other modes; EINVAL, EFBIG.
            NoSpaceError: it would not fit.
        """
        self._require_writable()
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
            tier, blocks = TIER_REMOVE, 2  # at the edges
        else:
            tier, blocks = TIER_ADD, self.ranges.missing_blocks(inode, offset, length)
            # No commit helps against that, and the filesystem is not full for what is smaller.
            self.store.admission.require_blocks(blocks)
        if grows:
            more_tier, more = self.data.truncation(inode, end)
            tier, blocks = max(tier, more_tier), blocks + more
        with self._begin(tier, blocks) as operation:
            inode = self._regular(ino)
            self.inodes.reach(inode)
            zeroing = self.ranges.reach_zero(inode, offset, length) if zeroes else None
            patch = self.data.reach_truncate(inode, end) if grows else None
            operation.change()
            if zeroing is not None:
                self.ranges.zero(inode, zeroing)
            if grows:
                self.data.truncate(inode, end, patch)
            self._written(inode)
            return inode

    def share(
        self,
        source: "Volume",
        source_ino: int,
        source_offset: int,
        ino: int,
        offset: int,
        length: int,
    ) -> int:
        """Let a part of a file be the same blocks as a part of another, of any volume or snapshot.

        Returns:
            Bytes that are shared now: `length`, or less if the source ends there or there is more to do.

        Raises:
            OSError: EXDEV where blocks cannot be shared; EINVAL, EFBIG.
            NoSpaceError: no room for the extents.
        """
        self._require_writable()
        inode = self._regular(ino)
        source_inode = source._regular(source_ino)
        if source_offset < 0 or offset < 0 or length < 0:
            raise posix_error(errno.EINVAL)
        source.settle(source_ino)
        where = (source.data, source_inode, source_offset, inode, offset, length)
        pieces = self.ranges.find_pieces(*where)
        if pieces is None:
            return 0
        with self._begin(TIER_ADD, pieces.leaf_blocks(self.store.copies)) as operation:
            self.inodes.reach(inode)
            patch = self.ranges.reach_share(inode, pieces)
            operation.change()
            self.ranges.share(inode, offset, pieces, patch)
            self._written(inode)
            return pieces.size_bytes

    def settle(self, ino: int) -> None:
        """Give the data of a file its blocks before the freeze does, so that it can be shared."""
        if ino in self.data.dirty:  # it was admitted and reached when it was written
            with self.operation.begin_admitted() as operation:
                operation.change()
                self.data.settle(self.get(ino))

    # --- orphans --------------------------------------------------------------------------------------

    @property
    def orphans(self) -> set[int]:
        """Inode numbers of files without a name, which somebody may still use."""
        return self._orphans.inos

    def load_orphans(self) -> None:
        """Find the orphans that a crash left behind; `reclaim` them."""
        self._orphans.load()

    def reclaim(self, ino: int) -> bool:
        """Give back what an orphan holds, a bounded part of it.

        Returns:
            Whether it is gone; otherwise call again.
        """
        assert ino in self.orphans
        for _ in range(RECLAIM_LEAVES):
            with self._begin(TIER_REMOVE) as operation:
                self.changed = True
                if self._orphans.reclaim(ino, operation):
                    return True
        return False

    # --- freezing -----------------------------------------------------------------------------------

    def flush(self) -> None:
        """Put all that is in memory into the tree. The store must have room: `admit` saw to it."""
        with self.operation.begin_admitted() as operation:
            operation.change()
            for inode in self.data.flush(self.inodes.get):
                self.inodes.touch(inode)
            self._orphans.flush()
            self.inodes.flush()
            self.changed = False

    # --- inside -------------------------------------------------------------------------------------

    def _written(self, inode: Inode) -> None:
        """The data of a file changed."""
        inode.mtime_ns = inode.ctime_ns = time.time_ns()
        self._touch(inode)

    def _regular(self, ino: int) -> Inode:
        inode = self.get(ino)
        if not stat.S_ISREG(inode.mode):
            raise posix_error(errno.EISDIR if stat.S_ISDIR(inode.mode) else errno.EINVAL)
        return inode


def _time_range(time_ns: int) -> int:
    """A time that fits the inode: a signed 64-bit count of nanoseconds."""
    return max(-(1 << 63), min((1 << 63) - 1, time_ns))
