"""Promises of cowdu on a mount: paths are the mount's, numbers are current, nobody is disturbed."""

import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.commands import COMMANDS, run_command
from tests.conftest import Mounted, json_of, require_success
from tests.sizes import HANG_SECONDS

pytestmark = [pytest.mark.mounted, pytest.mark.needs_cowfs]

MEBIBYTE = 1 << 20


def du(*words: str | os.PathLike[str]) -> dict[str, tuple[int, int, int]]:
    """Total, exclusive and set shared bytes of each path that cowdu reports."""
    rows = json_of(run_command("cowdu", "du", *words, "--json"))["paths"]
    return {
        row["path"]: (row["total_bytes"], row["exclusive_bytes"], row["set_shared_bytes"])
        for row in rows
    }


def reclaim(place: Path, *names: str) -> dict[str, Any]:
    answer: dict[str, Any] = json_of(run_command("cowdu", place, *names, "--json"))
    return answer


def test_du_is_right_where_btrfs_is_not(mount: Mounted) -> None:
    """Promise (C11): three snapshots of one file, reflinks, and dead parts of overwritten files.

    Btrfs's `filesystem du` reports for these: exclusive 0 for the directory of all three; the total
    of both copies, and exclusive 0; nothing for the part that was overwritten.
    """
    place, choice = mount.path, random.Random(9)
    snapshots = place / ".snapshots"
    (place / "deleted").write_bytes(choice.randbytes(10 * MEBIBYTE))
    for name in ("s1", "s2", "s3"):
        mount.snapshot(name)
    (place / "deleted").unlink()
    assert du("-s", *(snapshots / name for name in ("s1", "s2", "s3"))) == {
        str(snapshots / name): (10 * MEBIBYTE, 0, 10 * MEBIBYTE) for name in ("s1", "s2", "s3")
    }
    assert du("-s", snapshots)[str(snapshots)] == (10 * MEBIBYTE, 10 * MEBIBYTE, 0)
    three = [snapshots / name for name in ("s1", "s2", "s3")]
    assert du("-s", "-c", *three)["total"] == (10 * MEBIBYTE, 10 * MEBIBYTE, 0)

    (place / "one").write_bytes(choice.randbytes(6 * MEBIBYTE))
    require_success(run_command("cp", place / "one", place / "two"))
    mount.snapshot("s4")
    (place / "one").unlink()
    (place / "two").unlink()
    inside = du(snapshots / "s4")
    assert inside[str(snapshots / "s4")] == (6 * MEBIBYTE, 6 * MEBIBYTE, 0)
    for name in ("one", "two"):  # deleting only one of them frees nothing
        assert inside[str(snapshots / "s4" / name)] == (6 * MEBIBYTE, 0, 6 * MEBIBYTE)

    (place / "written over").write_bytes(choice.randbytes(8 * MEBIBYTE))
    require_success(run_command("sync", place))
    with open(place / "written over", "r+b") as file:
        file.write(choice.randbytes(7 * MEBIBYTE))
    live = str(place / "written over")
    assert du(live) == {live: (8 * MEBIBYTE, 8 * MEBIBYTE, 0)}
    mount.snapshot("s5")
    with open(place / "written over", "r+b") as file:
        file.write(choice.randbytes(7 * MEBIBYTE))
    assert du(live) == {live: (8 * MEBIBYTE, 7 * MEBIBYTE, MEBIBYTE)}
    report = reclaim(place, "s5")
    assert report["reclaim"]["reclaim_bytes"] - 7 * MEBIBYTE < MEBIBYTE
    why = json_of(run_command("cowdu", "why", place, "s5", "--json"))
    assert why["tree"]["bytes"] == 7 * MEBIBYTE


def test_paths_are_those_of_the_mount_wherever_one_stands(mount: Mounted) -> None:
    """Promise: relative paths, links above the mount, deleted files and files in snapshots work."""
    folder = mount.path / "folder"
    folder.mkdir()
    (folder / "file").write_bytes(os.urandom(100_000))
    mount.snapshot("monday")
    (folder / "file").write_bytes(os.urandom(50_000))
    mount.snapshot("tuesday")
    (folder / "file").unlink()
    link = mount.path.parent / "link"
    link.symlink_to(mount.path)
    program = str(COMMANDS / "cowdu")
    ways = [
        (mount.path, "folder/file"),
        (folder, "file"),
        (folder, "../folder/./file"),
        (mount.path.parent, "link/folder/file"),
        (Path("/"), str(folder / "file")),
        (Path("/"), str(mount.path / ".snapshots/monday/folder/file")),
    ]
    answers = []
    for directory, path in ways:
        result = subprocess.run(
            [program, "log", path, "-H", "-p"],
            cwd=directory,
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
            check=True,
        )
        answers.append([line.split("\t")[2::4] for line in result.stdout.splitlines()])
    assert answers[0] == [["100000", "monday"], ["50000", "tuesday"]]
    assert all(answer == answers[0] for answer in answers[:-1]), answers
    inside = du(mount.path / ".snapshots" / "monday" / "folder")
    assert list(inside.values()) == [(25 * 4096, 25 * 4096, 0)] * 2
    for words, says in (
        (["log", mount.path.parent / "elsewhere"], "not on a mounted cowfs"),
        (["log", mount.path / "never"], "nothing at"),
        (["du", mount.path / ".snapshots/none"], "no snapshot 'none'"),
        (["du", mount.path, "/"], "not on a mounted cowfs"),
        (["why", mount.path], "name a snapshot"),
    ):
        refused = run_command("cowdu", *words)
        assert refused.returncode in (1, 2)
        assert says in refused.stderr
        assert refused.stderr.count("\n") == 1


def test_a_mount_of_a_snapshot_is_asked_about_that_snapshot(mount: Mounted) -> None:
    """Promise: with -o snapshot=NAME, a path means the file in that snapshot."""
    (mount.path / "file").write_bytes(os.urandom(40_960))
    mount.snapshot("then")
    (mount.path / "file").write_bytes(os.urandom(81_920))
    mount.umount()
    require_success(run_command("mount", mount.image, mount.path, "-o", "snapshot=then"))
    try:
        path = str(mount.path / "file")
        assert du(path) == {path: (40_960, 40_960, 0)}
    finally:
        require_success(run_command("umount", mount.path))
    mount.remount()


def test_numbers_hold_while_programs_write(mount: Mounted) -> None:
    """Promise (C11): a report of a busy mount shows one moment, and deletion frees what it says."""
    choice = random.Random(4)
    stop = threading.Event()

    def work() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            (mount.path / f"busy {number % 50}").write_bytes(os.urandom(20_000))

    (mount.path / "base").write_bytes(choice.randbytes(3 * MEBIBYTE))
    worker = threading.Thread(target=work)
    worker.start()
    try:
        for number in range(4):
            mount.snapshot(f"s{number}")
            report = reclaim(mount.path)
            rows = {row["name"]: row for row in report["snapshots"]}
            assert set(rows) == {f"s{count}" for count in range(number + 1)}
            live = next(row for row in report["others"] if row["kind"] == "volume")
            totals = report["totals"]
            assert live["referenced_bytes"] + totals["snapshots_bytes"] == totals["allocated_bytes"]
    finally:
        stop.set()
        worker.join()
    told = reclaim(mount.path, "s0", "s2")["reclaim"]["reclaim_bytes"]
    planned = json_of(run_command("cowdu", "plan", mount.path, "--free", "1", "--json"))
    assert planned["reclaim_bytes"] > 0
    before = json_of(run_command("df", mount.path, "--json"))["tree_bytes"]
    require_success(run_command("snapshot", "delete", mount.path, "s0", "s2", "--wait"))
    require_success(run_command("sync", mount.path))
    assert before - json_of(run_command("df", mount.path, "--json"))["tree_bytes"] == told


def test_files_that_are_open_without_a_name_have_a_row(mount: Mounted) -> None:
    """Promise: files that only open descriptors keep get a row, until they are closed."""
    path = mount.path / "open"
    path.write_bytes(os.urandom(2 * MEBIBYTE))
    with open(path, "rb"):
        path.unlink()
        rows = {row["kind"]: row for row in reclaim(mount.path)["others"]}
        assert rows["orphans"]["exclusive_bytes"] == 2 * MEBIBYTE
        text = require_success(run_command("cowdu", mount.path)).stdout
        assert "(open files without a name)" in text
    require_success(run_command("sync", mount.path))
    assert "orphans" not in {row["kind"] for row in reclaim(mount.path)["others"]}


def test_cowdu_stands_back_for_everybody_else(mount: Mounted) -> None:
    """Promise: cowdu runs at low priority, so that others get the processor first."""
    program = (
        "import os\n"
        "from cowfs_tools.cowdu.looking import look\n"
        f"with look({str(mount.path)!r}):\n"
        "    print(os.getpriority(os.PRIO_PROCESS, 0) >= 10)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=True,
    )
    assert result.stdout == "True\n"
