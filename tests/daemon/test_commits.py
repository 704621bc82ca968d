"""Promises of the commits of a mount: no caller is told that lost changes are durable."""

import errno
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
