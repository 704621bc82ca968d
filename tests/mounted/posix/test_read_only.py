"""Tables of EROFS: a read-only mount and a snapshot refuse every change, and can all be read."""

import errno
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import run_command
from tests.conftest import Mounted, require_success
from tests.mounted.posix.engine import KINDS, RENAME_EXCHANGE, SELF, Caller, Case, Filesystem, User
from tests.mounted.posix.test_paths import MAKING, calls_on
from tests.sizes import HANG_SECONDS

LOOKING = {
    *("access", "chdir", "lstat", "stat", "listdir", "readlink", "open", "open not following"),
    *("open a directory", "getxattr", "listxattr", "statvfs"),
}


def all_is_refused(case: Case, place: str, *, by_kernel: bool) -> None:
    """Require that every call that would change something is EROFS, or fails as anywhere.

    Args:
        by_kernel: the mount is read-only. The kernel does not know that a snapshot in a writable
            mount is, and answers access(2) by the mode alone.
    """
    for name in ("file", "dir", "full", "link"):
        path = f"{place}/{name}"
        for call_name, call in calls_on(path).items():
            if call_name in LOOKING or call_name in ("link from", "rename from"):
                continue
            if call_name in MAKING and call_name != "open to create":
                continue  # EEXIST or EROFS, whichever the kernel checks first
            if name == "link" and call_name not in ("unlink", "lchown"):
                continue  # because the link is dangling
            if name == "file" and call_name == "rmdir":
                continue
            if name != "file" and (call_name.startswith("open") or call_name == "truncate"):
                continue
            if name in ("dir", "full") and call_name == "unlink":
                continue
            if call_name.startswith("rename exchange"):
                continue
            case.no(errno.EROFS, *call)
        case.no(errno.EROFS, "rename", path, f"{place}/new")
        case.no(errno.EROFS, "rename_with_flags", path, f"{place}/file2", RENAME_EXCHANGE)
    for call_name, call in calls_on(f"{place}/new").items():
        if call_name in MAKING and "link to" not in call_name and "rename" not in call_name:
            case.no(errno.EROFS, *call)
    case.no(errno.EROFS, "link", f"{place}/file", f"{place}/new")
    case.no(errno.EROFS, "utimens", f"{place}/file", [(1, 2), (3, 4)])
    case.no(errno.EROFS, "touch_open", f"{place}/file", os.O_RDWR)
    case.may(errno.EROFS if by_kernel else 0, "access", f"{place}/file", os.W_OK)
    case.ok("access", f"{place}/file", os.R_OK)
    case.equal(case.ok("take", f"{place}/file"), b"contents")
    case.equal(case.ok("listdir", place), ["dir", "file", "file2", "full", "link"])
    case.equal(case.ok("listdir", f"{place}/full"), ["inside"])
    case.equal(case.ok("readlink", f"{place}/link"), "nowhere")


def stock(folder: Path) -> None:
    for name in ("file", "file2"):
        (folder / name).write_bytes(b"contents")
    (folder / "dir").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "inside").touch()
    (folder / "link").symlink_to("nowhere")


@pytest.fixture
def read_only_place(users: Case) -> Iterator[str]:
    """A second, read-only mount of the case's directory."""
    folder = users.folder / "stocked"
    folder.mkdir()
    stock(folder)
    with tempfile.TemporaryDirectory(prefix="cowfs-posix-") as place:
        subprocess.run(["mount", "--bind", folder, place], check=True, timeout=HANG_SECONDS)
        try:
            words = ["mount", "-o", "remount,bind,ro", place]
            subprocess.run(words, check=True, timeout=HANG_SECONDS)
            yield place
        finally:
            subprocess.run(["umount", "-l", place], check=True, timeout=HANG_SECONDS)


def test_a_read_only_mount_refuses_every_change(users: Case, read_only_place: str) -> None:
    """Promise: every changing call is EROFS, nothing is changed, and all files can be read."""
    paths = ("stocked", "stocked/file", "stocked/dir", "stocked/full", "stocked/link")
    for path in ("file", "full"):
        users.ok("stat", f"{read_only_place}/{path}")
    before = {path: users.status(path) for path in paths}
    users.ok("chdir", read_only_place)
    all_is_refused(users, read_only_place, by_kernel=True)
    users.ok("chdir", str(users.folder))
    for path in paths:
        after = users.status(path)
        for field in ("mode", "nlink", "uid", "gid", "size", "ino", "mtime_ns", "ctime_ns"):
            users.equal(after[field], before[path][field], f"{path} {field}")


@pytest.mark.parametrize("kind", KINDS)
def test_reading_on_a_read_only_mount_works(users: Case, kind: str) -> None:
    """Promise: on a read-only mount files of every kind can be read and examined."""
    users.make(kind, "f")
    with tempfile.TemporaryDirectory(prefix="cowfs-posix-") as place:
        subprocess.run(["mount", "--bind", users.folder, place], check=True, timeout=HANG_SECONDS)
        try:
            subprocess.run(
                ["mount", "-o", "remount,bind,ro", place], check=True, timeout=HANG_SECONDS
            )
            users.has(f"{place}/f", kind=kind)
            if kind in ("fifo", "socket", "char", "block"):
                number = 0  # writing to it does not write to the filesystem
            else:
                number = errno.EROFS if kind != "symlink" else errno.ENOENT
            users.may(number, "access", f"{place}/f", os.W_OK)
            users.no(errno.EROFS, "lchown", f"{place}/f", 1, 1)
        finally:
            subprocess.run(["umount", "-l", place], check=True, timeout=HANG_SECONDS)


def test_a_snapshot_and_a_mount_with_ro_refuse_every_change() -> None:
    """Promise: cowfs itself gives EROFS below `.snapshots` and on `cowfs mount -o ro`."""
    caller = Caller(SELF)
    callers: dict[User, Caller] = {SELF: caller}
    with tempfile.TemporaryDirectory(prefix="cowfs-posix-") as name:
        mount = Mounted(Path(name), "64M")
        try:
            mount.start()
            stock(mount.path)
            place = mount.snapshot("past")
            # Nothing in a snapshot can get another name or lose one.
            case = Case(Filesystem("cowfs", mount.path, 0.0, 0), callers, mount.path)
            all_is_refused(case, str(place), by_kernel=False)
            for path in (str(place), f"{place}/file", f"{place}/dir"):
                case.no(errno.EROFS, "rename", path, "moved")
            case.no(errno.EROFS, "rename", "file", f"{place}/moved")
            case.no(errno.EROFS, "link", "file", f"{place}/linked")
            case.no(errno.EROFS, "mkdir", str(place.parent / "new"))
            case.no(errno.EROFS, "rmdir", str(place))
            case.ok("chdir", "/")
            mount.mount_options = ("-o", "ro")
            mount.remount()
            assert os.statvfs(mount.path).f_flag & os.ST_RDONLY
            read_only = Case(Filesystem("cowfs", mount.path, 0.0, 0), callers, mount.path)
            all_is_refused(read_only, str(mount.path), by_kernel=True)
            read_only.ok("chdir", "/")
        finally:
            caller.close()
            trouble = mount.close()
        assert trouble is None, trouble
        require_success(run_command("check", mount.image))
    assert not case.failures, case.report()
    assert not read_only.failures, read_only.report()
