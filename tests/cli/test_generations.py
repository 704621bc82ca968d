"""Promises of `info --generations` and `rollback --generation`: back to an earlier commit."""

from pathlib import Path

import pytest
from msgspec.structs import replace

from cowfs.care.generations import generation_reports
from cowfs.errors import ImageError
from cowfs.files.items import ROOT_INO
from cowfs.history.filesystem import Filesystem
from cowfs.history.images import open_filesystem, restore_generation
from cowfs.storage.device import FileDevice
from cowfs.storage.format import BLOCK_SIZE_BYTES, KIND_DATA
from cowfs.storage.store import Store
from cowfs.storage.superblock import read_newest
from tests.cli.test_commands import ERROR, USAGE, assert_refused, fields, run
from tests.image_files import change, make_image, require_clean, snapshot, write
from tests.model.recount import recount


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image of several commits, each with one more file; the newest commits are retained."""
    image = make_image(tmp_path / "disk.img")

    def commit(filesystem: Filesystem) -> None:
        filesystem.commit()

    change(image, write("first", 50_000), commit, write("second", 50_000), commit)
    change(image, snapshot("keep"), write("third", 90_000), commit, write("first", 9_000), commit)
    return image


def names_in(image: Path, generation: int | None = None) -> set[bytes]:
    filesystem = open_filesystem(
        FileDevice(image, writable=False), writable=False, generation=generation
    )
    try:
        return {entry.name for _, entry in filesystem.live.listing(ROOT_INO)}
    finally:
        filesystem.close()


def newest(image: Path) -> int:
    device = FileDevice(image, writable=False)
    try:
        return read_newest(device).generation
    finally:
        device.close()


def test_generations_are_listed_newest_first_with_what_is_kept(image: Path) -> None:
    """Promise: each generation is listed with its number, whether it is retained, and readable."""
    found = fields("info", image, "--generations")["generations"]
    numbers = [row["generation"] for row in found]
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[0] == newest(image)
    assert [row["newest"] for row in found] == [True] + [False] * (len(found) - 1)
    assert [row["retained"] for row in found][:4] == [True, True, True, False]
    assert all(row["problem"] == "" for row in found[:3])
    assert found[0]["snapshot_count"] == 1
    table = run("info", image, "--generations").stdout.splitlines()
    assert table[0].split() == [
        "GENERATION",
        "COMMITTED",
        "KEPT",
        "SNAPSHOTS",
        "USED",
        "LOG",
        "STATE",
    ]
    assert len(table) == 1 + len(found)


def test_generation_with_a_damaged_catalog_is_told(image: Path) -> None:
    """Promise: a damaged catalog is reported for its own commit only."""
    device = FileDevice(image, writable=True)
    superblock = read_newest(device)
    for block in (superblock.catalog.block, superblock.catalog.twin):
        device.write(block * BLOCK_SIZE_BYTES, [b"x" * BLOCK_SIZE_BYTES])
    reports = generation_reports(device)
    device.close()
    assert "catalog" in reports[0].problem
    assert reports[0].snapshot_count is None
    assert reports[1].problem == ""


def test_restored_generation_is_the_newest_again_and_harms_no_other(image: Path) -> None:
    """Promise: the restored state is the newest, clean, and reuses no block of the others."""
    before = newest(image)
    old_names = names_in(image, before - 2)
    device = FileDevice(image, writable=False)
    shown = {number: recount(device, number).reachable for number in (before, before - 1)}
    old = {block: device.read(block * 4096, 4096) for blocks in shown.values() for block in blocks}
    device.close()
    assert fields("rollback", image, "--generation", str(before - 2), "-n") == {
        "generation": before - 2,
        "dry_run": True,
        "new_generation": None,
    }
    assert newest(image) == before
    answer = fields("rollback", image, "--generation", str(before - 2), "--yes")
    assert answer["new_generation"] == before + 1 == newest(image)
    assert names_in(image) == old_names
    require_clean(image)
    device = FileDevice(image, writable=False)
    assert all(device.read(block * 4096, 4096) == data for block, data in old.items())
    superblock = read_newest(device)
    assert superblock.oldest_retained == before + 1
    device.close()
    change(image, write("again", 200_000), snapshot("after"))
    require_clean(image)
    assert b"again" in names_in(image)


def test_blocks_of_abandoned_generations_cannot_be_allocated(image: Path) -> None:
    """Promise: writes right after a restore overwrite no block that another generation shows."""
    device = FileDevice(image, writable=True)
    newest_one = read_newest(device)
    target = read_newest(device, newest_one.generation - 2)
    shown = recount(device, newest_one.generation).reachable
    base = replace(target, generation=newest_one.generation, oldest_retained=newest_one.generation)
    store = Store(device, base, writable=True)
    assert shown & {block for block in range(64, 4096) if not store.map.refcount(block)}
    store.continue_after([newest_one])
    runs = store.allocator.allocate(KIND_DATA, store.map.free_blocks)
    assert not shown & {block for first, count in runs for block in range(first, first + count)}
    device.close()


def test_restore_helps_when_the_newest_commit_is_damaged(image: Path) -> None:
    """Promise: a restore makes an image with a damaged newest commit whole again."""
    device = FileDevice(image, writable=True)
    superblock = read_newest(device)
    for pointer in (superblock.catalog, superblock.space_map):
        for block in (pointer.block, pointer.twin):
            device.write(block * BLOCK_SIZE_BYTES, [b"x" * BLOCK_SIZE_BYTES])
    device.close()
    fields("rollback", image, "--generation", str(superblock.generation - 1), "--yes")
    require_clean(image)
    change(image, write("again", 200_000))
    require_clean(image)


def test_generation_that_lost_blocks_is_refused_unless_forced(image: Path) -> None:
    """Promise: a restore checks the generation first; a damaged one needs --force."""
    device = FileDevice(image, writable=True)
    target = read_newest(device).generation - 1
    superblock = read_newest(device, target)
    for block in (superblock.catalog.block, superblock.catalog.twin):
        device.write(block * BLOCK_SIZE_BYTES, [b"x" * BLOCK_SIZE_BYTES])
    device.close()
    words = ("rollback", image, "--generation", str(target), "--yes")
    assert_refused(run(*words), ERROR, f"generation {target} is not whole", "--force")
    assert newest(image) == target + 1


def test_restore_asks_and_refuses_what_cannot_be(image: Path) -> None:
    """Promise: a restore needs --yes, and wrong numbers are named."""
    before = newest(image)
    assert_refused(run("rollback", image, "--generation", str(before - 1)), USAGE, "--yes")
    assert_refused(run("rollback", image, "--generation", "99999", "--yes"), ERROR, "99999")
    assert_refused(run("rollback", image), USAGE, "--generation")
    assert_refused(run("rollback", image, "keep", "--generation", "3"), USAGE, "--generation")
    device = FileDevice(image, writable=True)
    with pytest.raises(ImageError, match="newest already"):
        restore_generation(device, before)
    device.close()
    assert newest(image) == before
