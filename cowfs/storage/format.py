"""Codecs of the storage floor: superblock, pointer, node.

FORMAT.md has a table for each record; a test compares the tables with this file. Decoding checks
every field and raises `CorruptError` where one is out of range, so nobody checks again. All numbers
are little-endian, but keys are big-endian, so that they sort as bytes. Reserved bytes are zero.
Index pages are in index_pages.py: this file imports no numpy, so that a command starts fast.
"""

import struct
from itertools import accumulate, pairwise
from typing import NamedTuple

from msgspec import Struct
from xxhash import xxh3_128_digest

from cowfs.errors import CorruptError, ImageError

BLOCK_SIZE_BYTES = 4096
NODE_SIZE_BYTES = 16384
NODE_BLOCKS = NODE_SIZE_BYTES // BLOCK_SIZE_BYTES
FORMAT_VERSION = 1

# Feature flags. What a reader does that finds an unknown flag: compatible, ignore it;
# read-only-compatible, mount read-only; incompatible, refuse the image.
INCOMPAT_DUPLICATED_METADATA = 1 << 0
INCOMPAT_LOG = 1 << 1
KNOWN_COMPAT = 0
KNOWN_RO_COMPAT = 0
KNOWN_INCOMPAT = INCOMPAT_DUPLICATED_METADATA | INCOMPAT_LOG

# --- superblock -----------------------------------------------------------------------------------

RING_SLOTS = 64
MIN_TOTAL_BLOCKS = 4096  # 16 MiB: the two rings, the reserve of a full image, and room to work
MAX_TOTAL_BLOCKS = 1 << 40  # 4 PiB

SUPERBLOCK_MAGIC = b"cowfs\x00\x1a\n"
SUPERBLOCK = struct.Struct("<8s16sIIQQQ16sQQQQIIqqQ40s40sQQQQQ64sQQII")
FLAG_CLEAN = 1 << 0
LABEL_BYTES_MAX = 64
GENERATION_MAX = 1 << 56  # so generations and births never leave signed 64-bit numbers
GENERATION_WRITABLE_MAX = 1 << 55  # no real image has more commits; above it, only reading
assert SUPERBLOCK.size == 344

# --- pointer --------------------------------------------------------------------------------------

POINTER = struct.Struct("<QQQ16s")
POINTER_BYTES = 40
assert POINTER.size == POINTER_BYTES


class Pointer(NamedTuple):
    """Address and checksum of a node or page. `twin` is 0 where there is no second copy."""

    block: int
    twin: int
    birth: int
    checksum: bytes

    def encode(self) -> bytes:
        return POINTER.pack(*self)


NULL_POINTER = Pointer(0, 0, 0, bytes(16))


def decode_pointer(data: bytes) -> Pointer:
    return Pointer(*POINTER.unpack(data))


# --- log ------------------------------------------------------------------------------------------

LOG_MAGIC = int.from_bytes(b"cowL", "little")
LOG_HEADER = struct.Struct("<16sIIQQQII16s8x")
LOG_HEADER_BYTES = 80
LOG_AREAS = 2
LOG_AREA_BLOCKS_MIN, LOG_AREA_BLOCKS_MAX = 16, 512
assert LOG_HEADER.size == LOG_HEADER_BYTES


class LogPlace(NamedTuple):
    """Where the log lies: two areas in a row, in one or two copies. FORMAT.md "Log".

    Attributes:
        block, twin: the first block of each copy; `twin` is 0 where there is one copy.
        area_blocks: blocks of one area.
        area: the area with the records that follow this generation, 0 or 1.
    """

    block: int
    twin: int
    area_blocks: int
    area: int

    @property
    def copies(self) -> list[int]:
        """The first block of each copy; each has LOG_AREAS * area_blocks blocks."""
        return [self.block, self.twin] if self.twin else [self.block]

    def blocks(self) -> int:
        """Blocks of all areas and copies."""
        return LOG_AREAS * self.area_blocks * len(self.copies)

    def other_area(self) -> "LogPlace":
        """The place for the next generation: the records of this one stay (L1)."""
        return self._replace(area=1 - self.area)


NO_LOG = (0, 0, 0, 0)


class Superblock(Struct, frozen=True):
    """One commit: what the image is, and the addresses of its trees. FORMAT.md "Superblock"."""

    uuid: bytes
    seed: int
    name_seed: int
    generation: int
    total_blocks: int
    flags: int = 0
    committed_ns: int = 0
    created_ns: int = 0
    oldest_retained: int = 0
    catalog: Pointer = NULL_POINTER
    space_map: Pointer = NULL_POINTER
    used_blocks: int = 0
    catalog_nodes: int = 0
    system_blocks: int = 0
    next_root_id: int = 1
    label: str = ""
    compat: int = 0
    ro_compat: int = 0
    incompat: int = INCOMPAT_DUPLICATED_METADATA
    log: LogPlace | None = None

    @property
    def duplicates_metadata(self) -> bool:
        """Whether nodes and pages have twins."""
        return bool(self.incompat & INCOMPAT_DUPLICATED_METADATA)

    @property
    def image_id(self) -> int:
        """The number that every node and index page of the image carries."""
        return int.from_bytes(self.uuid[:8], "little")

    def slot(self) -> int:
        """The ring slot of this generation."""
        return self.generation % RING_SLOTS

    def checksum(self) -> bytes:
        """The checksum in its slot: where the chain of this generation's log begins (L4)."""
        return self.encode()[8:24]

    def encode(self) -> bytes:
        label = self.label.encode()
        assert len(label) <= LABEL_BYTES_MAX
        body = SUPERBLOCK.pack(
            SUPERBLOCK_MAGIC,
            bytes(16),
            FORMAT_VERSION,
            BLOCK_SIZE_BYTES,
            self.compat,
            self.ro_compat,
            self.incompat,
            self.uuid,
            self.seed,
            self.name_seed,
            self.generation,
            self.total_blocks,
            NODE_SIZE_BYTES,
            self.flags,
            self.committed_ns,
            self.created_ns,
            self.oldest_retained,
            self.catalog.encode(),
            self.space_map.encode(),
            self.used_blocks,
            self.catalog_nodes,
            self.system_blocks,
            self.next_root_id,
            0,
            label,
            *(self.log or NO_LOG),
        ).ljust(BLOCK_SIZE_BYTES, b"\0")
        return body[:8] + xxh3_128_digest(body[24:]) + body[24:]


_AFTER_SUPERBLOCK = bytes(BLOCK_SIZE_BYTES - SUPERBLOCK.size)


def decode_superblock(data: bytes) -> Superblock:
    """Decode one slot of the ring: BLOCK_SIZE_BYTES bytes.

    Raises:
        CorruptError: the slot has no superblock, or a damaged one.
        ImageError: a valid superblock of a format, or with features, that this program does not
            know.
    """
    if len(data) != BLOCK_SIZE_BYTES or data[:8] != SUPERBLOCK_MAGIC:
        raise CorruptError("superblock", 0, "no superblock here")
    if xxh3_128_digest(data[24:]) != data[8:24]:
        raise CorruptError("superblock", 0, "checksum is wrong")
    fields = SUPERBLOCK.unpack_from(data)
    version, block_size, compat, ro_compat, incompat = fields[2:7]
    if version > FORMAT_VERSION:
        raise ImageError(
            f"the image has format {version}, newer than {FORMAT_VERSION}, the newest that this "
            "cowfs knows; use a newer cowfs"
        )
    if incompat & ~KNOWN_INCOMPAT:
        raise ImageError(
            f"the image uses features that this cowfs does not know (incompatible flags "
            f"{incompat & ~KNOWN_INCOMPAT:#x}); use a newer cowfs"
        )
    superblock = Superblock(
        uuid=fields[7],
        seed=fields[8],
        name_seed=fields[9],
        generation=fields[10],
        total_blocks=fields[11],
        flags=fields[13],
        committed_ns=fields[14],
        created_ns=fields[15],
        oldest_retained=fields[16],
        catalog=decode_pointer(fields[17]),
        space_map=decode_pointer(fields[18]),
        used_blocks=fields[19],
        catalog_nodes=fields[20],
        system_blocks=fields[21],
        next_root_id=fields[22],
        label=fields[24].rstrip(b"\0").decode("utf-8", "replace"),
        compat=compat,
        ro_compat=ro_compat,
        incompat=incompat,
        log=LogPlace(*fields[25:29]) if incompat & INCOMPAT_LOG else None,
    )
    total = superblock.total_blocks
    checks = (
        (version == FORMAT_VERSION, "format version", version),
        (block_size == BLOCK_SIZE_BYTES, "block size", block_size),
        (fields[12] == NODE_SIZE_BYTES, "node size", fields[12]),
        (MIN_TOTAL_BLOCKS <= total <= MAX_TOTAL_BLOCKS, "block count", total),
        (0 < superblock.generation <= GENERATION_MAX, "generation", superblock.generation),
        (not superblock.flags & ~FLAG_CLEAN, "flags", superblock.flags),
        (superblock.next_root_id > 0, "next root id", superblock.next_root_id),
        (superblock.catalog_nodes <= total // NODE_BLOCKS, "nodes of the catalog", 0),
        (not fields[23] and data.endswith(_AFTER_SUPERBLOCK), "reserved bytes", 0),
        (superblock.oldest_retained <= superblock.generation, "oldest retained generation", 0),
        (superblock.used_blocks <= total, "used blocks", superblock.used_blocks),
        (superblock.system_blocks <= total, "system blocks", superblock.system_blocks),
        (superblock.log is not None or fields[25:29] == NO_LOG, "reserved bytes", 0),
    )
    for good, what, found in checks:
        if not good:
            raise CorruptError("superblock", 0, f"{what} out of range", found)
    check_pointer(superblock.catalog, total, superblock.generation, "catalog", 0)
    check_pointer(superblock.space_map, total, superblock.generation, "space map", 0, 1)
    if superblock.log is not None:
        _check_log_place(superblock.log, total)
    return superblock


def _check_log_place(place: LogPlace, total_blocks: int) -> None:
    """Raise CorruptError unless the log lies inside the image and its copies are apart."""
    size = LOG_AREAS * place.area_blocks
    inside = range(RING_SLOTS, total_blocks - RING_SLOTS - size + 1)
    checks = (
        (LOG_AREA_BLOCKS_MIN <= place.area_blocks <= LOG_AREA_BLOCKS_MAX, "size of the log", size),
        (place.block in inside, "the log leaves the image", place.block),
        (not place.twin or place.twin in inside, "the log leaves the image", place.twin),
        (not place.twin or abs(place.twin - place.block) >= size, "the log's copies overlap", 0),
        (place.area < LOG_AREAS, "area of the log", place.area),
    )
    for good, what, found in checks:
        if not good:
            raise CorruptError("superblock", 0, what, found)


def require_generations(superblock: Superblock) -> None:
    """Raise ImageError if the image has no generation numbers left for commits."""
    if superblock.generation > GENERATION_WRITABLE_MAX:
        raise ImageError(
            f"the image has no number left for another commit: its generation is "
            f"{superblock.generation}; mount it with -o ro, and copy its files to a new image"
        )


def check_pointer(
    pointer: Pointer, total_blocks: int, birth: int, owner: str, at: int, blocks: int = NODE_BLOCKS
) -> None:
    """Raise CorruptError unless `pointer` stays inside the image and is no newer than `birth`.

    Args:
        birth: of the node or superblock that has the pointer.
        owner, at: for the message: what has the pointer, and its block.
        blocks: size of the target: NODE_BLOCKS, or 1 for a page of the space map.
    """
    last = total_blocks - RING_SLOTS - blocks
    if not RING_SLOTS <= pointer.block <= last:
        raise CorruptError(owner, at, "pointer leaves the image", pointer.block)
    if pointer.twin:
        if not RING_SLOTS <= pointer.twin <= last:
            raise CorruptError(owner, at, "twin pointer leaves the image", pointer.twin)
        if abs(pointer.twin - pointer.block) < blocks:
            raise CorruptError(owner, at, "twins overlap", pointer.twin)
    if not 0 < pointer.birth <= birth:
        raise CorruptError(owner, at, "pointer is newer than its parent", pointer.birth, birth)


def ring_blocks(total_blocks: int) -> tuple[int, int]:
    """The first block of each copy of the superblock ring."""
    return 0, total_blocks - RING_SLOTS


# --- node -----------------------------------------------------------------------------------------

NODE_MAGIC = int.from_bytes(b"cowN", "little")
NODE_HEADER = struct.Struct("<16sIBBHIIQQQQ")
NODE_HEADER_BYTES = 64
NODE_CAPACITY_BYTES = NODE_SIZE_BYTES - NODE_HEADER_BYTES
NODE_LEVEL_MAX = 12
ENTRY_OVERHEAD_BYTES = 4  # two 16-bit lengths
KEY_BYTES_MAX = 300
VALUE_BYTES_MAX = 4200  # three of the largest entries fit in a node: a split always works
assert NODE_HEADER.size == NODE_HEADER_BYTES
assert 3 * (KEY_BYTES_MAX + VALUE_BYTES_MAX + ENTRY_OVERHEAD_BYTES) <= NODE_CAPACITY_BYTES


class NodeImage(NamedTuple):
    """A decoded node: keys strictly ascending, a value for each. `level` 0 is a leaf."""

    level: int
    birth: int
    block: int
    owner: int
    keys: list[bytes]
    values: list[bytes]
    used_bytes: int


def encode_node(
    level: int,
    birth: int,
    block: int,
    owner: int,
    image_id: int,
    seed: int,
    keys: list[bytes],
    values: list[bytes],
) -> tuple[bytes, bytes]:
    """Encode a node as (NODE_SIZE_BYTES bytes, checksum)."""
    count = len(keys)
    lengths = struct.pack(f"<{2 * count}H", *map(len, keys), *map(len, values))
    body = b"".join((lengths, *keys, *values))
    assert len(body) <= NODE_CAPACITY_BYTES, "a node outgrew its block run"
    header = NODE_HEADER.pack(
        bytes(16), NODE_MAGIC, level, 0, 0, count, len(body), birth, block, owner, image_id
    )
    rest = (header[16:] + body).ljust(NODE_SIZE_BYTES - 16, b"\0")
    checksum = xxh3_128_digest(rest, seed)
    return checksum + rest, checksum


def decode_node(
    data: bytes, pointer: Pointer, image_id: int, seed: int, level: int | None
) -> NodeImage:
    """Decode the node that `pointer` points at, and check every field (I4, I5).

    Args:
        data: NODE_SIZE_BYTES bytes read from pointer.block or pointer.twin.
        level: the level that the parent expects; None for a root.

    Raises:
        CorruptError: with the reason.
    """
    at = pointer.block
    if len(data) != NODE_SIZE_BYTES:
        raise CorruptError("node", at, "short read", len(data), NODE_SIZE_BYTES)
    checksum = xxh3_128_digest(memoryview(data)[16:], seed)
    if checksum != pointer.checksum or checksum != data[:16]:
        raise CorruptError("node", at, "checksum is wrong")
    _, magic, found_level, flags, reserved, count, used, birth, block, owner, image = (
        NODE_HEADER.unpack_from(data)
    )
    if magic != NODE_MAGIC:
        raise CorruptError("node", at, "no node magic", hex(magic))
    if image != image_id:
        raise CorruptError("node", at, "belongs to another image", hex(image), hex(image_id))
    if block != pointer.block:
        raise CorruptError("node", at, "carries another block number", block, at)
    if birth != pointer.birth:
        raise CorruptError("node", at, "birth differs from the pointer's", birth, pointer.birth)
    if found_level > NODE_LEVEL_MAX or (level is not None and found_level != level):
        raise CorruptError("node", at, "level is wrong", found_level, level)
    if flags or reserved:
        raise CorruptError("node", at, "reserved bytes are not zero", flags or reserved)
    lengths_bytes = 4 * count
    if used > NODE_CAPACITY_BYTES or lengths_bytes > used:
        raise CorruptError("node", at, "count exceeds its capacity", count)
    lengths = struct.unpack_from(f"<{2 * count}H", data, NODE_HEADER_BYTES)
    if lengths_bytes + sum(lengths) != used:
        raise CorruptError("node", at, "lengths do not add up", sum(lengths), used)
    if data.count(0, NODE_HEADER_BYTES + used) != NODE_CAPACITY_BYTES - used:
        raise CorruptError("node", at, "bytes after the last entry are not zero")
    cuts = list(accumulate(lengths, initial=NODE_HEADER_BYTES + lengths_bytes))
    pieces = [data[start:stop] for start, stop in pairwise(cuts)]
    keys = pieces[:count]
    values = pieces[count:]
    if count and (min(lengths[:count]) == 0 or max(lengths[:count]) > KEY_BYTES_MAX):
        raise CorruptError("node", at, "key length out of range")
    for first, second in pairwise(keys):
        if first >= second:
            raise CorruptError("node", at, "keys are not ascending", second.hex(), first.hex())
    if found_level:
        if not count:
            raise CorruptError("node", at, "an inner node has no children")
        if any(length != POINTER_BYTES for length in lengths[count:]):
            raise CorruptError("node", at, "a child pointer has the wrong size")
    elif count and max(lengths[count:]) > VALUE_BYTES_MAX:
        raise CorruptError("node", at, "value length out of range", max(lengths[count:]))
    return NodeImage(found_level, birth, block, owner, keys, values, used)


# --- space map ------------------------------------------------------------------------------------

GROUP_BLOCKS = 1024  # refcounts in one page: 4 MiB of image
REFCOUNT_MAX = (1 << 32) - 1
INDEX_FANOUT = 64
INDEX_MAGIC = int.from_bytes(b"cowI", "little")
INDEX_HEADER = struct.Struct("<16sIB3xQQQQ8x")
INDEX_HEADER_BYTES = 64
KIND_NONE, KIND_DATA, KIND_NODES, KIND_TWINS = range(4)
INDEX_ENTRY_BYTES = 48
assert INDEX_HEADER.size == INDEX_HEADER_BYTES
assert INDEX_HEADER_BYTES + INDEX_FANOUT * INDEX_ENTRY_BYTES <= BLOCK_SIZE_BYTES
assert GROUP_BLOCKS * 4 == BLOCK_SIZE_BYTES


def group_count(total_blocks: int) -> int:
    """Groups of an image; the last one may be cut short."""
    return -(-total_blocks // GROUP_BLOCKS)


def index_shape(total_blocks: int) -> list[int]:
    """Number of index pages on each level, from the level above the refcounts to the top."""
    shape = [-(-group_count(total_blocks) // INDEX_FANOUT)]
    while shape[-1] > 1:
        shape.append(-(-shape[-1] // INDEX_FANOUT))
    return shape


# --- data -----------------------------------------------------------------------------------------

DATA_CHECKSUM_BYTES = 8  # xxh3-64 of each stored block, seeded, as big-endian bytes
