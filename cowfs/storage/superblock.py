"""The superblock ring: where an image begins, and the commit point of every commit.

The ring has RING_SLOTS slots of one block each, in two copies, at both ends of the image.
Generation G goes to slot G mod RING_SLOTS of both copies. The newest valid slot of either copy wins
at mount.
"""

import os
import time

from cowfs.errors import CorruptError, DeviceError, ImageError
from cowfs.storage.device import Device
from cowfs.storage.format import (
    BLOCK_SIZE_BYTES,
    INCOMPAT_DUPLICATED_METADATA,
    INCOMPAT_LOG,
    MIN_TOTAL_BLOCKS,
    RING_SLOTS,
    SUPERBLOCK_MAGIC,
    LogPlace,
    Superblock,
    decode_superblock,
    require_generations,
    ring_blocks,
)

_RING_BYTES = RING_SLOTS * BLOCK_SIZE_BYTES


def read_ring(device: Device, first_block: int) -> list[Superblock]:
    """The valid superblocks of one copy of the ring; none where it cannot be read.

    Raises:
        ImageError: a valid superblock has a format that this program does not know.
    """
    try:
        data = device.read(first_block * BLOCK_SIZE_BYTES, _RING_BYTES)
    except DeviceError:
        return []
    found = []
    for slot in range(RING_SLOTS):
        start = slot * BLOCK_SIZE_BYTES
        if not data.startswith(SUPERBLOCK_MAGIC, start):
            continue  # most slots of a new image are empty
        try:
            superblock = decode_superblock(data[start : start + BLOCK_SIZE_BYTES])
        except CorruptError:
            continue  # a torn slot: its commit never counted
        if superblock.slot() == slot:
            found.append(superblock)
    return found


def read_newest(device: Device, generation: int | None = None) -> Superblock:
    """The newest superblock of the image, or that of `generation`.

    Raises:
        ImageError: not an image, a newer format, truncated, or no such generation in the ring.
        DeviceError: no ring was found, and the device cannot be read.
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
            f"{device.name} has no valid superblock: both rings are damaged; "
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
    """The superblock of an earlier generation of the same image. Reads only its slot.

    Returns:
        None if neither copy of the slot has it.
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

    A torn slot holds most of a superblock whose commit never counted; the blocks that it points at
    are free. If that slot were written and torn once more, the two halves could make a valid
    superblock that points at overwritten blocks. So a torn slot is skipped until the next round of
    the ring, when that superblock would be an old one.

    Raises:
        ImageError: no generation number is left.
    """
    require_generations(newest)
    for generation in range(newest.generation + 1, newest.generation + RING_SLOTS // 2):
        slot = generation % RING_SLOTS
        if not any(_is_torn(device, first + slot) for first in ring_blocks(newest.total_blocks)):
            return generation
    return newest.generation + 1  # half the ring is torn: damage, not crashes


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


def blank_superblock(
    total_blocks: int,
    *,
    label: str = "",
    duplicate_metadata: bool = True,
    log: LogPlace | None = None,
) -> Superblock:
    """A superblock of generation 0 for a new image. It is never written."""
    now_ns = time.time_ns()
    uuid = os.urandom(16)
    return Superblock(
        uuid=uuid,
        # Every node carries the seed as its image id, so it is known when both rings are lost
        # (care/scan.py).
        seed=int.from_bytes(uuid[:8], "little"),
        name_seed=int.from_bytes(os.urandom(8), "little"),
        generation=0,
        total_blocks=total_blocks,
        committed_ns=now_ns,
        created_ns=now_ns,
        label=label,
        incompat=(INCOMPAT_DUPLICATED_METADATA if duplicate_metadata else 0)
        | (0 if log is None else INCOMPAT_LOG),
        log=log,
    )
