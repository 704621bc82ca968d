"""Discards: give free blocks back to the host, so that the image takes no more room than it uses.

Discarded blocks read as zeros afterwards, so a discard counts as a write. Two rules keep discards
away from blocks that somebody needs:

- The space map gives only blocks that can be allocated now. Blocks that a retained generation or a
  reader outside shows are pending, so they are not among these (I2).
- A block that was free when a sweep looked may be allocated before the thread discards it. Only a
  commit writes blocks, and only blocks allocated before its freeze. So a commit frozen before the
  sweep looked writes no block that the sweep saw free. A commit frozen later stops the discard
  before its first write. A stopped discard begins no further run; the sweep looks at the rest
  again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from cowfs.storage.device import Device
from cowfs.storage.format import BLOCK_SIZE_BYTES, GROUP_BLOCKS
from cowfs.storage.runs import Run, merge_runs

if TYPE_CHECKING:
    from cowfs.storage.store import Store

DISCARD_BLOCKS_MIN = 256  # 1 MiB: the host journals each hole, and small holes are soon used again
# A step of a sweep ends when it reaches one of these limits: neither the event loop nor a commit
# that waits for a run should wait long.
STEP_GROUPS_MAX = 4096
STEP_LOADS_MAX = 16  # groups whose page of refcounts may have to be read
STEP_RUNS_MAX = 256
STEP_BLOCKS_MAX = (
    8192  # 32 MiB: 13 ms on ext4, nearly all of it to drop the range from the page cache
)


class Discard:
    """Runs that were free when a sweep looked. `run` discards them unless `stop` comes first.

    Attributes:
        runs: to discard, in this order.
        done: number of runs that are discarded.
        is_refused: whether the host cannot discard.
    """

    def __init__(self, device: Device, runs: Sequence[Run]) -> None:
        self.runs = runs
        self.done = 0
        self.is_refused = False
        self._device = device
        self._is_stopped = False
        self._turn = threading.Lock()  # held while a run is discarded

    @property
    def is_whole(self) -> bool:
        return self.done == len(self.runs)

    def run(self) -> None:
        """Discard the runs, from any thread. Returns early when stopped or refused."""
        for first, count in self.runs:
            with self._turn:
                if self._is_stopped:
                    return
                if not self._device.discard(first * BLOCK_SIZE_BYTES, count * BLOCK_SIZE_BYTES):
                    self.is_refused = True
                    return
                self.done += 1

    def stop(self) -> None:
        """Stop, from any thread: when this returns no run is being discarded, nor will be."""
        self._is_stopped = True
        with self._turn:
            pass  # `run` reads `_is_stopped` only while it holds the lock


class Sweep:
    """One pass over groups that discards their free blocks, in short steps. One sweep at a time.

    A step is `look`, in the store's thread; then `Discard.run`, in any thread; then `done_with`, in
    the store's thread again, whatever happened in between.

    Args:
        groups: group numbers, ascending.
        least: the shortest run, in blocks, that is discarded.

    Attributes:
        discarded_blocks: so far.
        is_refused: whether the host cannot discard; ends the sweep.
    """

    def __init__(self, store: Store, groups: Sequence[int], least: int) -> None:
        self._store = store
        self._groups = groups
        self._least = least
        self._at = 0
        self._seen_from = 0
        self.discarded_blocks = 0
        self.is_refused = False

    @classmethod
    def of_released(cls, store: Store, *, settled: bool = False) -> Sweep:
        """A sweep of the groups in which blocks were released since the last such sweep.

        Args:
            settled: only groups in which no block was released since then; the others are left for
                the next one.
        """
        return cls(store, store.map.take_released(settled=settled), DISCARD_BLOCKS_MIN)

    @classmethod
    def of_everything(cls, store: Store) -> Sweep:
        """A sweep of every free block."""
        return cls(store, range(store.map.group_count), 1)

    @property
    def is_done(self) -> bool:
        return self.is_refused or self._at >= len(self._groups)

    @property
    def done_bytes(self) -> int:
        """How much of the image the sweep has passed."""
        return self._at * GROUP_BLOCKS * BLOCK_SIZE_BYTES

    @property
    def total_bytes(self) -> int:
        return len(self._groups) * GROUP_BLOCKS * BLOCK_SIZE_BYTES

    def look(self) -> Discard:
        """Find the free runs of the next groups, for a discard that the caller runs now.

        Raises:
            CorruptError, DeviceError: a page of the space map cannot be read.
            ReadOnlyError, DeviceError: the image cannot be written (any more, C8).
        """
        store = self._store
        store.require_writable()
        assert store.discard is None, "one discard at a time"
        self._seen_from = self._at
        space_map = store.map
        runs: list[Run] = []
        blocks = loads = 0
        for number in self._groups[self._at : self._at + STEP_GROUPS_MAX]:
            loads += space_map.free[number] > 0 and not space_map.is_unused(number)
            if loads > STEP_LOADS_MAX or len(runs) >= STEP_RUNS_MAX or blocks >= STEP_BLOCKS_MAX:
                break
            self._at += 1
            found = space_map.free_runs(number, self._least)
            blocks += sum(count for _, count in found)
            runs += found
        store.discard = Discard(store.device, merge_runs(runs))
        return store.discard

    def done_with(self, discard: Discard) -> None:
        """Count what `discard` did, and go back to the group where it was stopped."""
        discard.stop()
        self._store.discard = None
        self.discarded_blocks += sum(count for _, count in discard.runs[: discard.done])
        self.is_refused = discard.is_refused
        if not discard.is_whole:
            group = discard.runs[discard.done][0] // GROUP_BLOCKS
            self._at = self._seen_from
            while self._groups[self._at] < group:
                self._at += 1

    def run(self, show: Callable[[Sweep], None] | None = None) -> None:
        """Do all steps in this thread. Calls `show` after each."""
        while not self.is_done:
            discard = self.look()
            try:
                discard.run()
            finally:
                self.done_with(discard)
            if show is not None:
                show(self)
