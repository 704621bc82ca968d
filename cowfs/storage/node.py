"""Nodes in memory, and the bounded cache of clean nodes.

A node is changed in place only while its `generation` is that of the open transaction: nobody else
sees it then. It has no address before its commit (`block` is 0), and no checksum before it is
encoded. The values of an inner node are its children: the child `Node` while that is dirty, else
its `Pointer`.
"""

from collections import OrderedDict
from typing import Any

from cowfs.storage.format import POINTER, NodeImage, Pointer

CACHE_BYTES_DEFAULT = 128 << 20
ENTRY_MEMORY_BYTES = 100  # two Python objects and two list slots, beside their bytes


class Node:
    """One decoded node of a B+tree.

    Attributes:
        block, twin: addresses of the two copies; 0 before the commit, `twin` also where there is
            none.
        checksum: of the encoded node; empty before it is encoded.
        generation: in which the node was born.
        level: 0 is a leaf.
        owner: id of the root whose tree made the node.
        used_bytes: what the entries take in the encoded node.
    """

    __slots__ = (
        "block",
        "checksum",
        "generation",
        "keys",
        "level",
        "owner",
        "twin",
        "used_bytes",
        "values",
    )

    def __init__(
        self,
        level: int,
        keys: list[bytes],
        values: list[Any],
        used_bytes: int,
        generation: int,
        owner: int,
    ) -> None:
        self.level = level
        self.keys = keys
        self.values = values
        self.used_bytes = used_bytes
        self.generation = generation
        self.owner = owner
        self.block = 0
        self.twin = 0
        self.checksum = b""

    def pointer(self) -> Pointer:
        """The pointer to the node, which must have been encoded."""
        assert self.checksum, "pointer to a node that is not encoded"
        return Pointer(self.block, self.twin, self.generation, self.checksum)

    def value_bytes(self) -> list[bytes]:
        """The values as bytes, for encoding. Replaces children by their pointers, for good."""
        values = self.values
        if self.level:
            for index, child in enumerate(values):
                if child.__class__ is Node:
                    values[index] = child.pointer()
            return [POINTER.pack(*child) for child in values]
        for index, value in enumerate(values):
            if value.__class__ is not bytes:
                values[index] = value.encode()
        return values

    @property
    def memory_bytes(self) -> int:
        """Estimate of the memory that the node takes."""
        return self.used_bytes + ENTRY_MEMORY_BYTES * len(self.keys)


def node_from_image(image: NodeImage, pointer: Pointer) -> Node:
    """The clean node that was decoded from the place that `pointer` names."""
    values: list[Any] = image.values
    if image.level:
        values = [Pointer._make(fields) for fields in POINTER.iter_unpack(b"".join(values))]
    node = Node(image.level, image.keys, values, image.used_bytes, image.birth, image.owner)
    node.block, node.twin, node.checksum = pointer.block, pointer.twin, pointer.checksum
    return node


class NodeCache:
    """Clean nodes by block number; the least recently used is dropped first."""

    def __init__(self, limit_bytes: int = CACHE_BYTES_DEFAULT) -> None:
        self.limit_bytes = limit_bytes
        self.size_bytes = 0
        self._nodes: OrderedDict[int, Node] = OrderedDict()
        self._sizes: dict[int, int] = {}

    def get(self, block: int) -> Node | None:
        node = self._nodes.get(block)
        if node is not None:
            self._nodes.move_to_end(block)
        return node

    def put(self, node: Node) -> None:
        size = node.memory_bytes
        self.size_bytes += size - self._sizes.get(node.block, 0)
        self._sizes[node.block] = size
        self._nodes[node.block] = node
        while self.size_bytes > self.limit_bytes and len(self._nodes) > 1:
            block, _ = self._nodes.popitem(last=False)
            self.size_bytes -= self._sizes.pop(block)

    def forget(self, block: int) -> None:
        if self._nodes.pop(block, None) is not None:
            self.size_bytes -= self._sizes.pop(block)
