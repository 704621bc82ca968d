"""A full filesystem (C10) refuses with ENOSPC and nothing else, and can always delete.

Each case fills a small image in one way until an operation is refused, then frees it again. No
acknowledged data may be lost on the way, and the image must check clean at each stage.
"""

import contextlib
import errno
import random
import stat
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowfs.care.check import check_image
from cowfs.errors import NoSpaceError
from cowfs.files.calls import Changes
from cowfs.files.volume import Volume
from cowfs.history.edits import CreateSnapshot, DeleteSnapshots
from cowfs.history.filesystem import Filesystem
from cowfs.history.images import make_filesystem, open_filesystem
from cowfs.storage.admission import DEFAULT_LIMITS, Limits
from tests.model.behind import changing
from tests.model.devices import MemoryDevice
from tests.model.recount import recount
from tests.sizes import is_long, machine_settings, sized

ROOT = 1
BLOCK = 4096
BLOCKS_OF_NAMES = 700


def make(total_blocks: int, *, copies: bool = True, limits: Limits = DEFAULT_LIMITS) -> Filesystem:
    disk = MemoryDevice(total_blocks)
    make_filesystem(disk, duplicate_metadata=copies)
    return open_filesystem(disk, writable=True, limits=limits)


def require_clean(filesystem: Filesystem) -> None:
    filesystem.commit()
    disk = filesystem.store.device
    assert isinstance(disk, MemoryDevice)
    recount(disk).require_exact()
    report = check_image(disk)
    assert report.clean, "\n".join(map(str, report.findings[:20]))


def crashed(filesystem: Filesystem) -> Filesystem:
    disk = filesystem.store.device
    assert isinstance(disk, MemoryDevice)
    return open_filesystem(disk.crash(), writable=True)


def create(volume: Volume, name: bytes) -> int:
    return volume.create(ROOT, name, stat.S_IFREG | 0o644, 0, 0).ino


def fill(step: Callable[[int], None], most: int = 1_000_000) -> int:
    """Call `step(0)`, `step(1)`, ... until ENOSPC. Returns how many calls succeeded."""
    for number in range(most):
        try:
            step(number)
        except NoSpaceError as error:
            assert error.errno == errno.ENOSPC
            return number
    raise AssertionError("it never filled")


def block_of(number: int) -> bytes:
    return b"%016d" % number * 256


def fill_large(volume: Volume) -> int:
    name = b"large" if volume.find(ROOT, b"large") is None else b"rest"
    ino = create(volume, name)
    return fill(lambda number: volume.write(ino, number * 65536, block_of(number) * 16) and None)


def fill_blocks(volume: Volume) -> int:
    """Fill with files of one block each."""

    def step(number: int) -> None:
        ino = create(volume, b"block%d" % number)
        volume.write(ino, 0, block_of(number))

    return fill(step)


def fill_inline(volume: Volume) -> int:
    def step(number: int) -> None:
        ino = create(volume, b"inline%d" % number)
        volume.write(ino, 0, block_of(number)[:2048])

    return fill(step)


def fill_names(volume: Volume) -> int:
    return fill(lambda number: create(volume, b"name%d" % number + b"n" * 230) and None)


def fill_names_beside_data(volume: Volume) -> int:
    """Fill with names, after most of the image was filled with data.

    A block holds so many names that names alone would take most of the test's time.
    """
    admission = volume.store.admission
    ino = create(volume, b"data of names %d" % sum(1 for _ in volume.listing(ROOT)))
    size = 0
    # To the block: two fillings are compared.
    while (spare := admission.available_blocks() - BLOCKS_OF_NAMES) > 0:
        size = volume.write(ino, size, bytes(min(16, spare) * BLOCK)).size_bytes
    return fill_names(volume)


def fill_xattrs(volume: Volume) -> int:
    def step(number: int) -> None:
        ino = create(volume, b"xattr%d" % number)
        volume.setxattr(ino, b"user.a", block_of(number) * 16)

    return fill(step)


def fill_sparse(volume: Volume) -> int:
    """Fill with sparse files: each block is an extent of its own."""
    ino = create(volume, b"sparse")
    return fill(lambda number: volume.write(ino, number * 3 * BLOCK, block_of(number)) and None)


FILL_NAMES = fill_names if is_long() else fill_names_beside_data
WAYS = [fill_large, fill_blocks, fill_inline, FILL_NAMES, fill_xattrs, fill_sparse]


def contents(volume: Volume) -> dict[bytes, bytes]:
    found = {}
    for _, entry in volume.listing(ROOT):
        inode = volume.get(entry.ino)
        data = volume.read(entry.ino, 0, min(inode.size_bytes, 1 << 20))
        found[entry.name] = data + b"".join(
            volume.getxattr(entry.ino, name) for name in volume.listxattr(entry.ino)
        )
    return found


def delete_everything(filesystem: Filesystem) -> None:
    """Remove and reclaim every file, with a commit now and then as the timer would make."""
    volume = filesystem.live
    for number, (_, entry) in enumerate(list(volume.listing(ROOT))):
        volume.unlink(ROOT, entry.name)
        while not volume.reclaim(entry.ino):
            pass
        if number % 500 == 499:
            filesystem.commit()


@pytest.mark.parametrize(
    ("total_blocks", "copies"),
    [(4096, True), (4500, False), pytest.param(6000, True, marks=pytest.mark.long)],
    ids=["small", "one-copy", "larger"],
)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_fill_to_the_end_keeps_everything_and_can_delete_all(
    way: Callable[[Volume], int], total_blocks: int, copies: bool
) -> None:
    """Promise C10: a full filesystem says ENOSPC, loses nothing, and lets everything be deleted."""
    filesystem = make(total_blocks, copies=copies)
    empty = filesystem.space().used
    count = way(filesystem.live)
    assert count > 10
    with contextlib.suppress(NoSpaceError):
        fill_large(filesystem.live)  # the little that is left
    require_clean(filesystem)
    before = contents(filesystem.live)
    assert filesystem.store.failed is None

    filesystem = crashed(filesystem)
    assert contents(filesystem.live) == before
    delete_everything(filesystem)
    require_clean(filesystem)
    assert filesystem.space().used <= empty + 8
    assert way(filesystem.live) >= count * 9 // 10, "space was lost"
    require_clean(filesystem)


@pytest.mark.parametrize(
    ("total_blocks", "operations"),
    [(65536, DEFAULT_LIMITS.ceiling_operations), (16384, 16), (4096, 2), (8192, 1)],
    ids=["256 MiB", "64 MiB", "16 MiB", "32 MiB"],
)
@pytest.mark.parametrize("step_blocks", [1, 16], ids=["4 KiB", "64 KiB"])
def test_room_that_large_writes_took_is_not_given_to_small_ones_again(
    total_blocks: int, operations: int, step_blocks: int
) -> None:
    """Promise C10: room that a check found is not used again after large writes filled it.

    Small operations once skipped the room check after large writes had filled the image.
    """
    filesystem = make(total_blocks, limits=Limits(ceiling_operations=operations))
    volume = filesystem.live
    available = filesystem.space().available
    create(volume, b"touched")
    ino = create(volume, b"large")
    chunk = bytes(256 * BLOCK)
    size = 0
    for part in (chunk, chunk[: step_blocks * BLOCK], chunk[:BLOCK]):
        with contextlib.suppress(NoSpaceError):
            while True:
                volume.write(ino, size, part)
                size += len(part)
    filesystem.commit()
    assert filesystem.store.failed is None
    # All announced space can be written, but for a few percent and the last large write.
    assert available * 97 // 100 - 256 <= size // BLOCK <= available
    volume.unlink(ROOT, b"touched")
    delete_everything(filesystem)
    require_clean(filesystem)


ORDERS = ["listing", "shuffled"]  # of deletion; shuffled copies every node


def delete_in_order(filesystem: Filesystem, order: str, *, crash_every: int = 0) -> Filesystem:
    """Remove and reclaim every file, whatever snapshots hold; a refusal fails the test."""
    names = [entry.name for _, entry in filesystem.live.listing(ROOT)]
    if order == "shuffled":
        random.Random(len(names)).shuffle(names)
    for number, name in enumerate(names):
        if crash_every and number % crash_every == crash_every // 2:
            filesystem.commit()
            filesystem = crashed(filesystem)
            filesystem.reclaim_orphans()
        volume = filesystem.live
        inode = volume.unlink(ROOT, name)
        while not volume.reclaim(inode.ino):
            pass
    return filesystem


def try_snapshot(filesystem: Filesystem, name: str) -> bool:
    """Make a snapshot, or see it refused for lack of space, with nothing changed."""
    try:
        filesystem.apply(CreateSnapshot(name))
    except NoSpaceError as error:
        assert "snapshot" in str(error)
        assert filesystem.catalog.find(name) is None
        assert filesystem.store.failed is None
        return False
    return True


def delete_snapshots_one_by_one(filesystem: Filesystem) -> None:
    while filesystem.catalog.snapshots():
        kept = filesystem.catalog.snapshots()
        filesystem.apply(DeleteSnapshots((kept[0].name,)))
        filesystem.work_drops()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("way", "total_blocks", "copies"),
    [(way, 4800, True) for way in WAYS]
    + [
        pytest.param(way, 4500, False, marks=pytest.mark.long)
        for way in WAYS
        if way is not FILL_NAMES
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_full_with_snapshots_deletes_every_file_and_every_snapshot(
    way: Callable[[Volume], int], total_blocks: int, copies: bool, order: str
) -> None:
    """Promise C10: at 100 % every removal works, even if snapshots hold all and nothing is freed.

    The same holds after crashes on the way.
    """
    filesystem = make(total_blocks, copies=copies)
    empty = filesystem.space().used
    volume = filesystem.live
    ino = create(volume, b"first")
    for number in range(40):
        volume.write(ino, number * 65536, block_of(number) * 16)
    assert try_snapshot(filesystem, "one")
    assert way(volume) > 10
    for name in ("two", "three"):  # there may be no room to delete what these would hold
        try_snapshot(filesystem, name)
    with contextlib.suppress(NoSpaceError):
        fill_large(volume)
    require_clean(filesystem)

    count = sum(1 for _ in volume.listing(ROOT))
    filesystem = crashed(filesystem)
    filesystem = delete_in_order(filesystem, order, crash_every=max(2, count // 3))
    require_clean(filesystem)
    for names in (["two"], ["one", "three"]):
        there = {record.name for record in filesystem.catalog.snapshots()}
        filesystem.apply(DeleteSnapshots(tuple([name for name in names if name in there])))
        filesystem = crashed(filesystem)
        filesystem.work_drops()
        require_clean(filesystem)
    assert filesystem.space().used <= empty + 8


@pytest.mark.parametrize("way", [FILL_NAMES, fill_inline, fill_xattrs, fill_blocks])
def test_snapshot_of_a_filesystem_full_of_metadata_waits_until_deleting_would_fit(
    way: Callable[[Volume], int],
) -> None:
    """Promise C10: a snapshot under which no file could be deleted is refused, with a reason.

    Deleting makes room for it; from then on every other file can be deleted under it.
    """
    filesystem = make(4096)
    way(filesystem.live)
    assert not try_snapshot(filesystem, "late")
    names = [entry.name for _, entry in filesystem.live.listing(ROOT)]
    while not try_snapshot(filesystem, "late"):
        for name in [names.pop() for _ in range(min(25, len(names)))]:
            inode = filesystem.live.unlink(ROOT, name)
            while not filesystem.live.reclaim(inode.ino):
                pass
    assert names, "the snapshot came too late"
    with contextlib.suppress(NoSpaceError):
        fill_large(filesystem.live)
    filesystem = crashed(filesystem)
    filesystem = delete_in_order(filesystem, "shuffled")
    require_clean(filesystem)
    delete_snapshots_one_by_one(filesystem)
    require_clean(filesystem)


@pytest.mark.parametrize("seed", [6, 92])
def test_names_of_some_images_leave_free_blocks_in_small_pieces(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise C10: in whatever order the names hash, files can be deleted under a snapshot.

    With these seeds, files of one block once left free space in pieces too small for nodes.
    """
    monkeypatch.setattr("os.urandom", random.Random(seed).randbytes)
    test_snapshot_of_a_filesystem_full_of_metadata_waits_until_deleting_would_fit(fill_blocks)


def test_room_to_delete_under_a_snapshot_is_known_after_a_remount() -> None:
    """Promise C10: each mount counts anew what snapshots share, and keeps that reserve unspent."""
    filesystem = make(6000)
    fill_names_some(filesystem.live, 4000)
    assert try_snapshot(filesystem, "one")
    fill_names_some(filesystem.live, 5000)
    filesystem.commit()
    held = filesystem.store.admission.held_blocks()
    assert held > filesystem.store.admission.reserve_blocks
    filesystem = crashed(filesystem)
    assert filesystem.store.admission.held_blocks() == held
    filesystem.apply(DeleteSnapshots(("one",)))
    filesystem = crashed(filesystem)
    assert filesystem.store.admission.held_blocks() >= held, "a dropped snapshot still shares"
    filesystem.work_drops()
    filesystem.commit()
    assert filesystem.store.admission.held_blocks() == filesystem.store.admission.reserve_blocks


def fill_names_some(volume: Volume, stop: int) -> None:
    for number in range(stop):
        if volume.find(ROOT, b"some%d" % number) is None:
            create(volume, b"some%d" % number)


@pytest.mark.parametrize("copies", [True, False], ids=["twins", "one-copy"])
@pytest.mark.parametrize(
    ("way", "total_blocks"),
    [
        (fill_large, 16384),
        pytest.param(fill_blocks, 16384, marks=pytest.mark.long),
        (fill_xattrs, 16384),
        (fill_large, 65536),
        (fill_xattrs, 65536),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_larger_images_fill_and_empty_under_a_snapshot(
    way: Callable[[Volume], int], total_blocks: int, copies: bool
) -> None:
    """Promise C10: the reserve grows with the image as much as its need does."""
    filesystem = make(total_blocks, copies=copies)
    assert try_snapshot(filesystem, "zero")
    way(filesystem.live)
    filesystem = crashed(filesystem)
    filesystem = delete_in_order(filesystem, "shuffled" if total_blocks < 20_000 else "listing")
    delete_snapshots_one_by_one(filesystem)
    require_clean(filesystem)


@given(
    total_blocks=st.integers(4096, 9000),
    copies=st.booleans(),
    order=st.sampled_from(ORDERS),
    seed=st.integers(0, 1 << 32),
    snapshot_every=st.sampled_from([50, 400, 3000]),
)
@machine_settings(short=4, long=12, steps=1)
def test_any_mixture_fills_and_empties(
    total_blocks: int, copies: bool, order: str, seed: int, snapshot_every: int
) -> None:
    """Promise C10: any mixture of what takes space fills and empties, with snapshots on the way."""
    choice = random.Random(seed)
    weights = [choice.random() for _ in range(6)]
    filesystem = make(total_blocks, copies=copies)
    empty = filesystem.space().used
    refused = 0
    number = 0
    names: list[bytes] = []
    while refused < 12:
        number += 1
        volume = filesystem.live
        kind = choice.choices(range(6), weights)[0]
        name = b"%d" % number + b"n" * choice.choice([0, 0, 220])
        try:
            if kind == 5 and names:
                volume.rename(ROOT, names[-1], ROOT, name)
                names[-1] = name
                continue
            if kind == 4:
                volume.symlink(ROOT, name, b"t" * choice.randrange(1, 4000), 0, 0)
                names.append(name)
                continue
            ino = create(volume, name)
            names.append(name)
            if kind == 1:
                volume.write(ino, choice.randrange(100_000), bytes(choice.randrange(200_000)))
            elif kind == 2:
                volume.write(ino, 0, bytes(choice.randrange(1, 2048)))
            elif kind == 3:
                volume.setxattr(ino, b"user.x", bytes(choice.randrange(20_000)))
        except NoSpaceError:
            refused += 1
        if number % snapshot_every == 0 and len(filesystem.catalog.snapshots()) < 30:
            try_snapshot(filesystem, f"s{number}")
        if choice.random() < 0.002:
            filesystem.commit()
            filesystem = crashed(filesystem)
    assert filesystem.store.failed is None
    require_clean(filesystem)
    for _, entry in list(filesystem.live.listing(ROOT))[::7]:
        inode = filesystem.live.get(entry.ino)
        if stat.S_ISREG(inode.mode):
            filesystem.live.setattr(entry.ino, Changes(size_bytes=0))
    filesystem = crashed(filesystem)
    filesystem = delete_in_order(filesystem, order, crash_every=choice.choice([0, 200]))
    require_clean(filesystem)
    delete_snapshots_one_by_one(filesystem)
    require_clean(filesystem)
    assert filesystem.space().used <= empty + 8


def test_truncating_every_file_works_when_full_and_all_pinned() -> None:
    """Promise C10: truncating to zero works when full, also for files that a snapshot holds."""
    filesystem = make(6000)
    assert try_snapshot(filesystem, "zero")
    fill_blocks(filesystem.live)
    filesystem.commit()
    try_snapshot(filesystem, "late")
    for _, entry in list(filesystem.live.listing(ROOT)):
        filesystem.live.setattr(entry.ino, Changes(size_bytes=0))
    require_clean(filesystem)
    delete_in_order(filesystem, "listing")
    require_clean(filesystem)


@pytest.mark.parametrize("pinned", [False, True])
def test_reading_every_file_of_a_full_filesystem_does_not_eat_the_reserve(pinned: bool) -> None:
    """Promise C8, C10: access times are not updated where there is no room to store them."""
    filesystem = make(4096)
    volume = filesystem.live
    if pinned:
        assert try_snapshot(filesystem, "zero")
    fill_inline(volume)
    filesystem.commit()
    for _, entry in list(volume.listing(ROOT)):
        inode = volume.get(entry.ino)
        inode.atime_ns = 0
        volume.accessed(inode)
    require_clean(filesystem)
    assert filesystem.store.failed is None
    delete_in_order(filesystem, "shuffled")
    require_clean(filesystem)


@pytest.mark.parametrize("blocks", [1, 16, 256])
def test_refusing_writes_of_a_full_filesystem_costs_next_to_no_commits(blocks: int) -> None:
    """ENOSPC is cheap: a commit is tried where it can free space, and not again after that."""
    filesystem = make(6000)
    fill_large(filesystem.live)
    ino = create_or_find(filesystem.live, b"large")
    before = filesystem.store.generation
    refused = 0
    for number in range(300):
        try:
            filesystem.live.write(ino, (1 << 30) + number * (1 << 20), bytes(blocks * BLOCK))
        except NoSpaceError:
            refused += 1
    assert refused > 250
    assert filesystem.store.generation - before <= 8
    require_clean(filesystem)
    # What was refused is admitted as soon as there is room, without waiting for a commit.
    filesystem.live.setattr(ino, Changes(size_bytes=1 << 20))
    filesystem.live.write(ino, 1 << 30, bytes(blocks * BLOCK))
    require_clean(filesystem)


def create_or_find(volume: Volume, name: bytes) -> int:
    found = volume.find(ROOT, name)
    return create(volume, name) if found is None else found.ino


def test_first_refusal_is_told_once_and_again_after_room_came_back() -> None:
    """The state "full" is reported once when it begins, and again after room came back."""
    filesystem = make(16384)
    told: list[int] = []
    filesystem.store.admission.on_full = lambda: told.append(1)
    for round_number in (1, 2):
        fill_large(filesystem.live)
        fill_names(filesystem.live)
        assert len(told) == round_number
        delete_everything(filesystem)
        require_clean(filesystem)
        create(filesystem.live, b"fits")
        delete_everything(filesystem)


def test_truncate_in_a_full_filesystem_frees_space() -> None:
    """Promise C10: truncating a file frees space, as deleting it does."""
    filesystem = make(4096)
    fill_large(filesystem.live)
    filesystem.commit()
    ino = filesystem.live.lookup(ROOT, b"large").ino
    for size in (3_000_001, 1_000_001, 100_001, 1, 0):
        filesystem.live.setattr(ino, Changes(size_bytes=size))
    filesystem.live.write(ino, 0, block_of(1) * 256)
    require_clean(filesystem)


@pytest.mark.parametrize("total_blocks", [4096, pytest.param(10_000, marks=pytest.mark.long)])
@pytest.mark.parametrize("then", [fill_names, fill_inline, fill_xattrs, fill_blocks])
def test_free_space_in_single_blocks_never_fails_a_commit(
    then: Callable[[Volume], int], total_blocks: int
) -> None:
    """Promise C10: where no four free blocks lie together for a node, ENOSPC comes in time."""
    filesystem = make(total_blocks)
    volume = filesystem.live
    ino = create(volume, b"comb")
    count = fill(lambda number: volume.write(ino, number * BLOCK, block_of(number)) and None)
    filesystem.commit()
    # Overwrite so that in each stretch of the image every other block is freed, one at a time.
    for first in range(0, count, 2):
        volume.setattr(ino, Changes(mode=0o600))
        _punch_by_copy(volume, ino, first, count)
    for _ in range(4):
        filesystem.commit()
    then(volume)
    for _ in range(3):
        require_clean(filesystem)
    delete_everything(filesystem)
    require_clean(filesystem)


def _punch_by_copy(volume: Volume, ino: int, first: int, count: int) -> None:
    """Free one block of a file; the other blocks are not moved."""
    inode = volume.get(ino)
    with changing(volume):
        volume.extents.punch(inode, first, first + 1)
        volume.inodes.touch(inode)


def test_random_work_at_the_edge_of_full_fails_with_nothing_but_enospc() -> None:
    """Promise C10: after hours at 100 % every refusal is still ENOSPC."""
    for seed in range(sized(3, 6)):
        choice = random.Random(seed)
        filesystem = make(choice.choice([4096, 6000, 12_000]), copies=choice.random() < 0.7)
        volume = filesystem.live
        inos: list[bytes] = []
        refused = 0
        for step in range(2500):
            kind = choice.random()
            try:
                if kind < 0.45 or not inos:
                    name = b"%d" % step + b"n" * choice.choice([0, 0, 200])
                    ino = create(volume, name)
                    inos.append(name)
                    size = choice.choice([0, 100, 2000, 4096, 20_000, 200_000])
                    if size:
                        volume.write(ino, 0, choice.randbytes(size))
                elif kind < 0.6:
                    ino = volume.lookup(ROOT, choice.choice(inos)).ino
                    data = choice.randbytes(choice.choice([1, 5000]))
                    volume.write(ino, choice.randrange(300_000), data)
                elif kind < 0.65:
                    ino = volume.lookup(ROOT, choice.choice(inos)).ino
                    volume.setxattr(ino, b"user.x", bytes(choice.choice([10, 3000, 65536])))
                elif kind < 0.7:
                    filesystem.commit()
                elif kind < 0.72 and len(filesystem.catalog.snapshots()) < 4:
                    filesystem.apply(CreateSnapshot(f"s{step}"))
                elif kind < 0.74 and filesystem.catalog.snapshots():
                    kept = filesystem.catalog.snapshots()
                    filesystem.apply(DeleteSnapshots((choice.choice(kept).name,)))
                elif kind < 0.8:
                    filesystem.drops.step(4)
                elif kind < 0.85:
                    ino = volume.lookup(ROOT, choice.choice(inos)).ino
                    volume.setattr(ino, Changes(size_bytes=choice.randrange(100_000)))
                elif (refused and choice.random() < 0.5) or kind > 0.97:
                    name = inos.pop(choice.randrange(len(inos)))
                    try:
                        inode = volume.unlink(ROOT, name)
                    except NoSpaceError:
                        inos.append(name)
                        raise
                    while not volume.reclaim(inode.ino):
                        pass
            except NoSpaceError:
                refused += 1
            assert filesystem.store.failed is None, f"seed {seed}, step {step}"
        assert refused
        require_clean(filesystem)
        filesystem.work_drops()
        while filesystem.catalog.snapshots():
            kept = filesystem.catalog.snapshots()
            filesystem.apply(DeleteSnapshots((kept[0].name,)))
            filesystem.work_drops()
        require_clean(filesystem)
        filesystem.reclaim_orphans()
        delete_everything(filesystem)
        require_clean(filesystem)
