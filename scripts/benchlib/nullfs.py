"""A filesystem that stores nothing: the upper limit that pyfuse3 allows, as a peer of cowfs.

Names, attributes and lookup counts are real, in memory. Data is discarded and reads as zeros.
The answers keep the kernel from asking again: long timeouts, negative entries, and ENOSYS for FLUSH
and (without --xattrs) for extended attributes.

    nullfs.py MOUNTPOINT [--loop burst|stock] [--xattrs]

runs in the foreground until unmounted or until SIGTERM, and prints "ready" once mounted.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import stat
import sys
import time
from pathlib import Path
from typing import Any

import pyfuse3
import trio

TIMEOUT_S = 3600.0
MOUNT_OPTIONS = ("default_permissions", "nosuid", "nodev")
WORKERS_MAX = 16
WORKERS_IDLE_MAX = 4

_READ_BYTES_MAX = 1 << 20
_ZEROS = bytes(_READ_BYTES_MAX)


class _Node:
    """One inode. `entries` is None for files."""

    __slots__ = ("attributes", "entries", "lookups")

    def __init__(self, number: int, mode: int, uid: int, gid: int) -> None:
        attributes = pyfuse3.EntryAttributes()
        attributes.st_ino = number
        attributes.generation = 0
        attributes.entry_timeout = TIMEOUT_S
        attributes.attr_timeout = TIMEOUT_S
        attributes.st_mode = mode
        attributes.st_nlink = 2 if stat.S_ISDIR(mode) else 1
        attributes.st_uid = uid
        attributes.st_gid = gid
        attributes.st_rdev = 0
        attributes.st_size = 0
        attributes.st_blksize = 4096
        attributes.st_blocks = 0
        now_ns = time.time_ns()
        attributes.st_atime_ns = now_ns
        attributes.st_mtime_ns = now_ns
        attributes.st_ctime_ns = now_ns
        self.attributes = attributes
        self.entries: dict[bytes, int] | None = {} if stat.S_ISDIR(mode) else None
        self.lookups = 0

    def resize(self, size_bytes: int) -> None:
        self.attributes.st_size = size_bytes
        self.attributes.st_blocks = -(-size_bytes // 512)


class NullFilesystem(pyfuse3.Operations):
    """The request handlers. None of them awaits anything.

    Args:
        xattrs: answer GETXATTR with "no such attribute", not ENOSYS. The kernel then asks before
            each write, as it does for a filesystem with extended attributes.
    """

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(self, xattrs: bool = False) -> None:
        super().__init__()
        self._xattrs = xattrs
        root = _Node(pyfuse3.ROOT_INODE, stat.S_IFDIR | 0o755, os.getuid(), os.getgid())
        root.lookups = 1
        self._nodes: dict[int, _Node] = {pyfuse3.ROOT_INODE: root}
        self._next_number = pyfuse3.ROOT_INODE + 1
        self._listings: dict[int, list[tuple[bytes, int]]] = {}
        self._next_listing = 1
        self._missing = pyfuse3.EntryAttributes()
        self._missing.st_ino = 0
        self._missing.entry_timeout = TIMEOUT_S

    def _entries(self, number: int) -> dict[bytes, int]:
        entries = self._nodes[number].entries
        if entries is None:
            raise pyfuse3.FUSEError(errno.ENOTDIR)
        return entries

    def _add(
        self, parent: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        entries = self._entries(parent)
        if name in entries:
            raise pyfuse3.FUSEError(errno.EEXIST)
        number = self._next_number
        self._next_number += 1
        node = _Node(number, mode, ctx.uid, ctx.gid)
        node.lookups = 1
        self._nodes[number] = node
        entries[name] = number
        return node.attributes

    def _drop_link(self, number: int, links: int) -> None:
        node = self._nodes[number]
        node.attributes.st_nlink = max(0, node.attributes.st_nlink - links)
        if not node.lookups and not node.attributes.st_nlink:
            del self._nodes[number]

    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        number = self._entries(parent_inode).get(name)
        if number is None:
            return self._missing
        node = self._nodes[number]
        node.lookups += 1
        return node.attributes

    async def forget(self, inode_list: Any) -> None:
        for number, lookups in inode_list:
            node = self._nodes.get(number)
            if node is None:
                continue
            node.lookups -= lookups
            if node.lookups <= 0 and not node.attributes.st_nlink:
                del self._nodes[number]

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._nodes[inode].attributes

    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        node = self._nodes[inode]
        own = node.attributes
        if fields.update_size:
            node.resize(attr.st_size)
        if fields.update_mode:
            own.st_mode = attr.st_mode
        if fields.update_uid:
            own.st_uid = attr.st_uid
        if fields.update_gid:
            own.st_gid = attr.st_gid
        if fields.update_atime:
            own.st_atime_ns = attr.st_atime_ns
        if fields.update_mtime:
            own.st_mtime_ns = attr.st_mtime_ns
        own.st_ctime_ns = time.time_ns()
        return own

    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        self._nodes[parent_inode].attributes.st_nlink += 1
        return self._add(parent_inode, name, stat.S_IFDIR | mode, ctx)

    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._add(parent_inode, name, mode, ctx)

    async def create(
        self,
        parent_inode: int,
        name: bytes,
        mode: int,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        attributes = self._add(parent_inode, name, stat.S_IFREG | mode, ctx)
        return pyfuse3.FileInfo(fh=attributes.st_ino, keep_cache=True), attributes

    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        number = self._entries(parent_inode).pop(name, None)
        if number is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        self._drop_link(number, 1)

    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        entries = self._entries(parent_inode)
        number = entries.get(name)
        if number is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        if self._entries(number):
            raise pyfuse3.FUSEError(errno.ENOTEMPTY)
        del entries[name]
        self._nodes[parent_inode].attributes.st_nlink -= 1
        self._drop_link(number, 2)

    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        if flags:
            raise pyfuse3.FUSEError(errno.EINVAL)
        source = self._entries(parent_inode_old)
        target = self._entries(parent_inode_new)
        if name_old not in source:
            raise pyfuse3.FUSEError(errno.ENOENT)
        replaced = target.get(name_new)
        number = source.pop(name_old)
        target[name_new] = number
        if replaced is not None and replaced != number:
            self._drop_link(replaced, self._nodes[replaced].attributes.st_nlink)

    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        handle = self._next_listing
        self._next_listing += 1
        self._listings[handle] = list(self._entries(inode).items())
        return handle

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        listing = self._listings[fh]
        nodes = self._nodes
        reply = pyfuse3.readdir_reply
        for index in range(start_id, len(listing)):
            name, number = listing[index]
            node = nodes.get(number)
            if node is None:
                continue
            if not reply(token, name, node.attributes, index + 1):
                break
            node.lookups += 1

    async def releasedir(self, fh: int) -> None:
        del self._listings[fh]

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        if flags & os.O_TRUNC:
            self._nodes[inode].resize(0)
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        size = max(0, min(size, self._nodes[fh].attributes.st_size - off))
        return _ZEROS if size == _READ_BYTES_MAX else _ZEROS[:size]

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        node = self._nodes[fh]
        if off + len(buf) > node.attributes.st_size:
            node.resize(off + len(buf))
        return len(buf)

    async def flush(self, fh: int) -> None:
        raise pyfuse3.FUSEError(errno.ENOSYS)

    async def release(self, fh: int) -> None:
        return

    async def fsync(self, fh: int, datasync: bool) -> None:
        return

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        return

    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        raise pyfuse3.FUSEError(pyfuse3.ENOATTR if self._xattrs else errno.ENOSYS)

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_blocks = data.f_bfree = data.f_bavail = 1 << 28
        data.f_files = data.f_ffree = data.f_favail = 1 << 30
        data.f_namemax = 255
        return data


async def serve(mountpoint: str, filesystem: pyfuse3.Operations, name: str) -> None:
    """Mount, print "ready", and serve until unmounted or until SIGTERM or SIGINT."""
    pyfuse3.init(filesystem, mountpoint, {*MOUNT_OPTIONS, f"fsname={name}", "subtype=null"})
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:

            async def wait_for_signal() -> None:
                async for _ in signals:
                    pyfuse3.terminate()
                    return

            nursery.start_soon(wait_for_signal)
            print("ready", flush=True)
            try:
                await pyfuse3.main(min_tasks=WORKERS_IDLE_MAX, max_tasks=WORKERS_MAX)
            finally:
                pyfuse3.close(unmount=True)
            nursery.cancel_scope.cancel()


def main() -> int:
    parser = argparse.ArgumentParser(description="mount a filesystem that stores nothing")
    parser.add_argument("mountpoint")
    parser.add_argument("--loop", choices=("burst", "stock"), default="burst")
    parser.add_argument("--xattrs", action="store_true", help="answer GETXATTR")
    arguments = parser.parse_args()
    if arguments.loop == "burst":
        sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
        from cowfs.daemon.loop import install_burst_loop

        install_burst_loop()
    name = "null" if arguments.loop == "burst" else "null-stock"
    trio.run(serve, arguments.mountpoint, NullFilesystem(arguments.xattrs), name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
