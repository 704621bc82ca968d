"""Promises of holds, and of deleting by rules, on an image that is not mounted."""

import time
from pathlib import Path

import pytest

from tests.cli.test_commands import ERROR, USAGE, assert_refused, fields, names, output, run
from tests.image_files import change, make_image, require_clean, snapshot, tree_bytes

NAMES = ["auto-1", "auto-2", "release", "auto-3"]


# --- holds ----------------------------------------------------------------------------------------


def test_held_snapshot_is_listed_and_not_deleted_until_released(image: Path) -> None:
    """Promise: deleting a set with a held snapshot deletes nothing and says how to release it."""
    assert output("snapshot", "hold", image, "release", "auto-1") == "held auto-1\nheld release\n"
    listed = [line.split("\t") for line in output("snapshot", "list", image, "-Hp").splitlines()]
    assert [row[4] for row in listed] == ["held", "-", "held", "-"]
    contents = image.read_bytes()
    for words in (["release", "auto-2"], ["-n", "auto-2", "release"], ["auto-2%release"]):
        result = run("snapshot", "delete", image, *words)
        assert_refused(result, ERROR, "snapshot 'release' is held; cowfs snapshot release it first")
    result = run("snapshot", "delete", image, "%")
    assert_refused(result, ERROR, "snapshots 'auto-1', 'release' are held")
    assert image.read_bytes() == contents

    assert output("snapshot", "release", image, "%release") == (
        "released auto-1\nreleased auto-2\nreleased release\n"
    )
    output("snapshot", "delete", image, "%")
    assert names(image) == []


def test_hold_and_release_answer_with_the_snapshots_as_they_are_then(image: Path) -> None:
    """Promise: --json reports the snapshots; patterns hold all that match, or none."""
    held = fields("snapshot", "hold", image, "auto-*")["snapshots"]
    assert [(found["name"], found["held"]) for found in held] == [
        ("auto-1", True),
        ("auto-2", True),
        ("auto-3", True),
    ]
    listed = fields("snapshot", "list", image)["snapshots"]
    assert [found for found in listed if found["held"]] == held
    assert fields("snapshot", "hold", image, "auto-1")["snapshots"] == held[:1]
    released = fields("snapshot", "release", image, "auto-1")["snapshots"]
    assert released == [{**held[0], "held": False}]
    assert_refused(run("snapshot", "hold", image, "x*"), ERROR, "no snapshot matches 'x*'")
    assert_refused(run("snapshot", "hold", image), USAGE, "NAME")


def test_undo_of_a_rollback_whose_state_is_held_is_refused(image: Path) -> None:
    """Promise: the refusal names the snapshot and the command that makes undo possible."""
    kept = fields("rollback", image, "auto-2")["kept"]
    assert kept["held"] is False
    output("snapshot", "hold", image, kept["name"])
    says = f"snapshot '{kept['name']}', which is held; cowfs snapshot release it first"
    assert_refused(run("undo", image), ERROR, says)
    output("snapshot", "release", image, kept["name"])
    assert "undone" in output("undo", image)


# --- rules ----------------------------------------------------------------------------------------


def test_delete_by_a_rule_frees_what_the_dry_run_told_and_says_why_others_stay(
    image: Path,
) -> None:
    """Promise C11: delete takes the named snapshots but those that rules keep and says why."""
    words = ["auto-*", "--keep-last", "1", "--keep", "auto-1"]
    before = tree_bytes(image)
    contents = image.read_bytes()
    told = fields("snapshot", "delete", "-n", image, *words)
    assert told["names"] == ["auto-2"]
    assert told["kept"] == {"auto-1": ["named"], "auto-3": ["last"]}
    lines = output("snapshot", "delete", "-n", image, *words).splitlines()
    assert lines[:3] == ["would destroy auto-2", "keep auto-1 (named)", "keep auto-3 (last)"]
    assert lines[3].startswith("would reclaim ")
    assert output("snapshot", "delete", "-np", image, *words) == (
        f"destroy\tauto-2\nreclaim\t{told['reclaim_bytes']}\n"
    )
    assert image.read_bytes() == contents
    assert output("snapshot", "delete", image, *words) == "destroyed auto-2\n"
    assert before - tree_bytes(image) == told["reclaim_bytes"]
    assert names(image) == ["auto-1", "release", "auto-3"]


def test_rules_without_a_name_are_for_all_and_keep_what_is_held(image: Path) -> None:
    """Promise: rules without names apply to every snapshot, and keep the held ones."""
    output("snapshot", "hold", image, "release")
    lines = output("snapshot", "delete", "-n", image, "--keep-daily", "1").splitlines()
    assert lines[:-1] == [
        "would destroy auto-1",
        "would destroy auto-2",
        "keep release (held)",
        "keep auto-3 (daily)",
    ]
    output("snapshot", "delete", image, "--older-than", "0s")
    assert names(image) == ["release"]


def test_ages_count_from_the_time_of_each_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: --older-than counts from now, --keep-within from the newest."""
    image = make_image(tmp_path / "disk.img")
    now_ns = time.time_ns()
    for days in (40, 20, 10):
        monkeypatch.setattr(time, "time_ns", lambda days=days: now_ns - days * 86_400 * 10**9)
        change(image, snapshot(f"{days}d"))
    monkeypatch.undo()

    def chosen(*words: str) -> list[str]:
        found: list[str] = fields("snapshot", "delete", "-n", image, *words)["names"]
        return found

    assert chosen("--older-than", "2w") == ["40d", "20d"]
    assert chosen("--older-than", "1m", "--keep-last", "3") == []
    assert chosen("--keep-within", "2w") == ["40d"]
    assert chosen("--keep-daily", "2") == ["40d"]
    require_clean(image)


def test_nothing_left_to_delete_is_no_error(image: Path) -> None:
    """Promise: a job that finds nothing to do ends with 0 and changes nothing."""
    contents = image.read_bytes()
    assert output("snapshot", "delete", image, "--keep-last", "4") == "nothing to delete\n"
    assert output("snapshot", "delete", "-p", image, "--keep-last", "4") == ""
    assert output("snapshot", "delete", "-np", image, "--keep-last", "4") == "reclaim\t0\n"
    shown = output("snapshot", "delete", "-n", image, "auto-1", "--keep-last", "4")
    assert shown == "nothing to delete\nkeep auto-1 (last)\n"
    answer = fields("snapshot", "delete", image, "auto-1", "--keep-last", "4")
    assert answer["names"] == []
    assert answer["kept"] == {"auto-1": ["last"]}
    assert image.read_bytes() == contents
    empty = make_image(image.parent / "empty.img")
    assert output("snapshot", "delete", empty, "--keep-last", "4") == "nothing to delete\n"


def test_rules_that_cannot_be_are_refused_and_change_nothing(image: Path) -> None:
    """Promise: delete without a name or rule, or with an invalid rule, changes nothing."""
    contents = image.read_bytes()
    for words, status, says in (
        ([], USAGE, "give a NAME, or a rule"),
        (["--keep-last", "0"], USAGE, "give a NAME, or a rule"),
        (["--keep-last", "-1"], USAGE, "--keep-last"),
        (["--keep-daily", "many"], USAGE, "--keep-daily"),
        (["--older-than", "30"], USAGE, "'30' is not a duration such as 12h, 30d"),
        (["%", "--keep-within", "days"], USAGE, "'days' is not a duration"),
        (["--keep", "auto-9"], ERROR, "there is no snapshot 'auto-9'"),
        (["x*", "--keep-last", "1"], ERROR, "no snapshot matches 'x*'"),
        (["auto-*%", "--keep-last", "1"], USAGE, "no patterns"),
    ):
        assert_refused(run("snapshot", "delete", image, *words), status, says)
    assert image.read_bytes() == contents
