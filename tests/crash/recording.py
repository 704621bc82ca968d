"""A device in memory that records everything done to it, in order, with marks in between.

It asserts I3 at every write (as `MemoryDevice` does) and checks I2 by itself: after each commit it
computes which blocks the newest generation and those that its superblock retains can reach, and
refuses every write and discard there. In the log it refuses a second write to a block while the
newest generation, or the one before it, may need the first (L1). It relies on nothing of the code
under test for this.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from cowfs.errors import ImageError
from cowfs.storage.device import Buffer
from cowfs.storage.format import BLOCK_SIZE_BYTES, RING_SLOTS
from cowfs.storage.superblock import read_newest
from tests.model.devices import MemoryDevice
from tests.model.recount import log_blocks, recount

Blocks = dict[int, bytes]
ZERO_BLOCK = bytes(BLOCK_SIZE_BYTES)


@dataclass(frozen=True, slots=True, eq=False)
class Write:
    """One write call, as the device received it."""

    first_block: int
    data: bytes
    pieces: list[bytes] = field(init=False, repr=False)  # cut once, so that states share the pieces

    def __post_init__(self) -> None:
        cuts = range(0, len(self.data), BLOCK_SIZE_BYTES)
        pieces = [self.data[at : at + BLOCK_SIZE_BYTES] for at in cuts]
        object.__setattr__(self, "pieces", pieces)

    @property
    def block_count(self) -> int:
        return len(self.pieces)

    @property
    def blocks(self) -> range:
        return range(self.first_block, self.first_block + len(self.pieces))

    def apply(self, content: Blocks) -> None:
        content.update(zip(self.blocks, self.pieces, strict=True))


@dataclass(frozen=True, slots=True, eq=False)
class Discard:
    """One discard; where it takes effect, the blocks read as zeros."""

    first_block: int
    block_count: int

    @property
    def blocks(self) -> range:
        return range(self.first_block, self.first_block + self.block_count)

    def apply(self, content: Blocks) -> None:
        for number in self.blocks:
            content.pop(number, None)


@dataclass(frozen=True, slots=True, eq=False)
class Resize:
    """A change of the device's size; a smaller size cuts the rest off."""

    total_blocks: int
    first_block = RING_SLOTS
    block_count = 0
    blocks = range(0)

    def apply(self, content: Blocks) -> None:
        for number in [number for number in content if number >= self.total_blocks]:
            del content[number]


@dataclass(frozen=True, slots=True, eq=False)
class Flush:
    """A flush: everything before it is durable."""


@dataclass(frozen=True, slots=True, eq=False)
class Mark:
    """A mark of the history: operation `number` was started, or is acknowledged as durable."""

    kind: Literal["started", "durable"]
    number: int


Entry = Write | Discard | Resize | Flush | Mark


class RecordingDevice(MemoryDevice):
    """A recording device.

    Args: the size, and the content at the beginning, which is not changed.

    Attributes:
        log: everything since then.
    """

    def __init__(self, total_blocks: int, blocks: Blocks) -> None:
        super().__init__(total_blocks, dict(blocks))
        self.log: list[Entry] = []
        self._shown: dict[int, set[int]] = {}  # by generation
        self._ring_is_dirty = False
        self._log_blocks: set[int] = set()  # that may be written
        self._records: set[int] = set()  # blocks of the records that follow the newest generation
        if blocks:
            self._guard()

    def mark(self, kind: Literal["started", "durable"], number: int) -> None:
        self.log.append(Mark(kind, number))

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        data = b"".join(buffers)
        super().write(offset, [data])
        first_block = offset // BLOCK_SIZE_BYTES
        for number in range(first_block, first_block + len(data) // BLOCK_SIZE_BYTES):
            if number in self._log_blocks:
                self._records.add(number)
                self.protected = self.protected | {number}
        self.log.append(Write(first_block, data))
        self._ring_is_dirty |= self._is_ring(first_block)

    def flush(self) -> None:
        super().flush()
        self.log.append(Flush())
        if self._ring_is_dirty:
            self._ring_is_dirty = False
            self._guard()

    def discard(self, offset: int, size: int) -> bool:
        taken = super().discard(offset, size)
        self.log.append(Discard(offset // BLOCK_SIZE_BYTES, size // BLOCK_SIZE_BYTES))
        return taken

    def resize(self, total_blocks: int) -> None:
        """Give the device another size, as `ftruncate` does."""
        for number in [number for number in self._durable if number >= total_blocks]:
            del self._durable[number]
        self.total_blocks = total_blocks
        self.size_bytes = total_blocks * BLOCK_SIZE_BYTES
        self.log.append(Resize(total_blocks))

    def durable_content(self) -> Blocks:
        """A copy of the content that a power cut surely leaves."""
        return dict(self._durable)

    def _guard(self) -> None:
        """From now on refuse changes to the blocks that the retained generations show (I2)."""
        try:
            newest = read_newest(self)
        except ImageError:
            return  # mkfs has not finished
        promised = range(max(1, newest.oldest_retained), newest.generation + 1)
        self._shown = {
            generation: self._shown.get(generation) or recount(self, generation).reachable
            for generation in promised
        }
        self.kept = set().union(*self._shown.values())
        self.kept.update(log_blocks(newest, 0), log_blocks(newest, 1))
        self._log_blocks = {*log_blocks(newest, 0), *log_blocks(newest, 1)}
        self.protected = self.kept - self._log_blocks | self._records
        self._records = set()
