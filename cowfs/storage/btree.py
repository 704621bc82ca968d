"""The B+tree: sorted byte keys to opaque values, copied on write.

One implementation for every tree. This file changes trees; tree_reader.py reads them. A change
shadows the nodes from the root to the leaf (store.py), then changes the copies in place. A value is
bytes, or an object with `len()` and `encode()` whose bytes are known only when the leaf is written,
such as a record that points at a tree of the same commit.

A node splits when it overflows. A node below a quarter full joins a neighbour when both together
fill three quarters of a node or less.

Each change happens whole or not at all, also where nodes are damaged (C9). So an operation
*reaches* a key before it changes the key: that shadows the leaf. Until the next freeze, every
change of a key in the range of a reached leaf finds all that it needs in memory, also after the
leaf was split, joined or dropped. A tree that has an `operation` asserts this order (operation.py).

Keeps I5. Source: Rodeh 2008; FORMAT.md "Nodes".
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from cowfs.errors import CorruptError, DeviceError
from cowfs.storage.format import (
    ENTRY_OVERHEAD_BYTES,
    NODE_CAPACITY_BYTES,
    NODE_LEVEL_MAX,
    POINTER_BYTES,
    Pointer,
)
from cowfs.storage.node import Node
from cowfs.storage.operation import CHANGING, REACHING, Operation
from cowfs.storage.store import References, Store
from cowfs.storage.tree_reader import Path, TreeReader, upper_bound

MERGE_BELOW_BYTES = NODE_CAPACITY_BYTES // 4
MERGED_BYTES_MAX = NODE_CAPACITY_BYTES * 3 // 4
# A node whose overflowing entry is in its last tenth splits there: ascending keys leave full nodes.
APPEND_SHARE = 0.9

Renew = Callable[[list[bytes], list[Any]], list[tuple[bytes, Any]]]
DAMAGE = (CorruptError, DeviceError)


def no_references(keys: list[bytes], values: list[Any]) -> list[tuple[int, int]]:
    """The `references` of a tree whose leaves point at no data."""
    return []


class Tree(TreeReader):
    """A tree of one store.

    Reach a key before changing it: `reach` raises CorruptError or DeviceError (EIO), and the tree
    has the same entries as before. A change of a reached key cannot fail.

    Args:
        store: that holds its nodes.
        root: the root node or its pointer.
        owner: root id written into new nodes.
        node_count: nodes reachable from the root.
        references: gives the data runs that the items of a leaf point at.

    Attributes:
        operation: whose steps the tree asserts; None where no order is asserted.
        end_reached: the generation in which `reach_end` has nothing more to do.
    """

    __slots__ = (
        "_emptied",
        "_found_key",
        "_found_leaf",
        "_found_path",
        "_head_to",
        "_reached_from",
        "_reached_generation",
        "_reached_to",
        "_tail_from",
        "end_reached",
        "node_count",
        "operation",
        "owner",
        "references",
    )

    def __init__(
        self,
        store: Store,
        root: Node | Pointer,
        owner: int,
        node_count: int,
        references: References = no_references,
    ) -> None:
        super().__init__(store, root)
        self.owner = owner
        self.node_count = node_count
        self.references = references
        self.operation: Operation | None = None
        self._emptied: list[bytes] = []  # a key in the range of each empty leaf, until the freeze
        # The key reached last, its leaf and the path to it, until a node is split, joined or
        # placed: the next change is nearly always of this key, and needs no descent.
        self._found_key = b""
        self._found_leaf: Node | None = None
        self._found_path: Path = []
        # What was reached in `_reached_generation`: keys below `_head_to` (the first leaf, which
        # has orphan marks), from `_reached_from` to below `_reached_to` (the last leaf reached),
        # and from `_tail_from` on (the last leaf of the tree, which gets new inodes).
        self._reached_generation = 0
        self._head_to = b""
        self._reached_from = b""
        self._reached_to: bytes | None = b""
        self._tail_from: bytes | None = None
        self.end_reached = 0

    @classmethod
    def empty(cls, store: Store, owner: int, references: References = no_references) -> "Tree":
        """A new tree: one empty leaf."""
        return cls(store, store.new_node(0, [], [], 0, owner), owner, 1, references)

    # --- changing ---------------------------------------------------------------------------------

    def _writable_leaf(self, key: bytes, path: Path) -> Node:
        """The leaf whose range contains `key`, shadowed with all nodes above it; fill `path`."""
        store = self.store
        generation = store.generation
        node = self.root_node()
        if node.generation != generation:
            node = store.shadow(node, self.owner, self.references)
        self.root = node
        while node.level:
            at = bisect_right(node.keys, key, 1) - 1
            child = node.values[at]
            if child.__class__ is Pointer:
                child = store.load(child, node.level - 1)
            if child.generation != generation:
                child = store.shadow(child, self.owner, self.references)
                node.values[at] = child
            path.append((node, at))
            node = child
        return node

    def reach(self, key: bytes) -> None:
        """Shadow the leaf of `key`, so that changes of `key` cannot fail until the next freeze.

        Raises:
            CorruptError, DeviceError: a node cannot be read (EIO); no entry was changed.
        """
        if self.operation is not None:
            assert self.operation.step == REACHING, "reached outside the second step"
        if self._reached_generation != self.store.generation:
            self._reached_generation = self.store.generation
            self._reached_to, self._head_to, self._tail_from = b"", b"", None
        if self._is_reached(key):
            return
        path: Path = []
        self._found_leaf = self._writable_leaf(key, path)
        self._found_key, self._found_path = key, path
        start, stop = b"", None
        for node, at in path:
            if at:
                start = node.keys[at]
            if at + 1 < len(node.keys):
                stop = node.keys[at + 1]
        if not start and stop is not None:
            self._head_to = stop
        else:
            self._reached_from, self._reached_to = start, stop
        if stop is None:
            self._tail_from = start
            self.end_reached = self._reached_generation

    def _is_reached(self, key: bytes) -> bool:
        tail, stop = self._tail_from, self._reached_to
        if key < self._head_to or (tail is not None and key >= tail):
            return True
        return self._reached_from <= key and (stop is None or key < stop)

    def reach_range(self, first: bytes, last: bytes) -> None:
        """Reach all keys with first <= key <= last. Raises as `reach`."""
        at: bytes | None = first
        while at is not None and at <= last:
            self.reach(at)
            if self._tail_from is not None and at >= self._tail_from:
                return
            at = self._head_to if at < self._head_to else self._reached_to

    def reach_end(self, key: bytes) -> None:
        """Reach a key above all that the tree has ever held.

        A last leaf, or a node above it, that cannot be read stays as it is: the key gets a new leaf
        behind it.

        Raises:
            CorruptError, DeviceError: the root, or a page of refcounts, cannot be read (EIO).
        """
        if self.end_reached == self.store.generation:
            return
        try:
            self.reach(key)
        except DAMAGE:
            self._append_leaf(key)
            self.reach(key)

    def _append_leaf(self, key: bytes) -> None:
        """Add an empty leaf for `key` behind the last leaf, which cannot be read."""
        store = self.store
        node = store.shadow(self.root_node(), self.owner, self.references)
        self.root = node
        path: Path = []
        while node.level:
            at = len(node.keys) - 1
            try:
                child = self._child(node, at)
            except DAMAGE:
                if node.keys[at] >= key:
                    raise
                break
            child = store.shadow(child, self.owner, self.references)
            node.values[at] = child
            path.append((node, at))
            node = child
        else:
            return  # the last leaf can be read now
        fresh = store.new_node(0, [], [], 0, self.owner)
        for level in range(1, node.level):
            used = ENTRY_OVERHEAD_BYTES + len(key) + POINTER_BYTES
            fresh = store.new_node(level, [key], [fresh], used, self.owner)
        self.node_count += max(1, node.level)
        node.keys.append(key)
        node.values.append(fresh)
        node.used_bytes += ENTRY_OVERHEAD_BYTES + len(key) + POINTER_BYTES
        self._emptied.append(key)
        self._split(node, len(node.keys) - 1, path)

    def put(self, key: bytes, value: Any) -> None:
        """Insert an entry, or replace the value of an existing key."""
        self._require_changing()
        if key == self._found_key and self._found_leaf is not None:
            self._put_into(self._found_leaf, key, value, self._found_path)
            return
        path: Path = []
        self._put_into(self._writable_leaf(key, path), key, value, path)

    def put_ascending(self, entries: Iterable[tuple[bytes, Any]]) -> None:
        """Put entries whose keys ascend, with one descent for each leaf."""
        self._require_changing()
        leaf: Node | None = None
        high: bytes | None = None
        for key, value in entries:
            if leaf is None or (high is not None and key >= high):
                path: Path = []
                leaf = self._writable_leaf(key, path)
                high = upper_bound(path)
            if self._put_into(leaf, key, value, path):
                leaf = None

    def _require_changing(self) -> None:
        if self.operation is not None:
            assert self.operation.step == CHANGING, "changed outside the third step"

    def _put_into(self, leaf: Node, key: bytes, value: Any, path: Path) -> bool:
        """Put an entry into its writable leaf. Returns whether nodes were split or joined."""
        keys = leaf.keys
        at = bisect_left(keys, key)
        if at < len(keys) and keys[at] == key:
            leaf.used_bytes += len(value) - len(leaf.values[at])
            leaf.values[at] = value
        else:
            keys.insert(at, key)
            leaf.values.insert(at, value)
            leaf.used_bytes += ENTRY_OVERHEAD_BYTES + len(key) + len(value)
        if leaf.used_bytes > NODE_CAPACITY_BYTES:
            self._split(leaf, at, path)
            return True
        if leaf.used_bytes < MERGE_BELOW_BYTES and path:
            self._join(leaf, path, key)  # the new value may be shorter
            return True
        return False

    def delete(self, key: bytes) -> bool:
        """Remove `key`. Returns whether the tree had it."""
        self._require_changing()
        if key == self._found_key and self._found_leaf is not None:
            leaf, path = self._found_leaf, self._found_path
        else:
            path = []
            leaf = self._writable_leaf(key, path)
        at = bisect_left(leaf.keys, key)
        if at == len(leaf.keys) or leaf.keys[at] != key:
            return False
        leaf.used_bytes -= ENTRY_OVERHEAD_BYTES + len(key) + len(leaf.values[at])
        del leaf.keys[at]
        del leaf.values[at]
        if leaf.used_bytes < MERGE_BELOW_BYTES and path:
            self._join(leaf, path, key)
        return True

    def delete_ascending(self, keys: Sequence[bytes]) -> None:
        """Remove keys that ascend, with one descent for each leaf."""
        self._require_changing()
        at = 0
        while at < len(keys):
            path: Path = []
            leaf = self._writable_leaf(keys[at], path)
            high = upper_bound(path)
            stop = len(keys) if high is None else bisect_left(keys, high, at)
            gone = set(keys[at:stop])
            kept = [index for index, key in enumerate(leaf.keys) if key not in gone]
            if len(kept) < len(leaf.keys):
                leaf.keys[:] = [leaf.keys[index] for index in kept]
                leaf.values[:] = [leaf.values[index] for index in kept]
                leaf.used_bytes = sum(self._entry_sizes(leaf))
                if leaf.used_bytes < MERGE_BELOW_BYTES and path:
                    self._join(leaf, path, keys[at])
            at = stop

    def pop_range(self, start: bytes, stop: bytes) -> list[tuple[bytes, Any]]:
        """Remove and return entries with start <= key < stop: those of the first leaf that has any.

        Call it until it returns an empty list. Leaves without such entries are not shadowed.
        """
        keys = self._leaf(start).keys
        at = bisect_left(keys, start)
        if at < len(keys):
            if keys[at] >= stop:
                return []
            start = keys[at]
        else:  # `start` is above this leaf's last key
            found = next(self.leaf_slices(start, stop), None)
            if found is None:
                return []
            start = found[0][found[2]]
        return self.pop_from(start, stop)

    def pop_from(self, start: bytes, stop: bytes) -> list[tuple[bytes, Any]]:
        """As `pop_range`, where `start` is the key of an entry."""
        self._require_changing()
        path: Path = []
        leaf = self._writable_leaf(start, path)
        first = bisect_left(leaf.keys, start)
        last = bisect_left(leaf.keys, stop, first)
        removed = list(zip(leaf.keys[first:last], leaf.values[first:last], strict=True))
        del leaf.keys[first:last]
        del leaf.values[first:last]
        for key, value in removed:
            leaf.used_bytes -= ENTRY_OVERHEAD_BYTES + len(key) + len(value)
        if leaf.used_bytes < MERGE_BELOW_BYTES and path:
            self._join(leaf, path, start)
        return removed

    def rewrite(self, start: bytes, stop: bytes, renew: Renew) -> bool:
        """Replace the entries from the last one with key <= `start` up to `stop`, in one leaf.

        Args:
            renew: gets the keys and the values of these entries, and returns the entries that
                replace them: ascending, in the same range, except that the last key may be `stop`;
                at least one, and at most two more than before. When it raises, nothing is changed.

        Returns:
            Whether the entries were replaced; False where a second leaf may hold some of them.
        """
        self._require_changing()
        path: Path = []
        leaf = self._writable_leaf(start, path)
        keys = leaf.keys
        first = bisect_left(keys, start)
        last = bisect_left(keys, stop, first)
        if first == len(keys) or keys[first] != start:
            if not first:
                return False
            first -= 1
        if last == len(keys):
            high = upper_bound(path)
            if high is not None and high <= stop:  # a key `stop` belongs to the next leaf
                return False
        old_keys, old_values = keys[first:last], leaf.values[first:last]
        entries = renew(old_keys, old_values)
        keys[first:last] = [key for key, _ in entries]
        leaf.values[first:last] = [value for _, value in entries]
        leaf.used_bytes += ENTRY_OVERHEAD_BYTES * (len(entries) - len(old_keys))
        leaf.used_bytes += sum([len(key) + len(value) for key, value in entries])
        leaf.used_bytes -= sum(map(len, old_keys)) + sum(map(len, old_values))
        if leaf.used_bytes > NODE_CAPACITY_BYTES:
            self._split(leaf, 0, path)  # in the middle: several entries were added
        elif leaf.used_bytes < MERGE_BELOW_BYTES and path:
            self._join(leaf, path, start)
        return True

    def _split(self, node: Node, at: int, path: Path) -> None:
        """Split an overfull node, and overfull parents. `at`: index of the new entry."""
        self._found_leaf = None
        while node.used_bytes > NODE_CAPACITY_BYTES:
            keys, values = node.keys, node.values
            sizes = self._entry_sizes(node)
            cut = at if at >= len(keys) * APPEND_SHARE else _half(sizes)
            right_used = sum(sizes[cut:])
            if right_used > NODE_CAPACITY_BYTES:  # few entries, but large ones
                cut = _half(sizes)
                right_used = sum(sizes[cut:])
            right = self.store.new_node(
                node.level, keys[cut:], values[cut:], right_used, self.owner
            )
            self.node_count += 1
            del keys[cut:]
            del values[cut:]
            node.used_bytes -= right_used
            if not path:
                root_keys = [keys[0], right.keys[0]]
                used = sum(map(len, root_keys)) + 2 * (ENTRY_OVERHEAD_BYTES + POINTER_BYTES)
                if node.level == NODE_LEVEL_MAX:
                    raise CorruptError("node", node.block, "the tree is too high", node.level)
                self.root = self.store.new_node(
                    node.level + 1, root_keys, [node, right], used, self.owner
                )
                self.node_count += 1
                return
            parent, index = path.pop()
            # Only the first key of the parent, which bounds nothing, can be above the child's keys.
            if keys[0] < parent.keys[index]:
                self._replace_key(parent, index, keys[0])
            at = index + 1
            parent.keys.insert(at, right.keys[0])
            parent.values.insert(at, right)
            parent.used_bytes += ENTRY_OVERHEAD_BYTES + len(right.keys[0]) + POINTER_BYTES
            node = parent

    def _entry_sizes(self, node: Node) -> list[int]:
        if node.level:
            return [ENTRY_OVERHEAD_BYTES + POINTER_BYTES + len(key) for key in node.keys]
        return [
            ENTRY_OVERHEAD_BYTES + len(key) + len(value)
            for key, value in zip(node.keys, node.values, strict=True)
        ]

    def place(self) -> list[Node]:
        """Give every dirty node its address, for a commit.

        Returns:
            The dirty nodes, children before parents.
        """
        self._found_leaf = None
        for key in self._emptied:
            path: Path = []
            leaf = self._writable_leaf(key, path)
            if not leaf.keys and path:
                self._join(leaf, path, key, last=True)
        self._emptied.clear()
        return self.store.place(self.root)

    def _reach_heir(self, path: Path) -> bool:
        """Reach the leaf that takes over the range of the leaf that `path` leads to.

        Returns:
            False if that leaf cannot be read. True as well where no other leaf is left.
        """
        store = self.store
        for parent, at in reversed(path):
            if len(parent.keys) == 1:
                continue
            node, index = parent, at - 1 if at else 1
            try:
                while node.level:
                    child = self._child(node, index)
                    child = store.shadow(child, self.owner, self.references)
                    node.values[index] = child
                    node = child
                    index = len(node.keys) - 1 if at else 0
            except DAMAGE:
                return False
            return True
        return True

    def _join(self, node: Node, path: Path, key: bytes, *, last: bool = False) -> None:
        """Join an underfull node with a neighbour if both fit.

        An empty node is dropped, and the root replaced by its child where it has only one.
        A neighbour that cannot be read is left alone. An empty leaf stays until the freeze if the
        leaf that takes over its range cannot be read.

        Args:
            key: in the range of `node`.
            last: nothing more will be put into that range.
        """
        self._found_leaf = None
        store = self.store
        while path and node.used_bytes < MERGE_BELOW_BYTES:
            parent, at = path.pop()
            if not node.keys:
                if not (node.level or last or self._reach_heir([*path, (parent, at)])):
                    self._emptied.append(key)
                    return
                self._remove_child(parent, at)
                store.forget(node)
                self.node_count -= 1
            else:
                for left in (at - 1, at):
                    other_at = left if left < at else at + 1
                    if not 0 <= other_at < len(parent.keys):
                        continue
                    try:
                        other = self._child(parent, other_at)
                        if other.used_bytes + node.used_bytes > MERGED_BYTES_MAX:
                            continue
                        other = store.shadow(other, self.owner, self.references)
                    except DAMAGE:
                        continue  # the caller's change is done; joining is optional
                    parent.values[other_at] = other
                    first, second = (other, node) if left < at else (node, other)
                    if node.level:  # its first key bounds nothing; the key in the parent does
                        self._replace_key(second, 0, parent.keys[left + 1])
                    first.keys += second.keys
                    first.values += second.values
                    first.used_bytes += second.used_bytes
                    self._remove_child(parent, left + 1)
                    store.forget(second)
                    self.node_count -= 1
                    break
            node = parent
        root = self.root
        while isinstance(root, Node) and root.level and len(root.keys) <= 1:
            if not root.keys:  # all children are gone: the tree is one empty leaf again
                store.forget(root)
                self.root = store.new_node(0, [], [], 0, self.owner)
                return
            child = root.values[0]
            store.forget(root)
            self.node_count -= 1
            self.root = child
            if child.__class__ is Pointer:
                return
            root = child
            if root.generation != store.generation:
                return

    def _replace_key(self, node: Node, at: int, key: bytes) -> None:
        node.used_bytes += len(key) - len(node.keys[at])
        node.keys[at] = key

    def _remove_child(self, parent: Node, at: int) -> None:
        parent.used_bytes -= ENTRY_OVERHEAD_BYTES + len(parent.keys[at]) + POINTER_BYTES
        del parent.keys[at]
        del parent.values[at]


def _half(sizes: list[int]) -> int:
    """The index at which two parts are about the same size; neither part is empty."""
    half = sum(sizes) // 2
    total = 0
    for index, size in enumerate(sizes[:-1]):
        total += size
        if total >= half:
            return index + 1
    return len(sizes) - 1
