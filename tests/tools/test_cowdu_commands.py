"""Promises of cowdu's commands beside the list: their answers are right and change nothing."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cowfs.accounting.virtual_drop import simulate_deletion
from cowfs.files.items import ROOT_INO
from cowfs.history.edits import DeleteSnapshots, HoldSnapshots
from cowfs.history.filesystem import Filesystem
from cowfs.history.images import open_filesystem
from cowfs.storage.device import FileDevice
from cowfs.storage.format import BLOCK_SIZE_BYTES
from tests.image_files import (
    change,
    dated,
    history,
    make_image,
    remove,
    require_clean,
    snapshot,
    tree_bytes,
    write,
)
from tests.sizes import HANG_SECONDS
from tests.tools.running import cowdu as run
from tests.tools.running import cowdu_answer as answer

NAMES = ["one", "two", "three", "four", "five"]


def freed_bytes(image: Path, names: list[str]) -> int:
    """The bytes that deleting these snapshots really frees."""
    before = tree_bytes(image)

    def delete(filesystem: Filesystem) -> None:
        filesystem.apply(DeleteSnapshots(names))
        filesystem.work_drops()

    change(image, delete)
    return before - tree_bytes(image)


def counted_bytes(image: Path, names: list[str]) -> int:
    """The bytes that deleting these snapshots frees, by virtual drop."""
    filesystem = open_filesystem(FileDevice(image, writable=False), writable=False)
    try:
        records = [filesystem.catalog.snapshot(name) for name in names]
        return simulate_deletion(filesystem, records).blocks * BLOCK_SIZE_BYTES
    finally:
        filesystem.close()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory of its own for each test."""
    place = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(place))
    return place / "cowfs"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = make_image(tmp_path_factory.mktemp("original") / "disk.img")
    change(path, *history(NAMES))
    require_clean(path)
    return path.read_bytes()


# --- list -----------------------------------------------------------------------------------------


def test_list_tells_the_same_with_and_without_what_an_earlier_look_left(
    image: Path, cache: Path
) -> None:
    """Promise C11: numbers are the same by virtual drop, by owner sets and from the cache."""
    alone = {name: answer(image, name)["snapshots"][0] for name in NAMES}
    assert not list(cache.glob("*")), "one snapshot needs no pass over everything"
    first = answer(image, "-o", "cumulative")
    assert len(list(cache.glob("*"))) == 1
    again = answer(image)
    assert first == again
    for row in again["snapshots"]:
        measured = alone[row["name"]]
        for column in ("referenced_bytes", "exclusive_bytes", "shared_bytes", "written_bytes"):
            assert row[column] == measured[column], (row["name"], column)
    ages = [row["name"] for row in again["snapshots"]]
    for number, row in enumerate(again["snapshots"]):
        assert row["cumulative_bytes"] == counted_bytes(image, ages[: number + 1])
    # With the sets in the cache, a single snapshot is answered from them as well.
    assert answer(image, "two")["snapshots"][0] == again["snapshots"][1]


def test_list_after_a_change_is_not_what_the_cache_remembers(image: Path) -> None:
    """Promise: a cache of another generation is not used."""
    before = answer(image)
    change(image, write("late", 400_000), snapshot("six"), remove("late"))
    after = answer(image)
    assert [row["name"] for row in after["snapshots"]] == [*NAMES, "six"]
    assert after["generation"] > before["generation"]
    last = after["snapshots"][-1]
    assert last["exclusive_bytes"] == counted_bytes(image, ["six"]) > 400_000
    assert last["cumulative_bytes"] == counted_bytes(image, [*NAMES, "six"])


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "text", "other"])
def test_list_with_a_damaged_cache_is_right_all_the_same(
    image: Path, cache: Path, how: str
) -> None:
    """Promise: a damaged cache changes no number and is replaced."""
    expected = answer(image)
    (kept,) = cache.glob("*")
    data = bytearray(kept.read_bytes())
    if how == "flipped":
        data[len(data) // 2] ^= 1
    contents = {
        "cut": bytes(data[: len(data) // 2]),
        "flipped": bytes(data),
        "empty": b"",
        "text": b"cache",
        "other": os.urandom(1000),
    }
    kept.write_bytes(contents[how])
    assert answer(image) == expected
    assert kept.stat().st_size == len(data), "a good one has taken its place"


def test_list_works_where_no_cache_can_be_written(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: the list works without a cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert answer(image)["snapshots"][0]["name"] == "one"


def test_list_adds_up_to_all_that_is_allocated(image: Path) -> None:
    """Promise: what live files and snapshots hold adds up to all that is allocated."""
    report = answer(image)
    totals = report["totals"]
    assert totals["allocated_bytes"] == tree_bytes(image)
    assert totals["snapshots_bytes"] == counted_bytes(image, NAMES)
    live = report["others"][0]
    assert live["kind"] == "volume"
    assert live["referenced_bytes"] + totals["snapshots_bytes"] == totals["allocated_bytes"]
    for row in [*report["snapshots"], live]:
        assert row["shared_bytes"] + row["exclusive_bytes"] == row["referenced_bytes"]
        assert 0 < row["referenced_metadata_bytes"] < row["referenced_bytes"]
        assert row["exclusive_metadata_bytes"] <= row["exclusive_bytes"]


def test_list_shows_the_columns_that_are_asked_for_in_the_order_asked_for(image: Path) -> None:
    """Promise: -o, -s and -S choose columns and order; the words of zfs and btrfs are accepted."""
    rows = {row["name"]: row for row in answer(image)["snapshots"]}
    lines = run(image, "-H", "-p", "-o", "excl,name,cum", "-S", "used").stdout.splitlines()
    listed = [line.split("\t") for line in lines]
    sizes = [int(cells[0]) for cells in listed]
    assert sizes == sorted(sizes, reverse=True)
    for size, name, cumulative in listed:
        if name in rows:
            assert int(size) == rows[name]["exclusive_bytes"]
            assert int(cumulative) == rows[name]["cumulative_bytes"]
    rising = run(image, "-H", "-o", "name", "-s", "name").stdout.split()
    assert rising == sorted(rising)
    space = run(image, "-o", "space").stdout.splitlines()
    assert space[0].split() == ["NAME", "AVAIL", "USED", "USEDSNAP", "USEDDS"]
    assert len(space) == 2 + len(NAMES)
    every = run(image, "-o", "all", "-a").stdout.splitlines()
    assert "WRITTEN-META" in every[0]
    assert any(line.startswith("(generation ") for line in every)
    for words in (["-o", "frob"], ["-s", "frob"], ["-s", "name", "-S", "name"]):
        refused = run(image, *words)
        assert refused.returncode == 2, refused
        assert refused.stderr.count("\n") == 1


def test_list_of_a_set_is_what_the_deletion_with_the_same_words_frees(image: Path) -> None:
    """Promise C11: names, patterns, ranges and rules mean the same to cowdu and to delete."""
    for words in (["t*"], ["one%three"], ["--keep-last", "2"], ["t*", "--keep", "two"]):
        told = answer(image, *words)["reclaim"]
        program = "from cowfs.cli.main import main; main()"
        result = subprocess.run(
            [sys.executable, "-c", program, "snapshot", "delete", "-n", image, *words, "--json"],
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
            check=True,
        )
        deletion = json.loads(result.stdout)
        assert deletion["names"] == told["names"] != []
        assert deletion["reclaim_bytes"] == told["reclaim_bytes"] > 0
    assert freed_bytes(image, told["names"]) == told["reclaim_bytes"]


# --- plan -----------------------------------------------------------------------------------------


def test_plan_frees_what_it_says_with_the_command_that_it_prints(image: Path) -> None:
    """Promise C11: the command of a plan frees exactly the announced bytes, which are enough."""
    everything = counted_bytes(image, NAMES)
    told = answer("plan", image, "--free", f"{everything // 2 >> 10}K")
    names = [row["name"] for row in told["snapshots"]]
    assert told["exact"] is True
    assert told["reclaim_bytes"] >= told["wanted_bytes"]
    assert 0 < len(names) < len(NAMES)
    assert told["command"].startswith(f"cowfs snapshot delete {image} ")
    import shlex

    words = shlex.split(told["command"])[1:]
    before = tree_bytes(image)
    program = "from cowfs.cli.main import main; main()"
    subprocess.run([sys.executable, "-c", program, *words], check=True, timeout=HANG_SECONDS)
    assert before - tree_bytes(image) == told["reclaim_bytes"]


def test_plan_leaves_alone_what_is_held_or_kept(image: Path) -> None:
    """Promise: a plan has no snapshot that is held or that a rule keeps."""
    change(image, lambda filesystem: filesystem.apply(HoldSnapshots(("two",), True)))
    told = answer("plan", image, "--free", "4K", "--keep", "three")
    assert {row["name"] for row in told["snapshots"]}.isdisjoint({"two", "three"})
    assert told["kept"] == {"two": ["held"], "three": ["named"]}
    refused = run("plan", image, "--free", "1G")
    assert refused.returncode == 1
    assert refused.stdout == ""
    assert "deleting all 4 snapshots that may be deleted frees" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_plan_prints_a_table_a_reason_and_the_command(image: Path) -> None:
    """Promise: a plan says why each snapshot is in it, and that no smaller set frees enough."""
    lines = run("plan", image, "--free", "500K", "--lose", "oldest").stdout.splitlines()
    assert lines[0].split() == ["NAME", "CREATED", "ALONE", "IN", "PLAN", "WHY"]
    assert lines[1].startswith("one ")
    assert "keeps" in lines[1]
    assert lines[-1].startswith("cowfs snapshot delete ")
    assert run("plan", image, "--free", "0").stdout.splitlines()[-1].startswith("nothing needs")
    for words in (["--free", "much"], [], ["--free", "1M", "--lose", "all"]):
        assert run("plan", image, *words).returncode == 2


# --- why ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["two"], ["two", "four"], NAMES])
def test_why_names_files_that_add_up_to_what_is_freed(image: Path, names: list[str]) -> None:
    """Promise C11: files and metadata of `why` add up to what the deletion frees."""
    told = answer("why", image, *names)
    assert told["reclaim_bytes"] == counted_bytes(image, names)
    tree = told["tree"]
    assert tree["bytes"] + told["metadata_bytes"] == told["reclaim_bytes"]
    assert sum(child["bytes"] for child in tree["children"]) == tree["bytes"]
    states = {child["name"]: child["deleted"] for child in tree["children"]}
    # Each file was removed after the next snapshot.
    for name, later in zip(NAMES, [*NAMES[1:], "five"], strict=True):
        kept_by_these = {name, later} <= {*names}
        assert states.get(f"file of {name}", False) is kept_by_these, "deleted files are told"
    assert states["always"] is False


def test_why_opens_directories_and_shows_the_largest_first(tmp_path: Path) -> None:
    """Promise: `why` shows a tree, --depth deep and --top wide, with the rest as one line."""
    image = make_image(tmp_path / "disk.img")

    def files(filesystem: Filesystem) -> None:
        live = filesystem.live
        outer = live.create(ROOT_INO, b"outer", 0o40755, 0, 0).ino
        inner = live.create(outer, b"inner", 0o40755, 0, 0).ino
        for number in range(5):
            ino = live.create(inner, b"f%d" % number, 0o100644, 0, 0).ino
            live.write(ino, 0, os.urandom(4096 * (number + 1)))

    def cut(filesystem: Filesystem) -> None:
        live = filesystem.live
        outer = live.find(ROOT_INO, b"outer")
        assert outer is not None
        inner = live.find(outer.ino, b"inner")
        assert inner is not None
        for number in range(4):
            gone = live.unlink(inner.ino, b"f%d" % number)
            while not live.reclaim(gone.ino):
                pass
        last = live.find(inner.ino, b"f4")
        assert last is not None
        live.write(last.ino, 0, os.urandom(4096))

    change(image, files, snapshot("s"), cut)
    lines = run("why", image, "s", "-p").stdout.splitlines()
    assert [line.split()[:3] for line in lines[1:7]] == [
        ["45056", "changed", "outer/"],
        ["45056", "changed", "inner/"],
        ["16384", "deleted", "f3"],
        ["12288", "deleted", "f2"],
        ["8192", "deleted", "f1"],
        ["4096", "deleted", "f0"],
    ]
    assert lines[7].split() == ["4096", "changed", "f4"]
    short = run("why", image, "s", "--depth", "3", "--top", "2", "-p").stdout.splitlines()
    assert short[5].split() == ["16384", "-", "(3", "more)"]
    assert len(run("why", image, "s", "--depth", "1").stdout.splitlines()) == 4
    flat = run("why", image, "s", "--flat", "-H", "-p").stdout.splitlines()
    assert flat[0] == "16384\tdeleted\touter/inner/f3"
    assert run("why", image).returncode == 2


# --- du -------------------------------------------------------------------------------------------


def test_du_prints_the_words_of_btrfs_with_the_right_numbers(image: Path) -> None:
    """Promise: du shows Total, Exclusive, Set shared, Filename; every row tells what is shared."""
    text = run("du", "--image", image, "/", "-p").stdout.splitlines()
    assert text[0] == "     Total   Exclusive  Set shared  Filename"
    rows = {line.split(maxsplit=3)[3]: line.split()[:3] for line in text[1:]}
    for total, exclusive, shared in rows.values():
        assert int(total) == int(exclusive) + int(shared)
    assert int(rows["/always"][0]) == -(-300_000 // 4096) * 4096
    together = run(
        "du", "-s", "-c", "-H", "-p", "--image", image, "/.snapshots/one", "/.snapshots/two"
    ).stdout.splitlines()
    total = together[2].split("\t")
    assert total[3] == "total"
    assert int(total[1]) >= sum(int(line.split("\t")[1]) for line in together[:2])
    every = answer("du", "--image", image, "/.snapshots", "-d", "1")["paths"]
    assert [row["path"] for row in every] == [f"/.snapshots/{name}" for name in NAMES] + [
        "/.snapshots"
    ]
    why = answer("why", image, "%")
    assert every[-1]["exclusive_bytes"] == why["reclaim_bytes"] - why["metadata_bytes"]
    missing = run("du", "--image", image, "/none")
    assert (missing.returncode, missing.stdout) == (2, "")
    assert "nothing at /none" in missing.stderr
    assert run("du", "/etc").returncode == 1


def test_du_of_paths_below_each_other_counts_each_name_once(tmp_path: Path) -> None:
    """Promise C11: a file that has a name elsewhere frees nothing, however often it is named."""
    image = make_image(tmp_path / "disk.img")

    def files(filesystem: Filesystem) -> None:
        live = filesystem.live
        folder = live.create(ROOT_INO, b"folder", 0o40755, 0, 0).ino
        for name in (b"linked", b"alone"):
            ino = live.create(folder, name, 0o100644, 0, 0).ino
            live.write(ino, 0, os.urandom(40_960))
            if name == b"linked":
                live.link(ino, ROOT_INO, b"elsewhere")

    change(image, files)

    def together(*paths: str) -> tuple[int, int]:
        row = answer("du", "-s", "-c", "--image", image, *paths)["paths"][-1]
        assert row["path"] == "total"
        return row["total_bytes"], row["exclusive_bytes"]

    alone = (81_920, 40_960)
    assert together("/folder") == together("/folder", "/folder/linked") == alone
    assert together("/folder/linked", "/folder", "/folder/linked") == alone
    assert together("/folder", "/elsewhere") == (81_920, 81_920)


# --- log ------------------------------------------------------------------------------------------


def test_log_lists_the_versions_of_a_file_and_where_they_live(image: Path) -> None:
    """Promise: log lists each state of a file with its new blocks and its snapshots.

    Deleted files are listed too.
    """
    told = answer("log", "--image", image, "/always")["versions"]
    assert [version["snapshots"] for version in told] == [[name] for name in NAMES]
    assert [version["live"] for version in told] == [False] * 4 + [True]
    assert told[0]["new_bytes"] == told[0]["on_disk_bytes"] == -(-300_000 // 4096) * 4096
    assert {version["new_bytes"] for version in told[1:]} == {3 * 4096}
    gone = answer("log", "--image", image, "/file of two")["versions"]
    assert [(version["snapshots"], version["live"]) for version in gone] == [
        (["two", "three"], False)
    ]
    small = answer("log", "--image", image, "/small one 1")["versions"]
    assert [version["snapshots"] for version in small] == [["one"]] or len(small) == 1
    lines = run("log", "--image", image, "file of two", "-a").stdout.splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["absent", "file"]
    assert lines[1].endswith("one, four%five, (live)")
    for path in ("/none", "/../x"):
        refused = run("log", "--image", image, path)
        assert (refused.returncode, refused.stdout) == (2, ""), refused


# --- curve, pairs, block --------------------------------------------------------------------------


def test_curve_is_what_deleting_the_oldest_frees(image: Path) -> None:
    """Promise C11: each step of the curve is what that deletion frees."""
    steps = answer("curve", image)["steps"]
    assert [step["count"] for step in steps] == [1, 2, 3, 4, 5]
    for step in steps:
        assert step["reclaim_bytes"] == counted_bytes(image, NAMES[: step["count"]])
    some = answer("curve", image, "t*", "--keep-last", "1")["steps"]
    assert [step["name"] for step in some] == ["two"]
    assert len(run("curve", image, "-H").stdout.splitlines()) == 5


def test_curve_and_cumulative_say_by_what_order(image: Path) -> None:
    """Promise: older means created before; where the dates disagree, a line says so."""
    words = "older means created before; the order of the dates is different"
    columns = ("-o", "name,cumulative")
    for told in (run("curve", image), run(image, *columns)):
        assert words not in told.stdout.splitlines()
    change(image, dated("two", time.time_ns() + 10**18))
    for told in (run("curve", image), run(image, *columns)):
        assert words in told.stdout.splitlines()
    for quiet in (run("curve", image, "-H"), run(image, "-H", *columns), run(image)):
        assert words not in quiet.stdout
    found = answer("curve", image)
    assert found["order"] == "creation"
    assert [step["name"] for step in found["steps"]] == NAMES
    rows = answer(image)["snapshots"]
    for at, step in enumerate(found["steps"]):
        assert step["reclaim_bytes"] == counted_bytes(image, NAMES[: at + 1])
        assert rows[at]["cumulative_bytes"] == step["reclaim_bytes"]


def test_rules_of_cowdu_name_what_a_wrong_clock_dated(image: Path) -> None:
    """Promise: a rule selects what deletion would, and names what it keeps for its date."""
    change(image, dated("two", time.time_ns() + 10**18))
    for words in (
        ("list", image),
        ("curve", image),
        ("plan", image, "--free", "1"),
        ("why", image),
    ):
        told = run(*words, "--keep-last", "3")
        assert told.stderr == (
            "cowdu: kept in spite of the rules, because dated in the future: 'two'\n"
        ), words
    assert answer(image, "--keep-last", "3")["reclaim"]["names"] == ["one"]
    assert answer("plan", image, "--free", "1", "--keep-last", "3")["kept"]["two"] == [
        "dated in the future"
    ]


def test_pairs_tells_what_two_share_and_nobody_else_has(image: Path) -> None:
    """Promise: a pair shares what deleting both frees beyond deleting each."""
    told = answer("pairs", image)["pairs"]
    assert told
    alone = {name: counted_bytes(image, [name]) for name in NAMES}
    for pair in told:
        names = [pair["older"], pair["newer"]]
        both = counted_bytes(image, names)
        assert pair["shared_bytes"] == both - sum(alone[name] for name in names) > 0
    matrix = run("pairs", image, "--matrix", "-H", "-p").stdout.splitlines()
    assert len(matrix) == len(NAMES)
    assert int(matrix[0].split("\t")[1]) == alone["one"]


def test_block_explains_what_is_there(image: Path) -> None:
    """Promise: block tells kind, references, birth, owners, and the file and offset."""
    assert answer("block", image, "3")["kind"] == "superblock ring"
    filesystem = open_filesystem(FileDevice(image, writable=False), writable=False)
    try:
        node = filesystem.record.pointer
        always = filesystem.live.find(ROOT_INO, b"always")
        assert always is not None
        (start, extent), *_ = filesystem.live.extents.find(always.ino, 20, 21)
    finally:
        filesystem.close()
    told = answer("block", image, str(node.block))
    assert (told["kind"], told["twin"], told["birth"]) == ("node", False, node.birth)
    assert told["reached_by"] == ["(live)"]
    assert answer("block", image, str(node.twin))["twin"] is True
    told = answer("block", image, str(extent.block))
    assert (told["kind"], told["birth"]) == ("data", extent.birth)
    assert told["reached_by"] == [*NAMES, "(live)"]
    assert {(place["path"], place["offset_bytes"]) for place in told["files"]} == {
        ("always", start * BLOCK_SIZE_BYTES)
    }
    assert (
        "reached by             one%five, (live)" in run("block", image, str(extent.block)).stdout
    )
    refused = run("block", image, str(1 << 40))
    assert (refused.returncode, refused.stdout) == (2, "")


# --- report ---------------------------------------------------------------------------------------


def test_report_writes_one_file_and_never_over_another(image: Path, tmp_path: Path) -> None:
    """Promise: the report is one self-contained page; an existing file is replaced only with -f."""
    page = tmp_path / "page.html"
    told = answer("report", image, "--html", page)
    assert told["size_bytes"] == page.stat().st_size
    assert told["snapshot_count"] == len(NAMES)
    text = page.read_text(encoding="utf-8")
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text
    refused = run("report", image, "--html", page)
    assert refused.returncode == 2
    assert "-f" in refused.stderr
    assert run("report", image, "--html", page, "-f").returncode == 0
    assert run("report", image, "--html", "-").stdout.rstrip() != ""


@pytest.mark.parametrize("force", [[], ["-f"]])
@pytest.mark.parametrize("kind", ["link", "dangling", "fifo", "directory"])
def test_report_writes_nothing_where_a_name_leads_elsewhere(
    image: Path, tmp_path: Path, kind: str, force: list[str]
) -> None:
    """Promise: the report follows no link, not even with -f."""
    page, elsewhere = tmp_path / "page.html", tmp_path / "elsewhere"
    if kind == "fifo":
        os.mkfifo(page)
    elif kind == "directory":
        page.mkdir()
    else:
        page.symlink_to(elsewhere)
    if kind == "link":
        elsewhere.write_text("precious")
    before = page.lstat()
    refused = run("report", image, "--html", page, *force)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "is not a regular file" in refused.stderr or "is a directory" in refused.stderr
    assert os.path.samestat(page.lstat(), before)
    assert elsewhere.exists() == (kind == "link")
    if kind == "link":
        assert elsewhere.read_text() == "precious"


def test_report_over_another_replaces_it_whole(image: Path, tmp_path: Path) -> None:
    """Promise: -f puts a new file under the name; open and linked copies of the old one stay."""
    page, other = tmp_path / "page.html", tmp_path / "other"
    page.write_text("old")
    os.link(page, other)
    assert run("report", image, "--html", page, "-f").returncode == 0
    assert other.read_text() == "old"
    assert page.read_text().startswith("<!")
    assert {file.name for file in tmp_path.iterdir()} >= {"page.html", "other"}
    assert not list(tmp_path.glob(".page*"))
    missing = tmp_path / "no" / "page.html"
    failed = run("report", image, "--html", missing)
    assert failed.returncode == 1
    assert f"cannot write {missing}: No such file" in failed.stderr


def test_commands_come_without_their_word_and_images_may_be_called_like_one(
    tmp_path: Path, original: bytes
) -> None:
    """Promise: cowdu TARGET is cowdu list TARGET; an image called plan is written ./plan."""
    (tmp_path / "plan").write_bytes(original)
    program = "from tools.cowdu.main import main; main()"
    texts = []
    for words in (["./plan"], ["list", "plan"]):
        result = subprocess.run(
            [sys.executable, "-c", program, *words, "-H", "--debug"],
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
            check=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        texts.append(result.stdout)
    assert texts[0] == texts[1] != ""
