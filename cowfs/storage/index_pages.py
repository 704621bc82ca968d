"""The codec of an index page of the space map. FORMAT.md "Space map".

Decoding checks the page's identity. The caller checks the entries.
"""

import numpy as np
from xxhash import xxh3_128_digest

from cowfs.errors import CorruptError
from cowfs.storage.format import (
    BLOCK_SIZE_BYTES,
    INDEX_ENTRY_BYTES,
    INDEX_FANOUT,
    INDEX_HEADER,
    INDEX_HEADER_BYTES,
    INDEX_MAGIC,
    Pointer,
)

INDEX_ENTRY = np.dtype(
    [
        ("block", "<u8"),
        ("twin", "<u8"),
        ("birth", "<u8"),
        ("checksum", "V16"),
        ("free", "<u4"),
        ("kind", "u1"),
        ("reserved", "V3"),
    ]
)
assert INDEX_ENTRY.itemsize == INDEX_ENTRY_BYTES


def encode_index_page(
    level: int, number: int, birth: int, block: int, image_id: int, seed: int, entries: bytes
) -> tuple[bytes, bytes]:
    """Encode a page as (one block, checksum). `entries`: the bytes of INDEX_FANOUT entries."""
    header = INDEX_HEADER.pack(bytes(16), INDEX_MAGIC, level, number, birth, block, image_id)
    rest = (header[16:] + entries).ljust(BLOCK_SIZE_BYTES - 16, b"\0")
    checksum = xxh3_128_digest(rest, seed)
    return checksum + rest, checksum


def decode_index_page(
    data: bytes, pointer: Pointer, level: int, number: int, image_id: int, seed: int
) -> np.ndarray:
    """Decode an index page, and check its checksum and identity.

    Args:
        data: the block read from pointer.block or pointer.twin.
        level, number: of the page that the parent names.

    Returns:
        INDEX_FANOUT entries (INDEX_ENTRY), which the caller checks.

    Raises:
        CorruptError: with the reason.
    """
    at = pointer.block
    if len(data) != BLOCK_SIZE_BYTES:
        raise CorruptError("space map index", at, "short read", len(data), BLOCK_SIZE_BYTES)
    checksum = xxh3_128_digest(memoryview(data)[16:], seed)
    if checksum != pointer.checksum or checksum != data[:16]:
        raise CorruptError("space map index", at, "checksum is wrong")
    found = INDEX_HEADER.unpack_from(data)[1:]
    expected = (INDEX_MAGIC, level, number, pointer.birth, pointer.block, image_id)
    if found != expected:
        raise CorruptError("space map index", at, "identity is wrong", found, expected)
    entries = np.frombuffer(data, INDEX_ENTRY, INDEX_FANOUT, INDEX_HEADER_BYTES)
    end = INDEX_HEADER_BYTES + INDEX_FANOUT * INDEX_ENTRY_BYTES
    if any(data[21:24] + data[56:64] + data[end:] + entries["reserved"].tobytes()):
        raise CorruptError("space map index", at, "reserved bytes are not zero")
    return entries
