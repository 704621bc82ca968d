"""Promises that bytes which are not UTF-8 work in paths, names, arguments, errors and answers."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowfs.escapes import host_path, unescaped
from tests.commands import COMMANDS, Completed, run_command
from tests.conftest import is_mount_point, require_clean, unmount_lazily
from tests.sizes import HANG_SECONDS

pytestmark = [pytest.mark.mounted, pytest.mark.needs_cowfs]

ERROR, USAGE = 1, 2
BAD = os.fsdecode(b"\xff\xfe")


@pytest.fixture(autouse=True)
def _strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let output that is no text be an error, as in a locale like de_DE.UTF-8.

    The forks of the server of commands are that strict by themselves.
    """
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")


def run(*words: str | Path, status: int = 0, program: bool | None = None) -> Completed:
    """Run a command; require its status, and output without internal error that is all text."""
    done = run_command(*words[words[0] == "cowfs" :], program=program)
    story = f"{done.args!a}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert done.returncode == status, story
    for words_of_a_bug in ("internal error", "ended the connection", "Traceback", "udc"):
        assert words_of_a_bug not in done.stdout + done.stderr, story
    assert done.stderr.count("\n") == (status != 0), story
    return done


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / os.fsdecode(b"f\xe9 \\x41\nline")
    folder.mkdir()
    return folder


@pytest.fixture
def image(folder: Path) -> Path:
    image = folder / f"image{BAD}.img"
    run("cowfs", "mkfs", image, "--size", "64M", program=True)
    return image


@pytest.fixture
def place(folder: Path, image: Path) -> Iterator[Path]:
    """A mount with a snapshot, all at paths that are not text; the image is clean at the end."""
    place = folder / f"mnt{BAD}"
    place.mkdir()
    run("cowfs", "mount", image, place)
    (place / f"file{BAD}").write_bytes(os.urandom(100_000))
    run("cowfs", "snapshot", "create", place, "monday", "-m", "käse")
    yield place
    if is_mount_point(place):
        run("cowfs", "umount", place)
    if is_mount_point(place):
        unmount_lazily(place)
    require_clean(image)


COMMANDS_THAT_LOOK = [
    ("cowfs", "snapshot", "list"),
    ("cowfs", "df"),
    ("cowfs", "info"),
    ("cowfs", "info", "--generations"),
    ("cowfs", "sync"),
    ("cowfs", "check"),
    ("cowfs", "scrub", "start", "-B"),
    ("cowfs", "scrub", "status"),
    ("cowdu",),
    ("cowdu", "curve"),
    ("cowdu", "pairs"),
    ("cowdu", "why", "monday"),
    ("cowdu", "block", "9"),
]


def test_every_command_works_on_paths_that_are_no_text(
    place: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: commands work on mount and image, in words and as JSON; JSON names convert back."""
    for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    (place / f"file{BAD}").unlink()

    def look(target: Path) -> None:
        for program, *words in COMMANDS_THAT_LOOK:
            at = 2 if words[:1] in (["snapshot"], ["scrub"]) else 1 if words else 0
            line = [program, *words[:at], target, *words[at:]]
            told = run(*line).stdout
            assert "\udcff" not in told
            answer = json.loads(run(*line, "--json").stdout)
            found = answer.get("image", answer.get("scrub", {}) and answer["scrub"]["image"])
            if found:
                assert host_path(found) == str(image), words
        why = json.loads(run("cowdu", "why", target, "monday", "--json").stdout)["tree"]
        assert [unescaped(child["path"]) for child in why["children"]] == [b"file\xff\xfe"]

    look(place)
    info = json.loads(run("cowfs", "info", place, "--json", program=True).stdout)
    assert host_path(info["mount_point"]) == str(place)
    inside = place / ".snapshots" / "monday" / f"file{BAD}"
    du = json.loads(run("cowdu", "du", inside, "--json", program=True).stdout)["paths"]
    assert [host_path(each["path"]) for each in du] == [str(inside)]
    log = json.loads(run("cowdu", "log", place / f"file{BAD}", "--json").stdout)
    assert unescaped(log["path"]) == b"file\xff\xfe"
    run("cowfs", "cp", inside, place / f"back{BAD}")
    (place / f"back{BAD}").write_bytes(b"of its own now")
    page = tmp_path / f"page{BAD}.html"
    run("cowdu", "report", place, "--html", page)
    plan = json.loads(run("cowdu", "plan", place, "--free", "1", "--json").stdout)
    ended = json.loads(run("cowfs", "umount", place, "--json").stdout)
    assert host_path(ended["mount_point"]) == str(place)
    assert host_path(ended["image"]) == str(image)
    look(image)
    run("cowdump", image, "items", "main", "1")
    rescued = tmp_path / f"rescued{BAD}"
    run("cowfs", "salvage", image, rescued)
    assert b"back\xff\xfe" in os.listdir(os.fsencode(rescued / "main"))
    # What the plan printed can be pasted into a shell.
    run("cowfs", "mount", image, place)
    words = subprocess.run(
        ["bash", "-c", f'printf "%s\\0" {plan["command"]}'], capture_output=True, check=True
    ).stdout.split(b"\0")
    assert words == [b"cowfs", b"snapshot", b"delete", os.fsencode(place), b"monday", b""]


def test_refusal_names_open_files_that_are_no_text(place: Path) -> None:
    """Promise: rollback names the open file by its bytes, and the daemon goes on."""
    with (place / f"open{BAD}").open("wb"):
        refused = run("cowfs", "rollback", place, "monday", status=ERROR)
        assert r"\xff\xfe" in refused.stderr
        assert f"(process {os.getpid()})" in refused.stderr
        busy = run("cowfs", "umount", place, status=ERROR)
        assert "is busy" in busy.stderr
    run("cowfs", "rollback", place, "monday")
    run("cowfs", "undo", place)


def test_names_that_no_snapshot_can_have_are_refused_in_words(place: Path, image: Path) -> None:
    """Promise: such a name is refused, quoted in the error, and nothing changes or breaks."""

    def refused(target: Path) -> None:
        for words, status, says in (
            (("snapshot", "create", target, BAD), USAGE, "is not valid UTF-8"),
            (("snapshot", "create", target, "x", "-m", BAD), USAGE, "is not valid UTF-8"),
            (("snapshot", "rename", target, "monday", BAD), USAGE, "is not valid UTF-8"),
            (("snapshot", "delete", target, BAD), ERROR, "there is no snapshot"),
            (("snapshot", "delete", target, f"*{BAD}"), ERROR, "no snapshot matches"),
            (("snapshot", "hold", target, BAD), ERROR, "there is no snapshot"),
            (("rollback", target, BAD, "-n"), ERROR, "there is no snapshot"),
            (("mount", image, target, "-o", BAD), USAGE, "unknown mount option"),
            (("snapshot", "delete", target, "--older-than", BAD), USAGE, "is not a duration"),
        ):
            done = run("cowfs", *words, status=status)
            assert says in done.stderr
            assert r"\xff\xfe" in done.stderr
        for words in (("snapshot", "rename", target, BAD, "x"), ("rollback", target, BAD)):
            done = run("cowfs", *words, status=USAGE if target == place else ERROR)
            assert r"snapshot name '\xff\xfe'" in done.stderr or (
                r"there is no snapshot '\xff\xfe'" in done.stderr
            )

    refused(place)
    listed = json.loads(run("cowfs", "snapshot", "list", place, "--json").stdout)["snapshots"]
    assert [found["name"] for found in listed] == ["monday"]
    run("cowfs", "umount", place)
    refused(image)
    failed = run("cowfs", "mount", image, place, "-o", f"snapshot={BAD}", status=ERROR)
    assert r"there is no snapshot '\xff\xfe'" in failed.stderr
    run("cowfs", "mount", image, place)


def test_snapshot_directory_answers_any_bytes_as_a_directory_does(place: Path) -> None:
    """Promise: an unknown name in .snapshots is ENOENT, and making it is EROFS."""
    name = os.fsencode(place / ".snapshots") + b"/\xff"
    for call, says in (
        (os.stat, "No such file"),
        (os.mkdir, "Read-only file system"),
        (os.rmdir, "No such file"),
        (os.unlink, "No such file"),
    ):
        with pytest.raises(OSError, match=says):
            call(name)
    assert os.listdir(place / ".snapshots") == ["monday"]


def test_daemon_log_takes_paths_that_are_no_text(place: Path, image: Path) -> None:
    """Promise: the log line has such a path, and the daemon in the foreground ends cleanly."""
    run("cowfs", "umount", place)
    with subprocess.Popen(
        [str(COMMANDS / "cowfs"), "mount", "-f", str(image), str(place)],
        stderr=subprocess.PIPE,
    ) as daemon:
        try:
            assert daemon.stderr is not None
            line = daemon.stderr.readline()
            assert rb"\xff\xfe, generation" in line  # complete, despite line breaks in the path
            run("cowfs", "umount", place)
            assert b"Logging error" not in daemon.stderr.read()
            assert daemon.wait(HANG_SECONDS) == 0
        finally:
            daemon.kill()
    run("cowfs", "mount", image, place)
