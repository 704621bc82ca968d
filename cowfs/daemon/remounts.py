"""`mount -o remount,ro` and `remount,rw`, as the daemon learns of them.

The kernel changes its own flag and tells no FUSE daemon, but it wakes whoever polls the table of mounts.
Then the flag is looked at, and followed: a mount that is read-only for the kernel writes nothing of its
own to the image either, no access times, no freed space, no commits.
"""

import logging
import os
import select
from collections.abc import Awaitable, Callable

import trio

from cowfs.daemon import places
from cowfs.errors import CowfsError

log = logging.getLogger(__name__)

LOOK_INTERVAL_S = 0.2  # at the most so often, where mounts come and go all the time


def kernel_is_read_only(device: int) -> bool | None:
    """Whether the kernel takes a filesystem for read-only; None when no mount of it is in sight.

    Args:
        device: its st_dev.

    Source: proc(5), mountinfo: the options of the filesystem are the last field.
    """
    number = f"{os.major(device)}:{os.minor(device)}".encode()
    with open(places.MOUNTINFO, "rb") as table:
        for line in table:
            before, _, after = line.rstrip(b"\n").partition(b" - ")
            if before.split(b" ")[2:3] == [number]:
                return b"ro" in after.rpartition(b" ")[2].split(b",")
    return None


class Remounts:
    """Follows the kernel's flag of one mount.

    Args:
        device: st_dev of the mount.
        read_only: as it was mounted.
        became: awaited with the new flag when it changed.
    """

    def __init__(
        self, device: int, read_only: bool, became: Callable[[bool], Awaitable[None]]
    ) -> None:
        self._device = device
        self._read_only = read_only
        self._became = became
        self._lock = trio.Lock()

    async def look(self) -> None:
        """See what the kernel says, and follow it. Raises what `became` raises."""
        async with self._lock:
            found = await trio.to_thread.run_sync(kernel_is_read_only, self._device)
            if found is not None and found != self._read_only:
                self._read_only = found
                await self._became(found)

    async def run(self) -> None:
        """Look whenever a mount changes. Ends by cancellation."""
        limiter = trio.CapacityLimiter(1)
        with open(places.MOUNTINFO, "rb") as table:
            changes = select.poll()
            changes.register(table, select.POLLPRI)
            while True:
                await trio.to_thread.run_sync(changes.poll, abandon_on_cancel=True, limiter=limiter)
                try:
                    await self.look()
                except (CowfsError, OSError) as error:
                    log.error("a remount could not be followed: %s", error)
                await trio.sleep(LOOK_INTERVAL_S)
