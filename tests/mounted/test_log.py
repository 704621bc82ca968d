"""The log on real mounts: what commands show of an image whose daemon was killed. Guards C1, C2."""

import lzma
import os
from pathlib import Path

from cowfs.storage.device import FileDevice
from cowfs.storage.format import INCOMPAT_LOG
from cowfs.storage.log_records import has_records
from cowfs.storage.superblock import read_newest
from tests.commands import run_command
from tests.conftest import Mounted, json_of, require_clean, require_success

GOLDEN = Path(__file__).parents[1] / "golden" / "without-log.img.xz"


def newest(image: Path) -> tuple[int, bool, bool]:
    """The newest generation on disk, whether the image has a log, and whether that has a record."""
    device = FileDevice(image, writable=False)
    try:
        superblock = read_newest(device)
        has_log = bool(superblock.incompat & INCOMPAT_LOG)
        return superblock.generation, has_log, has_records(device, superblock)
    finally:
        device.close()


def kill_after_fsync(mount: Mounted) -> int:
    """Leave an image with a record: one file, fsynced. Returns the generation that it follows."""
    descriptor = os.open(mount.path / "file", os.O_CREAT | os.O_WRONLY)
    os.write(descriptor, b"data" * 5000)
    os.fsync(descriptor)
    os.close(descriptor)
    mount.kill()
    generation, _, recorded = newest(mount.image)
    assert recorded, "the fsync was a commit"
    return generation


def test_commands_on_an_image_with_a_log_show_what_a_mount_would(
    mount: Mounted, tmp_path: Path
) -> None:
    """Promise: whoever reads the image finds what was fsynced, and changes nothing."""
    generation = kill_after_fsync(mount)
    before = mount.image.stat().st_mtime_ns
    info = json_of(run_command("info", mount.image, "--json"))
    assert (info["generation"], info["log_calls"]) == (generation, 2)
    rows = json_of(run_command("info", mount.image, "--generations", "--json"))["generations"]
    assert (rows[0]["generation"], rows[0]["log_calls"]) == (generation, 2)
    checked = require_success(run_command("check", mount.image)).stdout
    assert f"2 calls after generation {generation}" in checked
    assert (
        "nothing to repair"
        in require_success(run_command("check", mount.image, "--repair", "-n")).stdout
    )
    require_success(run_command("salvage", mount.image, tmp_path / "out"))
    assert (tmp_path / "out" / "main" / "file").read_bytes() == b"data" * 5000
    assert mount.image.stat().st_mtime_ns == before, "the image was written"
    mount.remount()
    assert (mount.path / "file").read_bytes() == b"data" * 5000


def test_read_only_mount_of_an_image_with_a_log_can_be_asked(mount: Mounted) -> None:
    """Promise: commands find the commit that only the memory of such a mount has."""
    kill_after_fsync(mount)
    before = mount.image.stat().st_mtime_ns
    mount.mount_options = ("-o", "ro")
    mount.remount()
    assert (mount.path / "file").read_bytes() == b"data" * 5000
    for words in (("check", mount.path), ("scrub", "start", "-B", mount.path)):
        require_success(run_command(*words))
    require_success(run_command("cowdu", "list", mount.path))
    mount.umount()
    assert mount.image.stat().st_mtime_ns == before, "the image was written"


def test_mount_gives_an_older_image_a_log(mount: Mounted) -> None:
    """Promise: the first writable mount makes the log, and an fsync there is a record."""
    mount.umount()
    mount.image.write_bytes(lzma.decompress(GOLDEN.read_bytes()))
    assert not newest(mount.image)[1]
    mount.remount()
    assert newest(mount.image)[1]
    kill_after_fsync(mount)
    mount.remount()
    assert (mount.path / "hard").read_bytes().startswith(b"changed")
    assert (mount.path / "file").read_bytes() == b"data" * 5000
    mount.umount()
    require_clean(mount.image)
