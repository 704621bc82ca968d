"""Promises that every item of a volume survives a round trip, and that damage is refused.

There is one test case for each reason that a decoder can give.
"""

import stat
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_digest

from cowfs.errors import CorruptError
from cowfs.files.items import (
    EXTENT,
    EXTENT_BLOCKS_MAX,
    FILE_SIZE_MAX,
    FILE_TYPES,
    INO_MAX,
    INODE_INLINE,
    NAME_SLOTS,
    TYPE_EXTENT,
    TYPE_INODE,
    XATTR_CHUNK_BYTES,
    XATTR_CHUNKS,
    XATTR_HEADER,
    XATTR_VALUE_BYTES_MAX,
    Extent,
    Inode,
    Name,
    decode_extent,
    decode_inode,
    decode_names,
    decode_xattr_first,
    encode_names,
    encode_xattr,
    inode_key,
    key,
    name_hash,
    references,
    split_key,
    xattr_hash,
)

U16 = st.integers(0, (1 << 16) - 1)
U32 = st.integers(0, (1 << 32) - 1)
U64 = st.integers(0, (1 << 64) - 1)
I64 = st.integers(-(1 << 63), (1 << 63) - 1)
INOS = st.integers(1, INO_MAX)
NAMES = st.binary(min_size=1, max_size=255).filter(
    lambda name: b"/" not in name and b"\0" not in name and name not in (b".", b"..")
)


# --- key ----------------------------------------------------------------------------------------


@given(U64, st.integers(0, 255), U64)
def test_key_round_trip(ino: int, type_: int, offset: int) -> None:
    """Promise: a key decodes to the numbers it was made of."""
    assert split_key(key(ino, type_, offset)) == (ino, type_, offset)


@given(st.lists(st.tuples(U64, st.integers(0, 255), U64), min_size=2, max_size=2))
def test_keys_sort_as_their_numbers_do(pair: list[tuple[int, int, int]]) -> None:
    """Promise: items of one inode are adjacent, sorted by type, then by offset."""
    first, second = pair
    assert (key(*first) < key(*second)) == (first < second)


def test_inode_key_is_the_inode_item() -> None:
    """Promise: `inode_key` gives the key of the inode item."""
    assert inode_key(7) == key(7, TYPE_INODE, 0)


# --- inode --------------------------------------------------------------------------------------


@given(
    INOS,
    st.sampled_from(sorted(FILE_TYPES)),
    st.integers(0, 0o7777),
    st.tuples(U32, U32, U32, U64),
    st.integers(0, FILE_SIZE_MAX),
    st.tuples(U64, U64, I64, I64, I64, I64, st.sampled_from([0, INODE_INLINE]), U16),
)
def test_inode_round_trip(
    ino: int,
    type_: int,
    permissions: int,
    owner: tuple[int, int, int, int],
    size_bytes: int,
    rest: tuple[int, int, int, int, int, int, int, int],
) -> None:
    """Promise: every member survives a round trip, negative times too."""
    inode = Inode(ino, type_ | permissions, *owner, size_bytes, *rest)
    assert decode_inode(ino, inode.encode()) == inode


def inode_bytes(**changes: int) -> bytes:
    members = {"mode": stat.S_IFREG | 0o644, "nlink": 1, "size_bytes": 5} | changes
    names = ["mode", "nlink", "uid", "gid", "rdev", "size_bytes", "data_blocks", "birth"]
    return Inode(3, *(members.get(name, 0) for name in names), 0, 0, 0, 0).encode()


@pytest.mark.parametrize(
    ("ino", "value", "reason"),
    [
        (3, b"", "wrong length"),
        (3, inode_bytes() + b"\0", "wrong length"),
        (3, inode_bytes()[:-2] + b"\1\0", "reserved bytes are not zero"),
        (3, inode_bytes(mode=0o644), "unknown file type"),
        (3, inode_bytes(mode=0o170000), "unknown file type"),
        (3, inode_bytes(mode=stat.S_IFREG | 1 << 16), "unknown file type"),
        (3, inode_bytes()[:80] + b"\2" + inode_bytes()[81:], "unknown flags"),
        (3, inode_bytes(size_bytes=FILE_SIZE_MAX + 1), "size out of range"),
        (0, inode_bytes(), "inode number out of range"),
        (INO_MAX + 1, inode_bytes(), "inode number out of range"),
    ],
)
def test_impossible_inode_is_refused(ino: int, value: bytes, reason: str) -> None:
    """Promise: each member is checked, and the error names the inode."""
    with pytest.raises(CorruptError, match=reason) as caught:
        decode_inode(ino, value)
    assert caught.value.owner == f"inode {ino}"


# --- names --------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(NAMES, INOS, st.sampled_from(sorted(FILE_TYPES))),
        min_size=1,
        max_size=NAME_SLOTS,
    )
)
def test_names_round_trip(entries: list[tuple[bytes, int, int]]) -> None:
    """Promise: all names of one hash survive a round trip, in slot order."""
    names = [Name(name, ino, type_ >> 12, slot) for slot, (name, ino, type_) in enumerate(entries)]
    assert decode_names(1, encode_names(names)) == names


@given(st.binary(max_size=300), U64)
def test_name_hash_leaves_room_for_the_slot(name: bytes, seed: int) -> None:
    """Promise: hash and slot make a positive 63-bit cookie that is never one of readdir's first."""
    value = name_hash(name, seed)
    assert NAME_SLOTS <= value < 1 << 63
    assert value % NAME_SLOTS == 0


REGULAR = stat.S_IFREG >> 12


def entry(name: bytes = b"n", ino: int = 5, type_: int = REGULAR, slot: int = 0) -> bytes:
    return encode_names([Name(name, ino, type_, slot)])


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"", "an empty name item"),
        (entry()[:10], "a name is cut short"),
        (entry(b"abc")[:-1], "a name is cut short"),
        (entry(b""), "a name is cut short"),
        (entry() + b"\0", "a name is cut short"),
        (entry(b"a/b"), "impossible name"),
        (entry(b"a\0b"), "impossible name"),
        (entry(b"."), "impossible name"),
        (entry(b".."), "impossible name"),
        (entry(slot=NAME_SLOTS), "slots not ascending"),
        (entry(slot=3) + entry(b"m", slot=3), "slots not ascending"),
        (entry(slot=3) + entry(b"m", slot=2), "slots not ascending"),
        (entry(type_=0), "impossible entry"),
        (entry(type_=15), "impossible entry"),
        (entry(ino=0), "impossible entry"),
        (entry(ino=INO_MAX + 1), "impossible entry"),
    ],
)
def test_impossible_names_are_refused(value: bytes, reason: str) -> None:
    """Promise: a damaged name never reaches a program; the error names the directory."""
    with pytest.raises(CorruptError, match=reason) as caught:
        decode_names(9, value)
    assert caught.value.owner == "directory 9"


# --- xattrs -------------------------------------------------------------------------------------


@given(
    st.binary(min_size=1, max_size=255).filter(lambda name: b"\0" not in name),
    st.one_of(
        st.binary(max_size=5000),
        st.sampled_from([0, 2047, 2048, 2049, 4096, XATTR_VALUE_BYTES_MAX]).map(bytes),
    ),
)
def test_xattr_round_trip(name: bytes, value: bytes) -> None:
    """Promise: name and value survive in parts; an empty value has one part."""
    first, *rest = encode_xattr(name, value)
    found, size_bytes, part = decode_xattr_first(3, first)
    assert (found, size_bytes) == (name, len(value))
    assert b"".join([part, *rest]) == value
    assert 1 + len(rest) == max(1, -(-len(value) // XATTR_CHUNK_BYTES))
    assert all(len(part) == XATTR_CHUNK_BYTES for part in rest[:-1])


@given(st.binary(max_size=300), U64)
def test_xattr_hash_leaves_room_for_parts_and_probes(name: bytes, seed: int) -> None:
    """Promise: hash + probe + part never overflows the offset of a key."""
    value = xattr_hash(name, seed)
    assert value % XATTR_CHUNKS == 0
    assert value < 1 << 62


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"\0\0\0\0", "cut short"),
        (XATTR_HEADER.pack(0, 0), "impossible name"),
        (XATTR_HEADER.pack(0, 5) + b"name", "impossible name"),
        (XATTR_HEADER.pack(0, 2) + b"\0n", "impossible name"),
        (XATTR_HEADER.pack(XATTR_VALUE_BYTES_MAX + 1, 1) + b"n" + bytes(2048), "value length"),
        (XATTR_HEADER.pack(3, 1) + b"n" + b"ab", "value length"),
        (XATTR_HEADER.pack(3, 1) + b"n" + b"abcd", "value length"),
        (XATTR_HEADER.pack(3000, 1) + b"n" + bytes(2047), "value length"),
    ],
)
def test_impossible_xattr_is_refused(value: bytes, reason: str) -> None:
    """Promise: the first part of an attribute must be complete."""
    with pytest.raises(CorruptError, match=reason) as caught:
        decode_xattr_first(3, value)
    assert caught.value.owner == "xattr of inode 3"


# --- data ---------------------------------------------------------------------------------------


@given(U64, st.integers(1, EXTENT_BLOCKS_MAX), U64, st.data())
def test_extent_round_trip_and_parts(
    block: int, count: int, birth: int, data: st.DataObject
) -> None:
    """Promise: an extent survives, and any part of it is an extent of the same data."""
    sums = b"".join(at.to_bytes(8, "big") for at in range(count))
    extent = Extent(block, count, birth, sums)
    assert decode_extent(3, extent.encode()) == extent
    first = data.draw(st.integers(0, count - 1))
    length = data.draw(st.integers(1, count - first))
    part = extent.part(first, length)
    assert part == Extent(block + first, length, birth, sums[8 * first : 8 * (first + length)])


def raw_extent(count: int, sums: int, **members: int) -> bytes:
    names = ("algorithm", "reserved", "stored", "skipped")
    return EXTENT.pack(100, count, 1, *(members.get(name, 0) for name in names)) + bytes(8 * sums)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (raw_extent(1, 1)[:27], "cut short"),
        (raw_extent(1, 1, algorithm=1), "unknown compression"),
        (raw_extent(1, 1, reserved=1), "unknown compression"),
        (raw_extent(1, 1, stored=1), "unknown compression"),
        (raw_extent(1, 1, skipped=1), "unknown compression"),
        (raw_extent(0, 0), "length out of range"),
        (raw_extent(EXTENT_BLOCKS_MAX + 1, EXTENT_BLOCKS_MAX + 1), "length out of range"),
        (raw_extent(2, 1), "checksums missing"),
        (raw_extent(1, 2), "checksums missing"),
    ],
)
def test_impossible_extent_is_refused(value: bytes, reason: str) -> None:
    """Promise: an extent has its checksums, and nothing that version 1 does not know."""
    with pytest.raises(CorruptError, match=reason) as caught:
        decode_extent(3, value)
    assert caught.value.owner == "extent of inode 3"


def test_references_are_the_runs_of_the_extents() -> None:
    """Promise I1: each extent counts its data once, and no other item references data."""
    keys = [key(1, TYPE_INODE, 0), key(1, TYPE_EXTENT, 0), key(1, TYPE_EXTENT, 9)]
    values = [
        inode_bytes(),
        Extent(70, 2, 1, bytes(16)).encode(),
        Extent(90, 1, 1, bytes(8)).encode(),
    ]
    assert references(keys, values) == [(70, 2), (90, 1)]


def test_data_checksum_is_the_canonical_digest() -> None:
    """Promise: a data checksum is the 64-bit hash in big-endian bytes, as FORMAT.md says."""
    digest = xxh3_64_digest(b"a" * 4096, 1)
    assert struct.unpack(">Q", digest)[0] == int.from_bytes(digest, "big")
    assert len(digest) == 8
