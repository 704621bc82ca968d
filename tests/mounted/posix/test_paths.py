"""Tables of how each call checks a path: its length, its components, and who may search it.

Every row is a call and every column a kind of path, so that no rule leaves out a call.
"""

import errno
import os
from typing import Any

import pytest

from tests.mounted.posix.engine import (
    ALICE,
    BOB,
    CAROL,
    NO_DIRS,
    OTHERS,
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    UTIME_NOW,
    Case,
)

NOW = [(0, UTIME_NOW), (0, UTIME_NOW)]
NAME_BYTES_MAX = 255
PATH_BYTES_MAX = 4095  # without the final zero byte

Call = tuple[Any, ...]


def calls_on(path: str) -> dict[str, Call]:
    """Every call, applied to this path. `file` and `dir` exist."""
    return {
        "access": ("access", path, os.F_OK),
        "chdir": ("chdir", path),
        "chmod": ("chmod", path, 0o600),
        "chown": ("chown", path, -1, -1),
        "getxattr": ("getxattr", path, "user.x"),
        "lchown": ("lchown", path, -1, -1),
        "link from": ("link", path, "free"),
        "link to": ("link", "file", path),
        "listdir": ("listdir", path),
        "listxattr": ("listxattr", path),
        "lstat": ("lstat", path),
        "mkdir": ("mkdir", path, 0o755),
        "mkfifo": ("mkfifo", path, 0o644),
        "mknod": ("mknod", path, 0o100644),
        "open": ("touch_open", path, os.O_RDONLY),
        "open to write": ("touch_open", path, os.O_WRONLY),
        "open to truncate": ("touch_open", path, os.O_WRONLY | os.O_TRUNC),
        "open to create": ("touch_open", path, os.O_CREAT | os.O_WRONLY, 0o644),
        "open to create anew": ("touch_open", path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644),
        "open not following": ("touch_open", path, os.O_RDONLY | os.O_NOFOLLOW),
        "open a directory": ("touch_open", path, os.O_RDONLY | os.O_DIRECTORY),
        "readlink": ("readlink", path),
        "removexattr": ("removexattr", path, "user.x"),
        "rename from": ("rename", path, "free"),
        "rename to": ("rename", "file", path),
        "rename directory to": ("rename", "dir", path),
        "rename noreplace": ("rename_with_flags", "file", path, RENAME_NOREPLACE),
        "rename exchange from": ("rename_with_flags", path, "file", RENAME_EXCHANGE),
        "rename exchange to": ("rename_with_flags", "file", path, RENAME_EXCHANGE),
        "rmdir": ("rmdir", path),
        "setxattr": ("setxattr", path, "user.x", b"x"),
        "stat": ("stat", path),
        "statvfs": ("statvfs", path),
        "symlink": ("symlink", "target", path),
        "truncate": ("truncate", path, 0),
        "unlink": ("unlink", path),
        "utimens": ("utimens", path, NOW),
    }


NAMES = tuple(calls_on(""))
# Calls that make the last component of the path, so it may be missing.
MAKING = {
    *("mkdir", "mkfifo", "mknod", "symlink", "link to", "open to create", "open to create anew"),
    *("rename to", "rename directory to", "rename noreplace"),
}
# Calls that do not follow a symbolic link in the last component.
NOT_FOLLOWING = {
    *("lchown", "link from", "lstat", "readlink", "rename from", "unlink", "rmdir"),
    *("rename exchange from", "rename exchange to", "open not following", *MAKING),
} - {"open to create"}


@pytest.fixture
def stocked(case: Case) -> Case:
    """A case with `file` and `dir`."""
    case.make("file", "file")
    case.make("dir", "dir")
    return case


def test_a_part_that_is_missing_is_enoent(stocked: Case) -> None:
    """Promise: a missing directory in the path, or an empty path, is ENOENT for every call."""
    for path in ("missing/x", "dir/missing/x", "./missing/../x", ""):
        for call in calls_on(path).values():
            stocked.no(errno.ENOENT, *call)
    for name, call in calls_on("dir/missing").items():
        if name not in MAKING:
            stocked.no(errno.ENOENT, *call)
    stocked.equal(stocked.ok("listdir", "."), ["dir", "file"])
    stocked.equal(stocked.ok("listdir", "dir"), [])


@pytest.mark.parametrize("kind", [kind for kind in NO_DIRS if kind != "symlink"])
def test_a_part_that_is_no_directory_is_enotdir(stocked: Case, kind: str) -> None:
    """Promise: a path component that is not a directory is ENOTDIR for every call."""
    stocked.make(kind, "part")
    stocked.ok("symlink", "part", "link")
    for path in ("part/x", "part/.", "part/..", "link/x", "dir/../part/x"):
        for call in calls_on(path).values():
            stocked.no(errno.ENOTDIR, *call)


def test_names_of_255_bytes_and_one_more(stocked: Case) -> None:
    """Promise: a name of 256 bytes is ENAMETOOLONG for every call, one of 255 is not."""
    for letter in ("n", "ü"):
        longest = (letter * 255).encode()[:NAME_BYTES_MAX].decode(errors="ignore").ljust(127, "x")
        longest += "x" * (NAME_BYTES_MAX - len(longest.encode()))
        too_long = longest + "y"
        for path in (too_long, f"{too_long}/x", f"dir/{too_long}"):
            for call in calls_on(path).values():
                stocked.no(errno.ENAMETOOLONG, *call)
        for name, call in calls_on(longest).items():
            if name not in MAKING:
                stocked.no(errno.ENOENT, *call)
        for kind in ("file", "dir", "symlink", "fifo"):
            stocked.make(kind, longest)
            stocked.has(longest, kind=kind)
            stocked.equal(stocked.ok("listdir", "."), sorted(["dir", "file", longest]))
            stocked.ok("rename", longest, f"dir/{longest}")
            stocked.gone(longest)
            stocked.has(f"dir/{longest}", kind=kind)
            stocked.ok("rmdir" if kind == "dir" else "unlink", f"dir/{longest}")
        stocked.make("file", "one")
        stocked.ok("link", "one", longest)
        stocked.has(longest, nlink=2)
        stocked.without("one", longest)


def test_paths_of_4095_bytes_and_one_more(stocked: Case) -> None:
    """Promise: a path of 4096 bytes is ENAMETOOLONG for every call, one of 4095 works."""
    longest = ("./" * 2048)[: PATH_BYTES_MAX - 1] + "f"
    assert len(longest) == PATH_BYTES_MAX
    for call in calls_on(f".{longest}").values():
        stocked.no(errno.ENAMETOOLONG, *call)
    for make, remove in (
        (("touch_open", longest, os.O_CREAT | os.O_WRONLY), "unlink"),
        (("mkdir", longest), "rmdir"),
        (("mkfifo", longest), "unlink"),
        (("symlink", "x", longest), "unlink"),
        (("link", "file", longest), "unlink"),
    ):
        stocked.ok(*make)
        stocked.ok("lstat", longest)
        stocked.no(errno.EEXIST, "mkdir", longest)
        stocked.ok("rename", longest, "f2")
        stocked.ok("rename", "f2", longest)
        stocked.ok(remove, longest)
    for size in (1, 59, 60, 61, 1000, 4095):
        target = "t" * size
        stocked.ok("symlink", target, "link")
        stocked.equal(stocked.ok("readlink", "link"), target)
        stocked.has("link", size=size, kind="symlink", mode=0o777, nlink=1)
        stocked.ok("unlink", "link")
    stocked.no(errno.ENAMETOOLONG, "symlink", "t" * 4096, "link")
    stocked.no(errno.ENOENT, "symlink", "", "link")
    stocked.gone("link")


def test_symbolic_links_that_lead_in_a_circle_are_eloop(stocked: Case) -> None:
    """Promise: a circle of links is ELOOP for every call, also as a last component it follows."""
    stocked.ok("symlink", "b", "a")
    stocked.ok("symlink", "a", "b")
    stocked.ok("symlink", "self/x", "self")
    for path in ("a/x", "self/x", "dir/../b/x"):
        for call in calls_on(path).values():
            stocked.no(errno.ELOOP, *call)
    for name, call in calls_on("a").items():
        if name not in NOT_FOLLOWING:
            stocked.no(errno.ELOOP, *call)
    stocked.no(errno.ELOOP, "touch_open", "a", os.O_RDONLY | os.O_NOFOLLOW)
    stocked.no(errno.EEXIST, "touch_open", "a", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    stocked.equal(stocked.ok("readlink", "a"), "b")


def test_40_symbolic_links_are_followed_and_41_are_not(case: Case) -> None:
    """Promise: as on Linux, 40 symbolic links in one path are followed, and 41 are ELOOP."""
    case.write("0", b"the end")
    for number in range(1, 43):
        case.ok("symlink", str(number - 1), str(number))
    for number in (1, 20, 39, 40):
        case.equal(case.ok("take", str(number)), b"the end")
    for number in (41, 42):
        case.no(errno.ELOOP, "take", str(number))
        case.no(errno.ELOOP, "stat", str(number))
        case.ok("lstat", str(number))


def test_a_slash_at_the_end_asks_for_a_directory(stocked: Case) -> None:
    """Promise: with a slash at its end a path names a directory, for every call."""
    exists = {"link to", "mkdir", "mkfifo", "mknod", "symlink", "rename noreplace"}
    for name, call in calls_on("file/").items():
        number = errno.EEXIST if name in exists else errno.ENOTDIR
        stocked.no(errno.EISDIR if name.startswith("open to create") else number, *call)
    stocked.ok("symlink", "dir", "link")
    stocked.has("link/", kind="dir")
    for number, call in (
        (errno.ENOENT, ("symlink", "x", "new/")),
        (errno.ENOENT, ("link", "file", "new/")),
        (errno.ENOENT, ("mkfifo", "new/")),
        (errno.ENOENT, ("mknod", "new/", 0o100644)),
        (errno.EISDIR, ("touch_open", "new/", os.O_CREAT | os.O_WRONLY)),
        (errno.ENOTDIR, ("rename", "file", "new/")),
        (errno.ENOTDIR, ("rmdir", "link")),
        (errno.ENOTDIR, ("rmdir", "link/")),
        (errno.ENOTDIR, ("unlink", "link/")),
    ):
        stocked.no(number, *call)
    stocked.ok("mkdir", "new/")
    stocked.has("new", kind="dir")
    stocked.ok("rename", "new/", "newer/")
    stocked.has("newer/", kind="dir")
    stocked.ok("rmdir", "newer/")


def test_dot_and_dot_dot_cannot_be_made_or_removed(stocked: Case) -> None:
    """Promise: for `.` and `..` each call gives its own error, and nothing changes."""
    making = ("mkdir", "mkfifo", "mknod", "symlink", "link to", "open to create anew")
    for path in (".", "..", "dir/.", "dir/..", "dir/../."):
        calls = calls_on(path)
        for name in making:
            stocked.no(errno.EEXIST, *calls[name])
        stocked.no(errno.EISDIR, *calls["unlink"])
        stocked.no(errno.EISDIR, *calls["open to create"])
        stocked.no(errno.EISDIR, *calls["open to write"])
        stocked.no(errno.EISDIR, *calls["truncate"])
        last = path.rpartition("/")[2]
        stocked.no(errno.EINVAL if last == "." else errno.ENOTEMPTY, *calls["rmdir"])
        for name in NAMES:
            if name == "rename noreplace":
                stocked.no(errno.EEXIST, *calls[name])
            elif name.startswith("rename"):
                stocked.no(errno.EBUSY, *calls[name])
    stocked.equal(stocked.ok("listdir", "."), ["dir", "file"])
    stocked.has("dir", nlink=2)


# --- who may search -------------------------------------------------------------------------------


def bits_for(user: object, mode: int) -> int:
    """Permission bits on alice's directory: the owner's, her group's for carol, or the others'."""
    return mode >> {ALICE: 6, CAROL: 3}.get(user, 0) & 7  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("mode", [0o000, 0o666, 0o711, 0o171, 0o117, 0o676, 0o767, 0o777])
def test_every_call_needs_search_permission(users: Case, mode: int) -> None:
    """Promise: without x for the caller on a directory of the path, every call is EACCES."""
    case = users
    case.ok("chmod", ".", 0o777)
    case.make("file", "file", 0o666, ALICE)
    case.make("dir", "dir", 0o777, ALICE)
    case.make("dir", "closed", 0o777, ALICE)
    case.make("file", "closed/inside", 0o777)
    case.make("dir", "closed/below", 0o777)
    case.ok("chmod", "closed", mode)
    for user in OTHERS:
        may_search = bits_for(user, mode) & 1
        for path in ("closed/inside", "closed/below/x", "closed/missing", "dir/../closed/x"):
            for call in calls_on(path).values():
                if not may_search:
                    case.no(errno.EACCES, *call, by=user)
        if may_search:
            case.ok("stat", "closed/inside", by=user)
            case.ok("lstat", "closed/below", by=user)
            case.no(errno.ENOENT, "lstat", "closed/missing", by=user)
            case.ok("take", "closed/inside", by=user)
            case.ok("put", "closed/inside", b"x", by=user)
    case.ok("stat", "closed/inside")  # root may search any directory


@pytest.mark.parametrize("mode", [0o000, 0o777, 0o755, 0o575, 0o557, 0o333, 0o300, 0o030, 0o003])
def test_names_change_only_with_write_permission(users: Case, mode: int) -> None:
    """Promise: making, removing and renaming need w and x on the directory; listing needs r."""
    case = users
    case.make("dir", "open", 0o777)
    case.make("dir", "place", 0o777, ALICE)
    for user in OTHERS:
        bits = bits_for(user, mode)
        may_write = 0 if bits & 3 == 3 else errno.EACCES
        case.write("place/file", b"x")
        case.ok("chmod", "place/file", 0o666)
        case.ok("lchown", "place/file", user.uid, user.gid)
        case.make("dir", "place/sub", 0o777, user)
        case.make("file", "open/mine", 0o666, user)
        case.ok("chmod", "place", mode)
        case.may(0 if bits & 4 else errno.EACCES, "listdir", "place", by=user)
        for making in (
            ("mkdir", "place/new", 0o755),
            ("mkfifo", "place/new", 0o644),
            ("mknod", "place/new", 0o100644),
            ("symlink", "x", "place/new"),
            ("link", "open/mine", "place/new"),
            ("touch_open", "place/new", os.O_CREAT | os.O_WRONLY),
            ("touch_open", "place/new", os.O_CREAT | os.O_EXCL | os.O_RDWR),
            ("make_socket", "place/new"),
        ):
            case.may(may_write, *making, by=user)
            if not may_write:
                case.ok("chmod", "place", 0o777)
                case.remove("place/new")
                case.ok("chmod", "place", mode)
            else:
                case.gone("place/new")
        # Opening an existing file needs no permission to write to the directory.
        case.may(0 if bits & 1 else errno.EACCES, "put", "place/file", b"y", by=user)
        exists = os.O_CREAT | os.O_WRONLY
        case.may(0 if bits & 1 else errno.EACCES, "touch_open", "place/file", exists, by=user)
        case.may(may_write, "rename", "place/file", "open/moved", by=user)
        if not may_write:
            case.ok("rename", "open/moved", "place/file", by=user)
            case.ok("rename_with_flags", "place/file", "place/sub", RENAME_EXCHANGE, by=user)
            case.ok("rename_with_flags", "place/file", "place/sub", RENAME_EXCHANGE, by=user)
        case.may(may_write, "rename", "open/mine", "place/file", by=user)
        case.may(may_write, "rmdir", "place/sub", by=user)
        case.may(may_write, "unlink", "place/file", by=user)
        case.ok("chmod", "place", 0o777)
        case.equal(case.ok("listdir", "place"), ["file", "sub"] if may_write else [])
        for path in case.ok("listdir", "place"):
            case.remove(f"place/{path}")
        for path in case.ok("listdir", "open"):
            case.remove(f"open/{path}")


@pytest.mark.parametrize("mode", [0o000, 0o400, 0o200, 0o040, 0o020, 0o004, 0o002, 0o666, 0o444])
def test_files_open_only_with_permission(users: Case, mode: int) -> None:
    """Promise: open and access allow each kind of access if the mode does for this user."""
    case = users
    case.ok("chmod", ".", 0o777)
    for kind in ("file", "dir"):
        case.make(kind, kind, mode, ALICE)
        case.ok("symlink", kind, f"{kind}-link")
        for user in OTHERS:
            bits = bits_for(user, mode)
            for path in (kind, f"{kind}-link"):
                for wanted in (os.R_OK, os.W_OK, os.X_OK, os.R_OK | os.W_OK):
                    refused = 0 if bits & wanted == wanted else errno.EACCES
                    case.may(refused, "access", path, wanted, by=user)
                reading = 0 if bits & 4 else errno.EACCES
                writing = 0 if bits & 2 else errno.EACCES
                if kind == "dir":
                    case.may(reading, "listdir", path, by=user)
                    continue
                case.may(reading, "touch_open", path, os.O_RDONLY, by=user)
                case.may(writing, "touch_open", path, os.O_WRONLY, by=user)
                case.may(reading or writing, "touch_open", path, os.O_RDWR, by=user)
                case.may(writing, "touch_open", path, os.O_WRONLY | os.O_TRUNC, by=user)
                both = os.O_RDONLY | os.O_TRUNC
                case.may(reading or writing, "touch_open", path, both, by=user)
                case.may(writing, "truncate", path, 0, by=user)
        case.ok("access", kind, os.R_OK | os.W_OK)  # root may read and write anything
    case.no(errno.EACCES, "access", "file", os.X_OK)
    case.ok("chmod", "file", mode | 0o010)
    case.ok("access", "file", os.X_OK)


def test_a_supplementary_group_counts_as_much_as_the_first(users: Case) -> None:
    """Promise: a member by a supplementary group has the group's permissions, and only these."""
    case = users
    case.make("file", "file", 0o060, BOB)
    case.ok("lchown", "file", BOB.uid, 64000)
    case.ok("take", "file", by=CAROL)
    case.ok("put", "file", b"x", by=CAROL)
    case.no(errno.EACCES, "take", "file", by=ALICE)
    case.no(errno.EACCES, "take", "file", by=BOB)  # the owner's bits apply to the owner alone
    case.ok("chmod", "file", 0o606)
    case.no(errno.EACCES, "take", "file", by=CAROL)
    case.ok("take", "file", by=ALICE)
