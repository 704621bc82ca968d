"""Promises of the files that commands keep: written whole, and read only if they are valid."""

import json
import os
from pathlib import Path

import pytest

from cowfs.care.scrub_report import Marks, ScrubReport
from cowfs.cli.own_files import make_file, read_own, replace_file
from cowfs.cli.scrub_state import ScrubState
from tests.cli.test_commands import output
from tests.image_files import make_image

REPORT = ScrubReport(uuid="u", image="/disk.img", state="finished", generation=3, started_ns=1)


def test_file_comes_back_as_it_was_and_only_up_to_its_bound(tmp_path: Path) -> None:
    """Promise: a file is private, replaced whole, and read only up to the given size."""
    file = tmp_path / "file"
    assert read_own(file, 100) is None
    replace_file(file, [b"one", memoryview(b"two")])
    assert read_own(file, 6) == b"onetwo"
    assert read_own(file, 5) is None
    assert file.stat().st_mode & 0o777 == 0o600
    replace_file(file, [b""])
    assert read_own(file, 5) == b""
    with pytest.raises(FileExistsError):
        make_file(file, [b"other"])
    assert os.listdir(tmp_path) == ["file"]


def test_what_is_no_regular_file_is_not_read_and_what_a_link_names_not_written(
    tmp_path: Path,
) -> None:
    """Promise: no read waits for a fifo; a write replaces a link and never follows it."""
    fifo, link, target = tmp_path / "fifo", tmp_path / "link", tmp_path / "target"
    os.mkfifo(fifo)
    target.write_bytes(b"precious")
    link.symlink_to(target)
    assert read_own(fifo, 100) is None
    assert read_own(link, 100) is None
    assert read_own(tmp_path, 100) is None
    for place in (fifo, link):
        replace_file(place, [b"new"])
        assert read_own(place, 100) == b"new"
    assert target.read_bytes() == b"precious"
    link.unlink()
    link.symlink_to(tmp_path / "missing")
    with pytest.raises(FileExistsError):
        make_file(link, [b"x"])
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize("suffix", ["json", "marks"])
def test_state_of_a_scrub_that_is_no_file_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """Promise: a fifo in place of the state stops no command; the next scrub replaces it."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    state = ScrubState("u")
    (tmp_path / "cowfs").mkdir()
    os.mkfifo(tmp_path / "cowfs" / f"scrub-u.{suffix}")
    assert state.report() is None
    assert state.marks(100) is None
    state.save(REPORT)
    state.save_marks(Marks(100, 3))
    assert state.report() == REPORT
    marks = state.marks(100)
    assert marks is not None
    assert marks.generation == 3


@pytest.mark.parametrize(
    "lie",
    [
        {"started_ns": 10**400},
        {"ended_ns": 1 << 63},
        {"done_bytes": -1},
        {"total_bytes": 10**40},
        {"state": "\x1b[2J"},
        {"damage": [{"what": "x", "block": 10**30}]},
        {"damage": "[" * 10_000},
    ],
    ids=str,
)
def test_result_of_a_scrub_that_lies_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: dict[str, object]
) -> None:
    """Promise: a result with impossible numbers or words counts as no result."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    image = make_image(tmp_path / "disk.img")
    output("scrub", "start", "-B", image)
    (file,) = (tmp_path / "cowfs").glob("*.json")
    told = json.loads(file.read_bytes())
    assert "has not scrubbed" not in output("scrub", "status", image)
    file.write_text(json.dumps(told | lie))
    assert "has not scrubbed" in output("scrub", "status", image)
    output("info", image)
