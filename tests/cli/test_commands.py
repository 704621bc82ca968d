"""Promises of every command on an image that is not mounted: effect, output and exit status."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from click.testing import CliRunner, Result

import cowfs.cli.space as space_command
from cowfs.api import ImageConnection
from cowfs.cli.main import _COMMANDS, cli
from cowfs.errors import DeviceError
from cowfs.history.filesystem import Filesystem
from cowfs.history.images import make_filesystem, open_filesystem
from cowfs.history.reports import (
    DropReport,
    InfoReport,
    ReclaimReport,
    Setting,
    SpaceReport,
    info_report,
)
from cowfs.history.retention import DAY_NS
from cowfs.storage.device import FileDevice
from tests.commands import Completed, run_command
from tests.image_files import change, dated, history, make_image, require_clean, tree_bytes, write
from tests.model.devices import MemoryDevice
from tests.sizes import HANG_SECONDS

ERROR, USAGE, IMAGE_MISSING, LOCKED = 1, 2, 10, 11
NAMES = ["one", "two", "three", "four"]


def run(*words: str | os.PathLike[str]) -> Completed:
    """Run a command in a process of its own; none of these is a mount that stays."""
    return run_command(*words, program=False)


def invoke(*words: str | os.PathLike[str]) -> Result:
    """Run a command in this process; a CowfsError comes out unchanged."""
    return CliRunner().invoke(cli, [*map(os.fspath, words)], standalone_mode=False)


def output(*words: str | os.PathLike[str]) -> str:
    """The standard output of a command, which must succeed."""
    result = invoke(*words)
    if result.exception is not None:
        raise result.exception
    assert not result.return_value
    return result.stdout


def fields(*words: str | os.PathLike[str]) -> dict[str, Any]:
    """The answer of a command with --json, after checking its envelope."""
    answer = cast(dict[str, Any], json.loads(output(*words, "--json")))
    version = answer.pop("output_version")
    command = " ".join(os.fspath(word) for word in words)
    assert command.startswith(version.pop("command").removeprefix("cowfs "))
    assert version == {"vers_major": 0, "vers_minor": 1}
    return answer


def assert_refused(result: Completed, status: int, *says: str) -> None:
    """Fail unless the command ended with that status and one line on stderr with these words."""
    story = f"{result.args}: {result.returncode}\n{result.stdout}\n{result.stderr}"
    assert result.returncode == status, story
    assert result.stdout == "", story
    assert result.stderr.count("\n") == 1, story
    line = result.stderr.removesuffix("\n")
    assert line.startswith("cowfs: "), story
    assert line.isprintable(), story
    for words in says:
        assert words in line, story


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Path]:
    """An image without files; clean afterwards."""
    image = make_image(tmp_path / "disk.img")
    yield image
    require_clean(image)


def names(image: Path) -> list[str]:
    return [found["name"] for found in fields("snapshot", "list", image)["snapshots"]]


# --- mkfs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "size_bytes"),
    [
        (["--size", "16M"], 16 << 20),
        (["--size", "32MiB"], 32 << 20),
        (["--size", "1G"], 1 << 30),
        (["--size", " 0.5 gib "], 1 << 29),
        (["--size", "20000000"], 20_000_000 // 4096 * 4096),
        ([], 4 << 30),
    ],
    ids=str,
)
def test_mkfs_makes_a_clean_image_of_that_size(
    tmp_path: Path, words: list[str], size_bytes: int
) -> None:
    """Promise: mkfs takes sizes as people write them; the image is sparse, private and clean."""
    path = tmp_path / "disk.img"
    made = fields("mkfs", path, *words, "--label", "für Bilder")
    assert made["total_bytes"] == size_bytes
    assert path.stat().st_size == size_bytes
    assert path.stat().st_mode & 0o077 == 0
    info = fields("info", path)
    assert path.stat().st_blocks * 512 - info["log_bytes"] < 4 << 20
    assert (info["label"], info["uuid"]) == ("für Bilder", made["uuid"])
    assert info["clean"] is True
    assert info["duplicated_metadata"] is True
    require_clean(path)


def test_mkfs_options_do_what_they_say(tmp_path: Path) -> None:
    """Promise: one option keeps one copy of metadata, another allocates all space on the host."""
    path = tmp_path / "disk.img"
    output("mkfs", path, "--size", "16M", "--no-duplicate-metadata", "--preallocate")
    assert fields("info", path)["duplicated_metadata"] is False
    assert path.stat().st_blocks * 512 >= 15 << 20
    require_clean(path)


@pytest.mark.parametrize(
    ("size", "says"),
    [
        ("1", "at least 16 MiB"),
        ("15.9M", "at least 16 MiB"),
        ("0", "at least 16 MiB"),
        ("", "is not a size"),
        ("many", "is not a size"),
        ("-1G", "is not a size"),
        ("1e9", "is not a size"),
        ("9" * 5000, "is not a size"),
        ("8192P", "at most 4 PiB"),
    ],
)
def test_mkfs_impossible_size_is_refused(tmp_path: Path, size: str, says: str) -> None:
    """Promise: no file is made, and the message names the limit."""
    assert_refused(run("mkfs", tmp_path / "disk.img", f"--size={size}"), USAGE, says)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("label", ["x" * 65, "ü" * 33, "line\nline", "\x1b[1m"])
def test_mkfs_impossible_label_is_refused(tmp_path: Path, label: str) -> None:
    """Promise: a label that is too long or not printable is refused."""
    assert_refused(run("mkfs", tmp_path / "disk.img", "--label", label), USAGE, "label")
    assert list(tmp_path.iterdir()) == []


def test_mkfs_refuses_what_holds_data_unless_forced(image: Path, tmp_path: Path) -> None:
    """Promise: mkfs overwrites neither an image nor any other data without --force."""
    uuid = fields("info", image)["uuid"]
    assert_refused(run("mkfs", image), ERROR, "holds a cowfs image", "--force")
    with open(image, "r+b") as file:  # the first ring is gone; the second still shows an image
        first_ring = file.read(64 * 4096)
        file.seek(0)
        file.write(bytes(64 * 4096))
    assert_refused(run("mkfs", image), ERROR, "holds a cowfs image")
    with open(image, "r+b") as file:
        file.write(first_ring)
    assert fields("info", image)["uuid"] == uuid

    data = tmp_path / "data"
    data.write_bytes(bytes(500_000) + b"x" + bytes(20_000_000))
    assert_refused(run("mkfs", data), ERROR, "holds data", "--force")
    blank = tmp_path / "blank"
    blank.write_bytes(bytes(20 << 20))
    assert_refused(run("mkfs", blank, "--size", "16M"), ERROR, "larger than --size")

    size_bytes = image.stat().st_size
    output("mkfs", image, "--force")
    assert fields("info", image)["uuid"] != uuid
    assert image.stat().st_size == size_bytes
    output("mkfs", data, "--force", "--size", "32M")
    output("mkfs", blank)
    for path in (data, blank):
        require_clean(path)
    assert blank.stat().st_size == 20 << 20


def test_mkfs_refuses_places_where_no_image_can_be(tmp_path: Path) -> None:
    """Promise: a place where no image can be made is refused, and the message says why."""
    assert_refused(run("mkfs", tmp_path), ERROR, "is a directory")
    assert_refused(run("mkfs", tmp_path / "no" / "x.img"), ERROR, "No such file or directory")
    assert_refused(run("mkfs", "/dev/null"), ERROR, "not a regular file")
    assert_refused(run("mkfs"), USAGE, "IMG")


def test_locked_image_is_refused_by_every_command_that_writes(image: Path) -> None:
    """Promise: the command exits with 11, and the message names the process that has the image."""
    device = FileDevice(image, writable=True)
    try:
        for words in (
            ["mkfs", image, "--force"],
            ["snapshot", "create", image, "new"],
            ["snapshot", "delete", image, "one"],
            ["snapshot", "rename", image, "one", "1"],
            ["snapshot", "hold", image, "one"],
            ["snapshot", "release", image, "one"],
            ["rollback", image, "one"],
        ):
            assert_refused(run(*words), LOCKED, f"process {os.getpid()}")
    finally:
        device.close()


def test_mkfs_warns_of_a_host_without_room(tmp_path: Path) -> None:
    """Promise: a sparse image larger than the host's free space is made, with a warning."""
    result = run("mkfs", tmp_path / "disk.img", "--size", "8T")
    if result.returncode == 0:  # a host that has files of that size
        assert "warning: the host has" in result.stderr
        (tmp_path / "disk.img").unlink()
    else:
        assert_refused(result, ERROR, "File too large")


# --- snapshots ------------------------------------------------------------------------------------


def test_snapshots_are_created_listed_renamed_and_deleted(empty: Path) -> None:
    """Promise: create, list, rename and delete work, and each change is durable on return."""
    made = fields("snapshot", "create", empty, "first", "-m", "the first")["snapshot"]
    assert (made["name"], made["description"], made["parent"]) == ("first", "the first", None)
    assert made["automatic"] is made["held"] is False
    assert output("snapshot", "create", empty, "second") == "created snapshot second\n"
    listed = fields("snapshot", "list", empty)["snapshots"]
    assert listed[0] == made
    assert [found["name"] for found in listed] == ["first", "second"]
    assert listed[1]["parent"] == "first"
    assert set(made) == {
        "name",
        "id",
        "uuid",
        "created_ns",
        "generation",
        "referenced_bytes",
        "referenced_is_exact",
        "description",
        "automatic",
        "held",
        "parent",
    }
    assert fields("snapshot", "rename", empty, "first", "1st")["snapshot"]["name"] == "1st"
    assert names(empty) == ["1st", "second"]
    deleted = fields("snapshot", "delete", empty, "1st", "--wait")
    assert deleted == {"names": ["1st"], "dry_run": False, "reclaim_bytes": None, "kept": {}}
    assert names(empty) == ["second"]


def test_snapshot_list_is_plain_for_people_and_exact_for_scripts(image: Path) -> None:
    """Promise: the list is aligned and without colour codes; -H -p gives tabs and exact numbers."""
    table = output("snapshot", "list", image)
    assert "\x1b" not in table
    assert table.splitlines()[0].split() == [
        "NAME",
        "CREATED",
        "REFERENCED",
        "PARENT",
        "HELD",
        "DESCRIPTION",
    ]
    assert "KiB" in table
    lines = [line.split("\t") for line in output("snapshot", "list", image, "-Hp").splitlines()]
    snapshots = fields("snapshot", "list", image)["snapshots"]
    assert lines == [
        [
            found["name"],
            str(found["created_ns"] // 10**9),
            str(found["referenced_bytes"]),
            found["parent"] or "-",
            "-",
            found["description"],
        ]
        for found in snapshots
    ]


def test_description_cannot_command_the_terminal(empty: Path) -> None:
    """Promise: whatever a description holds, the list has one line for each snapshot."""
    output("snapshot", "create", empty, "x", "-m", "two\nlines\t\x1b[31m")
    for words in ([], ["-H"]):
        text = output("snapshot", "list", empty, *words)
        assert "two\\nlines\\t\\x1b[31m" in text
        assert "\x1b" not in text
    description = fields("snapshot", "list", empty)["snapshots"][0]["description"]
    assert description == "two\nlines\t\x1b[31m"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["two"], ["two"]),
        (["two%three"], ["two", "three"]),
        (["%two"], ["one", "two"]),
        (["four,one", "three%"], ["one", "three", "four"]),
        (["%"], NAMES),
    ],
    ids=str,
)
def test_delete_frees_to_the_byte_what_the_dry_run_told(
    image: Path, words: list[str], expected: list[str]
) -> None:
    """Promise C11: a dry run tells exactly what deleting any set frees, and changes nothing."""
    before = tree_bytes(image)
    contents = image.read_bytes()
    told = fields("snapshot", "delete", "-n", image, *words)
    assert told["names"] == expected
    assert told["dry_run"] is True
    assert told["reclaim_bytes"] > 0
    assert output("snapshot", "delete", "-np", image, *words) == "".join(
        [f"destroy\t{name}\n" for name in expected] + [f"reclaim\t{told['reclaim_bytes']}\n"]
    )
    text = output("snapshot", "delete", "-n", image, *words)
    assert text.startswith(f"would destroy {expected[0]}\n")
    assert "\nwould reclaim " in text
    assert image.read_bytes() == contents

    assert output("snapshot", "delete", image, *words).splitlines() == [
        f"destroyed {name}" for name in expected
    ]
    assert before - tree_bytes(image) == told["reclaim_bytes"]
    assert names(image) == [name for name in NAMES if name not in expected]
    assert fields("df", image)["drops"] == []


def test_rules_keep_and_name_what_a_wrong_clock_dated(image: Path) -> None:
    """Promise: rules keep a snapshot of 2042 beside all others and say so; its name deletes it."""
    quarter_ns = 90 * DAY_NS
    now_ns = time.time_ns()
    change(
        image,
        *[dated(name, now_ns - quarter_ns + at) for at, name in enumerate(NAMES)],
        dated("two", now_ns + 16 * 365 * DAY_NS),
    )
    kept = fields("snapshot", "delete", "-n", image, "--keep-within", "30d")["kept"]
    assert list(kept) == NAMES
    assert kept["two"] == ["dated in the future"]
    result = run("snapshot", "delete", image, "--keep-daily", "1")
    assert result.stdout == "destroyed one\ndestroyed three\n"
    words = "kept in spite of the rules, because dated in the future: 'two'"
    assert result.stderr == f"cowfs: {words}\n"
    assert output("snapshot", "delete", image, "two") == "destroyed two\n"
    assert names(image) == ["four"]


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "n" * 256, "new\nline", "\x1b[31m", "a%b", "a,b"], ids=ascii
)
def test_bad_snapshot_name_is_refused(empty: Path, name: str) -> None:
    """Promise: create and rename refuse a bad name as a usage error in one printable line."""
    output("snapshot", "create", empty, "good")
    contents = empty.read_bytes()
    assert_refused(run("snapshot", "create", empty, name), USAGE)
    assert_refused(run("snapshot", "rename", empty, "good", name), USAGE)
    assert empty.read_bytes() == contents


def test_unknown_and_taken_names_are_refused_and_change_nothing(image: Path) -> None:
    """Promise: a command with one unknown or taken name changes nothing."""
    contents = image.read_bytes()
    for words in (
        ["snapshot", "delete", image, "nobody"],
        ["snapshot", "delete", "-n", image, "nobody"],
        ["snapshot", "delete", image, "one", "nobody"],
        ["snapshot", "delete", image, "one%nobody"],
        ["snapshot", "rename", image, "nobody", "x"],
        ["snapshot", "hold", image, "one", "nobody"],
        ["snapshot", "release", image, "nobody"],
        ["rollback", image, "nobody"],
        ["rollback", "-n", image, "nobody"],
    ):
        assert_refused(run(*words), ERROR, "'nobody'", "cowfs snapshot list")
    assert_refused(run("snapshot", "create", image, "one"), ERROR, "'one'")
    assert_refused(run("snapshot", "rename", image, "one", "two"), ERROR, "'two'")
    assert_refused(run("snapshot", "delete", image, "three%one"), ERROR, "newer")
    assert_refused(run("snapshot", "delete", image, ""), USAGE)
    assert_refused(run("snapshot", "delete", image, "a%b%c"), USAGE)
    assert_refused(run("rollback", "-n", image, "one%two"), USAGE)
    assert_refused(run("snapshot", "delete", image), USAGE, "NAME")
    assert_refused(run("snapshot", "create", image, "x", "-m", "y" * 1025), USAGE, "description")
    assert_refused(run("undo", image), ERROR, "no rollback")
    assert image.read_bytes() == contents


# --- rollback and undo ----------------------------------------------------------------------------


def test_rollback_and_undo_lose_nothing(image: Path) -> None:
    """Promise: each rollback keeps the state before and every snapshot; undo brings it back."""
    before = fields("info", image)
    text = output("rollback", image, "two", "-n")
    assert text.startswith("would roll back to two of ")
    assert fields("info", image) == before

    done = fields("rollback", image, "two")
    assert (done["name"], done["dry_run"]) == ("two", False)
    kept = done["kept"]
    assert kept["automatic"] is True
    assert names(image) == [*NAMES, kept["name"]]
    assert fields("info", image)["live_root_id"] != before["live_root_id"]
    require_clean(image)

    undone = fields("undo", image)
    assert undone["kept"]["automatic"] is True
    assert names(image) == [*NAMES, undone["kept"]["name"]]
    assert fields("info", image)["inode_count"] == before["inode_count"]
    require_clean(image)
    assert "undone" in output("undo", image, "--force")
    assert "kept as before-rollback" in output("rollback", image, "one", "--force")


# --- space, info, sync, check ---------------------------------------------------------------------


def test_df_adds_up_and_prints_all_it_knows(image: Path) -> None:
    """Promise: the parts sum to the whole, and the columns are those of the JSON."""
    space = fields("df", image)
    assert set(space) == {
        "total_bytes",
        "used_bytes",
        "tree_bytes",
        "catalog_bytes",
        "system_bytes",
        "pending_bytes",
        "free_bytes",
        "promised_bytes",
        "largest_snapshots",
        "reserved_bytes",
        "available_bytes",
        "drops",
    }
    assert space["tree_bytes"] + space["catalog_bytes"] == space["used_bytes"]
    parts = ("used_bytes", "system_bytes", "pending_bytes", "free_bytes")
    assert sum(space[part] for part in parts) == space["total_bytes"] == 64 << 20
    numbers = output("df", image, "-H", "-p").rstrip("\n").split("\t")
    plain = [value for value in space.values() if isinstance(value, int)]
    assert [int(number) for number in numbers] == plain
    header, row = output("df", image).splitlines()
    assert header.split()[0] == "TOTAL"
    assert row.startswith("64.0 MiB")


def test_info_tells_what_the_image_is(image: Path) -> None:
    """Promise: info gives integers with units in their names, and null where there is no mount."""
    info = fields("info", image)
    assert info["image"] == str(image)
    assert (info["block_size_bytes"], info["node_size_bytes"]) == (4096, 16384)
    assert (info["total_bytes"], info["snapshot_count"]) == (64 << 20, 4)
    assert info["mount_point"] is info["daemon_pid"] is info["daemon_settings"] is None
    assert info["clean"] is True
    text = output("info", image)
    assert str(image) in text
    assert info["uuid"] in text


def test_sync_of_an_image_without_a_daemon_has_nothing_to_do(image: Path) -> None:
    """Promise: sync succeeds silently, and gives the generation with --json."""
    assert output("sync", image) == ""
    assert fields("sync", image) == {"generation": fields("info", image)["generation"]}


def test_check_finds_a_clean_image_clean_and_a_damaged_one_not(tmp_path: Path) -> None:
    """Promise: check ends with 0 if clean, else with 1 and findings that say what and where."""
    image = make_image(tmp_path / "disk.img")
    change(image, *history())
    report = fields("check", image)
    assert (report["clean"], report["findings"], report["findings_left_off"]) == (True, [], 0)
    assert report["verified_blocks"] == report["data_blocks"] > 0
    assert fields("check", image, "--no-data")["verified_blocks"] == 0
    assert output("check", image).startswith(f"{image} is clean: generation ")

    # One bit of a block of file data: nothing else becomes wrong.
    marked = os.urandom(4096)
    change(image, _write_known("known", marked))
    damaged = bytearray(image.read_bytes())
    at = damaged.find(marked)
    assert at > 0
    damaged[at] ^= 1
    image.write_bytes(damaged)
    result = run("check", image)
    assert result.returncode == ERROR
    assert "NOT CLEAN" in result.stdout
    assert "/known" in result.stdout
    result = run("check", image, "--json")
    assert result.returncode == ERROR
    found = json.loads(result.stdout)
    assert found["clean"] is False
    assert {finding["invariant"] for finding in found["findings"]} == {"C9"}
    assert run("check", image, "--no-data").returncode == 0


def _write_known(name: str, data: bytes) -> Any:
    def step(filesystem: Any) -> None:
        write(name, 1)(filesystem)
        inode = filesystem.live.find(1, name.encode())
        filesystem.live.write(inode.ino, 0, data)

    return step


# --- what every command has in common -------------------------------------------------------------

ON_A_TARGET: dict[str, list[str]] = {
    "df": [],
    "info": [],
    "sync": [],
    "trim": [],
    "check": [],
    "snapshot list": [],
    "snapshot create": ["x"],
    "snapshot delete": ["x"],
    "snapshot rename": ["x", "y"],
    "snapshot hold": ["x"],
    "snapshot release": ["x"],
    "rollback": ["x"],
    "undo": [],
}


@pytest.mark.parametrize("command", ON_A_TARGET)
def test_wrong_target_is_refused_with_its_status(tmp_path: Path, command: str) -> None:
    """Promise: a missing target ends with 10, one that is no image with 1, all in one line."""
    words, more = command.split(), ON_A_TARGET[command]
    assert_refused(run(*words, tmp_path / "no.img", *more), IMAGE_MISSING, str(tmp_path / "no.img"))
    assert_refused(run(*words, tmp_path, *more), ERROR, "no cowfs is mounted")
    for contents in (b"", b"text\n" * 10_000, bytes(17 << 20)):
        (tmp_path / "file").write_bytes(contents)
        assert_refused(run(*words, tmp_path / "file", *more), ERROR, str(tmp_path / "file"))
        assert (tmp_path / "file").read_bytes() == contents
    assert_refused(run(*words), USAGE, "--help")
    assert_refused(run(*words, tmp_path, *more, "--frob"), USAGE, "--frob")


def test_mount_refuses_what_it_cannot_mount(image: Path, tmp_path: Path) -> None:
    """Promise: mount checks options and image before it starts anything."""
    place = tmp_path / "place"
    place.mkdir()
    for option, word in (
        ("frob", "frob"),
        ("commit=0", "commit=0"),
        ("commit=nan", "commit=nan"),
        ("cache=1K", "cache=1K"),
        ("snapshots=blue", "blue"),
        ("generation=x", "generation=x"),
        ("generation=3,rw", "contradict"),
        ("commit", "needs a value"),
        ("log=", "log"),
    ):
        assert_refused(run("mount", image, place, "-o", option), USAGE, word)
    missing = tmp_path / "no.img"
    assert_refused(run("mount", missing, place), IMAGE_MISSING, str(missing))
    assert_refused(run("mount", tmp_path, place), ERROR, "is a directory")
    assert_refused(run("mount", image), USAGE, "DIR")
    assert_refused(run("umount", place), ERROR, str(place), "not a cowfs mount point")
    assert_refused(run("umount", tmp_path / "no"), ERROR, "not a cowfs mount point")


def test_control_characters_in_paths_reach_no_terminal(tmp_path: Path) -> None:
    """Promise: an error stays one printable line, whatever the user typed."""
    for name in ("new\nline", "\x1b[31m", os.fsdecode(b"\xff\xfe")):
        assert_refused(run("info", tmp_path / name), IMAGE_MISSING)
    path = make_image(tmp_path / os.fsdecode(b"\xff.img"))
    result = run("info", path, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["image"].endswith("\\xff.img")


def test_debug_shows_where_an_error_came_from(tmp_path: Path) -> None:
    """Promise: --debug prints the traceback of an error, and nothing else does."""
    assert "Traceback" in run("--debug", "info", tmp_path / "no").stderr
    assert_refused(run("info", tmp_path / "no"), IMAGE_MISSING)


def test_closed_pipe_is_no_error_to_talk_about(image: Path) -> None:
    """Promise: `cowfs ... | head -0` prints no complaint."""
    program = "from cowfs.cli.main import main; main()"
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [sys.executable, "-c", program, "snapshot", "list", str(image)],
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)
    assert result.stderr == b""
    assert result.returncode == ERROR


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell: str) -> None:
    """Promise: `completion` prints a script for each of the three shells."""
    assert "_COWFS_COMPLETE" in output("completion", shell)


def test_completion_knows_commands_and_snapshot_names(image: Path) -> None:
    """Promise: completion offers the words that the command would accept."""
    program = "from cowfs.cli.main import main; main()"

    def complete(line: str) -> list[str]:
        words = line.split(" ")
        environment = {
            **os.environ,
            "_COWFS_COMPLETE": "bash_complete",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(words) - 1),
        }
        result = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return [word.partition(",")[2] for word in result.stdout.split()]

    assert complete("cowfs sn") == ["snapshot"]
    assert complete(f"cowfs rollback {image} t") == ["two", "three"]
    assert complete("cowfs rollback /nowhere t") == []


def test_every_command_teaches() -> None:
    """Promise: --help of each command has an example, and needs no image or mount."""
    commands = [
        *_COMMANDS,
        *(f"snapshot {verb}" for verb in ["create", "list", "delete", "rename"]),
        *(f"scrub {verb}" for verb in ["start", "status", "cancel", "resume"]),
    ]
    for command in commands:
        if command not in ("snapshot", "scrub"):
            assert f"cowfs {command} " in output(*command.split(), "--help"), command
        assert output(*command.split(), "--help").startswith("Usage: ")
    listed = output("--help")
    for command, (_, words) in _COMMANDS.items():
        assert command in listed
        assert words in listed


def test_short_commands_import_no_numpy_and_no_trio(tmp_path: Path) -> None:
    """Promise: commands that only print or ask a daemon start without the large libraries."""
    program = (
        "import sys, runpy\n"
        "import cowfs.cli.snapshots, cowfs.cli.space, cowfs.cli.rollback, cowfs.cli.mounting\n"
        "import cowfs.cli.images, cowfs.cli.main, cowfs.cli.target, cowfs.daemon.client\n"
        "print([name for name in ('numpy', 'trio', 'rich', 'pyfuse3') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"


def test_helper_of_mount_has_the_status_of_mount(tmp_path: Path, image: Path) -> None:
    """Promise: the helpers of mount(8) exit with the statuses that mount(8) defines."""
    program = "from cowfs.cli.mount_helper import main; main()"
    place = tmp_path / "place"
    place.mkdir()

    def helper(*words: str | Path) -> Completed:
        return subprocess.run(
            [sys.executable, "-c", program, *map(str, words)],
            env={"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=False,
        )

    usual = "rw,noauto,user,nofail,_netdev,x-systemd.automount,noatime,nosuid,nodev"
    rehearsed = helper(image, place, "-f", "-v", "-o", usual)
    assert (rehearsed.returncode, rehearsed.stderr) == (0, "")
    assert str(image) in rehearsed.stdout
    for words, status in (
        ([image], 1),
        ([image, place, "-o", "frob"], 1),
        ([image, place, "-z"], 1),
        ([image, place, "-sf", "-o", "frob"], 0),
        ([tmp_path / "no.img", place], 32),
        ([image, tmp_path / "nowhere"], 32),
    ):
        result = helper(*words)
        assert result.returncode == status, (words, result)
        assert result.stderr.count("\n") == (1 if status else 0), result
        assert "Traceback" not in result.stderr


# --- terminals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("terminal", [False, True])
def test_list_ends_on_no_terminal_of_few_characters(
    empty: Path, encoding: str, *, terminal: bool
) -> None:
    """Promise: every row is printed in any encoding; characters that it lacks are escaped."""
    for name in ("käse", "日本", "last"):
        invoke("snapshot", "create", empty, name, "-m", "α and ω")
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "TERM": "xterm", "COLUMNS": "200"}
    for module, words in (
        ("cowfs.cli.main", ["snapshot", "list", os.fspath(empty)]),
        ("cowfs.cli.main", ["snapshot", "hold", os.fspath(empty), "*"]),
        ("tools.cowdu.main", [os.fspath(empty)]),
        ("tools.cowdump.main", [os.fspath(empty), "catalog"]),
    ):
        program = f"from {module} import main; main()"
        command = [sys.executable, "-c", program, *words]
        if terminal:
            status, shown = _on_terminal(command, environment)
        else:
            done = subprocess.run(command, env=environment, capture_output=True, check=False)
            status, shown = done.returncode, done.stdout + done.stderr
        text = shown.decode("latin-1" if encoding == "latin-1" else "utf-8")
        assert status == 0, text
        assert "last" in text, text
        assert "日本" in text or r"\u65e5\u672c" in text, text
        assert "käse" in text or r"k\xe4se" in text, text


def _on_terminal(command: list[str], environment: dict[str, str]) -> tuple[int, bytes]:
    """Run a command with a terminal as its output; return its status and all that it printed."""
    leader, follower = os.openpty()
    child = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=follower, stderr=follower
    )
    os.close(follower)
    said = b""
    try:
        while part := os.read(leader, 65536):
            said += part
    except OSError:
        pass  # the other end of the terminal was closed
    finally:
        os.close(leader)
    return child.wait(HANG_SECONDS), said


@pytest.mark.parametrize("fault", [KeyboardInterrupt, ZeroDivisionError])
def test_edit_that_is_interrupted_in_the_middle_commits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: type[BaseException]
) -> None:
    """Promise: ^C in a command that edits an image leaves its last commit, not half of a change."""
    image = make_image(tmp_path / "disk.img")
    change(image, *history(NAMES))
    contents = image.read_bytes()

    def half(filesystem: Filesystem, action: object) -> object:
        write("half", 50_000)(filesystem)
        raise fault

    target = ImageConnection(str(image))
    with monkeypatch.context() as patch:
        patch.setattr(Filesystem, "apply", half)
        with pytest.raises(fault):
            target.create_snapshot("never")
    assert image.read_bytes() == contents
    target.create_snapshot("the lock is free")
    require_clean(image)


def test_trim_of_an_image_gives_back_what_is_free_and_keeps_the_rest(image: Path) -> None:
    """Promise: trim frees space on the host and keeps all files, snapshots and retained commits."""
    with open(image, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, image.stat().st_size)
    before = tree_bytes(image)
    answer = fields("trim", image)
    space = fields("df", image)
    assert answer["host_bytes"] == image.stat().st_blocks * 512
    assert answer["host_bytes"] <= space["total_bytes"] - answer["trimmed_bytes"] + (64 << 10)
    kept_bytes = space["free_bytes"] - answer["trimmed_bytes"] - answer["pending_bytes"]
    assert 0 <= kept_bytes < 1 << 20  # the space maps of the two commits before
    assert tree_bytes(image) == before
    require_clean(image)


def _space_with(drops: tuple[DropReport, ...]) -> SpaceReport:
    sizes = {name: 1 << 20 for name in SpaceReport.__struct_fields__ if name.endswith("_bytes")}
    return SpaceReport(**sizes, drops=drops)


class _ManySnapshots:
    """A nearly full filesystem with thousands of snapshots, and thousands more being deleted."""

    def __init__(self, space: SpaceReport) -> None:
        self.space = lambda: space


def test_df_with_thousands_of_snapshots_stays_a_page(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Promise: df prints few short lines for any number of snapshots, with all stuck drops."""
    drops = tuple(
        DropReport(name=f"gone {n}", freed_bytes=1, referenced_bytes=1 << 20, stuck=n >= 4998)
        for n in range(5000)
    )
    names = tuple(f"snapshot-{n}" for n in range(64))
    reports = [
        ReclaimReport(names=("snapshot-7",), reclaim_bytes=1 << 20),
        ReclaimReport(names=names, reclaim_bytes=1 << 30),
    ]
    target = _ManySnapshots(_space_with(drops))
    monkeypatch.setattr(space_command, "connect", lambda _: contextlib.nullcontext(target))
    monkeypatch.setattr(space_command, "_largest", lambda *_: reports)
    lines = output("df", "anything").splitlines()
    assert len(lines) < 10
    assert max(map(len, lines)) < 130
    assert lines[2].startswith("deleted snapshot gone 4998 cannot be freed")
    assert lines[3].startswith("deleted snapshot gone 4999 cannot be freed")
    assert lines[5].startswith("4997 more deleted snapshots are being freed: 4.9 KiB of at")
    assert "nearly full: deleting snapshot-7 frees 1.0 MiB" in lines
    assert "nearly full: deleting the 64 oldest (%snapshot-63) frees 1.0 GiB" in lines


def test_info_of_a_mount_tells_when_and_why_it_ended_writing() -> None:
    """Promise: info of a read-only mount shows when and why the daemon stopped writing."""
    filesystem = open_filesystem(_made_device(), writable=True)
    assert info_report(filesystem).failure is None
    before_ns = time.time_ns()
    filesystem.store.fail(DeviceError("cannot write disk.img at 4096: No space left on device"))
    report = info_report(filesystem, mount_point="/data", daemon_pid=1)
    assert report.failed_ns is not None
    assert before_ns <= report.failed_ns <= time.time_ns()
    line = dict(space_command._facts(report))["writing"]
    assert line.startswith("ended at 2")
    assert "No space left on device" in line
    assert dict(space_command._facts(_read_only(report)))["writing"].startswith("no")


def _made_device() -> MemoryDevice:
    device = MemoryDevice(4096)
    make_filesystem(device)
    return device


def _read_only(report: InfoReport) -> InfoReport:
    settings: dict[str, Setting] = {"read_only": True}
    return msgspec.structs.replace(report, failure=None, failed_ns=None, daemon_settings=settings)
