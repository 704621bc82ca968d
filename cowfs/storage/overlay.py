"""A device whose writes stay in memory: what a read-only open shows of an image with a log.

The log is replayed and committed on the overlay as a writable open does on the image. So whoever
reads the image finds an ordinary commit, and the image itself is not changed (L5).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cowfs.storage.device import Buffer, Device
from cowfs.storage.format import BLOCK_SIZE_BYTES


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """What became of a log.

    Attributes:
        generation, committed_ns: of the commit that the log follows.
        calls: number of calls that were made again.
        error: why the others were not; None if all of them were.
    """

    generation: int
    committed_ns: int
    calls: int
    error: str | None = None


class OverlayDevice:
    """A device in front of another, which is only read. Closing it closes the other.

    Memory: the blocks that were written.

    Attributes:
        below: the other device.
        replay: what became of the log.
    """

    def __init__(self, below: Device) -> None:
        self.below = below
        self._blocks: dict[int, bytes] = {}
        self.name = below.name
        self.size_bytes = below.size_bytes
        self.replay: ReplayReport | None = None

    def read(self, offset: int, size: int) -> bytes:
        first, stop = offset // BLOCK_SIZE_BYTES, -(-(offset + size) // BLOCK_SIZE_BYTES)
        written = [number for number in range(first, stop) if number in self._blocks]
        if not written:
            return self.below.read(offset, size)
        start = first * BLOCK_SIZE_BYTES
        end = min(stop * BLOCK_SIZE_BYTES, self.size_bytes)
        data = bytearray(self.below.read(start, end - start))
        for number in written:
            at = number * BLOCK_SIZE_BYTES - start
            data[at : at + BLOCK_SIZE_BYTES] = self._blocks[number]
        return bytes(data[offset - start : offset - start + size])

    def read_cached(self, offset: int, size: int) -> Buffer | None:
        first, stop = offset // BLOCK_SIZE_BYTES, -(-(offset + size) // BLOCK_SIZE_BYTES)
        if any(number in self._blocks for number in range(first, stop)):
            return self.read(offset, size)
        return self.below.read_cached(offset, size)

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        data = b"".join(buffers)
        for at in range(0, len(data), BLOCK_SIZE_BYTES):
            self._blocks[(offset + at) // BLOCK_SIZE_BYTES] = data[at : at + BLOCK_SIZE_BYTES]

    def flush(self) -> None:
        pass

    def discard(self, offset: int, size: int) -> bool:
        return False

    def prefetch(self, offset: int, size: int) -> None:
        self.below.prefetch(offset, size)

    def close(self) -> None:
        self.below.close()
