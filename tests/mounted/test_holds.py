"""Promises of holds and of deleting by rules while the filesystem is mounted."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cowfs.api import connect
from cowfs.errors import SnapshotError
from tests.commands import run_command
from tests.conftest import is_mount_point, json_of, require_clean, require_success, unmount_lazily

pytestmark = [pytest.mark.mounted, pytest.mark.needs_cowfs]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A mount with snapshots auto-1, auto-2 and auto-3; its image is clean at the end."""
    image, place = tmp_path / "disk.img", tmp_path / "mnt"
    place.mkdir()
    require_success(run_command("mkfs", image, "--size", "64M"))
    require_success(run_command("mount", image, place))
    for name in ("auto-1", "auto-2", "auto-3"):
        (place / "file").write_text(name * 5000)
        require_success(run_command("snapshot", "create", place, name))
    yield place
    if is_mount_point(place):
        run_command("umount", place)
    if is_mount_point(place):
        unmount_lazily(place)
    require_clean(image)


def names(place: Path, *, held: bool | None = None) -> list[str]:
    listed = json_of(run_command("snapshot", "list", place, "--json"))["snapshots"]
    return [found["name"] for found in listed if held is None or found["held"] == held]


def test_hold_of_a_mounted_snapshot_outlives_the_mount(place: Path) -> None:
    """Promise: the daemon and the rules keep held snapshots, also after a remount."""
    image = place.parent / "disk.img"
    held = json_of(run_command("snapshot", "hold", place, "auto-1", "--json"))["snapshots"]
    assert [(found["name"], found["held"]) for found in held] == [("auto-1", True)]
    refused = run_command("snapshot", "delete", place, "auto-1", "auto-2")
    assert refused.returncode == 1
    says = "snapshot 'auto-1' is held; cowfs snapshot release it first"
    assert says in refused.stderr
    with connect(place) as target, pytest.raises(SnapshotError, match=says):
        target.delete_snapshots(["auto-2", "auto-1"])  # the request goes to the daemon itself
    assert names(place) == ["auto-1", "auto-2", "auto-3"]
    require_success(
        run_command("snapshot", "delete", place, "auto-*", "--keep-last", "1", "--wait")
    )
    assert names(place) == ["auto-1", "auto-3"]

    require_success(run_command("rollback", place, "auto-1"))
    assert (place / "file").read_text() == "auto-1" * 5000
    assert names(place, held=True) == ["auto-1"]
    (kept,) = (name for name in names(place) if name.startswith("before-rollback"))
    require_success(run_command("snapshot", "hold", place, kept))
    refused = run_command("undo", place)
    assert refused.returncode == 1
    assert f"snapshot '{kept}', which is held" in refused.stderr
    require_success(run_command("umount", place))
    require_success(run_command("mount", image, place))
    assert names(place, held=True) == ["auto-1", kept]

    require_success(run_command("snapshot", "release", place, kept))
    require_success(run_command("undo", place))
    assert (place / "file").read_text() == "auto-3" * 5000
    require_success(run_command("snapshot", "release", place, "auto-1"))
    require_success(run_command("snapshot", "delete", place, "auto-1"))
    assert "auto-1" not in names(place)
