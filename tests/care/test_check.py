"""Promises that the checker finds each broken invariant, names it and its place, and nothing else.

The images are written by hand (image_builder.py), one fault in each.
"""

import stat
import struct
from collections.abc import Callable

import numpy as np
import pytest
from msgspec.structs import replace

from cowfs.care.check import CheckProgress, CheckReport, Finding, check_image
from cowfs.care.names import detached_directories
from cowfs.errors import CorruptError, DeviceError, ImageError
from cowfs.files.items import (
    INODE_INLINE,
    TYPE_EXTENT,
    TYPE_INLINE,
    TYPE_NAME,
    TYPE_ORPHAN,
    TYPE_SYMLINK,
    TYPE_XATTR,
    Extent,
    Name,
    decode_extent,
    encode_names,
    encode_xattr,
    key,
    name_hash,
    xattr_hash,
)
from cowfs.history.records import DropStep, RootKind, encode_id, root_key, snapshot_key, volume_key
from cowfs.storage.format import (
    BLOCK_SIZE_BYTES,
    RING_SLOTS,
    Pointer,
    decode_node,
    decode_pointer,
    decode_superblock,
)
from tests.care.image_builder import (
    NAME_SEED,
    SEED,
    ImageBuilder,
    MemoryDevice,
    VolumeItems,
    node_bytes,
    sample_volume,
)

Change = Callable[[ImageBuilder, VolumeItems], None]


def sample_image(**options: int) -> tuple[ImageBuilder, VolumeItems]:
    builder = ImageBuilder(**options)
    return builder, sample_volume(builder)


def checked(
    change: Change | None = None, *, per_node: int = 4, **superblock: object
) -> CheckReport:
    """The report on an image of a volume and its snapshot; `change` alters the volume first."""
    builder, volume = sample_image()
    if change:
        change(builder, volume)
    record = builder.add_root(volume, per_node=per_node)
    tree = (record.pointer, record.node_count)
    builder.add_root(volume, "monday", RootKind.SNAPSHOT, tree=tree)
    return check_image(builder.finish(per_node=3, **superblock))


def the_error(report: CheckReport, text: str) -> Finding:
    """The only error of a report; it must say `text`."""
    assert [finding for finding in report.errors if text in finding.what], report.findings
    assert len(report.errors) == 1, "\n".join(map(str, report.findings))
    assert not report.clean
    return report.errors[0]


# --- sound images ---------------------------------------------------------------------------------


@pytest.mark.parametrize("per_node", [2, 3, 5, 1000])
@pytest.mark.parametrize("duplicated", [True, False])
def test_sound_image_is_clean_however_its_items_fall_into_leaves(
    per_node: int, duplicated: bool
) -> None:
    """Promise: a sound image is clean, also when the items of an inode span several leaves."""
    builder = ImageBuilder(duplicated=duplicated)
    volume = sample_volume(builder)
    record = builder.add_root(volume, per_node=per_node)
    shared = (record.pointer, record.node_count)
    builder.add_root(volume, "monday", RootKind.SNAPSHOT, tree=shared)
    report = check_image(builder.finish(per_node=2))
    assert report.findings == ()
    assert report.clean
    assert report.roots == 2
    assert report.inodes == 9
    assert report.data_blocks == report.verified_blocks == 6
    assert report.generation == 70
    copies = 2 if duplicated else 1
    assert report.used_blocks == report.nodes * 4 * copies + 6


def test_empty_volume_of_a_large_image_with_two_index_levels_is_clean() -> None:
    """Promise: the last group may reach past the end, and the index may have several levels."""
    builder = ImageBuilder(total_blocks=64 * 1024 + 500)
    volume = VolumeItems()
    volume.directory(1)
    builder.next_block = 64 * 1024 - 40  # across the boundary of two index pages
    builder.add_root(volume)
    report = check_image(builder.finish())
    assert report.findings == ()


def test_data_false_leaves_data_unread() -> None:
    """Promise: a check of metadata reads no data."""
    builder, volume = sample_image()
    record = builder.add_root(volume)
    device = builder.finish()
    extent = decode_extent(3, volume.items[key(3, TYPE_EXTENT, 0)])
    device.unreadable.update(range(extent.block, extent.block + extent.count))
    report = check_image(device, data=False)
    assert report.clean
    assert report.verified_blocks == 0
    assert record.data_blocks == report.data_blocks == 6


def test_shared_nodes_are_read_once_for_all_snapshots() -> None:
    """Promise: a snapshot that shares every node costs only the read of its root record."""
    builder, volume = sample_image()
    record = builder.add_root(volume, per_node=3)
    alone = check_image(builder.finish())
    builder, volume = sample_image()
    record = builder.add_root(volume, per_node=3)
    for number in range(20):
        builder.add_root(
            volume,
            f"s{number}",
            RootKind.SNAPSHOT,
            tree=(record.pointer, record.node_count),
        )
    together = check_image(builder.finish())
    assert together.findings == ()
    assert together.nodes == alone.nodes
    assert together.inodes == alone.inodes


def test_progress_ends_at_what_the_superblock_promises() -> None:
    """Promise: a progress bar reaches its end and never runs backwards."""
    builder, volume = sample_image()
    builder.add_root(volume)
    told: list[CheckProgress] = []
    report = check_image(builder.finish(), progress=told.append)
    assert told[-1].done_blocks == told[-1].total_blocks == report.used_blocks
    assert [each.done_blocks for each in told] == sorted(each.done_blocks for each in told)
    assert {each.stage for each in told} == {"catalog", "volume main"}


# --- not an image ---------------------------------------------------------------------------------


def test_file_without_superblock_is_no_image() -> None:
    """Promise: a file that is not an image is refused in one line."""
    with pytest.raises(ImageError, match="has no valid superblock"):
        check_image(MemoryDevice(4096))
    with pytest.raises(ImageError, match="too small"):
        check_image(MemoryDevice(100))


def test_newer_format_is_refused() -> None:
    """Promise: an unknown incompatible feature is an ImageError, not a list of findings."""
    builder, volume = sample_image()
    builder.add_root(volume)
    device = builder.finish(incompat=1 | 1 << 40)
    with pytest.raises(ImageError, match="features that this cowfs does not know"):
        check_image(device)


def test_generation_that_is_gone_is_refused() -> None:
    """Promise: asking for a generation outside of the ring is an error that says so."""
    builder, volume = sample_image()
    builder.add_root(volume)
    with pytest.raises(ImageError, match="no superblock of generation 3"):
        check_image(builder.finish(), generation=3)


def test_unreadable_rings_are_a_device_error() -> None:
    """Promise: an image whose two rings are both unreadable is a device error."""
    builder, volume = sample_image()
    builder.add_root(volume)
    device = builder.finish()
    device.unreadable.update((0, 4095))
    with pytest.raises(DeviceError):
        check_image(device)


# --- the ring -------------------------------------------------------------------------------------


def test_second_ring_is_enough() -> None:
    """Promise: with the first ring unreadable the image is checked from the second."""
    builder, volume = sample_image()
    builder.add_root(volume)
    device = builder.finish()
    device.unreadable.add(5)
    report = check_image(device)
    assert report.clean
    assert any("cannot be read" in finding.what for finding in report.warnings)


def test_torn_copy_of_a_slot_is_a_warning() -> None:
    """Promise: with one valid copy of a slot, the torn copy is a warning and not an error."""
    builder, volume = sample_image()
    builder.add_root(volume)
    device = builder.finish()
    device.damage(70 % RING_SLOTS)
    report = check_image(device)
    assert report.clean
    assert report.generation == 70
    assert {finding.severity for finding in report.findings} == {"warning"}
    assert any("copies of slot 6 differ" in finding.what for finding in report.findings)


def test_newest_valid_slot_of_both_copies_wins() -> None:
    """Promise: the highest valid generation is checked, whichever copy has it, or one asked for."""
    builder, volume = sample_image()
    builder.add_root(volume)
    device = builder.finish()
    superblock = decode_superblock(device.blocks[6])
    builder.put_superblock(replace(superblock, generation=71), copies=[1])
    assert check_image(device).generation == 71
    assert check_image(device, generation=70).generation == 70


def test_superblock_in_the_wrong_slot_does_not_count() -> None:
    """Promise: a superblock in the wrong slot is reported and not used."""
    builder, volume = sample_image()
    builder.add_root(volume)
    device = builder.finish()
    superblock = decode_superblock(device.blocks[6])
    device.blocks[9] = replace(superblock, generation=99).encode()
    report = check_image(device)
    assert report.generation == 70
    assert any("does not belong in this slot" in finding.what for finding in report.warnings)


# --- I1 -------------------------------------------------------------------------------------------


def test_leaked_blocks_are_found_with_their_place() -> None:
    """Promise: a refcount without a pointer is a leak; a run of leaked blocks is one finding."""
    builder, volume = sample_image()
    leak = builder.allocate(3)
    builder.references.update(range(leak, leak + 3))
    builder.add_root(volume)
    found = the_error(check_image(builder.finish()), "leaked: 3 blocks with refcount 1")
    assert (found.invariant, found.root, found.block) == ("I1", "space map", leak)


@pytest.mark.parametrize(
    ("by", "text"),
    [
        (1, "refcount 2 for 1 block, but 1 pointers"),
        (-1, "1 block counted as free, but 1 pointers"),
    ],
)
def test_wrong_refcount_of_data_is_found(by: int, text: str) -> None:
    """Promise: a count too high (never freed) and too low (freed in use) are both found."""
    builder, volume = sample_image()
    builder.add_root(volume)
    block = decode_extent(3, volume.items[key(3, TYPE_EXTENT, 7)]).block
    builder.references[block] += by
    found = the_error(check_image(builder.finish()), text)
    assert (found.invariant, found.block) == ("I1", block)


def test_shared_node_counted_too_low_is_found() -> None:
    """Promise: the refcount of a shared root must be the number of roots."""
    builder, volume = sample_image()
    record = builder.add_root(volume)
    tree = (record.pointer, record.node_count)
    builder.add_root(volume, "monday", RootKind.SNAPSHOT, tree=tree)
    builder.references.subtract(range(record.pointer.block, record.pointer.block + 4))
    found = the_error(check_image(builder.finish()), "refcount 1 for 4 blocks, but 2 pointers")
    assert (found.invariant, found.block) == ("I1", record.pointer.block)


def test_wrong_refcount_of_a_twin_is_found() -> None:
    """Promise: twins are counted like their originals."""
    builder, volume = sample_image()
    record = builder.add_root(volume)
    builder.references.update(range(record.pointer.twin, record.pointer.twin + 4))
    assert the_error(check_image(builder.finish()), "refcount 2").block == record.pointer.twin


def test_refcount_beyond_the_end_is_found() -> None:
    """Promise: blocks of the last group that lie beyond the image have refcount zero."""
    builder = ImageBuilder(total_blocks=4096 + 100)
    volume = sample_volume(builder)
    builder.references[4096 + 300] = 1
    builder.add_root(volume)
    device = builder.finish(used_blocks=0)
    report = check_image(device)
    assert any(
        "beyond the end of the image" in finding.what and finding.block == 4396
        for finding in report.errors
    )


# --- half-done drops ------------------------------------------------------------------------------


def half_dropped(*, done: int = 1, wrong_step: bool = False) -> tuple[ImageBuilder, list[Pointer]]:
    """An image with a dropped tree of three leaves, of which the first was given back already."""
    builder, volume = sample_image()
    builder.add_root(volume)
    gone = VolumeItems()
    gone.directory(1)
    gone.inode(2, stat.S_IFREG | 0o644, 1, 90 * BLOCK_SIZE_BYTES)
    for number in range(6):
        gone.extent(2, 10 * number, builder.data(bytes([number]) * BLOCK_SIZE_BYTES))
    before = len(builder.node_pointers)
    root, _ = builder.tree(gone.entries(), per_node=3)
    leaves = builder.node_pointers[before:-1]
    first = node_bytes(builder.device, leaves[0].block)
    # Already given back: the first leaf with its extent, and the first item of the second leaf.
    builder.references.subtract(
        block for start in (leaves[0].block, leaves[0].twin) for block in range(start, start + 4)
    )
    images = [
        decode_node(node_bytes(builder.device, leaf.block), leaf, builder.image_id, SEED, 0)
        for leaf in leaves
    ]
    for value in (images[0].values[2], images[1].values[0]):
        extent = decode_extent(2, value)
        builder.references.subtract(range(extent.block, extent.block + extent.count))
    assert first[:16] == leaves[0].checksum
    for block in range(leaves[0].block, leaves[0].block + 4):
        builder.device.blocks[block] = b"\xaa" * BLOCK_SIZE_BYTES  # reused for something else
    second = leaves[2] if wrong_step else leaves[1]
    builder.add_drop([DropStep(root, 1), DropStep(second, done)])
    return builder, [root, *leaves]


def test_half_done_drop_is_clean() -> None:
    """Promise: what a drop has already given back is neither missed nor followed."""
    builder, _ = half_dropped()
    report = check_image(builder.finish())
    assert report.findings == ()
    assert report.roots == 2


def test_drop_record_that_forgot_its_progress_is_found() -> None:
    """Promise: an entry that was given back while the record still counts it is found."""
    builder, _ = half_dropped(done=0)
    found = the_error(check_image(builder.finish()), "1 block counted as free, but 1 pointers")
    assert found.invariant == "I1"


def test_drop_record_whose_steps_do_not_follow_is_found() -> None:
    """Promise: each step of a drop record must be an entry of the step before."""
    builder, pointers = half_dropped(wrong_step=True)
    report = check_image(builder.finish())
    found = [f for f in report.errors if "next step is not entry 1" in f.what]
    assert found
    assert found[0].block == pointers[0].block
    assert found[0].root == "drop queue, gone"


def test_drop_record_that_is_too_far_is_found() -> None:
    """Promise: a drop record that counts more entries than its node has is found."""
    builder, _ = half_dropped(done=99)
    report = check_image(builder.finish())
    assert any("has dropped 99 entries of 3" in finding.what for finding in report.errors)


def test_half_dropped_node_that_is_shared_is_found() -> None:
    """Promise: a half-dropped node must not have other parents."""
    builder, pointers = half_dropped()
    builder.add_drop([DropStep(pointers[2], 0)], "other")
    report = check_image(builder.finish())
    found = the_error(report, "half-dropped node has more than one pointer")
    assert found.block == pointers[2].block


# --- I2 -------------------------------------------------------------------------------------------


def with_retained() -> tuple[MemoryDevice, Pointer, Extent]:
    """Generations 69 and 70; the older has a node and data that the newer one freed."""
    builder = ImageBuilder(generation=69)
    volume = sample_volume(builder)
    extent = builder.data(b"old" * 1000)
    volume.inode(10, stat.S_IFREG | 0o644, 1, 3000)
    volume.name(1, b"old", 10)
    volume.extent(10, 0, extent)
    record = builder.add_root(volume, per_node=4)
    device = builder.finish(oldest_retained=69)
    later = ImageBuilder(generation=70)
    later.device = device
    later.next_block = builder.next_block
    later.add_root(sample_volume(later))
    later.finish(oldest_retained=69)
    return device, record.pointer, extent


def test_retained_generation_is_walked_too() -> None:
    """Promise: the report lists the generations that could still be mounted."""
    device, _, _ = with_retained()
    report = check_image(device)
    assert report.findings == ()
    assert report.retained_generations == (69,)
    assert check_image(device, generation=69).clean


def test_node_of_a_retained_generation_overwritten_is_found() -> None:
    """Promise: reuse of a node that a retained generation shows is found (I2)."""
    device, pointer, _ = with_retained()
    device.damage(pointer.block)
    found = the_error(check_image(device), "a retained generation is not whole")
    assert (found.invariant, found.root, found.block) == ("I2", "generation 69", pointer.block)


def test_data_of_a_retained_generation_overwritten_is_found() -> None:
    """Promise: reuse of a data block that a retained generation shows is found (I2)."""
    device, _, extent = with_retained()
    device.damage(extent.block)
    found = the_error(check_image(device), "wrong data checksum")
    assert (found.invariant, found.block) == ("I2", extent.block)


# --- I4 -------------------------------------------------------------------------------------------


def test_child_newer_than_its_parent_is_found() -> None:
    """Promise: no child is younger than its parent."""
    builder, volume = sample_image()
    entries = volume.entries()
    leaves = [builder.node(0, entries[:8], birth=60), builder.node(0, entries[8:], birth=70)]
    firsts = (entries[0][0], entries[8][0])
    root = builder.node(
        1,
        [(first, leaf.encode()) for first, leaf in zip(firsts, leaves, strict=True)],
        birth=65,
    )
    builder.add_root(volume, tree=(root, 3))
    found = [f for f in check_image(builder.finish()).errors if f.invariant == "I4"]
    assert [(each.block, each.root) for each in found] == [(root.block, "volume main")]
    assert "found birth 70, parent 65" in found[0].what


def test_data_newer_than_its_node_is_found() -> None:
    """Promise: no extent is younger than the leaf that names it."""

    def change(builder: ImageBuilder, volume: VolumeItems) -> None:
        extent = decode_extent(3, volume.items[key(3, TYPE_EXTENT, 0)])
        volume.items[key(3, TYPE_EXTENT, 0)] = extent._replace(birth=71).encode()

    found = the_error(checked(change), "data is newer than its node")
    assert (found.invariant, found.path, found.ino) == ("I4", "/big", 3)


def test_inode_newer_than_its_node_is_found() -> None:
    """Promise: no inode is younger than the leaf that holds it."""

    def change(builder: ImageBuilder, volume: VolumeItems) -> None:
        volume.inodes[9].birth = 80

    assert the_error(checked(change), "an inode is newer").invariant == "I4"


def test_snapshot_with_a_tree_born_after_it_is_found() -> None:
    """Promise: no node of a snapshot is younger than the snapshot."""
    builder, volume = sample_image()
    record = builder.add_root(volume)
    builder.add_root(volume, "s", RootKind.SNAPSHOT, tree=(record.pointer, record.node_count))
    builder.roots[1] = replace(builder.roots[1], created_generation=50)
    found = the_error(check_image(builder.finish()), "a tree born in 70")
    assert (found.invariant, found.root) == ("I4", "snapshot s")


def test_root_of_a_generation_to_come_is_found() -> None:
    """Promise: no root record is younger than the superblock."""
    builder, volume = sample_image()
    builder.add_root(volume)
    builder.roots[0] = replace(builder.roots[0], created_generation=71)
    assert the_error(check_image(builder.finish()), "but the image is at").invariant == "I4"


# --- I5 and C9: nodes -----------------------------------------------------------------------------


def test_damaged_copy_of_a_node_is_found_and_the_twin_serves() -> None:
    """Promise: both copies are read; a bad one is an error, and the subtree is still checked."""
    builder, volume = sample_image()
    record = builder.add_root(volume, per_node=3)
    device = builder.finish()
    device.damage(record.pointer.block)
    found = the_error(check_image(device), "checksum is wrong; the other copy is intact")
    assert (found.invariant, found.root, found.block) == (
        "C9",
        "volume main",
        record.pointer.block,
    )
    device.damage(record.pointer.twin + 3)
    lost = [finding for finding in check_image(device).errors if "neither copy" in finding.what]
    assert [finding.block for finding in lost] == [record.pointer.block, record.pointer.twin]


def test_damaged_twin_is_found() -> None:
    """Promise: a copy that no read needs is verified all the same."""
    builder, volume = sample_image()
    record = builder.add_root(volume)
    device = builder.finish()
    device.damage(record.pointer.twin + 1)
    assert the_error(check_image(device), "node: checksum is wrong").block == record.pointer.twin


def test_unreadable_node_is_found_and_its_subtree_is_not_called_leaked() -> None:
    """Promise: a lost leaf is one error and one warning of lost contents, not many leaks."""
    builder, volume = sample_image(duplicated=False)
    before = len(builder.node_pointers)
    builder.add_root(volume, per_node=4)
    leaf = builder.node_pointers[before + 2]
    device = builder.finish()
    device.unreadable.add(leaf.block)
    report = check_image(device)
    found = the_error(report, "node cannot be read")
    assert (found.invariant, found.block) == ("C9", leaf.block)
    assert [finding.invariant for finding in report.warnings] in ([], ["I6"])


def test_pointer_out_of_the_image_is_found() -> None:
    """Promise: a pointer whose node would lie in a ring, wholly or in part, is found."""
    for block in (0, 63, 4096 - RING_SLOTS - 3, 1 << 50):
        builder, volume = sample_image()
        record = builder.add_root(volume)
        bad = record.pointer._replace(block=block)
        builder.catalog_items[root_key(1)] = replace(record, tree=bad).encode()
        report = check_image(builder.finish())
        assert any("pointer leaves the image" in f.what for f in report.errors), block


def test_extent_out_of_the_image_is_found() -> None:
    """Promise: an extent beyond the image is found, and its file is named."""

    def change(builder: ImageBuilder, volume: VolumeItems) -> None:
        builder.point_at = lambda pointer: None  # type: ignore[method-assign]
        extent = decode_extent(3, volume.items[key(3, TYPE_EXTENT, 7)])
        volume.items[key(3, TYPE_EXTENT, 7)] = extent._replace(block=4096 - 66).encode()

    report = checked(change)
    found = [f for f in report.errors if "an extent leaves the image" in f.what]
    assert found
    assert (found[0].invariant, found[0].path) == ("I5", "/big")


def test_cycle_is_found_and_the_walk_ends() -> None:
    """Promise: a node below itself is found and does not trap the checker."""
    # A node cannot hold its own checksum, so the cycle is one of block numbers.
    builder, volume = sample_image()
    leaf = builder.node(0, volume.entries())
    block = builder.next_block
    fake = Pointer(block, block + 4, 70, bytes(16))
    root = builder.node(1, [(b"\0", leaf.encode()), (b"\xff", fake.encode())], count=False)
    assert root.block == block
    builder.add_root(volume, tree=(root, 2))
    report = check_image(builder.finish())
    found = [finding for finding in report.errors if "a cycle" in finding.what]
    assert [(each.invariant, each.block) for each in found] == [("I5", root.block)]


def test_key_below_its_bound_is_found() -> None:
    """Promise: no key below an entry is smaller than the entry's key."""
    builder, volume = sample_image()
    entries = volume.entries()
    leaves = [builder.node(0, entries[:8]), builder.node(0, entries[8:])]
    bound = entries[9][0]
    root = builder.node(1, [(entries[0][0], leaves[0].encode()), (bound, leaves[1].encode())])
    builder.add_root(volume, tree=(root, 3))
    found = the_error(check_image(builder.finish()), "is below its bound")
    assert (found.invariant, found.block) == ("I5", root.block)


def test_key_beyond_the_next_bound_is_found() -> None:
    """Promise: all keys below an entry come before the next entry's key."""
    builder, volume = sample_image()
    entries = volume.entries()
    leaves = [builder.node(0, entries[:8]), builder.node(0, entries[8:])]
    bound = entries[7][0]
    root = builder.node(1, [(entries[0][0], leaves[0].encode()), (bound, leaves[1].encode())])
    builder.add_root(volume, tree=(root, 3))
    found = the_error(check_image(builder.finish()), "not less than the next bound")
    assert (found.invariant, found.block) == ("I5", root.block)


def test_level_that_does_not_fall_by_one_is_found() -> None:
    """Promise: all paths from a root to a leaf have the same length."""
    builder, volume = sample_image()
    leaf = builder.node(0, volume.entries())
    root = builder.node(2, [(b"\0", leaf.encode())])
    builder.add_root(volume, tree=(root, 2))
    report = check_image(builder.finish())
    assert any("level is wrong, found 0, expected 1" in finding.what for finding in report.errors)


def test_empty_leaf_below_a_root_is_found() -> None:
    """Promise: an empty leaf is valid only as the root of an empty tree."""
    builder, volume = sample_image()
    leaves = [builder.node(0, volume.entries()), builder.node(0, [])]
    root = builder.node(1, [(b"\0", leaves[0].encode()), (b"\xff" * 17, leaves[1].encode())])
    builder.add_root(volume, tree=(root, 3))
    found = the_error(check_image(builder.finish()), "a leaf below the root is empty")
    assert (found.invariant, found.block) == ("I5", leaves[1].block)


def test_two_pointers_that_disagree_are_found() -> None:
    """Promise: pointers to a shared node that differ are found."""
    builder, volume = sample_image()
    record = builder.add_root(volume)
    other = record.pointer._replace(checksum=bytes(16))
    builder.add_root(volume, "s", RootKind.SNAPSHOT, tree=(other, record.node_count))
    found = the_error(check_image(builder.finish()), "disagree")
    assert (found.invariant, found.root) == ("I5", "snapshot s")


def test_node_on_data_is_found() -> None:
    """Promise: a block that is both node and data is found, even when its refcount adds up."""
    builder, volume = sample_image()
    record = builder.add_root(volume)
    inside = Extent(record.pointer.block, 4, 1, bytes(32))
    snapshot = sample_volume(builder)
    snapshot.items[key(3, TYPE_EXTENT, 3)] = inside.encode()
    snapshot.inodes[3].data_blocks += 4
    builder.add_root(snapshot, "s", RootKind.SNAPSHOT)
    report = check_image(builder.finish(), data=False)
    found = the_error(report, "data lies on a node")
    assert (found.invariant, found.block, found.path) == ("I5", record.pointer.block, "/big")


def test_missing_twin_is_found() -> None:
    """Promise: an image with duplicated metadata has a twin for every node."""
    builder, volume = sample_image()
    record = builder.add_root(volume)
    single = record.pointer._replace(twin=0)
    builder.roots[0] = replace(record, tree=single)
    report = check_image(builder.finish())
    assert any("keeps a twin of every node" in finding.what for finding in report.errors)


def test_unknown_and_damaged_catalog_entries_are_found() -> None:
    """Promise: an unreadable entry of the catalog is an error that names the entry."""
    builder, volume = sample_image()
    builder.add_root(volume)
    builder.catalog_items[b"X1"] = b"?"
    builder.catalog_items[root_key(5)] = builder.roots[0].encode()
    texts = {finding.what for finding in check_image(builder.finish()).errors}
    assert any("unknown key" in text for text in texts)
    assert any("is under another root's key" in text for text in texts)


def test_catalog_name_and_root_that_do_not_fit_are_found() -> None:
    """Promise: each root has exactly one name, and each name its root."""
    builder, volume = sample_image()
    builder.add_root(volume)
    builder.catalog_items[snapshot_key("ghost")] = encode_id(77)
    found = the_error(
        check_image(builder.finish()), "'ghost' points at root 77, which does not exist"
    )
    assert (found.invariant, found.root) == ("I7", "catalog")
    builder, volume = sample_image()
    builder.add_root(volume)
    builder.catalog_items[volume_key("main")] = b""
    found = the_error(check_image(builder.finish()), "its catalog names are none")
    assert found.invariant == "I7"


def test_root_id_that_will_be_given_again_is_found() -> None:
    """Promise: a next root id that is already in use is found."""
    found = the_error(checked(next_root_id=2), "root id is 2, but the next root id is 2")
    assert found.root == "snapshot monday"


# --- I6: counters and the space map ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("member", "text"),
    [
        ("used_blocks", "counts 7 used blocks"),
        ("system_blocks", "counts 7 system blocks"),
        ("catalog_nodes", "counts 7 catalog nodes"),
    ],
)
def test_wrong_counter_of_the_superblock_is_found(member: str, text: str) -> None:
    """Promise: a counter of the superblock that differs from the image is found."""
    assert the_error(checked(**{member: 7}), text).invariant == "I6"


def test_wrong_free_count_of_a_group_is_found() -> None:
    """Promise: a summary in the space map that differs from its group is found."""
    builder, volume = sample_image()
    builder.add_root(volume)

    def change(entries: np.ndarray, level: int) -> None:
        entries["free"][0] += 1

    builder.change_entries = change
    found = the_error(check_image(builder.finish()), "entry 0 of the index page counts")
    assert (found.invariant, found.root) == ("I6", "space map")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda entries, level: entries["birth"].__setitem__(3, 5), "not all zero"),
        (lambda entries, level: entries["kind"].__setitem__(0, 9), "unknown kind"),
        (lambda entries, level: entries["birth"].__setitem__(0, 99), "newer than its parent"),
        (lambda entries, level: entries["block"].__setitem__(0, 9), "pointer leaves the image"),
        (lambda entries, level: entries.__setitem__(9, entries[0]), "beyond the last group"),
    ],
)
def test_impossible_index_entry_is_found(
    change: Callable[[np.ndarray, int], None], text: str
) -> None:
    """Promise: every member of an index entry is checked."""
    builder, volume = sample_image()
    builder.add_root(volume)
    builder.change_entries = change
    report = check_image(builder.finish())
    assert any(text in finding.what for finding in report.errors), report.findings


def test_damaged_page_of_the_space_map_is_found() -> None:
    """Promise: both copies of each page are read; a page lost in both raises no false alarm."""
    builder, volume = sample_image()
    builder.add_root(volume)
    device = builder.finish()
    page = builder.page_places[0]
    device.damage(page)
    found = the_error(check_image(device), "refcount page: checksum is wrong; the other copy")
    assert (found.invariant, found.root, found.block) == ("C9", "space map", page)
    device.damage(page + 1)
    report = check_image(device)
    assert {finding.invariant for finding in report.errors} == {"C9"}
    device.damage(builder.page_places[-1])
    errors = check_image(device).errors
    assert [finding.block for finding in errors if "index page: checksum" in finding.what] == [
        builder.page_places[-1]
    ]


def test_page_of_the_space_map_that_lies_on_a_node_is_found() -> None:
    """Promise: a system block that is used for something else is found."""
    builder, volume = sample_image()
    page_block = builder.allocate(2)
    extent = Extent(page_block, 1, 1, bytes(8))
    volume.extent(3, 3, extent)
    builder.add_root(volume)
    original = builder._page
    places = iter([(page_block, page_block + 1)])
    builder._page = lambda: next(places, None) or original()  # type: ignore[method-assign]
    report = check_image(builder.finish(), data=False)
    found = the_error(report, "lies on a node or on data")
    assert (found.invariant, found.block) == ("I6", page_block)


def test_truncated_image_is_found() -> None:
    """Promise: an image that was cut short is reported as truncated."""
    builder, volume = sample_image()
    builder.add_root(volume)
    device = builder.finish()
    device.size_bytes -= BLOCK_SIZE_BYTES
    report = check_image(device)
    assert any("the image is truncated" in finding.what for finding in report.errors)


# --- C9: data -------------------------------------------------------------------------------------


def test_damaged_data_is_found_with_file_and_offset() -> None:
    """Promise: a flipped bit in a file is reported with the file, the byte and the block."""
    builder, volume = sample_image()
    builder.add_root(volume, per_node=3)
    device = builder.finish()
    block = decode_extent(3, volume.items[key(3, TYPE_EXTENT, 7)]).block + 2
    device.damage(block)
    found = the_error(check_image(device), f"wrong data checksum, at byte {9 * 4096} of the file")
    assert (found.invariant, found.root, found.path, found.ino, found.block) == (
        "C9",
        "volume main",
        "/big",
        3,
        block,
    )
    assert str(found) == (
        f"error C9: volume main, /big, inode 3, block {block}: "
        "wrong data checksum, at byte 36864 of the file"
    )


def test_unreadable_data_is_found_block_by_block() -> None:
    """Promise: one bad sector is one finding, and the rest of the extent is verified."""
    builder, volume = sample_image()
    builder.add_root(volume)
    device = builder.finish()
    block = decode_extent(3, volume.items[key(3, TYPE_EXTENT, 0)]).block + 1
    device.unreadable.add(block)
    assert the_error(check_image(device), "data cannot be read").block == block


def test_one_block_with_two_checksums_is_found() -> None:
    """Promise: a block is verified against the checksum of each file that has it."""

    def change(builder: ImageBuilder, volume: VolumeItems) -> None:
        extent = decode_extent(3, volume.items[key(3, TYPE_EXTENT, 0)])
        volume.inode(10, stat.S_IFREG | 0o644, 1, 3 * BLOCK_SIZE_BYTES)
        volume.name(1, b"clone", 10)
        volume.extent(10, 0, extent._replace(checksums=extent.checksums[:16] + bytes(8)))

    found = the_error(checked(change), "wrong data checksum, at byte 8192")
    assert found.path == "/clone"


# --- I7: names and links --------------------------------------------------------------------------


def set_member(ino: int, member: str, value: int) -> Change:
    def change(builder: ImageBuilder, volume: VolumeItems) -> None:
        setattr(volume.inodes[ino], member, value)

    return change


def put(item_key: bytes, value: bytes) -> Change:
    """Replace an item, or leave it out if the value is empty."""

    def change(builder: ImageBuilder, volume: VolumeItems) -> None:
        volume.items[item_key] = value

    return change


def _add_missing_name(builder: ImageBuilder, volume: VolumeItems) -> None:
    volume.names[1].append((b"ghost", 50))
    volume.inodes[1].size_bytes += 5


def _drop_name(builder: ImageBuilder, volume: VolumeItems) -> None:
    volume.names[1].remove((b"empty", 9))
    volume.inodes[1].size_bytes -= 5


def _drop_mark(builder: ImageBuilder, volume: VolumeItems) -> None:
    del volume.items[key(0, TYPE_ORPHAN, 7)]


def _two_names_of_a_directory(builder: ImageBuilder, volume: VolumeItems) -> None:
    volume.name(1, b"again", 6)


def _wrong_type(builder: ImageBuilder, volume: VolumeItems) -> None:
    volume.names[1].remove((b"fifo", 8))
    volume.items[key(1, TYPE_NAME, name_hash(b"fifo", NAME_SEED))] = encode_names(
        [Name(b"fifo", 8, stat.S_IFSOCK >> 12, 0)]
    )


def _loop(builder: ImageBuilder, volume: VolumeItems) -> None:
    """Make two directories each other's parent."""
    volume.directory(20)
    volume.directory(21)
    volume.name(20, b"down", 21)
    volume.name(21, b"up", 20)


def _name_of_root(builder: ImageBuilder, volume: VolumeItems) -> None:
    volume.name(6, b"top", 1)


def _wrong_hash(builder: ImageBuilder, volume: VolumeItems) -> None:
    volume.names[1].remove((b"fifo", 8))
    volume.items[key(1, TYPE_NAME, 1 << 40)] = encode_names(
        [Name(b"fifo", 8, stat.S_IFIFO >> 12, 0)]
    )


def _twice(builder: ImageBuilder, volume: VolumeItems) -> None:
    volume.name(1, b"fifo", 8)
    volume.inodes[8].nlink = 2


def _no_inode(builder: ImageBuilder, volume: VolumeItems) -> None:
    volume.items[key(30, TYPE_INLINE, 0)] = b"lost"


@pytest.mark.parametrize("per_node", [2, 1000])
@pytest.mark.parametrize(
    ("change", "text", "ino", "path"),
    [
        (_add_missing_name, "1 name for an inode that does not exist", 50, "/ghost"),
        (_drop_name, "nlink is 1, but 0 names point at it", 9, ""),
        (set_member(2, "nlink", 3), "nlink is 3, but 2 names point at it", 2, None),
        (_drop_mark, "unlinked, but without an orphan mark", 7, ""),
        (put(key(0, TYPE_ORPHAN, 77), b""), "an orphan mark for an inode that does not", 77, ""),
        (put(key(0, TYPE_ORPHAN, 9), b""), "an orphan mark, but nlink is 1", 9, "/empty"),
        (_two_names_of_a_directory, "a directory with nlink 2 has 2 names", 6, None),
        (_wrong_type, "1 name for a socket, but the inode is a fifo", 8, "/fifo"),
        (_loop, "cannot be reached from the root directory", 20, ""),
        (_name_of_root, "1 names for the root directory", 1, "/"),
        (set_member(6, "rdev", 1), "in inode 5 calls inode 1 its parent", 6, "/sub/deep"),
        (set_member(1, "rdev", 5), "the parent of the root directory is 5", 1, "/"),
        (_wrong_hash, "the name fifo is filed under another name's hash", 1, "/"),
        (_twice, "the name fifo is there twice", 1, "/"),
        (_no_inode, "items of an inode that does not exist", 30, ""),
        (set_member(5, "size_bytes", 7), "size is 7, but its names have 8 bytes", 5, "/sub"),
        (set_member(5, "nlink", 2), "nlink of the directory is 2, expected 3", 5, "/sub"),
        (set_member(4, "size_bytes", 6), "but the target has 5 bytes", 4, "/link"),
        (put(key(4, TYPE_SYMLINK, 0), b""), "a symlink without a target", 4, "/link"),
        (put(key(9, TYPE_SYMLINK, 0), b"x"), "a regular file has a symlink target", 9, "/empty"),
        (put(key(8, TYPE_INLINE, 0), b"x"), "a fifo has data", 8, "/fifo"),
        (set_member(3, "data_blocks", 5), "data_blocks is 5, but its extents have 6", 3, "/big"),
        (set_member(3, "size_bytes", 9 * 4096), "beyond the 9 blocks of its size", 3, "/big"),
        (set_member(3, "xattr_count", 1), "xattr_count is 1, but it has 2 xattrs", 3, "/big"),
        (put(key(3, TYPE_INLINE, 0), b"x"), "both inline data and extents", 3, "/big"),
        (set_member(2, "size_bytes", 12), "size is 12, but it has 11 inline bytes", 2, None),
        (set_member(2, "flags", 0), "flags are 0x0, but it has inline data", 2, None),
        (set_member(9, "flags", 1), "flags are 0x1, but it has no inline data", 9, "/empty"),
        (put(key(8, 9, 0), b"x"), "an item of unknown type 9", 8, "/fifo"),
        (put(key(0, TYPE_INLINE, 0), b"x"), "an item of inode 0 is not an orphan mark", 0, ""),
        (put(key(9, TYPE_INLINE, 7), b"x"), "inline data at offset 7", 9, "/empty"),
        (put(key(4, TYPE_SYMLINK, 1), b"x"), "a malformed symlink target", 4, "/link"),
        (put(key(9, 1, 5), bytes(88)), "unknown file type", 9, "/empty"),
    ],
)
def test_contents_that_do_not_fit_are_found_and_named(
    change: Change, text: str, ino: int, path: str | None, per_node: int
) -> None:
    """Promise: every rule of I7 is checked wherever leaves are cut; findings give the path."""
    report = checked(change, per_node=per_node)
    found = [finding for finding in report.errors if text in finding.what and finding.ino == ino]
    assert len(found) == 1, "\n".join(map(str, report.findings))
    assert found[0].invariant == "I7"
    assert found[0].root == "volume main"
    if path is None:
        assert found[0].path in {"/hello", "/sub/hard", "/sub/deep", "/again"}
    else:
        assert found[0].path == path


def test_inline_data_beyond_its_limit_is_found() -> None:
    """Promise: inline data of more than 2 KiB is found."""

    def change(builder: ImageBuilder, volume: VolumeItems) -> None:
        volume.items[key(9, TYPE_INLINE, 0)] = bytes(2049)
        volume.inodes[9].size_bytes = 2049
        volume.inodes[9].flags = INODE_INLINE

    assert the_error(checked(change), "inline data of 2049 bytes, at most 2048").ino == 9


@pytest.mark.parametrize("per_node", [2, 3, 1000])
def test_overlapping_extents_are_found(per_node: int) -> None:
    """Promise: extents that overlap are found, also when they lie in two leaves."""

    def change(builder: ImageBuilder, volume: VolumeItems) -> None:
        volume.extent(3, 2, builder.data(b"c" * BLOCK_SIZE_BYTES))

    found = the_error(checked(change, per_node=per_node), "extents overlap: one begins at file")
    assert (found.invariant, found.path) == ("I7", "/big")


LARGE = xattr_hash(b"user.large", NAME_SEED)


@pytest.mark.parametrize("per_node", [2, 1000])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (put(key(3, TYPE_XATTR, LARGE + 1), b""), "chunks of an xattr do not follow each other"),
        (put(key(3, TYPE_XATTR, LARGE + 2), b"short"), "chunks of an xattr do not follow"),
        (put(key(3, TYPE_XATTR, LARGE + 1), bytes(2047)), "chunks of an xattr do not follow"),
        (
            put(key(3, TYPE_XATTR, 256), encode_xattr(b"user.x", b"")[0]),
            "the xattr user.x is filed under another name's hash",
        ),
        (put(key(3, TYPE_XATTR, 256), b"?"), "xattr of inode 3: cut short"),
        (
            put(key(3, TYPE_XATTR, LARGE + 512), encode_xattr(b"user.large", b"")[0]),
            "the xattr user.large is there twice",
        ),
        (
            put(
                key(9, TYPE_XATTR, xattr_hash(b"n", NAME_SEED)), encode_xattr(b"n", bytes(3000))[0]
            ),
            "the last 952 bytes of an xattr are missing",
        ),
    ],
)
def test_broken_xattrs_are_found(change: Change, text: str, per_node: int) -> None:
    """Promise: an xattr that is incomplete or malformed is an error."""
    report = checked(change, per_node=per_node)
    assert any(text in finding.what for finding in report.errors), report.findings
    assert {finding.path for finding in report.errors} <= {"/big", "/empty"}


def acl_item(ino: int, name: bytes, value: bytes) -> Change:
    """Add an xattr to an inode that has none, and count it."""

    def change(builder: ImageBuilder, volume: VolumeItems) -> None:
        for chunk, part in enumerate(encode_xattr(name, value)):
            volume.items[key(ino, TYPE_XATTR, xattr_hash(name, NAME_SEED) + chunk)] = part
        set_member(ino, "xattr_count", 1)(builder, volume)

    return change


def acl_value(*entries: tuple[int, int, int]) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


NO_ID = 0xFFFFFFFF
PLAIN_644 = acl_value((1, 6, NO_ID), (4, 4, NO_ID), (32, 4, NO_ID))
NAMED_644 = acl_value((1, 6, NO_ID), (2, 7, 77), (4, 0, NO_ID), (16, 4, NO_ID), (32, 4, NO_ID))
NAMED_MANY = acl_value(
    (1, 6, NO_ID),
    *((2, 7, uid) for uid in range(300)),
    (4, 0, NO_ID),
    (16, 4, NO_ID),
    (32, 4, NO_ID),
)
ACCESS, DEFAULT = b"system.posix_acl_access", b"system.posix_acl_default"


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        (ACCESS, PLAIN_644, None),
        (ACCESS, NAMED_644, None),
        (ACCESS, NAMED_MANY, None),
        (ACCESS, b"", "malformed: 0 bytes"),
        (ACCESS, b"\3" + PLAIN_644[1:], "malformed: its version is 3"),
        (ACCESS, PLAIN_644[:-8], "malformed: 0 entries with the tag 0x20"),
        (ACCESS, bytes(5000), "malformed: 5000 bytes are too many"),
        (ACCESS, acl_value((1, 7, NO_ID), (4, 4, NO_ID), (32, 4, NO_ID)), "are 644, but those of"),
        (DEFAULT, PLAIN_644, "a regular file has the ACL system.posix_acl_default"),
    ],
)
def test_broken_acls_are_found(name: bytes, value: bytes, text: str | None) -> None:
    """Promise: an ACL that is invalid or contradicts the mode is an error of that file."""
    ino = 9  # /empty, of mode 644
    report = checked(acl_item(ino, name, value))
    if text is None:
        assert report.clean, report.findings
    else:
        found = the_error(report, text)
        assert (found.invariant, found.ino, found.path) == ("I7", ino, "/empty")


def test_key_of_an_impossible_length_is_told() -> None:
    """Promise: a key that is not of 17 bytes is an error."""

    def change(builder: ImageBuilder, volume: VolumeItems) -> None:
        volume.items[b"short"] = b"x"

    assert "a key of 5 bytes, expected 17" in the_error(checked(change), "a key of").what


def test_damaged_item_is_found_with_its_inode() -> None:
    """Promise: an item that its codec refuses is an error of its inode."""

    def change(builder: ImageBuilder, volume: VolumeItems) -> None:
        volume.items[key(2, 1, 0)] = b"not an inode"

    report = checked(change)
    assert any("inode 2: wrong length" in finding.what for finding in report.errors)


def test_tree_without_a_root_directory_is_found() -> None:
    """Promise: a volume without a root directory is found."""
    builder = ImageBuilder()
    builder.add_root(VolumeItems())
    assert the_error(check_image(builder.finish()), "no root directory").root == "volume main"


def test_root_that_is_no_directory_is_found() -> None:
    """Promise: a volume whose inode 1 is not a directory is found."""
    builder = ImageBuilder()
    volume = VolumeItems()
    volume.inode(1, stat.S_IFREG | 0o644, 0)
    volume.items[key(0, TYPE_ORPHAN, 1)] = b""
    builder.add_root(volume)
    assert the_error(check_image(builder.finish()), "inode 1 is not a directory").path == "/"


@pytest.mark.parametrize(
    ("member", "value", "text"),
    [
        ("node_count", 3, "the root record counts 3 nodes, expected 1"),
        ("data_blocks", 3, "the root record counts 3 data blocks, expected 6"),
        ("inode_count", 3, "the root record counts 3 inodes, expected 9"),
        ("next_ino", 9, "next inode number is 9, but 9 exists"),
    ],
)
def test_wrong_counter_of_a_root_record_is_found(member: str, value: int, text: str) -> None:
    """Promise: a counter of a root record that differs from its tree is found."""
    builder, volume = sample_image()
    builder.add_root(volume)
    builder.roots[0] = replace(builder.roots[0], **{member: value})
    found = the_error(check_image(builder.finish()), text)
    assert (found.invariant, found.root) == ("I7", "volume main")


def test_fault_in_one_snapshot_is_told_of_that_snapshot() -> None:
    """Promise: a fault in a node of a snapshot only is reported with snapshot and path."""
    builder, volume = sample_image()
    builder.add_root(volume)
    other = sample_volume(builder)
    other.inodes[9].nlink = 2
    builder.add_root(other, "monday", RootKind.SNAPSHOT)
    found = the_error(check_image(builder.finish()), "nlink is 2, but 1 names")
    assert (found.root, found.path) == ("snapshot monday", "/empty")


def test_detached_directories_of_a_deep_chain() -> None:
    """Promise: a chain of any depth is attached; a loop and all below it are detached."""
    chain = [[number, number + 1] for number in range(1, 5000)]
    assert detached_directories(np.array(chain, np.uint64)) == []
    loop = [[6001, 6000], [6000, 6001], [6001, 6002]]
    assert detached_directories(np.array(chain + loop, np.uint64)) == [6000, 6001, 6002]


def test_findings_are_bounded() -> None:
    """Promise: a report lists at most 1000 findings and counts the others."""

    def change(builder: ImageBuilder, volume: VolumeItems) -> None:
        for number in range(1500):
            volume.items[key(100 + number, TYPE_INLINE, 0)] = b"x"

    report = checked(change, per_node=100)
    assert len(report.findings) == 1000
    assert report.findings_left_off > 400
    assert not report.clean


def test_child_pointer_survives_its_node() -> None:
    """Promise: the decoder reads the nodes that the builder writes; the other tests rely on it."""
    builder, volume = sample_image()
    record = builder.add_root(volume, per_node=3)
    image = decode_node(
        node_bytes(builder.device, record.pointer.block),
        record.pointer,
        builder.image_id,
        SEED,
        None,
    )
    assert image.level >= 1
    assert decode_pointer(image.values[0]) in builder.node_pointers
    with pytest.raises(CorruptError):
        decode_node(bytes(16384), record.pointer, builder.image_id, SEED, None)
