"""How long a client of a mount with thousands of snapshots waits while commands run.

The library makes the image: one commit for each snapshot, with a few files rewritten before each.
Then a client creates, writes and stats a small file every millisecond, while one command after the
other runs. For each command the figures are the client's longest time and its 99th percentile.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from benchlib.targets import Cowfs, run

FILES, CHANGES = 200, 4
INTERVAL_S = 0.001
QUEUE_SECONDS_MAX = 600.0
BEFORE_S = 0.3  # how long the client runs before the command starts
Say = Callable[[str], None]


def make_snapshots(image: Path, count: int) -> None:
    """Fill a new image with `count` snapshots, named s00000, s00001 and so on."""
    from cowfs.history.edits import CreateSnapshot
    from cowfs.history.images import open_filesystem
    from cowfs.storage.device import FileDevice

    device = FileDevice(image, writable=True)
    device.flush = lambda: None  # type: ignore[method-assign]  # a crash may lose this image
    filesystem = open_filesystem(device, writable=True)
    live = filesystem.live
    inos = [live.create(1, b"f%d" % n, 0o100644, 0, 0).ino for n in range(FILES)]
    for number in range(count):
        for change in range(CHANGES):
            live.write(inos[(number * 7 + change * 31) % FILES], 0, os.urandom(5000))
        filesystem.apply(CreateSnapshot(f"s{number:05d}"))
    filesystem.close()


def _client(directory: str, stop: Event, answers: Any) -> None:
    os.makedirs(directory, exist_ok=True)
    times: list[tuple[float, float]] = []
    while not stop.is_set():
        path = f"{directory}/{len(times) % 500}"
        start_s = time.perf_counter()
        with open(path, "wb") as file:
            file.write(b"small")
        os.stat(path)
        end_s = time.perf_counter()
        times.append((start_s, end_s))
        time.sleep(max(0.0, INTERVAL_S - (end_s - start_s)))
    answers.send(times)


def _beside(mount: Path, call: Callable[[], object]) -> tuple[float, list[float]]:
    """Seconds of the call, and seconds of each job that the client did meanwhile, ascending."""
    stop = multiprocessing.Event()
    answers, there = multiprocessing.Pipe(duplex=False)
    client = multiprocessing.Process(
        target=_client, args=(str(mount / "waits"), stop, there), daemon=True
    )
    client.start()
    try:
        time.sleep(BEFORE_S)
        start_s = time.perf_counter()
        call()
        end_s = time.perf_counter()
        time.sleep(0.05)
    finally:
        stop.set()
        times = answers.recv()
        client.join()
    return end_s - start_s, sorted(b - a for a, b in times if b >= start_s and a <= end_s)


def wait_figures(work: Path, count: int, say: Say) -> dict[str, float]:
    """Seconds of each command, and milliseconds that the client waited meanwhile."""
    target = Cowfs(work / "waits", 16 << 30)
    mount = target.mountpoint
    half = count // 2
    try:
        mount.mkdir(parents=True)
        target.make()
        say(f"cowfs: making {count:,} snapshots")
        make_snapshots(target.image, count)
        target.mount()

        def snapshot(*words: str) -> Callable[[], object]:
            verb, *rest = words
            return lambda: target.command("snapshot", verb, mount, *rest)

        def wait_for_queue() -> None:
            stop_s = time.monotonic() + QUEUE_SECONDS_MAX
            while json.loads(target.command("df", mount, "--json"))["drops"]:
                if time.monotonic() > stop_s:
                    return
                time.sleep(0.2)

        parts: list[tuple[str, Callable[[], object]]] = [
            ("nothing", lambda: time.sleep(1)),
            ("snapshot create", snapshot("create", "new")),
            ("snapshot list", snapshot("list")),
            ("ls .snapshots", lambda: os.listdir(mount / ".snapshots")),
            ("ls -l .snapshots", lambda: run("ls", "-l", mount / ".snapshots")),
            ("delete one", snapshot("delete", "s00001")),
            ("delete half", snapshot("delete", f"s00002%s{half:05d}")),
            ("the drop queue", wait_for_queue),
        ]
        figures = {}
        for name, call in parts:
            say(f"cowfs: {name}")
            seconds, waits = _beside(mount, call)
            label = f"{name}, {count:,} snapshots"
            figures[f"{label}, s"] = seconds
            figures[f"{label}: p99 wait beside it, ms"] = waits[int(len(waits) * 0.99)] * 1e3
            figures[f"{label}: longest wait beside it, ms"] = waits[-1] * 1e3
        snapshot("delete", f"s{half + 1:05d}%s{count - 2:05d}")()
        start_s = time.perf_counter()
        target.unmount()
        figures[f"umount while the drop queue works, {count:,} snapshots, s"] = (
            time.perf_counter() - start_s
        )
    finally:
        target.tear_down()
    return figures
