"""The transaction manager: nodes and data blocks in, nodes and data blocks out, never overwritten.

One transaction is open at any time; `generation` is its number, one above the last that was frozen.
Reading, changing and freezing are plain synchronous calls of one thread. What was frozen is written by
`commit.py`, from any thread, on nodes and buffers that nobody changes any more; until it is durable
reads find its blocks in memory.

May assume: the device keeps what it flushed. Keeps I1 (shadowing counts references), I2 (a block in
use, or shown by a retained generation, is never allocated) and I4.
Source: Rodeh, "B-trees, Shadowing, and Clones", 2008, section 3; FORMAT.md "Nodes".
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from xxhash import xxh3_64_digest

from cowfs.errors import CorruptError, DeviceError, ImageError, ReadOnlyError
from cowfs.storage.admission import DEFAULT_LIMITS, Admission, Limits
from cowfs.storage.allocator import Allocator
from cowfs.storage.device import Buffer, Device
from cowfs.storage.discards import Discard
from cowfs.storage.format import (
    BLOCK_SIZE_BYTES,
    DATA_CHECKSUM_BYTES,
    INCOMPAT_DUPLICATED_METADATA,
    KIND_DATA,
    KIND_NODES,
    KIND_TWINS,
    NODE_BLOCKS,
    NODE_SIZE_BYTES,
    NULL_POINTER,
    RING_SLOTS,
    NodeImage,
    Pointer,
    Superblock,
    check_pointer,
    decode_node,
    ring_blocks,
)
from cowfs.storage.node import CACHE_BYTES_DEFAULT, Node, NodeCache, node_from_image
from cowfs.storage.repairs import Repairs, good_copy
from cowfs.storage.runs import Run
from cowfs.storage.spacemap import SpaceMap
from cowfs.storage.superblock import next_generation, read_earlier

log = logging.getLogger(__name__)

References = Callable[[list[bytes], list[Any]], list[Run]]


class Store:
    """An open image below its trees.

    Args:
        device: of the image; locked by the caller when `writable`.
        superblock: the newest, or the one to look at.
        writable: whether transactions may be made.
        cache_bytes: bound of the node cache.
        limits: of admission.
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
        self.failed_ns: int | None = None  # when
        self.generation = (
            next_generation(device, superblock) if writable else superblock.generation + 1
        )
        self.oldest_held = superblock.generation  # no block of it or a newer one was reused
        self.cache = NodeCache(cache_bytes)
        self.copies = 2 if superblock.duplicates_metadata else 1
        self.seed = superblock.seed
        self.repairs = Repairs()
        self.discard: Discard | None = None  # under way, in another thread
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
        if not writable:
            self.admission.closed = ReadOnlyError("the image is open read-only")
        self.admission.opened(self.generation)
        self.admission.let_go = self.let_go
        self.pins: dict[object, int] = {}  # generations that readers outside hold
        self.data_writes: list[tuple[int, list[Buffer]]] = []
        self.queued_blocks = 0  # in `data_writes`
        self.unwritten: dict[int, Buffer] = {}  # data blocks that are allocated, not yet on disk
        self._frozen_nodes: dict[int, Node] = {}
        if writable:
            self._hold_retained()
            if self.generation > superblock.generation + 1:  # a promise reaches over no gap
                self.oldest_held = self.generation

    def _hold_retained(self) -> None:
        """Leave whole the generations that the superblock promises: the next crash may need them."""
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
                return  # it is lost already; nothing older can be promised either
            self.oldest_held = generation

    def continue_after(self, others: Sequence[Superblock]) -> None:
        """Let the next commits be made from this superblock, though the ring names newer ones.

        What the others show is not allocated before the second commit from now is durable, as far as
        their space maps can be read. None of them is promised to be whole any more.

        Args:
            others: the other superblocks of the image that may be whole, newest first; the store was
                opened with the number of the newest.
        """
        for other in others:
            try:
                self.map.hold(other.space_map, self.superblock.generation)
            except (CorruptError, DeviceError) as error:
                log.warning("generation %d cannot be kept: %s", other.generation, error)
        self.oldest_held = self.generation

    # --- nodes --------------------------------------------------------------------------------------

    def load(self, pointer: Pointer, level: int | None) -> Node:
        """The node at `pointer`, from the cache or the disk; repaired reads come from its twin.

        Args:
            level: that the parent expects; None for a root.

        Raises:
            CorruptError: both copies are damaged (C9).
            DeviceError: neither can be read.
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
        """The node on disk, checked for itself: whoever takes it looks at its children's pointers.

        For reading whole trees, past the cache. Raises as `load`.
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
        """Somebody who read the image found a bad copy. It is believed only as far as it can be seen.

        Args:
            kind: "node", "page" (of the space map) or "slot" (of the ring).
            birth, checksum: of the pointer at it.

        Returns:
            Whether it will be written again by the next commit.

        Raises:
            ReadOnlyError, DeviceError: nothing can be written.
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
                return False  # freed meanwhile
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
        """A node born in the open transaction."""
        self.admission.dirty_nodes += 1
        return Node(level, keys, values, used, self.generation, owner)

    def shadow(self, node: Node, owner: int, references: References) -> Node:
        """Give a copy of `node` that this transaction may write; `node` itself if it already may.

        The old place is dropped. Where others share the old node, each of its children gains the
        reference that the copy holds; otherwise the copy takes over the children.

        Args:
            node: reachable from a root of this transaction.
            owner: root id that the copy will carry.
            references: the data runs that a leaf's items point at.

        Raises:
            CorruptError: refcounts are wrong, or cannot be read (EIO).

        Source: Rodeh 2008, section 3. Keeps I1, I2.
        """
        generation = self.generation
        if node.generation == generation:
            return node
        if node.twin:
            self.map.require(node.twin, NODE_BLOCKS)
        if self.map.refcount(node.block) > 1:
            # What cannot be read must stop us before the first count is raised.
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
            admission.copied_from(node.generation)
        admission.dirty_nodes += 1
        return Node(
            node.level, node.keys.copy(), node.values.copy(), node.used_bytes, generation, owner
        )

    def forget(self, node: Node) -> None:
        """Give up a node born in the open transaction."""
        assert node.generation == self.generation
        self.admission.dirty_nodes -= 1

    def add_reference(self, block: int, twin: int) -> None:
        """One more parent points at this node."""
        self.map.add(block, NODE_BLOCKS)
        if twin:
            self.map.add(twin, NODE_BLOCKS)

    def drop_reference(self, block: int, twin: int) -> int:
        """One parent less points at this node. Returns the number of blocks freed, twin included."""
        freed = self.map.drop(block, NODE_BLOCKS, self.generation)
        if twin:
            freed += self.map.drop(twin, NODE_BLOCKS, self.generation)
        return freed

    # --- data ---------------------------------------------------------------------------------------

    def write_data(self, blocks: Sequence[Buffer]) -> list[tuple[int, int, bytes]]:
        """Allocate and hand over whole blocks, to be written with the next commit.

        Args:
            blocks: BLOCK_SIZE_BYTES each, in file order.

        Returns:
            Runs (first block, count, checksums of DATA_CHECKSUM_BYTES each) in the same order.

        Raises:
            NoSpaceError: they do not fit; `admit` should have been asked first.
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
        """The bytes of a run of data blocks, each verified.

        Args:
            owner: for the message when it is damaged.
            wait: read from the disk if need be; otherwise None says that it would wait.

        Raises:
            CorruptError: a block is not what was written (C9).
            DeviceError: it cannot be read.
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

    # --- freezing -----------------------------------------------------------------------------------

    def place(self, root: Node | Pointer) -> list[Node]:
        """Give every dirty node under `root` its address. Returns them, children before parents."""
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
            self.cache.forget(block)  # what the block held in an earlier life
            self._frozen_nodes[block] = node
        return nodes

    def _places(self, kind: int, count: int, unit: int, *, system: bool) -> list[int]:
        return [
            block
            for first, length in self.allocator.allocate(kind, count * unit, unit, system=system)
            for block in range(first, first + length, unit)
        ]

    def place_map(self) -> list[tuple[int, int]]:
        """A place (block, twin) for each page of the space map that this commit writes."""
        count = len(self.map.dirty_pages())
        blocks = self._places(KIND_NODES, count, 1, system=True)
        twins = self._places(KIND_TWINS, count, 1, system=True) if self.copies == 2 else [0] * count
        return list(zip(blocks, twins, strict=True))

    def release_limit(self) -> int:
        """The newest generation whose freed blocks may be allocated, once this commit is durable."""
        return min([self.generation - self._retained, *self.pins.values()])

    def let_go(self) -> bool:
        """Let go of the retained generations before the newest durable one: the image is too full.

        What only they show can be allocated then. A reader's pin of them does not hold any more.

        Returns:
            Whether there was anything.
        """
        newest, before = self.superblock.generation, self.map.free_blocks
        self.map.release(newest)
        if self.map.free_blocks == before:
            return False
        log.warning(
            "the image is so full that earlier generations than %d are given up to delete snapshots",
            newest,
        )
        self.pins = {pin: held for pin, held in self.pins.items() if held >= newest}
        self.oldest_held = max(self.oldest_held, newest)
        return True

    def oldest_retained(self) -> int:
        """The oldest generation that the open transaction's commit leaves whole."""
        return max(self.oldest_held, self.generation - self._retained)

    def settle(self, nodes: Sequence[Node], data: Sequence[tuple[int, list[Buffer]]]) -> None:
        """A commit is durable: its nodes are clean, its data is read from disk from now on."""
        for node in nodes:
            del self._frozen_nodes[node.block]
            self.cache.put(node)
        for first, blocks in data:
            for block in range(first, first + len(blocks)):
                self.unwritten.pop(block, None)

    def fail(self, error: Exception) -> None:
        """End all writing for good: the open transaction is lost, the last generation stays (C8)."""
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

    def require_writable(self) -> None:
        """Raise the error that ends every change here, if there is one."""
        if self.admission.closed is not None:
            raise self.admission.closed


def _collect(node: Node, generation: int, nodes: list[Node]) -> None:
    if node.level:
        for child in node.values:
            if child.__class__ is Node and child.generation == generation:
                _collect(child, generation, nodes)
    nodes.append(node)


def blank_superblock(
    total_blocks: int, *, label: str = "", duplicate_metadata: bool = True
) -> Superblock:
    """The superblock of generation 0, before the first commit of a new image: it is never written."""
    now_ns = time.time_ns()
    uuid = os.urandom(16)
    return Superblock(
        uuid=uuid,
        # Every node carries it as its image id: known also when both rings are lost (care/scan.py).
        seed=int.from_bytes(uuid[:8], "little"),
        name_seed=int.from_bytes(os.urandom(8), "little"),
        generation=0,
        total_blocks=total_blocks,
        committed_ns=now_ns,
        created_ns=now_ns,
        label=label,
        incompat=INCOMPAT_DUPLICATED_METADATA if duplicate_metadata else 0,
    )
