"""Single cases of the B+tree that a random walk meets too seldom."""

import pytest

from cowfs.storage.btree import Tree
from cowfs.storage.node import Node
from cowfs.storage.store import Store, blank_superblock
from tests.model.devices import MemoryDevice
from tests.storage.test_btree_machine import require_sound

TOTAL_BLOCKS = 32768


@pytest.fixture
def tree() -> Tree:
    store = Store(MemoryDevice(TOTAL_BLOCKS), blank_superblock(TOTAL_BLOCKS), writable=True)
    return Tree.empty(store, 1)


def test_put_large_value_near_the_end_of_a_full_leaf_splits_into_nodes_that_fit(
    tree: Tree,
) -> None:
    """Promise I5: a node never outgrows its blocks, wherever in a full leaf an entry goes."""
    expected = {}
    for number in range(150):  # small ones first: 90 % of the entries, a fifth of the bytes
        expected[b"a%03d" % number] = b""
    for number in range(10):
        expected[b"b%03d" % number] = b"x" * 1450
    expected[b"b"] = b"y" * 4200
    for key, value in expected.items():
        tree.put(key, value)
    require_sound(tree)
    assert dict(tree.items(b"a", b"c")) == expected


def test_split_below_a_lost_first_child_keeps_the_neighbour_reachable(tree: Tree) -> None:
    """Promise: keys of any lengths stay reachable, however the nodes above them split."""
    store = tree.store

    def leaf(*keys: bytes) -> Node:
        return store.new_node(
            0, list(keys), [b"v" * 4000] * len(keys), sum(4004 + len(key) for key in keys), 1
        )

    def inner(level: int, keys: list[bytes], children: list[Node]) -> Node:
        return store.new_node(level, keys, list(children), sum(44 + len(key) for key in keys), 1)

    # The right inner node has lost its first child: its first key is above its bound "abcx".
    left = inner(1, [b"a", b"abcw"], [leaf(b"aa"), leaf(b"abcw", b"abcww")])
    many = [b"abf%03d" % number + b"z" * 275 for number in range(50)]
    right = inner(
        1,
        [b"abd", *many],
        [leaf(b"abcy1", b"abcy2", b"abcy3", b"abcy4"), *(leaf(key) for key in many)],
    )
    tree.root = inner(2, [b"a", b"abcx"], [left, right])
    tree.node_count = 3 + len(left.keys) + len(right.keys)
    require_sound(tree)
    before = dict(tree.items(b"a", b"b"))
    tree.put(b"abcy5", b"v" * 4200)
    require_sound(tree)
    assert dict(tree.items(b"a", b"b")) == before | {b"abcy5": b"v" * 4200}
    assert tree.get(b"abcw") == b"v" * 4000


def test_emptied_tree_is_one_leaf_again(tree: Tree) -> None:
    """Promise: a tree without entries is a leaf without entries, of whatever height it was."""
    for number in range(5000):
        tree.put(b"%06d" % number + b"k" * 200, b"v" * 100)
    assert tree.root_node().level == 2
    while tree.pop_range(b"0", b"1"):
        pass
    require_sound(tree)
    assert tree.root_node().level == 0
    assert tree.node_count == 1
    assert tree.store.dirty_nodes == 1
