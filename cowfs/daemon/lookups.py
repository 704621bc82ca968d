"""How often the kernel was told of each inode and has not forgotten it: FUSE's lookup counts.

The kernel may remember millions of files, for as long as it has memory. So the counts are small numbers
in arrays, by inode number: some bytes for each file, where a dictionary takes a hundred.
"""

from array import array
from collections.abc import Iterator

CHUNK_BITS = 10
CHUNK = 1 << CHUNK_BITS
_INDEX = CHUNK - 1
_ZEROS = bytes(4 * (CHUNK + 1))


class Lookups:
    """Lookup counts of the inodes of one tree."""

    def __init__(self) -> None:
        # Of CHUNK inode numbers each, and behind them how many are not zero: one at least.
        self._chunks: dict[int, array[int]] = {}

    def add(self, ino: int) -> None:
        """The kernel was told once more."""
        chunk = self._chunks.get(ino >> CHUNK_BITS)
        if chunk is None:
            chunk = self._chunks[ino >> CHUNK_BITS] = array("I", _ZEROS)
        if not chunk[ino & _INDEX]:
            chunk[CHUNK] += 1
        chunk[ino & _INDEX] += 1

    def drop(self, ino: int, count: int) -> int:
        """The kernel forgets `count` of the times. Returns how many are left."""
        chunk = self._chunks.get(ino >> CHUNK_BITS)
        if chunk is None or not chunk[ino & _INDEX]:
            return 0
        left = chunk[ino & _INDEX] = max(0, chunk[ino & _INDEX] - count)
        if not left:
            chunk[CHUNK] -= 1
            if not chunk[CHUNK]:
                del self._chunks[ino >> CHUNK_BITS]
        return left

    def inos(self) -> Iterator[int]:
        """The inodes that the kernel knows. Counts may change meanwhile, also in another thread."""
        for number in list(self._chunks):
            chunk = self._chunks.get(number)
            if chunk is not None:
                for index in range(CHUNK):
                    if chunk[index]:
                        yield number << CHUNK_BITS | index

    def __contains__(self, ino: int) -> bool:
        """Whether the kernel knows the inode."""
        chunk = self._chunks.get(ino >> CHUNK_BITS)
        return chunk is not None and chunk[ino & _INDEX] != 0
