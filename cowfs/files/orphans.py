"""Orphans: files without a name. Kept while the kernel knows them, then removed with all they hold.

An orphan has a mark in the tree, so that the next mount finds it after a crash (C7). A large file
is removed in steps, so that no request waits long; a file whose items lie in one leaf goes in one
step.
"""

import logging
import stat

from cowfs.errors import CorruptError, DeviceError
from cowfs.files.calls import CALL_BYTES, Reclaim
from cowfs.files.data import Data
from cowfs.files.extents import Extents
from cowfs.files.inodes import Inodes
from cowfs.files.items import (
    INODE_INLINE,
    TYPE_EXTENT,
    TYPE_ORPHAN,
    TYPE_SYMLINK,
    Inode,
    decode_extent,
    inode_key,
    key,
    split_key,
)
from cowfs.files.xattrs import Xattrs
from cowfs.storage.btree import Tree
from cowfs.storage.operation import Operation

log = logging.getLogger(__name__)


class Orphans:
    """The orphans of one tree.

    Attributes:
        inos: inode numbers of the orphans.
        unnamed: those of `inos` that never had a name (O_TMPFILE); `link` may give them one.
    """

    def __init__(
        self, tree: Tree, inodes: Inodes, data: Data, extents: Extents, xattrs: Xattrs
    ) -> None:
        self._tree = tree
        self._inodes = inodes
        self._data = data
        self._extents = extents
        self._xattrs = xattrs
        self.inos: set[int] = set()
        self.unnamed: set[int] = set()
        self._marked: set[int] = set()  # inode numbers with a mark in the tree

    def load(self) -> None:
        """Find the orphans that a crash left behind. The caller then calls `reclaim` for each.

        A mark that cannot be read is logged: its orphan keeps its space.
        """
        start, stop = key(0, TYPE_ORPHAN, 0), key(0, TYPE_ORPHAN + 1, 0)
        try:
            found = {split_key(item)[2] for item, _ in self._tree.items(start, stop)}
        except (CorruptError, DeviceError) as error:
            log.error(
                "cannot read the list of deleted files that were open; they keep their space: %s; "
                "run cowfs check",
                error,
            )
            return
        self.inos |= found
        self._marked |= found

    def reach(self, inode: Inode) -> None:
        """Reach an inode, and its orphan mark if it may become an orphan or stop being one."""
        self._inodes.reach(inode)
        if inode.nlink <= 1 or stat.S_ISDIR(inode.mode):
            self._tree.reach(key(0, TYPE_ORPHAN, inode.ino))

    def discard(self, ino: int) -> None:
        """The inode is an orphan no longer: it was removed, or `link` gave it a name."""
        self.unnamed.discard(ino)
        self.inos.discard(ino)

    def reclaim(self, ino: int, operation: Operation) -> bool:
        """Remove an orphan whole, or one leaf of the extents of a large one.

        Args:
            operation: begun for this.

        Returns:
            Whether the orphan is gone; otherwise call again in a new operation.

        Raises:
            CorruptError: the inode has links, or an item is damaged.
            DeviceError: a node or a page of the space map cannot be read.
        """
        inode = self._inodes.find(ino)
        if inode is None:  # a mark without an inode: the next flush deletes it
            self.discard(ino)
            return True
        if inode.nlink:
            raise CorruptError(
                f"inode {ino}", ino, "an orphan mark, but nlink is not 0", inode.nlink
            )
        self.reach(inode)
        start, stop = inode_key(ino), inode_key(ino + 1)
        items = self._tree.one_leaf(start, stop)
        if items is not None:
            extents = [
                decode_extent(ino, value)
                for item, value in items
                if split_key(item)[1] == TYPE_EXTENT
            ]
            for extent in extents:
                self._tree.store.map.require(extent.block, extent.count)
            if items:
                self._tree.reach(items[0][0])
            operation.change(Reclaim(ino), CALL_BYTES)
            if items:
                self._tree.pop_from(items[0][0], stop)
            if ino in self._data.dirty:
                self._data.discard_all_dirty(ino)
            if extents:
                self._extents.drop(extents)
            self._inodes.forget(inode)
            self.discard(ino)
            return True
        removal = self._extents.reach_removal(inode)
        if removal is not None:
            operation.change_unlogged()  # replay goes on until the orphan is gone
            self._extents.remove(inode, removal)
            self._inodes.touch(inode)
            return False
        self._tree.reach_range(start, key(ino, TYPE_EXTENT, 0))
        operation.change(Reclaim(ino), CALL_BYTES)
        self._data.discard_all_dirty(ino)
        if inode.flags & INODE_INLINE:
            self._data.drop_inline(inode)
        self._xattrs.remove_all(inode)
        if stat.S_ISLNK(inode.mode):
            self._tree.delete(key(ino, TYPE_SYMLINK, 0))
        self._inodes.remove(inode)
        self.discard(ino)
        return True

    def flush(self) -> None:
        """Bring the marks in the tree up to date."""
        for ino in self._marked - self.inos:
            self._tree.delete(key(0, TYPE_ORPHAN, ino))
        for ino in self.inos - self._marked:
            self._tree.put(key(0, TYPE_ORPHAN, ino), b"")
        self._marked = set(self.inos)
