"""Names: the operations that make, find, move and remove files and directories of one tree.

Every method is one operation: it happens as a whole or not at all, and never suspends. It takes
three steps: it is admitted, reaches what it will change, then gives its call to the log and changes
it (storage/operation.py). So damage and a full image refuse a whole operation, and a commit never
runs into them (C9, C10). POSIX errors are raised as `OSError`.
"""

import errno
import stat
from collections.abc import Iterator

from cowfs.errors import CorruptError, posix_error
from cowfs.files.calls import (
    CALL_BYTES,
    Link,
    Make,
    MakeUnnamed,
    RemoveDirectory,
    Rename,
    Unlink,
)
from cowfs.files.items import (
    FILE_SIZE_MAX,
    LINK_MAX,
    NAME_BYTES_MAX,
    ROOT_INO,
    SYMLINK_BYTES_MAX,
    TYPE_ORPHAN,
    TYPE_SYMLINK,
    Inode,
    Name,
    key,
)
from cowfs.files.parts import Parts
from cowfs.storage.admission import TIER_ADD, TIER_REMOVE

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4
# The whiteout that overlayfs reads as "deleted here": a character device 0:0 without permissions.
WHITEOUT_MODE, WHITEOUT_DEVICE = stat.S_IFCHR, 0


class Namespace:
    """The operations on the names of one tree."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._tree = parts.tree
        self._inodes = parts.inodes
        self._names = parts.names
        self._acls = parts.acls
        self._orphans = parts.orphans
        self._begin = parts.begin
        self._touch = parts.touch
        self._now_ns = parts.now_ns
        self._get = parts.inodes.get

    def make_root(self, mode: int, uid: int, gid: int) -> None:
        """Make the root directory of a new, empty tree."""
        with self._parts.operation.begin_admitted() as operation:
            self._inodes.reach_new()
            operation.change_unlogged()
            inode = self._inodes.create(
                stat.S_IFDIR | mode, uid, gid, ROOT_INO, self._parts.now_ns()
            )
            assert inode.ino == ROOT_INO
            inode.nlink = 2
            self._parts.changed = True

    # --- looking ---------------------------------------------------------------------------------

    def lookup(self, directory: int, name: bytes) -> Inode:
        """The inode of a name, `.` and `..` included. Raises OSError ENOENT, ENOTDIR."""
        if name == b".":
            return self._directory(directory)
        if name == b"..":
            return self._get(self._directory(directory).rdev)
        entry = self._find(directory, name)
        if entry is None:
            raise posix_error(errno.ENOENT)
        return self._inode_of(entry)

    def find(self, directory: int, name: bytes) -> Inode | None:
        """As `lookup`, without `.` and `..`; None when there is no such name."""
        entry = self._find(directory, name)
        return None if entry is None else self._inode_of(entry)

    def listing(self, directory: int, after: int = 0) -> Iterator[tuple[int, Name]]:
        """(cookie, entry) of each name with a cookie above `after`, in cookie order.

        The volume must not change while the iterator is used.
        """
        self._directory(directory)
        return self._names.listing(directory, after)

    # --- making and unmaking ---------------------------------------------------------------------

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
        """Make a file of any type but a symlink.

        Args:
            rdev: number of a device file.
            umask: bits cleared in the mode, unless the directory has a default ACL.
            inherits: False to ignore the directory's default ACL.

        Raises:
            CorruptError: the default ACL of the directory is damaged.
            OSError: EEXIST, ENOENT, ENOTDIR, EMLINK, ENAMETOOLONG.
            NoSpaceError: the image is full.
        """
        return self._make(directory, name, mode, uid, gid, rdev, b"", umask, inherits)

    def _make(
        self,
        directory: int,
        name: bytes,
        mode: int,
        uid: int,
        gid: int,
        rdev: int,
        target: bytes,
        umask: int,
        inherits: bool,
    ) -> Inode:
        """Do the work of `create` and `symlink`; `target` is empty except for a symlink."""
        with self._begin(TIER_ADD) as operation:
            parent = self._linked_directory(directory)
            self._reach_new_name(directory, name)
            is_directory = stat.S_ISDIR(mode)
            asked = mode, uid, gid
            if parent.mode & stat.S_ISGID:
                gid = parent.gid
                if is_directory:
                    mode |= stat.S_ISGID
            if is_directory and parent.nlink >= LINK_MAX:
                raise posix_error(errno.EMLINK)
            mode, access, default = self._inherited(parent, mode, umask, inherits)
            self._inodes.reach(parent)
            ino = self._inodes.reach_new()
            now_ns = self._now_ns()
            operation.change(
                Make(directory, name, *asked, rdev, target, umask, inherits, ino, now_ns),
                CALL_BYTES + len(name) + len(target),
            )
            inode = self._inodes.create(mode, uid, gid, directory if is_directory else rdev, now_ns)
            self._names.add(directory, name, inode.ino, mode >> 12)
            if is_directory:
                inode.nlink = 2
                parent.nlink += 1
            if target:
                self._tree.put(key(inode.ino, TYPE_SYMLINK, 0), target)
                inode.size_bytes = len(target)
            if default is not None:
                self._acls.put_inherited(inode, access, default)
            self._touch_directory(parent, len(name), now_ns)
            return inode

    def _inherited(
        self, parent: Inode, mode: int, umask: int, inherits: bool
    ) -> tuple[int, bytes | None, bytes | None]:
        """Mode, access ACL and default ACL of a new file. Both are None if none is inherited."""
        default = None
        if inherits and parent.xattr_count and not stat.S_ISLNK(mode):
            default = self._acls.default(parent)
        if default is None:
            return mode & ~umask, None, None
        return *self._acls.inherit(parent, default, mode), default

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
        """Make a regular file without a name (O_TMPFILE): an orphan, until `link` names it.

        Args:
            directory: the directory whose group and default ACL the file may inherit.
            umask, inherits: as for `create`.

        Raises:
            CorruptError: the default ACL of the directory is damaged.
            OSError: ENOENT, ENOTDIR.
            NoSpaceError: the image is full.
        """
        with self._begin(TIER_ADD) as operation:
            parent = self._linked_directory(directory)
            ino = self._inodes.reach_new()
            self._tree.reach(key(0, TYPE_ORPHAN, ino))
            asked = mode, uid, gid
            if parent.mode & stat.S_ISGID:
                gid = parent.gid
            mode, access, _ = self._inherited(parent, stat.S_IFREG | mode & 0o7777, umask, inherits)
            now_ns = self._now_ns()
            operation.change(
                MakeUnnamed(directory, *asked, umask, inherits, ino, now_ns), CALL_BYTES
            )
            inode = self._inodes.create(mode, uid, gid, 0, now_ns)
            inode.nlink = 0
            self._acls.put_access(inode, access)
            self._orphans.inos.add(inode.ino)
            self._orphans.unnamed.add(inode.ino)
            self._parts.changed = True
            return inode

    def symlink(self, directory: int, name: bytes, target: bytes, uid: int, gid: int) -> Inode:
        """Make a symlink. Raises as `create`; for the target also ENAMETOOLONG, ENOENT (empty),
        EINVAL (a zero byte).
        """
        if not target:
            raise posix_error(errno.ENOENT)
        if len(target) > SYMLINK_BYTES_MAX:
            raise posix_error(errno.ENAMETOOLONG)
        if b"\0" in target:
            raise posix_error(errno.EINVAL)
        mode = stat.S_IFLNK | 0o777
        return self._make(directory, name, mode, uid, gid, 0, target, 0, False)

    def link(self, ino: int, directory: int, name: bytes) -> Inode:
        """Add a name to a file. Raises OSError EPERM for a directory, EMLINK, EEXIST, ENOENT."""
        with self._begin(TIER_ADD) as operation:
            inode = self._get(ino)
            parent = self._linked_directory(directory)
            if stat.S_ISDIR(inode.mode):
                raise posix_error(errno.EPERM)
            if inode.nlink >= LINK_MAX:
                raise posix_error(errno.EMLINK)
            if not inode.nlink and ino not in self._orphans.unnamed:
                raise posix_error(errno.ENOENT)
            self._reach_new_name(directory, name)
            self._inodes.reach(parent)
            self._orphans.reach(inode)
            now_ns = self._now_ns()
            operation.change(Link(ino, directory, name, now_ns), CALL_BYTES + len(name))
            self._names.add(directory, name, ino, inode.mode >> 12)
            inode.nlink += 1
            if inode.nlink == 1:
                self._orphans.discard(ino)
            inode.ctime_ns = now_ns
            self._inodes.touch(inode)
            self._touch_directory(parent, len(name), now_ns)
            return inode

    def unlink(self, directory: int, name: bytes) -> Inode:
        """Remove a name of a file that is not a directory. Without names the file is an orphan.

        Returns:
            The inode. If its nlink is 0, call `Volume.reclaim` once the kernel has forgotten it.

        Raises:
            OSError: EISDIR, ENOENT, ENOTDIR.
        """
        with self._begin(TIER_REMOVE) as operation:
            parent = self._directory(directory)
            inode = self.lookup(directory, name)
            if stat.S_ISDIR(inode.mode):
                raise posix_error(errno.EISDIR)
            self._require_linked(inode)
            self._inodes.reach(parent)
            self._orphans.reach(inode)
            self._names.reach(directory, name)
            now_ns = self._now_ns()
            operation.change(Unlink(directory, name, inode.ino, now_ns), CALL_BYTES + len(name))
            self._names.remove(directory, name)
            self._touch_directory(parent, -len(name), now_ns)
            self._count_unlink(inode, now_ns)
            return inode

    def rmdir(self, directory: int, name: bytes) -> Inode:
        """Remove an empty directory, which becomes an orphan. Returns its inode; see `unlink`.

        Raises:
            OSError: ENOTEMPTY, also for `..`; ENOTDIR, ENOENT; EINVAL for `.`.
        """
        with self._begin(TIER_REMOVE) as operation:
            if name in (b".", b".."):
                raise posix_error(errno.EINVAL if name == b"." else errno.ENOTEMPTY)
            parent = self._directory(directory)
            inode = self.lookup(directory, name)
            self._require_empty(inode)
            self._require_linked(inode)
            self._inodes.reach(parent)
            self._orphans.reach(inode)
            self._names.reach(directory, name)
            now_ns = self._now_ns()
            operation.change(
                RemoveDirectory(directory, name, inode.ino, now_ns), CALL_BYTES + len(name)
            )
            self._names.remove(directory, name)
            self._count_link(parent, -1)
            self._touch_directory(parent, -len(name), now_ns)
            self._count_unlink(inode, now_ns)
            return inode

    def rename(
        self,
        old_directory: int,
        old_name: bytes,
        directory: int,
        name: bytes,
        flags: int = 0,
        *,
        uid: int = 0,
        gid: int = 0,
    ) -> Inode | None:
        """Rename a file or directory, atomically (C3).

        Args:
            flags: 0 or RENAME_NOREPLACE, each with or without RENAME_WHITEOUT; or RENAME_EXCHANGE.
            uid, gid: owner of the whiteout that RENAME_WHITEOUT leaves under the old name.

        Returns:
            The inode that had the new name before and was replaced, or None; see `unlink`.

        Raises:
            OSError: EINVAL into its own subtree or for other flags; ENOENT, EEXIST, ENOTEMPTY,
                EISDIR, ENOTDIR, EBUSY as rename(2).
            NoSpaceError: the image is full.
        """
        asked = flags
        whiteout = bool(flags & RENAME_WHITEOUT)
        flags &= ~RENAME_WHITEOUT
        if flags not in (0, RENAME_NOREPLACE, RENAME_EXCHANGE) or (
            whiteout and flags == RENAME_EXCHANGE
        ):
            raise posix_error(errno.EINVAL)
        for part in (old_name, name):
            if part in (b".", b".."):
                raise posix_error(errno.EBUSY)
        with self._begin(TIER_ADD) as operation:
            old_parent, parent = self._directory(old_directory), self._linked_directory(directory)
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
            if target is None:
                if (
                    stat.S_ISDIR(moving.mode)
                    and parent is not old_parent
                    and parent.nlink >= LINK_MAX
                ):
                    raise posix_error(errno.EMLINK)
            elif flags == RENAME_EXCHANGE:
                if stat.S_ISDIR(target.mode):
                    self._require_outside(target.ino, old_directory)
            else:
                if stat.S_ISDIR(moving.mode):
                    self._require_empty(target)
                elif stat.S_ISDIR(target.mode):
                    raise posix_error(errno.EISDIR)
                self._require_linked(target)
            self._names.reach(old_directory, old_name)
            if target is None:
                self._names.reach_new(directory, name)
            else:
                self._names.reach(directory, name)
            for inode in (old_parent, parent, moving):
                self._inodes.reach(inode)
            if target is not None:
                self._orphans.reach(target)
            if whiteout:
                self._inodes.reach_new()
            now_ns = self._now_ns()
            operation.change(
                Rename(
                    old_directory, old_name, directory, name, asked, uid, gid, moving.ino, now_ns
                ),
                CALL_BYTES + len(old_name) + len(name),
            )
            if target is None:
                self._names.add(directory, name, moving.ino, moving.mode >> 12)
                self._touch_directory(parent, len(name), now_ns)
            elif flags == RENAME_EXCHANGE:
                self._exchange(old_parent, old_name, moving, parent, name, target, now_ns)
                return None
            else:
                if stat.S_ISDIR(moving.mode):
                    self._count_link(parent, -1)
                self._names.change(directory, name, moving.ino, moving.mode >> 12)
                self._touch_directory(parent, 0, now_ns)
                self._count_unlink(target, now_ns)
            if whiteout:
                if old_parent.mode & stat.S_ISGID:
                    gid = old_parent.gid
                left = self._inodes.create(WHITEOUT_MODE, uid, gid, WHITEOUT_DEVICE, now_ns)
                self._names.change(old_directory, old_name, left.ino, left.mode >> 12)
                self._touch_directory(old_parent, 0, now_ns)
            else:
                self._names.remove(old_directory, old_name)
                self._touch_directory(old_parent, -len(old_name), now_ns)
            self._finish_move(moving, old_parent, parent, now_ns)
            return target

    def _exchange(
        self,
        old_parent: Inode,
        old_name: bytes,
        moving: Inode,
        parent: Inode,
        name: bytes,
        target: Inode,
        now_ns: int,
    ) -> None:
        self._names.change(old_parent.ino, old_name, target.ino, target.mode >> 12)
        self._names.change(parent.ino, name, moving.ino, moving.mode >> 12)
        self._touch_directory(old_parent, 0, now_ns)
        self._touch_directory(parent, 0, now_ns)
        self._finish_move(moving, old_parent, parent, now_ns)
        self._finish_move(target, parent, old_parent, now_ns)

    def _finish_move(self, inode: Inode, old_parent: Inode, parent: Inode, now_ns: int) -> None:
        if stat.S_ISDIR(inode.mode) and old_parent is not parent:
            inode.rdev = parent.ino
            self._count_link(old_parent, -1)
            self._count_link(parent, 1)
        inode.ctime_ns = now_ns
        self._inodes.touch(inode)

    # --- helpers ---------------------------------------------------------------------------------

    def _directory(self, ino: int) -> Inode:
        inode = self._get(ino)
        if not stat.S_ISDIR(inode.mode):
            raise posix_error(errno.ENOTDIR)
        return inode

    def _linked_directory(self, ino: int) -> Inode:
        """A directory that can take names. Raises ENOENT for one that was removed."""
        inode = self._directory(ino)
        if not inode.nlink:
            raise posix_error(errno.ENOENT)
        return inode

    def _find(self, directory: int, name: bytes) -> Name | None:
        self._directory(directory)
        if len(name) > NAME_BYTES_MAX:
            raise posix_error(errno.ENAMETOOLONG)
        return self._names.find(directory, name)

    def _inode_of(self, entry: Name) -> Inode:
        try:
            return self._inodes.get(entry.ino)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            raise CorruptError(f"inode {entry.ino}", entry.ino, "a name without inode") from None

    def _check_name(self, name: bytes) -> None:
        if len(name) > NAME_BYTES_MAX:
            raise posix_error(errno.ENAMETOOLONG)
        if not name or b"/" in name or b"\0" in name:
            raise posix_error(errno.EINVAL)

    def _reach_new_name(self, directory: int, name: bytes) -> None:
        self._check_name(name)
        if name in (b".", b".."):
            raise posix_error(errno.EEXIST)
        self._names.reach_new(directory, name)

    def _touch_directory(self, directory: Inode, bytes_more: int, now_ns: int) -> None:
        directory.size_bytes = max(0, min(FILE_SIZE_MAX, directory.size_bytes + bytes_more))
        directory.mtime_ns = directory.ctime_ns = now_ns
        self._touch(directory)

    def _count_unlink(self, inode: Inode, now_ns: int) -> None:
        inode.nlink = 0 if stat.S_ISDIR(inode.mode) else inode.nlink - 1
        inode.ctime_ns = now_ns
        self._inodes.touch(inode)
        if not inode.nlink:
            self._orphans.inos.add(inode.ino)

    def _require_linked(self, inode: Inode) -> None:
        """Raise CorruptError if an inode that has a name says it has no links, or is the root."""
        if not inode.nlink or inode.ino == ROOT_INO:
            raise CorruptError(f"inode {inode.ino}", inode.ino, "a name, but nlink", inode.nlink)

    def _count_link(self, directory: Inode, links: int) -> None:
        """Add to a directory's nlink. It stays in range, even if it was wrong in the image."""
        directory.nlink = max(1, min(LINK_MAX, directory.nlink + links))

    def _require_empty(self, inode: Inode) -> None:
        if not stat.S_ISDIR(inode.mode):
            raise posix_error(errno.ENOTDIR)
        if not self._names.is_empty(inode.ino):
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
