"""Promises of the commits of a mount: no caller is told that lost changes are durable."""

import errno
import threading
import time
from collections.abc import Callable

import pytest
import trio

from cowfs.daemon.commits import Committer
from cowfs.errors import CowfsError, DeviceError
from cowfs.files.items import ROOT_INO
from cowfs.history.filesystem import Filesystem
from cowfs.history.images import make_filesystem, open_filesystem
from cowfs.storage.commit import Commit
from cowfs.storage.format import BLOCK_SIZE_BYTES, MIN_TOTAL_BLOCKS
from cowfs.storage.log import Log
from cowfs.storage.superblock import read_newest
from tests.model.devices import MemoryDevice
from tests.sizes import HANG_SECONDS


@pytest.fixture
def device() -> MemoryDevice:
    device = MemoryDevice(max(MIN_TOTAL_BLOCKS, (64 << 20) // BLOCK_SIZE_BYTES))
    make_filesystem(device)
    return device


def change(filesystem: Filesystem, name: bytes) -> None:
    filesystem.live.create(ROOT_INO, name, 0o100644, 0, 0, 0)


@pytest.mark.parametrize("waiters", [1, 2])
@pytest.mark.parametrize(
    "place", ["freeze", "write", "finish", "next record", "record's write", "record's finish"]
)
def test_unexpected_error_in_a_commit_is_no_success_for_anybody(
    device: MemoryDevice,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    place: str,
    waiters: int,
) -> None:
    """Promise C8: an internal error in a commit ends writing with EIO; the last commit stays."""
    filesystem = open_filesystem(device, writable=True)
    change(filesystem, b"durable")
    filesystem.commit()
    generation = filesystem.store.superblock.generation
    committer = Committer(filesystem, 1000.0, 64 << 20)
    change(filesystem, b"lost")

    def fail(*_: object, **__: object) -> None:
        raise KeyError("a fault of our own")

    targets: dict[str, tuple[object, str]] = {
        "freeze": (filesystem.drops, "save"),
        "write": (Commit, "_write"),
        "finish": (filesystem, "finish"),
        "next record": (Log, "next_record"),
        "record's write": (device, "write"),
        "record's finish": (filesystem, "finish_record"),
    }
    monkeypatch.setattr(*targets[place], fail)
    found: list[int | None] = []
    make = committer.sync if "record" in place else committer.commit

    async def wait(call: Callable[[], object]) -> None:
        try:
            await call()  # type: ignore[misc]
        except CowfsError as error:
            found.append(error.errno)
        else:
            found.append(None)

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(waiters):
                nursery.start_soon(wait, make)
        await wait(committer.sync)

    trio.run(run)
    assert found == [errno.EIO] * (waiters + 1)
    assert isinstance(filesystem.store.failed, DeviceError)
    assert "unexpected error in a commit" in caplog.text
    with pytest.raises(DeviceError):
        change(filesystem, b"refused")
    monkeypatch.undo()
    filesystem.close()

    expected = generation + (place == "finish")  # "finish" fails after the superblock is written
    assert read_newest(device).generation == expected
    again = open_filesystem(device, writable=False)
    assert again.live.find(ROOT_INO, b"durable") is not None


# --- records of the log ---------------------------------------------------------------------------


def writes_of(device: MemoryDevice, start: int) -> list[str]:
    return [event.kind for event in device.events[start:]]


async def sync_all(committer: Committer, count: int) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(committer.sync)


@pytest.mark.parametrize("alone", [True, False])
def test_all_who_wait_share_one_record(device: MemoryDevice, alone: bool) -> None:
    """Guards L3: several fsyncs are one record and one flush, and a lone one does not wait."""
    filesystem = open_filesystem(device, writable=True)
    filesystem.commit()
    committer = Committer(filesystem, 1000.0, 64 << 20)
    committer.others_wait = lambda: not alone
    for number in range(5):
        change(filesystem, b"%d" % number)
    start = len(device.events)
    trio.run(sync_all, committer, 5)
    assert writes_of(device, start) == ["write", "write", "flush"]
    assert (committer.record_count, committer.commit_count) == (1, 0)
    shown = open_filesystem(device.crash(), writable=False).live
    assert len(list(shown.listing(ROOT_INO))) == 5


def test_what_is_changed_during_a_record_is_in_the_next(device: MemoryDevice) -> None:
    """Guards C2 and L2: an fsync that comes while a record is written waits for its own."""
    filesystem = open_filesystem(device, writable=True)
    filesystem.commit()
    committer = Committer(filesystem, 1000.0, 64 << 20)
    entered, leave = threading.Event(), threading.Event()
    flush = device.flush

    def slow_flush() -> None:
        entered.set()
        assert leave.wait(HANG_SECONDS)
        flush()

    async def work() -> None:
        change(filesystem, b"first")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(committer.sync)
            nursery.start_soon(committer.sync)  # two, so that a thread writes
            while not entered.is_set():
                await trio.sleep(0.001)
            change(filesystem, b"second")
            acknowledged = trio.Event()

            async def sync() -> None:
                await committer.sync()
                acknowledged.set()

            nursery.start_soon(sync)
            await trio.sleep(0.05)
            assert not acknowledged.is_set(), "acknowledged before its record was written"
            leave.set()

    device.flush = slow_flush  # type: ignore[method-assign]
    trio.run(work)
    assert committer.record_count == 2
    shown = open_filesystem(device.crash(), writable=False).live
    assert shown.find(ROOT_INO, b"second") is not None


def test_commit_for_room_during_a_record_loses_neither(device: MemoryDevice) -> None:
    """Guards L1 and L6: a commit in the loop waits for the record that a thread writes."""
    filesystem = open_filesystem(device, writable=True)
    filesystem.commit()
    committer = Committer(filesystem, 1000.0, 64 << 20)
    entered = threading.Event()
    flush = device.flush

    def slow_flush() -> None:
        if not entered.is_set():
            entered.set()
            time.sleep(0.05)
        flush()

    async def work() -> None:
        change(filesystem, b"first")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(committer.sync)
            nursery.start_soon(committer.sync)
            while not entered.is_set():
                await trio.sleep(0.001)
            change(filesystem, b"second")
            filesystem.commit()  # as admission does that needs room
        change(filesystem, b"third")
        await committer.sync()

    device.flush = slow_flush  # type: ignore[method-assign]
    trio.run(work)
    shown = open_filesystem(device.crash(), writable=False).live
    assert {name.name for _, name in shown.listing(ROOT_INO)} == {b"first", b"second", b"third"}


def test_commit_is_no_record(device: MemoryDevice) -> None:
    """Promise: who reads the image after `commit` finds everything in a generation."""
    filesystem = open_filesystem(device, writable=True)
    committer = Committer(filesystem, 1000.0, 64 << 20)
    change(filesystem, b"file")
    trio.run(committer.sync)
    generation = filesystem.store.superblock.generation
    trio.run(committer.commit)
    assert filesystem.store.superblock.generation == generation + 1
    trio.run(committer.commit)
    assert filesystem.store.superblock.generation == generation + 1
