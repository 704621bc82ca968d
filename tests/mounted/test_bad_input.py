"""Promises that wrong input is refused in one line that says what is wrong, and changes nothing.

Exit status: 1 error, 2 usage, 10 the image is missing, 11 it is locked. Never a traceback.
"""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import Completed, run_command
from tests.conftest import (
    Mounted,
    is_mount_point,
    json_of,
    mounted,
    process_is_alive,
    require_clean,
    require_success,
)

pytestmark = [pytest.mark.mounted, pytest.mark.needs_cowfs]

ERROR, USAGE, IMAGE_MISSING, LOCKED = 1, 2, 10, 11


def assert_refused(result: Completed, *statuses: int, says: str | tuple[str, ...] = ()) -> None:
    """Fails unless a command was refused with such a status, in one line with these words."""
    story = f"{result.args}: {result.returncode}\n{result.stdout}\n{result.stderr}"
    assert "Traceback" not in result.stdout + result.stderr, story
    assert result.returncode in statuses, story
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, f"not one line: {story}"
    assert lines[0].isprintable(), f"control characters reach the terminal: {story!r}"
    for words in [says] if isinstance(says, str) else says:
        assert words in lines[0], f"does not say {words!r}: {story}"


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Path]:
    """A fresh image that is not mounted; whatever the test tried, it must be clean at the end."""
    image = tmp_path / "image.img"
    require_success(run_command("mkfs", image, "--size", "256M"))
    yield image
    require_clean(image)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """An empty directory where nothing may be mounted at the end."""
    place = tmp_path / "place"
    place.mkdir()
    yield place
    assert not is_mount_point(place), "what was refused is mounted all the same"


# ------------------------------------------------------------------- images


@pytest.mark.parametrize(
    "command", ["mount", "check", "info", "snapshot list", "rollback", "cowdu"]
)
def test_missing_image_is_refused(tmp_path: Path, place: Path, command: str) -> None:
    """Promise: every command says that the image does not exist, with status 10."""
    missing = tmp_path / "missing.img"
    more: dict[str, list[str | Path]] = {"mount": [place], "rollback": ["name"]}
    result = run_command(*command.split(), missing, *more.get(command, []))
    assert_refused(result, IMAGE_MISSING, says=str(missing))
    assert not missing.exists()


@pytest.mark.parametrize("command", ["mount", "check", "info", "snapshot list", "cowdu"])
@pytest.mark.parametrize("kind", ["empty", "short", "text", "zeros", "random"])
def test_file_that_is_no_image_is_refused(
    tmp_path: Path, place: Path, command: str, kind: str
) -> None:
    """Promise: a file that is no image is refused by name and left as it is."""
    file = tmp_path / "file"
    file.write_bytes(
        {
            "empty": b"",
            "short": b"short",
            "text": b"just a text\n" * 100_000,
            "zeros": bytes(8 << 20),
            "random": os.urandom(8 << 20),
        }[kind]
    )
    before = file.read_bytes()
    result = run_command(*command.split(), file, *([place] if command == "mount" else []))
    assert_refused(result, ERROR, says=str(file))
    assert file.read_bytes() == before


def test_directory_as_image_is_refused(tmp_path: Path, place: Path) -> None:
    """Promise: a directory in place of an image is an error, not a crash."""
    (tmp_path / "directory").mkdir()
    assert_refused(run_command("mount", tmp_path / "directory", place), ERROR)
    assert_refused(run_command("mkfs", tmp_path / "directory", "--size", "1G"), ERROR, USAGE)


@pytest.mark.parametrize("part", [0.5, 0.999, 0.0001])
def test_truncated_image_is_refused(tmp_path: Path, place: Path, part: float) -> None:
    """Promise: an image whose end is missing is not mounted, since reads would fail later."""
    image = tmp_path / "image.img"
    require_success(run_command("mkfs", image, "--size", "256M"))
    os.truncate(image, int(image.stat().st_size * part) // 4096 * 4096)
    assert_refused(run_command("mount", image, place), ERROR, says=str(image))
    assert run_command("check", image).returncode != 0


@pytest.mark.parametrize("size", ["0", "-1", "1", "4K", "100K", "many", "", "10X", "1.5.2G", "nan"])
def test_impossible_size_is_refused(tmp_path: Path, size: str) -> None:
    """Promise: mkfs makes no image when the size is too small or malformed."""
    image = tmp_path / "image.img"
    assert_refused(run_command("mkfs", image, f"--size={size}"), ERROR, USAGE)
    assert not image.exists()


def test_mkfs_does_not_overwrite_an_image(image: Path) -> None:
    """Promise: mkfs does not overwrite an existing image unless asked to."""
    before = json_of(run_command("info", image, "--json"))
    assert_refused(run_command("mkfs", image, "--size", "1G"), ERROR, USAGE, says=str(image))
    assert json_of(run_command("info", image, "--json")) == before


def test_unknown_words_are_refused(image: Path) -> None:
    """Promise: a mistyped command or option is a usage error."""
    assert_refused(run_command("snapshoot"), USAGE, says="snapshoot")
    assert_refused(run_command("check", image, "--not-an-option"), USAGE, says="--not-an-option")
    assert_refused(run_command("mount", image), USAGE)
    assert_refused(run_command("snapshot", "create", image), USAGE)


# ------------------------------------------------------------------- mount points


def test_mount_point_must_be_an_empty_directory(image: Path, tmp_path: Path, place: Path) -> None:
    """Promise: the error says why the mount point cannot be used."""
    missing, file = tmp_path / "missing", tmp_path / "file"
    file.write_bytes(b"")
    (place / "something").touch()
    assert_refused(run_command("mount", image, missing), ERROR, says=str(missing))
    assert_refused(run_command("mount", image, file), ERROR, says=str(file))
    assert_refused(run_command("mount", image, place), ERROR, says=str(place))
    assert not missing.exists()


def test_image_inside_its_own_mount_is_refused(tmp_path: Path) -> None:
    """Promise: an image below its own mount point is refused, as every access to it would hang."""
    place = tmp_path / "place"
    (place / "below").mkdir(parents=True)
    for image in (place / "image.img", place / "below" / "image.img"):
        require_success(run_command("mkfs", image, "--size", "256M"))
        assert_refused(run_command("mount", image, place), ERROR, says=str(image))
        assert not is_mount_point(place)
        require_clean(image)
        image.unlink()


def test_second_daemon_on_an_image_is_refused(mount: Mounted, place: Path) -> None:
    """Promise: two daemons never write to one image; the refusal names the first."""
    (mount.path / "file").write_bytes(b"untouched")
    for _ in range(2):
        result = run_command("mount", mount.image, place)
        assert_refused(result, LOCKED, says=str(mount.daemon_pid))
    alias = place.parent / "alias.img"
    alias.symlink_to(mount.image)
    assert_refused(run_command("mount", alias, place), LOCKED, says=str(mount.daemon_pid))
    result = run_command("mkfs", mount.image, "--size", "1G", "--force")
    assert_refused(result, LOCKED, USAGE)
    assert mount.daemon_pid is not None
    assert process_is_alive(mount.daemon_pid)
    assert (mount.path / "file").read_bytes() == b"untouched"


def test_mount_point_in_use_is_refused(mount: Mounted, image: Path) -> None:
    """Promise: nothing is mounted over a mount, not even an empty one."""
    assert_refused(run_command("mount", image, mount.path), ERROR, says=str(mount.path))
    assert run_command("info", mount.path).returncode == 0


def test_umount_of_what_is_not_mounted_is_refused(place: Path, tmp_path: Path) -> None:
    """Promise: umount, df and sync say so when the directory is not mounted."""
    for command in ("umount", "df", "sync"):
        assert_refused(run_command(command, place), ERROR, says=str(place))
        missing = tmp_path / "missing"
        assert_refused(run_command(command, missing), ERROR, IMAGE_MISSING, says=str(missing))


def test_busy_mount_is_not_unmounted(mount: Mounted) -> None:
    """Promise: umount refuses while a file is open, and works after it was closed."""
    with open(mount.path / "file", "wb") as file:
        file.write(b"still being written")
        assert_refused(run_command("umount", mount.path), ERROR, says=str(mount.path))
        assert is_mount_point(mount.path)
        file.write(b", and still")
    mount.remount()
    assert (mount.path / "file").read_bytes() == b"still being written, and still"


# ------------------------------------------------------------------- snapshots

BAD_NAMES = ["", ".", "..", "a/b", "/", "n" * 256, "new\nline", "bell\a", "\x1b[31mred", "del\x7f"]
BAD_NAMES += ["%", "a%b", "a,b"]  # they would read as ranges and lists of snapshots


@pytest.fixture(scope="module")
def mount_with_snapshot(module_mount: Mounted) -> Mounted:
    """The mount of all tests that change nothing, with the snapshot `good`."""
    require_success(run_command("snapshot", "create", module_mount.path, "good"))
    return module_mount


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_bad_snapshot_name_is_refused(mount_with_snapshot: Mounted, image: Path, name: str) -> None:
    """Promise: a name that no directory or no command could have is refused."""
    mount = mount_with_snapshot
    before = run_command("snapshot", "list", mount.path).stdout
    for target in (mount.path, image):
        assert_refused(run_command("snapshot", "create", target, name), ERROR, USAGE)
    result = run_command("snapshot", "rename", mount.path, "good", name)
    assert_refused(result, ERROR, USAGE)
    assert run_command("snapshot", "list", mount.path).stdout == before


def test_unusual_snapshot_names_work(mount: Mounted) -> None:
    """Promise: any other file name works, of 255 bytes or not in English."""
    names = ["n" * 255, "ü" * 127, "two words", "~", "#", "@", "a:b", "*", "日本語"]
    for name in names:
        (mount.path / "file").write_text(name, encoding="utf-8")
        require_success(run_command("snapshot", "create", mount.path, name))
    for name in names:
        file = mount.path / ".snapshots" / name / "file"
        assert file.read_text(encoding="utf-8") == name
    require_success(run_command("snapshot", "delete", mount.path, *names, "--wait"))


def test_duplicate_and_unknown_snapshots_are_refused(mount: Mounted) -> None:
    """Promise: no snapshot is replaced, and a command on an unknown snapshot is refused."""
    (mount.path / "file").write_bytes(b"first")
    require_success(run_command("snapshot", "create", mount.path, "one"))
    require_success(run_command("snapshot", "create", mount.path, "two"))
    (mount.path / "file").write_bytes(b"second")
    assert_refused(run_command("snapshot", "create", mount.path, "one"), ERROR, USAGE, says="one")
    result = run_command("snapshot", "rename", mount.path, "two", "one")
    assert_refused(result, ERROR, USAGE, says="one")
    for words in (
        ("snapshot", "delete", mount.path, "nobody"),
        ("snapshot", "delete", "-n", mount.path, "nobody"),
        ("snapshot", "delete", mount.path, "one", "nobody"),
        ("snapshot", "rename", mount.path, "nobody", "somebody"),
        ("rollback", mount.path, "nobody"),
        ("rollback", "-n", mount.path, "nobody"),
        ("cowdu", mount.path, "nobody"),
    ):
        assert_refused(run_command(*words), ERROR, USAGE, says="nobody")
    # Refused as a whole: if one of two names is wrong, the other is not deleted either.
    for name in ("one", "two"):
        assert (mount.path / ".snapshots" / name / "file").read_bytes() == b"first"
    assert (mount.path / "file").read_bytes() == b"second"
    assert_refused(run_command("undo", mount.path), ERROR)


# ------------------------------------------------------------------- rollback under open files


def test_rollback_under_an_open_file_is_refused_naming_it(mount: Mounted) -> None:
    """Promise: without --force, rollback refuses while a file is open for writing, and names it."""
    (mount.path / "folder").mkdir()
    file = mount.path / "folder" / "being written"
    file.write_bytes(b"at the snapshot")
    require_success(run_command("snapshot", "create", mount.path, "before"))
    with open(file, "r+b", buffering=0) as stream:
        stream.write(b"and now changed")
        result = run_command("rollback", mount.path, "before")
        assert_refused(result, ERROR, says="being written")
        assert file.read_bytes() == b"and now changed"

        require_success(run_command("rollback", mount.path, "before", "--force"))
        assert file.read_bytes() == b"at the snapshot"
        with pytest.raises(OSError) as caught:  # noqa: PT011  # the test checks errno below
            write_durably(stream.fileno(), b"into the past")
        assert caught.value.errno in (errno.ESTALE, errno.EROFS, errno.EBADF)
    assert file.read_bytes() == b"at the snapshot"
    # A file that is open only for reading does not prevent a rollback.
    with open(file, "rb"):
        require_success(run_command("rollback", mount.path, "before"))


def write_durably(descriptor: int, data: bytes) -> None:
    """Write and fsync: one of them must fail on a file of the old live volume."""
    os.write(descriptor, data)
    os.fsync(descriptor)


# ------------------------------------------------------------------- a full disk


def fill(file: Path) -> int:
    """Write until the filesystem is full; returns the number of bytes that fit."""
    written = 0
    chunk = os.urandom(1 << 20)
    descriptor = os.open(file, os.O_CREAT | os.O_WRONLY)
    try:
        while True:
            written += os.write(descriptor, chunk)
            if written % (8 << 20) == 0:
                os.fsync(descriptor)
    except OSError as error:
        assert error.errno == errno.ENOSPC, error  # the loop ends only here
    finally:
        try:
            os.close(descriptor)
        except OSError as error:
            assert error.errno == errno.ENOSPC, error
    return written


def test_full_filesystem_says_so_and_can_always_delete(tmp_path: Path) -> None:
    """Promise (C10): full means ENOSPC and nothing worse; files and snapshots can be deleted."""
    with mounted(tmp_path / "small", size="256M") as mount:
        kept = os.urandom(4 << 20)
        (mount.path / "kept").write_bytes(kept)
        (mount.path / "old").write_bytes(os.urandom(32 << 20))
        require_success(run_command("snapshot", "create", mount.path, "holds old"))
        (mount.path / "old").unlink()

        assert fill(mount.path / "big") > 100 << 20
        for number in range(10_000):
            try:
                (mount.path / f"small {number}").write_bytes(os.urandom(4096))
            except OSError as error:
                assert error.errno == errno.ENOSPC, error  # both outcomes are fine
                break
        else:
            pytest.fail("a full filesystem took 10,000 files more")
        assert (mount.path / "kept").read_bytes() == kept
        assert json_of(mount.cowfs("df", mount.path, "--json"))["available_bytes"] < 16 << 20

        # Deleting a snapshot needs no free space, and frees some.
        require_success(run_command("snapshot", "delete", mount.path, "holds old", "--wait"))
        assert fill(mount.path / "more") > 8 << 20

        # Full again: deleting files needs no free space either.
        (mount.path / "big").unlink()
        (mount.path / "more").unlink()
        require_success(run_command("sync", mount.path))
        assert json_of(mount.cowfs("df", mount.path, "--json"))["available_bytes"] > 100 << 20
        (mount.path / "again").write_bytes(kept)
        mount.remount()
        assert (mount.path / "again").read_bytes() == kept
        assert (mount.path / "kept").read_bytes() == kept
