"""Plans a reclaim: the set of snapshots whose deletion frees enough and loses least.

Two snapshots deleted together free at least what each frees alone (the number is supermodular). So
the cheapest way to free much is mostly one long run of neighbours, which a choice of one snapshot
at a time does not find.

In a linear history (no rollback, nothing copied out of a snapshot) a block lives from one snapshot
to another. So its owners are a run of neighbours, and dynamic programming over runs finds the
fewest snapshots exactly.

In other histories the problem is *relaxed*: each set of owners is replaced by the longest run
within it. Its blocks then count as freed no later than they really are. So the fewest snapshots of
the relaxed problem are a lower bound; if they really free enough, they are the answer. A second
lower bound divides the blocks of each set equally among its members, and counts how many of the
largest shares make up the wanted number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from cowfs.accounting.owners import OwnerSets, members
from cowfs.accounting.structure import Numbers
from cowfs.errors import CowfsError

EXACT_SNAPSHOTS_MAX = 3000  # the tables of pairs of more snapshots take more than 140 MiB
FIRST_LIMIT = 8  # number of deleted snapshots that is solved for first; then it is doubled


class Loss(StrEnum):
    """Which of the plans that free enough is the best one."""

    FEWEST = "fewest"  # as few snapshots as possible; of such plans, with the oldest
    OLDEST = (
        "oldest"  # the newest deleted snapshot is as old as possible; of such plans, the fewest
    )


class NotEnoughError(CowfsError):
    """Deleting every snapshot that may be deleted frees less than is wanted.

    Attributes:
        most_blocks: what that frees.
    """

    def __init__(self, most_blocks: int) -> None:
        super().__init__("the snapshots that may be deleted do not free that much")
        self.most_blocks = most_blocks


@dataclass(frozen=True, slots=True)
class Chosen:
    """A snapshot of a plan.

    Attributes:
        bit: in the owner sets.
        alone: blocks that deleting only this snapshot frees.
        needed: how many blocks less the plan frees without this snapshot.
    """

    bit: int
    alone: int
    needed: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A set of snapshots to delete.

    Attributes:
        chosen: the snapshots, the oldest first.
        blocks: what deleting exactly these frees.
        at_least: a lower bound of the number of snapshots that free enough; with `Loss.OLDEST`, if
            they are chosen among as few of the oldest as suffice.
        linear: every set of owners is a run of neighbours, as without rollbacks.
    """

    chosen: tuple[Chosen, ...]
    blocks: int
    at_least: int
    linear: bool

    @property
    def exact(self) -> bool:
        """Whether it is proved that no plan with fewer snapshots frees enough."""
        return len(self.chosen) == self.at_least


def plan_reclaim(
    sets: OwnerSets, allowed: Sequence[int], wanted_blocks: int, loss: Loss = Loss.FEWEST
) -> Plan:
    """Choose snapshots whose deletion frees at least `wanted_blocks`.

    Args:
        allowed: bits of the snapshots that may be deleted, ascending.
        loss: which plan is the best one.

    Raises:
        NotEnoughError: all of them together free less.
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
    """The sets all of whose owners may be deleted. A position numbers the snapshots in `allowed`.

    A "picked" array says of each position whether the snapshot is deleted.
    """

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
        """The blocks that deleting the picked snapshots frees."""
        return int(self._blocks[~self._table[:, ~picked].any(axis=1)].sum())

    def losses(self, picked: npt.NDArray[np.bool_]) -> Numbers:
        """Of each picked snapshot, how many blocks less are freed without it."""
        inside = ~self._table[:, ~picked].any(axis=1)
        lost: Numbers = self._blocks[inside] @ self._table[inside].astype(np.int64)
        return lost

    def shortest_prefix(self, wanted: int) -> int:
        """How many of the oldest snapshots must be deleted to free `wanted` blocks."""
        if wanted <= 0:
            return 0
        ends = self._count - 1 - np.argmax(self._table[:, ::-1], axis=1)
        freed = np.cumsum(np.bincount(ends, self._blocks, self._count).astype(np.int64))
        return int(np.searchsorted(freed, wanted)) + 1

    def solve(self, wanted: int) -> tuple[npt.NDArray[np.bool_], int]:
        """The snapshots to pick, and a lower bound of their number."""
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
        # The history is not linear, and the relaxed problem's answer does not really free enough.
        # Make two candidates, and take the smaller one; take the higher of two lower bounds.
        best = self._thinned(~nothing, wanted)
        for count in range(fewest + 1, int(best.sum())):
            picked = runs.pick(count, wanted)
            if self.freed(picked) >= wanted:
                best = self._thinned(picked, wanted)
                break
        return best, max(fewest, self._bound(wanted))

    def _bound(self, wanted: int) -> int:
        """A lower bound: the blocks of each set are divided equally among its members."""
        sizes = self._table.sum(axis=1)
        shares = (self._blocks / np.maximum(sizes, 1)) @ self._table
        most = np.cumsum(np.sort(shares)[::-1])
        return int(np.searchsorted(most, wanted * (1 - 1e-9))) + 1

    def _thinned(self, picked: npt.NDArray[np.bool_], wanted: int) -> npt.NDArray[np.bool_]:
        """Unpick snapshots that are not needed, each time the one that frees least.

        Of equals, the newest is unpicked.
        """
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
            position = int(candidates[spare[candidates] == least][-1])
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
    """Solves the problem in which each set of owners is a run of neighbours, exactly.

    Args:
        first, last: positions of each set's first and last owner.
        blocks: of each set.
        count: of the snapshots that may be deleted.
    """

    def __init__(self, first: Numbers, last: Numbers, blocks: Numbers, count: int) -> None:
        self._count = count
        cells = np.zeros((count, count), np.int64)
        np.add.at(cells, (first, last), blocks)
        # cells[a, b] becomes the blocks of all sets that begin at a or later and end by b.
        cells = np.cumsum(cells[::-1], axis=0)[::-1]
        self._within = np.cumsum(cells, axis=1)
        self._most = np.zeros((0, 0), np.int64)
        self._limit = 0

    def fewest(self, wanted: int) -> int:
        """The smallest number of snapshots that frees enough; all together must free enough."""
        limit = min(FIRST_LIMIT, self._count)
        while True:
            self._solve(limit)
            for count in range(1, limit + 1):
                if self._freed(count, self._count) >= wanted:
                    return count
            limit = min(2 * limit, self._count)

    def pick(self, count: int, wanted: int) -> npt.NDArray[np.bool_]:
        """The `count` snapshots that free most.

        If they free enough, the newest of them is as old as possible.
        """
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
        """Fill `_most[kept, among]`: the most blocks freed if `kept` of the first `among` are kept.

        Cells in which more than `limit` snapshots are deleted are left out. The last of the first
        `among` snapshots is either kept, or ends a run of deleted ones; what is before that run is
        the same problem with as many kept.
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
