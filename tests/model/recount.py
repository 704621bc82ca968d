"""A second opinion about refcounts: counts every reference of an image from its formats alone.

It uses the record formats, and nothing of the trees, allocator, space map or checker.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from cowfs.files.items import references
from cowfs.history.records import decode_drop, decode_root
from cowfs.storage.device import Device
from cowfs.storage.format import (
    BLOCK_SIZE_BYTES,
    GROUP_BLOCKS,
    INDEX_FANOUT,
    NODE_BLOCKS,
    NODE_SIZE_BYTES,
    RING_SLOTS,
    NodeImage,
    Pointer,
    Superblock,
    decode_node,
    decode_pointer,
    index_shape,
)
from cowfs.storage.index_pages import decode_index_page
from cowfs.storage.store import References
from cowfs.storage.superblock import read_newest


@dataclass(slots=True)
class Recount:
    """What one generation of an image holds.

    Attributes:
        expected: references of each block, counted by walking.
        recorded: references of each block, as the space map has them.
        system: blocks of the rings, of the log and of the space map itself.
    """

    superblock: Superblock
    expected: Counter[int] = field(default_factory=Counter)
    recorded: Counter[int] = field(default_factory=Counter)
    system: Counter[int] = field(default_factory=Counter)

    @property
    def reachable(self) -> set[int]:
        """All blocks that this generation reaches, without the rings and the log."""
        total = self.superblock.total_blocks
        apart = {*range(RING_SLOTS), *range(total - RING_SLOTS, total)}
        for area in (0, 1):
            apart.update(log_blocks(self.superblock, area))
        return (set(self.expected) | set(self.system)) - apart

    def require_exact(self) -> None:
        """Require I1 and I6, as far as refcounts show them."""
        wrong = {
            block: (self.recorded[block], self.expected[block])
            for block in self.expected.keys() | self.recorded.keys()
            if self.recorded[block] != self.expected[block]
        }
        assert not wrong, f"I1: refcounts (recorded, counted): {dict(sorted(wrong.items())[:20])}"
        twice = [block for block, count in self.system.items() if count > 1]
        assert not twice, f"blocks of the space map named twice: {twice}"
        both = self.expected.keys() & self.system.keys()
        assert not both, f"blocks of the space map in use by a tree: {sorted(both)}"
        assert self.superblock.used_blocks == len(self.expected), "I6: used blocks"
        assert self.superblock.system_blocks == len(self.system), "I6: system blocks"


def log_blocks(superblock: Superblock, area: int) -> list[int]:
    """The blocks of one area of the log, in both copies; none where there is no log."""
    place = superblock.log
    if place is None:
        return []
    start = area * place.area_blocks
    return [copy + at for copy in place.copies for at in range(start, start + place.area_blocks)]


def recount(
    device: Device, generation: int | None = None, data_runs: References = references
) -> Recount:
    """Count the newest generation of an image, or another one that its ring still names.

    Args:
        data_runs: gives the runs of data blocks of a leaf; by default as in trees of files.
    """
    superblock = read_newest(device, generation)
    counted = Recount(superblock)
    _walk_map(device, counted)
    visited: set[int] = set()
    catalog = _nodes(device, counted, superblock.catalog, visited, lambda keys, values: [])
    for image in catalog:
        for key, value in zip(image.keys, image.values, strict=True):
            if image.level:
                continue
            if key[:1] == b"R":
                _nodes(device, counted, decode_root(value).pointer, visited, data_runs)
            elif key[:1] == b"D":
                steps = decode_drop(value).path
                # A half-dropped node no longer refers to its first `done` children.
                skip = {step.pointer.block: step.done for step in steps}
                _nodes(device, counted, steps[0].pointer, visited, data_runs, skip)
    return counted


def _nodes(
    device: Device,
    counted: Recount,
    root: Pointer,
    visited: set[int],
    data_runs: References,
    skip: dict[int, int] | None = None,
) -> list[NodeImage]:
    superblock = counted.superblock
    found = []
    waiting = [root]
    while waiting:
        pointer = waiting.pop()
        for first in (pointer.block, pointer.twin):
            if first:
                counted.expected.update(range(first, first + NODE_BLOCKS))
        if pointer.block in visited:
            continue
        visited.add(pointer.block)
        data = device.read(pointer.block * BLOCK_SIZE_BYTES, NODE_SIZE_BYTES)
        image = decode_node(data, pointer, superblock.image_id, superblock.seed, None)
        found.append(image)
        done = (skip or {}).get(pointer.block, 0)
        if image.level:
            waiting += [decode_pointer(value) for value in image.values[done:]]
        else:
            for first, count in data_runs(image.keys, image.values):
                assert 0 <= first <= first + count <= superblock.total_blocks, "outside the image"
                counted.expected.update(range(first, first + count))
    return found


def _walk_map(device: Device, counted: Recount) -> None:
    superblock = counted.superblock
    total = superblock.total_blocks
    counted.system.update(range(RING_SLOTS))
    counted.system.update(range(total - RING_SLOTS, total))
    for area in (0, 1):
        counted.system.update(log_blocks(superblock, area))
    waiting = [(superblock.space_map, len(index_shape(total)), 0)]
    while waiting:
        pointer, level, number = waiting.pop()
        counted.system.update(block for block in (pointer.block, pointer.twin) if block)
        data = device.read(pointer.block * BLOCK_SIZE_BYTES, BLOCK_SIZE_BYTES)
        if not level:
            page = np.frombuffer(data, "<u4")
            for at in np.flatnonzero(page).tolist():
                counted.recorded[number * GROUP_BLOCKS + at] = int(page[at])
            continue
        entries = decode_index_page(
            data, pointer, level, number, superblock.image_id, superblock.seed
        )
        for at in np.flatnonzero(entries["block"]).tolist():
            entry = entries[at]
            child = Pointer(
                int(entry["block"]),
                int(entry["twin"]),
                int(entry["birth"]),
                entry["checksum"].tobytes(),
            )
            waiting.append((child, level - 1, number * INDEX_FANOUT + at))


def reachable_from(device: Device, root: Pointer) -> set[int]:
    """All blocks below one root of the newest generation, twins included."""
    counted = Recount(read_newest(device))
    _nodes(device, counted, root, set(), references)
    return set(counted.expected)
