"""The edits of the catalog, as values: what a command, a program or the control socket asks for.

An edit is frozen, and is sent over the control socket as it is. It is made in two steps
(`Filesystem.check`, `Filesystem.freeze`):

- `check` comes before the freeze. It refuses what cannot be done (a missing name, a lost leaf, no
  room) and returns a `Plan` with the catalog's keys that will change. The filesystem then reaches
  those keys.
- `apply` comes inside the freeze, when every tree is whole. It changes only what the plan names, in
  memory, and cannot fail. The edit becomes durable with that commit: it is atomic (C6), and its
  cost depends only on the number of snapshots that it names.

When a root is deleted, its parent becomes the parent of the roots that grew from it.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, ClassVar, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from cowfs.errors import CorruptError, DeviceError, NoSpaceError, SnapshotError
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
    drop_key,
    root_key,
    snapshot_key,
    volume_key,
)
from cowfs.history.retention import require_released
from cowfs.storage.admission import TIER_DROP, TIER_FREE, TIER_REMOVE
from cowfs.storage.format import NODE_BLOCKS

if TYPE_CHECKING:
    from cowfs.files.volume import Volume
    from cowfs.history.filesystem import Filesystem

SLICE_NAMES = 64  # of an edit, checked in one turn of the daemon's loop: 2 ms
T = TypeVar("T")


@dataclass(slots=True)
class Plan:
    """What `Edit.check` found out, for `Edit.apply`.

    Attributes:
        keys: of the catalog, that `apply` changes beside the live volume's record.
        added: number of records that are new, or may become longer.
        records: the records to change, as they are before.
        drops: for each deleted record, its record in the drop queue.
        relinked: roots that grew from a deleted root, with their new parents.
        live: the record and the volume that become live.
        name: of the snapshot that keeps the old live volume.
    """

    keys: list[bytes] = field(default_factory=list)
    added: int = 4
    records: list[RootRecord] = field(default_factory=list)
    drops: list[DropRecord] = field(default_factory=list)
    relinked: list[RootRecord] = field(default_factory=list)
    live: tuple[RootRecord, Volume] | None = None
    name: str = ""


class Edit(Struct, frozen=True, tag_field="type", forbid_unknown_fields=True):
    """One change of the catalog. The fields are its arguments.

    Attributes:
        tier: of admission: how much of the reserve the edit leaves.
        replaces_live: whether another tree becomes the live volume.
        returns_one: whether the answer is one record, else a list of records.
    """

    tier: ClassVar[int] = TIER_REMOVE
    replaces_live: ClassVar[bool] = False
    returns_one: ClassVar[bool] = True

    def check(self, filesystem: Filesystem) -> Plan:
        """Find out whether the edit can be made, and what it will change. Changes nothing.

        Raises:
            UsageError: a name or a description is invalid.
            SnapshotError: a snapshot is missing, exists already, or is held.
            NoSpaceError: there is no room for the edit.
            CorruptError, DeviceError: the catalog, or a tree, cannot be read (C9).
        """
        raise NotImplementedError  # each subclass has its own; a Struct cannot be an ABC

    def check_in_slices(self, filesystem: Filesystem) -> Generator[None, None, Plan] | None:
        """`check` in slices of at most SLICE_NAMES names, for an edit that may have thousands.

        Requests may be served between two slices, but no other edit may be made. None for an edit
        whose check is short, or must not be interrupted.
        """
        return None

    def no_room(self) -> NoSpaceError:
        """The error to raise when admission refuses the edit."""
        return NoSpaceError("the filesystem is full; delete files or snapshots (cowdu shows which)")

    def apply(self, filesystem: Filesystem, plan: Plan) -> list[RootRecord]:
        """Make the edit, in a freeze. Returns the records of the answer."""
        raise NotImplementedError  # each subclass has its own; a Struct cannot be an ABC


class CreateSnapshot(Edit, frozen=True, tag="create-snapshot"):
    """Keep the live volume as it is now, under a name. Answer: the new snapshot."""

    name: str
    description: str = ""

    def check(self, filesystem: Filesystem) -> Plan:
        check_snapshot_name(self.name)
        check_description(self.description)
        _require_unused(filesystem, self.name)
        filesystem.store.admission.admit_snapshot(filesystem.live.tree.node_count)
        root_id = filesystem.catalog.require_root_id()
        return Plan([root_key(root_id), snapshot_key(self.name)])

    def apply(self, filesystem: Filesystem, plan: Plan) -> list[RootRecord]:
        live, store = filesystem.record, filesystem.store
        snapshot = replace(
            live,
            root_id=filesystem.catalog.take_root_id(),
            kind=RootKind.SNAPSHOT,
            name=self.name,
            description=self.description,
            uuid=os.urandom(16),
            created_generation=store.generation,
            created_ns=time.time_ns(),
            undo_id=0,
            flags=live.flags & FLAG_SHARES,
        )
        root = live.tree
        store.add_reference(root.block, root.twin)  # type: ignore[union-attr]
        filesystem.catalog.put_new(snapshot)
        filesystem.set_live_record(replace(live, parent_id=snapshot.root_id))
        store.admission.set_shared(live.node_count, store.generation)
        return [snapshot]


class DeleteSnapshots(Edit, frozen=True, tag="delete-snapshots"):
    """Delete all of these snapshots, or none. Answer: the deleted snapshots.

    Their roots move to the drop queue.
    """

    names: tuple[str, ...]

    tier: ClassVar[int] = TIER_FREE
    returns_one: ClassVar[bool] = False

    def check(self, filesystem: Filesystem) -> Plan:
        return _in_one_piece(self.check_in_slices(filesystem))

    def check_in_slices(self, filesystem: Filesystem) -> Generator[None, None, Plan]:
        records = yield from _snapshots(filesystem, self.names)
        require_released(records)
        relinked = yield from _relinked(filesystem, records)
        plan = Plan(added=len(records), records=records, relinked=relinked)
        plan.keys += [root_key(record.root_id) for record in relinked]
        now_ns = time.time_ns()
        copies = filesystem.store.copies
        for part in _slices(records):
            for record in part:
                number = filesystem.drops.next_number()
                plan.keys += (drop_key(number), root_key(record.root_id), snapshot_key(record.name))
                plan.drops.append(
                    DropRecord(
                        number=number,
                        root_id=record.root_id,
                        name=record.name,
                        deleted_ns=now_ns,
                        freed_blocks=0,
                        path=(DropStep(record.pointer, 0),),
                        referenced_blocks=record.referenced_blocks(copies),
                    )
                )
            yield
        return plan

    def no_room(self) -> NoSpaceError:
        count = len(dict.fromkeys(self.names))
        if count == 1:
            return super().no_room()
        return NoSpaceError(
            f"the filesystem is too full to delete {count} snapshots at once; "
            "delete fewer at a time"
        )

    def apply(self, filesystem: Filesystem, plan: Plan) -> list[RootRecord]:
        filesystem.catalog.remove(plan.records)
        _relink(filesystem, plan)
        for record in plan.records:
            filesystem.forget_volume(record.root_id)
        filesystem.drops.add_all(plan.drops)
        filesystem.shared_is_stale = True
        return plan.records


class RenameSnapshot(Edit, frozen=True, tag="rename-snapshot"):
    """Rename a snapshot. Answer: the renamed snapshot, which is no longer automatic."""

    old: str
    new: str

    def check(self, filesystem: Filesystem) -> Plan:
        check_snapshot_name(self.new)
        record = filesystem.catalog.snapshot(self.old)
        _require_unused(filesystem, self.new)
        keys = [root_key(record.root_id), snapshot_key(self.old), snapshot_key(self.new)]
        return Plan(keys, records=[record])

    def apply(self, filesystem: Filesystem, plan: Plan) -> list[RootRecord]:
        (record,) = plan.records
        filesystem.catalog.remove_name(record)
        renamed = replace(record, name=self.new, flags=record.flags & ~FLAG_AUTOMATIC)
        filesystem.catalog.put_new(renamed)
        return [renamed]


class HoldSnapshots(Edit, frozen=True, tag="hold-snapshots"):
    """Hold all of these snapshots, or release them; all or none. A held snapshot cannot be deleted.

    Answer: all of them, as they are then; those that needed no change too.
    """

    names: tuple[str, ...]
    held: bool

    tier: ClassVar[int] = TIER_FREE  # no record grows, and a release must come before a deletion
    returns_one: ClassVar[bool] = False

    def check(self, filesystem: Filesystem) -> Plan:
        return _in_one_piece(self.check_in_slices(filesystem))

    def check_in_slices(self, filesystem: Filesystem) -> Generator[None, None, Plan]:
        records = yield from _snapshots(filesystem, self.names)
        return Plan([root_key(record.root_id) for record in records], records=records)

    def apply(self, filesystem: Filesystem, plan: Plan) -> list[RootRecord]:
        flag = FLAG_HELD if self.held else 0
        records = [
            replace(record, flags=record.flags & ~FLAG_HELD | flag) for record in plan.records
        ]
        for record in records:
            filesystem.catalog.put(record)
        return records


class Rollback(Edit, frozen=True, tag="rollback"):
    """Make the live volume what a snapshot holds; keep its old state as an automatic snapshot.

    Answer: that automatic snapshot. Every other snapshot stays. `force` allows it while files are
    open for writing, which only a mount can know.

    Rollback is the way out of a filesystem that was filled by mistake. So it is not refused when
    there is no room to copy the nodes that it shares. Then deleting files may lack that room until
    a snapshot is deleted.
    """

    name: str
    force: bool = False

    tier: ClassVar[int] = TIER_DROP
    replaces_live: ClassVar[bool] = True

    def check(self, filesystem: Filesystem) -> Plan:
        target = filesystem.catalog.snapshot(self.name)
        root = target.pointer
        for block in (root.block, root.twin):
            if block:
                filesystem.store.map.require(block, NODE_BLOCKS)
        return _plan_successor(filesystem, target, target.root_id, Plan(records=[target]))

    def apply(self, filesystem: Filesystem, plan: Plan) -> list[RootRecord]:
        (target,) = plan.records
        root = target.pointer
        filesystem.store.add_reference(root.block, root.twin)
        return _replace_live(filesystem, plan, f"the state before the rollback to {self.name}")


class Undo(Edit, frozen=True, tag="undo"):
    """Undo the last rollback or undo. Answer: the automatic snapshot of the state before this undo.

    `force`, and the room for copies, are as for `Rollback`.
    """

    force: bool = False

    tier: ClassVar[int] = TIER_DROP
    replaces_live: ClassVar[bool] = True

    def check(self, filesystem: Filesystem) -> Plan:
        target = _undo_target(filesystem)
        relinked = _in_one_piece(_relinked(filesystem, [target]))
        plan = Plan(records=[target], relinked=relinked)
        plan.keys += (root_key(target.root_id), snapshot_key(target.name))
        plan.keys += [root_key(record.root_id) for record in plan.relinked]
        return _plan_successor(filesystem, target, target.parent_id, plan)

    def apply(self, filesystem: Filesystem, plan: Plan) -> list[RootRecord]:
        (target,) = plan.records
        filesystem.catalog.remove([target])  # the live volume takes over its reference
        filesystem.forget_volume(target.root_id)
        _relink(filesystem, plan)
        return _replace_live(filesystem, plan, "the state before a rollback was undone")


# The control socket decodes exactly these.
AnyEdit = CreateSnapshot | DeleteSnapshots | RenameSnapshot | HoldSnapshots | Rollback | Undo


def _require_unused(filesystem: Filesystem, name: str) -> None:
    if filesystem.catalog.find(name) is not None:
        raise SnapshotError(f"snapshot {name!r} exists already; choose another name")


def _undo_target(filesystem: Filesystem) -> RootRecord:
    undo_id = filesystem.record.undo_id
    record = filesystem.catalog.root(undo_id) if undo_id else None
    if record is None:
        raise SnapshotError("there is no rollback to undo, or its automatic snapshot was deleted")
    if record.held:
        raise SnapshotError(
            f"undo would use up snapshot {record.name!r}, which is held; "
            "cowfs snapshot release it first"
        )
    return record


def _in_one_piece(slices: Generator[None, None, T]) -> T:
    """Run a check to its end."""
    while True:
        try:
            next(slices)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


def _slices(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for at in range(0, len(items), SLICE_NAMES):
        yield items[at : at + SLICE_NAMES]


def _snapshots(
    filesystem: Filesystem, names: Sequence[str]
) -> Generator[None, None, list[RootRecord]]:
    """The snapshots of these names, each once, looked up in slices."""
    records = []
    for part in _slices(list(dict.fromkeys(names))):
        records += [filesystem.catalog.snapshot(name) for name in part]
        yield
    return records


def _relinked(
    filesystem: Filesystem, gone: list[RootRecord]
) -> Generator[None, None, list[RootRecord]]:
    """The roots that grew from roots in `gone`, each with its nearest remaining ancestor."""
    parents = {record.root_id: record.parent_id for record in gone}
    live_id = filesystem.record.root_id
    relinked: list[RootRecord] = []
    next_id = 0
    while True:
        grown = filesystem.catalog.roots_grown_from(parents, next_id)
        part = list(islice(grown, SLICE_NAMES))
        relinked += [
            replace(record, parent_id=_ancestor(parents, record.parent_id))
            for record in part
            if record.root_id != live_id
        ]
        if len(part) < SLICE_NAMES:
            return relinked
        next_id = part[-1].root_id + 1
        yield


def _ancestor(parents: dict[int, int], root_id: int) -> int:
    """The nearest ancestor of `root_id` that is not in `parents`: deleted roots with their parents.

    A damaged image may have a cycle of parents; then the answer is 0, no parent.
    """
    for _ in range(len(parents) + 1):
        if root_id not in parents:
            return root_id
        root_id = parents[root_id]
    return 0


def _relink(filesystem: Filesystem, plan: Plan) -> None:
    """Write the new parents of the roots that grew from the plan's records."""
    for record in plan.relinked:
        filesystem.catalog.put(record)
    parents = {record.root_id: record.parent_id for record in plan.records}
    live = filesystem.record
    if live.parent_id in parents or live.undo_id in parents:
        filesystem.set_live_record(
            replace(
                live,
                parent_id=_ancestor(parents, live.parent_id),
                undo_id=0 if live.undo_id in parents else live.undo_id,
            )
        )


def _plan_successor(filesystem: Filesystem, target: RootRecord, parent_id: int, plan: Plan) -> Plan:
    """Plan that the tree of `target` becomes the live volume, and a snapshot keeps the old one.

    Raises:
        SnapshotError: the tree cannot be read.
    """
    catalog = filesystem.catalog
    record = replace(
        target,
        root_id=catalog.require_root_id(),
        kind=RootKind.VOLUME,
        name=MAIN_VOLUME,
        description="",
        uuid=filesystem.record.uuid,
        origin_uuid=target.uuid,
        created_generation=filesystem.store.generation,
        created_ns=time.time_ns(),
        parent_id=parent_id,
        undo_id=filesystem.record.root_id,
        flags=target.flags & FLAG_SHARES,
    )
    volume = filesystem.open_volume(record, writable=True)
    try:
        volume.load_orphans()
    except (CorruptError, DeviceError) as error:
        refusal = SnapshotError(
            f"snapshot {target.name!r} cannot be read: {error}; run cowfs check"
        )
        refusal.errno = errno.EIO
        raise refusal from error
    plan.live = record, volume
    stamp = time.strftime("%Y-%m-%dT%H.%M.%S", time.localtime(record.created_ns // 10**9))
    plan.name = name = f"before-rollback-{stamp}"
    number = 1
    while catalog.find(plan.name) is not None:
        number += 1
        plan.name = f"{name}.{number}"
    plan.keys += (root_key(record.root_id), volume_key(MAIN_VOLUME), snapshot_key(plan.name))
    return plan


def _replace_live(filesystem: Filesystem, plan: Plan, reason: str) -> list[RootRecord]:
    """Make the plan's volume the live one. The edit has counted the reference to its tree.

    Returns:
        The automatic snapshot of the old live volume.
    """
    assert plan.live is not None
    record, volume = plan.live
    old, store, catalog = filesystem.record, filesystem.store, filesystem.catalog
    kept = replace(
        old,
        kind=RootKind.SNAPSHOT,
        name=plan.name,
        description=reason,
        uuid=os.urandom(16),
        created_generation=store.generation,
        created_ns=record.created_ns,
        undo_id=0,
        flags=FLAG_AUTOMATIC | old.flags & FLAG_SHARES,
    )
    catalog.put_new(kept)
    root_id = catalog.take_root_id()
    assert root_id == record.root_id, "another edit came between"
    catalog.put_name(record)
    filesystem.set_live(record, volume)
    store.admission.set_shared(record.node_count, store.generation)
    return [kept]
