"""Tables of the calls that make a file: mkdir, mkfifo, mknod, symlink, link, open with O_CREAT.

They say what the new file is like, who owns it, what changes in its directory, and what is refused.
"""

import errno
import os
import stat

import pytest

from tests.mounted.posix.engine import (
    ALICE,
    BOB,
    CAROL,
    IS_ROOT,
    KINDS,
    NO_DIRS,
    OTHERS,
    SELF,
    TEAM_GID,
    TYPES,
    Case,
    User,
)

CREATE = os.O_CREAT | os.O_WRONLY
DEVICE = os.makedev(259, 70_000)

MAKERS = {
    "mkdir": lambda path, mode: ("mkdir", path, mode),
    "mkfifo": lambda path, mode: ("mkfifo", path, mode),
    "mknod file": lambda path, mode: ("mknod", path, stat.S_IFREG | mode),
    "mknod fifo": lambda path, mode: ("mknod", path, stat.S_IFIFO | mode),
    "mknod socket": lambda path, mode: ("mknod", path, stat.S_IFSOCK | mode),
    "open": lambda path, mode: ("touch_open", path, CREATE, mode),
    "open anew": lambda path, mode: ("touch_open", path, CREATE | os.O_EXCL, mode),
    "open to read": lambda path, mode: ("touch_open", path, os.O_CREAT | os.O_RDONLY, mode),
}
if IS_ROOT:
    MAKERS["mknod block"] = lambda path, mode: ("mknod", path, stat.S_IFBLK | mode, DEVICE)
    MAKERS["mknod char"] = lambda path, mode: ("mknod", path, stat.S_IFCHR | mode, DEVICE)
KIND_OF = {
    "mkdir": "dir",
    "mkfifo": "fifo",
    "open": "file",
    "open anew": "file",
    "open to read": "file",
}


def kind_of(maker: str) -> str:
    return KIND_OF.get(maker) or maker.removeprefix("mknod ")


@pytest.mark.parametrize("maker", MAKERS)
def test_a_new_file_has_the_mode_asked_for_less_the_umask(case: Case, maker: str) -> None:
    """Promise: type, mode, owner, size and links of each new file are right; its times are now."""
    kind, make = kind_of(maker), MAKERS[maker]
    for umask in (0o000, 0o022, 0o077, 0o777, 0o070, 0o151):
        case.ok("umask", umask)
        for mode in (0o000, 0o755, 0o644, 0o777, 0o151, 0o070, 0o345, 0o1777):
            if umask:
                case.ok(*make("new", mode))
            else:
                with case.times(dot="mc"):
                    case.ok(*make("new", mode))
            expected = mode & ~umask
            if kind == "dir":
                case.has("new", nlink=2)
            else:
                case.has("new", nlink=1, size=0)
            case.has("new", kind=kind, mode=expected, uid=SELF.uid, gid=SELF.gid)
            case.has("new", rdev=DEVICE if kind in ("block", "char") else 0)
            case.has("new", blocks=0 if kind != "dir" else case.status("new")["blocks"])
            found = case.status("new")
            case.equal(found["atime_ns"], found["mtime_ns"], "atime and mtime")
            case.equal(found["ctime_ns"], found["mtime_ns"], "ctime and mtime")
            case.remove("new")
    case.ok("umask", 0)


@pytest.mark.parametrize("maker", MAKERS)
def test_what_exists_is_not_made_again(case: Case, maker: str) -> None:
    """Promise: EEXIST for every kind of existing file, even a dangling link; nothing changes."""
    for kind in KINDS:
        case.make(kind, "old")
        if maker in ("open", "open to read"):
            case.without("old")
            continue
        with case.times(dot="", old=""):
            case.no(errno.EEXIST, *MAKERS[maker]("old", 0o600))
        case.has("old", kind=kind)
        case.without("old")


def test_link_counts_of_directories_follow_their_subdirectories(case: Case) -> None:
    """Promise: a directory's nlink is 2 and one for each subdirectory; other files do not count."""
    case.make("dir", "d")
    for number in range(1, 6):
        case.ok("mkdir", f"d/{number}")
        case.has("d", nlink=2 + number)
    for kind in NO_DIRS:
        case.make(kind, f"d/{kind}")
        case.has("d", nlink=7)
    for number in range(5, 0, -1):
        case.ok("rmdir", f"d/{number}")
        case.has("d", nlink=1 + number)


def test_only_root_makes_devices(users: Case) -> None:
    """Promise: mknod of a device is EPERM for others; the numbers that root gives are kept."""
    case = users
    case.ok("chmod", ".", 0o777)
    for kind in ("block", "char"):
        for user in OTHERS:
            with case.times(dot=""):
                case.no(errno.EPERM, "mknod", "new", TYPES[kind] | 0o644, DEVICE, by=user)
            case.gone("new")
        for major, minor in ((0, 0), (1, 3), (7, 255), (8, 256), (259, 70_000), (4095, 1048575)):
            device = os.makedev(major, minor)
            case.ok("mknod", "new", TYPES[kind] | 0o640, device)
            case.has("new", kind=kind, mode=0o640, rdev=device)
            case.without("new")
    case.ok("mknod", "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    case.equal(case.ok("put", "null", b"gone"), 4)
    case.equal(case.ok("take", "null"), b"")
    case.has("null", size=0)
    for user in OTHERS:
        for kind in ("file", "fifo", "socket"):
            case.ok("mknod", "new", TYPES[kind] | 0o644, by=user)
            case.owned("new", 0o644, user)
            case.without("new")
        case.no(errno.EPERM, "mknod", "new", TYPES["dir"] | 0o755, by=user)
    case.no(errno.EPERM, "mknod", "new", TYPES["dir"] | 0o755)
    case.no(errno.EINVAL, "mknod", "new", TYPES["symlink"] | 0o755)
    case.gone("new")


@pytest.mark.parametrize("maker", [*MAKERS, "symlink", "make_socket"])
def test_a_new_file_belongs_to_its_maker_or_the_directorys_group(users: Case, maker: str) -> None:
    """Promise: a new file has its maker's uid and gid, in a set-group-ID directory that group."""
    case = users
    makers: tuple[User, ...] = (SELF, *OTHERS)
    if maker in ("mknod block", "mknod char"):
        makers = (SELF,)
    for owner, mode in (
        ((0, 0), 0o777),
        ((ALICE.uid, BOB.gid), 0o777),
        ((0, TEAM_GID), 0o2777),
        ((ALICE.uid, ALICE.gid), 0o2777),
        ((BOB.uid, 0), 0o3777),
    ):
        case.make("dir", "place", mode, owner)
        for user in makers:
            if maker == "symlink":
                case.ok("symlink", "nowhere", "place/new", by=user)
            elif maker == "make_socket":
                case.ok("make_socket", "place/new", by=user)
            else:
                case.ok(*MAKERS[maker]("place/new", 0o755), by=user)
            gid = owner[1] if mode & 0o2000 else user.gid
            expected = 0o777 if maker in ("symlink", "make_socket") else 0o755
            if maker == "mkdir" and mode & 0o2000:
                expected |= 0o2000
            case.owned("place/new", expected, (user.uid, gid))
            case.remove("place/new")
        case.remove("place")


def test_set_group_id_is_not_given_to_whom_the_group_is_not(users: Case) -> None:
    """Promise: in a set-group-ID directory, only members of its group make files with S_ISGID."""
    case = users
    case.make("dir", "place", 0o2777, (0, TEAM_GID))
    for user, kept in ((SELF, 0o2000), (ALICE, 0), (BOB, 0), (CAROL, 0o2000)):
        for mode in (0o2755, 0o2777, 0o6755):
            case.ok("touch_open", "place/new", CREATE, mode, by=user)
            case.owned("place/new", mode & ~0o2000 | kept, (user.uid, TEAM_GID))
            case.remove("place/new")
            case.ok("mknod", "place/new", stat.S_IFREG | mode, by=user)
            case.owned("place/new", mode & ~0o2000 | kept, (user.uid, TEAM_GID))
            case.remove("place/new")


# --- symlink --------------------------------------------------------------------------------------


def test_a_symbolic_link_is_kept_to_the_byte(case: Case) -> None:
    """Promise: a link keeps any target; mode 777, size its length; the directory's times move."""
    targets = ["x", "a/b", "/", "..", "ü" * 200, " ", "\n", "a" * 255, "b" * 1024]
    for target in targets:
        with case.times(dot="mc"):
            case.ok("symlink", target, "link")
        size = len(target.encode())
        case.has("link", kind="symlink", mode=0o777, nlink=1, size=size, uid=SELF.uid, gid=SELF.gid)
        case.equal(case.ok("readlink", "link"), target)
        with case.times(dot="", link=""):
            case.no(errno.EEXIST, "symlink", "other", "link")
        case.equal(case.ok("readlink", "link"), target)
        with case.times(dot="mc"):
            case.ok("unlink", "link")
    for kind in KINDS:
        case.make(kind, "old")
        with case.times(dot="", old=""):
            case.no(errno.EEXIST, "symlink", "target", "old")
            if kind != "symlink":
                case.no(errno.EINVAL, "readlink", "old")
        case.without("old")


def test_a_dangling_link_is_followed_by_open_alone(case: Case) -> None:
    """Promise: O_CREAT makes the link's target; mkdir, mknod and O_EXCL see the link itself."""
    case.ok("symlink", "target", "link")
    for number, call in (
        (errno.EEXIST, ("mkdir", "link")),
        (errno.EEXIST, ("mkfifo", "link")),
        (errno.EEXIST, ("touch_open", "link", CREATE | os.O_EXCL)),
        (errno.ELOOP, ("touch_open", "link", CREATE | os.O_NOFOLLOW)),
        (errno.ENOENT, ("touch_open", "link", os.O_RDONLY)),
        (errno.ENOENT, ("stat", "link")),
        (errno.ENOENT, ("chmod", "link", 0o600)),
        (errno.ENOENT, ("truncate", "link", 0)),
        (errno.ENOENT, ("chown", "link", -1, -1)),
        (errno.ENOENT, ("utimens", "link", None)),
    ):
        with case.times(dot=""):
            case.no(number, *call)
    case.gone("target")
    case.ok("touch_open", "link", CREATE, 0o640)
    case.has("target", kind="file", mode=0o640)
    case.has("link", kind="symlink")
    case.ok("symlink", "missing/target", "bad")
    case.no(errno.ENOENT, "touch_open", "bad", CREATE)


# --- link -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NO_DIRS)
def test_a_hard_link_is_the_same_file(case: Case, kind: str) -> None:
    """Promise: all names show one inode; the file's ctime and the directory's times move."""
    case.make(kind, "a")
    case.make("dir", "d")
    ino = case.status("a")["ino"]
    with case.times(dot="mc", a="c", d=""):
        case.ok("link", "a", "b")
    case.has("a", nlink=2, ino=ino, kind=kind)
    case.has("b", nlink=2, ino=ino, kind=kind)
    with case.times(dot="", a="c", d="mc"):
        case.ok("link", "b", "d/c")
    case.has("d/c", nlink=3, ino=ino)
    if kind != "symlink":
        case.ok("chmod", "d/c", 0o600)
        case.has("a", mode=0o600)
    with case.times(dot="", a="", b="", d=""):
        case.no(errno.EEXIST, "link", "a", "b")
        case.no(errno.EEXIST, "link", "a", "a")
        case.no(errno.EEXIST, "link", "a", "d")
    with case.times(dot="mc", b="c", d=""):
        case.ok("unlink", "a")
    case.gone("a")
    case.has("b", nlink=2, ino=ino)
    with case.times(dot="", b="c", d="mc"):
        case.ok("unlink", "d/c")
    case.has("b", nlink=1)


def test_what_cannot_be_linked(case: Case) -> None:
    """Promise: link is EPERM for a directory, EXDEV across filesystems, ENOENT for a lost file."""
    case.make("dir", "d")
    case.make("file", "f")
    with case.times(dot="", d="", f=""):
        case.no(errno.EPERM, "link", "d", "new")
        case.no(errno.EPERM, "link", ".", "new")
        case.no(errno.EXDEV, "link", "f", "/dev/shm/cowfs-posix-never")
        case.no(errno.EXDEV, "rename", "f", "/dev/shm/cowfs-posix-never")
        case.no(errno.EXDEV, "rename", "d", "/dev/shm/cowfs-posix-never")
        case.no(errno.ENOENT, "link", "missing", "new")
        case.no(errno.ENOENT, "link", "f", "missing/new")
    case.ok("symlink", "f", "s")
    case.ok("link_followed", "s", "followed")
    descriptor = case.ok("open", "f", os.O_RDONLY)
    case.ok("unlink", "f")
    case.ok("unlink", "followed")
    case.no(errno.ENOENT, "link_followed", f"/proc/self/fd/{descriptor}", "back")
    case.equal(case.ok("fstat", descriptor)["nlink"], 0)
    case.ok("close", descriptor)


def test_who_may_link_what(users: Case) -> None:
    """Promise: fs.protected_hardlinks holds: the owner may link, others need read and write."""
    case = users
    with open("/proc/sys/fs/protected_hardlinks", encoding="ascii") as setting:
        is_protected = setting.read().strip() == "1"
    case.ok("chmod", ".", 0o777)
    for mode, others_may in ((0o600, False), (0o666, True), (0o4777, False), (0o2775, False)):
        case.make("file", "f", mode, ALICE)
        for user in (ALICE, BOB):
            may = user is ALICE or others_may or not is_protected
            case.may(0 if may else errno.EPERM, "link", "f", "new", by=user)
            case.has("f", nlink=2 if may else 1)
            if may:
                case.remove("new")
        case.remove("f")
