"""Promises about edits of the catalog, one case at a time, and about what must be refused."""

import stat

import pytest

from cowfs.care.check import check_image
from cowfs.errors import SnapshotError, UsageError
from cowfs.history.edits import (
    CreateSnapshot,
    DeleteSnapshots,
    HoldSnapshots,
    RenameSnapshot,
    Rollback,
    Undo,
)
from cowfs.history.filesystem import Filesystem
from cowfs.history.images import make_filesystem, open_filesystem
from cowfs.history.records import FLAG_HELD
from tests.model.devices import MemoryDevice
from tests.model.recount import recount

ROOT = 1


def make() -> tuple[MemoryDevice, Filesystem]:
    disk = MemoryDevice(8192)
    make_filesystem(disk)
    return disk, open_filesystem(disk, writable=True)


def write(filesystem: Filesystem, name: bytes, data: bytes) -> None:
    volume = filesystem.live
    found = volume.find(ROOT, name)
    ino = found.ino if found else volume.create(ROOT, name, stat.S_IFREG | 0o644, 0, 0).ino
    volume.write(ino, 0, data)


def names(filesystem: Filesystem) -> set[bytes]:
    return {entry.name for _, entry in filesystem.live.listing(ROOT)}


def require_clean(disk: MemoryDevice) -> None:
    recount(disk).require_exact()
    report = check_image(disk)
    assert report.clean, "\n".join(map(str, report.findings[:9]))


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("second", ["delete", "rollback", "undo"])
def test_edit_of_a_snapshot_right_after_it_was_made_works(second: str, changed: bool) -> None:
    """Promise C6: an edit includes all that was written before it; the next edit sees it whole."""
    disk, filesystem = make()
    write(filesystem, b"old", b"x" * 9000)
    filesystem.commit()
    if changed:
        write(filesystem, b"new", b"y" * 9000)
    filesystem.apply(CreateSnapshot("s"))
    filesystem.apply(DeleteSnapshots(("s",)) if second == "delete" else Rollback("s"))
    if second == "undo":
        filesystem.apply(Undo())
    assert names(filesystem) == ({b"old", b"new"} if changed else {b"old"})
    filesystem.work_drops()
    require_clean(disk)
    again = open_filesystem(disk.crash(), writable=True)
    assert names(again) == names(filesystem)
    write(again, b"later", b"z" * 9000)
    again.commit()
    require_clean(disk)


def test_delete_of_several_is_all_or_nothing() -> None:
    """Promise C6: a deletion that names one unknown snapshot deletes none."""
    disk, filesystem = make()
    for name in ("a", "b", "c"):
        filesystem.apply(CreateSnapshot(name))
    with pytest.raises(SnapshotError, match="nope"):
        filesystem.apply(DeleteSnapshots(("a", "nope", "b")))
    filesystem.apply(DeleteSnapshots(("b",)))
    with pytest.raises(SnapshotError, match="'b'"):
        filesystem.apply(DeleteSnapshots(("a", "b")))
    assert [record.name for record in filesystem.catalog.snapshots()] == ["a", "c"]
    filesystem.apply(
        DeleteSnapshots(
            (
                "a",
                "a",
                "c",
            )
        )
    )
    filesystem.work_drops()
    assert not filesystem.catalog.snapshots()
    require_clean(disk)


def held_names(filesystem: Filesystem) -> list[str]:
    return [record.name for record in filesystem.catalog.snapshots() if record.held]


def test_held_snapshot_is_not_deleted_until_released() -> None:
    """Promise: a refused deletion names each held snapshot, before and after a remount."""
    disk, filesystem = make()
    write(filesystem, b"file", b"x" * 9000)
    for name in ("a", "b", "c"):
        filesystem.apply(CreateSnapshot(name))
    records = filesystem.apply(
        HoldSnapshots(
            (
                "a",
                "c",
                "a",
            ),
            True,
        )
    )
    assert isinstance(records, list)
    assert [(record.name, record.held) for record in records] == [("a", True), ("c", True)]
    filesystem.apply(HoldSnapshots(("a",), True))  # holding again is no error
    for opened in (filesystem, open_filesystem(disk.crash(), writable=True)):
        assert held_names(opened) == ["a", "c"]
        with pytest.raises(SnapshotError, match=r"^snapshot 'a' is held; .* release it first$"):
            opened.apply(DeleteSnapshots(("b", "a")))
        with pytest.raises(SnapshotError, match=r"^snapshots 'c', 'a' are held; .* release them"):
            opened.apply(DeleteSnapshots(("c", "a")))
    filesystem.apply(DeleteSnapshots(("b",)))
    filesystem.apply(
        HoldSnapshots(
            (
                "a",
                "c",
            ),
            False,
        )
    )
    filesystem.apply(
        DeleteSnapshots(
            (
                "a",
                "c",
            )
        )
    )
    filesystem.work_drops()
    assert not filesystem.catalog.snapshots()
    require_clean(disk)


def test_hold_that_names_an_unknown_snapshot_holds_none() -> None:
    """Promise C6: a hold applies to all or none of its names, also if one was just deleted."""
    disk, filesystem = make()
    for name in ("a", "b"):
        filesystem.apply(CreateSnapshot(name))
    with pytest.raises(SnapshotError, match="nope"):
        filesystem.apply(HoldSnapshots(("a", "nope"), True))
    filesystem.apply(DeleteSnapshots(("b",)))
    with pytest.raises(SnapshotError, match="'b'"):
        filesystem.apply(HoldSnapshots(("a", "b"), True))
    assert held_names(filesystem) == []
    require_clean(disk)


def test_hold_is_kept_by_a_rename_and_inherited_by_nothing() -> None:
    """Promise: a rename keeps a hold; new snapshots, and those of rollback and undo, have none."""
    disk, filesystem = make()
    write(filesystem, b"file", b"x" * 9000)
    filesystem.apply(CreateSnapshot("a"))
    filesystem.apply(HoldSnapshots(("a",), True))
    filesystem.apply(RenameSnapshot("a", "b"))
    assert held_names(filesystem) == ["b"]
    filesystem.apply(Rollback("b"))
    filesystem.apply(CreateSnapshot("c"))
    filesystem.apply(Undo())
    filesystem.apply(CreateSnapshot("d"))
    assert held_names(filesystem) == ["b"]
    assert not filesystem.record.held
    assert len(filesystem.catalog.snapshots()) == 4
    require_clean(disk)
    assert held_names(open_filesystem(disk.crash(), writable=True)) == ["b"]


def test_undo_does_not_use_up_what_is_held() -> None:
    """Promise: undo refuses a held snapshot, says what to do, changes nothing; release helps."""
    disk, filesystem = make()
    write(filesystem, b"one", b"1")
    filesystem.apply(CreateSnapshot("s"))
    write(filesystem, b"two", b"2")
    (kept,) = filesystem.apply(Rollback("s"))
    filesystem.apply(HoldSnapshots((kept.name,), True))
    says = f"use up snapshot '{kept.name}', which is held; cowfs snapshot release it"
    with pytest.raises(SnapshotError, match=says):
        filesystem.apply(Undo())
    assert names(filesystem) == {b"one"}
    assert filesystem.catalog.snapshot(kept.name).flags == kept.flags | FLAG_HELD
    filesystem.apply(HoldSnapshots((kept.name,), False))
    assert filesystem.catalog.snapshot(kept.name).flags == kept.flags
    filesystem.apply(Undo())
    assert names(filesystem) == {b"one", b"two"}
    require_clean(disk)


def test_orphan_in_a_snapshot_is_reclaimed_after_rollback() -> None:
    """Promise C7: a file open and unlinked when a snapshot was made is freed after rollback."""
    disk, filesystem = make()
    write(filesystem, b"file", b"x" * 50_000)
    orphan = filesystem.live.unlink(ROOT, b"file").ino
    filesystem.apply(CreateSnapshot("s"))
    assert filesystem.live.reclaim(orphan)
    filesystem.commit()
    filesystem.apply(Rollback("s"))
    assert filesystem.live.orphans == {orphan}
    filesystem.reclaim_orphans()
    filesystem.commit()
    assert filesystem.live.inodes.count == 1
    require_clean(disk)


def test_undo_goes_back_and_forth() -> None:
    """Promise: undo of an undo is a redo, as often as wanted."""
    disk, filesystem = make()
    write(filesystem, b"one", b"1")
    filesystem.apply(CreateSnapshot("s"))
    write(filesystem, b"two", b"2")
    filesystem.apply(Rollback("s"))
    for turn in range(5):
        assert names(filesystem) == ({b"one"} if turn % 2 == 0 else {b"one", b"two"})
        filesystem.apply(Undo())
        assert len(filesystem.catalog.snapshots()) == 2
    kept = next(record for record in filesystem.catalog.snapshots() if record.automatic)
    filesystem.apply(DeleteSnapshots((kept.name,)))
    with pytest.raises(SnapshotError, match="no rollback to undo"):
        filesystem.apply(Undo())
    filesystem.work_drops()
    require_clean(disk)


def test_old_volume_after_rollback_can_be_read_and_not_written() -> None:
    """Promise: after a rollback, handles of the old live volume still read it and cannot write."""
    _, filesystem = make()
    write(filesystem, b"file", b"before")
    filesystem.apply(CreateSnapshot("s"))
    write(filesystem, b"file", b"after!")
    old_root, old = filesystem.record.root_id, filesystem.live
    ino = old.lookup(ROOT, b"file").ino
    filesystem.apply(Rollback("s"))
    assert filesystem.volume(old_root) is old
    assert old.read(ino, 0, 10) == b"after!"
    assert filesystem.live.read(ino, 0, 10) == b"before"
    with pytest.raises(OSError, match="cannot be changed"):
        old.write(ino, 0, b"x")
    assert filesystem.record.root_id != old_root


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\0b", "a\nb", "x" * 256, "é" * 128, "-a"])
def test_impossible_name_is_refused_before_anything_happens(name: str) -> None:
    """Promise: a snapshot's name is always one path component that a terminal can show."""
    _, filesystem = make()
    with pytest.raises(UsageError):
        filesystem.apply(CreateSnapshot(name))


def test_many_snapshots_and_drops_leave_nothing_behind() -> None:
    """Promise I6: after 300 snapshots come and go, the catalog and the image are as before."""
    disk, filesystem = make()
    write(filesystem, b"file", b"x" * 100_000)
    filesystem.commit()
    before = filesystem.space()
    for number in range(300):
        write(filesystem, b"file", b"%d" % number * 3000)
        filesystem.apply(CreateSnapshot(f"s{number:03}" + "n" * 200))
    assert filesystem.catalog.tree.node_count > 3
    assert filesystem.space().catalog > before.catalog
    wanted = [record.name for record in filesystem.catalog.snapshots()]
    filesystem.apply(DeleteSnapshots(wanted))
    assert len(filesystem.drops.progress()) == 300
    filesystem = open_filesystem(disk.crash(), writable=True)
    filesystem.work_drops()
    filesystem.commit()
    after = filesystem.space()
    assert after.catalog == before.catalog
    assert after.tree <= before.tree
    require_clean(disk)
