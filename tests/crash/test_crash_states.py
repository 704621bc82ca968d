"""Promises that no crash loses what was acknowledged, whichever writes arrived (C1, C6, C7).

The states are enumerated, not drawn: see states.py. Each share of the work has images of its own,
so no state is counted twice. `scripts/crashlab` does the same for as long as you like.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.crash.campaign import run_campaign, save, shortened
from tests.crash.lab import Lab, LabFailureError
from tests.crash.workloads import parse
from tests.sizes import chosen_seed, sized

SHARES = 4
STATES = sized(130, 5200)  # unique states of each share; more than 20,000 together in the long run
OF_WORKLOAD = sized(4, 40)
OF_NESTED = sized(2, 12)
# Each share starts at its own workload; together they use all four modes of durability.
SEED = chosen_seed(4000)


@pytest.mark.parametrize("share", range(SHARES))
def test_crash_states_of_all_workloads_are_legal(
    share: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Promise C1: a crash shows one past state with all acknowledged work, and needs no repair."""
    logging.disable(logging.CRITICAL)  # these images are damaged on purpose
    try:
        tally = run_campaign(SEED + share, STATES, of_workload=OF_WORKLOAD, of_nested=OF_NESTED)
    except LabFailureError as failure:
        save(shortened(failure), tmp_path)
        raise
    finally:
        logging.disable(logging.NOTSET)
    record_property("summary", f"crash lab, share {share}: {tally}")
    assert tally.unique >= STATES
    assert tally.nested >= STATES // 10
    missing = {"tear", "ring", "prefix", "subset", "blocks", "lost", "misdirected", "rest", "size"}
    assert not missing - tally.by_kind.keys()


@pytest.mark.parametrize(("way", "states"), [("commit", 400), ("fsync", 250)])
def test_crash_of_a_short_history_is_enumerated_whole(way: str, states: int) -> None:
    """Promise C1: no state of a rename that replaces a file is left out, nor one of its record."""
    lab = Lab(SEED)
    lab.run(parse(f"flat: rename A/foo B/bar; {way}"))
    assert lab.tally.unique > states
