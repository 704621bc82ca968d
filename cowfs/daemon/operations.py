"""The FUSE operations: each handler turns a kernel request into calls on a volume, and answers it.

A handler that need not wait awaits nothing. answers.py turns exceptions into errnos. Node ids and
attributes, which the handlers share, are in nodes.py.
"""

import copy
import errno
import functools
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from typing import Any

import trio

from cowfs.daemon.answers import answers, answers_now, waits
from cowfs.daemon.commits import Committer
from cowfs.daemon.fuse import (
    pyfuse3,
    times_set_to_now,
    umask_is_ours,
    write_kills_privileges,
)
from cowfs.daemon.narrow import NarrowListings
from cowfs.daemon.nodes import (
    ROOT_NODE,
    SNAPSHOTS_NAME,
    SNAPSHOTS_NODE,
    TIMEOUT_S,
    Nodes,
)
from cowfs.daemon.options import MountOptions
from cowfs.daemon.privileges import SET_ID, cleared_by_setattr, group_bit, is_member
from cowfs.daemon.writeback import Writeback
from cowfs.errors import CorruptError, posix_error
from cowfs.files.acl import ACCESS_NAME
from cowfs.files.acl import NAMES as ACL_NAMES
from cowfs.files.calls import Changes
from cowfs.files.items import INO_MAX, NAME_BYTES_MAX, ROOT_INO, Inode
from cowfs.files.volume import Volume
from cowfs.history.filesystem import Filesystem
from cowfs.storage.format import BLOCK_SIZE_BYTES

log = logging.getLogger(__name__)

UNNAMED = b"/"  # the name in the request of O_TMPFILE; no file can have it
# A file handle is the node id, with this bit set if it is open for writing.
WRITER_BIT = 1 << 63
HANDLE_NODE = WRITER_BIT - 1
# A directory handle is the node id. Directories opened by 32-bit programs have handles from here
# upwards, which no node id with WRITER_BIT reaches.
NARROW_HANDLES = WRITER_BIT | 1 << 62
COOKIE_DOT, COOKIE_DOT_DOT, COOKIE_SNAPSHOTS = 1, 2, 3
# Snapshots in one readdir answer. Reading the root directory of each may take 0.2 ms, and the
# kernel has room for a thousand.
SNAPSHOTS_LISTED_MAX = 8
Reply = Callable[[Any, bytes, Any, int], bool]  # as pyfuse3.readdir_reply
XATTR_NAMESPACES = (b"user.", b"trusted.", b"security.")


class Operations(pyfuse3.Operations):
    """The handlers of one mount. pyfuse3 and the module `_session` call them.

    Args:
        filesystem: open.
        committer: its commits; None when the mount is read-only.
        options: of the mount.

    Attributes:
        nodes: node ids, and which inodes the kernel knows.
        writeback: the kernel's write-back cache; None if it is off.
    """

    # pyfuse3 reads this, enable_acl and enable_writeback_cache when it mounts.
    supports_dot_lookup = True

    def __init__(
        self, filesystem: Filesystem, committer: Committer | None, options: MountOptions
    ) -> None:
        super().__init__()
        self.filesystem = filesystem
        self.committer = committer
        self.nodes = nodes = Nodes(filesystem, committer, options)
        self._resolve = nodes.resolve
        self._resolve_for_change = nodes.resolve_for_change
        self._attributes = nodes.attributes
        self._found = nodes.found
        self._accessed = nodes.accessed
        self._changed = nodes.changed
        self._lost_name = nodes.lost_name
        self._snapshots_shown = options.snapshots == "visible"
        self._xattrs = options.xattrs
        self.enable_acl = options.acls and options.xattrs
        self._keep_cache = not (options.access_times and options.strict_access_times)
        self.writeback: Writeback | None = None
        if options.writeback and committer is not None:
            self.writeback = Writeback(options.mountpoint, nodes.writers.keys)
        self.enable_writeback_cache = self.writeback is not None
        self._absent = pyfuse3.EntryAttributes()
        self._absent.st_ino = pyfuse3.InodeT(0)
        self._absent.entry_timeout = TIMEOUT_S
        self._narrow = NarrowListings(NARROW_HANDLES, pyfuse3.readdir_reply)

    # --- names ------------------------------------------------------------------------------------

    @answers
    def lookup(self, parent: int, name: bytes, ctx: object) -> pyfuse3.EntryAttributes:
        if parent == SNAPSHOTS_NODE:
            return self._lookup_snapshot(name)
        volume, ino = self._resolve(parent)
        if name == SNAPSHOTS_NAME and self.nodes.is_snapshots_parent(parent):
            return self.nodes.snapshots_attributes()
        inode: Inode | None
        if name == b".":  # also of a file: so the kernel resolves a file handle (NFS)
            inode = volume.get(ino)
        elif name == b"..":
            if self.nodes.is_snapshot_root(volume, ino):
                return self.nodes.snapshots_attributes()
            inode = volume.lookup(ino, name)
        else:
            inode = volume.find(ino, name)
        if inode is None:
            return self._absent
        return self._found(volume, inode)

    def _lookup_snapshot(self, name: bytes) -> pyfuse3.EntryAttributes:
        if name == b".":
            return self.nodes.snapshots_attributes()
        if name == b"..":
            return self._found(self.nodes.live, self.nodes.live.get(ROOT_INO))
        record = None
        if len(name) <= NAME_BYTES_MAX:
            record = self.filesystem.catalog.find(name.decode("utf-8", "surrogateescape"))
        volume = None if record is None else self.filesystem.volume(record.root_id)
        if volume is None:
            raise posix_error(errno.ENOENT)
        entry = copy.copy(self._attributes(volume, volume.get(ROOT_INO)))
        entry.entry_timeout = 0  # commands make and delete snapshots behind the kernel's back
        return entry

    @waits
    async def forget(self, inode_list: list[tuple[int, int]]) -> None:
        for node, count in inode_list:
            self.nodes.forget(node, count)

    @answers
    def mknod(
        self, parent: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._make(parent, name, mode, ctx, rdev)

    @answers
    def mkdir(
        self, parent: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._make(parent, name, mode, ctx)

    def _make(
        self, parent: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext, rdev: int = 0
    ) -> pyfuse3.EntryAttributes:
        self.nodes.refuse_reserved(parent, name)
        volume, directory = self._resolve_for_change(parent)
        inode = self._create(volume, directory, name, mode, ctx, rdev)
        self._changed()
        return self._found(volume, inode)

    def _create(
        self,
        volume: Volume,
        directory: int,
        name: bytes,
        mode: int,
        ctx: pyfuse3.RequestContext,
        rdev: int = 0,
    ) -> Inode:
        # Else the kernel has applied the umask to the mode already, also below a default ACL.
        umask = ctx.umask if umask_is_ours() else 0
        inherits, uid, gid = self.enable_acl, ctx.uid, ctx.gid
        if name == UNNAMED:
            return volume.create_unnamed(directory, mode, uid, gid, umask=umask, inherits=inherits)
        return volume.create(directory, name, mode, uid, gid, rdev, umask=umask, inherits=inherits)

    @answers
    def symlink(
        self, parent: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        self.nodes.refuse_reserved(parent, name)
        volume, directory = self._resolve_for_change(parent)
        inode = volume.symlink(directory, name, target, ctx.uid, ctx.gid)
        self._changed()
        return self._found(volume, inode)

    @answers
    def link(
        self, node: int, new_parent: int, new_name: bytes, ctx: object
    ) -> pyfuse3.EntryAttributes:
        self.nodes.refuse_reserved(new_parent, new_name)
        volume, ino = self._resolve_for_change(node)
        _, directory = self._resolve_for_change(new_parent)
        inode = volume.link(ino, directory, new_name)
        self._changed()
        return self._found(volume, inode)

    @answers
    def unlink(self, parent: int, name: bytes, ctx: object) -> None:
        if parent == SNAPSHOTS_NODE:
            raise posix_error(errno.EROFS)
        volume, directory = self._resolve_for_change(parent)
        self._lost_name(volume.unlink(directory, name))

    @answers
    def rmdir(self, parent: int, name: bytes, ctx: object) -> None:
        if parent == SNAPSHOTS_NODE:
            raise posix_error(errno.EROFS)  # only `cowfs snapshot delete` deletes snapshots
        if name == SNAPSHOTS_NAME and self.nodes.is_snapshots_parent(parent):
            raise posix_error(errno.EBUSY)
        volume, directory = self._resolve_for_change(parent)
        self._lost_name(volume.rmdir(directory, name))

    @answers
    def rename(
        self,
        parent: int,
        name: bytes,
        new_parent: int,
        new_name: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        for directory, part in ((parent, name), (new_parent, new_name)):
            if directory == SNAPSHOTS_NODE:
                raise posix_error(errno.EROFS)
            if part == SNAPSHOTS_NAME and self.nodes.is_snapshots_parent(directory):
                raise posix_error(errno.EBUSY)
        volume, old_directory = self._resolve_for_change(parent)
        _, directory = self._resolve_for_change(new_parent)
        lost = volume.rename(
            old_directory, name, directory, new_name, flags, uid=ctx.uid, gid=ctx.gid
        )
        self._lost_name(lost)

    # --- attributes -------------------------------------------------------------------------------

    @answers
    def getattr(self, node: int, ctx: object) -> pyfuse3.EntryAttributes:
        if node == SNAPSHOTS_NODE:
            return self.nodes.snapshots_attributes()
        volume, ino = self._resolve(node)
        return self._attributes(volume, volume.get(ino))

    @answers
    def setattr(
        self,
        node: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        if node == SNAPSHOTS_NODE:
            raise posix_error(errno.EROFS)
        volume, ino = self._resolve_for_change(node)
        bits, clear_capability = cleared_by_setattr(volume.get(ino), attr, fields, ctx)
        now_ns = time.time_ns()
        atime_now, mtime_now = times_set_to_now()
        changes = Changes(
            clear_bits=bits,
            clear_capability=clear_capability,
            mode=attr.st_mode if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            size_bytes=attr.st_size if fields.update_size else None,
            atime_ns=(now_ns if atime_now else attr.st_atime_ns) if fields.update_atime else None,
            mtime_ns=(now_ns if mtime_now else attr.st_mtime_ns) if fields.update_mtime else None,
            ctime_ns=attr.st_ctime_ns if fields.update_ctime else None,
        )
        inode = volume.setattr(ino, changes)
        self._changed()
        return self._attributes(volume, inode)

    @answers
    def readlink(self, node: int, ctx: object) -> bytes:
        volume, ino = self._resolve(node)
        target = volume.readlink(ino)
        self._accessed(volume, volume.get(ino))
        return target

    @answers
    def access(self, node: int, mode: int, ctx: object) -> bool:
        return True  # default_permissions: the kernel has checked

    @answers
    def statfs(self, ctx: object) -> pyfuse3.StatvfsData:
        space = self.filesystem.space()
        answer = pyfuse3.StatvfsData()
        answer.f_bsize = answer.f_frsize = BLOCK_SIZE_BYTES
        answer.f_blocks = space.total - space.system
        answer.f_bfree = max(0, space.free + space.pending - space.promised)
        answer.f_bavail = space.available
        inodes = self.nodes.live.inodes
        free_inodes = min(INO_MAX - inodes.next_ino, space.available * 8)
        answer.f_files = inodes.count + free_inodes
        answer.f_ffree = answer.f_favail = free_inodes
        answer.f_namemax = NAME_BYTES_MAX
        return answer

    # --- xattrs -----------------------------------------------------------------------------------

    def _check_namespace(self, name: bytes) -> None:
        """Refuse namespaces that the kernel's own filesystems lack. The kernel checks rights."""
        if not self._xattrs:
            raise posix_error(errno.ENOSYS)
        if name.startswith(XATTR_NAMESPACES):
            if name in XATTR_NAMESPACES:
                raise posix_error(errno.EINVAL)
        elif name not in ACL_NAMES or not self.enable_acl:
            raise posix_error(errno.EOPNOTSUPP)

    @answers
    def getxattr(self, node: int, name: bytes, ctx: object) -> bytes:
        self._check_namespace(name)
        if node == SNAPSHOTS_NODE:
            raise posix_error(errno.ENODATA)
        volume, ino = self._resolve(node)
        # A shortcut: without the module `_session` the kernel asks before every write.
        if not volume.get(ino).xattr_count:
            raise pyfuse3.FUSEError(errno.ENODATA)
        return volume.getxattr(ino, name)

    @answers
    def listxattr(self, node: int, ctx: pyfuse3.RequestContext) -> Iterator[bytes]:
        if not self._xattrs:
            raise posix_error(errno.ENOSYS)
        if node == SNAPSHOTS_NODE:
            return iter(())
        volume, ino = self._resolve(node)
        names = volume.listxattr(ino)
        if ctx.uid:  # ext4 hides these too; the kernel refuses to read them
            names = [name for name in names if not name.startswith(b"trusted.")]
        if not self.enable_acl:
            names = [name for name in names if name not in ACL_NAMES]
        return iter(names)

    @answers
    def setxattr(self, node: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext) -> None:
        self._check_namespace(name)
        if node == SNAPSHOTS_NODE:
            raise posix_error(errno.EROFS)
        volume, ino = self._resolve_for_change(node)
        keep_setgid = True
        if name == ACCESS_NAME:
            inode = volume.get(ino)
            keep_setgid = not inode.mode & stat.S_ISGID or is_member(ctx, inode.gid)
        volume.setxattr(ino, name, value, keep_setgid=keep_setgid)
        self._changed()

    @answers
    def removexattr(self, node: int, name: bytes, ctx: object) -> None:
        self._check_namespace(name)
        if node == SNAPSHOTS_NODE:
            raise posix_error(errno.EROFS)
        volume, ino = self._resolve_for_change(node)
        volume.removexattr(ino, name)
        self._changed()

    # --- files ------------------------------------------------------------------------------------

    @answers
    def open(self, node: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        handle = node
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            volume, ino = self._resolve_for_change(node)
            self.filesystem.store.require_writable()
            if flags & os.O_TRUNC:
                inode = volume.get(ino)
                bits = 0
                if ctx.uid:
                    bits = stat.S_ISUID | group_bit(inode, inode.mode, ctx)
                volume.setattr(ino, Changes(size_bytes=0, clear_bits=bits, clear_capability=True))
                self._changed()
            self.nodes.writers[node] = self.nodes.writers.get(node, 0) + 1
            handle |= WRITER_BIT
        else:
            volume, ino = self._resolve(node)
            volume.get(ino)
        # Without keep_cache the kernel drops the file's pages at each open, and reads them again.
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(handle), keep_cache=self._keep_cache)

    @answers
    def create(
        self, parent: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        self.nodes.refuse_reserved(parent, name)
        volume, directory = self._resolve_for_change(parent)
        inode = self._create(volume, directory, name, stat.S_IFREG | mode & 0o7777, ctx)
        self._changed()
        entry = self._found(volume, inode)
        node = entry.st_ino
        if flags & os.O_ACCMODE == os.O_RDONLY:
            return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(node), keep_cache=True), entry
        self.nodes.writers[node] = 1
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(node | WRITER_BIT), keep_cache=True), entry

    @waits
    async def read(self, handle: int, offset: int, size: int) -> Any:
        volume, ino = self._resolve(handle & HANDLE_NODE)
        inode = volume.get(ino)
        reading = volume.reading(ino, offset, size)
        self._accessed(volume, inode)
        data = reading.fetch(wait=False)
        if data is None:
            data = await self._read_waiting(volume, ino, offset, size)
        return data

    async def _read_waiting(self, volume: Volume, ino: int, offset: int, size: int) -> Any:
        reading = volume.reading(ino, offset, size)
        try:
            return await trio.to_thread.run_sync(functools.partial(reading.fetch, wait=True))
        except CorruptError:
            # While the thread waited, the blocks may have been freed and reused. Read once more,
            # from where the tree has the data now; those blocks cannot be reused during this call.
            return volume.reading(ino, offset, size).fetch(wait=True)

    @waits
    async def write(self, handle: int, offset: int, data: bytes) -> int:
        volume, ino = self._resolve_for_change(handle & HANDLE_NODE)
        inode = volume.write(ino, offset, data)
        if (inode.mode & SET_ID or inode.xattr_count) and write_kills_privileges():
            bits = SET_ID if inode.mode & stat.S_IXGRP else stat.S_ISUID
            volume.setattr(ino, Changes(clear_bits=bits, clear_capability=True))
        committer = self.committer
        if committer is not None:
            committer.kick_if_due()
            if committer.over_limit:
                await committer.throttle()
        return len(data)

    @answers
    def flush(self, handle: int) -> None:
        raise posix_error(errno.ENOSYS)  # close() needs no work: the kernel then stops asking

    @answers
    def release(self, handle: int) -> None:
        if handle & WRITER_BIT:
            node = handle & HANDLE_NODE
            left = self.nodes.writers.pop(node, 0) - 1
            if left > 0:
                self.nodes.writers[node] = left

    @waits
    async def fsync(self, handle: int, datasync: bool) -> None:
        if self.committer is not None:
            await self.committer.sync()

    # --- operations that pyfuse3 lacks, called by fuse.session ------------------------------------

    @answers_now
    def fallocate(self, node: int, mode: int, offset: int, length: int) -> int:
        volume, ino = self._resolve_for_change(node)
        volume.allocate(ino, mode, offset, length)
        self._changed()
        return 0

    @answers_now
    def lseek(self, node: int, offset: int, whence: int) -> int:
        # The kernel would ask before it has sent its dirty pages. After ENOSYS it answers by
        # itself.
        if self.writeback is not None:
            raise posix_error(errno.ENOSYS)
        volume, ino = self._resolve(node)
        return volume.seek(ino, offset, whence)

    @answers_now
    def copy_file_range(
        self, node_in: int, offset_in: int, node_out: int, offset_out: int, length: int
    ) -> int:
        source, source_ino = self._resolve(node_in)
        volume, ino = self._resolve_for_change(node_out)
        shared = volume.reflink(source, source_ino, offset_in, ino, offset_out, length)
        self._changed()
        return shared

    def birth_ns(self, node: int) -> int | None:
        """The birth time of a node in nanoseconds; None for .snapshots."""
        if node == SNAPSHOTS_NODE:
            return None
        volume, ino = self._resolve(node)
        return volume.get(ino).btime_ns

    # --- directories ------------------------------------------------------------------------------

    @answers
    def opendir(self, node: int, ctx: pyfuse3.RequestContext) -> int:
        if self.writeback is not None and self.writeback.is_ours(ctx.pid):
            return node | WRITER_BIT
        if node != SNAPSHOTS_NODE:
            volume, ino = self._resolve(node)
            if not stat.S_ISDIR(volume.get(ino).mode):
                raise posix_error(errno.ENOTDIR)
        narrow = self._narrow.open(node, ctx.pid)
        return node if narrow is None else narrow

    @answers
    def readdir(self, handle: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        narrow = self._narrow.get(handle)
        if narrow is not None:
            self._list(narrow.node, narrow.seek(start_id), token, narrow.reply)
        else:
            self._list(handle, start_id, token, pyfuse3.readdir_reply)

    def _list(self, node: int, start_id: int, token: pyfuse3.ReaddirToken, reply: Reply) -> None:
        if node == SNAPSHOTS_NODE:
            self._list_snapshots(start_id, token, reply)
            return
        volume, ino = self._resolve(node)
        inode = volume.get(ino)
        if not start_id:
            self._accessed(volume, inode)
        if start_id < COOKIE_DOT and not reply(
            token, b".", self._attributes(volume, inode), COOKIE_DOT
        ):
            return
        if start_id < COOKIE_DOT_DOT and not reply(
            token, b"..", self._parent_attributes(volume, inode), COOKIE_DOT_DOT
        ):
            return
        shown = node == ROOT_NODE and self._snapshots_shown
        if (
            shown
            and start_id < COOKIE_SNAPSHOTS
            and not reply(
                token, SNAPSHOTS_NAME, self.nodes.snapshots_attributes(), COOKIE_SNAPSHOTS
            )
        ):
            return
        if not inode.nlink:
            return
        live = volume is self.nodes.live
        get, known, attributes = volume.inodes.get, self.nodes.lookups.add, self._attributes
        for cookie, entry in volume.listing(ino, max(start_id, COOKIE_SNAPSHOTS)):
            try:
                found = get(entry.ino)
            except OSError as error:
                log.error(
                    "name %r in directory %d is left out of the listing: %s", entry.name, ino, error
                )
                continue
            if not reply(token, entry.name, found.answer or attributes(volume, found), cookie):
                return
            if live:
                known(entry.ino)

    def _parent_attributes(self, volume: Volume, inode: Inode) -> pyfuse3.EntryAttributes:
        if self.nodes.is_snapshot_root(volume, inode.ino):
            return self.nodes.snapshots_attributes()
        parent = inode
        try:
            if inode.nlink:
                parent = volume.get(inode.rdev)
        except OSError as error:
            log.error("the parent of directory %d is listed as itself: %s", inode.ino, error)
        return self._attributes(volume, parent)

    def _list_snapshots(self, start_id: int, token: pyfuse3.ReaddirToken, reply: Reply) -> None:
        own = self.nodes.snapshots_attributes()
        if start_id < COOKIE_DOT and not reply(token, b".", own, COOKIE_DOT):
            return
        parent = self._attributes(self.nodes.live, self.nodes.live.get(ROOT_INO))
        if start_id < COOKIE_DOT_DOT and not reply(token, b"..", parent, COOKIE_DOT_DOT):
            return
        shown = 0
        next_id = max(0, start_id - COOKIE_SNAPSHOTS + 1)
        for record in self.filesystem.catalog.roots_from(next_id):
            volume = self.filesystem.volume(record.root_id)
            if volume is None or volume is self.nodes.live:
                continue
            try:
                entry = copy.copy(self._attributes(volume, volume.get(ROOT_INO)))
            except OSError as error:
                log.error("snapshot %s is left out of .snapshots: %s", record.name, error)
                continue
            entry.entry_timeout = 0
            cookie = record.root_id + COOKIE_SNAPSHOTS
            if not reply(token, record.name.encode(), entry, cookie):
                return
            shown += 1
            if shown == SNAPSHOTS_LISTED_MAX:
                return  # the kernel then asks for the rest

    @answers
    def releasedir(self, handle: int) -> None:
        if handle & WRITER_BIT and not self._narrow.close(handle) and self.writeback is not None:
            self.writeback.released()

    @waits
    async def fsyncdir(self, node: int, datasync: bool) -> None:
        if self.committer is not None:
            await self.committer.sync()
