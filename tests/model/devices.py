"""Devices in memory: one that loses what was not flushed, one that fails at a chosen call.

`MemoryDevice` keeps what is *live* (a read sees it) apart from what is *durable* (a crash leaves
it), and asserts I3 at every write. `FaultDevice` puts an error in front of any other device.
"""

import errno
import os
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cowfs.errors import DeviceError
from cowfs.storage.device import Buffer, Device
from cowfs.storage.format import BLOCK_SIZE_BYTES, RING_SLOTS

_ZEROS = bytes(BLOCK_SIZE_BYTES)


@dataclass(slots=True)
class Event:
    """One call that changed the device: "write", "discard" or "flush"."""

    kind: str
    first_block: int = 0
    block_count: int = 0


class MemoryDevice:
    """Bytes in memory, in blocks of 4 KiB.

    Args:
        total_blocks: size of the device.
        blocks: the initial content; blocks left out are zero.

    Attributes:
        events: every write, discard and flush, in order.
        protected: blocks that must not be written (I2), unless to undo `damage`.
        kept: blocks that must not be discarded, since discards come after the commit point.
    """

    def __init__(self, total_blocks: int, blocks: dict[int, bytes] | None = None) -> None:
        self.name = "memory"
        self.size_bytes = total_blocks * BLOCK_SIZE_BYTES
        self.total_blocks = total_blocks
        self.events: list[Event] = []
        self.protected: frozenset[int] | set[int] = frozenset()
        self.kept: frozenset[int] | set[int] = frozenset()
        self.read_blocks = 0
        self.closed = False
        self._durable: dict[int, bytes] = {} if blocks is None else blocks
        self._unflushed: dict[int, list[bytes]] = {}  # all versions since the last flush
        self._written: set[int] = set()
        self._pristine: dict[int, bytes] = {}  # the content before it was damaged
        self._lock = threading.Lock()  # a thread may write a commit while the loop discards

    # --- Device -----------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> bytes:
        self._require_inside(offset, size)
        self.read_blocks += size // BLOCK_SIZE_BYTES
        first, skip = divmod(offset, BLOCK_SIZE_BYTES)
        stop = -(-(offset + size) // BLOCK_SIZE_BYTES)
        if self._unflushed:
            parts = [self.block(number) for number in range(first, stop)]
        else:
            durable = self._durable.get
            parts = [durable(number, _ZEROS) for number in range(first, stop)]
        return b"".join(parts)[skip : skip + size]

    def read_cached(self, offset: int, size: int) -> bytes | None:
        return self.read(offset, size)

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        data = b"".join(buffers)
        assert not offset % BLOCK_SIZE_BYTES, "a write begins inside a block"
        assert not len(data) % BLOCK_SIZE_BYTES, "a write ends inside a block"
        self._require_inside(offset, len(data))
        pieces = [data[at : at + BLOCK_SIZE_BYTES] for at in range(0, len(data), BLOCK_SIZE_BYTES)]
        first = offset // BLOCK_SIZE_BYTES
        numbers = range(first, first + len(pieces))
        self.events.append(Event("write", first, len(pieces)))
        self._require_writable(numbers, pieces)
        self._written.update(numbers)
        with self._lock:
            for number, piece in zip(numbers, pieces, strict=True):
                versions = self._unflushed.get(number)
                if versions is None:
                    self._unflushed[number] = [piece]
                else:
                    versions.append(piece)

    def _require_writable(self, numbers: range, pieces: list[bytes]) -> None:
        """I2 and I3, which the ring of superblocks is free of."""
        if self._touches_ring(numbers):
            outside = [number for number in numbers if not self._is_ring(number)]
        else:
            outside = list(numbers)
        twice = self._written.intersection(outside)
        assert not twice, f"I3: blocks {sorted(twice)} written twice"
        for number in self.protected.intersection(outside):
            is_repair = self._pristine.get(number) == pieces[number - numbers.start]
            assert is_repair, f"I2: block {number} is in use and written"

    def flush(self) -> None:
        self.events.append(Event("flush"))
        with self._lock:
            self._durable.update(
                {number: versions[-1] for number, versions in self._unflushed.items()}
            )
            self._unflushed.clear()
        self._written.clear()

    def discard(self, offset: int, size: int) -> bool:
        self._require_inside(offset, size)
        first, count = offset // BLOCK_SIZE_BYTES, size // BLOCK_SIZE_BYTES
        self.events.append(Event("discard", first, count))
        for number in range(first, first + count):
            assert not self._is_ring(number), f"block {number} of the ring is discarded"
            assert number not in self.kept, f"I2: block {number} is in use and discarded"
            with self._lock:
                if number in self._durable or number in self._unflushed:
                    self._unflushed.setdefault(number, []).append(_ZEROS)
        return True

    def prefetch(self, offset: int, size: int) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    # --- what only a test can do ------------------------------------------------------------------

    def block(self, number: int) -> bytes:
        """The live content of one block."""
        versions = self._unflushed.get(number)
        return versions[-1] if versions else self._durable.get(number, _ZEROS)

    def crash(self, choice: random.Random | None = None) -> "MemoryDevice":
        """Make a new device with what a power cut leaves.

        Args:
            choice: picks which unflushed blocks arrived nevertheless; None: none did.
        """
        blocks = dict(self._durable)
        if choice is not None:
            share = choice.random()
            for number, versions in self._unflushed.items():
                if choice.random() < share:
                    blocks[number] = choice.choice(versions)
        return MemoryDevice(self.total_blocks, blocks)

    def holds_the_same(self, other: "MemoryDevice") -> bool:
        """Whether the durable content is equal, block by block."""
        return self.total_blocks == other.total_blocks and self._durable == other._durable

    def copy(self) -> "MemoryDevice":
        """Make a new device with the live content, all of it durable."""
        blocks = dict(self._durable)
        blocks.update({number: versions[-1] for number, versions in self._unflushed.items()})
        return MemoryDevice(self.total_blocks, blocks)

    def damage(self, number: int, at: int = 0, mask: int = 1) -> None:
        """Flip bits of one byte, both live and durable."""
        data = bytearray(self.block(number))
        self._pristine.setdefault(number, bytes(data))
        data[at] ^= mask
        self._unflushed.pop(number, None)
        self._durable[number] = bytes(data)

    def put(self, number: int, data: bytes) -> None:
        """Replace one block, both live and durable."""
        assert len(data) == BLOCK_SIZE_BYTES
        self._unflushed.pop(number, None)
        self._durable[number] = data

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the durable content to a file, for inspection."""
        with open(path, "wb") as file:
            file.truncate(self.size_bytes)
            for number, data in self._durable.items():
                file.seek(number * BLOCK_SIZE_BYTES)
                file.write(data)

    def _touches_ring(self, numbers: range) -> bool:
        return numbers.start < RING_SLOTS or numbers.stop > self.total_blocks - RING_SLOTS

    def _is_ring(self, number: int) -> bool:
        return number < RING_SLOTS or number >= self.total_blocks - RING_SLOTS

    def _require_inside(self, offset: int, size: int) -> None:
        if offset < 0 or size < 0 or offset + size > self.size_bytes:
            raise DeviceError(f"cannot reach {self.name} at {offset}: outside the device")


@dataclass(slots=True)
class Fault:
    """Which call fails, and how.

    Attributes:
        kind: "read", "write" or "flush".
        after: number of calls of that kind that succeed first.
        number: errno of the failure.
        short: a failing write still stores the first half of its bytes.
        sticky: later calls of that kind fail too.
    """

    kind: str
    after: int
    number: int = errno.EIO
    short: bool = False
    sticky: bool = False
    fired: int = field(default=0, init=False)


class FaultDevice:
    """Wraps another device and makes it fail as one `Fault` says."""

    def __init__(self, device: Device, fault: Fault | None = None) -> None:
        self.device = device
        self.name = device.name
        self.size_bytes = device.size_bytes
        self.fault = fault
        self.calls = {"read": 0, "write": 0, "flush": 0}
        self.before_write: Callable[[], None] | None = None

    def _due(self, kind: str) -> bool:
        self.calls[kind] += 1
        fault = self.fault
        if fault is None or fault.kind != kind or (fault.fired and not fault.sticky):
            return False
        if fault.after:
            fault.after -= 1
            return False
        fault.fired += 1
        return True

    def _error(self, kind: str) -> DeviceError:
        assert self.fault is not None
        return DeviceError(f"cannot {kind} {self.name}: {os.strerror(self.fault.number)}")

    def read(self, offset: int, size: int) -> bytes:
        if self._due("read"):
            raise self._error("read")
        return self.device.read(offset, size)

    def read_cached(self, offset: int, size: int) -> bytes | None:
        return self.device.read_cached(offset, size)

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        if self.before_write is not None:
            self.before_write()
        if self._due("write"):
            assert self.fault is not None
            data = b"".join(buffers)
            half = len(data) // 2 // BLOCK_SIZE_BYTES * BLOCK_SIZE_BYTES
            if self.fault.short and half:
                self.device.write(offset, [data[:half]])
            raise self._error("write")
        self.device.write(offset, buffers)

    def flush(self) -> None:
        if self._due("flush"):
            raise self._error("flush")
        self.device.flush()

    def discard(self, offset: int, size: int) -> bool:
        return self.device.discard(offset, size)

    def prefetch(self, offset: int, size: int) -> None:
        self.device.prefetch(offset, size)

    def close(self) -> None:
        self.device.close()
