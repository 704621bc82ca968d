"""Measures cowfs and its peers on the same disk in one run, and prints the ratios.

It needs root for mounts, loop devices and dropping caches. A target that is missing or fails is
shown as failed, and the others are still measured. It leaves no mount, loop device, pool or daemon
behind, also after Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType

from benchlib import report
from benchlib.accounting import accounting_figures
from benchlib.plan import SYNC_WORKLOADS, WORKLOADS, as_json, measure_all, parameters, with_needs
from benchlib.snapshots import all_figures
from benchlib.targets import TARGETS, Before
from benchlib.waits import wait_figures
from rich.console import Console

DEFAULT_TARGETS = "cowfs,null,null-stock,zfs-fuse,ext4,btrfs"


def names_of(text: str, known: list[str], what: str) -> list[str]:
    """The names in a comma-separated text. Exits with a message if one is not known."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            sys.exit(f"bench: unknown {what} {name!r}; known are {', '.join(known)}")
    return names


def stop(number: int, frame: FrameType | None) -> None:
    # A second signal must not interrupt the clean-up.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(checkout: Path) -> int:
    """Measure as the command line asks. Returns the exit status.

    Args:
        checkout: images go to `.bench` in it, unless --dir is given.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    known_workloads = [workload.name for workload in WORKLOADS]
    parser.add_argument("--targets", default=DEFAULT_TARGETS, help=f"of {', '.join(TARGETS)}")
    parser.add_argument(
        "--workloads",
        default=",".join(known_workloads),
        help=f"of {', '.join(known_workloads)}; workloads that these need run too",
    )
    parser.add_argument(
        "--sync",
        action="store_true",
        help="instead of --workloads: databases, git and others that make each change durable",
    )
    parser.add_argument(
        "--before",
        type=Path,
        metavar="PROGRAM",
        help="the cowfs command of another version, measured as the target 'before'",
    )
    parser.add_argument("--runs", type=int, default=1, help="each on fresh filesystems")
    parser.add_argument("--quick", action="store_true", help="about a tenth of the work")
    parser.add_argument("--figures", action="store_true", help="also snapshots, 1 TiB and cowdu")
    parser.add_argument(
        "--accounting", action="store_true", help="cowdu and Btrfs's tools at 1,000 snapshots"
    )
    parser.add_argument(
        "--snapshots",
        type=int,
        nargs="?",
        const=2000,
        default=0,
        metavar="N",
        help="how long a client waits during lists, edits and drops at N snapshots (2000)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all results to FILE")
    parser.add_argument("--dir", type=Path, help="where images go (default: .bench here)")
    arguments = parser.parse_args()
    targets = names_of(arguments.targets, list(TARGETS), "target")
    if arguments.before is not None:
        Before.program = arguments.before.absolute()
        targets.insert(0, Before.name)
    workloads = with_needs(names_of(arguments.workloads, known_workloads, "workload"))
    if arguments.sync:
        workloads = list(SYNC_WORKLOADS)
    if os.geteuid() != 0:
        sys.exit("bench: must be root, to mount and to drop caches")

    console = Console(width=None if sys.stdout.isatty() else 160)
    notes = Console(stderr=True)

    def say(text: str) -> None:
        notes.print(f"bench: {text}", markup=False, highlight=False)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    parent = arguments.dir or checkout / ".bench"
    parent_is_new = not parent.exists()
    parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="run-", dir=parent)).resolve()
    figures: dict[str, float] = {}
    failures: list[str] = []
    try:
        results = measure_all(targets, workloads, arguments.runs, arguments.quick, work, say)
        if arguments.figures:
            figures, failures = all_figures(work, arguments.quick, say)
        if arguments.accounting:
            more, failed = accounting_figures(work, arguments.quick, say)
            figures |= more
            failures += failed
        if arguments.snapshots:
            figures |= wait_figures(work, arguments.snapshots, say)
    except KeyboardInterrupt:
        say("interrupted; everything is unmounted")
        return 130
    finally:
        # Remove only directories without a mount: one that could not be unmounted stays.
        for left in work.iterdir():
            if not any(os.path.ismount(path) for path in left.iterdir()):
                shutil.rmtree(left, ignore_errors=True)
        try:
            work.rmdir()
            if parent_is_new:
                parent.rmdir()
        except OSError as error:
            say(f"could not remove {error.filename}; look for a mount in it")

    ratios = report.ratios(results)
    report.print_rates(console, results, workloads)
    report.print_figures(console, "ratios (above 1: the first is faster)", ratios)
    report.print_figures(console, "cowfs alone, and Btrfs's accounting", figures)
    for failure in failures:
        console.print(f"cowfs: {failure}", markup=False)
    if arguments.json:
        document = {
            "machine": {"kernel": platform.release(), "cpus": os.cpu_count()},
            "python": platform.python_version(),
            "parameters": parameters(arguments.quick),
            "results": as_json(results),
            "ratios": ratios,
            "figures": figures,
            "figure_failures": failures,
        }
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0
