"""Promises that the programs people use every day work on a mount as on any other filesystem.

git, Python environments, SQLite, tar, rsync, find and du run unchanged. Their results must pass
their own checks, and equal the results made elsewhere.
"""

import contextlib
import os
import sqlite3
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.conftest import Mounted
from tests.mounted.programs import git, run
from tests.mounted.tree_state import assert_same, make_library, tree_state

pytestmark = [pytest.mark.mounted]


# ------------------------------------------------------------------- git


def test_git_history_survives_gc_clone_and_remount(mount: Mounted, tmp_path: Path) -> None:
    """Promise: repositories made, packed and cloned on the mount pass git's own checks."""
    work = mount.path / "work"
    work.mkdir()
    git(work, "init", "--quiet")
    library = Path(sysconfig.get_path("stdlib"))
    for number, name in enumerate(("json", "email", "asyncio", "logging", "http")):
        run("cp", "-r", library / name, work / name)
        (work / "number").write_text(str(number), encoding="utf-8")
        git(work, "add", "--all")
        git(work, "commit", "--quiet", "--message", f"add {name}")
    git(work, "checkout", "--quiet", "-b", "side", "HEAD~2")
    (work / "side").write_text("side", encoding="utf-8")
    git(work, "add", "--all")
    git(work, "commit", "--quiet", "--message", "side")
    git(work, "checkout", "--quiet", "main")
    git(work, "merge", "--quiet", "--no-edit", "side")
    assert git(work, "status", "--porcelain") == ""
    history = git(work, "log", "--format=%H %T %s")
    assert len(history.splitlines()) == 7

    git(work, "gc", "--quiet", "--aggressive", "--prune=now")
    git(work, "fsck", "--full", "--strict")
    git(mount.path, "clone", "--quiet", work, mount.path / "linked clone")
    git(mount.path, "clone", "--quiet", "--no-local", work, mount.path / "clone")
    git(mount.path, "clone", "--quiet", "--bare", work, tmp_path / "bare outside")

    mount.remount()
    for repository in (work, mount.path / "linked clone", mount.path / "clone"):
        git(repository, "fsck", "--full", "--strict")
        assert git(repository, "log", "--format=%H %T %s") == history
        assert git(repository, "status", "--porcelain") == ""
        assert (repository / "number").read_text(encoding="utf-8") == "4"
    assert git(tmp_path / "bare outside", "log", "--format=%H %T %s", "main") == history


# ------------------------------------------------------------------- Python


@pytest.mark.long
def test_python_environment_with_pip_works(mount: Mounted) -> None:
    """Promise: a virtual environment on the mount is made, runs, and installs a package."""
    place = mount.path / "environment"
    run(sys.executable, "-m", "venv", place)
    python = place / "bin" / "python"
    prefix = run(python, "-c", "import sys; print(sys.prefix)")
    assert Path(prefix.strip()) == place
    assert "pip" in run(python, "-m", "pip", "--version")
    listed = run(python, "-m", "pip", "list", "--format=freeze", "--disable-pip-version-check")
    assert "pip==" in listed
    run(python, "-m", "compileall", "-q", "-f", place / "lib")
    mount.remount()
    run(python, "-m", "pip", "check", "--disable-pip-version-check")
    run(python, "-c", "import pip, json, sqlite3, asyncio; assert pip.__file__.startswith('/')")
    run(python, "-m", "pip", "uninstall", "--yes", "--quiet", "pip")
    assert not list(place.glob("lib/python*/site-packages/pip"))


# ------------------------------------------------------------------- SQLite


@pytest.mark.parametrize("journal", ["wal", "delete"])
def test_sqlite_database_is_whole_after_remount(mount: Mounted, journal: str) -> None:
    """Promise: committed data is kept, with two connections, locks and shared memory."""
    file = mount.path / "data.sqlite"
    with (
        contextlib.closing(sqlite3.connect(file, isolation_level=None)) as writer,
        contextlib.closing(sqlite3.connect(file, isolation_level=None, timeout=0.05)) as other,
    ):
        assert writer.execute(f"PRAGMA journal_mode={journal}").fetchone() == (journal,)
        writer.execute("PRAGMA synchronous=FULL")
        writer.execute("CREATE TABLE entries (number INTEGER PRIMARY KEY, contents BLOB)")
        for batch in range(20):
            writer.execute("BEGIN IMMEDIATE")
            writer.executemany(
                "INSERT INTO entries VALUES (?, ?)",
                [(batch * 500 + n, os.urandom(200)) for n in range(500)],
            )
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                other.execute("BEGIN IMMEDIATE")
            assert other.execute("SELECT count(*) FROM entries").fetchone() == (batch * 500,)
            writer.execute("COMMIT")
            assert other.execute("SELECT count(*) FROM entries").fetchone()[0] == 500 * (batch + 1)
        other.execute("UPDATE entries SET contents = zeroblob(3000) WHERE number % 7 = 0")
        other.execute("DELETE FROM entries WHERE number % 3 = 0")
        expected = writer.execute("SELECT count(*), sum(length(contents)) FROM entries").fetchone()
        writer.execute("BEGIN")
        writer.execute("DELETE FROM entries")
        writer.execute("ROLLBACK")
        assert writer.execute("PRAGMA integrity_check").fetchone() == ("ok",)

    mount.remount()
    with contextlib.closing(sqlite3.connect(file)) as again:
        assert again.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert again.execute("PRAGMA journal_mode").fetchone() == (journal,)
        query = "SELECT count(*), sum(length(contents)) FROM entries"
        assert again.execute(query).fetchone() == expected
    assert run("sqlite3", file, "PRAGMA integrity_check; VACUUM; PRAGMA integrity_check;") == (
        "ok\nok\n"
    )


# ------------------------------------------------------------------- tar, rsync


def test_tar_there_and_back_keeps_everything(mount: Mounted, tmp_path: Path) -> None:
    """Promise: an archive unpacked on the mount and packed again holds the same tree, holes too."""
    original = tmp_path / "library"
    make_library(original)
    expected = tree_state(original)
    # tar finds holes by reading: not every filesystem can report them.
    pack = ("tar", "--create", "--sparse", "--hole-detection=raw", "--xattrs", "--format=posix")
    unpack = ("tar", "--extract", "--xattrs", "--xattrs-include=*", "--preserve-permissions")
    run(*pack, "--file", tmp_path / "one.tar", "library", folder=tmp_path)
    run(*unpack, "--file", tmp_path / "one.tar", folder=mount.path)
    copy = mount.path / "library"
    assert_same(expected, tree_state(copy))
    sparse = (copy / "one of everything" / "sparse").stat()
    assert sparse.st_size == 20 << 20
    assert sparse.st_blocks * 512 <= 1 << 20

    mount.remount()
    run(*pack, "--file", mount.path / "two.tar", "library", folder=mount.path)
    (tmp_path / "back").mkdir()
    run(*unpack, "--file", mount.path / "two.tar", folder=tmp_path / "back")
    assert_same(expected, tree_state(tmp_path / "back" / "library"))
    run("tar", "--compare", "--file", mount.path / "two.tar", folder=mount.path)


def test_rsync_both_ways_keeps_links_and_attributes(mount: Mounted, tmp_path: Path) -> None:
    """Promise: rsync -aHAX there and back changes nothing, and a second run finds nothing."""
    original = tmp_path / "library"
    make_library(original)
    expected = tree_state(original)
    run("rsync", "-aHAX", f"{original}/", mount.path / "copy")
    assert_same(expected, tree_state(mount.path / "copy"))
    again = run("rsync", "-aHAXi", "--checksum", "--delete", f"{original}/", mount.path / "copy")
    assert again == ""

    mount.remount()
    run("rsync", "-aHAX", "--sparse", f"{mount.path}/copy/", tmp_path / "back")
    assert_same(expected, tree_state(tmp_path / "back"))

    # rsync updates files in place, and deletes what is gone at the source.
    (original / "one of everything" / "file").write_bytes(b"changed\n")
    with open(original / "one of everything" / "sparse", "r+b") as file:
        file.seek(15 << 20)
        file.write(b"another island")
    run("rm", "-r", original / "json")
    os.utime(original, ns=(0, 1_400_000_000_987_654_321))
    run(
        "rsync",
        "-aHAX",
        "--inplace",
        "--no-whole-file",
        "--delete",
        f"{original}/",
        mount.path / "copy",
    )
    assert_same(tree_state(original), tree_state(mount.path / "copy"))


# ------------------------------------------------------------------- find, du


def test_find_and_du_agree_with_the_attributes(mount: Mounted, tmp_path: Path) -> None:
    """Promise: find sees each name once; du counts each file once, in the blocks of stat."""
    original = tmp_path / "library"
    make_library(original)
    run("cp", "-a", original, mount.path)
    copy = mount.path / "library"

    found = run("find", copy, "-print0").split("\0")[:-1]
    walked = [str(copy / path) for path in tree_state(copy) if path != "."]
    assert sorted(found) == sorted([str(copy), *walked])
    assert len(found) == len(set(found))
    for test in (
        ("-type", "d"),
        ("-type", "l"),
        ("-type", "p"),
        ("-links", "+1", "-type", "f"),
        ("-perm", "-4000"),
        ("-empty", "-type", "f"),
        ("-name", "*.py", "-size", "+64k"),
    ):
        here = run("find", ".", *test, "-printf", "%P\\0", folder=copy).split("\0")
        there = run("find", ".", *test, "-printf", "%P\\0", folder=original).split("\0")
        assert sorted(here) == sorted(there), test

    blocks = {}
    for path in found:
        information = os.lstat(path)
        blocks[information.st_ino] = information.st_blocks
        if os.path.isfile(path) and not os.path.islink(path) and information.st_size > 1 << 16:
            assert information.st_blocks > 0, path
    counted = int(run("du", "--summarize", "--block-size=512", copy).split()[0])
    assert counted == sum(blocks.values())
    apparent = int(run("du", "--summarize", "--apparent-size", "--block-size=1", copy).split()[0])
    assert apparent > 20 << 20


@pytest.mark.needs_cowfs
def test_find_on_one_filesystem_does_not_enter_snapshots(mount: Mounted) -> None:
    """Promise: a search of the whole mount with -xdev does not enter the snapshots."""
    for number in range(10):
        (mount.path / f"file {number}").write_bytes(b"x")
    snapshot = mount.snapshot("kept")
    assert len(run("find", mount.path, "-type", "f").splitlines()) == 10
    assert len(run("find", snapshot, "-type", "f").splitlines()) == 10
    (mount.path / "file 0").unlink()
    assert (snapshot / "file 0").stat().st_ino not in {
        entry.stat().st_ino for entry in mount.path.iterdir()
    }
