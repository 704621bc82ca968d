"""The space map: how many parents point at each block of the image.

A flat table of 32-bit refcounts, cut into groups of GROUP_BLOCKS blocks with one page each, under
an index (map_index.py). The blocks of the map itself are *not* counted in it: the index names them,
and opening an image marks them in memory as *system* blocks, as it does those of the log. So
writing the map does not change the map.

Groups are loaded on demand and forgotten when clean, so memory does not grow with the image. Work
is done on runs of blocks with numpy, not block by block. A block that lost its last reference is
*pending*: it cannot be allocated until no retained generation shows it (I2).

Keeps I1 (with btree.py), I2 and I6. FORMAT.md "Space map".
"""

import logging
from collections import OrderedDict

import numpy as np

from cowfs.errors import CorruptError, DeviceError
from cowfs.storage.device import Device
from cowfs.storage.format import (
    BLOCK_SIZE_BYTES,
    GROUP_BLOCKS,
    NODE_BLOCKS,
    REFCOUNT_MAX,
    RING_SLOTS,
    Pointer,
    group_count,
    ring_blocks,
)
from cowfs.storage.index_pages import INDEX_ENTRY
from cowfs.storage.map_index import FrozenMap, MapIndex
from cowfs.storage.repairs import Repairs
from cowfs.storage.runs import Run, split_run, zero_runs

log = logging.getLogger(__name__)

GROUPS_LOADED_MAX = 4096  # 6 KiB each
# `node_places` counts at least this many places at once: the next admissions need no new count.
NODE_PLACES_AHEAD = 4096
# Runs of at most this length, a node's among them, are compared as lists: numpy costs 2 us a call.
SHORT_BLOCKS = 24
_NODE_FREE = bytes(NODE_BLOCKS)  # a node's blocks in `Group.busy` where all are free


class Group:
    """The refcounts of GROUP_BLOCKS blocks, and which of the blocks cannot be allocated now.

    Attributes:
        references: a uint32 refcount for each block.
        busy: for each block 1 if it is in use, pending, a system block or beyond the image, else 0.
        dirty: whether the next commit writes the group's page.
        holds: number of reasons to keep the group loaded although it is clean: each pending run in
            it, and a commit that still writes it.
    """

    __slots__ = ("busy", "dirty", "holds", "references")

    def __init__(self, references: np.ndarray, busy: bytearray) -> None:
        self.references = references
        self.busy = busy
        self.dirty = False
        self.holds = 0


class SpaceMap:
    """The refcounts of all blocks, as the open transaction sees them.

    Args:
        device: that holds the image.
        total_blocks: size of the image in blocks.
        image_id: first 8 bytes of the uuid, as a number.
        seed: of the checksums.
        repairs: gets each bad copy whose twin is good.
        writable: a group whose page is lost counts as full; without it, loading the group fails.

    Attributes:
        index: where the pages are on disk.
        used_blocks: blocks with a reference.
        system_blocks: superblocks, the log, and the map's own blocks, `pending_system_blocks`
            included.
        pending_blocks: counted blocks that were freed and are not released yet.
        pending_system_blocks: blocks that the map's pages have left and that are not released yet.
        kinds: for each group its kind (KIND_DATA ...).
        free: for each group the number of blocks that can be allocated now.
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
        self._writable = writable
        self.total_blocks = total_blocks
        self.group_count = group_count(total_blocks)
        self.used_blocks = 0
        self.system_blocks = 0
        self.pending_blocks = 0
        self.pending_system_blocks = 0
        self.index = MapIndex(device, total_blocks, image_id, seed, repairs)
        self.kinds = np.zeros(self.group_count, np.uint8)
        self.free = np.full(self.group_count, GROUP_BLOCKS, np.int32)
        self.free[-1] = self._blocks_inside(self.group_count - 1)
        # A lower bound of the places for nodes; exact once all groups were looked at.
        self._node_places = 0
        self._node_places_exact = False
        self._groups: OrderedDict[int, Group] = OrderedDict()
        # For each group 2 if blocks were released since the last `take_released`, 1 if before it.
        self._released = np.zeros(self.group_count, np.uint8)
        self._dirty: set[int] = set()
        self._system: dict[int, bytearray] = {}  # for each group, 1 where a block is a system block
        self._pending: dict[int, list[Run]] = {}  # by the generation that freed the runs
        self._pending_system: dict[int, list[Run]] = {}
        for first in ring_blocks(total_blocks):
            self._mark_system(first, RING_SLOTS)

    def _blocks_inside(self, number: int) -> int:
        """How many blocks of a group are inside the image: the last group may be cut short."""
        return min(GROUP_BLOCKS, self.total_blocks - number * GROUP_BLOCKS)

    @property
    def free_blocks(self) -> int:
        """Blocks that can be allocated now."""
        return self.total_blocks - self.used_blocks - self.system_blocks - self.pending_blocks

    def node_places(self, wanted: int) -> int:
        """Count the places for nodes: NODE_BLOCKS free blocks in a row, inside one group.

        Args:
            wanted: the count may stop when it has found this many.

        Returns:
            At least `wanted`, or the exact number if there are fewer.
        """
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
                    continue  # no node can be placed in a group that cannot be loaded
            self._node_places = places
            self._node_places_exact = places < wanted
        return self._node_places

    # --- opening ----------------------------------------------------------------------------------

    def open(self, top: Pointer, used_blocks: int) -> None:
        """Read the index of an image (not the refcounts), and mark the map's own blocks.

        Raises:
            CorruptError: an index page is damaged in both copies, or two entries name one block.
            DeviceError: an index page cannot be read.
        """
        for pointer in self.index.read(top):
            self._mark_system(pointer.block, 1)
            if pointer.twin:
                self._mark_system(pointer.twin, 1)
        entries = self.index.levels[0][: self.group_count]
        self.kinds = entries["kind"].copy()
        for group in np.flatnonzero(entries["block"]).tolist():
            free = int(entries["free"][group])
            if free > GROUP_BLOCKS:
                block = int(entries["block"][group])
                raise CorruptError("space map", block, "free count out of range", free)
            self.free[group] -= self._blocks_inside(group) - free
        self.used_blocks = used_blocks
        for group, system in self._system.items():
            if entries["block"][group] and self.free[group] < 0:
                raise CorruptError(
                    "space map", group, "more system blocks than free ones", sum(system)
                )

    def hold(self, top: Pointer, generation: int) -> None:
        """Make the blocks pending that an earlier generation shows and the newest does not.

        They were pending before the image was closed or the program was killed. Call this for newer
        generations first.

        Args:
            top: of the space map of that generation.
            generation: its number.

        Raises:
            CorruptError, DeviceError: that map is damaged; some blocks may be pending already.
        """
        for pointer, level, number in self.index.earlier_pages(top, generation):
            for block in (pointer.block, pointer.twin):
                group, at = divmod(block, GROUP_BLOCKS)
                if block and not self.group(group).busy[at]:
                    self._mark_system(block, 1)
                    self._drop_system(block, generation + 1)
            if not level:
                shown = np.frombuffer(self.index.read_refcounts(pointer), "<u4") != 0
                self._hold_group(number, shown, generation + 1)

    def _hold_group(self, number: int, shown: np.ndarray, generation: int) -> None:
        group = self.group(number)
        runs = zero_runs(np.frombuffer(group.busy, np.uint8) | ~shown, number * GROUP_BLOCKS)
        for first, count in runs:
            at = first % GROUP_BLOCKS
            group.busy[at : at + count] = b"\1" * count
            group.holds += 1
            self.free[number] -= count
            self.pending_blocks += count
        self._pending.setdefault(generation, []).extend(runs)

    def keep(self, first: int, count: int) -> None:
        """Mark blocks as system blocks for as long as the image is open: those of the log.

        Raises:
            CorruptError: one of them is a system block already.
        """
        self._forget_node_places()
        self._mark_system(first, count)

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

    # --- groups -----------------------------------------------------------------------------------

    def group(self, number: int) -> Group:
        """Return a group, loaded if necessary.

        Raises:
            CorruptError: the group's page is damaged in both copies, and the map is not writable.
            DeviceError: the page cannot be read.
        """
        group = self._groups.get(number)
        if group is not None:
            return group
        if self.index.levels[0]["block"][number]:
            try:
                page = self.index.read_refcounts(self.index.pointer(0, number))
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
        inside = self._blocks_inside(number)
        busy[inside:] = b"\1" * (GROUP_BLOCKS - inside)
        group = Group(references, busy)
        self._groups[number] = group
        self.free[number] = busy.count(0)
        if len(self._groups) > GROUPS_LOADED_MAX:
            self._forget_some(number)
        return group

    def _lost_group(self, number: int, error: CorruptError) -> Group:
        """Make a full group in place of one whose page is damaged in both copies.

        All its blocks count as in use for good, with the highest refcount. A count that is too high
        wastes a block; one that is too low destroys the block's content. So nothing is allocated or
        freed in this group. The next commit writes these counts: the lost page would not know of
        references made since, should the page become readable again.
        """
        log.error(
            "%s, in both copies; the %d MiB that it describes count as full until "
            "cowfs check --repair makes the refcounts anew",
            error,
            GROUP_BLOCKS * BLOCK_SIZE_BYTES >> 20,
        )
        inside = self._blocks_inside(number)
        references = np.zeros(GROUP_BLOCKS, np.uint32)
        references[:inside] = REFCOUNT_MAX
        system = self._system.get(number)
        if system is not None:
            references[np.frombuffer(system, np.uint8) != 0] = 0
        used_before = inside - int(self.index.levels[0]["free"][number])
        self.used_blocks += int(np.count_nonzero(references)) - used_before
        group = Group(references, bytearray(b"\1" * GROUP_BLOCKS))
        group.dirty = True
        self._dirty.add(number)
        self._forget_node_places()
        return group

    def _forget_some(self, keep: int) -> None:
        """Forget an eighth of GROUPS_LOADED_MAX: clean groups without holds, first loaded first."""
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

    # --- refcounts --------------------------------------------------------------------------------

    def _parts(self, first: int, count: int) -> list[tuple[int, int, int]]:
        """Cut a run, which may come from disk, at group boundaries: (group, offset in it, count).

        Raises:
            CorruptError: the run leaves the image.
        """
        if not (first >= 0 and 0 < count <= self.total_blocks - first):
            raise CorruptError("space map", first, "a run leaves the image", count)
        return split_run(first, count)

    def refcount(self, block: int) -> int:
        """The number of parents that point at a block.

        Raises:
            CorruptError: the block is beyond the image, or as `group`.
            DeviceError: as `group`.
        """
        if not 0 < block < self.total_blocks:
            raise CorruptError("space map", block, "a block beyond the end of the image")
        number, at = divmod(block, GROUP_BLOCKS)
        return int(self.group(number).references[at])

    def is_busy(self, block: int) -> bool:
        """Whether a block is in use, pending or a system block."""
        number, at = divmod(block, GROUP_BLOCKS)
        return bool(self.group(number).busy[at])

    def refcounts(self, first: int, count: int) -> np.ndarray:
        """A copy of the refcounts of a run: `count` numbers of uint32. Raises as `require`."""
        parts = self._parts(first, count)
        return np.concatenate([self.group(group).references[at : at + n] for group, at, n in parts])

    def require(self, first: int, count: int) -> None:
        """Raise now what `add` or `drop` of this run would raise.

        A caller that changes several runs, or a tree as well, first requires all of them: a failure
        half way would leave wrong refcounts for good.

        Raises:
            CorruptError: the run leaves the image, a page is damaged in both copies, or a refcount
                is zero.
            DeviceError: a page cannot be read.
        """
        for number, at, here in self._parts(first, count):
            part = self.group(number).references[at : at + here]
            if 0 in part.tolist() if here <= SHORT_BLOCKS else not part.all():
                raise CorruptError("space map", first, "a block in use has refcount 0")

    def _forget_node_places(self) -> None:
        self._node_places = 0
        self._node_places_exact = False

    def take(self, first: int, count: int, kind: int) -> None:
        """Give a run its first reference. The allocator found the run free, inside one group."""
        self._forget_node_places()
        number, at = divmod(first, GROUP_BLOCKS)
        group = self._dirty_group(number)
        group.references[at : at + count] = 1
        group.busy[at : at + count] = b"\1" * count
        self.free[number] -= count
        self.kinds[number] = kind
        self.used_blocks += count

    def take_system(self, first: int, count: int, kind: int) -> None:
        """Take a run for pages of the map: mark it in memory, without a refcount."""
        self._forget_node_places()
        self._mark_system(first, count)
        self.kinds[first // GROUP_BLOCKS] = kind

    def add(self, first: int, count: int) -> None:
        """Count one more parent for each block of a run.

        Raises:
            CorruptError: a refcount is zero, or as `require`.
        """
        for number, at, here in self._parts(first, count):
            part = self._dirty_group(number).references[at : at + here]
            least, most = _bounds(part)
            if not least:
                raise CorruptError("space map", first, "a block in use has refcount 0")
            if most >= REFCOUNT_MAX - 1:
                part[part < REFCOUNT_MAX] += 1  # REFCOUNT_MAX stays: the true count is unknown
            else:
                part += 1

    def drop(self, first: int, count: int, generation: int) -> int:
        """Count one parent less for each block of a run. Blocks left without a parent are pending.

        Args:
            generation: of the open transaction, whose commit frees the blocks.

        Returns:
            The number of blocks freed.

        Raises:
            CorruptError: a refcount is zero already, or as `require`.
        """
        freed = 0
        for number, at, here in self._parts(first, count):
            group = self._dirty_group(number)
            if here == 1 and group.references[at] == 1:  # a small file is deleted: most often
                group.references[at] = 0
                self._pending.setdefault(generation, []).append((number * GROUP_BLOCKS + at, 1))
                group.holds += 1
                freed += 1
                continue
            part = group.references[at : at + here]
            least, most = _bounds(part)
            if not least:
                raise CorruptError("space map", first, "a block in use has refcount 0")
            if most == 1:  # the last reference to each block
                part[:] = left = 0
            else:
                if most == REFCOUNT_MAX:
                    part[part < REFCOUNT_MAX] -= 1
                else:
                    part -= 1
                left = here if least > 1 else int(np.count_nonzero(part))
            if left == here:
                continue
            base = number * GROUP_BLOCKS + at
            runs = [(base, here)] if not left else zero_runs(part, base)
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
        """Make blocks allocatable that were freed in `generation` or before.

        The caller guarantees that no retained generation shows these blocks (I2).
        """
        self._forget_node_places()
        for freed in [number for number in self._pending if number <= generation]:
            for first, count in self._pending.pop(freed):
                number, at = divmod(first, GROUP_BLOCKS)
                group = self._groups[number]
                group.busy[at : at + count] = bytes(count)
                group.holds -= 1
                self.free[number] += count
                self._released[number] = 2
                self.pending_blocks -= count
        for freed in [number for number in self._pending_system if number <= generation]:
            for first, count in self._pending_system.pop(freed):
                number, at = divmod(first, GROUP_BLOCKS)
                self._system[number][at] = 0
                self.free[number] += count
                self._released[number] = 2
                self.system_blocks -= count
                self.pending_system_blocks -= count
                loaded = self._groups.get(number)
                if loaded is not None:
                    loaded.busy[at] = 0

    def take_released(self, *, settled: bool) -> list[int]:
        """Give the groups in which blocks were released, and forget that they were.

        Args:
            settled: give only groups in which no block was released since the last such call; the
                others are for the next one.
        """
        if settled:
            groups = np.flatnonzero(self._released == 1)
            self._released >>= 1
        else:
            groups = np.flatnonzero(self._released)
            self._released[:] = 0
        return groups.tolist()

    def is_unused(self, number: int) -> bool:
        """Whether a group was never used: all blocks allocatable, and no page. Loads nothing."""
        return bool(
            self.free[number] == GROUP_BLOCKS
            and not self.index.levels[0]["block"][number]
            and number not in self._groups
        )

    def free_runs(self, number: int, least: int) -> list[Run]:
        """The runs of allocatable blocks in a group that have `least` blocks or more.

        A run at an edge of the group that is too short is joined with the free blocks next to it in
        the neighbouring group.

        Raises:
            CorruptError, DeviceError: the page of the group, or of a neighbour, cannot be read.
        """
        base = number * GROUP_BLOCKS
        if self.free[number] <= 0:
            return []
        if self.is_unused(number):
            runs = [(base, GROUP_BLOCKS)]
        else:
            runs = zero_runs(np.frombuffer(self.group(number).busy, np.uint8), base)
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
        """How many blocks `release(generation)` would make allocatable, the map's own left out."""
        return sum(
            count
            for freed, runs in self._pending.items()
            if freed <= generation
            for _, count in runs
        )

    # --- commit -----------------------------------------------------------------------------------

    @property
    def dirty_groups(self) -> int:
        return len(self._dirty)

    def dirty_pages(self) -> list[tuple[int, int]]:
        """(level, number) of each page that `freeze` needs an address for, in its order."""
        numbers = sorted(self._dirty)
        wanted = [(0, number) for number in numbers if self._groups[number].references.any()]
        return wanted + self.index.pages_above(numbers)

    def freeze(self, generation: int, places: list[tuple[int, int]]) -> FrozenMap:
        """Copy the pages that this commit writes, and give them their addresses.

        The old addresses become pending in `generation`. A group without references loses its page.

        Args:
            generation: of the open transaction.
            places: (block, twin) for each page of `dirty_pages`, in that order.
        """
        addresses = iter(places)
        numbers = sorted(self._dirty)
        pages = []
        below = self.index.levels[0]
        for number in numbers:
            group = self._groups[number]
            inside = self._blocks_inside(number)
            free = inside - int(np.count_nonzero(group.references))
            self._drop_place(0, number, generation)
            if free < inside:
                block, twin = next(addresses)
                below[number] = (block, twin, generation, b"", free, int(self.kinds[number]), b"")
                pages.append((number, block, twin, group.references.tobytes()))
                group.holds += 1
            else:
                self.kinds[number] = 0
                below[number] = np.zeros((), INDEX_ENTRY)
            group.dirty = False
        self._dirty.clear()
        above = self.index.pages_above(numbers)
        for level, number in above:
            self._drop_place(level, number, generation)
        index = self.index.freeze(above, addresses, generation)
        assert next(addresses, None) is None, "more addresses than pages"
        return FrozenMap(generation, pages, index)

    def _drop_place(self, level: int, number: int, generation: int) -> None:
        entry = self.index.levels[level][number]
        self._drop_system(int(entry["block"]), generation)
        self._drop_system(int(entry["twin"]), generation)

    def written(self, frozen: FrozenMap) -> None:
        """The commit of `frozen` is durable: keep the checksums of its pages for later reads."""
        for number, _, _, _ in frozen.pages:
            self._groups[number].holds -= 1
        self.index.keep_checksums(frozen)


def _bounds(part: np.ndarray) -> tuple[int, int]:
    """The lowest and the highest of some refcounts."""
    if len(part) <= SHORT_BLOCKS:
        counts = part.tolist()
        return min(counts), max(counts)
    return int(part.min()), int(part.max())
