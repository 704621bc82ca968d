"""Figures that only cowfs has: cost of snapshots, of mounting a large image, and of cowdu."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from benchlib.plan import run_client
from benchlib.targets import Cowfs, TargetError, resident_bytes, run

SAMPLES = 7
Say = Callable[[str], None]


def _seconds(call: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s


def _fill(target: Cowfs, file_count: int) -> None:
    sizes = {"files": file_count}
    run_client("make_tree", target.mountpoint, sizes)
    run_client("create", target.mountpoint, sizes)
    target.sync()


def _touch(target: Cowfs, number: int) -> None:
    (target.mountpoint / "touched").write_bytes(b"%d\n" % number)


def snapshot_figures(work: Path, file_count: int, say: Say) -> dict[str, float]:
    """Time of `cowfs snapshot create` with that many files, also as a multiple of one commit.

    A commit is measured as `cowfs sync` after a change of one file. Both times are of whole
    commands. The start of a command is measured too (`cowfs sync` with nothing to do), and
    subtracted from both sides of the ratio.
    """
    say(f"cowfs: snapshots of {file_count:,} files")
    target = Cowfs(work / f"snapshots-{file_count}", 4 << 30)
    try:
        target.set_up()
        _fill(target, file_count)
        idle_s, commit_s, create_s = [], [], []
        for number in range(SAMPLES):
            idle_s.append(_seconds(target.sync))
            _touch(target, number)
            commit_s.append(_seconds(target.sync))
            _touch(target, number + SAMPLES)
            create_s.append(
                _seconds(
                    lambda number=number: target.command(  # type: ignore[misc]
                        "snapshot", "create", target.mountpoint, f"sample-{number}"
                    )
                )
            )
    finally:
        target.tear_down()
    idle, commit, create = median(idle_s), median(commit_s), median(create_s)
    label = f"{file_count:,} files"
    return {
        f"cowfs sync, nothing to do, {label}, ms": idle * 1e3,
        f"cowfs sync, one file touched, {label}, ms": commit * 1e3,
        f"cowfs snapshot create, {label}, ms": create * 1e3,
        f"cowfs snapshot create, {label}, commits' worth": (
            max(create - idle, 0.0) / max(commit - idle, 0.0001)
        ),
    }


def large_image_figures(work: Path, size_bytes: int, label: str, say: Say) -> dict[str, float]:
    """Time to mount an empty sparse image of this size, and the daemon's memory after it."""
    say(f"cowfs: mounting {label}")
    target = Cowfs(work / f"large-{size_bytes}", size_bytes)
    try:
        target.mountpoint.mkdir(parents=True)
        mkfs_s = _seconds(target.make)
        mount_s = [_seconds(target.mount)]
        for _ in range(2):
            target.unmount()
            mount_s.append(_seconds(target.mount))
        list(target.mountpoint.iterdir())
        daemon = target.daemon()
        resident = resident_bytes(daemon) if daemon is not None else 0
        stored_bytes = target.image.stat().st_blocks * 512
    finally:
        target.tear_down()
    return {
        f"cowfs mkfs of {label}, ms": mkfs_s * 1e3,
        f"cowfs mount of {label}, ms": median(mount_s) * 1e3,
        f"daemon's memory with {label}, MiB": resident / (1 << 20),
        f"disk used by {label}, MiB": stored_bytes / (1 << 20),
    }


def cowdu_figures(work: Path, file_count: int, snapshot_count: int, say: Say) -> dict[str, float]:
    """Time of `cowdu` for one of many snapshots of a mount: the first time, and later ones."""
    say(f"cowfs: cowdu, {snapshot_count} snapshots of {file_count:,} files")
    target = Cowfs(work / "cowdu", 4 << 30)
    program = Path(sys.executable).parent / "cowdu"
    try:
        target.set_up()
        _fill(target, file_count)
        for number in range(snapshot_count):
            _touch(target, number)
            target.command("snapshot", "create", target.mountpoint, f"sample-{number}")
        name = f"sample-{snapshot_count // 2}"
        target.remount()
        cold_s = _seconds(lambda: run(program, target.mountpoint, name))
        warm_s = [_seconds(lambda: run(program, target.mountpoint, name)) for _ in range(SAMPLES)]
    finally:
        target.tear_down()
    label = f"one of {snapshot_count} snapshots, {file_count:,} files"
    return {f"cowdu, {label}, first, ms": cold_s * 1e3, f"cowdu, {label}, ms": median(warm_s) * 1e3}


def all_figures(work: Path, quick: bool, say: Say) -> tuple[dict[str, float], list[str]]:
    """All figures that could be measured, and a line for each failure."""
    many = 10_000 if quick else 100_000
    parts: list[Callable[[], dict[str, float]]] = [
        lambda: snapshot_figures(work, 1000, say),
        lambda: snapshot_figures(work, many, say),
        lambda: large_image_figures(work, 1 << 30, "1 GiB", say),
        lambda: large_image_figures(work, 1 << 40, "1 TiB", say),
        lambda: cowdu_figures(work, many, 20 if quick else 200, say),
    ]
    figures: dict[str, float] = {}
    failures: list[str] = []
    for part in parts:
        try:
            figures.update(part())
        except (TargetError, OSError) as error:
            failures.append(str(error))
    small = figures.get("cowfs snapshot create, 1,000 files, ms")
    large = figures.get(f"cowfs snapshot create, {many:,} files, ms")
    if small and large:
        figures[f"cowfs snapshot create, {many:,} files / 1,000 files"] = large / small
    return figures, failures
