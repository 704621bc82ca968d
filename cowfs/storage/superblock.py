"""The superblock ring: where an image begins, and the commit point of every commit.

RING_SLOTS slots of one block each, in two copies at the two ends of the image. Generation G goes to
slot G mod RING_SLOTS of both; the newest valid slot of either wins at mount.
"""

from cowfs.errors import CorruptError, DeviceError, ImageError
from cowfs.storage.device import Device
from cowfs.storage.format import (
    BLOCK_SIZE_BYTES,
    MIN_TOTAL_BLOCKS,
    RING_SLOTS,
    SUPERBLOCK_MAGIC,
    Superblock,
    decode_superblock,
    require_generations,
    ring_blocks,
)

_RING_BYTES = RING_SLOTS * BLOCK_SIZE_BYTES


def read_ring(device: Device, first_block: int) -> list[Superblock]:
    """The valid superblocks of one copy of the ring.

    Raises:
        ImageError: a whole superblock of a newer format: nothing else here can be trusted.
    """
    try:
        data = device.read(first_block * BLOCK_SIZE_BYTES, _RING_BYTES)
    except DeviceError:
        return []
    found = []
    for slot in range(RING_SLOTS):
        start = slot * BLOCK_SIZE_BYTES
        if not data.startswith(SUPERBLOCK_MAGIC, start):
            continue  # empty, as most slots of a young image
        try:
            superblock = decode_superblock(data[start : start + BLOCK_SIZE_BYTES])
        except CorruptError:
            continue  # a torn slot: another one is newest
        if superblock.slot() == slot:
            found.append(superblock)
    return found


def read_newest(device: Device, generation: int | None = None) -> Superblock:
    """The newest superblock of the image, or that of `generation`.

    Raises:
        ImageError: not an image, newer, truncated, or no such generation in the ring.
    """
    total = device.size_bytes // BLOCK_SIZE_BYTES
    if total < MIN_TOTAL_BLOCKS:
        raise ImageError(
            f"{device.name} is not a cowfs image: it has only {device.size_bytes} bytes"
        )
    found = read_ring(device, ring_blocks(total)[0])
    if found:
        expected = max(found, key=lambda superblock: superblock.generation)
        if expected.total_blocks <= total:
            found += read_ring(device, ring_blocks(expected.total_blocks)[1])
    else:
        found = read_ring(device, ring_blocks(total)[1])
    if not found:
        copies = [
            device.read(first * BLOCK_SIZE_BYTES, _RING_BYTES) for first in ring_blocks(total)
        ]
        ring = b"".join(copies)
        magics = {ring[at : at + 8] for at in range(0, len(ring), BLOCK_SIZE_BYTES)}
        if SUPERBLOCK_MAGIC not in magics:
            raise ImageError(
                f"{device.name} is not a cowfs image (no superblock found); if it was one, "
                "cowfs salvage copies out what is left, else cowfs mkfs makes one"
            )
        raise ImageError(
            f"{device.name} has no superblock that is whole: both rings are damaged; "
            "cowfs salvage copies out what is left"
        )
    if generation is not None:
        found = [superblock for superblock in found if superblock.generation == generation]
        if not found:
            raise ImageError(f"{device.name} does not hold generation {generation} any more")
    newest = max(found, key=lambda superblock: superblock.generation)
    if newest.total_blocks > total:
        raise ImageError(
            f"{device.name} is truncated: {device.size_bytes} bytes are left of "
            f"{newest.total_blocks * BLOCK_SIZE_BYTES}; restore its size from a copy"
        )
    return newest


def read_earlier(device: Device, newest: Superblock, generation: int) -> Superblock | None:
    """The superblock of an earlier generation of the same image, read from its slot alone.

    Returns:
        None if neither copy of the slot holds it, whole.
    """
    slot = generation % RING_SLOTS
    for first in ring_blocks(newest.total_blocks):
        try:
            found = decode_superblock(
                device.read((first + slot) * BLOCK_SIZE_BYTES, BLOCK_SIZE_BYTES)
            )
        except (CorruptError, DeviceError):
            continue
        if found.generation == generation and found.uuid == newest.uuid:
            return found
    return None


def next_generation(device: Device, newest: Superblock) -> int:
    """The number of the commit after `newest`: the next one whose slot is not torn.

    A torn slot holds most of a superblock that never counted, and its nodes are about to be
    overwritten. Written again and torn again, the two could make one that is whole and points at them.
    So it is left alone until the ring comes round to it and that superblock is an old one.

    Raises:
        ImageError: there is no next number.
    """
    require_generations(newest)
    for generation in range(newest.generation + 1, newest.generation + RING_SLOTS // 2):
        slot = generation % RING_SLOTS
        if not any(_is_torn(device, first + slot) for first in ring_blocks(newest.total_blocks)):
            return generation
    return newest.generation + 1  # damage all over the ring, not a few crashes


def _is_torn(device: Device, block: int) -> bool:
    try:
        data = device.read(block * BLOCK_SIZE_BYTES, BLOCK_SIZE_BYTES)
        if data != bytes(BLOCK_SIZE_BYTES):
            decode_superblock(data)
    except (CorruptError, DeviceError):
        return True
    return False


def write_slot(device: Device, superblock: Superblock) -> None:
    """Write the slot of this generation in both copies. The caller flushes before and after."""
    image = superblock.encode()
    for first in ring_blocks(superblock.total_blocks):
        device.write((first + superblock.slot()) * BLOCK_SIZE_BYTES, [image])
