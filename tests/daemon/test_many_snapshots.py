"""Promises for many snapshots: one request does bounded work, and a listing reads a record once."""

import stat
from collections.abc import Callable, Iterator

import pytest
import trio

from cowfs.daemon import messages, operations, service
from cowfs.daemon.commits import Committer
from cowfs.daemon.nodes import SNAPSHOTS_NODE
from cowfs.daemon.operations import Operations
from cowfs.daemon.options import MountOptions
from cowfs.daemon.service import MountService
from cowfs.files.items import ROOT_INO
from cowfs.history import catalog as catalog_file
from cowfs.history import edits, requests
from cowfs.history.edits import CreateSnapshot, DeleteSnapshots, HoldSnapshots
from cowfs.history.filesystem import Filesystem
from cowfs.history.images import make_filesystem, open_filesystem
from cowfs.history.records import RootRecord
from tests.model.devices import MemoryDevice
from tests.model.recount import recount

SNAPSHOTS = 400


@pytest.fixture(scope="module")
def device() -> MemoryDevice:
    disk = MemoryDevice(16384)
    make_filesystem(disk)
    filesystem = open_filesystem(disk, writable=True)
    for number in range(SNAPSHOTS):
        filesystem.apply(CreateSnapshot(f"s{number:04d}"))
    filesystem.apply(DeleteSnapshots(("s0007", "s0100")))
    filesystem.work_drops()
    filesystem.close()
    return disk


@pytest.fixture
def filesystem(device: MemoryDevice) -> Filesystem:
    return open_filesystem(device.copy(), writable=True)


def list_all(
    handlers: Operations, room: int, between: Callable[[], object] = lambda: None
) -> list[list[bytes]]:
    """The names in each answer until one is empty; an answer has room for `room` names."""
    answers: list[list[bytes]] = []
    position = 0
    while True:
        names: list[bytes] = []

        def reply(token: object, name: bytes, entry: object, cookie: int) -> bool:
            nonlocal position
            if len(names) == room:  # noqa: B023  called before the next iteration
                return False
            names.append(name)  # noqa: B023
            position = cookie
            return True

        handlers._list(SNAPSHOTS_NODE, position, None, reply)  # type: ignore[arg-type]
        if not names:
            return answers
        answers.append(names)
        assert len(answers) < 2 * SNAPSHOTS, "the same names again"
        between()


def expected() -> list[bytes]:
    shown = [b"s%04d" % number for number in range(SNAPSHOTS) if number not in (7, 100)]
    return [b".", b"..", *shown]


@pytest.mark.parametrize("room", [3, 1 << 20])
def test_listing_looks_at_each_snapshot_once(
    filesystem: Filesystem, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: the time of `ls .snapshots` grows linearly with the number of snapshots."""
    handlers = Operations(filesystem, None, MountOptions(image="image", mountpoint="/nowhere"))
    looked, roots = 0, type(filesystem.catalog).roots_from

    def counted(catalog: catalog_file.Catalog, root_id: int) -> Iterator[RootRecord]:
        nonlocal looked
        for record in roots(catalog, root_id):
            looked += 1
            yield record

    monkeypatch.setattr(catalog_file.Catalog, "roots_from", counted)
    monkeypatch.setattr(operations, "SNAPSHOTS_LISTED_MAX", 20)
    answers = list_all(handlers, room)
    assert [name for names in answers for name in names] == expected()
    assert looked <= SNAPSHOTS + 2 * len(answers) + 2
    assert max(map(len, answers)) <= 20 + 2


def test_listing_goes_on_when_what_it_ended_with_is_deleted(filesystem: Filesystem) -> None:
    """Promise: each name that stays is listed once, whatever is created or deleted meanwhile."""
    handlers = Operations(filesystem, None, MountOptions(image="image", mountpoint="/nowhere"))
    gone: list[bytes] = []

    def delete_last() -> None:
        if not gone:
            name = b"s0002"
            gone.append(name)
            filesystem.apply(DeleteSnapshots((name.decode(),)))

    answers = list_all(handlers, 5, delete_last)
    assert answers[0][-1] == gone[0]
    assert [name for names in answers for name in names] == expected()


def test_records_are_decoded_once(filesystem: Filesystem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise: a list of all snapshots decodes each record at most once."""
    decoded = 0
    decode = catalog_file.decode_root

    def counted(value: bytes) -> RootRecord:
        nonlocal decoded
        decoded += 1
        return decode(value)

    monkeypatch.setattr(catalog_file, "decode_root", counted)
    catalog = filesystem.catalog
    before = catalog.snapshots()
    assert catalog.snapshot_count == len(before) == SNAPSHOTS - 2
    decoded = 0
    assert catalog.snapshots() == before
    assert decoded == 0
    filesystem.apply(HoldSnapshots(("s0005",), True))
    held = [record.name for record in catalog.snapshots() if record.held]
    assert held == ["s0005"], "what changed is not taken from what was known"


def test_records_beyond_those_kept_are_right(
    filesystem: Filesystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog_file, "DECODED_MAX", 10)
    again = catalog_file.Catalog(filesystem.catalog.tree, filesystem.catalog.next_root_id)
    assert again.snapshots() == again.snapshots() == filesystem.catalog.snapshots()
    assert len(again._known) == 10


@pytest.mark.parametrize("kind", ["snapshots", "drops", "space"])
def test_lists_let_other_requests_go_between(
    filesystem: Filesystem, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: no other request waits until a whole list is made."""
    monkeypatch.setattr(service, "SLICE_REPORTS", 10)
    if kind != "snapshots":
        names = [record.name for record in filesystem.catalog.snapshots()]
        filesystem.apply(DeleteSnapshots(tuple(names)))
    options = MountOptions(image="image", mountpoint="/nowhere")
    handlers = Operations(filesystem, None, options)
    serving = MountService(filesystem, None, handlers, options, lambda path: None)
    request: messages.Request = {
        "snapshots": requests.Snapshots(),
        "drops": requests.Drops(),
        "space": requests.Space(),
    }[kind]
    turns, found = 0, 0

    async def main() -> None:
        nonlocal found

        async def others() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        async def no_progress(progress: messages.Progress) -> None:
            raise AssertionError

        async with trio.open_nursery() as nursery:
            nursery.start_soon(others)
            reply = await serving.handle(request, no_progress)
            nursery.cancel_scope.cancel()
        match reply:
            case requests.SnapshotsReply(snapshots=snapshots):
                found = len(snapshots)
            case requests.DropsReply(drops=drops):
                found = len(drops)
            case requests.SpaceReply(space=space):
                found = len(space.drops)

    trio.run(main)
    assert found == SNAPSHOTS - 2
    assert turns >= found // 10 - 2


def test_check_of_a_large_edit_lets_requests_and_commits_between(
    filesystem: Filesystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: a check of hundreds of names stops nobody, and a commit in its middle is no harm."""
    monkeypatch.setattr(edits, "SLICE_NAMES", 16)
    names = tuple(f"s{number:04d}" for number in range(SNAPSHOTS) if number not in (7, 100))[:-50]
    slices = len(names) // 16
    turns = 0
    turns_at_freeze: list[int] = []

    async def serve() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1
            if turns == slices:  # in the middle of the check, as when admission asks for relief
                filesystem.live.create(ROOT_INO, b"meanwhile", stat.S_IFREG | 0o600, 0, 0)
                filesystem.commit()

    async def work() -> None:
        committer = Committer(filesystem, 60, 64 << 20)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            deleted = await committer.apply(
                DeleteSnapshots(names), lambda: turns_at_freeze.append(turns)
            )
            nursery.cancel_scope.cancel()
        assert [record.name for record in deleted] == list(names)

    trio.run(work)
    assert turns_at_freeze[0] >= 2 * slices
    assert len(filesystem.catalog.snapshots()) == 50
    filesystem.work_drops()
    assert filesystem.live.find(ROOT_INO, b"meanwhile") is not None
    filesystem.close()
    recount(filesystem.store.device).require_exact()  # type: ignore[arg-type]
