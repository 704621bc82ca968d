"""Promise: snapshots, rollback and the drop queue agree with a model that simply keeps copies."""

import random
import stat
from collections.abc import Callable

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from cowfs.accounting.owners import OwnerKind, owner_sets
from cowfs.accounting.snapshot_usage import referenced_blocks, written_blocks
from cowfs.accounting.virtual_drop import simulate_deletion
from cowfs.errors import DeviceError, NoSpaceError, SnapshotError
from cowfs.history.edits import (
    CreateSnapshot,
    DeleteSnapshots,
    Edit,
    HoldSnapshots,
    RenameSnapshot,
    Rollback,
    Undo,
)
from cowfs.history.records import RootRecord
from cowfs.storage.commit import Commit
from tests.model.devices import Fault
from tests.model.files_machine import FilesMachine, compare, picks, sizes
from tests.model.recount import reachable_from, recount
from tests.sizes import machine_settings

snapshot_names = st.sampled_from(["one", "two", "three", "früh", "x" * 255])


class HistoryMachine(FilesMachine):
    """FilesMachine with snapshots and rollback."""

    total_blocks_choices = (8192, 16384)

    def __init__(self) -> None:
        super().__init__()
        self.next_fault: Fault | None = None
        self.next_seed = 0
        self.extra = 0

    # --- edits ------------------------------------------------------------------------------------

    @rule(
        kind=st.sampled_from(["write", "flush"]),
        after=st.integers(0, 8),
        short=st.booleans(),
        seed=picks,
    )
    def let_next_edit_crash(self, kind: str, after: int, short: bool, seed: int) -> None:
        self.next_fault = Fault(kind, after, short=short, sticky=True)
        self.next_seed = seed

    def _apply(self, edit: Edit, model: Callable[..., None], *, legal: bool) -> RootRecord | None:
        """Make an edit, or see it refused. Returns the first record of its answer."""
        self.settle()
        try:
            checked = self.filesystem.check(edit)
        except SnapshotError:
            assert not legal, "refused what the model does"
            return None
        assert legal, "allowed what the model refuses"
        commit = self.filesystem.freeze(checked)
        model(checked.result[0] if edit.returns_one else checked.result)
        self._write_commit(commit)
        return checked.result[0] if checked.result else None

    def _write_commit(self, commit: Commit) -> None:
        """Write a frozen commit, and remember the model that it will make durable."""
        self.states[commit.generation] = self.model.copy()
        self.device.fault, self.next_fault = self.next_fault, None
        commit.write()
        try:
            self.filesystem.finish(commit)
        except DeviceError:
            assert self.device.fault is not None
            self.open(self.disk.crash(random.Random(self.next_seed)))
            self.check()
            self.compare_all()
        else:
            assert self.device.fault is None or not self.device.fault.fired
            self.device.fault = None
            self.acknowledged = commit.generation

    @rule(name=snapshot_names)
    def snapshot(self, name: str) -> None:
        def model(_record: RootRecord) -> None:
            self.model.snapshots[name] = self.files.copy()

        legal = name not in self.model.snapshots
        if legal and len(self.model.snapshots) >= 5:
            return
        self._apply(CreateSnapshot(name, "text"), model, legal=legal)

    @precondition(lambda self: self.model.snapshots)
    @rule(chosen=st.sets(picks, min_size=1, max_size=4), extra=st.sampled_from([[], [], ["none"]]))
    def delete(self, chosen: set[int], extra: list[str]) -> None:
        there = sorted(self.model.snapshots)
        wanted = sorted({there[pick % len(there)] for pick in chosen}) + extra

        def model(_records: list[RootRecord]) -> None:
            for name in wanted:
                del self.model.snapshots[name]
                if self.model.undo == name:
                    self.model.undo = None

        legal = not extra and self.model.held.isdisjoint(wanted)
        self._apply(DeleteSnapshots(tuple(wanted)), model, legal=legal)

    @precondition(lambda self: self.model.snapshots)
    @rule(
        chosen=st.sets(picks, min_size=1, max_size=2),
        undo=st.booleans(),
        extra=st.sampled_from([[], [], [], ["none"]]),
        held=st.booleans(),
    )
    def hold_or_release(self, chosen: set[int], undo: bool, extra: list[str], held: bool) -> None:
        there = sorted(self.model.snapshots)
        wanted = sorted({there[pick % len(there)] for pick in chosen}) + extra
        if undo and self.model.undo is not None:
            wanted.append(self.model.undo)

        def model(_records: list[RootRecord]) -> None:
            if held:
                self.model.held.update(wanted)
            else:
                self.model.held.difference_update(wanted)

        self._apply(HoldSnapshots(tuple(wanted), held), model, legal=not extra)
        if undo:
            self.undo()

    @precondition(lambda self: self.model.held)
    @rule(pick=picks, others=st.sets(picks, max_size=2), new=snapshot_names)
    def delete_and_rename_held(self, pick: int, others: set[int], new: str) -> None:
        there = sorted(self.model.snapshots)
        held = there.index(sorted(self.model.held)[pick % len(self.model.held)])
        self.delete({held, *others}, [])
        self.rename_snapshot(held, new)
        self.compare_all()

    @precondition(lambda self: self.model.snapshots.keys() > self.model.held)
    @rule(chosen=st.sets(picks, min_size=1, max_size=5))
    def delete_frees_what_was_predicted(self, chosen: set[int]) -> None:
        """C11: a deletion frees exactly what was predicted."""
        self.commit_now()
        self.filesystem.work_drops()
        there = sorted(self.model.snapshots)
        free = sorted(self.model.snapshots.keys() - self.model.held)
        wanted = sorted({free[pick % len(free)] for pick in chosen})
        records = [self.filesystem.catalog.snapshot(name) for name in wanted]
        predicted = simulate_deletion(self.filesystem, records).blocks
        owners = owner_sets(self.filesystem)
        bits = [owners.bit(OwnerKind.SNAPSHOT, record.root_id) for record in records]
        assert owners.exclusive(bits).total == predicted, "the two algorithms"
        assert owners.total().total == self.filesystem.space().tree
        for record in records:
            parent = self.filesystem.catalog.root(record.parent_id) if record.parent_id else None
            own = reachable_from(self.disk, record.pointer)
            assert referenced_blocks(self.filesystem, record) == len(own)
            if parent is not None:
                own = own - reachable_from(self.disk, parent.pointer)
            assert written_blocks(self.filesystem, record) == len(own), "written"
        before = self.filesystem.space().tree
        self.next_fault = None
        self.delete(set(map(there.index, wanted)), [])
        self.filesystem.work_drops()
        self.acknowledged = self.filesystem.store.superblock.generation
        assert before - self.filesystem.space().tree == predicted, "C11"

    @precondition(lambda self: self.model.snapshots)
    @rule(pick=picks, of=picks, at=picks, first=st.integers(0, 8), size=sizes)
    def share_from_snapshot(self, pick: int, of: int, at: int, first: int, size: int) -> None:
        there = sorted(self.model.snapshots)
        name = there[pick % len(there)]
        files = self.model.snapshots[name].files
        regular = sorted(ino for ino, file in files.items() if stat.S_ISREG(file.mode))
        record = self.filesystem.catalog.find(name)
        assert record is not None
        volume = self.filesystem.volume(record.root_id)
        if regular and volume is not None:
            self._share(volume, files[regular[of % len(regular)]], at, 0, first, size)

    @precondition(lambda self: self.model.snapshots)
    @rule(pick=picks, new=snapshot_names)
    def rename_snapshot(self, pick: int, new: str) -> None:
        there = sorted(self.model.snapshots)
        old = there[pick % len(there)]

        def model(_record: RootRecord) -> None:
            self.model.rename_snapshot(old, new)

        legal = new not in self.model.snapshots
        self._apply(RenameSnapshot(old, new), model, legal=legal)

    @precondition(lambda self: self.model.snapshots)
    @rule(pick=picks)
    def rollback(self, pick: int) -> None:
        there = sorted(self.model.snapshots)
        name = there[pick % len(there)]

        def model(kept: RootRecord) -> None:
            target = self.model.snapshots[name]
            self.model.snapshots[kept.name] = self.files
            self.model.live = target.copy()
            self.model.undo = kept.name

        self._apply(Rollback(name), model, legal=True)

    @rule()
    def undo(self) -> None:
        def model(kept: RootRecord) -> None:
            assert self.model.undo is not None
            target = self.model.snapshots.pop(self.model.undo)
            self.model.snapshots[kept.name] = self.files
            self.model.live = target.copy()
            self.model.undo = kept.name

        legal = self.model.undo is not None and self.model.undo not in self.model.held
        self._apply(Undo(), model, legal=legal)

    # --- drop queue -------------------------------------------------------------------------------

    @rule(nodes=st.integers(1, 8))
    def drop_some(self, nodes: int) -> None:
        try:
            self.filesystem.drops.step(nodes)
        except NoSpaceError:
            return

    @rule()
    def drop_all(self) -> None:
        self.settle()
        self.filesystem.work_drops()
        self.acknowledged = self.filesystem.store.superblock.generation
        self.filesystem.commit()
        self.acknowledged = self.filesystem.store.superblock.generation
        assert not self.filesystem.drops.progress()
        counted = recount(self.disk)
        counted.require_exact()
        assert self.filesystem.space().used == len(counted.expected)

    # --- comparing --------------------------------------------------------------------------------

    def compare_all(self) -> None:
        super().compare_all()
        records = {record.name: record for record in self.filesystem.catalog.snapshots()}
        assert records.keys() == self.model.snapshots.keys()
        assert {name for name in records if records[name].held} == self.model.held
        for name, files in self.model.snapshots.items():
            volume = self.filesystem.volume(records[name].root_id)
            assert volume is not None
            compare(volume, files)

    @rule()
    def compare_snapshots(self) -> None:
        self.compare_all()


TestHistoryMachine = HistoryMachine.TestCase
TestHistoryMachine.settings = machine_settings(short=40, long=140, steps=60)
TestHistoryMachine.__doc__ = (
    "Promise: the past is what it was, and costs what cowfs says (C6, C11)."
)
