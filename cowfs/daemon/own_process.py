"""The daemon as a process: its signals, descriptors, limits, memory and privileges.

Promises:
- From `EndSignals.install` until the process exits, SIGTERM, SIGINT and SIGHUP never kill it. The
  first of them starts the shutdown, which ends in a last commit; later ones have no effect. So a
  second signal cannot cost that commit.
- A daemon in the background inherits no descriptor of its caller: no lock, pipe or directory of the
  caller stays open as long as the mount.
- Soft limits of the caller's shell do not stop the daemon's writes. Too low a limit of open files
  is refused before the mount is made.
"""

import contextlib
import ctypes
import os
import resource
import signal
from collections.abc import Callable, Iterator
from types import FrameType

import trio

from cowfs.errors import MountError

END_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# For the image, FUSE, the loop, the log, threads that read /proc, and a umount(8) with its pipes.
OWN_DESCRIPTORS_MAX = 32
MALLOC_KEEP_BYTES = 64 << 20
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1  # malloc.h
_PR_SET_NO_NEW_PRIVS = 38  # linux/prctl.h


class EndSignals:
    """The signals that end a mount.

    Attributes:
        first: the first one that arrived.
    """

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        self._wake: Callable[[], None] | None = None

    def install(self) -> None:
        """Handle the signals until `ignore`, also if the caller had them blocked."""
        for number in END_SIGNALS:
            signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, END_SIGNALS)

    def ignore(self) -> None:
        """Ignore the signals during the exit: all is written, and the exit status must be 0.

        Otherwise Python would restore the default handlers during its exit.
        """
        for number in END_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.first is None:
            self.first = signal.Signals(number)
            if self._wake is not None:
                self._wake()

    async def wait(self) -> signal.Signals:
        """Wait for the first signal, which may have arrived before. For one task at a time."""
        arrived = trio.Event()
        token = trio.lowlevel.current_trio_token()

        def wake() -> None:
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(arrived.set)

        self._wake = wake  # before `first` is read, so that no signal is missed
        try:
            if self.first is None:
                await arrived.wait()
        finally:
            self._wake = None
        assert self.first is not None
        return self.first


@contextlib.contextmanager
def end_signals_blocked() -> Iterator[None]:
    """Block the signals in this thread and in the programs that it starts meanwhile.

    A terminal sends SIGINT to fusermount3 too, which must unmount nevertheless.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, END_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def close_descriptors(keep: set[int]) -> None:
    """Close all descriptors except `keep` and the three standard ones."""
    for number in [int(name) for name in os.listdir("/proc/self/fd")]:
        if number > 2 and number not in keep:
            with contextlib.suppress(OSError):  # the descriptor of listdir is closed already
                os.close(number)


def raise_limits(descriptors: int) -> None:
    """Raise the soft limits of open files, file size and CPU time to the hard limits.

    Args:
        descriptors: open files that the daemon may need at once.

    Raises:
        MountError: the hard limit of open files is lower.
    """
    for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_CPU):
        _, hard = resource.getrlimit(limit)
        resource.setrlimit(limit, (hard, hard))
    found = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if resource.RLIM_INFINITY != found < descriptors:
        raise MountError(
            f"a process may open only {found} files here, and the daemon needs {descriptors}; "
            f"raise the limit first: ulimit -n {descriptors}"
        )


def require_file_size(size_bytes: int, name: str) -> None:
    """Refuse an image that is larger than the file size limit: its end could not be written.

    Raises:
        MountError: the hard limit of file sizes is lower than `size_bytes`.
    """
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if resource.RLIM_INFINITY != limit < size_bytes:
        raise MountError(
            f"a file may have at most {limit} bytes here, and {name} has {size_bytes}; "
            "raise the limit first: ulimit -f unlimited"
        )


def leave_terminal() -> None:
    """Connect the three standard descriptors to /dev/null."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)


@contextlib.contextmanager
def stderr_captured(lines: list[str]) -> Iterator[None]:
    """Append standard error to `lines`: libfuse and fusermount3 report errors only there."""
    before = os.dup(2)
    caught = os.memfd_create("stderr")
    os.dup2(caught, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        with open(caught, "rb") as file:
            file.seek(0)
            lines += os.fsdecode(file.read()).splitlines()


def keep_memory() -> None:
    """Let malloc reuse the buffers of large requests: a fresh map costs 256 page faults per MiB.

    Halves the CPU time of large reads and writes. Malloc keeps no more than was in use at one time.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, MALLOC_KEEP_BYTES)
    libc.mallopt(_M_TRIM_THRESHOLD, MALLOC_KEEP_BYTES)


def take_no_new_privileges() -> None:
    """Give up gaining privileges from set-id programs, for this process and its children: prctl(2).

    Only as root, who unmounts with a system call. Another user's daemon needs the set-uid
    fusermount3 to unmount at its end.
    """
    if os.geteuid() == 0:
        ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
