"""The transaction manager: reads and allocates nodes and data blocks, and overwrites none in use.

One transaction is open at any time; `generation` is its number. Reading, changing and freezing are
synchronous calls of one thread. commit.py writes what was frozen, from any thread: nobody changes
frozen nodes and buffers any more. Until the commit is durable, reads find its blocks in memory.

May assume: the device keeps what it flushed. Keeps I1 (shadowing counts references), I2 (a block
that is in use, or that a retained generation shows, is never allocated) and I4.
Source: Rodeh, "B-trees, Shadowing, and Clones", 2008, section 3; FORMAT.md "Nodes".
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from msgspec.structs import replace
from xxhash import xxh3_64_digest

from cowfs.errors import CorruptError, DeviceError, ImageError, ReadOnlyError
from cowfs.storage.admission import DEFAULT_LIMITS, Admission, Limits
from cowfs.storage.allocator import Allocator
from cowfs.storage.device import Buffer, Device
from cowfs.storage.discards import Discard
from cowfs.storage.format import (
    BLOCK_SIZE_BYTES,
    DATA_CHECKSUM_BYTES,
    INCOMPAT_LOG,
    KIND_DATA,
    KIND_NODES,
    KIND_TWINS,
    LOG_AREAS,
    NODE_BLOCKS,
    NODE_SIZE_BYTES,
    NULL_POINTER,
    RING_SLOTS,
    LogPlace,
    NodeImage,
    Pointer,
    Superblock,
    check_pointer,
    decode_node,
    ring_blocks,
)
from cowfs.storage.log import Log, find_log_place, write_zeros
from cowfs.storage.log_records import has_records
from cowfs.storage.node import CACHE_BYTES_DEFAULT, Node, NodeCache, node_from_image
from cowfs.storage.repairs import Repairs, good_copy
from cowfs.storage.runs import Run
from cowfs.storage.spacemap import SpaceMap
from cowfs.storage.superblock import next_generation, read_earlier

log = logging.getLogger(__name__)

# Gives the data runs that the items (keys, values) of a leaf point at.
References = Callable[[list[bytes], list[Any]], list[Run]]


class Store:
    """An open image, below its trees.

    Args:
        device: that holds the image; the caller has locked it when `writable`.
        superblock: of the generation to open; the newest when `writable`.
        writable: whether transactions may be made.
        cache_bytes: limit of the node cache.
        limits: of admission.

    Attributes:
        superblock: of the newest durable generation.
        generation: number of the open transaction.
        oldest_held: from this generation on, no block has been allocated that a generation shows.
        failed: why writing has ended (C8), None as long as it goes on.
        failed_ns: when it ended.
        discard: the discard under way in another thread, if there is one.
        pins: generations that readers outside (check, cowdu) hold, by reader.
        data_writes: (first block, buffers) of the data that the next commit writes.
        queued_blocks: number of blocks in `data_writes`.
        unwritten: data blocks that are allocated and not on disk yet.
        log: of the calls since the newest durable generation.
    """

    def __init__(
        self,
        device: Device,
        superblock: Superblock,
        *,
        writable: bool,
        cache_bytes: int = CACHE_BYTES_DEFAULT,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.device = device
        self.superblock = superblock
        self.writable = writable
        self.failed: DeviceError | None = None
        self.failed_ns: int | None = None
        self.generation = (
            next_generation(device, superblock) if writable else superblock.generation + 1
        )
        self.oldest_held = superblock.generation
        self.cache = NodeCache(cache_bytes)
        self.copies = 2 if superblock.duplicates_metadata else 1
        self.seed = superblock.seed
        self.repairs = Repairs()
        self.discard: Discard | None = None
        self.map = SpaceMap(
            device,
            superblock.total_blocks,
            superblock.image_id,
            superblock.seed,
            self.repairs,
            writable=writable,
        )
        if superblock.space_map != NULL_POINTER:
            self.map.open(superblock.space_map, superblock.used_blocks)
        self.allocator = Allocator(self.map)
        self._retained = limits.retained_generations
        self.admission = Admission(self.map, self.copies, limits)
        self.log = Log(device, superblock, limits, is_empty=not has_records(device, superblock))
        self._keep_log(superblock.log)
        if not writable:
            self.admission.closed = ReadOnlyError("the image is open read-only")
        self.admission.begin_transaction(self.generation)
        self.admission.give_up_retained = self.give_up_retained
        self.pins: dict[object, int] = {}
        self.data_writes: list[tuple[int, list[Buffer]]] = []
        self.queued_blocks = 0
        self.unwritten: dict[int, Buffer] = {}
        self._frozen_nodes: dict[int, Node] = {}
        if writable:
            self._hold_retained()
            if self.generation > superblock.generation + 1:  # not promised across a gap in the ring
                self.oldest_held = self.generation

    def _hold_retained(self) -> None:
        """Make pending what the generations show that the superblock promises to keep.

        The next crash may need them.
        """
        newest = self.superblock
        for generation in range(newest.generation - 1, newest.oldest_retained - 1, -1):
            if newest.generation - generation > self._retained:
                return
            try:
                earlier = read_earlier(self.device, newest, generation)
                if earlier is None:
                    return
                self.map.hold(earlier.space_map, generation)
            except (CorruptError, DeviceError, ImageError):
                return  # this generation is lost; so nothing older is promised either
            self.oldest_held = generation

    def _keep_log(self, place: LogPlace | None) -> None:
        """Keep the blocks of the log out of allocation, and use the log only if they are free.

        Raises:
            CorruptError: the log lies on the rings or on pages of the space map.
        """
        if place is None:
            return
        count = LOG_AREAS * place.area_blocks
        for first in place.copies:
            self.map.keep(first, count)
        if self.writable and any(self.map.refcounts(first, count).any() for first in place.copies):
            log.error("the log lies on blocks that are in use, and is not written; run cowfs check")
            self.log.close()

    def make_log(self) -> bool:
        """Give an image that has no log one, if there is room. The next commit makes it the log.

        Returns:
            Whether it has one now.

        Raises:
            DeviceError: its blocks cannot be written.
        """
        place = find_log_place(self.map, self.copies)
        if place is None:
            return False
        write_zeros(self.device, place)
        for first in place.copies:
            self.map.keep(first, LOG_AREAS * place.area_blocks)
        old = self.superblock
        self.superblock = replace(old, incompat=old.incompat | INCOMPAT_LOG, log=place)
        return True

    def continue_after(self, others: Sequence[Superblock]) -> None:
        """Continue from `superblock` although the ring names newer generations.

        Blocks that the other generations show are not allocated until the second commit from now is
        durable, as far as their space maps can be read. None of them is promised to stay whole.

        Args:
            others: the superblocks of the other generations that may be whole, newest first. The
                store was opened with the number of the newest.
        """
        for other in others:
            try:
                self.map.hold(other.space_map, self.superblock.generation)
            except (CorruptError, DeviceError) as error:
                log.warning("generation %d cannot be kept whole: %s", other.generation, error)
        self.oldest_held = self.generation

    # --- nodes ------------------------------------------------------------------------------------

    def load(self, pointer: Pointer, level: int | None) -> Node:
        """Return the node at `pointer`, from the cache or from disk.

        Args:
            level: that the parent expects; None for a root.

        Raises:
            CorruptError: both copies are damaged (C9).
            DeviceError: neither copy can be read.
        """
        block = pointer.block
        node = self.cache.get(block) or self._frozen_nodes.get(block)
        if node is not None and node.generation == pointer.birth:
            if level is not None and node.level != level:
                raise CorruptError("node", block, "level is wrong", node.level, level)
            return node
        check_pointer(pointer, self.superblock.total_blocks, self.generation, "node", block)
        node = node_from_image(self.read_image(pointer, level), pointer)
        if node.level:
            for child in node.values:
                check_pointer(child, self.superblock.total_blocks, node.generation, "node", block)
        self.cache.put(node)
        return node

    def read_image(self, pointer: Pointer, level: int | None) -> NodeImage:
        """Read and decode a node past the cache; for reading whole trees.

        The twin is taken, and a repair queued, if the first copy is bad. The pointers to the
        children are not checked: the caller does that. Raises as `load`.
        """
        problem: CorruptError | DeviceError | None = None
        for block in (pointer.block, pointer.twin):
            if not block:
                continue
            try:
                data = self.device.read(block * BLOCK_SIZE_BYTES, NODE_SIZE_BYTES)
                image = decode_node(data, pointer, self.superblock.image_id, self.seed, level)
                if problem is not None:
                    self.repairs.add(pointer.block, block, data, problem)
                return image
            except (CorruptError, DeviceError) as error:
                problem = problem or error
        assert problem is not None
        raise problem

    def offer_repair(
        self, kind: str, bad_block: int, good_block: int, birth: int, checksum: bytes
    ) -> bool:
        """Queue the repair of a bad copy that a reader of the image found, if it can be confirmed.

        Args:
            kind: "node", "page" (of the space map) or "slot" (of the ring).
            bad_block, good_block: first blocks of the two copies.
            birth, checksum: of the pointer to the node or page; unused for a slot.

        Returns:
            Whether the next commit rewrites the bad copy.

        Raises:
            ReadOnlyError: the image is open read-only.
            DeviceError: writing has ended (C8), or the good copy cannot be read.
        """
        self.require_writable()
        total = self.superblock.total_blocks
        ring = [range(first, first + RING_SLOTS) for first in ring_blocks(total)]
        size = NODE_BLOCKS if kind == "node" else 1
        for block in (bad_block, good_block):
            if kind == "slot":
                if not any(block in copy for copy in ring):
                    return False
            elif not RING_SLOTS <= block <= total - RING_SLOTS - size:
                return False
            elif not self.map.is_busy(block):
                return False  # freed since it was found
        if kind == "slot":
            places = sorted((bad_block, good_block))
            if places[0] + ring[1][0] != places[1]:
                return False
        elif kind not in ("node", "page") or not 0 < birth <= self.superblock.generation:
            return False
        data = good_copy(self.device, kind, bad_block, good_block, checksum, self.seed)
        if data is None:
            return False
        self.repairs.add(bad_block, good_block, data, f"bad copy of a {kind} at block {bad_block}")
        return True

    def new_node(
        self, level: int, keys: list[bytes], values: list[Any], used: int, owner: int
    ) -> Node:
        """Make a node, born in the open transaction. `used`: bytes that the entries take."""
        self.admission.dirty_nodes += 1
        return Node(level, keys, values, used, self.generation, owner)

    def shadow(self, node: Node, owner: int, references: References) -> Node:
        """Give a copy of `node` that this transaction may change, or `node` itself if it is one.

        The old node loses one reference. If others share the old node, each of its children gains a
        reference for the copy; otherwise the copy takes the children over.

        Args:
            node: reachable from a root of this transaction.
            owner: root id that the copy will carry.
            references: gives the data runs that the items of a leaf point at.

        Raises:
            CorruptError: a refcount is wrong, or its page is damaged (EIO).
            DeviceError: a page of refcounts cannot be read (EIO).

        Source: Rodeh 2008, section 3. Keeps I1, I2.
        """
        generation = self.generation
        if node.generation == generation:
            return node
        if node.twin:
            self.map.require(node.twin, NODE_BLOCKS)
        if self.map.refcount(node.block) > 1:
            # All pages are loaded before the first count is raised: after that nothing may fail.
            runs: list[Run]
            if node.level:
                places = [place for child in node.values for place in (child.block, child.twin)]
                runs = [(place, NODE_BLOCKS) for place in places if place]
            else:
                runs = references(node.keys, node.values)
            for first, count in runs:
                self.map.require(first, count)
            for first, count in runs:
                self.map.add(first, count)
        self.drop_reference(node.block, node.twin)
        admission = self.admission
        if owner:
            admission.count_copy(node.generation)
        admission.dirty_nodes += 1
        return Node(
            node.level, node.keys.copy(), node.values.copy(), node.used_bytes, generation, owner
        )

    def forget(self, node: Node) -> None:
        """Discard a node born in the open transaction."""
        assert node.generation == self.generation
        self.admission.dirty_nodes -= 1

    def add_reference(self, block: int, twin: int) -> None:
        """Count one more parent of a node and of its twin (0: no twin)."""
        self.map.add(block, NODE_BLOCKS)
        if twin:
            self.map.add(twin, NODE_BLOCKS)

    def drop_reference(self, block: int, twin: int) -> int:
        """Count one parent less. Returns the number of blocks freed, twin included."""
        freed = self.map.drop(block, NODE_BLOCKS, self.generation)
        if twin:
            freed += self.map.drop(twin, NODE_BLOCKS, self.generation)
        return freed

    # --- data -------------------------------------------------------------------------------------

    def write_data(self, blocks: Sequence[Buffer]) -> list[tuple[int, int, bytes]]:
        """Allocate blocks for data, and queue the data for the next commit.

        Args:
            blocks: BLOCK_SIZE_BYTES each, in file order.

        Returns:
            Runs (first block, count, checksums of DATA_CHECKSUM_BYTES each) in the same order.

        Raises:
            NoSpaceError: no room, though `Admission.admit` should have found it.
        """
        seed = self.seed
        runs = []
        at = 0
        for first, count in self.allocator.allocate(KIND_DATA, len(blocks)):
            part = list(blocks[at : at + count])
            at += count
            checksums = b"".join([xxh3_64_digest(block, seed) for block in part])
            runs.append((first, count, checksums))
            self.data_writes.append((first, part))
            self.queued_blocks += count
            self.unwritten.update(zip(range(first, first + count), part, strict=True))
        return runs

    def read_data(
        self, first: int, count: int, checksums: bytes, owner: str, *, wait: bool = True
    ) -> Buffer | None:
        """Read a run of data blocks, and verify each block.

        Args:
            checksums: DATA_CHECKSUM_BYTES for each block.
            owner: what the data belongs to, for the message of an error.
            wait: read from the disk if necessary; without it, only what needs no wait.

        Returns:
            The bytes; None where `wait` is False and the read would wait.

        Raises:
            CorruptError: a block has another checksum (C9), or the run leaves the image.
            DeviceError: the device cannot read it.
        """
        if self.unwritten and not self.unwritten.keys().isdisjoint(range(first, first + count)):
            return self._read_unwritten(first, count, checksums, owner)
        if not RING_SLOTS <= first <= self.superblock.total_blocks - RING_SLOTS - count:
            raise CorruptError(owner, first, "an extent leaves the image")
        offset, size = first * BLOCK_SIZE_BYTES, count * BLOCK_SIZE_BYTES
        data: Buffer | None
        data = self.device.read(offset, size) if wait else self.device.read_cached(offset, size)
        if data is None:
            return None
        self._verify(data, first, checksums, owner)
        return data

    def _verify(self, data: Buffer, first: int, checksums: bytes, owner: str) -> None:
        seed = self.seed
        view = memoryview(data)
        found = b"".join(
            [
                xxh3_64_digest(view[at : at + BLOCK_SIZE_BYTES], seed)
                for at in range(0, len(data), BLOCK_SIZE_BYTES)
            ]
        )
        if found != checksums:
            step = DATA_CHECKSUM_BYTES
            bad = next(
                at // step
                for at in range(0, len(found), step)
                if found[at : at + step] != checksums[at : at + step]
            )
            raise CorruptError(owner, first + bad, "checksum is wrong")

    def _read_unwritten(self, first: int, count: int, checksums: bytes, owner: str) -> Buffer:
        parts: list[Buffer] = []
        for index in range(count):
            part = self.unwritten.get(first + index)
            if part is None:
                part = self.device.read((first + index) * BLOCK_SIZE_BYTES, BLOCK_SIZE_BYTES)
                start = index * DATA_CHECKSUM_BYTES
                checksum = checksums[start : start + DATA_CHECKSUM_BYTES]
                self._verify(part, first + index, checksum, owner)
            parts.append(part)
        return b"".join(parts)

    # --- freezing ---------------------------------------------------------------------------------

    def place(self, root: Node | Pointer) -> list[Node]:
        """Give every dirty node under `root` its address.

        Returns:
            The dirty nodes, children before parents.
        """
        if root.__class__ is Pointer or root.generation != self.generation:  # type: ignore[union-attr]
            return []
        nodes: list[Node] = []
        _collect(root, self.generation, nodes)  # type: ignore[arg-type]
        blocks = self._places(KIND_NODES, len(nodes), NODE_BLOCKS, system=False)
        twins = (
            self._places(KIND_TWINS, len(nodes), NODE_BLOCKS, system=False)
            if self.copies == 2
            else [0] * len(nodes)
        )
        for node, block, twin in zip(nodes, blocks, twins, strict=True):
            node.block, node.twin = block, twin
            self.cache.forget(block)  # drop the node that was here before
            self._frozen_nodes[block] = node
        return nodes

    def _places(self, kind: int, count: int, unit: int, *, system: bool) -> list[int]:
        return [
            block
            for first, length in self.allocator.allocate(kind, count * unit, unit, system=system)
            for block in range(first, first + length, unit)
        ]

    def place_map(self) -> list[tuple[int, int]]:
        """Allocate (block, twin) for each page of the space map that this commit writes."""
        count = len(self.map.dirty_pages())
        blocks = self._places(KIND_NODES, count, 1, system=True)
        twins = self._places(KIND_TWINS, count, 1, system=True) if self.copies == 2 else [0] * count
        return list(zip(blocks, twins, strict=True))

    def release_limit(self) -> int:
        """The newest generation whose freed blocks are released after the next commit (I2)."""
        return min([self.generation - self._retained, *self.pins.values()])

    def give_up_retained(self) -> bool:
        """Give up the retained generations before the newest durable one: the image is too full.

        Blocks that only they show can be allocated afterwards. Readers' pins of them are dropped.

        Returns:
            Whether any block became free.
        """
        newest, before = self.superblock.generation, self.map.free_blocks
        self.map.release(newest)
        if self.map.free_blocks == before:
            return False
        log.warning(
            "the image is full: generations before %d are given up, to make room for deleting",
            newest,
        )
        self.pins = {pin: held for pin, held in self.pins.items() if held >= newest}
        self.oldest_held = max(self.oldest_held, newest)
        return True

    def oldest_retained(self) -> int:
        """The oldest generation that is whole once the open transaction is committed."""
        return max(self.oldest_held, self.generation - self._retained)

    def settle(self, nodes: Sequence[Node], data: Sequence[tuple[int, list[Buffer]]]) -> None:
        """A commit is durable: cache its nodes as clean, and forget its data in memory."""
        for node in nodes:
            del self._frozen_nodes[node.block]
            self.cache.put(node)
        for first, blocks in data:
            for block in range(first, first + len(blocks)):
                self.unwritten.pop(block, None)

    def fail(self, error: Exception) -> None:
        """End all writing until the image is opened again; the newest generation stays (C8)."""
        log.error(
            "%s; the filesystem is read-only now, generation %d is intact",
            error,
            self.superblock.generation,
        )
        self.failed_ns = time.time_ns()
        self.failed = DeviceError(
            f"generation {self.superblock.generation + 1} was not written: {error}; "
            "unmount and mount again"
        )
        self.admission.closed = self.failed

    def require_durable(self, error: Exception | None) -> None:
        """Take the result of a write in another thread. Raises DeviceError if it failed (C8)."""
        if error is not None:
            if self.failed is None:
                self.fail(error)
            assert self.failed is not None
            raise self.failed

    def require_writable(self) -> None:
        """Raise ReadOnlyError or DeviceError if the image cannot be changed (any more)."""
        if self.admission.closed is not None:
            raise self.admission.closed


def _collect(node: Node, generation: int, nodes: list[Node]) -> None:
    """Append the dirty nodes under `node` and itself to `nodes`, children before parents."""
    if node.level:
        for child in node.values:
            if child.__class__ is Node and child.generation == generation:
                _collect(child, generation, nodes)
    nodes.append(node)
