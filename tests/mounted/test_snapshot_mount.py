"""Promises of `-o snapshot=NAME`: the mount is that snapshot, read-only, whatever happens later."""

import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import run_command
from tests.conftest import is_mount_point, json_of, require_clean, require_success, unmount_lazily

pytestmark = [pytest.mark.mounted, pytest.mark.needs_cowfs]

LOCKED = 11


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A mount point beside `disk.img`, with snapshots monday and tuesday; not mounted."""
    image, place = tmp_path / "disk.img", tmp_path / "mnt"
    place.mkdir()
    require_success(run_command("mkfs", image, "--size", "64M"))
    require_success(run_command("mount", image, place))
    (place / "folder").mkdir()
    for day in ("monday", "tuesday"):
        (place / "folder" / "file").write_text(day * 5000)
        (place / "program").write_text(day)
        (place / "program").chmod(0o4755)
        require_success(run_command("snapshot", "create", place, day))
    (place / "folder" / "file").write_text("now")
    require_success(run_command("umount", place))
    yield place
    if is_mount_point(place):
        run_command("umount", place)
    if is_mount_point(place):
        unmount_lazily(place)
    require_clean(image)


def test_snapshot_is_mounted_as_it_was_and_nothing_changes(place: Path) -> None:
    """Promise: its files and modes, no .snapshots; all is read-only, and the image unchanged."""
    image = place.parent / "disk.img"
    before = image.read_bytes()
    require_success(run_command("mount", image, place, "-o", "snapshot=monday"))
    assert (place / "folder" / "file").read_text() == "monday" * 5000
    assert {entry.name for entry in place.iterdir()} == {"folder", "program"}
    assert stat.S_IMODE((place / "program").stat().st_mode) == 0o4755
    assert not (place / ".snapshots").exists()
    for change in (
        lambda: (place / "new").touch(),
        lambda: (place / "folder" / "file").write_text("x"),
        lambda: (place / "program").chmod(0o600),
        lambda: (place / "program").unlink(),
        lambda: (place / ".snapshots").mkdir(),
    ):
        with pytest.raises(OSError, match="Read-only"):
            change()
    info = json_of(run_command("info", place, "--json"))
    assert info["daemon_settings"]["snapshot"] == "monday"
    assert info["snapshot_count"] == 2
    refused = run_command("snapshot", "create", place, "more")
    assert refused.returncode == 1
    assert "read-only" in refused.stderr
    require_success(run_command("umount", place))
    assert image.read_bytes() == before


def test_snapshot_of_an_earlier_commit_is_mounted(place: Path) -> None:
    """Promise: generation= with snapshot= mounts the snapshot as that commit had it."""
    image = place.parent / "disk.img"
    generation = json_of(run_command("info", image, "--json"))["generation"]
    require_success(run_command("snapshot", "delete", image, "monday"))
    gone = run_command("mount", image, place, "-o", "snapshot=monday")
    assert gone.returncode == 1
    assert "'monday'" in gone.stderr
    options = f"snapshot=monday,generation={generation}"
    require_success(run_command("mount", image, place, "-o", options))
    assert (place / "folder" / "file").read_text() == "monday" * 5000


def test_unknown_snapshot_is_refused_with_names_that_are_near(place: Path) -> None:
    """Promise: the error names similar snapshots, and nothing is mounted."""
    image = place.parent / "disk.img"
    for words in (
        ["mount", image, place, "-o", "snapshot=mondy"],
        ["rollback", image, "mondy"],
        ["snapshot", "delete", image, "mondy"],
    ):
        refused = run_command(*words)
        assert refused.returncode == 1
        assert "no snapshot 'mondy' (there is 'monday'" in refused.stderr, refused
    assert not is_mount_point(place)


def test_image_that_is_mounted_is_not_mounted_again_but_shown(place: Path, tmp_path: Path) -> None:
    """Promise: the error says where the snapshot can be read; a reader keeps writers away."""
    image, other = place.parent / "disk.img", tmp_path / "other"
    other.mkdir()
    require_success(run_command("mount", image, place))
    refused = run_command("mount", image, other, "-o", "snapshot=monday")
    assert refused.returncode == LOCKED
    shown = refused.stderr.rstrip().rpartition(" ")[2]
    assert (Path(shown) / "folder" / "file").read_text() == "monday" * 5000
    require_success(run_command("umount", place))
    require_success(run_command("mount", image, place, "-o", "snapshot=monday"))
    for options in ("rw", "snapshot=tuesday"):
        refused = run_command("mount", image, other, "-o", options)
        assert refused.returncode == LOCKED
        assert f"is mounted on {place} already" in refused.stderr
    assert not is_mount_point(other)
