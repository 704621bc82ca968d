"""Promises of a mount's discards: they start by themselves, end, and do not hold commits up."""

import os
from collections.abc import Awaitable, Callable

import pytest
import trio

import cowfs.daemon.discards as discards_module
import cowfs.storage.discards as steps_module
from cowfs.daemon.commits import Committer
from cowfs.files.items import ROOT_INO
from cowfs.history.filesystem import Filesystem
from cowfs.history.images import make_filesystem, open_filesystem
from cowfs.storage.format import BLOCK_SIZE_BYTES
from tests.model.devices import MemoryDevice
from tests.model.recount import recount
from tests.sizes import HANG_SECONDS

TOTAL_BLOCKS = 16384
INTERVAL_S = 0.05


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> MemoryDevice:
    monkeypatch.setattr(discards_module, "DISCARD_INTERVAL_S", INTERVAL_S)
    device = MemoryDevice(TOTAL_BLOCKS)
    make_filesystem(device)
    return device


def create(filesystem: Filesystem, name: bytes, blocks: int) -> bytes:
    data = os.urandom(blocks * BLOCK_SIZE_BYTES)
    ino = filesystem.live.create(ROOT_INO, name, 0o100644, 0, 0).ino
    filesystem.live.write(ino, 0, data)
    return data


def remove(filesystem: Filesystem, name: bytes) -> None:
    filesystem.live.reclaim(filesystem.live.unlink(ROOT_INO, name).ino)


def kept_content(device: MemoryDevice) -> int:
    zeros = bytes(BLOCK_SIZE_BYTES)
    return sum(device.block(number) != zeros for number in range(device.total_blocks))


def run(committer: Committer, call: Callable[[], Awaitable[object]]) -> None:
    """Run `call` while the committer works."""

    async def all_of_it() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(committer.run)
            with trio.fail_after(HANG_SECONDS):
                await call()
            nursery.cancel_scope.cancel()

    trio.run(all_of_it)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await trio.sleep(0.02)


@pytest.mark.parametrize("way", ["at once", "in three commits", "in small pieces"])
def test_what_was_deleted_reaches_the_host_without_any_more_work(
    device: MemoryDevice, way: str
) -> None:
    """Promise: an idle mount discards what was freed, and then rests."""
    filesystem = open_filesystem(device, writable=True)
    count = {"at once": 1, "in three commits": 3, "in small pieces": 300}[way]
    for number in range(count):
        create(filesystem, b"%d" % number, 6000 // count)
    filesystem.commit()
    committer = Committer(filesystem, INTERVAL_S, 64 << 20)

    async def work() -> None:
        for number in range(count):
            remove(filesystem, b"%d" % number)
            if way != "in small pieces" or number % 100 == 0:
                await committer.commit()
        await until(lambda: kept_content(device) < 1500)
        generation = filesystem.store.superblock.generation
        await trio.sleep(6 * INTERVAL_S)
        assert filesystem.store.superblock.generation == generation

    run(committer, work)
    recount(device.crash()).require_exact()
    filesystem.close()


def test_mount_with_nodiscard_discards_when_it_is_asked_to_only(device: MemoryDevice) -> None:
    """Promise: with nodiscard the mount discards only when `cowfs trim` asks for it."""
    filesystem = open_filesystem(device, writable=True, discard=False)
    create(filesystem, b"large", 6000)
    filesystem.commit()
    committer = Committer(filesystem, INTERVAL_S, 64 << 20)

    async def work() -> None:
        remove(filesystem, b"large")
        await committer.commit()
        generation = filesystem.store.superblock.generation
        await trio.sleep(8 * INTERVAL_S)
        assert filesystem.store.superblock.generation == generation
        assert all(event.kind != "discard" for event in device.events)
        sweep = await committer.trim()
        assert sweep.discarded_blocks > TOTAL_BLOCKS - 1000
        assert kept_content(device) < 1000

    run(committer, work)
    filesystem.close()


def test_pinned_generation_is_not_discarded_before_its_reader_is_gone(
    device: MemoryDevice,
) -> None:
    """Promise: blocks of a pinned generation are discarded only after its reader has gone."""
    filesystem = open_filesystem(device, writable=True)
    create(filesystem, b"large", 6000)
    filesystem.commit()
    committer = Committer(filesystem, INTERVAL_S, 64 << 20)
    store = filesystem.store

    async def work() -> None:
        store.pins["reader"] = store.superblock.generation
        device.kept = recount(device).reachable
        remove(filesystem, b"large")
        await committer.commit()
        await committer.trim()
        generation = store.superblock.generation
        await trio.sleep(8 * INTERVAL_S)
        assert store.superblock.generation == generation, "commits that cannot help"
        device.kept = frozenset()
        del store.pins["reader"]
        await until(lambda: kept_content(device) < 1500)

    run(committer, work)
    filesystem.close()


def test_trim_ends_beside_writers_that_never_rest_and_takes_nothing_from_them(
    device: MemoryDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: a discard pauses for commits and goes on after them; files stay whole."""
    monkeypatch.setattr(steps_module, "STEP_BLOCKS_MAX", 500)
    filesystem = open_filesystem(device, writable=True)
    committer = Committer(filesystem, 0.02, 64 << 20)
    files: dict[bytes, bytes] = {}
    shown: list[int] = []

    async def write() -> None:
        number = 0
        while True:
            name = b"%d" % number
            files[name] = create(filesystem, name, 1 + number % 90)
            if len(files) > 40:
                oldest = next(iter(files))
                remove(filesystem, oldest)
                del files[oldest]
            number += 1
            if number % 3 == 0:
                await committer.commit()
            await trio.sleep(0)

    async def work() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            for _ in range(5):
                sweep = await committer.trim()
                shown.append(sweep.discarded_blocks)
            nursery.cancel_scope.cancel()

    run(committer, work)
    assert min(shown) > 4000
    filesystem.commit()
    recount(device.crash()).require_exact()
    for name, data in files.items():
        ino = filesystem.live.lookup(ROOT_INO, name).ino
        assert filesystem.live.read(ino, 0, len(data) + 1) == data
    filesystem.close()


def test_two_sweeps_at_once_come_one_after_the_other(device: MemoryDevice) -> None:
    """Promise: when several clients ask for a trim at once, each is served."""
    filesystem = open_filesystem(device, writable=True)
    committer = Committer(filesystem, INTERVAL_S, 64 << 20)
    done: list[int] = []

    async def trim() -> None:
        done.append((await committer.trim()).discarded_blocks)

    async def work() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(trim)

    run(committer, work)
    assert len(done) == 3
    filesystem.close()
