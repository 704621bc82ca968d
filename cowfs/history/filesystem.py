"""An open image: the live volume, its snapshots, and the commits.

Snapshot, delete, rename, hold, rollback and undo are *edits* of the catalog (edits.py). An edit is
checked before a freeze and applied in the freeze, when every tree is whole. It becomes durable with
that commit, so each edit is atomic (C6). A freeze changes only memory, and cannot be refused.
"""

import logging
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace

from cowfs.errors import CorruptError, CowfsError, DeviceError, NoSpaceError
from cowfs.files.items import references
from cowfs.files.parts import Parts
from cowfs.files.volume import Volume
from cowfs.history.catalog import Catalog
from cowfs.history.drops import DropQueue
from cowfs.history.edits import Edit, Plan
from cowfs.history.records import FLAG_SHARES, MAIN_VOLUME, RootKind, RootRecord, root_key
from cowfs.history.replay import replay
from cowfs.storage.admission import TIER_FREE
from cowfs.storage.btree import Tree
from cowfs.storage.commit import Commit, begin, finish
from cowfs.storage.discards import Sweep
from cowfs.storage.format import FLAG_CLEAN
from cowfs.storage.log import LogWrite
from cowfs.storage.overlay import ReplayReport
from cowfs.storage.store import Store

log = logging.getLogger(__name__)

SHARED_READS_MAX = 256  # nodes read to count what snapshots share: about 10 ms
# This many pending blocks (4 MiB) that need only two more commits to be released are worth two
# commits that change nothing. Such a commit itself leaves about ten blocks pending.
FOLLOW_UP_BLOCKS_MIN = 1024
ENTRIES_PER_LEAF_MIN = 10  # a leaf of the catalog has at least this many entries
SNAPSHOT_VOLUMES_MAX = 64  # open trees of snapshots; each is small: nodes are in the cache


@dataclass(slots=True)
class Checked:
    """An edit that was checked, for the freeze that follows at once.

    Attributes:
        generation: the open transaction in which it was checked.
        result: the records of the answer; set by the freeze.
    """

    edit: Edit
    plan: Plan
    generation: int
    result: list[RootRecord] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Space:
    """How many blocks of an image are used for what. used + free + system + pending = total (I6).

    Attributes:
        tree: used by volumes, snapshots and the drop queue.
        catalog: used by the catalog's nodes; tree + catalog = used.
        system: superblocks and the space map.
        pending: freed, and waiting until no retained generation shows them.
        promised: of data in memory.
        reserved: held back for deleting.
        available: for new data.
    """

    total: int
    used: int
    tree: int
    catalog: int
    system: int
    pending: int
    free: int
    promised: int
    reserved: int
    available: int


class Filesystem:
    """The filesystem in an open image; see `open_filesystem`.

    Args:
        store: the open image.
        discard: give free blocks back to the host at `close`.
        snapshot: its tree takes the place of the live volume, read-only.

    Attributes:
        record: root record of the live volume.
        live: the live volume.
        inflight: the commit that is frozen and not finished.
        inflight_record: the record of the log that is being written.
        shared_is_stale: whether the nodes that snapshots share must be counted again.
    """

    def __init__(self, store: Store, *, discard: bool = True, snapshot: str | None = None) -> None:
        superblock = store.superblock
        self.store = store
        self.catalog = Catalog(
            Tree(store, superblock.catalog, 0, superblock.catalog_nodes), superblock.next_root_id
        )
        self.record = (
            self.catalog.volume(MAIN_VOLUME)
            if snapshot is None
            else self.catalog.snapshot(snapshot)
        )
        self.live = self.open_volume(self.record, writable=store.writable)
        self.drops = DropQueue(store, self.catalog)
        self.inflight: Commit | None = None
        self.inflight_record: LogWrite | None = None
        self.discard = discard
        self._snapshot_volumes: dict[int, Volume] = {}
        self.shared_is_stale = False
        if store.writable:
            store.admission.relieve = self._relieve
            store.admission.on_full = self._warn_full
            self.live.load_orphans()
            store.admission.set_shared(self.record.node_count, superblock.generation)
            store.admission.set_catalog(self.catalog.tree.node_count)
            self.shared_is_stale = True
            self._count_shared()

    # --- roots ------------------------------------------------------------------------------------

    def open_volume(self, record: RootRecord, *, writable: bool) -> Volume:
        """Open the tree of a root as a volume."""
        root: Any = record.tree  # a node until its commit is written
        tree = Tree(self.store, root, record.root_id, record.node_count, references)
        parts = Parts(
            tree,
            self.store.superblock.name_seed,
            next_ino=record.next_ino,
            inode_count=record.inode_count,
            data_blocks=record.data_blocks,
            writable=writable,
        )
        return Volume(parts)

    def volume(self, root_id: int) -> Volume | None:
        """The volume of a root: the live one, or a snapshot's, read-only. None if it is gone."""
        if root_id == self.record.root_id:
            return self.live
        volume = self._snapshot_volumes.get(root_id)
        if volume is None:
            record = self.catalog.root(root_id)
            if record is None or record.kind != RootKind.SNAPSHOT:
                return None
            if len(self._snapshot_volumes) >= SNAPSHOT_VOLUMES_MAX:
                del self._snapshot_volumes[next(iter(self._snapshot_volumes))]
            volume = self._snapshot_volumes[root_id] = self.open_volume(record, writable=False)
        return volume

    def current_record(self) -> RootRecord:
        """The live volume's record as a commit would write it now. Its tree may be a node."""
        live = self.live
        return replace(
            self.record,
            tree=live.tree.root,
            next_ino=live.inodes.next_ino,
            node_count=max(1, live.tree.node_count),  # a damaged image may have had any number
            data_blocks=live.extents.data_blocks,
            inode_count=live.inodes.count,
            flags=self.record.flags | (FLAG_SHARES if live.ranges.has_reflinks else 0),
        )

    def replay(self) -> ReplayReport:
        """Make the calls of the log again, in memory; before anything else is changed."""
        store = self.store
        return replay(store.device, store.superblock, self.live, self.volume)

    # --- edits ------------------------------------------------------------------------------------

    def check(self, edit: Edit, plan: Plan | None = None) -> Checked:
        """Check an edit, and reach all that it will change (edits.py). May commit, to make room.

        The freeze must follow at once.

        Args:
            plan: what `edit.check_in_slices` found; no other edit was made since it began.

        Raises:
            CowfsError: the edit cannot be made; nothing of it was done.
        """
        store = self.store
        store.require_writable()
        self.live.flush()  # so that the check sees what will be frozen
        generation = store.generation
        if plan is None:
            plan = edit.check(self)
        try:
            store.admission.admit(0, edit.tier, self._nodes_of(edit, plan))
        except NoSpaceError:
            raise edit.no_room() from None
        if generation != store.generation:  # a commit made room, so the plan is out of date
            self.live.flush()
            plan = edit.check(self)
        with self.catalog.operation.begin_admitted():
            for key in sorted(plan.keys):
                self.catalog.tree.reach(key)
        return Checked(edit, plan, store.generation)

    def _nodes_of(self, edit: Edit, plan: Plan) -> int:
        """Catalog nodes that an edit dirties beyond `Limits.commit_nodes`.

        These are the nodes on the paths to its keys and to the live volume's record, and the leaves
        that new records need.
        """
        keys = sorted([*plan.keys, root_key(self.record.root_id)])
        nodes = self.catalog.tree.count_nodes(keys) + plan.added // ENTRIES_PER_LEAF_MIN + 1
        return (
            nodes
            if edit.tier == TIER_FREE
            else max(0, nodes - self.store.admission.limits.commit_nodes)
        )

    def set_live_record(self, record: RootRecord) -> None:
        """Replace the live volume's record. Only in a freeze."""
        self.record = record
        self.catalog.put(record)

    def set_live(self, record: RootRecord, volume: Volume) -> None:
        """Replace the live volume. The old one becomes a snapshot's volume. Only in a freeze."""
        self.live.make_read_only()
        self._snapshot_volumes[self.record.root_id] = self.live
        self.set_live_record(record)
        self.live = volume

    def forget_volume(self, root_id: int) -> None:
        """Drop the open volume of a deleted snapshot."""
        self._snapshot_volumes.pop(root_id, None)

    def _count_shared(self) -> None:
        """Count again which nodes the live tree shares with snapshots, if that may have changed.

        Roots in the drop queue still share nodes, so this waits until the queue is empty.
        """
        if not self.shared_is_stale or len(self.drops):
            return
        tree, admission = self.live.tree, self.store.admission
        self.shared_is_stale = False
        try:
            newest = self.catalog.newest_snapshot_generation()
            newer = tree.count_newer(newest, SHARED_READS_MAX) if newest else 0
        except (CorruptError, DeviceError):
            return  # the old count is too high, which is safe
        if newest:
            admission.set_shared(tree.node_count - newer, newest)
        else:
            admission.set_shared(0, 0)

    # --- commit -----------------------------------------------------------------------------------

    @property
    def changed(self) -> bool:
        """Whether a commit would make anything durable."""
        store = self.store
        return (
            self.live.changed
            or self.drops.changed
            or store.map.dirty_groups > 0
            or (store.writable and len(store.repairs) > 0)
        )

    @property
    def marked_clean(self) -> bool:
        """Whether the newest commit marks the image as unmounted in order."""
        return bool(self.store.superblock.flags & FLAG_CLEAN)

    def freeze(self, checked: Checked | None = None, *, clean: bool = False) -> Commit:
        """Freeze the open transaction and open the next. The caller writes and finishes the commit.

        Args:
            checked: an edit to make in the freeze, checked just now.
            clean: mark the image as unmounted in order.

        Raises:
            ReadOnlyError, DeviceError: the image cannot be written (any more, C8).
            CorruptError: a leaf of the catalog cannot be read; this ends all writing.
            NoSpaceError: the reserve was too small; this ends all writing.
        """
        assert self.inflight is None, "one commit at a time"
        store, catalog = self.store, self.catalog
        store.require_writable()
        assert checked is None or checked.generation == store.generation, "checked too early"
        try:
            with catalog.operation.begin_admitted() as operation:
                catalog.tree.reach(root_key(self.record.root_id))
                self.drops.reach()
                operation.change_unlogged()
                self.live.flush()
                nodes = self.live.tree.place()
                self.set_live_record(self.current_record())
                if checked is not None:
                    checked.result = checked.edit.apply(self, checked.plan)
                self.drops.save()
                nodes += catalog.tree.place()
            store.admission.set_catalog(catalog.tree.node_count)
            self.inflight = begin(
                store,
                nodes,
                catalog_nodes=catalog.tree.node_count,
                next_root_id=catalog.next_root_id,
                clean=clean,
            )
        except Exception as error:  # any error: half a transaction must never be written
            if store.failed is None:
                store.fail(error)
            raise
        return self.inflight

    def finish(self, commit: Commit) -> None:
        """Finish a commit after `commit.write()`. Raises DeviceError if that failed (C8)."""
        if self.inflight is commit:
            self.inflight = None
        finish(commit)
        self._count_shared()

    def commit(self, checked: Checked | None = None, *, clean: bool = False) -> None:
        """Freeze, write and finish a commit in this thread."""
        self._finish_inflight()
        commit = self.freeze(checked, clean=clean)
        commit.write()
        self.finish(commit)

    def apply(self, edit: Edit) -> list[RootRecord]:
        """Make an edit; it is durable when this returns. Returns the records of its answer.

        Raises:
            CowfsError: the edit cannot be made, and nothing was changed; or the commit failed (C8).
        """
        self._finish_inflight()
        checked = self.check(edit)
        self.commit(checked)
        return checked.result

    def _finish_inflight(self) -> None:
        if self.inflight_record is not None:
            self.finish_record(self.inflight_record)
        if self.inflight is not None:
            self.finish(self.inflight)

    # --- log --------------------------------------------------------------------------------------

    def begin_record(self) -> LogWrite | None:
        """Take the calls that are not durable yet as a record of the log, for the caller to write.

        Returns:
            None if only a commit can make them durable.
        """
        assert self.inflight is None, "one write at a time"
        assert self.inflight_record is None, "one write at a time"
        self.store.require_writable()
        self.inflight_record = self.store.log.next_record()
        return self.inflight_record

    def finish_record(self, record: LogWrite) -> None:
        """Finish a record after `record.write()`. Raises DeviceError if that failed (C8)."""
        if self.inflight_record is record:
            self.inflight_record = None
        record.done.wait()
        self.store.require_durable(record.error)
        self.store.log.finish(record)

    def sync(self) -> None:
        """Make all calls durable, by a record of the log or a commit, in this thread (C2).

        Raises:
            DeviceError: a write failed, now or before (C8).
        """
        self._finish_inflight()
        if self.store.failed is not None:
            raise self.store.failed
        if not self.unsynced:
            return
        record = self.begin_record()
        if record is None:
            self.commit()
        else:
            record.write()
            self.finish_record(record)

    @property
    def unsynced(self) -> bool:
        """Whether a call was made that is not durable, as far as is known here."""
        log_of_calls = self.store.log
        return bool(log_of_calls.calls) or (not log_of_calls.is_whole and self.changed)

    def _relieve(self) -> bool:
        """Commit, so that freed blocks are released. Returns whether that could help."""
        store = self.store
        if not (store.map.pending_blocks or store.map.pending_system_blocks or self.changed):
            return False
        if store.pins and store.map.pending_upto(min(store.pins.values())) == 0:
            store.pins.clear()  # readers must not keep the filesystem full
        self.commit()
        return True

    def _warn_full(self) -> None:
        """Log which snapshots to delete. `cowfs df` finds out what each frees: too long here."""
        snapshots = self.catalog.snapshots()
        if not snapshots:
            log.warning("the filesystem is full, and there are no snapshots; delete files")
            return
        copies = self.store.copies
        largest = max(snapshots, key=lambda record: record.referenced_blocks(copies))
        log.warning(
            "the filesystem is full; of %d snapshots %r is the oldest and %r the largest; cowfs df "
            "shows which to delete to free most",
            len(snapshots),
            snapshots[0].name,
            largest.name,
        )

    @property
    def follow_up_due(self) -> bool:
        """Whether FOLLOW_UP_BLOCKS_MIN pending blocks need only further commits to be released."""
        store = self.store
        if store.failed is not None or store.map.pending_blocks < FOLLOW_UP_BLOCKS_MIN:
            return False
        limit = min([store.generation, *store.pins.values()])
        return store.map.pending_upto(limit) >= FOLLOW_UP_BLOCKS_MIN

    def close(self) -> None:
        """Commit all changes, mark the image clean, discard free blocks, close the device."""
        try:
            if self.store.writable and self.store.failed is None:
                self._finish_inflight()
                if self.changed or not self.marked_clean:
                    self.commit(clean=True)
                if self.discard:
                    self._discard_at_end()
        finally:
            self.store.device.close()

    def follow_up(self) -> None:
        """Commit without changes, as long as that releases many pending blocks."""
        for _ in range(self.store.admission.limits.retained_generations):
            if self.follow_up_due:
                self.commit(clean=True)

    def _discard_at_end(self) -> None:
        """Give free blocks back to the host. All is durable before, so an error is only logged."""
        try:
            self.follow_up()
            Sweep.of_released(self.store).run()
        except CowfsError as error:
            log.warning("free space was not given back to the host: %s", error)

    def reclaim_orphans(self) -> None:
        """Free every orphan. Only when no orphan can be open: at the start.

        A damaged orphan keeps its blocks; the others are freed.
        """
        for ino in list(self.live.orphans):
            try:
                while not self.live.reclaim(ino):
                    pass
            except (CorruptError, DeviceError) as error:
                log.error("cannot free deleted file %d (inode): %s; run cowfs check", ino, error)

    def work_drops(self) -> None:
        """Empty the drop queue and commit."""
        self.empty_drops()
        if self.changed:
            self.commit()

    def empty_drops(self) -> None:
        """Empty the drop queue. Commits now and then; the next commit makes the rest durable."""
        while self.drops.working:
            self.drops.step(256)
            if self.store.admission.dirty_nodes > 1024 or self.store.map.dirty_groups > 1024:
                self.commit()

    # --- space ------------------------------------------------------------------------------------

    def space(self) -> Space:
        """The use of space now, the open transaction included."""
        store = self.store
        space_map = store.map
        catalog = self.catalog.tree.node_count * store.copies * 4
        return Space(
            total=space_map.total_blocks,
            used=space_map.used_blocks,
            tree=space_map.used_blocks - catalog,
            catalog=catalog,
            system=space_map.system_blocks,
            pending=space_map.pending_blocks,
            free=space_map.free_blocks,
            promised=store.admission.promised_blocks,
            reserved=store.admission.held_blocks(),
            available=store.admission.available_blocks(),
        )
