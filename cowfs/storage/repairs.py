"""Repairs: bad copies of metadata whose twin is good, kept here until they are rewritten.

A bad copy is rewritten in place, with the bytes of its twin. That is the one exception to I2. It is
safe: nobody could read what is overwritten, and every pointer to the copy has the checksum of what
is written. So no generation loses anything, however the write ends. A copy at another address would
need new pointers in every tree that shares the node, snapshots included.

Repairs are written first in a commit, with a flush before anything else is written
(`Repairs.write`). So a device that refuses a repair has refused nothing else, and each copy is
written once between two flushes (I3). A flush that fails ends all writing, as everywhere (C8).
"""

import logging
import threading
import time

from xxhash import xxh3_128_digest

from cowfs.errors import CorruptError, DeviceError
from cowfs.storage.device import Device
from cowfs.storage.format import (
    BLOCK_SIZE_BYTES,
    NODE_SIZE_BYTES,
    decode_superblock,
)

log = logging.getLogger(__name__)

WAITING_MAX = 512  # of up to 16 KiB; a copy beyond the limit is found again by its next read
LOG_INTERVAL_S = 60.0
LOG_LINES_MAX = 10  # in each LOG_INTERVAL_S


class Repairs:
    """The repairs of one open image. `add` and `take` may be called from any thread.

    Attributes:
        found: bad copies found; each counts once for each commit.
        written: copies rewritten.
    """

    def __init__(self) -> None:
        self.found = 0
        self.written = 0
        self._waiting: dict[int, tuple[int, bytes]] = {}  # by bad block: good block, bytes
        self._lock = threading.Lock()
        self._log_from_s = 0.0
        self._log_lines = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, bad_block: int, good_block: int, data: bytes, problem: Exception | str) -> None:
        """Queue a bad copy whose twin is good, and log it.

        Args:
            bad_block, good_block: first blocks of the two copies.
            data: the bytes of the good copy, verified against their pointer.
            problem: what is wrong with the bad copy.
        """
        with self._lock:
            if bad_block in self._waiting:
                return
            self.found += 1
            if len(self._waiting) < WAITING_MAX:
                self._waiting[bad_block] = (good_block, data)
        now_s = time.monotonic()
        if now_s - self._log_from_s > LOG_INTERVAL_S:
            self._log_from_s, self._log_lines = now_s, 0
        self._log_lines += 1
        if self._log_lines <= LOG_LINES_MAX:
            log.warning("%s; its twin at block %d is good", problem, good_block)
        elif self._log_lines == LOG_LINES_MAX + 1:
            log.warning("more bad copies were found and not logged; cowfs scrub repairs all")

    def take(self) -> list[tuple[int, int, bytes]]:
        """Remove all queued repairs, and return them as (bad block, good block, bytes)."""
        with self._lock:
            taken = [(bad, good, data) for bad, (good, data) in self._waiting.items()]
            self._waiting.clear()
        return taken

    def write(self, device: Device, repairs: list[tuple[int, int, bytes]]) -> None:
        """Write the repairs that `take` gave; durable on return. Write nothing else meanwhile.

        A copy is left alone unless its twin still holds the good bytes. A write that is refused is
        logged and loses nothing: the next read of that copy finds it again.

        Raises:
            DeviceError: the flush failed, and so does the commit: nobody knows which writes a
                failed flush covers (C8).
        """
        wrote = False
        for bad, good, data in repairs:
            try:
                if device.read(good * BLOCK_SIZE_BYTES, len(data)) != data:
                    continue  # a ring slot that was written since
                if not _is_same(device, bad, data):
                    wrote = True  # also before a write that fails: it may have begun
                    device.write(bad * BLOCK_SIZE_BYTES, [data])
                    self.written += 1
            except DeviceError as error:
                log.warning("cannot repair the copy at block %d: %s", bad, error)
        if wrote:
            device.flush()


def good_copy(
    device: Device, kind: str, bad_block: int, good_block: int, checksum: bytes, seed: int
) -> bytes | None:
    """Confirm a claim that one copy is bad and the other good.

    Args:
        kind: "node", "page" (of the space map) or "slot" (of the ring).
        checksum: of the pointer to both copies; unused for a slot.

    Returns:
        The bytes of the good copy; None if it is not good, or the other copy is not bad.

    Raises:
        DeviceError: the good copy cannot be read.
    """
    size_bytes = NODE_SIZE_BYTES if kind == "node" else BLOCK_SIZE_BYTES

    def is_good(data: bytes) -> bool:
        if kind == "slot":
            try:
                decode_superblock(data)
            except CorruptError:
                return False
            return True
        # Nodes and index pages begin with their own checksum, which may be damaged as well.
        if data[:16] == checksum and xxh3_128_digest(memoryview(data)[16:], seed) == checksum:
            return True
        return kind == "page" and xxh3_128_digest(data, seed) == checksum

    good = device.read(good_block * BLOCK_SIZE_BYTES, size_bytes)
    if not is_good(good) or _is_same(device, bad_block, good):
        return None
    try:
        bad = device.read(bad_block * BLOCK_SIZE_BYTES, size_bytes)
    except DeviceError:
        return good
    return None if is_good(bad) else good


def _is_same(device: Device, block: int, data: bytes) -> bool:
    try:
        return device.read(block * BLOCK_SIZE_BYTES, len(data)) == data
    except DeviceError:
        return False  # a bad sector: writing may repair it
