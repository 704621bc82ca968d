"""Figures of cowdu at scale, and of Btrfs's own tools on the same history.

The history is made through a mount, by the same calls on both: many files, then many snapshots,
with a few files rewritten before each. Then three things are measured: the list of all snapshots
with all columns, cold and warm; a question about a set of snapshots; and how much slower the mount
is for its clients while cowdu reads everything at the lowest priority.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from benchlib.targets import Btrfs, Cowfs, Target, TargetError, drop_caches, run

FILES_PER_DIRECTORY = 100
SIZES = (500, 1500, 3000, 8000, 20_000)
CHANGES = 20  # files rewritten before each snapshot
SECONDS_MAX = 1800.0
DU_SNAPSHOTS = 3  # snapshots for btrfs filesystem du, which reads every file of each
LOAD_ROUNDS, LOAD_SECONDS = 5, 3.0
Say = Callable[[str], None]
TakeSnapshot = Callable[[str], object]


def make_history(
    directory: Path, file_count: int, snapshot_count: int, take: TakeSnapshot
) -> list[str]:
    """Make files, changes and snapshots, the same each time. Returns the names of the snapshots."""
    chance = random.Random(1)
    paths = []
    for number in range(file_count):
        place = directory / f"d{number // FILES_PER_DIRECTORY}"
        if number % FILES_PER_DIRECTORY == 0:
            place.mkdir()
        paths.append(place / f"f{number % FILES_PER_DIRECTORY}")
        paths[-1].write_bytes(chance.randbytes(chance.choice(SIZES)))
    names = []
    for number in range(snapshot_count):
        near = chance.randrange(file_count)
        for change in range(CHANGES):
            # Half of the changes are near each other, like the work of one day.
            offset = (
                int(chance.expovariate(1 / 200)) if change % 2 else chance.randrange(file_count)
            )
            path = paths[(near + offset) % file_count]
            path.write_bytes(chance.randbytes(chance.choice(SIZES)))
        names.append(f"s{number:04d}")
        take(names[-1])
    return names


def accounting_figures(work: Path, quick: bool, say: Say) -> tuple[dict[str, float], list[str]]:
    """All figures that could be measured, and a line for each target that failed."""
    files, snapshots = (10_000, 100) if quick else (100_000, 1000)
    figures: dict[str, float] = {}
    failures = []
    for part in (_cowfs, _btrfs):
        try:
            figures |= part(work, files, snapshots, say)
        except (TargetError, OSError) as error:
            failures.append(str(error))
    label = f"{snapshots:,} snapshots of {files:,} files"
    slow = figures.get(f"btrfs quota rescan and qgroup show, {label}, s")
    fast = figures.get(f"cowdu, all columns, {label}, cold, s")
    if slow and fast:
        figures[f"btrfs quota rescan and qgroup show / cowdu cold, {label}"] = slow / fast
    return figures, failures


def _seconds(call: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s


# --- cowfs ----------------------------------------------------------------------------------------


def _cowfs(work: Path, file_count: int, snapshot_count: int, say: Say) -> dict[str, float]:
    from cowfs.api import connect

    label = f"{snapshot_count:,} snapshots of {file_count:,} files"
    say(f"cowfs: making {label}")
    target = Cowfs(work / "accounting", 32 << 30)
    os.environ["XDG_CACHE_HOME"] = str(work / "cache")
    cache = work / "cache"
    program = Path(sys.executable).parent / "cowdu"
    place = target.mountpoint

    def cowdu(*words: str | Path) -> float:
        return _seconds(lambda: run(program, *words, seconds_max=SECONDS_MAX))

    def forget() -> None:
        shutil.rmtree(cache, ignore_errors=True)

    try:
        target.set_up()

        def take(name: str) -> None:
            # One connection per snapshot: the daemon closes a quiet one.
            with connect(place) as filesystem:
                filesystem.create_snapshot(name)

        names = make_history(place, file_count, snapshot_count, take)
        middle = snapshot_count // 2
        some = f"{names[middle // 2]}%{names[middle]}"
        say("cowfs: cowdu")
        drop_caches(3)
        one_s = cowdu(place, names[middle])
        forget()
        drop_caches(3)
        figures = {
            f"cowdu, all columns, {label}, cold, s": cowdu(place, "-o", "all", "-H"),
            f"cowdu of one of {label}, nothing known, s": one_s,
        }
        warm = [cowdu(place, "-o", "all", "-H") for _ in range(5)]
        figures[f"cowdu, all columns, {label}, again, s"] = median(warm)
        changed = []
        for number in range(5):
            (place / "d0" / "f0").write_bytes(b"%d" % number * 5000)
            changed.append(cowdu(place, "-o", "all", "-H"))
        figures[f"cowdu, all columns, {label}, after a change, s"] = median(changed)
        figures[f"cowdu of a quarter of {label}, whole command, s"] = median(
            [cowdu(place, some) for _ in range(5)]
        )
        figures[f"a what-if over {label}, ms"] = _what_if_ms(place, middle)
        figures[f"cowdu plan, {label}, s"] = cowdu("plan", place, "--free", "10M")
        figures[f"cowdu why of a quarter of {label}, s"] = cowdu("why", place, some)
        say("cowfs: the mount under load, with and without cowdu beside it")
        figures |= _load_ratios(place, program, forget)
    finally:
        target.tear_down()
        forget()
    return figures


def _what_if_ms(place: Path, count: int) -> float:
    """Time to measure `count` snapshots with the owner sets in memory, as in `cowdu top`."""
    from cowfs_tools.cowdu.looking import look

    with look(str(place)) as found:
        sets = found.sets()
        times = [
            _seconds(lambda first=first: sets.exclusive(range(first, first + count)))  # type: ignore[misc]
            for first in range(0, count, max(1, count // 20))
        ]
    return median(times) * 1000


def _load_ratios(place: Path, program: Path, forget: Callable[[], None]) -> dict[str, float]:
    """Ratios of a client's latency while cowdu reads everything to that without cowdu, in turns.

    On a virtual machine a sleeping second processor costs more than a busy one. So besides an idle
    machine the peer is also a process that only counts, at the priority of cowdu.
    """
    cowdu = (
        "import shutil, subprocess, sys\n"
        "program, place, cache = sys.argv[1:]\n"
        "while True:\n"
        "    shutil.rmtree(cache, ignore_errors=True)\n"
        "    subprocess.run([program, place, '-o', 'all', '-H'], stdout=subprocess.DEVNULL)\n"
    )
    counting = "import os\nos.nice(10)\nwhile True: pass\n"
    times: dict[str, list[float]] = {"nothing": [], "counting": [], "cowdu": []}
    words = [str(program), str(place), os.environ["XDG_CACHE_HOME"]]
    for _ in range(LOAD_ROUNDS):
        times["nothing"] += _load(place)
        for name, text in (("counting", counting), ("cowdu", cowdu)):
            busy = subprocess.Popen([sys.executable, "-c", text, *words], start_new_session=True)
            try:
                times[name] += _load(place)
            finally:
                os.killpg(busy.pid, signal.SIGKILL)
                busy.wait()
    forget()
    figures = {}
    for name in ("nothing", "counting"):
        label = f"latency beside cowdu / beside {name}"
        figures[f"{label}, median"] = median(times["cowdu"]) / median(times[name])
        figures[f"{label}, 99th of 100"] = _at(times["cowdu"], 0.99) / _at(times[name], 0.99)
    return figures


def _at(values: list[float], share: float) -> float:
    return sorted(values)[int(len(values) * share)]


def _load(place: Path) -> list[float]:
    """Seconds of each of many small jobs: create, write, read, stat and remove a file."""
    times = []
    stop_s = time.monotonic() + LOAD_SECONDS
    directory = place / "load"
    directory.mkdir(exist_ok=True)
    data = os.urandom(4096)
    number = 0
    while time.monotonic() < stop_s:
        path = directory / f"{number}"
        number += 1
        start_s = time.perf_counter()
        path.write_bytes(data)
        path.read_bytes()
        path.stat()
        path.unlink()
        times.append(time.perf_counter() - start_s)
    return times


# --- Btrfs ----------------------------------------------------------------------------------------


def _btrfs(work: Path, file_count: int, snapshot_count: int, say: Say) -> dict[str, float]:
    label = f"{snapshot_count:,} snapshots of {file_count:,} files"
    say(f"btrfs: making {label}")
    target: Target = Btrfs(work / "accounting-btrfs", 32 << 30)
    try:
        target.set_up()
        main = target.mountpoint / "main"
        run("btrfs", "subvolume", "create", main)

        def take(name: str) -> None:
            run("btrfs", "subvolume", "snapshot", "-r", main, target.mountpoint / name)

        names = make_history(main, file_count, snapshot_count, take)
        say("btrfs: filesystem du")
        drop_caches(3)
        some = [target.mountpoint / name for name in names[:DU_SNAPSHOTS]]
        du_s = _seconds(
            lambda: run("btrfs", "filesystem", "du", "-s", *some, seconds_max=SECONDS_MAX)
        )
        say("btrfs: quota rescan")
        drop_caches(3)

        def show() -> str:
            return run("btrfs", "qgroup", "show", target.mountpoint, seconds_max=SECONDS_MAX)

        def scan() -> None:
            run("btrfs", "quota", "enable", target.mountpoint)
            run("btrfs", "quota", "rescan", "-w", target.mountpoint, seconds_max=SECONDS_MAX)
            show()

        scan_s = _seconds(scan)
        show_s = median([_seconds(show) for _ in range(5)])
    finally:
        target.tear_down()
    return {
        f"btrfs quota rescan and qgroup show, {label}, s": scan_s,
        f"btrfs qgroup show, {label}, again, s": show_s,
        f"btrfs filesystem du of {DU_SNAPSHOTS} of {label}, s": du_s,
    }
