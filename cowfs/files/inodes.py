"""The inodes of one volume in memory: decoded, changed in place, put into the tree at the freeze.

An inode that was changed is *dirty* and stays in memory until `flush`; clean ones are forgotten when
there are too many. Inode numbers are never used twice.
"""

import errno
import logging
import time

from cowfs.errors import CorruptError, DeviceError, NoSpaceError, posix_error
from cowfs.files.items import INO_MAX, KEY_BYTES, Inode, decode_inode, inode_key
from cowfs.storage.btree import Tree

log = logging.getLogger(__name__)

CACHED_MAX = 65536  # about 300 bytes each


class Inodes:
    """Args: tree of the volume; the next free inode number; how many inode items the tree holds."""

    def __init__(self, tree: Tree, next_ino: int, count: int) -> None:
        self._tree = tree
        self.next_ino = next_ino
        self._next_is_free = False  # looked up in the tree, not only told by the root record
        self.count = count
        self.dirty: dict[int, Inode] = {}
        self._clean: dict[int, Inode] = {}
        self._fresh: set[int] = set()  # made since the last flush: not in the tree yet

    def get(self, ino: int) -> Inode:
        """The inode; the same object until it is flushed and forgotten.

        Raises:
            OSError: ESTALE, there is none.
        """
        inode = self.dirty.get(ino) or self._clean.get(ino) or self.find(ino)
        if inode is None:
            raise posix_error(errno.ESTALE)
        return inode

    def find(self, ino: int) -> Inode | None:
        """The same; None when there is none."""
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
        """See to it that a change of the inode can be put into the tree, before it is made (C9).

        Raises:
            CorruptError, DeviceError: its leaf cannot be read.
        """
        if inode.ino not in self.dirty:
            self._tree.reach(inode_key(inode.ino))

    def touch(self, inode: Inode) -> None:
        """The inode, which was reached in this transaction, was changed."""
        inode.answer = None
        ino = inode.ino
        if ino not in self.dirty:
            self.dirty[ino] = inode
            self._clean.pop(ino, None)
            self._tree.store.admission.promise(0, 1)

    def reach_new(self) -> int:
        """Reach the place of the inode that `create` makes next. Returns its number.

        Raises:
            NoSpaceError: no number is left.
        """
        if self.next_ino > INO_MAX:
            raise NoSpaceError("no inode number is left")
        tree = self._tree
        if not self._next_is_free:
            self._require_free()
        if tree.end_reached != tree.store.generation:
            tree.reach_end(inode_key(self.next_ino))
        return self.next_ino

    def _require_free(self) -> None:
        """Nothing in the tree has the next inode number, or a higher one, whatever a record said.

        Raises:
            NoSpaceError: none is left.
        """
        self._next_is_free = True
        try:
            last = self._tree.floor(b"\xff" * (KEY_BYTES + 1))
        except (CorruptError, DeviceError):
            return  # what is lost there is not overwritten: see Tree.reach_end
        found = 0 if last is None else int.from_bytes(last[0][:8].ljust(8, b"\0"), "big")
        if found >= self.next_ino:
            log.warning(
                "the next inode number is said to be %d, but there is %d already; going on from there",
                self.next_ino,
                found,
            )
            self.next_ino = found + 1
        if self.next_ino > INO_MAX:
            raise NoSpaceError("no inode number is left")

    def create(self, mode: int, uid: int, gid: int, rdev: int) -> Inode:
        """A new inode with one link, dirty; `reach_new` came before."""
        ino = self.next_ino
        self.next_ino += 1
        now_ns = time.time_ns()
        # One link, no bytes, no blocks. (By position: twice as fast, and this is in every create.)
        birth = self._tree.store.generation
        inode = Inode(ino, mode, 1, uid, gid, rdev, 0, 0, birth, now_ns, now_ns, now_ns, now_ns)
        self._fresh.add(ino)
        self.count += 1
        self.touch(inode)
        return inode

    def remove(self, inode: Inode) -> None:
        """The inode is gone; what belonged to it was removed by the caller."""
        ino = inode.ino
        if ino not in self._fresh and not self._tree.delete(inode_key(ino)):
            raise CorruptError(f"inode {ino}", ino, "missing from its tree")
        self.forget(inode)

    def forget(self, inode: Inode) -> None:
        """The inode is gone, and its item, if it had one, with it."""
        ino = inode.ino
        if self.dirty.pop(ino, None) is not None:
            self._tree.store.admission.promise(0, -1)
        self._clean.pop(ino, None)
        self._fresh.discard(ino)
        self.count = max(0, self.count - 1)  # the image may say any number

    def forget_answers(self) -> None:
        """What was made of the inodes holds no more."""
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
