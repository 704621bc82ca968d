"""Follow `mount -o remount,ro` and `remount,rw`.

The kernel changes its own read-only flag without telling the FUSE daemon, but it wakes every poll
of the mount table. The daemon then reads the flag and follows it: while the kernel has the mount
read-only, the daemon writes nothing to the image either: no access times, no freed space, no
commits.
"""

import logging
import os
import select
from collections.abc import Awaitable, Callable

import trio

from cowfs.daemon import places
from cowfs.errors import CowfsError

log = logging.getLogger(__name__)

LOOK_INTERVAL_S = 0.2  # shortest time between two looks, where mounts come and go all the time


def kernel_is_read_only(device: int) -> bool | None:
    """Whether the kernel has a filesystem read-only; None if no mount of it is visible.

    Args:
        device: st_dev of the filesystem.

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
    """Follows the kernel's read-only flag of one mount.

    Args:
        device: st_dev of the mount.
        read_only: the flag when it was mounted.
        follow: awaited with the new flag when it has changed.
    """

    def __init__(
        self, device: int, read_only: bool, follow: Callable[[bool], Awaitable[None]]
    ) -> None:
        self._device = device
        self._read_only = read_only
        self._follow = follow
        self._lock = trio.Lock()

    async def look(self) -> None:
        """Read the kernel's flag, and follow it if it has changed. Raises what `follow` raises."""
        async with self._lock:
            found = await trio.to_thread.run_sync(kernel_is_read_only, self._device)
            if found is not None and found != self._read_only:
                self._read_only = found
                await self._follow(found)

    async def run(self) -> None:
        """Look at every change of the mount table. Ends by cancellation."""
        limiter = trio.CapacityLimiter(1)
        with open(places.MOUNTINFO, "rb") as table:
            changes = select.poll()
            changes.register(table, select.POLLPRI)
            while True:
                await trio.to_thread.run_sync(changes.poll, abandon_on_cancel=True, limiter=limiter)
                try:
                    await self.look()
                except (CowfsError, OSError) as error:
                    log.error("cannot follow a remount: %s", error)
                await trio.sleep(LOOK_INTERVAL_S)
