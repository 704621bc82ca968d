"""The calls that change the files of a volume, as values: what the log records (storage/log.py).

An operation gives its call when it begins to change, as it cannot fail any more (operation.py).
Made again on the same files, in the same order, the calls give the same files (replay.py). So a
call has all that its result depends on beside the files: the time, and, as a check, the inode
number that a new file got. How the data lies in blocks is left to the replay.

The classes are encoded as msgpack arrays that begin with the number of their kind. Decoding checks
types and ranges, so that nothing else has to. FORMAT.md "Calls".
"""

from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from cowfs.files.items import FILE_SIZE_MAX, INO_MAX, NAME_BYTES_MAX, XATTR_VALUE_BYTES_MAX

# Upper bound of the encoded size of a call, without its names and data.
CALL_BYTES = 96

Ino = Annotated[int, Meta(ge=1, le=INO_MAX)]
Offset = Annotated[int, Meta(ge=0, le=FILE_SIZE_MAX)]
Mode = Annotated[int, Meta(ge=0, le=0o177777)]
Number = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]
Name = Annotated[bytes, Meta(min_length=1, max_length=NAME_BYTES_MAX)]
TimeNs = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]


class Changes(Struct, frozen=True, array_like=True, gc=False):
    """The changes that `Attributes.setattr` makes; None leaves an attribute alone.

    Attributes:
        clear_bits: bits to clear in the mode, after `mode` was applied.
        clear_capability: remove the xattr `security.capability`.
    """

    mode: Mode | None = None
    uid: Number | None = None
    gid: Number | None = None
    size_bytes: Offset | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    ctime_ns: int | None = None
    clear_bits: Mode = 0
    clear_capability: bool = False


class Make(Struct, frozen=True, array_like=True, gc=False, tag=1):
    """`Namespace.create`, or `symlink` where `target` is not empty. `ino`: of the new file."""

    directory: Ino
    name: Name
    mode: Mode
    uid: Number
    gid: Number
    rdev: int
    target: bytes
    umask: Mode
    inherits: bool
    ino: Ino
    now_ns: TimeNs


class MakeUnnamed(Struct, frozen=True, array_like=True, gc=False, tag=2):
    """`Namespace.create_unnamed`. `ino`: of the new file."""

    directory: Ino
    mode: Mode
    uid: Number
    gid: Number
    umask: Mode
    inherits: bool
    ino: Ino
    now_ns: TimeNs


class Link(Struct, frozen=True, array_like=True, gc=False, tag=3):
    """`Namespace.link`."""

    ino: Ino
    directory: Ino
    name: Name
    now_ns: TimeNs


class Unlink(Struct, frozen=True, array_like=True, gc=False, tag=4):
    """`Namespace.unlink`. `ino`: of the file, as a check."""

    directory: Ino
    name: Name
    ino: Ino
    now_ns: TimeNs


class RemoveDirectory(Struct, frozen=True, array_like=True, gc=False, tag=5):
    """`Namespace.rmdir`. `ino`: of the directory, as a check."""

    directory: Ino
    name: Name
    ino: Ino
    now_ns: TimeNs


class Rename(Struct, frozen=True, array_like=True, gc=False, tag=6):
    """`Namespace.rename`. `ino`: of what moves, as a check."""

    old_directory: Ino
    old_name: Name
    directory: Ino
    name: Name
    flags: Number
    uid: Number
    gid: Number
    ino: Ino
    now_ns: TimeNs


class SetAttributes(Struct, frozen=True, array_like=True, gc=False, tag=7):
    """`Attributes.setattr`."""

    ino: Ino
    changes: Changes
    now_ns: TimeNs


class Accessed(Struct, frozen=True, array_like=True, gc=False, tag=8):
    """`Attributes.accessed`: atime becomes `now_ns`."""

    ino: Ino
    now_ns: TimeNs


class SetXattr(Struct, frozen=True, array_like=True, gc=False, tag=9):
    """`Attributes.setxattr`."""

    ino: Ino
    name: Name
    value: Annotated[bytes, Meta(max_length=XATTR_VALUE_BYTES_MAX)]
    keep_setgid: bool
    now_ns: TimeNs


class RemoveXattr(Struct, frozen=True, array_like=True, gc=False, tag=10):
    """`Attributes.removexattr`."""

    ino: Ino
    name: Name
    now_ns: TimeNs


class Write(Struct, frozen=True, array_like=True, gc=False, tag=11):
    """`Content.write`. `now_ns` is None where the kernel sets the times of the file."""

    ino: Ino
    offset: Offset
    data: bytes
    now_ns: TimeNs | None


class Allocate(Struct, frozen=True, array_like=True, gc=False, tag=12):
    """`Content.allocate`. `now_ns` as in `Write`."""

    ino: Ino
    mode: Number
    offset: Offset
    length: Offset
    now_ns: TimeNs | None


class Reflink(Struct, frozen=True, array_like=True, gc=False, tag=13):
    """`Content.reflink`, of as many bytes as were shared. `now_ns` as in `Write`.

    Attributes:
        root_id: of the volume or snapshot that has the source.
    """

    root_id: Annotated[int, Meta(ge=1)]
    source_ino: Ino
    source_offset: Offset
    ino: Ino
    offset: Offset
    length: Offset
    now_ns: TimeNs | None


class Reclaim(Struct, frozen=True, array_like=True, gc=False, tag=14):
    """`Volume.reclaim`, until the orphan is gone."""

    ino: Ino


Call = (
    Make
    | MakeUnnamed
    | Link
    | Unlink
    | RemoveDirectory
    | Rename
    | SetAttributes
    | Accessed
    | SetXattr
    | RemoveXattr
    | Write
    | Allocate
    | Reflink
    | Reclaim
)

decode_calls = msgspec.msgpack.Decoder(list[Call]).decode
