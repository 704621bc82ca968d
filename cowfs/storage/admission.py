"""Admission: whether there is room for an operation, before the operation changes anything.

Deleting must always be possible, also in a full filesystem (C10), and a freeze must always find the
blocks that it needs. So a part of the image, the *reserve*, is held back in *tiers*: an operation
that adds leaves all of the reserve, one that removes leaves half, the drop queue a quarter. A
commit may use the rest.

`Admission` owns every number that the decision needs: the *promised* blocks and items (data and
items in memory that the next freeze places), the dirty nodes, and the nodes that snapshots share
with the live tree. `admit` compares the worst case of the next commit with the free blocks. Where
that does not fit, `admit` asks for *relief*: commits that release freed blocks.

A full comparison costs microseconds. So a comparison that finds plenty of room sets *ceilings* for
promised blocks, promised items, dirty nodes and dirty groups. Below all ceilings, operations are
admitted without another comparison. Ceilings limit what is in memory, not a number of calls, so no
operation can bypass them. They end with the transaction in which they were set.

This file knows nothing of trees and files, and imports no numpy, so that a command that names an
edit starts fast. Keeps C10.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cowfs.errors import CowfsError, NoSpaceError
from cowfs.storage.format import BLOCK_SIZE_BYTES, GROUP_BLOCKS, NODE_BLOCKS

if TYPE_CHECKING:
    from cowfs.storage.spacemap import SpaceMap

# The quarters of the reserve that an operation of each tier must leave.
TIER_ADD, TIER_REMOVE, TIER_DROP, TIER_FREE = 4, 2, 1, 0
# While snapshots share nodes of the live tree, an operation that adds must leave these quarters,
# and a place for a copy of each shared node: removing a name copies the nodes that a snapshot
# shares.
TIER_CHURN = 3
# The least number of data blocks, in long runs, whose extents fit in one block of a leaf: 8 bytes
# of checksum for each data block, and leaves may be half full.
DATA_BLOCKS_PER_LEAF_BLOCK = 256


@dataclass(frozen=True, slots=True)
class Limits:
    """The numbers of admission that were chosen, not taken from the image. Tests shrink them.

    Attributes:
        reserve_part: the reserve is the image's size divided by this, within the next two.
        reserve_blocks_min, reserve_blocks_max: bounds of the reserve, in blocks.
        retained_generations: generations before the newest that are kept whole, for rescue.
        commit_nodes: the most nodes that a commit writes beside the dirty ones: nodes of the
            catalog, and nodes made by splits.
        commit_groups: the most pages of refcounts that a commit writes beside the dirty ones.
        freeing_nodes, freeing_groups: the same for a commit that only frees, whose own nodes are
            counted one by one. Freeing must be possible from any state.
        operation_nodes: the most nodes that one operation dirties (a rename dirties a dozen).
        ceiling_operations: the number of operations that the ceilings make room for.
        ceiling_blocks: data blocks of each of these operations.
        hopeless_generations: after relief failed, a request that is no smaller gets no relief for
            this number of generations: refusing must be cheap.
        log_bytes: calls of more bytes than this are not kept for the log: the next fsync commits.
        log_calls: the most calls in one log; replaying them takes less than a second.
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
    log_bytes: int = 256 << 10
    log_calls: int = 16384

    def reserve_blocks(self, total_blocks: int) -> int:
        """The reserve of an image of `total_blocks`, in blocks."""
        wanted = total_blocks // self.reserve_part
        return max(self.reserve_blocks_min, min(self.reserve_blocks_max, wanted))


DEFAULT_LIMITS = Limits()


class Admission:
    """The room of one open image.

    Args:
        space_map: of the image.
        copies: number of copies of each node and page: 1 or 2.
        limits: chosen numbers.

    Attributes:
        closed: why nothing may change any more; None as long as changes are possible.
        relieve: commits, so that freed blocks can be used; returns whether that could help. Set by
            the owner of the commits.
        give_up_retained: gives up the retained generations before the newest one, so that the
            blocks that only they show can be used without a commit; returns whether there were any.
            Used last, and only for operations that free.
        on_full: called at the first ENOSPC, and again only after there was room.
        promised_blocks: blocks of data in memory that the next freeze places.
        promised_items: items in memory that the next freeze puts into leaves.
        dirty_nodes: nodes born in the open transaction.
        shared_nodes: the most nodes of the live tree that snapshots share.
        catalog_nodes: nodes of the catalog.
        is_replaying: the operations are those of the log, which were admitted before the crash:
            nothing is refused, and nothing commits (L5).
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
        self.give_up_retained: Callable[[], bool] | None = None
        self.on_full: Callable[[], None] | None = None
        self.promised_blocks = 0
        self.promised_items = 0
        self.dirty_nodes = 0
        self.shared_nodes = 0
        self.catalog_nodes = 0
        self.is_replaying = False
        self._shared_until = 0
        self._map = space_map
        self._node_blocks = NODE_BLOCKS * copies  # blocks of one node with its twin
        self._copies = copies
        self._generation = 0
        self._said_full = False
        self._block_ceiling = self._node_ceiling = self._group_ceiling = -1
        # When relief last failed: the spare blocks then, and the generation.
        self._hopeless = (-1, -limits.hopeless_generations)

    # --- numbers of the open transaction ----------------------------------------------------------

    def promise(self, blocks: int, items: int) -> None:
        """Add to the promised blocks and items; negative numbers were placed or dropped."""
        self.promised_blocks += blocks
        self.promised_items += items

    def begin_transaction(self, generation: int) -> None:
        """A transaction begins: no node is dirty, and no ceiling is set."""
        self._generation = generation
        self.dirty_nodes = 0
        self._lower_ceilings()

    def count_copy(self, birth: int) -> None:
        """A node of a volume, born in `birth`, was copied: snapshots no longer share it."""
        if birth <= self._shared_until:
            self.shared_nodes -= 1

    def set_shared(self, nodes: int, until: int) -> None:
        """Record how many nodes the snapshots share with the live tree.

        Args:
            nodes: the most that they may share.
            until: none of these nodes was born after this generation.
        """
        self.shared_nodes = nodes
        self._shared_until = until
        self._lower_ceilings()

    def set_catalog(self, nodes: int) -> None:
        """Record the number of catalog nodes: deleting many snapshots may copy all of them."""
        if nodes > self.catalog_nodes:
            self._lower_ceilings()
        self.catalog_nodes = nodes

    # --- room -------------------------------------------------------------------------------------

    def held_blocks(self, tier: int = TIER_ADD) -> int:
        """Blocks that an operation of `tier` must leave free."""
        if tier == TIER_ADD:
            return self._held_with(self.shared_nodes, self.catalog_nodes)
        if tier == TIER_FREE:
            return 0
        copies = self._catalog_copies(self.catalog_nodes)
        return self.reserve_blocks * tier // 4 + copies * self._node_blocks

    def _held_with(self, shared_nodes: int, catalog_nodes: int) -> int:
        """Blocks that adding must leave free, given the shared nodes and the catalog's nodes."""
        held = self.reserve_blocks
        copies = shared_nodes + self._catalog_copies(catalog_nodes)
        if copies:
            held = max(held, self.reserve_blocks * TIER_CHURN // 4 + copies * self._node_blocks)
        return held

    def _catalog_copies(self, catalog_nodes: int) -> int:
        """Nodes to hold back so that all snapshots can be deleted in one commit.

        That copies each catalog node, and writes about as many for drop records. For a small
        catalog `Limits.commit_nodes` are enough.
        """
        return max(0, 2 * catalog_nodes - self.limits.commit_nodes)

    def available_blocks(self) -> int:
        """Blocks of new data that would fit, counting the blocks that the next commits release.

        Each data block also needs room for its checksum in a leaf.
        """
        room = self._room() - self.promised_blocks - self.held_blocks()
        return max(
            0, room * DATA_BLOCKS_PER_LEAF_BLOCK // (DATA_BLOCKS_PER_LEAF_BLOCK + self._copies)
        )

    def _room(self, tier: int = TIER_ADD) -> int:
        """The most blocks that are free after the next commits, less what each commit may take."""
        space = self._map
        ripe = space.free_blocks + space.pending_blocks + space.pending_system_blocks
        nodes, groups = self._commit_takes(tier)
        pages = space.index.pages_to_write(groups) * self._copies
        return ripe - pages - (nodes + self.dirty_nodes) * self._node_blocks

    def _commit_takes(self, tier: int) -> tuple[int, int]:
        """The most nodes and pages of refcounts that a commit takes beside the dirty ones."""
        limits = self.limits
        if tier == TIER_FREE:
            return limits.freeing_nodes, limits.freeing_groups
        return limits.commit_nodes, limits.commit_groups

    def metadata_need(self) -> int:
        """The most blocks that the open transaction's commit takes beside data."""
        return self._metadata_need(TIER_ADD, 0, 0, 0)

    def _metadata_need(self, tier: int, blocks: int, nodes: int, groups: int) -> int:
        """The same after adding `blocks` of data, `nodes` dirty nodes and `groups` dirty groups."""
        commit_nodes, commit_groups = self._commit_takes(tier)
        nodes += self.dirty_nodes + self.promised_items + commit_nodes
        node_blocks = nodes * self._node_blocks
        taken = 2 * (node_blocks + self.promised_blocks + blocks) // GROUP_BLOCKS
        groups += self._map.dirty_groups + commit_groups + taken
        return node_blocks + self._map.index.pages_to_write(groups) * self._copies

    # --- asking -----------------------------------------------------------------------------------

    def admit(self, blocks: int, tier: int, nodes: int = 0) -> None:
        """Admit an operation, or raise.

        Call it before the operation reaches anything: it may commit.

        Args:
            blocks: blocks of data that the operation adds.
            tier: how much of the reserve the operation leaves.
            nodes: nodes that it dirties beyond `Limits.operation_nodes`.

        Raises:
            NoSpaceError: the operation does not fit, even after relief.
            ReadOnlyError: the image is open read-only.
            DeviceError: a commit failed (C8).
        """
        if self.closed is not None:
            raise self.closed
        if self.is_replaying:
            return
        if (
            self.promised_blocks + blocks <= self._block_ceiling
            and self.dirty_nodes + self.promised_items + nodes <= self._node_ceiling
            and self._map.dirty_groups <= self._group_ceiling
        ):
            return
        if not (
            self._fits(blocks, tier, nodes)
            or self._fits_after_relief(blocks, tier, nodes)
            or self._fits_after_giving_up(blocks, tier, nodes)
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
        """Whether a small operation fits without a commit; for changes that may be left out."""
        return self.closed is None and (
            self.dirty_nodes + self.promised_items <= self._node_ceiling
            or self._fits(0, TIER_ADD, 0)
        )

    def require_blocks(self, blocks: int) -> None:
        """Raise NoSpaceError if `blocks` blocks of data do not fit, even after commits."""
        available = self.available_blocks()
        if blocks > available and not self.is_replaying:
            raise NoSpaceError(
                f"{blocks * BLOCK_SIZE_BYTES} bytes do not fit, "
                f"{available * BLOCK_SIZE_BYTES} are available"
            )

    def admit_snapshot(self, nodes: int) -> None:
        """Admit a snapshot that shares `nodes` nodes of the live tree, or raise. May commit.

        Deleting a file that a snapshot holds copies nodes and frees nothing. The room for copies of
        all shared nodes is set aside when the snapshot is made, so that files can always be deleted
        (C10).

        Raises:
            NoSpaceError: there is no such room.
            ReadOnlyError, DeviceError: as `admit`.
        """
        self._require_open()
        catalog_nodes = self.catalog_nodes + 2  # the snapshot's records may split leaves
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
            "no room for a snapshot: the free space is in pieces too small for the nodes that "
            "deleting its files would copy; delete files or snapshots first (cowdu shows which)"
        )

    def _require_open(self) -> None:
        if self.closed is not None:
            raise self.closed

    # --- deciding ---------------------------------------------------------------------------------

    def _raise_ceilings(self) -> None:
        """Set ceilings if there is room for `Limits.ceiling_operations` more operations."""
        limits = self.limits
        blocks = limits.ceiling_operations * limits.ceiling_blocks
        nodes = limits.ceiling_operations * limits.operation_nodes
        groups = limits.ceiling_operations
        if not blocks or not self._fits(blocks, TIER_ADD, nodes, groups):
            self._lower_ceilings()
            return
        self._block_ceiling = self.promised_blocks + blocks
        # The operation that crosses the ceiling may still dirty `operation_nodes` nodes.
        self._node_ceiling = self.dirty_nodes + self.promised_items + nodes - limits.operation_nodes
        self._group_ceiling = self._map.dirty_groups + groups

    def _lower_ceilings(self) -> None:
        self._block_ceiling = self._node_ceiling = self._group_ceiling = -1

    def _fits_after_relief(self, blocks: int, tier: int, nodes: int) -> bool:
        """Commit until the operation fits. Returns whether it does."""
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
                return False  # even all pending blocks would not be enough
            if tier == TIER_FREE and self._map.free_blocks < 2 * self._metadata_need(tier, 0, 0, 0):
                break  # there may be no room for the commit itself
            if self.relieve is None or not self.relieve():
                break
            if self._fits(blocks, tier, nodes):
                return True
        self._hopeless = (spare, self._generation)
        return False

    def _fits_after_giving_up(self, blocks: int, tier: int, nodes: int) -> bool:
        """Give up retained generations for an operation that frees. Returns whether it fits."""
        return (
            tier == TIER_FREE
            and self.give_up_retained is not None
            and self.give_up_retained()
            and self._fits(blocks, tier, nodes)
        )

    def _spare(self, blocks: int, tier: int) -> int:
        """Blocks that are left over after the operation; negative if it cannot fit."""
        return self._room(tier) - blocks - self.held_blocks(tier)

    def _fits(self, blocks: int, tier: int, nodes: int, groups: int = 0) -> bool:
        """Whether the next commit fits in the worst case, with these additions."""
        need = blocks + self.promised_blocks + self._metadata_need(tier, blocks, nodes, groups)
        if self._map.free_blocks - need < self.held_blocks(tier):
            return False
        # A node needs NODE_BLOCKS free blocks in a row; single free blocks are room for data only.
        copies = 0
        if tier == TIER_ADD:
            copies = self.shared_nodes + self._catalog_copies(self.catalog_nodes)
        # `need` is the worst case of this commit. The margin is for later commits, in which single
        # blocks of data and of the map take places for nodes. Adding leaves four times as many
        # places as removing.
        margin = self.reserve_blocks * tier // (8 if tier == TIER_ADD else 16)
        places = (need + margin + copies * self._node_blocks) // NODE_BLOCKS + 4
        return self._map.node_places(places) >= places
