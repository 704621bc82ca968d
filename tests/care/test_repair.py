"""Promises of the repair: it mends what is broken, touches nothing else, and survives a crash."""

import random
from collections.abc import Callable

import numpy as np
import pytest

from cowfs.care.check import check_image
from cowfs.care.repair import RepairRefusedError, repair_image
from cowfs.errors import DeviceError, NoSpaceError
from cowfs.history.edits import DeleteSnapshots
from cowfs.history.images import open_filesystem
from cowfs.history.records import RootKind
from cowfs.storage.format import BLOCK_SIZE_BYTES, RING_SLOTS, Pointer
from cowfs.storage.superblock import read_newest
from tests.care.image_builder import ImageBuilder, MemoryDevice, sample_volume
from tests.model import devices
from tests.model.recount import recount

Break = Callable[[ImageBuilder], object]


def broken(
    change: Break | None = None, *, after: Break | None = None, **finish: object
) -> MemoryDevice:
    """An image with a snapshot; `change` runs before its counts are written, `after` afterwards."""
    builder = ImageBuilder()
    record = builder.add_root(sample_volume(builder), per_node=4)
    builder.add_root(
        sample_volume(builder),
        "monday",
        RootKind.SNAPSHOT,
        tree=(record.pointer, record.node_count),
    )
    if change is not None:
        change(builder)
    device = builder.finish(per_node=3, **finish)
    if after is not None:
        after(builder)
    return device


def pages(builder: ImageBuilder) -> list[int]:
    return [block for first in builder.page_places for block in (first, first + 1)]


def wipe_map(builder: ImageBuilder) -> None:
    for block in pages(builder):
        builder.write(block, b"x" * BLOCK_SIZE_BYTES)


def leak(builder: ImageBuilder) -> None:
    builder.references.update(range(3000, 3010))


def too_low(builder: ImageBuilder) -> None:
    for block in list(builder.references)[::3]:
        builder.references[block] = 0


def too_high(builder: ImageBuilder) -> None:
    for block in list(builder.references)[::5]:
        builder.references[block] += 7


def wrong_root_counters(builder: ImageBuilder) -> None:
    from msgspec.structs import replace

    builder.roots[0] = replace(
        builder.roots[0], node_count=1, data_blocks=99, inode_count=5, next_ino=2
    )


def bad_copies(builder: ImageBuilder) -> None:
    for number, pointer in enumerate(builder.node_pointers):
        builder.device.damage(pointer.twin if number % 2 else pointer.block)


def bad_pages(builder: ImageBuilder) -> None:
    for first in builder.page_places:
        builder.device.damage(first)


@pytest.mark.parametrize(
    "make",
    [
        lambda: broken(leak),
        lambda: broken(too_low),
        lambda: broken(too_high),
        lambda: broken(wrong_root_counters),
        lambda: broken(after=wipe_map),
        lambda: broken(after=bad_copies),
        lambda: broken(after=bad_pages),
        lambda: broken(used_blocks=7, system_blocks=3, catalog_nodes=2),
        lambda: broken(next_root_id=1),
        lambda: broken(wrong_root_counters, after=wipe_map, used_blocks=0),
    ],
    ids=[
        "leak", "too low", "too high", "root counters", "map lost", "bad copies", "bad pages",
        "superblock counters", "next root id", "map lost and counters",
    ],
)  # fmt: skip
def test_repair_makes_it_clean_and_writes_to_free_blocks_only(
    make: Callable[[], MemoryDevice],
) -> None:
    """Promise: a dry run changes nothing; after a repair this check and the next are clean."""
    device = make()
    before = dict(device.blocks)
    assert not check_image(device).clean
    bad = _bad_copies(device)
    plan = repair_image(device, dry_run=True)
    assert plan.changes
    assert plan.generation is None
    assert device.blocks == before
    in_use = recounted(device)
    done = repair_image(device)
    assert done.changes == plan.changes
    assert done.generation == 71
    changed = {block for block in device.blocks if device.blocks[block] != before.get(block)}
    ring = {block for block in changed if block < RING_SLOTS or block >= 4096 - RING_SLOTS}
    assert ring == {71 - 64, 4096 - RING_SLOTS + 71 - 64}
    assert not (changed - ring - bad) & in_use
    report = check_image(device)
    assert report.findings == ()
    assert repair_image(device).changes == ()
    recount(device).require_exact()
    filesystem = open_filesystem(device, writable=True)
    filesystem.live.create(1, b"afterwards", 0o100644, 0, 0)
    filesystem.apply(DeleteSnapshots(("monday",)))
    filesystem.work_drops()
    filesystem.close()
    assert check_image(device).clean


def _bad_copies(device: MemoryDevice) -> set[int]:
    return {
        block + more
        for finding in check_image(device).errors
        if finding.root != "space map" and finding.block and "intact" in finding.what
        for block in [finding.block]
        for more in range(4)
    }


def recounted(device: MemoryDevice) -> set[int]:
    """All blocks that the trees of the newest generation reach, without the space map."""
    from cowfs.care.check import inspect_image

    found = inspect_image(device)
    return {
        group * 1024 + at
        for group in found.references.groups()
        for at in np.flatnonzero(found.references.counts(group)).tolist()
    }


def test_sound_image_is_left_alone() -> None:
    """Promise: repairing a sound image writes nothing."""
    device = broken()
    before = dict(device.blocks)
    report = repair_image(device)
    assert (report.changes, report.remaining, report.generation) == ((), (), None)
    assert device.blocks == before


def test_lost_node_is_refused_and_with_consent_its_blocks_stay_allocated() -> None:
    """Promise: losses need consent, and salvage can still find the blocks of what was lost."""

    def lose(builder: ImageBuilder) -> None:
        for pointer in builder.node_pointers[1:6]:  # the nodes with extents are among them
            builder.device.damage(pointer.block)
            builder.device.damage(pointer.twin)

    device = broken(too_low, after=lose)
    with pytest.raises(RepairRefusedError, match="accept-loss"):
        repair_image(device)
    device = broken(too_low, after=lose)
    before, content = recount_map(device), dict(device.blocks)
    report = repair_image(device, accept_loss=True)
    changed = {block for block in device.blocks if device.blocks[block] != content.get(block)}
    assert not [block for block in changed if before.get(block)]
    assert report.generation == 71
    assert any("neither copy" in finding.what for finding in report.remaining)
    after = recount_map(device)
    assert not [block for block, count in before.items() if count and not after[block]]
    assert not [finding for finding in check_image(device).errors if finding.repairable]


def recount_map(device: MemoryDevice) -> dict[int, int]:
    from tests.model.recount import Recount, _walk_map

    counted = Recount(read_newest(device))
    _walk_map(device, counted)
    return counted.recorded


def test_trees_that_contradict_each_other_are_refused() -> None:
    """Promise: an image where a node lies on data is refused, without a guess which is right."""

    def overlap(builder: ImageBuilder) -> None:
        pointer = builder.node_pointers[0]
        moved = Pointer(pointer.block + 1, pointer.twin, pointer.birth, pointer.checksum)
        builder.add_root(sample_volume(builder), "tuesday", RootKind.SNAPSHOT, tree=(moved, 1))
        too_low(builder)

    with pytest.raises(RepairRefusedError, match="contradict"):
        repair_image(broken(overlap))


def filled(data_blocks: int) -> tuple[MemoryDevice, int]:
    """An image with that much data and a wrong counter; also how many of its blocks are free."""
    builder = ImageBuilder()
    volume = sample_volume(builder)
    volume.inodes[3].size_bytes = (100 + data_blocks) * BLOCK_SIZE_BYTES
    for at in range(0, data_blocks, 256):
        count = min(256, data_blocks - at)
        volume.extent(3, 100 + at, builder.data(b"z" * BLOCK_SIZE_BYTES * count))
    builder.add_root(volume, per_node=4)
    device = builder.finish(used_blocks=1)
    return device, 4096 - RING_SLOTS - builder.next_block


def test_image_without_room_is_refused_unchanged() -> None:
    """Promise: without room for a second space map the repair fails and changes nothing."""
    _, free = filled(3000)
    left, number = 99, 3000 + free
    while not 0 <= left < 10:
        number -= 4
        device, left = filled(number)
    before = dict(device.blocks)
    with pytest.raises(NoSpaceError):
        repair_image(device)
    assert device.blocks == before


@pytest.mark.parametrize("seed", range(40))
def test_power_cut_in_a_repair_leaves_the_old_state_or_the_new_one(seed: int) -> None:
    """Promise: a repair that was interrupted at any moment can be repeated."""
    choice = random.Random(seed)
    sound = broken(after=[wipe_map, bad_copies, bad_pages][seed % 3])
    device = devices.MemoryDevice(4096, dict(sound.blocks))
    calls = choice.randrange(1, 40)

    class CutError(Exception):
        """The power is cut."""

    def cut(name: str) -> Callable[..., object]:
        original = getattr(device, name)

        def call(*arguments: object) -> object:
            nonlocal calls
            calls -= 1
            if calls <= 0:
                raise CutError
            return original(*arguments)

        return call

    device.write, device.flush = cut("write"), cut("flush")  # type: ignore[method-assign]
    try:
        repair_image(device)
    except CutError:
        pass
    left = device.crash(choice)
    repair_image(left)
    assert check_image(left).findings == ()


def test_failed_write_is_an_error_and_the_image_as_it_was() -> None:
    """Promise: when the host refuses a write, the old state stays."""
    device = broken(leak)

    def refuse(offset: int, buffers: object) -> None:
        raise DeviceError("cannot write memory: no space")

    device.write = refuse  # type: ignore[method-assign]
    with pytest.raises(DeviceError):
        repair_image(device)
    assert read_newest(device).generation == 70
