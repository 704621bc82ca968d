"""The inodes of one volume in memory: decoded on use, changed in place, flushed at the freeze.

A changed inode is *dirty* and stays in memory until `flush`. Clean ones are evicted when there are
more than CACHED_MAX. Inode numbers are never used twice.
"""

import errno
import logging

from cowfs.errors import CorruptError, DeviceError, NoSpaceError, posix_error
from cowfs.files.items import INO_MAX, KEY_BYTES, Inode, decode_inode, inode_key
from cowfs.storage.btree import Tree

log = logging.getLogger(__name__)

CACHED_MAX = 65536  # clean inodes, about 300 bytes each


class Inodes:
    """The inodes of one volume.

    Args:
        tree: the tree of the volume.
        next_ino: the next free inode number, from the root record.
        count: inodes in the tree, from the root record.

    Attributes:
        dirty: the dirty inodes by number.
    """

    def __init__(self, tree: Tree, next_ino: int, count: int) -> None:
        self._tree = tree
        self.next_ino = next_ino
        self._next_is_checked = False  # whether the tree was searched for numbers >= next_ino
        self.count = count
        self.dirty: dict[int, Inode] = {}
        self._clean: dict[int, Inode] = {}
        self._fresh: set[int] = set()  # created since the last flush: not in the tree yet

    def get(self, ino: int) -> Inode:
        """The inode with that number. The same object each time, until it is evicted.

        Raises:
            OSError: ESTALE, there is no such inode.
            CorruptError, DeviceError: its item is damaged or cannot be read.
        """
        inode = self.dirty.get(ino) or self._clean.get(ino) or self.find(ino)
        if inode is None:
            raise posix_error(errno.ESTALE)
        return inode

    def find(self, ino: int) -> Inode | None:
        """As `get`, but None when there is no such inode."""
        inode = self.dirty.get(ino) or self._clean.get(ino)
        if inode is not None:
            return inode
        value = self._tree.get(inode_key(ino)) if 0 < ino <= INO_MAX else None
        if value is None:
            return None
        inode = decode_inode(ino, value)
        if inode.birth > self._tree.store.generation:
            raise CorruptError(f"inode {ino}", ino, "born in the future", inode.birth)
        if len(self._clean) >= CACHED_MAX:
            for old in list(self._clean)[: CACHED_MAX // 8]:
                del self._clean[old]
        self._clean[ino] = inode
        return inode

    def reach(self, inode: Inode) -> None:
        """Reach the inode's item, so that a change of the inode cannot fail later (C9).

        Raises:
            CorruptError, DeviceError: its leaf cannot be read.
        """
        if inode.ino not in self.dirty:
            self._tree.reach(inode_key(inode.ino))

    def touch(self, inode: Inode) -> None:
        """Make an inode dirty. It must have been reached in this transaction."""
        inode.answer = None
        ino = inode.ino
        if ino not in self.dirty:
            self.dirty[ino] = inode
            self._clean.pop(ino, None)
            self._tree.store.admission.promise(0, 1)

    def reach_new(self) -> int:
        """Reach the place of the inode that `create` makes next.

        Returns:
            The number that it will have.

        Raises:
            NoSpaceError: no inode number is left.
            CorruptError, DeviceError: the place cannot be reached.
        """
        if self.next_ino > INO_MAX:
            raise NoSpaceError("no inode number is left")
        tree = self._tree
        if not self._next_is_checked:
            self._check_next()
        if tree.end_reached != tree.store.generation:
            tree.reach_end(inode_key(self.next_ino))
        return self.next_ino

    def _check_next(self) -> None:
        """Raise `next_ino` above every inode number in the tree, if the root record was wrong.

        Raises:
            NoSpaceError: no inode number is left.
        """
        self._next_is_checked = True
        try:
            last = self._tree.floor(b"\xff" * (KEY_BYTES + 1))
        except (CorruptError, DeviceError):
            return  # Tree.reach_end keeps a damaged last leaf, and adds a new one behind it
        found = 0 if last is None else int.from_bytes(last[0][:8].ljust(8, b"\0"), "big")
        if found >= self.next_ino:
            log.warning(
                "the root record says that the next inode number is %d, but inode %d exists; "
                "continuing after it; run cowfs check",
                self.next_ino,
                found,
            )
            self.next_ino = found + 1
        if self.next_ino > INO_MAX:
            raise NoSpaceError("no inode number is left")

    def create(self, mode: int, uid: int, gid: int, rdev: int, now_ns: int) -> Inode:
        """Make a new inode with one link. It is dirty; `reach_new` must have been called before.

        Args:
            rdev: device number; of a directory, the inode number of its parent.
            now_ns: all its times.
        """
        ino = self.next_ino
        self.next_ino += 1
        # One link, no bytes, no blocks. By position, because that is twice as fast in every create.
        birth = self._tree.store.generation
        inode = Inode(ino, mode, 1, uid, gid, rdev, 0, 0, birth, now_ns, now_ns, now_ns, now_ns)
        self._fresh.add(ino)
        self.count += 1
        self.touch(inode)
        return inode

    def remove(self, inode: Inode) -> None:
        """Delete an inode and its item. The caller has removed all its other items.

        Raises:
            CorruptError: the tree has no item for it.
        """
        ino = inode.ino
        if ino not in self._fresh and not self._tree.delete(inode_key(ino)):
            raise CorruptError(f"inode {ino}", ino, "missing from its tree")
        self.forget(inode)

    def forget(self, inode: Inode) -> None:
        """Forget an inode whose item was deleted, or never was in the tree."""
        ino = inode.ino
        if self.dirty.pop(ino, None) is not None:
            self._tree.store.admission.promise(0, -1)
        self._clean.pop(ino, None)
        self._fresh.discard(ino)
        self.count = max(0, self.count - 1)  # the image may say any number

    def forget_answers(self) -> None:
        """Discard the kernel answers cached in the inodes."""
        for inodes in (self.dirty, self._clean):
            for inode in inodes.values():
                inode.answer = None

    def flush(self) -> None:
        """Put every dirty inode into the tree."""
        dirty = self.dirty
        self._tree.put_ascending([(inode_key(ino), dirty[ino].encode()) for ino in sorted(dirty)])
        self._tree.store.admission.promise(0, -len(self.dirty))
        self._clean.update(self.dirty)
        self.dirty.clear()
        self._fresh.clear()
        excess = len(self._clean) - CACHED_MAX
        if excess > 0:
            for old in list(self._clean)[:excess]:
                del self._clean[old]
