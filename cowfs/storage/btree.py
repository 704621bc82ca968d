"""The B+tree: sorted byte keys to opaque values, copied on write.

One implementation for every tree. A change shadows the path from the root (store.py) and then works in
place. A value is bytes, or anything with `len()` and `encode()` whose bytes are known only when it is
written (a record that points at a tree of the same commit).

In an inner node every key but the first bounds its child from below; the first bounds nothing.
Nodes split when they overflow; a node below a quarter joins a neighbour when both fit. Iterators hold
no lock: a tree must not change while one of its iterators is used.

Each change happens whole or not at all, also where it meets damage. What a change must not meet is
*reached* first: the leaf is shadowed then, and until the next freeze every change of a key in its range
finds all that it needs in memory, whatever becomes of the leaf (C9). A tree that has an `operation`
asserts that order (operation.py).
Keeps I5. Source: Rodeh 2008; FORMAT.md "Nodes".
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
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

MERGE_BELOW_BYTES = NODE_CAPACITY_BYTES // 4
MERGED_BYTES_MAX = NODE_CAPACITY_BYTES * 3 // 4
# An entry put this close to the end of a full node splits off there: ascending keys leave full nodes.
APPEND_SHARE = 0.9

Path = list[tuple[Node, int]]
Renew = Callable[[list[bytes], list[Any]], list[tuple[bytes, Any]]]
DAMAGE = (CorruptError, DeviceError)


def no_references(keys: list[bytes], values: list[Any]) -> list[tuple[int, int]]:
    """For trees whose leaves point at no data."""
    return []


class Tree:
    """A tree of one store.

    Args:
        store: that holds its nodes.
        root: the root node or its pointer.
        owner: root id written into new nodes.
        node_count: nodes reachable from the root.
        references: the data runs that a leaf's items point at.

    Attributes:
        operation: whose steps its callers keep; None where nobody's order is asserted.
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
        "root",
        "store",
    )

    def __init__(
        self,
        store: Store,
        root: Node | Pointer,
        owner: int,
        node_count: int,
        references: References = no_references,
    ) -> None:
        self.store = store
        self.root = root
        self.owner = owner
        self.node_count = node_count
        self.references = references
        self.operation: Operation | None = None
        self._emptied: list[bytes] = []  # keys of the leaves without entries, until the freeze
        # The key that was reached last, its leaf and the path to it, until the tree changes its shape:
        # who reaches a key nearly always changes it next.
        self._found_key = b""
        self._found_leaf: Node | None = None
        self._found_path: Path = []
        # The ranges of the leaf that was reached last, and of the tree's first and last leaf when
        # they were: orphan marks are in the one, new inodes in the other.
        self._reached_generation = 0
        self._head_to = b""
        self._reached_from = b""
        self._reached_to: bytes | None = b""
        self._tail_from: bytes | None = None
        self.end_reached = 0  # the generation in which `reach_end` has nothing more to do

    @classmethod
    def empty(cls, store: Store, owner: int, references: References = no_references) -> "Tree":
        """A new tree of one leaf without entries."""
        return cls(store, store.new_node(0, [], [], 0, owner), owner, 1, references)

    # --- reading ------------------------------------------------------------------------------------

    def root_node(self) -> Node:
        root = self.root
        if root.__class__ is Pointer:
            return self.store.load(root, None)
        return root  # type: ignore[return-value]

    def _leaf(self, key: bytes) -> Node:
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

    def floor(self, key: bytes) -> tuple[bytes, bytes] | None:
        """The entry with the greatest key not above `key`, or None."""
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
        """The same, one leaf at a time: its keys and values, and which part of them."""
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
            if not node.keys or node.keys[0] <= before:  # else one leaf could be met for ever
                raise CorruptError("node", node.block, "its keys are not above those before it")
            first = 0

    def one_leaf(self, start: bytes, stop: bytes) -> list[tuple[bytes, Any]] | None:
        """The entries with start <= key < stop if one leaf holds all of them, else None."""
        leaf = self._leaf(start)
        keys = leaf.keys
        first = bisect_left(keys, start)
        last = bisect_left(keys, stop, first)
        if last == len(keys):  # the range may go on, unless this is the last leaf of all
            path: Path = []
            self._descend(start, path)
            if _upper_bound(path) is not None:
                return None
        return list(zip(keys[first:last], leaf.values[first:last], strict=True))

    def _descend(self, key: bytes, path: Path) -> Node:
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
        """How many nodes were born after `generation`; fewer are counted if that reads too many.

        A node is not older than those below it, so only newer inner nodes are looked into.

        Args:
            reads: inner nodes to look into, at the most.
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
        """How many nodes lie on the paths to keys that ascend."""
        found: set[int] = set()
        at = 0
        while at < len(keys):
            path: Path = []
            leaf = self._descend(keys[at], path)
            found.add(id(leaf))
            found.update(id(node) for node, _ in path)
            high = _upper_bound(path)
            at = len(keys) if high is None else bisect_left(keys, high, at)
        return len(found)

    # --- changing -----------------------------------------------------------------------------------

    def _writable_leaf(self, key: bytes, path: Path) -> Node:
        """The leaf for `key`, it and the path to it shadowed."""
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
        """See to it that changes of `key` meet no damage until the next freeze.

        Raises:
            CorruptError, DeviceError: its leaf cannot be read (EIO); nothing was changed.
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
        """The same for all keys with first <= key <= last."""
        at: bytes | None = first
        while at is not None and at <= last:
            self.reach(at)
            if self._tail_from is not None and at >= self._tail_from:
                return
            at = self._head_to if at < self._head_to else self._reached_to

    def reach_end(self, key: bytes) -> None:
        """The same for a key above all that the tree has ever held.

        A last leaf that cannot be read is left as it is: the key gets a new one behind it.
        """
        if self.end_reached == self.store.generation:
            return
        try:
            self.reach(key)
        except DAMAGE:
            self._append_leaf(key)
            self.reach(key)

    def _append_leaf(self, key: bytes) -> None:
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
            return  # it can be read now
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
        """Insert, or replace the value of an existing key."""
        self._require_changing()
        if key == self._found_key and self._found_leaf is not None:
            self._put_into(self._found_leaf, key, value, self._found_path)
            return
        path: Path = []
        self._put_into(self._writable_leaf(key, path), key, value, path)

    def put_ascending(self, entries: Iterable[tuple[bytes, Any]]) -> None:
        """Put entries whose keys ascend; those of one leaf cost one descent."""
        self._require_changing()
        leaf: Node | None = None
        high: bytes | None = None
        for key, value in entries:
            if leaf is None or (high is not None and key >= high):
                path: Path = []
                leaf = self._writable_leaf(key, path)
                high = _upper_bound(path)
            if self._put_into(leaf, key, value, path):
                leaf = None

    def _require_changing(self) -> None:
        if self.operation is not None:
            assert self.operation.step == CHANGING, "changed outside the third step"

    def _put_into(self, leaf: Node, key: bytes, value: Any, path: Path) -> bool:
        """Put an entry into its writable leaf. Returns whether that changed the nodes above it."""
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
            self._join(leaf, path, key)  # a replaced value may have shrunk
            return True
        return False

    def delete(self, key: bytes) -> bool:
        """Remove `key`. Returns whether it was there."""
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
        """Remove keys that ascend; those of one leaf cost one descent."""
        self._require_changing()
        at = 0
        while at < len(keys):
            path: Path = []
            leaf = self._writable_leaf(keys[at], path)
            high = _upper_bound(path)
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

        An empty answer says that none is left; what is left untouched is not shadowed.
        """
        keys = self._leaf(start).keys
        at = bisect_left(keys, start)
        if at < len(keys):
            if keys[at] >= stop:
                return []
            start = keys[at]
        else:  # between this leaf's last entry and the next one's first
            found = next(self.leaf_slices(start, stop), None)
            if found is None:
                return []
            start = found[0][found[2]]
        return self.pop_from(start, stop)

    def pop_from(self, start: bytes, stop: bytes) -> list[tuple[bytes, Any]]:
        """The same where `start` is known to be an entry's key."""
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
        """Let other entries take the place of those from the one at or below `start` up to `stop`.

        Args:
            renew: gets the keys and the values, gives the entries that replace them: ascending, in the
                same range or the last one at `stop`, at least one and at most two more. What it
                raises changes nothing.

        Returns:
            Whether it was done. It is not where more than one leaf may have to do with it.
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
            high = _upper_bound(path)
            if high is not None and high <= stop:  # an entry at `stop` belongs to the next leaf
                return False
        old_keys, old_values = keys[first:last], leaf.values[first:last]
        entries = renew(old_keys, old_values)
        keys[first:last] = [key for key, _ in entries]
        leaf.values[first:last] = [value for _, value in entries]
        leaf.used_bytes += ENTRY_OVERHEAD_BYTES * (len(entries) - len(old_keys))
        leaf.used_bytes += sum([len(key) + len(value) for key, value in entries])
        leaf.used_bytes -= sum(map(len, old_keys)) + sum(map(len, old_values))
        if leaf.used_bytes > NODE_CAPACITY_BYTES:
            self._split(leaf, 0, path)  # in the middle: there is room for several entries then
        elif leaf.used_bytes < MERGE_BELOW_BYTES and path:
            self._join(leaf, path, start)
        return True

    def _split(self, node: Node, at: int, path: Path) -> None:
        """Cut an overfull node in two, and its parents as they overflow. `at`: the last change."""
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
            if (
                keys[0] < parent.keys[index]
            ):  # only a first key, which bounds nothing, can be too high
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
        """Give every dirty node its address, for a commit. Returns them, children before parents."""
        self._found_leaf = None
        for key in self._emptied:
            path: Path = []
            leaf = self._writable_leaf(key, path)
            if not leaf.keys and path:
                self._join(leaf, path, key, last=True)
        self._emptied.clear()
        return self.store.place(self.root)

    def _reach_heir(self, path: Path) -> bool:
        """Reach the leaf that takes over the range of the one at the end of `path`, which is to go.

        Returns:
            Whether it can be read; where no other leaf is left, nothing need be.
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
        """Join an underfull node with a neighbour if both fit; drop it when empty; lower the root.

        Neighbours that cannot be read are left alone, and an empty leaf stays until the freeze if it
        is one of them that would take over its range.

        Args:
            key: in the range of `node`.
            last: nothing will be put into the range any more.
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
                        continue  # joining is a favour; what was asked for is done already
                    parent.values[other_at] = other
                    first, second = (other, node) if left < at else (node, other)
                    if node.level:  # its first key bounds nothing; the parent's does
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
            if not root.keys:  # every child was emptied: a leaf without entries again
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


def _upper_bound(path: Path) -> bytes | None:
    """The key below which all keys of the leaf at the end of `path` are; None for the last leaf."""
    for node, at in reversed(path):
        if at + 1 < len(node.keys):
            return node.keys[at + 1]
    return None


def _half(sizes: list[int]) -> int:
    """Where to cut so that both parts are about the same size; never at an end."""
    half = sum(sizes) // 2
    total = 0
    for index, size in enumerate(sizes[:-1]):
        total += size
        if total >= half:
            return index + 1
    return len(sizes) - 1
