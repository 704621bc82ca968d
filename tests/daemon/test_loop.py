"""The burst loop behaves as trio does: fair, cancellable, and asleep if there is nothing to do.

Each test mounts a small filesystem in this process, runs `pyfuse3.main` under `trio.run`, and
drives it from a child process that knows nothing but the mount point.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pyfuse3
import pytest
import trio

from cowfs.daemon.loop import BURST_REQUESTS_MAX, install_burst_loop, uninstall_burst_loop
from tests.sizes import HANG_SECONDS, wait_until

# Without signals: the alarm signal belongs to the loop while it runs.
pytestmark = pytest.mark.timeout(method="thread")

INODE_OF_DIRECTORY_0 = 100
WORKERS_MAX = 16

# The kernel does not cache misses of stat() here, so each one is a request to the daemon.
FLOOD = """
import os, sys
print("started", flush=True)
while True:
    try:
        os.stat(sys.argv[1] + "/missing")
    except FileNotFoundError:
        pass
"""

CALLS = """
import os, sys, time
count = int(sys.argv[2])
pause_s = float(sys.argv[3])
for _ in range(count):
    try:
        os.stat(sys.argv[1] + "/missing")
    except FileNotFoundError:
        pass
    time.sleep(pause_s)
"""


class Probe(pyfuse3.Operations):
    """A root with directories 0, 1, 2 and so on, each of them empty.

    Looking up "missing" answers at once, "slow" waits in trio for `release`. Each client takes its
    own directory: the kernel lets only one lookup at a time into a directory.
    """

    supports_dot_lookup = False

    def __init__(self) -> None:
        super().__init__()
        self.lookups = 0
        self.slow_now = 0
        self.slow_most = 0
        self.release = trio.Event()
        self.on_lookup: Callable[[bytes], None] = lambda name: None

    def _directory(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = stat.S_IFDIR | 0o755
        entry.st_nlink = 2
        entry.attr_timeout = 300
        entry.entry_timeout = 300
        return entry

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._directory(inode)

    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        if name.isdigit():
            return self._directory(INODE_OF_DIRECTORY_0 + int(name))
        self.lookups += 1
        self.on_lookup(name)
        if name == b"slow":
            self.slow_now += 1
            self.slow_most = max(self.slow_most, self.slow_now)
            try:
                await self.release.wait()
            finally:
                self.slow_now -= 1
        raise pyfuse3.FUSEError(errno.ENOENT)


@pytest.fixture(autouse=True)
def burst_loop() -> Iterator[None]:
    install_burst_loop()
    yield
    uninstall_burst_loop()


@pytest.fixture
def mountpoint(tmp_path: Path) -> Iterator[str]:
    path = tmp_path / "mount"
    path.mkdir()
    yield str(path)
    if os.path.ismount(path):
        subprocess.run(["umount", "-l", str(path)], check=True)
        pytest.fail("the mount was left behind")


@asynccontextmanager
async def mounted(mountpoint: str, probe: Probe) -> AsyncIterator[trio.Nursery]:
    """Serve `probe` while the body runs; then end the session with `pyfuse3.terminate`."""
    pyfuse3.init(probe, mountpoint, {"default_permissions", "fsname=probe"})
    try:
        async with trio.open_nursery() as nursery:
            ended = trio.Event()

            async def serve() -> None:
                await pyfuse3.main(min_tasks=4, max_tasks=WORKERS_MAX)
                ended.set()

            nursery.start_soon(serve)
            yield nursery
            pyfuse3.terminate()
            with trio.fail_after(HANG_SECONDS):
                await ended.wait()
            nursery.cancel_scope.cancel()
    finally:
        pyfuse3.close()


@asynccontextmanager
async def client(script: str, *arguments: str) -> AsyncIterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(process.communicate)


async def stat_in_thread(path: str) -> None:
    def call() -> None:
        with pytest.raises(FileNotFoundError):
            os.stat(path)

    await trio.to_thread.run_sync(call)


def is_running(pid: int) -> bool:
    """True while a process runs or is runnable, false while it waits for an answer."""
    status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    return status.rpartition(")")[2].split()[0] == "R"


def test_flood_of_requests_leaves_timers_on_time(mountpoint: str) -> None:
    """A flood delays a timer of 10 ms by a few ms at most, and lasts for the whole test.

    Only the CPU time of this thread counts: no timer is punctual while other processes run.
    """
    probe = Probe()

    async def run() -> list[float]:
        delays_s = []
        async with (
            mounted(mountpoint, probe),
            client(FLOOD, f"{mountpoint}/0"),
            client(FLOOD, f"{mountpoint}/1"),
            client(FLOOD, f"{mountpoint}/2"),
            client(FLOOD, f"{mountpoint}/3"),
        ):
            while probe.lookups < 1000:
                await trio.sleep(0.01)
            while len(delays_s) < 100 or probe.lookups <= 3000:
                start_s = time.thread_time()
                await trio.sleep(0.010)
                delays_s.append(time.thread_time() - start_s - 0.010)
        return delays_s

    delays_s = sorted(trio.run(run))
    assert delays_s[len(delays_s) // 2] < 0.005
    assert delays_s[len(delays_s) * 95 // 100] < 0.030


def test_flood_of_requests_gives_other_tasks_a_turn_after_each_burst(mountpoint: str) -> None:
    """Between two steps of a task that only yields, no more than two bursts are served.

    Two, because trio may run the task first in one round and last in the next.
    """
    probe = Probe()

    async def run() -> int:
        most = 0
        async with (
            mounted(mountpoint, probe),
            client(FLOOD, f"{mountpoint}/0"),
            client(FLOOD, f"{mountpoint}/1"),
        ):
            while probe.lookups < 100:
                await trio.sleep(0.01)
            while probe.lookups < 5000:
                before = probe.lookups
                await trio.lowlevel.checkpoint()
                most = max(most, probe.lookups - before)
        return most

    assert 0 < trio.run(run) <= 2 * BURST_REQUESTS_MAX


def test_queued_requests_are_served_without_the_scheduler(mountpoint: str) -> None:
    """Queued requests are served in one step of a worker."""
    probe = Probe()
    steps_of_lookups: list[int] = []

    class CountSteps(trio.abc.Instrument):
        served = 0

        def after_task_step(self, task: trio.lowlevel.Task) -> None:
            if probe.lookups != self.served:
                steps_of_lookups.append(probe.lookups - self.served)
                self.served = probe.lookups

    steps = CountSteps()

    async def run() -> None:
        trio.lowlevel.add_instrument(steps)
        async with (
            mounted(mountpoint, probe),
            client(FLOOD, f"{mountpoint}/0") as first,
            client(FLOOD, f"{mountpoint}/1") as second,
            client(FLOOD, f"{mountpoint}/2") as third,
            client(FLOOD, f"{mountpoint}/3") as fourth,
        ):
            clients = [first.pid, second.pid, third.pid, fourth.pid]
            while probe.lookups < 100:
                await trio.sleep(0.01)
            probe.lookups = steps.served = 0
            steps_of_lookups.clear()
            # A handler that waits lets the other requests queue up behind it.
            probe.on_lookup = lambda name: wait_until(
                lambda: not any(map(is_running, clients)), "the clients do not come to wait"
            )
            while probe.lookups < 100:
                await trio.sleep(0.01)
            probe.on_lookup = lambda name: None

    trio.run(run)
    assert max(steps_of_lookups) > 1
    assert max(steps_of_lookups) <= BURST_REQUESTS_MAX
    assert len(steps_of_lookups) < sum(steps_of_lookups) * 0.8


def test_handlers_that_sleep_overlap(mountpoint: str) -> None:
    """Five handlers wait at the same time: none of them ends before all have begun."""
    probe = Probe()

    async def run() -> None:
        async with mounted(mountpoint, probe), trio.open_nursery() as nursery:
            for index in range(5):
                nursery.start_soon(stat_in_thread, f"{mountpoint}/{index}/slow")
            with trio.fail_after(HANG_SECONDS):
                while probe.slow_now < 5:
                    await trio.sleep(0.005)
            probe.release.set()

    trio.run(run)
    assert probe.slow_most == 5


def test_handlers_that_sleep_leave_others_served(mountpoint: str) -> None:
    """While a handler waits, requests that need no waiting are answered."""
    probe = Probe()

    async def run() -> None:
        async with mounted(mountpoint, probe), trio.open_nursery() as nursery:
            nursery.start_soon(stat_in_thread, f"{mountpoint}/0/slow")
            while not probe.slow_now:
                await trio.sleep(0.005)
            with trio.fail_after(HANG_SECONDS):
                for _ in range(10):
                    await stat_in_thread(f"{mountpoint}/1/missing")
            assert probe.slow_now == 1
            probe.release.set()

    trio.run(run)


def test_more_waits_than_workers_are_all_answered(mountpoint: str) -> None:
    """With every worker in a handler that waits, the requests behind them still get their turn."""
    probe = Probe()

    async def run() -> None:
        async with mounted(mountpoint, probe), trio.open_nursery() as nursery:
            for index in range(20):
                nursery.start_soon(stat_in_thread, f"{mountpoint}/{index}/slow")
            with trio.fail_after(HANG_SECONDS):
                while probe.slow_now < WORKERS_MAX:
                    await trio.sleep(0.005)
            await trio.sleep(0.05)  # for the requests that have no worker
            probe.release.set()

    trio.run(run)
    assert probe.lookups >= 20
    assert probe.slow_most == WORKERS_MAX


def test_killed_clients_do_not_stop_the_process(mountpoint: str) -> None:
    """A client killed while its request is queued leaves nothing to read, and no read that hangs.

    The loop polls right after the kill: most runs then meet the gap between poll and read.
    """
    probe = Probe()

    async def run() -> None:
        async with mounted(mountpoint, probe):
            for _ in range(20):
                goal = probe.lookups + 50
                async with client(FLOOD, f"{mountpoint}/0"), client(FLOOD, f"{mountpoint}/1"):
                    while probe.lookups < goal:
                        await trio.sleep(0.001)
                await trio.sleep(0.01)

    def wake() -> None:
        hung.append("a read hung until another request came")
        with contextlib.suppress(FileNotFoundError):
            os.stat(f"{mountpoint}/2/missing")

    hung: list[str] = []
    timer = threading.Timer(HANG_SECONDS, wake)
    timer.start()
    try:
        trio.run(run)
    finally:
        timer.cancel()
    assert not hung


def test_workers_stay_few_under_a_flood(mountpoint: str) -> None:
    """A burst does not start a worker for each request that it reads."""
    probe = Probe()

    class CountWorkers(trio.abc.Instrument):
        started = 0

        def task_spawned(self, task: trio.lowlevel.Task) -> None:
            self.started += task.name.startswith("pyfuse-")

    workers = CountWorkers()

    async def run() -> None:
        trio.lowlevel.add_instrument(workers)
        async with (
            mounted(mountpoint, probe),
            client(FLOOD, f"{mountpoint}/0"),
            client(FLOOD, f"{mountpoint}/1"),
        ):
            while probe.lookups < 5000:
                await trio.sleep(0.01)

    trio.run(run)
    assert workers.started <= 3


def require_end_at_once(
    mountpoint: str, probe: Probe, flooded: bool, run: Callable[[], Awaitable[int]]
) -> None:
    """Serve until `run` has ended main(), which must be at once.

    At once means before two more bursts are served; `run` returns the requests served after the
    end.
    """
    pyfuse3.init(probe, mountpoint, {"default_permissions", "fsname=probe"})
    process = subprocess.Popen(
        [sys.executable, "-c", FLOOD if flooded else "", mountpoint],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        served = trio.run(run)
    finally:
        pyfuse3.close()
        process.kill()
        process.wait()
    assert served <= 2 * BURST_REQUESTS_MAX


@pytest.mark.parametrize("flooded", [False, True])
def test_cancelling_main_ends_it(mountpoint: str, flooded: bool) -> None:
    """A cancelled main() ends at once, idle or flooded, and the mount can be closed."""
    probe = Probe()

    async def run() -> int:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pyfuse3.main, 4, WORKERS_MAX)
                while flooded and probe.lookups < 500:
                    await trio.sleep(0.01)
                await trio.sleep(0.2)
                served = probe.lookups
                scope.cancel()
        assert scope.cancelled_caught
        return probe.lookups - served

    require_end_at_once(mountpoint, probe, flooded, run)


@pytest.mark.parametrize("flooded", [False, True])
def test_terminate_ends_main(mountpoint: str, flooded: bool) -> None:
    """pyfuse3.terminate() ends main() whatever its workers do at that moment, every time."""
    for _ in range(10 if flooded else 2):
        probe = Probe()

        async def run(probe: Probe = probe) -> int:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pyfuse3.main, 4, WORKERS_MAX)
                while flooded and probe.lookups < 500:
                    await trio.sleep(0.001)
                await trio.sleep(0.05)
                served = probe.lookups
                pyfuse3.terminate()
            return probe.lookups - served

        require_end_at_once(mountpoint, probe, flooded, run)


def test_terminate_inside_a_handler_ends_main_after_the_answer(mountpoint: str) -> None:
    """A handler may end the session; its own request is still answered."""
    probe = Probe()
    probe.on_lookup = lambda name: pyfuse3.terminate() if name == b"end" else None

    async def run() -> None:
        with trio.fail_after(HANG_SECONDS):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pyfuse3.main, 4, WORKERS_MAX)
                await stat_in_thread(f"{mountpoint}/end")

    pyfuse3.init(probe, mountpoint, {"default_permissions", "fsname=probe"})
    try:
        trio.run(run)
    finally:
        pyfuse3.close()


@pytest.mark.parametrize("waiting", [False, True])
def test_unmount_ends_main(mountpoint: str, waiting: bool) -> None:
    """umount(8) ends main() also while a handler waits, after that handler."""
    probe = Probe()

    async def umount() -> None:
        command = ["umount", "-l", mountpoint] if waiting else ["umount", mountpoint]
        await trio.run_process(command)

    async def run() -> None:
        with trio.fail_after(HANG_SECONDS):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pyfuse3.main, 4, WORKERS_MAX)
                await stat_in_thread(f"{mountpoint}/missing")
                if waiting:
                    nursery.start_soon(stat_in_thread, f"{mountpoint}/slow")
                    while not probe.slow_now:
                        await trio.sleep(0.005)
                await umount()
                probe.release.set()

    pyfuse3.init(probe, mountpoint, {"default_permissions", "fsname=probe"})
    try:
        trio.run(run)
    finally:
        pyfuse3.close()
    assert not os.path.ismount(mountpoint)


def test_idle_mount_uses_no_cpu(mountpoint: str) -> None:
    """After a flood has ended, the loop sleeps: less than 1 % of a CPU."""
    probe = Probe()

    async def run() -> float:
        async with mounted(mountpoint, probe):
            async with client(FLOOD, mountpoint):
                while probe.lookups < 2000:
                    await trio.sleep(0.01)
            await trio.sleep(0.1)
            start_s = time.process_time()
            await trio.sleep(2.0)
            return (time.process_time() - start_s) / 2.0

    assert trio.run(run) < 0.01


def test_slow_trickle_of_requests_uses_little_cpu(mountpoint: str) -> None:
    """A client that pauses for longer than the spin does not make the loop spin each time."""
    probe = Probe()

    async def run() -> float:
        async with mounted(mountpoint, probe):
            start_s = time.process_time()
            async with client(CALLS, mountpoint, "1000", "0.0005") as process:
                await trio.to_thread.run_sync(process.wait)
            return time.process_time() - start_s

    elapsed_s = trio.run(run)
    assert probe.lookups >= 1000
    assert elapsed_s / probe.lookups < 0.000_400


def test_main_runs_again_in_a_second_event_loop(mountpoint: str) -> None:
    """Nothing of one session is left in the next: mount, serve, end, three times."""
    for _ in range(3):
        probe = Probe()

        async def run(probe: Probe = probe) -> None:
            async with mounted(mountpoint, probe):
                await stat_in_thread(f"{mountpoint}/missing")

        trio.run(run)
        assert probe.lookups == 1


def test_install_is_idempotent_and_reversible() -> None:
    """Installing twice keeps the first object; uninstalling gives trio back."""
    installed = pyfuse3.trio  # type: ignore[attr-defined]
    install_burst_loop()
    assert pyfuse3.trio is installed  # type: ignore[attr-defined]
    uninstall_burst_loop()
    assert pyfuse3.trio is trio  # type: ignore[attr-defined]


def test_everything_else_is_passed_to_trio() -> None:
    """Every attribute that the loop does not replace is trio's own."""
    stand_in = pyfuse3.trio  # type: ignore[attr-defined]
    assert stand_in.ClosedResourceError is trio.ClosedResourceError
    assert stand_in.from_thread is trio.from_thread
    assert stand_in.lowlevel.current_task is trio.lowlevel.current_task
    assert stand_in.lowlevel.current_trio_token is trio.lowlevel.current_trio_token
