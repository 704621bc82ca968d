"""Fixtures that mount a real image through the real command, and never leave one mounted.

`mount` gives a `Mounted`: a fresh image of 2 GiB (sparse), mounted in the background. Whatever the
test did, afterwards the mount is gone, the daemon has ended, and `cowfs check` found the image
clean, or the test fails and its image is kept. Nothing is skipped because something is missing.

With COWFS_TEST_BASE=DIR the same tests run on plain directories below DIR: that proves the tests
themselves on the filesystem of the host. Snapshots are then copies, and there is nothing to check.

The short run is the default; tests/sizes.py says what `--long`, `--times` and `--seed` change.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import sizes
from tests.commands import Completed, end_server, run_command
from tests.sizes import HANG_SECONDS, wait_until

PLAIN_BASE = os.environ.get("COWFS_TEST_BASE")


def require_success(result: Completed) -> Completed:
    """Return the result if the command succeeded; else fail the test with all that it printed."""
    if result.returncode != 0:
        pytest.fail(
            f"{result.args} ended with {result.returncode}\n"
            f"stdout: {result.stdout}\nstderr: {result.stderr}"
        )
    return result


def json_of(result: Completed) -> dict[str, Any]:
    """The answer of a command with --json, after checking its envelope."""
    answer: dict[str, Any] = json.loads(require_success(result).stdout)
    version = answer["output_version"]
    assert isinstance(version["command"], str)
    assert isinstance(version["vers_major"], int)
    assert isinstance(version["vers_minor"], int)
    return answer


def require_clean(image: Path) -> None:
    """Fail the test unless `cowfs check` finds nothing wrong with the image."""
    result = run_command("check", image, "--json")
    if result.returncode != 0:
        pytest.fail(
            f"{image} is not clean (kept): cowfs check ended with {result.returncode}\n"
            f"stdout: {result.stdout[:8000]}\nstderr: {result.stderr[:2000]}"
        )
    assert json_of(result)["clean"] is True, result.stdout[:8000]


def process_is_alive(pid: int) -> bool:
    """True while a process runs; a process that ended but was not yet waited for does not count."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in ("Z", "X")


def wait_for_end(pid: int, seconds_max: float = HANG_SECONDS) -> bool:
    """Wait for a process to end; false if it has not ended in time."""
    deadline = time.monotonic() + seconds_max
    while process_is_alive(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def is_mount_point(path: Path) -> bool:
    """True if something is mounted exactly at this path, alive or dead."""
    with open("/proc/self/mountinfo", "rb") as table:
        # Octal escapes are decoded; the other bytes stay as they are and need not be valid text.
        places = {line.split()[4].decode("unicode_escape").encode("latin-1") for line in table}
    return os.fsencode(path) in places


def unmount_lazily(path: Path) -> None:
    """Detach a mount from the tree, even a dead or busy one."""
    subprocess.run(
        ["fusermount3", "-uz", str(path)], capture_output=True, check=True, timeout=HANG_SECONDS
    )


class Mounted:
    """An image and the place where it is mounted."""

    plain = False

    def __init__(self, folder: Path, size: str = "2G", mount_options: tuple[str, ...] = ()) -> None:
        self.image = folder / "test.img"
        self.path = folder / "mnt"
        self.size = size
        self.mount_options = mount_options
        self.starts_program = (
            False  # a daemon of its own start, with what the environment does to it
        )
        self.daemon_pid: int | None = None

    def start(self) -> None:
        """Make the image and mount it. If this fails half way, `close` still cleans up."""
        self.path.mkdir(parents=True)
        require_success(run_command("mkfs", self.image, "--size", self.size))
        self.remount()

    def cowfs(self, *arguments: str | os.PathLike[str]) -> Completed:
        """Run `cowfs ARGUMENTS`; the caller checks the exit status."""
        return run_command(*arguments)

    def remount(self) -> None:
        """Unmount if mounted, then mount."""
        if is_mount_point(self.path):
            self.umount()
        words = ("mount", self.image, self.path, *self.mount_options)
        require_success(run_command(*words, program=self.starts_program))
        assert is_mount_point(self.path), "cowfs mount returned before the mount was live"
        self.daemon_pid = json_of(run_command("info", self.path, "--json"))["daemon_pid"]
        assert isinstance(self.daemon_pid, int)
        assert process_is_alive(self.daemon_pid)

    def _run_umount(self) -> Completed:
        """Run `cowfs umount`, again while a test beside this one has a copy of the mount.

        A new mount namespace of such a test has copies of all mounts, for a moment.
        """
        result = run_command("umount", self.path)
        deadline = time.monotonic() + HANG_SECONDS
        while "in the mount namespace of" in result.stderr and time.monotonic() < deadline:
            time.sleep(0.2)
            result = run_command("umount", self.path)
        return result

    def umount(self) -> None:
        """Unmount as a user does, and see that the daemon ends."""
        require_success(self._run_umount())
        assert not is_mount_point(self.path), "cowfs umount returned while still mounted"
        pid, self.daemon_pid = self.daemon_pid, None
        if pid is not None and not wait_for_end(pid):
            os.kill(pid, signal.SIGKILL)
            pytest.fail(f"the daemon {pid} outlived its mount by {HANG_SECONDS} s")

    def kill(self) -> None:
        """Kill the daemon without warning, then remove the dead mount."""
        pid, self.daemon_pid = self.daemon_pid, None
        assert pid is not None, "not mounted"
        os.kill(pid, signal.SIGKILL)
        assert wait_for_end(pid)
        unmount_lazily(self.path)

    def check(self) -> None:
        """Fail the test unless the (unmounted) image is clean."""
        require_clean(self.image)

    def wait_for_commit(self) -> None:
        """Wait until the daemon's own commit has made everything written before durable."""

        def generation() -> int:
            number: int = json_of(run_command("info", self.path, "--json"))["generation"]
            return number

        before = generation()
        wait_until(lambda: generation() > before, "no commit came by itself")

    def snapshot(self, name: str) -> Path:
        """Take a snapshot; return the path where its tree can be read."""
        require_success(run_command("snapshot", "create", self.path, name))
        return self.path / ".snapshots" / name

    def rollback(self, name: str) -> None:
        """Set the mounted tree back to a snapshot."""
        require_success(run_command("rollback", self.path, name))

    def delete_snapshot(self, name: str) -> None:
        """Delete a snapshot and wait until its space is free."""
        require_success(run_command("snapshot", "delete", self.path, name, "--wait"))

    def close(self) -> str | None:
        """Unmount and end the daemon, by force if need be.

        Returns:
            None if an ordinary unmount was enough, else what was wrong.
        """
        trouble = None
        pid = self.daemon_pid
        if is_mount_point(self.path):
            result = self._run_umount()
            if result.returncode != 0:
                trouble = f"cowfs umount ended with {result.returncode}: {result.stderr.strip()}"
            if is_mount_point(self.path):
                unmount_lazily(self.path)
                trouble = trouble or "cowfs umount said it was done, but was not"
        if pid is not None and not wait_for_end(pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            wait_for_end(pid)
            trouble = trouble or f"the daemon {pid} did not end after its mount had"
        return trouble


class PlainDirectory(Mounted):
    """The same interface on a directory of the host: it proves the tests, not cowfs."""

    plain = True

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.copies = folder / "copies"

    def start(self) -> None:
        self.path.mkdir(parents=True)
        self.copies.mkdir()

    def cowfs(self, *arguments: str | os.PathLike[str]) -> Completed:
        raise AssertionError(f"a test that needs cowfs ran on a plain directory: {arguments}")

    def remount(self) -> None:
        pass

    def umount(self) -> None:
        pass

    def kill(self) -> None:
        pass

    def check(self) -> None:
        pass

    def snapshot(self, name: str) -> Path:
        subprocess.run(["cp", "-a", f"{self.path}/.", self.copies / name], check=True)
        return self.copies / name

    def rollback(self, name: str) -> None:
        for entry in list(self.path.iterdir()):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        subprocess.run(["cp", "-a", f"{self.copies / name}/.", self.path], check=True)

    def delete_snapshot(self, name: str) -> None:
        shutil.rmtree(self.copies / name)

    def close(self) -> str | None:
        shutil.rmtree(self.path.parent)
        return None


@contextlib.contextmanager
def mounted(
    folder: Path,
    has_failed: Callable[[], bool] = lambda: False,
    size: str = "2G",
    mount_options: tuple[str, ...] = (),
) -> Iterator[Mounted]:
    """A fresh image, mounted while the block runs, then unmounted, checked and removed.

    Args:
        folder: where image and mount point are made.
        has_failed: tells whether a test on this mount failed; then the image is kept.
        size: of the image, as for `cowfs mkfs --size`.
        mount_options: more words for `cowfs mount`.
    """
    if PLAIN_BASE is not None:
        place = Path(PLAIN_BASE).resolve() / f"{folder.parent.name}-{folder.name}-{os.getpid()}"
        shutil.rmtree(place, ignore_errors=True)
        plain = PlainDirectory(place)
        try:
            plain.start()
            yield plain
        finally:
            plain.close()
        return

    mount = Mounted(folder, size, mount_options)
    try:
        mount.start()
        yield mount
    finally:
        trouble = mount.close()
    require_clean(mount.image)
    if trouble is not None:
        pytest.fail(f"{trouble} (image kept: {mount.image})")
    if not has_failed():
        mount.image.unlink()


# ------------------------------------------------------------------- pytest

FAILED: pytest.StashKey[bool] = pytest.StashKey()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Record on each test, and on its file, that it failed: teardown then keeps the image."""
    report = yield
    if report.failed:
        item.stash[FAILED] = True
        if item.parent is not None:
            item.parent.stash[FAILED] = True
    return report


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that say how much a run does."""
    group = parser.getgroup("cowfs")
    group.addoption("--long", action="store_true", help="all tests, at their long sizes")
    group.addoption(
        "--times", type=float, default=1, metavar="N", help="with --long: N times the long sizes"
    )
    group.addoption(
        "--seed",
        type=int,
        metavar="N",
        help="for tests that choose at random, as a failure prints it",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Set the sizes of this run before any test is imported.

    The caches of commands go to a directory of this run, not to the user's own.
    """
    is_long, times = config.getoption("--long"), config.getoption("--times")
    if times <= 0 or (times != 1 and not is_long):
        raise pytest.UsageError("--times takes a number above 0, and only together with --long")
    config.add_cleanup(end_server)
    # Commands that tests call in this process lower its priority, and all later tests would keep
    # it.
    for name in ("nice", "setpriority"):
        patch = pytest.MonkeyPatch()
        patch.setattr(os, name, lambda *_: 0)
        config.add_cleanup(patch.undo)
    sizes.begin(long=is_long, times=times, seed=config.getoption("--seed"))
    if PLAIN_BASE is None:
        place = tempfile.mkdtemp(prefix="cowfs-test-cache-")
        config.add_cleanup(lambda: shutil.rmtree(place, ignore_errors=True))
        os.environ["XDG_CACHE_HOME"] = place


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what has no meaning on a plain directory, what only root may do, and what takes long."""
    unmet = set()
    if not sizes.is_long():
        unmet.add("long")
    if PLAIN_BASE is not None:
        unmet.add("needs_cowfs")
    if os.geteuid():
        unmet.add("needs_root")
    left_out = [item for item in items if unmet & {mark.name for mark in item.iter_markers()}]
    if left_out:
        items[:] = [item for item in items if item not in set(left_out)]
        config.hook.pytest_deselected(items=left_out)
    if sizes.is_long():
        limit = pytest.mark.timeout(sizes.seconds(0, sizes.LONG_TEST_SECONDS_MAX))
        for item in items:
            if item.get_closest_marker("timeout") is None:
                item.add_marker(limit)


def pytest_report_header() -> list[str]:
    """Say which tests this run leaves out."""
    told = []
    if not sizes.is_long():
        told.append("short run: scripts/test --long has longer ones, and the tests marked long")
    if os.geteuid():
        told.append(
            "not as root: tests marked needs_root are left out; sudo scripts/test runs them too"
        )
    return told


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print figures that are worth seeing in every run; tests record them as properties.

    `summary` is a line; `count` is a pair of a name and a number, summed over all tests.
    """
    properties = [
        each
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        for each in report.user_properties
    ]
    lines = [str(value) for name, value in properties if name == "summary"]
    counts: Counter[str] = Counter()
    for name, value in properties:
        if name == "count":
            what, number = value
            counts[what] += number
    lines += [f"{what}: {number:,}" for what, number in counts.items()]
    if lines:
        terminalreporter.section("figures")
        for line in sorted(lines):
            terminalreporter.write_line(line)


@pytest.fixture
def mount(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Mounted]:
    """A mounted filesystem of 2 GiB that belongs to one test."""
    with mounted(tmp_path / "cowfs", lambda: request.node.stash.get(FAILED, False)) as mount:
        yield mount


@pytest.fixture(scope="module")
def module_mount(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Mounted]:
    """A mounted filesystem of 2 GiB that all tests of one file share."""
    folder = tmp_path_factory.mktemp("cowfs")
    with mounted(folder / "shared", lambda: request.node.stash.get(FAILED, False)) as mount:
        yield mount
