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

from cowfs.errors import CorruptError, DeviceError, ImageError, NoSpaceError, ReadOnlyError
from cowfs.storage.allocator import Allocator
from cowfs.storage.device import Buffer, Device
from cowfs.storage.format import (
    BLOCK_SIZE_BYTES,
    DATA_CHECKSUM_BYTES,
    GROUP_BLOCKS,
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
from cowfs.storage.spacemap import Run, SpaceMap
from cowfs.storage.superblock import next_generation, read_earlier

log = logging.getLogger(__name__)

RETAINED_GENERATIONS = 2  # older ones kept whole beside the newest, for rescue

# What is held back of the image, so that a full one can still delete (C10): 1/32, within these limits.
RESERVE_BLOCKS_MIN = 512
RESERVE_BLOCKS_MAX = 32768
# How much of the reserve an operation must leave: adding all of it, removing half, dropping a snapshot
# a quarter; a commit may use it all. Where snapshots share nodes of the live tree, adding must leave
# TIER_CHURN and room for a copy of each of those: removing a name copies what a snapshot holds.
TIER_ADD, TIER_REMOVE, TIER_DROP = 4, 2, 1
TIER_CHURN = 3
# After commits did not help against ENOSPC, so many generations pass before they are tried again for
# a request that is no smaller: refusing must be cheap.
HOPELESS_GENERATIONS = 16

# With plenty of room, so many operations of at most so many blocks go on without another look: what
# they can need together was found to be there. A rename dirties a dozen nodes, two copies of each.
PASSES = 256
PASS_BLOCKS = 16
PASS_NEED_BLOCKS = PASS_BLOCKS + 128

# Nodes that a commit may take beside those that are dirty: of the catalog, and at splits.
COMMIT_NODES = 24

References = Callable[[list[bytes], list[Any]], list[Run]]


class Store:
    """An open image below its trees.

    Args:
        device: of the image; locked by the caller when `writable`.
        superblock: the newest, or the one to look at.
        writable: whether transactions may be made.
        cache_bytes: bound of the node cache.
    """

    def __init__(
        self,
        device: Device,
        superblock: Superblock,
        *,
        writable: bool,
        cache_bytes: int = CACHE_BYTES_DEFAULT,
    ) -> None:
        self.device = device
        self.superblock = superblock
        self.writable = writable
        self.failed: DeviceError | None = None
        self.generation = (
            next_generation(device, superblock) if writable else superblock.generation + 1
        )
        self.oldest_held = superblock.generation  # no block of it or a newer one was reused
        self.cache = NodeCache(cache_bytes)
        self.copies = 2 if superblock.duplicates_metadata else 1
        self.seed = superblock.seed
        self.repairs = Repairs()
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
        self.dirty_nodes = 0
        self._passes = 0  # operations that need not ask for room
        self.promised_blocks = 0  # data in memory that will need a block at the next freeze
        self.promised_items = 0  # items in memory that will go into leaves at the next freeze
        self.pins: dict[object, int] = {}  # generations that readers outside hold
        self.relieve: Callable[[], bool] | None = None  # commits, so that blocks come free
        self.full: Callable[[], None] | None = None  # told when ENOSPC begins
        self._said_full = False
        # Relief did not help: by how much it should have been enough, and in which generation.
        self._hopeless = (-1, -HOPELESS_GENERATIONS)
        # Nodes of the live tree, at most, that snapshots hold too: those born until `_shared_until`.
        self.shared_nodes = 0
        self._shared_until = 0
        self.data_writes: list[tuple[int, list[Buffer]]] = []
        self.queued_blocks = 0  # in `data_writes`
        self.unwritten: dict[int, Buffer] = {}  # data blocks that are allocated, not yet on disk
        self._frozen_nodes: dict[int, Node] = {}
        total = superblock.total_blocks
        self.reserve_blocks = max(RESERVE_BLOCKS_MIN, min(RESERVE_BLOCKS_MAX, total // 32))
        if writable:
            self._hold_retained()
            if self.generation > superblock.generation + 1:  # a promise reaches over no gap
                self.oldest_held = self.generation

    def _hold_retained(self) -> None:
        """Leave whole the generations that the superblock promises: the next crash may need them."""
        newest = self.superblock
        for generation in range(newest.generation - 1, newest.oldest_retained - 1, -1):
            if newest.generation - generation > RETAINED_GENERATIONS:
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
        self.dirty_nodes += 1
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
        if owner and node.generation <= self._shared_until:
            self.shared_nodes -= 1
        self.dirty_nodes += 1
        return Node(
            node.level, node.keys.copy(), node.values.copy(), node.used_bytes, generation, owner
        )

    def forget(self, node: Node) -> None:
        """Give up a node born in the open transaction."""
        assert node.generation == self.generation
        self.dirty_nodes -= 1

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

    # --- space --------------------------------------------------------------------------------------

    def metadata_need(self) -> int:
        """Blocks that the open transaction's commit takes beside data, at the most."""
        nodes = self.dirty_nodes + self.promised_items + COMMIT_NODES
        node_blocks = nodes * NODE_BLOCKS * self.copies
        groups = (
            self.map.dirty_groups + 8 + 2 * (node_blocks + self.promised_blocks) // GROUP_BLOCKS
        )
        return node_blocks + self.map.pages_to_write(groups) * self.copies

    def held_blocks(self, tier: int = TIER_ADD) -> int:
        """Blocks that an operation of that tier must leave."""
        held = self.reserve_blocks * tier // 4
        if tier == TIER_ADD and self.shared_nodes:
            return max(held, self._held_with(self.shared_nodes))
        return held

    def _held_with(self, shared_nodes: int) -> int:
        return self.reserve_blocks * TIER_CHURN // 4 + shared_nodes * NODE_BLOCKS * self.copies

    def available_blocks(self, tier: int = TIER_ADD) -> int:
        """Blocks that an operation of that tier may still ask for; what the next commits free counts."""
        room = self.map.free_blocks + self.map.pending_blocks - self.promised_blocks
        return room - self.held_blocks(tier)

    def share(self, nodes: int, until: int) -> None:
        """Snapshots hold nodes of the live tree: so many at most, all born in `until` or before."""
        self.shared_nodes = nodes
        self._shared_until = until
        self._passes = 0

    def admit(self, blocks: int, tier: int) -> None:
        """Let an operation go on that needs that many data blocks, and some metadata.

        Raises:
            NoSpaceError: it would not fit, also after the commits that bring blocks free.
            ReadOnlyError: nothing may change here.
            DeviceError: a commit failed before (C8).
        """
        if self.failed is not None:
            raise self.failed
        if not self.writable:
            raise ReadOnlyError("the image is open read-only")
        if self._passes and blocks <= PASS_BLOCKS:
            self._passes -= 1
            return
        if self._fits(blocks, tier, self.held_blocks(tier)):
            if self._fits(blocks + PASSES * PASS_NEED_BLOCKS, TIER_ADD, self.held_blocks()):
                self._passes = PASSES
            if self._said_full and self.available_blocks() > self.reserve_blocks:
                self._said_full = False
            return
        if not self._relieved(blocks, tier):
            if self.full is not None and not self._said_full:
                self._said_full = True
                self.full()
            raise NoSpaceError(
                "the filesystem is full; delete files or snapshots (cowdu shows which)"
            )

    def would_admit(self) -> bool:
        """Whether something small fits as it is; for what can as well be left out."""
        if self.failed is not None or not self.writable:
            return False
        return self._passes > 0 or self._fits(0, TIER_ADD, self.held_blocks())

    def admit_snapshot(self, nodes: int, *, relieve: bool) -> None:
        """Let a snapshot be made that shares all nodes of the live tree, if there is room to copy them.

        Deleting a file that a snapshot holds copies nodes and frees nothing. That room is promised
        when the snapshot is made, so that a full filesystem can always delete (C10).

        Args:
            relieve: commit if that may help; not while one is being frozen.

        Raises:
            NoSpaceError: there is no such room.
        """
        self.require_writable()
        missing = self._held_with(nodes) - self._room()
        if missing > 0:
            raise NoSpaceError(
                "no room for a snapshot: deleting files that it holds would need "
                f"{missing * BLOCK_SIZE_BYTES >> 10} KiB more than there is; delete files or "
                "snapshots first (cowdu shows which)"
            )
        places = self._held_with(nodes) // NODE_BLOCKS
        for _ in range(RETAINED_GENERATIONS + 2):
            if self.map.node_places(places) >= places:
                return
            if not relieve or self.relieve is None or not self.relieve():
                break
        raise NoSpaceError(
            "no room for a snapshot: what is free lies in pieces too small to delete files that it "
            "holds; delete files or snapshots first (cowdu shows which)"
        )

    def _room(self) -> int:
        """Blocks that the next commits leave free, less what each commit may take: at the most."""
        space = self.map
        ripe = space.free_blocks + space.pending_blocks + space.pending_system_blocks
        idle = COMMIT_NODES * NODE_BLOCKS * self.copies + space.pages_to_write(8) * self.copies
        return ripe - idle - self.dirty_nodes * NODE_BLOCKS * self.copies

    def _relieved(self, blocks: int, tier: int) -> bool:
        """Commit until an operation fits. Returns whether it does."""
        held = self.held_blocks(tier)
        hopeless, generation = self._hopeless
        spare = self._room() - blocks - held
        if (
            tier == TIER_ADD
            and spare <= hopeless
            and self.generation < generation + HOPELESS_GENERATIONS
        ):
            return False
        for _ in range(RETAINED_GENERATIONS + 2):
            spare = self._room() - blocks - held
            if spare < 0 and not self.promised_items:
                return False  # not even if all that is pending were free
            if self.relieve is None or not self.relieve():
                break
            held = self.held_blocks(tier)
            if self._fits(blocks, tier, held):
                return True
        self._hopeless = (spare, self.generation)
        return False

    def _fits(self, blocks: int, tier: int, held: int) -> bool:
        need = blocks + self.promised_blocks + self.metadata_need()
        if self.map.free_blocks - need < held:
            return False
        # Nodes need blocks that lie together: free ones that lie apart are room for data only.
        copies = self.shared_nodes * NODE_BLOCKS * self.copies if tier == TIER_ADD else 0
        # `need` is the worst case of this commit. The margin is for those after it, in which single
        # blocks of data and of the map break places up: adding must leave four times that of removing.
        margin = self.reserve_blocks * tier // (8 if tier == TIER_ADD else 16)
        places = (need + margin + copies) // NODE_BLOCKS + 4
        return self.map.node_places(places) >= places

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
        limit = self.generation - RETAINED_GENERATIONS
        return min([limit, *self.pins.values()])

    def oldest_retained(self) -> int:
        """The oldest generation that the open transaction's commit leaves whole."""
        return max(self.oldest_held, self.generation - RETAINED_GENERATIONS)

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
        self.failed = DeviceError(
            f"generation {self.superblock.generation + 1} was not written: {error}; "
            "unmount and mount again"
        )

    def require_writable(self) -> None:
        """Raise the error that ends every change here, if there is one."""
        if self.failed is not None:
            raise self.failed
        if not self.writable:
            raise ReadOnlyError("the image is open read-only")


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
