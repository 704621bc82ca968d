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
        try:
            superblock = decode_superblock(
                data[slot * BLOCK_SIZE_BYTES : (slot + 1) * BLOCK_SIZE_BYTES]
            )
        except CorruptError:
            continue  # an empty or torn slot: another one is newest
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
                f"{device.name} is not a cowfs image (no superblock found); cowfs mkfs makes one"
            )
        raise ImageError(f"{device.name} has no superblock that is whole: both rings are damaged")
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


def write_slot(device: Device, superblock: Superblock) -> None:
    """Write the slot of this generation in both copies. The caller flushes before and after."""
    image = superblock.encode()
    for first in ring_blocks(superblock.total_blocks):
        device.write((first + superblock.slot()) * BLOCK_SIZE_BYTES, [image])
