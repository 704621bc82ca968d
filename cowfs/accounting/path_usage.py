"""The usage of files and directories, with sharing: what they hold, and what deleting them frees.

The numbers are blocks of file data. A block counts once for each file, directory or argument that
holds it, however many files below share it. Metadata belongs to no single file, and neither do
files of at most 2 KiB, whose data is in the leaves.

*Exclusive* is what is freed if the file or directory is deleted and everything else stays. So a
block counts only if no snapshot, no other volume and no file outside has it. A file with another
name elsewhere frees nothing. *Shared* is the rest: total = exclusive + shared.
"""

import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from cowfs.accounting.owners import OwnerSets
from cowfs.accounting.paths import DEPTH_MAX, DIRECTORY, require
from cowfs.accounting.structure import Numbers, Progress, covered, require_inside
from cowfs.accounting.virtual_drop import Freed, pieces_of, simulate_deletion
from cowfs.errors import CorruptError
from cowfs.files.items import (
    INO_MAX,
    TYPE_EXTENT,
    TYPE_ORPHAN,
    Inode,
    decode_extent,
    inode_key,
    key,
    split_key,
)
from cowfs.files.volume import Volume
from cowfs.history.filesystem import Filesystem
from cowfs.history.records import RootRecord

SCAN_SHARE = 8  # for more than 1/SCAN_SHARE of all inodes, the whole tree is read in order


@dataclass(eq=False, slots=True)
class Place:
    """A name of a file or directory, and the data blocks below it.

    Attributes:
        total, exclusive: blocks, as this file's docstring defines them.
        children: the entries of a directory.
        parent: the directory's place; None at the top.
    """

    name: bytes
    is_directory: bool
    total: int = 0
    exclusive: int = 0
    children: list["Place"] = field(default_factory=list)
    parent: "Place | None" = field(default=None, repr=False)

    @property
    def shared(self) -> int:
        return self.total - self.exclusive

    def walk(self) -> Iterator["Place"]:
        """All places below, and then the place itself: the order of du."""
        for child in self.children:
            yield from child.walk()
        yield self


@dataclass(frozen=True, slots=True)
class Argument:
    """A file or directory in the tree of a root, whose usage is asked for.

    Attributes:
        name: the name to show.
        path: the path inside the tree; empty for the root directory.
    """

    record: RootRecord
    volume: Volume
    inode: Inode
    name: bytes
    path: bytes = b""


class Whole(NamedTuple):
    """Roots that are deleted as a whole: their records, and their data runs (structure.py)."""

    records: Sequence[RootRecord]
    run_first: Numbers
    run_count: Numbers


@dataclass(slots=True)
class _Tree:
    """The places below an argument.

    Attributes:
        top: the place of the argument itself.
        places: all places, by inode number.
        complete: the inodes that have no name outside.
    """

    volume: Volume
    top: Place
    places: dict[int, list[Place]]
    complete: set[int]


def usage_of_path(
    filesystem: Filesystem, argument: Argument, progress: Progress | None = None
) -> Place:
    """Find the usage of a file or directory, and of everything below it.

    Raises:
        CorruptError: a node or directory cannot be read, or a refcount is wrong.
    """
    tree = _tree(argument)
    _count_totals(tree)
    freed = simulate_deletion(filesystem, [argument.record], progress)
    _count_exclusive(tree, freed)
    return tree.top


def usage_together(
    filesystem: Filesystem,
    arguments: Sequence[Argument],
    whole: Whole | None = None,
    progress: Progress | None = None,
) -> Place:
    """Find what several files and directories hold together, and what deleting all of them frees.

    Args:
        arguments: files and directories; some may lie below others, or be given twice.
        whole: roots that are deleted as a whole at the same time.

    Returns:
        One place without children.

    Raises:
        CorruptError: a node or directory cannot be read, or a refcount is wrong.
    """
    records = {argument.record.root_id: argument.record for argument in arguments}
    volumes = {argument.record.root_id: argument.volume for argument in arguments}
    entire = {record.root_id for record in whole.records} if whole is not None else set()
    # By root id:
    inside: dict[int, dict[int, int]] = {root: {} for root in records}  # names found, by inode
    visited: dict[int, set[int]] = {root: set() for root in records}  # directories
    files: dict[int, dict[tuple[int, bytes], int]] = {root: {} for root in records}  # arguments
    none = np.zeros(0, np.int64)
    first, count = [none], [none]
    if whole is not None:
        first, count = [whole.run_first], [whole.run_count]
    for argument in arguments:
        root = argument.record.root_id
        tree = _tree(argument, visited[root])
        fresh = set(tree.places) - set(inside[root])
        runs = np.array([run[1:] for run in _runs(argument.volume, fresh)], np.int64).reshape(-1, 2)
        first.append(runs[:, 0])
        count.append(runs[:, 1])
        if not tree.top.is_directory:
            words = [word for word in argument.path.split(b"/") if word not in (b"", b".")]
            above, _, name = b"/".join(words).rpartition(b"/")
            directory = require(argument.volume, above).ino
            files[root][directory, name] = argument.inode.ino
            continue
        for ino, places in tree.places.items():
            inside[root][ino] = inside[root].get(ino, 0) + len(places)
    for root, named in files.items():
        for (directory, _), ino in named.items():
            if directory not in visited[root]:  # otherwise its names are counted already
                inside[root][ino] = inside[root].get(ino, 0) + 1
    # Of each root the inodes all of whose names are deleted.
    deleted = {
        root: {ino for ino, found in names.items() if _link_count(volumes[root], ino) == found}
        for root, names in inside.items()
    }
    if whole is not None:
        records |= {record.root_id: record for record in whole.records}
    roots = list(records)
    freed = simulate_deletion(filesystem, list(records.values()), progress)
    found = freed.runs
    # Of each set of roots those that are not deleted as a whole.
    partial = [
        [root for bit, root in enumerate(roots) if mask >> bit & 1 and root not in entire]
        for mask in found.masks
    ]
    run_deleted = np.array(
        [
            all(ino in deleted[root] for root in partial[mask])
            for mask, ino in zip(found.mask.tolist(), found.ino.tolist(), strict=True)
        ],
        np.bool_,
    )
    bounds = freed.piece_from[:-1]
    piece_deleted = (
        np.logical_and.reduceat(run_deleted[freed.piece_runs], bounds)
        if len(bounds)
        else run_deleted[:0]
    )
    exclusive = int(freed.piece_count[piece_deleted].sum())
    return Place(b"total", True, covered(np.concatenate(first), np.concatenate(count)), exclusive)


def usage_of_orphans(filesystem: Filesystem) -> Place | None:
    """Find the usage of the live volume's files that were deleted while open.

    Returns:
        A place with one child for each orphan; None if there is no orphan.

    Raises:
        CorruptError: a node cannot be read, or a refcount is wrong.
    """
    volume = filesystem.live
    start, stop = key(0, TYPE_ORPHAN, 0), key(0, TYPE_ORPHAN + 1, 0)
    inos = {split_key(item)[2] for item, _ in volume.tree.items(start, stop)}
    if not inos:
        return None
    top = Place(b"", True)
    places = {ino: [Place(b"inode %d" % ino, False, parent=top)] for ino in sorted(inos)}
    top.children = [found[0] for found in places.values()]
    tree = _Tree(volume, top, places, inos)
    _count_totals(tree)
    _count_exclusive(tree, simulate_deletion(filesystem, [filesystem.record]))
    return top


def usage_of_snapshots(sets: OwnerSets) -> Place:
    """The usage of whole snapshots: a place for all together, with a child for each snapshot."""
    count = sets.snapshot_count
    every = range(count)
    data = sets.data
    top = Place(
        b".snapshots",
        True,
        int(data[~sets.within(range(count, len(sets.owners)))].sum()),
        int(data[sets.within(every)].sum()),
    )
    totals, exclusives = sets.each("referenced")[:, 1], sets.each("exclusive")[:, 1]
    for bit in every:
        name = sets.owners[bit].name.encode()
        top.children.append(Place(name, True, int(totals[bit]), int(exclusives[bit]), parent=top))
    return top


# --- the tree of names ----------------------------------------------------------------------------


def _tree(argument: Argument, visited: set[int] | None = None) -> _Tree:
    """Read all places below an argument.

    Args:
        visited: directories read before, whose entries are left out; grows. By default none.
    """
    volume, inode = argument.volume, argument.inode
    top = Place(argument.name, stat.S_ISDIR(inode.mode))
    places: dict[int, list[Place]] = {inode.ino: [top]}
    if visited is None:
        visited = set()
    waiting = [(inode.ino, top, 0)] if top.is_directory else []
    while waiting:
        directory, place, depth = waiting.pop()
        if directory in visited:
            continue
        visited.add(directory)
        if depth > DEPTH_MAX:
            raise CorruptError(f"directory {directory}", directory, "lies too deep")
        for _, name in volume.listing(directory):
            child = Place(name.name, name.type == DIRECTORY, parent=place)
            place.children.append(child)
            places.setdefault(name.ino, []).append(child)
            if child.is_directory:
                waiting.append((name.ino, child, depth + 1))
        place.children.sort(key=lambda each: each.name)
    complete = {
        ino
        for ino, found in places.items()
        if found[0].is_directory or _link_count(volume, ino) == len(found)
    }
    return _Tree(volume, top, places, complete)


def _link_count(volume: Volume, ino: int) -> int:
    return volume.get(ino).nlink


def _runs(volume: Volume, inos: set[int]) -> Iterator[tuple[int, int, int]]:
    """The data runs of these files, as (inode number, first block, count)."""
    tree = volume.tree
    if inos and max(inos) > INO_MAX:
        raise CorruptError("item", 0, "names an impossible inode", max(inos))
    scan = len(inos) * SCAN_SHARE > volume.inodes.count
    ranges = (
        [(inode_key(1), b"\xff" * 17)]
        if scan
        else [(inode_key(ino), inode_key(ino + 1)) for ino in sorted(inos)]
    )
    for start, stop in ranges:
        for keys, values, first, last in tree.leaf_slices(start, stop):
            for at in range(first, last):
                ino, kind, _ = split_key(keys[at])
                if kind == TYPE_EXTENT and ino in inos:
                    extent = decode_extent(ino, values[at])
                    require_inside(tree.store, extent.block, extent.count)
                    if ino > INO_MAX:
                        raise CorruptError("extent", extent.block, "of an impossible inode", ino)
                    yield ino, extent.block, extent.count


# --- counting -------------------------------------------------------------------------------------


def _count_totals(tree: _Tree) -> None:
    """Add each data block to `total` of every place above a file that holds it."""
    rows = np.array(list(_runs(tree.volume, set(tree.places))), np.int64).reshape(-1, 3)
    _, counts, starts, runs = pieces_of(rows[:, 1], rows[:, 2])
    inos = rows[:, 0][runs]
    for holders, blocks in _by_holders(starts, inos, counts).items():
        above: set[Place] = set()
        for ino in holders:
            for place in tree.places[ino]:
                at: Place | None = place
                while at is not None and at not in above:
                    above.add(at)
                    at = at.parent
        for each in above:
            each.total += blocks


def _count_exclusive(tree: _Tree, freed: Freed) -> None:
    """Add each freed block to `exclusive` of every place that is above all files that hold it.

    A block that a file with a name outside holds is exclusive to no place.
    """
    inos = freed.runs.ino[freed.piece_runs]
    for holders, blocks in _by_holders(freed.piece_from, inos, freed.piece_count).items():
        if not all(ino in tree.complete for ino in holders):
            continue
        at = _common([place for ino in holders for place in tree.places[ino]])
        while at is not None:
            at.exclusive += blocks
            at = at.parent


def _by_holders(starts: Numbers, inos: Numbers, counts: Numbers) -> dict[tuple[int, ...], int]:
    """Blocks by the set of inodes that hold them.

    Args:
        starts, inos: piece i is held by the inodes `inos[starts[i]:starts[i + 1]]`.
        counts: blocks of each piece.
    """
    found: dict[tuple[int, ...], int] = {}
    bounds, listed = starts.tolist(), inos.tolist()
    for number, blocks in enumerate(counts.tolist()):
        part = listed[bounds[number] : bounds[number + 1]]
        holders = tuple(part) if len(part) == 1 else tuple(sorted(set(part)))
        found[holders] = found.get(holders, 0) + blocks
    return found


def _common(places: Sequence[Place]) -> Place | None:
    """The lowest place that is above or equal to each of these; None if there is none."""
    first = places[0]
    if len(places) == 1:
        return first
    ways = []
    for place in places:
        way = [place]
        while way[-1].parent is not None:
            way.append(way[-1].parent)
        ways.append(way[::-1])
    common = None
    for level in zip(*ways, strict=False):
        if any(place is not level[0] for place in level):
            break
        common = level[0]
    return common
