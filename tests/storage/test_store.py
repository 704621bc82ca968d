"""Promises about loading nodes: twins, damage of one subtree, levels; and read-only stores."""

import stat

import pytest

from cowfs.errors import CorruptError, DeviceError, ReadOnlyError
from cowfs.history.edits import CreateSnapshot
from cowfs.history.filesystem import Filesystem
from cowfs.history.images import make_filesystem, open_filesystem
from cowfs.storage.format import NODE_BLOCKS, Pointer
from tests.model.devices import FaultDevice, MemoryDevice

ROOT = 1
FILES = 400


def make(*, copies: bool) -> tuple[MemoryDevice, list[Pointer]]:
    """An image with a tree of two levels, and the pointers of its leaves."""
    disk = MemoryDevice(8192)
    make_filesystem(disk, duplicate_metadata=copies)
    filesystem = open_filesystem(disk, writable=True)
    for number in range(FILES):
        ino = filesystem.live.create(ROOT, b"%03d" % number, stat.S_IFREG | 0o644, 0, 0).ino
        filesystem.live.write(ino, 0, b"%03d" % number * 300)
    filesystem.close()
    filesystem = open_filesystem(disk, writable=False)
    root = filesystem.live.tree.root_node()
    assert root.level == 1
    return disk, list(root.values)


def readable(filesystem: Filesystem) -> int:
    """How many files can be read; each of the others must be refused as damaged."""
    good = 0
    volume = filesystem.live
    for ino in range(2, FILES + 2):
        try:
            assert volume.read(ino, 0, 2000) == b"%03d" % (ino - 2) * 300
            good += 1
        except CorruptError:
            continue
    return good


def test_damaged_nodes_are_read_from_their_twins() -> None:
    """Promise C9: with two copies of metadata, one copy of each node may be lost."""
    disk, leaves = make(copies=True)
    for number, leaf in enumerate(leaves):
        assert leaf.twin
        disk.damage(leaf.block if number % 2 else leaf.twin, 50 + number)
    assert readable(open_filesystem(disk, writable=False, cache_bytes=1)) == FILES
    filesystem = open_filesystem(disk.crash(), writable=True, cache_bytes=1)
    filesystem.live.unlink(ROOT, b"007")
    filesystem.commit()


@pytest.mark.parametrize("copies", [True, False])
def test_node_lost_in_all_copies_costs_its_subtree_only(copies: bool) -> None:
    """Promise C9: EIO for just that subtree; never zeros, never a silent gap."""
    disk, leaves = make(copies=copies)
    lost = leaves[len(leaves) // 2]
    disk.damage(lost.block + 1, 99)
    if lost.twin:
        disk.damage(lost.twin + NODE_BLOCKS - 1, 4095, 0x80)
    found = readable(open_filesystem(disk, writable=False))
    assert FILES * 3 // 4 < found < FILES


def test_misdirected_and_stale_nodes_are_found() -> None:
    """Promise C9: an intact node at a wrong place, or of an older generation, is refused."""
    disk, leaves = make(copies=False)
    first, second = leaves[3].block, leaves[4].block
    for at in range(NODE_BLOCKS):
        disk.put(first + at, disk.block(second + at))
    found = readable(open_filesystem(disk, writable=False))
    assert found < FILES


def test_unreadable_node_is_read_from_its_twin() -> None:
    """Promise C9: when the host cannot read a node, its twin is read, as after damage."""
    disk, leaves = make(copies=True)
    bad = {leaf.block for leaf in leaves}
    device = FaultDevice(disk)
    read = device.read

    def refusing(offset: int, size: int) -> bytes:
        if offset // 4096 in bad:
            raise DeviceError("cannot read: Input/output error")
        return read(offset, size)

    device.read = refusing  # type: ignore[method-assign]
    assert readable(open_filesystem(device, writable=False)) == FILES
    bad |= {leaves[2].twin}
    with pytest.raises(DeviceError):
        readable(open_filesystem(device, writable=False))


def test_read_only_store_refuses_every_change() -> None:
    """Promise: a store opened for reading writes nothing."""
    disk, _ = make(copies=True)
    events = len(disk.events)
    filesystem = open_filesystem(disk, writable=False)
    for change in (
        lambda: filesystem.live.create(ROOT, b"x", stat.S_IFREG, 0, 0),
        lambda: filesystem.live.unlink(ROOT, b"001"),
        lambda: filesystem.live.write(2, 0, b"x"),
        lambda: filesystem.apply(CreateSnapshot("s")),
    ):
        with pytest.raises(ReadOnlyError):
            change()
    filesystem.close()
    assert len(disk.events) == events
