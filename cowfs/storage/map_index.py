"""The index of the space map: where each page of refcounts is on disk, and a summary of each.

The index has a few levels. Level 0 are the pages of refcounts, one for each group; a page of a
level above names INDEX_FANOUT pages of the level below, with their addresses, checksums and free
counts. All entries are in memory, about 55 bytes for 4 MiB of image in use.

`MapIndex` reads and checks pages, and takes the twin where the first copy is bad (C9). It knows the
addresses of the map's own pages, not the refcounts: spacemap.py keeps those, and keeps the
addresses from being allocated. FORMAT.md "Space map".
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from xxhash import xxh3_128_digest

from cowfs.errors import CorruptError, DeviceError
from cowfs.storage.device import Device
from cowfs.storage.format import (
    BLOCK_SIZE_BYTES,
    INDEX_FANOUT,
    NULL_POINTER,
    Pointer,
    check_pointer,
    group_count,
    index_shape,
)
from cowfs.storage.index_pages import INDEX_ENTRY, decode_index_page, encode_index_page
from cowfs.storage.repairs import Repairs

_Decoded = TypeVar("_Decoded")


@dataclass(slots=True)
class FrozenMap:
    """A copy of the pages that one commit writes, so that the next transaction may change the map.

    Attributes:
        pages: (group, block, twin, refcounts) of each page of refcounts.
        index: for each index level, from the lowest: (number, block, twin, entries) of each page.
        top: pointer to the top page; set by `encode`.
        checksums: for each level, from level 0: page number to checksum; set by `encode`.
    """

    generation: int
    pages: list[tuple[int, int, int, bytes]]
    index: list[list[tuple[int, int, int, np.ndarray]]]
    top: Pointer = NULL_POINTER
    checksums: list[dict[int, bytes]] = field(default_factory=list)

    def encode(self, image_id: int, seed: int) -> list[tuple[int, int, bytes]]:
        """Return every page as (block, twin, bytes), children before parents; set `top`."""
        images = []
        below = {}
        for group, block, twin, references in self.pages:
            below[group] = xxh3_128_digest(references, seed)
            images.append((block, twin, references))
        self.checksums = [below]
        for level, pages in enumerate(self.index, 1):
            here = {}
            entries_of = {number: entries for number, _, _, entries in pages}
            for child, checksum in below.items():
                parent, at = divmod(child, INDEX_FANOUT)
                entries_of[parent]["checksum"][at] = np.void(checksum)
            for number, block, twin, entries in pages:
                image, here[number] = encode_index_page(
                    level, number, self.generation, block, image_id, seed, entries.tobytes()
                )
                images.append((block, twin, image))
                self.top = Pointer(block, twin, self.generation, here[number])
            self.checksums.append(here)
            below = here
        return images


class MapIndex:
    """The index of one space map, in memory. Empty until `read`.

    Args:
        device: that holds the image.
        total_blocks: size of the image in blocks.
        image_id: first 8 bytes of the uuid, as a number.
        seed: of the checksums.
        repairs: gets each bad copy whose twin is good.

    Attributes:
        levels: an array for each level; `levels[n][number]` is the entry (INDEX_ENTRY) of page
            `number` of level n. The last level is the top page alone.
    """

    def __init__(
        self, device: Device, total_blocks: int, image_id: int, seed: int, repairs: Repairs
    ) -> None:
        self._device = device
        self._total_blocks = total_blocks
        self._image_id = image_id
        self._seed = seed
        self._repairs = repairs
        shape = index_shape(total_blocks)
        lengths = [shape[0] * INDEX_FANOUT, *(count * INDEX_FANOUT for count in shape[1:]), 1]
        self.levels = [np.zeros(length, INDEX_ENTRY) for length in lengths]

    def pointer(self, level: int, number: int) -> Pointer:
        """The pointer to a page. Its block is 0 where the page was never written."""
        return _entry_pointer(self.levels[level][number])

    # --- reading ----------------------------------------------------------------------------------

    def read(self, top: Pointer) -> Iterator[Pointer]:
        """Read all index pages into `levels`. Exhaust the iterator: it reads as it goes.

        Yields:
            The pointer to each page, index pages and pages of refcounts.

        Raises:
            CorruptError: an index page is damaged in both copies, or has an impossible entry.
            DeviceError: an index page cannot be read.
        """
        self.levels[-1][0] = (top.block, top.twin, top.birth, np.void(top.checksum), 0, 0, b"")
        for level in range(len(self.levels) - 1, -1, -1):
            for number in np.flatnonzero(self.levels[level]["block"]).tolist():
                pointer = self.pointer(level, number)
                check_pointer(pointer, self._total_blocks, top.birth, "space map", 0, 1)
                if level:
                    entries = self._read_index_page(pointer, level, number)
                    first = number * INDEX_FANOUT
                    self._require_empty_rest(entries, level - 1, first, pointer.block)
                    self.levels[level - 1][first : first + INDEX_FANOUT] = entries
                yield pointer

    def _require_empty_rest(self, entries: np.ndarray, level: int, first: int, at: int) -> None:
        """Entries that name no page must be zero, and none may name a page beyond the last one."""
        count = -(-group_count(self._total_blocks) // INDEX_FANOUT**level)
        named = entries["block"] != 0
        if entries[~named].tobytes().count(0) != entries[~named].nbytes:
            raise CorruptError("space map index", at, "an entry without a page is not empty")
        if named[max(0, count - first) :].any():
            raise CorruptError("space map index", at, "an entry beyond the last page")

    def earlier_pages(self, top: Pointer, generation: int) -> Iterator[tuple[Pointer, int, int]]:
        """Walk the map of an earlier generation, but only where it differs from this index.

        Args:
            top: of the map of that generation.
            generation: its number.

        Yields:
            (pointer, level, number) of each page that this index does not name.

        Raises:
            CorruptError, DeviceError: an index page of that generation cannot be read.
        """
        waiting = [(top, len(self.levels) - 1, 0)]
        while waiting:
            pointer, level, number = waiting.pop()
            now = self.levels[level][number]
            if (int(now["block"]), int(now["birth"])) == (pointer.block, pointer.birth):
                continue  # the same page, so the same pages below it
            check_pointer(pointer, self._total_blocks, generation, "space map", 0, 1)
            yield pointer, level, number
            if level:
                entries = self._read_index_page(pointer, level, number)
                for at in np.flatnonzero(entries["block"]).tolist():
                    child = _entry_pointer(entries[at])
                    waiting.append((child, level - 1, number * INDEX_FANOUT + at))

    def read_refcounts(self, pointer: Pointer) -> bytes:
        """The bytes of a page of refcounts, checksum verified.

        Raises:
            CorruptError: both copies are damaged.
            DeviceError: the page cannot be read.
        """

        def decode(data: bytes) -> bytes:
            if xxh3_128_digest(data, self._seed) != pointer.checksum:
                raise CorruptError("space map page", pointer.block, "checksum is wrong")
            return data

        return self._read_copies(pointer, decode)

    def _read_index_page(self, pointer: Pointer, level: int, number: int) -> np.ndarray:
        def decode(data: bytes) -> np.ndarray:
            return decode_index_page(data, pointer, level, number, self._image_id, self._seed)

        return self._read_copies(pointer, decode)

    def _read_copies(self, pointer: Pointer, decode: Callable[[bytes], _Decoded]) -> _Decoded:
        """Decode the first copy of a page, or its twin. Raises the error of the last copy tried."""
        try:
            data = self._device.read(pointer.block * BLOCK_SIZE_BYTES, BLOCK_SIZE_BYTES)
            return decode(data)
        except (CorruptError, DeviceError) as error:
            if not pointer.twin:
                raise
            problem = error
        data = self._device.read(pointer.twin * BLOCK_SIZE_BYTES, BLOCK_SIZE_BYTES)
        page = decode(data)
        self._repairs.add(pointer.block, pointer.twin, data, problem)
        return page

    # --- writing ----------------------------------------------------------------------------------

    def pages_to_write(self, groups: int) -> int:
        """The most pages, index included, that a commit with `groups` dirty groups writes."""
        pages = groups
        total = groups
        for level in range(1, len(self.levels)):
            pages = min(pages, len(self.levels[level]))
            total += pages
        return total

    def pages_above(self, groups: list[int]) -> list[tuple[int, int]]:
        """(level, number) of each index page above these groups, lowest level first."""
        pages = []
        numbers = groups
        for level in range(1, len(self.levels)):
            numbers = sorted({number // INDEX_FANOUT for number in numbers})
            pages += [(level, number) for number in numbers]
        return pages

    def freeze(
        self, pages: list[tuple[int, int]], addresses: Iterator[tuple[int, int]], generation: int
    ) -> list[list[tuple[int, int, int, np.ndarray]]]:
        """Give index pages new addresses, and copy their entries.

        The entries of the changed groups in level 0 must be new already.

        Args:
            pages: as `pages_above` gives them.
            addresses: (block, twin) of each page, in that order.
            generation: of the commit that writes the pages.

        Returns:
            `FrozenMap.index`.
        """
        placed = []
        for level, number in pages:
            block, twin = next(addresses)
            first = number * INDEX_FANOUT
            entries = self.levels[level - 1][first : first + INDEX_FANOUT]
            free = int(entries["free"].sum()) & 0xFFFFFFFF
            self.levels[level][number] = (block, twin, generation, b"", free, 0, b"")
            placed.append((level, number, block, twin, entries))
        # Entries are copied last: each holds the address of a page below, which is known only now.
        frozen: list[list[tuple[int, int, int, np.ndarray]]] = [[] for _ in self.levels[1:]]
        for level, number, block, twin, entries in placed:
            frozen[level - 1].append((number, block, twin, entries.copy()))
        return frozen

    def keep_checksums(self, frozen: FrozenMap) -> None:
        """Take over the checksums that `frozen.encode` made, for later reads of its pages."""
        for entries, checksums in zip(self.levels, frozen.checksums, strict=True):
            for number, checksum in checksums.items():
                if int(entries["birth"][number]) == frozen.generation:
                    entries["checksum"][number] = np.void(checksum)


def _entry_pointer(entry: np.void) -> Pointer:
    return Pointer(
        int(entry["block"]), int(entry["twin"]), int(entry["birth"]), entry["checksum"].tobytes()
    )
