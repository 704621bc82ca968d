"""Tables of unlink and rmdir: what can be removed, by whom, and what files and times show then."""

import errno
import os

import pytest

from tests.mounted.posix.engine import (
    ALICE,
    BOB,
    CAROL,
    IS_ROOT,
    KINDS,
    NO_DIRS,
    SELF,
    TYPES,
    Case,
    User,
)


@pytest.mark.parametrize("kind", NO_DIRS)
def test_unlink_takes_away_one_name(case: Case, kind: str) -> None:
    """Promise: unlink removes any file but a directory; other names stay, and nlink counts them."""
    case.make("dir", "d")
    case.make(kind, "d/f")
    with case.times(dot="", d="mc"):
        case.ok("unlink", "d/f")
    case.gone("d/f")
    case.equal(case.ok("listdir", "d"), [])
    case.make(kind, "d/f")
    case.ok("link", "d/f", "g")
    with case.times(dot="", d="mc", g="c"):
        case.ok("unlink", "d/f")
    case.has("g", nlink=1, kind=kind)
    with case.times(dot="", g=""):
        case.no(errno.ENOTDIR, "rmdir", "g")
        case.no(errno.ENOENT, "unlink", "d/f")
    case.has("g", kind=kind)


def test_unlink_of_a_directory_is_eisdir(case: Case) -> None:
    """Promise: unlink of a directory is EISDIR, empty or not, for root too; nothing changes."""
    case.make("dir", "d")
    with case.times(dot="", d=""):
        case.no(errno.EISDIR, "unlink", "d")
    case.make("file", "d/f")
    with case.times(dot="", d="", d__f=""):
        case.no(errno.EISDIR, "unlink", "d")
    case.has("d", kind="dir", nlink=2)


@pytest.mark.parametrize("kind", KINDS)
def test_rmdir_takes_only_what_is_empty(case: Case, kind: str) -> None:
    """Promise: rmdir is ENOTEMPTY with any kind of file inside, and works once that is removed."""
    case.make("dir", "d")
    case.make(kind, "d/inside")
    with case.times(dot="", d="", d__inside=""):
        case.no(errno.ENOTEMPTY, "rmdir", "d")
    case.has("d/inside", kind=kind)
    case.remove("d/inside")
    with case.times(dot="mc"):
        case.ok("rmdir", "d")
    case.gone("d")
    case.has(".", nlink=2)
    with case.times(dot=""):
        case.no(errno.ENOENT, "rmdir", "d")


def test_a_removed_directory_that_is_open_takes_nothing(case: Case) -> None:
    """Promise: a removed directory that is open has nlink 0, and making a file in it is ENOENT."""
    case.make("dir", "d")
    descriptor = case.ok("open", "d", os.O_RDONLY | os.O_DIRECTORY)
    case.ok("rmdir", "d")
    case.equal(case.ok("fstat", descriptor)["nlink"], 0)
    case.equal(case.ok("list_open", descriptor), [])
    case.no(errno.ENOENT, "open_at", "x", os.O_CREAT | os.O_WRONLY, descriptor)
    case.no(errno.ENOENT, "mkdir_at", "x", descriptor)
    case.ok("close", descriptor)


def test_an_unlinked_file_that_is_open_goes_on(case: Case) -> None:
    """Promise: an open file without a name has nlink 0; it is read, written, cut and changed."""
    case.write("f", b"before")
    descriptor = case.ok("open", "f", os.O_RDWR)
    case.ok("unlink", "f")
    found = case.ok("fstat", descriptor)
    case.equal(found["nlink"], 0)
    case.equal(found["size"], 6)
    case.equal(case.ok("pread", descriptor, 100, 0), b"before")
    case.equal(case.ok("pwrite", descriptor, b"after it went", 4), 13)
    case.equal(case.ok("pread", descriptor, 100, 0), b"befoafter it went")
    case.ok("truncate", descriptor, 5)
    case.ok("chmod", descriptor, 0o600)
    case.ok("utimens", descriptor, [(5, 0), (6, 0)])
    case.ok("fsync", descriptor)
    found = case.ok("fstat", descriptor)
    case.equal((found["size"], found["mode"] & 0o7777), (5, 0o600))
    case.equal(found["mtime_ns"], 6 * 10**9)
    case.make("file", "f")
    case.has("f", size=0, nlink=1)
    case.equal(case.ok("fstat", descriptor)["size"], 5)
    case.ok("close", descriptor)


def test_rmdir_of_a_mount_point_is_ebusy(case: Case) -> None:
    """Promise: rmdir of the filesystem's root is EBUSY; its contents stay."""
    root = str(case.filesystem.root)
    case.no(errno.EBUSY, "rmdir", root)
    case.no(errno.EISDIR, "unlink", root)
    case.no(errno.EBUSY, "rename", root, f"{root}2")


# --- sticky directories ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("directory_owner", [SELF, ALICE, BOB], ids=lambda user: user.name)
@pytest.mark.parametrize("file_owner", [SELF, ALICE, BOB], ids=lambda user: user.name)
def test_a_sticky_directory_guards_its_files(
    users: Case, kind: str, directory_owner: User, file_owner: User
) -> None:
    """Promise: EPERM for all but root and the owners of the file and of the directory.

    Without the sticky bit the same users may, since everybody may write to the directory.
    """
    case = users
    call = "rmdir" if kind == "dir" else "unlink"
    case.ok("chmod", ".", 0o777)
    for mode in (0o1777, 0o777):
        case.make("dir", "d", mode, directory_owner)
        for user in (ALICE, BOB, CAROL, SELF):
            case.make(kind, "d/f", 0o777, file_owner)
            may = not mode & 0o1000 or user in (directory_owner, file_owner, SELF)
            refused = 0 if may else errno.EPERM
            if not may:
                with case.times(d="", d__f=""):
                    case.no(refused, call, "d/f", by=user)
                    case.no(refused, "rename", "d/f", "d/g", by=user)
                    case.no(refused, "rename", "d/f", "moved", by=user)
                case.has("d/f", kind=kind)
            else:
                if kind != "dir" or user in (SELF, file_owner) or not mode & 0o1000:
                    case.ok("rename", "d/f", "d/g", by=user)
                    case.ok("rename", "d/g", "d/f", by=user)
                case.ok(call, "d/f", by=user)
                case.gone("d/f")
            if not may:
                case.remove("d/f")
        case.remove("d")


def test_what_these_tables_take_for_granted() -> None:
    """The tables list all kinds of files, so that no row is missing."""
    assert len(KINDS) == (7 if IS_ROOT else 5)
    assert len(TYPES) == 7
