"""The burst loop: a worker of pyfuse3 reads request after request as long as the kernel has any.

Promises:
- While the kernel has requests queued, a worker reads them one after the other without passing
  through trio's scheduler. After `BURST_REQUESTS_MAX` requests or `BURST_DURATION_NS_MAX`,
  whichever comes first, a real checkpoint gives every other task, timer and descriptor a turn.
- As soon as a handler really suspends, another worker may read: handlers that wait overlap.
- The loop spins briefly for a client whose next request comes within microseconds (see
  `SPIN_DURATION_NS_MAX`). An idle loop sleeps in epoll and uses no CPU.
- It stays plain trio. A cancelled worker ends at its next turn, `pyfuse3.terminate` ends all of
  them.

How: pyfuse3 looks the name `trio` up in its own module at every use. `pyfuse3.asyncio` uses that to
replace the event loop, and so does `install_burst_loop`. It puts an object there that implements
`open_nursery`, `Lock` and `lowlevel.wait_readable` itself while a session runs, and passes
everything else to trio. A worker of pyfuse3 takes the lock, waits for the descriptor, releases the
lock, reads one request and awaits its handler. Between the wait and the read it has no suspension
point, so a request that poll has seen is read by the worker that saw it.

There is one exception: the kernel withdraws the request of a client that is killed. The read is
blocking and pyfuse3 holds the GIL, so the whole process would stop, timers and threads included,
until another request comes. pyfuse3's own loop has this fault too. Here an alarm signal interrupts
such a read (`_ReadAlarm`), and pyfuse3 then waits again.
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

# A turn costs a checkpoint (4 us) and an epoll call: within noise over 64 requests of 12 us each.
# 64 cheap requests delay a timer by less than 1 ms.
BURST_REQUESTS_MAX = 64

# Bounds the delay of timers where requests are not cheap (a write of 1 MiB takes about 300 us).
BURST_DURATION_NS_MAX = 2_000_000

# If its last sleep was short, the reader polls for this long before it sleeps again. A client that
# makes one call after the other sends its next request within 20 us, while a sleep and a wake-up
# cost both sides 30 us. Measured with one client on its own CPU: 14,000 -> 46,000 lookups/s, and
# *less* CPU per request (46 -> 13 us). 100 us measured the same.
SPIN_DURATION_NS_MAX = 50_000
SHORT_SLEEP_NS_MAX = 200_000

# Each spin without a request doubles the number of short sleeps before the next spin, up to this
# limit; a spin that sees a request resets the number to one. So a client that needs the CPU of the
# spinning reader, or is slower, loses 50 us once in a thousand requests. An idle loop never spins.
SHORT_SLEEPS_NEEDED_MAX = 1024

# How long the process may be blocked by a withdrawn request. Fifty signals a second while busy
# measured as 0.5 % of a CPU, within noise.
READ_ALARM_INTERVAL_S = 0.020


class _ReadAlarm:
    """Interrupts a blocked read: SIGALRM every `READ_ALARM_INTERVAL_S` while the loop is busy.

    The timer starts when the reader wakes up. At its first signal while the reader sleeps it stops
    itself. So an idle loop gets no signals, and a busy one makes no system calls for the timer.
    Signal handlers of Python do not restart system calls, so the read ends with EINTR. Python runs
    them in the main thread only; in another thread reads are not guarded.
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
            self._running = True  # so that `start` does nothing

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
    """The lock of the workers, the wait for requests, and the limits of a burst.

    As an instrument it learns when the step of a task ends: a handler, or the reader, has really
    suspended. Only then does a worker that waits for the lock have to be woken.
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
        """Start a new burst, and wake a worker if the lock is free."""
        self._burst_requests = 0
        if not self._locked and not self._woken and self._lot:
            self._woken = True
            self._lot.unpark(count=1)

    def task_spawned(self, task: Task) -> None:
        """End the burst soon, so that a new task gets its first step.

        Otherwise a worker that starts another one would not see it run by the next request, and
        start one more each time.
        """
        self._turn_due = True

    # The lock of the workers. It is not handed over: the first worker that finds it free takes it.

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
        """Return when a request is queued at `descriptor`. Within a burst this may not suspend.

        Raises:
            trio.ClosedResourceError: the session is ending.
        """
        if self._turn_due or (
            self._burst_requests
            and (self._burst_requests >= BURST_REQUESTS_MAX or monotonic_ns() >= self._burst_end_ns)
        ):
            closings = self._closings
            self._turn_due = False
            await trio.lowlevel.checkpoint()
            if self._closings != closings:
                # notify_closing came during the checkpoint, with nobody waiting, and comes once.
                raise trio.ClosedResourceError("the session is ending")
        if not self._burst_requests:
            self._burst_end_ns = monotonic_ns() + BURST_DURATION_NS_MAX
        if descriptor != self._descriptor:
            self._poller = select.poll()
            self._poller.register(descriptor, select.POLLIN)
            self._descriptor = descriptor
        # Return at any event (readable, hung up, error): the read then reports which.
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
        """Poll for SPIN_DURATION_NS_MAX if enough sleeps were short. Whether a request came."""
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

    def is_queued(self) -> bool:
        """Whether a request is queued."""
        return bool(self._poller.poll(0))

    def note_closing(self) -> None:
        """Remember that the session ends, for a worker that is in its checkpoint now."""
        self._closings += 1


class _BurstLowlevel:
    """Stands in for `trio.lowlevel` in pyfuse3."""

    def __init__(self, session: _BurstSession) -> None:
        self._session = session
        self.wait_readable: Callable[[int], Awaitable[None]] = trio.lowlevel.wait_readable

    def __getattr__(self, name: str) -> Any:
        return getattr(trio.lowlevel, name)

    def notify_closing(self, descriptor: int) -> None:
        self._session.note_closing()
        trio.lowlevel.notify_closing(descriptor)


class _BurstLoop:
    """Stands in for `trio` in pyfuse3. While no session runs it only passes everything to trio."""

    def __init__(self) -> None:
        self._session = _BurstSession()
        self._running = False
        self.lowlevel = _BurstLowlevel(self._session)

    def __getattr__(self, name: str) -> Any:
        return getattr(trio, name)

    def Lock(self) -> _BurstSession | trio.Lock:  # noqa: N802 - the name that pyfuse3 looks up
        return self._session if self._running else trio.Lock()

    def requests_queued(self) -> bool:
        """Whether the kernel has a request queued now."""
        return not self._running or self._session.is_queued()

    @asynccontextmanager
    async def open_nursery(self) -> AsyncGenerator[trio.Nursery, None]:
        """A nursery of trio with the burst session around it. pyfuse3 opens one, in main()."""
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


def requests_queued() -> bool:
    """Whether the kernel has a request queued now. True where the burst loop does not run."""
    current = _current()
    return not isinstance(current, _BurstLoop) or current.requests_queued()


def install_burst_loop() -> None:
    """Make the next `pyfuse3.main` use the burst loop.

    Call it before `pyfuse3.main` starts; a second call changes nothing. Call `pyfuse3.main` in the
    main thread. SIGALRM and the real-time interval timer belong to the loop while it runs.
    """
    if not isinstance(_current(), _BurstLoop):
        setattr(pyfuse3, "trio", _BurstLoop())  # noqa: B010 - not in the stubs of pyfuse3


def uninstall_burst_loop() -> None:
    """Restore pyfuse3's own loop. Do not call it while `pyfuse3.main` runs."""
    setattr(pyfuse3, "trio", trio)  # noqa: B010 - not in the stubs of pyfuse3


def _current() -> object:
    return getattr(pyfuse3, "trio")  # noqa: B009 - not in the stubs of pyfuse3
