"""The log: what succeeded since the newest commit, in records, so that an fsync needs no commit.

The calls that change files gather in memory. An fsync writes those that no record has yet as one
record, in both copies of the log, and flushes once. A commit holds all of them, so it makes the log
empty. Opening an image makes the calls of its log again, and commits (history/replay.py).

- L1 A record names its base generation. Records of a generation that a mount could still fall back
  to are never overwritten: each commit changes to the other of two areas.
- L2 A record holds everything that completed before it and that is in no earlier record or commit,
  and nothing in it depends on what is only in memory.
- L3 One record is written at a time, and acknowledged after its flush. After a failed write or
  flush nothing is acknowledged any more (C8).
- L4 The chain starts at the checksum of the base superblock. The checksum of each record covers its
  header, with its own place and the checksum before it, and its body. So a torn, lost, misdirected
  or stale record ends the chain; nothing behind it was acknowledged.

This file does not know what a call is: it gets objects that msgspec can encode, and gives bytes.
FORMAT.md "Log".
"""

import logging
import threading
from dataclasses import dataclass, field
from typing import Any

import msgspec

from cowfs.errors import CorruptError, DeviceError
from cowfs.storage.admission import Limits
from cowfs.storage.device import Device
from cowfs.storage.format import (
    BLOCK_SIZE_BYTES,
    GROUP_BLOCKS,
    LOG_AREA_BLOCKS_MAX,
    LOG_AREA_BLOCKS_MIN,
    LOG_AREAS,
    LOG_HEADER_BYTES,
    RING_SLOTS,
    LogPlace,
    Superblock,
)
from cowfs.storage.log_records import encode_record
from cowfs.storage.spacemap import SpaceMap

log = logging.getLogger(__name__)

# An area is this part of the image, within the bounds of the format: at 1 GiB it is 2 MiB.
AREA_PART = 512
_encoder = msgspec.msgpack.Encoder()


@dataclass(slots=True)
class LogWrite:
    """One record on its way to the device.

    Attributes:
        device: to write to.
        places: the first block in each copy.
        image: header and body, whole blocks.
        checksum: where the next record goes on.
        call_count: its calls.
        done: set when `write` has ended, with or without an error.
        error: why the record is not durable.
        finished: whether `Log.finish` has done its work.
    """

    device: Device
    places: list[int]
    image: bytes
    checksum: bytes
    call_count: int
    done: threading.Event = field(default_factory=threading.Event)
    error: DeviceError | None = None
    finished: bool = False

    @property
    def written_bytes(self) -> int:
        return len(self.image) * len(self.places)

    def write(self) -> None:
        """Make the record durable. An error of the device is kept in `error`, not raised."""
        try:
            for place in self.places:
                self.device.write(place * BLOCK_SIZE_BYTES, [self.image])
            self.device.flush()
        except DeviceError as error:
            self.error = error
        except BaseException as error:  # our bug: the record is not durable either
            self.error = DeviceError(f"internal error: {error!r}")
            raise
        finally:
            self.done.set()


class Log:
    """Collects the calls that no commit and no record has, and makes records of them.

    Args:
        device: of the image.
        superblock: the newest durable one.
        limits: of what may gather.
        is_empty: whether no record follows `superblock` yet. Otherwise the records must be replayed
            and committed first: until then every sync is a commit, so none can be overwritten (L1).

    Attributes:
        calls: since the last record or freeze.
        is_whole: whether `calls` has all of them. False after more than the limits allow, until the
            next freeze; and always where the image has no log.
    """

    __slots__ = (
        "_bytes",
        "_call_count",
        "_chain",
        "_device",
        "_is_closed",
        "_limits",
        "_next_block",
        "_sequence",
        "_superblock",
        "calls",
        "is_whole",
    )

    def __init__(
        self, device: Device, superblock: Superblock, limits: Limits, *, is_empty: bool
    ) -> None:
        self._device = device
        self._limits = limits
        self.calls: list[Any] = []
        self._bytes = 0
        self._is_closed = False
        self.rebase(superblock)
        self.is_whole = is_empty and superblock.log is not None

    def close(self) -> None:
        """Write no records: every fsync commits. For an image whose log cannot be used."""
        self._is_closed = True
        self.is_whole = False
        self.calls = []

    def add(self, call: Any, size_bytes: int) -> None:
        """Collect a call that is being made.

        Args:
            size_bytes: upper bound of its encoded size.
        """
        if self.is_whole:
            self.calls.append(call)
            self._bytes += size_bytes
            if self._bytes > self._limits.log_bytes:
                self.is_whole = False
                self.calls = []

    def freeze(self, place: LogPlace | None) -> None:
        """The open transaction is frozen: its commit will hold all calls made until now.

        Args:
            place: of the log that follows the commit.
        """
        self.calls = []
        self._bytes = 0
        self.is_whole = place is not None and not self._is_closed

    def rebase(self, superblock: Superblock) -> None:
        """A commit is durable: its log is empty, and begins at its superblock."""
        self._superblock = superblock
        self._chain: bytes | None = None
        self._next_block = 0
        self._sequence = 0
        self._call_count = 0

    def next_record(self) -> LogWrite | None:
        """Take the collected calls as a record to write, or return None: a commit is needed.

        Not while another record, or a commit, is being written.
        """
        place = self._superblock.log
        if not self.is_whole or place is None:
            return None
        calls = self.calls
        room = (place.area_blocks - self._next_block) * BLOCK_SIZE_BYTES
        if (
            self._bytes + LOG_HEADER_BYTES > room
            or self._call_count + len(calls) > self._limits.log_calls
        ):
            return None
        if self._chain is None:
            self._chain = self._superblock.checksum()
        try:
            body = _encoder.encode(calls)
        except (TypeError, ValueError, OverflowError) as error:  # our bug: a commit is right, too
            log.error("a call cannot be recorded", exc_info=error)
            return None
        first = place.area * place.area_blocks + self._next_block
        image, checksum = encode_record(
            self._superblock,
            place.block + first,
            self._sequence,
            len(calls),
            self._chain,
            body,
        )
        self.calls = []
        self._bytes = 0
        return LogWrite(
            self._device, [copy + first for copy in place.copies], image, checksum, len(calls)
        )

    def finish(self, write: LogWrite) -> None:
        """A record is durable: the next one follows it."""
        if write.finished:
            return
        write.finished = True
        self._next_block += len(write.image) // BLOCK_SIZE_BYTES
        self._chain = write.checksum
        self._sequence += 1
        self._call_count += write.call_count


# --- making a log ---------------------------------------------------------------------------------


def area_blocks_of(total_blocks: int) -> int:
    """Blocks of one area in an image of that size."""
    return max(LOG_AREA_BLOCKS_MIN, min(LOG_AREA_BLOCKS_MAX, total_blocks // AREA_PART))


def new_log_place(total_blocks: int, copies: int) -> LogPlace:
    """Where the log of a new image lies: its copies are beside the two rings."""
    size = area_blocks_of(total_blocks)
    twin = total_blocks - RING_SLOTS - LOG_AREAS * size if copies == 2 else 0
    return LogPlace(RING_SLOTS, twin, size, 0)


def find_log_place(space_map: SpaceMap, copies: int) -> LogPlace | None:
    """Free blocks for the log of an image that has none; None where there is no room.

    The log is smaller where free runs are short, and takes at most a quarter of what is free.
    """
    size = area_blocks_of(space_map.total_blocks)
    while size >= LOG_AREA_BLOCKS_MIN:
        if space_map.free_blocks >= 4 * LOG_AREAS * size * copies:
            first = _free_run(space_map, LOG_AREAS * size, range(space_map.group_count), None)
            if first is not None and copies == 1:
                return LogPlace(first, 0, size, 0)
            if first is not None:
                groups = range(space_map.group_count - 1, -1, -1)
                twin = _free_run(space_map, LOG_AREAS * size, groups, first)
                if twin is not None:
                    return LogPlace(first, twin, size, 0)
        size //= 2
    return None


def _free_run(space_map: SpaceMap, blocks: int, groups: range, other: int | None) -> int | None:
    """The first block of a free run inside one group, not on the blocks from `other` on."""
    for number in groups:
        if space_map.free[number] < blocks:
            continue
        try:
            busy = bytearray(space_map.group(number).busy)
        except (CorruptError, DeviceError):
            continue
        if other is not None and other // GROUP_BLOCKS == number:
            at = other % GROUP_BLOCKS
            busy[at : at + blocks] = b"\1" * blocks
        at = busy.find(bytes(blocks))
        if at >= 0:
            return number * GROUP_BLOCKS + at
    return None


def write_zeros(device: Device, place: LogPlace) -> None:
    """Write every block of the log once, and flush.

    A write into a hole, or into a block that was never written, costs the host's journal a write.
    """
    zeros = bytes(LOG_AREAS * place.area_blocks * BLOCK_SIZE_BYTES)
    for first in place.copies:
        device.write(first * BLOCK_SIZE_BYTES, [zeros])
    device.flush()
