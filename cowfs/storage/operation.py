"""One operation at a time, in three steps: admit, reach, change.

- *Admit*: the room is found once, at the start. This may commit, and a commit begins a new generation
  in which nothing is reached yet: so nothing may be reached before.
- *Reach*: everything that will be read or changed is brought into memory and shadowed (btree.py). This
  may meet damage, and later may ask to wait: then the operation is given up without a trace.
- *Change*: cannot fail and cannot wait.

`Tree` asserts the order: it reaches only in the second step and changes only in the third. An exception
in the third step is our mistake and leaves half an operation in memory; that must never be written, so
it ends all writing, and the last generation stays (C8).
"""

from collections.abc import Callable
from types import TracebackType
from typing import Self

from cowfs.storage.admission import Admission

IDLE, REACHING, CHANGING = 0, 1, 2


class Operation:
    """The operation under way on one tree; used again for the next.

        with volume.operation.begin(TIER_ADD) as operation:
            ...  # look, refuse, reach
            operation.change()
            ...  # change

    Args:
        admission: of the store.
        fail: ends all writing, told of an exception that came while changing.

    Attributes:
        step: IDLE, REACHING or CHANGING.
    """

    __slots__ = ("_admission", "_fail", "step")

    def __init__(self, admission: Admission, fail: Callable[[Exception], None]) -> None:
        self._admission = admission
        self._fail = fail
        self.step = IDLE

    def begin(self, tier: int, blocks: int = 0) -> Self:
        """Admit an operation that adds so many blocks of data. It reaches from here on.

        Raises:
            NoSpaceError, ReadOnlyError, DeviceError: as `Admission.admit`.
        """
        assert self.step == IDLE, "an operation begins inside another"
        self._admission.admit(blocks, tier)
        self.step = REACHING
        return self

    def begin_admitted(self) -> Self:
        """Begin what `Admission.would_admit` found room for, or what a freeze places."""
        assert self.step == IDLE, "an operation begins inside another"
        self.step = REACHING
        return self

    def change(self) -> None:
        """All is reached: what follows cannot fail."""
        assert self.step == REACHING, "an operation changes twice, or before it began"
        self.step = CHANGING

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and self.step == CHANGING:
            self._fail(error if isinstance(error, Exception) else Exception(repr(error)))
        self.step = IDLE
