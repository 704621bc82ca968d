"""Scans all blocks of a device for the nodes of an image, when its roots are gone.

A node has a magic number, the id of the image, its own block, level, birth, owner and checksum. The
image id that most nodes have is that of the image. Checksums need the seed: it is in every slot of
the ring, also in torn ones, and in an image that cowfs made it equals the image id. The seed that
verifies most nodes is taken.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from xxhash import xxh3_128_digest

from cowfs.errors import CorruptError, DeviceError, ImageError
from cowfs.storage.device import Device
from cowfs.storage.format import (
    BLOCK_SIZE_BYTES,
    NODE_BLOCKS,
    NODE_CAPACITY_BYTES,
    NODE_HEADER,
    NODE_LEVEL_MAX,
    NODE_MAGIC,
    NODE_SIZE_BYTES,
    RING_SLOTS,
    SUPERBLOCK,
    SUPERBLOCK_MAGIC,
    Pointer,
    Superblock,
    decode_node,
)

CHUNK_BLOCKS = 1024  # read at once
_MAGIC_WORD = 4  # the magic is the fifth 32-bit word of a node
_VOTERS_MAX = 200  # nodes whose checksums decide on the seed


@dataclass(slots=True)
class FoundNode:
    """A node whose checksum is right.

    Attributes:
        pointer: made from the node's header. Its block is the one the header gives; its twin is
            another place with an equal copy, 0 if none was found.
        owner: the root id of the tree that the node was written for; 0: the catalog.
    """

    pointer: Pointer
    level: int
    owner: int


@dataclass(frozen=True, slots=True)
class Scan:
    """The result of a scan.

    Attributes:
        identity: the superblock given to the scan, or one whose image id, seed and size are right
            and whose other fields mean nothing.
        nodes: all nodes with a right checksum, also old ones.
    """

    identity: Superblock
    nodes: list[FoundNode]


def scan_image(
    device: Device,
    known: Superblock | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scan:
    """Read the whole device, and collect the nodes of one image.

    Args:
        known: any superblock of the image, if there is one.
        progress: called with the number of blocks read, and the number of all blocks.

    Raises:
        ImageError: `known` is None, and no node can be verified.
    """
    places: list[tuple[int, int]] = []
    total = device.size_bytes // BLOCK_SIZE_BYTES
    for first, data in _chunks(device, total):
        words = np.frombuffer(data, "<u4").reshape(-1, BLOCK_SIZE_BYTES // 4)
        for at in np.flatnonzero(words[:, _MAGIC_WORD] == NODE_MAGIC).tolist():
            header = NODE_HEADER.unpack_from(data, at * BLOCK_SIZE_BYTES)
            level, used, image_id = header[2], header[6], header[10]
            if level <= NODE_LEVEL_MAX and used <= NODE_CAPACITY_BYTES:
                places.append((first + at, image_id))
        if progress is not None:
            progress(min(first + CHUNK_BLOCKS, total), total)
    if known is None:
        known = _identify(device, places, total)
    found: dict[tuple[int, int, bytes], FoundNode] = {}
    for place, image_id in places:
        if image_id == known.image_id:
            _add(device, place, known, found)
    return Scan(known, list(found.values()))


def _chunks(device: Device, total: int) -> Iterator[tuple[int, bytes]]:
    """The readable blocks of the device, as (first block, data)."""
    for first in range(0, total, CHUNK_BLOCKS):
        count = min(CHUNK_BLOCKS, total - first)
        try:
            yield first, device.read(first * BLOCK_SIZE_BYTES, count * BLOCK_SIZE_BYTES)
        except DeviceError:
            for block in range(first, first + count):
                try:
                    yield block, device.read(block * BLOCK_SIZE_BYTES, BLOCK_SIZE_BYTES)
                except DeviceError:
                    continue  # an unreadable sector is left out


def _identify(device: Device, places: list[tuple[int, int]], total: int) -> Superblock:
    """A superblock with the image id that most nodes have, and the seed that verifies most."""
    if not places:
        raise ImageError(
            f"{device.name} holds no node of a cowfs image; there is nothing to salvage"
        )
    image_id = Counter(found for _, found in places).most_common(1)[0][0]
    voters = [place for place, found in places if found == image_id][:_VOTERS_MAX]
    seeds = dict.fromkeys([image_id, *_seeds_in_rings(device, total)])
    votes = {seed: sum(_verifies(device, place, seed) for place in voters) for seed in seeds}
    seed = max(votes, key=votes.__getitem__)
    if not votes[seed]:
        raise ImageError(
            f"{device.name}: no node can be verified, because the rings of superblocks are lost "
            "and with them the seed of the checksums; nothing can be salvaged"
        )
    return Superblock(
        uuid=image_id.to_bytes(8, "little") + bytes(8),
        seed=seed,
        name_seed=0,
        generation=1,
        total_blocks=total,
    )


def _seeds_in_rings(device: Device, total: int) -> Iterator[int]:
    """The seeds in all slots of both rings that begin with the magic number, also in torn ones."""
    for block in (*range(min(RING_SLOTS, total)), *range(max(0, total - RING_SLOTS), total)):
        try:
            data = device.read(block * BLOCK_SIZE_BYTES, BLOCK_SIZE_BYTES)
        except DeviceError:
            continue
        if data[:8] == SUPERBLOCK_MAGIC:
            yield SUPERBLOCK.unpack_from(data)[8]


def _read(device: Device, place: int) -> bytes:
    try:
        return device.read(place * BLOCK_SIZE_BYTES, NODE_SIZE_BYTES)
    except DeviceError:
        return b""


def _verifies(device: Device, place: int, seed: int) -> bool:
    data = _read(device, place)
    return len(data) == NODE_SIZE_BYTES and xxh3_128_digest(data[16:], seed) == data[:16]


def _add(
    device: Device,
    place: int,
    known: Superblock,
    found: dict[tuple[int, int, bytes], FoundNode],
) -> None:
    """Add the node at block `place` to `found`, if it can be verified."""
    data = _read(device, place)
    if len(data) != NODE_SIZE_BYTES:
        return
    header = NODE_HEADER.unpack_from(data)
    checksum, birth, block = header[0], header[7], header[8]
    identity = (block, birth, checksum)
    before = found.get(identity)
    if before is not None:
        if place != block and not before.pointer.twin:
            before.pointer = before.pointer._replace(twin=place)
        return
    pointer = Pointer(block, 0 if place == block else place, birth, checksum)
    try:
        image = decode_node(data, pointer, known.image_id, known.seed, None)
    except CorruptError:
        return
    if block + NODE_BLOCKS <= device.size_bytes // BLOCK_SIZE_BYTES and birth:
        found[identity] = FoundNode(pointer, image.level, image.owner)
