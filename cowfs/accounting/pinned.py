"""Why snapshots cost what they cost: the files whose blocks only these snapshots keep, by path.

A block may be in several of the snapshots and in several files, but it is counted once: at the
newest of the snapshots, and there at the file with the lowest inode number. So the sum over all
paths and the metadata is exactly what deleting the snapshots frees (C11). Files of at most 2 KiB
lie in the leaves, and count as metadata.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cowfs.accounting.paths import PathFinder, volume_of
from cowfs.accounting.structure import Progress
from cowfs.accounting.virtual_drop import Freed, simulate_deletion
from cowfs.history.filesystem import Filesystem
from cowfs.history.records import RootRecord

NAMELESS = b"(deleted while open)"  # shown as the directory of files without a name


@dataclass(frozen=True, slots=True)
class PinnedFile:
    """Data blocks of a file that exactly these roots keep.

    Attributes:
        path: in the newest of the roots.
        owners: a mask of the roots, bit i for root number i.
    """

    path: bytes
    owners: int
    blocks: int


@dataclass(frozen=True, slots=True)
class Pinned:
    """The blocks that only some roots keep.

    Attributes:
        metadata: blocks of nodes, by the mask of the roots that keep them.
        files: data blocks; each pair of a path and a mask once.
    """

    metadata: dict[int, int]
    files: list[PinnedFile]

    @property
    def blocks(self) -> int:
        """The number of blocks that deleting all of the roots would free."""
        return sum(self.metadata.values()) + sum(each.blocks for each in self.files)


def pinned_by(
    filesystem: Filesystem, records: Sequence[RootRecord], progress: Progress | None = None
) -> Pinned:
    """Find the files whose blocks only these roots keep.

    Args:
        records: the oldest first; bit i of a mask is `records[i]`.

    Raises:
        CorruptError: a node or directory cannot be read, or a refcount is wrong.
    """
    freed = simulate_deletion(filesystem, records, progress)
    amounts = _by_file(freed)
    inos: dict[int, set[int]] = {}
    for root, ino, _ in amounts:
        inos.setdefault(root, set()).add(ino)
    finder = PathFinder(
        filesystem.store,
        [(records[root].pointer, inos[root]) for root in sorted(inos)],
        progress,
    )
    by_path: dict[tuple[bytes, int], int] = {}
    named = {}
    for root in sorted(inos):
        volume = volume_of(filesystem, records[root])
        named[root] = finder.paths(volume, inos[root])
    for (root, ino, owners), blocks in amounts.items():
        path = named[root].get(ino)
        if path is None:
            path = NAMELESS + b"/inode %d" % ino
        where = (path, owners)
        by_path[where] = by_path.get(where, 0) + blocks
    files = [PinnedFile(path, owners, blocks) for (path, owners), blocks in by_path.items()]
    return Pinned(freed.node_blocks, files)


def _by_file(freed: Freed) -> dict[tuple[int, int, int], int]:
    """Freed data blocks by (number of the newest root, inode number there, mask of all roots)."""
    runs = freed.runs
    newest = np.array([mask.bit_length() - 1 for mask in runs.masks] or [0], np.int64)[runs.mask]
    # In the order below, a piece is counted at the last of its runs: newest root, lowest inode.
    piece = np.repeat(np.arange(len(freed.piece_count)), np.diff(freed.piece_from))
    inside = freed.piece_runs
    order = np.lexsort((-runs.ino[inside], newest[inside], piece))
    last = freed.piece_from[1:] - 1
    counted = inside[order[last]] if len(last) else inside
    amounts: dict[tuple[int, int, int], int] = {}
    for root, ino, owners, blocks in zip(
        newest[counted].tolist(),
        runs.ino[counted].tolist(),
        freed.masks_of_pieces(),
        freed.piece_count.tolist(),
        strict=True,
    ):
        amounts[(root, ino, owners)] = amounts.get((root, ino, owners), 0) + blocks
    return amounts
