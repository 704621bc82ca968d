"""Promises about a repair in place that the device refuses (C8, C9)."""

import stat

import pytest

from cowfs.care.check import check_image
from cowfs.errors import DeviceError
from cowfs.files.items import ROOT_INO
from cowfs.history.edits import CreateSnapshot
from cowfs.history.filesystem import Filesystem
from cowfs.history.images import make_filesystem, open_filesystem
from tests.model.devices import Fault, FaultDevice, MemoryDevice


def with_a_repair_waiting() -> tuple[MemoryDevice, FaultDevice, Filesystem, int]:
    """An open image whose root node has one bad copy, found already; and the block of that copy."""
    disk = MemoryDevice(16384)
    make_filesystem(disk)
    filesystem = open_filesystem(disk, writable=True)
    filesystem.live.create(ROOT_INO, b"before", stat.S_IFREG | 0o644, 0, 0)
    filesystem.commit()
    block = filesystem.live.tree.root_node().block
    # A snapshot holds the node, so that the next commit does not simply replace it.
    filesystem.apply(CreateSnapshot("held"))
    disk.damage(block, 100)
    device = FaultDevice(disk)
    filesystem = open_filesystem(device, writable=True)
    filesystem.live.create(ROOT_INO, b"after", stat.S_IFREG | 0o644, 0, 0)
    assert len(filesystem.store.repairs) == 1
    return disk, device, filesystem, block


def names(filesystem: Filesystem) -> set[bytes]:
    return {entry.name for _, entry in filesystem.live.listing(ROOT_INO)}


def test_repair_that_is_written_makes_both_copies_the_same() -> None:
    """Promise C9: a written repair makes the copy good again, and the check agrees."""
    disk, _, filesystem, block = with_a_repair_waiting()
    bad = disk.block(block)
    filesystem.commit()
    assert disk.block(block) != bad
    report = check_image(disk)
    assert report.clean
    assert not report.findings


def test_write_of_a_repair_that_is_refused_costs_the_repair_alone() -> None:
    """Promise: if a repair's write is refused, the commit counts; the next read finds it again."""
    disk, device, filesystem, block = with_a_repair_waiting()
    bad = disk.block(block)
    device.fault = Fault("write", after=0)
    filesystem.commit()
    assert device.fault.fired == 1
    assert filesystem.store.failed is None
    assert disk.block(block) == bad
    again = open_filesystem(disk.crash(), writable=False)
    assert names(again) == {b"before", b"after"}
    assert check_image(disk).findings, "the copy is bad and nobody says so"


def test_flush_of_a_repair_that_fails_ends_all_writing() -> None:
    """Promise C8: a failed flush ends writing, whatever it was for; the last commit is whole."""
    disk, device, filesystem, _ = with_a_repair_waiting()
    device.fault = Fault("flush", after=0)
    with pytest.raises(DeviceError):
        filesystem.commit()
    assert device.fault.fired == 1
    assert filesystem.store.failed is not None
    with pytest.raises(DeviceError):
        filesystem.live.create(ROOT_INO, b"never", stat.S_IFREG | 0o644, 0, 0)
    again = open_filesystem(disk.crash(), writable=True)
    assert names(again) == {b"before"}
