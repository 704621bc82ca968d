"""A full filesystem (C10): it refuses with ENOSPC and nothing else, and can always delete.

Each case fills a small image to the last admitted operation in one way, then frees it again. Nothing
that was acknowledged may be lost on the way, and the image must check clean at each stage.
"""

import contextlib
import errno
import random
import stat
from collections.abc import Callable

import pytest

from cowfs.care.check import check_image
from cowfs.errors import NoSpaceError
from cowfs.files.volume import Changes, Volume
from cowfs.history.filesystem import Filesystem, make_filesystem, open_filesystem
from tests.model.devices import MemoryDevice
from tests.model.recount import recount

ROOT = 1
BLOCK = 4096


def make(total_blocks: int, *, copies: bool = True) -> Filesystem:
    disk = MemoryDevice(total_blocks)
    make_filesystem(disk, duplicate_metadata=copies)
    return open_filesystem(disk, writable=True)


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
    """Call `step(0)`, `step(1)`, ... until there is no space. Returns how many succeeded."""
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
    """Files of one block each."""

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


def fill_xattrs(volume: Volume) -> int:
    def step(number: int) -> None:
        ino = create(volume, b"xattr%d" % number)
        volume.setxattr(ino, b"user.a", block_of(number) * 16)

    return fill(step)


def fill_sparse(volume: Volume) -> int:
    """One block here, one there: an extent for each."""
    ino = create(volume, b"sparse")
    return fill(lambda number: volume.write(ino, number * 3 * BLOCK, block_of(number)) and None)


WAYS = [fill_large, fill_blocks, fill_inline, fill_names, fill_xattrs, fill_sparse]


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
    """Remove each file, and reclaim it; a commit now and then, as a timer would."""
    volume = filesystem.live
    for number, (_, entry) in enumerate(list(volume.listing(ROOT))):
        volume.unlink(ROOT, entry.name)
        while not volume.reclaim(entry.ino):
            pass
        if number % 500 == 499:
            filesystem.commit()


@pytest.mark.parametrize(
    ("total_blocks", "copies"),
    [(4096, True), (4500, False), (6000, True)],
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


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_full_with_snapshots_can_delete_snapshots_and_then_files(
    way: Callable[[Volume], int],
) -> None:
    """Promise C10: snapshots can be deleted at 100 %, whatever they hold, and that frees."""
    filesystem = make(6000)
    empty = filesystem.space().used
    volume = filesystem.live
    ino = create(volume, b"first")
    for number in range(40):
        volume.write(ino, number * 65536, block_of(number) * 16)
    filesystem.apply(filesystem.create_snapshot("one"))
    way(volume)
    filesystem.apply(filesystem.create_snapshot("two"))
    filesystem.apply(filesystem.create_snapshot("three"))

    # Deleting frees nothing now, as the snapshots hold it, and costs metadata: it may be refused at
    # some point, but never by anything else than ENOSPC, and never for good.
    with contextlib.suppress(NoSpaceError):
        delete_everything(filesystem)
    require_clean(filesystem)
    with contextlib.suppress(NoSpaceError):
        fill_large(volume)

    for names in (["two"], ["one", "three"]):
        filesystem.apply(filesystem.delete_snapshots(names))
        filesystem = crashed(filesystem)
        filesystem.work_drops()
        require_clean(filesystem)
    filesystem.reclaim_orphans()
    delete_everything(filesystem)
    require_clean(filesystem)
    assert filesystem.space().used <= empty + 8


def test_truncate_in_a_full_filesystem_frees_space() -> None:
    """Promise C10: truncating is deleting."""
    filesystem = make(4096)
    fill_large(filesystem.live)
    filesystem.commit()
    ino = filesystem.live.lookup(ROOT, b"large").ino
    for size in (3_000_001, 1_000_001, 100_001, 1, 0):
        filesystem.live.setattr(ino, Changes(size_bytes=size))
    filesystem.live.write(ino, 0, block_of(1) * 256)
    require_clean(filesystem)


@pytest.mark.parametrize("total_blocks", [4096, 10_000])
@pytest.mark.parametrize("then", [fill_names, fill_inline, fill_xattrs, fill_blocks])
def test_free_space_in_single_blocks_never_fails_a_commit(
    then: Callable[[Volume], int], total_blocks: int
) -> None:
    """Promise C10: when no four free blocks lie together for a node, that is ENOSPC in time."""
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
    """Free one block of a file; what stays is not moved."""
    inode = volume.get(ino)
    volume.data._punch(inode, first, first + 1)
    volume.inodes.touch(inode)
    volume.changed = True


def test_random_work_at_the_edge_of_full_fails_with_nothing_but_enospc() -> None:
    """Promise C10: hours at 100 % end no differently from minutes."""
    for seed in range(6):
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
                    filesystem.apply(filesystem.create_snapshot(f"s{step}"))
                elif kind < 0.74 and filesystem.catalog.snapshots():
                    kept = filesystem.catalog.snapshots()
                    filesystem.apply(filesystem.delete_snapshots([choice.choice(kept).name]))
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
            filesystem.apply(filesystem.delete_snapshots([kept[0].name]))
            filesystem.work_drops()
        require_clean(filesystem)
        filesystem.reclaim_orphans()
        delete_everything(filesystem)
        require_clean(filesystem)
