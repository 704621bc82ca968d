"""The workloads in their order, and the loop over runs and targets.

Promises: a target that is missing or fails becomes a result with the reason, and the others are
still measured. Every target is torn down before the next one starts, also after errors.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchlib.targets import (
    COMMAND_SECONDS_MAX,
    TARGETS,
    Target,
    TargetError,
    cpu_seconds,
    drop_caches,
    written_bytes,
)

WARM, FORGOTTEN, COLD = "warm", "forgotten", "cold"


@dataclass(frozen=True, slots=True)
class Workload:
    """One row of the table.

    Args:
        name: of the row and on the command line.
        unit: of the rate: operations per second, or MiB/s (an operation is then 1 MiB).
        step: the function of `benchlib.workloads` that is timed.
        needs: workloads that must have run before on the same mount.
        prepare: steps that run before and are not timed.
        before: WARM: no cache is dropped; FORGOTTEN: the kernel's caches are dropped, the daemon's
            stay; COLD: the filesystem is remounted too, so the daemon's caches are empty as well.
        synced: also give a rate that includes the sync afterwards.
    """

    name: str
    unit: str
    step: str
    needs: tuple[str, ...] = ()
    prepare: tuple[str, ...] = ()
    before: str = WARM
    synced: bool = False


# In running order: each leaves what the next ones need.
WORKLOADS: tuple[Workload, ...] = (
    Workload("create", "files/s", "create", prepare=("make_tree",), synced=True),
    Workload("stat", "files/s", "stat_files", needs=("create",), before=FORGOTTEN),
    Workload("stat-remounted", "files/s", "stat_files", needs=("create",), before=COLD),
    Workload("find", "entries/s", "find", needs=("create",), before=FORGOTTEN),
    Workload("find-remounted", "entries/s", "find", needs=("create",), before=COLD),
    Workload("delete", "files/s", "delete", needs=("create",), synced=True),
    Workload("readdir", "entries/s", "readdir", prepare=("make_listing",), before=FORGOTTEN),
    Workload("create-fsync", "files/s", "create_fsync"),
    Workload("seq-write", "MiB/s", "seq_write"),
    Workload("seq-read", "MiB/s", "seq_read", needs=("seq-write",), before=FORGOTTEN),
    Workload("seq-read-remounted", "MiB/s", "seq_read", needs=("seq-write",), before=COLD),
    Workload("rand-write", "writes/s", "rand_write", prepare=("make_random",)),
    Workload("write-fsync", "writes/s", "write_fsync", needs=("rand-write",)),
    Workload("rand-read", "reads/s", "rand_read", needs=("rand-write",), before=FORGOTTEN),
    Workload("rand-read-remounted", "reads/s", "rand_read", needs=("rand-write",), before=COLD),
)


# Every operation is made durable. In running order.
SYNC_WORKLOADS: tuple[Workload, ...] = (
    Workload("write-fsync", "writes/s", "write_fsync", prepare=("make_random",)),
    Workload("write-fsync-8", "writes/s", "write_fsync_many", prepare=("make_client_files",)),
    Workload("create-fsync", "files/s", "create_fsync"),
    Workload("unpack", "files/s", "unpack"),
    Workload("sqlite-journal", "rows/s", "sqlite_journal"),
    Workload("sqlite-wal", "rows/s", "sqlite_wal"),
    Workload("git-commits", "commits/s", "git_commits"),
)


@dataclass(slots=True)
class Result:
    """The measurements of one workload on one target, one entry per run.

    Attributes:
        rates, synced_rates: operations a second, without and with the sync afterwards.
        cpu_us, written_kib: CPU time of the daemon, and what it wrote, per operation.
    """

    rates: list[float] = field(default_factory=list)
    synced_rates: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)
    written_kib: list[float] = field(default_factory=list)
    failure: str = ""


Results = dict[str, dict[str, Result]]  # target, workload (or "" for the target itself)


def parameters(quick: bool) -> dict[str, int]:
    """The sizes of the workloads: full, or about a tenth."""
    mebibyte = 1 << 20
    return {
        "files": 1000 if quick else 5000,
        "entries": 2000 if quick else 20_000,
        "synced": 100 if quick else 500,
        "sequential_bytes": (128 if quick else 1024) * mebibyte,
        "random_bytes": (32 if quick else 256) * mebibyte,
        "random_writes": 2000 if quick else 20_000,
        "random_reads": 1000 if quick else 5000,
    }


def run_client(step: str, directory: Path, sizes: dict[str, int]) -> tuple[float, int]:
    """Run one step in a child process.

    Raises:
        TargetError: the step failed; the message is the last line that it printed.
    """
    script = Path(__file__).with_name("workloads.py")
    process = subprocess.Popen(
        [sys.executable, "-S", "-E", str(script), step, str(directory), json.dumps(sizes)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        output, errors = process.communicate(timeout=COMMAND_SECONDS_MAX)
    except subprocess.TimeoutExpired:
        raise TargetError(f"{step}: not finished after {COMMAND_SECONDS_MAX} s") from None
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if process.returncode:
        lines = errors.strip().splitlines() or [f"ended with status {process.returncode}"]
        raise TargetError(f"{step}: {lines[-1]}")
    answer = json.loads(output)
    return answer["seconds"], answer["operations"]


def with_needs(names: Iterable[str]) -> list[Workload]:
    """The workloads with these names and those that they need, in running order."""
    wanted: set[str] = set()

    def want(name: str) -> None:
        wanted.add(name)
        for workload in WORKLOADS:
            if workload.name == name:
                for needed in workload.needs:
                    want(needed)

    for name in names:
        want(name)
    return [workload for workload in WORKLOADS if workload.name in wanted]


def _measure(target: Target, workload: Workload, sizes: dict[str, int], result: Result) -> None:
    if workload.before == COLD and not target.remountable:
        result.failure = "-"  # the target keeps no files over a remount
        return
    for step in workload.prepare:
        run_client(step, target.mountpoint, sizes)
    if workload.before == COLD:
        target.remount()
    if workload.before in (COLD, FORGOTTEN):
        drop_caches(3)
    daemon = target.daemon()
    cpu_before_s = cpu_seconds(daemon) if daemon is not None else 0.0
    written_before = written_bytes(daemon) if daemon is not None else 0
    seconds, operations = run_client(workload.step, target.mountpoint, sizes)
    synced_s = 0.0
    if workload.synced:
        start_s = time.perf_counter()
        target.sync()
        synced_s = time.perf_counter() - start_s
        result.synced_rates.append(operations / (seconds + synced_s))
    result.rates.append(operations / seconds)
    if daemon is not None:
        result.cpu_us.append((cpu_seconds(daemon) - cpu_before_s) / operations * 1e6)
        result.written_kib.append((written_bytes(daemon) - written_before) / operations / 1024)


def measure_all(
    target_names: list[str],
    workloads: list[Workload],
    runs: int,
    quick: bool,
    work: Path,
    say: Callable[[str], None],
) -> Results:
    """Measure every workload on every target, `runs` times, each time on a fresh filesystem.

    Each run measures all targets one after the other, so a machine that slows down affects them
    all.
    """
    sizes = parameters(quick)
    size_bytes = 3 * sizes["sequential_bytes"] + 4 * sizes["random_bytes"] + (1 << 30)
    results: Results = {
        name: {key: Result() for key in ["", *(workload.name for workload in workloads)]}
        for name in target_names
    }
    for number in range(runs):
        for name in target_names:
            own = results[name]
            if own[""].failure:
                continue
            target = TARGETS[name](work / f"{name}-{number}", size_bytes)
            try:
                say(f"{name}: run {number + 1} of {runs}: setting up")
                target.set_up()
                failed: set[str] = set()
                for workload in workloads:
                    say(f"{name}: run {number + 1} of {runs}: {workload.name}")
                    result = own[workload.name]
                    if failed.intersection(workload.needs):
                        failed.add(workload.name)
                        result.failure = result.failure or "a workload that it needs failed"
                        continue
                    try:
                        _measure(target, workload, sizes, result)
                    except (TargetError, OSError) as error:
                        failed.add(workload.name)
                        result.failure = str(error)
            except (TargetError, OSError) as error:
                own[""].failure = str(error)
            finally:
                target.tear_down()
    return results


def as_json(results: Results) -> Any:
    """The results as plain data."""
    return {
        target: {name or "target": asdict(result) for name, result in rows.items()}
        for target, rows in results.items()
    }
