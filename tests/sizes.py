"""How much one run of the tests does, and how long it waits for what must come.

Each size that matters stands in its test as `sized(short, long)`. The short run is the default;
`--long` takes the long sizes and also runs the tests marked `long`; `--long --times N` takes N
times the long sizes. `--seed N` replaces the seeds of tests that choose at random.
tests/conftest.py has these options.
"""

import time
from collections.abc import Callable

from hypothesis import HealthCheck, settings

# How long anything may take before it counts as hung. A machine that is ten times slower than an
# idle one must not come near it: speed is compared within a run, and never with a clock.
HANG_SECONDS = 300
TEST_SECONDS_MAX = 1800  # limit for one test of the short run
LONG_TEST_SECONDS_MAX = 8 * 3600  # the same of `--long`, times `--times`; shrinking takes long

_POLL_SECONDS = 0.01
# The speed at which hypothesis makes examples depends on how busy the machine is.
_CHECKS_OFF = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)


class _Run:
    """The options of this run."""

    long = False
    times = 1.0
    seed: int | None = None


def begin(*, long: bool, times: float, seed: int | None) -> None:
    """Take the options of the run; called before any test is imported."""
    _Run.long, _Run.times, _Run.seed = long, times, seed
    settings.register_profile(
        "cowfs", deadline=None, print_blob=True, suppress_health_check=_CHECKS_OFF
    )
    settings.load_profile("cowfs")


def is_long() -> bool:
    """Whether this is a run with `--long`."""
    return _Run.long


def sized(short: int, long: int) -> int:
    """`short` or `long`, as this run wants it, with `--times` applied."""
    return round(long * _Run.times) if _Run.long else short


def seconds(short: float, long: float) -> float:
    """The same for a duration."""
    return long * _Run.times if _Run.long else short


def chosen_seed(usual: int) -> int:
    """The seed given with `--seed`, else the usual one."""
    return usual if _Run.seed is None else _Run.seed


def seeds(short: int, long: int, first: int = 0) -> range:
    """The seeds of that many random histories."""
    return range(first, first + sized(short, long))


def machine_settings(short: int, long: int, steps: int) -> settings:
    """Settings of a state machine: the number of examples, and of steps in each."""
    return settings(max_examples=sized(short, long), stateful_step_count=steps)


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Wait until `condition` holds; fail with the words `what` if it does not in HANG_SECONDS."""
    deadline = time.monotonic() + HANG_SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(_POLL_SECONDS)
