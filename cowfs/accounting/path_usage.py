"""What files and directories hold, and what deleting them would free: `du` that knows of sharing.

Of data alone: blocks of file data, each counted once for a file, a directory and an argument as a
whole, however many files below share it. Metadata, and with it files of at most 2 KiB, belongs to no
single file.

*Exclusive* of a file or directory is what is freed if it goes and everything else stays. So a block
counts only if no snapshot, no other volume and no file outside has it, and a file with another name
elsewhere frees nothing. *Shared* is the rest: total = exclusive + shared.
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

SCAN_SHARE = 8  # with more than an eighth of all inodes, the whole tree is read in order


@dataclass(eq=False, slots=True)
class Place:
    """A name, and what is below it. Blocks of data."""

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
        """What is below and then the place itself, as du does."""
        for child in self.children:
            yield from child.walk()
        yield self


@dataclass(frozen=True, slots=True)
class Argument:
    """What is asked about: a file or directory in the tree of a root.

    Attributes:
        name: that it is shown by.
        path: inside of the tree; that of the root is empty.
    """

    record: RootRecord
    volume: Volume
    inode: Inode
    name: bytes
    path: bytes = b""


class Whole(NamedTuple):
    """Roots as a whole: their records, and the data runs below them (structure.py)."""

    records: Sequence[RootRecord]
    run_first: Numbers
    run_count: Numbers


@dataclass(slots=True)
class _Tree:
    """An argument on its way: its places by inode, and the inodes whose every name is below it."""

    volume: Volume
    top: Place
    places: dict[int, list[Place]]
    complete: set[int]


def usage_of_path(
    filesystem: Filesystem, argument: Argument, progress: Progress | None = None
) -> Place:
    """What a file or directory holds, with all that is below it.

    Raises:
        CorruptError: something cannot be read, or refcounts cannot be right.
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
    """What several hold together, and what is freed if all of them go.

    Args:
        arguments: files and directories; some may be below others, or come twice.
        whole: roots that go altogether.
    """
    records = {argument.record.root_id: argument.record for argument in arguments}
    volumes = {argument.record.root_id: argument.volume for argument in arguments}
    entire = {record.root_id for record in whole.records} if whole is not None else set()
    inside: dict[int, dict[int, int]] = {root: {} for root in records}  # names below, by inode
    met: dict[int, set[int]] = {root: set() for root in records}
    files: dict[int, dict[tuple[int, bytes], int]] = {root: {} for root in records}
    none = np.zeros(0, np.int64)
    first, count = [none], [none]
    if whole is not None:
        first, count = [whole.run_first], [whole.run_count]
    for argument in arguments:
        root = argument.record.root_id
        tree = _tree(argument, met[root])
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
            if directory not in met[root]:  # else the name is counted already
                inside[root][ino] = inside[root].get(ino, 0) + 1
    goes_with = {
        root: {ino for ino, found in names.items() if _link_count(volumes[root], ino) == found}
        for root, names in inside.items()
    }
    if whole is not None:
        records |= {record.root_id: record for record in whole.records}
    roots = list(records)
    freed = simulate_deletion(filesystem, list(records.values()), progress)
    found = freed.runs
    partial = [
        [root for bit, root in enumerate(roots) if mask >> bit & 1 and root not in entire]
        for mask in found.masks
    ]
    goes = np.array(
        [
            all(ino in goes_with[root] for root in partial[mask])
            for mask, ino in zip(found.mask.tolist(), found.ino.tolist(), strict=True)
        ],
        np.bool_,
    )
    bounds = freed.piece_from[:-1]
    all_go = np.logical_and.reduceat(goes[freed.piece_runs], bounds) if len(bounds) else goes[:0]
    exclusive = int(freed.piece_count[all_go].sum())
    return Place(b"total", True, covered(np.concatenate(first), np.concatenate(count)), exclusive)


def usage_of_orphans(filesystem: Filesystem) -> Place | None:
    """What files hold that were deleted while open, in the live volume. None when there are none."""
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
    """What whole snapshots hold, each a place below one for all of them together."""
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


# --- the tree of names ------------------------------------------------------------------------------


def _tree(argument: Argument, met: set[int] | None = None) -> _Tree:
    """All places below an argument.

    Args:
        met: directories that were gone into already, which are left out; grows.
    """
    volume, inode = argument.volume, argument.inode
    top = Place(argument.name, stat.S_ISDIR(inode.mode))
    places: dict[int, list[Place]] = {inode.ino: [top]}
    gone_into: set[int] = set() if met is None else met
    waiting = [(inode.ino, top, 0)] if top.is_directory else []
    while waiting:
        directory, place, depth = waiting.pop()
        if directory in gone_into:
            continue
        gone_into.add(directory)
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


def _runs(volume: Volume, inos: set[int] | None) -> Iterator[tuple[int, int, int]]:
    """(inode, first block, count) of each data run of these files; of all when None."""
    tree = volume.tree
    if inos and max(inos) > INO_MAX:
        raise CorruptError("item", 0, "names an impossible inode", max(inos))
    scan = inos is None or len(inos) * SCAN_SHARE > volume.inodes.count
    ranges = (
        [(inode_key(1), b"\xff" * 17)]
        if scan
        else [(inode_key(ino), inode_key(ino + 1)) for ino in sorted(inos or ())]
    )
    for start, stop in ranges:
        for keys, values, first, last in tree.leaf_slices(start, stop):
            for at in range(first, last):
                ino, kind, _ = split_key(keys[at])
                if kind == TYPE_EXTENT and (inos is None or ino in inos):
                    extent = decode_extent(ino, values[at])
                    require_inside(tree.store, extent.block, extent.count)
                    if ino > INO_MAX:
                        raise CorruptError("extent", extent.block, "of an impossible inode", ino)
                    yield ino, extent.block, extent.count


# --- counting ---------------------------------------------------------------------------------------


def _count_totals(tree: _Tree) -> None:
    rows = np.array(list(_runs(tree.volume, set(tree.places))), np.int64).reshape(-1, 3)
    _, counts, starts, runs = pieces_of(rows[:, 1], rows[:, 2])
    inos = rows[:, 0][runs]
    for holders, blocks in _by_holders(starts, inos, counts).items():
        met: set[Place] = set()
        for ino in holders:
            for place in tree.places[ino]:
                at: Place | None = place
                while at is not None and at not in met:
                    met.add(at)
                    at = at.parent
        for each in met:
            each.total += blocks


def _count_exclusive(tree: _Tree, freed: Freed) -> None:
    inos = freed.runs.ino[freed.piece_runs]
    for holders, blocks in _by_holders(freed.piece_from, inos, freed.piece_count).items():
        if not all(ino in tree.complete for ino in holders):
            continue
        at = _common([place for ino in holders for place in tree.places[ino]])
        while at is not None:
            at.exclusive += blocks
            at = at.parent


def _by_holders(starts: Numbers, inos: Numbers, counts: Numbers) -> dict[tuple[int, ...], int]:
    """Blocks by the inodes that hold them."""
    found: dict[tuple[int, ...], int] = {}
    bounds, listed = starts.tolist(), inos.tolist()
    for number, blocks in enumerate(counts.tolist()):
        part = listed[bounds[number] : bounds[number + 1]]
        holders = tuple(part) if len(part) == 1 else tuple(sorted(set(part)))
        found[holders] = found.get(holders, 0) + blocks
    return found


def _common(places: Sequence[Place]) -> Place | None:
    """The lowest place that all of these are, or are below."""
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
