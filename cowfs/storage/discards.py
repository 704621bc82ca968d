"""Discards: free blocks given back to the host, so that the image takes no more of it than is in use.

What is discarded reads as zeros afterwards, so it counts as a write. Two things keep it from what
somebody needs:

- The space map offers only blocks that could be allocated now. What a retained generation or a reader
  outside still shows is pending, and not among them (I2).
- A block that was free when a sweep saw it may be allocated a moment later, while the discard is on
  its way in a thread. Only a commit writes blocks, and only those that were allocated before its
  freeze. So a commit that was frozen before the sweep looked writes nothing that the sweep saw free,
  and one that is frozen later stops the discard before its first write. A stopped discard begins no
  run any more; the sweep looks again at those that are left.
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

DISCARD_BLOCKS_MIN = 256  # 1 MiB: the host journals every hole, and small ones are soon used again
# One step of a sweep. It ends where one of these is reached, so that neither the loop that looks nor a
# commit that waits for a run is kept long.
STEP_GROUPS_MAX = 4096
STEP_LOADS_MAX = 16  # groups whose page may have to be read
STEP_RUNS_MAX = 256
STEP_BLOCKS_MAX = 8192  # 32 MiB: 13 ms on ext4, nearly all of it for what is in the page cache


class Discard:
    """Runs that were free when a sweep looked. Discarded by `run` unless `stop` comes first."""

    def __init__(self, device: Device, runs: Sequence[Run]) -> None:
        self.runs = runs
        self.done = 0  # of the runs
        self.is_refused = False  # the host cannot do it
        self._device = device
        self._is_stopped = False
        self._turn = threading.Lock()  # held while a run is discarded

    @property
    def is_whole(self) -> bool:
        return self.done == len(self.runs)

    def run(self) -> None:
        """Discard the runs, in order, in any thread; returns early when stopped or refused."""
        for first, count in self.runs:
            with self._turn:
                if self._is_stopped:
                    return
                if not self._device.discard(first * BLOCK_SIZE_BYTES, count * BLOCK_SIZE_BYTES):
                    self.is_refused = True
                    return
                self.done += 1

    def stop(self) -> None:
        """No run is being discarded when this returns, and none will be. From any thread."""
        self._is_stopped = True
        with self._turn:
            pass  # `run` looks at the mark after it took its turn


class Sweep:
    """One pass over groups that discards what is free in them, in steps that are short.

    A step is `look`, in the thread of the store; `Discard.run`, in any thread; and `done_with`, in the
    thread of the store again, whatever happened in between. One sweep at a time.

    Args:
        groups: their numbers, ascending.
        least: blocks in a row that are worth a discard.
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
        """Of what came free since the last such sweep was made, in runs that are worth it.

        Args:
            settled: only where nothing more came free since then; the rest is for the next one.
        """
        return cls(store, store.map.take_released(settled=settled), DISCARD_BLOCKS_MIN)

    @classmethod
    def of_everything(cls, store: Store) -> Sweep:
        """Of every free block, whenever it came free."""
        return cls(store, range(store.map.group_count), 1)

    @property
    def is_done(self) -> bool:
        return self.is_refused or self._at >= len(self._groups)

    @property
    def done_bytes(self) -> int:
        """How much of the image was looked at."""
        return self._at * GROUP_BLOCKS * BLOCK_SIZE_BYTES

    @property
    def total_bytes(self) -> int:
        return len(self._groups) * GROUP_BLOCKS * BLOCK_SIZE_BYTES

    def look(self) -> Discard:
        """Find what is free in the next groups: it is to be discarded now.

        Raises:
            DeviceError: a page of the space map cannot be read, or writing has ended (C8).
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
        """Take note of how far the discard came, and go back to what is left of it."""
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
        """All steps, here and now. Tells `show` after each."""
        while not self.is_done:
            discard = self.look()
            try:
                discard.run()
            finally:
                self.done_with(discard)
            if show is not None:
                show(self)
