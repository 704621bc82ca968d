"""The history of one path: its distinct versions by what they are made of, and where each is kept.

Two states of a file are one version if they have the same blocks in the same places, or the same bytes
where it is small; times and modes do not count. Nothing is compared by content, so a file that was
written again with the same bytes is another version: it takes other blocks.
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
    """A state of a file, or that there is none.

    Attributes:
        kind: "file", "directory", "symlink", "other", or "absent".
        ino: of the file where it is met first.
        data_blocks: distinct blocks of data.
        fresh_blocks: of these, the ones that no earlier version has.
        mtime_ns: where it is met first.
        roots: indices of the roots that have it, ascending.
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
    """The versions of a path in these roots, in the order in which they are met first.

    Args:
        records: the oldest first.
        path: inside of each tree.

    Raises:
        UsageError: the path contains `..`.
        CorruptError: something cannot be read.
    """
    met: dict[tuple[object, ...], list[int]] = {}
    first: dict[tuple[object, ...], tuple[Inode | None, Numbers]] = {}
    for number, record in enumerate(records):
        volume = volume_of(filesystem, record)
        inode = resolve(volume, path)
        identity, runs = _identity(volume, inode)
        met.setdefault(identity, []).append(number)
        first.setdefault(identity, (inode, runs))
    versions = []
    seen = np.zeros((0, 2), np.int64)
    for identity, numbers in met.items():
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
    """What a state is known by, and its runs of blocks, as rows of (first, count)."""
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
    extents: list[tuple[int, int, int]] = []  # first and last + 1 in the file, first block
    for start, extent in volume.data.extents(inode.ino, 0, FILE_BLOCK_MAX):
        require_inside(volume.store, extent.block, extent.count)
        # Where one extent ends and the next begins says nothing about the file.
        if extents:
            begin, end, block = extents[-1]
            if end == start and extent.block == block + end - begin:
                extents[-1] = (begin, start + extent.count, block)
                continue
        extents.append((start, start + extent.count, extent.block))
    runs = np.array([(block, end - begin) for begin, end, block in extents], np.int64)
    return (kind, inode.size_bytes, tuple(extents)), runs.reshape(-1, 2)
