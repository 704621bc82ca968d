"""The items of a filesystem tree as bytes: inodes, names, xattrs, symlinks, data.

The keys of the tree are `(inode, type, offset)`, 17 bytes, big-endian. FORMAT.md has a table for
each value; a test compares the two. Decoding checks every field. A value out of range is a
`CorruptError`; its `block` is the inode number where no block is known.
"""

import stat
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

from xxhash import xxh3_64_intdigest

from cowfs.errors import CorruptError
from cowfs.storage.format import BLOCK_SIZE_BYTES, DATA_CHECKSUM_BYTES

ROOT_INO = 1
INO_MAX = (1 << 40) - 1
NAME_BYTES_MAX = 255
SYMLINK_BYTES_MAX = 4095
FILE_SIZE_MAX = (1 << 63) - 1
LINK_MAX = (1 << 32) - 1

# --- key -----------------------------------------------------------------------------------------

KEY = struct.Struct(">QBQ")
KEY_BYTES = 17
assert KEY.size == KEY_BYTES

TYPE_ORPHAN = 0  # orphan mark: its inode is 0, its offset the orphan's inode number
TYPE_INODE = 1
TYPE_NAME = 2
TYPE_XATTR = 3
TYPE_SYMLINK = 4
TYPE_INLINE = 5
TYPE_EXTENT = 6
TYPES = frozenset(range(7))

key = KEY.pack


def split_key(item: bytes) -> tuple[int, int, int]:
    """Inode, type and offset of an item's key."""
    if len(item) != KEY_BYTES:
        raise CorruptError("item", 0, "its key has the wrong length", len(item), KEY_BYTES)
    return KEY.unpack(item)


def inode_key(ino: int) -> bytes:
    return KEY.pack(ino, TYPE_INODE, 0)


# --- inode --------------------------------------------------------------------------------------

INODE = struct.Struct("<IIIIQQQQqqqqIHH")
INODE_BYTES = 88
assert INODE.size == INODE_BYTES
FILE_TYPES = frozenset(
    (
        stat.S_IFREG,
        stat.S_IFDIR,
        stat.S_IFLNK,
        stat.S_IFIFO,
        stat.S_IFSOCK,
        stat.S_IFCHR,
        stat.S_IFBLK,
    )
)


INODE_INLINE = (
    1 << 0
)  # flag: the data is an inline item; without it a file has extents or only holes


@dataclass(slots=True)
class Inode:
    """One file of any type. FORMAT.md "Inode".

    Attributes:
        rdev: device number; of a directory, the inode number of its parent (the root is its own).
        size_bytes: of a directory, the sum of the lengths of its names.
        data_blocks: blocks of all its extents.
        xattr_count: number of xattrs; zero saves the search for them.
        answer: the kernel answer cached by the daemon, dropped when the inode is touched. Not
            stored.
    """

    ino: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size_bytes: int
    data_blocks: int
    birth: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    btime_ns: int
    flags: int = 0
    xattr_count: int = 0
    answer: Any = None

    def encode(self) -> bytes:
        return INODE.pack(
            self.mode,
            self.nlink,
            self.uid,
            self.gid,
            self.rdev,
            self.size_bytes,
            self.data_blocks,
            self.birth,
            self.atime_ns,
            self.mtime_ns,
            self.ctime_ns,
            self.btime_ns,
            self.flags,
            self.xattr_count,
            0,
        )


def decode_inode(ino: int, value: bytes) -> Inode:
    if len(value) != INODE_BYTES:
        raise CorruptError(f"inode {ino}", ino, "wrong length", len(value), INODE_BYTES)
    fields = INODE.unpack(value)
    if fields[14]:
        raise CorruptError(f"inode {ino}", ino, "reserved bytes are not zero", fields[14])
    inode = Inode(ino, *fields[:14])
    if inode.mode >> 12 not in _NAME_TYPES:
        raise CorruptError(f"inode {ino}", ino, "unknown file type", oct(inode.mode))
    if inode.flags & ~INODE_INLINE:
        raise CorruptError(f"inode {ino}", ino, "unknown flags", hex(inode.flags))
    if inode.size_bytes > FILE_SIZE_MAX:
        raise CorruptError(f"inode {ino}", ino, "size out of range", inode.size_bytes)
    if not 0 < ino <= INO_MAX:
        raise CorruptError(f"inode {ino}", ino, "inode number out of range")
    return inode


# --- names --------------------------------------------------------------------------------------

NAME_ENTRY = struct.Struct("<QBBB")  # inode, file type (mode >> 12), slot, length of the name
NAME_ENTRY_BYTES = 11
NAME_SLOTS = 16
assert NAME_ENTRY.size == NAME_ENTRY_BYTES


_NAME_TYPES = frozenset(mode >> 12 for mode in FILE_TYPES)
_DOTS = (b".", b"..")


class Name(NamedTuple):
    """One directory entry. `type` is `mode >> 12`.

    `slot` tells entries of one hash apart. It never changes, because it is a part of the cookie.
    """

    name: bytes
    ino: int
    type: int
    slot: int


def name_hash(name: bytes, seed: int) -> int:
    """A 63-bit hash, at least NAME_SLOTS. Its low 4 bits are zero: a cookie has the slot there."""
    return (xxh3_64_intdigest(name, seed) >> 1 & ~(NAME_SLOTS - 1)) or NAME_SLOTS


def find_name(directory: int, value: bytes, name: bytes) -> Name | None:
    """The entry of that name in a name item, or None. A sole entry is checked less."""
    if value[NAME_ENTRY_BYTES:] == name and value[NAME_ENTRY_BYTES - 1] == len(name):
        ino, type_, slot, _ = NAME_ENTRY.unpack_from(value)
        if type_ in _NAME_TYPES and 0 < ino <= INO_MAX:
            return Name(name, ino, type_, slot)
    return next((entry for entry in decode_names(directory, value) if entry.name == name), None)


def encode_name(name: bytes, ino: int, type_: int, slot: int) -> bytes:
    return NAME_ENTRY.pack(ino, type_, slot, len(name)) + name


def encode_names(names: list[Name]) -> bytes:
    return b"".join([encode_name(*entry) for entry in names])


def decode_names(directory: int, value: bytes) -> list[Name]:
    """The entries of one name item, in slot order. Every name is valid, every slot unique.

    Raises:
        CorruptError: the item is damaged; its block is the directory's inode number.
    """
    if len(value) > NAME_ENTRY_BYTES == len(value) - value[NAME_ENTRY_BYTES - 1]:
        name = value[NAME_ENTRY_BYTES:]  # nearly always: the only entry
        ino, type_, slot, _ = NAME_ENTRY.unpack_from(value)
        if (
            b"/" not in name
            and b"\0" not in name
            and name not in _DOTS
            and slot < NAME_SLOTS
            and type_ in _NAME_TYPES
            and 0 < ino <= INO_MAX
        ):
            return [Name(name, ino, type_, slot)]
    names = []
    at = 0
    size = len(value)
    last_slot = -1
    while at < size:
        if at + NAME_ENTRY_BYTES > size:
            raise CorruptError(f"directory {directory}", directory, "a name is cut short")
        ino, type_, slot, length = NAME_ENTRY.unpack_from(value, at)
        at += NAME_ENTRY_BYTES + length
        name = value[at - length : at]
        if len(name) != length or not length:
            raise CorruptError(f"directory {directory}", directory, "a name is cut short")
        if b"/" in name or b"\0" in name or name in _DOTS:
            raise CorruptError(f"directory {directory}", directory, "impossible name", name)
        if not last_slot < slot < NAME_SLOTS:
            raise CorruptError(f"directory {directory}", directory, "slots not ascending", slot)
        if type_ not in _NAME_TYPES or not 0 < ino <= INO_MAX:
            raise CorruptError(f"directory {directory}", directory, "impossible entry", name)
        last_slot = slot
        names.append(Name(name, ino, type_, slot))
    if not names:
        raise CorruptError(f"directory {directory}", directory, "an empty name item")
    return names


# --- xattrs -------------------------------------------------------------------------------------

# An attribute is one or more items, at offset hash + chunk index; the first one has the name. The
# low 8 bits of a hash are zero, for the chunk index. On a collision a name takes the next free
# hash, trying XATTR_PROBES in all.
XATTR_HEADER = struct.Struct("<IB")  # length of the whole value, length of the name
XATTR_CHUNK_BYTES = 2048
XATTR_CHUNKS = 256
XATTR_PROBES = 8
XATTR_VALUE_BYTES_MAX = 65536
XATTR_COUNT_MAX = 65535


def xattr_hash(name: bytes, seed: int) -> int:
    return xxh3_64_intdigest(name, seed) >> 2 & ~(XATTR_CHUNKS - 1)


def encode_xattr(name: bytes, value: bytes) -> list[bytes]:
    """The items of one attribute, in chunk order."""
    first = XATTR_HEADER.pack(len(value), len(name)) + name + value[:XATTR_CHUNK_BYTES]
    rest = range(XATTR_CHUNK_BYTES, len(value), XATTR_CHUNK_BYTES)
    return [first, *(value[at : at + XATTR_CHUNK_BYTES] for at in rest)]


def decode_xattr_first(ino: int, value: bytes) -> tuple[bytes, int, bytes]:
    """Decode the first item of an attribute.

    Returns:
        The name, the length of the whole value, and the first chunk of the value.
    """
    if len(value) < XATTR_HEADER.size:
        raise CorruptError(f"xattr of inode {ino}", ino, "cut short", len(value))
    size, name_length = XATTR_HEADER.unpack_from(value)
    start = XATTR_HEADER.size + name_length
    name, part = value[XATTR_HEADER.size : start], value[start:]
    if not name_length or len(name) != name_length or b"\0" in name:
        raise CorruptError(f"xattr of inode {ino}", ino, "impossible name", name)
    if size > XATTR_VALUE_BYTES_MAX or len(part) != min(size, XATTR_CHUNK_BYTES):
        raise CorruptError(f"xattr of inode {ino}", ino, "value length out of range", size)
    return name, size, part


# --- data ---------------------------------------------------------------------------------------

INLINE_BYTES_MAX = 2048  # larger files have extents
EXTENT_BLOCKS_MAX = 256  # 1 MiB: the checksums of an extent are 2 KiB of its item
EXTENT = struct.Struct("<QIQBBHI")
EXTENT_BYTES = 28
assert EXTENT.size == EXTENT_BYTES
FILE_BLOCK_MAX = FILE_SIZE_MAX // BLOCK_SIZE_BYTES


class Extent(NamedTuple):
    """A run of blocks that holds consecutive blocks of a file.

    The offset in its key is the index of the first of these in the file. Nothing is compressed, so
    any part of an extent is an extent.

    Attributes:
        block, count: the run in the image.
        birth: generation of the commit that wrote it.
        checksums: DATA_CHECKSUM_BYTES for each block, concatenated.
    """

    block: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which means nothing here
    birth: int
    checksums: bytes

    def encode(self) -> bytes:
        return EXTENT.pack(self.block, self.count, self.birth, 0, 0, 0, 0) + self.checksums

    def part(self, first: int, count: int) -> "Extent":
        """The extent of `count` blocks of this one, from its block number `first` (0-based)."""
        return Extent(
            self.block + first,
            count,
            self.birth,
            self.checksums[first * DATA_CHECKSUM_BYTES : (first + count) * DATA_CHECKSUM_BYTES],
        )


def decode_extent(ino: int, value: bytes) -> Extent:
    """Decode an extent. The caller checks that it lies inside the image."""
    if len(value) < EXTENT_BYTES:
        raise CorruptError(f"extent of inode {ino}", ino, "cut short", len(value))
    block, count, birth, algorithm, reserved, stored, skipped = EXTENT.unpack_from(value)
    if algorithm or reserved or stored or skipped:
        raise CorruptError(f"extent of inode {ino}", ino, "unknown compression", algorithm)
    if not 0 < count <= EXTENT_BLOCKS_MAX:
        raise CorruptError(f"extent of inode {ino}", ino, "length out of range", count)
    if len(value) != EXTENT_BYTES + count * DATA_CHECKSUM_BYTES:
        raise CorruptError(f"extent of inode {ino}", ino, "checksums missing", len(value))
    return Extent(block, count, birth, value[EXTENT_BYTES:])


def references(keys: list[bytes], values: list[bytes]) -> list[tuple[int, int]]:
    """The data runs (first, count) that the items of a leaf point at, one per extent (I1).

    Raises:
        CorruptError: the length of an extent is out of range.
    """
    runs = [
        EXTENT.unpack_from(value)[:2]
        for item_key, value in zip(keys, values, strict=True)
        if len(item_key) == KEY_BYTES and item_key[8] == TYPE_EXTENT and len(value) >= EXTENT_BYTES
    ]
    for first, count in runs:
        if not 0 < count <= EXTENT_BLOCKS_MAX:
            raise CorruptError("extent", first, "length out of range", count)
    return runs
