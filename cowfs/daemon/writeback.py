"""The kernel's write-back cache (`-o writeback`): fetching what it holds before it is needed.

With it, write() returns when the bytes are in the kernel's pages, and they come to us later. What
promises to have them lets the kernel send them first: a snapshot (C6), `cowfs sync`, the commit timer
(C5), the end of the mount. Only files that are open for writing can have such pages: close(), fsync and
the end of a mapping send those of a file.

syncfs(2) makes the kernel send them but does not wait for us to get them. Two things do. Invalidating a
file waits for its pages on their way (since Linux 6.16, where these are the pages of the cache
itself). And requests that nobody waits for stay in order in the kernel: so the release of a directory
that is closed after syncfs comes behind all of them.

Never awaited in the handler of a request: all workers could wait there, and none would read the
requests that are waited for.
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

    async def fetch(self, *, whole: bool = True) -> None:
        """Return when every write() that returned before the call has come to us.

        Args:
            whole: False lets what comes at the same moment as other calls on its file be left for
                the next time, and leaves the pages of open files in the cache.
        """
        if not self._writers():
            return
        async with self.lock:
            self._released = trio.Event()
            # Abandoned when serving ends: then only the unmounting lets it return.
            opened = await trio.to_thread.run_sync(
                functools.partial(self._ask, list(self._writers()), whole=whole),
                abandon_on_cancel=True,
            )
            if opened:
                await self._released.wait()

    def _ask(self, nodes: list[int], *, whole: bool) -> bool:
        """In a thread: the requests that this makes are answered by the loop.

        Returns whether the root directory was opened, and so will be released.
        """
        directory = self._open_root()
        try:
            is_ours = directory is not None and os.fstat(directory).st_dev == self.device
            if is_ours and ctypes.CDLL(None, use_errno=True).syncfs(directory) == -1:
                # The pages of a file could not be written: its fsync or close says so.
                log.debug("syncfs: %s", os.strerror(ctypes.get_errno()))
            # Where the root is out of reach (another mount on top of it, or a lazy unmount)
            # invalidating writes the pages, one after the other.
            for node in nodes if whole or not is_ours else ():
                try:
                    pyfuse3.invalidate_inode(pyfuse3.InodeT(node))
                except OSError as error:
                    if error.errno != errno.ENOENT:  # closed and forgotten meanwhile
                        log.debug("invalidating node %d: %s", node, error)
        finally:
            if directory is not None:
                os.close(directory)
        return is_ours

    def _open_root(self) -> int | None:
        self._thread_id = threading.get_native_id()
        try:
            # Open for this moment alone: an open descriptor would make every umount fail.
            return os.open(self._mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            log.debug("opening %s: %s", self._mountpoint, error)
            return None
        finally:
            self._thread_id = 0
