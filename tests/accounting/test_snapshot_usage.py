"""Promises of the numbers of snapshots whose files share blocks, against counting one by one."""

import random

from cowfs.accounting.owners import OwnerKind, owner_sets
from cowfs.accounting.snapshot_usage import referenced_blocks, written_blocks
from cowfs.accounting.virtual_drop import simulate_deletion
from cowfs.history.edits import CreateSnapshot, Rollback
from cowfs.history.filesystem import Filesystem
from cowfs.history.images import make_filesystem, open_filesystem
from cowfs.history.records import RootRecord
from cowfs.storage.format import BLOCK_SIZE_BYTES
from tests.model.devices import MemoryDevice
from tests.model.recount import reachable_from

SIZE = 40 * BLOCK_SIZE_BYTES


def make() -> tuple[MemoryDevice, Filesystem]:
    disk = MemoryDevice(16384)
    make_filesystem(disk, label="test")
    return disk, open_filesystem(disk, writable=True)


def create(filesystem: Filesystem, name: bytes, seed: int | None = None) -> int:
    """A file, empty or of SIZE bytes."""
    inode = filesystem.live.create(1, name, 0o100644, 0, 0)
    if seed is not None:
        filesystem.live.write(inode.ino, 0, random.Random(seed).randbytes(SIZE))
    return inode.ino


def snapshot(filesystem: Filesystem, name: str) -> RootRecord:
    filesystem.apply(CreateSnapshot(name))
    return filesystem.catalog.snapshot(name)


def require_exact(disk: MemoryDevice, filesystem: Filesystem, record: RootRecord) -> None:
    """Fail unless all numbers of a snapshot match a count of its blocks."""
    own = reachable_from(disk, record.pointer)
    assert referenced_blocks(filesystem, record) == len(own)
    owners = owner_sets(filesystem)
    bit = owners.bit(OwnerKind.SNAPSHOT, record.root_id)
    assert owners.referenced(bit).total == len(own)
    assert owners.exclusive([bit]).total == simulate_deletion(filesystem, [record]).blocks
    parent = filesystem.catalog.root(record.parent_id) if record.parent_id else None
    before = reachable_from(disk, parent.pointer) if parent is not None else set()
    assert written_blocks(filesystem, record) == len(own - before)
    assert owners.written(bit).total == len(own - before)
    assert owners.total().total == filesystem.space().tree


def test_blocks_that_files_share_are_counted_once() -> None:
    """Promise: referenced and written count distinct blocks, also when files share them."""
    disk, filesystem = make()
    live = filesystem.live
    one = create(filesystem, b"one", 1)
    two = create(filesystem, b"two")
    assert live.reflink(live, one, 0, two, 0, SIZE) == SIZE
    first = snapshot(filesystem, "first")
    assert first.shares
    assert first.referenced_blocks(2) - referenced_blocks(filesystem, first) == 40
    require_exact(disk, filesystem, first)
    three = create(filesystem, b"three")
    assert live.reflink(live, two, 0, three, BLOCK_SIZE_BYTES, SIZE) == SIZE
    second = snapshot(filesystem, "second")
    require_exact(disk, filesystem, second)


def test_blocks_that_came_back_from_an_older_snapshot_were_written() -> None:
    """Promise: a block that the parent does not hold counts as written, however old it is."""
    disk, filesystem = make()
    live = filesystem.live
    one = create(filesystem, b"one", 1)
    oldest = snapshot(filesystem, "oldest")
    live.unlink(1, b"one")
    live.reclaim(one)
    require_exact(disk, filesystem, snapshot(filesystem, "without"))
    again = create(filesystem, b"again")
    volume = filesystem.volume(oldest.root_id)
    assert volume is not None
    assert live.reflink(volume, one, 0, again, 0, SIZE) == SIZE
    newest = snapshot(filesystem, "newest")
    require_exact(disk, filesystem, newest)
    assert written_blocks(filesystem, newest) > 40


def test_rollback_and_what_it_keeps_know_that_files_share() -> None:
    """Promise: after a rollback the live tree and the kept one are still counted block by block."""
    disk, filesystem = make()
    live = filesystem.live
    one, two = create(filesystem, b"one", 1), create(filesystem, b"two")
    snapshot(filesystem, "before")
    live.reflink(live, one, 0, two, 0, SIZE)
    snapshot(filesystem, "shared")
    for name in ("before", "shared"):
        (kept,) = filesystem.apply(Rollback(name))
        require_exact(disk, filesystem, filesystem.catalog.snapshot(kept.name))
    require_exact(disk, filesystem, snapshot(filesystem, "after"))
