"""Promise C10 at the edge of full: every freeze finds the blocks it needs, whatever came before.

Random work, edits of the catalog included, runs on images of every size from the smallest to 1 GiB.
The limits of admission are shrunk, since on small images they would hide mistakes.
"""

import contextlib
import logging
import random
import stat
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowfs.care.check import check_image
from cowfs.errors import CowfsError, NoSpaceError, SnapshotError
from cowfs.files.calls import Changes
from cowfs.history.edits import (
    CreateSnapshot,
    DeleteSnapshots,
    Edit,
    HoldSnapshots,
    RenameSnapshot,
    Rollback,
    Undo,
)
from cowfs.history.filesystem import Filesystem
from cowfs.history.images import make_filesystem, open_filesystem
from cowfs.storage.admission import DEFAULT_LIMITS, Limits
from tests.crash.faults import Fault, applied
from tests.model.devices import MemoryDevice
from tests.sizes import machine_settings

ROOT = 1
BLOCK = 4096
SMALLEST, LARGEST = 4096, 262_144  # blocks: 16 MiB, 1 GiB
CHUNK = bytes(256 * BLOCK)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Silence the warning that a full filesystem logs each time."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def make(total_blocks: int, limits: Limits = DEFAULT_LIMITS, *, copies: bool = True) -> Filesystem:
    disk = MemoryDevice(total_blocks)
    make_filesystem(disk, duplicate_metadata=copies)
    return open_filesystem(disk, writable=True, limits=limits)


def fill(filesystem: Filesystem, name: bytes = b"filler") -> None:
    """Write until nothing more fits, in large steps and then in small ones."""
    volume = filesystem.live
    found = volume.find(ROOT, name)
    ino = found.ino if found else volume.create(ROOT, name, stat.S_IFREG | 0o600, 0, 0).ino
    at = volume.get(ino).size_bytes
    for part in (CHUNK, CHUNK[: 16 * BLOCK], CHUNK[:BLOCK]):
        with contextlib.suppress(NoSpaceError):
            while True:
                volume.write(ino, at, part)
                at += len(part)


class Worker:
    """Random operations; each succeeds or is refused for a reason that a full image may have."""

    def __init__(self, filesystem: Filesystem, seed: int) -> None:
        self.filesystem = filesystem
        self.choice = random.Random(seed)
        self.number = 0
        self.refused = 0

    def step(self) -> None:
        kind = self.choice.choice(
            [self.make, self.write, self.write, self.cut, self.remove, self.edit, self.commit]
        )
        try:
            kind()
        except (NoSpaceError, SnapshotError):
            self.refused += 1
        assert self.filesystem.store.failed is None

    def _names(self) -> list[bytes]:
        return [entry.name for _, entry in self.filesystem.live.listing(ROOT)]

    def _ino(self) -> int:
        names = self._names()
        if not names:  # after a rollback to the beginning
            return self.filesystem.live.create(ROOT, b"again", stat.S_IFREG | 0o600, 0, 0).ino
        return self.filesystem.live.lookup(ROOT, self.choice.choice(names)).ino

    def make(self) -> None:
        self.number += 1
        name = b"%d" % self.number + b"n" * self.choice.choice([0, 200])
        ino = self.filesystem.live.create(ROOT, name, stat.S_IFREG | 0o600, 0, 0).ino
        if self.choice.random() < 0.3:
            self.filesystem.live.setxattr(ino, b"user.x", CHUNK[: self.choice.choice([9, 60_000])])

    def write(self) -> None:
        blocks = self.choice.choice([1, 1, 16, 17, 256])
        offset = self.choice.randrange(1 << 16) * BLOCK + self.choice.choice([0, 0, 1])
        self.filesystem.live.write(self._ino(), offset, CHUNK[: blocks * BLOCK])

    def cut(self) -> None:
        self.filesystem.live.setattr(
            self._ino(), Changes(size_bytes=self.choice.randrange(1 << 28))
        )

    def remove(self) -> None:
        names = self._names()
        if len(names) > 1:
            volume = self.filesystem.live
            inode = volume.unlink(ROOT, self.choice.choice(names))
            while not volume.reclaim(inode.ino):
                pass

    def commit(self) -> None:
        self.filesystem.commit()

    def edit(self) -> None:
        self.number += 1
        filesystem, choice = self.filesystem, self.choice
        there = [record.name for record in filesystem.catalog.snapshots()]
        some = tuple(choice.sample(there, min(len(there), choice.choice([1, 1, 5, 1000]))))
        name = choice.choice(there) if there else "none"
        edits: list[Edit] = [
            CreateSnapshot(f"s{self.number}" + "x" * choice.choice([0, 200]), "d" * 900),
            RenameSnapshot(name, f"r{self.number}"),
            HoldSnapshots(some, choice.random() < 0.1),
            Rollback(name),
            Undo(),
            DeleteSnapshots(some),
        ]
        filesystem.apply(choice.choice(edits))
        for _ in range(choice.choice([0, 3, 100])):
            filesystem.drops.step(4)


def empty(filesystem: Filesystem) -> None:
    """Delete every file and every snapshot, which must work at 100 % full too (C10)."""
    volume = filesystem.live
    waiting = [entry.name for _, entry in volume.listing(ROOT)]
    while waiting:
        try:
            inode = volume.unlink(ROOT, waiting[-1])
            while not volume.reclaim(inode.ino):
                pass
            waiting.pop()
        except NoSpaceError:  # allowed only after a rollback, and until a snapshot is deleted
            snapshots = filesystem.catalog.snapshots()
            assert any(record.automatic for record in snapshots)
            filesystem.apply(HoldSnapshots((snapshots[0].name,), False))
            filesystem.apply(DeleteSnapshots((snapshots[0].name,)))
            filesystem.work_drops()
            if inode.ino in volume.orphans:
                waiting.pop()
                filesystem.reclaim_orphans()
    names = tuple(record.name for record in filesystem.catalog.snapshots())
    filesystem.apply(HoldSnapshots(names, False))
    filesystem.apply(DeleteSnapshots(names))
    filesystem.work_drops()
    assert not filesystem.catalog.snapshots()


def require_clean(filesystem: Filesystem) -> None:
    assert filesystem.store.failed is None
    filesystem.commit()
    device = filesystem.store.device
    assert isinstance(device, MemoryDevice)
    report = check_image(device)
    assert report.clean, "\n".join(map(str, report.findings[:9]))


@given(
    total_blocks=st.one_of(st.integers(SMALLEST, 16_384), st.integers(SMALLEST, 65_536)),
    operations=st.sampled_from([1, 3, 32, DEFAULT_LIMITS.ceiling_operations]),
    retained=st.sampled_from([2, 2, 3]),
    copies=st.booleans(),
    seed=st.integers(0, 1 << 32),
)
@machine_settings(short=4, long=12, steps=1)
def test_no_freeze_at_the_edge_of_full_finds_no_block(
    total_blocks: int, operations: int, retained: int, copies: bool, seed: int
) -> None:
    """Promise C10: random work and edits at the edge succeed or are refused; then all can go."""
    limits = Limits(ceiling_operations=operations, retained_generations=retained)
    filesystem = make(total_blocks, limits, copies=copies)
    worker = Worker(filesystem, seed)
    for _ in range(60):
        worker.step()
    fill(filesystem)
    for number in range(200):
        worker.step()
        if number % 40 == 0:
            with contextlib.suppress(NoSpaceError):
                fill(filesystem)
    with contextlib.suppress(NoSpaceError):
        fill(filesystem)
    filesystem.commit()
    device = filesystem.store.device
    assert isinstance(device, MemoryDevice)
    filesystem = open_filesystem(device.crash(), writable=True, limits=limits)
    filesystem.reclaim_orphans()
    empty(filesystem)
    require_clean(filesystem)


@pytest.mark.parametrize(
    "total_blocks",
    [100_000, *(pytest.param(total, marks=pytest.mark.long) for total in (163_840, LARGEST))],
)
def test_no_freeze_of_a_large_image_finds_no_block(total_blocks: int) -> None:
    """Promise C10: the same up to sizes where the reserve is no larger than one grant of room."""
    test_no_freeze_at_the_edge_of_full_finds_no_block.hypothesis.inner_test(  # type: ignore[attr-defined]
        total_blocks, DEFAULT_LIMITS.ceiling_operations, 2, True, total_blocks
    )


def test_small_writes_with_a_commit_after_each_end_by_a_refusal() -> None:
    """Promise C10: room that an admission check found is not used beyond its transaction."""
    filesystem = make(SMALLEST, Limits(ceiling_operations=2))
    ino = filesystem.live.create(ROOT, b"file", stat.S_IFREG | 0o600, 0, 0).ino
    with contextlib.suppress(NoSpaceError):
        for number in range(SMALLEST):
            filesystem.live.write(ino, number * 4 * BLOCK, CHUNK[: 4 * BLOCK])
            filesystem.commit()
    empty(filesystem)
    require_clean(filesystem)


@pytest.mark.parametrize("kind", ["rollback", "undo", "hold", "rename", "create"])
def test_edits_of_a_full_image_end_by_a_refusal(kind: str) -> None:
    """Promise C10: edits need admission like all else; deletions work when edits are refused.

    A thousand rollbacks of a full image once took the last block of the commit.
    """
    filesystem = make(SMALLEST)
    filesystem.live.create(ROOT, b"file", stat.S_IFREG | 0o600, 0, 0)
    filesystem.apply(CreateSnapshot("first"))
    fill(filesystem)
    edits = {
        "rollback": lambda number: Rollback("first"),
        "undo": lambda number: Undo() if number else Rollback("first"),
        "hold": lambda number: HoldSnapshots(("first",), bool(number % 2)),
        "rename": lambda number: RenameSnapshot(
            filesystem.catalog.snapshots()[0].name, f"{number}" + "n" * (number % 200)
        ),
        "create": lambda number: CreateSnapshot(f"s{number}" + "n" * 200, "d" * 1000),
    }
    made = 0
    with contextlib.suppress(NoSpaceError):
        for number in range(2500):
            filesystem.apply(edits[kind](number))
            made += 1
    assert filesystem.store.failed is None
    if kind in ("rollback", "create"):
        assert 3 < made < 2500, "adding records must end"
    else:
        assert made == 2500, "what adds no record goes on"
    device = filesystem.store.device
    assert isinstance(device, MemoryDevice)
    filesystem = open_filesystem(device.crash(), writable=True)
    if kind in ("rollback", "create"):
        filesystem.apply(HoldSnapshots(("first",), False))
        some = tuple(record.name for record in filesystem.catalog.snapshots()[:50])
        filesystem.apply(DeleteSnapshots(some))
        filesystem.drops.step(10)
        filesystem.commit()
    empty(filesystem)
    require_clean(filesystem)


WEDGED = replace(
    DEFAULT_LIMITS, reserve_blocks_min=0, reserve_part=1 << 20, commit_nodes=4, commit_groups=2
)


def test_image_that_was_wedged_gives_its_snapshots_back() -> None:
    """Promise C10: from a state that today's admission would not allow, deleting still frees space.

    The image is filled with next to no reserve, as an earlier version could leave it.
    """
    filesystem = make(SMALLEST, WEDGED)
    filesystem.store.admission._catalog_copies = lambda _: 0  # type: ignore[method-assign]
    filesystem.live.create(ROOT, b"file", stat.S_IFREG | 0o600, 0, 0)
    for number in range(110):
        ino = filesystem.live.create(ROOT, b"%d" % number, stat.S_IFREG | 0o600, 0, 0).ino
        filesystem.live.write(ino, 0, CHUNK[:BLOCK])
        filesystem.apply(CreateSnapshot(f"s{number}" + "n" * 200, "d" * 1000))
    fill(filesystem)
    with contextlib.suppress(NoSpaceError):
        for _ in range(300):
            filesystem.apply(Rollback("s0" + "n" * 200))
    filesystem.commit()
    device = filesystem.store.device
    assert isinstance(device, MemoryDevice)
    filesystem = open_filesystem(device.crash(), writable=True)
    space = filesystem.space()
    assert space.free + space.pending < space.reserved // 2, "not wedged"
    before = filesystem.space().used
    names = [record.name for record in filesystem.catalog.snapshots()]
    with contextlib.suppress(NoSpaceError):  # all at once may be refused for lack of room
        filesystem.apply(DeleteSnapshots(tuple(names)))
        names = []
    assert filesystem.store.failed is None
    while names:
        try:
            filesystem.apply(DeleteSnapshots(tuple(names[:7])))
            names = names[7:]
        except NoSpaceError as error:
            assert "delete fewer at a time" in str(error)
            filesystem.apply(DeleteSnapshots((names.pop(0),)))  # deleting one works from any state
        filesystem.work_drops()
        assert not len(filesystem.drops), "its space never comes"
    filesystem.work_drops()
    assert not len(filesystem.drops), "its space never comes"
    assert filesystem.space().used < before
    require_clean(filesystem)


FAULTS = (
    Fault(
        "room that was found is kept over a commit",
        "cowfs.storage.admission:Admission.begin_transaction",
        "self._lower_ceilings()",
        "pass",
    ),
    Fault(
        "edits are not admitted",
        "cowfs.history.filesystem:Filesystem.check",
        "store.admission.admit(0, edit.tier, self._nodes_of(edit, plan))",
        "pass",
    ),
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_seeded_fault_of_admission_is_caught(fault: Fault) -> None:
    """Promise: the tests of this file notice each seeded fault."""
    caught = False
    with applied(fault):
        try:
            test_small_writes_with_a_commit_after_each_end_by_a_refusal()
            test_image_that_was_wedged_gives_its_snapshots_back()
            for kind in ("rollback", "create"):
                test_edits_of_a_full_image_end_by_a_refusal(kind)
        except (AssertionError, CowfsError):
            caught = True
    assert caught
