"""Promises that damage met by an edit of a mount does not end its writing (C8, C9)."""

import os
from pathlib import Path

from cowfs.files.items import ROOT_INO, TYPE_NAME, key
from cowfs.history.images import open_filesystem
from cowfs.storage.device import FileDevice
from cowfs.storage.format import BLOCK_SIZE_BYTES, Pointer
from tests.conftest import Mounted, require_success


def _damage_a_leaf_of_names(image: Path) -> tuple[Pointer, bytes]:
    """Spoil both copies of a leaf with names of the live root. Returns its place and old bytes."""
    device = FileDevice(image, writable=True)
    tree = open_filesystem(device, writable=False).live.tree
    node = tree.root_node()
    while node.level > 1:
        node = tree.store.load(node.values[-1], node.level - 1)
    first, last = key(ROOT_INO, TYPE_NAME, 0), key(ROOT_INO, TYPE_NAME + 1, 0)
    for pointer in node.values[1:]:
        leaf = tree.store.load(pointer, 0)
        if first <= leaf.keys[0] and leaf.keys[-1] < last:
            before = device.read(pointer.block * BLOCK_SIZE_BYTES, BLOCK_SIZE_BYTES)
            device.close()
            _write_copies(image, pointer, os.urandom(BLOCK_SIZE_BYTES))
            return pointer, before
    raise AssertionError("no leaf holds names of the root directory alone")


def _write_copies(image: Path, pointer: Pointer, data: bytes) -> None:
    device = FileDevice(image, writable=True)
    for block in (pointer.block, pointer.twin):
        device.write(block * BLOCK_SIZE_BYTES, [data])
    device.flush()
    device.close()


def test_rollback_from_a_damaged_root_directory_is_the_remedy(mount: Mounted) -> None:
    """Promise C8, C9: rollback works, and helps, when a leaf of the live tree is lost."""
    (mount.path / "kept").write_text("kept")
    mount.snapshot("good")
    for number in range(2000):
        (mount.path / f"file {number} {'n' * 100}").touch()
    mount.umount()
    damaged, before = _damage_a_leaf_of_names(mount.image)
    mount.remount()
    require_success(mount.cowfs("rollback", mount.path, "good"))
    assert os.listdir(mount.path) == ["kept"]
    (mount.path / "after").write_text("written")
    require_success(mount.cowfs("sync", mount.path))
    mount.remount()
    assert sorted(os.listdir(mount.path)) == ["after", "kept"]
    mount.umount()
    _write_copies(mount.image, damaged, before)  # the snapshot of the old state still has this leaf


def test_names_of_a_large_root_directory_are_forgotten_without_stopping_others(
    mount: Mounted,
) -> None:
    """Promise: rollback lists the root directory in slices; the kernel forgets all its names."""
    mount.snapshot("empty")
    for number in range(5000):
        (mount.path / f"{number}").touch()
    assert len(os.listdir(mount.path)) == 5000
    require_success(mount.cowfs("rollback", mount.path, "empty"))
    assert os.listdir(mount.path) == []
    for number in (0, 1, 2499, 4999):
        assert not (mount.path / f"{number}").exists()
