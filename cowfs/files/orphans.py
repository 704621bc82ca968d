"""Files whose last name is gone: kept while somebody uses them, then given back.

A mark in the tree lets the next mount find them after a crash (C7). Giving back a large file is done in
steps, so that nobody waits for it; files of few items go in one piece.
"""

import logging
import stat

from cowfs.errors import CorruptError, DeviceError
from cowfs.files.data import Data
from cowfs.files.inodes import Inodes
from cowfs.files.items import (
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
    """The orphans of one tree, by inode number, and all that one of them may have in it."""

    def __init__(self, tree: Tree, inodes: Inodes, data: Data, xattrs: Xattrs) -> None:
        self._tree = tree
        self._inodes = inodes
        self._data = data
        self._xattrs = xattrs
        self.inos: set[int] = set()
        self.unnamed: set[int] = set()  # of these: never had a name, and may get one
        self._marked: set[int] = set()  # with a mark in the tree

    def load(self) -> None:
        """Find the orphans that a crash left behind; `reclaim` them."""
        start, stop = key(0, TYPE_ORPHAN, 0), key(0, TYPE_ORPHAN + 1, 0)
        try:
            found = {split_key(item)[2] for item, _ in self._tree.items(start, stop)}
        except (CorruptError, DeviceError) as error:
            log.error("deleted files that were open keep their space: %s; run cowfs check", error)
            return
        self.inos |= found
        self._marked |= found

    def reach(self, inode: Inode) -> None:
        """Reach an inode, and the mark that it has or will have if this is its last name."""
        self._inodes.reach(inode)
        if inode.nlink <= 1 or stat.S_ISDIR(inode.mode):
            self._tree.reach(key(0, TYPE_ORPHAN, inode.ino))

    def named(self, ino: int) -> None:
        """It is no orphan any more: it is gone, or a file that never had a name has got one."""
        self.unnamed.discard(ino)
        self.inos.discard(ino)

    def reclaim(self, ino: int, operation: Operation) -> bool:
        """Give back what an orphan holds: all of a small file, else what lies in one leaf.

        Args:
            operation: begun for this.

        Returns:
            Whether it is gone; otherwise call again.
        """
        inode = self._inodes.find(ino)
        if inode is None:  # a mark in the image for nothing: it goes with the next flush
            self.named(ino)
            return True
        if inode.nlink:
            raise CorruptError(f"inode {ino}", ino, "an orphan mark, but names", inode.nlink)
        self.reach(inode)
        start, stop = inode_key(ino), inode_key(ino + 1)
        items = self._tree.one_leaf(start, stop)
        if items is not None:  # a file of few items goes in one piece
            extents = [
                decode_extent(ino, value)
                for item, value in items
                if split_key(item)[1] == TYPE_EXTENT
            ]
            for extent in extents:
                self._data.store.map.require(extent.block, extent.count)
            if items:
                self._tree.reach(items[0][0])
            operation.change()
            if items:
                self._tree.pop_from(items[0][0], stop)
            self._data.forget(inode, extents)
            self._inodes.forget(inode)
            self.named(ino)
            return True
        removal = self._data.reach_removal(inode)
        if removal is not None:
            operation.change()
            self._data.remove(inode, removal)
            self._inodes.touch(inode)
            return False
        self._tree.reach_range(start, key(ino, TYPE_EXTENT, 0))
        operation.change()
        self._data.remove_memory(inode)
        self._xattrs.remove_all(inode)
        if stat.S_ISLNK(inode.mode):
            self._tree.delete(key(ino, TYPE_SYMLINK, 0))
        self._inodes.remove(inode)
        self.named(ino)
        return True

    def flush(self) -> None:
        """Put the marks into the tree."""
        for ino in self._marked - self.inos:
            self._tree.delete(key(0, TYPE_ORPHAN, ino))
        for ino in self.inos - self._marked:
            self._tree.put(key(0, TYPE_ORPHAN, ino), b"")
        self._marked = set(self.inos)
