"""Promises that every record of the storage layer survives a round trip, and damage is refused.

There is one test case for each reason that a decoder can give.
"""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from xxhash import xxh3_128_digest

from cowfs.errors import CorruptError, ImageError
from cowfs.storage.format import (
    BLOCK_SIZE_BYTES,
    ENTRY_OVERHEAD_BYTES,
    GENERATION_MAX,
    GROUP_BLOCKS,
    INDEX_FANOUT,
    INDEX_MAGIC,
    KEY_BYTES_MAX,
    MAX_TOTAL_BLOCKS,
    MIN_TOTAL_BLOCKS,
    NODE_CAPACITY_BYTES,
    NODE_HEADER,
    NODE_LEVEL_MAX,
    NODE_MAGIC,
    NODE_SIZE_BYTES,
    RING_SLOTS,
    VALUE_BYTES_MAX,
    Pointer,
    Superblock,
    check_pointer,
    decode_node,
    decode_pointer,
    decode_superblock,
    encode_node,
    group_count,
    index_shape,
    ring_blocks,
)
from cowfs.storage.index_pages import INDEX_ENTRY, decode_index_page, encode_index_page

U32 = st.integers(0, (1 << 32) - 1)
U64 = st.integers(0, (1 << 64) - 1)
I64 = st.integers(-(1 << 63), (1 << 63) - 1)
IMAGE_ID = 0x0706050403020100
SEED = 42


# --- pointer ------------------------------------------------------------------------------------


@given(U64, U64, U64, st.binary(min_size=16, max_size=16))
def test_pointer_round_trip(block: int, twin: int, birth: int, checksum: bytes) -> None:
    """Promise: a pointer survives a round trip."""
    pointer = Pointer(block, twin, birth, checksum)
    assert decode_pointer(pointer.encode()) == pointer


@pytest.mark.parametrize(
    ("pointer", "reason"),
    [
        (Pointer(63, 0, 1, bytes(16)), "pointer leaves the image"),
        (Pointer(4096 - 64, 0, 1, bytes(16)), "pointer leaves the image"),
        (Pointer(64, 63, 1, bytes(16)), "twin pointer leaves the image"),
        (Pointer(64, 4096 - 64, 1, bytes(16)), "twin pointer leaves the image"),
        (Pointer(64, 0, 0, bytes(16)), "pointer is newer than its parent"),
        (Pointer(64, 0, 8, bytes(16)), "pointer is newer than its parent"),
    ],
)
def test_pointer_out_of_range_is_refused(pointer: Pointer, reason: str) -> None:
    """Promise: a pointer into a ring, out of the image or into the future is refused."""
    with pytest.raises(CorruptError, match=reason) as caught:
        check_pointer(pointer, 4096, 7, "node", 99)
    assert (caught.value.owner, caught.value.block) == ("node", 99)


def test_pointer_in_range_is_accepted() -> None:
    """Promise: a twinless pointer to the block after the ring, born with its parent, is valid."""
    check_pointer(Pointer(64, 0, 7, bytes(16)), 4096, 7, "node", 0)
    check_pointer(Pointer(4000, 64, 1, bytes(16)), 4096, 7, "node", 0)


# --- superblock ---------------------------------------------------------------------------------


def superblock(**changes: object) -> Superblock:
    sound = Superblock(
        uuid=bytes(range(16)),
        seed=SEED,
        name_seed=43,
        generation=70,
        total_blocks=4096,
        flags=0,
        committed_ns=1,
        created_ns=-1,
        oldest_retained=68,
        catalog=Pointer(64, 68, 70, bytes(16)),
        space_map=Pointer(72, 73, 69, bytes(16)),
        used_blocks=8,
        catalog_nodes=1,
        system_blocks=132,
        next_root_id=2,
        label="",
    )
    return replace(sound, **changes)


@given(
    seed=U64,
    name_seed=U64,
    generation=st.integers(100, GENERATION_MAX),
    total_blocks=st.integers(MIN_TOTAL_BLOCKS, MAX_TOTAL_BLOCKS),
    flags=st.sampled_from([0, 1]),
    committed_ns=I64,
    created_ns=I64,
    catalog_nodes=st.integers(0, 1000),
    next_root_id=st.integers(1, (1 << 64) - 1),
    label=st.text(max_size=16).filter(lambda text: "\0" not in text),
    compat=U64,
    ro_compat=U64,
    incompat=st.sampled_from([0, 1]),
    uuid=st.binary(min_size=16, max_size=16),
)
def test_superblock_round_trip(**members: object) -> None:
    """Promise: every member survives a round trip; slot and identity follow from them."""
    written = superblock(**members)
    data = written.encode()
    assert len(data) == BLOCK_SIZE_BYTES
    assert decode_superblock(data) == written
    assert written.slot() == written.generation % RING_SLOTS
    assert written.image_id == int.from_bytes(written.uuid[:8], "little")
    assert written.duplicates_metadata == (written.incompat == 1)


def resealed(data: bytes, at: int, value: bytes) -> bytes:
    """The superblock with some bytes replaced and a checksum that fits."""
    body = data[:at] + value + data[at + len(value) :]
    return body[:8] + xxh3_128_digest(body[24:]) + body[24:]


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [
        (24, struct.pack("<I", 0), "format version out of range"),
        (28, struct.pack("<I", 512), "block size out of range"),
        (104, struct.pack("<I", 4096), "node size out of range"),
        (96, struct.pack("<Q", 4095), "block count out of range"),
        (96, struct.pack("<Q", MAX_TOTAL_BLOCKS + 1), "block count out of range"),
        (88, struct.pack("<Q", 0), "generation out of range"),
        (88, struct.pack("<Q", GENERATION_MAX + 1), "generation out of range"),
        (88, struct.pack("<Q", (1 << 64) - 1), "generation out of range"),
        (128, struct.pack("<Q", 71), "oldest retained generation out of range"),
        (216, struct.pack("<Q", 4097), "used blocks out of range"),
        (232, struct.pack("<Q", 4097), "system blocks out of range"),
        (136, struct.pack("<Q", 5), "corrupt catalog .*pointer leaves the image"),
        (152, struct.pack("<Q", 71), "corrupt catalog .*newer than its parent"),
        (176, struct.pack("<Q", 4090), "corrupt space map .*pointer leaves the image"),
        (184, struct.pack("<Q", 4090), "corrupt space map .*twin pointer leaves the image"),
    ],
)
def test_superblock_member_out_of_range_is_refused(at: int, value: bytes, reason: str) -> None:
    """Promise: a superblock with a right checksum and an impossible member is refused."""
    with pytest.raises(CorruptError, match=reason):
        decode_superblock(resealed(superblock().encode(), at, value))


def test_superblock_that_is_damaged_or_absent_is_refused() -> None:
    """Promise: an empty slot, a foreign block, a short read and a flipped bit differ in error."""
    data = superblock().encode()
    for absent in (bytes(BLOCK_SIZE_BYTES), b"\xff" * BLOCK_SIZE_BYTES, data[:-1], b""):
        with pytest.raises(CorruptError, match="no superblock here"):
            decode_superblock(absent)
    for at in (8, 24, 100, 319, 320, 4095):
        damaged = bytearray(data)
        damaged[at] ^= 1
        with pytest.raises(CorruptError, match="checksum is wrong"):
            decode_superblock(bytes(damaged))


def test_superblock_of_a_newer_format_is_not_called_damaged() -> None:
    """Promise: for a newer format the error says that a newer cowfs is needed, not "damaged"."""
    data = superblock().encode()
    with pytest.raises(ImageError, match="format 2, newer than 1"):
        decode_superblock(resealed(data, 24, struct.pack("<I", 2)))
    with pytest.raises(ImageError, match="incompatible flags 0x10"):
        decode_superblock(resealed(data, 48, struct.pack("<Q", 0x11)))
    assert decode_superblock(resealed(data, 32, struct.pack("<Q", 0x10))).compat == 0x10
    assert decode_superblock(resealed(data, 40, struct.pack("<Q", 0x10))).ro_compat == 0x10


def test_ring_is_at_both_ends() -> None:
    """Promise: the two halves of the ring are as far apart as they can be."""
    assert ring_blocks(4096) == (0, 4096 - 64)


# --- node ---------------------------------------------------------------------------------------


def sealed_node(data: bytes) -> tuple[bytes, bytes]:
    checksum = xxh3_128_digest(data[16:], SEED)
    return checksum + data[16:], checksum


def node(level: int = 0, entries: list[tuple[bytes, bytes]] | None = None) -> tuple[bytes, Pointer]:
    entries = [(b"a", b"1"), (b"b", b"2")] if entries is None else entries
    data, checksum = encode_node(
        level,
        5,
        100,
        3,
        IMAGE_ID,
        SEED,
        [key for key, _ in entries],
        [value for _, value in entries],
    )
    return data, Pointer(100, 0, 5, checksum)


def changed(at: int, value: bytes, level: int = 0) -> tuple[bytes, Pointer]:
    """A node with some bytes replaced and checksums that fit."""
    child = Pointer(64, 0, 1, bytes(16)).encode()
    data, pointer = node(level, [(b"a", child), (b"b", child)])
    data, checksum = sealed_node(data[:at] + value + data[at + len(value) :])
    return data, pointer._replace(checksum=checksum)


@given(
    st.dictionaries(
        st.binary(min_size=1, max_size=KEY_BYTES_MAX), st.binary(max_size=200), max_size=30
    ),
    st.integers(1, (1 << 64) - 1),
    U64,
    U64,
)
def test_leaf_round_trip(entries: dict[bytes, bytes], birth: int, owner: int, seed: int) -> None:
    """Promise: keys and values of any length survive a round trip."""
    keys = sorted(entries)
    values = [entries[key] for key in keys]
    data, checksum = encode_node(0, birth, 100, owner, IMAGE_ID, seed, keys, values)
    assert len(data) == NODE_SIZE_BYTES
    image = decode_node(data, Pointer(100, 0, birth, checksum), IMAGE_ID, seed, 0)
    assert (image.keys, image.values) == (keys, values)
    assert (image.level, image.birth, image.block, image.owner) == (0, birth, 100, owner)
    lengths = sum(len(key) + len(entries[key]) + ENTRY_OVERHEAD_BYTES for key in keys)
    assert image.used_bytes == lengths


@given(st.sets(st.binary(min_size=1, max_size=20), min_size=1, max_size=50), st.integers(1, 12))
def test_inner_node_round_trip(keys: set[bytes], level: int) -> None:
    """Promise: keys and child pointers survive a round trip."""
    ordered = sorted(keys)
    pointers = [Pointer(64 + 4 * at, 0, 1, bytes([at]) * 16) for at in range(len(ordered))]
    data, checksum = encode_node(
        level, 5, 100, 1, IMAGE_ID, SEED, ordered, [pointer.encode() for pointer in pointers]
    )
    image = decode_node(data, Pointer(100, 0, 5, checksum), IMAGE_ID, SEED, level)
    assert [decode_pointer(value) for value in image.values] == pointers
    assert image.level == level


def test_largest_entries_fit_thrice() -> None:
    """Promise: a node with three of the largest entries is valid, so a split always works."""
    entries = [(bytes([at]) * KEY_BYTES_MAX, bytes(VALUE_BYTES_MAX)) for at in range(3)]
    data, pointer = node(0, entries)
    assert len(decode_node(data, pointer, IMAGE_ID, SEED, 0).keys) == 3


HEADER_AT = {
    "magic": 16,
    "level": 20,
    "flags": 21,
    "reserved": 22,
    "count": 24,
    "used": 28,
    "birth": 32,
    "block": 40,
    "image": 56,
}


@pytest.mark.parametrize(
    ("member", "value", "reason"),
    [
        ("magic", b"none", "no node magic"),
        ("image", bytes(8), "belongs to another image"),
        ("block", struct.pack("<Q", 101), "carries another block number"),
        ("birth", struct.pack("<Q", 6), "birth differs from the pointer's"),
        ("level", b"\x01", "level is wrong"),
        ("level", bytes([NODE_LEVEL_MAX + 1]), "level is wrong"),
        ("flags", b"\x01", "reserved bytes are not zero"),
        ("reserved", b"\x00\x01", "reserved bytes are not zero"),
        ("count", struct.pack("<I", 1 << 30), "count exceeds its capacity"),
        ("used", struct.pack("<I", NODE_CAPACITY_BYTES + 1), "count exceeds its capacity"),
        ("used", struct.pack("<I", 80), "lengths do not add up"),
    ],
)
def test_node_with_an_impossible_header_is_refused(member: str, value: bytes, reason: str) -> None:
    """Promise: each member of the header is checked, although the checksum is right."""
    data, pointer = changed(HEADER_AT[member], value)
    with pytest.raises(CorruptError, match=reason) as caught:
        decode_node(data, pointer, IMAGE_ID, SEED, 0)
    assert caught.value.block == 100


@pytest.mark.parametrize(
    ("lengths", "body", "reason"),
    [
        ((0, 1, 1, 1), b"a12", "key length out of range"),
        ((KEY_BYTES_MAX + 1, 1, 0, 0), b"a" * KEY_BYTES_MAX + b"bb", "key length out of range"),
        ((1, 1, 0, 0), b"aa", "keys are not ascending"),
        ((1, 1, 0, 0), b"ba", "keys are not ascending"),
        ((1, 1, VALUE_BYTES_MAX + 1, 0), b"ab" + bytes(VALUE_BYTES_MAX + 1), "value length"),
    ],
)
def test_leaf_with_impossible_entries_is_refused(
    lengths: tuple[int, ...], body: bytes, reason: str
) -> None:
    """Promise: keys ascend strictly and stay within their limits (I5)."""
    packed = struct.pack("<4H", *lengths) + body
    header = NODE_HEADER.pack(bytes(16), NODE_MAGIC, 0, 0, 0, 2, len(packed), 5, 100, 3, IMAGE_ID)
    data, checksum = sealed_node((header + packed).ljust(NODE_SIZE_BYTES, b"\0"))
    with pytest.raises(CorruptError, match=reason):
        decode_node(data, Pointer(100, 0, 5, checksum), IMAGE_ID, SEED, 0)


def test_inner_node_without_sound_children_is_refused() -> None:
    """Promise: an inner node without children, or with a value that is no pointer, is refused."""
    data, pointer = node(1, [])
    with pytest.raises(CorruptError, match="an inner node has no children"):
        decode_node(data, pointer, IMAGE_ID, SEED, 1)
    data, pointer = node(1, [(b"a", bytes(39))])
    with pytest.raises(CorruptError, match="a child pointer has the wrong size"):
        decode_node(data, pointer, IMAGE_ID, SEED, 1)
    data, pointer = node(0, [])
    assert decode_node(data, pointer, IMAGE_ID, SEED, None).keys == []


@given(st.integers(0, NODE_SIZE_BYTES - 1), st.integers(0, 7))
def test_any_flipped_bit_of_a_node_is_noticed(at: int, bit: int) -> None:
    """Promise C9: every byte of a node is covered by the checksum, or belongs to it."""
    data, pointer = node()
    damaged = bytearray(data)
    damaged[at] ^= 1 << bit
    with pytest.raises(CorruptError, match="checksum is wrong"):
        decode_node(bytes(damaged), pointer, IMAGE_ID, SEED, 0)


def test_node_of_another_pointer_is_refused() -> None:
    """Promise: an intact node that is not the one meant (a lost write) is refused; so is a part."""
    data, pointer = node()
    with pytest.raises(CorruptError, match="checksum is wrong"):
        decode_node(data, pointer._replace(checksum=bytes(16)), IMAGE_ID, SEED, 0)
    with pytest.raises(CorruptError, match="checksum is wrong"):
        decode_node(data, pointer, IMAGE_ID, SEED + 1, 0)
    with pytest.raises(CorruptError, match="short read"):
        decode_node(data[:-1], pointer, IMAGE_ID, SEED, 0)


# --- space map ----------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(U64, U64, U64, U32, st.integers(0, 3)), max_size=INDEX_FANOUT),
    st.integers(1, 7),
    U64,
)
def test_index_page_round_trip(
    rows: list[tuple[int, int, int, int, int]], level: int, number: int
) -> None:
    """Promise: every entry of an index page survives a round trip."""
    entries = np.zeros(INDEX_FANOUT, INDEX_ENTRY)
    for at, (block, twin, birth, free, kind) in enumerate(rows):
        entries[at] = (block, twin, birth, np.void(bytes([at]) * 16), free, kind, b"")
    data, checksum = encode_index_page(level, number, 5, 100, IMAGE_ID, SEED, entries.tobytes())
    assert len(data) == BLOCK_SIZE_BYTES
    pointer = Pointer(100, 0, 5, checksum)
    found = decode_index_page(data, pointer, level, number, IMAGE_ID, SEED)
    assert found.tobytes() == entries.tobytes()


def test_index_page_that_is_another_is_refused() -> None:
    """Promise: a page must have the level, number, birth, block and image of its place."""
    entries = bytes(INDEX_FANOUT * INDEX_ENTRY.itemsize)
    data, checksum = encode_index_page(1, 2, 5, 100, IMAGE_ID, SEED, entries)
    pointer = Pointer(100, 0, 5, checksum)
    for level, number, image_id, meant in (
        (2, 2, IMAGE_ID, pointer),
        (1, 3, IMAGE_ID, pointer),
        (1, 2, IMAGE_ID + 1, pointer),
        (1, 2, IMAGE_ID, pointer._replace(birth=6)),
        (1, 2, IMAGE_ID, pointer._replace(block=101)),
    ):
        with pytest.raises(CorruptError, match="identity is wrong"):
            decode_index_page(data, meant, level, number, image_id, SEED)


def test_index_page_that_is_damaged_is_refused() -> None:
    """Promise: an index page that is short, has a flipped bit or lacks its magic is refused."""
    entries = bytes(INDEX_FANOUT * INDEX_ENTRY.itemsize)
    data, checksum = encode_index_page(1, 2, 5, 100, IMAGE_ID, SEED, entries)
    pointer = Pointer(100, 0, 5, checksum)
    with pytest.raises(CorruptError, match="short read"):
        decode_index_page(data[:-1], pointer, 1, 2, IMAGE_ID, SEED)
    for at in (0, 16, 64, 4095):
        damaged = bytearray(data)
        damaged[at] ^= 1
        with pytest.raises(CorruptError, match="checksum is wrong"):
            decode_index_page(bytes(damaged), pointer, 1, 2, IMAGE_ID, SEED)
    body = data[:16] + struct.pack("<I", INDEX_MAGIC + 1) + data[20:]
    checksum = xxh3_128_digest(body[16:], SEED)
    with pytest.raises(CorruptError, match="identity is wrong"):
        decode_index_page(
            checksum + body[16:], pointer._replace(checksum=checksum), 1, 2, IMAGE_ID, SEED
        )


@given(st.integers(MIN_TOTAL_BLOCKS, MAX_TOTAL_BLOCKS))
def test_index_has_a_place_for_every_group_and_one_top(total_blocks: int) -> None:
    """Promise: each level is just wide enough for the level below, up to a single page."""
    groups = group_count(total_blocks)
    assert (groups - 1) * GROUP_BLOCKS < total_blocks <= groups * GROUP_BLOCKS
    below = groups
    for count in index_shape(total_blocks):
        assert (count - 1) * INDEX_FANOUT < below <= count * INDEX_FANOUT
        below = count
    assert below == 1
