"""A second opinion about which root holds what: walks every root, from the formats alone.

It uses the record formats, and nothing of the trees, the space map, structure.py or the virtual
drop. It keeps sets of block numbers, so it suits small images only.
"""

import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from cowfs.files.items import (
    ROOT_INO,
    TYPE_EXTENT,
    TYPE_INLINE,
    TYPE_INODE,
    TYPE_NAME,
    TYPE_ORPHAN,
    Inode,
    decode_extent,
    decode_inode,
    decode_names,
    split_key,
)
from cowfs.history.records import RootKind, decode_drop, decode_root
from cowfs.storage.device import Device
from cowfs.storage.format import (
    BLOCK_SIZE_BYTES,
    NODE_BLOCKS,
    NODE_SIZE_BYTES,
    NodeImage,
    Pointer,
    Superblock,
    decode_node,
    decode_pointer,
)
from cowfs.storage.superblock import read_newest

Key = tuple[str, int]  # kind of a root, and its number
Edge = tuple[int, bytes]  # directory, and a name in it


@dataclass(slots=True)
class Held:
    """What one root reaches.

    Attributes:
        node_at: by first block of each node: (level, birth, twin).
        data: data blocks by inode.
        extents: by inode, where the blocks stand: block of the file -> block.
        births: birth of each data block, as its extent has it.
        names: names of each inode, in the order of the directories.
    """

    kind: str
    number: int
    name: str
    pointer: Pointer
    parent: int = 0
    node_at: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    data: dict[int, set[int]] = field(default_factory=dict)
    extents: dict[int, dict[int, int]] = field(default_factory=dict)
    births: dict[int, int] = field(default_factory=dict)
    names: dict[int, list[Edge]] = field(default_factory=dict)
    inodes: dict[int, Inode] = field(default_factory=dict)
    inline: dict[int, bytes] = field(default_factory=dict)
    orphans: set[int] = field(default_factory=set)
    node_blocks: set[int] = field(default_factory=set)
    data_blocks: set[int] = field(default_factory=set)

    @property
    def key(self) -> Key:
        return self.kind, self.number

    @property
    def blocks(self) -> set[int]:
        return self.node_blocks | self.data_blocks

    def paths(self) -> dict[bytes, int]:
        """Every path from the root directory, with the inode it leads to."""
        listed: dict[int, list[tuple[bytes, int]]] = {}
        for ino, edges in self.names.items():
            for directory, name in edges:
                listed.setdefault(directory, []).append((name, ino))
        found = {b"": int(ROOT_INO)}
        waiting = [(b"", int(ROOT_INO))]
        while waiting:
            path, directory = waiting.pop()
            for name, ino in listed.get(directory, []):
                below = path + b"/" + name if path else name
                found[below] = ino
                if stat.S_ISDIR(self.inodes[ino].mode):
                    waiting.append((below, ino))
        return found

    def below(self, path: bytes) -> dict[int, set[Edge]]:
        """The names at and below a path, by inode. The root directory's name is (0, b"")."""
        paths = self.paths()
        found: dict[int, set[Edge]] = {}
        for each, ino in paths.items():
            if each == path or not path or each.startswith(path + b"/"):
                above, _, name = each.rpartition(b"/")
                edge = (paths[above], name) if each else (0, b"")
                found.setdefault(ino, set()).add(edge)
        return found

    def complete(self, inside: dict[int, set[Edge]]) -> set[int]:
        """The inodes all of whose names are in `inside`."""
        return {ino for ino, edges in inside.items() if set(self.names.get(ino, [])) <= edges}


@dataclass(slots=True)
class Holdings:
    """All roots of one generation. `references`: the number of parents of each block."""

    superblock: Superblock
    held: dict[Key, Held] = field(default_factory=dict)
    references: Counter[int] = field(default_factory=Counter)

    def owners(self) -> dict[int, frozenset[Key]]:
        """The roots that reach each block."""
        found: dict[int, set[Key]] = {}
        for key, held in self.held.items():
            for block in held.blocks:
                found.setdefault(block, set()).add(key)
        return {block: frozenset(keys) for block, keys in found.items()}

    def exclusive(self, keys: Iterable[Key]) -> set[int]:
        """The blocks that only these roots reach."""
        chosen = set(keys)
        inside: set[int] = set()
        outside: set[int] = set()
        for key, held in self.held.items():
            (inside if key in chosen else outside).update(held.blocks)
        return inside - outside

    def snapshots(self) -> list[Held]:
        return [held for held in self.held.values() if held.kind == "snapshot"]

    @property
    def live(self) -> Held:
        return next(held for held in self.held.values() if held.kind == "volume")


def holdings(device: Device, generation: int | None = None) -> Holdings:
    """Walk every root of the newest generation, or of an older one that the ring names."""
    superblock = read_newest(device, generation)
    found = Holdings(superblock)
    counted: set[tuple[int, int]] = set()  # nodes whose pointers were counted: place and start
    catalog = Held("catalog", 0, "", superblock.catalog)
    found.references.update(_node_blocks(superblock.catalog))
    drops = []
    for image in _walk(device, found, catalog, {}, counted):
        for key, value in zip(image.keys, image.values, strict=True):
            if image.level:
                continue
            if key[:1] == b"R":
                record = decode_root(value)
                kind = "snapshot" if record.kind == RootKind.SNAPSHOT else "volume"
                root = (kind, record.root_id)
                found.held[root] = Held(*root, record.name, record.pointer, record.parent_id)
            elif key[:1] == b"D":
                drops.append(decode_drop(value))
    for held in list(found.held.values()):
        _fill(device, found, held, {}, counted)
    for drop in drops:
        held = Held("drop", drop.number, drop.name, drop.path[0].pointer)
        found.held[held.key] = held
        done = {step.pointer.block: step.done for step in drop.path}
        _fill(device, found, held, done, counted)
    found.held[catalog.key] = catalog
    return found


def _node_blocks(pointer: Pointer) -> list[int]:
    return [
        block
        for first in (pointer.block, pointer.twin)
        if first
        for block in range(first, first + NODE_BLOCKS)
    ]


def _fill(
    device: Device,
    found: Holdings,
    held: Held,
    done: dict[int, int],
    counted: set[tuple[int, int]],
) -> None:
    found.references.update(_node_blocks(held.pointer))
    for image in _walk(device, found, held, done, counted):
        if image.level:
            continue
        fresh = (image.block, -1) not in counted
        counted.add((image.block, -1))
        for item, value in zip(image.keys, image.values, strict=True):
            ino, kind, offset = split_key(item)
            if kind == TYPE_EXTENT:
                extent = decode_extent(ino, value)
                run = range(extent.block, extent.block + extent.count)
                held.data.setdefault(ino, set()).update(run)
                held.data_blocks.update(run)
                held.births.update(dict.fromkeys(run, extent.birth))
                places = held.extents.setdefault(ino, {})
                places.update({offset + at: block for at, block in enumerate(run)})
                if fresh:
                    found.references.update(run)
            elif kind == TYPE_NAME:
                for name in decode_names(ino, value):
                    held.names.setdefault(name.ino, []).append((ino, name.name))
            elif kind == TYPE_INODE:
                held.inodes[ino] = decode_inode(ino, value)
            elif kind == TYPE_INLINE:
                held.inline[ino] = value
            elif kind == TYPE_ORPHAN:
                held.orphans.add(offset)


def _walk(
    device: Device,
    found: Holdings,
    held: Held,
    done: dict[int, int],
    counted: set[tuple[int, int]],
) -> list[NodeImage]:
    superblock = found.superblock
    images = []
    waiting = [held.pointer]
    while waiting:
        pointer = waiting.pop()
        if pointer.block in held.node_at:
            continue
        data = device.read(pointer.block * BLOCK_SIZE_BYTES, NODE_SIZE_BYTES)
        image = decode_node(data, pointer, superblock.image_id, superblock.seed, None)
        images.append(image)
        held.node_at[pointer.block] = (image.level, pointer.birth, pointer.twin)
        held.node_blocks.update(_node_blocks(pointer))
        if image.level:
            children = [decode_pointer(value) for value in image.values]
            children = children[done.get(pointer.block, 0) :]
            if (pointer.block, image.level) not in counted:
                counted.add((pointer.block, image.level))
                for child in children:
                    found.references.update(_node_blocks(child))
            waiting += children
    return images
