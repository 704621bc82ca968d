"""Questions that need all names of one tree: names without an inode, lost directories, paths.

`Contents` and the scrub ask them about few trees: all leaves of the tree are read again for them.
"""

import stat
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from cowfs.errors import CorruptError
from cowfs.escapes import escaped
from cowfs.files.items import (
    KEY_BYTES,
    ROOT_INO,
    TYPE_INODE,
    TYPE_NAME,
    Inode,
    decode_inode,
    decode_names,
    split_key,
)
from cowfs.storage.format import NodeImage

_DIRECTORY = stat.S_IFDIR >> 12
FILE_TYPE_WORDS = {
    stat.S_IFREG >> 12: "regular file",
    stat.S_IFDIR >> 12: "directory",
    stat.S_IFLNK >> 12: "symlink",
    stat.S_IFIFO >> 12: "fifo",
    stat.S_IFSOCK >> 12: "socket",
    stat.S_IFCHR >> 12: "character device",
    stat.S_IFBLK >> 12: "block device",
}


def mismatches(leaves: Iterator[NodeImage]) -> Iterator[tuple[str, int]]:
    """Names, link counts, parents and orphan marks that contradict each other.

    Args:
        leaves: all leaves of a tree.

    Yields:
        What is wrong, and the inode number that it is about.
    """
    inodes: dict[int, Inode] = {}
    name_counts: dict[tuple[int, int], int] = {}  # by inode number and file type of the name
    marks: set[int] = set()
    parents: dict[int, int] = {}  # of a directory: the directory that has its name
    for image in leaves:
        for key, value in zip(image.keys, image.values, strict=True):
            if len(key) != KEY_BYTES:
                continue
            ino, type_, offset = split_key(key)
            try:
                if not ino:
                    marks.add(offset)
                elif type_ == TYPE_INODE:
                    inodes[ino] = decode_inode(ino, value)
                elif type_ == TYPE_NAME:
                    for name in decode_names(ino, value):
                        target = (name.ino, name.type)
                        name_counts[target] = name_counts.get(target, 0) + 1
                        if name.type == _DIRECTORY:
                            parents[name.ino] = ino
            except CorruptError:
                continue  # reported when the leaf was first read
    for (ino, type_), count in name_counts.items():
        inode = inodes.get(ino)
        names = f"{count} name{'s' if count > 1 else ''}"
        if inode is None:
            yield f"{names} for an inode that does not exist", ino
        elif inode.mode >> 12 != type_:
            found, actual = FILE_TYPE_WORDS[type_], FILE_TYPE_WORDS[inode.mode >> 12]
            yield f"{names} for a {found}, but the inode is a {actual}", ino
    for ino, inode in inodes.items():
        type_ = inode.mode >> 12
        count = name_counts.get((ino, type_), 0)
        if ino == ROOT_INO:
            if count:
                yield f"{count} names for the root directory", ino
        elif type_ == _DIRECTORY and count != bool(inode.nlink):
            yield f"a directory with nlink {inode.nlink} has {count} names", ino
        elif type_ != _DIRECTORY and count != inode.nlink:
            yield f"nlink is {inode.nlink}, but {count} names point at it", ino
        if type_ == _DIRECTORY and inode.nlink and inode.rdev != parents.get(ino, inode.rdev):
            yield f"a directory in inode {parents[ino]} calls inode {inode.rdev} its parent", ino
        if not inode.nlink and ino not in marks:
            yield "unlinked, but without an orphan mark", ino
    for ino in marks:
        marked = inodes.get(ino)
        if marked is None:
            yield "an orphan mark for an inode that does not exist", ino
        elif marked.nlink:
            yield f"an orphan mark, but nlink is {marked.nlink}", ino


def detached_directories(edges: npt.NDArray[np.uint64]) -> list[int]:
    """The directories that no chain of parents connects with the root directory.

    Args:
        edges: rows of (parent, child), both inode numbers of directories.
    """
    numbers = np.unique(np.append(edges.ravel(), np.uint64(ROOT_INO)))
    parents = np.arange(len(numbers))
    parents[np.searchsorted(numbers, edges[:, 1])] = np.searchsorted(numbers, edges[:, 0])
    root = int(np.searchsorted(numbers, np.uint64(ROOT_INO)))
    parents[root] = root
    for _ in range(len(numbers).bit_length()):
        parents = parents[parents]  # each round doubles how far up `parents` points
    return [int(number) for number in numbers[parents != root]]


def paths_of(leaves: Iterator[NodeImage], wanted: set[int]) -> dict[int, str]:
    """One path from the root directory for each of the wanted inodes that has one.

    Args:
        leaves: all leaves of a tree.

    Returns:
        By inode number the path, which begins with "/" and is escaped (escapes.py).
    """
    parents: dict[int, tuple[int, bytes]] = {}
    for image in leaves:
        for key, value in zip(image.keys, image.values, strict=True):
            if len(key) == KEY_BYTES and key[8] == TYPE_NAME:
                directory = split_key(key)[0]
                try:
                    names = decode_names(directory, value)
                except CorruptError:
                    continue  # reported when the leaf was first read
                for name in names:
                    parents.setdefault(name.ino, (directory, name.name))
    paths = {}
    for ino in wanted:
        words: list[bytes] = []
        at = ino
        visited = set()
        while at in parents and at != ROOT_INO and at not in visited:
            visited.add(at)
            at, word = parents[at]
            words.append(word)
        if at == ROOT_INO:
            paths[ino] = "/" + "/".join(escaped(word) for word in reversed(words))
    return paths
