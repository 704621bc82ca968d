"""The drop queue: deleted roots give their blocks back in small steps, crash-safe at each.

A root is dropped depth first. A node that others share only loses the queue's reference; one that is
the queue's alone loses its children first and is freed last. The state is the path from the root to the
node at work, written with every commit, together with the refcounts it explains (C6, C7). It needs no
free space beyond that of a commit (C10).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from cowfs.errors import CorruptError, NoSpaceError
from cowfs.files.items import references
from cowfs.history.catalog import Catalog
from cowfs.history.records import DropRecord, DropStep, drop_key
from cowfs.storage.admission import TIER_DROP, TIER_FREE
from cowfs.storage.format import NODE_BLOCKS, Pointer
from cowfs.storage.store import Store

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Step:
    pointer: Pointer
    level: int | None
    done: int


@dataclass(slots=True)
class _Drop:
    record: DropRecord
    path: list[_Step]
    freed_blocks: int
    changed: bool = False
    stuck: bool = False


@dataclass(frozen=True, slots=True)
class DropProgress:
    """One deleted root: blocks given back so far, and how many it referenced at the most."""

    name: str
    freed_blocks: int
    referenced_blocks: int
    stuck: bool


class DropQueue:
    """The queue of one open image. `step` belongs to the open transaction, like any operation."""

    def __init__(self, store: Store, catalog: Catalog) -> None:
        self._store = store
        self._catalog = catalog
        self._drops: dict[int, _Drop] = {}
        self._finished: list[int] = []
        for record in catalog.drops():
            path = [_Step(step.pointer, None, step.done) for step in record.path]
            self._drops[record.number] = _Drop(record, path, record.freed_blocks)

    @property
    def working(self) -> bool:
        """Whether `step` has anything to do."""
        return any(not drop.stuck for drop in self._drops.values())

    @property
    def changed(self) -> bool:
        """Whether the next commit has something of the queue to write."""
        return bool(self._finished) or any(drop.changed for drop in self._drops.values())

    def progress(self) -> list[DropProgress]:
        return [
            DropProgress(
                drop.record.name, drop.freed_blocks, drop.record.referenced_blocks, drop.stuck
            )
            for drop in self._drops.values()
        ]

    @property
    def is_empty(self) -> bool:
        """Whether nothing is to be given back, stuck or not."""
        return not self._drops

    def add_all(self, records: Sequence[DropRecord]) -> None:
        """Take over the references that root records held. In a frozen transaction only."""
        for record in records:
            path = [_Step(step.pointer, None, step.done) for step in record.path]
            self._drops[record.number] = _Drop(record, path, 0)
        self._catalog.put_drops(records)

    def next_number(self) -> int:
        return 1 + max([0, *self._drops, *self._finished])

    def step(self, nodes: int) -> int:
        """Visit at most `nodes` nodes. Returns the number of blocks freed.

        Raises:
            NoSpaceError, DeviceError: nothing can be committed.
        """
        freed = 0
        for number, drop in list(self._drops.items()):
            if drop.stuck:
                continue
            try:
                while nodes and drop.path:
                    self._admit()
                    freed_now = self._visit(drop.path)
                    drop.freed_blocks += freed_now
                    freed += freed_now
                    drop.changed = True
                    nodes -= 1
            except CorruptError as error:
                drop.stuck = True
                log.error(
                    "cannot give back snapshot %r: %s; run cowfs check", drop.record.name, error
                )
            if not drop.path:
                del self._drops[number]
                self._finished.append(number)
            if not nodes:
                break
        return freed

    def _admit(self) -> None:
        """Leave a quarter of the reserve; but where that is gone, use what is left: this frees."""
        admission = self._store.admission
        try:
            admission.admit(0, TIER_DROP)
        except NoSpaceError:
            admission.admit(0, TIER_FREE)

    def _visit(self, path: list[_Step]) -> int:
        """One step of the walk: down into a child, or done with a node. Returns blocks freed."""
        store = self._store
        step = path[-1]
        freed = 0
        if step.done or store.map.refcount(step.pointer.block) == 1:
            node = store.load(step.pointer, step.level)
            if node.level and step.done < len(node.values):
                path.append(_Step(node.values[step.done], node.level - 1, 0))
                return 0
            if not node.level:
                runs = references(node.keys, node.values)
                for first, count in runs:  # all or none: this leaf is visited again if it fails
                    store.map.require(first, count)
                if step.pointer.twin:
                    store.map.require(step.pointer.twin, NODE_BLOCKS)
                for first, count in runs:
                    freed += store.map.drop(first, count, store.generation)
        elif step.pointer.twin:
            store.map.require(step.pointer.twin, NODE_BLOCKS)
        freed += store.drop_reference(step.pointer.block, step.pointer.twin)
        path.pop()
        if path:
            path[-1].done += 1
        return freed

    def reach(self) -> None:
        """Reach what `save` changes. Before a freeze changes anything."""
        changed = [number for number, drop in self._drops.items() if drop.changed]
        for number in sorted([*changed, *self._finished]):
            self._catalog.tree.reach(drop_key(number))

    def save(self) -> None:
        """Put the state into the catalog. In a frozen transaction only."""
        for number in self._finished:
            self._catalog.remove_drop(number)
        self._finished.clear()
        for drop in self._drops.values():
            if drop.changed:
                path = tuple(DropStep(step.pointer, step.done) for step in drop.path)
                drop.record = drop.record.with_path(path, drop.freed_blocks)
                self._catalog.put_drop(drop.record)
                drop.changed = False
