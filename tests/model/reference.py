"""Plain-Python models: what a cowfs filesystem must look like, whatever its implementation.

`DictTree` is a sorted dictionary. `ReferenceFiles` is a filesystem of dictionaries; its operations
raise the errno that the real ones must raise. `ReferenceHistory` keeps copies of it by snapshot
name.
"""

import errno
import os
import stat
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field

ROOT = 1
BLOCK = 4096
NAME_BYTES_MAX = 255
ZEROS = bytes(BLOCK)


class DictTree:
    """A sorted map from bytes to bytes."""

    def __init__(self, entries: dict[bytes, bytes] | None = None) -> None:
        self.entries = dict(entries or {})

    def copy(self) -> "DictTree":
        return DictTree(self.entries)

    def keys(self) -> list[bytes]:
        return sorted(self.entries)

    def floor(self, key: bytes) -> tuple[bytes, bytes] | None:
        keys = self.keys()
        at = bisect_right(keys, key)
        return (keys[at - 1], self.entries[keys[at - 1]]) if at else None

    def items(self, start: bytes, stop: bytes) -> list[tuple[bytes, bytes]]:
        keys = self.keys()
        found = keys[bisect_left(keys, start) : bisect_left(keys, stop)]
        return [(key, self.entries[key]) for key in found]


def refuse(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@dataclass(slots=True)
class ReferenceFile:
    """One inode. `blocks` maps block index to a whole block of data; an absent block is zero."""

    ino: int
    mode: int
    uid: int
    gid: int
    nlink: int
    rdev: int = 0
    size: int = 0
    parent: int = 0
    target: bytes = b""
    mtime_ns: int | None = None  # None once the model cannot know it any more
    names: dict[bytes, int] = field(default_factory=dict)
    blocks: dict[int, bytes] = field(default_factory=dict)
    xattrs: dict[bytes, bytes] = field(default_factory=dict)

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    def copy(self) -> "ReferenceFile":
        return ReferenceFile(
            self.ino,
            self.mode,
            self.uid,
            self.gid,
            self.nlink,
            self.rdev,
            self.size,
            self.parent,
            self.target,
            self.mtime_ns,
            dict(self.names),
            dict(self.blocks),
            dict(self.xattrs),
        )

    def read(self, offset: int, size: int) -> bytes:
        size = max(0, min(size, self.size - offset))
        if not size:
            return b""
        first, stop = offset // BLOCK, -(-(offset + size) // BLOCK)
        whole = b"".join([self.blocks.get(index, ZEROS) for index in range(first, stop)])
        return whole[offset - first * BLOCK :][:size]


class ReferenceFiles:
    """A whole filesystem, by inode number. The caller chooses the numbers of new inodes."""

    def __init__(self, root_mode: int = 0o755) -> None:
        root = ReferenceFile(ROOT, stat.S_IFDIR | root_mode, 0, 0, 2, parent=ROOT)
        self.files = {ROOT: root}
        self.orphans: set[int] = set()
        self.unnamed: set[int] = set()  # those orphans that may get a name, until the next mount

    def copy(self) -> "ReferenceFiles":
        other = ReferenceFiles()
        other.files = {ino: file.copy() for ino, file in self.files.items()}
        other.orphans = set(self.orphans)
        return other

    # --- looking ----------------------------------------------------------------------------------

    def directory(self, ino: int) -> ReferenceFile:
        file = self.file(ino)
        if not file.is_directory:
            raise refuse(errno.ENOTDIR)
        return file

    def living(self, ino: int) -> ReferenceFile:
        directory = self.directory(ino)
        if not directory.nlink:
            raise refuse(errno.ENOENT)
        return directory

    def file(self, ino: int) -> ReferenceFile:
        if ino not in self.files:
            raise refuse(errno.ESTALE)
        return self.files[ino]

    def named(self, directory: int, name: bytes) -> ReferenceFile:
        found = self.directory(directory).names
        if len(name) > NAME_BYTES_MAX:
            raise refuse(errno.ENAMETOOLONG)
        if name not in found:
            raise refuse(errno.ENOENT)
        return self.files[found[name]]

    def is_below(self, directory: int, ino: int) -> bool:
        while True:
            if directory == ino:
                return True
            if directory == ROOT:
                return False
            directory = self.files[directory].parent

    # --- changing ---------------------------------------------------------------------------------

    def check_create(self, directory: int, name: bytes) -> None:
        parent = self.living(directory)
        if len(name) > NAME_BYTES_MAX:
            raise refuse(errno.ENAMETOOLONG)
        if name in parent.names:
            raise refuse(errno.EEXIST)

    def create(
        self,
        directory: int,
        name: bytes,
        mode: int,
        uid: int,
        gid: int,
        ino: int,
        rdev: int = 0,
        target: bytes = b"",
    ) -> ReferenceFile:
        self.check_create(directory, name)
        assert ino not in self.files, "an inode number is used twice"
        parent = self.files[directory]
        file = ReferenceFile(ino, mode, uid, gid, 1, rdev, len(target), target=target)
        if parent.mode & stat.S_ISGID:
            file.gid = parent.gid
        if file.is_directory:
            file.mode |= parent.mode & stat.S_ISGID
            file.nlink, file.parent = 2, directory
            parent.nlink += 1
        self._add(parent, name, ino)
        self.files[ino] = file
        return file

    def link(self, ino: int, directory: int, name: bytes) -> None:
        file = self.file(ino)
        parent = self.living(directory)
        if file.is_directory:
            raise refuse(errno.EPERM)
        if not file.nlink and ino not in self.unnamed:
            raise refuse(errno.ENOENT)
        self.check_create(directory, name)
        self._add(parent, name, ino)
        file.nlink += 1
        if file.nlink == 1:
            self.unnamed.discard(ino)
            self.orphans.discard(ino)

    def unlink(self, directory: int, name: bytes) -> None:
        file = self.named(directory, name)
        if file.is_directory:
            raise refuse(errno.EISDIR)
        self._take(self.files[directory], name)
        self._unlinked(file)

    def rmdir(self, directory: int, name: bytes) -> None:
        file = self.named(directory, name)
        self._require_empty(file)
        self._take(self.files[directory], name)
        self.files[directory].nlink -= 1
        self._unlinked(file)

    def rename(
        self,
        old_directory: int,
        old_name: bytes,
        directory: int,
        name: bytes,
        flags: int,
        whiteout_ino: int = 0,
    ) -> None:
        """`whiteout_ino` is the inode number of the whiteout that RENAME_WHITEOUT leaves behind."""
        if flags & 4 and flags & 2:
            raise refuse(errno.EINVAL)
        old_parent, parent = self.directory(old_directory), self.living(directory)
        moving = self.named(old_directory, old_name)
        if len(name) > NAME_BYTES_MAX:
            raise refuse(errno.ENAMETOOLONG)
        target = self.files.get(parent.names.get(name, 0))
        if target is not None and flags & 1:
            raise refuse(errno.EEXIST)
        if target is None and flags == 2:
            raise refuse(errno.ENOENT)
        if target is moving:
            return
        if moving.is_directory and self.is_below(directory, moving.ino):
            raise refuse(errno.EINVAL)
        if flags == 2:
            assert target is not None
            if target.is_directory and self.is_below(old_directory, target.ino):
                raise refuse(errno.EINVAL)
            old_parent.names[old_name], parent.names[name] = target.ino, moving.ino
            self._moved(moving, old_parent, parent)
            self._moved(target, parent, old_parent)
            old_parent.mtime_ns = parent.mtime_ns = None
            return
        if target is not None:
            if moving.is_directory:
                self._require_empty(target)
                parent.nlink -= 1
            elif target.is_directory:
                raise refuse(errno.EISDIR)
            self._take(parent, name)
            self._unlinked(target)
        self._take(old_parent, old_name)
        self._add(parent, name, moving.ino)
        self._moved(moving, old_parent, parent)
        if flags & 4:
            self.create(old_directory, old_name, stat.S_IFCHR, 0, 0, whiteout_ino)

    def regular(self, ino: int) -> ReferenceFile:
        file = self.file(ino)
        if not stat.S_ISREG(file.mode):
            raise refuse(errno.EISDIR if file.is_directory else errno.EINVAL)
        return file

    def write(self, ino: int, offset: int, data: bytes) -> None:
        file = self.regular(ino)
        end = offset + len(data)
        at = 0
        while at < len(data):
            index, skip = divmod(offset + at, BLOCK)
            count = min(BLOCK - skip, len(data) - at)
            old = file.blocks.get(index, ZEROS)
            file.blocks[index] = old[:skip] + data[at : at + count] + old[skip + count :]
            at += count
        if data:
            file.size = max(file.size, end)
        file.mtime_ns = None

    def allocate(self, ino: int, mode: int, offset: int, length: int) -> None:
        """fallocate: KEEP_SIZE 1, PUNCH_HOLE 2, ZERO_RANGE 16."""
        file = self.regular(ino)
        if not length:
            raise refuse(errno.EINVAL)
        if mode & 0x12:
            self.zero(file, offset, length)
        if not mode & 1:
            file.size = max(file.size, offset + length)
        file.mtime_ns = None

    def zero(self, file: ReferenceFile, offset: int, length: int) -> None:
        """Set bytes in the file to zero."""
        end = min(offset + length, file.size)
        for index in list(file.blocks):
            begin = index * BLOCK
            first, stop = max(offset, begin), min(end, begin + BLOCK)
            if first < stop:
                old = file.blocks[index]
                old = old[: first - begin] + bytes(stop - first) + old[stop - begin :]
                file.blocks[index] = old

    def share(self, source: ReferenceFile, begin: int, ino: int, offset: int, length: int) -> None:
        """Replace bytes here by those of another file; both ranges begin at a block."""
        self.write(ino, offset, source.read(begin, length))

    def create_unnamed(self, directory: int, mode: int, uid: int, gid: int, ino: int) -> None:
        parent = self.living(directory)
        gid = parent.gid if parent.mode & stat.S_ISGID else gid
        self.files[ino] = ReferenceFile(ino, stat.S_IFREG | mode, uid, gid, 0)
        self.orphans.add(ino)
        self.unnamed.add(ino)

    def truncate(self, ino: int, size: int) -> None:
        file = self.regular(ino)
        if size < file.size:
            stop, tail = divmod(size, BLOCK)
            file.blocks = {index: block for index, block in file.blocks.items() if index <= stop}
            if stop in file.blocks:
                kept = file.blocks.pop(stop)[:tail]
                if tail:
                    file.blocks[stop] = kept.ljust(BLOCK, b"\0")
        file.size = size
        file.mtime_ns = None

    def reclaim(self, ino: int) -> None:
        self.orphans.discard(ino)
        self.unnamed.discard(ino)
        del self.files[ino]

    # --- inside -----------------------------------------------------------------------------------

    def _add(self, directory: ReferenceFile, name: bytes, ino: int) -> None:
        directory.names[name] = ino
        directory.size += len(name)
        directory.mtime_ns = None

    def _take(self, directory: ReferenceFile, name: bytes) -> None:
        del directory.names[name]
        directory.size -= len(name)
        directory.mtime_ns = None

    def _require_empty(self, file: ReferenceFile) -> None:
        if not file.is_directory:
            raise refuse(errno.ENOTDIR)
        if file.names:
            raise refuse(errno.ENOTEMPTY)

    def _unlinked(self, file: ReferenceFile) -> None:
        file.nlink = 0 if file.is_directory else file.nlink - 1
        if not file.nlink:
            self.orphans.add(file.ino)

    def _moved(self, file: ReferenceFile, old_parent: ReferenceFile, parent: ReferenceFile) -> None:
        if file.is_directory and old_parent is not parent:
            file.parent = parent.ino
            old_parent.nlink -= 1
            parent.nlink += 1


@dataclass(slots=True)
class ReferenceHistory:
    """The live files, those of every snapshot by name, and the names of held snapshots.

    `undo` names the snapshot that the last rollback made.
    """

    live: ReferenceFiles = field(default_factory=ReferenceFiles)
    snapshots: dict[str, ReferenceFiles] = field(default_factory=dict)
    undo: str | None = None
    held: set[str] = field(default_factory=set)

    def copy(self) -> "ReferenceHistory":
        # Snapshots never change, so they may be shared.
        return ReferenceHistory(self.live.copy(), dict(self.snapshots), self.undo, set(self.held))

    def rename_snapshot(self, old: str, new: str) -> None:
        """Rename a snapshot; undo and a hold follow it."""
        self.snapshots[new] = self.snapshots.pop(old)
        if self.undo == old:
            self.undo = new
        if old in self.held:
            self.held.remove(old)
            self.held.add(new)
