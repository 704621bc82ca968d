"""The drop queue: frees the blocks of deleted roots in small steps, each of them crash-safe.

A root is dropped depth first. A node that others share only loses the queue's reference. A node
that only the queue refers to loses its children first, and is freed last. The state is the path
from the root to the current node; each commit writes it together with the refcounts that it
explains (C6, C7). The queue needs no free space beyond that of a commit (C10).

No operation takes longer because the queue is long, but for those that list all of it.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cowfs.errors import CorruptError, NoSpaceError
from cowfs.files.items import references
from cowfs.history.catalog import Catalog
from cowfs.history.records import COUNTER_MAX, DropRecord, DropStep, drop_key
from cowfs.storage.admission import TIER_DROP, TIER_FREE
from cowfs.storage.format import NODE_BLOCKS, Pointer
from cowfs.storage.runs import Run
from cowfs.storage.store import Store

log = logging.getLogger(__name__)

RUNS_PER_WORK = 4  # dropping 4 runs of data takes as long as visiting a node: about 50 us


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
    stuck: bool = False


@dataclass(frozen=True, slots=True)
class DropProgress:
    """One deleted root: the blocks freed so far, and the most that dropping it may free."""

    name: str
    freed_blocks: int
    referenced_blocks: int
    stuck: bool


class DropQueue:
    """The queue of one open image. `step` is an operation of the open transaction.

    Attributes:
        freed_blocks, referenced_blocks: sums over the roots in the queue.
    """

    def __init__(self, store: Store, catalog: Catalog) -> None:
        self._store = store
        self._catalog = catalog
        self._drops: dict[int, _Drop] = {}
        self._waiting: dict[int, _Drop] = {}  # those that `step` works on, in that order
        self._changed: dict[int, _Drop] = {}  # since the last freeze
        self._finished: set[int] = set()  # numbers of those finished since the last freeze
        self._last_number = 0
        self.freed_blocks = self.referenced_blocks = 0
        for record in catalog.drops():
            self._take(record)

    def _take(self, record: DropRecord) -> None:
        path = [_Step(step.pointer, None, step.done) for step in record.path]
        drop = _Drop(record, path, record.freed_blocks)
        self._drops[record.number] = self._waiting[record.number] = drop
        self._last_number = max(self._last_number, record.number)
        self.freed_blocks += record.freed_blocks
        self.referenced_blocks += record.referenced_blocks

    def __len__(self) -> int:
        """Number of roots in the queue, stuck ones included."""
        return len(self._drops)

    @property
    def working(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._waiting)

    @property
    def changed(self) -> bool:
        """Whether the next commit must write records of the queue."""
        return bool(self._finished or self._changed)

    def progress(self) -> list[DropProgress]:
        """The progress of every root in the queue."""
        return list(self.each())

    def each(self) -> Iterator[DropProgress]:
        """Iterate over the roots now in the queue. The queue may change between two of them."""
        for drop in list(self._drops.values()):
            yield DropProgress(
                drop.record.name, drop.freed_blocks, drop.record.referenced_blocks, drop.stuck
            )

    def add_all(self, records: Sequence[DropRecord]) -> None:
        """Add deleted roots, in a freeze. The queue takes over the references of their records.

        Args:
            records: each with a number from `next_number`.
        """
        for record in records:
            self._take(record)
        self._catalog.put_drops(records)

    def next_number(self) -> int:
        """A number that no record of the queue has; a different one at each call."""
        self._last_number += 1
        if self._last_number > COUNTER_MAX:  # an image may have any number: start again at 1
            self._last_number = 1
        while self._last_number in self._drops or self._last_number in self._finished:
            self._last_number += 1
        return self._last_number

    def step(self, work: int) -> int:
        """Drop nodes until `work` is used up or the queue is empty.

        Visiting a node costs 1, and RUNS_PER_WORK runs of data in a leaf cost 1 more. The step ends
        with the node that uses up the rest: a leaf of 250 runs at most.

        Returns:
            The number of blocks freed.

        Raises:
            NoSpaceError: there is no room for a commit.
            ReadOnlyError, DeviceError: the image cannot be written (any more, C8).
        """
        freed = 0
        while work > 0 and self._waiting:
            number, drop = next(iter(self._waiting.items()))
            try:
                while work > 0 and drop.path:
                    self._admit()
                    freed_now, worked = self._visit(drop.path)
                    drop.freed_blocks += freed_now
                    self.freed_blocks += freed_now
                    freed += freed_now
                    self._changed[number] = drop
                    work -= worked
            except CorruptError as error:
                drop.stuck = True
                del self._waiting[number]
                log.error(
                    "cannot free the blocks of deleted snapshot %r: %s; run cowfs check",
                    drop.record.name,
                    error,
                )
            if not drop.path:
                del self._drops[number], self._waiting[number]
                self._changed.pop(number, None)
                self._finished.add(number)
                self.freed_blocks -= drop.freed_blocks
                self.referenced_blocks -= drop.record.referenced_blocks
        return freed

    def _admit(self) -> None:
        """Leave a quarter of the reserve, or less if that is gone: dropping frees blocks."""
        admission = self._store.admission
        try:
            admission.admit(0, TIER_DROP)
        except NoSpaceError:
            admission.admit(0, TIER_FREE)

    def _visit(self, path: list[_Step]) -> tuple[int, int]:
        """Go down into a child, or drop the node at the end of `path`.

        Returns:
            (blocks freed, work done).
        """
        store = self._store
        step = path[-1]
        freed, worked = 0, 1
        if step.done or store.map.refcount(step.pointer.block) == 1:
            node = store.load(step.pointer, step.level)
            if node.level and step.done < len(node.values):
                path.append(_Step(node.values[step.done], node.level - 1, 0))
                return 0, 1
            if not node.level:
                runs = _joined(references(node.keys, node.values))
                worked += len(runs) // RUNS_PER_WORK
                for first, count in runs:  # all runs or none: a leaf that fails is visited again
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
        return freed, worked

    def reach(self) -> None:
        """Reach all records that `save` will change, before the freeze changes anything.

        Raises:
            CorruptError, DeviceError: a leaf of the catalog cannot be read; nothing was changed.
        """
        for number in sorted([*self._finished, *self._changed]):
            self._catalog.tree.reach(drop_key(number))

    def save(self) -> None:
        """Write the changed records to the catalog. Only in a freeze."""
        for number in sorted(self._finished):
            self._catalog.remove_drop(number)
        self._finished.clear()
        for drop in self._changed.values():
            path = tuple(DropStep(step.pointer, step.done) for step in drop.path)
            drop.record = drop.record.with_path(path, drop.freed_blocks)
            self._catalog.put_drop(drop.record)
        self._changed.clear()


def _joined(runs: list[Run]) -> list[Run]:
    """Sort runs, and join those that lie end to end. Overlapping runs stay apart."""
    joined: list[Run] = []
    for first, count in sorted(runs):
        if joined and sum(joined[-1]) == first:
            joined[-1] = (joined[-1][0], joined[-1][1] + count)
        else:
            joined.append((first, count))
    return joined
