"""When a mount gives free blocks back to the host: seconds after they were freed, and on `trim`.

A busy filesystem soon reuses freed blocks, above all those of nodes. So a group of blocks is
discarded only when no block of it was freed for a while. The loop only looks for free runs, in
short steps; a thread discards them. A commit stops a discard that may be in its way
(storage/discards.py).
"""

import logging
from collections.abc import Awaitable, Callable

import trio

from cowfs.errors import CowfsError
from cowfs.history.filesystem import Filesystem
from cowfs.storage.discards import Sweep

log = logging.getLogger(__name__)

DISCARD_INTERVAL_S = 5.0
STOPPED_WAIT_S = 0.02  # pause after a commit stopped a discard: more commits may follow
SHOW_INTERVAL_S = 0.2

ShowSweep = Callable[[Sweep], Awaitable[None]]


class Discarder:
    """The discards of one mounted filesystem that is open for writing."""

    def __init__(self, filesystem: Filesystem) -> None:
        self._filesystem = filesystem
        self._sweeping = trio.Lock()  # one sweep at a time

    async def run(self) -> None:
        """Discard blocks that were freed and not reused, until cancelled or writing has failed."""
        filesystem = self._filesystem
        while filesystem.discard and filesystem.store.failed is None:
            await trio.sleep(DISCARD_INTERVAL_S)
            try:
                await self.sweep(Sweep.of_released(filesystem.store, settled=True))
            except CowfsError as error:
                log.debug("cannot discard free blocks: %s", error)

    async def sweep(self, sweep: Sweep, show: ShowSweep | None = None) -> None:
        """Carry out a sweep to its end.

        Args:
            show: called every SHOW_INTERVAL_S with the progress.

        Raises:
            DeviceError: a page of the space map cannot be read, or writing has ended (C8).
        """
        async with self._sweeping:
            shown = trio.current_time()
            while not sweep.is_done:
                discard = sweep.look()
                try:
                    if discard.runs:
                        await trio.to_thread.run_sync(discard.run)
                finally:
                    sweep.done_with(discard)
                await trio.sleep(0 if discard.is_whole else STOPPED_WAIT_S)
                if show is not None and trio.current_time() - shown > SHOW_INTERVAL_S:
                    await show(sweep)
                    shown = trio.current_time()
