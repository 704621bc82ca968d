"""Promises of real mounts: deleted files take no space of the host, and trim harms nothing."""

import os
import threading
import time
from pathlib import Path

import pytest

from cowfs.api import connect
from tests.commands import run_command
from tests.conftest import Mounted, json_of, mounted, require_success
from tests.sizes import HANG_SECONDS, sized, wait_until

pytestmark = [pytest.mark.mounted, pytest.mark.needs_cowfs]

MIB = 1 << 20
FILES = sized(24, 60)  # of one MiB
RESTS_BYTES = 8 * MIB  # metadata, and free pieces too small for a discard


def host_bytes(image: Path) -> int:
    return image.stat().st_blocks * 512


def fill(mount: Mounted, files: int, size: int) -> None:
    for number in range(files):
        (mount.path / f"f{number}").write_bytes(os.urandom(size))
    require_success(mount.cowfs("sync", mount.path))
    assert host_bytes(mount.image) >= files * size


def delete_in_three_commits(mount: Mounted, files: int) -> None:
    for turn in range(3):
        for number in range(turn, files, 3):
            (mount.path / f"f{number}").unlink()
        require_success(mount.cowfs("sync", mount.path))


@pytest.mark.parametrize(
    ("files", "size"), [pytest.param(FILES, MIB, marks=pytest.mark.long), (16 * FILES, 64 << 10)]
)
def test_deleted_files_give_their_space_back_while_mounted(
    tmp_path: Path, files: int, size: int
) -> None:
    """Promise: an idle mount discards the space of deleted files, large and small."""
    with mounted(tmp_path / "cowfs", size="256M", mount_options=("-o", "commit=1")) as mount:
        fill(mount, files, size)
        delete_in_three_commits(mount, files)
        wait_until(lambda: host_bytes(mount.image) < RESTS_BYTES, "it never came")


def test_deleted_files_give_their_space_back_at_unmount(tmp_path: Path) -> None:
    """Promise: after umount the image takes of the host only the space in use."""
    with mounted(tmp_path / "cowfs", size="256M") as mount:
        fill(mount, FILES, MIB)
        delete_in_three_commits(mount, FILES)
        mount.umount()
        assert host_bytes(mount.image) < RESTS_BYTES


def test_nodiscard_keeps_the_space_until_trim_is_asked_for(tmp_path: Path) -> None:
    """Promise: -o nodiscard lasts to the end; cowfs trim works on a mount and on an image."""
    options = ("-o", "commit=1,nodiscard")
    with mounted(tmp_path / "cowfs", size="256M", mount_options=options) as mount:
        fill(mount, FILES, MIB)
        delete_in_three_commits(mount, FILES)
        time.sleep(3)
        mount.umount()
        assert host_bytes(mount.image) > (FILES - 5) * MIB
        mount.remount()
        answer = json_of(mount.cowfs("trim", mount.path, "--json"))
        assert answer["trimmed_bytes"] > 240 * MIB
        assert host_bytes(mount.image) == answer["host_bytes"] < RESTS_BYTES

        fill(mount, FILES, MIB)
        delete_in_three_commits(mount, FILES)
        mount.umount()
        assert host_bytes(mount.image) > (FILES - 5) * MIB
        said = require_success(mount.cowfs("trim", mount.image)).stdout
        assert said.startswith("gave 2")
        assert "of free space to the host; the image now takes" in said
        assert host_bytes(mount.image) < RESTS_BYTES


def test_trim_beside_writers_leaves_every_byte(mount: Mounted) -> None:
    """Promise: blocks that are allocated while trim passes over them are never punched out."""
    ended = threading.Event()
    contents: dict[str, bytes] = {}

    def write() -> None:
        number = 0
        while not ended.is_set():
            name = f"w{number}"
            contents[name] = os.urandom(1 + number * 7919 % (3 * MIB))
            path = mount.path / name
            with open(path, "wb") as file:
                file.write(contents[name])
                if number % 2:
                    os.fsync(file.fileno())
            if number >= 20:
                (mount.path / f"w{number - 20}").unlink()
                del contents[f"w{number - 20}"]
            number += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(4):
            require_success(mount.cowfs("trim", mount.path))
    finally:
        ended.set()
        writer.join(HANG_SECONDS)
    mount.remount()  # so that nothing is read from the kernel's cache
    for name, data in contents.items():
        assert (mount.path / name).read_bytes() == data


def test_requests_go_on_while_trim_works(tmp_path: Path) -> None:
    """Promise: requests are answered between the steps of a trim."""
    files = 100
    trimmed_bytes: list[int] = []
    sizes_bytes: list[int] = []  # of the image on its host, after each request
    with mounted(tmp_path / "cowfs", mount_options=("-o", "nodiscard")) as mount:
        fill(mount, files, MIB)
        for number in range(files):
            (mount.path / f"f{number}").unlink()
        with connect(mount.path) as connection:
            trimmer = threading.Thread(
                target=lambda: trimmed_bytes.append(connection.trim().trimmed_bytes)
            )
            trimmer.start()
            while trimmer.is_alive():
                assert not (mount.path / "nothing").exists()
                sizes_bytes.append(host_bytes(mount.image))
            trimmer.join()
    assert trimmed_bytes[0] > 1 << 30
    # The files take four steps. A trim that lets no request through shows at most one such size,
    # to the request that was answered before it.
    between = [size for size in sizes_bytes if RESTS_BYTES < size < (files - 4) * MIB]
    assert len(between) > 1


def test_trim_of_what_nobody_may_write_is_refused_in_words(mount: Mounted) -> None:
    """Promise: trim of a read-only mount, or of the image under it, is refused with the reason."""
    mount.umount()
    require_success(run_command("mount", mount.image, mount.path, "-o", "ro"))
    for target in (mount.path, mount.image):
        refused = mount.cowfs("trim", target)
        assert refused.returncode == 1
        assert "is mounted read-only" in refused.stderr
    require_success(run_command("umount", mount.path))
    mount.remount()
