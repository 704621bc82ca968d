"""Promises about the files that only some snapshots keep, against the blocks of every file."""

import random
from collections.abc import Sequence

import pytest

from cowfs.accounting.owners import OwnerSets, owner_sets
from cowfs.accounting.paths import resolve
from cowfs.accounting.pinned import NAMELESS, Pinned, pinned_by
from cowfs.history.edits import CreateSnapshot
from cowfs.history.records import RootRecord
from cowfs.storage.format import BLOCK_SIZE_BYTES
from tests.accounting.test_accounting import (
    bits_of,
    each_moment,
    keys_of,
    some_sets,
    table_of,
)
from tests.model.histories import History
from tests.model.holdings import Held, holdings
from tests.sizes import seeds


def by_set(pinned: Pinned) -> dict[int, list[int]]:
    """Counts of node and data blocks by the snapshots that keep them."""
    table = {owners: [blocks, 0] for owners, blocks in pinned.metadata.items()}
    for file in pinned.files:
        table.setdefault(file.owners, [0, 0])[1] += file.blocks
    return table


def sets_within(sets: OwnerSets, records: Sequence[RootRecord]) -> dict[int, list[int]]:
    """Owner sets of these records only, as bits of their positions in `records`."""
    bits = bits_of(sets, records)
    found = {}
    for mask, amounts in table_of(sets).items():
        if not mask & ~sum(1 << bit for bit in bits):
            small = sum(1 << number for number, bit in enumerate(bits) if mask >> bit & 1)
            found[small] = amounts
    return found


@pytest.mark.parametrize("seed", seeds(4, 10))
def test_files_and_metadata_are_all_that_a_deletion_frees(seed: int) -> None:
    """Promise: each block is listed once, at the file that the newest snapshot has it in."""
    nameless = 0

    def look(history: History, choice: random.Random) -> None:
        nonlocal nameless
        found = holdings(history.disk)
        sets = owner_sets(history.filesystem)
        for records in some_sets(history.records, choice):
            pinned = pinned_by(history.filesystem, records)
            assert pinned.blocks == len(found.exclusive(keys_of(records)))
            assert by_set(pinned) == sets_within(sets, records)
            held = [found.held[key] for key in keys_of(records)]
            assert files_of(history, records, pinned) == expected_files(
                found.exclusive(keys_of(records)), held
            )
            where = [(file.path, file.owners) for file in pinned.files]
            assert len(set(where)) == len(where), "a file and a set twice"
            assert all(file.blocks > 0 for file in pinned.files)
            nameless += sum(file.path.startswith(NAMELESS) for file in pinned.files)

    each_moment(seed, look)


def files_of(
    history: History, records: Sequence[RootRecord], pinned: Pinned
) -> dict[tuple[int, int, int], int]:
    """Blocks by (newest snapshot, inode there, set), from the paths."""
    found: dict[tuple[int, int, int], int] = {}
    for file in pinned.files:
        newest = file.owners.bit_length() - 1
        volume = history.filesystem.volume(records[newest].root_id)
        assert volume is not None
        if file.path.startswith(NAMELESS):
            ino = int(file.path.removeprefix(NAMELESS + b"/inode "))
            assert not volume.get(ino).nlink, "it has a name"
        else:
            inode = resolve(volume, file.path)
            assert inode is not None, file.path
            ino = inode.ino
        where = (newest, ino, file.owners)
        assert where not in found, "a file at two of its paths"
        found[where] = file.blocks
    return found


def expected_files(gone: set[int], held: Sequence[Held]) -> dict[tuple[int, int, int], int]:
    expected: dict[tuple[int, int, int], int] = {}
    for block in gone:
        numbers = [number for number, one in enumerate(held) if block in one.data_blocks]
        if not numbers:
            continue
        newest = numbers[-1]
        ino = min(ino for ino, blocks in held[newest].data.items() if block in blocks)
        where = (newest, ino, sum(1 << number for number in numbers))
        expected[where] = expected.get(where, 0) + 1
    return expected


def test_file_that_was_deleted_while_open_has_no_name() -> None:
    """Promise: a file without a name in the snapshot is listed by its inode number."""
    history = History(0, small_files=0)
    live = history.live
    ino = live.create(1, b"open", 0o100644, 0, 0).ino
    live.write(ino, 0, b"1" * 10 * BLOCK_SIZE_BYTES)
    live.unlink(1, b"open")
    history.filesystem.apply(CreateSnapshot("with"))
    while not live.reclaim(ino):
        pass
    history.commit()
    (file,) = pinned_by(history.filesystem, history.records).files
    assert (file.path, file.owners, file.blocks) == (NAMELESS + b"/inode %d" % ino, 1, 10)


def test_path_is_that_of_the_newest_snapshot_of_the_set() -> None:
    """Promise: a file that moved is listed under its path in the newest of the snapshots."""
    history = History(0, small_files=0)
    live, filesystem = history.live, history.filesystem
    below = live.create(1, b"below", 0o040755, 0, 0).ino
    ino = live.create(1, b"file", 0o100644, 0, 0).ino
    live.write(ino, 0, b"1" * 10 * BLOCK_SIZE_BYTES)
    filesystem.apply(CreateSnapshot("one"))
    live.rename(1, b"file", below, b"moved", 0)
    live.rename(1, b"below", 1, b"under", 0)
    filesystem.apply(CreateSnapshot("two"))
    live.unlink(below, b"moved")
    while not live.reclaim(ino):
        pass
    history.commit()
    one, two = history.records
    (file,) = pinned_by(filesystem, [one, two]).files
    assert (file.path, file.owners, file.blocks) == (b"under/moved", 3, 10)
    assert pinned_by(filesystem, [one]).files == []
    assert pinned_by(filesystem, [two]).files == []
    assert pinned_by(filesystem, []).blocks == 0
