"""The client side of the control socket: one method per request.

It uses plain blocking calls, so that commands start without an event loop. The client checks which
user serves, and the server checks which user asks.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

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
    Done,
    Envelope,
    ErrorMessage,
    FollowRemount,
    PinGeneration,
    PinReply,
    Progress,
    RepairCopy,
    RepairReply,
    Reply,
    Request,
    Stop,
    Sync,
    Trim,
    TrimReply,
    WaitDrops,
    encode_request,
    error_of,
    frames,
)
from cowfs.errors import ImageError, MountError, UsageError
from cowfs.history.reports import InfoReport, TrimReport
from cowfs.history.requests import Info, InfoReply

ANSWER_BYTES_MAX = 256 << 20  # all frames of one answer: 200,000 snapshots
# The client gives up after this time without a frame. The daemon's loop never stops for so long.
SILENCE_S_MAX = 120.0
QUEUE_RETRY_S = 0.02

ReplyType = TypeVar("ReplyType")
ShowProgress = Callable[[Progress], None]


class Client:
    """A connection to a daemon. One request at a time; close it, or use it in `with`.

    Args:
        socket_path: from `places.find_sockets`.
        silence_s_max: how long to wait for a frame before giving up.

    Attributes:
        daemon_pid: 0 if the daemon is in another PID namespace.
        daemon: the daemon's name in messages.

    Raises:
        ConnectionRefusedError, FileNotFoundError: nobody serves there.
        MountError: the server cannot be trusted, or does not accept connections.
    """

    def __init__(self, socket_path: Path, *, silence_s_max: float = SILENCE_S_MAX) -> None:
        self._path = socket_path
        directory, owner = places.open_directory(socket_path.parent)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.settimeout(silence_s_max)
            self._connect(places.socket_address(directory, socket_path.name), silence_s_max)
            self.daemon_pid, user_id = places.peer(self._socket)
            self.daemon = f"process {self.daemon_pid}"
            if not self.daemon_pid:
                self.daemon = "a process of another PID namespace"
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

    def _connect(self, address: str, wait_s: float) -> None:
        """Connect, trying again while the daemon's queue is full, which is EAGAIN at once."""
        deadline_s = time.monotonic() + wait_s
        while True:
            try:
                self._socket.connect(address)
                return
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    raise TimeoutError from None
                time.sleep(QUEUE_RETRY_S)

    def serves_image(self, image: str) -> bool:
        """Whether a path still leads to the daemon's image, which may have been moved."""
        try:
            return places.socket_name(image) == self._path.name
        except ImageError:
            return False

    # --- requests

    def info(self) -> InfoReport:
        return self.ask(Info(), InfoReply).info

    def wait_drops(self, progress: ShowProgress | None = None) -> None:
        """Return when the drop queue is empty and that is durable."""
        self.ask(WaitDrops(), Done, progress)

    def sync(self) -> int:
        """Make everything durable. Returns the newest durable generation."""
        return self.ask(Sync(), Done).generation

    def follow_remount(self) -> int:
        """Make the daemon follow a remount now. Returns the newest durable generation."""
        return self.ask(FollowRemount(), Done).generation

    def trim(self, progress: ShowProgress | None = None) -> TrimReport:
        """Give all free blocks back to the host."""
        return self.ask(Trim(), TrimReply, progress).trim

    def pin(self) -> tuple[int, bool]:
        """Pin a generation until this client is closed, or ask about the pin.

        Returns:
            The generation, and whether it is (still) kept.
        """
        reply = self.ask(PinGeneration(), PinReply)
        return reply.generation, reply.holds

    def repair(self, copy: RepairCopy) -> bool:
        """Ask the daemon to rewrite a bad copy with its next commit.

        Returns:
            Whether the daemon accepts: it found the same damage.

        Raises:
            ReadOnlyError: the mount is read-only.
        """
        return self.ask(copy, RepairReply).accepted

    def stop(self) -> None:
        """Unmount cleanly. Returns when the last commit is durable.

        Raises:
            BusyError: files are open.
            ConnectionAbortedError: the daemon ended before it answered.
        """
        try:
            self.ask(Stop(), Done)
        except _EndedError as error:
            raise ConnectionAbortedError(str(error)) from None

    # --- frames

    def ask(
        self,
        request: Request,
        expected: type[ReplyType],
        progress: ShowProgress | None = None,
    ) -> ReplyType:
        """Send a request, and return its reply.

        Args:
            expected: the type of the reply.
            progress: called with each progress report.

        Raises:
            CowfsError: the error that the daemon reports.
            MountError: the daemon does not answer, or its answer cannot be decoded.
        """
        try:
            self._send(request)
            payload = self._receive(progress)
        except TimeoutError:
            raise MountError(
                f"the daemon ({self.daemon}) does not answer; is it stopped?"
            ) from None
        except (ConnectionError, EOFError):
            raise _EndedError(
                f"the daemon ({self.daemon}) ended the connection; its log may tell why"
            ) from None
        try:
            reply = msgspec.json.decode(payload, type=Reply)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise MountError(f"the daemon's answer cannot be read: {error}") from None
        if not isinstance(reply, expected):
            raise MountError(
                f"the daemon answered with {type(reply).__name__}, not {expected.__name__}"
            )
        return reply

    def _send(self, request: Request) -> None:
        envelope = Envelope(version=PROTOCOL_VERSION, request=msgspec.Raw(encode_request(request)))
        payload = msgspec.json.encode(envelope)
        if len(payload) > REQUEST_BYTES_MAX:
            raise UsageError(f"a request of {len(payload)} bytes is too long for the daemon")
        whole = b"".join(frames(REQUEST, payload))
        try:
            self._socket.sendall(whole)
        except (BrokenPipeError, ConnectionResetError):
            pass  # its reason may have arrived before it closed

    def _receive(self, progress: ShowProgress | None) -> bytes:
        """Receive frames until the reply is complete, or raise the error that comes instead."""
        parts: list[bytes] = []
        total = 0
        while True:
            size, kind = HEADER.unpack(self._exactly(HEADER.size))
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
                raise error_of(_decode(payload, ErrorMessage))
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
    except (msgspec.MsgspecError, RecursionError) as error:
        raise MountError(f"the daemon's answer cannot be read: {error}") from None
