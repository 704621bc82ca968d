"""The files of one tree as POSIX sees them. Knows nothing of FUSE or of snapshots.

`Volume` puts the operations together: names (namespace.py), attributes (attributes.py) and data
(content.py), on the parts that they share (parts.py). It adds the reclaiming of orphans and the
flush. Changes stay in memory until `flush` puts them into the tree, at a commit's freeze.
"""

from cowfs.files.attributes import Attributes
from cowfs.files.content import Content
from cowfs.files.namespace import Namespace
from cowfs.files.parts import Parts
from cowfs.storage.admission import TIER_REMOVE

# Leaves of extents that one `reclaim` removes: about 450 MiB of data, some milliseconds.
RECLAIM_LEAVES = 64


class Volume:
    """A writable volume or a snapshot.

    Its operations are bound methods of Namespace, Attributes and Content: a call has no extra cost.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.tree = parts.tree
        self.store = parts.store
        self.operation = parts.operation
        self.inodes = parts.inodes
        self.names = parts.names
        self.data = parts.data
        self.extents = parts.extents
        self.ranges = parts.ranges
        self.xattrs = parts.xattrs
        self.get = parts.inodes.get

        namespace = Namespace(parts)
        self.make_root = namespace.make_root
        self.lookup = namespace.lookup
        self.find = namespace.find
        self.listing = namespace.listing
        self.create = namespace.create
        self.create_unnamed = namespace.create_unnamed
        self.symlink = namespace.symlink
        self.link = namespace.link
        self.unlink = namespace.unlink
        self.rmdir = namespace.rmdir
        self.rename = namespace.rename

        attributes = Attributes(parts)
        self.stat_blocks = attributes.stat_blocks
        self.readlink = attributes.readlink
        self.setattr = attributes.setattr
        self.accessed = attributes.accessed
        self.set_accessed = attributes.set_accessed
        self.getxattr = attributes.getxattr
        self.listxattr = attributes.listxattr
        self.setxattr = attributes.setxattr
        self.removexattr = attributes.removexattr

        self._content = content = Content(parts)
        self.reading = content.reading
        self.read = content.read
        self.write = content.write
        self.seek = content.seek
        self.allocate = content.allocate
        self.settle = content.settle

    @property
    def writable(self) -> bool:
        """False for a snapshot, and for a volume that became one."""
        return self._parts.writable

    def make_read_only(self) -> None:
        """Refuse every change from now on: the volume became a snapshot."""
        self._parts.writable = False

    def leave_times_to_kernel(self) -> None:
        """Set no mtime and ctime for changes of data from now on: the kernel sends them."""
        self._parts.kernel_keeps_times = True

    @property
    def changed(self) -> bool:
        """Whether anything changed since the last flush."""
        return self._parts.changed

    @changed.setter
    def changed(self, value: bool) -> None:
        self._parts.changed = value

    def reflink(
        self,
        source: "Volume",
        source_ino: int,
        source_offset: int,
        ino: int,
        offset: int,
        length: int,
    ) -> int:
        """`Content.reflink`, from any volume or snapshot of the image, this one included."""
        return self._content.reflink(
            source._content, source_ino, source_offset, ino, offset, length
        )

    # --- orphans ---------------------------------------------------------------------------------

    @property
    def orphans(self) -> set[int]:
        """Inode numbers of the files without a name, which may still be open."""
        return self._parts.orphans.inos

    def load_orphans(self) -> None:
        """Find the orphans that a crash left behind. The caller then calls `reclaim` for each."""
        self._parts.orphans.load()

    def reclaim(self, ino: int) -> bool:
        """Remove an orphan, or up to RECLAIM_LEAVES leaves of its extents.

        Returns:
            Whether the orphan is gone; otherwise call again.

        Raises:
            CorruptError, DeviceError: a part of it cannot be read. The orphan stays.
        """
        assert ino in self.orphans
        for _ in range(RECLAIM_LEAVES):
            with self._parts.begin(TIER_REMOVE) as operation:
                self._parts.changed = True
                if self._parts.orphans.reclaim(ino, operation):
                    return True
        return False

    # --- replaying -------------------------------------------------------------------------------

    def set_clock(self, now_ns: int | None, *, kernel_keeps_times: bool) -> None:
        """Set the time of the operations that follow, as a call of the log says.

        Args:
            now_ns: None for the time of the system.
            kernel_keeps_times: the operations on data leave the times of the file alone.
        """
        self._parts.replay_ns = now_ns
        self._parts.kernel_keeps_times = kernel_keeps_times

    def allow_links_to_orphans(self) -> set[int]:
        """Let `link` name any orphan, not only those made without a name. Returns the others."""
        orphans = self._parts.orphans
        others = orphans.inos - orphans.unnamed
        orphans.unnamed |= others
        return others

    def forbid_links_to_orphans(self, inos: set[int]) -> None:
        """Take back what `allow_links_to_orphans` allowed."""
        self._parts.orphans.unnamed -= inos

    # --- freezing --------------------------------------------------------------------------------

    def flush(self) -> None:
        """Put all changes in memory into the tree. Admission has promised the room."""
        with self.operation.begin_admitted() as operation:
            operation.change_unlogged()
            for inode in self.data.flush(self.inodes.get):
                self.inodes.touch(inode)
            self._parts.orphans.flush()
            self.inodes.flush()
            self._parts.changed = False
