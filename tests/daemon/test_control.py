"""Promises of the control socket: it serves only its user and whole messages, and passes errors on.

Server and client are the real ones; the service behind them is a fake.
"""

import contextlib
import errno
import json
import logging
import os
import socket
import stat
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from cowfs import errors
from cowfs.api import MountConnection
from cowfs.daemon import messages, places, server
from cowfs.daemon.client import Client
from cowfs.daemon.messages import Progress, Reply, Request
from cowfs.errors import (
    BusyError,
    CorruptError,
    CowfsError,
    ImageMissingError,
    LockedError,
    MountError,
    NoSpaceError,
    SnapshotError,
    UsageError,
)
from cowfs.history import edits, requests
from cowfs.history.reports import DropReport, InfoReport, SnapshotReport, SpaceReport, TrimReport
from tests.sizes import HANG_SECONDS, wait_until

HEADER = struct.Struct(">IB")


def a_snapshot(name: str, description: str = "") -> SnapshotReport:
    return SnapshotReport(
        name=name,
        id=7,
        uuid="u",
        created_ns=1,
        generation=2,
        referenced_bytes=1 << 60,
        referenced_is_exact=True,
        description=description,
        automatic=False,
        held=False,
        parent=None,
    )


A_SPACE = SpaceReport(
    total_bytes=1,
    used_bytes=2,
    tree_bytes=3,
    catalog_bytes=4,
    system_bytes=5,
    pending_bytes=6,
    free_bytes=7,
    promised_bytes=8,
    reserved_bytes=9,
    available_bytes=10,
    drops=(DropReport(name="d", freed_bytes=1, referenced_bytes=2, stuck=True),),
)
AN_INFO = InfoReport(
    image="i",
    label="",
    uuid="u",
    format_version=1,
    block_size_bytes=4096,
    node_size_bytes=16384,
    total_bytes=1,
    generation=2,
    created_ns=3,
    committed_ns=4,
    clean=False,
    duplicated_metadata=True,
    snapshot_count=0,
    inode_count=1,
    live_root_id=1,
    log_bytes=8192,
    mount_point="/m",
    daemon_pid=5,
    daemon_settings={"commit_interval_s": 5.0, "discard": True, "generation": None},
)
A_TRIM = TrimReport(trimmed_bytes=1 << 40, pending_bytes=5)


@dataclass
class FakeService:
    """Answers every request; raises `error` if set; `requests` records the requests."""

    error: Exception | None = None
    requests: list[Request] = field(default_factory=list)
    pins: list[server.Pin] = field(default_factory=list)
    released: int = 0
    many: int = 2
    steps: int = 3
    delay_s: float = 0.0
    progress_broke: threading.Event = field(default_factory=threading.Event)

    async def handle(
        self, request: Request, progress: Callable[[Progress], Awaitable[None]]
    ) -> Reply:
        self.requests.append(request)
        await trio.sleep(self.delay_s)
        if self.error is not None:
            raise self.error
        match request:
            case requests.Info():
                return requests.InfoReply(info=AN_INFO)
            case requests.Space():
                return requests.SpaceReply(space=A_SPACE)
            case requests.Snapshots():
                snapshots = tuple(a_snapshot(f"ü {n}", "x" * 500) for n in range(self.many))
                return requests.SnapshotsReply(snapshots=snapshots)
            case requests.Drops():
                return requests.DropsReply(drops=A_SPACE.drops)
            case edits.DeleteSnapshots(names=names):
                return requests.SnapshotsReply(snapshots=tuple(map(a_snapshot, names)))
            case messages.WaitDrops():
                try:
                    for step in range(self.steps):
                        told = Progress(what="drop", done_bytes=step, total_bytes=self.steps)
                        await progress(told)
                        await trio.sleep(0)
                except trio.BrokenResourceError:
                    self.progress_broke.set()
                    raise
                return messages.Done(generation=9)
            case edits.HoldSnapshots(names=names):
                return requests.SnapshotsReply(snapshots=tuple(map(a_snapshot, names)))
            case messages.Sync() | messages.FollowRemount() | messages.Stop():
                return messages.Done(generation=9)
            case messages.Trim():
                await progress(Progress(what="trimming", done_bytes=1, total_bytes=2))
                return messages.TrimReply(trim=A_TRIM)
            case edits.Undo():
                return requests.SnapshotsReply(snapshots=(a_snapshot("kept"),))
            case edits.CreateSnapshot(name=name) | edits.Rollback(name=name):
                return requests.SnapshotsReply(snapshots=(a_snapshot(name),))
            case edits.RenameSnapshot(new=name):
                return requests.SnapshotsReply(snapshots=(a_snapshot(name),))
        raise AssertionError(request)

    def pin(self) -> server.Pin:
        pin = server.Pin(41)
        self.pins.append(pin)
        return pin

    def unpin(self, pin: server.Pin) -> None:
        if pin in self.pins:
            self.pins.remove(pin)
        self.released += 1

    def holds(self, pin: server.Pin) -> bool:
        return pin in self.pins


@contextlib.contextmanager
def serving(path: Path, service: FakeService) -> Iterator[Callable[[], None]]:
    """Run the server in a thread while the block runs. Yields a function that ends it."""
    ready = threading.Event()
    tools: list[Any] = []

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(
                lambda task_status: server.serve(path, service, task_status=task_status)
            )
            tools.extend((trio.lowlevel.current_trio_token(), nursery.cancel_scope))
            ready.set()

    thread = threading.Thread(target=trio.run, args=(run,))
    thread.start()

    def end() -> None:
        with contextlib.suppress(trio.RunFinishedError):
            tools[0].run_sync_soon(tools[1].cancel)

    try:
        assert ready.wait(HANG_SECONDS)
        yield end
    finally:
        end()
        thread.join(HANG_SECONDS)
        assert not thread.is_alive()
    assert not path.exists()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir(mode=0o700)
    return tmp_path / "run" / "1-2.sock"


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def served(path: Path, service: FakeService) -> Iterator[Callable[[], None]]:
    with serving(path, service) as end:
        yield end


def raw_connection(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(HANG_SECONDS)
    connection.connect(str(path))
    return connection


def frame(kind: bytes, payload: bytes) -> bytes:
    return HEADER.pack(1 + len(payload), kind[0]) + payload


def read_frame(connection: socket.socket) -> tuple[bytes, bytes] | None:
    """Kind and payload; None at the end of the connection."""
    data = b""
    while len(data) < HEADER.size:
        part = connection.recv(HEADER.size - len(data))
        if not part:
            return None
        data += part
    size, kind = HEADER.unpack(data)
    payload = b""
    while len(payload) < size - 1:
        payload += connection.recv(size - 1 - len(payload))
    return bytes([kind]), payload


def request_frame(request: object, version: int = messages.PROTOCOL_VERSION) -> bytes:
    return frame(b"Q", json.dumps({"version": version, "request": request}).encode())


# --- answers --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("served")
def test_every_request_arrives_and_is_answered(path: Path, service: FakeService) -> None:
    """Promise: the service gets what the client sends, and the client what the service answers."""
    with Client(path) as client:
        assert client.daemon_pid == os.getpid()
        mount = MountConnection(client, "disk.img")
        assert client.info() == AN_INFO
        assert mount.space() == A_SPACE
        assert mount.drops() == A_SPACE.drops
        assert [found.name for found in mount.snapshots()] == ["ü 0", "ü 1"]
        assert mount.create_snapshot("日本", "text").name == "日本"
        assert mount.rename_snapshot("a", "b").name == "b"
        assert [found.name for found in mount.hold_snapshots(["a", "b"], True)] == ["a", "b"]
        assert [found.name for found in mount.hold_snapshots(["a"], False)] == ["a"]
        assert mount.rollback("r", force=True).name == "r"
        assert mount.undo().name == "kept"
        mount.wait_drops()
        assert mount.sync() == 9
        assert client.follow_remount() == 9
        assert mount.trim() == A_TRIM
        client.stop()
    assert service.requests == [
        requests.Info(),
        requests.Space(),
        requests.Drops(),
        requests.Snapshots(),
        edits.CreateSnapshot(name="日本", description="text"),
        edits.RenameSnapshot(old="a", new="b"),
        edits.HoldSnapshots(names=("a", "b"), held=True),
        edits.HoldSnapshots(names=("a",), held=False),
        edits.Rollback(name="r", force=True),
        edits.Undo(force=False),
        messages.WaitDrops(),
        messages.Sync(),
        messages.FollowRemount(),
        messages.Trim(),
        messages.Stop(),
    ]


@pytest.mark.usefixtures("served")
def test_long_list_comes_in_frames_of_bounded_size(path: Path, service: FakeService) -> None:
    """Promise: a long answer arrives whole, in frames no longer than the limit."""
    service.many = 3000
    with Client(path) as client:
        assert len(MountConnection(client, "disk.img").snapshots()) == 3000
    kinds = []
    with raw_connection(path) as connection:
        connection.sendall(request_frame({"type": "snapshots"}))
        while not kinds or kinds[-1] != b"R":
            found = read_frame(connection)
            assert found is not None
            assert HEADER.size + len(found[1]) <= messages.FRAME_BYTES_MAX + HEADER.size
            kinds.append(found[0])
    assert len(kinds) > 20
    assert set(kinds) == {b"C", b"R"}


@pytest.mark.usefixtures("served")
def test_progress_is_told_before_the_answer(path: Path) -> None:
    """Promise: long work reports its progress before the answer."""
    told: list[Progress] = []
    with Client(path) as client:
        mount = MountConnection(client, "disk.img")
        mount.delete_snapshots(["a"], wait=True, progress=told.append)
    assert [progress.done_bytes for progress in told] == [0, 1, 2]


@pytest.mark.usefixtures("served")
def test_many_names_are_deleted_in_one_request(path: Path, service: FakeService) -> None:
    """Promise: a list of names longer than a frame is one edit, all or nothing."""
    names = [f"{number:0250}" for number in range(1000)]
    with Client(path) as client:
        deleted = MountConnection(client, "disk.img").delete_snapshots(names)
    assert [found.name for found in deleted] == names
    assert service.requests == [edits.DeleteSnapshots(tuple(names))]


@pytest.mark.usefixtures("served")
def test_request_that_is_too_long_is_refused_at_both_ends(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: both ends refuse a request that is too long; the connection stays usable."""
    monkeypatch.setattr("cowfs.daemon.client.REQUEST_BYTES_MAX", 200_000)
    with Client(path) as client:
        mount = MountConnection(client, "disk.img")
        with pytest.raises(UsageError, match="too long"):
            mount.create_snapshot("x" * 200_000)
        assert client.sync() == 9
    monkeypatch.undo()
    monkeypatch.setattr("cowfs.daemon.server.REQUEST_BYTES_MAX", 200_000)
    with Client(path) as client, pytest.raises(UsageError, match="too long request"):
        MountConnection(client, "disk.img").create_snapshot("x" * 200_000)


def test_answer_that_is_ready_is_sent_though_the_server_ends(
    path: Path, service: FakeService
) -> None:
    """Promise: a client that asked for the unmount hears that it is done."""
    service.delay_s = 0.2
    with serving(path, service) as end, Client(path) as client:
        handle = service.handle

        async def handle_and_end(
            request: Request, progress: Callable[[Progress], Awaitable[None]]
        ) -> Reply:
            reply = await handle(request, progress)
            end()
            return reply

        service.handle = handle_and_end  # type: ignore[method-assign]
        client.stop()


def test_life_is_shown_while_work_takes_long(
    path: Path, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: the daemon shows life during long work, so even an impatient client waits."""
    monkeypatch.setattr(server, "LIFE_SIGN_INTERVAL_S", 0.05)
    service.delay_s = 1.5
    with serving(path, service), Client(path, silence_s_max=1.0) as client:
        assert client.sync() == 9


@pytest.mark.usefixtures("served")
def test_silent_daemon_is_given_up(path: Path, service: FakeService) -> None:
    """Promise: a hanging daemon does not hang the command; the message names its process."""
    service.delay_s = 2
    with (
        Client(path, silence_s_max=0.2) as client,
        pytest.raises(MountError, match=f"process {os.getpid()}.*does not answer"),
    ):
        client.sync()


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        UsageError("wrong word"),
        SnapshotError("there is no snapshot 'x'"),
        BusyError("/m is busy: ü"),
        NoSpaceError("full"),
        LockedError("in use by process 7"),
        ImageMissingError("gone"),
        CorruptError("node", 7, "checksum is wrong"),
        CowfsError("plain"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.usefixtures("served")
def test_error_travels_with_kind_words_errno_and_exit_code(
    path: Path, service: FakeService, error: CowfsError
) -> None:
    """Promise: the client raises the same error as the daemon: kind, words, errno, exit code."""
    service.error = error
    with Client(path) as client:
        for _ in range(2):  # the connection goes on
            with pytest.raises(CowfsError) as caught:
                client.sync()
            assert type(caught.value) is type(error)
            assert str(caught.value) == str(error)
            assert caught.value.errno == error.errno
            assert caught.value.exit_code == error.exit_code


@pytest.mark.usefixtures("served")
def test_every_kind_of_error_can_travel(path: Path, service: FakeService) -> None:
    """Promise: every error class of errors.py can be sent, new ones without further code."""
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, CowfsError)
    ]
    assert len(kinds) > 10
    with Client(path) as client:
        for kind in kinds:
            service.error = kind("a", 1, "b") if kind is CorruptError else kind("words")
            with pytest.raises(kind) as caught:
                client.sync()
            assert type(caught.value) is kind


@pytest.mark.usefixtures("served")
def test_error_of_its_own_exit_code_keeps_it(path: Path, service: FakeService) -> None:
    """Promise: an error that has its own exit code keeps it."""
    service.error = MountError("words")
    service.error.exit_code = 11
    with Client(path) as client, pytest.raises(MountError) as caught:
        client.sync()
    assert caught.value.exit_code == 11
    assert MountError.exit_code == errors.EXIT_ERROR


@pytest.mark.usefixtures("served")
def test_unforeseen_exception_is_logged_and_told_without_its_inside(
    path: Path, service: FakeService, caplog: pytest.LogCaptureFixture
) -> None:
    """Promise: an internal error is logged, ends no daemon and sends the client no traceback."""
    service.error = ZeroDivisionError("secret inside")
    with Client(path) as client:
        with pytest.raises(CowfsError, match="internal error") as caught:
            client.sync()
        assert "secret" not in str(caught.value)
        assert caught.value.errno == errno.EIO
        service.error = None
        assert client.sync() == 9
    assert "secret inside" in caplog.text
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


# --- who may, and what is a request ---------------------------------------------------------------


@pytest.mark.usefixtures("served")
def test_socket_is_for_its_owner_alone(path: Path) -> None:
    """Promise: the socket has mode 0600, its directory 0700."""
    assert stat.S_IMODE(path.lstat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_directory_that_others_can_enter_is_refused_at_both_ends(path: Path, mode: int) -> None:
    """Promise: daemon and command both refuse a directory that other users can enter."""
    with serving(path, FakeService()):
        path.parent.chmod(mode)
        with pytest.raises(MountError, match="can be entered by others"):
            Client(path)
        path.parent.chmod(0o700)
    path.parent.chmod(mode)
    with pytest.raises(MountError, match="can be entered by others"):
        trio.run(server.serve, path, FakeService())


def test_link_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    """Promise: a link in place of the directory is refused."""
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(MountError, match="cannot open the directory"):
        Client(tmp_path / "link" / "x.sock")


@pytest.mark.usefixtures("served")
def test_another_user_is_refused(
    path: Path,
    service: FakeService,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Promise: a peer that is neither the daemon's user nor root (SO_PEERCRED) is refused."""
    monkeypatch.setattr(places, "peer", lambda connection: (1, os.geteuid() + 12345))
    with raw_connection(path) as connection:
        found = read_frame(connection)
        assert found is not None
        assert found[0] == b"E"
        assert json.loads(found[1])["kind"] == "MountError"
        assert read_frame(connection) is None
    assert not service.requests
    assert "refused a connection" in caplog.text
    with pytest.raises(MountError, match="expected user"):
        Client(path)


@pytest.mark.usefixtures("served")
def test_other_version_is_refused_in_words(path: Path, service: FakeService) -> None:
    """Promise: a request of another protocol version is refused with the reason."""
    with raw_connection(path) as connection:
        connection.sendall(request_frame({"type": "not invented yet", "x": 1}, version=99))
        found = read_frame(connection)
        assert found is not None
        message = json.loads(found[1])
        assert message["kind"] == "UsageError"
        assert f"version {messages.PROTOCOL_VERSION}" in message["message"]
        assert "99" in message["message"]
    assert not service.requests


@pytest.mark.parametrize(
    "data",
    [
        frame(b"Q", b"not json"),
        frame(b"Q", b"[1, 2]"),
        request_frame({"type": "unknown"}),
        request_frame({"type": "create-snapshot"}),
        request_frame({"type": "create-snapshot", "name": 7}),
        request_frame({"type": "sync", "more": 1}),
        frame(b"R", b"{}"),
        HEADER.pack(messages.FRAME_BYTES_MAX + 1, b"Q"[0]),
        HEADER.pack(0, b"Q"[0]),
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff" * 4096,
    ],
    ids=str,
)
@pytest.mark.usefixtures("served")
def test_what_is_no_request_is_refused_and_harms_nobody(
    path: Path, service: FakeService, data: bytes
) -> None:
    """Promise: the service sees only valid requests, and the next client is served."""
    with raw_connection(path) as connection:
        connection.sendall(data[:100_000])
        found = read_frame(connection)
        assert found is not None
        assert found[0] == b"E"
        assert json.loads(found[1])["kind"] == "UsageError"
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""
    assert not service.requests
    with Client(path) as client:
        assert client.sync() == 9


def test_half_a_request_ends_by_a_timeout(
    path: Path, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: a client that sends nothing or half a request is disconnected."""
    monkeypatch.setattr(server, "REQUEST_TIMEOUT_S", 0.3)
    with serving(path, service):
        for data in (b"", b"\0\0", request_frame({"type": "sync"})[:-3]):
            with raw_connection(path) as connection:
                connection.sendall(data)
                assert connection.recv(1) == b""
    assert not service.requests


def test_clients_are_counted(
    path: Path, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: clients beyond the limit get BusyError, and a closed connection frees a place."""
    monkeypatch.setattr(server, "CLIENTS_MAX", 3)
    with serving(path, service):
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(Client(path)) for _ in range(3)]
            assert [client.sync() for client in clients] == [9, 9, 9]
            with Client(path) as extra, pytest.raises(BusyError, match="3 clients"):
                extra.sync()

        def is_served() -> bool:
            try:
                with Client(path) as client:
                    return client.sync() == 9
            except BusyError:
                return False

        wait_until(is_served, "no place comes free")


def test_quiet_readers_take_no_place_of_others(
    path: Path, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: pinned readers take no place of other clients; they have their own limit."""
    monkeypatch.setattr(server, "CLIENTS_MAX", 2)
    monkeypatch.setattr(server, "READERS_MAX", 4)
    with serving(path, service):
        with contextlib.ExitStack() as stack:
            for _ in range(4):
                assert stack.enter_context(Client(path)).pin() == (41, True)
            with Client(path) as one, Client(path) as two:
                assert [one.sync(), two.sync()] == [9, 9]
                with pytest.raises(BusyError, match="4 readers"):
                    two.pin()
                assert two.sync() == 9
        wait_until(lambda: service.released == 4, "their pins stay")
        with contextlib.ExitStack() as stack:
            for _ in range(4):  # the places are free again
                stack.enter_context(Client(path)).pin()


def test_connection_that_finds_the_queue_full_waits(
    path: Path, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: however many commands come while the daemon is busy, each is served."""
    path.parent.chmod(0o700)
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as stack:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(1)
        for _ in range(2):
            stack.enter_context(raw_connection(path))
        with pytest.raises(MountError, match="does not accept"):
            Client(path, silence_s_max=0.3)
        assert places.server_pid(path) == 0, "a daemon that is busy is not gone"
        timer = threading.Timer(0.3, lambda: listener.accept()[0].close())
        timer.start()
        with Client(path) as client:
            assert client.daemon_pid == os.getpid()
        timer.join()
    path.unlink()
    monkeypatch.setattr(server, "QUEUED_MAX", 1)
    monkeypatch.setattr(server, "CLIENTS_MAX", 100)
    service.delay_s = 0.01
    answers: list[int] = []

    def ask() -> None:
        with Client(path) as client:
            answers.append(client.sync())

    with serving(path, service):
        threads = [threading.Thread(target=ask) for _ in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANG_SECONDS)
    assert answers == [9] * 50


@pytest.mark.parametrize("inner", [b"[", b'{"a":'])
@pytest.mark.parametrize("place", ["whole", "version", "request", "field"])
@pytest.mark.usefixtures("served")
def test_request_nested_deeply_is_refused_in_words(
    path: Path, place: str, inner: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Promise: a deeply nested request is refused as unreadable."""
    deep = inner * ((messages.FRAME_BYTES_MAX - 200) // len(inner))
    payload = {
        "whole": deep,
        "version": b'{"request":{},"version":' + deep,
        "request": b'{"version":1,"request":' + deep,
        "field": b'{"version":1,"request":{"type":"rollback","name":' + deep,
    }[place]
    with raw_connection(path) as connection:
        connection.sendall(frame(b"Q", payload))
        found = read_frame(connection)
        assert found is not None
        assert found[0] == b"E"
        assert b"cannot be read" in found[1]
        assert read_frame(connection) is None
    with Client(path) as client:
        assert client.sync() == 9
    assert not caplog.records


@pytest.mark.parametrize("is_answer", [True, False])
def test_answer_nested_deeply_is_refused_in_words(path: Path, is_answer: bool) -> None:
    """Promise: a deeply nested answer is refused by the client too."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                kind = b"R" if is_answer else b"E"
                connection.sendall(frame(kind, b'{"a":' * (messages.FRAME_BYTES_MAX // 5 - 10)))

        thread = threading.Thread(target=serve)
        thread.start()
        with Client(path) as client, pytest.raises(MountError, match="cannot be read"):
            client.sync()
        thread.join(HANG_SECONDS)
    path.unlink()


@pytest.mark.parametrize("what", ["the socket", "the directory", "a stale socket", "a living one"])
def test_socket_that_is_lost_is_made_again(
    tmp_path: Path,
    service: FakeService,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    what: str,
) -> None:
    """Promise: a lost socket is made again; connections live on; no living socket is replaced."""
    monkeypatch.setattr(server, "NAME_CHECK_INTERVAL_S", 0.05)
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(places, "runtime_directories", lambda user: [folder])
    path = folder / "1-2.sock"

    def connected() -> Client:
        found: list[Client] = []

        def can_connect() -> bool:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError, MountError):
                found.append(Client(path))
            return bool(found)

        wait_until(can_connect, "the socket is not made again")
        return found[0]

    with serving(path, service), Client(path) as before, contextlib.ExitStack() as stack:
        assert before.sync() == 9
        for _ in range(3):
            path.unlink()
            if what == "the directory":
                folder.rmdir()
            elif what != "the socket":
                other = stack.enter_context(socket.socket(socket.AF_UNIX))
                other.bind(str(path))
                if what == "a living one":
                    other.listen(1)
                    inode = path.stat().st_ino
                    time.sleep(0.5)
                    assert path.stat().st_ino == inode
                    path.unlink()
                else:
                    other.close()
            with connected() as client:
                assert client.sync() == 9
        assert before.sync() == 9
    assert all(
        record.levelno < logging.WARNING or "another" in record.message for record in caplog.records
    )


@pytest.mark.usefixtures("served")
def test_client_that_leaves_ends_only_the_telling(path: Path, service: FakeService) -> None:
    """Promise: when a client leaves, its progress reports fail and the daemon serves on."""
    service.steps = 100_000_000
    with raw_connection(path) as connection:
        connection.sendall(request_frame({"type": "wait-drops"}))
        assert read_frame(connection) is not None
    assert service.progress_broke.wait(HANG_SECONDS)
    with Client(path) as client:
        assert client.sync() == 9


# --- pins and names -------------------------------------------------------------------------------


@pytest.mark.usefixtures("served")
def test_pin_lives_as_long_as_its_connection(path: Path, service: FakeService) -> None:
    """Promise: the pin of a killed reader is released."""
    with Client(path) as client:
        assert client.pin() == (41, True)
        assert client.pin() == (41, True)
        assert len(service.pins) == 1
        service.pins.clear()  # a full filesystem breaks pins
        assert client.pin() == (41, False)
    wait_until(lambda: service.released, "the pin stays")
    assert service.released == 1


def test_quiet_pin_outlives_the_timeout_of_requests(
    path: Path, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: a quiet connection with a pin is not timed out."""
    monkeypatch.setattr(server, "REQUEST_TIMEOUT_S", 0.5)
    with serving(path, service), Client(path) as client:
        client.pin()
        time.sleep(1.0)
        assert client.pin() == (41, True)


def test_nobody_serving_is_told_apart(path: Path, service: FakeService) -> None:
    """Promise: a command can tell that no daemon serves, so it works on the image itself."""
    with pytest.raises(FileNotFoundError):
        Client(path)
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))
    with pytest.raises(ConnectionRefusedError):
        Client(path)
    with serving(path, service), Client(path) as client:  # the server takes over the stale name
        assert client.sync() == 9


def test_path_too_long_for_a_socket_works(tmp_path: Path, service: FakeService) -> None:
    """Promise: socket paths longer than the kernel's 108 bytes work."""
    folder = tmp_path / ("d" * 120)
    folder.mkdir(mode=0o700)
    with serving(folder / "1-2.sock", service), Client(folder / "1-2.sock") as client:
        assert client.sync() == 9


def test_stale_sockets_are_removed_and_a_living_one_is_respected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, service: FakeService
) -> None:
    """Promise: stale sockets are removed; a living one locks its image and names its process."""
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(places, "runtime_directories", lambda user: [folder])
    image = tmp_path / "image"
    image.touch()
    stale = folder / "9-9.sock"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(stale))
    socket_path = places.prepare_socket(image)
    status = image.stat()
    assert socket_path == folder / f"{status.st_dev}-{status.st_ino}.sock"
    assert not stale.exists()
    assert places.find_sockets(image) == []
    with serving(socket_path, service):
        assert places.find_sockets(image) == [socket_path]
        with pytest.raises(LockedError, match=f"process {os.getpid()}"):
            places.prepare_socket(image)
        (tmp_path / "other").touch()
        places.prepare_socket(tmp_path / "other")
        assert socket_path.exists()
        # As the kernel shows a peer of another PID namespace.
        monkeypatch.setattr(places, "peer", lambda connection: (0, os.geteuid()))
        places.prepare_socket(tmp_path / "other")
        assert socket_path.exists()
        with pytest.raises(LockedError, match="another PID namespace"):
            places.prepare_socket(image)


def test_directory_is_made_private_where_the_first_place_is_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: a directory that others can enter is skipped, and the next one made private."""
    bad, good = tmp_path / "bad", tmp_path / "good"
    bad.mkdir()
    bad.chmod(0o777)
    monkeypatch.setattr(places, "runtime_directories", lambda user: [bad, good])
    assert places.make_directory() == good
    assert stat.S_IMODE(good.stat().st_mode) == 0o700
    monkeypatch.setattr(places, "runtime_directories", lambda user: [bad])
    with pytest.raises(MountError, match="can be entered by others"):
        places.make_directory()


MOUNTINFO = b"\n".join(
    [
        b"22 1 0:21 / / rw,relatime shared:1 - ext4 /dev/root rw",
        rb"90 22 0:55 / /home/u/my\040data rw,nosuid,nodev,relatime shared:9 master:1 "
        rb"- fuse.cowfs /tmp/a\134b,\011c.img rw,user_id=1000,group_id=1000,default_permissions",
        b"91 22 0:56 / /other rw - fuse.sshfs host: rw,user_id=1000",
        b"92 22 0:57 / /ro ro,nosuid - fuse.cowfs /x.img ro,user_id=0,group_id=0",
        b"this is - no line",
        b"93 22 0:58",
        b"",
    ]
)


def test_mountinfo_gives_cowfs_mounts_with_their_images() -> None:
    """Promise: mounts of cowfs only are returned, their paths with all escapes decoded."""
    assert places.parse_mountinfo(MOUNTINFO) == [
        places.Mount("/home/u/my data", "/tmp/a\\b,\tc.img", 1000, False, "0:55", 1000),
        places.Mount("/ro", "/x.img", 0, True, "0:57", 0),
    ]


def test_mount_is_found_by_any_name_of_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: relative paths and links lead to the mount; paths inside it only with `inside`."""
    place = tmp_path / "place"
    (place / "inside").mkdir(parents=True)
    (tmp_path / "link").symlink_to(place)
    mount = places.Mount(str(place), "/image", 0, False, "0:55", 0)
    monkeypatch.setattr(places, "mounts", lambda: [mount])
    monkeypatch.chdir(tmp_path)
    for name in (place, "place", "./place/", "link", tmp_path / "link", "place/inside/.."):
        assert places.find_mount(name) == mount, name
    for name in ("place/inside", "link/inside"):
        assert places.find_mount(name) is None
        assert places.find_mount(name, inside=True) == mount
    assert places.find_mount("elsewhere", inside=True) is None
    assert places.find_mount("/", inside=True) is None
