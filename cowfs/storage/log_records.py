"""The records of the log: their bytes, and the chain that they form on the device (L4).

log.py writes records, whoever opens or checks an image reads them here. FORMAT.md "Log".
"""

from collections.abc import Iterator
from typing import NamedTuple

from xxhash import xxh3_128_digest

from cowfs.errors import CorruptError, DeviceError
from cowfs.storage.device import Device
from cowfs.storage.format import (
    BLOCK_SIZE_BYTES,
    LOG_HEADER,
    LOG_HEADER_BYTES,
    LOG_MAGIC,
    Superblock,
)


class LogRecord(NamedTuple):
    """A record that was read.

    Attributes:
        block: its first block in the first copy; `blocks` is its length.
        body: its calls as msgpack.
        checksum: where the next record goes on.
        bad_copies: the first block of each copy that does not have it whole.
    """

    block: int
    blocks: int
    sequence: int
    call_count: int
    body: bytes
    checksum: bytes
    bad_copies: tuple[int, ...] = ()


def encode_record(
    superblock: Superblock,
    block: int,
    sequence: int,
    call_count: int,
    previous: bytes,
    body: bytes,
) -> tuple[bytes, bytes]:
    """Encode a record as (whole blocks, checksum). Arguments as in FORMAT.md "Log"."""
    header = LOG_HEADER.pack(
        bytes(16),
        LOG_MAGIC,
        sequence,
        superblock.image_id,
        superblock.generation,
        block,
        len(body),
        call_count,
        previous,
    )
    size = LOG_HEADER_BYTES + len(body)
    rest = b"".join((header[16:], body, bytes(-size % BLOCK_SIZE_BYTES)))
    checksum = xxh3_128_digest(rest, superblock.seed)
    return checksum + rest, checksum


def has_records(device: Device, superblock: Superblock) -> bool:
    """Whether the log of a generation has a record."""
    return next(read_log(device, superblock), None) is not None


def read_log(device: Device, superblock: Superblock) -> Iterator[LogRecord]:
    """The records of the log that follow a generation, in order; none where it has no log.

    Each record is taken from the first copy that has it whole (L4).
    """
    place = superblock.log
    if place is None:
        return
    chain = superblock.checksum()
    at = place.area * place.area_blocks
    stop = at + place.area_blocks
    sequence = 0
    while at < stop:
        record: LogRecord | None = None
        bad: list[int] = []
        for copy in place.copies:
            try:
                found = _read_record(
                    device, superblock, copy, place.block + at, stop - at, sequence, chain
                )
            except (CorruptError, DeviceError):
                bad.append(copy + at)
            else:
                record = record or found
        if record is None:
            return
        yield record._replace(bad_copies=tuple(bad))
        chain = record.checksum
        at += record.blocks
        sequence += 1


def _read_record(
    device: Device,
    superblock: Superblock,
    copy: int,
    block: int,
    blocks_max: int,
    sequence: int,
    chain: bytes,
) -> LogRecord:
    """Read a record of one copy. Raises CorruptError where the chain ends, DeviceError."""
    place = superblock.log
    assert place is not None
    at = copy + block - place.block
    data = device.read(at * BLOCK_SIZE_BYTES, BLOCK_SIZE_BYTES)
    checksum, magic, number, image_id, generation, own, size, count, previous = (
        LOG_HEADER.unpack_from(data)
    )
    blocks = -(-(LOG_HEADER_BYTES + size) // BLOCK_SIZE_BYTES)
    is_stale = generation != superblock.generation or previous != chain
    is_elsewhere = image_id != superblock.image_id or own != block or number != sequence
    if magic != LOG_MAGIC or is_stale or is_elsewhere or blocks > blocks_max:
        raise CorruptError("log", at, "the chain ends here")
    if blocks > 1:
        data += device.read((at + 1) * BLOCK_SIZE_BYTES, (blocks - 1) * BLOCK_SIZE_BYTES)
    if xxh3_128_digest(memoryview(data)[16:], superblock.seed) != checksum:
        raise CorruptError("log", at, "checksum is wrong")
    body = data[LOG_HEADER_BYTES : LOG_HEADER_BYTES + size]
    return LogRecord(block, blocks, number, count, body, checksum)
