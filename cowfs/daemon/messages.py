"""The messages of the control socket, and the frames that carry them.

Promises:
- A frame is 4 bytes of length, 1 byte of kind, and JSON, FRAME_BYTES_MAX at the most; longer
  answers come in several frames. A request carries PROTOCOL_VERSION; another is refused in words.
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
from cowfs.history.reports import DropReport, InfoReport, SnapshotReport, SpaceReport, TrimReport

PROTOCOL_VERSION = 1
FRAME_BYTES_MAX = 64 << 10
HEADER = struct.Struct(">IB")

# Kinds of frames.
REQUEST, PROGRESS, PART, RESULT, ERROR, LIFE = b"QPCREL"


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


class HoldSnapshots(_Message, tag="hold-snapshots", frozen=True, kw_only=True):
    """Refuse the deletion of these from now on, or no longer: all of them or none.

    Answered by SnapshotsReply (as they are then) when that is durable.
    """

    names: tuple[str, ...]
    held: bool


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
    Info
    | Space
    | Snapshots
    | Drops
    | CreateSnapshot
    | DeleteSnapshots
    | RenameSnapshot
    | HoldSnapshots
    | Rollback
    | Undo
    | Sync
    | FollowRemount
    | Trim
    | Stop
    | PinGeneration
    | RepairCopy
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


class RepairReply(_Message, tag="repair", frozen=True, kw_only=True):
    """Whether the daemon saw the same, and writes the copy again with its next commit."""

    accepted: bool


class TrimReply(_Message, tag="trim", frozen=True, kw_only=True):
    trim: TrimReport


class Done(_Message, tag="done", frozen=True, kw_only=True):
    """`generation`: the newest durable one."""

    generation: int


Reply = (
    InfoReply
    | SpaceReply
    | SnapshotReply
    | SnapshotsReply
    | DropsReply
    | PinReply
    | RepairReply
    | TrimReply
    | Done
)


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


def result_frames(reply: Reply) -> Iterator[bytes]:
    """An answer as frames, each no longer than FRAME_BYTES_MAX."""
    view = memoryview(msgspec.json.encode(reply))
    step = FRAME_BYTES_MAX - HEADER.size
    while len(view) > step:
        yield frame(PART, view[:step])
        view = view[step:]
    yield frame(RESULT, view)
