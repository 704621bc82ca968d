"""The daemon as a process: its signals, its descriptors, its limits.

Promises:
- From `EndSignals.install` until the process is gone, SIGTERM, SIGINT and SIGHUP end nothing by
  themselves. The first one asks for the end, in a last commit; the others, however many, are
  part of the same wish. So nobody's second signal costs that commit.
- A daemon in the background has no descriptor of its caller's: no lock, pipe or directory of theirs
  lives as long as the mount.
- Soft limits of the caller's shell do not end the daemon's writing, and too few descriptors are
  refused before there is a mount.
"""

import contextlib
import os
import resource
import signal
from collections.abc import Callable, Iterator
from types import FrameType

import trio

from cowfs.errors import MountError

END_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# The image, FUSE, the loop, the log, threads that look into /proc, a umount(8) with its pipes.
OWN_DESCRIPTORS_MAX = 32


class EndSignals:
    """The wish that the mount may end, which signals bring."""

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        self._wake: Callable[[], None] | None = None

    def install(self) -> None:
        """Take the signals, for the rest of the process's life; also if the caller had them blocked."""
        for number in END_SIGNALS:
            signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, END_SIGNALS)

    def ignore(self) -> None:
        """All is written: what is left is to exit, with the status of an orderly end.

        Python would give the signals their default back while it exits.
        """
        for number in END_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.first is None:
            self.first = signal.Signals(number)
            if self._wake is not None:
                self._wake()

    async def wait(self) -> signal.Signals:
        """The first of them, also one that came before the call. For one task at a time."""
        arrived = trio.Event()
        token = trio.lowlevel.current_trio_token()

        def wake() -> None:
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(arrived.set)

        self._wake = wake  # before the look at `first`: one of the two sees a signal
        try:
            if self.first is None:
                await arrived.wait()
        finally:
            self._wake = None
        assert self.first is not None
        return self.first


@contextlib.contextmanager
def end_signals_blocked() -> Iterator[None]:
    """Keep the signals from this thread and from the programs that it starts meanwhile.

    A terminal sends them to fusermount3 too, which is to unmount all the same.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, END_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def close_descriptors(keep: set[int]) -> None:
    """Close all that is open but `keep` and the three standard descriptors."""
    for number in [int(name) for name in os.listdir("/proc/self/fd")]:
        if number > 2 and number not in keep:
            with contextlib.suppress(OSError):  # of the listing itself
                os.close(number)


def raise_limits(descriptors: int) -> None:
    """Raise the soft limits that would end a daemon's work.

    Args:
        descriptors: how many the daemon may need at once.

    Raises:
        MountError: it may not have so many.
    """
    for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_CPU):
        _, hard = resource.getrlimit(limit)
        resource.setrlimit(limit, (hard, hard))
    found = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if resource.RLIM_INFINITY != found < descriptors:
        raise MountError(
            f"a process may open {found} files here and the daemon needs {descriptors}; "
            f"ulimit -n {descriptors} first"
        )


def require_file_size(size_bytes: int, name: str) -> None:
    """Refuse an image of which the end could not be written.

    Raises:
        MountError: the caller's limit of the size of files is below it.
    """
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if resource.RLIM_INFINITY != limit < size_bytes:
        raise MountError(
            f"files may be {limit} bytes long here and {name} has {size_bytes}; "
            "ulimit -f unlimited first"
        )
