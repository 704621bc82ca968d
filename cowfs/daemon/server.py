"""The server side of the control socket: receives typed requests, sends answers.

Promises:
- Only the daemon's own user and root are served: the socket is 0600 in a 0700 directory, and the
  kernel reports which user connects (SO_PEERCRED).
- No client can keep the daemon busy. The number of clients is limited, and so is that of readers,
  which hold a pin and are quiet. A request that does not arrive and an answer that is not received
  end by a timeout, and `accept` backs off when descriptors run out.
- A socket that was removed is made again, in the directory that is best by then.
- An exception other than `CowfsError` is logged here, and the client gets one generic line.
- A pin lives exactly as long as its connection.

During a request the server sends a sign of life every few seconds, so that a client can tell a long
commit from a daemon that hangs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

import msgspec
import trio

from cowfs.daemon import places
from cowfs.daemon.messages import (
    ERROR,
    FRAME_BYTES_MAX,
    HEADER,
    LIFE,
    PART,
    PROGRESS,
    PROTOCOL_VERSION,
    REQUEST,
    REQUEST_BYTES_MAX,
    RESULT,
    Envelope,
    PinGeneration,
    PinReply,
    Progress,
    Reply,
    Request,
    frame,
    frames,
    message_of,
)
from cowfs.errors import BusyError, CowfsError, MountError, UsageError

log = logging.getLogger(__name__)

CLIENTS_MAX = 32
QUEUED_MAX = 128  # connections not accepted yet
READERS_MAX = 64  # connections that hold a pin: they may be quiet for hours
CONNECTIONS_MAX = CLIENTS_MAX + READERS_MAX
NAME_CHECK_INTERVAL_S = 1.0  # between checks whether the socket was removed
REQUEST_TIMEOUT_S = 10.0  # from one answer to the next complete request
ANSWER_TIMEOUT_S = 30.0  # for the client to receive a frame
LIFE_SIGN_INTERVAL_S = 5.0


class Pin:
    """A generation that another process reads. Pins compare by identity: a key of `Store.pins`."""

    __slots__ = ("generation",)

    def __init__(self, generation: int) -> None:
        self.generation = generation


class Service(Protocol):
    """What the daemon does for its clients: see service.py."""

    async def handle(
        self, request: Request, progress: Callable[[Progress], Awaitable[None]]
    ) -> Reply:
        """Answer any request but PinGeneration. Several may be under way at a time.

        Args:
            progress: sends a report. Raises trio.BrokenResourceError when the client is gone:
                finish what must not be left half done, then raise it further.

        Raises:
            CowfsError: sent to the client.
        """

    def pin(self) -> Pin:
        """Keep the newest durable generation readable."""

    def unpin(self, pin: Pin) -> None:
        """Release a pin, which may have been dropped already."""

    def holds(self, pin: Pin) -> bool:
        """Whether the generation is still kept. A full filesystem drops pins."""


async def serve(
    socket_path: Path,
    service: Service,
    *,
    task_status: trio.TaskStatus[None] | None = None,
) -> None:
    """Serve until cancelled. An answer that is ready by then is still sent.

    Args:
        socket_path: from `places.prepare_socket`.
        task_status: `started` is called when clients can connect.

    Raises:
        MountError: the socket cannot be made.
    """
    server = _Server(service)
    place = _Place(socket_path)
    try:
        async with trio.open_nursery() as clients:
            accepting = await clients.start(server.accept, place.listener, clients)
            if task_status is not None:
                task_status.started()
            is_logged = False  # whether the present failure to make the socket again was logged
            while True:
                await trio.sleep(NAME_CHECK_INTERVAL_S)
                if place.is_ours():
                    continue
                try:
                    # In a thread, because by now the path may lead through any filesystem.
                    again = await trio.to_thread.run_sync(_made_again, place.name)
                except CowfsError as error:
                    if not is_logged:
                        log.warning(
                            "the control socket was removed and cannot be made again yet: %s", error
                        )
                    is_logged = True
                    continue
                log.info("the control socket was removed; made %s", again.path)
                accepting.cancel()
                place.remove()
                place, is_logged = again, False
                accepting = await clients.start(server.accept, place.listener, clients)
    finally:
        place.remove()
        place.listener.close()


def _made_again(name: str) -> _Place:
    """Make a socket of that name in the directory that is best now.

    Raises:
        MountError: no directory can be used, or another daemon serves there.
    """
    path = places.make_directory() / name
    with contextlib.suppress(ConnectionRefusedError):
        if places.server_pid(path) is not None:
            raise MountError(f"another daemon serves at {path}")
    return _Place(path)


class _Place:
    """A listening socket in its directory. It gets its name only when it listens.

    Raises:
        MountError: the socket cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        self._directory, owner = places.open_directory(path.parent)
        directory = self._directory
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        temporary = f".{path.name}.{os.getpid()}"
        try:
            if owner != os.geteuid():
                raise MountError(f"the directory {path.parent} belongs to user {owner}")
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=directory)
            self.listener.bind(places.socket_address(directory, temporary))
            os.chmod(temporary, 0o600, dir_fd=directory)
            self.listener.listen(QUEUED_MAX)
            self.listener.setblocking(False)
            os.rename(temporary, path.name, src_dir_fd=directory, dst_dir_fd=directory)
            self._status = os.stat(path.name, dir_fd=directory, follow_symlinks=False)
        except OSError as error:
            self.listener.close()
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=directory)
            os.close(directory)
            if isinstance(error, CowfsError):
                raise
            raise MountError(f"cannot make the control socket {path}: {error.strerror}") from None

    def is_ours(self) -> bool:
        """Whether the name still leads to this socket.

        Looked up in the open directory, not by path: the path may lead into our own mount.
        """
        try:
            found = os.stat(self.name, dir_fd=self._directory, follow_symlinks=False)
        except OSError:
            return False
        return os.path.samestat(found, self._status)

    def remove(self) -> None:
        """Remove the name if it is still ours. The listener is closed by the task that accepts."""
        with contextlib.suppress(OSError):
            if self.is_ours():
                os.unlink(self.name, dir_fd=self._directory)
        os.close(self._directory)


class _ClientGoneError(Exception):
    """The client closed the connection, or did not send or receive in time."""


class _Server:
    """Accepts connections and counts them.

    Attributes:
        clients: connections that hold no pin.
        readers: connections that hold one.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self.clients = 0
        self.readers = 0

    async def accept(
        self,
        listener: socket.socket,
        clients: trio.Nursery,
        *,
        task_status: trio.TaskStatus[trio.CancelScope],
    ) -> None:
        """Accept connections until the scope given to `started` is cancelled."""
        listening = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
        with trio.CancelScope() as scope:
            task_status.started(scope)
            await trio.serve_listeners(self.serve_client, [listening], handler_nursery=clients)

    async def serve_client(self, stream: trio.SocketStream) -> None:
        """Serve one connection to its end. Raises nothing but Cancelled."""
        connection = _Connection(self._service, stream, self)
        try:
            await connection.serve()
        except (_ClientGoneError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client gave up
        except Exception:
            log.exception("a connection to the control socket failed")
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await stream.aclose()


class _Connection:
    """One connection of a client."""

    def __init__(self, service: Service, stream: trio.SocketStream, server: _Server) -> None:
        self._service = service
        self._stream = stream
        self._server = server
        self._sending = trio.Lock()
        self._pin: Pin | None = None

    async def serve(self) -> None:
        self._server.clients += 1
        try:
            _, user_id = places.peer(self._stream.socket)
            if user_id not in (os.geteuid(), 0):
                log.warning("refused a connection of user %d to the control socket", user_id)
                await self._fail(MountError(f"user {user_id} may not control this mount"))
                return
            if self._server.clients > CLIENTS_MAX:
                words = f"the daemon has {CLIENTS_MAX} clients already; try again later"
                await self._fail(BusyError(words))
                return
            while (payload := await self._read()) is not None:
                await self._answer(payload)
        finally:
            if self._pin is None:
                self._server.clients -= 1
            else:
                self._server.readers -= 1
                self._service.unpin(self._pin)

    async def _read(self) -> bytes | None:
        """The bytes of the next request; None at the end of the connection."""
        # A client that holds a pin may be quiet.
        seconds = float("inf") if self._pin is not None else REQUEST_TIMEOUT_S
        with trio.move_on_after(seconds) as first_wait:
            first = await self._stream.receive_some(HEADER.size)
        if first_wait.cancelled_caught:
            return None
        if not first:
            return None
        payload = bytearray()
        with trio.move_on_after(REQUEST_TIMEOUT_S):
            header = bytes(first) + await self._exactly(HEADER.size - len(first))
            while True:
                size, kind = HEADER.unpack(header)
                too_long = len(payload) + size > REQUEST_BYTES_MAX
                if kind not in (REQUEST, PART) or not 1 <= size <= FRAME_BYTES_MAX or too_long:
                    await self._fail(
                        UsageError("the control socket received a malformed or too long request")
                    )
                    raise _ClientGoneError
                payload += await self._exactly(size - 1)
                if kind == REQUEST:
                    return bytes(payload)
                header = await self._exactly(HEADER.size)
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
                log.exception("the request %s failed", type(request).__name__)
                error_answer = CowfsError(
                    f"the daemon (process {os.getpid()}) had an internal error; see its log"
                )
            if error_answer is not None:
                await self._fail(error_answer)
            else:
                for part in frames(RESULT, msgspec.json.encode(reply)):
                    await self._send(part)
            nursery.cancel_scope.cancel()

    async def _handle(self, request: Request) -> Reply:
        if not isinstance(request, PinGeneration):
            return await self._service.handle(request, self._tell)
        if self._pin is None:
            if self._server.readers >= READERS_MAX:
                raise BusyError(f"{READERS_MAX} readers keep a generation already; try again later")
            self._pin = self._service.pin()
            # From now on it counts as a reader: it may stay for hours, and must not block clients.
            self._server.clients -= 1
            self._server.readers += 1
        return PinReply(generation=self._pin.generation, holds=self._service.holds(self._pin))

    async def _tell(self, progress: Progress) -> None:
        try:
            await self._send(frame(PROGRESS, msgspec.json.encode(progress)))
        except _ClientGoneError:
            raise trio.BrokenResourceError("the client is gone") from None

    async def _show_life(self) -> None:
        """Send signs of life until cancelled."""
        while True:
            await trio.sleep(LIFE_SIGN_INTERVAL_S)
            try:
                await self._send(frame(LIFE, b""))
            except (trio.BrokenResourceError, trio.ClosedResourceError, _ClientGoneError):
                return  # sending the answer will fail too

    async def _fail(self, error: CowfsError) -> None:
        message = message_of(error)
        answer = frame(ERROR, msgspec.json.encode(message))
        if len(answer) > FRAME_BYTES_MAX:
            shorter = msgspec.structs.replace(message, message=message.message[:4096] + "...")
            answer = frame(ERROR, msgspec.json.encode(shorter))
        await self._send(answer)

    async def _send(self, whole: bytes) -> None:
        """Send one frame completely, even while the surrounding scopes are cancelled.

        Raises:
            _ClientGoneError: the client did not receive it in time.
        """
        with trio.move_on_after(ANSWER_TIMEOUT_S, shield=True) as scope:
            async with self._sending:
                await self._stream.send_all(whole)
        if scope.cancelled_caught:
            raise _ClientGoneError


def _decode_request(payload: bytes) -> Request:
    try:
        envelope = msgspec.json.decode(payload, type=Envelope)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise UsageError(
            f"the control socket received a request that cannot be read: {error}"
        ) from None
    if envelope.version != PROTOCOL_VERSION:
        raise UsageError(
            f"the daemon speaks version {PROTOCOL_VERSION} of the control protocol, the command "
            f"version {envelope.version}; unmount, and mount again with the cowfs installed now"
        )
    try:
        request: Request = msgspec.json.decode(envelope.request, type=Request)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise UsageError(
            f"the control socket received a request that cannot be read: {error}"
        ) from None
    return request
