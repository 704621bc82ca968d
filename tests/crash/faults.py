"""Faults that are seeded in the engine, one at a time, to prove that the lab finds them.

While a fault is applied, one line of one function is replaced; every caller of the function, by
whatever name, gets the faulty one. A fault whose line is no longer in the function is an error, so
the list has to follow the engine.
"""

import __future__

import importlib
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType

from tests.crash.bases import BASES, base
from tests.crash.lab import Lab, LabFailureError
from tests.crash.workloads import Workload, parse

SEED = 1
STATES_MAX = (20, 150)  # of each workload; few at first, as most faults are caught early
NESTED_EVERY = 25


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    Attributes:
        name: what is wrong, in words.
        function: the function, as module:qualified name.
        line: the line to replace; it occurs once in the function.
        instead: its replacement, at the same indentation; further lines add their own indentation.
        own_images: make the base images with the fault too, as it concerns both writing and
        reading.
        shown_by: the number of the workload that is known to show it; tried first and with most
        states.
    """

    name: str
    function: str
    line: str
    instead: str
    own_images: bool = False
    shown_by: int | None = None


_COMMIT = "cowfs.storage.commit:Commit._write"
_STORE = "cowfs.storage.store:Store"
_MAP = "cowfs.storage.spacemap:SpaceMap"
_HISTORY = "cowfs.history.filesystem:Filesystem"
_LOG = "cowfs.storage.log:Log"
_EDITS = "cowfs.history.edits"
_DROPS = "cowfs.history.drops:DropQueue"
_NAMESPACE = "cowfs.files.namespace:Namespace"
_VOLUME = "cowfs.files.volume:Volume"
_ORPHANS = "cowfs.files.orphans:Orphans"
_RANGES = "cowfs.files.ranges:Ranges"

FAULTS = (
    # the order of a commit
    Fault(
        "no flush before the superblock",
        _COMMIT,
        "device.flush()\n# All that this",
        "# All that this",
    ),
    Fault(
        "no flush after the superblock",
        _COMMIT,
        "device.flush()\n# This is the commit point",
        "# This is the commit point",
    ),
    Fault(
        "superblock before what it points at",
        _COMMIT,
        "for first, buffers in _gather(writes):",
        "write_slot(device, superblock)\ndevice.flush()\nfor first, buffers in _gather(writes):",
    ),
    Fault(
        "the last write of a commit is left out",
        _COMMIT,
        "_gather(writes):",
        "_gather(writes)[:-1]:",
    ),
    Fault(
        "a commit is acknowledged and not written",
        f"{_HISTORY}.commit",
        "self._finish_inflight()",
        "self._finish_inflight()\nif checked is None and not clean: return",
    ),
    Fault(
        "superblock in one copy only",
        "cowfs.storage.superblock:write_slot",
        "(superblock.total_blocks):",
        "(superblock.total_blocks)[:1]:",
    ),
    Fault(
        "every generation in one slot",
        "cowfs.storage.format:Superblock.slot",
        "% RING_SLOTS",
        "* 0",
        own_images=True,
    ),
    Fault(
        "two slots for all generations",
        "cowfs.storage.format:Superblock.slot",
        "% RING_SLOTS",
        "% 2",
        own_images=True,
    ),
    Fault(
        "the old space map in the new superblock",
        _COMMIT,
        "space_map=self.map.top",
        "space_map=self.superblock.space_map",
    ),
    Fault(
        "wrong count of used blocks",
        "cowfs.storage.commit:begin",
        "used_blocks=max(0, min(store.map.used_blocks, store.map.total_blocks)),",
        "used_blocks=store.map.used_blocks + 1,",
    ),
    # twins and checksums
    Fault("twin of a node not written", _COMMIT, "if node.twin:", "if False:"),
    Fault("twin of a map page not written", _COMMIT, "if twin:", "if False:"),
    Fault(
        "twin of a node not read",
        f"{_STORE}.read_image",
        "(pointer.block, pointer.twin)",
        "(pointer.block,)",
        shown_by=1,
    ),
    Fault(
        "second copy of the ring not read",
        "cowfs.storage.superblock:read_newest",
        "found += read_ring(device, ring_blocks(expected.total_blocks)[1])",
        "pass",
        shown_by=1,
    ),
    Fault(
        "checksum of data not looked at",
        f"{_STORE}._verify",
        "if found != checksums:",
        "if False:",
        shown_by=0,
    ),
    Fault("wrong birth in a node", _COMMIT, "node.generation,", "node.generation - 1,"),
    Fault(
        "wrong birth in a pointer",
        "cowfs.storage.node:Node.pointer",
        "self.generation,",
        "self.generation + 1,",
    ),
    Fault(
        "wrong birth in the space map",
        f"{_MAP}.freeze",
        "below[number] = (block, twin, generation,",
        "below[number] = (block, twin, generation - 1,",
    ),
    # what may be overwritten
    Fault(
        "pending blocks released at once",
        f"{_STORE}.release_limit",
        "self.generation - self._retained",
        "self.generation",
    ),
    Fault(
        "pending blocks released one generation early",
        f"{_STORE}.release_limit",
        "self.generation - self._retained",
        "self.generation - self._retained + 1",
    ),
    Fault(
        "a block that was freed is used in the same transaction",
        f"{_MAP}.drop",
        "group.holds += len(runs)",
        "group.holds += len(runs)\n"
        "for place, size in runs:\n"
        "    group.busy[place % GROUP_BLOCKS : place % GROUP_BLOCKS + size] = bytes(size)",
    ),
    Fault(
        "place of a map page used again at once",
        f"{_MAP}._drop_system",
        "self.pending_system_blocks += 1",
        "self.pending_system_blocks += 1\n"
        "self._pending_system[0] = self._pending_system.pop(generation)\n"
        "self.release(0)",
    ),
    Fault(
        "retained generations forgotten at the mount",
        f"{_STORE}._hold_retained",
        "self.map.hold(earlier.space_map, generation)",
        "pass",
    ),
    Fault(
        "more generations promised than are kept",
        f"{_STORE}.oldest_retained",
        "max(self.oldest_held, self.generation - self._retained)",
        "max(1, self.generation - self._retained - 2)",
    ),
    Fault(
        "discard of blocks that are still shown",
        f"{_MAP}.free_runs",
        "runs = zero_runs(np.frombuffer(self.group(number).busy, np.uint8), base)",
        "busy = bytearray(self.group(number).busy)\n"
        "for first, count in sum(self._pending.values(), []):\n"
        "    if first // GROUP_BLOCKS == number:\n"
        "        busy[first - base : first - base + count] = bytes(count)\n"
        "runs = zero_runs(np.frombuffer(busy, np.uint8), base)",
    ),
    # refcounts
    Fault(
        "refcount one too high",
        f"{_MAP}.take",
        "group.references[at : at + count] = 1",
        "group.references[at : at + count] = 2",
    ),
    Fault("a reference that is not counted", f"{_MAP}.add", "part += 1", "pass", shown_by=3),
    Fault(
        "a reference that is not given back",
        f"{_STORE}.shadow",
        "self.drop_reference(node.block, node.twin)",
        "pass",
    ),
    Fault(
        "the twin's reference not counted",
        f"{_STORE}.add_reference",
        "if twin:",
        "if False:",
        shown_by=3,
    ),
    Fault(
        "counts of children not raised on shadow",
        f"{_STORE}.shadow",
        "runs = [(place, NODE_BLOCKS) for place in places if place]",
        "runs = []",
        shown_by=3,
    ),
    Fault(
        "counts of data not raised on shadow",
        f"{_STORE}.shadow",
        "self.map.add(first, count)",
        "pass",
        shown_by=3,
    ),
    Fault(
        "snapshot without a reference",
        f"{_EDITS}:CreateSnapshot.apply",
        "store.add_reference(root.block, root.twin)",
        "pass",
        shown_by=3,
    ),
    Fault(
        "rollback without a reference",
        f"{_EDITS}:Rollback.apply",
        "filesystem.store.add_reference(root.block, root.twin)",
        "pass",
        shown_by=4,
    ),
    Fault(
        "undo keeps the record whose reference it takes",
        f"{_EDITS}:Undo.apply",
        "filesystem.catalog.remove([target])",
        "pass",
        shown_by=4,
    ),
    Fault(
        "a hold is acknowledged and not kept",
        f"{_EDITS}:HoldSnapshots.apply",
        "filesystem.catalog.put(record)",
        "pass",
        shown_by=7,
    ),
    Fault(
        "a release is acknowledged and not kept",
        f"{_EDITS}:HoldSnapshots.apply",
        "flag = FLAG_HELD if self.held else 0",
        "flag = FLAG_HELD",
    ),
    Fault(
        "rollback passes a hold on",
        f"{_EDITS}:_plan_successor",
        "flags=target.flags & FLAG_SHARES",
        "flags=target.flags",
        shown_by=7,
    ),
    Fault(
        "a renamed snapshot is held no more",
        f"{_EDITS}:RenameSnapshot.apply",
        "flags=record.flags & ~FLAG_AUTOMATIC",
        "flags=record.flags & FLAG_SHARES",
        shown_by=7,
    ),
    # files that share
    Fault(
        "blocks that files share are not counted",
        f"{_RANGES}.reflink",
        "data.store.map.add(extent.block, extent.count)",
        "pass",
        shown_by=9,
    ),
    # orphans and the drop queue
    Fault(
        "orphan mark missing",
        f"{_ORPHANS}.flush",
        'self._tree.put(key(0, TYPE_ORPHAN, ino), b"")',
        "pass",
        shown_by=2,
    ),
    Fault(
        "orphan mark not taken away",
        f"{_ORPHANS}.flush",
        "self._tree.delete(key(0, TYPE_ORPHAN, ino))",
        "pass",
        shown_by=2,
    ),
    Fault(
        "orphans not looked for at the mount",
        f"{_ORPHANS}.load",
        "self.inos |= found",
        "pass",
        shown_by=2,
    ),
    Fault(
        "drop queue not durable",
        f"{_DROPS}.save",
        "self._catalog.put_drop(drop.record)",
        "pass",
        shown_by=3,
    ),
    Fault(
        "deleted snapshot not in the drop queue",
        f"{_DROPS}.add_all",
        "self._catalog.put_drops(records)",
        "pass",
        shown_by=3,
    ),
    Fault(
        "drop queue walks into what others share",
        f"{_DROPS}._visit",
        "store.map.refcount(step.pointer.block) == 1",
        "True",
        shown_by=6,
    ),
    Fault(
        "finished drop stays in the queue",
        f"{_DROPS}.save",
        "self._catalog.remove_drop(number)",
        "pass",
    ),
    # atomicity
    Fault("changed inodes left out of a commit", f"{_VOLUME}.flush", "self.inodes.flush()", "pass"),
    Fault(
        "a commit between the halves of a rename",
        f"{_NAMESPACE}.rename",
        "self._names.remove(old_directory, old_name)",
        "operation.step = 0\n"
        "self._parts.store.admission.relieve()\n"
        "operation.step = 2\n"
        "self._names.remove(old_directory, old_name)",
        shown_by=1,
    ),
    Fault(
        "a snapshot is taken before what was written",
        f"{_HISTORY}.freeze",
        "self.set_live_record(self.current_record())",
        "self.set_live_record(self.current_record() if checked is None else self.record)",
    ),
    Fault(
        "rollback keeps the old tree",
        f"{_EDITS}:_replace_live",
        "filesystem.set_live(record, volume)",
        "filesystem.set_live(replace(record, tree=old.tree), volume)",
    ),
    # the log
    Fault(
        "records of a generation that may be needed are overwritten",
        "cowfs.storage.format:LogPlace.other_area",
        "1 - self.area",
        "self.area",
        own_images=True,
        shown_by=10,
    ),
    Fault(
        "a call is left out of a record",
        f"{_LOG}.next_record",
        "calls = self.calls",
        "calls = self.calls[1:]",
        shown_by=10,
    ),
    Fault(
        "a rename is not recorded",
        f"{_LOG}.add",
        "if self.is_whole:",
        "if self.is_whole and type(call).__name__ != 'Rename':",
        shown_by=10,
    ),
    Fault(
        "a write is recorded in part",
        "cowfs.files.content:Content.write",
        "Write(ino, offset, data, now_ns)",
        "Write(ino, offset, data[:100], now_ns)",
        shown_by=10,
    ),
    Fault(
        "a record is acknowledged without a flush",
        "cowfs.storage.log:LogWrite.write",
        "self.device.flush()",
        "pass",
        shown_by=10,
    ),
    Fault(
        "a record is acknowledged and not written",
        f"{_HISTORY}.sync",
        "record.write()",
        "record.done.set()",
        shown_by=10,
    ),
    Fault(
        "a record in one copy only",
        "cowfs.storage.log:LogWrite.write",
        "in self.places:",
        "in self.places[:1]:",
        shown_by=10,
    ),
    Fault(
        "second copy of the log not read",
        "cowfs.storage.log_records:read_log",
        "for copy in place.copies:",
        "for copy in place.copies[:1]:",
        shown_by=12,
    ),
    Fault(
        "checksum of a record not looked at",
        "cowfs.storage.log_records:_read_record",
        "superblock.seed) != checksum:",
        "superblock.seed) == bytes(16):",
        shown_by=13,
    ),
    Fault(
        "records of an earlier life are replayed",
        "cowfs.storage.log_records:_read_record",
        "is_stale = generation != superblock.generation or previous != chain",
        "is_stale = False",
        shown_by=10,
    ),
    Fault(
        "a record does not follow the one before it",
        f"{_LOG}.finish",
        "self._chain = write.checksum",
        "pass",
        shown_by=10,
    ),
    Fault(
        "the log is not replayed",
        "cowfs.storage.log_records:has_records",
        "is not None",
        "is ...",
        shown_by=10,
    ),
    Fault(
        "calls of a commit are recorded again",
        f"{_LOG}.freeze",
        "self.calls = []",
        "pass",
        shown_by=10,
    ),
    Fault(
        "the log goes on behind a commit",
        f"{_LOG}.rebase",
        "self._next_block = 0",
        "self._next_block = getattr(self, '_next_block', 0)",
        shown_by=10,
    ),
    Fault(
        "calls that are too much for a record are forgotten",
        f"{_LOG}.add",
        "self.is_whole = False",
        "pass",
        shown_by=11,
    ),
    Fault(
        "a full log is written over",
        f"{_LOG}.next_record",
        "self._bytes + LOG_HEADER_BYTES > room",
        "False",
        shown_by=13,
    ),
)

# Short histories that run every line above; each fault is looked for in all until one shows it.
WORKLOADS = (
    parse(
        "flat: write A/foo 4096 9000; commit; chmod B/bar 600; commit; write A/foo 0 5000; "
        "commit; end"
    ),
    parse(
        "deep: rename A/foo B/bar; commit; rename A/sub B/empty; commit; unlink C/3; commit; end"
    ),
    parse(
        "flat: unlink-open A/foo; commit; chmod A 700; commit; remount; create A/new; commit; end",
    ),
    parse(
        "deep: snapshot new; write C/3 0 1500; commit; delete old,middle; drop 2; commit; "
        "drop-all; end"
    ),
    parse(
        "turned: undo; write A/foo 0 9000; commit; rollback old; write B/bar 0 9000; commit; end",
    ),
    parse(
        "busy: drop 2; commit; remount; drop-all; commit; write A/foo 0 9000; commit; "
        "write A/foo 0 9000; end"
    ),
    parse(
        "flat: write A/foo 0 900; freeze; snapshot new; rollback new; write A/foo 1 9; undo; "
        "commit; end"
    ),
    parse(
        "flat: hold old; rename-snapshot old kept; delete kept; rollback kept; release kept; "
        "delete kept; commit; end"
    ),
    parse("single: write C/1 0 9000; commit; unlink C/1; commit; write C/2 0 9000; commit; end"),
    parse(
        "deep: share A/foo A/copy 0 99999; commit; unlink A/foo; commit; unlink A/copy; commit; end"
    ),
    # records of the log: several behind one another, an older chain behind a newer one
    parse(
        "flat: write A/foo 4096 4096; fsync; rename A/foo B/moved; fsync; unlink B/bar; fsync; "
        "symlink A/link there; commit; create A/new; fsync; commit; write A/inline 0 50; fsync; end"
    ),
    # more than a record takes, then more than an area takes
    parse("flat: create A/new; write A/foo 0 300000; fsync; create A/dir; fsync; end"),
    # one record alone: each of its states is judged
    parse("flat: write A/foo 4096 100; fsync"),
    parse(f"flat: {'write A/foo 0 9000; fsync; chmod A/foo 600; fsync; ' * 5}end"),
)


@contextmanager
def applied(fault: Fault) -> Iterator[None]:
    """Run the engine with this fault while the block runs."""
    module_name, _, qualified = fault.function.partition(":")
    found = importlib.import_module(module_name)
    for name in qualified.split("."):
        found = getattr(found, name)
    assert isinstance(found, FunctionType)
    function = found
    source = textwrap.dedent(inspect.getsource(function))
    namespace = dict(function.__globals__)
    flags = __future__.annotations.compiler_flag
    exec(compile(_replaced(source, fault), f"<{fault.name}>", "exec", flags), namespace)
    faulty = namespace[function.__name__]
    whole = function.__code__
    function.__code__ = faulty.__code__
    try:
        yield
    finally:
        function.__code__ = whole


def _replaced(source: str, fault: Fault) -> str:
    """The source with the line replaced; the indentation of a second line does not matter."""
    first, _, rest = fault.line.partition("\n")
    lines = source.split("\n")
    at = [
        number
        for number, line in enumerate(lines)
        if first in line and (not rest or lines[number + 1].lstrip().startswith(rest))
    ]
    assert len(at) == 1, f"{fault.name}: {fault.line!r} is {len(at)} times in {fault.function}"
    number = at[0]
    line = lines[number]
    indent = line[: len(line) - len(line.lstrip())]
    if rest:
        # Only the line itself is dropped; the second line tells it from others like it.
        del lines[number]
    else:
        lines[number] = line.replace(first, fault.instead.replace("\n", f"\n{indent}"))
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Caught:
    """How a fault was found: by which judgement, with which message, after how many states."""

    judgement: str
    what: str
    states: int
    workload: Workload


def hunt(fault: Fault) -> Caught | None:
    """Look for a fault; None if no workload shows it."""
    seed = SEED + 1 + FAULTS.index(fault) if fault.own_images else SEED
    if not fault.own_images:
        for name in BASES:
            base(name, seed)  # made without the fault
    lab = Lab(seed, nested_every=NESTED_EVERY)
    turns = [(states, workload) for states in STATES_MAX for workload in WORKLOADS]
    if fault.shown_by is not None:
        turns.insert(0, (STATES_MAX[-1], WORKLOADS[fault.shown_by]))
    with applied(fault):
        for lab.states_max, workload in turns:
            try:
                lab.run(workload)
            except LabFailureError as failure:
                return Caught(failure.judgement, failure.what, lab.tally.unique, workload)
    return None


def table(results: Sequence[tuple[Fault, Caught | None]]) -> list[str]:
    """One line per fault: what caught it, and after how many states (0: while recording)."""
    width = max(len(fault.name) for fault, _ in results)
    lines = []
    for fault, caught in results:
        if caught is None:
            lines.append(f"{fault.name:{width}}  NOT CAUGHT")
        else:
            what = caught.what if len(caught.what) <= 90 else caught.what[:87] + "..."
            lines.append(
                f"{fault.name:{width}}  {caught.judgement:11} {caught.states:4} states  {what}"
            )
    count = sum(1 for _, caught in results if caught is not None)
    lines.append(f"{count} of {len(results)} seeded faults are caught")
    return lines
