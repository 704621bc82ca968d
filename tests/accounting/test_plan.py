"""Promises of the plan that frees enough and loses least, against trying every set of snapshots."""

import random
from collections.abc import Iterable, Sequence
from itertools import combinations

import numpy as np
import pytest

from cowfs.accounting.owners import Owner, OwnerKind, OwnerSets, owner_sets
from cowfs.accounting.plan import Loss, NotEnoughError, Plan, plan_reclaim
from tests.model.histories import History
from tests.sizes import seeds, sized

CASES = sized(150, 400)  # of made-up owner sets
LEAST_SHARE = 0.95  # measured: 0.97 to 0.99

Masks = dict[int, int]  # number of blocks by owners, the owners as bits


def made_up(masks: Masks, snapshots: int) -> OwnerSets:
    """Owner sets of that many snapshots, and of a volume, which is the highest bit."""
    words = snapshots // 64 + 1
    rows = [[mask >> 64 * word & (1 << 64) - 1 for word in range(words)] for mask in masks]
    amounts = np.array(list(masks.values()), np.int64)
    nodes = amounts // 3
    owners = (
        *(Owner(OwnerKind.SNAPSHOT, f"s{bit}", bit + 1) for bit in range(snapshots)),
        Owner(OwnerKind.VOLUME, "main", 1000000),
    )
    table = np.array(rows, np.uint64).reshape(-1, words)
    return OwnerSets(owners, table, nodes, amounts - nodes)


def masks_by_chance(choice: random.Random, snapshots: int, *, runs: bool) -> Masks:
    """Random sets of owners; a third of them include the volume."""
    masks: Masks = {}
    for _ in range(choice.randrange(1, 40)):
        if runs:
            first = choice.randrange(snapshots)
            mask = (1 << choice.randrange(1, snapshots - first + 1)) - 1 << first
        else:
            mask = choice.randrange(1, 1 << snapshots)
            if choice.random() < 0.5:
                mask &= choice.randrange(1, 1 << snapshots)
        if choice.random() < 0.3:
            mask |= 1 << snapshots
        if mask:
            masks[mask] = choice.choice((1, 2, 5, 100, 1000, choice.randrange(1, 50000)))
    return masks


def freed(masks: Masks, bits: Iterable[int]) -> int:
    chosen = sum(1 << bit for bit in bits)
    return sum(blocks for mask, blocks in masks.items() if not mask & ~chosen)


def fewest(masks: Masks, allowed: Sequence[int], wanted: int) -> int:
    """The fewest snapshots that free enough, by trying every set."""
    for count in range(len(allowed) + 1):
        if any(freed(masks, bits) >= wanted for bits in combinations(allowed, count)):
            return count
    raise AssertionError("all of them are not enough")


def newest_of_oldest(masks: Masks, allowed: Sequence[int], wanted: int) -> list[int]:
    """The shortest run of the oldest snapshots that frees enough."""
    for count in range(len(allowed) + 1):
        if freed(masks, allowed[:count]) >= wanted:
            return list(allowed[:count])
    raise AssertionError("all of them are not enough")


def require_right(
    masks: Masks, allowed: Sequence[int], wanted: int, loss: Loss, plan: Plan
) -> tuple[int, int]:
    """Check a plan by brute force. Returns the fewest snapshots and the plan's number of them."""
    bits = [chosen.bit for chosen in plan.chosen]
    assert bits == sorted(set(bits))
    assert set(bits) <= set(allowed)
    assert plan.blocks == freed(masks, bits), "not what it frees"
    assert plan.blocks >= wanted, "not enough"
    for chosen in plan.chosen:
        assert chosen.alone == freed(masks, [chosen.bit])
        rest = [bit for bit in bits if bit != chosen.bit]
        assert chosen.needed == plan.blocks - freed(masks, rest)
        assert freed(masks, rest) < wanted, "one that need not go"
    among = list(allowed)
    if loss == Loss.OLDEST:
        among = newest_of_oldest(masks, allowed, wanted)
        assert set(bits) <= set(among)
        assert max(bits, default=-1) == (among[-1] if among else -1), "newer than need be"
    right = fewest(masks, among, wanted)
    assert plan.at_least <= right <= len(bits)
    if plan.exact:
        assert len(bits) == right
    inside = [mask for mask in masks if not mask & ~sum(1 << bit for bit in among)]
    linear = all(is_run(mask, among) for mask in inside)
    assert plan.linear == linear
    if linear and among:
        assert plan.exact, "a linear history"
        if loss == Loss.FEWEST:
            oldest = next(
                among[stop - 1]
                for stop in range(right, len(among) + 1)
                if not right or fewest_in(masks, among[:stop], right, wanted)
            )
            assert not right or bits[-1] == oldest, "as old as so few can be"
    return right, len(bits)


def fewest_in(masks: Masks, among: Sequence[int], count: int, wanted: int) -> bool:
    return any(freed(masks, bits) >= wanted for bits in combinations(among, count))


def is_run(mask: int, among: Sequence[int]) -> bool:
    positions = [position for position, bit in enumerate(among) if mask >> bit & 1]
    return positions[-1] - positions[0] + 1 == len(positions)


@pytest.mark.parametrize("loss", list(Loss))
@pytest.mark.parametrize("runs", [True, False])
def test_plan_of_made_up_sets_is_right(runs: bool, loss: Loss) -> None:
    """Promise: a plan frees enough, tells how much, keeps its bound, and `exact` means fewest."""
    exact = least = plans = 0
    for seed in range(CASES):
        choice = random.Random(seed)
        snapshots = choice.randint(1, 9)
        masks = masks_by_chance(choice, snapshots, runs=runs)
        sets = made_up(masks, snapshots)
        allowed = sorted(choice.sample(range(snapshots), choice.randint(0, snapshots)))
        if choice.random() < 0.5:
            allowed = list(range(snapshots))
        most = freed(masks, allowed)
        for wanted in {0, 1, most, choice.randint(0, most), choice.randint(0, most)}:
            if wanted > most:
                continue
            try:
                plan = plan_reclaim(sets, allowed, wanted, loss)
                right, taken = require_right(masks, allowed, wanted, loss, plan)
            except BaseException as error:
                error.add_note(f"seed {seed}, wanted {wanted} of {allowed}: {masks}")
                raise
            plans += 1
            exact += plan.exact
            least += right == taken
        with pytest.raises(NotEnoughError) as caught:
            plan_reclaim(sets, allowed, most + 1, loss)
        assert caught.value.most_blocks == most
    # How often a plan not proved to be least is least: no promise, but it must not get worse.
    assert exact <= least
    assert least >= plans * (1 if runs else LEAST_SHARE)


@pytest.mark.parametrize("loss", list(Loss))
def test_plan_beyond_the_exact_tables_is_right(loss: Loss, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise: with more snapshots than the exact tables take, a plan is right if not least."""
    monkeypatch.setattr("cowfs.accounting.plan.EXACT_SNAPSHOTS_MAX", 2)
    for seed in range(sized(80, 200)):
        choice = random.Random(seed)
        snapshots = choice.randint(3, 9)
        masks = masks_by_chance(choice, snapshots, runs=choice.random() < 0.5)
        sets = made_up(masks, snapshots)
        allowed = list(range(snapshots))
        most = freed(masks, allowed)
        for wanted in {0, most, choice.randint(0, most)}:
            plan = plan_reclaim(sets, allowed, wanted, loss)
            bits = [chosen.bit for chosen in plan.chosen]
            assert plan.blocks == freed(masks, bits) >= wanted
            among = newest_of_oldest(masks, allowed, wanted) if loss == Loss.OLDEST else allowed
            assert set(bits) <= set(among)
            right = fewest(masks, among, wanted)
            assert plan.at_least <= right <= len(bits), f"seed {seed}, wanted {wanted}"


def test_plan_of_many_small_steps_is_exact_in_a_linear_history() -> None:
    """Promise: long runs of neighbours that each free nothing alone are found."""
    snapshots = 90  # two words, and more than the tables are first made for
    for seed in range(20):
        choice = random.Random(seed)
        masks: Masks = {}
        for _ in range(300):
            first = choice.randrange(snapshots)
            length = min(choice.choice((2, 3, 5, 8, 20)), snapshots - first)
            masks[(1 << length) - 1 << first] = choice.randrange(1, 1000)
        sets = made_up(masks, snapshots)
        allowed = [bit for bit in range(snapshots) if choice.random() < 0.95]
        most = freed(masks, allowed)
        best = most_by_count(masks, allowed)
        for wanted in (1, most // 10, most // 3, most - 1, most):
            plan = plan_reclaim(sets, allowed, wanted)
            right = next(count for count, blocks in enumerate(best) if blocks >= wanted)
            bits = [chosen.bit for chosen in plan.chosen]
            if plan.linear:
                assert plan.exact
                assert len(bits) == right
            assert plan.blocks == freed(masks, bits) >= wanted
            assert plan.at_least <= len(bits)


def most_by_count(masks: Masks, allowed: Sequence[int]) -> list[int]:
    """The most that n snapshots can free, for each n, by another recurrence than the plan's.

    Every set of owners must be a run of snapshots.
    """
    count = len(allowed)
    within = [[0] * count for _ in range(count)]
    for first in range(count):
        for last in range(first, count):
            within[first][last] = freed(masks, allowed[first : last + 1])
    # best[last][gone]: of the first `last` snapshots, of which the last stays
    never = -1
    best = [[never] * (count + 1) for _ in range(count + 2)]
    best[0][0] = 0
    for last in range(1, count + 2):
        for before in range(last):
            run = last - before - 1
            gain = within[before][last - 2] if run else 0
            for gone in range(count + 1 - run):
                if best[before][gone] >= 0:
                    best[last][gone + run] = max(best[last][gone + run], best[before][gone] + gain)
    return best[count + 1]


@pytest.mark.parametrize("loss", list(Loss))
def test_nothing_is_wanted_and_nothing_goes(loss: Loss) -> None:
    """Promise: a plan for zero bytes is empty and exact, also when no snapshot may go."""
    for masks, snapshots in (({0b1: 5, 0b110: 7}, 3), ({}, 0), ({0b10: 3}, 1)):
        sets = made_up(masks, snapshots)
        for allowed in (list(range(snapshots)), []):
            plan = plan_reclaim(sets, allowed, 0, loss)
            assert (plan.chosen, plan.blocks, plan.at_least, plan.exact) == ((), 0, 0, True)


def test_what_may_not_go_is_never_in_a_plan() -> None:
    """Promise: no plan has held or kept snapshots, nor counts what they share as freed."""
    masks = {0b001: 1000, 0b010: 10, 0b111: 500, 0b110: 70}
    sets = made_up(masks, 3)
    plan = plan_reclaim(sets, [1, 2], 75)
    assert [chosen.bit for chosen in plan.chosen] == [1, 2]
    assert plan.blocks == 80
    with pytest.raises(NotEnoughError) as caught:
        plan_reclaim(sets, [1, 2], 81)
    assert caught.value.most_blocks == 80


def test_two_that_free_nothing_alone_are_the_plan() -> None:
    """Promise: two snapshots that free nothing alone are found as a plan."""
    masks = {0b0011: 1000, 0b0100: 300, 0b1000: 300}
    plan = plan_reclaim(made_up(masks, 4), range(4), 900)
    assert [(chosen.bit, chosen.alone, chosen.needed) for chosen in plan.chosen] == [
        (0, 0, 1000),
        (1, 0, 1000),
    ]
    assert plan.exact
    assert plan.linear


@pytest.mark.parametrize("seed", seeds(4, 10))
def test_plan_of_a_linear_history_is_exact(seed: int) -> None:
    """Promise: a plan has the fewest snapshots without rollbacks and copies out of snapshots."""
    history = History(seed, linear=True)
    for _ in range(4):
        history.run(50)
        history.filesystem.work_drops()
        sets = owner_sets(history.filesystem)
        count = sets.snapshot_count
        require_plans(sets, list(range(count)), random.Random(seed), linear=True)


@pytest.mark.parametrize("seed", seeds(4, 10, 50))
def test_plan_of_any_history_is_right(seed: int) -> None:
    """Promise: with rollbacks and shared blocks a plan is right; `exact` says if it is least."""
    history = History(seed)
    choice = random.Random(seed)
    for _ in range(4):
        history.run(50)
        sets = owner_sets(history.filesystem)
        allowed = [bit for bit in range(sets.snapshot_count) if choice.random() < 0.9]
        require_plans(sets, allowed, choice, linear=False)


def require_plans(
    sets: OwnerSets, allowed: list[int], choice: random.Random, *, linear: bool
) -> None:
    masks: Masks = {}
    for row, nodes, data in zip(sets.sets.tolist(), sets.nodes, sets.data, strict=True):
        masks[sum(word << 64 * at for at, word in enumerate(row))] = int(nodes + data)
    most = freed(masks, allowed)
    assert most == sets.exclusive(allowed).total
    for loss in Loss:
        for wanted in {0, most, most // 2, choice.randint(0, most)}:
            plan = plan_reclaim(sets, allowed, wanted, loss)
            require_right(masks, allowed, wanted, loss, plan)
            if linear:
                assert plan.linear
                assert plan.exact
