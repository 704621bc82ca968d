"""The state of one mount that all handlers share: node ids, attributes, lookup counts, orphans.

A node id for the kernel is (root id, inode number): unique over the live volume and all snapshots.
Node 1 is the root directory of the live volume, also after a rollback gave that another root id. An
old node id keeps naming the tree for which it was given out.

Programs see another number (st_ino, d_ino): for files of snapshots the node id, for live files the
plain inode number. So du, find, tar and rsync never confuse two files, a file keeps its number over
a rollback, and 32-bit programs can read directories.

Only this daemon changes the tree. So the kernel may cache names and attributes for long, and a
rollback invalidates them.
"""

import errno
import logging
import os
import stat
import time
from typing import NamedTuple

from cowfs.daemon.commits import Committer
from cowfs.daemon.fuse import pyfuse3, show_numbers
from cowfs.daemon.lookups import Lookups
from cowfs.daemon.options import MountOptions
from cowfs.daemon.privileges import SET_ID
from cowfs.errors import CowfsError, posix_error
from cowfs.files.items import INO_MAX, ROOT_INO, Inode
from cowfs.files.volume import Volume
from cowfs.history.filesystem import Filesystem

log = logging.getLogger(__name__)

INO_BITS = 40
ROOT_NODE = 1  # FUSE_ROOT_ID
SNAPSHOTS_NODE = 2  # the directory .snapshots: inode 2 of root 0, and no root has the id 0
SNAPSHOTS_NAME = b".snapshots"
# The number of .snapshots that programs see fits in 32 bits until a file may have that number.
SNAPSHOTS_NUMBER, SNAPSHOTS_NUMBER_LATER = (1 << 32) - 1, 1 << 63
TIMEOUT_S = 86400.0

assert INO_MAX < 1 << INO_BITS


class Nodes:
    """The state of one mount that the handlers (operations.py) share.

    Args:
        filesystem: open.
        committer: its commits; None when the mount is read-only.
        options: of the mount.

    Attributes:
        live: the live volume.
        lookups: lookup counts of its inodes.
        writers: number of handles open for writing, by node id.
    """

    def __init__(
        self, filesystem: Filesystem, committer: Committer | None, options: MountOptions
    ) -> None:
        self.filesystem = filesystem
        self.committer = committer
        self._snapshots_served = options.snapshots != "disabled"
        self._access_times = options.access_times
        self._strict_times = options.access_times and options.strict_access_times
        self.lookups = Lookups()
        # Of the volume that was live before the last rollback; its nodes start at `_old_base`.
        self._old_lookups = self.lookups
        self.writers: dict[int, int] = {}
        self._reclaims: list[int] = []  # orphans that are reclaimed in steps
        self._has_writeback = options.writeback and committer is not None
        self._set_live()
        self._old_base = self._live_base
        self._uid, self._gid = os.getuid(), os.getgid()
        self._started_ns = time.time_ns()

    def _set_live(self) -> None:
        self.live = self.filesystem.live
        if self._has_writeback:
            self.live.leave_times_to_kernel()
        self._live_base = self.filesystem.record.root_id << INO_BITS
        self._show_numbers()

    def _show_numbers(self) -> None:
        is_free = self.live.inodes.next_ino <= SNAPSHOTS_NUMBER
        show_numbers(
            plain_base=self._live_base,
            plain_mask=INO_MAX,
            odd_node=SNAPSHOTS_NODE,
            odd_number=SNAPSHOTS_NUMBER if is_free else SNAPSHOTS_NUMBER_LATER,
        )

    # --- node ids ---------------------------------------------------------------------------------

    def resolve(self, node: int) -> tuple[Volume, int]:
        """The volume and inode number of a node id. Raises OSError ESTALE if its root is gone."""
        ino = node - self._live_base
        if 0 < ino <= INO_MAX:
            return self.live, ino
        if node == ROOT_NODE:
            return self.live, ROOT_INO
        volume = self.filesystem.volume(node >> INO_BITS)
        if volume is None:
            raise posix_error(errno.ESTALE)
        return volume, node & INO_MAX

    def resolve_for_change(self, node: int) -> tuple[Volume, int]:
        """As `resolve`, for the live volume only.

        Raises:
            OSError: EROFS for a node of a snapshot; ESTALE for one of a volume that a rollback
                replaced.
        """
        volume, ino = self.resolve(node)
        if volume is not self.live:
            stale = volume.tree.owner << INO_BITS | ino
            raise posix_error(errno.ESTALE if self._was_live(stale) else errno.EROFS)
        return volume, ino

    def _was_live(self, node: int) -> bool:
        """Whether a node is of a volume that was live before a rollback."""
        record = self.filesystem.catalog.root(node >> INO_BITS)
        return record is None or record.automatic

    def attributes(self, volume: Volume, inode: Inode) -> pyfuse3.EntryAttributes:
        """The kernel answer for an inode, cached in the inode until it is touched: read only."""
        entry: pyfuse3.EntryAttributes | None = inode.answer
        if entry is not None:
            return entry
        entry = pyfuse3.EntryAttributes()  # its defaults are those of a regular file
        ino, mode = inode.ino, inode.mode
        file_type = mode & 0o170000
        if volume is self.live:
            entry.st_ino = self._live_base + ino if ino != ROOT_INO else ROOT_NODE
        else:
            entry.st_ino = volume.tree.owner << INO_BITS | ino
            if file_type == stat.S_IFREG:
                mode &= ~SET_ID  # a program with a hole that was fixed since must not run set-id
        entry.entry_timeout = TIMEOUT_S
        entry.attr_timeout = TIMEOUT_S
        entry.st_mode = mode
        if inode.nlink != 1:
            entry.st_nlink = inode.nlink
        if inode.uid:
            entry.st_uid = inode.uid
        if inode.gid:
            entry.st_gid = inode.gid
        if file_type == stat.S_IFREG:
            entry.st_blocks = volume.stat_blocks(inode)
        elif file_type in (stat.S_IFCHR, stat.S_IFBLK):
            entry.st_rdev = inode.rdev
        entry.st_size = inode.size_bytes
        entry.st_atime_ns = inode.atime_ns
        entry.st_mtime_ns = inode.mtime_ns
        entry.st_ctime_ns = inode.ctime_ns
        inode.answer = entry
        return entry

    def found(self, volume: Volume, inode: Inode) -> pyfuse3.EntryAttributes:
        """`attributes` for the answer of a lookup, which adds one to the lookup count."""
        if volume is self.live:
            self.lookups.add(inode.ino)
        return self.attributes(volume, inode)

    def accessed(self, volume: Volume, inode: Inode) -> None:
        """Update atime after a read, if the mount options ask for it."""
        if self._access_times and not self._is_paused:
            volume.accessed(inode, strict=self._strict_times)

    def changed(self) -> None:
        """Start a commit if one is due. Called after every change."""
        if self.committer is not None:
            self.committer.kick_if_due()

    # --- the directory .snapshots -----------------------------------------------------------------

    def is_snapshots_parent(self, node: int) -> bool:
        return node == ROOT_NODE and self._snapshots_served

    def is_snapshot_root(self, volume: Volume, ino: int) -> bool:
        """Whether an inode is the root directory of a snapshot."""
        return ino == ROOT_INO and volume is not self.live

    def snapshots_attributes(self) -> pyfuse3.EntryAttributes:
        """The kernel answer for the directory .snapshots."""
        self._show_numbers()
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(SNAPSHOTS_NODE)
        entry.entry_timeout = TIMEOUT_S
        entry.attr_timeout = 1.0
        entry.st_mode = pyfuse3.ModeT(stat.S_IFDIR | 0o500)
        entry.st_nlink = 2
        entry.st_uid, entry.st_gid = self._uid, self._gid
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = self._started_ns
        return entry

    def refuse_reserved(self, parent: int, name: bytes) -> None:
        """Raise EROFS for a new name inside .snapshots, EEXIST for the name .snapshots itself."""
        if parent == SNAPSHOTS_NODE:
            raise posix_error(errno.EROFS)
        if name == SNAPSHOTS_NAME and self.is_snapshots_parent(parent):
            raise posix_error(errno.EEXIST)

    # --- orphans ----------------------------------------------------------------------------------

    @property
    def _is_paused(self) -> bool:
        """Whether the mount was remounted read-only: nothing may be written until it is undone."""
        return self.committer is not None and self.committer.paused

    def forget(self, node: int, count: int) -> None:
        """Lower the lookup count of a node by `count`. An orphan with count 0 is reclaimed."""
        ino = node - self._live_base
        if not 0 < ino <= INO_MAX:
            self._old_lookups.drop(node - self._old_base, count)
        elif self.lookups.drop(ino, count) == 0 and ino in self.live.orphans:
            self.reclaim(ino)

    def reclaim(self, ino: int) -> None:
        """Remove an orphan, or begin to: `reclaim_some` continues with a large one."""
        try:
            if not self.live.reclaim(ino):
                self._reclaims.append(ino)
        except CowfsError as error:
            log.warning("deleted inode %d keeps its space until the next mount: %s", ino, error)

    def reclaim_some(self) -> bool:
        """Do one step of removing large deleted files. Returns whether more is left."""
        if self._is_paused:
            return False
        if self._reclaims:
            ino = self._reclaims.pop()
            if ino in self.live.orphans:
                self.reclaim(ino)
        return bool(self._reclaims)

    def lost_name(self, inode: Inode | None) -> None:
        """Reclaim an inode that has lost its last name, unless the kernel still knows it."""
        if inode is not None and not inode.nlink and inode.ino not in self.lookups:
            self.reclaim(inode.ino)
        self.changed()

    # --- rollback ---------------------------------------------------------------------------------

    def writer_inos(self) -> list[int]:
        """Inode numbers of the files of the live volume that are open for writing."""
        return [
            node - self._live_base if node != ROOT_NODE else ROOT_INO
            for node in self.writers
            if 0 < node - self._live_base <= INO_MAX
        ]

    def switch(self) -> "Stale":
        """Switch to the new live volume of the filesystem, after a rollback. Cannot fail.

        Returns:
            What the kernel must forget.
        """
        old = self.live
        old.inodes.forget_answers()
        self._old_lookups, self._old_base = self.lookups, self._live_base
        self.lookups = Lookups()
        self._set_live()
        self._reclaims = list(self.live.orphans)  # they were open when the snapshot was taken
        return Stale((old, self.live), self._old_base, self._old_lookups)


class Stale(NamedTuple):
    """What the kernel has cached when a rollback replaces the live volume.

    Attributes:
        volumes: the old and the new live volume; names of either root directory may be cached.
        base: node id of inode 0 of the old live volume.
        lookups: lookup counts of the old live volume.
    """

    volumes: tuple[Volume, Volume]
    base: int
    lookups: Lookups


def invalidate(stale: Stale, names: list[bytes]) -> None:
    """Make the kernel forget the old live volume. Call it from a thread, so that the loop runs.

    Args:
        stale: from `Nodes.switch`.
        names: all names in the root directories of both volumes.
    """
    for name in names:
        try:
            pyfuse3.invalidate_entry(pyfuse3.InodeT(ROOT_NODE), pyfuse3.FileNameT(name))
        except OSError as error:
            if error.errno != errno.ENOENT:  # the kernel did not have it cached
                log.warning("cannot invalidate %r: %s", name, error)
    pyfuse3.invalidate_inode(pyfuse3.InodeT(ROOT_NODE))
    # Inodes that the kernel still knows are open, or are working directories. They belong to a
    # snapshot now, so the kernel must not go on showing the number of the live file.
    for ino in stale.lookups.inos():
        try:
            pyfuse3.invalidate_inode(pyfuse3.InodeT(stale.base | ino), attr_only=True)
        except OSError as error:
            if error.errno != errno.ENOENT:  # forgotten meanwhile
                log.warning("cannot invalidate inode %d: %s", ino, error)
