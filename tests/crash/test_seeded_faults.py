"""Promises that the crash lab sees what it is for: every fault seeded in the engine is caught."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.crash.bases import base
from tests.crash.campaign import save, shortened
from tests.crash.faults import FAULTS, WORKLOADS, Fault, applied, hunt, table
from tests.crash.lab import Lab, LabFailureError
from tests.crash.workloads import parse

FAULTS_MIN = 25


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Silence the log: a faulty engine warns of everything that it breaks."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_seeded_fault_is_caught(
    fault: Fault, record_property: Callable[[str, object], None]
) -> None:
    """Promise: the lab catches this fault of the engine."""
    caught = hunt(fault)
    record_property("summary", table([(fault, caught)])[0])
    assert caught is not None


def test_engine_without_fault_is_not_accused() -> None:
    """Promise: the workloads find no fault in the sound engine, even after faults were applied."""
    assert len({(fault.function, fault.line, fault.instead) for fault in FAULTS}) >= FAULTS_MIN
    for fault in FAULTS:
        with applied(fault):
            pass
    lab = Lab(2, states_max=20, nested_every=25)
    for workload in WORKLOADS:
        lab.run(workload)
    assert lab.tally.unique > len(WORKLOADS) * 20


def test_failure_is_made_shorter_saved_and_repeated(tmp_path: Path) -> None:
    """Promise: a failure is shortened to what matters, and what it prints repeats it."""
    fault = next(fault for fault in FAULTS if "halves of a rename" in fault.name)
    base("deep", 3)
    long_history = parse("deep: chmod A 700; rename A/foo B/bar; fsync")
    with applied(fault):
        with pytest.raises(LabFailureError) as first:
            Lab(3, states_max=40).run(long_history)
        short = shortened(first.value)
        assert short.workload == parse("deep: rename A/foo B/bar")
        assert str(short.workload) in save(short, tmp_path).read_text()
        assert (tmp_path / "crash-failure.img").exists()
        with pytest.raises(LabFailureError) as again:
            Lab(3).run(short.workload, only=short.state)
        assert again.value.state == short.state
