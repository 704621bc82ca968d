"""An open image: the live volume, its snapshots, and the commit that moves them through time.

Snapshot, delete, rename, hold, rollback and undo are *edits* of the catalog. They are applied at a
freeze, when every tree is whole, and become durable with that commit: each is atomic (C6) and O(1).
"""

import errno
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cowfs.errors import (
    CorruptError,
    CowfsError,
    DeviceError,
    SnapshotError,
)
from cowfs.files.items import references
from cowfs.files.volume import Volume
from cowfs.history.catalog import Catalog
from cowfs.history.drops import DropQueue
from cowfs.history.records import (
    FLAG_AUTOMATIC,
    FLAG_HELD,
    FLAG_SHARES,
    MAIN_VOLUME,
    DropRecord,
    DropStep,
    RootKind,
    RootRecord,
    check_description,
    check_snapshot_name,
)
from cowfs.history.retention import require_released
from cowfs.storage.btree import Tree
from cowfs.storage.commit import Commit, begin, finish
from cowfs.storage.discards import Sweep
from cowfs.storage.format import (
    FLAG_CLEAN,
)
from cowfs.storage.store import Store

log = logging.getLogger(__name__)

SHARED_READS_MAX = 256  # nodes read to learn what snapshots share: some ten milliseconds
# Blocks that wait for two more commits before they are free. So many (4 MiB) are worth two commits that
# change nothing; such a commit leaves some ten blocks behind itself.
FOLLOW_UP_BLOCKS_MIN = 1024
SNAPSHOT_VOLUMES_MAX = 64  # open trees of snapshots; each holds little, its nodes are in the cache
EditAction = Callable[["Filesystem"], object]


@dataclass(slots=True)
class Edit:
    """A change of the catalog on its way into a commit; `result` or `error` tells how it went."""

    action: EditAction
    result: object = None
    error: CowfsError | None = None


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
        self.live = self._volume(self.record, writable=store.writable)
        self.drops = DropQueue(store, self.catalog)
        self.inflight: Commit | None = None
        self.discard = discard
        self._snapshot_volumes: dict[int, Volume] = {}
        self._shared_is_stale = False
        if store.writable:
            store.admission.relieve = self._relieve
            store.admission.on_full = self._say_full
            self.live.load_orphans()
            store.admission.set_shared(self.record.node_count, superblock.generation)
            self._shared_is_stale = True
            self._count_shared()

    # --- roots --------------------------------------------------------------------------------------

    def _volume(self, record: RootRecord, *, writable: bool) -> Volume:
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
            volume = self._snapshot_volumes[root_id] = self._volume(record, writable=False)
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
            flags=self.record.flags | (FLAG_SHARES if live.ranges.shared else 0),
        )

    # --- edits --------------------------------------------------------------------------------------

    def create_snapshot(self, name: str, description: str = "") -> EditAction:
        """The live volume as it is, under a name. The edit's result is the new record.

        Raises:
            UsageError: the name or the description cannot be.
            SnapshotError: the name is taken (here, or when the edit runs).
            NoSpaceError: there would be no room to delete what it holds (C10).
        """
        check_snapshot_name(name)
        check_description(description)
        self._require_unused(name)
        self.store.admission.admit_snapshot(self.live.tree.node_count)

        def apply(filesystem: "Filesystem") -> RootRecord:
            filesystem._require_unused(name)
            live = filesystem.record
            snapshot = replace(
                live,
                root_id=filesystem.catalog.take_root_id(),
                kind=RootKind.SNAPSHOT,
                name=name,
                description=description,
                uuid=os.urandom(16),
                created_generation=filesystem.store.generation,
                created_ns=time.time_ns(),
                undo_id=0,
                flags=live.flags & FLAG_SHARES,
            )
            root = live.tree
            filesystem.store.add_reference(root.block, root.twin)  # type: ignore[union-attr]
            filesystem._put_new(snapshot)
            filesystem._set_live(replace(live, parent_id=snapshot.root_id))
            filesystem.store.admission.set_shared(live.node_count, filesystem.store.generation)
            return snapshot

        return apply

    def delete_snapshots(self, names: Sequence[str]) -> EditAction:
        """All of these, or none. The edit's result is the list of their records.

        Raises:
            SnapshotError: one of them is unknown or held (here, or when the edit runs).
        """
        require_released([self.catalog.snapshot(name) for name in dict.fromkeys(names)])

        def apply(filesystem: "Filesystem") -> list[RootRecord]:
            catalog = filesystem.catalog
            records = [catalog.snapshot(name) for name in dict.fromkeys(names)]
            require_released(records)
            for record in records:
                if record.created_generation == filesystem.store.generation:  # not written yet
                    raise SnapshotError(f"snapshot {record.name!r} is being made; delete it then")
            for record in records:
                record = catalog.snapshot(record.name)  # its parent may have gone just now
                catalog.remove(record)
                filesystem._relink(record)
                filesystem._snapshot_volumes.pop(record.root_id, None)
                filesystem.drops.add(
                    DropRecord(
                        number=filesystem.drops.next_number(),
                        root_id=record.root_id,
                        name=record.name,
                        deleted_ns=time.time_ns(),
                        freed_blocks=0,
                        path=(DropStep(record.pointer, 0),),
                        referenced_blocks=record.referenced_blocks(filesystem.store.copies),
                    )
                )
            filesystem._shared_is_stale = True
            return records

        return apply

    def rename_snapshot(self, old: str, new: str) -> EditAction:
        """The edit's result is the renamed record. Raises as the others."""
        check_snapshot_name(new)
        self.catalog.snapshot(old)
        self._require_unused(new)

        def apply(filesystem: "Filesystem") -> RootRecord:
            record = filesystem.catalog.snapshot(old)
            filesystem._require_unused(new)
            filesystem.catalog.remove_name(record)
            renamed = replace(record, name=new, flags=record.flags & ~FLAG_AUTOMATIC)
            filesystem._put_new(renamed)
            return renamed

        return apply

    def hold_snapshots(self, names: Sequence[str], held: bool) -> EditAction:
        """Refuse the deletion of all of these from now on, or no longer. All of them, or none.

        The edit's result is the list of their records. One that is as it should be stays so.

        Raises:
            SnapshotError: one of them is unknown (here, or when the edit runs).
        """
        for name in names:
            self.catalog.snapshot(name)

        def apply(filesystem: "Filesystem") -> list[RootRecord]:
            records = [filesystem.catalog.snapshot(name) for name in dict.fromkeys(names)]
            flag = FLAG_HELD if held else 0
            records = [
                replace(record, flags=record.flags & ~FLAG_HELD | flag) for record in records
            ]
            for record in records:
                filesystem.catalog.put(record)
            return records

        return apply

    def rollback(self, name: str) -> EditAction:
        """Let the live volume be what a snapshot holds; keep what it was as an automatic snapshot.

        The edit's result is that automatic snapshot's record. Every other snapshot stays.
        """
        self.catalog.snapshot(name)

        def apply(filesystem: "Filesystem") -> RootRecord:
            target = filesystem.catalog.snapshot(name)
            record, volume = filesystem._successor(target, target.root_id)
            root = target.tree
            filesystem.store.add_reference(root.block, root.twin)  # type: ignore[union-attr]
            reason = f"the state before the rollback to {name}"
            return filesystem._replace_live(record, volume, reason)

        self._successor(self.catalog.snapshot(name), 0)  # damage is to be found before the freeze
        return apply

    def undo(self) -> EditAction:
        """Take back the last rollback (or undo). The edit's result is the snapshot of what it undid.

        Raises:
            SnapshotError: there is nothing to undo, or the snapshot that it would use up is held.
        """
        self._undo_target()

        def apply(filesystem: "Filesystem") -> RootRecord:
            target = filesystem._undo_target()
            record, volume = filesystem._successor(target, target.parent_id)
            filesystem.catalog.remove(target)  # the live volume takes over its reference
            filesystem._snapshot_volumes.pop(target.root_id, None)
            filesystem._relink(target)
            reason = "the state before a rollback was undone"
            return filesystem._replace_live(record, volume, reason)

        self._successor(self._undo_target(), 0)
        return apply

    def _undo_target(self) -> RootRecord:
        record = self.catalog.root(self.record.undo_id) if self.record.undo_id else None
        if record is None:
            raise SnapshotError(
                "there is no rollback to undo, or its automatic snapshot is deleted"
            )
        if record.held:
            raise SnapshotError(
                f"undo would use up snapshot {record.name!r}, which is held; cowfs snapshot release "
                "it first"
            )
        return record

    def _successor(self, target: RootRecord, parent_id: int) -> tuple[RootRecord, Volume]:
        """What the live volume would be with the tree of `target`. Changes nothing.

        Raises:
            SnapshotError: the tree cannot be read; a freeze goes on without the edit.
        """
        record = replace(
            target,
            root_id=self.catalog.next_root_id,
            kind=RootKind.VOLUME,
            name=MAIN_VOLUME,
            description="",
            uuid=self.record.uuid,
            origin_uuid=target.uuid,
            created_generation=self.store.generation,
            created_ns=time.time_ns(),
            parent_id=parent_id,
            undo_id=self.record.root_id,
            flags=target.flags & FLAG_SHARES,
        )
        volume = self._volume(record, writable=True)
        try:
            volume.load_orphans()
        except (CorruptError, DeviceError) as error:
            refusal = SnapshotError(f"snapshot {target.name!r} cannot be read: {error}")
            refusal.errno = errno.EIO
            raise refusal from error
        return record, volume

    def _replace_live(self, record: RootRecord, volume: Volume, reason: str) -> RootRecord:
        """The live volume becomes that of `_successor`; the caller has seen to its tree's reference.

        Returns:
            The automatic snapshot of what was live.
        """
        old = self.record
        now_ns = record.created_ns
        stamp = time.strftime("%Y-%m-%dT%H.%M.%S", time.localtime(now_ns // 10**9))
        name = f"before-rollback-{stamp}"
        number = 1
        while self.catalog.find(name) is not None:
            number += 1
            name = f"before-rollback-{stamp}.{number}"
        kept = replace(
            old,
            kind=RootKind.SNAPSHOT,
            name=name,
            description=reason,
            uuid=os.urandom(16),
            created_generation=self.store.generation,
            created_ns=now_ns,
            undo_id=0,
            flags=FLAG_AUTOMATIC | old.flags & FLAG_SHARES,
        )
        self._put_new(kept)
        root_id = self.catalog.take_root_id()
        assert root_id == record.root_id, "another edit came between"
        self.live.writable = False
        self._snapshot_volumes[old.root_id] = self.live
        self.catalog.put_name(record)
        self._set_live(record)
        self.live = volume
        self.store.admission.set_shared(record.node_count, self.store.generation)
        return kept

    def _require_unused(self, name: str) -> None:
        if self.catalog.find(name) is not None:
            raise SnapshotError(f"there is a snapshot {name!r} already")

    def _put_new(self, record: RootRecord) -> None:
        self.catalog.put(record)
        self.catalog.put_name(record)

    def _set_live(self, record: RootRecord) -> None:
        self.record = record
        self.catalog.put(record)

    def _relink(self, gone: RootRecord) -> None:
        """What grew from `gone` grew from its parent now."""
        for record in list(self.catalog.roots()):
            if record.root_id == self.record.root_id:
                continue
            if record.parent_id == gone.root_id:
                self.catalog.put(replace(record, parent_id=gone.parent_id))
        live = self.record
        if gone.root_id in (live.parent_id, live.undo_id):
            self._set_live(
                replace(
                    live,
                    parent_id=gone.parent_id if live.parent_id == gone.root_id else live.parent_id,
                    undo_id=0 if live.undo_id == gone.root_id else live.undo_id,
                )
            )

    def _count_shared(self) -> None:
        """Find out anew what the live tree shares with snapshots, once deleted ones are given back."""
        if not self._shared_is_stale:
            return
        tree, store = self.live.tree, self.store
        if self.drops.progress():
            return  # they share as long as they hold
        self._shared_is_stale = False
        snapshots = self.catalog.snapshots()
        if not snapshots:
            store.admission.set_shared(0, 0)
            return
        newest = max(record.created_generation for record in snapshots)
        try:
            newer = tree.count_newer(newest, SHARED_READS_MAX)
        except (CorruptError, DeviceError):
            newer = 0  # more than is shared: the safe side
        store.admission.set_shared(tree.node_count - newer, newest)

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

    def freeze(self, edits: Sequence[Edit] = (), *, clean: bool = False) -> Commit:
        """Close the open transaction and open the next. The caller writes and finishes the commit.

        Raises:
            DeviceError: a commit failed before (C8).
            NoSpaceError: the reserve was too small; the image is read-only from now on.
        """
        assert self.inflight is None, "one commit at a time"
        store = self.store
        store.require_writable()
        try:
            self.live.flush()
            nodes = self.live.tree.place()
            self._set_live(self.current_record())
            for edit in edits:
                try:
                    self.catalog.load()  # damage must stop an edit before its first half
                    edit.result = edit.action(self)
                except (CorruptError, DeviceError):
                    raise  # half of the edit may be done
                except CowfsError as error:
                    edit.error = error
            self.drops.save()
            self._count_shared()
            nodes += self.catalog.tree.place()
            self.inflight = begin(
                store,
                nodes,
                catalog_nodes=self.catalog.tree.node_count,
                next_root_id=self.catalog.next_root_id,
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

    def commit(self, edits: Sequence[Edit] = (), *, clean: bool = False) -> None:
        """Freeze, write and finish, here and now. Raises an edit's error when there is one."""
        self._wait()
        commit = self.freeze(edits, clean=clean)
        commit.write()
        self.finish(commit)
        for edit in edits:
            if edit.error is not None:
                raise edit.error

    def apply(self, action: EditAction) -> object:
        """One edit, durable when this returns. Returns its result."""
        edit = Edit(action)
        self.commit([edit])
        return edit.result

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
        """Empty the drop queue, committing as it goes."""
        while self.drops.working:
            self.drops.step(256)
            if self.store.admission.dirty_nodes > 1024 or self.store.map.dirty_groups > 1024:
                self.commit()
        if self.changed:
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
