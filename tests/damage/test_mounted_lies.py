"""Promises about lying images on a real mount: no way out, no impossible name, no hang."""

import json
import os
import stat
from pathlib import Path

import pytest

from tests.commands import run_command
from tests.conftest import is_mount_point, require_success
from tests.damage.hostile import build, recipe_of, write_image

pytestmark = [pytest.mark.mounted, pytest.mark.needs_cowfs]

KEPT = json.loads((Path(__file__).parent / "kept.json").read_text())
MOUNTED = (
    "name with a slash",
    "name that leads up",
    "name with a zero byte",
    "name that leads to the root directory",
    "file of eight exbibytes",
    "directory key too long",
    "orphan mark on a live file",
    "orphan mark on nothing",
    "one leaf under 280 entries",
)
ENTRIES_MAX = 5000


def walk(top: Path) -> int:
    """Look at everything below a directory as find and cat would. Returns the number of names."""
    count = 0
    device = os.lstat(top).st_dev
    waiting, met = [os.fsencode(top)], set()
    while waiting:
        folder = waiting.pop()
        try:
            names = os.listdir(folder)
        except OSError:
            continue
        assert len(names) == len(set(names))
        for name in names:
            assert name not in (b"", b".", b".."), name
            assert b"/" not in name, name
            assert b"\0" not in name, name
            count += 1
            assert count < ENTRIES_MAX
            path = os.path.join(folder, name)
            try:
                status = os.lstat(path)
                assert status.st_dev == device, path
                if stat.S_ISDIR(status.st_mode) and status.st_ino not in met:
                    met.add(status.st_ino)
                    waiting.append(path)
                elif stat.S_ISREG(status.st_mode):
                    with open(path, "rb") as file:
                        file.read(1 << 20)
                elif stat.S_ISLNK(status.st_mode):
                    os.readlink(path)
            except OSError:
                continue
    return count


@pytest.mark.parametrize("name", MOUNTED)
@pytest.mark.parametrize("options", ["ro", "rw"])
def test_lying_image_is_mounted_looked_at_and_unmounted(
    tmp_path: Path, name: str, options: str
) -> None:
    """Promise: only valid names are shown, and the mount ends in order."""
    image, place = tmp_path / "lies.img", tmp_path / "place"
    place.mkdir()
    write_image(build(recipe_of(KEPT[name])), image)
    mounted = run_command("mount", image, place, "-o", f"{options},snapshots=visible")
    assert "Traceback" not in mounted.stdout + mounted.stderr
    if mounted.returncode:
        assert not is_mount_point(place)
        return
    try:
        shown = os.listdir(place)
        if name.startswith("name "):
            assert "sub" in shown or "many" in shown, shown
        assert walk(place) > 0
        if options == "rw":
            try:
                (place / "made").write_bytes(b"x" * 10_000)
                (place / "made").rename(place / "moved")
                (place / "moved").unlink()
            except OSError:
                pass
    finally:
        ended = run_command("umount", place)
    if options == "ro":
        require_success(ended)
    assert not is_mount_point(place)
