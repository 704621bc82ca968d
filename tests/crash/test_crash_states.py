"""Promises that no crash loses what was acknowledged, whatever part of the writes arrived (C1, C6, C7).

The states are enumerated, not drawn: see states.py. Each share of the work has images of its own, so
that no state is counted twice. `scripts/crashlab` runs the same for as long as one likes.
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
STATES = sized(400, 5200)  # unique, of each share: more than 20,000 in the long run
OF_WORKLOAD = sized(6, 40)
OF_NESTED = sized(2, 12)
# The shares take this one and those after it; all four modes of durability are among them.
SEED = chosen_seed(4000)


@pytest.mark.parametrize("share", range(SHARES))
def test_crash_states_of_all_workloads_are_legal(
    share: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Promise C1: one point of the past, nothing acknowledged is lost, and no repair is needed."""
    logging.disable(logging.CRITICAL)  # damage is what these images are made of
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


def test_crash_of_a_short_history_is_enumerated_whole() -> None:
    """Promise C1: of a rename that replaces and a rollback, not one state is left out."""
    lab = Lab(SEED)
    lab.run(parse("flat: rename A/foo B/bar; fsync"))
    assert lab.tally.unique > 400
