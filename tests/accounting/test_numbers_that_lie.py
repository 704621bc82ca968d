"""Promises about wrong counters in an image: nothing that exists is overwritten."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from cowfs.accounting.owners import owner_sets
from cowfs.care.check import check_image
from cowfs.care.repair import repair_image
from cowfs.errors import CorruptError, ImageError, NoSpaceError
from cowfs.files.items import INO_MAX, ROOT_INO, inode_key
from cowfs.history.edits import CreateSnapshot, Rollback, Undo
from cowfs.history.filesystem import Filesystem
from cowfs.history.images import open_filesystem, restore_generation
from cowfs.history.records import ROOT, ROOT_ID_MAX, decode_root
from cowfs.storage.device import FileDevice
from cowfs.storage.format import GENERATION_MAX, GENERATION_WRITABLE_MAX
from cowfs.storage.superblock import read_newest, write_slot
from tests.image_files import change, history, make_image, require_clean
from tests.model.behind import edit_by_hand

NAMES = ["one", "two", "three"]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    image = make_image(tmp_path / "disk.img")
    change(image, *history(NAMES))
    return image


def lie(image: Path, **members: int) -> None:
    """Change members of the newest superblock, with a right checksum."""
    device = FileDevice(image, writable=True)
    write_slot(device, replace(read_newest(device), **members))  # type: ignore[arg-type]
    device.close()


def lie_in_record(image: Path, edit: Callable[[Filesystem], object]) -> None:
    """Change the catalog in the image's last commit."""
    device = FileDevice(image, writable=True)
    edit_by_hand(open_filesystem(device, writable=True), edit)
    device.close()


def files_of(image: Path, *names: str) -> dict[str, dict[bytes, bytes]]:
    """The contents of each snapshot."""
    filesystem = open_filesystem(FileDevice(image, writable=False), writable=False)
    found = {}
    for name in names:
        volume = filesystem.volume(filesystem.catalog.snapshot(name).root_id)
        assert volume is not None
        listing = [entry for _, entry in volume.listing(ROOT_INO)]
        found[name] = {entry.name: volume.read(entry.ino, 0, 1 << 20) for entry in listing}
    filesystem.close()
    return found


@pytest.mark.parametrize("next_root_id", [1, 2, 4])
def test_next_root_id_that_is_too_low_costs_no_root(
    image: Path, next_root_id: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Promise: new snapshots and rollbacks get unused ids, and they correct the counter."""
    before = files_of(image, *NAMES)
    lie(image, next_root_id=next_root_id)
    assert not _is_clean(image)
    with caplog.at_level(logging.WARNING):
        change(image, _make("made"), _roll_back("two"), _make("last"), _undo)
    assert "next root id is said to be" in caplog.text
    assert files_of(image, *NAMES) == before
    require_clean(image)


@pytest.mark.parametrize("next_ino", [0, 1, 2, 7])
def test_next_ino_that_is_too_low_costs_no_file(
    image: Path, next_ino: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Promise: a new file gets an unused inode number, also after a rollback to such a snapshot."""

    def low(filesystem: Filesystem) -> None:
        for record in (filesystem.record, filesystem.catalog.snapshot("two")):
            filesystem.catalog.put(replace(record, next_ino=next_ino))

    before = files_of(image, *NAMES)
    lie_in_record(image, low)
    assert not _is_clean(image)

    def use(filesystem: Filesystem) -> None:
        for name in (b"new", b"newer"):
            made = filesystem.live.create(ROOT_INO, name, 0o100644, 0, 0)
            filesystem.live.write(made.ino, 0, b"x" * 5000)
        filesystem.commit()

    with caplog.at_level(logging.WARNING):
        change(image, use, _make("made"), _roll_back("two"), use, _make("last"))
    assert "says that the next inode number is" in caplog.text
    after = files_of(image, *NAMES, "made", "last")
    assert {name: after[name] for name in NAMES} == before
    for name, grew_from in (("made", {}), ("last", before["two"])):
        assert after[name][b"new"] == after[name][b"newer"] == b"x" * 5000
        assert after[name].items() >= grew_from.items()
    # The record of the snapshot itself keeps the wrong number: only a repair corrects it.
    device = FileDevice(image, writable=True)
    repair_image(device)
    device.close()
    require_clean(image)


def test_highest_inode_that_exists_leaves_no_number(image: Path) -> None:
    """Promise: with the highest inode number in use, creating a file fails with ENOSPC."""

    def step(filesystem: Filesystem) -> None:
        tree = filesystem.live.tree
        with filesystem.live.operation.begin_admitted() as operation:
            tree.reach(inode_key(INO_MAX))
            operation.change_unlogged()
            tree.put(inode_key(INO_MAX), filesystem.live.get(ROOT_INO).encode())
        for name in (b"a", b"b"):
            with pytest.raises(NoSpaceError, match="no inode number is left"):
                filesystem.live.create(ROOT_INO, name, 0o100644, 0, 0)

    change(image, step)


# --- generations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", [GENERATION_MAX + 1, 1 << 63, (1 << 64) - 1])
def test_generation_that_cannot_be_is_no_superblock(image: Path, generation: int) -> None:
    """Promise: a slot of an impossible generation is invalid: the commit before is the newest."""
    device = FileDevice(image, writable=False)
    newest = read_newest(device).generation
    device.close()
    slot = generation - generation % 64 + (newest + 1) % 64
    lie(image, generation=min(slot, (1 << 64) - 64 + (newest + 1) % 64))
    require_opens(image, newest)
    require_clean(image)
    change(image, _make("made"))
    assert files_of(image, "made")


@pytest.mark.parametrize("generation", [GENERATION_WRITABLE_MAX + 1, GENERATION_MAX])
def test_image_without_a_number_for_a_commit_is_only_read(image: Path, generation: int) -> None:
    """Promise: an image without a generation number for another commit can be read only."""
    device = FileDevice(image, writable=False)
    earlier = read_newest(device).generation
    device.close()
    lie(image, generation=generation)
    require_opens(image, generation)
    lie(image, generation=generation, used_blocks=1)  # something to repair
    contents = image.read_bytes()
    for write in (
        lambda device: open_filesystem(device, writable=True),
        lambda device: restore_generation(device, earlier),
        lambda device: repair_image(device, accept_loss=True),
    ):
        device = FileDevice(image, writable=True)
        with pytest.raises(ImageError, match="no number left for another commit"):
            write(device)
        device.close()
    assert image.read_bytes() == contents


def test_highest_generation_that_is_written_to_goes_on(image: Path) -> None:
    """Promise: at the highest writable generation commits, snapshots, usage and check work."""
    lie(image, generation=GENERATION_WRITABLE_MAX)
    change(image, _make("made"), _roll_back("made"))
    filesystem = open_filesystem(FileDevice(image, writable=False), writable=False)
    assert owner_sets(filesystem).snapshot_count == len(NAMES) + 2
    filesystem.close()
    require_clean(image)


def test_root_record_with_numbers_that_cannot_be_is_damage(image: Path) -> None:
    """Promise: a root record whose root id or generation is out of range is damage."""
    filesystem = open_filesystem(FileDevice(image, writable=False), writable=False)
    record = filesystem.catalog.snapshot("one")
    filesystem.close()
    good = record.encode()
    assert decode_root(good) == record
    for member, number, says in (
        (0, ROOT_ID_MAX + 1, "root id out of range"),
        (0, 1 << 63, "root id out of range"),
        (10, GENERATION_MAX + 1, "generation out of range"),
        (10, (1 << 64) - 1, "generation out of range"),
    ):
        fields = list(ROOT.unpack_from(good))
        fields[member] = number
        with pytest.raises(CorruptError, match=says):
            decode_root(ROOT.pack(*fields) + good[ROOT.size :])


def require_opens(image: Path, generation: int) -> None:
    filesystem = open_filesystem(FileDevice(image, writable=False), writable=False)
    assert filesystem.store.superblock.generation == generation
    assert [record.name for record in filesystem.catalog.snapshots()] == NAMES
    assert owner_sets(filesystem).snapshot_count == len(NAMES)
    filesystem.close()


def _is_clean(image: Path) -> bool:
    device = FileDevice(image, writable=False)
    try:
        return check_image(device).clean
    finally:
        device.close()


def _make(name: str) -> Callable[[Filesystem], object]:
    return lambda filesystem: filesystem.apply(CreateSnapshot(name))


def _roll_back(name: str) -> Callable[[Filesystem], object]:
    return lambda filesystem: filesystem.apply(Rollback(name))


def _undo(filesystem: Filesystem) -> None:
    filesystem.apply(Undo())
