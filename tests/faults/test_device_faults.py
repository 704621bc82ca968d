"""Promises C1 and C8 when the k-th call of the device fails, for every k: reads, writes, flushes.

The short run lets every write and flush of each part of the workload fail once with EIO, and every
fourth call in each other way, so a call meets one or two of those. `--long` lets every call of
every range of parts fail in every way. The number of faults is printed at the end of the run.
"""

import errno
import functools
from collections.abc import Callable

import pytest

from tests.faults.workload import PARTS, Base, Step, Workload, crash_seeds, make_bases
from tests.model.devices import Fault, FaultDevice, MemoryDevice
from tests.sizes import is_long

RANGES = [
    (first, stop)
    for first in range(len(PARTS))
    for stop in range(first + 1, len(PARTS) + 1 if is_long() else first + 2)
]

KINDS = [
    ("read", errno.EIO, False),
    ("write", errno.EIO, False),
    ("write", errno.EIO, True),
    ("write", errno.ENOSPC, False),
    ("write", errno.ENOSPC, True),
    ("flush", errno.EIO, False),
    ("flush", errno.ENOSPC, False),
]


STRIDE = 4  # for the ways that are not tried at every call
LAYOUTS = ["twins", "one-copy"]


@functools.cache
def bases(layout: str) -> list[Base]:
    return make_bases(copies=layout == "twins")


def start(layout: str, parts: tuple[int, int], fault: Fault | None) -> tuple[Workload, FaultDevice]:
    base = bases(layout)[parts[0]]
    device = FaultDevice(base.disk.copy(), fault)
    return Workload(device, base.model.copy()), device


@functools.cache
def call_count(layout: str, parts: tuple[int, int], kind: str) -> int:
    """The number of such calls in a run without failures; that run must be perfect."""
    work, device = start(layout, parts, None)
    work.run(script_of(parts))
    assert not work.failures
    assert work.filesystem is None
    work.end(disk_of(device).copy())
    return device.calls[kind]


def script_of(parts: tuple[int, int]) -> list[Step]:
    return [step for part in PARTS[slice(*parts)] for step in part]


def disk_of(device: FaultDevice) -> MemoryDevice:
    assert isinstance(device.device, MemoryDevice)
    return device.device


def inject(
    layout: str,
    parts: tuple[int, int],
    kind: str,
    after: int,
    number: int,
    *,
    short: bool,
    sticky: bool,
) -> None:
    """Make one run with one fault, and judge it."""
    fault = Fault(kind, after, number, short=short, sticky=sticky)
    work, device = start(layout, parts, fault)
    work.run(script_of(parts))
    assert fault.fired, "the fault was never met"
    if kind == "read":
        if not sticky and work.filesystem is not None and work.opened.store.failed is None:
            work.require_whole()
    else:
        assert work.filesystem is not None, "unmounted in order, although a call failed"
        work.require_failed_for_good()
    device.fault = None
    judged: list[MemoryDevice] = []
    for choice in crash_seeds(after):
        disk = disk_of(device).crash(choice)
        # After an unmount in order there is nothing that a power cut could lose.
        if not any(disk.holds_the_same(other) for other in judged):
            judged.append(disk)
            work.end(disk)


@pytest.mark.parametrize("sticky", [False, True], ids=["once", "sticky"])
@pytest.mark.parametrize(
    ("kind", "number", "short"),
    KINDS,
    ids=[f"{kind}-{errno.errorcode[number]}{'-half' * short}" for kind, number, short in KINDS],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_failing_call_leaves_no_false_success_and_no_half_operation(
    layout: str,
    kind: str,
    number: int,
    short: bool,
    sticky: bool,
    record_property: Callable[[str, object], None],
) -> None:
    """Promises C1 and C8: the operation answers EIO, history stays, and the image mounts clean."""
    injected = 0
    way = KINDS.index((kind, number, short)) + sticky
    is_simple = kind != "read" and number == errno.EIO and not short and not sticky
    is_every_call = is_long() or is_simple
    for parts in RANGES:
        calls = range(call_count(layout, parts, kind))
        for after in calls if is_every_call else calls[way % STRIDE :: STRIDE]:
            try:
                inject(layout, parts, kind, after, number, short=short, sticky=sticky)
            except BaseException:
                print(f"parts {parts}, {kind} number {after}, {errno.errorcode[number]}, ", end="")
                print(f"{layout}, {short=}, {sticky=}")
                raise
            injected += 1
    assert injected
    record_property("count", ("faults of the device", injected))
