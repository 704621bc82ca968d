"""Promises of what paths hold and deleting them frees, against every reference of every root."""

import random
import stat
from collections.abc import Iterable, Sequence

import numpy as np
import pytest

from cowfs.accounting.owners import OwnerKind, owner_sets, survey
from cowfs.accounting.path_usage import (
    Argument,
    Place,
    Whole,
    usage_of_orphans,
    usage_of_path,
    usage_of_snapshots,
    usage_together,
)
from cowfs.accounting.paths import require, resolve
from cowfs.accounting.virtual_drop import simulate_deletion
from cowfs.files.items import ROOT_INO
from cowfs.history.edits import CreateSnapshot, DeleteSnapshots
from cowfs.history.records import RootRecord
from cowfs.storage.format import BLOCK_SIZE_BYTES
from tests.accounting.test_accounting import each_moment
from tests.model.histories import History
from tests.model.holdings import Edge, Held, Holdings, Key, holdings
from tests.sizes import seeds

MIB_BLOCKS = (1 << 20) // BLOCK_SIZE_BYTES


def argument(history: History, record: RootRecord, path: bytes) -> Argument:
    volume = history.filesystem.volume(record.root_id)
    assert volume is not None
    return Argument(record, volume, require(volume, path), path, path)


def root_key(history: History, record: RootRecord) -> Key:
    live = record.root_id == history.filesystem.record.root_id
    return ("volume" if live else "snapshot", record.root_id)


def removed(found: Holdings, goes: dict[Key, set[int]], whole: Iterable[Key] = ()) -> set[int]:
    """The data blocks that only these inodes, and the roots in `whole`, refer to."""
    inside: set[int] = set()
    outside: set[int] = set()
    entire = set(whole)
    for key, held in found.held.items():
        for ino, blocks in held.data.items():
            gone = key in entire or ino in goes.get(key, ())
            (inside if gone else outside).update(blocks)
    return inside - outside


def data_below(held: Held, inside: Iterable[int]) -> set[int]:
    return set().union(*(held.data.get(ino, set()) for ino in inside))


def path_of(place: Place, top: bytes) -> bytes:
    names = []
    while place.parent is not None:
        names.append(place.name)
        place = place.parent
    return b"/".join(([top] if top else []) + names[::-1])


# --- one argument ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", seeds(3, 8))
def test_every_place_is_what_its_references_say(seed: int) -> None:
    """Promise: total and exclusive of every file and directory match a count of all references."""

    def look(history: History, choice: random.Random) -> None:
        found = holdings(history.disk)
        for record in [history.filesystem.record, *choice.sample(history.records, 1)]:
            key = root_key(history, record)
            held = found.held[key]
            paths = held.paths()
            for path in [b"", choice.choice(sorted(paths)), choice.choice(sorted(paths))]:
                top = usage_of_path(history.filesystem, argument(history, record, path))
                met = set()
                for place in top.walk():
                    here = path_of(place, path)
                    met.add(here)
                    inside = held.below(here)
                    gone = removed(found, {key: held.complete(inside)})
                    assert place.total == len(data_below(held, inside)), here
                    assert place.exclusive == len(gone), here
                    assert place.shared == place.total - place.exclusive >= 0
                    assert place.is_directory == stat.S_ISDIR(held.inodes[paths[here]].mode)
                expected = {
                    each
                    for each in paths
                    if each == path or not path or each.startswith(path + b"/")
                }
                assert met == expected

    each_moment(seed, look)


@pytest.mark.parametrize("seed", seeds(3, 8, 50))
def test_orphans_are_what_their_references_say(seed: int) -> None:
    """Promise: orphans are all files deleted while open, with what each of them holds."""

    def look(history: History, _choice: random.Random) -> None:
        found = holdings(history.disk)
        live = found.live
        place = usage_of_orphans(history.filesystem)
        assert (place is None) == (not live.orphans)
        if place is None:
            return
        assert [each.name for each in place.children] == [
            b"inode %d" % ino for ino in sorted(live.orphans)
        ]
        assert place.total == len(data_below(live, live.orphans))
        assert place.exclusive == len(removed(found, {live.key: live.orphans}))
        for ino, each in zip(sorted(live.orphans), place.children, strict=True):
            assert each.total == len(live.data.get(ino, set()))
            assert each.exclusive == len(removed(found, {live.key: {ino}}))

    each_moment(seed, look)


@pytest.mark.parametrize("seed", seeds(2, 4, 60))
def test_snapshots_as_a_whole_are_what_their_references_say(seed: int) -> None:
    """Promise: the directory of all snapshots has the numbers of their union, and of each."""

    def look(history: History, _choice: random.Random) -> None:
        found = holdings(history.disk)
        top = usage_of_snapshots(owner_sets(history.filesystem))
        snapshots = [found.held["snapshot", record.root_id] for record in history.records]
        assert top.total == len(set().union(*(held.data_blocks for held in snapshots)))
        assert top.exclusive == len(removed(found, {}, [held.key for held in snapshots]))
        assert [each.name.decode() for each in top.children] == [held.name for held in snapshots]
        for held, each in zip(snapshots, top.children, strict=True):
            assert each.total == len(held.data_blocks)
            assert each.exclusive == len(removed(found, {}, [held.key]))

    each_moment(seed, look)


# --- several --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", seeds(3, 8, 100))
def test_several_together_are_what_their_references_say(seed: int) -> None:
    """Promise: arguments of any roots count as one set, also when nested or named twice."""

    def look(history: History, choice: random.Random) -> None:
        found = holdings(history.disk)
        for _ in range(12):
            arguments, expected = some_arguments(history, found, choice)
            whole_records = (
                choice.sample(history.records, choice.randint(1, len(history.records)))
                if choice.random() < 0.4 and history.records
                else []
            )
            require_together(history, found, arguments, expected, whole_records)

    each_moment(seed, look)


def some_arguments(
    history: History, found: Holdings, choice: random.Random
) -> tuple[list[Argument], list[tuple[Key, bytes]]]:
    """A few paths of a few roots."""
    records = choice.sample(history.records, min(len(history.records), choice.randint(0, 2)))
    if not records or choice.random() < 0.7:
        records.append(history.filesystem.record)
    arguments, expected = [], []
    for _ in range(choice.randint(1, 6)):
        record = choice.choice(records)
        key = root_key(history, record)
        paths = found.held[key].paths()
        with_data = [path for path, ino in paths.items() if found.held[key].data.get(ino)]
        path = choice.choice(sorted(with_data if with_data and choice.random() < 0.7 else paths))
        if choice.random() < 0.2 and expected:
            key, path = choice.choice(expected)
            record = next(each for each in records if root_key(history, each) == key)
        if choice.random() < 0.2:
            path = path.rpartition(b"/")[0]
        arguments.append(argument(history, record, path))
        expected.append((key, path))
    return arguments, expected


def require_together(
    history: History,
    found: Holdings,
    arguments: Sequence[Argument],
    expected: Sequence[tuple[Key, bytes]],
    whole_records: Sequence[RootRecord],
) -> None:
    whole = whole_of(history, whole_records) if whole_records else None
    entire = [root_key(history, record) for record in whole_records]
    place = usage_together(history.filesystem, arguments, whole)
    inside: dict[Key, dict[int, set[Edge]]] = {}
    for key, path in expected:
        for ino, edges in found.held[key].below(path).items():
            inside.setdefault(key, {}).setdefault(ino, set()).update(edges)
    total = set().union(
        *(data_below(found.held[key], names) for key, names in inside.items()),
        *(found.held[key].data_blocks for key in entire),
    )
    goes = {key: found.held[key].complete(names) for key, names in inside.items()}
    assert place.total == len(total), expected
    assert place.exclusive == len(removed(found, goes, entire)), (expected, entire)


def whole_of(history: History, records: Sequence[RootRecord]) -> Whole:
    """Whole roots as arguments, with the runs of every leaf below them."""
    surveyed = survey(history.filesystem)
    sets, structure = surveyed.sets, surveyed.structure
    bits = {sets.bit(OwnerKind.SNAPSHOT, record.root_id) for record in records}
    reached = ~sets.within(set(range(len(sets.owners))) - bits)
    runs = np.repeat(reached[surveyed.labels], np.diff(structure.run_from))
    return Whole(records, structure.run_first[runs], structure.run_count[runs].astype(np.int64))


def test_file_that_is_named_beside_its_directory_goes_once() -> None:
    """Promise: a file named beside the directory that holds it is counted once."""
    history = History(0, small_files=0)
    live, filesystem = history.live, history.filesystem
    below = live.create(1, b"below", 0o040755, 0, 0).ino
    ino = live.create(below, b"file", 0o100644, 0, 0).ino
    live.write(ino, 0, b"1" * 10 * BLOCK_SIZE_BYTES)
    history.commit()

    def together(*paths: bytes) -> tuple[int, int]:
        arguments = [argument(history, filesystem.record, path) for path in paths]
        place = usage_together(filesystem, arguments)
        return place.total, place.exclusive

    assert together() == (0, 0)
    assert together(b"below/file") == (10, 10)
    assert together(b"below/file", b"below/file") == (10, 10)
    assert together(b"below", b"below/file") == (10, 10)
    assert together(b"below/file", b"below") == (10, 10)
    assert together(b"", b"below/file", b"below") == (10, 10)
    live.link(ino, ROOT_INO, b"outside")
    history.commit()
    assert together(b"below", b"below/file") == (10, 0), "a name outside stays"
    assert together(b"below/file", b"below/file") == (10, 0)
    assert together(b"below", b"outside") == (10, 10)


# --- where `btrfs filesystem du` is wrong ---------------------------------------------------------


class Cases:
    """A filesystem of files whose sizes are given in MiB."""

    def __init__(self) -> None:
        self.history = History(0, small_files=0, copies=2)

    def write(self, name: bytes, mib: int, at: int = 0) -> int:
        live = self.history.live
        inode = live.find(ROOT_INO, name) or live.create(ROOT_INO, name, 0o100644, 0, 0)
        for number in range(mib):
            live.write(inode.ino, (at + number) << 20, self.history.choice.randbytes(1 << 20))
        return inode.ino

    def remove(self, *names: bytes) -> None:
        for name in names:
            ino = self.history.live.unlink(ROOT_INO, name).ino
            while not self.history.live.reclaim(ino):
                pass
        self.history.commit()

    def snapshot(self, name: str) -> RootRecord:
        filesystem = self.history.filesystem
        filesystem.apply(CreateSnapshot(name))
        return filesystem.catalog.snapshot(name)

    def usage(self, record: RootRecord, path: bytes = b"") -> tuple[float, float]:
        place = usage_of_path(self.history.filesystem, argument(self.history, record, path))
        return place.total / MIB_BLOCKS, place.exclusive / MIB_BLOCKS

    def together(self, *records: RootRecord) -> tuple[float, float]:
        arguments = [argument(self.history, record, b"") for record in records]
        place = usage_together(self.history.filesystem, arguments)
        return place.total / MIB_BLOCKS, place.exclusive / MIB_BLOCKS

    def frees(self, *records: RootRecord) -> float:
        return simulate_deletion(self.history.filesystem, records).piece_count.sum() / MIB_BLOCKS


def test_three_snapshots_of_a_deleted_file_free_it_together() -> None:
    """Promise: 10 MiB that three snapshots share are exclusive to the three, but to none alone."""
    cases = Cases()
    cases.write(b"file", 10)
    records = [cases.snapshot(f"s{number}") for number in range(3)]
    cases.remove(b"file")
    for record in records:
        assert cases.usage(record) == (10, 0)
    assert cases.together(*records) == (10, 10)
    assert cases.together(*records[:2]) == (10, 0)
    top = usage_of_snapshots(owner_sets(cases.history.filesystem))
    assert (top.total / MIB_BLOCKS, top.exclusive / MIB_BLOCKS) == (10, 10)
    assert [(place.total, place.exclusive) for place in top.children] == [(10 * MIB_BLOCKS, 0)] * 3
    assert cases.frees(*records) == 10


def test_file_and_its_reflink_in_one_snapshot_count_once() -> None:
    """Promise: blocks shared within one snapshot count once, and as exclusive to it."""
    cases = Cases()
    live = cases.history.live
    source = cases.write(b"file", 6)
    target = live.create(ROOT_INO, b"copy", 0o100644, 0, 0).ino
    for at in range(6):
        assert live.reflink(live, source, at << 20, target, at << 20, 1 << 20) == 1 << 20
    record = cases.snapshot("s4")
    cases.remove(b"file", b"copy")
    assert cases.usage(record) == (6, 6)
    assert cases.usage(record, b"file") == (6, 0), "its copy stays"
    assert cases.usage(record, b"copy") == (6, 0)
    assert cases.frees(record) == 6


def test_rewritten_part_of_a_file_is_not_pinned_by_the_rest() -> None:
    """Promise: of 8 MiB with 7 rewritten, the snapshot alone keeps the old 7; no block is lost."""
    cases = Cases()
    cases.write(b"file", 8)
    record = cases.snapshot("before")
    cases.write(b"file", 7)
    cases.history.commit()
    live = cases.history.filesystem.record
    assert cases.usage(live) == (8, 7)
    assert cases.usage(record) == (8, 7)
    assert cases.together(live, record) == (15, 15)
    assert cases.frees(record) == 7
    filesystem = cases.history.filesystem
    before = filesystem.space()
    filesystem.apply(DeleteSnapshots(("before",)))
    filesystem.work_drops()
    assert (before.tree - filesystem.space().tree) // MIB_BLOCKS == 7
    assert cases.usage(filesystem.record) == (8, 8)


def test_what_a_path_cannot_free_is_not_exclusive() -> None:
    """Promise: what a hard link outside, an open file or the drop queue keeps is not exclusive."""
    history = History(0, small_files=0)
    live, filesystem = history.live, history.filesystem
    folder = live.create(1, b"folder", 0o040755, 0, 0).ino
    ino = live.create(folder, b"file", 0o100644, 0, 0).ino
    live.write(ino, 0, b"1" * 10 * BLOCK_SIZE_BYTES)
    live.link(ino, folder, b"again")
    history.commit()
    top = usage_of_path(filesystem, argument(history, filesystem.record, b"folder"))
    assert (top.total, top.exclusive) == (10, 10)
    assert [(place.total, place.exclusive) for place in top.children] == [(10, 0), (10, 0)]
    open_ino = live.create(1, b"open", 0o100644, 0, 0).ino
    live.reflink(live, ino, 0, open_ino, 0, 4 * BLOCK_SIZE_BYTES)
    live.unlink(1, b"open")
    history.commit()
    top = usage_of_path(filesystem, argument(history, filesystem.record, b"folder"))
    assert (top.total, top.exclusive) == (10, 6)
    filesystem.apply(CreateSnapshot("one"))
    history.filesystem.apply(DeleteSnapshots(("one",)))
    top = usage_of_path(filesystem, argument(history, filesystem.record, b"folder"))
    assert (top.total, top.exclusive) == (10, 0), "the queue has not given it back"
    filesystem.work_drops()
    top = usage_of_path(filesystem, argument(history, filesystem.record, b"folder"))
    assert (top.total, top.exclusive) == (10, 6)


def test_paths_are_followed_as_they_stand() -> None:
    """Promise: a path resolves to its inode or to none, and one with '..' is refused."""
    history = History(0, small_files=0)
    live = history.live
    folder = live.create(1, b"folder", 0o040755, 0, 0).ino
    ino = live.create(folder, b"file", 0o100644, 0, 0).ino
    history.commit()
    expected: list[tuple[bytes, int | None]] = [
        (b"", ROOT_INO),
        (b"/", ROOT_INO),
        (b"folder//file", ino),
        (b"./folder/./file/", ino),
        (b"folder/none", None),
        (b"folder/file/below", None),
    ]
    for path, wanted in expected:
        inode = resolve(live, path)
        assert (inode and inode.ino) == wanted, path
    for path in (b"..", b"folder/..", b"folder/../folder"):
        with pytest.raises(OSError, match=r"must not contain \.\."):
            resolve(live, path)
