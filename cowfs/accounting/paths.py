"""Paths: what a path means in the tree of a root, and at which path an inode is met there.

Inodes of files hold no names, so all names are read to find those of some inodes: once for each
distinct leaf, however many roots share it. What was found is then looked up in the tree of each root
that is asked about. Paths are bytes, without a slash at either end: b"" is the root.
"""

import errno
import stat
from collections.abc import Iterable, Set

from cowfs.accounting.structure import Progress, child_pointer
from cowfs.errors import CorruptError, UsageError, posix_error
from cowfs.files.items import (
    KEY_BYTES,
    ROOT_INO,
    TYPE_NAME,
    Inode,
    decode_names,
    split_key,
)
from cowfs.files.volume import Volume
from cowfs.history.filesystem import Filesystem
from cowfs.history.records import RootRecord
from cowfs.storage.format import Pointer
from cowfs.storage.store import Store

DIRECTORY = stat.S_IFDIR >> 12
DEPTH_MAX = 512  # of directories; a tree that lies could lead round in a circle
PROGRESS_NODES = 256
Name = tuple[int, bytes]  # directory, and a name in it


class PathFinder:
    """Paths of inodes in some roots of one image.

    Args:
        wanted: of each root the inode numbers that will be asked for.

    Raises:
        CorruptError: a node or a directory cannot be read.
    """

    def __init__(
        self,
        store: Store,
        wanted: Iterable[tuple[Pointer, Set[int]]],
        progress: Progress | None = None,
    ) -> None:
        self._store = store
        self._wanted: set[int] = set()
        self._names: dict[int, dict[Name, None]] = {}  # all that an inode has anywhere, in order
        self._met: set[int] = set()
        self._progress = progress
        tops = []
        for pointer, inos in wanted:
            self._wanted |= inos
            tops.append(pointer)
        for pointer in tops:
            self._gather(pointer, None)

    def _gather(self, pointer: Pointer, level: int | None) -> None:
        if pointer.block in self._met:
            return
        self._met.add(pointer.block)
        if self._progress is not None and len(self._met) % PROGRESS_NODES == 0:
            self._progress("reading names", len(self._met), 0)
        node = self._store.load(pointer, level)
        if node.level:
            for child in node.values:
                self._gather(child_pointer(child), node.level - 1)
            return
        for item, value in zip(node.keys, node.values, strict=True):
            if len(item) == KEY_BYTES and item[8] == TYPE_NAME:
                directory = split_key(item)[0]
                for entry in decode_names(directory, value):
                    if entry.type == DIRECTORY or entry.ino in self._wanted:
                        self._names.setdefault(entry.ino, {})[(directory, entry.name)] = None

    def paths(self, volume: Volume, inos: Iterable[int]) -> dict[int, bytes]:
        """A path of each of these inodes in the tree of a root.

        Those without a name there (deleted while open) are left out. Raises as the constructor.
        """
        found: dict[int, bytes | None] = {ROOT_INO: b""}
        paths = {}
        for ino in inos:
            path = self._path(volume, ino, found, 0)
            if path is not None:
                paths[ino] = path
        return paths

    def _path(
        self, volume: Volume, ino: int, found: dict[int, bytes | None], depth: int
    ) -> bytes | None:
        """The path of an inode; None when it is not below the root."""
        if ino in found:
            return found[ino]
        found[ino] = None  # also what a directory below itself gets
        if depth > DEPTH_MAX:
            return None
        for directory, name in self._names.get(ino, ()):
            entry = volume.names.find(directory, name)
            if entry is None or entry.ino != ino:
                continue
            above = self._path(volume, directory, found, depth + 1)
            if above is not None:
                found[ino] = above + b"/" + name if above else name
                break
        return found[ino]


def volume_of(filesystem: Filesystem, record: RootRecord) -> Volume:
    """The files of a root whose record was read just now.

    Raises:
        CorruptError: the catalog lists it and does not find it, or it is a second volume.
    """
    volume = filesystem.volume(record.root_id)
    if volume is None:
        raise CorruptError("catalog", 0, "a root is listed and not found", record.root_id)
    return volume


def resolve(volume: Volume, path: bytes) -> Inode | None:
    """The inode at a path in the tree of a volume; None when there is nothing. No link is followed.

    Raises:
        UsageError: the path leaves the tree by `..`.
    """
    inode = volume.get(ROOT_INO)
    for name in path.split(b"/"):
        if name in (b"", b"."):
            continue
        if name == b"..":
            raise UsageError("a path inside of an image must not contain ..")
        if not stat.S_ISDIR(inode.mode):
            return None
        found = volume.find(inode.ino, name)
        if found is None:
            return None
        inode = found
    return inode


def require(volume: Volume, path: bytes) -> Inode:
    """The same. Raises OSError ENOENT."""
    inode = resolve(volume, path)
    if inode is None:
        raise posix_error(errno.ENOENT)
    return inode
