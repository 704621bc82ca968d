"""When a mount gives free space back to the host: some seconds after it came free, and when asked to.

What comes free is soon used again while a filesystem is busy, above all the places of nodes. So a group
of blocks is left alone until nothing more has come free in it for a while. The loop only looks, in short
steps; a thread discards. Commits stop a discard that may be in their way (storage/discards.py).
"""

import logging
from collections.abc import Awaitable, Callable

import trio

from cowfs.errors import CowfsError
from cowfs.history.filesystem import Filesystem
from cowfs.storage.discards import Sweep

log = logging.getLogger(__name__)

DISCARD_INTERVAL_S = 5.0
STOPPED_WAIT_S = 0.02  # after a commit stopped a discard: others may follow it
SHOW_INTERVAL_S = 0.2

ShowSweep = Callable[[Sweep], Awaitable[None]]


class Discarder:
    """The discards of one mounted filesystem that is open for writing."""

    def __init__(self, filesystem: Filesystem) -> None:
        self._filesystem = filesystem
        self._turn = trio.Lock()  # one sweep at a time

    async def run(self) -> None:
        """Discard what came free and was not used again. Ends by cancellation."""
        filesystem = self._filesystem
        while filesystem.discard and filesystem.store.failed is None:
            await trio.sleep(DISCARD_INTERVAL_S)
            try:
                await self.sweep(Sweep.of_released(filesystem.store, settled=True))
            except CowfsError as error:
                log.debug("free space was not given back to the host: %s", error)

    async def sweep(self, sweep: Sweep, show: ShowSweep | None = None) -> None:
        """Do all of a sweep.

        Args:
            show: called now and then, with how far it is.

        Raises:
            DeviceError: a page of the space map cannot be read, or writing has ended (C8).
        """
        async with self._turn:
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
