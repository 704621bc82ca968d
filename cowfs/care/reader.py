"""Reads both rings of an image, and both copies of every node and page, and verifies all of them.

This file depends on the formats and the device alone, so that a fault in the filesystem's own code
cannot hide itself here. It writes nothing and locks nothing. Damage is reported to a callback and
not raised; a read returns the copy that is intact.

The newest-slot rule: of all valid slots of both copies of the ring, the one with the highest
generation is the state of the image. A slot is valid if it decodes and its number is its generation
mod RING_SLOTS.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_128_digest

from cowfs.errors import CorruptError, DeviceError, ImageError
from cowfs.storage.device import Device
from cowfs.storage.format import (
    BLOCK_SIZE_BYTES,
    INDEX_HEADER_BYTES,
    NODE_HEADER_BYTES,
    NODE_SIZE_BYTES,
    RING_SLOTS,
    NodeImage,
    Pointer,
    Superblock,
    decode_node,
    decode_superblock,
    ring_blocks,
)
from cowfs.storage.index_pages import decode_index_page

Report = Callable[[str, str, int], None]
"""Called with the invariant that is broken, what is wrong in words, and the block."""


def ignore_damage(_invariant: str, _what: str, _block: int) -> None:
    """A `Report` for reads whose damage is reported elsewhere."""


EMPTY = "empty"
_EMPTY_SLOT = bytes(BLOCK_SIZE_BYTES)
INTACT = "; the other copy is intact"  # the end of a report on one of two copies

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Slot:
    """One slot of one copy of the ring.

    Attributes:
        copy: 0 for copy A, 1 for copy B.
        number: of the slot in the ring.
        superblock: None if the slot is not valid; then `problem` says why, else it is "".
    """

    copy: int
    number: int
    block: int
    superblock: Superblock | None
    problem: str


def read_ring(device: Device) -> list[Slot]:
    """Read every slot of both copies of the ring, copy A first.

    Copy B is expected at the end of the image as the newest slot of copy A gives it, else at the
    end of the device.

    Raises:
        ImageError: the device is too small for an image, or the format is unknown.
        DeviceError: neither copy can be read.
    """
    device_blocks = device.size_bytes // BLOCK_SIZE_BYTES
    if device_blocks < 2 * RING_SLOTS:
        raise ImageError(f"{device.name} is not a cowfs image: it is too small to hold one")
    try:
        first = _read_copy(device, 0, 0)
    except DeviceError:
        slots = _read_copy(device, 1, device_blocks - RING_SLOTS)
        return [
            Slot(0, number, number, None, "cannot be read") for number in range(RING_SLOTS)
        ] + slots
    newest = max(
        (slot.superblock for slot in first if slot.superblock), key=_generation, default=None
    )
    start = ring_blocks(newest.total_blocks if newest else device_blocks)[1]
    try:
        second = _read_copy(device, 1, start)
    except DeviceError:
        second = [
            Slot(1, number, start + number, None, "cannot be read") for number in range(RING_SLOTS)
        ]
    return first + second


def choose_superblock(
    device: Device, slots: Iterable[Slot], generation: int | None = None
) -> Superblock:
    """The newest valid superblock of the ring, or the one of `generation`.

    Raises:
        ImageError: there is no such superblock.
    """
    found = [slot.superblock for slot in slots if slot.superblock is not None]
    if not found:
        raise ImageError(f"{device.name} is not a cowfs image: it has no valid superblock")
    if generation is not None:
        found = [superblock for superblock in found if superblock.generation == generation]
        if not found:
            raise ImageError(
                f"{device.name} has no superblock of generation {generation}; "
                "cowdump IMAGE superblocks lists those that it has"
            )
    return max(found, key=_generation)


def _generation(superblock: Superblock) -> int:
    return superblock.generation


def _read_copy(device: Device, copy: int, start: int) -> list[Slot]:
    data = device.read(start * BLOCK_SIZE_BYTES, RING_SLOTS * BLOCK_SIZE_BYTES)
    slots = []
    for number in range(RING_SLOTS):
        block = start + number
        piece = data[number * BLOCK_SIZE_BYTES : (number + 1) * BLOCK_SIZE_BYTES]
        superblock = None
        problem = ""
        try:
            if piece == _EMPTY_SLOT:
                problem = EMPTY
            else:
                superblock = decode_superblock(piece)
        except CorruptError as error:
            problem = error.reason
        if superblock is not None:
            if superblock.slot() != number:
                problem = f"generation {superblock.generation} does not belong in this slot"
            elif copy and ring_blocks(superblock.total_blocks)[1] != start:
                problem = f"an image of {superblock.total_blocks} blocks does not end here"
        slots.append(Slot(copy, number, block, None if problem else superblock, problem))
    return slots


class MetadataReader:
    """Reads nodes and pages of one image, both copies if there are two.

    Args:
        device: the image.
        superblock: of any generation of the image, for the seed and the image id.

    Attributes:
        bad_nodes: by block of each damaged copy of a node, the block of the good copy.
    """

    def __init__(self, device: Device, superblock: Superblock) -> None:
        self.device = device
        self.bad_nodes: dict[int, int] = {}
        self._image_id = superblock.image_id
        self._seed = superblock.seed

    def node(self, pointer: Pointer, level: int | None, report: Report) -> NodeImage | None:
        """The node that `pointer` points at; None if no copy is good.

        Args:
            level: the level that the node must have; None: any.
            report: called for each bad copy.
        """

        def decode(data: bytes) -> NodeImage:
            image = decode_node(data, pointer, self._image_id, self._seed, level)
            end = NODE_HEADER_BYTES + image.used_bytes
            if data.count(0, end) != NODE_SIZE_BYTES - end:
                raise CorruptError("node", pointer.block, "bytes after the last entry are not zero")
            return image

        return self._copies("node", pointer, NODE_SIZE_BYTES, decode, report)

    def index_page(
        self, pointer: Pointer, level: int, number: int, report: Report
    ) -> npt.NDArray[np.void] | None:
        """The entries of an index page of the space map; None if no copy is good."""

        def decode(data: bytes) -> npt.NDArray[np.void]:
            entries = decode_index_page(data, pointer, level, number, self._image_id, self._seed)
            if any(data[21:24]) or any(data[56:INDEX_HEADER_BYTES]):
                raise CorruptError("index page", pointer.block, "reserved bytes are not zero")
            if data.count(0, INDEX_HEADER_BYTES + entries.nbytes) != (
                BLOCK_SIZE_BYTES - INDEX_HEADER_BYTES - entries.nbytes
            ):
                raise CorruptError(
                    "index page", pointer.block, "bytes after the entries are not zero"
                )
            return entries

        return self._copies("index page", pointer, BLOCK_SIZE_BYTES, decode, report)

    def refcounts(self, pointer: Pointer, report: Report) -> npt.NDArray[np.uint32] | None:
        """The refcounts of one group; None if no copy is good."""

        def decode(data: bytes) -> npt.NDArray[np.uint32]:
            if xxh3_128_digest(data, self._seed) != pointer.checksum:
                raise CorruptError("refcount page", pointer.block, "checksum is wrong")
            return np.frombuffer(data, "<u4")

        return self._copies("refcount page", pointer, BLOCK_SIZE_BYTES, decode, report)

    def _copies(
        self,
        owner: str,
        pointer: Pointer,
        size_bytes: int,
        decode: Callable[[bytes], _T],
        report: Report,
    ) -> _T | None:
        """Read and decode both copies; report those that are bad, and return a good one."""
        good: _T | None = None
        good_data = b""
        good_block = 0
        problems: list[tuple[str, str, int]] = []
        blocks = (pointer.block, pointer.twin) if pointer.twin else (pointer.block,)
        for block in blocks:
            try:
                data = self.device.read(block * BLOCK_SIZE_BYTES, size_bytes)
                if good is not None and data == good_data:
                    continue
                value = decode(data)
            except DeviceError as error:
                problems.append(("C9", f"{owner} cannot be read ({error})", block))
            except CorruptError as error:
                problems.append((_invariant(error), f"{owner}: {_reason(error)}", block))
            else:
                good, good_data, good_block = value, data, block
        for invariant, what, block in problems:
            rest = ""
            if good is not None:
                rest = INTACT
                if size_bytes == NODE_SIZE_BYTES:
                    self.bad_nodes[block] = good_block
            elif len(blocks) == 2:
                rest = "; neither copy is intact"
            report(invariant, what + rest, block)
        return good


def _invariant(error: CorruptError) -> str:
    """The promise that a bad node or page breaks: C9 if its checksum is wrong."""
    if error.reason in ("checksum is wrong", "short read"):
        return "C9"
    return "I4" if error.reason.startswith("birth") else "I5"


def _reason(error: CorruptError) -> str:
    text = error.reason
    if error.found is not None:
        text += f", found {error.found}"
    if error.expected is not None:
        text += f", expected {error.expected}"
    return text


def size_is_impossible(device: Device, superblock: Superblock) -> str:
    """Why the device cannot hold the whole image; "" if it can."""
    needed = superblock.total_blocks * BLOCK_SIZE_BYTES
    if device.size_bytes < needed:
        return f"the image is truncated: {device.size_bytes} bytes, expected {needed}"
    return ""
