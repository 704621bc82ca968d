"""Promises about single cases of the B+tree that a random walk meets too seldom."""

import random
from collections.abc import Callable

import pytest

from cowfs.errors import CorruptError
from cowfs.storage.btree import Tree
from cowfs.storage.commit import begin, finish
from cowfs.storage.node import Node
from cowfs.storage.store import Store
from cowfs.storage.superblock import blank_superblock
from tests.model.devices import MemoryDevice
from tests.storage.test_btree_machine import require_sound

TOTAL_BLOCKS = 32768


@pytest.fixture
def tree() -> Tree:
    store = Store(MemoryDevice(TOTAL_BLOCKS), blank_superblock(TOTAL_BLOCKS), writable=True)
    return Tree.empty(store, 1)


def makers(
    tree: Tree,
) -> tuple[Callable[..., Node], Callable[[int, list[bytes], list[Node]], Node]]:
    """Functions that make a leaf with large values and an inner node."""
    store = tree.store

    def leaf(*keys: bytes) -> Node:
        used = sum(4004 + len(key) for key in keys)
        return store.new_node(0, list(keys), [b"v" * 4000] * len(keys), used, 1)

    def inner(level: int, keys: list[bytes], children: list[Node]) -> Node:
        return store.new_node(level, keys, list(children), sum(44 + len(key) for key in keys), 1)

    return leaf, inner


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


def test_rewrite_up_to_the_bound_of_its_leaf_leaves_the_last_entry_to_the_next(
    tree: Tree,
) -> None:
    """Promise I5: an entry at the bound of a leaf never lands in the leaf before it."""
    for number in range(12):
        tree.put(b"%03d" % number, b"v" * 2000)
    bound = tree.root_node().keys[1]
    last_before = b"%03d" % (int(bound) - 1)
    tree.delete(bound)  # the bound itself stays

    def renew(keys: list[bytes], values: list[bytes]) -> list[tuple[bytes, bytes]]:
        return [(last_before, b"new"), (bound, b"rest")]

    if not tree.rewrite(last_before, bound, renew):
        for key, value in renew([], []):
            tree.put(key, value)
    require_sound(tree)
    assert tree.get(bound) == b"rest"
    assert tree.get(last_before) == b"new"
    assert [key for key, _ in tree.items(b"000", b"999")] == [b"%03d" % each for each in range(12)]


def test_split_below_a_lost_first_child_keeps_the_neighbour_reachable(tree: Tree) -> None:
    """Promise: keys of any lengths stay reachable, however the nodes above them split."""
    leaf, inner = makers(tree)
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


def test_join_of_a_node_that_lost_its_first_child_keeps_what_came_after(tree: Tree) -> None:
    """Promise: a joined node is bounded by its parent's key, not by its own first one."""
    leaf, inner = makers(tree)
    left = inner(1, [b"a", b"ab"], [leaf(b"a"), leaf(b"ab", b"abb")])
    # The node lost the child before "m"; "c" came later, and went to the child that is first now.
    right = inner(1, [b"m", b"n"], [leaf(b"c", b"mm"), leaf(b"n")])
    far = inner(1, [b"p"], [leaf(b"p", b"pp")])
    tree.root = inner(2, [b"a", b"b", b"p"], [left, right, far])
    tree.node_count = 9
    require_sound(tree)
    assert tree.delete(b"n")
    require_sound(tree)
    assert tree.node_count < 8, "nothing was joined"
    assert tree.get(b"c") is not None
    assert [key for key, _ in tree.items(b"a", b"z")] == [
        *(b"a", b"ab", b"abb", b"c"),
        *(b"mm", b"p", b"pp"),
    ]


def test_emptied_tree_is_one_leaf_again(tree: Tree) -> None:
    """Promise: a tree without entries becomes a single empty leaf, whatever its height was."""
    for number in range(5000):
        tree.put(b"%06d" % number + b"k" * 200, b"v" * 100)
    assert tree.root_node().level == 2
    while tree.pop_range(b"0", b"1"):
        pass
    require_sound(tree)
    assert tree.root_node().level == 0
    assert tree.node_count == 1
    assert tree.store.admission.dirty_nodes == 1


@pytest.mark.parametrize("seed", range(4))
def test_tall_tree_survives_whatever_is_cut_out_of_it(tree: Tree, seed: int) -> None:
    """Promise I5: inner nodes split, join and vanish without losing the way to a key."""
    choice = random.Random(seed)
    model: dict[bytes, bytes] = {}
    tallest = 0
    for turn in range(12):
        prefix = b"%d" % choice.randrange(10)
        for _ in range(3000 if turn == 0 else 1000):
            key = prefix * choice.randrange(1, 4) + choice.randbytes(5)
            key += b"k" * choice.randrange(150, 280)
            model[key] = b"v" * choice.randrange(40)
            tree.put(key, model[key])
        tallest = max(tallest, tree.root_node().level)
        require_sound(tree)
        for _ in range(3):  # cut ranges of all lengths, so that nodes lose their first children
            known = sorted(model)
            first = choice.randrange(len(known))
            count = choice.choice([1, 30, 60, 200, 1000])
            stop = known[min(len(known) - 1, first + count)]
            while removed := tree.pop_range(known[first], stop):
                for key, _ in removed:
                    del model[key]
            require_sound(tree)
        for key in choice.sample(sorted(model), len(model) // 3):
            assert tree.delete(key)
            del model[key]
        require_sound(tree)
        assert dict(tree.items(b"", b"\xff")) == model
        for key in choice.sample(sorted(model), min(len(model), 200)):
            assert tree.get(key) == model[key]
            assert tree.floor(key + b"\0") == (key, model[key])
    assert tallest >= 2


def test_one_leaf_answers_only_for_ranges_that_no_other_leaf_continues(tree: Tree) -> None:
    """Promise: `one_leaf` gives the whole range or nothing, also at the edges of leaves."""
    entries = {b"%04d" % number: b"x" * 400 for number in range(200)}
    for key, value in entries.items():
        tree.put(key, value)
    assert tree.root_node().level, "one leaf is no test"
    whole = 0
    for number in range(199):
        start, stop = b"%04d" % number, b"%04d" % (number + 2)
        expected = [(key, value) for key, value in entries.items() if start <= key < stop]
        found = tree.one_leaf(start, stop)
        assert found is None or found == expected
        whole += found is not None
    assert 100 < whole < 199, "some ranges cross an edge, most do not"
    assert tree.one_leaf(b"0199", b"1") == [(b"0199", entries[b"0199"])], "the last leaf of all"


@pytest.mark.parametrize("place", [0, 1, 5, -1])
def test_range_that_was_reached_takes_keys_though_its_neighbours_are_lost(place: int) -> None:
    """Promise C9: changing a range that was reached needs no other leaf, even if it was emptied."""
    device = MemoryDevice(TOTAL_BLOCKS)
    store = Store(device, blank_superblock(TOTAL_BLOCKS, duplicate_metadata=False), writable=True)
    tree = Tree.empty(store, 1)
    expected = {b"%03d" % number: b"v" * 900 for number in range(200)}
    for key, value in expected.items():
        tree.put(key, value)
    commit = begin(store, tree.place(), catalog_nodes=1, next_root_id=2, clean=False)
    commit.write()
    finish(commit)
    children = list(tree.root_node().values)
    at = place % len(children)
    around = [children[index] for index in (at - 1, at + 1) if 0 <= index < len(children)]
    kept = {pointer.block: device.block(pointer.block) for pointer in around}
    for block in kept:
        device.damage(block)
        store.cache.forget(block)
    store.cache.forget(tree.root_node().block)
    tree.root = tree.root_node().pointer()

    inside = list(store.load(children[at], 0).keys)
    middle = inside[len(inside) // 2]
    tree.reach(middle)
    with pytest.raises(CorruptError):
        tree.reach_range(b"", b"\xff")
    assert len(tree.pop_range(inside[0], inside[-1] + b"x")) == len(inside)
    tree.put(middle, b"again")
    assert tree.get(middle) == b"again"
    assert tree.delete(middle)
    for block, data in kept.items():
        device.put(block, data)
    tree.place()
    require_sound(tree)
    left = {key: value for key, value in expected.items() if key not in inside}
    assert dict(tree.items(b"", b"\xff")) == left
