"""Promises about the beginning and the end of a mount: all of it or nothing, and nothing left behind."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowfs.daemon import places
from tests.conftest import (
    Mounted,
    is_mount_point,
    json_of,
    require_clean,
    require_success,
    run_command,
    wait_for_end,
)

pytestmark = [pytest.mark.mounted, pytest.mark.needs_cowfs]


def runtime_files(image: Path) -> set[str]:
    """What lies in the runtime directory for an image."""
    stem = Path(places.socket_name(image)).stem
    return {entry.name for entry in places.make_directory().iterdir() if stem in entry.name}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    image = tmp_path / "image.img"
    require_success(run_command("mkfs", image, "--size", "256M"))
    return image


@pytest.fixture
def blocked_socket(image: Path) -> Iterator[Path]:
    """A directory where the control socket would be: the last step of a start cannot succeed."""
    path = places.make_directory() / places.socket_name(image)
    for name in runtime_files(image):  # of an image that is gone, whose inode this one has now
        (path.parent / name).unlink()
    path.mkdir()
    yield path
    path.rmdir()


@pytest.mark.parametrize("foreground", [False, True])
def test_mount_whose_start_fails_leaves_nothing_behind(
    image: Path, tmp_path: Path, blocked_socket: Path, foreground: bool
) -> None:
    """Promise: after a failure there is no mount, no daemon and no lock, and one line says why."""
    place = tmp_path / "place"
    place.mkdir()
    result = run_command("mount", image, place, *(["-f"] if foreground else []))
    assert result.returncode == 1, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert str(blocked_socket) in result.stderr
    assert not is_mount_point(place)
    assert runtime_files(image) == {blocked_socket.name}
    require_clean(image)
    require_success(run_command("snapshot", "create", image, "no lock is held"))


def test_daemon_killed_during_its_start_leaves_no_mount(image: Path, tmp_path: Path) -> None:
    """Promise: `cowfs mount` clears away what a daemon left that was killed before it answered."""
    place = tmp_path / "place"
    place.mkdir()
    # The first system call of a mount that is alive is answered by nobody any more.
    program = (
        "import os, signal, sys\n"
        "from cowfs.daemon import mount\n"
        "async def die(self): os.kill(os.getpid(), signal.SIGKILL)\n"
        "mount._Mount._report_ready = die\n"
        "from cowfs.cli.main import main\n"
        "main(sys.argv[1:])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, "mount", image, place],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 1
    assert "ended before the mount answered" in result.stderr
    assert not is_mount_point(place)
    require_success(run_command("mount", image, place))
    require_success(run_command("umount", place))
    require_clean(image)


@pytest.mark.parametrize("how", ["cowfs umount", "umount", "SIGTERM", "SIGINT", "SIGHUP"])
def test_every_orderly_end_is_a_clean_commit(mount: Mounted, how: str) -> None:
    """Promise: however a mount ends, what was written is in the image, and no file is left over."""
    (mount.path / "file").write_bytes(b"never synced")
    assert len(runtime_files(mount.image)) == 2, "the socket and the log"
    pid = mount.daemon_pid
    assert pid is not None
    if how == "cowfs umount":
        require_success(run_command("umount", mount.path))
    elif how == "umount":
        subprocess.run(["fusermount3", "-u", mount.path], check=True, timeout=60)
    else:
        os.kill(pid, signal.Signals[how])
    assert wait_for_end(pid)
    assert not is_mount_point(mount.path)
    assert runtime_files(mount.image) == set()
    assert json_of(run_command("info", mount.image, "--json"))["clean"] is True
    mount.remount()
    assert (mount.path / "file").read_bytes() == b"never synced"
