"""The messages of the control socket, and the frames that carry them.

Promises:
- A frame is 4 bytes of length, 1 byte of kind, and JSON, FRAME_BYTES_MAX at the most; longer
  requests and answers come in several frames. A request carries PROTOCOL_VERSION; another is
  refused in words.
- An error of the service arrives as the same kind of `CowfsError`, with its words, errno and exit
  code.

Who sends them: client.py; who answers: server.py.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator

import msgspec
from msgspec import Struct

from cowfs import errors
from cowfs.errors import CorruptError, CowfsError, UsageError
from cowfs.escapes import encodable, quoted
from cowfs.history import requests
from cowfs.history.edits import AnyEdit
from cowfs.history.reports import TrimReport
from cowfs.history.requests import AnyQuery

PROTOCOL_VERSION = 2
FRAME_BYTES_MAX = 64 << 10
REQUEST_BYTES_MAX = 16 << 20  # of all frames of one request: 60,000 names of snapshots
HEADER = struct.Struct(">IB")

# Kinds of frames.
REQUEST, PROGRESS, PART, RESULT, ERROR, LIFE = b"QPCREL"


class _Message(Struct, frozen=True, kw_only=True, tag_field="type", forbid_unknown_fields=True):
    pass


class WaitDrops(_Message, tag="wait-drops", frozen=True, kw_only=True):
    """Wait until the drop queue is empty. Answered by Done when that is durable, with Progress."""


class Sync(_Message, tag="sync", frozen=True, kw_only=True):
    """Make everything durable. Answered by Done."""


class FollowRemount(_Message, tag="follow_remount", frozen=True, kw_only=True):
    """The kernel was told `remount,ro` or `remount,rw`: follow. Answered by Done when it is so."""


class Trim(_Message, tag="trim", frozen=True, kw_only=True):
    """Give all free blocks back to the host. Answered by TrimReply, with Progress until then."""


class Stop(_Message, tag="stop", frozen=True, kw_only=True):
    """Unmount. Answered by Done when the last commit is durable; BusyError when files are open."""


class PinGeneration(_Message, tag="pin", frozen=True, kw_only=True):
    """Keep the newest durable generation whole, until the connection ends. Answered by PinReply.

    Sent again on the same connection it tells whether the pin still holds.
    """


class RepairCopy(_Message, tag="repair-copy", frozen=True, kw_only=True):
    """A bad copy of a node, a page of the space map or a slot of the ring; its other copy is good.

    `checksum` in hex and `birth` are those of the pointer at it. Answered by RepairReply.
    """

    kind: str
    bad_block: int
    good_block: int
    birth: int
    checksum: str


Request = (
    AnyEdit | AnyQuery | WaitDrops | Sync | FollowRemount | Trim | Stop | PinGeneration | RepairCopy
)


class Progress(Struct, frozen=True, kw_only=True):
    """How far a long request is."""

    what: str
    done_bytes: int
    total_bytes: int


class PinReply(_Message, tag="pin", frozen=True, kw_only=True):
    generation: int
    holds: bool = True


class RepairReply(_Message, tag="repair", frozen=True, kw_only=True):
    """Whether the daemon saw the same, and writes the copy again with its next commit."""

    accepted: bool


class TrimReply(_Message, tag="trim", frozen=True, kw_only=True):
    trim: TrimReport


class Done(_Message, tag="done", frozen=True, kw_only=True):
    """`generation`: the newest durable one."""

    generation: int


Reply = requests.Reply | PinReply | RepairReply | TrimReply | Done


class Envelope(Struct, frozen=True, kw_only=True):
    """A request as it travels: `request` is decoded once the version is known to be ours."""

    version: int
    request: msgspec.Raw


class ErrorMessage(Struct, frozen=True, kw_only=True):
    """A `CowfsError` as it travels. `kind`: the name of its class."""

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


def message_of(error: CowfsError) -> ErrorMessage:
    """An error, to be sent."""
    kinds = _error_kinds()
    kind = next(base.__name__ for base in type(error).__mro__ if base.__name__ in kinds)
    return ErrorMessage(
        kind=kind,
        message=encodable(str(error)),
        errno=error.errno or errno.EIO,
        exit_code=error.exit_code,
    )


def error_of(message: ErrorMessage) -> CowfsError:
    """An error that was sent, to be raised."""
    kind = _error_kinds().get(message.kind, CowfsError)
    error = kind.__new__(kind)  # not every kind is made from its words alone
    CowfsError.__init__(error, message.message)
    error.errno = message.errno
    error.exit_code = message.exit_code
    if isinstance(error, CorruptError):
        error.owner, error.block, error.reason = "", 0, message.message
        error.found = error.expected = None
    return error


def encode_request(request: Request) -> bytes:
    """A request as JSON.

    Raises:
        UsageError: a name or a description in it is no text, so no image can have it.
    """
    try:
        return msgspec.json.encode(request)
    except UnicodeEncodeError as error:
        which = "the description" if error.object == getattr(request, "description", None) else ""
        words = f"{which or 'snapshot name'} {quoted(error.object)} is not valid UTF-8"
        raise UsageError(words) from None


def frame(kind: int, payload: bytes | memoryview) -> bytes:
    """One frame; the payload is at most FRAME_BYTES_MAX - 1 bytes."""
    return HEADER.pack(1 + len(payload), kind) + payload


def frames(last_kind: int, payload: bytes) -> Iterator[bytes]:
    """A request or an answer as frames of at most FRAME_BYTES_MAX; all but the last are parts."""
    view = memoryview(payload)
    step = FRAME_BYTES_MAX - HEADER.size
    while len(view) > step:
        yield frame(PART, view[:step])
        view = view[step:]
    yield frame(last_kind, view)
