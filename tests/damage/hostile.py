"""Images that lie: every checksum is right, and the contents they cover are impossible.

A *recipe* is a short list of mutations. `build` writes a small image by hand (image_builder.py) and
lets each mutation change one thing on the way: an entry of a node, its header, a root or drop
record, a refcount, an entry of the index, a member of the superblock. As parents are written after
their children, the checksums are right up to the superblock. The same recipe gives the same image.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import fields, replace
from xxhash import xxh3_128_digest

from cowfs.files.items import (
    KEY_BYTES,
    TYPE_EXTENT,
    TYPE_INODE,
    TYPE_NAME,
    TYPE_ORPHAN,
    TYPE_XATTR,
    key,
    name_hash,
    split_key,
)
from cowfs.history.records import DropStep, RootKind
from cowfs.storage.format import (
    BLOCK_SIZE_BYTES,
    INCOMPAT_DUPLICATED_METADATA,
    INCOMPAT_LOG,
    NODE_BLOCKS,
    NODE_CAPACITY_BYTES,
    NODE_HEADER,
    NODE_HEADER_BYTES,
    NODE_MAGIC,
    NODE_SIZE_BYTES,
    POINTER_BYTES,
    LogPlace,
    Pointer,
    Superblock,
    decode_pointer,
)
from tests.care.image_builder import (
    NAME_SEED,
    SEED,
    ImageBuilder,
    MemoryDevice,
    VolumeItems,
    sample_volume,
)

TOTAL_BLOCKS = 4096
GENERATION = 70

# Numbers at the limits of arithmetic, tables and the format.
NUMBERS = (
    0, 1, 2, 3, 7, 15, 16, 63, 64, 65, 69, 70, 71, 255, 256, 257, 1000, 1023, 1024, 2047, 2048,
    2049, 4031, 4032, 4095, 4096, 4097, 0x4000, 0x8000, 0xA000, 0xFFFF, 1 << 16, 1 << 20,
    (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 40) - 1, 1 << 40, (1 << 51) - 1, 1 << 51,
    1 << 52, (1 << 62),
    (1 << 63) - 1, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1,
)  # fmt: skip
NAMES = (
    b"..", b".", b"/", b"a/b", b"../../etc/passwd", b"/etc/passwd", b"nul\0inside", b"\0", b"",
    b"x" * 255, b"\xff\xfe", b"line\nbreak", b".snapshots", b"hello", b"big", b"\x1b[2J",
    b"lost+found",
)  # fmt: skip
ENTRY_KINDS = (
    "remove", "repeat", "swap", "key byte", "key length", "key number", "value cut", "value grow",
    "value byte", "value number", "name", "extent", "inode", "xattr", "type", "orphan", "clone",
    "child", "pointer", "many children", "key order", "empty", "target",
)  # fmt: skip
HEADER_KINDS = ("header", "raw", "magic")
OTHER_KINDS = ("root", "drop", "superblock", "refcount", "index", "system")
KINDS = ENTRY_KINDS + HEADER_KINDS + OTHER_KINDS


@dataclass(frozen=True, slots=True)
class Mutation:
    """One lie. `kind` is one of KINDS; the numbers, modulo their ranges, choose where and what."""

    kind: str
    site: int = 0
    entry: int = 0
    what: int = 0
    value: int = 0

    def to_list(self) -> list[str | int]:
        return [self.kind, self.site, self.entry, self.what, self.value]


def recipe_of(lists: Sequence[Sequence[Any]]) -> list[Mutation]:
    """A recipe from the lists that JSON holds."""
    return [Mutation(str(kind), *map(int, numbers)) for kind, *numbers in lists]


def build(
    recipe: Sequence[Mutation],
    *,
    per_node: int = 3,
    xattrs: Sequence[tuple[int, bytes, bytes]] = (),
) -> MemoryDevice:
    """Build the image of a recipe: a volume, two snapshots, and a half-done deletion.

    Args:
        xattrs: more xattrs, as inode, name and value.
    """
    builder = HostileBuilder(recipe)
    volume = sample_volume(builder)
    _grow(volume, builder)
    for each in xattrs:
        volume.xattr(*each)
    first = builder.add_root(volume, per_node=per_node)
    shared = (first.pointer, first.node_count)
    builder.add_root(volume, "monday", RootKind.SNAPSHOT, tree=shared)
    volume.inodes[2].mtime_ns += 1
    builder.add_root(volume, "tuesday", RootKind.SNAPSHOT, per_node=per_node + 2)
    builder.roots[0] = replace(builder.roots[0], parent_id=3, undo_id=2)
    gone, _ = builder.tree(volume.entries(), per_node=per_node + 1, owner=99)
    builder.add_drop([DropStep(gone, 0)])
    builder.change_records()
    return builder.finish(per_node=3, **builder.superblock_changes())


def build_braid(levels: int = 5, ways: int = 250) -> MemoryDevice:
    """A tree whose only leaf is reached in `ways` to the power of `levels` ways."""
    builder = HostileBuilder([])
    volume = VolumeItems()
    volume.directory(1)
    volume.inode(2, 0o100644, 1, 0)
    volume.name(1, b"file", 2)
    # The leaf holds items of inode 1 only, so a listing of inode 1 does not end in it.
    pointer = builder.node(0, [entry for entry in volume.entries() if split_key(entry[0])[0] == 1])
    nodes = 1
    for level in range(1, levels + 1):
        keys = [key(1, TYPE_NAME, number << 50 | level) for number in range(ways)]
        pointer = builder.node(level, [(item, pointer.encode()) for item in keys])
        nodes += 1
    builder.add_root(volume, tree=(pointer, nodes))
    builder.add_root(volume, "monday", RootKind.SNAPSHOT, tree=(pointer, nodes))
    return builder.finish()


def write_image(device: MemoryDevice, path: Path) -> None:
    """Write the image as a sparse file."""
    with open(path, "wb") as file:
        file.truncate(device.size_bytes)
        for block, data in device.blocks.items():
            if (block + 1) * BLOCK_SIZE_BYTES <= device.size_bytes:
                file.seek(block * BLOCK_SIZE_BYTES)
                file.write(data)


def _grow(volume: VolumeItems, builder: ImageBuilder) -> None:
    """Add enough files for a tree of four levels."""
    volume.directory(20, 1, b"many")
    for number in range(21, 33):
        volume.inode(number, 0o100644, 1, BLOCK_SIZE_BYTES)
        volume.name(20, b"file %d" % number, number)
        volume.extent(number, 0, builder.data(bytes([number]) * BLOCK_SIZE_BYTES))


class HostileBuilder(ImageBuilder):
    """A builder that writes what it is given, changed as a recipe says."""

    def __init__(self, recipe: Sequence[Mutation]) -> None:
        super().__init__(TOTAL_BLOCKS, generation=GENERATION)
        self._of_nodes: dict[int, list[Mutation]] = {}
        self._recipe = list(recipe)
        for mutation in recipe:
            if mutation.kind in ENTRY_KINDS + HEADER_KINDS:
                self._of_nodes.setdefault(mutation.site % 64, []).append(mutation)
        self._site = 0
        self.change_entries = self._change_index

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
        mutations = self._of_nodes.get(self._site % 64, [])
        self._site += 1
        if not mutations:
            return super().node(level, entries, birth=birth, owner=owner, count=count)
        changed = list(entries)
        for mutation in mutations:
            if mutation.kind in ENTRY_KINDS:
                changed = self._change_entries_of_node(level, changed, mutation)
        pointer = super().node(level, entries, birth=birth, owner=owner, count=count)
        data = bytearray(_encode(level, pointer, owner, self.image_id, changed))
        for mutation in mutations:
            if mutation.kind in HEADER_KINDS:
                _change_bytes(data, mutation)
        checksum = xxh3_128_digest(bytes(data[16:]), SEED)
        data[:16] = checksum
        self.write(pointer.block, bytes(data))
        self.write(pointer.twin, bytes(data))
        birth_in_header = NODE_HEADER.unpack_from(data)[7]
        lied = Pointer(pointer.block, pointer.twin, min(birth_in_header, (1 << 64) - 1), checksum)
        self.node_pointers[-1] = lied
        return lied

    def _change_entries_of_node(
        self, level: int, entries: list[tuple[bytes, bytes]], mutation: Mutation
    ) -> list[tuple[bytes, bytes]]:
        kind = mutation.kind
        if kind == "empty":
            return []
        if not entries:
            return entries
        at = mutation.entry % len(entries)
        item, value = entries[at]
        number = NUMBERS[mutation.value % len(NUMBERS)]
        new: list[tuple[bytes, bytes]] = [(item, value)]
        if kind == "remove":
            new = []
        elif kind == "repeat":
            new = [(item, value)] * 2
        elif kind == "swap":
            other = mutation.what % len(entries)
            entries[at], entries[other] = entries[other], entries[at]
            return entries
        elif kind == "key byte":
            new = [(_with_byte(item, mutation.what, mutation.value), value)]
        elif kind == "key length":
            new = [((item + bytes(301))[: number % 302], value)]
        elif kind == "key number":
            new = [(_with_key_number(item, mutation.what, number), value)]
        elif kind == "key order":
            entries.reverse()
            return entries
        elif kind == "value cut":
            new = [(item, value[: mutation.what % (len(value) + 1)])]
        elif kind == "value grow":
            new = [(item, value + bytes(mutation.what % 5000))]
        elif kind == "value byte":
            new = [(item, _with_byte(value, mutation.what, mutation.value))]
        elif kind == "value number":
            new = [(item, _with_number(value, mutation.what, number))]
        elif level:
            return self._change_children(entries, at, mutation, number)
        else:
            return _change_items(entries, at, mutation, number)
        return entries[:at] + new + entries[at + 1 :]

    def _change_children(
        self, entries: list[tuple[bytes, bytes]], at: int, mutation: Mutation, number: int
    ) -> list[tuple[bytes, bytes]]:
        """Lies of an inner node: pointers to other nodes, or to the same one many times."""
        item, value = entries[at]
        if mutation.kind == "many children":
            child = entries[0][1]
            return [
                (bytes([0, number % 3]) + index.to_bytes(4, "big"), child) for index in range(280)
            ]
        if len(value) != POINTER_BYTES:
            return entries
        pointer = decode_pointer(value)
        if mutation.kind == "child":
            pointer = self.node_pointers[mutation.what % len(self.node_pointers)]
        else:
            member = ("block", "twin", "birth")[mutation.what % 3]
            pointer = pointer._replace(**{member: number})
        entries[at] = (item, pointer.encode())
        return entries

    def point_at(self, pointer: Pointer) -> None:
        """Count a reference only if the blocks are in the image."""
        if max(pointer.block, pointer.twin) <= self.total_blocks - NODE_BLOCKS:
            super().point_at(pointer)

    # --- records ----------------------------------------------------------------------------------

    def change_records(self) -> None:
        """Change root records, drop records and refcounts as the recipe says."""
        for mutation in self._recipe:
            number = NUMBERS[mutation.value % len(NUMBERS)]
            if mutation.kind == "root":
                self._change_root(mutation, number)
            elif mutation.kind == "drop":
                self._change_drop(mutation, number)
            elif mutation.kind == "refcount":
                counted = sorted(self.references)
                block = counted[mutation.site * 7 % len(counted)]
                self.references[block] = number & 0xFFFFFFFF

    def _change_root(self, mutation: Mutation, number: int) -> None:
        index = mutation.site % len(self.roots)
        record = self.roots[index]
        members = (
            "root_id", "parent_id", "undo_id", "created_generation", "next_ino", "node_count",
            "data_blocks", "inode_count",
        )  # fmt: skip
        which = mutation.what % (len(members) + 3)
        pointer = record.pointer
        if which < len(members):
            record = replace(record, **{members[which]: number})
        elif which == len(members):
            other = self.node_pointers[mutation.entry % len(self.node_pointers)]
            record = replace(record, tree=other)
        elif which == len(members) + 1:
            member = ("block", "twin", "birth")[mutation.entry % 3]
            record = replace(record, tree=pointer._replace(**{member: number}))
        else:
            names = ("..", "a/b", "", "x" * 300, "main", "monday", "%", "-x", "\x1b")
            record = replace(record, name=names[mutation.entry % len(names)])
        self.roots[index] = record

    def _change_drop(self, mutation: Mutation, number: int) -> None:
        record = self.drops[0]
        which = mutation.what % 4
        first = record.path[0]
        if which == 0:
            path = [DropStep(first.pointer, number & 0xFFFFFFFF)]
        elif which == 1:
            other = self.node_pointers[mutation.site % len(self.node_pointers)]
            path = [DropStep(other, mutation.entry % 4)]
        elif which == 2:
            other = self.node_pointers[mutation.site % len(self.node_pointers)]
            path = [DropStep(first.pointer, mutation.entry % 3), DropStep(other, number % 5)]
        else:
            path = [DropStep(first.pointer, 0)] * (1 + number % 13)
        self.drops[0] = replace(record, path=tuple(path))

    def superblock_changes(self) -> dict[str, object]:
        changes: dict[str, object] = {}
        members = [member.name for member in fields(Superblock)]
        for mutation in self._recipe:
            if mutation.kind == "superblock":
                member = members[mutation.what % len(members)]
                number = NUMBERS[mutation.value % len(NUMBERS)]
                if member in ("catalog", "space_map"):
                    other = self.node_pointers[mutation.site % len(self.node_pointers)]
                    changes[member] = other._replace(block=other.block + mutation.entry % 2)
                elif member in ("flags",):
                    changes[member] = number & 0xFFFFFFFF
                elif member in ("committed_ns", "created_ns"):
                    changes[member] = number - (1 << 63) if number >> 63 else number
                elif member == "generation":
                    changes[member] = number or 1
                elif member == "log":
                    # A log where other things are, or nowhere.
                    node = self.node_pointers[mutation.site % len(self.node_pointers)]
                    changes[member] = (
                        LogPlace(node.block, node.twin * (mutation.entry % 2), 16, 0)
                        if mutation.value % 2
                        else LogPlace(number, mutation.site, mutation.entry, mutation.value % 3)
                    )
                    changes["incompat"] = INCOMPAT_DUPLICATED_METADATA | INCOMPAT_LOG
                elif member == "label":
                    changes[member] = "\x1b[2Jlabel"
                elif member != "uuid":
                    changes[member] = number
        return changes

    # --- space map --------------------------------------------------------------------------------

    def _change_index(self, entries: np.ndarray, level: int) -> None:
        for mutation in self._recipe:
            number = NUMBERS[mutation.value % len(NUMBERS)]
            at = mutation.site % len(entries)
            if mutation.kind == "index":
                member = ("block", "twin", "birth", "free", "kind")[mutation.what % 5]
                at = mutation.site % 2 if mutation.entry % 2 else at
                entries[member][at] = number & ((1 << 8 * entries[member].itemsize) - 1)
            elif mutation.kind == "system":
                used = np.flatnonzero(entries["block"])
                if len(used):
                    entries[at] = entries[used[mutation.entry % len(used)]]


# --- bytes ----------------------------------------------------------------------------------------


def _encode(
    level: int,
    pointer: Pointer,
    owner: int,
    image_id: int,
    entries: Sequence[tuple[bytes, bytes]],
) -> bytes:
    """Encode a node without any check; what does not fit is cut off."""
    keys = [item for item, _ in entries]
    values = [value for _, value in entries]
    lengths = struct.pack(
        f"<{2 * len(keys)}H", *(len(item) & 0xFFFF for item in keys), *map(len, values)
    )
    body = b"".join((lengths, *keys, *values))
    header = NODE_HEADER.pack(
        bytes(16), NODE_MAGIC, level, 0, 0, len(keys), len(body), pointer.birth, pointer.block,
        owner, image_id,
    )  # fmt: skip
    return (header + body[:NODE_CAPACITY_BYTES]).ljust(NODE_SIZE_BYTES, b"\0")


def _change_bytes(data: bytearray, mutation: Mutation) -> None:
    number = NUMBERS[mutation.value % len(NUMBERS)]
    if mutation.kind == "magic":
        data[16 + mutation.entry % 4] ^= 1 + mutation.value % 255
    elif mutation.kind == "header":
        at, size = (
            (20, 1),
            (21, 1),
            (22, 2),
            (24, 4),
            (28, 4),
            (32, 8),
            (40, 8),
            (48, 8),
            (56, 8),
        )[mutation.what % 9]
        data[at : at + size] = (number & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    else:
        at = NODE_HEADER_BYTES + mutation.what % 600
        data[at] ^= 1 + mutation.value % 255


def _with_byte(data: bytes, at: int, value: int) -> bytes:
    if not data:
        return data
    changed = bytearray(data)
    changed[at % len(data)] ^= 1 + value % 255
    return bytes(changed)


def _with_number(data: bytes, what: int, number: int) -> bytes:
    """Put a little-endian number of 2, 4 or 8 bytes at an aligned place."""
    size = (2, 4, 8)[what % 3]
    if len(data) < size:
        return data
    at = what // 3 * (4 if size == 8 else size) % (len(data) - size + 1)
    return data[:at] + (number & ((1 << 8 * size) - 1)).to_bytes(size, "little") + data[at + size :]


def _with_key_number(item: bytes, what: int, number: int) -> bytes:
    if len(item) != KEY_BYTES:
        return item[:1] + number.to_bytes(8, "big")
    ino, type_, offset = split_key(item)
    member = what % 3
    if member == 0:
        return key(number, type_, offset)
    if member == 1:
        return key(ino, number % 9, offset)
    return key(ino, type_, number)


_INODE_MEMBERS = {
    "mode": (0, 4), "nlink": (4, 4), "uid": (8, 4), "rdev": (16, 8), "size": (24, 8),
    "data_blocks": (32, 8), "birth": (40, 8), "atime": (48, 8), "mtime": (56, 8), "flags": (80, 4),
    "xattr_count": (84, 2),
}  # fmt: skip


def _change_items(
    entries: list[tuple[bytes, bytes]], at: int, mutation: Mutation, number: int
) -> list[tuple[bytes, bytes]]:
    """Lies about one item of a tree: a name, an extent, an inode, an xattr."""
    wanted = {
        "name": TYPE_NAME,
        "target": TYPE_NAME,
        "extent": TYPE_EXTENT,
        "inode": TYPE_INODE,
        "xattr": TYPE_XATTR,
    }.get(mutation.kind)
    if wanted is not None:
        places = [
            index
            for index, (item, _) in enumerate(entries)
            if len(item) == KEY_BYTES and item[8] == wanted
        ]
        if not places:
            return entries
        at = places[mutation.entry % len(places)]
    item, value = entries[at]
    if len(item) != KEY_BYTES:
        return entries
    ino, type_, offset = split_key(item)
    changes: dict[str, Callable[[], tuple[bytes, bytes]]] = {
        "name": lambda: _named(item, value, mutation),
        "target": lambda: (item, struct.pack("<Q", number) + value[8:]),
        "extent": lambda: (item, _with_member(value, [(0, 8), (8, 4), (12, 8), (20, 1)], mutation)),
        "inode": lambda: (item, _with_member(value, list(_INODE_MEMBERS.values()), mutation)),
        "xattr": lambda: (item, _with_member(value, [(0, 4), (4, 1)], mutation)),
        "type": lambda: (key(ino, mutation.what % 8, offset), value),
        "orphan": lambda: (key(0, TYPE_ORPHAN, number), b""),
        "clone": lambda: (
            key(ino, type_, (offset + 1 + mutation.what % 4) & (1 << 64) - 1),
            value,
        ),
    }
    if mutation.kind not in changes:
        return entries
    changed = changes[mutation.kind]()
    kept = entries if mutation.kind in ("orphan", "clone") else entries[:at] + entries[at + 1 :]
    return sorted([*kept, changed])


def _named(item: bytes, value: bytes, mutation: Mutation) -> tuple[bytes, bytes]:
    """Another name for the same inode, under its right hash or under the old one."""
    name = NAMES[mutation.what % len(NAMES)]
    length = len(name) if mutation.value % 5 else mutation.value % 256
    entry = value[:10] + bytes([length & 0xFF]) + name
    if mutation.value % 3 == 2:
        return item, entry
    return key(split_key(item)[0], TYPE_NAME, name_hash(name, NAME_SEED)), entry


def _with_member(value: bytes, members: list[tuple[int, int]], mutation: Mutation) -> bytes:
    at, size = members[mutation.what % len(members)]
    number = NUMBERS[mutation.value % len(NUMBERS)] & ((1 << 8 * size) - 1)
    return value[:at] + number.to_bytes(size, "little") + value[at + size :]


assert NODE_BLOCKS * BLOCK_SIZE_BYTES == NODE_SIZE_BYTES
