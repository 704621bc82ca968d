"""What a POSIX program meets: files and directories of one tree, without FUSE and without snapshots.

Every method is one operation of the history: it happens whole or not at all, and never suspends. What
it will change is *reached* first (btree.py), so that damage refuses the operation, and neither half of
it nor the commit meets it (C9). POSIX
answers are `OSError`; permissions are the kernel's business (default_permissions), ownership is given
by the caller. Changes stay in memory until `flush` puts them into the tree, at a commit's freeze.

Keeps I7. A file whose last name is gone is an *orphan* until `reclaim`; a mark in the tree lets the
next mount reclaim it after a crash (C7).
"""

import errno
import logging
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass

from cowfs.errors import CorruptError, DeviceError, ReadOnlyError, posix_error
from cowfs.files.acl import NAMES as ACL_NAMES
from cowfs.files.data import Data, Reading
from cowfs.files.inodes import Inodes
from cowfs.files.items import (
    FILE_SIZE_MAX,
    INODE_INLINE,
    LINK_MAX,
    NAME_BYTES_MAX,
    ROOT_INO,
    SYMLINK_BYTES_MAX,
    TYPE_EXTENT,
    TYPE_ORPHAN,
    TYPE_SYMLINK,
    Inode,
    Name,
    decode_extent,
    inode_key,
    key,
    split_key,
)
from cowfs.files.names import Names
from cowfs.files.ranges import Ranges
from cowfs.files.stored_acls import StoredAcls
from cowfs.files.xattrs import Xattrs
from cowfs.storage.btree import Tree
from cowfs.storage.device import Buffer
from cowfs.storage.format import BLOCK_SIZE_BYTES
from cowfs.storage.store import TIER_ADD, TIER_REMOVE

log = logging.getLogger(__name__)

CAPABILITY_XATTR = b"security.capability"
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 0x01, 0x02, 0x10  # FALLOC_FL_* of linux/falloc.h
RELATIME_NS = 24 * 3600 * 10**9
RECLAIM_LEAVES = 64  # of a file's extents, at once: about 450 MiB of data, some milliseconds


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


class Volume:
    """The files of one tree.

    Args:
        tree: of the volume or snapshot.
        name_seed: of the hashes of names, from the superblock.
        next_ino, inode_count, data_blocks: from the root record.
        writable: False for a snapshot.
    """

    def __init__(
        self,
        tree: Tree,
        name_seed: int,
        *,
        next_ino: int,
        inode_count: int,
        data_blocks: int,
        writable: bool,
    ) -> None:
        self.tree = tree
        self.store = tree.store
        self.inodes = Inodes(tree, next_ino, inode_count)
        self.data = Data(tree, data_blocks)
        self.ranges = Ranges(self.data)
        self.names = Names(tree, name_seed)
        self.xattrs = Xattrs(tree, name_seed)
        self.acls = StoredAcls(self.xattrs)
        self.writable = writable
        self.orphans: set[int] = set()
        self._unnamed: set[int] = (
            set()
        )  # of the orphans: those that never had a name, and may get one
        self._marked: set[int] = set()  # orphans whose mark is in the tree
        self.changed = False  # since the last flush

    def make_root(self, mode: int, uid: int, gid: int) -> None:
        """The root directory of a new, empty tree."""
        inode = self.inodes.create(stat.S_IFDIR | mode, uid, gid, ROOT_INO)
        assert inode.ino == ROOT_INO
        inode.nlink = 2
        self.changed = True

    # --- looking ------------------------------------------------------------------------------------

    def get(self, ino: int) -> Inode:
        """The inode. Raises OSError ESTALE."""
        return self.inodes.get(ino)

    def lookup(self, directory: int, name: bytes) -> Inode:
        """The inode of a name, `.` and `..` included. Raises OSError ENOENT, ENOTDIR."""
        if name == b".":
            return self._directory(directory)
        if name == b"..":
            return self.get(self._directory(directory).rdev)
        entry = self._find(directory, name)
        if entry is None:
            raise posix_error(errno.ENOENT)
        return self._named(entry)

    def find(self, directory: int, name: bytes) -> Inode | None:
        """The same without `.` and `..`; None when there is no such name."""
        entry = self._find(directory, name)
        return None if entry is None else self._named(entry)

    def listing(self, directory: int, after: int = 0) -> Iterator[tuple[int, Name]]:
        """(cookie, entry) of each name with a cookie above `after`. The volume must not change."""
        self._directory(directory)
        return self.names.listing(directory, after)

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

    # --- making and unmaking ------------------------------------------------------------------------

    def create(
        self,
        directory: int,
        name: bytes,
        mode: int,
        uid: int,
        gid: int,
        rdev: int = 0,
        *,
        umask: int = 0,
        inherits: bool = True,
    ) -> Inode:
        """A new file of any type but a symlink, with its name.

        Args:
            umask: bits taken from the mode, unless a default ACL of the directory decides.
            inherits: whether such an ACL counts.

        Raises:
            CorruptError: the default ACL of the directory is damaged.
            OSError: EEXIST, ENOENT, ENOTDIR, EMLINK, ENAMETOOLONG.
            NoSpaceError: the image is full.
        """
        self._admit(TIER_ADD)
        parent = self._living(directory)
        self._free_name(directory, name)
        is_directory = stat.S_ISDIR(mode)
        if parent.mode & stat.S_ISGID:
            gid = parent.gid
            if is_directory:
                mode |= stat.S_ISGID
        if is_directory and parent.nlink >= LINK_MAX:
            raise posix_error(errno.EMLINK)
        mode, access, default = self._inherited(parent, mode, umask, inherits)
        self.inodes.reach(parent)
        # The name first: only it can be refused, and must then leave no inode behind.
        self.names.add(directory, name, self.inodes.free_ino(), mode >> 12)
        inode = self.inodes.create(mode, uid, gid, directory if is_directory else rdev)
        if is_directory:
            inode.nlink = 2
            parent.nlink += 1
        if default is not None:
            self.acls.put_inherited(inode, access, default)
        self._renamed(parent, len(name), inode.mtime_ns)
        return inode

    def _inherited(
        self, parent: Inode, mode: int, umask: int, inherits: bool
    ) -> tuple[int, bytes | None, bytes | None]:
        """Mode and access ACL of a new file, and the default ACL that they come from, if one does."""
        default = None
        if inherits and parent.xattr_count and not stat.S_ISLNK(mode):
            default = self.acls.default(parent)
        if default is None:
            return mode & ~umask, None, None
        return *self.acls.inherit(parent, default, mode), default

    def create_unnamed(
        self,
        directory: int,
        mode: int,
        uid: int,
        gid: int,
        *,
        umask: int = 0,
        inherits: bool = True,
    ) -> Inode:
        """A regular file without a name (O_TMPFILE): an orphan, until `link` gives it one.

        Args:
            directory: whose group and default ACL it may get.
            umask, inherits: as for `create`.

        Raises:
            CorruptError: the default ACL of the directory is damaged.
            OSError: ENOENT, ENOTDIR.
            NoSpaceError: the image is full.
        """
        self._admit(TIER_ADD)
        parent = self._living(directory)
        self.tree.reach(key(0, TYPE_ORPHAN, self.inodes.free_ino()))
        if parent.mode & stat.S_ISGID:
            gid = parent.gid
        mode, access, _ = self._inherited(parent, stat.S_IFREG | mode & 0o7777, umask, inherits)
        inode = self.inodes.create(mode, uid, gid, 0)
        inode.nlink = 0
        self.acls.put_access(inode, access)
        self.orphans.add(inode.ino)
        self._unnamed.add(inode.ino)
        self.changed = True
        return inode

    def symlink(self, directory: int, name: bytes, target: bytes, uid: int, gid: int) -> Inode:
        """A symbolic link. Raises as `create`; ENAMETOOLONG, ENOENT also for the target."""
        if not target:
            raise posix_error(errno.ENOENT)
        if len(target) > SYMLINK_BYTES_MAX:
            raise posix_error(errno.ENAMETOOLONG)
        inode = self.create(directory, name, stat.S_IFLNK | 0o777, uid, gid)
        self.tree.put(key(inode.ino, TYPE_SYMLINK, 0), target)
        inode.size_bytes = len(target)
        return inode

    def link(self, ino: int, directory: int, name: bytes) -> Inode:
        """Another name for a file. Raises OSError EPERM for a directory, EMLINK, EEXIST, ENOENT."""
        self._admit(TIER_ADD)
        inode = self.get(ino)
        parent = self._living(directory)
        if stat.S_ISDIR(inode.mode):
            raise posix_error(errno.EPERM)
        if inode.nlink >= LINK_MAX:
            raise posix_error(errno.EMLINK)
        if not inode.nlink and ino not in self._unnamed:
            raise posix_error(errno.ENOENT)
        self._free_name(directory, name)
        now_ns = time.time_ns()
        self.inodes.reach(parent)
        self._reach_unlinked(inode)
        self.names.add(directory, name, ino, inode.mode >> 12)
        inode.nlink += 1
        if inode.nlink == 1:
            self._unnamed.discard(ino)
            self.orphans.discard(ino)
        inode.ctime_ns = now_ns
        self.inodes.touch(inode)
        self._renamed(parent, len(name), now_ns)
        return inode

    def unlink(self, directory: int, name: bytes) -> Inode:
        """Remove a name that is not a directory's. With the last one the file is an orphan.

        Returns:
            The inode; when its nlink is 0, `reclaim` it as soon as nobody uses it.
        """
        self._admit(TIER_REMOVE)
        parent = self._directory(directory)
        inode = self.lookup(directory, name)
        if stat.S_ISDIR(inode.mode):
            raise posix_error(errno.EISDIR)
        self._require_linked(inode)
        now_ns = time.time_ns()
        self.inodes.reach(parent)
        self._reach_unlinked(inode)
        self.names.remove(directory, name)
        self._renamed(parent, -len(name), now_ns)
        self._unlinked(inode, now_ns)
        return inode

    def rmdir(self, directory: int, name: bytes) -> Inode:
        """Remove an empty directory. Raises OSError ENOTEMPTY, ENOTDIR, EINVAL for `.`."""
        self._admit(TIER_REMOVE)
        if name in (b".", b".."):
            raise posix_error(errno.EINVAL if name == b"." else errno.ENOTEMPTY)
        parent = self._directory(directory)
        inode = self.lookup(directory, name)
        self._require_empty(inode)
        self._require_linked(inode)
        now_ns = time.time_ns()
        self.inodes.reach(parent)
        self._reach_unlinked(inode)
        self.names.remove(directory, name)
        self._count_link(parent, -1)
        self._renamed(parent, -len(name), now_ns)
        self._unlinked(inode, now_ns)
        return inode

    def rename(
        self, old_directory: int, old_name: bytes, directory: int, name: bytes, flags: int = 0
    ) -> Inode | None:
        """Give a file another name, atomically (C3).

        Args:
            flags: 0, RENAME_NOREPLACE or RENAME_EXCHANGE.

        Returns:
            The inode that lost its name to the new one, if there was one; see `unlink`.

        Raises:
            OSError: EINVAL into its own subtree or for other flags; ENOENT, EEXIST, ENOTEMPTY, EISDIR,
                ENOTDIR as rename(2).
        """
        if flags not in (0, RENAME_NOREPLACE, RENAME_EXCHANGE):
            raise posix_error(errno.EINVAL)
        for part in (old_name, name):
            if part in (b".", b".."):
                raise posix_error(errno.EBUSY)
        self._admit(TIER_ADD)
        old_parent, parent = self._directory(old_directory), self._living(directory)
        moving = self.lookup(old_directory, old_name)
        self._check_name(name)
        target = self.find(directory, name)
        if target is not None and flags == RENAME_NOREPLACE:
            raise posix_error(errno.EEXIST)
        if target is None and flags == RENAME_EXCHANGE:
            raise posix_error(errno.ENOENT)
        if target is moving:
            return None
        if stat.S_ISDIR(moving.mode):
            self._require_outside(moving.ino, directory)
        if flags == RENAME_EXCHANGE:
            assert target is not None
            if stat.S_ISDIR(target.mode):
                self._require_outside(target.ino, old_directory)
            self._reach_renamed(old_parent, old_name, moving, parent, name, target)
            self._exchange(old_parent, old_name, moving, parent, name, target)
            return None
        now_ns = time.time_ns()
        if target is None:
            if stat.S_ISDIR(moving.mode) and parent is not old_parent and parent.nlink >= LINK_MAX:
                raise posix_error(errno.EMLINK)
            self._reach_renamed(old_parent, old_name, moving, parent, name, target)
            self.names.add(directory, name, moving.ino, moving.mode >> 12)
            self._renamed(parent, len(name), now_ns)
        else:
            if stat.S_ISDIR(moving.mode):
                self._require_empty(target)
            elif stat.S_ISDIR(target.mode):
                raise posix_error(errno.EISDIR)
            self._require_linked(target)
            self._reach_renamed(old_parent, old_name, moving, parent, name, target)
            if stat.S_ISDIR(moving.mode):
                self._count_link(parent, -1)
            self.names.change(directory, name, moving.ino, moving.mode >> 12)
            self._renamed(parent, 0, now_ns)
            self._unlinked(target, now_ns)
        self.names.remove(old_directory, old_name)
        self._renamed(old_parent, -len(old_name), now_ns)
        self._moved(moving, old_parent, parent, now_ns)
        return target

    def _reach_renamed(
        self,
        old_parent: Inode,
        old_name: bytes,
        moving: Inode,
        parent: Inode,
        name: bytes,
        target: Inode | None,
    ) -> None:
        self.names.reach(old_parent.ino, old_name)
        self.names.reach(parent.ino, name)
        for inode in (old_parent, parent, moving):
            self.inodes.reach(inode)
        if target is not None:
            self._reach_unlinked(target)

    def _exchange(
        self,
        old_parent: Inode,
        old_name: bytes,
        moving: Inode,
        parent: Inode,
        name: bytes,
        target: Inode,
    ) -> None:
        now_ns = time.time_ns()
        self.names.change(old_parent.ino, old_name, target.ino, target.mode >> 12)
        self.names.change(parent.ino, name, moving.ino, moving.mode >> 12)
        self._renamed(old_parent, 0, now_ns)
        self._renamed(parent, 0, now_ns)
        self._moved(moving, old_parent, parent, now_ns)
        self._moved(target, parent, old_parent, now_ns)

    def _moved(self, inode: Inode, old_parent: Inode, parent: Inode, now_ns: int) -> None:
        if stat.S_ISDIR(inode.mode) and old_parent is not parent:
            inode.rdev = parent.ino
            self._count_link(old_parent, -1)
            self._count_link(parent, 1)
        inode.ctime_ns = now_ns
        self.inodes.touch(inode)

    # --- attributes ---------------------------------------------------------------------------------

    def setattr(self, ino: int, changes: Changes) -> Inode:
        """Change attributes. The caller decides who may, and which set-id bits go.

        A new mode changes the access ACL with it.

        Raises:
            OSError: EISDIR, EINVAL for the size of what has none; EFBIG.
        """
        self._admit(TIER_REMOVE)
        inode = self.get(ino)
        now_ns = time.time_ns()
        clear_capability = changes.clear_capability and inode.xattr_count
        if clear_capability:
            self.xattrs.reach(inode, CAPABILITY_XATTR)
        if changes.size_bytes is not None:
            if stat.S_ISDIR(inode.mode):
                raise posix_error(errno.EISDIR)
            if not stat.S_ISREG(inode.mode) or changes.size_bytes < 0:
                raise posix_error(errno.EINVAL)
        access = None if changes.mode is None else self.acls.reach_mode(inode, changes.mode)
        if changes.size_bytes is not None:
            self.data.truncate(inode, changes.size_bytes)
        self.inodes.reach(inode)
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
        return inode

    def accessed(self, inode: Inode) -> None:
        """The file was read: relatime, as the kernel's own filesystems keep it by default.

        Where there is no room the time stays: reading must not eat what deleting will need (C10).
        """
        now_ns = time.time_ns()
        stale = inode.atime_ns < inode.mtime_ns or inode.atime_ns < inode.ctime_ns
        if not self.writable or not (stale or now_ns - inode.atime_ns > RELATIME_NS):
            return
        if self.store.would_admit():
            try:
                self.inodes.reach(inode)
            except (CorruptError, DeviceError):
                return  # what was read is good all the same
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
        self._admit(TIER_ADD)
        inode = self.get(ino)
        self.inodes.reach(inode)
        if name in ACL_NAMES:
            mode = self.acls.set(inode, name, value)
            inode.mode = mode if keep_setgid else mode & ~stat.S_ISGID
        else:
            self.xattrs.set(inode, name, value)
        inode.ctime_ns = time.time_ns()
        self._touch(inode)

    def removexattr(self, ino: int, name: bytes) -> None:
        """Raises OSError ENODATA; not for an ACL, which everything has or could have."""
        self._admit(TIER_REMOVE)
        inode = self.get(ino)
        self.inodes.reach(inode)
        if not self.xattrs.remove(inode, name):
            if name in ACL_NAMES:
                return
            raise posix_error(errno.ENODATA)
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
        self._require_writable()
        inode = self._regular(ino)
        self.data.write(inode, offset, data)
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
        before = inode.size_bytes
        self.inodes.reach(inode)
        if mode & (PUNCH_HOLE | ZERO_RANGE):
            self.ranges.zero(inode, offset, length)
        else:
            self.ranges.require_room(inode, offset, length)
        if not mode & KEEP_SIZE and offset + length > before:
            self.data.truncate(inode, offset + length)
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
        self.inodes.reach(inode)
        shared = self.ranges.share(source.data, source_inode, source_offset, inode, offset, length)
        if shared:
            self._written(inode)
        return shared

    # --- orphans ------------------------------------------------------------------------------------

    def load_orphans(self) -> None:
        """Find the orphans that a crash left behind; `reclaim` them."""
        start, stop = key(0, TYPE_ORPHAN, 0), key(0, TYPE_ORPHAN + 1, 0)
        try:
            found = {split_key(item)[2] for item, _ in self.tree.items(start, stop)}
        except (CorruptError, DeviceError) as error:
            log.error("deleted files that were open keep their space: %s; run cowfs check", error)
            return
        self.orphans |= found
        self._marked |= found

    def reclaim(self, ino: int) -> bool:
        """Give back what an orphan holds, a bounded part of it.

        Returns:
            Whether it is gone; otherwise call again.
        """
        self._admit(TIER_REMOVE)
        assert ino in self.orphans
        inode = self.inodes.find(ino)
        self.changed = True
        if inode is None:  # a mark in the image for nothing: it goes with the next flush
            self.orphans.discard(ino)
            return True
        if inode.nlink:
            raise CorruptError(f"inode {ino}", ino, "an orphan mark, but names", inode.nlink)
        self._reach_unlinked(inode)
        start, stop = inode_key(ino), inode_key(ino + 1)
        items = self.tree.one_leaf(start, stop)
        if items is not None:  # a file of few items goes in one piece
            extents = [
                decode_extent(ino, value)
                for item, value in items
                if split_key(item)[1] == TYPE_EXTENT
            ]
            for extent in extents:
                self.store.map.require(extent.block, extent.count)
            if items:
                self.tree.pop_from(items[0][0], stop)
            self.data.forget(inode, extents)
            self.inodes.forget(inode)
        else:
            if not self.data.remove(inode, RECLAIM_LEAVES):
                self.inodes.touch(inode)
                return False
            self.xattrs.remove_all(inode)
            if stat.S_ISLNK(inode.mode):
                self.tree.delete(key(ino, TYPE_SYMLINK, 0))
            self.inodes.remove(inode)
        self.orphans.discard(ino)
        self._unnamed.discard(ino)
        return True

    # --- freezing -----------------------------------------------------------------------------------

    def flush(self) -> None:
        """Put all that is in memory into the tree. The store must have room: `admit` saw to it."""
        for inode in self.data.flush(self.inodes.get):
            self.inodes.touch(inode)
        for ino in self._marked - self.orphans:
            self.tree.delete(key(0, TYPE_ORPHAN, ino))
        for ino in self.orphans - self._marked:
            self.tree.put(key(0, TYPE_ORPHAN, ino), b"")
        self._marked = set(self.orphans)
        self.inodes.flush()
        self.changed = False

    # --- inside -------------------------------------------------------------------------------------

    def _require_writable(self) -> None:
        if not self.writable:
            raise ReadOnlyError("a snapshot cannot be changed")

    def _admit(self, tier: int) -> None:
        self._require_writable()
        self.store.admit(0, tier)

    def _touch(self, inode: Inode) -> None:
        self.changed = True
        self.inodes.touch(inode)

    def _written(self, inode: Inode) -> None:
        """The data of a file changed."""
        inode.mtime_ns = inode.ctime_ns = time.time_ns()
        self._touch(inode)

    def _regular(self, ino: int) -> Inode:
        inode = self.get(ino)
        if not stat.S_ISREG(inode.mode):
            raise posix_error(errno.EISDIR if stat.S_ISDIR(inode.mode) else errno.EINVAL)
        return inode

    def _directory(self, ino: int) -> Inode:
        inode = self.get(ino)
        if not stat.S_ISDIR(inode.mode):
            raise posix_error(errno.ENOTDIR)
        return inode

    def _living(self, ino: int) -> Inode:
        """A directory that can take names: not one that was removed and is still open."""
        inode = self._directory(ino)
        if not inode.nlink:
            raise posix_error(errno.ENOENT)
        return inode

    def _find(self, directory: int, name: bytes) -> Name | None:
        self._directory(directory)
        if len(name) > NAME_BYTES_MAX:
            raise posix_error(errno.ENAMETOOLONG)
        return self.names.find(directory, name)

    def _named(self, entry: Name) -> Inode:
        try:
            return self.inodes.get(entry.ino)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            raise CorruptError(f"inode {entry.ino}", entry.ino, "a name without inode") from None

    def _check_name(self, name: bytes) -> None:
        if len(name) > NAME_BYTES_MAX:
            raise posix_error(errno.ENAMETOOLONG)
        if not name or b"/" in name or b"\0" in name:
            raise posix_error(errno.EINVAL)

    def _free_name(self, directory: int, name: bytes) -> None:
        self._check_name(name)
        if name in (b".", b"..") or self.names.find(directory, name) is not None:
            raise posix_error(errno.EEXIST)

    def _renamed(self, directory: Inode, bytes_more: int, now_ns: int) -> None:
        directory.size_bytes = max(0, min(FILE_SIZE_MAX, directory.size_bytes + bytes_more))
        directory.mtime_ns = directory.ctime_ns = now_ns
        self._touch(directory)

    def _unlinked(self, inode: Inode, now_ns: int) -> None:
        inode.nlink = 0 if stat.S_ISDIR(inode.mode) else inode.nlink - 1
        inode.ctime_ns = now_ns
        self.inodes.touch(inode)
        if not inode.nlink:
            self.orphans.add(inode.ino)

    def _require_linked(self, inode: Inode) -> None:
        """A file that a name leads to has links; the image may say something else."""
        if not inode.nlink or inode.ino == ROOT_INO:
            raise CorruptError(f"inode {inode.ino}", inode.ino, "a name, but nlink", inode.nlink)

    def _count_link(self, directory: Inode, links: int) -> None:
        """A subdirectory came or went; a number that was wrong in the image stays one."""
        directory.nlink = max(1, min(LINK_MAX, directory.nlink + links))

    def _reach_unlinked(self, inode: Inode) -> None:
        """Reach an inode, and the mark that it has or will have if this is its last name."""
        self.inodes.reach(inode)
        if inode.nlink <= 1 or stat.S_ISDIR(inode.mode):
            self.tree.reach(key(0, TYPE_ORPHAN, inode.ino))

    def _require_empty(self, inode: Inode) -> None:
        if not stat.S_ISDIR(inode.mode):
            raise posix_error(errno.ENOTDIR)
        if not self.names.is_empty(inode.ino):
            raise posix_error(errno.ENOTEMPTY)

    def _require_outside(self, ino: int, directory: int) -> None:
        """Raise EINVAL if `directory` is the directory `ino` or below it."""
        seen = set()
        while directory != ROOT_INO:
            if directory == ino:
                raise posix_error(errno.EINVAL)
            if directory in seen:
                raise CorruptError(f"directory {directory}", directory, "is its own ancestor")
            seen.add(directory)
            directory = self._directory(directory).rdev


def _time_range(time_ns: int) -> int:
    """A time that fits the inode: a signed 64-bit count of nanoseconds."""
    return max(-(1 << 63), min((1 << 63) - 1, time_ns))
