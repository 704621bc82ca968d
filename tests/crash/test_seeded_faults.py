"""Promises that the crash lab sees what it is there for: faults put into the engine are all caught."""

import logging
from collections.abc import Callable, Iterator

import pytest

from tests.crash.faults import FAULTS, WORKLOADS, Fault, applied, hunt, table
from tests.crash.lab import Lab

FAULTS_MIN = 25

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """A faulty engine warns of all that it breaks."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_seeded_fault_is_caught(
    fault: Fault, record_property: Callable[[str, object], None]
) -> None:
    """Promise: the lab would notice this fault in the engine."""
    caught = hunt(fault)
    record_property("summary", table([(fault, caught)])[0])
    assert caught is not None


def test_engine_without_fault_is_not_accused() -> None:
    """Promise: what catches the faults finds nothing in the engine as it is, after a fault neither."""
    assert len({(fault.function, fault.line, fault.instead) for fault in FAULTS}) >= FAULTS_MIN
    for fault in FAULTS:
        with applied(fault):
            pass
    lab = Lab(2, states_max=20, nested_every=25)
    for workload in WORKLOADS:
        lab.run(workload)
    assert lab.tally.unique > len(WORKLOADS) * 20
