"""The space map: how many parents point at each block of the image.

A flat table of 32-bit refcounts cut into groups (one page each), under an index of a few levels that
holds a summary per group. The map's own blocks are *not* counted in it: the index names them, and
opening marks them in memory ("system" blocks), so writing the map never changes the map.

Groups are loaded on demand and forgotten when clean, so memory does not grow with the image. Work is
done on ranges (numpy), never block by block. A block that lost its last reference is *pending*: it
stays unallocatable until the generations that still show it are no longer retained (I2).

Keeps I1 (with btree.py), I2 and I6. FORMAT.md "Space map".
"""

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from xxhash import xxh3_128_digest

from cowfs.errors import CorruptError, DeviceError
from cowfs.storage.device import Device
from cowfs.storage.format import (
    BLOCK_SIZE_BYTES,
    GROUP_BLOCKS,
    INDEX_FANOUT,
    NODE_BLOCKS,
    NULL_POINTER,
    REFCOUNT_MAX,
    RING_SLOTS,
    Pointer,
    check_pointer,
    group_count,
    index_shape,
    ring_blocks,
)
from cowfs.storage.index_pages import INDEX_ENTRY, decode_index_page, encode_index_page
from cowfs.storage.repairs import Repairs

log = logging.getLogger(__name__)

GROUPS_LOADED_MAX = 4096  # 6 KiB each
NODE_PLACES_AHEAD = (
    4096  # counted at once, so that admitting one operation after the other is cheap
)
_NODE_FREE = bytes(NODE_BLOCKS)
Run = tuple[int, int]  # first block, count
_Decoded = TypeVar("_Decoded")


class Group:
    """The refcounts of GROUP_BLOCKS blocks, and which of them cannot be allocated now.

    `holds` counts the reasons not to forget the group although it is clean: pending blocks in it, or
    a commit that still writes it.
    """

    __slots__ = ("busy", "dirty", "holds", "references")

    def __init__(self, references: np.ndarray, busy: bytearray) -> None:
        self.references = references
        self.busy = busy
        self.dirty = False
        self.holds = 0


@dataclass(slots=True)
class FrozenMap:
    """The pages that one commit writes, copied, so that the next transaction may go on.

    `index` holds, per level from the lowest, the number, place and entries of each page to write.
    """

    generation: int
    pages: list[tuple[int, int, int, bytes]]  # group, block, twin, refcounts
    index: list[list[tuple[int, int, int, np.ndarray]]]  # number, block, twin, entries
    top: Pointer = NULL_POINTER
    checksums: list[dict[int, bytes]] = field(default_factory=list)

    def encode(self, image_id: int, seed: int) -> list[tuple[int, int, bytes]]:
        """Every page as (block, twin, bytes), children before parents; sets `top`."""
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


class SpaceMap:
    """Refcounts of all blocks, live: as the open transaction sees them.

    Args:
        device: that holds the image.
        total_blocks: of the image.
        image_id: first 8 bytes of the uuid, as a number.
        seed: of the checksums.
        repairs: told of bad copies whose twin is good.
        writable: take a group whose counts are lost for full, instead of refusing it.
    """

    def __init__(
        self,
        device: Device,
        total_blocks: int,
        image_id: int,
        seed: int,
        repairs: Repairs,
        *,
        writable: bool,
    ) -> None:
        self._device = device
        self._repairs = repairs
        self._writable = writable
        self._image_id = image_id
        self._seed = seed
        self.total_blocks = total_blocks
        self.group_count = group_count(total_blocks)
        self.used_blocks = 0
        self.system_blocks = 0
        self.pending_blocks = 0
        self.pending_system_blocks = 0  # places the map has left; still among the system blocks
        shape = index_shape(total_blocks)
        lengths = [shape[0] * INDEX_FANOUT, *(count * INDEX_FANOUT for count in shape[1:]), 1]
        self._index = [np.zeros(length, INDEX_ENTRY) for length in lengths]
        self.kinds = np.zeros(self.group_count, np.uint8)
        self.free = np.full(self.group_count, GROUP_BLOCKS, np.int32)  # allocatable now
        beyond = self.group_count * GROUP_BLOCKS - total_blocks
        self.free[-1] -= beyond
        self._node_places = 0  # at least so many; exactly, when all groups were looked at
        self._node_places_exact = False
        self._groups: OrderedDict[int, Group] = OrderedDict()
        self._came_free = np.zeros(self.group_count, np.uint8)  # 2: lately, 1: some time ago
        self._dirty: set[int] = set()
        self._system: dict[int, bytearray] = {}  # per group, 1 where a block is the map's own
        self._pending: dict[int, list[Run]] = {}  # by the generation that freed them
        self._pending_system: dict[int, list[Run]] = {}
        for first in ring_blocks(total_blocks):
            self._mark_system(first, RING_SLOTS)

    @property
    def free_blocks(self) -> int:
        """Blocks that could be allocated now."""
        return self.total_blocks - self.used_blocks - self.system_blocks - self.pending_blocks

    def node_places(self, wanted: int) -> int:
        """How many nodes could be placed now, each on blocks that lie together; stops at `wanted`."""
        if self._node_places < wanted and not self._node_places_exact:
            wanted = max(2 * wanted, NODE_PLACES_AHEAD)
            places = int(np.count_nonzero(self.free == GROUP_BLOCKS)) * (
                GROUP_BLOCKS // NODE_BLOCKS
            )
            partly = np.flatnonzero((self.free >= NODE_BLOCKS) & (self.free < GROUP_BLOCKS))
            for number in partly[np.argsort(-self.free[partly], kind="stable")].tolist():
                if places >= wanted:
                    break
                try:
                    places += self.group(number).busy.count(_NODE_FREE)
                except (CorruptError, DeviceError):
                    continue  # nothing can be allocated there
            self._node_places = places
            self._node_places_exact = places < wanted
        return self._node_places

    # --- opening ------------------------------------------------------------------------------------

    def open(self, top: Pointer, used_blocks: int) -> None:
        """Read the whole index of an image (not the refcounts) and mark the map's own blocks.

        Raises:
            CorruptError: an index page is damaged in both copies, or names a place twice.
        """
        levels = len(self._index)
        self._index[-1][0] = (top.block, top.twin, top.birth, np.void(top.checksum), 0, 0, b"")
        for level in range(levels - 1, 0, -1):
            above = self._index[level]
            for number in np.flatnonzero(above["block"]).tolist():
                pointer = self._pointer(level, number)
                check_pointer(pointer, self.total_blocks, top.birth, "space map", 0, 1)
                entries = self._read_index_page(pointer, level, number)
                first = number * INDEX_FANOUT
                self._require_empty_rest(entries, level - 1, first, pointer.block)
                self._index[level - 1][first : first + INDEX_FANOUT] = entries
                self._mark_own(pointer)
        entries = self._index[0][: self.group_count]
        self.kinds = entries["kind"].copy()
        for group in np.flatnonzero(entries["block"]).tolist():
            pointer = self._pointer(0, group)
            check_pointer(pointer, self.total_blocks, top.birth, "space map", 0, 1)
            self._mark_own(pointer)
            free = int(entries["free"][group])
            if free > GROUP_BLOCKS:
                raise CorruptError("space map", pointer.block, "free count out of range", free)
            system = self._system.get(group)
            inside = min(GROUP_BLOCKS, self.total_blocks - group * GROUP_BLOCKS)
            self.free[group] -= inside - free
        self.used_blocks = used_blocks
        for group, system in self._system.items():
            if entries["block"][group] and self.free[group] < 0:
                raise CorruptError(
                    "space map", group, "more system blocks than free ones", sum(system)
                )

    def _require_empty_rest(self, entries: np.ndarray, level: int, first: int, at: int) -> None:
        """Entries that name no page hold nothing else, and none stands beyond the last page."""
        count = -(-self.group_count // INDEX_FANOUT**level)
        named = entries["block"] != 0
        if entries[~named].tobytes().count(0) != entries[~named].nbytes:
            raise CorruptError("space map index", at, "an entry without a page is not empty")
        if named[max(0, count - first) :].any():
            raise CorruptError("space map index", at, "an entry beyond the last page")

    def hold(self, top: Pointer, generation: int) -> None:
        """Keep what an earlier generation shows from being allocated: it becomes pending, as it was
        before the image was closed or the program killed.

        Args:
            top: of the space map of that generation.
            generation: its number; hold newer ones first.

        Raises:
            CorruptError, DeviceError: its map is damaged; some of it may be held.
        """
        waiting = [(top, len(self._index) - 1, 0)]
        while waiting:
            pointer, level, number = waiting.pop()
            now = self._index[level][number]
            if (int(now["block"]), int(now["birth"])) == (pointer.block, pointer.birth):
                continue  # still the newest: so is all below it
            check_pointer(pointer, self.total_blocks, generation, "space map", 0, 1)
            for block in (pointer.block, pointer.twin):
                group, at = divmod(block, GROUP_BLOCKS)
                if block and not self.group(group).busy[at]:
                    self._mark_system(block, 1)
                    self._drop_system(block, generation + 1)
            if level:
                entries = self._read_index_page(pointer, level, number)
                for at in np.flatnonzero(entries["block"]).tolist():
                    child = _entry_pointer(entries[at])
                    waiting.append((child, level - 1, number * INDEX_FANOUT + at))
            else:
                shown = np.frombuffer(self._read_page(pointer), "<u4") != 0
                self._hold_group(number, shown, generation + 1)

    def _hold_group(self, number: int, shown: np.ndarray, generation: int) -> None:
        group = self.group(number)
        runs = _zero_runs(np.frombuffer(group.busy, np.uint8) | ~shown, number * GROUP_BLOCKS)
        for first, count in runs:
            at = first % GROUP_BLOCKS
            group.busy[at : at + count] = b"\1" * count
            group.holds += 1
            self.free[number] -= count
            self.pending_blocks += count
        self._pending.setdefault(generation, []).extend(runs)

    def _mark_own(self, pointer: Pointer) -> None:
        self._mark_system(pointer.block, 1)
        if pointer.twin:
            self._mark_system(pointer.twin, 1)

    def _mark_system(self, first: int, count: int) -> None:
        group, at = divmod(first, GROUP_BLOCKS)
        while count:
            here = min(count, GROUP_BLOCKS - at)
            system = self._system.setdefault(group, bytearray(GROUP_BLOCKS))
            if any(system[at : at + here]):
                raise CorruptError("space map", first, "names one block twice")
            system[at : at + here] = b"\1" * here
            loaded = self._groups.get(group)
            if loaded is None or not any(loaded.busy[at : at + here]):
                self.free[group] -= here
            if loaded is not None:
                loaded.busy[at : at + here] = b"\1" * here
            self.system_blocks += here
            count -= here
            group, at = group + 1, 0

    def _pointer(self, level: int, number: int) -> Pointer:
        return _entry_pointer(self._index[level][number])

    def _read_index_page(self, pointer: Pointer, level: int, number: int) -> np.ndarray:
        def decode(data: bytes) -> np.ndarray:
            return decode_index_page(data, pointer, level, number, self._image_id, self._seed)

        return self._read_copies(pointer, decode)

    # --- groups -------------------------------------------------------------------------------------

    def group(self, number: int) -> Group:
        """The group, loaded.

        Raises:
            CorruptError: its page is damaged in both copies, and nothing can be written.
            DeviceError: it cannot be read.
        """
        group = self._groups.get(number)
        if group is not None:
            return group
        entry = self._index[0][number]
        if entry["block"]:
            try:
                page = self._read_page(self._pointer(0, number))
            except CorruptError as error:
                if not self._writable:
                    raise
                group = self._groups[number] = self._lost_group(number, error)
                self.free[number] = 0
                return group
            references = np.frombuffer(page, "<u4").copy()
        else:
            references = np.zeros(GROUP_BLOCKS, np.uint32)
        busy = bytearray((references != 0).tobytes())
        system = self._system.get(number)
        if system is not None:
            busy = bytearray(np.bitwise_or(busy, system).tobytes())
        inside = self.total_blocks - number * GROUP_BLOCKS
        if inside < GROUP_BLOCKS:
            busy[inside:] = b"\1" * (GROUP_BLOCKS - inside)
        group = Group(references, busy)
        self._groups[number] = group
        self.free[number] = busy.count(0)
        if len(self._groups) > GROUPS_LOADED_MAX:
            self._forget_some(number)
        return group

    def _lost_group(self, number: int, error: CorruptError) -> Group:
        """A group whose counts are lost in both copies: all in use, by nobody knows how many, for good.

        A count that is too high wastes a block, one that is too low destroys what is in it. So nothing
        is allocated here and nothing freed, and the next commit writes that down: the lost page, should
        it be readable again one day, would not know of the references made until then.
        """
        log.error(
            "%s, in both copies; its %d MiB count as full until cowfs check --repair counts anew",
            error,
            GROUP_BLOCKS * BLOCK_SIZE_BYTES >> 20,
        )
        first = number * GROUP_BLOCKS
        inside = min(GROUP_BLOCKS, self.total_blocks - first)
        references = np.zeros(GROUP_BLOCKS, np.uint32)
        references[:inside] = REFCOUNT_MAX
        system = self._system.get(number)
        if system is not None:
            references[np.frombuffer(system, np.uint8) != 0] = 0
        used_before = inside - int(self._index[0][number]["free"])
        self.used_blocks += int(np.count_nonzero(references)) - used_before
        group = Group(references, bytearray(b"\1" * GROUP_BLOCKS))
        group.dirty = True
        self._dirty.add(number)
        self._forget_node_places()
        return group

    def _read_page(self, pointer: Pointer) -> bytes:
        def decode(data: bytes) -> bytes:
            if xxh3_128_digest(data, self._seed) != pointer.checksum:
                raise CorruptError("space map page", pointer.block, "checksum is wrong")
            return data

        return self._read_copies(pointer, decode)

    def _read_copies(self, pointer: Pointer, decode: Callable[[bytes], _Decoded]) -> _Decoded:
        """A page from the copy that is good. Raises what is wrong with the last one."""
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

    def _forget_some(self, keep: int) -> None:
        """Forget the longest loaded clean groups, an eighth of the limit at once."""
        wanted = GROUPS_LOADED_MAX // 8
        for number in list(self._groups):
            group = self._groups[number]
            if not (group.dirty or group.holds or number == keep):
                del self._groups[number]
                wanted -= 1
                if not wanted:
                    return

    def _dirty_group(self, number: int) -> Group:
        group = self.group(number)
        if not group.dirty:
            group.dirty = True
            self._dirty.add(number)
        return group

    # --- refcounts ----------------------------------------------------------------------------------

    def _parts(self, first: int, count: int) -> list[tuple[int, int, int]]:
        """A run that an item names, cut at group boundaries.

        Raises:
            CorruptError: it leaves the image.
        """
        if not (first >= 0 and 0 < count <= self.total_blocks - first):
            raise CorruptError("space map", first, "a run leaves the image", count)
        return _split(first, count)

    def refcount(self, block: int) -> int:
        if not 0 < block < self.total_blocks:
            raise CorruptError("space map", block, "a block beyond the end of the image")
        number, at = divmod(block, GROUP_BLOCKS)
        return int(self.group(number).references[at])

    def is_busy(self, block: int) -> bool:
        """Whether the block is in use, pending, or the map's own."""
        number, at = divmod(block, GROUP_BLOCKS)
        return bool(self.group(number).busy[at])

    def refcounts(self, first: int, count: int) -> np.ndarray:
        """The refcounts of a run, as a copy."""
        parts = [
            self.group(number).references[at : at + here]
            for number, at, here in self._parts(first, count)
        ]
        return np.concatenate(parts)

    def require(self, first: int, count: int) -> None:
        """See that a coming `add` or `drop` of the run will not fail.

        Whoever changes several runs, or a tree with them, asks for all of them first: half of the
        counts would be wrong for ever.

        Raises:
            CorruptError: the run leaves the image, its page is damaged in both copies, or a refcount is
                zero.
            DeviceError: a page cannot be read.
        """
        for number, at, here in self._parts(first, count):
            references = self.group(number).references
            if not (references[at] if here == 1 else references[at : at + here].all()):
                raise CorruptError("space map", first, "a block in use has refcount 0")

    def _forget_node_places(self) -> None:
        self._node_places = 0
        self._node_places_exact = False

    def take(self, first: int, count: int, kind: int) -> None:
        """Give a run, found free by the allocator inside one group, its first reference."""
        self._forget_node_places()
        number, at = divmod(first, GROUP_BLOCKS)
        group = self._dirty_group(number)
        group.references[at : at + count] = 1
        group.busy[at : at + count] = b"\1" * count
        self.free[number] -= count
        self.kinds[number] = kind
        self.used_blocks += count

    def take_system(self, first: int, count: int, kind: int) -> None:
        """Take a run for the map itself: marked in memory, counted nowhere."""
        self._forget_node_places()
        self._mark_system(first, count)
        self.kinds[first // GROUP_BLOCKS] = kind

    def add(self, first: int, count: int) -> None:
        """One more parent points at each block of the run (all of them referenced already)."""
        for number, at, here in self._parts(first, count):
            part = self._dirty_group(number).references[at : at + here]
            if not part.all():
                raise CorruptError("space map", first, "a block in use has refcount 0")
            if int(part.max()) >= REFCOUNT_MAX - 1:
                part[part < REFCOUNT_MAX] += 1  # the highest count is for good: no more is known
            else:
                part += 1

    def drop(self, first: int, count: int, generation: int) -> int:
        """One parent less points at each block of the run; those left without are pending.

        Args:
            generation: of the open transaction, whose commit frees them.

        Returns:
            How many blocks were freed.

        Raises:
            CorruptError: a refcount was zero already.
        """
        freed = 0
        for number, at, here in self._parts(first, count):
            group = self._dirty_group(number)
            if here == 1 and group.references[at] == 1:  # a small file's only block, as often
                group.references[at] = 0
                self._pending.setdefault(generation, []).append((number * GROUP_BLOCKS + at, 1))
                group.holds += 1
                freed += 1
                continue
            part = group.references[at : at + here]
            if not part.all():
                raise CorruptError("space map", first, "a block in use has refcount 0")
            if int(part.max()) == REFCOUNT_MAX:
                part[part < REFCOUNT_MAX] -= 1
            else:
                part -= 1
            left = int(np.count_nonzero(part))
            if left == here:
                continue
            base = number * GROUP_BLOCKS + at
            runs = [(base, here)] if not left else _zero_runs(part, base)
            pending = self._pending.setdefault(generation, [])
            pending.extend(runs)
            group.holds += len(runs)
            freed += here - left
        self.used_blocks -= freed
        self.pending_blocks += freed
        return freed

    def _drop_system(self, block: int, generation: int) -> None:
        if block:
            self._pending_system.setdefault(generation, []).append((block, 1))
            self.pending_system_blocks += 1

    def release(self, generation: int) -> None:
        """Make what was freed in `generation` or before allocatable.

        The caller vouches that no retained generation shows it.
        """
        self._forget_node_places()
        for freed in [number for number in self._pending if number <= generation]:
            for first, count in self._pending.pop(freed):
                number, at = divmod(first, GROUP_BLOCKS)
                group = self._groups[number]
                group.busy[at : at + count] = bytes(count)
                group.holds -= 1
                self.free[number] += count
                self._came_free[number] = 2
                self.pending_blocks -= count
        for freed in [number for number in self._pending_system if number <= generation]:
            for first, count in self._pending_system.pop(freed):
                number, at = divmod(first, GROUP_BLOCKS)
                self._system[number][at] = 0
                self.free[number] += count
                self._came_free[number] = 2
                self.system_blocks -= count
                self.pending_system_blocks -= count
                loaded = self._groups.get(number)
                if loaded is not None:
                    loaded.busy[at] = 0

    def take_released(self, *, settled: bool) -> list[int]:
        """The groups in which blocks came free since they were last given out by this method.

        Args:
            settled: only those in which nothing more came free since the last such call.
        """
        if settled:
            groups = np.flatnonzero(self._came_free == 1)
            self._came_free >>= 1
        else:
            groups = np.flatnonzero(self._came_free)
            self._came_free[:] = 0
        return groups.tolist()

    def is_unused(self, number: int) -> bool:
        """Whether all blocks of a group can be allocated, as is known without its page."""
        return bool(
            self.free[number] == GROUP_BLOCKS
            and not self._index[0]["block"][number]
            and number not in self._groups
        )

    def free_runs(self, number: int, least: int) -> list[Run]:
        """The runs of blocks in a group that could be allocated now, `least` blocks or longer.

        A run that would be too short, but goes on in a neighbouring group, is joined with what is free
        there.

        Raises:
            CorruptError, DeviceError: its page, or a neighbour's, cannot be read.
        """
        base = number * GROUP_BLOCKS
        if self.free[number] <= 0:
            return []
        if self.is_unused(number):
            runs = [(base, GROUP_BLOCKS)]
        else:
            runs = _zero_runs(np.frombuffer(self.group(number).busy, np.uint8), base)
        found = []
        for first, count in runs:
            end = first + count
            if count < least and first == base and number:
                before = self._free_at_end(number - 1)
                first, count = first - before, count + before
            if count < least and end == base + GROUP_BLOCKS and number + 1 < self.group_count:
                count += self._free_at_start(number + 1)
            if count >= least:
                found.append((first, count))
        return found

    def _free_at_start(self, number: int) -> int:
        busy = self.group(number).busy.find(1)
        return busy if busy >= 0 else GROUP_BLOCKS

    def _free_at_end(self, number: int) -> int:
        return GROUP_BLOCKS - 1 - self.group(number).busy.rfind(1)

    def pending_upto(self, generation: int) -> int:
        """How many counted blocks `release(generation)` would make allocatable."""
        return sum(
            count
            for freed, runs in self._pending.items()
            if freed <= generation
            for _, count in runs
        )

    # --- commit -------------------------------------------------------------------------------------

    @property
    def dirty_groups(self) -> int:
        return len(self._dirty)

    def pages_to_write(self, groups: int) -> int:
        """Pages, index included, that a commit with that many dirty groups writes at the most."""
        pages = groups
        total = groups
        for level in range(1, len(self._index)):
            pages = min(pages, len(self._index[level]))
            total += pages
        return total

    def dirty_pages(self) -> list[tuple[int, int]]:
        """(level, number) of each page that `freeze` needs a place for, in the order it takes them."""
        numbers = sorted(self._dirty)
        wanted = [(0, number) for number in numbers if self._groups[number].references.any()]
        for level in range(1, len(self._index)):
            numbers = sorted({number // INDEX_FANOUT for number in numbers})
            wanted += [(level, number) for number in numbers]
        return wanted

    def freeze(self, generation: int, places: list[tuple[int, int]]) -> FrozenMap:
        """Copy what this commit writes, at the places (block, twin) that answer `dirty_pages`.

        The old places become pending in `generation`.
        """
        wanted = iter(zip(self.dirty_pages(), places, strict=True))
        numbers = sorted(self._dirty)
        pages = []
        below = self._index[0]
        for number in numbers:
            group = self._groups[number]
            inside = min(GROUP_BLOCKS, self.total_blocks - number * GROUP_BLOCKS)
            free = inside - int(np.count_nonzero(group.references))
            self._drop_place(0, number, generation)
            if free < inside:
                _, (block, twin) = next(wanted)
                below[number] = (block, twin, generation, b"", free, int(self.kinds[number]), b"")
                pages.append((number, block, twin, group.references.tobytes()))
                group.holds += 1
            else:
                self.kinds[number] = 0
                below[number] = np.zeros((), INDEX_ENTRY)
            group.dirty = False
        self._dirty.clear()
        index = []
        for level in range(1, len(self._index)):
            numbers = sorted({number // INDEX_FANOUT for number in numbers})
            placed = []
            for number in numbers:
                _, (block, twin) = next(wanted)
                first = number * INDEX_FANOUT
                entries = self._index[level - 1][first : first + INDEX_FANOUT]
                self._drop_place(level, number, generation)
                free = int(entries["free"].sum()) & 0xFFFFFFFF
                self._index[level][number] = (block, twin, generation, b"", free, 0, b"")
                placed.append((number, block, twin, entries))
            index.append(placed)
        copied = [
            [(number, block, twin, entries.copy()) for number, block, twin, entries in placed]
            for placed in index
        ]
        return FrozenMap(generation, pages, copied)

    def _drop_place(self, level: int, number: int, generation: int) -> None:
        entry = self._index[level][number]
        self._drop_system(int(entry["block"]), generation)
        self._drop_system(int(entry["twin"]), generation)

    def written(self, frozen: FrozenMap) -> None:
        """The commit of `frozen` is durable: keep its checksums for later reads."""
        for number, _, _, _ in frozen.pages:
            self._groups[number].holds -= 1
        for entries, checksums in zip(self._index, frozen.checksums, strict=True):
            for number, checksum in checksums.items():
                if int(entries["birth"][number]) == frozen.generation:
                    entries["checksum"][number] = np.void(checksum)


def _entry_pointer(entry: np.void) -> Pointer:
    return Pointer(
        int(entry["block"]), int(entry["twin"]), int(entry["birth"]), entry["checksum"].tobytes()
    )


def _split(first: int, count: int) -> list[tuple[int, int, int]]:
    """A run cut at group boundaries, as (group, offset in it, count)."""
    number, at = divmod(first, GROUP_BLOCKS)
    if at + count <= GROUP_BLOCKS:
        return [(number, at, count)]
    parts = []
    while count:
        here = min(count, GROUP_BLOCKS - at)
        parts.append((number, at, here))
        count -= here
        number, at = number + 1, 0
    return parts


def _zero_runs(part: np.ndarray, base: int) -> list[Run]:
    """The runs of zeros in `part`, as block runs from `base`."""
    edges = np.flatnonzero(np.diff(np.concatenate(([1], part, [1])) == 0)).tolist()
    return [
        (base + start, stop - start) for start, stop in zip(edges[::2], edges[1::2], strict=True)
    ]


def merge_runs(runs: list[Run]) -> list[Run]:
    """Sorted runs, those joined that touch or overlap."""
    merged: list[Run] = []
    for first, count in runs:
        if merged and merged[-1][0] + merged[-1][1] >= first:
            start, before = merged[-1]
            merged[-1] = (start, max(before, first + count - start))
        else:
            merged.append((first, count))
    return merged
