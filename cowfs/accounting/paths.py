"""Paths in the tree of a root: the inode at a path, and the path of an inode.

An inode does not hold its names. So finding the paths of some inodes means reading all names: once
for each distinct leaf, however many roots share it. The names found are then looked up in the tree
of each root in question.

Paths are bytes, without a slash at either end; b"" is the root directory.
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
DEPTH_MAX = 512  # directories in a path; ends the search in a forged tree with a ring
PROGRESS_NODES = 256  # nodes read between two calls of the progress function
Name = tuple[int, bytes]  # inode number of a directory, and a name in it


class PathFinder:
    """Finds paths of inodes in some roots of one image. The constructor reads all their names.

    Args:
        wanted: the root node of each root, and the inode numbers that will be asked for there.

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
        # Of each inode its names in any of the roots, in the order in which they were found.
        self._names: dict[int, dict[Name, None]] = {}
        self._visited: set[int] = set()
        self._progress = progress
        tops = []
        for pointer, inos in wanted:
            self._wanted |= inos
            tops.append(pointer)
        for pointer in tops:
            self._read_names(pointer, None)

    def _read_names(self, pointer: Pointer, level: int | None) -> None:
        if pointer.block in self._visited:
            return
        self._visited.add(pointer.block)
        if self._progress is not None and len(self._visited) % PROGRESS_NODES == 0:
            self._progress("reading names", len(self._visited), 0)
        node = self._store.load(pointer, level)
        if node.level:
            for child in node.values:
                self._read_names(child_pointer(child), node.level - 1)
            return
        for item, value in zip(node.keys, node.values, strict=True):
            if len(item) == KEY_BYTES and item[8] == TYPE_NAME:
                directory = split_key(item)[0]
                for entry in decode_names(directory, value):
                    if entry.type == DIRECTORY or entry.ino in self._wanted:
                        self._names.setdefault(entry.ino, {})[(directory, entry.name)] = None

    def paths(self, volume: Volume, inos: Iterable[int]) -> dict[int, bytes]:
        """One path of each of these inodes in the tree of a root.

        Inodes without a name there (deleted while open) are left out.

        Raises:
            CorruptError: a node or a directory cannot be read.
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
        """The path of an inode; None if no name leads to it from the root directory."""
        if ino in found:
            return found[ino]
        found[ino] = None  # so a directory that is below itself gets no path
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
    """The files of a root whose record was just read from the catalog.

    Raises:
        CorruptError: a lookup in the catalog does not find the root, or it is a second volume.
    """
    volume = filesystem.volume(record.root_id)
    if volume is None:
        raise CorruptError("catalog", 0, "a root is listed and not found", record.root_id)
    return volume


def resolve(volume: Volume, path: bytes) -> Inode | None:
    """The inode at a path; None if nothing is there. Symlinks are not followed.

    Raises:
        UsageError: the path contains `..`.
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
    """The inode at a path, as `resolve` finds it.

    Raises:
        OSError: ENOENT: nothing is there.
        UsageError: the path contains `..`.
    """
    inode = resolve(volume, path)
    if inode is None:
        raise posix_error(errno.ENOENT)
    return inode
