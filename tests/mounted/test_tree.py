"""Promises that a real tree of thousands of files is kept exactly, in snapshots and after rollback.

The tests compare contents and every attribute that a program can see: see tree_state.py.
"""

import subprocess
from pathlib import Path

import pytest

from tests.conftest import Mounted, json_of
from tests.mounted.tree_state import (
    assert_same,
    change_heavily,
    differences,
    in_snapshot,
    make_library,
    tree_state,
)

pytestmark = [pytest.mark.mounted]


def test_tree_copied_changed_and_rolled_back_is_the_same_tree(
    mount: Mounted, tmp_path: Path
) -> None:
    """Promise: a snapshot gives back every byte and attribute, by its path and by rollback."""
    original = tmp_path / "library"
    make_library(original, whole=True)
    expected = tree_state(original)
    assert len(expected) > 1000, "the tree is too small to prove anything"

    subprocess.run(["cp", "-a", original, mount.path], check=True)
    copy = mount.path / "library"
    assert_same(expected, tree_state(copy))

    snapshot = mount.snapshot("before") / "library"
    kept = expected if mount.plain else in_snapshot(expected)
    assert_same(kept, tree_state(snapshot))

    change_heavily(copy, seed=1)
    changed = tree_state(copy)
    assert len(differences(expected, changed)) > 500, "the changes did not change much"
    assert_same(kept, tree_state(snapshot))

    mount.remount()
    assert_same(changed, tree_state(copy))
    assert_same(kept, tree_state(snapshot))

    mount.rollback("before")
    assert_same(expected, tree_state(copy))
    assert_same(kept, tree_state(snapshot))

    mount.umount()
    mount.check()
    mount.remount()
    assert_same(expected, tree_state(copy))
    assert_same(kept, tree_state(snapshot))


def test_tree_rolled_back_can_be_changed_and_rolled_back_again(mount: Mounted) -> None:
    """Promise: a snapshot can be rolled back to many times, and later snapshots stay."""
    tree = mount.path / "tree"
    tree.mkdir()
    for number in range(200):
        (tree / f"file {number}").write_bytes(bytes([number]) * number * 50)
    first = tree_state(tree)
    mount.snapshot("first")
    for number in range(0, 200, 2):
        (tree / f"file {number}").unlink()
    second = tree_state(tree)
    mount.snapshot("second")

    for name, expected in (("first", first), ("second", second), ("first", first)) * 2:
        (tree / "file 1").write_bytes(b"overwritten")
        (tree / f"written before going back to {name}").write_bytes(b"x" * 100_000)
        assert differences(expected, tree_state(tree))
        mount.rollback(name)
        assert_same(expected, tree_state(tree))


@pytest.mark.needs_cowfs
def test_tree_undo_after_rollback_gives_the_newer_tree_back(mount: Mounted) -> None:
    """Promise: the state before a rollback is kept, and `cowfs undo` restores it."""
    (mount.path / "old").write_bytes(b"old")
    mount.snapshot("before")
    (mount.path / "new").write_bytes(b"new" * 10_000)
    (mount.path / "old").write_bytes(b"changed")
    newer = tree_state(mount.path)

    mount.rollback("before")
    assert (mount.path / "old").read_bytes() == b"old"
    assert not (mount.path / "new").exists()

    assert mount.cowfs("undo", mount.path).returncode == 0
    assert_same(newer, tree_state(mount.path))


@pytest.mark.needs_cowfs
def test_tree_in_a_snapshot_cannot_be_changed(mount: Mounted) -> None:
    """Promise: a snapshot is read-only for everybody, root included."""
    (mount.path / "file").write_bytes(b"kept")
    snapshot = mount.snapshot("kept")
    with pytest.raises(OSError, match="Read-only"):
        (snapshot / "file").write_bytes(b"changed")
    with pytest.raises(OSError, match="Read-only"):
        (snapshot / "file").unlink()
    with pytest.raises(OSError, match="Read-only"):
        (snapshot / "directory").mkdir()
    with pytest.raises(OSError, match="Read-only"):
        (snapshot / "file").chmod(0o600)
    assert (snapshot / "file").read_bytes() == b"kept"
    assert ".snapshots" not in {entry.name for entry in mount.path.iterdir()}


@pytest.mark.needs_cowfs
def test_tree_deleting_a_snapshot_frees_what_was_announced(mount: Mounted) -> None:
    """Promise (C11): the dry run names exactly the number of bytes that deletion frees."""
    tree = mount.path / "tree"
    tree.mkdir()
    for number in range(300):
        (tree / f"file {number}").write_bytes(bytes([number % 251]) * (number * 400))
    mount.snapshot("one")
    for number in range(0, 300, 3):
        (tree / f"file {number}").write_bytes(b"other" * 3000)
    mount.snapshot("two")
    for number in range(0, 300, 5):
        (tree / f"file {number}").unlink()
    mount.snapshot("three")
    assert mount.cowfs("sync", mount.path).returncode == 0

    for names in (("two",), ("one", "three")):
        before = json_of(mount.cowfs("df", mount.path, "--json"))["tree_bytes"]
        planned = json_of(mount.cowfs("snapshot", "delete", "-n", mount.path, *names, "--json"))[
            "reclaim_bytes"
        ]
        assert planned > 0
        deleted = mount.cowfs("snapshot", "delete", mount.path, *names, "--wait")
        assert deleted.returncode == 0, deleted.stderr
        after = json_of(mount.cowfs("df", mount.path, "--json"))["tree_bytes"]
        assert before - after == planned
