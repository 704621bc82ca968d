"""FUSE's lookup counts: how many answers gave the kernel an inode that it has not forgotten since.

The kernel may remember millions of files, as long as it has memory. So the counts are kept in
arrays, by inode number: a few bytes per file, where a dict would take a hundred.
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
        # By `ino >> CHUNK_BITS`: the counts of CHUNK inode numbers, then the number of nonzero
        # ones. A chunk without nonzero counts is deleted.
        self._chunks: dict[int, array[int]] = {}

    def add(self, ino: int) -> None:
        """Add one to the count of an inode."""
        chunk = self._chunks.get(ino >> CHUNK_BITS)
        if chunk is None:
            chunk = self._chunks[ino >> CHUNK_BITS] = array("I", _ZEROS)
        if not chunk[ino & _INDEX]:
            chunk[CHUNK] += 1
        chunk[ino & _INDEX] += 1

    def drop(self, ino: int, count: int) -> int:
        """Subtract `count` from the count of an inode. Returns what is left."""
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
        """The inodes that the kernel knows. Another thread may change counts meanwhile."""
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
