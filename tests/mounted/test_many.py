"""Promises for many programs at once, and for a daemon that the host treats badly."""

import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands import run_command
from tests.conftest import (
    Mounted,
    is_mount_point,
    json_of,
    process_is_alive,
    require_success,
    wait_for_end,
)
from tests.sizes import HANG_SECONDS, seconds

pytestmark = [pytest.mark.mounted, pytest.mark.needs_cowfs]

SECONDS = seconds(8, 20)  # of mixed work
WORKERS = 8
# Memory of the daemon: its bounded caches (node cache 128 MiB, dirty data 256 MiB, refcounts 24
# MiB, the buffers of 16 requests) and Python itself. It must not grow with time.
MEMORY_MIB_MAX = 700
GROWTH_MIB_MAX = 64


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "XDG_STATE_HOME", str(tmp_path / "state")
    )  # where scrubs store their results


def start_worker(folder: Path, seed: int, seconds: float) -> subprocess.Popen[str]:
    program = Path(__file__).with_name("mixed_worker.py")
    return subprocess.Popen(
        [sys.executable, program, folder, str(seed), str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def memory_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / (1 << 20)


def tree_digest(folder: Path) -> str:
    """Names, sizes and contents below a directory."""
    digest = hashlib.sha256()
    for where, directories, names in os.walk(folder):
        directories.sort()
        for name in sorted(names):
            path = Path(where, name)
            data = path.read_bytes()
            digest.update(f"{path.relative_to(folder)} {len(data)} ".encode() + data)
    return digest.hexdigest()


def test_eight_programs_with_snapshots_reports_and_scrubs_read_what_they_wrote(
    mount: Mounted,
) -> None:
    """Promise: every byte that a program reads is the one it wrote, whatever else goes on.

    Snapshots are made, counted by cowdu, and deleted; scrubs read all copies. Two of the programs
    are killed and restarted meanwhile. The daemon's memory stays flat.
    """
    pid = mount.daemon_pid
    assert pid is not None
    choice = random.Random(11)
    end = time.monotonic() + SECONDS
    workers = {
        number: start_worker(mount.path / f"w{number}", number, SECONDS)
        for number in range(WORKERS)
    }
    kept: dict[str, str] = {}
    memory: list[float] = []
    killed = taken = scrubbed = compared = 0
    try:
        while (left := end - time.monotonic()) > 0 or killed < 2 or taken < 4:
            name = f"s{taken}"
            mount.snapshot(name)
            taken += 1
            kept[name] = tree_digest(mount.path / ".snapshots" / name / f"w{taken % WORKERS}")
            report = json_of(run_command("cowdu", mount.path, "--json"))
            assert {entry["name"] for entry in report["snapshots"]} >= set(kept)
            if len(kept) > 3:
                oldest = next(iter(kept))
                number = (int(oldest[1:]) + 1) % WORKERS
                folder = mount.path / ".snapshots" / oldest / f"w{number}"
                assert tree_digest(folder) == kept.pop(oldest), f"{oldest} changed"
                require_success(run_command("snapshot", "delete", mount.path, oldest))
            if taken % 2:
                done = run_command("scrub", "start", "-B", mount.path, "--json")
                assert done.returncode == 0, (done.stdout, done.stderr)
                scrubbed += 1
            memory.append(memory_mib(pid))
            if killed < 2 and left < SECONDS * (0.7 - 0.3 * killed):
                victim = choice.randrange(WORKERS)
                workers[victim].kill()
                workers[victim].communicate(timeout=HANG_SECONDS)
                again = start_worker(mount.path / f"w{victim}", 100 + victim, max(1.0, left - 1))
                workers[victim] = again
                killed += 1
        for worker in workers.values():
            output, errors = worker.communicate(timeout=SECONDS + HANG_SECONDS)
            assert worker.returncode == 0, errors
            compared += json.loads(output)["compared_bytes"]
    finally:
        for worker in workers.values():
            worker.kill()
            worker.communicate()  # else the open pipes fail the next test
    assert killed == 2
    assert taken >= 4
    assert scrubbed >= 2
    assert compared > 10 << 20
    assert process_is_alive(pid)
    first, last = memory[: len(memory) // 2], memory[len(memory) // 2 :]
    assert max(last) < max(first) + GROWTH_MIB_MAX, f"the daemon grows: {memory}"
    assert max(memory) < MEMORY_MIB_MAX, memory


def test_second_daemon_on_one_image_is_refused(mount: Mounted, tmp_path: Path) -> None:
    """Promise: an image has one writer; the error names the process that has the image."""
    place = tmp_path / "second"
    place.mkdir()
    result = run_command("mount", mount.image, place)
    assert result.returncode != 0
    assert str(mount.daemon_pid) in result.stderr
    assert not is_mount_point(place)
    (mount.path / "file").write_bytes(b"the first goes on")


def test_stopped_daemon_makes_programs_wait_and_loses_nothing(mount: Mounted) -> None:
    """Promise: SIGSTOP only delays programs: after SIGCONT all their work is done."""
    assert mount.daemon_pid is not None
    program = (
        "import os, sys\n"
        "for number in range(300):\n"
        "    with open(f'{sys.argv[1]}/file-{number}', 'wb') as file:\n"
        "        file.write(bytes([number % 256]) * 3000)\n"
        "        if number % 50 == 0: os.fsync(file.fileno())\n"
    )
    os.kill(mount.daemon_pid, signal.SIGSTOP)
    try:
        writer = subprocess.Popen([sys.executable, "-c", program, mount.path])
        time.sleep(0.7)
        assert writer.poll() is None, "it wrote to a filesystem that stands still"
    finally:
        os.kill(mount.daemon_pid, signal.SIGCONT)
    assert writer.wait(timeout=HANG_SECONDS) == 0
    for number in range(300):
        assert (mount.path / f"file-{number}").read_bytes() == bytes([number % 256]) * 3000


def test_sigterm_in_the_middle_of_commits_ends_with_all_that_was_written(mount: Mounted) -> None:
    """Promise: SIGTERM during a commit lets that one finish, and a last commit follows."""
    data = os.urandom(1 << 20)
    for round_number in range(4):
        pid = mount.daemon_pid
        assert pid is not None
        for number in range(24):
            (mount.path / f"{round_number}-{number}").write_bytes(data)
        syncing = subprocess.Popen(["sync", "-f", mount.path / f"{round_number}-0"])
        time.sleep(0.01 * round_number)
        os.kill(pid, signal.SIGTERM)
        syncing.wait(timeout=HANG_SECONDS)
        assert wait_for_end(pid)
        mount.daemon_pid = None
        assert not is_mount_point(mount.path)
        assert json_of(run_command("info", mount.image, "--json"))["clean"] is True
        mount.remount()
        for number in range(24):
            assert (mount.path / f"{round_number}-{number}").read_bytes() == data


def test_full_table_of_descriptors_stops_new_commands_only(mount: Mounted) -> None:
    """Promise: a daemon without a free descriptor serves files, uses no CPU on it, and recovers."""
    pid = mount.daemon_pid
    assert pid is not None
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = max(int(entry) for entry in os.listdir(f"/proc/{pid}/fd")) + 1
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (used, before[1]))
    try:
        command = subprocess.Popen(
            [Path(sys.executable).parent / "cowfs", "sync", mount.path],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        (mount.path / "file").write_bytes(b"served")
        assert (mount.path / "file").read_bytes() == b"served"
        ticks = _cpu_ticks(pid)
        time.sleep(1.0)
        spent = (_cpu_ticks(pid) - ticks) / os.sysconf("SC_CLK_TCK")
        assert spent < 0.5, f"{spent} s of CPU in one second of nothing to do"
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    command.wait(timeout=HANG_SECONDS)  # it is refused or served late, but must not hang
    require_success(run_command("sync", mount.path))


def _cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_small_address_space_is_enough_for_much_data_and_many_files(mount: Mounted) -> None:
    """Promise: the daemon's memory does not grow with what is written (512 MiB, 4,000 files)."""
    pid = mount.daemon_pid
    assert pid is not None
    size = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[0])
    limit = size * resource.getpagesize() + (900 << 20)
    resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))
    piece = os.urandom(1 << 20)
    with open(mount.path / "large", "wb") as file:
        for _ in range(512):
            file.write(piece)
    folder = mount.path / "many"
    folder.mkdir()
    for number in range(4000):
        (folder / f"file-{number}").write_bytes(piece[:3000])
    with open(mount.path / "large", "rb") as file:
        for _ in range(512):
            assert file.read(1 << 20) == piece
    assert len(list(folder.iterdir())) == 4000
    require_success(run_command("sync", mount.path))


@pytest.fixture
def future(mount: Mounted) -> Mounted:
    """The mount, served by a daemon whose clock is ten years ahead."""
    mount.umount()
    program = (
        "import sys, time\n"
        "now = time.time_ns\n"
        "time.time_ns = lambda: now() + 10 * 365 * 86400 * 10**9\n"
        "from cowfs.cli.main import main\n"
        "main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", program, "mount", mount.image, mount.path]
    subprocess.run(command, check=True, timeout=HANG_SECONDS)
    mount.daemon_pid = json_of(run_command("info", mount.path, "--json"))["daemon_pid"]
    return mount


def test_clock_set_back_changes_no_order(future: Mounted) -> None:
    """Promise: generations decide the order, so a clock set back makes nothing older win."""
    mount = future
    (mount.path / "file").write_bytes(b"in the future")
    assert os.stat(mount.path / "file").st_mtime > time.time() + 9 * 365 * 86400
    mount.snapshot("future")
    mount.remount()  # with the right clock
    (mount.path / "file").write_bytes(b"now")
    mount.snapshot("now")
    mount.kill()
    mount.check()
    mount.remount()
    assert (mount.path / "file").read_bytes() == b"now"
    listed = json_of(run_command("snapshot", "list", mount.path, "--json"))["snapshots"]
    assert [entry["name"] for entry in listed] == ["future", "now"]
    mount.rollback("future")
    assert (mount.path / "file").read_bytes() == b"in the future"
    require_success(run_command("undo", mount.path))
    assert (mount.path / "file").read_bytes() == b"now"
