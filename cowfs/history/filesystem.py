"""An open image: the live volume, its snapshots, and the commit that moves them through time.

Snapshot, delete, rename, hold, rollback and undo are *edits* of the catalog (edits.py). They are checked
before a freeze and applied in it, when every tree is whole, and become durable with that commit: each is
atomic (C6). A freeze changes what is in memory and cannot be refused.
"""

import logging
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace

from cowfs.errors import CorruptError, CowfsError, DeviceError, NoSpaceError
from cowfs.files.items import references
from cowfs.files.volume import Volume
from cowfs.history.catalog import Catalog
from cowfs.history.drops import DropQueue
from cowfs.history.edits import Edit, Plan
from cowfs.history.records import FLAG_SHARES, MAIN_VOLUME, RootKind, RootRecord, root_key
from cowfs.storage.admission import TIER_FREE
from cowfs.storage.btree import Tree
from cowfs.storage.commit import Commit, begin, finish
from cowfs.storage.discards import Sweep
from cowfs.storage.format import FLAG_CLEAN
from cowfs.storage.store import Store

log = logging.getLogger(__name__)

SHARED_READS_MAX = 256  # nodes read to learn what snapshots share: some ten milliseconds
# Blocks that wait for two more commits before they are free. So many (4 MiB) are worth two commits that
# change nothing; such a commit leaves some ten blocks behind itself.
FOLLOW_UP_BLOCKS_MIN = 1024
ENTRIES_PER_LEAF_MIN = 10  # of the catalog, whatever its records describe
SNAPSHOT_VOLUMES_MAX = 64  # open trees of snapshots; each holds little, its nodes are in the cache


@dataclass(slots=True)
class Checked:
    """An edit that can be made in the freeze that follows at once; `result` is set there."""

    edit: Edit
    plan: Plan
    generation: int
    result: list[RootRecord] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Space:
    """Where the blocks of an image are, in blocks. used + free + system + pending = total (I6).

    `tree` is what all volumes, snapshots and the drop queue hold; `catalog` the catalog's nodes;
    `system` the superblocks and the space map; `pending` was freed and waits for its generation to go;
    `promised` is data in memory; `reserved` is held back for deleting. `available` is for new data.
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
    """Args: an open store; see `open_filesystem`."""

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
        self.discard = discard
        self._snapshot_volumes: dict[int, Volume] = {}
        self.shared_is_stale = False
        if store.writable:
            store.admission.relieve = self._relieve
            store.admission.on_full = self._say_full
            self.live.load_orphans()
            store.admission.set_shared(self.record.node_count, superblock.generation)
            store.admission.set_catalog(self.catalog.tree.node_count)
            self.shared_is_stale = True
            self._count_shared()

    # --- roots --------------------------------------------------------------------------------------

    def open_volume(self, record: RootRecord, *, writable: bool) -> Volume:
        """The files of a root."""
        root: Any = record.tree  # a node while its commit is on its way
        tree = Tree(self.store, root, record.root_id, record.node_count, references)
        return Volume(
            tree,
            self.store.superblock.name_seed,
            next_ino=record.next_ino,
            inode_count=record.inode_count,
            data_blocks=record.data_blocks,
            writable=writable,
        )

    def volume(self, root_id: int) -> Volume | None:
        """The volume of a root: the live one, or a snapshot's, read-only. None when it is gone."""
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
        """The live volume's record as a commit would write it now, without its tree."""
        live = self.live
        return replace(
            self.record,
            tree=live.tree.root,
            next_ino=live.inodes.next_ino,
            node_count=max(1, live.tree.node_count),  # the image may have said any number
            data_blocks=live.data.data_blocks,
            inode_count=live.inodes.count,
            flags=self.record.flags | (FLAG_SHARES if live.ranges.has_reflinks else 0),
        )

    # --- edits --------------------------------------------------------------------------------------

    def check(self, edit: Edit, plan: Plan | None = None) -> Checked:
        """Find out whether an edit can be made, and reach all that it changes (edits.py).

        The freeze must follow at once. May commit, to make room.

        Args:
            plan: what `edit.check_in_slices` found; no other edit was made since it began.

        Raises:
            CowfsError: the edit cannot be made, and nothing of it was done.
        """
        store = self.store
        store.require_writable()
        self.live.flush()  # what is checked is what will be frozen
        generation = store.generation
        if plan is None:
            plan = edit.check(self)
        try:
            store.admission.admit(0, edit.tier, self._nodes_of(edit, plan))
        except NoSpaceError:
            raise edit.no_room() from None
        if generation != store.generation:  # a commit made room, and began anew
            self.live.flush()
            plan = edit.check(self)
        with self.catalog.operation.begin_admitted():
            for key in sorted(plan.keys):
                self.catalog.tree.reach(key)
        return Checked(edit, plan, store.generation)

    def _nodes_of(self, edit: Edit, plan: Plan) -> int:
        """Nodes of the catalog that an edit dirties beyond what each commit may: those on the paths to
        its keys and to the live volume's record, and the leaves that new records need.
        """
        keys = sorted([*plan.keys, root_key(self.record.root_id)])
        nodes = self.catalog.tree.count_nodes(keys) + plan.added // ENTRIES_PER_LEAF_MIN + 1
        return (
            nodes
            if edit.tier == TIER_FREE
            else max(0, nodes - self.store.admission.limits.commit_nodes)
        )

    def set_live_record(self, record: RootRecord) -> None:
        """The live volume's record is another one. In a freeze."""
        self.record = record
        self.catalog.put(record)

    def set_live(self, record: RootRecord, volume: Volume) -> None:
        """Another volume is the live one; what was live is the snapshot of its root. In a freeze."""
        self.live.make_read_only()
        self._snapshot_volumes[self.record.root_id] = self.live
        self.set_live_record(record)
        self.live = volume

    def forget_volume(self, root_id: int) -> None:
        """A snapshot is gone."""
        self._snapshot_volumes.pop(root_id, None)

    def _count_shared(self) -> None:
        """Find out anew what the live tree shares with snapshots, once deleted ones are given back."""
        if not self.shared_is_stale or len(self.drops):
            return  # those that are dropped share as long as they hold
        tree, admission = self.live.tree, self.store.admission
        self.shared_is_stale = False
        try:
            newest = self.catalog.newest_snapshot_generation()
            newer = tree.count_newer(newest, SHARED_READS_MAX) if newest else 0
        except (CorruptError, DeviceError):
            return  # more than is shared: the safe side
        if newest:
            admission.set_shared(tree.node_count - newer, newest)
        else:
            admission.set_shared(0, 0)

    # --- commit -------------------------------------------------------------------------------------

    @property
    def changed(self) -> bool:
        """Whether there is anything that a commit would make durable."""
        store = self.store
        return (
            self.live.changed
            or self.drops.changed
            or store.map.dirty_groups > 0
            or (store.writable and len(store.repairs) > 0)
        )

    @property
    def marked_clean(self) -> bool:
        """Whether the newest commit says that the image was unmounted in order."""
        return bool(self.store.superblock.flags & FLAG_CLEAN)

    def freeze(self, checked: Checked | None = None, *, clean: bool = False) -> Commit:
        """Close the open transaction and open the next. The caller writes and finishes the commit.

        Args:
            checked: an edit to make in it, checked just now.

        Raises:
            DeviceError: a commit failed before (C8).
            NoSpaceError: the reserve was too small; the image is read-only from now on.
        """
        assert self.inflight is None, "one commit at a time"
        store, catalog = self.store, self.catalog
        store.require_writable()
        assert checked is None or checked.generation == store.generation, "checked too early"
        try:
            with catalog.operation.begin_admitted() as operation:
                catalog.tree.reach(root_key(self.record.root_id))
                self.drops.reach()
                operation.change()
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
        except Exception as error:  # whatever it was: half a transaction must never be written
            if store.failed is None:
                store.fail(error)
            raise
        return self.inflight

    def finish(self, commit: Commit) -> None:
        """After `commit.write()`: raises DeviceError if it failed (C8)."""
        if self.inflight is commit:
            self.inflight = None
        finish(commit)
        self._count_shared()

    def commit(self, checked: Checked | None = None, *, clean: bool = False) -> None:
        """Freeze, write and finish, here and now."""
        self._wait()
        commit = self.freeze(checked, clean=clean)
        commit.write()
        self.finish(commit)

    def apply(self, edit: Edit) -> list[RootRecord]:
        """Make an edit; it is durable when this returns. Returns the records of its answer.

        Raises:
            CowfsError: it cannot be made, and nothing was changed; or the commit failed (C8).
        """
        self._wait()
        checked = self.check(edit)
        self.commit(checked)
        return checked.result

    def _wait(self) -> None:
        if self.inflight is not None:
            self.finish(self.inflight)

    def _relieve(self) -> bool:
        """Commit so that freed blocks can be used. Returns whether that could help."""
        store = self.store
        if not (store.map.pending_blocks or store.map.pending_system_blocks or self.changed):
            return False
        if store.pins and store.map.pending_upto(min(store.pins.values())) == 0:
            store.pins.clear()  # a reader must not keep the filesystem full
        self.commit()
        return True

    def _say_full(self) -> None:
        """Log what may help; what each deletion frees is for `cowfs df` to find out, not the loop."""
        snapshots = self.catalog.snapshots()
        if not snapshots:
            log.warning("the filesystem is full, and no snapshot holds anything; delete files")
            return
        copies = self.store.copies
        largest = max(snapshots, key=lambda record: record.referenced_blocks(copies))
        log.warning(
            "the filesystem is full; of %d snapshots %r is the oldest and %r the largest; cowfs df "
            "names those whose deletion frees most",
            len(snapshots),
            snapshots[0].name,
            largest.name,
        )

    @property
    def follow_up_due(self) -> bool:
        """Whether much waits for nothing but the next commits to be free."""
        store = self.store
        if store.failed is not None or store.map.pending_blocks < FOLLOW_UP_BLOCKS_MIN:
            return False
        limit = min([store.generation, *store.pins.values()])
        return store.map.pending_upto(limit) >= FOLLOW_UP_BLOCKS_MIN

    def close(self) -> None:
        """Commit what is left, mark the image clean, discard what came free, and close the device."""
        try:
            if self.store.writable and self.store.failed is None:
                self._wait()
                if self.changed or not self.marked_clean:
                    self.commit(clean=True)
                if self.discard:
                    self._discard_at_end()
        finally:
            self.store.device.close()

    def follow_up(self) -> None:
        """Commit, though nothing changed, until no more comes free by that."""
        for _ in range(self.store.admission.limits.retained_generations):
            if self.follow_up_due:
                self.commit(clean=True)

    def _discard_at_end(self) -> None:
        """All is durable. What fails here is logged, and takes nothing from that."""
        try:
            self.follow_up()
            Sweep.of_released(self.store).run()
        except CowfsError as error:
            log.warning("free space was not given back to the host: %s", error)

    def reclaim_orphans(self) -> None:
        """Give back every orphan. Only while nobody has one open: at the start.

        One that is damaged keeps what it holds, and the others go.
        """
        for ino in list(self.live.orphans):
            try:
                while not self.live.reclaim(ino):
                    pass
            except (CorruptError, DeviceError) as error:
                log.error("orphan %d keeps its space: %s; run cowfs check", ino, error)

    def work_drops(self) -> None:
        """Empty the drop queue, and make that durable."""
        self.empty_drops()
        if self.changed:
            self.commit()

    def empty_drops(self) -> None:
        """Empty the drop queue, committing as it goes; the next commit makes the rest durable."""
        while self.drops.working:
            self.drops.step(256)
            if self.store.admission.dirty_nodes > 1024 or self.store.map.dirty_groups > 1024:
                self.commit()

    # --- space --------------------------------------------------------------------------------------

    def space(self) -> Space:
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
