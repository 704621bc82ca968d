"""Admission: whether there is room for an operation, before it changes anything.

A full filesystem must always be able to delete (C10), and a freeze must always find the blocks that it
needs. So part of the image is held back, in *tiers*: an operation that adds leaves all of it, one that
removes leaves half, the drop queue a quarter, and a commit may use the rest.

Every number that the decision rests on is kept here and changed by the methods here: what is
*promised* (data and items in memory that the next freeze will place), how many nodes are dirty, and how
many nodes the snapshots share with the live tree. `admit` compares the worst case of the next commit
with what is free; when that does not fit it asks for *relief*, commits that let freed blocks go.

A full comparison costs microseconds, so a comparison that finds plenty of room sets *ceilings*: up to
them the promised blocks, the promised items, the dirty nodes and the dirty groups may grow without
another comparison. The ceilings bound what is in memory, not a number of calls, so no operation can go
round them; and they end with the transaction in which they were set.

Knows nothing of trees and files, and needs no numpy: what names an edit starts fast. Keeps C10.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cowfs.errors import CowfsError, NoSpaceError
from cowfs.storage.format import BLOCK_SIZE_BYTES, GROUP_BLOCKS, NODE_BLOCKS

if TYPE_CHECKING:
    from cowfs.storage.spacemap import SpaceMap

# How many quarters of the reserve an operation must leave.
TIER_ADD, TIER_REMOVE, TIER_DROP, TIER_FREE = 4, 2, 1, 0
# Where snapshots share nodes of the live tree, adding leaves that many quarters and a place for a
# copy of each shared node: removing a name copies what a snapshot holds.
TIER_CHURN = 3
# Data blocks whose extents one block of a leaf describes, at the least, when they lie in long runs: 8
# bytes of checksum for each, and leaves may be half full.
DATA_BLOCKS_PER_LEAF_BLOCK = 256


@dataclass(frozen=True, slots=True)
class Limits:
    """Everything in admission that was chosen and not measured from the image. Tests shrink it.

    Attributes:
        reserve_part: one part of so many of the image is held back, within the next two.
        reserve_blocks_min, reserve_blocks_max: bounds of the reserve, in blocks.
        retained_generations: generations kept whole beside the newest, for rescue.
        commit_nodes: nodes that a commit may take beside the dirty ones: of the catalog, at splits.
        commit_groups: pages of refcounts that a commit may take beside the dirty ones.
        freeing_nodes, freeing_groups: the same for a commit that only frees, whose own nodes are
            counted one by one. What frees must be possible from any state.
        operation_nodes: nodes that one operation dirties, at the most (a rename dirties a dozen).
        ceiling_operations: operations that the ceilings make room for.
        ceiling_blocks: data blocks of each of these.
        hopeless_generations: after relief failed, generations that pass before it is tried again for a
            request that is no smaller: refusing must be cheap.
    """

    reserve_part: int = 32
    reserve_blocks_min: int = 512
    reserve_blocks_max: int = 32768
    retained_generations: int = 2
    commit_nodes: int = 24
    commit_groups: int = 8
    freeing_nodes: int = 2
    freeing_groups: int = 2
    operation_nodes: int = 16
    ceiling_operations: int = 256
    ceiling_blocks: int = 16
    hopeless_generations: int = 16

    def reserve_blocks(self, total_blocks: int) -> int:
        """Blocks held back of an image of that size."""
        wanted = total_blocks // self.reserve_part
        return max(self.reserve_blocks_min, min(self.reserve_blocks_max, wanted))


DEFAULT_LIMITS = Limits()


class Admission:
    """The room of one open image.

    Args:
        space_map: of the image.
        copies: of each node and page: 1 or 2.
        limits: of everything.

    Attributes:
        closed: why nothing may change any more; None as long as something may.
        relieve: commits so that freed blocks can be used; returns whether that could help. Set by the
            owner of the commits, None until then.
        let_go: lets go of the retained generations before the newest one, so that what only they show
            can be used without a commit; returns whether that was anything. For what frees, at last.
        on_full: called when ENOSPC begins, once until there is room again.
        promised_blocks: blocks of data in memory that the next freeze places.
        promised_items: items in memory that the next freeze puts into leaves.
        dirty_nodes: nodes born in the open transaction.
        shared_nodes: nodes of the live tree that snapshots share, at the most.
    """

    def __init__(
        self,
        space_map: SpaceMap,
        copies: int,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.limits = limits
        self.reserve_blocks = limits.reserve_blocks(space_map.total_blocks)
        self.closed: CowfsError | None = None
        self.relieve: Callable[[], bool] | None = None
        self.let_go: Callable[[], bool] | None = None
        self.on_full: Callable[[], None] | None = None
        self.promised_blocks = 0
        self.promised_items = 0
        self.dirty_nodes = 0
        self.shared_nodes = 0
        self.catalog_nodes = 0
        self._shared_until = 0
        self._map = space_map
        self._node_blocks = NODE_BLOCKS * copies  # that one node takes
        self._copies = copies
        self._generation = 0
        self._said_full = False
        self._block_ceiling = self._node_ceiling = self._group_ceiling = -1
        # Relief did not help: what was spare then, and in which generation.
        self._hopeless = (-1, -limits.hopeless_generations)

    # --- what is in memory --------------------------------------------------------------------------

    def promise(self, blocks: int, items: int) -> None:
        """Count data blocks and items that the next freeze will place; negative ones were placed."""
        self.promised_blocks += blocks
        self.promised_items += items

    def opened(self, generation: int) -> None:
        """A transaction begins: nothing of it is dirty, and no ceiling of the one before holds."""
        self._generation = generation
        self.dirty_nodes = 0
        self._lower_ceilings()

    def copied_from(self, birth: int) -> None:
        """A node of a volume, born in `birth`, was shadowed: snapshots share it no more."""
        if birth <= self._shared_until:
            self.shared_nodes -= 1

    def set_shared(self, nodes: int, until: int) -> None:
        """Record that snapshots share up to `nodes` nodes of the live tree, none born after `until`."""
        self.shared_nodes = nodes
        self._shared_until = until
        self._lower_ceilings()

    def set_catalog(self, nodes: int) -> None:
        """Record how many nodes the catalog has: a deletion of many snapshots may copy all of them."""
        if nodes > self.catalog_nodes:
            self._lower_ceilings()
        self.catalog_nodes = nodes

    # --- what is left -------------------------------------------------------------------------------

    def held_blocks(self, tier: int = TIER_ADD) -> int:
        """Blocks that an operation of that tier must leave."""
        if tier == TIER_ADD:
            return self._held_with(self.shared_nodes, self.catalog_nodes)
        if tier == TIER_FREE:
            return 0
        copies = self._catalog_copies(self.catalog_nodes)
        return self.reserve_blocks * tier // 4 + copies * self._node_blocks

    def _held_with(self, shared_nodes: int, catalog_nodes: int) -> int:
        """What adding must leave when snapshots share so many nodes and the catalog has so many."""
        held = self.reserve_blocks
        copies = shared_nodes + self._catalog_copies(catalog_nodes)
        if copies:
            held = max(held, self.reserve_blocks * TIER_CHURN // 4 + copies * self._node_blocks)
        return held

    def _catalog_copies(self, catalog_nodes: int) -> int:
        """Nodes to hold back for a deletion of all snapshots: each copied, and drop records instead.

        What a commit takes anyway is enough for a small catalog.
        """
        return max(0, 2 * catalog_nodes - self.limits.commit_nodes)

    def available_blocks(self) -> int:
        """Blocks of new data that would fit; what the next commits free counts.

        Beside the data itself every block needs its checksum in a leaf, and the leaves need room.
        """
        room = self._room() - self.promised_blocks - self.held_blocks()
        return max(
            0, room * DATA_BLOCKS_PER_LEAF_BLOCK // (DATA_BLOCKS_PER_LEAF_BLOCK + self._copies)
        )

    def _room(self, tier: int = TIER_ADD) -> int:
        """Blocks that the next commits leave free, less what each commit may take: at the most."""
        space = self._map
        ripe = space.free_blocks + space.pending_blocks + space.pending_system_blocks
        nodes, groups = self._commit_takes(tier)
        pages = space.index.pages_to_write(groups) * self._copies
        return ripe - pages - (nodes + self.dirty_nodes) * self._node_blocks

    def _commit_takes(self, tier: int) -> tuple[int, int]:
        """Nodes and pages of refcounts that a commit may take beside the dirty ones."""
        limits = self.limits
        if tier == TIER_FREE:
            return limits.freeing_nodes, limits.freeing_groups
        return limits.commit_nodes, limits.commit_groups

    def metadata_need(self) -> int:
        """Blocks that the open transaction's commit takes beside data, at the most."""
        return self._metadata_need(TIER_ADD, 0, 0, 0)

    def _metadata_need(self, tier: int, blocks: int, nodes: int, groups: int) -> int:
        """The same when it grows by so many data blocks, nodes and dirty groups."""
        commit_nodes, commit_groups = self._commit_takes(tier)
        nodes += self.dirty_nodes + self.promised_items + commit_nodes
        node_blocks = nodes * self._node_blocks
        taken = 2 * (node_blocks + self.promised_blocks + blocks) // GROUP_BLOCKS
        groups += self._map.dirty_groups + commit_groups + taken
        return node_blocks + self._map.index.pages_to_write(groups) * self._copies

    # --- asking -------------------------------------------------------------------------------------

    def admit(self, blocks: int, tier: int, nodes: int = 0) -> None:
        """Let an operation go on that adds so many data blocks and dirties so many nodes.

        Must come before the operation reaches anything: it may commit.

        Args:
            tier: of the operation: how much of the reserve it leaves.
            nodes: that it dirties beyond `Limits.operation_nodes`.

        Raises:
            NoSpaceError: it would not fit, also after the commits that let freed blocks go.
            ReadOnlyError: nothing may change here.
            DeviceError: a commit failed before (C8).
        """
        if self.closed is not None:
            raise self.closed
        if (
            self.promised_blocks + blocks <= self._block_ceiling
            and self.dirty_nodes + self.promised_items + nodes <= self._node_ceiling
            and self._map.dirty_groups <= self._group_ceiling
        ):
            return
        if not (
            self._fits(blocks, tier, nodes)
            or self._relieved(blocks, tier, nodes)
            or self._released(blocks, tier, nodes)
        ):
            if self.on_full is not None and not self._said_full:
                self._said_full = True
                self.on_full()
            raise NoSpaceError(
                "the filesystem is full; delete files or snapshots (cowdu shows which)"
            )
        self._raise_ceilings()
        if self._said_full and self.available_blocks() > self.reserve_blocks:
            self._said_full = False

    def would_admit(self) -> bool:
        """Whether something small fits as it is; for what can as well be left out."""
        return self.closed is None and (
            self.dirty_nodes + self.promised_items <= self._node_ceiling
            or self._fits(0, TIER_ADD, 0)
        )

    def require_blocks(self, blocks: int) -> None:
        """Raise NoSpaceError when so many blocks of data do not fit, whatever is committed first."""
        available = self.available_blocks()
        if blocks > available:
            raise NoSpaceError(
                f"{blocks * BLOCK_SIZE_BYTES} bytes do not fit, "
                f"{available * BLOCK_SIZE_BYTES} are available"
            )

    def admit_snapshot(self, nodes: int) -> None:
        """Let a snapshot be made that shares `nodes` nodes of the live tree, if they could be copied.

        Deleting a file that a snapshot holds copies nodes and frees nothing. That room is promised
        when the snapshot is made, so that a full filesystem can always delete (C10). May commit.

        Raises:
            NoSpaceError: there is no such room.
        """
        self._require_open()
        catalog_nodes = self.catalog_nodes + 2  # the snapshot's own records may split leaves
        missing = self._held_with(nodes, catalog_nodes) - self._room()
        if missing > 0:
            raise NoSpaceError(
                "no room for a snapshot: deleting files that it holds would need "
                f"{missing * BLOCK_SIZE_BYTES >> 10} KiB more than there is; delete files or "
                "snapshots first (cowdu shows which)"
            )
        places = self._held_with(nodes, catalog_nodes) // NODE_BLOCKS
        for _ in range(self.limits.retained_generations + 2):
            if self._map.node_places(places) >= places:
                return
            if self.relieve is None or not self.relieve():
                break
        raise NoSpaceError(
            "no room for a snapshot: what is free lies in pieces too small to delete files that it "
            "holds; delete files or snapshots first (cowdu shows which)"
        )

    def _require_open(self) -> None:
        if self.closed is not None:
            raise self.closed

    # --- inside -------------------------------------------------------------------------------------

    def _raise_ceilings(self) -> None:
        """Find out whether the next operations may go on without a comparison."""
        limits = self.limits
        blocks = limits.ceiling_operations * limits.ceiling_blocks
        nodes = limits.ceiling_operations * limits.operation_nodes
        groups = limits.ceiling_operations
        if not blocks or not self._fits(blocks, TIER_ADD, nodes, groups):
            self._lower_ceilings()
            return
        self._block_ceiling = self.promised_blocks + blocks
        # The operation that reaches the ceiling may still dirty what one operation does.
        self._node_ceiling = self.dirty_nodes + self.promised_items + nodes - limits.operation_nodes
        self._group_ceiling = self._map.dirty_groups + groups

    def _lower_ceilings(self) -> None:
        self._block_ceiling = self._node_ceiling = self._group_ceiling = -1

    def _relieved(self, blocks: int, tier: int, nodes: int) -> bool:
        """Commit until an operation fits. Returns whether it does."""
        spare = self._spare(blocks, tier)
        hopeless, generation = self._hopeless
        if (
            tier == TIER_ADD
            and spare <= hopeless
            and self._generation < generation + self.limits.hopeless_generations
        ):
            return False
        for _ in range(self.limits.retained_generations + 2):
            spare = self._spare(blocks, tier)
            if spare < 0 and not self.promised_items:
                return False  # not even if all that is pending were free
            if tier == TIER_FREE and self._map.free_blocks < 2 * self._metadata_need(tier, 0, 0, 0):
                break  # a commit might not fit itself
            if self.relieve is None or not self.relieve():
                break
            if self._fits(blocks, tier, nodes):
                return True
        self._hopeless = (spare, self._generation)
        return False

    def _released(self, blocks: int, tier: int, nodes: int) -> bool:
        """Give up retained generations for what frees, when nothing else helps."""
        return (
            tier == TIER_FREE
            and self.let_go is not None
            and self.let_go()
            and self._fits(blocks, tier, nodes)
        )

    def _spare(self, blocks: int, tier: int) -> int:
        return self._room(tier) - blocks - self.held_blocks(tier)

    def _fits(self, blocks: int, tier: int, nodes: int, groups: int = 0) -> bool:
        need = blocks + self.promised_blocks + self._metadata_need(tier, blocks, nodes, groups)
        if self._map.free_blocks - need < self.held_blocks(tier):
            return False
        # Nodes need blocks that lie together: free ones that lie apart are room for data only.
        copies = 0
        if tier == TIER_ADD:
            copies = self.shared_nodes + self._catalog_copies(self.catalog_nodes)
        # `need` is the worst case of this commit. The margin is for those after it, in which single
        # blocks of data and of the map break places up: adding must leave four times that of removing.
        margin = self.reserve_blocks * tier // (8 if tier == TIER_ADD else 16)
        places = (need + margin + copies * self._node_blocks) // NODE_BLOCKS + 4
        return self._map.node_places(places) >= places
