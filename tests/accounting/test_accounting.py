"""Promise C11: what snapshots cost; every algorithm against sets of blocks and real deletions.

The histories are random (tests/model/histories.py); a failure names the seed.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pytest

from cowfs.accounting.owners import (
    Owner,
    OwnerKind,
    OwnerSets,
    Survey,
    _SetTable,
    members,
    owner_sets,
    survey,
)
from cowfs.accounting.snapshot_usage import referenced_blocks, written_blocks
from cowfs.accounting.virtual_drop import simulate_deletion
from cowfs.history.edits import CreateSnapshot, DeleteSnapshots
from cowfs.history.filesystem import Filesystem
from cowfs.history.images import make_filesystem, open_filesystem, restore_generation
from cowfs.history.records import RootRecord
from cowfs.storage.device import Device
from tests.model.devices import MemoryDevice
from tests.model.histories import History
from tests.model.holdings import Holdings, Key, holdings
from tests.model.recount import recount
from tests.sizes import seeds

HISTORIES = (3, 8)  # in the short and in the long run
MOMENTS = 4
STEPS = 60


def each_moment(
    seed: int, look: Callable[[History, random.Random], None], **wanted: object
) -> None:
    """Run a history, and call `look` now and then, right after a commit."""
    history = History(seed, **wanted)  # type: ignore[arg-type]
    choice = random.Random(seed)
    for moment in range(MOMENTS):
        history.run(STEPS)
        try:
            look(history, choice)
        except BaseException as error:
            error.add_note(f"seed {seed}, moment {moment}")
            raise


def key_of(owner: Owner) -> Key:
    return str(owner.kind), owner.number


def by_bits(found: Holdings, owners: Sequence[Owner]) -> dict[int, list[int]]:
    """Counts of node and data blocks by the roots that reach them, the roots as bits of an int."""
    bits = {key_of(owner): bit for bit, owner in enumerate(owners)}
    nodes = set().union(*(held.node_blocks for held in found.held.values()))
    table: dict[int, list[int]] = {}
    for block, keys in found.owners().items():
        mask = sum(1 << bits[key] for key in keys)
        table.setdefault(mask, [0, 0])[block not in nodes] += 1
    return table


def table_of(sets: OwnerSets) -> dict[int, list[int]]:
    """The same counts, from owner sets."""
    rows = members(sets.sets, len(sets.owners))
    masks = [sum(1 << int(bit) for bit in np.flatnonzero(row)) for row in rows]
    assert len(set(masks)) == len(masks), "a set twice"
    assert 0 not in masks, "a set of no owner"
    amounts = zip(sets.nodes.tolist(), sets.data.tolist(), strict=True)
    return {mask: list(both) for mask, both in zip(masks, amounts, strict=True)}


def some_sets(records: Sequence[RootRecord], choice: random.Random) -> list[list[RootRecord]]:
    """Each record alone, all together, and some random sets; the oldest first."""
    count = len(records)
    found = [[record] for record in records] + [list(records)] * (count > 1)
    for _ in range(4 if count > 2 else 0):
        found.append(sorted(choice.sample(records, choice.randint(2, count)), key=_age))
    return found


def _age(record: RootRecord) -> tuple[int, int]:
    return record.created_generation, record.root_id


def bits_of(sets: OwnerSets, records: Iterable[RootRecord]) -> list[int]:
    return [sets.bit(OwnerKind.SNAPSHOT, record.root_id) for record in records]


def keys_of(records: Iterable[RootRecord]) -> list[Key]:
    return [("snapshot", record.root_id) for record in records]


# --- owner sets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", seeds(*HISTORIES))
def test_owner_sets_are_those_of_every_block(seed: int) -> None:
    """Promise: each block is in exactly one set: that of all the roots that reach it."""

    def look(history: History, _choice: random.Random) -> None:
        found = holdings(history.disk)
        counted = recount(history.disk)
        counted.require_exact()
        assert found.references == counted.expected, "the two counters of the tests"
        for filesystem in (history.filesystem, open_filesystem(history.disk, writable=False)):
            sets = owner_sets(filesystem)
            assert {key_of(owner) for owner in sets.owners} == found.held.keys()
            assert table_of(sets) == by_bits(found, sets.owners)
            space = filesystem.space()
            assert sets.total().total == space.tree
            catalog = sets.exclusive([len(sets.owners) - 1])
            assert sets.owners[-1].kind == OwnerKind.CATALOG
            assert (catalog.total, catalog.data) == (space.catalog, 0)
            assert int(sets.nodes.sum() + sets.data.sum()) == space.used

    each_moment(seed, look)


@pytest.mark.parametrize("seed", seeds(*HISTORIES))
def test_labels_of_nodes_are_the_roots_that_reach_them(seed: int) -> None:
    """Promise: a survey labels each node with the roots from which a walk reaches it."""

    def look(history: History, _choice: random.Random) -> None:
        found = holdings(history.disk)
        surveyed = survey(history.filesystem)
        require_labels(found, surveyed)

    each_moment(seed, look)


def require_labels(found: Holdings, surveyed: Survey) -> None:
    owners = surveyed.sets.owners
    rows = members(surveyed.sets.sets[surveyed.labels], len(owners))
    by_node = {
        int(block): {key_of(owners[bit]) for bit in np.flatnonzero(row)}
        for block, row in zip(surveyed.structure.nodes["block"], rows, strict=True)
    }
    expected: dict[int, set[Key]] = {}
    for key, held in found.held.items():
        for block in held.node_at:
            expected.setdefault(block, set()).add(key)
    assert by_node == expected


@pytest.mark.parametrize("seed", seeds(*HISTORIES))
def test_numbers_of_every_root_at_once_are_those_of_each(seed: int) -> None:
    """Promise: the numbers of every root, and of pairs, match sets of its blocks."""

    def look(history: History, _choice: random.Random) -> None:
        found = holdings(history.disk)
        nodes = set().union(*(held.node_blocks for held in found.held.values()))

        def amounts(blocks: set[int]) -> list[int]:
            return [len(blocks & nodes), len(blocks - nodes)]

        sets = owner_sets(history.filesystem)
        count = sets.snapshot_count
        keys = [key_of(owner) for owner in sets.owners]
        each = {
            what: sets.each(what).tolist()
            for what in ("referenced", "exclusive", "written", "cumulative")
        }
        held = [found.held[key] for key in keys]
        for bit, one in enumerate(held):
            parent = found.held.get(("snapshot", one.parent))
            before = parent.blocks if parent is not None else set()
            assert each["referenced"][bit] == amounts(one.blocks), one
            assert each["exclusive"][bit] == amounts(found.exclusive([one.key])), one
            assert each["written"][bit] == amounts(one.blocks - before), one
            for what, number in (
                ("referenced", sets.referenced(bit)),
                ("exclusive", sets.exclusive([bit])),
                ("written", sets.written(bit)),
            ):
                assert list(number) == each[what][bit], what
            upto = amounts(found.exclusive(keys[: bit + 1])) if bit < count else [0, 0]
            assert each["cumulative"][bit] == upto
        owners = Counter(keys for keys in found.owners().values() if len(keys) == 2)
        pairs = {
            tuple(sorted(keys.index(key) for key in both)): blocks
            for both, blocks in owners.items()
            if all(kind == "snapshot" for kind, _ in both)
        }
        assert sets.pairs() == pairs
        for record in history.records:
            one = found.held["snapshot", record.root_id]
            assert referenced_blocks(history.filesystem, record) == len(one.blocks)
            parent = found.held.get(("snapshot", record.parent_id))
            fresh = one.blocks - (parent.blocks if parent else set())
            assert written_blocks(history.filesystem, record) == len(fresh)

    each_moment(seed, look)


@pytest.mark.parametrize("seed", seeds(3, 8))
def test_numbers_do_not_depend_on_how_many_are_counted_at_a_time(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: counting the tables in parts gives the same numbers as counting them whole."""

    def look(history: History, _choice: random.Random) -> None:
        whole = owner_sets(history.filesystem)
        names = ("referenced", "exclusive", "written", "cumulative")
        expected = [whole.each(name).tolist() for name in names]
        with monkeypatch.context() as patch:
            patch.setattr("cowfs.accounting.owners.COUNTED_CELLS_MAX", 7)
            patch.setattr("cowfs.accounting.owners.UNION_WORDS_MAX", 3)
            parts = owner_sets(history.filesystem)
            assert table_of(parts) == table_of(whole)
            assert [parts.each(name).tolist() for name in names] == expected

    each_moment(seed, look)


def test_seventy_snapshots_need_two_words() -> None:
    """Promise: more roots than a word has bits are counted as well as few."""
    history = History(5, small_files=20)
    choice = random.Random(5)
    for number in range(70):
        for _ in range(3):
            history.choice.choice(
                (history.write_new, history.overwrite, history.punch, history.share_in_live)
            )()
        history.filesystem.apply(CreateSnapshot(f"n{number}"))
    history.filesystem.apply(
        DeleteSnapshots(
            (
                "n3",
                "n64",
                "n65",
            )
        )
    )
    history.drop_some()
    history.commit()
    found = holdings(history.disk)
    sets = owner_sets(history.filesystem)
    assert len(sets.owners) > 64
    assert sets.sets.shape[1] == 2
    assert table_of(sets) == by_bits(found, sets.owners)
    records = history.records
    for _ in range(20):
        chosen = choice.sample(records, choice.choice((1, 2, 30, 66)))
        blocks = len(found.exclusive(keys_of(chosen)))
        assert sets.exclusive(bits_of(sets, chosen)).total == blocks
        assert simulate_deletion(history.filesystem, chosen).blocks == blocks
    referenced = sets.each("referenced").sum(axis=1).tolist()
    cumulative = sets.each("cumulative").sum(axis=1).tolist()
    keys = [key_of(owner) for owner in sets.owners]
    assert referenced == [len(found.held[key].blocks) for key in keys]
    for bit in (0, 1, 62, 63, 64, 65, len(keys) - 1):
        assert sets.referenced(bit).total == referenced[bit]
        assert list(sets.written(bit)) == sets.each("written")[bit].tolist()
    for bit in range(sets.snapshot_count):
        assert cumulative[bit] == len(found.exclusive(keys[: bit + 1]))


class FirstOnes:
    """A random generator whose first numbers are all 1, so that sums do not tell sets apart."""

    def __init__(self) -> None:
        self.drawn = 0
        self._random = np.random.default_rng(1)

    def integers(
        self, low: int, high: int, shape: tuple[int, int], kind: type[np.uint64]
    ) -> np.ndarray:
        self.drawn += 1
        if self.drawn == 1:
            return np.ones(shape, kind)
        return self._random.integers(low, high, shape, kind)


def test_sets_that_look_alike_by_their_sums_are_told_apart() -> None:
    """Promise: sets are compared by their members, so equal sums never merge two sets."""
    table = _SetTable(70)
    table._random = FirstOnes()  # type: ignore[assignment]
    # With these sums {0, 3} looks like {64, 67}, whose bits are in the other word.
    groups, members_of = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 3, 64, 67, 0, 3])
    numbers = table.unions(groups, members_of)
    assert table._random.drawn == 2  # type: ignore[attr-defined]
    assert numbers[0] == numbers[2] != numbers[1]
    rows = table.rows[numbers].tolist()
    assert rows == [[0b1001, 0], [0, 0b1001], [0b1001, 0]]


def test_tree_of_three_levels_is_counted() -> None:
    """Promise: inner nodes below inner nodes are counted as well."""
    history = History(1, small_files=1750, copies=2)
    for _ in range(2):
        history.run(40)
    found = holdings(history.disk)
    assert max(level for level, _, _ in found.live.node_at.values()) == 2
    surveyed = survey(history.filesystem)
    require_labels(found, surveyed)
    assert table_of(surveyed.sets) == by_bits(found, surveyed.sets.owners)
    for chosen in some_sets(history.records, random.Random(1)):
        blocks = len(found.exclusive(keys_of(chosen)))
        assert simulate_deletion(history.filesystem, chosen).blocks == blocks


@pytest.mark.parametrize("seed", seeds(2, 4))
def test_what_sets_free_is_monotone_and_supermodular(seed: int) -> None:
    """Promise: more snapshots free more, and two sets together at least the sum of both."""

    def look(history: History, choice: random.Random) -> None:
        sets = owner_sets(history.filesystem)
        every = range(len(sets.owners))

        def freed(bits: Iterable[int]) -> int:
            return sets.exclusive(bits).total

        for _ in range(40):
            one = {bit for bit in every if choice.random() < 0.5}
            two = {bit for bit in every if choice.random() < 0.5}
            assert freed(one) <= freed(one | two)
            assert freed(one | two) + freed(one & two) >= freed(one) + freed(two)
        assert freed(every) == history.filesystem.space().used
        assert freed([]) == 0

    each_moment(seed, look)


# --- deletions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", seeds(*HISTORIES, 100))
def test_deletion_frees_what_every_algorithm_says(seed: int) -> None:
    """Promise: all four ways to compute what a deletion frees agree with the real deletion.

    The ways are virtual drop, owner sets, simulation and sets of blocks.
    """

    def look(history: History, choice: random.Random) -> None:
        found = holdings(history.disk)
        filesystem = history.filesystem
        sets = owner_sets(filesystem)
        for chosen in some_sets(history.records, choice):
            blocks = len(found.exclusive(keys_of(chosen)))
            assert sets.exclusive(bits_of(sets, chosen)).total == blocks, "owner sets"
            shuffled = choice.sample(chosen, len(chosen))
            assert simulate_deletion(filesystem, shuffled).blocks == blocks, "virtual drop"
            if choice.random() < 0.4:
                assert freed_really(history, chosen, drain=False) == blocks, "the real deletion"
                drops = [key for key in found.held if key[0] == "drop"]
                together = len(found.exclusive([*keys_of(chosen), *drops]))
                assert freed_really(history, chosen, drain=True) == together, "with the queue"

    each_moment(seed, look)


def freed_really(history: History, records: Sequence[RootRecord], *, drain: bool) -> int:
    """Delete these snapshots on a copy of the image; return what that gave back.

    Args:
        drain: empty the drop queue of earlier deletions too; else those stay in it.
    """
    filesystem = history.copy()
    before = filesystem.space().tree
    if not drain:
        filesystem.drops._waiting.clear()  # as if damage kept each from proceeding
    filesystem.apply(DeleteSnapshots(tuple([record.name for record in records])))
    filesystem.work_drops()
    assert len(filesystem.drops.progress()) == (
        0 if drain else len(history.filesystem.drops._drops)
    )
    return before - filesystem.space().tree


@pytest.mark.parametrize("seed", seeds(*HISTORIES, 200))
def test_simulation_knows_blocks_roots_and_files(seed: int) -> None:
    """Promise: a simulated deletion names all roots and all files of each piece it frees."""

    def look(history: History, choice: random.Random) -> None:
        found = holdings(history.disk)
        live = history.filesystem.record
        for chosen in some_sets(history.records, choice):
            records = [*chosen, live] if choice.random() < 0.3 else chosen
            keys = [
                ("volume" if record is live else "snapshot", record.root_id) for record in records
            ]
            held = [found.held[key] for key in keys]
            freed = simulate_deletion(history.filesystem, records)
            gone = found.exclusive(keys)
            assert freed.blocks == len(gone)
            nodes: dict[int, int] = {}
            for block in gone & set().union(*(one.node_blocks for one in held)):
                mask = sum(1 << bit for bit, one in enumerate(held) if block in one.node_blocks)
                nodes[mask] = nodes.get(mask, 0) + 1
            assert freed.node_blocks == nodes
            pieces = {}
            for number, mask in enumerate(freed.masks_of_pieces()):
                first, count = int(freed.piece_first[number]), int(freed.piece_count[number])
                runs = freed.piece_runs[freed.piece_from[number] : freed.piece_from[number + 1]]
                inos = {int(ino) for ino in freed.runs.ino[runs]}
                for block in range(first, first + count):
                    assert block not in pieces, "a block twice"
                    pieces[block] = (mask, inos)
            expected = {}
            for block in gone - set().union(*(one.node_blocks for one in held)):
                mask = sum(1 << bit for bit, one in enumerate(held) if block in one.data_blocks)
                inos = {ino for one in held for ino in one.data if block in one.data[ino]}
                expected[block] = (mask, inos)
            assert pieces == expected

    each_moment(seed, look)


# --- what earlier generations retain --------------------------------------------------------------


def retained_by_hand(device: Device, generations: Sequence[int]) -> list[int]:
    """For each generation, newest first, the number of its blocks that no newer one of them has.

    Args:
        generations: the first is the one that is surveyed.
    """
    met: set[int] = set()
    amounts = []
    for generation in generations:
        found = holdings(device, generation)
        shown = set().union(*(held.blocks for held in found.held.values()))
        amounts.append(len(shown - met))
        met |= shown
    return amounts[1:]


def require_retained(filesystem: Filesystem, device: Device) -> int:
    """Compare `retained` with a walk of the earlier generations. Returns the sum."""
    superblock = filesystem.store.superblock
    generations = range(superblock.generation, superblock.oldest_retained - 1, -1)
    retained = owner_sets(filesystem).retained
    assert retained is not None
    assert [each.generation for each in retained] == list(generations)[1:]
    amounts = retained_by_hand(device, generations)
    assert [each.blocks.total for each in retained] == amounts
    return sum(amounts)


class Unseen:
    """Blocks that were allocated and freed between two commits: no generation ever shows them.

    They are pending like everything that was freed. Data is written before the commit where it is
    shared or where much is written.
    """

    def __init__(self, filesystem: Filesystem, patch: pytest.MonkeyPatch) -> None:
        self._store = filesystem.store
        self._taken: dict[int, int] = {}
        self._freed: Counter[int] = Counter()
        space_map = filesystem.store.map
        self._take, self._drop = space_map.take, space_map.drop
        patch.setattr(space_map, "take", self.take)
        patch.setattr(space_map, "drop", self.drop)

    def take(self, first: int, count: int, kind: int) -> None:
        self._taken.update(dict.fromkeys(range(first, first + count), self._store.generation))
        self._take(first, count, kind)

    def drop(self, first: int, count: int, generation: int) -> int:
        last = self._store.map.refcounts(first, count) == 1
        blocks = np.flatnonzero(last) + first
        self._freed[generation] += sum(
            self._taken.get(block) == generation for block in blocks.tolist()
        )
        return self._drop(first, count, generation)

    def pending(self) -> int:
        oldest = self._store.superblock.oldest_retained
        return sum(count for freed, count in self._freed.items() if freed > oldest)


@pytest.mark.parametrize("seed", seeds(*HISTORIES, 300))
def test_retained_generations_are_what_is_pending(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: blocks neither in use nor free are those of earlier generations, to the block.

    Blocks that were allocated and freed between two commits are the exception.
    """
    history = History(seed)
    history.commit()
    history.commit()
    history.commit()
    unseen = Unseen(history.filesystem, monkeypatch)
    for _ in range(8):
        history.run(12)
        total = require_retained(history.filesystem, history.disk)
        pending = history.filesystem.store.map.pending_blocks
        assert total + unseen.pending() == pending, f"seed {seed}"
        again = history.copy()
        assert require_retained(again, history.disk) == total
        assert again.store.map.pending_blocks == total, f"seed {seed}: opened again"


def test_data_that_is_shared_and_overwritten_before_a_commit_waits_unseen() -> None:
    """Promise: blocks that no generation shows are pending, but not counted as retained."""
    history = History(0, small_files=0)
    live = history.live
    one, two = (live.create(1, name, 0o100644, 0, 0).ino for name in (b"one", b"two"))
    live.write(one, 0, b"1" * 40960)
    live.reflink(live, one, 0, two, 0, 4096)  # writes the data of `one` to its blocks
    live.write(one, 4096, b"2" * 36864)
    for _ in range(3):
        history.commit()
        total = require_retained(history.filesystem, history.disk)
        space_map = history.filesystem.store.map
        unseen = 9 if history.filesystem.store.superblock.generation < 4 else 0
        assert space_map.pending_blocks - total == unseen


def test_generation_that_was_restored_retains_what_the_others_show() -> None:
    """Promise: after a restore, the generations before it are counted as after any commit."""
    history = History(7)
    history.run(60)
    before = history.filesystem.store.superblock.generation
    history.run(1)
    history.run(10)
    disk = history.disk.copy()
    restore_generation(disk, before)
    filesystem = open_filesystem(disk, writable=True)
    found = holdings(disk)
    sets = owner_sets(filesystem)
    assert table_of(sets) == by_bits(found, sets.owners)
    assert require_retained(filesystem, disk) == filesystem.store.map.pending_blocks


def test_earlier_generation_that_is_damaged_is_not_told() -> None:
    """Promise: with a damaged earlier generation `retained` is None, and the sets are as before."""
    history = History(3)
    history.run(60)
    sets = owner_sets(history.filesystem)
    disk = history.disk.copy()
    generation = history.filesystem.store.superblock.generation
    for ring in (0, disk.total_blocks - 64):
        disk.damage(ring + (generation - 1) % 64, 20)
    damaged = owner_sets(open_filesystem(disk, writable=False))
    assert damaged.retained is None
    assert table_of(damaged) == table_of(sets)


def test_new_image_holds_only_its_root() -> None:
    """Promise: an image without snapshots has numbers too: it holds its root only."""
    disk = MemoryDevice(4096)
    make_filesystem(disk, label="new")
    filesystem = open_filesystem(disk, writable=False)
    sets = owner_sets(filesystem)
    assert [owner.kind for owner in sets.owners] == [OwnerKind.VOLUME, OwnerKind.CATALOG]
    assert table_of(sets) == {1: [8, 0], 2: [8, 0]}
    assert sets.each("cumulative").tolist() == [[0, 0], [0, 0]]
    assert sets.pairs() == {}
    assert sets.retained == ()
    assert simulate_deletion(filesystem, []).blocks == 0
