"""One operation at a time, in three steps: admit, reach, change.

- *Admit*: find room, once, at the start. This may commit, and the commit begins a new generation in
  which nothing is reached. So nothing may be reached before.
- *Reach*: load and shadow everything that will be read or changed (btree.py). This may find damage,
  or need to wait: then the operation is given up without a trace.
- *Change*: cannot fail and does not wait. It begins with the call that the log records, if there
  is a log (log.py).

`Tree` asserts the order: it reaches only in the second step and changes only in the third. An
exception in the third step is our bug and leaves half an operation in memory. That must never be
written, so it ends all writing, and the newest generation stays (C8).
"""

from collections.abc import Callable
from types import TracebackType
from typing import Self

from cowfs.storage.admission import Admission
from cowfs.storage.log import Log

IDLE, REACHING, CHANGING = 0, 1, 2


class Operation:
    """The current operation on one tree. One object serves all operations, one after the other.

        with volume.operation.begin(TIER_ADD) as operation:
            ...  # look, refuse, reach
            operation.change(call, size_bytes)
            ...  # change

    Args:
        admission: of the store.
        fail: ends all writing; gets the exception that was raised in the third step.
        log: records the calls of a volume.

    Attributes:
        step: IDLE, REACHING or CHANGING.
    """

    __slots__ = ("_admission", "_fail", "_log", "step")

    def __init__(self, admission: Admission, fail: Callable[[Exception], None], log: Log) -> None:
        self._admission = admission
        self._fail = fail
        self._log = log
        self.step = IDLE

    def begin(self, tier: int, blocks: int = 0) -> Self:
        """Admit an operation that adds `blocks` of data, and enter the second step.

        Raises:
            NoSpaceError, ReadOnlyError, DeviceError: as `Admission.admit`.
        """
        assert self.step == IDLE, "an operation begins inside another"
        self._admission.admit(blocks, tier)
        self.step = REACHING
        return self

    def begin_admitted(self) -> Self:
        """Enter the second step: for a freeze, or after `Admission.would_admit` said yes."""
        assert self.step == IDLE, "an operation begins inside another"
        self.step = REACHING
        return self

    def change(self, call: object, size_bytes: int) -> None:
        """Enter the third step: all is reached, and what follows cannot fail.

        Args:
            call: the operation as a value, for the log (files/calls.py).
            size_bytes: upper bound of its encoded size.
        """
        assert self.step == REACHING, "an operation changes twice, or before it began"
        self.step = CHANGING
        self._log.add(call, size_bytes)

    def change_unlogged(self) -> None:
        """As `change`, for what changes no file that a program could see, or is a commit (L6)."""
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
