"""What the operations on one tree share: an object per kind of item, and the start of an operation.

The operations are in namespace.py, attributes.py and content.py; volume.py puts them together.
Keeps I7.
"""

import errno
import stat
import time

from cowfs.errors import ReadOnlyError, posix_error
from cowfs.files.data import Data
from cowfs.files.extents import Extents
from cowfs.files.inodes import Inodes
from cowfs.files.items import Inode
from cowfs.files.names import Names
from cowfs.files.orphans import Orphans
from cowfs.files.ranges import Ranges
from cowfs.files.stored_acls import StoredAcls
from cowfs.files.xattrs import Xattrs
from cowfs.storage.btree import Tree
from cowfs.storage.operation import Operation


class Parts:
    """The parts of one volume or snapshot.

    Args:
        tree: its tree.
        name_seed: seed of the name hashes, from the superblock.
        next_ino, inode_count, data_blocks: from its root record.
        writable: False for a snapshot.

    Attributes:
        operation: the steps of the operation under way; there is at most one at a time.
        changed: whether anything changed since the last flush.
        kernel_keeps_times: with its write-back cache on, the kernel sets mtime and ctime of files
            whose data changes, and sends them with setattr.
        replay_ns: while the log is replayed, the time of the call; else None.
    """

    __slots__ = (
        "acls",
        "changed",
        "data",
        "extents",
        "inodes",
        "kernel_keeps_times",
        "names",
        "operation",
        "orphans",
        "ranges",
        "replay_ns",
        "store",
        "tree",
        "writable",
        "xattrs",
    )

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
        self.operation = tree.operation = Operation(
            tree.store.admission, tree.store.fail, tree.store.log
        )
        self.inodes = Inodes(tree, next_ino, inode_count)
        self.extents = Extents(tree, data_blocks)
        self.data = Data(tree, self.extents)
        self.ranges = Ranges(self.data)
        self.names = Names(tree, name_seed)
        self.xattrs = Xattrs(tree, name_seed)
        self.acls = StoredAcls(self.xattrs)
        self.orphans = Orphans(tree, self.inodes, self.data, self.extents, self.xattrs)
        self.writable = writable
        self.changed = False
        self.kernel_keeps_times = False
        self.replay_ns: int | None = None

    def require_writable(self) -> None:
        """Raise ReadOnlyError for a snapshot."""
        if not self.writable:
            raise ReadOnlyError("a snapshot cannot be changed")

    def now_ns(self) -> int:
        """The time of the operation. Read once an operation, and recorded with its call."""
        return time.time_ns() if self.replay_ns is None else self.replay_ns

    def written_ns(self) -> int | None:
        """The time of an operation on data; None where the kernel sets the times of the file."""
        return None if self.kernel_keeps_times else self.now_ns()

    def begin(self, tier: int, blocks: int = 0) -> Operation:
        """Begin an operation.

        Args:
            tier: TIER_ADD, or TIER_REMOVE for what frees space (admission.py).
            blocks: upper bound of the data blocks that it adds.

        Returns:
            The operation, to be used in `with`.

        Raises:
            ReadOnlyError: the tree is a snapshot.
            NoSpaceError: the image has no room for it.
        """
        if not self.writable:
            self.require_writable()
        return self.operation.begin(tier, blocks)

    def touch(self, inode: Inode) -> None:
        """Record that an inode was changed. It must have been reached before."""
        self.changed = True
        self.inodes.touch(inode)

    def regular(self, ino: int) -> Inode:
        """The inode of a regular file.

        Raises:
            OSError: EISDIR for a directory, EINVAL for other types, ESTALE if there is no such
                inode.
        """
        inode = self.inodes.get(ino)
        if not stat.S_ISREG(inode.mode):
            raise posix_error(errno.EISDIR if stat.S_ISDIR(inode.mode) else errno.EINVAL)
        return inode
