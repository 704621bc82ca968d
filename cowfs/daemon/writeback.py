"""The kernel's write-back cache (`-o writeback`): fetching what it holds before it is needed.

With it, write() returns when the bytes are in the kernel's pages, and they come to us later. What
promises to have them lets the kernel send them first: a snapshot (C6), fsync and `cowfs sync` (C2), the
commit timer (C5), the end of the mount. Only files that are open for writing can have such pages:
close() and the end of a mapping send them.

syncfs(2) makes the kernel send them but does not wait for us to get them. Two things do. Invalidating a
file waits for its pages on their way (since Linux 6.16, where these are the pages of the cache
itself). And requests that nobody waits for stay in order in the kernel: so the release of a directory
that is closed after syncfs comes behind all of them.
"""

import ctypes
import errno
import functools
import logging
import os
import threading
from collections.abc import Callable, Collection

import trio

from cowfs.daemon.fuse import pyfuse3
from cowfs.errors import CowfsError

log = logging.getLogger(__name__)


class Writeback:
    """The kernel's cache of one mount.

    Args:
        mountpoint: of the mount.
        writers: the nodes that are open for writing.
    """

    def __init__(self, mountpoint: str, writers: Callable[[], Collection[int]]) -> None:
        self._mountpoint = mountpoint
        self._writers = writers
        self.lock = trio.Lock()  # held while our thread has the root directory open
        self._released = trio.Event()
        self._thread_id = 0
        self.device = 0  # st_dev of the mount; set when it answers

    # --- of the operations ---------------------------------------------------------------------------

    def is_ours(self, process_id: int) -> bool:
        """Whether it is our own thread that opens the root directory."""
        return process_id == self._thread_id

    def released(self) -> None:
        """The directory that our thread had opened was released."""
        self._released.set()

    # --- fetching ------------------------------------------------------------------------------------

    async def fetch(self, *, whole: bool = True, besides: int = 0) -> None:
        """Return when every write() that returned before the call has come to us.

        Args:
            whole: False lets what comes at the same moment as other calls on its file be left for
                the next time, and leaves the pages of open files in the cache.
            besides: a node whose pages were fetched by the caller.

        Raises:
            CowfsError: the mount point cannot be opened, so the kernel cannot be asked.
        """
        if not any(node != besides for node in self._writers()):
            return
        async with self.lock:
            nodes = [node for node in self._writers() if node != besides] if whole else []
            self._released = trio.Event()
            try:
                # Abandoned when serving ends: then only the unmounting lets it return.
                await trio.to_thread.run_sync(
                    functools.partial(self._ask, nodes), abandon_on_cancel=True
                )
            except OSError as error:
                raise CowfsError(
                    f"cannot fetch what the kernel holds of {self._mountpoint}: {error.strerror}"
                ) from None
            await self._released.wait()

    def _ask(self, nodes: list[int]) -> None:
        """In a thread: the requests that this makes are answered by the loop."""
        self._thread_id = threading.get_native_id()
        try:
            # Open for this moment alone: an open descriptor would make every umount fail.
            directory = os.open(self._mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        finally:
            self._thread_id = 0
        try:
            if os.fstat(directory).st_dev != self.device:
                raise OSError(errno.EBUSY, "another mount is on top of it")
            if ctypes.CDLL(None, use_errno=True).syncfs(directory) == -1:
                # The pages of a file could not be written: its fsync or close says so.
                log.debug("syncfs: %s", os.strerror(ctypes.get_errno()))
            for node in nodes:
                try:
                    pyfuse3.invalidate_inode(pyfuse3.InodeT(node))
                except OSError as error:
                    if error.errno != errno.ENOENT:  # closed and forgotten meanwhile
                        log.debug("invalidating node %d: %s", node, error)
        finally:
            os.close(directory)
