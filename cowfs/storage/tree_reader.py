"""Reading a B+tree: look a key up, go through a range, count nodes.

In an inner node every key but the first bounds its child from below; the first key bounds nothing.
An iterator holds no lock: a tree must not change while one of its iterators is used. Changing a
tree is in btree.py.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

from cowfs.errors import CorruptError
from cowfs.storage.format import Pointer
from cowfs.storage.node import Node
from cowfs.storage.store import Store

Path = list[tuple[Node, int]]  # from the root: an inner node, and the index of the child taken


class TreeReader:
    """The part of `Tree` that changes nothing.

    All methods raise CorruptError when a node is damaged in both copies, and DeviceError when it
    cannot be read (C9).

    Args:
        store: that holds the nodes.
        root: the root node or its pointer.
    """

    __slots__ = ("root", "store")

    def __init__(self, store: Store, root: Node | Pointer) -> None:
        self.store = store
        self.root = root

    def root_node(self) -> Node:
        """The root, loaded if necessary. Raises as the class says."""
        root = self.root
        if root.__class__ is Pointer:
            return self.store.load(root, None)
        return root  # type: ignore[return-value]

    def _leaf(self, key: bytes) -> Node:
        """The leaf whose range contains `key`."""
        node = self.root_node()
        load = self.store.load
        while node.level:
            child = node.values[bisect_right(node.keys, key, 1) - 1]
            if child.__class__ is Pointer:
                child = load(child, node.level - 1)
            node = child
        return node

    def get(self, key: bytes) -> Any:
        """The value of `key`, or None."""
        node = self._leaf(key)
        keys = node.keys
        at = bisect_left(keys, key)
        if at < len(keys) and keys[at] == key:
            return node.values[at]
        return None

    def floor(self, key: bytes) -> tuple[bytes, Any] | None:
        """The entry (key, value) with the greatest key <= `key`, or None."""
        path: Path = []
        node = self._descend(key, path)
        at = bisect_right(node.keys, key) - 1
        while at < 0:
            while path and path[-1][1] == 0:
                path.pop()
            if not path:
                return None
            parent, index = path.pop()
            path.append((parent, index - 1))
            node = self._child(parent, index - 1)
            while node.level:
                path.append((node, len(node.keys) - 1))
                node = self._child(node, len(node.keys) - 1)
            if not node.keys:
                raise CorruptError("node", node.block, "a leaf below the root is empty")
            at = len(node.keys) - 1
        return node.keys[at], node.values[at]

    def items(self, start: bytes, stop: bytes) -> Iterator[tuple[bytes, Any]]:
        """All entries with start <= key < stop, ascending."""
        for keys, values, first, last in self.leaf_slices(start, stop):
            for at in range(first, last):
                yield keys[at], values[at]

    def leaf_slices(
        self, start: bytes, stop: bytes
    ) -> Iterator[tuple[list[bytes], list[Any], int, int]]:
        """The entries with start <= key < stop, one leaf at a time.

        Yields:
            (keys, values, first, last): the lists of a leaf, of which [first:last] are in the
            range.
                They are the leaf's own lists: do not change them.
        """
        path: Path = []
        node = self._descend(start, path)
        first = bisect_left(node.keys, start)
        while True:
            last = bisect_left(node.keys, stop, first)
            if first < last:
                yield node.keys, node.values, first, last
            if last < len(node.keys):
                return
            while path and path[-1][1] + 1 == len(path[-1][0].keys):
                path.pop()
            if not path:
                return
            parent, index = path.pop()
            path.append((parent, index + 1))
            before = node.keys[-1] if node.keys else stop
            node = self._child(parent, index + 1)
            while node.level:
                path.append((node, 0))
                node = self._child(node, 0)
            if not node.keys or node.keys[0] <= before:  # else a loop could be endless
                raise CorruptError("node", node.block, "its keys are not above those before it")
            first = 0

    def one_leaf(self, start: bytes, stop: bytes) -> list[tuple[bytes, Any]] | None:
        """The entries with start <= key < stop if one leaf holds all of them, else None."""
        leaf = self._leaf(start)
        keys = leaf.keys
        first = bisect_left(keys, start)
        last = bisect_left(keys, stop, first)
        if last == len(keys):  # the next leaf may have more, if there is one
            path: Path = []
            self._descend(start, path)
            if upper_bound(path) is not None:
                return None
        return list(zip(keys[first:last], leaf.values[first:last], strict=True))

    def _descend(self, key: bytes, path: Path) -> Node:
        """The leaf whose range contains `key`; append the way to it to `path`."""
        node = self.root_node()
        while node.level:
            at = bisect_right(node.keys, key, 1) - 1
            path.append((node, at))
            node = self._child(node, at)
        return node

    def _child(self, node: Node, at: int) -> Node:
        child = node.values[at]
        if child.__class__ is Pointer:
            child = self.store.load(child, node.level - 1)
        return child  # type: ignore[no-any-return]

    def count_newer(self, generation: int, reads: int) -> int:
        """How many nodes were born after `generation`, or fewer where that would read too many.

        A node is never older than the nodes below it. So only inner nodes that were born after
        `generation` are read.

        Args:
            reads: limit of the inner nodes to read.
        """
        root = self.root
        birth = root.birth if root.__class__ is Pointer else root.generation  # type: ignore[union-attr]
        if birth <= generation:
            return 0
        count = 1
        waiting = [self.root_node()]
        while waiting and reads:
            node = waiting.pop()
            reads -= 1
            for at in range(len(node.values) if node.level else 0):
                child = node.values[at]
                birth = child.birth if child.__class__ is Pointer else child.generation
                if birth > generation:
                    count += 1
                    if node.level > 1:
                        waiting.append(self._child(node, at))
        return count

    def count_nodes(self, keys: Sequence[bytes]) -> int:
        """How many nodes lie on the paths from the root to `keys`, which ascend."""
        found: set[int] = set()
        at = 0
        while at < len(keys):
            path: Path = []
            leaf = self._descend(keys[at], path)
            found.add(id(leaf))
            found.update(id(node) for node, _ in path)
            high = upper_bound(path)
            at = len(keys) if high is None else bisect_left(keys, high, at)
        return len(found)


def upper_bound(path: Path) -> bytes | None:
    """The end of the range of the leaf that `path` leads to; None for the last leaf of the tree."""
    for node, at in reversed(path):
        if at + 1 < len(node.keys):
            return node.keys[at + 1]
    return None
