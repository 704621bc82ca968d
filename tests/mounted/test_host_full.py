"""Promises for a host without free space below a sparse image (C8).

The image lies on a small tmpfs and could grow to many times its size.
"""

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.commands import run_command
from tests.conftest import Mounted, json_of, require_success, wait_for_end
from tests.sizes import HANG_SECONDS

pytestmark = [pytest.mark.mounted, pytest.mark.needs_cowfs]

CHUNK_BYTES = 1 << 20
AS_ROOT = [] if os.geteuid() == 0 else ["sudo", "-n"]


@pytest.fixture
def small_host(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of the host with 64 MiB."""
    host = tmp_path / "host"
    host.mkdir()
    options = f"size=64m,uid={os.geteuid()},gid={os.getegid()},mode=700"
    mount = [*AS_ROOT, "mount", "-t", "tmpfs", "-o", options, "small-host", host]
    subprocess.run(mount, check=True, timeout=HANG_SECONDS)
    try:
        yield host
    finally:
        subprocess.run([*AS_ROOT, "umount", host], check=True, timeout=HANG_SECONDS)


def grow(host: Path) -> None:
    command = [*AS_ROOT, "mount", "-o", "remount,size=256m", host]
    subprocess.run(command, check=True, timeout=HANG_SECONDS)


def error_of(call: Callable[[], object]) -> int:
    """The errno with which a call must fail."""
    with pytest.raises(OSError) as caught:  # noqa: PT011  # the caller looks at errno
        call()
    assert caught.value.errno is not None
    return caught.value.errno


def fill_host(folder: Path) -> tuple[dict[Path, bytes], int]:
    """Write files of 1 MiB, each with an fsync, until one fails.

    Returns:
        The acknowledged files, and the descriptor of the file that failed.
    """
    acknowledged: dict[Path, bytes] = {}
    for number in range(64):
        contents = os.urandom(CHUNK_BYTES)
        path = folder / f"file {number}"
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY)
        try:
            os.write(descriptor, contents)
            os.fsync(descriptor)
        except OSError as error:
            assert error.errno == errno.EIO, error  # the loop ends only here
            return acknowledged, descriptor
        os.close(descriptor)
        acknowledged[path] = contents
    pytest.fail("more was acknowledged than the host has room for")


def assert_readable(acknowledged: dict[Path, bytes]) -> None:
    """Require every file as it was written, read from the filesystem and not from a cache."""
    for path, contents in acknowledged.items():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert file.read() == contents, path


def test_full_host_ends_all_writing_and_loses_nothing_acknowledged(
    small_host: Path, tmp_path: Path
) -> None:
    """Promise (C8): EIO now and at every later fsync; reads work; the last generation is intact."""
    mount = Mounted(tmp_path / "unused", size="1G")
    mount.image = small_host / "image.img"
    try:
        mount.start()
        early = os.open(mount.path / "early", os.O_CREAT | os.O_RDWR)
        os.write(early, b"at the beginning")
        os.fsync(early)
        require_success(run_command("snapshot", "create", mount.path, "kept"))
        acknowledged, failed = fill_host(mount.path)
        acknowledged[mount.path / "early"] = b"at the beginning"
        assert len(acknowledged) > 16, "the host was full too soon to prove anything"

        # Every caller is told each time that nothing will be durable any more.
        directory = os.open(mount.path, os.O_RDONLY)
        for descriptor in (failed, early, directory) * 3:
            assert error_of(lambda d=descriptor: os.fsync(d)) == errno.EIO
        assert error_of(lambda: os.pwrite(early, b"more", 0)) in (errno.EIO, errno.EROFS)
        assert error_of((mount.path / "new").mkdir) in (errno.EIO, errno.EROFS)
        assert error_of((mount.path / "early").unlink) in (errno.EIO, errno.EROFS)
        for words in (("sync", mount.path), ("snapshot", "create", mount.path, "late")):
            refused = run_command(*words)
            assert refused.returncode == 1, refused
            assert "No space left" in refused.stderr, refused
            assert len(refused.stderr.strip().splitlines()) == 1, refused

        # Files, snapshots and numbers can still be read.
        assert_readable(acknowledged)
        snapshot = mount.path / ".snapshots" / "kept"
        assert (snapshot / "early").read_bytes() == b"at the beginning"
        require_success(run_command("snapshot", "list", mount.path))
        require_success(run_command("df", mount.path))
        require_success(run_command("cowdu", mount.path))
        for descriptor in (failed, early, directory):
            os.close(descriptor)

        # umount reports that the image lacks the last commit.
        pid = mount.daemon_pid
        assert pid is not None
        ended = run_command("umount", mount.path)
        assert ended.returncode == 1, ended
        assert "without its last commit" in ended.stderr, ended
        assert wait_for_end(pid)
        mount.daemon_pid = None

        # The last generation is whole and readable without free space on the host.
        mount.check()
        require_success(run_command("mount", mount.image, mount.path, "-o", "ro"))
        assert_readable(acknowledged)
        require_success(run_command("umount", mount.path))

        grow(small_host)
        mount.remount()
        assert_readable(acknowledged)
        (mount.path / "with room").write_bytes(b"again" * 1000)
        require_success(run_command("sync", mount.path))
        mount.remount()
        assert (mount.path / "with room").read_bytes() == b"again" * 1000
        assert_readable(acknowledged)
        require_success(run_command("snapshot", "delete", mount.path, "kept", "--wait"))
        mount.umount()
        mount.check()
        assert json_of(run_command("info", mount.image, "--json"))["clean"] is True
    finally:
        trouble = mount.close()
    assert trouble is None
