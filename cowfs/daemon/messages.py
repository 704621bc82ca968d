"""The messages of the control socket, and the frames that carry them.

Promises:
- A frame is 4 bytes of length, 1 byte of kind, and JSON. A frame has at most FRAME_BYTES_MAX bytes;
  longer requests and answers take several frames. A request has PROTOCOL_VERSION; a request of
  another version is refused with a message.
- An error of the service arrives as the same kind of `CowfsError`, with its message, errno and exit
  code.

client.py sends requests, server.py answers them.
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
REQUEST_BYTES_MAX = 16 << 20  # all frames of one request: 60,000 names of snapshots
HEADER = struct.Struct(">IB")  # length of kind and payload, kind

# Kinds of frames. PART is followed by more of the same message. LIFE says that the daemon still
# works.
REQUEST, PROGRESS, PART, RESULT, ERROR, LIFE = b"QPCREL"


class _Message(Struct, frozen=True, kw_only=True, tag_field="type", forbid_unknown_fields=True):
    pass


class WaitDrops(_Message, tag="wait-drops", frozen=True, kw_only=True):
    """Wait until the drop queue is empty. Answered by Done when that is durable, with Progress."""


class Sync(_Message, tag="sync", frozen=True, kw_only=True):
    """Make everything durable. Answered by Done."""


class FollowRemount(_Message, tag="follow_remount", frozen=True, kw_only=True):
    """Follow a `remount,ro` or `remount,rw` now. Answered by Done when that has happened."""


class Trim(_Message, tag="trim", frozen=True, kw_only=True):
    """Give all free blocks back to the host. Answered by TrimReply, with Progress before."""


class Stop(_Message, tag="stop", frozen=True, kw_only=True):
    """Unmount. Answered by Done when the last commit is durable, or BusyError if files are open."""


class PinGeneration(_Message, tag="pin", frozen=True, kw_only=True):
    """Keep the newest durable generation readable until the connection ends. Answered by PinReply.

    Sent again on the same connection, it asks whether the pin still holds.
    """


class RepairCopy(_Message, tag="repair-copy", frozen=True, kw_only=True):
    """Rewrite the bad copy of a node, a space map page or a slot of the ring from its good copy.

    `checksum` (in hex) and `birth` are those of the pointer at it. Answered by RepairReply.
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
    """The progress of a long request."""

    what: str
    done_bytes: int
    total_bytes: int


class PinReply(_Message, tag="pin", frozen=True, kw_only=True):
    """The pinned generation. `holds` is False if the filesystem became full and dropped the pin."""

    generation: int
    holds: bool = True


class RepairReply(_Message, tag="repair", frozen=True, kw_only=True):
    """Whether the daemon found the same damage and rewrites the copy with its next commit."""

    accepted: bool


class TrimReply(_Message, tag="trim", frozen=True, kw_only=True):
    """What a trim gave back."""

    trim: TrimReport


class Done(_Message, tag="done", frozen=True, kw_only=True):
    """The request was carried out. `generation` is the newest durable one."""

    generation: int


Reply = requests.Reply | PinReply | RepairReply | TrimReply | Done


class Envelope(Struct, frozen=True, kw_only=True):
    """A request with its protocol version. `request` is decoded only if the version is ours."""

    version: int
    request: msgspec.Raw


class ErrorMessage(Struct, frozen=True, kw_only=True):
    """A `CowfsError` as it is sent. `kind` is the name of its class."""

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
    """The message for an error."""
    kinds = _error_kinds()
    kind = next(base.__name__ for base in type(error).__mro__ if base.__name__ in kinds)
    return ErrorMessage(
        kind=kind,
        message=encodable(str(error)),
        errno=error.errno or errno.EIO,
        exit_code=error.exit_code,
    )


def error_of(message: ErrorMessage) -> CowfsError:
    """The error of a message, to be raised."""
    kind = _error_kinds().get(message.kind, CowfsError)
    error = kind.__new__(kind)  # some kinds need more than a message for __init__
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
        UsageError: a snapshot name or a description is not valid UTF-8, so no image can have it.
    """
    try:
        return msgspec.json.encode(request)
    except UnicodeEncodeError as error:
        which = "the description" if error.object == getattr(request, "description", None) else ""
        words = f"{which or 'snapshot name'} {quoted(error.object)} is not valid UTF-8"
        raise UsageError(words) from None


def frame(kind: int, payload: bytes | memoryview) -> bytes:
    """One frame. The payload has at most FRAME_BYTES_MAX - 1 bytes."""
    return HEADER.pack(1 + len(payload), kind) + payload


def frames(last_kind: int, payload: bytes) -> Iterator[bytes]:
    """Split a request or an answer into frames. The last has `last_kind`, the others are PART."""
    view = memoryview(payload)
    step = FRAME_BYTES_MAX - HEADER.size
    while len(view) > step:
        yield frame(PART, view[:step])
        view = view[step:]
    yield frame(last_kind, view)
