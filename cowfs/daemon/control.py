"""The control socket: typed requests to a running daemon, and its answers.

Promises:
- Only the daemon's own user and root are served: the socket is 0600 in a 0700 directory, and the
  kernel tells who connects (SO_PEERCRED). A client checks who serves in the same way.
- A frame is 4 bytes of length, 1 byte of kind, and JSON, FRAME_BYTES_MAX at the most; longer
  answers come in several frames. A request carries PROTOCOL_VERSION; another is refused in words.
- Nobody can keep the daemon busy: clients are counted, a request that does not arrive and an
  answer that is not taken end by a timeout, and `accept` backs off when descriptors run out.
- An error of the service arrives as the same kind of `CowfsError`, with its words, errno and exit
  code. Any other exception is logged at the daemon and arrives as one generic line.
- A pin lives exactly as long as its connection.

While a request is worked on, the server sends a sign of life every few seconds, so a client can
tell a long commit from a daemon that hangs. The client is made of plain blocking calls: commands
start without an event loop.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import msgspec
from msgspec import Struct

from cowfs import errors
from cowfs.daemon import places
from cowfs.errors import BusyError, CorruptError, CowfsError, MountError, UsageError
from cowfs.history.reports import DropReport, InfoReport, SnapshotReport, SpaceReport

if TYPE_CHECKING:
    import logging

    import trio

PROTOCOL_VERSION = 1
FRAME_BYTES_MAX = 64 << 10
ANSWER_BYTES_MAX = 256 << 20  # of all frames of one answer: 200,000 snapshots
CLIENTS_MAX = 32
REQUEST_TIMEOUT_S = 10.0  # from one answer to the next whole request
ANSWER_TIMEOUT_S = 30.0  # for the client to take a frame
LIFE_SIGN_INTERVAL_S = 5.0
SILENCE_S_MAX = (
    120.0  # without a frame, then the client gives up: the daemon's loop never stops so long
)

_HEADER = struct.Struct(">IB")

# Kinds of frames.
REQUEST, PROGRESS, PART, RESULT, ERROR, LIFE = b"QPCREL"


# --- messages ------------------------------------------------------------------------------------


class _Message(Struct, frozen=True, kw_only=True, tag_field="type", forbid_unknown_fields=True):
    pass


class Info(_Message, tag="info", frozen=True, kw_only=True):
    """What is mounted, and how. Answered by InfoReply."""


class Space(_Message, tag="space", frozen=True, kw_only=True):
    """Answered by SpaceReply."""


class Snapshots(_Message, tag="snapshots", frozen=True, kw_only=True):
    """All snapshots, the oldest first. Answered by SnapshotsReply."""


class Drops(_Message, tag="drops", frozen=True, kw_only=True):
    """The drop queue. Answered by DropsReply."""


class CreateSnapshot(_Message, tag="create-snapshot", frozen=True, kw_only=True):
    """Answered by SnapshotReply when it is durable."""

    name: str
    description: str = ""


class DeleteSnapshots(_Message, tag="delete-snapshots", frozen=True, kw_only=True):
    """All of these or none. Answered by SnapshotsReply (those deleted) when that is durable.

    With `wait` only when the drop queue is empty, with Progress until then.
    """

    names: tuple[str, ...]
    wait: bool = False


class RenameSnapshot(_Message, tag="rename-snapshot", frozen=True, kw_only=True):
    """Answered by SnapshotReply when it is durable."""

    old: str
    new: str


class Rollback(_Message, tag="rollback", frozen=True, kw_only=True):
    """Answered by SnapshotReply: the automatic snapshot of the state before.

    With `force` also while files are open for writing.
    """

    name: str
    force: bool = False


class Undo(_Message, tag="undo", frozen=True, kw_only=True):
    """Take back the last rollback. Answered as Rollback."""

    force: bool = False


class Sync(_Message, tag="sync", frozen=True, kw_only=True):
    """Make everything durable. Answered by Done."""


class Stop(_Message, tag="stop", frozen=True, kw_only=True):
    """Unmount. Answered by Done when the last commit is durable; BusyError when files are open."""


class PinGeneration(_Message, tag="pin", frozen=True, kw_only=True):
    """Keep the newest durable generation whole, until the connection ends. Answered by PinReply.

    Sent again on the same connection it tells whether the pin still holds.
    """


Request = (
    Info
    | Space
    | Snapshots
    | Drops
    | CreateSnapshot
    | DeleteSnapshots
    | RenameSnapshot
    | Rollback
    | Undo
    | Sync
    | Stop
    | PinGeneration
)


class Progress(Struct, frozen=True, kw_only=True):
    """How far a long request is."""

    what: str
    done_bytes: int
    total_bytes: int


class InfoReply(_Message, tag="info", frozen=True, kw_only=True):
    info: InfoReport


class SpaceReply(_Message, tag="space", frozen=True, kw_only=True):
    space: SpaceReport


class SnapshotReply(_Message, tag="snapshot", frozen=True, kw_only=True):
    snapshot: SnapshotReport


class SnapshotsReply(_Message, tag="snapshots", frozen=True, kw_only=True):
    snapshots: tuple[SnapshotReport, ...]


class DropsReply(_Message, tag="drops", frozen=True, kw_only=True):
    drops: tuple[DropReport, ...]


class PinReply(_Message, tag="pin", frozen=True, kw_only=True):
    generation: int
    holds: bool = True


class Done(_Message, tag="done", frozen=True, kw_only=True):
    """`generation`: the newest durable one."""

    generation: int


Reply = InfoReply | SpaceReply | SnapshotReply | SnapshotsReply | DropsReply | PinReply | Done


class _Envelope(Struct, frozen=True, kw_only=True):
    version: int
    request: msgspec.Raw


class _ErrorMessage(Struct, frozen=True, kw_only=True):
    kind: str
    message: str
    errno: int
    exit_code: int


def _error_kinds() -> dict[str, type[CowfsError]]:
    return {
        name: value
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, CowfsError)
    }


def _message_of(error: CowfsError) -> _ErrorMessage:
    kinds = _error_kinds()
    kind = next(base.__name__ for base in type(error).__mro__ if base.__name__ in kinds)
    return _ErrorMessage(
        kind=kind,
        message=str(error),
        errno=error.errno or errno.EIO,
        exit_code=error.exit_code,
    )


def _error_of(message: _ErrorMessage) -> CowfsError:
    kind = _error_kinds().get(message.kind, CowfsError)
    error = kind.__new__(kind)  # not every kind is made from its words alone
    CowfsError.__init__(error, message.message)
    error.errno = message.errno
    error.exit_code = message.exit_code
    if isinstance(error, CorruptError):
        error.owner, error.block, error.reason = "", 0, message.message
        error.found = error.expected = None
    return error


def _frame(kind: int, payload: bytes | memoryview) -> bytes:
    return _HEADER.pack(1 + len(payload), kind) + payload


def _result_frames(reply: Reply) -> Iterator[bytes]:
    """An answer as frames, each no longer than FRAME_BYTES_MAX."""
    view = memoryview(msgspec.json.encode(reply))
    step = FRAME_BYTES_MAX - _HEADER.size
    while len(view) > step:
        yield _frame(PART, view[:step])
        view = view[step:]
    yield _frame(RESULT, view)


# --- server --------------------------------------------------------------------------------------


def _log() -> logging.Logger:
    """The logger of this file; commands, which are clients, start without the module."""
    import logging

    return logging.getLogger(__name__)


class Pin:
    """A generation that somebody outside reads. Each is itself: usable as a key of `Store.pins`."""

    __slots__ = ("generation",)

    def __init__(self, generation: int) -> None:
        self.generation = generation


class Service(Protocol):
    """What the daemon does for its clients."""

    async def handle(
        self, request: Request, progress: Callable[[Progress], Awaitable[None]]
    ) -> Reply:
        """Answer any request but PinGeneration. Several may be under way at a time.

        `progress` raises trio.BrokenResourceError when the client is gone: let it pass, once what
        was asked for is safe.

        Raises:
            CowfsError: travels to the client.
        """

    def pin(self) -> Pin:
        """Keep the newest durable generation whole."""

    def unpin(self, pin: Pin) -> None:
        """Let it go; one that no longer holds is no error."""

    def holds(self, pin: Pin) -> bool:
        """Whether the generation is still kept: a full filesystem lets go of pins."""


async def serve(
    socket_path: Path,
    service: Service,
    *,
    task_status: trio.TaskStatus[None] | None = None,
) -> None:
    """Serve until cancelled. `started` is called when clients can connect.

    An answer that is ready when the cancellation comes is still sent.

    Args:
        socket_path: from `places.prepare_socket`.

    Raises:
        MountError: the socket cannot be made.
    """
    import trio

    server = _Server(service)
    listener, remove = _listen(socket_path)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(
                lambda task_status=trio.TASK_STATUS_IGNORED: trio.serve_listeners(
                    server.serve_client,
                    [trio.SocketListener(trio.socket.from_stdlib_socket(listener))],
                    task_status=task_status,
                )
            )
            if task_status is not None:
                task_status.started()
    finally:
        remove()


def _listen(path: Path) -> tuple[socket.socket, Callable[[], None]]:
    """A listening socket that has its name only once it listens; and how to remove that name."""
    directory, owner = places.open_directory(path.parent)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    temporary = f".{path.name}.{os.getpid()}"
    try:
        if owner != os.geteuid():
            raise MountError(f"the directory {path.parent} belongs to user {owner}")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=directory)
        listener.bind(places.socket_address(directory, temporary))
        os.chmod(temporary, 0o600, dir_fd=directory)
        listener.listen(CLIENTS_MAX)
        listener.setblocking(False)
        os.rename(temporary, path.name, src_dir_fd=directory, dst_dir_fd=directory)
        inode = os.stat(path.name, dir_fd=directory, follow_symlinks=False).st_ino
    except OSError as error:
        listener.close()
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=directory)
        os.close(directory)
        if isinstance(error, CowfsError):
            raise
        raise MountError(f"cannot make the control socket {path}: {error.strerror}") from None

    def remove() -> None:
        with contextlib.suppress(OSError):  # somebody removed it, or made another: not ours
            found = os.stat(path.name, dir_fd=directory, follow_symlinks=False)
            if found.st_ino == inode:
                os.unlink(path.name, dir_fd=directory)
        os.close(directory)

    return listener, remove


class _ClientGoneError(Exception):
    """The client closed its end, or does not take or send what it should."""


class _Server:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._clients = 0

    async def serve_client(self, stream: trio.SocketStream) -> None:
        """One connection, from its first request to its end. Never raises but Cancelled."""
        import trio

        self._clients += 1
        try:
            await _Connection(self._service, stream).serve(crowded=self._clients > CLIENTS_MAX)
        except (_ClientGoneError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # its own business
        except Exception:
            _log().exception("a connection to the control socket failed")
        finally:
            self._clients -= 1
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await stream.aclose()


class _Connection:
    def __init__(self, service: Service, stream: trio.SocketStream) -> None:
        import trio

        self._service = service
        self._stream = stream
        self._sending = trio.Lock()
        self._pin: Pin | None = None

    async def serve(self, *, crowded: bool) -> None:
        _, user_id = places.peer(self._stream.socket)
        if user_id not in (os.geteuid(), 0):
            _log().warning("refused a connection of user %d to the control socket", user_id)
            await self._fail(MountError(f"user {user_id} may not control this mount"))
            return
        if crowded:
            await self._fail(BusyError(f"the daemon has {CLIENTS_MAX} clients already; try again"))
            return
        try:
            while (payload := await self._read()) is not None:
                await self._answer(payload)
        finally:
            if self._pin is not None:
                self._service.unpin(self._pin)

    async def _read(self) -> bytes | None:
        """The next request's bytes; None at the end of the connection."""
        import trio

        # A pin is held by keeping quiet.
        seconds = float("inf") if self._pin is not None else REQUEST_TIMEOUT_S
        with trio.move_on_after(seconds) as first_wait:
            first = await self._stream.receive_some(_HEADER.size)
        if first_wait.cancelled_caught:
            return None
        if not first:
            return None
        with trio.move_on_after(REQUEST_TIMEOUT_S):
            header = bytes(first) + await self._exactly(_HEADER.size - len(first))
            size, kind = _HEADER.unpack(header)
            if kind != REQUEST or not 1 <= size <= FRAME_BYTES_MAX:
                await self._fail(UsageError("the control socket got something that is no request"))
                raise _ClientGoneError
            return await self._exactly(size - 1)
        raise _ClientGoneError

    async def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = await self._stream.receive_some(size - len(data))
            if not part:
                raise _ClientGoneError
            data += part
        return bytes(data)

    async def _answer(self, payload: bytes) -> None:
        import trio

        try:
            request = _decode_request(payload)
        except CowfsError as error:
            await self._fail(error)
            raise _ClientGoneError from None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._show_life)
            error_answer: CowfsError | None = None
            try:
                reply = await self._handle(request)
            except CowfsError as error:
                error_answer = error
            except (trio.BrokenResourceError, _ClientGoneError):
                nursery.cancel_scope.cancel()
                return
            except Exception:
                _log().exception("the request %s failed", type(request).__name__)
                error_answer = CowfsError(
                    f"the daemon (process {os.getpid()}) met an internal error; its log has more"
                )
            if error_answer is not None:
                await self._fail(error_answer)
            else:
                for frame in _result_frames(reply):
                    await self._send(frame)
            nursery.cancel_scope.cancel()

    async def _handle(self, request: Request) -> Reply:
        if not isinstance(request, PinGeneration):
            return await self._service.handle(request, self._tell)
        if self._pin is None:
            self._pin = self._service.pin()
        return PinReply(generation=self._pin.generation, holds=self._service.holds(self._pin))

    async def _tell(self, progress: Progress) -> None:
        import trio

        try:
            await self._send(_frame(PROGRESS, msgspec.json.encode(progress)))
        except _ClientGoneError:
            raise trio.BrokenResourceError("the client is gone") from None

    async def _show_life(self) -> None:
        import trio

        while True:
            await trio.sleep(LIFE_SIGN_INTERVAL_S)
            try:
                await self._send(_frame(LIFE, b""))
            except (trio.BrokenResourceError, trio.ClosedResourceError, _ClientGoneError):
                return  # whoever sends the answer finds out

    async def _fail(self, error: CowfsError) -> None:
        message = _message_of(error)
        frame = _frame(ERROR, msgspec.json.encode(message))
        if len(frame) > FRAME_BYTES_MAX:
            shorter = msgspec.structs.replace(message, message=message.message[:4096] + "...")
            frame = _frame(ERROR, msgspec.json.encode(shorter))
        await self._send(frame)

    async def _send(self, frame: bytes) -> None:
        """One frame, whole or not at all, also while everything around is being cancelled."""
        import trio

        with trio.move_on_after(ANSWER_TIMEOUT_S, shield=True) as scope:
            async with self._sending:
                await self._stream.send_all(frame)
        if scope.cancelled_caught:
            raise _ClientGoneError


def _decode_request(payload: bytes) -> Request:
    try:
        envelope = msgspec.json.decode(payload, type=_Envelope)
    except msgspec.MsgspecError as error:
        raise UsageError(f"the control socket got a request that cannot be read: {error}") from None
    if envelope.version != PROTOCOL_VERSION:
        raise UsageError(
            f"the daemon speaks version {PROTOCOL_VERSION} of the control protocol, the command "
            f"{envelope.version}; unmount and mount again with the cowfs that is installed now"
        )
    try:
        request: Request = msgspec.json.decode(envelope.request, type=Request)
    except msgspec.MsgspecError as error:
        raise UsageError(f"the control socket got a request that cannot be read: {error}") from None
    return request


# --- client --------------------------------------------------------------------------------------

ReplyType = TypeVar("ReplyType")
ShowProgress = Callable[[Progress], None]


class Client:
    """A connection to a daemon. One request at a time; close it, or use it in `with`.

    Args:
        socket_path: from `places.find_sockets`.
        silence_s_max: how long to wait for a sign of life.

    Raises:
        ConnectionRefusedError, FileNotFoundError: nobody serves there.
        MountError: it cannot be trusted, or does not answer.
    """

    def __init__(self, socket_path: Path, *, silence_s_max: float = SILENCE_S_MAX) -> None:
        self._path = socket_path
        directory, owner = places.open_directory(socket_path.parent)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.settimeout(silence_s_max)
            self._socket.connect(places.socket_address(directory, socket_path.name))
            self.daemon_pid, user_id = places.peer(self._socket)
            if user_id != owner:
                raise MountError(f"user {user_id} serves at {socket_path}, expected user {owner}")
        except TimeoutError:
            self._socket.close()
            raise MountError(f"the daemon at {socket_path} does not accept connections") from None
        except BaseException:
            self._socket.close()
            raise
        finally:
            os.close(directory)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    # --- requests

    def info(self) -> InfoReport:
        return self._ask(Info(), InfoReply).info

    def space(self) -> SpaceReport:
        return self._ask(Space(), SpaceReply).space

    def snapshots(self) -> tuple[SnapshotReport, ...]:
        return self._ask(Snapshots(), SnapshotsReply).snapshots

    def drops(self) -> tuple[DropReport, ...]:
        return self._ask(Drops(), DropsReply).drops

    def create_snapshot(self, name: str, description: str = "") -> SnapshotReport:
        request = CreateSnapshot(name=name, description=description)
        return self._ask(request, SnapshotReply).snapshot

    def delete_snapshots(
        self, names: Sequence[str], *, wait: bool = False, progress: ShowProgress | None = None
    ) -> tuple[SnapshotReport, ...]:
        """Delete them, all or none; more names than fit in one request go in several, in order."""
        deleted: tuple[SnapshotReport, ...] = ()
        batches = list(_batches(names))
        for number, batch in enumerate(batches):
            is_last = number == len(batches) - 1
            request = DeleteSnapshots(names=batch, wait=wait and is_last)
            deleted += self._ask(request, SnapshotsReply, progress).snapshots
        return deleted

    def rename_snapshot(self, old: str, new: str) -> SnapshotReport:
        return self._ask(RenameSnapshot(old=old, new=new), SnapshotReply).snapshot

    def rollback(self, name: str, *, force: bool = False) -> SnapshotReport:
        return self._ask(Rollback(name=name, force=force), SnapshotReply).snapshot

    def undo(self, *, force: bool = False) -> SnapshotReport:
        return self._ask(Undo(force=force), SnapshotReply).snapshot

    def sync(self) -> int:
        """Returns the newest durable generation."""
        return self._ask(Sync(), Done).generation

    def pin(self) -> tuple[int, bool]:
        """The generation kept whole until this client is closed, and whether it (still) is."""
        reply = self._ask(PinGeneration(), PinReply)
        return reply.generation, reply.holds

    def stop(self) -> None:
        """Unmount cleanly. Returns when the last commit is durable.

        Raises:
            BusyError: files are open.
            ConnectionAbortedError: the daemon ended without telling.
        """
        try:
            self._ask(Stop(), Done)
        except _EndedError as error:
            raise ConnectionAbortedError(str(error)) from None

    # --- frames

    def _ask(
        self,
        request: Request,
        expected: type[ReplyType],
        progress: ShowProgress | None = None,
    ) -> ReplyType:
        try:
            self._send(request)
            payload = self._receive(progress)
        except TimeoutError:
            raise MountError(
                f"the daemon (process {self.daemon_pid}) does not answer; is it stopped?"
            ) from None
        except (ConnectionError, EOFError):
            raise _EndedError(
                f"the daemon (process {self.daemon_pid}) ended the connection; its log may tell why"
            ) from None
        try:
            reply = msgspec.json.decode(payload, type=Reply)
        except msgspec.MsgspecError as error:
            raise MountError(f"the daemon's answer cannot be read: {error}") from None
        if not isinstance(reply, expected):
            raise MountError(f"the daemon answered with {type(reply).__name__}")
        return reply

    def _send(self, request: Request) -> None:
        envelope = _Envelope(
            version=PROTOCOL_VERSION, request=msgspec.Raw(msgspec.json.encode(request))
        )
        frame = _frame(REQUEST, msgspec.json.encode(envelope))
        if len(frame) > FRAME_BYTES_MAX:
            raise UsageError(f"a request of {len(frame)} bytes is too long for the daemon")
        try:
            self._socket.sendall(frame)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it may have said why before it closed

    def _receive(self, progress: ShowProgress | None) -> bytes:
        parts: list[bytes] = []
        total = 0
        while True:
            size, kind = _HEADER.unpack(self._exactly(_HEADER.size))
            if not 1 <= size <= FRAME_BYTES_MAX:
                raise MountError("the daemon's answer cannot be read: a frame is too long")
            payload = self._exactly(size - 1)
            if kind == LIFE:
                continue
            if kind == PROGRESS:
                if progress is not None:
                    progress(_decode(payload, Progress))
                continue
            if kind == ERROR:
                raise _error_of(_decode(payload, _ErrorMessage))
            if kind not in (PART, RESULT):
                raise MountError("the daemon's answer cannot be read: a frame of unknown kind")
            total += len(payload)
            if total > ANSWER_BYTES_MAX:
                raise MountError("the daemon's answer is too long")
            parts.append(payload)
            if kind == RESULT:
                return b"".join(parts)

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = self._socket.recv(size - len(data))
            if not part:
                raise EOFError
            data += part
        return bytes(data)


class _EndedError(MountError):
    """The daemon closed the connection before it answered."""


def _decode(payload: bytes, kind: type[ReplyType]) -> ReplyType:
    try:
        return msgspec.json.decode(payload, type=kind)
    except msgspec.MsgspecError as error:
        raise MountError(f"the daemon's answer cannot be read: {error}") from None


def _batches(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The names in groups of which each fits in one request."""
    room = FRAME_BYTES_MAX - 1024
    batch: list[str] = []
    used = 0
    for name in names:
        size = len(msgspec.json.encode(name)) + 1
        if batch and used + size > room:
            yield tuple(batch)
            batch, used = [], 0
        batch.append(name)
        used += size
    if batch or not names:
        yield tuple(batch)
