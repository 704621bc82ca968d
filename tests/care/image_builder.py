"""Writes small images by hand with the encoders alone: an independent writer of the format.

The builder counts references itself: each node adds one to everything it points at when it is made.
A test changes a record, a count or a byte before or after `finish`, and so knows exactly what is
wrong.
"""

import stat
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from msgspec.structs import replace
from xxhash import xxh3_64_digest, xxh3_128_digest

from cowfs.errors import DeviceError
from cowfs.files.items import (
    INODE_INLINE,
    ROOT_INO,
    TYPE_EXTENT,
    TYPE_INLINE,
    TYPE_NAME,
    TYPE_ORPHAN,
    TYPE_SYMLINK,
    TYPE_XATTR,
    Extent,
    Inode,
    Name,
    encode_names,
    encode_xattr,
    inode_key,
    key,
    name_hash,
    xattr_hash,
)
from cowfs.history.records import (
    DropRecord,
    DropStep,
    RootKind,
    RootRecord,
    drop_key,
    encode_id,
    root_key,
    snapshot_key,
    volume_key,
)
from cowfs.storage.format import (
    BLOCK_SIZE_BYTES,
    FLAG_CLEAN,
    GROUP_BLOCKS,
    INCOMPAT_DUPLICATED_METADATA,
    INDEX_FANOUT,
    KIND_NODES,
    NODE_BLOCKS,
    NODE_SIZE_BYTES,
    RING_SLOTS,
    Pointer,
    Superblock,
    decode_pointer,
    encode_node,
    group_count,
    index_shape,
)
from cowfs.storage.index_pages import INDEX_ENTRY, encode_index_page

UUID = bytes(range(16))
SEED = 0x1122334455667788
NAME_SEED = 0x99AA
NOW_NS = 1_700_000_000_000_000_000


class MemoryDevice:
    """A device that keeps only the blocks that were written."""

    name = "memory"

    def __init__(self, total_blocks: int) -> None:
        self.size_bytes = total_blocks * BLOCK_SIZE_BYTES
        self.blocks: dict[int, bytes] = {}
        self.unreadable: set[int] = set()
        self.read_bytes = 0

    def read(self, offset: int, size: int) -> bytes:
        first, last = offset // BLOCK_SIZE_BYTES, (offset + size) // BLOCK_SIZE_BYTES
        if offset + size > self.size_bytes or self.unreadable.intersection(range(first, last)):
            raise DeviceError(f"cannot read memory at {offset}: input/output error")
        self.read_bytes += size
        return b"".join(
            self.blocks.get(block, bytes(BLOCK_SIZE_BYTES)) for block in range(first, last)
        )

    def read_cached(self, offset: int, size: int) -> bytes | None:
        return None

    def write(self, offset: int, buffers: Sequence[bytes | bytearray | memoryview]) -> None:
        data = b"".join(buffers)
        for at in range(0, len(data), BLOCK_SIZE_BYTES):
            self.blocks[(offset + at) // BLOCK_SIZE_BYTES] = data[at : at + BLOCK_SIZE_BYTES]

    def flush(self) -> None:
        """Nothing to do: all writes are durable at once."""

    def discard(self, offset: int, size: int) -> bool:
        """Leave the blocks as they are, which a device may do."""
        return True

    def prefetch(self, offset: int, size: int) -> None:
        """Nothing to do: everything is in memory."""

    def close(self) -> None:
        """Nothing to close."""

    def damage(self, block: int, at: int = 100) -> None:
        """Flip one bit of a block."""
        data = bytearray(self.blocks.get(block, bytes(BLOCK_SIZE_BYTES)))
        data[at] ^= 1
        self.blocks[block] = bytes(data)


class ImageBuilder:
    """One image. Make nodes, roots and drops, then `finish`."""

    def __init__(
        self, total_blocks: int = 4096, *, generation: int = 70, duplicated: bool = True
    ) -> None:
        self.device = MemoryDevice(total_blocks)
        self.total_blocks = total_blocks
        self.generation = generation
        self.duplicated = duplicated
        self.references: Counter[int] = Counter()
        self.roots: list[RootRecord] = []
        self.drops: list[DropRecord] = []
        self.catalog_items: dict[bytes, bytes] = {}
        self.next_block = RING_SLOTS
        self.node_pointers: list[Pointer] = []
        self.change_entries: Callable[[np.ndarray, int], None] = lambda entries, level: None
        self.page_places: list[int] = []

    @property
    def image_id(self) -> int:
        return int.from_bytes(UUID[:8], "little")

    def allocate(self, count: int) -> int:
        first = self.next_block
        self.next_block += count
        return first

    def write(self, block: int, data: bytes) -> None:
        self.device.write(block * BLOCK_SIZE_BYTES, [data])

    def point_at(self, pointer: Pointer) -> None:
        """Count one more pointer to a node."""
        for first in (pointer.block, pointer.twin):
            if first:
                self.references.update(range(first, first + NODE_BLOCKS))

    # --- nodes ------------------------------------------------------------------------------------

    def node(
        self,
        level: int,
        entries: Sequence[tuple[bytes, bytes]],
        *,
        birth: int | None = None,
        owner: int = 1,
        count: bool = True,
    ) -> Pointer:
        """Write a node; count a reference for everything it points at."""
        birth = self.generation if birth is None else birth
        block = self.allocate(NODE_BLOCKS)
        twin = self.allocate(NODE_BLOCKS) if self.duplicated else 0
        keys = [item_key for item_key, _ in entries]
        values = [value for _, value in entries]
        data, checksum = encode_node(level, birth, block, owner, self.image_id, SEED, keys, values)
        self.write(block, data)
        if twin:
            self.write(twin, data)
        pointer = Pointer(block, twin, birth, checksum)
        self.node_pointers.append(pointer)
        if count:
            for item_key, value in entries:
                self._count_value(level, item_key, value)
        return pointer

    def _count_value(self, level: int, item_key: bytes, value: bytes) -> None:
        if level:
            self.point_at(decode_pointer(value))
        elif len(item_key) == 17 and item_key[8] == TYPE_EXTENT and item_key[:8] != bytes(8):
            first, count = struct.unpack_from("<QI", value)
            self.references.update(range(first, first + count))

    def tree(
        self,
        entries: Sequence[tuple[bytes, bytes]],
        *,
        per_node: int = 1000,
        birth: int | None = None,
        owner: int = 1,
    ) -> tuple[Pointer, int]:
        """Write a tree of those items; return its root and its number of nodes."""
        level = 0
        nodes = 0
        here = list(entries)
        while True:
            groups = [here[at : at + per_node] for at in range(0, len(here), per_node)] or [[]]
            pointers = [self.node(level, group, birth=birth, owner=owner) for group in groups]
            nodes += len(groups)
            if len(pointers) == 1:
                return pointers[0], nodes
            here = [
                (group[0][0], pointer.encode())
                for group, pointer in zip(groups, pointers, strict=True)
            ]
            level += 1

    def data(self, content: bytes, birth: int | None = None) -> Extent:
        """Write data in consecutive blocks; the extent is counted once an item holds it."""
        count = -(-len(content) // BLOCK_SIZE_BYTES)
        content = content.ljust(count * BLOCK_SIZE_BYTES, b"\0")
        block = self.allocate(count)
        self.write(block, content)
        sums = b"".join(
            xxh3_64_digest(content[at : at + BLOCK_SIZE_BYTES], SEED)
            for at in range(0, len(content), BLOCK_SIZE_BYTES)
        )
        return Extent(block, count, self.generation if birth is None else birth, sums)

    # --- roots ------------------------------------------------------------------------------------

    def add_root(
        self,
        volume: "VolumeItems",
        name: str = "main",
        kind: RootKind = RootKind.VOLUME,
        *,
        per_node: int = 1000,
        tree: tuple[Pointer, int] | None = None,
    ) -> RootRecord:
        """Write a tree (or share one) and record it as a root."""
        root_id = len(self.roots) + 1
        pointer, node_count = tree or self.tree(volume.entries(), per_node=per_node, owner=root_id)
        record = RootRecord(
            root_id=root_id,
            kind=kind,
            name=name,
            uuid=bytes([root_id]) * 16,
            tree=pointer,
            created_generation=self.generation,
            created_ns=NOW_NS,
            next_ino=max(volume.inodes, default=0) + 1,
            node_count=node_count,
            data_blocks=volume.data_blocks(),
            inode_count=len(volume.inodes),
        )
        self.roots.append(record)
        return record

    def add_drop(self, path: Sequence[DropStep], name: str = "gone") -> DropRecord:
        record = DropRecord(len(self.drops) + 1, 99, name, NOW_NS, 0, tuple(path))
        self.drops.append(record)
        return record

    # --- the end ----------------------------------------------------------------------------------

    def finish(self, *, per_node: int = 1000, **changes: object) -> MemoryDevice:
        """Write catalog, space map and superblock; `changes` replace members of the superblock."""
        items = dict(self.catalog_items)
        for root in self.roots:
            items.setdefault(root_key(root.root_id), root.encode())
            named = volume_key if root.kind is RootKind.VOLUME else snapshot_key
            items.setdefault(named(root.name), encode_id(root.root_id))
            self.point_at(root.pointer)
        for drop in self.drops:
            items[drop_key(drop.number)] = drop.encode()
            self.point_at(drop.path[0].pointer)
        entries = sorted((item_key, value) for item_key, value in items.items() if value)
        catalog, catalog_nodes = self.tree(entries, per_node=per_node, owner=0)
        self.point_at(catalog)
        space_map, system_blocks = self._space_map()
        superblock = Superblock(
            uuid=UUID,
            seed=SEED,
            name_seed=NAME_SEED,
            generation=self.generation,
            total_blocks=self.total_blocks,
            flags=FLAG_CLEAN,
            committed_ns=NOW_NS,
            created_ns=NOW_NS,
            oldest_retained=self.generation,
            catalog=catalog,
            space_map=space_map,
            used_blocks=sum(1 for count in self.references.values() if count > 0),
            catalog_nodes=catalog_nodes,
            system_blocks=system_blocks,
            next_root_id=len(self.roots) + 100,
            label="hand-made",
            incompat=INCOMPAT_DUPLICATED_METADATA if self.duplicated else 0,
        )
        self.put_superblock(replace(superblock, **changes))
        return self.device

    def put_superblock(self, superblock: Superblock, copies: Sequence[int] = (0, 1)) -> None:
        """Write a superblock to its slot."""
        for copy in copies:
            start = (self.total_blocks - RING_SLOTS) * copy
            self.write(start + superblock.slot(), superblock.encode())

    def _page(self) -> tuple[int, int]:
        pages = self.allocate(2) if self.duplicated else self.allocate(1)
        self.page_places.append(pages)
        return pages, pages + 1 if self.duplicated else 0

    def _space_map(self) -> tuple[Pointer, int]:
        birth = self.generation
        groups: dict[int, np.ndarray] = {}
        for block, count in self.references.items():
            if count:
                page = groups.setdefault(block // GROUP_BLOCKS, np.zeros(GROUP_BLOCKS, "<u4"))
                page[block % GROUP_BLOCKS] = count
        system = 2 * RING_SLOTS
        below = np.zeros(group_count(self.total_blocks), INDEX_ENTRY)
        for group, page in groups.items():
            block, twin = self._page()
            system += 1 + bool(twin)
            for copy in (block, twin):
                if copy:
                    self.write(copy, page.tobytes())
            inside = min(GROUP_BLOCKS, self.total_blocks - group * GROUP_BLOCKS)
            free = inside - np.count_nonzero(page[:inside])
            checksum = np.void(xxh3_128_digest(page.tobytes(), SEED))
            below[group] = (block, twin, birth, checksum, free, KIND_NODES, b"")
        pointer = None
        for level, count in enumerate(index_shape(self.total_blocks), 1):
            above = np.zeros(count, INDEX_ENTRY)
            for number in range(count):
                entries = np.zeros(INDEX_FANOUT, INDEX_ENTRY)
                piece = below[number * INDEX_FANOUT : (number + 1) * INDEX_FANOUT]
                if not piece["block"].any() and count > 1:
                    continue
                entries[: len(piece)] = piece
                self.change_entries(entries, level)
                block, twin = self._page()
                system += 1 + bool(twin)
                data, checksum = encode_index_page(
                    level, number, birth, block, self.image_id, SEED, entries.tobytes()
                )
                for copy in (block, twin):
                    if copy:
                        self.write(copy, data)
                free = int(entries["free"].sum()) & 0xFFFFFFFF
                above[number] = (block, twin, birth, np.void(checksum), free, 0, b"")
                pointer = Pointer(block, twin, birth, checksum)
            below = above
        assert pointer is not None
        return pointer, system


@dataclass
class VolumeItems:
    """The contents of a tree; a test changes them before they are written."""

    inodes: dict[int, Inode] = field(default_factory=dict)
    names: dict[int, list[tuple[bytes, int]]] = field(default_factory=dict)
    items: dict[bytes, bytes] = field(default_factory=dict)
    birth: int = 1

    def inode(self, ino: int, mode: int, nlink: int = 1, size_bytes: int = 0) -> Inode:
        inode = Inode(ino, mode, nlink, 1000, 1000, 0, size_bytes, 0, self.birth, *([NOW_NS] * 4))
        self.inodes[ino] = inode
        return inode

    def directory(self, ino: int, parent: int = 0, name: bytes = b"") -> Inode:
        inode = self.inode(ino, stat.S_IFDIR | 0o755, 2)
        inode.rdev = parent or ROOT_INO
        self.names[ino] = []
        if parent:
            self.name(parent, name, ino)
        return inode

    def name(self, directory: int, name: bytes, ino: int) -> None:
        """Add a name, and update the counters of the directory."""
        self.names[directory].append((name, ino))
        self.inodes[directory].size_bytes += len(name)
        if stat.S_ISDIR(self.inodes[ino].mode):
            self.inodes[directory].nlink += 1
            self.inodes[ino].rdev = directory

    def extent(self, ino: int, file_block: int, extent: Extent) -> None:
        self.items[key(ino, TYPE_EXTENT, file_block)] = extent.encode()
        self.inodes[ino].data_blocks += extent.count

    def xattr(self, ino: int, name: bytes, value: bytes) -> None:
        base = xattr_hash(name, NAME_SEED)
        for chunk, part in enumerate(encode_xattr(name, value)):
            self.items[key(ino, TYPE_XATTR, base + chunk)] = part
        self.inodes[ino].xattr_count += 1

    def data_blocks(self) -> int:
        return sum(inode.data_blocks for inode in self.inodes.values())

    def entries(self) -> list[tuple[bytes, bytes]]:
        """All items in key order, except those of value b"" that are not orphan marks."""
        items = {}
        for ino, inode in self.inodes.items():
            items[inode_key(ino)] = inode.encode()
        for directory, names in self.names.items():
            slots: dict[int, list[Name]] = {}
            for name, ino in names:
                target = self.inodes.get(ino)
                type_ = target.mode >> 12 if target else 8
                same = slots.setdefault(name_hash(name, NAME_SEED), [])
                same.append(Name(name, ino, type_, len(same)))
            for offset, same in slots.items():
                items[key(directory, TYPE_NAME, offset)] = encode_names(same)
        items.update(self.items)
        return sorted(
            (item_key, value)
            for item_key, value in items.items()
            if value or item_key[:8] == bytes(8)
        )


def sample_volume(builder: ImageBuilder) -> VolumeItems:
    """A small tree with one of each kind.

    /hello (2, inline; also /sub/hard), /big (3: two extents, a hole, two xattrs), /link (4),
    /sub (5), /sub/deep (6), an orphan (7), /fifo (8), /empty (9).
    """
    volume = VolumeItems()
    volume.directory(ROOT_INO)
    volume.inode(2, stat.S_IFREG | 0o644, 2, 11)
    volume.inodes[2].flags = INODE_INLINE
    volume.items[key(2, TYPE_INLINE, 0)] = b"hello world"
    volume.inode(3, stat.S_IFREG | 0o600, 1, 9 * BLOCK_SIZE_BYTES + 5)
    volume.extent(3, 0, builder.data(b"a" * 3 * BLOCK_SIZE_BYTES))
    volume.extent(3, 7, builder.data(b"b" * 3 * BLOCK_SIZE_BYTES))
    volume.xattr(3, b"user.small", b"value")
    volume.xattr(3, b"user.large", bytes(range(250)) * 20)
    volume.inode(4, stat.S_IFLNK | 0o777, 1, 5)
    volume.items[key(4, TYPE_SYMLINK, 0)] = b"hello"
    volume.name(1, b"hello", 2)
    volume.name(1, b"big", 3)
    volume.name(1, b"link", 4)
    volume.directory(5, 1, b"sub")
    volume.name(5, b"hard", 2)
    volume.directory(6, 5, b"deep")
    volume.inode(7, stat.S_IFREG | 0o644, 0, 0)
    volume.items[key(0, TYPE_ORPHAN, 7)] = b""
    volume.inode(8, stat.S_IFIFO | 0o644, 1, 0)
    volume.name(1, b"fifo", 8)
    volume.inode(9, stat.S_IFREG | 0o644, 1, 0)
    volume.name(1, b"empty", 9)
    return volume


def node_bytes(device: MemoryDevice, block: int) -> bytes:
    return device.read(block * BLOCK_SIZE_BYTES, NODE_SIZE_BYTES)
