"""The set of snapshots whose deletion frees enough and loses least.

What a set frees is supermodular: two snapshots together free at least what each frees alone. So the
cheapest way to free much is mostly one long run of neighbours, and looking at one snapshot at a time is
blind to it. In a linear history (no rollback, nothing copied back out of a snapshot) a block lives from
one snapshot to another, its owners are a run of neighbours, and dynamic programming over runs finds the
fewest snapshots exactly. Elsewhere each set is *relaxed* to the longest run within it, which is freed
no later than the set itself: the fewest snapshots of the relaxed problem are a lower bound, and if they
free enough in truth, they are the answer as well. Another bound shares the blocks of each set out among
its members: so many snapshots are needed as it takes of the largest shares.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from cowfs.accounting.owners import OwnerSets, members
from cowfs.accounting.structure import Numbers
from cowfs.errors import CowfsError

EXACT_SNAPSHOTS_MAX = 3000  # beyond, the tables of pairs would take more than 140 MiB
FEW_AT_FIRST = 8


class Loss(StrEnum):
    """What counts as losing least."""

    FEWEST = "fewest"  # snapshots; of those the oldest
    OLDEST = "oldest"  # the newest that goes is as old as can be; of those the fewest


class NotEnoughError(CowfsError):
    """All that may be deleted frees less than is wanted."""

    def __init__(self, most_blocks: int) -> None:
        super().__init__("the snapshots that may be deleted do not free that much")
        self.most_blocks = most_blocks


@dataclass(frozen=True, slots=True)
class Chosen:
    """A snapshot of a plan: blocks that it frees alone, and that the plan would free less without it."""

    bit: int
    alone: int
    needed: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A set of snapshots.

    Attributes:
        chosen: the oldest first.
        blocks: that deleting exactly these frees.
        at_least: no fewer snapshots (of those that the rule of least loss looks at) free enough.
        linear: every set of owners is a run of neighbours, as without rollbacks.
    """

    chosen: tuple[Chosen, ...]
    blocks: int
    at_least: int
    linear: bool

    @property
    def exact(self) -> bool:
        """Whether it is proved that nothing loses less."""
        return len(self.chosen) == self.at_least


def plan_reclaim(
    sets: OwnerSets, allowed: Sequence[int], wanted_blocks: int, loss: Loss = Loss.FEWEST
) -> Plan:
    """The snapshots to delete so that at least so many blocks are freed.

    Args:
        allowed: bits of the snapshots that may go, ascending.

    Raises:
        NotEnoughError: all of them free less.
    """
    problem = _Problem(sets, allowed)
    most = problem.freed(np.ones(len(allowed), np.bool_))
    if most < wanted_blocks:
        raise NotEnoughError(most)
    stop = len(allowed)
    if loss == Loss.OLDEST:
        stop = problem.shortest_prefix(wanted_blocks)
        problem = _Problem(sets, allowed[:stop])
    picked, at_least = problem.solve(wanted_blocks)
    chosen = []
    needed = problem.losses(picked)
    for position in np.flatnonzero(picked).tolist():
        bit = allowed[position]
        chosen.append(Chosen(bit, sets.exclusive([bit]).total, int(needed[position])))
    return Plan(tuple(chosen), problem.freed(picked), at_least, problem.linear)


class _Problem:
    """Which sets of owners lie within the snapshots that may go; positions count only those."""

    def __init__(self, sets: OwnerSets, allowed: Sequence[int]) -> None:
        inside = sets.within(allowed)
        self._count = len(allowed)
        table = members(sets.sets[inside], len(sets.owners))
        self._table = table[:, np.array(allowed, np.int64)]
        self._blocks = (sets.nodes + sets.data)[inside]
        self._first, self._last = _longest_runs(self._table)
        sizes = self._table.sum(axis=1)
        self.linear = bool((self._last - self._first + 1 == sizes).all())

    def freed(self, picked: npt.NDArray[np.bool_]) -> int:
        """Blocks that deleting these frees."""
        return int(self._blocks[~self._table[:, ~picked].any(axis=1)].sum())

    def losses(self, picked: npt.NDArray[np.bool_]) -> Numbers:
        """What would be freed less without each of these."""
        inside = ~self._table[:, ~picked].any(axis=1)
        lost: Numbers = self._blocks[inside] @ self._table[inside].astype(np.int64)
        return lost

    def shortest_prefix(self, wanted: int) -> int:
        """How many of the oldest must go so that enough is freed."""
        if wanted <= 0:
            return 0
        ends = self._count - 1 - np.argmax(self._table[:, ::-1], axis=1)
        freed = np.cumsum(np.bincount(ends, self._blocks, self._count).astype(np.int64))
        return int(np.searchsorted(freed, wanted)) + 1

    def solve(self, wanted: int) -> tuple[npt.NDArray[np.bool_], int]:
        """The snapshots to pick, and how many it takes at the least."""
        nothing = np.zeros(self._count, np.bool_)
        if wanted <= 0:
            return nothing, 0
        if self._count > EXACT_SNAPSHOTS_MAX:
            return self._thinned(~nothing, wanted), self._bound(wanted)
        runs = _Runs(self._first, self._last, self._blocks, self._count)
        fewest = runs.fewest(wanted)
        picked = runs.pick(fewest, wanted)
        if self.freed(picked) >= wanted:
            return picked, fewest
        # Not a linear history: what the relaxed problem takes for enough is not. Two ways to a good set,
        # and two to a bound.
        best = self._thinned(~nothing, wanted)
        for count in range(fewest + 1, int(best.sum())):
            picked = runs.pick(count, wanted)
            if self.freed(picked) >= wanted:
                best = self._thinned(picked, wanted)
                break
        return best, max(fewest, self._bound(wanted))

    def _bound(self, wanted: int) -> int:
        """A number of snapshots below which no set frees enough: each set's blocks are shared out."""
        sizes = self._table.sum(axis=1)
        shares = (self._blocks / np.maximum(sizes, 1)) @ self._table
        most = np.cumsum(np.sort(shares)[::-1])
        return int(np.searchsorted(most, wanted * (1 - 1e-9))) + 1

    def _thinned(self, picked: npt.NDArray[np.bool_], wanted: int) -> npt.NDArray[np.bool_]:
        """Without what is not needed: again and again the one goes that is missed least."""
        picked = picked.copy()
        inside = ~self._table[:, ~picked].any(axis=1)
        freed = int(self._blocks[inside].sum())
        lost = self._blocks[inside] @ self._table[inside].astype(np.int64)
        while True:
            spare = np.where(picked & (freed - lost >= wanted), lost, -1)
            candidates = np.flatnonzero(spare >= 0)
            if not len(candidates):
                return picked
            least = spare[candidates].min()
            position = int(candidates[spare[candidates] == least][-1])  # the newest is dearest
            picked[position] = False
            ends = inside & self._table[:, position]
            inside &= ~ends
            freed -= int(self._blocks[ends].sum())
            lost = lost - self._blocks[ends] @ self._table[ends].astype(np.int64)


def _longest_runs(table: npt.NDArray[np.bool_]) -> tuple[Numbers, Numbers]:
    """The first and last position of the longest run of neighbours in each row."""
    length = np.zeros(len(table), np.int64)
    best = np.zeros(len(table), np.int64)
    last = np.zeros(len(table), np.int64)
    for position in range(table.shape[1]):
        length = np.where(table[:, position], length + 1, 0)
        longer = length > best
        best = np.where(longer, length, best)
        last = np.where(longer, position, last)
    return last - best + 1, last


class _Runs:
    """The problem where each set is a run of neighbours: solved exactly."""

    def __init__(self, first: Numbers, last: Numbers, blocks: Numbers, count: int) -> None:
        self._count = count
        cells = np.zeros((count, count), np.int64)
        np.add.at(cells, (first, last), blocks)
        # Of the run from a to b: all sets that begin at a or later and end at b or before.
        cells = np.cumsum(cells[::-1], axis=0)[::-1]
        self._within = np.cumsum(cells, axis=1)
        self._most = np.zeros((0, 0), np.int64)
        self._limit = 0

    def fewest(self, wanted: int) -> int:
        """How many must go at the least. All together are enough."""
        limit = min(FEW_AT_FIRST, self._count)
        while True:
            self._solve(limit)
            for count in range(1, limit + 1):
                if self._freed(count, self._count) >= wanted:
                    return count
            limit = min(2 * limit, self._count)

    def pick(self, count: int, wanted: int) -> npt.NDArray[np.bool_]:
        """The best that so many can do; if that is enough, among as few of the oldest as can be."""
        if count > self._limit:
            self._solve(min(max(count, 2 * self._limit), self._count))
        among = self._count
        while among > count and self._freed(count, among - 1) >= wanted:
            among -= 1
        picked = np.zeros(self._count, np.bool_)
        kept = among - count
        while among > kept:
            value = self._most[kept, among]
            if kept and self._most[kept - 1, among - 1] == value:
                kept, among = kept - 1, among - 1
                continue
            starts = np.arange(kept, among)
            made = self._most[kept, starts] + self._within[starts, among - 1]
            start = int(starts[np.flatnonzero(made == value)[0]])
            picked[start:among] = True
            among = start
        return picked

    def _freed(self, count: int, among: int) -> int:
        return int(self._most[among - count, among]) if 0 <= count <= among else -1

    def _solve(self, limit: int) -> None:
        """Fill `_most[kept, among]`: freed at the most if all but `kept` of the first `among` go.

        Only for at most `limit` that go. The last of them is kept, or ends a run that goes: then what
        is before the run is the same problem with as many kept.
        """
        if limit <= self._limit:
            return
        self._limit = limit
        never = np.iinfo(np.int64).min // 2
        most = np.full((self._count + 1, self._count + 1), never, np.int64)
        most[0, 0] = 0
        for among in range(1, self._count + 1):
            low = max(0, among - limit)
            runs = most[low : among + 1, low:among] + self._within[low:among, among - 1]
            best = runs.max(axis=1)
            kept = np.arange(low, among + 1)
            before = np.where(kept > 0, most[kept - 1, among - 1], never)
            most[low : among + 1, among] = np.maximum(best, before)
        self._most = most
