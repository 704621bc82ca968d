"""The burst loop: pyfuse3 keeps reading while requests are queued, with trio as the event loop.

Promises:
- While the kernel has requests queued, a worker reads one after the other without passing through
  the scheduler. After `BURST_REQUESTS_MAX` requests or `BURST_DURATION_NS_MAX`, whichever comes
  first, every other task, timer and descriptor gets a turn (a real checkpoint).
- As soon as a handler really suspends, another worker may read: handlers that wait overlap.
- A client that comes back within microseconds is waited for awake (see `SPIN_DURATION_NS_MAX`);
  with nothing to do the loop sleeps in epoll and uses no CPU.
- It stays plain trio. A cancelled worker ends at its next turn, `pyfuse3.terminate` ends all of
  them.

How: pyfuse3 looks the name `trio` up in its own module at every use, and `pyfuse3.asyncio` uses
that seam to put another event loop there. `install_burst_loop` puts an object there that answers
`open_nursery`, `Lock` and `lowlevel.wait_readable` itself while a session runs, and passes
everything else to trio. pyfuse3 takes the lock, waits for the descriptor, gives the lock back,
reads one request and awaits its handler, and has no suspension point between the wait and the
read, so a request seen by poll is read by the worker that saw it.

One thing can come between: a client that is killed takes its request back. The read, which
libfuse does blocking and pyfuse3 with the GIL held, would then stop the whole process, timers and
threads included, until some other request comes. pyfuse3's own loop has this fault too. Here an
alarm signal interrupts such a read (`_ReadAlarm`), which pyfuse3 takes for "wait again".
"""

from __future__ import annotations

import select
import signal
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from time import monotonic_ns
from types import FrameType, TracebackType
from typing import Any

import trio
from trio.lowlevel import ParkingLot, Task, enable_ki_protection

from cowfs.daemon.fuse import pyfuse3

# One turn costs a checkpoint (4 us) and an epoll call: lost in the noise over 64 requests of 12 us.
# And 64 cheap requests keep a timer waiting for less than 1 ms.
BURST_REQUESTS_MAX = 64

# Bounds the wait of timers where requests are not cheap (a write of 1 MiB takes about 300 us).
BURST_DURATION_NS_MAX = 2_000_000

# Before it sleeps, the reader polls for this long, if the last sleep was short: a client that
# makes one call after the other has its next request here within 20 us, while a sleep and a
# wake-up cost both sides 30 us. One client on its own CPU: 14,000 -> 46,000 lookups/s, and *less*
# CPU per request (46 -> 13 us). 100 us measured the same.
SPIN_DURATION_NS_MAX = 50_000
SHORT_SLEEP_NS_MAX = 200_000

# Each spin in vain doubles the number of short sleeps before the next try, up to this; a spin that
# meets a request sets it back to one. So a client that the spin keeps from its CPU, or that
# thinks for longer, pays 50 us once in a thousand requests, and an idle loop never spins.
SHORT_SLEEPS_NEEDED_MAX = 1024

# How long the process may stand still when a client took its request back. Fifty signals a second
# while busy measured as 0.5 % of a CPU, within noise.
READ_ALARM_INTERVAL_S = 0.020


class _ReadAlarm:
    """Interrupts a read that blocks: SIGALRM every `READ_ALARM_INTERVAL_S` while there is work.

    Started when the reader wakes up. It goes off at most once while the reader sleeps, sees that
    there is nothing to interrupt, and stops: an idle loop gets no signals, a busy one makes no
    system calls for this. Python's handlers do not restart system calls, so the read ends in EINTR.
    Only in the main thread; elsewhere Python gives no signals and the reads stay unguarded.
    """

    def __init__(self) -> None:
        self._running = False
        self._handler_before: Any = None
        self.reader_sleeps = False

    def install(self) -> None:
        self._running = False
        self.reader_sleeps = False
        if threading.current_thread() is threading.main_thread():
            self._handler_before = signal.signal(signal.SIGALRM, self._ring)
        else:
            self._running = True  # nothing to start

    def uninstall(self) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._handler_before)

    def start(self) -> None:
        if not self._running:
            self._running = True
            signal.setitimer(signal.ITIMER_REAL, READ_ALARM_INTERVAL_S, READ_ALARM_INTERVAL_S)

    def _ring(self, number: int, frame: FrameType | None) -> None:
        if self.reader_sleeps:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self._running = False


class _BurstSession(trio.abc.Instrument):
    """Who reads, and how long the burst has lasted; also the lock of the workers.

    As an instrument it is told when a task's step ends. That is the moment at which a handler
    has really suspended (or the reader has), and so the only moment at which a worker that waits
    for its turn to read needs to be woken.
    """

    def __init__(self) -> None:
        self.alarm = _ReadAlarm()
        self.reset()

    def reset(self) -> None:
        """Forget the previous run."""
        self._poller = select.poll()
        self._descriptor = -1
        self._locked = False
        self._lot = ParkingLot()
        self._woken = False  # a worker left the lot and has not run yet
        self._burst_requests = 0
        self._burst_end_ns = 0
        self._turn_due = False
        self._closings = 0
        self._short_sleeps = 0
        self._short_sleeps_needed = 1

    # Hooks of trio.

    def after_task_step(self, task: Task) -> None:
        """Start a new burst, and pass the right to read on if nobody uses it."""
        self._burst_requests = 0
        if not self._locked and not self._woken and self._lot:
            self._woken = True
            self._lot.unpark(count=1)

    def task_spawned(self, task: Task) -> None:
        """Give a new task its first step soon.

        A worker that starts another would otherwise see it still missing at the next request and
        start one more each time.
        """
        self._turn_due = True

    # The lock of the workers. No hand-over: whoever runs and finds it free takes it.

    @enable_ki_protection
    async def __aenter__(self) -> None:
        while self._locked:
            await self._lot.park()
            self._woken = False
        self._locked = True

    @enable_ki_protection
    async def __aexit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._locked = False

    # The wait.

    @enable_ki_protection
    async def wait_readable(self, descriptor: int) -> None:
        """Return when a request is queued at `descriptor`, at once if the burst allows it.

        Raises:
            trio.ClosedResourceError: the session was told to end.
        """
        if self._turn_due or (
            self._burst_requests
            and (self._burst_requests >= BURST_REQUESTS_MAX or monotonic_ns() >= self._burst_end_ns)
        ):
            closings = self._closings
            self._turn_due = False
            await trio.lowlevel.checkpoint()
            if self._closings != closings:
                # notify_closing found nobody waiting and cannot come again.
                raise trio.ClosedResourceError("the session is ending")
        if not self._burst_requests:
            self._burst_end_ns = monotonic_ns() + BURST_DURATION_NS_MAX
        if descriptor != self._descriptor:
            self._poller = select.poll()
            self._poller.register(descriptor, select.POLLIN)
            self._descriptor = descriptor
        # Any event (readable, hung up, failed) is for the read to find out.
        if not self._poller.poll(0) and not self._spin():
            await self._sleep(descriptor)
        self._burst_requests += 1

    async def _sleep(self, descriptor: int) -> None:
        start_ns = monotonic_ns()
        self.alarm.reader_sleeps = True
        try:
            await trio.lowlevel.wait_readable(descriptor)
        finally:
            self.alarm.reader_sleeps = False
            self.alarm.start()
        now_ns = monotonic_ns()
        self._burst_end_ns = now_ns + BURST_DURATION_NS_MAX
        if now_ns - start_ns < SHORT_SLEEP_NS_MAX:
            self._short_sleeps += 1
        else:
            self._short_sleeps = 0

    def _spin(self) -> bool:
        """Poll for a moment, if that promises something, and tell whether a request came."""
        if self._short_sleeps < self._short_sleeps_needed:
            return False
        end_ns = monotonic_ns() + SPIN_DURATION_NS_MAX
        while monotonic_ns() < end_ns:
            if self._poller.poll(0):
                self._short_sleeps_needed = 1
                return True
        self._short_sleeps = 0
        self._short_sleeps_needed = min(2 * self._short_sleeps_needed, SHORT_SLEEPS_NEEDED_MAX)
        return False

    def note_closing(self) -> None:
        """Remember that the session ends, for a worker that is in its checkpoint just now."""
        self._closings += 1


class _BurstLowlevel:
    """Stands for `trio.lowlevel`."""

    def __init__(self, session: _BurstSession) -> None:
        self._session = session
        self.wait_readable: Callable[[int], Awaitable[None]] = trio.lowlevel.wait_readable

    def __getattr__(self, name: str) -> Any:
        return getattr(trio.lowlevel, name)

    def notify_closing(self, descriptor: int) -> None:
        self._session.note_closing()
        trio.lowlevel.notify_closing(descriptor)


class _BurstLoop:
    """Stands for `trio` in pyfuse3. Outside of a running session it is nothing but trio."""

    def __init__(self) -> None:
        self._session = _BurstSession()
        self._running = False
        self.lowlevel = _BurstLowlevel(self._session)

    def __getattr__(self, name: str) -> Any:
        return getattr(trio, name)

    def Lock(self) -> _BurstSession | trio.Lock:  # noqa: N802 - the name that pyfuse3 looks up
        return self._session if self._running else trio.Lock()

    @asynccontextmanager
    async def open_nursery(self) -> AsyncGenerator[trio.Nursery, None]:
        """A nursery of trio's with the burst session around it; pyfuse3 opens one, in main()."""
        self._session.reset()
        self._session.alarm.install()
        trio.lowlevel.add_instrument(self._session)
        self._running = True
        self.lowlevel.wait_readable = self._session.wait_readable
        try:
            async with trio.open_nursery() as nursery:
                yield nursery
        finally:
            self.lowlevel.wait_readable = trio.lowlevel.wait_readable
            self._running = False
            trio.lowlevel.remove_instrument(self._session)
            self._session.alarm.uninstall()


def install_burst_loop() -> None:
    """Let the next `pyfuse3.main` read in bursts.

    Call it before `pyfuse3.main` starts; a second call changes nothing. Call `pyfuse3.main` in
    the main thread, and leave SIGALRM and the real-time interval timer to it.
    """
    if not isinstance(_current(), _BurstLoop):
        setattr(pyfuse3, "trio", _BurstLoop())  # noqa: B010 - not in the stubs of pyfuse3


def uninstall_burst_loop() -> None:
    """Give pyfuse3 its own session loop back. Not while `pyfuse3.main` runs."""
    setattr(pyfuse3, "trio", trio)  # noqa: B010 - not in the stubs of pyfuse3


def _current() -> object:
    return getattr(pyfuse3, "trio")  # noqa: B009 - not in the stubs of pyfuse3
