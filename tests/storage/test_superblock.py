"""Promises about the superblock ring: which slot wins, and what each kind of damage leads to."""

import pytest
from msgspec.structs import replace
from xxhash import xxh3_128_digest

from cowfs.care.check import check_image
from cowfs.errors import CowfsError, ImageError
from cowfs.history.images import make_filesystem, open_filesystem
from cowfs.storage.format import BLOCK_SIZE_BYTES, RING_SLOTS, decode_superblock
from cowfs.storage.superblock import read_newest, write_slot
from tests.model.devices import MemoryDevice

TOTAL_BLOCKS = 4096
SECOND = TOTAL_BLOCKS - RING_SLOTS


def image(commits: int = 5, total_blocks: int = TOTAL_BLOCKS) -> MemoryDevice:
    disk = MemoryDevice(total_blocks)
    make_filesystem(disk, label="ring")
    filesystem = open_filesystem(disk, writable=True)
    for number in range(commits):
        filesystem.live.create(1, b"%d" % number, 0o100644, 0, 0)
        filesystem.commit()
    return disk


def sealed(body: bytes) -> bytes:
    return body[:8] + xxh3_128_digest(body[24:]) + body[24:]


def test_ring_after_more_commits_than_slots_shows_the_newest() -> None:
    """Promise C1: the newest valid slot wins, also after the ring wrapped around."""
    disk = image(RING_SLOTS * 2 + 3)
    newest = read_newest(disk)
    assert newest.generation == RING_SLOTS * 2 + 4
    filesystem = open_filesystem(disk, writable=False)
    assert len(list(filesystem.live.listing(1))) == RING_SLOTS * 2 + 3


@pytest.mark.parametrize("copy", [0, SECOND], ids=["first", "second"])
@pytest.mark.parametrize("at", [0, 8, 24, 100, 319, 4095])
def test_slot_damaged_in_one_copy_is_read_from_the_other(copy: int, at: int) -> None:
    """Promise: one valid copy of the newest slot is enough."""
    disk = image()
    newest = read_newest(disk)
    disk.damage(copy + newest.slot(), at)
    assert read_newest(disk) == newest


def test_slot_torn_in_both_copies_leads_to_the_generation_before() -> None:
    """Promise C1: a commit whose slot is torn in both copies never happened."""
    disk = image()
    newest = read_newest(disk)
    for copy in (0, SECOND):
        whole = disk.block(copy + newest.slot())
        disk.put(copy + newest.slot(), whole[:256] + bytes(BLOCK_SIZE_BYTES - 256))
    assert read_newest(disk).generation == newest.generation - 1
    filesystem = open_filesystem(disk, writable=False)
    assert len(list(filesystem.live.listing(1))) == 4


def test_slot_only_in_the_second_copy_wins() -> None:
    """Promise: a commit counts even if the first copy of its slot was lost."""
    disk = image()
    newest = read_newest(disk)
    disk.put(newest.slot(), bytes(BLOCK_SIZE_BYTES))
    assert read_newest(disk).generation == newest.generation


def test_first_ring_lost_altogether_is_no_loss() -> None:
    """Promise: the second ring is enough when the first is lost altogether."""
    disk = image()
    newest = read_newest(disk)
    for slot in range(RING_SLOTS):
        disk.put(slot, b"\xff" * BLOCK_SIZE_BYTES)
    assert read_newest(disk) == newest


def test_slot_at_a_wrong_place_is_not_believed() -> None:
    """Promise: a superblock written to a wrong slot is ignored, and no older state returns."""
    disk = image()
    newest = read_newest(disk)
    for copy in (0, SECOND):
        disk.put(copy + newest.slot(), disk.block(newest.slot() - 2))
    assert read_newest(disk).generation == newest.generation - 1


def test_device_without_superblock_is_not_an_image() -> None:
    """Promise: the message says what is wrong and what to do."""
    with pytest.raises(ImageError, match=r"not a cowfs image.*mkfs"):
        read_newest(MemoryDevice(TOTAL_BLOCKS))
    with pytest.raises(ImageError, match="not a cowfs image: it has only"):
        read_newest(MemoryDevice(100))
    disk = MemoryDevice(TOTAL_BLOCKS)
    disk.put(0, b"\x7fELF".ljust(BLOCK_SIZE_BYTES, b"x"))
    with pytest.raises(ImageError, match="not a cowfs image"):
        read_newest(disk)


def test_image_whose_rings_are_both_damaged_is_refused_as_damaged() -> None:
    """Promise: an image with both rings damaged is called damaged, not foreign."""
    disk = image()
    for copy in (0, SECOND):
        for slot in range(RING_SLOTS):
            disk.damage(copy + slot, 50)
    with pytest.raises(ImageError, match="both rings are damaged"):
        read_newest(disk)


def test_truncated_image_is_refused() -> None:
    """Promise: a shortened image is not mounted as if it were whole."""
    disk = image(total_blocks=5000)
    short = MemoryDevice(4999, {number: disk.block(number) for number in range(4999)})
    with pytest.raises(ImageError, match="is truncated"):
        read_newest(short)


def test_grown_image_is_read_as_before() -> None:
    """Promise: if the image file grew, the added space is ignored until a resize."""
    disk = image()
    blocks = {number: disk.block(number) for number in range(TOTAL_BLOCKS)}
    assert read_newest(MemoryDevice(TOTAL_BLOCKS + 77, blocks)) == read_newest(disk)


@pytest.mark.parametrize(
    ("offset", "value", "complaint"),
    [(24, 2, "newer than"), (24, 1 << 30, "newer than"), (48, 1 << 7, "does not know")],
)
def test_newer_format_is_refused_and_never_guessed(offset: int, value: int, complaint: str) -> None:
    """Promise: an image of a newer format is refused, whatever older slots it still has."""
    disk = image()
    newest = read_newest(disk)
    body = bytearray(disk.block(newest.slot()))
    size = 4 if offset == 24 else 8
    body[offset : offset + size] = value.to_bytes(size, "little")
    for copy in (0, SECOND):
        disk.put(copy + newest.slot(), sealed(bytes(body)))
    with pytest.raises(ImageError, match=complaint):
        read_newest(disk)


def test_read_only_compatible_features_are_mounted_read_only() -> None:
    """Promise: an unknown feature that concerns only writers still lets readers mount."""
    disk = image()
    newest = read_newest(disk)
    write_slot(disk, replace(newest, ro_compat=1 << 5))
    assert open_filesystem(disk, writable=False).live.lookup(1, b"0")
    with pytest.raises(ImageError, match="can only read"):
        open_filesystem(disk, writable=True)


def test_generation_that_left_the_ring_is_refused_by_name() -> None:
    """Promise: when a generation is asked for, no other one is opened in its place."""
    disk = image(RING_SLOTS + 5)
    assert read_newest(disk, RING_SLOTS).generation == RING_SLOTS
    with pytest.raises(ImageError, match="does not hold generation 2"):
        read_newest(disk, 2)


def test_every_byte_of_a_superblock_is_covered_by_its_checksum() -> None:
    """Promise: the checksum covers every byte, so each flipped bit of a slot is noticed."""
    disk = image(1)
    whole = disk.block(read_newest(disk).slot())
    for at in [*range(330), *range(330, BLOCK_SIZE_BYTES, 97), BLOCK_SIZE_BYTES - 1]:
        flipped = bytearray(whole)
        flipped[at] ^= 0x10
        with pytest.raises(CowfsError):
            decode_superblock(bytes(flipped))


def test_torn_slot_is_not_written_again_before_its_superblock_is_old() -> None:
    """Promise C1: a torn slot is not rewritten while a second tear could make it valid."""
    disk = image()
    newest = read_newest(disk)
    at = (newest.generation + 1) % RING_SLOTS
    lost = replace(newest, generation=newest.generation + 1).encode()
    torn = lost[:-512] + b"\xff" * 512
    disk.put(SECOND + at, torn)
    filesystem = open_filesystem(disk, writable=True)
    filesystem.live.create(1, b"after", 0o100644, 0, 0)
    filesystem.commit()
    assert disk.block(SECOND + at) == torn
    after = read_newest(disk)
    assert after.generation == newest.generation + 2
    assert after.oldest_retained == after.generation, "what is promised has no gap"
    disk.put(SECOND + at, torn[:-512] + bytes(512))  # what a second torn write could leave of it
    assert read_newest(disk) == after
    for number in range(RING_SLOTS):
        filesystem.live.create(1, b"%d more" % number, 0o100644, 0, 0)
        filesystem.commit()
    assert disk.block(SECOND + at) != torn
    assert check_image(disk).clean
