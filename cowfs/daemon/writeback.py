"""The kernel's write-back cache (`-o writeback`): fetch its dirty pages before they are needed.

With the cache, write() returns when the bytes are in pages of the kernel, and the daemon gets them
later. So what promises to include them fetches them first: a snapshot (C6), `cowfs sync`, the
commit timer (C5), the end of the mount. Only files open for writing can have dirty pages, because
close(), fsync and the end of a mapping send the pages of a file.

syncfs(2) makes the kernel send dirty pages, but does not wait until the daemon has them. Two things
wait. Invalidating an inode waits for its pages in flight (since Linux 6.16, where these are the
pages of the cache itself). And the kernel keeps requests that nobody waits for in order. So if a
directory is closed after syncfs, its release comes after all of those pages.

Never await a fetch in the handler of a request: all workers could end up waiting, and none would
read the requests that they wait for.
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
    """The write-back cache of one mount.

    Args:
        mountpoint: of the mount.
        writers: gives the nodes that are open for writing.

    Attributes:
        lock: held while a thread of ours has the root directory open.
        device: st_dev of the mount; set when the mount answers.
    """

    def __init__(self, mountpoint: str, writers: Callable[[], Collection[int]]) -> None:
        self._mountpoint = mountpoint
        self._writers = writers
        self.lock = trio.Lock()
        self._released = trio.Event()
        self._thread_id = 0  # of our thread while it opens the root directory
        self.device = 0

    # --- called by the operations -----------------------------------------------------------------

    def is_ours(self, process_id: int) -> bool:
        """Whether an opendir comes from our own thread."""
        return process_id == self._thread_id

    def released(self) -> None:
        """Record the release of the directory that our thread had opened."""
        self._released.set()

    # --- fetching ---------------------------------------------------------------------------------

    async def fetch(self, *, whole: bool = True) -> None:
        """Return when the daemon has the data of every write() that returned before the call.

        Args:
            whole: False skips the invalidation, so open files keep their cached pages. Then pages
                whose file is busy with other calls at that moment may be left for the next fetch.
        """
        if not self._writers():
            return
        async with self.lock:
            self._released = trio.Event()
            # If serving ends first, the thread is abandoned: it returns when the mount is
            # unmounted.
            opened = await trio.to_thread.run_sync(
                functools.partial(self._ask, list(self._writers()), whole=whole),
                abandon_on_cancel=True,
            )
            if opened:
                await self._released.wait()

    def _ask(self, nodes: list[int], *, whole: bool) -> bool:
        """Make the kernel send its dirty pages. Runs in a thread, because the loop must answer.

        Returns:
            Whether the root directory was opened, so that its release will come.
        """
        directory = self._open_root()
        try:
            is_ours = directory is not None and os.fstat(directory).st_dev == self.device
            if is_ours and ctypes.CDLL(None, use_errno=True).syncfs(directory) == -1:
                # Some page could not be written; fsync or close of its file reports that.
                log.debug("syncfs: %s", os.strerror(ctypes.get_errno()))
            # If the root cannot be opened (another mount covers it, or it was unmounted lazily),
            # invalidating each inode writes its pages.
            for node in nodes if whole or not is_ours else ():
                try:
                    pyfuse3.invalidate_inode(pyfuse3.InodeT(node))
                except OSError as error:
                    if error.errno != errno.ENOENT:  # ENOENT: closed and forgotten meanwhile
                        log.debug("invalidating node %d: %s", node, error)
        finally:
            if directory is not None:
                os.close(directory)
        return is_ours

    def _open_root(self) -> int | None:
        self._thread_id = threading.get_native_id()
        try:
            # The caller closes it soon: an open descriptor makes every umount fail.
            return os.open(self._mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            log.debug("opening %s: %s", self._mountpoint, error)
            return None
        finally:
            self._thread_id = 0
