"""Attributes: size, mode, owner, times, extended attributes and ACLs of the files of one tree.

Every method is one operation, in the three steps that namespace.py describes. Permissions are not
checked here: the kernel checks them (default_permissions), and the caller decides the rest.
"""

import contextlib
import errno
import stat

from msgspec.structs import replace

from cowfs.errors import CorruptError, DeviceError, posix_error
from cowfs.files.acl import NAMES as ACL_NAMES
from cowfs.files.calls import (
    CALL_BYTES,
    Accessed,
    Changes,
    RemoveXattr,
    SetAttributes,
    SetXattr,
)
from cowfs.files.items import (
    INODE_INLINE,
    SYMLINK_BYTES_MAX,
    TYPE_SYMLINK,
    Inode,
    key,
)
from cowfs.files.parts import Parts
from cowfs.storage.admission import TIER_ADD, TIER_REMOVE
from cowfs.storage.format import BLOCK_SIZE_BYTES

CAPABILITY_XATTR = b"security.capability"
RELATIME_NS = 24 * 3600 * 10**9


class Attributes:
    """The operations on the attributes of the files of one tree."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._tree = parts.tree
        self._inodes = parts.inodes
        self._data = parts.data
        self._xattrs = parts.xattrs
        self._acls = parts.acls
        self._begin = parts.begin
        self._touch = parts.touch
        self._now_ns = parts.now_ns
        self._get = parts.inodes.get

    def stat_blocks(self, inode: Inode) -> int:
        """st_blocks: 512-byte units that the file's data takes in the image."""
        if inode.mode & 0o170000 == stat.S_IFREG:
            blocks = self._data.allocated_blocks(inode)
            if not blocks and inode.flags & INODE_INLINE:
                return -(-inode.size_bytes // 512)
            return blocks * (BLOCK_SIZE_BYTES // 512)
        return 0

    def readlink(self, ino: int) -> bytes:
        """The target of a symlink. Raises OSError EINVAL for other files."""
        inode = self._get(ino)
        if not stat.S_ISLNK(inode.mode):
            raise posix_error(errno.EINVAL)
        target = self._tree.get(key(ino, TYPE_SYMLINK, 0))
        if target is None or not 0 < len(target) <= SYMLINK_BYTES_MAX:
            raise CorruptError(f"symlink {ino}", ino, "target is missing")
        return target  # type: ignore[no-any-return]

    def setattr(self, ino: int, changes: Changes) -> Inode:
        """Change attributes. A new mode also changes the access ACL.

        The caller checks permissions and decides which set-id bits are cleared.

        Raises:
            OSError: EISDIR or EINVAL if a size is set of a file that is not regular; EFBIG.
            NoSpaceError: the image is full.
        """
        changes = _storable(changes)
        size = changes.size_bytes
        tier, blocks = TIER_REMOVE, 0
        if size is not None:
            self._parts.require_writable()
            inode = self._get(ino)
            if stat.S_ISDIR(inode.mode):
                raise posix_error(errno.EISDIR)
            if not stat.S_ISREG(inode.mode) or size < 0:
                raise posix_error(errno.EINVAL)
            tier, blocks = self._data.truncation(inode, size)
        with self._begin(tier, blocks) as operation:
            inode = self._get(ino)
            clear_capability = changes.clear_capability and bool(inode.xattr_count)
            if clear_capability:
                self._xattrs.reach_remove(inode, CAPABILITY_XATTR)
            access = None if changes.mode is None else self._acls.reach_mode(inode, changes.mode)
            patch = None if size is None else self._data.reach_truncate(inode, size)
            self._inodes.reach(inode)
            now_ns = self._now_ns()
            operation.change(SetAttributes(ino, changes, now_ns), CALL_BYTES)
            if size is not None:
                self._data.truncate(inode, size, patch)
            self._set_attributes(inode, changes, access, clear_capability, now_ns)
            return inode

    def _set_attributes(
        self,
        inode: Inode,
        changes: Changes,
        access: bytes | None,
        clear_capability: bool,
        now_ns: int,
    ) -> None:
        """Make all changes but the size. The inode and its xattrs are reached."""
        if changes.size_bytes is not None:
            inode.mtime_ns = now_ns
        if changes.mode is not None:
            inode.mode = stat.S_IFMT(inode.mode) | changes.mode & 0o7777
            self._acls.put_access(inode, access)
        inode.mode &= ~changes.clear_bits
        if clear_capability:
            self._xattrs.remove(inode, CAPABILITY_XATTR)
        if changes.uid is not None:
            inode.uid = changes.uid
        if changes.gid is not None:
            inode.gid = changes.gid
        if changes.atime_ns is not None:
            inode.atime_ns = changes.atime_ns
        if changes.mtime_ns is not None:
            inode.mtime_ns = changes.mtime_ns
        inode.ctime_ns = now_ns if changes.ctime_ns is None else changes.ctime_ns
        self._touch(inode)

    def accessed(self, inode: Inode, *, strict: bool = False) -> None:
        """Update atime after a read, by the rules of relatime.

        If the image has no room, atime stays: reads must not take the room that deleting needs
        (C10).

        Args:
            strict: update it at every read (strictatime).
        """
        now_ns = self._now_ns()
        stale = inode.atime_ns < inode.mtime_ns or inode.atime_ns < inode.ctime_ns
        stale = stale or strict or now_ns - inode.atime_ns > RELATIME_NS
        if not self._parts.writable or not stale:
            return
        if self._parts.store.admission.would_admit():
            with contextlib.suppress(CorruptError, DeviceError):  # the read itself succeeded
                self._set_accessed(inode, now_ns)

    def set_accessed(self, ino: int) -> None:
        """Set the atime of a file. Raises CorruptError, DeviceError: it cannot be reached."""
        self._set_accessed(self._get(ino), self._now_ns())

    def _set_accessed(self, inode: Inode, now_ns: int) -> None:
        with self._parts.operation.begin_admitted() as operation:
            self._inodes.reach(inode)
            operation.change(Accessed(inode.ino, now_ns), CALL_BYTES)
            inode.atime_ns = now_ns
            self._touch(inode)

    def getxattr(self, ino: int, name: bytes) -> bytes:
        """The value of an xattr. Raises OSError ENODATA if it does not exist."""
        inode = self._get(ino)
        value = self._xattrs.get(inode, name)
        if value is None:
            raise posix_error(errno.ENODATA)
        if name in ACL_NAMES:
            self._acls.check(inode, name, value)
        return value

    def listxattr(self, ino: int) -> list[bytes]:
        """The names of all xattrs of a file, ACLs included."""
        return self._xattrs.names(self._get(ino))

    def setxattr(self, ino: int, name: bytes, value: bytes, *, keep_setgid: bool = True) -> None:
        """Set an xattr. An access ACL also sets the mode.

        Args:
            keep_setgid: False to clear S_ISGID when an access ACL is set: the caller may not keep
                it.

        Raises:
            OSError: ERANGE, E2BIG, ENOSPC; for an ACL as `StoredAcls.reach_set`.
            NoSpaceError: the image is full.
        """
        with self._begin(TIER_ADD) as operation:
            inode = self._get(ino)
            self._inodes.reach(inode)
            now_ns = self._now_ns()
            call = (
                SetXattr(ino, name, value, keep_setgid, now_ns),
                CALL_BYTES + len(name) + len(value),
            )
            if name in ACL_NAMES:
                mode, encoded = self._acls.reach_set(inode, name, value)
                operation.change(*call)
                self._acls.set(inode, name, encoded)
                inode.mode = mode if keep_setgid else mode & ~stat.S_ISGID
            else:
                self._xattrs.reach_set(inode, name, value)
                operation.change(*call)
                self._xattrs.set(inode, name, value)
            inode.ctime_ns = now_ns
            self._touch(inode)

    def removexattr(self, ino: int, name: bytes) -> None:
        """Remove an xattr. Raises OSError ENODATA if there is none, except for an ACL."""
        with self._begin(TIER_REMOVE) as operation:
            inode = self._get(ino)
            self._inodes.reach(inode)
            if not self._xattrs.reach_remove(inode, name):
                if name in ACL_NAMES:
                    return
                raise posix_error(errno.ENODATA)
            now_ns = self._now_ns()
            operation.change(RemoveXattr(ino, name, now_ns), CALL_BYTES + len(name))
            self._xattrs.remove(inode, name)
            inode.ctime_ns = now_ns
            self._touch(inode)


def _storable(changes: Changes) -> Changes:
    """The same changes, with times clamped to what an inode stores: signed 64-bit nanoseconds."""
    times = {
        name: max(-(1 << 63), min((1 << 63) - 1, time_ns))
        for name in ("atime_ns", "mtime_ns", "ctime_ns")
        if (time_ns := getattr(changes, name)) is not None
    }
    return replace(changes, **times) if times else changes
