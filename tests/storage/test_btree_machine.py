"""Promise: the B+tree agrees with a sorted dictionary, over commits, crashes and shared roots."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cowfs.errors import DeviceError
from cowfs.history.catalog import Catalog
from cowfs.history.records import RootKind, RootRecord
from cowfs.storage.btree import Tree
from cowfs.storage.commit import Commit, begin, finish
from cowfs.storage.format import (
    ENTRY_OVERHEAD_BYTES,
    KEY_BYTES_MAX,
    NODE_CAPACITY_BYTES,
    POINTER_BYTES,
    VALUE_BYTES_MAX,
    Pointer,
)
from cowfs.storage.node import Node
from cowfs.storage.store import Store
from cowfs.storage.superblock import blank_superblock, read_newest
from tests.model.devices import Fault, FaultDevice, MemoryDevice
from tests.model.recount import recount
from tests.model.reference import DictTree
from tests.sizes import machine_settings

TOTAL_BLOCKS = 32768
PREFIXES = [b"", b"a", b"ab", b"abc" * 20, b"\xff" * 3]

keys = st.one_of(
    st.binary(min_size=1, max_size=3),
    st.binary(min_size=1, max_size=KEY_BYTES_MAX),
    st.builds(
        lambda prefix, rest: (prefix + rest)[:KEY_BYTES_MAX],
        st.sampled_from(PREFIXES),
        st.binary(min_size=1, max_size=40),
    ),
)
value_sizes = st.one_of(
    st.integers(0, 60), st.integers(0, VALUE_BYTES_MAX), st.just(VALUE_BYTES_MAX)
)


def value_of(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


def no_data(_keys: list[bytes], _values: list[bytes]) -> list[tuple[int, int]]:
    return []


def require_sound(tree: Tree) -> None:
    """Require I5, and that the tree's own counters are right."""
    count = 0

    def walk(node: Node, low: bytes | None, high: bytes | None) -> None:
        nonlocal count
        count += 1
        assert node.used_bytes <= NODE_CAPACITY_BYTES, "a node outgrew its blocks"
        assert all(a < b for a, b in zip(node.keys, node.keys[1:], strict=False)), (
            "keys not ascending"
        )
        sizes = [POINTER_BYTES if node.level else len(value) for value in node.values]
        used = sum(map(len, node.keys)) + sum(sizes) + ENTRY_OVERHEAD_BYTES * len(sizes)
        assert used == node.used_bytes, "used_bytes is wrong"
        assert node is tree.root_node() or node.keys, "an empty node below the root"
        if not node.level:
            assert all(low is None or key >= low for key in node.keys)
            assert all(high is None or key < high for key in node.keys)
            return
        for at in range(len(node.keys)):
            child = tree._child(node, at)
            assert child.level == node.level - 1
            first = low if at == 0 else node.keys[at]
            last = high if at + 1 == len(node.keys) else node.keys[at + 1]
            walk(child, first, last)

    walk(tree.root_node(), None, None)
    assert count == tree.node_count, "node_count is wrong"


class TreeMachine(RuleBasedStateMachine):
    """One tree "main" and snapshots of it, each a root record of a catalog."""

    def __init__(self) -> None:
        super().__init__()
        self.model = DictTree()
        self.kept: dict[str, DictTree] = {}
        self.inflight: Commit | None = None
        self.states: dict[int, tuple[DictTree, dict[str, DictTree]]] = {}
        self.acknowledged = 0

    @initialize(copies=st.booleans(), cache_bytes=st.sampled_from([1, 50_000, 1 << 27]))
    def make(self, copies: bool, cache_bytes: int) -> None:
        self.cache_bytes = cache_bytes
        self.disk = MemoryDevice(TOTAL_BLOCKS)
        self.device = FaultDevice(self.disk)
        blank = blank_superblock(TOTAL_BLOCKS, duplicate_metadata=copies)
        self.store = Store(self.device, blank, writable=True, cache_bytes=cache_bytes)
        self.catalog = Catalog(Tree.empty(self.store, 0), 1)
        self.tree = Tree.empty(self.store, self.catalog.take_root_id(), no_data)
        self.commit()

    # --- the tree ---------------------------------------------------------------------------------

    @rule(key=keys, size=value_sizes, seed=st.integers(0, 1000))
    def put(self, key: bytes, size: int, seed: int) -> None:
        value = value_of(size, seed)
        self.tree.put(key, value)
        self.model.entries[key] = value

    @rule(
        prefix=st.sampled_from(PREFIXES),
        count=st.integers(1, 600),
        key_size=st.sampled_from([2, 12, 60, KEY_BYTES_MAX]),
        exact=st.booleans(),
        size=st.sampled_from([0, 10, 300, VALUE_BYTES_MAX]),
        order=st.sampled_from(["random", "up", "down"]),
        seed=st.integers(0, 1 << 32),
    )
    def put_many(
        self,
        prefix: bytes,
        count: int,
        key_size: int,
        exact: bool,
        size: int,
        order: str,
        seed: int,
    ) -> None:
        choice = random.Random(seed)
        if size == VALUE_BYTES_MAX:
            count //= 8
        new = [
            (prefix + choice.randbytes(key_size if exact else choice.randint(1, key_size)))[
                :KEY_BYTES_MAX
            ]
            for _ in range(count)
        ]
        if order != "random":
            new.sort(reverse=order == "down")
        for key in new:
            self.put(key, choice.randint(0, size), choice.randint(0, 50))

    @rule(at=st.integers(0, 1 << 20), share=st.sampled_from([2, 10, 100]), size=value_sizes)
    def replace_some(self, at: int, share: int, size: int) -> None:
        for key in self.model.keys()[at % share :: share]:
            self.put(key, size, at)

    @rule(key=keys)
    def delete_any(self, key: bytes) -> None:
        assert self.tree.delete(key) == (key in self.model.entries)
        self.model.entries.pop(key, None)

    @rule(at=st.integers(0, 1 << 20), share=st.sampled_from([2, 3, 10, 100]))
    def delete_some(self, at: int, share: int) -> None:
        for key in self.model.keys()[at % share :: share]:
            assert self.tree.delete(key)
            del self.model.entries[key]

    @rule(start=keys, stop=keys)
    def pop_range(self, start: bytes, stop: bytes) -> None:
        expected = self.model.items(start, stop)
        found = self.tree.pop_range(start, stop)
        assert found == expected[: len(found)]
        assert bool(found) == bool(expected)
        for key, _ in found:
            del self.model.entries[key]

    @rule(at=st.floats(0, 1), length=st.floats(0, 1))
    def pop_all_of_range(self, at: float, length: float) -> None:
        known = self.model.keys()
        if not known:
            return
        start = known[int(at * (len(known) - 1))]
        stop = known[min(len(known) - 1, int((at + length) * len(known)))]
        while found := self.tree.pop_range(start, stop):
            for key, value in found:
                assert self.model.entries.pop(key) == value
        assert not self.model.items(start, stop)

    @rule(key=keys, other=keys)
    def look(self, key: bytes, other: bytes) -> None:
        assert self.tree.get(key) == self.model.entries.get(key)
        assert self.tree.floor(key) == self.model.floor(key)
        assert list(self.tree.items(key, other)) == self.model.items(key, other)

    @invariant()
    def is_sound(self) -> None:
        if not hasattr(self, "tree"):
            return
        require_sound(self.tree)
        known = self.model.keys()
        for key in known[:: max(1, len(known) // 7)]:
            assert self.tree.get(key) == self.model.entries[key]
            before = key[:-1] + bytes([key[-1] - 1]) if key[-1] else key[:-1]
            if before:
                assert self.tree.floor(before) == self.model.floor(before)

    # --- commits ----------------------------------------------------------------------------------

    def _record(self, name: str, root_id: int, kind: RootKind) -> RootRecord:
        return RootRecord(
            root_id=root_id,
            kind=kind,
            name=name,
            uuid=bytes(16),
            tree=self.tree.root,
            created_generation=self.store.generation,
            created_ns=0,
            next_ino=1,
            node_count=self.tree.node_count,
            data_blocks=0,
            inode_count=0,
        )

    def freeze(self, keep: str | None = None) -> None:
        self.settle()
        store = self.store
        nodes = self.tree.place()
        if keep is not None:
            root = self.tree.root
            store.add_reference(root.block, root.twin)
            record = self._record(keep, self.catalog.take_root_id(), RootKind.SNAPSHOT)
            with self._changing_catalog():
                self.catalog.put_new(record)
            self.kept[keep] = self.model.copy()
        main = self._record("main", self.tree.owner, RootKind.VOLUME)
        with self._changing_catalog():
            self.catalog.put_new(main)
        nodes += self.catalog.tree.place()
        self.states[store.generation] = (self.model.copy(), dict(self.kept))
        self.inflight = begin(
            store,
            nodes,
            catalog_nodes=self.catalog.tree.node_count,
            next_root_id=self.catalog.next_root_id,
            clean=False,
        )

    def settle(self) -> None:
        if self.inflight is not None:
            commit, self.inflight = self.inflight, None
            if not commit.done.is_set():
                commit.write()
            finish(commit)
            self.acknowledged = commit.generation

    @rule()
    def commit(self) -> None:
        self.freeze()
        self.settle()

    @rule()
    def freeze_only(self) -> None:
        self.freeze()

    @rule()
    def write_only(self) -> None:
        if self.inflight is not None and not self.inflight.done.is_set():
            commit = self.inflight
            commit.write()
            self.acknowledged = commit.generation

    @rule(number=st.integers(0, 5))
    def keep(self, number: int) -> None:
        if f"k{number}" not in self.kept:
            self.freeze(keep=f"k{number}")

    @precondition(lambda self: self.kept)
    @rule(at=st.integers(0, 100))
    def drop_kept(self, at: int) -> None:
        self.settle()
        name = sorted(self.kept)[at % len(self.kept)]
        del self.kept[name]
        record = self.catalog.snapshot(name)
        with self._changing_catalog():
            self.catalog.remove([record])
        waiting = [record.pointer]
        while waiting:
            pointer = waiting.pop()
            if self.store.map.refcount(pointer.block) == 1:
                node = self.store.load(pointer, None)
                if node.level:
                    waiting += [
                        child if isinstance(child, Pointer) else child.pointer()
                        for child in node.values
                    ]
            self.store.drop_reference(pointer.block, pointer.twin)

    @rule()
    def compare_all(self) -> None:
        assert list(self.tree.items(b"\0", b"\xff" * 301)) == self.model.items(b"\0", b"\xff" * 301)
        self.settle()
        for name, model in self.kept.items():
            record = self.catalog.snapshot(name)
            tree = Tree(self.store, record.pointer, record.root_id, record.node_count, no_data)
            require_sound(tree)
            assert list(tree.items(b"\0", b"\xff" * 301)) == model.items(b"\0", b"\xff" * 301)

    @contextmanager
    def _changing_catalog(self) -> Iterator[None]:
        with self.catalog.operation.begin_admitted() as operation:
            operation.change_unlogged()
            yield

    # --- reopening --------------------------------------------------------------------------------

    def _open(self, disk: MemoryDevice) -> None:
        self.disk = disk
        self.device = FaultDevice(disk)
        superblock = read_newest(self.device)
        assert superblock.generation >= self.acknowledged, "an acknowledged commit is gone (C1)"
        recount(disk, data_runs=no_data).require_exact()
        self.acknowledged = superblock.generation
        model, kept = self.states[superblock.generation]
        self.model, self.kept = model.copy(), dict(kept)
        self.inflight = None
        self.store = Store(self.device, superblock, writable=True, cache_bytes=self.cache_bytes)
        self.catalog = Catalog(
            Tree(self.store, superblock.catalog, 0, superblock.catalog_nodes),
            superblock.next_root_id,
        )
        record = self.catalog.volume("main")
        self.tree = Tree(self.store, record.pointer, record.root_id, record.node_count, no_data)
        self.compare_all()

    @rule()
    def reopen(self) -> None:
        self.commit()
        self._open(self.disk.copy())

    @rule(seed=st.none() | st.integers(0, 1 << 32))
    def crash(self, seed: int | None) -> None:
        self._open(self.disk.crash(None if seed is None else random.Random(seed)))

    @rule(
        kind=st.sampled_from(["write", "flush"]),
        after=st.integers(0, 12),
        short=st.booleans(),
        seed=st.integers(0, 1 << 32),
    )
    def crash_in_commit(self, kind: str, after: int, short: bool, seed: int) -> None:
        self.freeze()
        self.device.fault = Fault(kind, after, short=short, sticky=True)
        commit = self.inflight
        assert commit is not None
        commit.write()
        failed = commit.error is not None
        assert failed == bool(self.device.fault.fired)
        if failed:
            try:
                finish(commit)
            except DeviceError:
                pass
            else:
                raise AssertionError("a failed commit looks finished")
            assert self.store.failed is not None
        else:
            self.acknowledged = commit.generation
        self._open(self.disk.crash(random.Random(seed)))

    def teardown(self) -> None:
        if hasattr(self, "tree") and self.store.failed is None:
            self.commit()
            self.compare_all()
            recount(self.disk.crash(), data_runs=no_data).require_exact()


TestTreeMachine = TreeMachine.TestCase
TestTreeMachine.settings = machine_settings(short=80, long=300, steps=50)
TestTreeMachine.__doc__ = (
    "Promise: the tree is a sorted map, whatever is committed, shared or crashed."
)
