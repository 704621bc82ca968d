"""Codecs of the catalog: roots, their names, and the drop queue.

Keys of the catalog tree: b"R" + root id (8 bytes) -> root record; b"S" + name -> root id of that
snapshot; b"V" + name -> root id of that volume; b"D" + number (8 bytes) -> drop record. FORMAT.md
has a table for each; a test compares the tables with this file.
"""

import re
import struct
from enum import IntEnum
from typing import NamedTuple, Protocol

from msgspec import Struct
from msgspec.structs import replace

from cowfs.errors import CorruptError, UsageError
from cowfs.escapes import quoted
from cowfs.storage.format import (
    GENERATION_MAX,
    NODE_BLOCKS,
    NODE_LEVEL_MAX,
    POINTER_BYTES,
    Pointer,
    decode_pointer,
)

ROOT_ID_MAX = (1 << 23) - 1  # with an inode number and a flag it fits in a 64-bit node id
SNAPSHOT_NAME_BYTES_MAX = 255
DESCRIPTION_BYTES_MAX = 1024
MAIN_VOLUME = "main"
COUNTER_MAX = 1 << 56  # no image has more of anything, so counters never leave 64 bits

_ID = struct.Struct(">Q")


def root_key(root_id: int) -> bytes:
    return b"R" + _ID.pack(root_id)


def snapshot_key(name: str) -> bytes:
    return b"S" + name.encode()


def volume_key(name: str) -> bytes:
    return b"V" + name.encode()


def drop_key(number: int) -> bytes:
    return b"D" + _ID.pack(number)


def encode_id(root_id: int) -> bytes:
    return _ID.pack(root_id)


def decode_id(value: bytes) -> int:
    if len(value) != _ID.size:
        raise CorruptError("catalog", 0, "a root id has the wrong length", len(value))
    return int(_ID.unpack(value)[0])


def check_snapshot_name(name: str) -> str:
    """Return `name` if a snapshot can have it: 1 to 255 bytes of UTF-8, one path component.

    Raises:
        UsageError: with the rule that the name breaks.
    """
    shown = quoted(name, 40)
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise UsageError(f"snapshot name {shown} is not valid UTF-8") from None
    if not name:
        raise UsageError("a snapshot name must not be empty")
    if size > SNAPSHOT_NAME_BYTES_MAX:
        raise UsageError(
            f"snapshot name {shown} is too long: {size} bytes, at most {SNAPSHOT_NAME_BYTES_MAX}"
        )
    if name in (".", ".."):
        raise UsageError(f"a snapshot cannot be named {name}")
    if "/" in name:
        raise UsageError(f"snapshot name {shown} must not contain /")
    if re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", name):
        raise UsageError(f"snapshot name {shown} must not contain control characters")
    if "%" in name or "," in name:
        raise UsageError(f"snapshot name {shown} must not contain % or , (they make ranges)")
    if name.startswith("-"):
        raise UsageError(f"snapshot name {shown} must not begin with -")
    return name


def check_description(text: str) -> str:
    """Return `text` if a snapshot can have it as its description.

    Raises:
        UsageError: with the rule that the text breaks.
    """
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise UsageError(f"the description {quoted(text)} is not valid UTF-8") from None
    if size > DESCRIPTION_BYTES_MAX or "\0" in text:
        raise UsageError(
            f"the description is longer than {DESCRIPTION_BYTES_MAX} bytes or has a zero byte"
        )
    return text


# --- root -----------------------------------------------------------------------------------------


class RootKind(IntEnum):
    VOLUME = 1
    SNAPSHOT = 2


FLAG_AUTOMATIC = 1 << 0  # made by a rollback or undo, to keep the state before
FLAG_SHARES = 1 << 1  # files of the tree share data blocks with other files or within a file
FLAG_HELD = 1 << 2  # snapshots only: it cannot be deleted before it is released
_FLAGS = FLAG_AUTOMATIC | FLAG_SHARES | FLAG_HELD

ROOT = struct.Struct("<QBBHI16s16sQQ40sQqQQQQ16sQHHHH")
ROOT_BYTES = 184
assert ROOT.size == ROOT_BYTES


class TreeRoot(Protocol):
    """A root node that has no checksum before it is encoded. `pointer` works only afterwards."""

    def pointer(self) -> Pointer: ...


class RootRecord(Struct, frozen=True):
    """A volume or a snapshot. FORMAT.md "Root record".

    Attributes:
        tree: a `Pointer`, or the root node until the commit has encoded it; the record is encoded
            after its tree.
        created_generation: the generation whose commit made the record. No block of a snapshot was
            born after it.
        parent_id: the snapshot that this root grew from, 0 for none. Blocks born after the parent's
            generation were written since.
        undo_id: of a volume, the automatic snapshot that the last rollback kept, 0 for none.
        origin_uuid: of a volume that a rollback or undo made, the uuid of the snapshot.
    """

    root_id: int
    kind: RootKind
    name: str
    uuid: bytes
    tree: "Pointer | TreeRoot"
    created_generation: int
    created_ns: int
    next_ino: int
    node_count: int
    data_blocks: int
    inode_count: int
    parent_id: int = 0
    undo_id: int = 0
    origin_uuid: bytes = bytes(16)
    flags: int = 0
    description: str = ""

    @property
    def automatic(self) -> bool:
        return bool(self.flags & FLAG_AUTOMATIC)

    @property
    def held(self) -> bool:
        return bool(self.flags & FLAG_HELD)

    @property
    def pointer(self) -> Pointer:
        return self.tree if isinstance(self.tree, Pointer) else self.tree.pointer()

    @property
    def shares(self) -> bool:
        """Whether the tree may have a block more than once, or blocks not from its parent."""
        return bool(self.flags & FLAG_SHARES)

    def referenced_blocks(self, node_copies: int) -> int:
        """Blocks reachable from this root, twins of nodes included (docs/design/accounting.md).

        With `shares` an upper bound: a block that files share counts for each of them
        (accounting/snapshot_usage.py counts it once).
        """
        return self.node_count * NODE_BLOCKS * node_copies + self.data_blocks

    def __len__(self) -> int:
        return ROOT_BYTES + len(self.name.encode()) + len(self.description.encode())

    def encode(self) -> bytes:
        name = self.name.encode()
        description = self.description.encode()
        return (
            ROOT.pack(
                self.root_id,
                self.kind,
                0,
                0,
                self.flags,
                self.uuid,
                self.origin_uuid,
                self.parent_id,
                self.undo_id,
                self.pointer.encode(),
                self.created_generation,
                self.created_ns,
                self.next_ino,
                self.node_count,
                self.data_blocks,
                self.inode_count,
                bytes(16),
                0,
                len(name),
                len(description),
                0,
                0,
            )
            + name
            + description
        )


_PARENT_ID = struct.Struct("<48xQ")
_CREATED_GENERATION = struct.Struct("<8xB95xQ")


def parent_of(value: bytes) -> int:
    """The parent id in an encoded root record; 0 if the record is cut short."""
    return int(_PARENT_ID.unpack_from(value)[0]) if len(value) >= ROOT_BYTES else 0


def snapshot_generation(value: bytes) -> int:
    """The creation generation in an encoded snapshot record; 0 if it is not a snapshot's."""
    if len(value) < ROOT_BYTES:
        return 0
    kind, generation = _CREATED_GENERATION.unpack_from(value)
    return int(generation) if kind == RootKind.SNAPSHOT else 0


def decode_root(value: bytes) -> RootRecord:
    """Decode a root record and check every field. Raises CorruptError with the reason."""
    if len(value) < ROOT_BYTES:
        raise CorruptError("root record", 0, "cut short", len(value))
    fields = ROOT.unpack_from(value)
    root_id, kind = fields[:2]
    name_length, description_length = fields[18:20]
    if len(value) != ROOT_BYTES + name_length + description_length:
        raise CorruptError(f"root record {root_id}", 0, "wrong length", len(value))
    if kind not in (1, 2) or not root_id:
        raise CorruptError(f"root record {root_id}", 0, "unknown kind", kind)
    if root_id > ROOT_ID_MAX:
        raise CorruptError(f"root record {root_id}", 0, "a root id out of range", root_id)
    if fields[10] > GENERATION_MAX:
        raise CorruptError(f"root record {root_id}", 0, "a generation out of range", fields[10])
    if fields[4] & ~_FLAGS or description_length > DESCRIPTION_BYTES_MAX:
        raise CorruptError(f"root record {root_id}", 0, "unknown flags, or too long a description")
    if kind == RootKind.VOLUME and fields[4] & FLAG_HELD:
        raise CorruptError(f"root record {root_id}", 0, "a volume is held", fields[4])
    if any(fields[2:4]) or any(fields[16]) or fields[17] or any(fields[20:22]):
        raise CorruptError(f"root record {root_id}", 0, "reserved bytes are not zero")
    if max(fields[12:16]) > COUNTER_MAX:
        raise CorruptError(f"root record {root_id}", 0, "a number out of range", max(fields[12:16]))
    try:
        name = value[ROOT_BYTES : ROOT_BYTES + name_length].decode()
        description = value[ROOT_BYTES + name_length :].decode()
        check_snapshot_name(name)
    except (UnicodeDecodeError, UsageError) as error:
        raise CorruptError(f"root record {root_id}", 0, f"impossible name ({error})") from None
    return RootRecord(
        root_id=root_id,
        kind=RootKind(kind),
        flags=fields[4],
        uuid=fields[5],
        origin_uuid=fields[6],
        parent_id=fields[7],
        undo_id=fields[8],
        tree=decode_pointer(fields[9]),
        created_generation=fields[10],
        created_ns=fields[11],
        next_ino=fields[12],
        node_count=fields[13],
        data_blocks=fields[14],
        inode_count=fields[15],
        name=name,
        description=description,
    )


# --- drop queue -----------------------------------------------------------------------------------

DROP = struct.Struct("<QQqQQBBH")
DROP_STEP = struct.Struct("<40sI")
DROP_BYTES = 44
assert DROP.size == DROP_BYTES
assert DROP_STEP.size == POINTER_BYTES + 4


class DropStep(NamedTuple):
    """A node on the path being dropped. Its first `done` entries are already dropped."""

    pointer: Pointer
    done: int


class DropRecord(Struct, frozen=True):
    """A deleted root whose blocks are being freed. FORMAT.md "Drop record".

    Attributes:
        path: from the root to the current node. The queue holds one reference to the first node;
            each further node is entry number `done` of the node before it.
        freed_blocks: so far.
        referenced_blocks: of the root when it was deleted; it may free at most this many.
    """

    number: int
    root_id: int
    name: str
    deleted_ns: int
    freed_blocks: int
    path: tuple[DropStep, ...]
    referenced_blocks: int = 0

    def __len__(self) -> int:
        return DROP_BYTES + len(self.name.encode()) + DROP_STEP.size * len(self.path)

    def encode(self) -> bytes:
        name = self.name.encode()
        return (
            DROP.pack(
                self.number,
                self.root_id,
                self.deleted_ns,
                self.freed_blocks,
                self.referenced_blocks,
                len(self.path),
                0,
                len(name),
            )
            + name
            + b"".join(DROP_STEP.pack(step.pointer.encode(), step.done) for step in self.path)
        )

    def with_path(self, path: tuple[DropStep, ...], freed_blocks: int) -> "DropRecord":
        return replace(self, path=path, freed_blocks=freed_blocks)


def decode_drop(value: bytes) -> DropRecord:
    """Decode a drop record and check every field. Raises CorruptError with the reason."""
    if len(value) < DROP_BYTES:
        raise CorruptError("drop record", 0, "cut short", len(value))
    number, root_id, deleted_ns, freed, referenced, steps, reserved, name_length = DROP.unpack_from(
        value
    )
    start = DROP_BYTES + name_length
    if len(value) != start + steps * DROP_STEP.size or reserved:
        raise CorruptError(f"drop record {number}", 0, "wrong length", len(value))
    if max(number, freed, referenced) > COUNTER_MAX:
        raise CorruptError(f"drop record {number}", 0, "a number out of range")
    if not 0 < steps <= NODE_LEVEL_MAX + 1:
        raise CorruptError(f"drop record {number}", 0, "path length out of range", steps)
    try:
        name = value[DROP_BYTES:start].decode()
    except UnicodeDecodeError:
        raise CorruptError(f"drop record {number}", 0, "impossible name") from None
    path = tuple(
        DropStep(decode_pointer(pointer), done)
        for pointer, done in DROP_STEP.iter_unpack(value[start:])
    )
    return DropRecord(number, root_id, name, deleted_ns, freed, path, referenced)
