"""Promise C11: cowdu tells to the byte what deleting frees, and changes nothing."""

import itertools
import os
from pathlib import Path
from typing import Any

import pytest

from cowfs.history.edits import DeleteSnapshots
from tests.image_files import change, history, make_image, require_clean, tree_bytes
from tests.tools.running import cowdu as run
from tests.tools.running import cowdu_answer

NAMES = ["one", "two", "three", "four"]


def usage(*words: str | os.PathLike[str]) -> dict[str, Any]:
    answer = cowdu_answer(*words)
    assert answer.pop("output_version") == {"command": "cowdu", "vers_major": 0, "vers_minor": 1}
    return answer


@pytest.fixture(scope="module", params=[True, False], ids=["two copies", "one copy"])
def original(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> bytes:
    """An image with four snapshots that share data, as bytes."""
    path = make_image(
        tmp_path_factory.mktemp("original") / "disk.img", duplicate_metadata=request.param
    )
    change(path, *history(NAMES))
    require_clean(path)
    return path.read_bytes()


SETS = [
    names for count in range(1, 5) for names in itertools.combinations(NAMES, count)
]  # every set of snapshots


@pytest.mark.parametrize("names", SETS, ids="+".join)
def test_cowdu_tells_what_deleting_a_set_frees(image: Path, names: tuple[str, ...]) -> None:
    """Promise C11: for every set of snapshots cowdu tells what deleting it frees, to the byte."""
    before = tree_bytes(image)
    told = usage(image, *names)["reclaim"]
    assert told["names"] == list(names)

    def delete(filesystem: Any) -> None:
        filesystem.apply(DeleteSnapshots(tuple(names)))
        filesystem.work_drops()

    change(image, delete)
    assert before - tree_bytes(image) == told["reclaim_bytes"]


def test_cowdu_rows_are_what_their_columns_say(image: Path) -> None:
    """Promise: exclusive is what deleting that one frees; all together free more than the sum."""
    contents = image.read_bytes()
    report = usage(image)
    rows = {row["name"]: row for row in report["snapshots"]}
    assert list(rows) == NAMES
    for name, row in rows.items():
        assert usage(image, name)["reclaim"]["reclaim_bytes"] == row["exclusive_bytes"] > 0
        assert row["exclusive_bytes"] <= row["written_bytes"] <= row["referenced_bytes"]
    assert rows["one"]["written_bytes"] == rows["one"]["referenced_bytes"]
    assert rows["two"]["written_bytes"] < rows["two"]["referenced_bytes"]
    together = report["reclaim"]["reclaim_bytes"]
    assert together > sum(row["exclusive_bytes"] for row in rows.values())
    assert image.read_bytes() == contents


def test_cowdu_prints_tables_for_people_and_for_scripts(image: Path) -> None:
    """Promise: cowdu takes ranges; a pipe gets plain text, -p exact numbers, -H no titles."""
    text = run(image, "two%three").stdout
    lines = text.splitlines()
    assert lines[0].split() == ["NAME", "CREATED", "REFERENCED", "EXCLUSIVE", "WRITTEN"]
    assert [line.split()[0] for line in lines[1:3]] == ["two", "three"]
    assert lines[3].startswith("deleting these 2 snapshots would free ")
    assert "\x1b" not in text
    bare = [line.split("\t") for line in run(image, "-H", "-p").stdout.splitlines()]
    report = usage(image)
    rows = report["snapshots"]
    assert len(bare) == len(rows) + 1  # the live files too; retained generations only with -a
    assert len(run(image, "-H", "-a").stdout.splitlines()) == len(rows) + len(report["others"])
    assert bare[len(rows)][0] == "(live)"
    assert bare[: len(rows)] == [
        [
            row["name"],
            str(row["created_ns"] // 10**9),
            str(row["referenced_bytes"]),
            str(row["exclusive_bytes"]),
            str(row["written_bytes"]),
        ]
        for row in rows
    ]


def test_cowdu_of_an_image_without_snapshots_has_only_what_is_live(tmp_path: Path) -> None:
    """Promise: an image without snapshots is no error, and cowdu shows its live files."""
    image = make_image(tmp_path / "disk.img")
    report = usage(image)
    assert report["snapshots"] == []
    assert report["reclaim"] == {"names": [], "reclaim_bytes": 0}
    assert [row["kind"] for row in report["others"]][:1] == ["volume"]
    assert run(image, "-H").stdout.splitlines()[0].startswith("(live)\t")


def test_cowdu_refuses_in_one_line(tmp_path: Path, image: Path) -> None:
    """Promise: an error is one line, and the exit status tells its kind."""
    for words, status, says in (
        ([tmp_path / "no.img"], 10, "no.img"),
        ([tmp_path], 1, "no cowfs is mounted"),
        ([image, "nobody"], 1, "'nobody'"),
        ([image, "four%one"], 1, "newer"),
        ([image, "a%b%c"], 2, "range"),
        ([], 2, "TARGET"),
        ([image, "--frob"], 2, "--frob"),
    ):
        result = run(*words)
        assert result.returncode == status, result
        assert result.stdout == ""
        assert result.stderr.count("\n") == 1, result
        assert result.stderr.startswith("cowdu: ")
        assert says in result.stderr
