"""The history of one path: its distinct versions, and which roots keep each.

Two states of a file are the same version if they have the same blocks at the same offsets; of files
whose data is inline, if they have the same bytes. Times and modes do not count. The content of
blocks is not compared: a file written again with the same bytes has other blocks, so it is another
version.
"""

import stat
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from xxhash import xxh3_128_digest

from cowfs.accounting.paths import resolve, volume_of
from cowfs.accounting.structure import Numbers, covered, require_inside
from cowfs.files.items import FILE_BLOCK_MAX, INODE_INLINE, TYPE_INLINE, TYPE_SYMLINK, Inode, key
from cowfs.files.volume import Volume
from cowfs.history.filesystem import Filesystem
from cowfs.history.records import RootRecord

KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
}


@dataclass(frozen=True, slots=True)
class Version:
    """One version of a file; also that nothing is at the path.

    Attributes:
        kind: "file", "directory", "symlink", "other", or "absent".
        ino, mtime_ns: as in the oldest root that has this version.
        data_blocks: distinct data blocks.
        fresh_blocks: the data blocks that no earlier version has.
        roots: indices of the roots that have this version, ascending.
    """

    kind: str
    ino: int
    size_bytes: int
    data_blocks: int
    fresh_blocks: int
    mtime_ns: int
    roots: tuple[int, ...]


def versions_of(
    filesystem: Filesystem, records: Sequence[RootRecord], path: bytes
) -> list[Version]:
    """The versions of a path in these roots, in the order of the first root that has each.

    Args:
        records: the roots, the oldest first.
        path: inside each root's tree.

    Raises:
        UsageError: the path contains `..`.
        CorruptError: a node cannot be read.
    """
    numbers_of: dict[tuple[object, ...], list[int]] = {}
    first: dict[tuple[object, ...], tuple[Inode | None, Numbers]] = {}
    for number, record in enumerate(records):
        volume = volume_of(filesystem, record)
        inode = resolve(volume, path)
        identity, runs = _identity(volume, inode)
        numbers_of.setdefault(identity, []).append(number)
        first.setdefault(identity, (inode, runs))
    versions = []
    seen = np.zeros((0, 2), np.int64)
    for identity, numbers in numbers_of.items():
        inode, runs = first[identity]
        before = covered(seen[:, 0], seen[:, 1])
        seen = np.concatenate([seen, runs])
        versions.append(
            Version(
                kind="absent" if inode is None else KINDS.get(stat.S_IFMT(inode.mode), "other"),
                ino=0 if inode is None else inode.ino,
                size_bytes=0 if inode is None else inode.size_bytes,
                data_blocks=covered(runs[:, 0], runs[:, 1]),
                fresh_blocks=covered(seen[:, 0], seen[:, 1]) - before,
                mtime_ns=0 if inode is None else inode.mtime_ns,
                roots=tuple(numbers),
            )
        )
    return versions


def _identity(volume: Volume, inode: Inode | None) -> tuple[tuple[object, ...], Numbers]:
    """What identifies the version of an inode, and its data runs as rows of (first, count)."""
    none = np.zeros((0, 2), np.int64)
    if inode is None:
        return (), none
    kind = stat.S_IFMT(inode.mode)
    if kind == stat.S_IFDIR:
        names = sorted((entry.name, entry.ino) for _, entry in volume.listing(inode.ino))
        return (kind, inode.ino, tuple(names)), none
    if kind != stat.S_IFREG or inode.flags & INODE_INLINE:
        type_ = TYPE_INLINE if kind == stat.S_IFREG else TYPE_SYMLINK
        value = volume.tree.get(key(inode.ino, type_, 0))
        return (kind, inode.rdev, inode.size_bytes, value and xxh3_128_digest(value)), none
    extents: list[tuple[int, int, int]] = []  # start and end in the file, first block
    for start, extent in volume.extents.find(inode.ino, 0, FILE_BLOCK_MAX):
        require_inside(volume.store, extent.block, extent.count)
        # Extents that follow each other in the file and on disk are joined: how the file's blocks
        # are divided into extents is no difference between versions.
        if extents:
            begin, end, block = extents[-1]
            if end == start and extent.block == block + end - begin:
                extents[-1] = (begin, start + extent.count, block)
                continue
        extents.append((start, start + extent.count, extent.block))
    runs = np.array([(block, end - begin) for begin, end, block in extents], np.int64)
    return (kind, inode.size_bytes, tuple(extents)), runs.reshape(-1, 2)
