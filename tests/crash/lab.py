"""The crash lab: records workloads, makes every state that a crash may leave, and judges each one.

A state is judged by everything that is promised of it (cowfs/docs/design/contract.md):

1. `check` finds it clean, with I1 to I7; where everything written was flushed, it finds nothing to
remark either;
2. it can be mounted, and shows exactly the result of one of the operations that are legal there;
3. mounting, reclaiming orphans and emptying the drop queue change nothing visible and leave nothing
behind;
4. it can be used: a file is made and fsynced, the power is cut, and all is there; then everything
is deleted, snapshots too, and not a block is left over.

A state whose device broke a promise (a lost or misdirected write) may report damage, but must never
show other bytes.
"""

import dataclasses
import random
import stat
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from cowfs.care.check import check_image
from cowfs.errors import CowfsError, ImageError
from cowfs.files.volume import Volume
from cowfs.history.edits import DeleteSnapshots, HoldSnapshots
from cowfs.history.filesystem import Filesystem
from cowfs.history.images import open_filesystem
from cowfs.storage.format import NODE_BLOCKS
from cowfs.storage.superblock import read_newest
from tests.crash.bases import TOTAL_BLOCKS, base, repeatable
from tests.crash.oracle import (
    LIVE,
    Picture,
    difference,
    picture_of,
    wrong_in_spite_of_damage,
)
from tests.crash.recording import RecordingDevice
from tests.crash.states import CrashState, Fingerprints, crash_states
from tests.crash.workloads import CACHE_BYTES, Session, Workload, mount
from tests.model.devices import MemoryDevice
from tests.model.recount import recount
from tests.model.reference import ROOT

PROBE = b"probe of the crash lab"
PROBE_BYTES = 5000
NESTED_STATES = 12  # of each mount that is itself crashed
# These come first in every workload: nothing is left out, or the newest superblock is at stake.
FIRST = ("rest", "prefix", "ring")


_T = TypeVar("_T")


class LabFailureError(AssertionError):
    """A promise is broken. The message says in which state, and how to repeat it."""

    def __init__(self, judgement: str, what: str) -> None:
        super().__init__(f"{judgement}: {what}")
        self.judgement = judgement
        self.what = what
        self.seed = 0
        self.workload: Workload | None = None
        self.state = "while recording"
        self.device: MemoryDevice | None = None

    @property
    def is_nested(self) -> bool:
        """Whether the failing state came from crashing the mount of a crashed image."""
        return " / " in self.state

    def __str__(self) -> str:
        return (
            f"{self.judgement}: {self.what}\n"
            f"  seed:     {self.seed}\n"
            f"  workload: {self.workload}\n"
            f"  state:    {self.state}\n"
            f"  again:    scripts/crashlab --seed {self.seed} --state '{self.state}' "
            f"--workload '{self.workload}'"
        )


@dataclass(slots=True)
class Tally:
    """Counts of the states that were judged.

    Attributes:
        total: states that were enumerated and not skipped, duplicates included.
        unique: states whose image was new; each was judged.
        by_kind: unique states of each kind.
        nested: unique states of mounts that were crashed in turn; counted in `unique` too.
        refused: damaged states in which the image or a part of it answered with an error.
    """

    workloads: int = 0
    total: int = 0
    unique: int = 0
    nested: int = 0
    refused: int = 0
    by_kind: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Tally") -> None:
        """Add the counts of another lab."""
        self.workloads += other.workloads
        self.total += other.total
        self.unique += other.unique
        self.nested += other.nested
        self.refused += other.refused
        self.by_kind += other.by_kind

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {count}" for kind, count in self.by_kind.most_common())
        return (
            f"{self.unique} unique states of {self.total}, {self.nested} of them nested, "
            f"{self.workloads} workloads, {self.refused} answered with an error ({kinds})"
        )


class Lab:
    """Judges workloads.

    Args:
        seed: chooses the images, and the states where there are too many.
        states_max: the most unique states per workload, without nested ones; 0 means all.
        nested_every: every nested_every-th state has its mount crashed in turn; 0 means none.
        nested_max: the most states per mount that is crashed in turn.
    """

    def __init__(
        self,
        seed: int,
        *,
        states_max: int = 0,
        nested_every: int = 0,
        nested_max: int = NESTED_STATES,
    ) -> None:
        self.seed = seed
        self.states_max = states_max
        self.nested_every = nested_every
        self.nested_max = nested_max
        self.tally = Tally()
        self._seen: set[bytes] = set()
        self._fingerprints = Fingerprints()

    # --- workloads --------------------------------------------------------------------------------

    def run(self, workload: Workload, only: str = "") -> None:
        """Record a workload and judge its states.

        Args:
            only: the name of one state, to repeat it.

        Raises:
            LabFailureError: the first promise that is broken.
        """
        self.tally.workloads += 1
        try:
            with repeatable(self.seed):
                self._run(workload, only)
        except LabFailureError as failure:
            failure.seed, failure.workload = self.seed, workload
            raise

    def _run(self, workload: Workload, only: str) -> None:
        device, session = self.record(workload)
        start = base(workload.base, self.seed).blocks
        states = list(crash_states(device.log, start, TOTAL_BLOCKS))
        if only:
            wanted = only.partition(" / ")[0]
            states = [state for state in states if state.name == wanted]
            assert states, f"the workload has no state {wanted!r}"
        elif self.states_max:
            states = self._in_order_of_worth(states, workload)
        nested = only.partition(" / ")[2]
        enough = self.tally.unique + (self.states_max or len(states))
        for number, state in enumerate(states):
            if self.tally.unique >= enough:
                break
            if not nested:
                self._judge(state, session.pictures, forced=bool(only))
            if nested or (self.nested_every and not only and number % self.nested_every == 0):
                enough += self._judge_nested(state, nested)

    def record(self, workload: Workload) -> tuple[RecordingDevice, Session]:
        """Run a workload. Raises LabFailureError if it goes wrong even without a crash."""

        def play() -> tuple[RecordingDevice, Session]:
            start = base(workload.base, self.seed)
            device = RecordingDevice(TOTAL_BLOCKS, start.blocks)
            session = Session(device, start.history.copy())
            session.run(workload.operations)
            return device, session

        return _guarded("recording", play)

    def _in_order_of_worth(self, states: list[CrashState], workload: Workload) -> list[CrashState]:
        """Shuffle the states, as not all will be judged.

        The kinds that matter most fill at most the first half; after them comes a state of the kind
        that was judged least.
        """
        choice = random.Random(f"{self.seed} {workload}")
        choice.shuffle(states)
        first = [state for state in states if state.kind in FIRST][: self.states_max // 2]
        names = {state.name for state in first}
        rest = [state for state in states if state.name not in names]
        if rest:
            rarest = min(rest, key=lambda state: self.tally.by_kind[state.kind])
            rest.remove(rarest)
            rest.insert(0, rarest)
        return first + rest

    # --- states -----------------------------------------------------------------------------------

    def _device(self, state: CrashState, *, forced: bool = False) -> MemoryDevice | None:
        """The image of a state; None if an equal image was judged before."""
        self.tally.total += 1
        content = state.build()
        print_of = self._fingerprints.of(content, state.total_blocks)
        if state.may_be_damaged:  # other rules apply, so an equal image is not the same state
            print_of += b"damage"
        if print_of in self._seen and not forced:
            return None
        self._seen.add(print_of)
        self.tally.unique += 1
        self.tally.by_kind[state.kind] += 1
        return MemoryDevice(state.total_blocks, content)

    def _judge(self, state: CrashState, pictures: list[Picture], *, forced: bool = False) -> None:
        device = self._device(state, forced=forced)
        if device is None:
            return
        legal = pictures[state.oldest : state.newest + 1]
        self._under(state.name, device, lambda: self._verdict(state, device, legal))

    def _judge_nested(self, state: CrashState, only: str) -> int:
        """Crash the mount of a crashed image and all its work. Returns the states judged."""
        if state.may_be_damaged or state.kind == "size":
            return 0
        start = state.build()
        device = RecordingDevice(state.total_blocks, start)

        def reclaim_all() -> Picture:
            filesystem = mount(device)
            shown = picture_of(filesystem)
            while filesystem.drops.working:
                filesystem.drops.step(2)
                filesystem.commit()
            filesystem.close()
            return shown

        shown = self._under(
            f"{state.name} / ",
            device,
            lambda: _guarded("mounting", reclaim_all),
        )
        states = list(crash_states(device.log, start, state.total_blocks))
        if only:
            states = [inner for inner in states if inner.name == only]
        elif len(states) > self.nested_max:
            states = random.Random(f"{self.seed} {state.name}").sample(states, self.nested_max)
        # `_judge` tells of the same state whether what the mount showed is one of the legal
        # pictures.
        before = self.tally.unique
        for inner in states:
            name = f"{state.name} / {inner.name}"
            quiet = dataclasses.replace(inner, name=name, oldest=0, newest=0, spotless=False)
            self._judge(quiet, [shown], forced=bool(only))
        judged = self.tally.unique - before
        self.tally.nested += judged
        return judged

    def _under(self, name: str, device: MemoryDevice, action: Callable[[], _T]) -> _T:
        try:
            return action()
        except LabFailureError as failure:
            failure.state, failure.device = name, device
            raise

    # --- verdicts ---------------------------------------------------------------------------------

    def _verdict(self, state: CrashState, device: MemoryDevice, legal: list[Picture]) -> None:
        if state.kind == "size" and state.total_blocks < TOTAL_BLOCKS:
            self._refused(device)
        elif state.may_be_damaged:
            self._damaged(state, device, legal)
        else:
            self._whole(state, device, legal)

    def _refused(self, device: MemoryDevice) -> None:
        """Fail unless an image that was cut short is refused by mount."""
        try:
            open_filesystem(device, writable=True)
        except ImageError:
            self.tally.refused += 1
            return
        raise LabFailureError("size", "an image that was cut off is mounted")

    def _whole(self, state: CrashState, device: MemoryDevice, legal: list[Picture]) -> None:
        report = _guarded("check", lambda: check_image(device))
        if not report.clean or (state.spotless and report.findings):
            raise LabFailureError("check", "; ".join(map(str, report.findings[:3])))
        filesystem = _guarded("mounting", lambda: _open(device))
        shown = _guarded("reading", lambda: picture_of(filesystem))
        _require_legal(shown, legal)
        _guarded("probe", lambda: _probe(filesystem, device, shown))

    def _damaged(self, state: CrashState, device: MemoryDevice, legal: list[Picture]) -> None:
        """Fail unless what is shown is right, all else is an error, and `check` finds damage."""
        victim = state.victim
        assert victim is not None
        if all(map(_same, map(device.block, victim.blocks), victim.pieces)):
            return  # the block held the same bytes before
        report = _guarded("check", lambda: check_image(device))
        if not report.findings:
            raise LabFailureError("check", "finds nothing wrong")
        # A lost write leaves the twin intact; a misdirected one may overwrite the twin as well.
        twins_help = state.kind == "lost" and read_newest(device).duplicates_metadata
        try:
            filesystem = _open(device)
            shown = picture_of(filesystem, damage=True)
        except CowfsError as error:
            if twins_help:
                raise LabFailureError("twins", f"the twin is not used: {error}") from error
            self.tally.refused += 1
            return
        except Exception as error:
            raise LabFailureError("reading", f"{error!r}") from error
        wrong = [wrong_in_spite_of_damage(shown, picture) for picture in legal]
        if all(wrong):
            raise LabFailureError("wrong bytes", wrong[-1])
        if shown.damaged:
            self.tally.refused += 1
            if report.clean:
                raise LabFailureError("check", f"is content, but damaged are {shown.damaged}")
        if shown.damaged_metadata and twins_help:
            raise LabFailureError("twins", f"lost in spite of twins: {shown.damaged_metadata}")


def _same(found: bytes, wanted: bytes) -> bool:
    return found == wanted


def _guarded(judgement: str, action: Callable[[], _T]) -> _T:
    """Turn any error into a broken promise, assertions of the device (I2, I3) or the model too."""
    try:
        return action()
    except LabFailureError:
        raise
    except Exception as error:
        raise LabFailureError(judgement, f"{error!r}") from error


def _open(device: MemoryDevice) -> Filesystem:
    return open_filesystem(device, writable=True, cache_bytes=CACHE_BYTES)


def _require_legal(shown: Picture, legal: Sequence[Picture]) -> None:
    differences = []
    for wanted in reversed(legal):  # the newest is the most likely
        found = difference(shown, wanted)
        if not found:
            return
        differences.append(found)
    raise LabFailureError(
        "contract", f"shows none of {len(legal)} legal states; the newest differs: {differences[0]}"
    )


# --- probe ---------------------------------------------------------------------------------------


def _probe(filesystem: Filesystem, device: MemoryDevice, shown: Picture) -> None:
    """Use the image, cut the power after an fsync, look again, and delete everything."""
    filesystem.reclaim_orphans()
    filesystem.work_drops()
    volume = filesystem.live
    probe = volume.create(ROOT, PROBE, stat.S_IFREG | 0o600, 0, 0)
    data = random.Random(len(shown.trees[LIVE])).randbytes(PROBE_BYTES)
    volume.write(probe.ino, 0, data)
    if data[0] % 2:  # half of the images each: as a record of the log, as a commit
        filesystem.sync()
    else:
        filesystem.commit()

    filesystem = _open(device.crash())
    volume = filesystem.live
    found = volume.lookup(ROOT, PROBE)
    assert volume.read(found.ino, 0, PROBE_BYTES + 1) == data, "the fsynced file is another"
    assert not volume.orphans, "orphans are left"
    assert not filesystem.drops.working, "the drop queue is not empty"
    inodes = {facts[0] for facts in shown.trees[LIVE].values()}
    assert volume.inodes.count == len(inodes) + 1, "inodes are left without a name"
    volume.unlink(ROOT, PROBE)
    filesystem.reclaim_orphans()
    again = picture_of(filesystem)
    again.times[LIVE, b""] = shown.times[LIVE, b""]
    what = difference(again, shown)
    assert not what, f"changed by mounting: {what}"

    _remove_all(volume, ROOT)
    filesystem.reclaim_orphans()
    names = [record.name for record in filesystem.catalog.snapshots()]
    if names:
        filesystem.apply(HoldSnapshots(names, False))
        filesystem.apply(DeleteSnapshots(names))
    filesystem.work_drops()
    filesystem.commit()
    counted = recount(filesystem.store.device)
    counted.require_exact()
    nodes = 1 + filesystem.catalog.tree.node_count
    wanted = nodes * NODE_BLOCKS * filesystem.store.copies
    assert len(counted.expected) == wanted, (
        f"{len(counted.expected)} blocks are in use after all was deleted, expected {wanted}"
    )


def _remove_all(volume: Volume, directory: int) -> None:
    for _, entry in list(volume.listing(directory)):
        if stat.S_ISDIR(entry.type << 12):
            _remove_all(volume, entry.ino)
            volume.rmdir(directory, entry.name)
        else:
            volume.unlink(directory, entry.name)
