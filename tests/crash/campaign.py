"""Many workloads in a row: every single operation, then pairs and long histories without end.

A failure is shortened as far as possible and saved: the text that repeats it, and the image.
"""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.crash.bases import BASES
from tests.crash.lab import NESTED_STATES, Lab, LabFailureError, Tally
from tests.crash.workloads import Workload, pairs, single_operations, walks

STATES_OF_WORKLOAD = 40
STATES_OF_MINIMUM = 400  # judged for each shorter workload while a failure is shortened
PAIRS_OF_WALK = 4  # after that many pairs of operations comes one long history
NESTED_EVERY = 40


def plan(seed: int) -> Iterator[Workload]:
    """First all single operations, then pairs and long histories without end."""
    bases = tuple(BASES)
    turn = seed % len(bases)
    bases = bases[turn:] + bases[:turn]
    yield from single_operations(seed, bases)
    long_histories = walks(seed, bases)
    for round_number in itertools.count():
        for number, pair in enumerate(pairs(seed + round_number, bases)):
            yield pair
            if number % PAIRS_OF_WALK == PAIRS_OF_WALK - 1:
                yield next(long_histories)


def run_campaign(
    seed: int,
    states: int,
    progress: Callable[[Tally, Workload], None] | None = None,
    *,
    of_workload: int = STATES_OF_WORKLOAD,
    of_nested: int = NESTED_STATES,
) -> Tally:
    """Judge at least that many unique states, and all those of single operations.

    Args:
        of_workload: unique states of each workload, without nested ones.
        of_nested: states of each mount that is itself crashed.

    Raises:
        LabFailureError: the first promise that is broken.
    """
    lab = Lab(seed, states_max=of_workload, nested_every=NESTED_EVERY, nested_max=of_nested)
    singles = sum(1 for _ in single_operations(seed, tuple(BASES)))
    for number, workload in enumerate(plan(seed)):
        if number >= singles and lab.tally.unique >= states:
            break
        lab.run(workload)
        if progress is not None:
            progress(lab.tally, workload)
    return lab.tally


def shortened(failure: LabFailureError) -> LabFailureError:
    """The same kind of failure with fewer operations, as far as leaving some out still shows it."""
    assert failure.workload is not None
    operations = failure.workload.operations
    at = 0
    while at < len(operations):
        fewer = Workload(failure.workload.base, operations[:at] + operations[at + 1 :])
        found = _failure_of(failure, fewer)
        if found is None:
            at += 1
        else:
            failure, operations = found, fewer.operations
    return failure


def _failure_of(failure: LabFailureError, workload: Workload) -> LabFailureError | None:
    nested_every = 5 if failure.is_nested else 0
    lab = Lab(failure.seed, states_max=STATES_OF_MINIMUM, nested_every=nested_every)
    try:
        lab.run(workload)
    except LabFailureError as found:
        return found if found.judgement == failure.judgement else None
    return None


def save(failure: LabFailureError, folder: Path) -> Path:
    """Save what repeats a failure. Returns the file that explains it; the image is beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "crash-failure.txt"
    text.write_text(f"{failure}\n")
    if failure.device is not None:
        failure.device.save(folder / "crash-failure.img")
    return text
