"""Promises C1 and C8 when calls of the host do less than asked: a short transfer, or nothing.

`FileDevice` works on a real file, with stand-ins for the functions of `os` that it calls. It must
continue after a short call, which changes nothing; a call that does nothing is an error like any
other (C8).
"""

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import cowfs.storage.device as device_module
from cowfs.storage.device import Buffer, FileDevice
from cowfs.storage.format import BLOCK_SIZE_BYTES
from tests.faults.workload import PARTS, Base, Workload, make_bases
from tests.model.devices import MemoryDevice
from tests.sizes import is_long

STRIDE = 1 if is_long() else 30  # each run reads and writes a whole image


class HostCalls:
    """`os`, with one call of one function replaced.

    Args:
        name: "pread", "pwritev" or "fdatasync".
        after: that many calls of the function are left alone.
        how: "short" transfers a part, "nothing" transfers nothing, "EIO" and "ENOSPC" raise.
        sticky: all later calls of the function fail too.
    """

    def __init__(self, name: str, after: int, how: str, *, sticky: bool) -> None:
        self._name, self._after, self._how, self._sticky = name, after, how, sticky
        self.fired = 0
        self.calls = {"pread": 0, "pwritev": 0, "fdatasync": 0}

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _due(self, name: str) -> bool:
        self.calls[name] += 1
        if name != self._name or self.calls[name] <= self._after:
            return False
        if self.fired and not self._sticky:
            return False
        self.fired += 1
        if self._how in ("EIO", "ENOSPC"):
            number = getattr(errno, self._how)
            raise OSError(number, os.strerror(number))
        return True

    def _less(self, size: int) -> int:
        return max(1, size // 3) if self._how == "short" else 0

    def pread(self, descriptor: int, size: int, offset: int) -> bytes:
        if self._due("pread"):
            size = self._less(size)
        return os.pread(descriptor, size, offset)

    def pwritev(self, descriptor: int, buffers: Sequence[Buffer], offset: int) -> int:
        if self._due("pwritev"):
            whole = b"".join(buffers)
            return os.pwrite(descriptor, whole[: self._less(len(whole))], offset)
        return os.pwritev(descriptor, buffers, offset)

    def fdatasync(self, descriptor: int) -> None:
        self._due("fdatasync")
        os.fdatasync(descriptor)


@pytest.fixture(scope="module")
def bases() -> list[Base]:
    return make_bases(copies=True)


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "image"
    yield path
    path.unlink()


def content_of(path: Path) -> MemoryDevice:
    data = path.read_bytes()
    count = len(data) // BLOCK_SIZE_BYTES
    parts = [data[at * BLOCK_SIZE_BYTES : (at + 1) * BLOCK_SIZE_BYTES] for at in range(count)]
    zeros = bytes(BLOCK_SIZE_BYTES)
    return MemoryDevice(count, {at: part for at, part in enumerate(parts) if part != zeros})


def run(base: Base, part: int, path: Path, host: HostCalls) -> Workload:
    """Make one run on a real file; the image that it leaves must be legal and clean."""
    base.disk.save(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_module, "os", host)
        device = FileDevice(path, writable=True)
        try:
            work = Workload(device, base.model.copy())
            work.run(PARTS[part])
        finally:
            device.close()
    work.end(content_of(path))
    return work


HARMLESS = [("pread", "short"), ("pwritev", "short")]
ERRORS = [
    ("pread", "nothing"),
    ("pread", "EIO"),
    ("pwritev", "nothing"),
    ("pwritev", "ENOSPC"),
    ("fdatasync", "EIO"),
]


@pytest.mark.parametrize("sticky", [False, True], ids=["once", "sticky"])
@pytest.mark.parametrize(("name", "how"), HARMLESS + ERRORS)
def test_call_of_the_host_does_less_than_asked(
    bases: list[Base],
    image: Path,
    name: str,
    how: str,
    sticky: bool,
    record_property: Callable[[str, object], None],
) -> None:
    """Promises C1 and C8: short calls are continued; failed calls are reported and harm nothing."""
    injected = 0
    for part, base in enumerate(bases):
        untouched = HostCalls("none", 0, how, sticky=False)
        assert not run(base, part, image, untouched).failures
        for after in range(part % STRIDE, untouched.calls[name], STRIDE):
            host = HostCalls(name, after, how, sticky=sticky)
            work = run(base, part, image, host)
            assert host.fired, f"part {part}, {name} number {after} was never met"
            if (name, how) in HARMLESS:
                assert not work.failures, f"part {part}, {name} number {after}: {how} was an error"
                assert work.filesystem is None, "it was not unmounted in order"
            elif name in ("pwritev", "fdatasync"):
                assert work.filesystem is not None, f"part {part}, {name} {after}: nobody noticed"
                work.require_failed_for_good()
            injected += 1
    assert injected
    record_property("count", ("faults of the host's calls", injected))
