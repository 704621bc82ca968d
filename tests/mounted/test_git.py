"""Promises that git works on a repository with thousands of commits as it does on the host.

The same work is done on the mount and on a plain directory. Names of commits and trees are hashes
of all their contents, so equal names mean equal contents. git's own check, `fsck`, runs too.
"""

from pathlib import Path

import pytest

from tests.conftest import Mounted
from tests.mounted.programs import git
from tests.sizes import sized

pytestmark = [pytest.mark.mounted]

COMMITS = sized(900, 3000)
FOLDERS, FILES = 20, 10
SIDE_BEGINS, SIDE_COMMITS = COMMITS - 100, 25
BEGIN = 1_700_000_000
# Fixed dates: with dates from the clock, no commit would get the same name twice.
DATES = {"GIT_AUTHOR_DATE": f"{BEGIN} +0000", "GIT_COMMITTER_DATE": f"{BEGIN} +0000"}


def path_of(number: int) -> str:
    """The file that commit `number` changes."""
    return f"folder {number * 7 % FOLDERS}/file {number * 11 % (FOLDERS * FILES) // FOLDERS}"


def contents_of(number: int) -> str:
    """The text that commit `number` writes there: one line of its own, the others as before."""
    return "".join(f"line {line} of {number - number % (line + 1)}\n" for line in range(30))


def stream(first: int, end: int, branch: str, parent: str | None) -> str:
    """Commits `first` to before `end`, as git fast-import reads them."""
    parts = []
    for number in range(first, end):
        message, contents = f"change {number}", contents_of(number)
        name = path_of(number) if branch == "main" else f"side/{number}"
        mark = f"mark :{number + 1}\n" if branch == "main" else ""
        parts.append(
            f"commit refs/heads/{branch}\n{mark}"
            f"committer A <a@example.org> {BEGIN + number * 60} +0000\n"
            f"data {len(message)}\n{message}\n"
        )
        if number == first and parent:
            parts.append(f"from {parent}\n")
        parts.append(f"M 100644 inline {name}\ndata {len(contents)}\n{contents}\n")
    return "".join(parts)


def make_history(work: Path) -> None:
    """A repository of thousands of commits: a pack, a thousand loose commits, and a side branch."""
    work.mkdir()
    git(work, "init", "--quiet")
    packed = COMMITS * 2 // 3
    git(work, "fast-import", "--quiet", given=stream(0, packed, "main", None))
    loose = stream(packed, COMMITS, "main", "refs/heads/main^0")
    loose += stream(0, SIDE_COMMITS, "side", f":{SIDE_BEGINS}")
    git(work, "-c", "fastimport.unpackLimit=100000", "fast-import", "--quiet", given=loose)
    git(work, "checkout", "--quiet", "--force", "main")


def work_on(work: Path) -> dict[str, str]:
    """Do everyday work on a repository; returns the outcome, without inodes and times."""
    seen = {"count": git(work, "rev-list", "--count", "--all")}
    seen["log"] = git(work, "log", "--format=%H %s", "--stat", "-n", "300")
    seen["blame"] = git(work, "blame", "--line-porcelain", path_of(COMMITS - 1))
    seen["grep"] = git(work, "grep", "-n", "line 29 of", f"main~{COMMITS // 3}")
    for number in (10, COMMITS // 2, COMMITS - 50, 40, COMMITS - 1):
        commit = git(work, "rev-parse", f"main~{COMMITS - 1 - number}").strip()
        git(work, "checkout", "--quiet", commit)
        assert (work / path_of(number)).read_text(encoding="ascii") == contents_of(number)
        assert git(work, "status", "--porcelain") == ""
        seen[f"files of {number}"] = git(work, "ls-files", "--stage")

    git(work, "checkout", "--quiet", "-b", "rebased", "side")
    git(work, "rebase", "--quiet", "main", **DATES)
    git(work, "checkout", "--quiet", "-b", "merged", "main")
    git(work, "merge", "--quiet", "--no-ff", "--no-edit", "side", **DATES)
    git(work, "checkout", "--quiet", "main")
    (work / path_of(COMMITS - 1)).write_text("changed by hand\n", encoding="ascii")
    (work / "new").write_text("new\n", encoding="ascii")
    git(work, "stash", "push", "--quiet", "--include-untracked", **DATES)
    assert git(work, "status", "--porcelain") == ""
    git(work, "stash", "pop", "--quiet")
    assert sorted(git(work, "status", "--porcelain").split("\n"))[1:] == sorted(
        [f' M "{path_of(COMMITS - 1)}"', "?? new"]
    )
    git(work, "reset", "--quiet", "--hard")
    git(work, "clean", "--quiet", "-d", "--force")

    git(work, "worktree", "add", "--quiet", work.with_name("tree"), "merged")
    seen["worktree"] = git(work.with_name("tree"), "ls-files", "--stage")
    assert len([*work.with_name("tree").glob("side/*")]) == SIDE_COMMITS
    git(work, "worktree", "remove", work.with_name("tree"))
    assert not work.with_name("tree").exists()

    git(work, "repack", "-d", "--quiet")
    git(work, "gc", "--quiet", "--prune=now")
    assert not [*(work / ".git" / "objects").glob("[0-9a-f][0-9a-f]/*")]
    git(work, "fsck", "--full", "--strict")
    seen["references"] = git(work, "for-each-ref")
    return seen


def test_git_does_on_a_mount_what_it_does_on_the_host(mount: Mounted, tmp_path: Path) -> None:
    """Promise: 3,000 commits, viewed, checked out, rebased, merged and packed, are the same."""
    (tmp_path / "host").mkdir()
    results = []
    for place in (tmp_path / "host", mount.path):
        make_history(place / "work")
        results.append(work_on(place / "work"))
    expected, found = results
    assert expected.keys() == found.keys()
    for what in expected:
        assert expected[what] == found[what], what
    assert found["count"].strip() == str(COMMITS + SIDE_COMMITS)

    mount.remount()
    git(mount.path, "clone", "--quiet", "--local", mount.path / "work", mount.path / "clone")
    packs = [*(mount.path / "clone" / ".git" / "objects" / "pack").glob("*.pack")]
    assert packs
    assert all(pack.stat().st_nlink == 2 for pack in packs), "no hard links"
    for name in ("work", "clone"):
        git(mount.path / name, "fsck", "--full", "--strict")
        assert git(mount.path / name, "status", "--porcelain") == ""


def test_git_gets_back_from_a_snapshot_what_gc_has_thrown_away(mount: Mounted) -> None:
    """Promise C6: after a rollback, a repository has again the objects that git gc threw away."""
    work = mount.path / "repository"
    make_history(work)
    git(work, "repack", "-a", "-d", "--quiet")
    references, side = git(work, "for-each-ref"), git(work, "rev-parse", "side").strip()
    inodes = {path.stat().st_ino for path in work.rglob("*.pack")}

    snapshot = mount.snapshot("before gc")
    git(work, "branch", "--quiet", "-D", "side")
    git(work, "reflog", "expire", "--expire=now", "--all")
    git(work, "gc", "--quiet", "--prune=now")
    assert git(work, "for-each-ref") != references
    git(work, "cat-file", "-e", side, status=1)
    assert not inodes & {path.stat().st_ino for path in work.rglob("*.pack")}
    # git can read from the snapshot although it is read-only.
    only_read = ("-c", "safe.directory=*", f"--git-dir={snapshot}/repository/.git")
    assert git(mount.path, *only_read, "for-each-ref") == references
    git(mount.path, *only_read, "fsck", "--full")

    mount.rollback("before gc")
    for _ in range(2):
        assert git(work, "for-each-ref") == references
        git(work, "fsck", "--full", "--strict")
        assert git(work, "status", "--porcelain") == ""
        assert git(work, "rev-list", "--count", "side").split() == [str(SIDE_BEGINS + SIDE_COMMITS)]
        mount.remount()
