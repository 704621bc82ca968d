"""Promises about POSIX ACLs on a mount: every decision is the same as on ext4 and tmpfs.

Tables run on all three; random tests run on cowfs and ext4 side by side and compare.
"""

import functools
import os
import random
import re
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cowfs.history.images import open_filesystem
from cowfs.storage.device import FileDevice
from tests.commands import run_command
from tests.conftest import Mounted, require_clean, require_success
from tests.model.behind import changing
from tests.mounted.peers import (
    ANN,
    BOB,
    CARL,
    DORA,
    KINDS,
    ROOT,
    USERS,
    User,
    as_user,
    needs_root,
    open_folder,
    open_mount,
    outcome,
    peer,
)
from tests.sizes import HANG_SECONDS, wait_until

pytestmark = [
    pytest.mark.mounted,
    pytest.mark.needs_cowfs,
    pytest.mark.xdist_group("acl"),
    needs_root,
]

ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"
NO_ID = 0xFFFFFFFF
UMASKS = (0o000, 0o022, 0o027, 0o077, 0o777)

Places = dict[str, Path]


@pytest.fixture(scope="module")
def places() -> Iterator[Places]:
    """One mounted filesystem of each kind."""
    with peer("cowfs") as cowfs, peer("ext4") as ext4, peer("tmpfs") as tmpfs:
        yield {"cowfs": cowfs, "ext4": ext4, "tmpfs": tmpfs}


@pytest.fixture(params=KINDS)
def folder(places: Places, request: pytest.FixtureRequest) -> Path:
    """An empty directory, on each kind of filesystem in turn."""
    place: Path = places[request.param] / re.sub(r"\W", "-", request.node.name)
    place.mkdir()
    place.chmod(0o755)
    return place


@pytest.fixture
def pair(places: Places, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """An empty directory on cowfs and one on ext4."""
    made = []
    for kind in ("cowfs", "ext4"):
        place = places[kind] / request.node.name
        place.mkdir()
        place.chmod(0o755)
        made.append(place)
    return made[0], made[1]


def acl(text: str) -> bytes:
    """The binary value of an ACL in short form: `u::rwx,u:1001:r,g::rx,m::rwx,o::`."""
    entries = []
    for word in text.split(","):
        kind, name, letters = word.split(":")
        tag = {"u": 2, "g": 8}[kind] if name else {"u": 1, "g": 4, "m": 16, "o": 32}[kind]
        bits = sum({"r": 4, "w": 2, "x": 1}[letter] for letter in letters)
        entries.append((tag, bits, int(name) if name else NO_ID))
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *each) for each in sorted(entries))


def acls(path: Path) -> dict[str, bytes]:
    """The stored ACLs by name."""
    names = os.listxattr(path, follow_symlinks=False)
    return {name: os.getxattr(path, name, follow_symlinks=False) for name in names}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def getfacl(folder: Path) -> str:
    """All ACLs below a folder, as getfacl(1) prints them."""
    words = ["getfacl", "--recursive", "--numeric", "."]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert not done.returncode, done.stderr
    parts = done.stdout.split("\n\n")
    return "\n\n".join(sorted(parts))


def programs(*words: str | os.PathLike[str], cwd: Path | None = None) -> str:
    done = subprocess.run(
        [os.fspath(word) for word in words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert not done.returncode, f"{words}: {done.stderr}"
    return done.stdout


# --- tables, on each filesystem -------------------------------------------------------------------

NAMED = "u::rwx,u:64001:rw,g::rx,g:64011:x,m::rwx,o::r"


@pytest.mark.parametrize(
    ("text", "shown", "is_stored"),
    [
        ("u::rwx,g::rx,o::r", 0o754, False),
        ("u::,g::,o::", 0o000, False),
        ("u::rw,g::rwx,o::x", 0o671, False),
        (NAMED, 0o774, True),
        ("u::rw,g::rwx,m::r,o::", 0o640, True),
        ("u::rw,u:64001:rwx,g::rwx,m::,o::", 0o600, True),
        ("u::,g::,g:64010:rwx,m::x,o::rwx", 0o017, True),
    ],
)
def test_an_access_acl_sets_the_mode(folder: Path, text: str, shown: int, is_stored: bool) -> None:
    """Promise: an ACL's owner, mask or group, and other are the mode; more than that is stored."""
    for number, old in enumerate((0o000, 0o777, 0o7654)):
        for path in (folder / f"file {number}", folder / f"directory {number}"):
            path.touch() if path.name[0] == "f" else path.mkdir()
            path.chmod(old)
            os.setxattr(path, ACCESS, acl(NAMED))  # an earlier ACL plays no part
            os.setxattr(path, ACCESS, acl(text))
            assert mode(path) == old & 0o7000 | shown
            assert acls(path) == ({ACCESS: acl(text)} if is_stored else {})
            assert outcome(lambda path=path: os.getxattr(path, ACCESS)) == (
                acl(text) if is_stored else "ENODATA"
            )


@pytest.mark.parametrize("new", [0o000, 0o777, 0o124, 0o642, 0o1750, 0o4711, 0o2770])
@pytest.mark.parametrize(
    ("text", "after"),
    [
        (NAMED, "u::{u},u:64001:rw,g::rx,g:64011:x,m::{g},o::{o}"),
        ("u::rw,g::rwx,m::r,o::", "u::{u},g::rwx,m::{g},o::{o}"),
    ],
)
def test_chmod_changes_the_access_acl(folder: Path, text: str, after: str, new: int) -> None:
    """Promise: chmod sets owner, mask and other of the ACL, and leaves the rest."""
    letters = ["".join(c for c, b in zip("rwx", (4, 2, 1), strict=True) if n & b) for n in range(8)]
    path = folder / "directory"
    path.mkdir()
    os.setxattr(path, ACCESS, acl(text))
    os.setxattr(path, DEFAULT, acl(NAMED))
    path.chmod(new)
    user, group, other = new >> 6 & 7, new >> 3 & 7, new & 7
    wanted = after.format(u=letters[user], g=letters[group], o=letters[other])
    assert acls(path) == {ACCESS: acl(wanted), DEFAULT: acl(NAMED)}
    assert mode(path) == new


BROKEN = {
    "nothing in it": struct.pack("<I", 1),
    "a version of its own": b"\3" + acl(NAMED)[1:],
    "cut": acl(NAMED)[:-1],
    "no mask": acl("u::rwx,u:64001:rw,g::rx,o::r"),
    "no owner": acl("g::rx,o::r"),
    "two others": acl("u::rwx,g::rx,o::r,o::r"),
    "not in order": acl("u::rwx,g::rx,o::r")[:4] + acl("g::rx,o::r")[4:] + acl("u::rwx")[4:],
    "permissions that are none": acl("u::rwx,g::rx,o::r").replace(b"\7\0", b"\10\0"),
    "a tag that is none": acl("u::rwx,g::rx,o::r").replace(b"\4\0\5", b"\3\0\5"),
    "a user that is nobody": acl(f"u::rwx,u:{NO_ID}:rw,g::rx,m::rx,o::r"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_no_acl_is_refused(folder: Path, what: str) -> None:
    """Promise: a malformed ACL is refused and nothing changes."""
    path = folder / "directory"
    path.mkdir()
    path.chmod(0o750)
    for name in (ACCESS, DEFAULT):
        number = outcome(lambda name=name: os.setxattr(path, name, BROKEN[what]))
        assert number == ("ENOTSUP" if "version" in what or "nothing" in what else "EINVAL")
    assert (mode(path), acls(path)) == (0o750, {})


def test_acls_are_refused_where_there_can_be_none(folder: Path) -> None:
    """Promise: only directories have default ACLs, symlinks none; only owners set a file's ACL."""
    file, link, fifo, ours = (folder / name for name in ("file", "link", "fifo", "ours"))
    file.touch()
    link.symlink_to("file")
    os.mkfifo(fifo)
    for path in (file, fifo):
        assert outcome(lambda path=path: os.setxattr(path, DEFAULT, acl(NAMED))) == "EACCES"
        assert outcome(lambda path=path: os.removexattr(path, DEFAULT)) is None
        os.setxattr(path, ACCESS, acl(NAMED))
        assert acls(path) == {ACCESS: acl(NAMED)}
    for name in (ACCESS, DEFAULT):
        for call in (
            lambda name=name: os.setxattr(link, name, acl(NAMED), follow_symlinks=False),
            lambda name=name: os.getxattr(link, name, follow_symlinks=False),
        ):
            assert outcome(call) == "ENOTSUP"
    ours.touch()
    os.chown(ours, ANN.uid, ANN.gid)
    ours.chmod(0o777)
    for user, answer in ((BOB, "EPERM"), (CARL, "EPERM"), (ANN, None)):
        assert as_user(user, lambda: os.setxattr(ours, ACCESS, acl(NAMED))) == answer
    for user, answer in ((BOB, "EPERM"), (CARL, "EPERM"), (ANN, None)):
        assert as_user(user, lambda: os.removexattr(ours, ACCESS)) == answer


def test_removing_acls(folder: Path) -> None:
    """Promise: removing an absent ACL succeeds; the mode stays as the ACL left it."""
    path = folder / "directory"
    path.mkdir()
    for name in (ACCESS, DEFAULT):
        os.removexattr(path, name)
        assert outcome(lambda name=name: os.getxattr(path, name)) == "ENODATA"
        os.setxattr(path, name, acl(NAMED))
        os.removexattr(path, name)
        assert acls(path) == {}
        os.setxattr(path, name, acl(NAMED))
        os.setxattr(path, name, b"\2\0\0\0")  # an ACL without entries means no ACL
        assert acls(path) == {}
    assert mode(path) == 0o774
    programs("setfacl", "--remove-all", "--remove-default", path)


@pytest.mark.parametrize("user", [ANN, BOB, CARL])
def test_set_group_id_goes_when_an_outsider_sets_an_acl(folder: Path, user: User) -> None:
    """Promise: S_ISGID stays only for root and members of the group, supplementary ones too."""
    path = folder / "directory"
    path.mkdir()
    for group in (64001, 64010, 64012):
        for name, value in ((ACCESS, NAMED), (ACCESS, "u::rwx,g::rx,o::r"), (DEFAULT, NAMED)):
            os.chown(path, user.uid, group)
            path.chmod(0o2775)
            assert (
                as_user(user, lambda name=name, value=value: os.setxattr(path, name, acl(value)))
                is None
            )
            is_member = group in (user.gid, *user.groups)
            assert bool(mode(path) & stat.S_ISGID) == (is_member or name == DEFAULT), (group, value)
    path.chmod(0o2775)
    os.setxattr(path, ACCESS, acl(NAMED))
    assert mode(path) & stat.S_ISGID


def test_setfacl_and_getfacl(folder: Path) -> None:
    """Promise: setfacl and getfacl work, and print what they print elsewhere."""
    path = folder / "directory"
    path.mkdir(mode=0o750)
    programs("setfacl", "-m", "u:64001:rwx,g:64011:r", path)
    programs("setfacl", "-m", "d:u:64002:rx,d:m:r", path)
    programs("setfacl", "-x", "g:64011", path)
    (path / "file").touch(mode=0o666)
    text = programs("getfacl", "--numeric", "--omit-header", "directory", cwd=folder)
    assert text.split("\n")[:-2] == [
        "user::rwx",
        "user:64001:rwx",
        "group::r-x",
        "mask::rwx",
        "other::---",
        "default:user::rwx",
        "default:user:64002:r-x\t#effective:r--",
        "default:group::r-x\t#effective:r--",
        "default:mask::r--",
        "default:other::---",
    ]
    assert programs("ls", "-ld", path)[10] == "+"
    programs("setfacl", "-b", path)
    assert programs("ls", "-ld", path)[10] != "+"
    programs("setfacl", "-R", "-m", "u:64003:rX", path)
    assert acls(path / "file")[ACCESS]


# --- inheritance ----------------------------------------------------------------------------------


def random_acl(choice: random.Random, *, is_sorted: bool = False) -> bytes:
    """A valid ACL; named entries are for the users and groups of the tests.

    Programs sort them by number (`is_sorted`); the kernel accepts any order.
    """
    bits = lambda: choice.choice([0, 4, 5, 6, 7, 7, choice.randrange(8)])  # noqa: E731
    uids = [64001, 64002, 64003, 64004, 0]
    gids = [64001, 64002, 64010, 64011, 64012, 0]
    entries = [(1, bits(), NO_ID), (4, bits(), NO_ID), (32, bits(), NO_ID)]
    if choice.random() < 0.7:
        entries.append((16, bits(), NO_ID))
        entries += [(2, bits(), uid) for uid in choice.sample(uids, choice.randrange(4))]
        entries += [(8, bits(), gid) for gid in choice.sample(gids, choice.randrange(4))]
    entries.sort(key=lambda entry: (entry[0], entry[2] * is_sorted))
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *each) for each in entries)


def create(path: Path, kind: str, mode: int) -> None:
    if kind == "file":
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
    elif kind == "nameless":
        descriptor = os.open(path.parent, os.O_TMPFILE | os.O_WRONLY, mode)
        try:
            # Python follows the link only if a directory is given.
            os.link(f"/proc/self/fd/{descriptor}", path, src_dir_fd=descriptor)
        finally:
            os.close(descriptor)
    elif kind == "directory":
        os.mkdir(path, mode)
    elif kind == "symlink":
        os.symlink("target", path)
    else:
        types = {"fifo": stat.S_IFIFO, "socket": stat.S_IFSOCK, "node": stat.S_IFREG}
        os.mknod(path, types[kind] | mode)


def state(path: Path) -> tuple[Any, ...]:
    status = path.lstat()
    return status.st_mode, status.st_uid, status.st_gid, acls(path)


KINDS_OF_FILES = (
    "file",
    "file",
    "directory",
    "directory",
    "fifo",
    "socket",
    "node",
    "symlink",
    "nameless",
)


def test_new_files_inherit_as_on_ext4(
    pair: tuple[Path, Path], record_property: Callable[[str, object], None]
) -> None:
    """Promise: for any default ACL, mode, umask, file type and creator, a file is as on ext4."""
    choice = random.Random(20)
    plans = []
    for number in range(400):
        default = random_acl(choice) if choice.random() < 0.85 else None
        umask = choice.choice(UMASKS)
        kind, user = choice.choice(KINDS_OF_FILES), choice.choice(USERS)
        if kind == "nameless":
            user = ROOT  # after a change of user /proc/self/fd cannot be followed
        asked = choice.choice([0o666, 0o777, 0o600, choice.randrange(0o10000)])
        parent_mode = choice.choice([0o777, 0o777, 0o2777])
        plans.append((number, default, umask, kind, user, asked))
        for root in pair:
            parent = root / f"{number}"
            parent.mkdir()
            parent.chmod(parent_mode)
            if default is not None:
                os.setxattr(parent, DEFAULT, default)

    def make_all(root: Path, caller: User) -> None:
        for number, _, umask, kind, user, asked in plans:
            if user == caller:
                os.umask(umask)
                create(root / f"{number}" / "made", kind, asked)

    for user in USERS:
        for root in pair:
            assert as_user(user, functools.partial(make_all, root, user)) is None
    compared = 0
    for plan in plans:
        parents = [root / f"{plan[0]}" for root in pair]
        ours, theirs = ((state(parent / "made"), state(parent)) for parent in parents)
        assert ours == theirs, plan
        compared += len(ours)
    assert getfacl(pair[0]) == getfacl(pair[1])
    record_property("count", ("inheritances compared with ext4", compared))


def test_a_tree_inherits_downwards_as_on_ext4(pair: tuple[Path, Path]) -> None:
    """Promise: default ACLs are inherited all the way down, by files of programs as well."""
    for root in pair:
        os.setxattr(root, DEFAULT, acl("u::rwx,u:64001:rwx,g::rx,g:64011:rw,m::rwx,o::"))
        before = os.umask(0o077)
        try:
            (root / "a/b/c").mkdir(parents=True)
            (root / "a/b/file").write_text("text")
            programs("cp", root / "a/b/file", root / "a/copy")
            programs("mkdir", "-p", "-m", "700", root / "a/x")
            programs("tar", "--create", "--file", root / "archive.tar", "-C", root, "a")
            (root / "out").mkdir()
            programs("tar", "--extract", "--file", root / "archive.tar", "-C", root / "out")
        finally:
            os.umask(before)
    assert getfacl(pair[0]) == getfacl(pair[1])


# --- decisions ------------------------------------------------------------------------------------


def decisions(root: Path, count: int) -> list[Any]:
    """The accesses that the caller has to each file and directory of a folder."""

    def opened(path: Path, flags: int) -> None:
        os.close(os.open(path, flags))

    def made(path: Path) -> None:
        os.mkdir(path)
        os.rmdir(path)

    found: list[Any] = []
    for number in range(count):
        file, directory = root / f"f{number}", root / f"d{number}"
        calls: list[Callable[[], Any]] = [
            lambda file=file: opened(file, os.O_RDONLY),
            lambda file=file: opened(file, os.O_WRONLY),
            lambda file=file: opened(file, os.O_RDWR),
            lambda file=file: os.access(file, os.X_OK),
            lambda file=file: os.access(file, os.R_OK | os.X_OK),
            lambda directory=directory: sorted(os.listdir(directory)),
            lambda directory=directory: (directory / "inside").lstat().st_mode,
            lambda directory=directory: made(directory / "new"),
            lambda directory=directory: os.setxattr(directory, "user.x", b"x"),
            lambda directory=directory: os.access(directory, os.W_OK),
        ]
        found += [outcome(call) for call in calls]
    return found


def change(path: Path, action: str, value: bytes, mode: int, owner: tuple[int, int]) -> None:
    if action == "acl":
        os.setxattr(path, ACCESS, value)
    elif action == "chmod":
        os.chmod(path, mode)
    elif action == "chown":
        os.chown(path, *owner)
    elif action == "remove":
        os.removexattr(path, ACCESS)


def test_every_user_may_do_what_ext4_lets_them(
    pair: tuple[Path, Path], record_property: Callable[[str, object], None]
) -> None:
    """Promise: decisions equal ext4's, also right after chmod, chown and changes of the ACL."""
    choice = random.Random(4)
    count, compared = 40, 0
    names = [f"{letter}{number}" for number in range(count) for letter in "fd"]
    for root in pair:
        for name in names:
            (root / name).touch() if name[0] == "f" else (root / name / "inside").mkdir(
                parents=True
            )
    for turn in range(5):
        for name in names:
            action = "acl" if not turn else choice.choice(["acl", "chmod", "chown", "remove", ""])
            value, bits = random_acl(choice), choice.randrange(0o1000)
            owner = (choice.choice(USERS).uid, choice.choice([0, 64001, 64010, 64011, 64012]))
            for root in pair:
                if not turn:
                    os.chown(root / name, *owner)
                change(root / name, action, value, bits, owner)
        for user in USERS:
            ours, theirs = (
                as_user(user, lambda root=root: decisions(root, count)) for root in pair
            )
            assert len(ours) == 10 * count
            assert ours == theirs, f"turn {turn}, {user}"
            compared += len(ours)
        assert getfacl(pair[0]) == getfacl(pair[1])
    record_property("count", ("decisions compared with ext4", compared))


# --- round trips ----------------------------------------------------------------------------------


def populate(root: Path) -> None:
    choice = random.Random(7)
    for number in range(12):
        directory = root / f"directory {number}"
        directory.mkdir()
        os.setxattr(directory, "user.note", b"n" * number * 100)
        for file in (directory / "one", directory / "two"):
            file.write_text(file.name * number)
            os.setxattr(file, ACCESS, random_acl(choice, is_sorted=True))
            os.setxattr(file, "user.empty", b"")
        os.setxattr(directory, DEFAULT, random_acl(choice, is_sorted=True))
        os.setxattr(directory, ACCESS, random_acl(choice, is_sorted=True))
        os.symlink("one", directory / "link")


def attributes(root: Path) -> dict[str, Any]:
    return {str(path.relative_to(root)): state(path) for path in sorted(root.rglob("*"))}


TAR = ("tar", "--acls", "--xattrs", "--xattrs-include=*", "--numeric-owner")


@pytest.mark.parametrize("program", ["cp", "rsync", "tar"])
def test_programs_carry_acls_over_and_back(pair: tuple[Path, Path], program: str) -> None:
    """Promise: cp -a, rsync -aAX and tar keep every ACL and attribute, ext4 to cowfs and back."""
    cowfs, ext4 = pair
    source, middle, back = ext4 / "source", cowfs / "copy", ext4 / "back"
    for directory in (source, middle, back):
        directory.mkdir()
    populate(source)
    for old, new in ((source, middle), (middle, back)):
        if program == "cp":
            programs("cp", "-a", f"{old}/.", new)
        elif program == "rsync":
            programs("rsync", "-aAX", f"{old}/", new)
        else:
            programs(*TAR, "--create", "--file", ext4 / "archive", "-C", old, ".")
            programs(*TAR, "--extract", "-p", "--file", ext4 / "archive", "-C", new)
    wanted = attributes(source)
    assert attributes(middle) == wanted
    assert attributes(back) == wanted
    assert len(wanted) == 12 * 4


# --- what only cowfs has --------------------------------------------------------------------------


def remounted(mount: Mounted, options: str) -> None:
    mount.mount_options = ("-o", options)
    mount.remount()


@pytest.fixture
def shared() -> Iterator[Mounted]:
    """A mount for one test that other users can reach."""
    with open_mount() as mount:
        yield mount


def test_noacl_and_noxattrs_leave_acls_alone(shared: Mounted) -> None:
    """Promise: with noacl or noxattrs, ACLs are hidden, refused, not enforced, and none is lost."""
    path, below = shared.path / "file", shared.path / "directory"
    path.write_text("text")
    path.chmod(0o600)
    below.mkdir()
    os.setxattr(path, ACCESS, acl("u::rw,u:64001:r,g::,m::r,o::"))
    os.setxattr(path, "user.x", b"x")
    os.setxattr(below, DEFAULT, acl(NAMED))
    assert as_user(ANN, path.read_text) == "text"
    assert as_user(BOB, path.read_text) == "EACCES"
    remounted(shared, "allow_other,noacl")
    assert as_user(ANN, path.read_text) == "EACCES"
    assert os.listxattr(path) == ["user.x"]
    for call in (
        lambda: os.getxattr(path, ACCESS),
        lambda: os.setxattr(path, ACCESS, acl(NAMED)),
        lambda: os.removexattr(path, ACCESS),
    ):
        assert outcome(call) == "ENOTSUP"
    path.chmod(0o620)
    (below / "made").mkdir(mode=0o700)
    remounted(shared, "allow_other,noxattrs")
    assert as_user(ANN, path.read_text) == "EACCES"
    assert outcome(lambda: os.getxattr(path, "user.x")) == "ENOTSUP"
    assert outcome(lambda: os.setxattr(path, ACCESS, acl(NAMED))) == "ENOTSUP"
    remounted(shared, "allow_other,acl")
    assert acls(path) == {ACCESS: acl("u::rw,u:64001:r,g::,m::w,o::"), "user.x": b"x"}
    assert acls(below / "made") == {}
    assert as_user(ANN, path.read_text) == "EACCES"


def test_acls_of_snapshots_hold(shared: Mounted) -> None:
    """Promise: a snapshot shows and enforces its own ACLs; rollback and undo restore ACLs."""
    root = shared.path
    path, below = root / "file", root / "directory"
    path.write_text("old")
    below.mkdir()
    (below / "inside").write_text("inside")
    before = acl("u::rw,u:64001:r,g::,m::r,o::")
    os.setxattr(path, ACCESS, before)
    os.setxattr(below, ACCESS, acl("u::rwx,g::,g:64010:x,m::x,o::"))
    os.setxattr(root, ACCESS, acl("u::rwx,u:64002:,g::rx,m::rx,o::rx"))
    past = shared.snapshot("past")
    os.setxattr(path, ACCESS, acl("u::rw,u:64002:rw,g::,m::rw,o::"))
    os.removexattr(below, ACCESS)
    below.chmod(0o700)
    os.removexattr(root, ACCESS)
    assert acls(past / "file") == {ACCESS: before}
    assert outcome(lambda: os.setxattr(past / "file", ACCESS, before)) == "EROFS"
    assert outcome(lambda: os.removexattr(past / "file", ACCESS)) == "EROFS"

    def read(name: str, at: int) -> str:
        with open(os.open(name, os.O_RDONLY, dir_fd=at)) as file:
            return file.read()

    # Only the owner may enter .snapshots: others use a descriptor that root opened.
    inside = os.open(past, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for user, first, second in (
            (ANN, "old", "EACCES"),
            (BOB, "EACCES", "EACCES"),
            (CARL, "EACCES", "inside"),
            (DORA, "EACCES", "inside"),
        ):
            assert as_user(user, lambda: read("file", inside)) == first, user
            assert as_user(user, lambda: read("directory/inside", inside)) == second, user
    finally:
        os.close(inside)
    assert as_user(BOB, path.read_text) == "old"
    assert as_user(ANN, path.read_text) == "EACCES"
    shared.rollback("past")
    assert as_user(BOB, lambda: os.listdir(root)) == "EACCES", "the kernel keeps an old ACL"
    assert as_user(ANN, path.read_text) == "old"
    assert acls(path) == {ACCESS: before}
    require_success(run_command("undo", root))
    assert as_user(ANN, path.read_text) == "EACCES"
    assert as_user(BOB, path.read_text) == "old"
    assert acls(root) == {}


def test_acls_survive_a_crash_after_fsync(shared: Mounted) -> None:
    """Promise: fsync makes ACLs, inherited ones too, durable with their modes (C2)."""
    root = shared.path
    os.setxattr(root, DEFAULT, acl(NAMED))
    below = root / "directory"
    below.mkdir(mode=0o777)
    file = below / "file"
    descriptor = os.open(file, os.O_CREAT | os.O_WRONLY, 0o666)
    os.setxattr(root, ACCESS, acl("u::rwx,u:64001:,g::rx,m::rx,o::rx"))
    below.chmod(0o751)
    wanted = [state(path) for path in (root, below, file)]
    os.fsync(descriptor)
    os.close(descriptor)
    shared.kill()
    require_clean(shared.image)
    shared.remount()
    assert [state(path) for path in (root, below, file)] == wanted


def test_a_malformed_acl_in_an_image_is_an_error_and_can_be_removed(shared: Mounted) -> None:
    """Promise: EIO for users whom the ACL would concern; nothing else is lost, check names it."""
    path, below = shared.path / "file", shared.path / "directory"
    path.write_text("text")
    path.chmod(0o664)
    below.mkdir()
    below.chmod(0o777)
    shared.umount()
    filesystem = open_filesystem(FileDevice(str(shared.image), writable=True), writable=True)
    volume = filesystem.live
    for name in (b"file", b"directory"):
        inode = volume.lookup(1, name)
        volume.setxattr(inode.ino, b"user.x", b"x")
        for attribute in (ACCESS, DEFAULT):
            with changing(volume):
                volume.xattrs.set(volume.get(inode.ino), attribute.encode(), b"\2\0\0\0not an ACL")
    filesystem.commit()
    filesystem.close()
    found = run_command("check", shared.image).stdout
    assert "system.posix_acl_access is malformed" in found
    assert "a regular file has the ACL system.posix_acl_default" in found
    shared.remount()
    assert path.read_text() == "text"
    for user in (ANN, BOB):
        assert as_user(user, path.read_text) == "EIO"
        assert as_user(user, lambda: os.mkdir(below / "new")) == "EIO"
    assert outcome(lambda: os.getxattr(path, ACCESS)) == "EIO"
    assert outcome(lambda: os.mkdir(below / "new")) == "EIO"
    assert outcome(lambda: path.chmod(0o600)) == "EIO"
    assert sorted(os.listxattr(path)) == [ACCESS, DEFAULT, "user.x"]
    for each in (path, below):
        for attribute in (ACCESS, DEFAULT):
            os.removexattr(each, attribute)
    assert as_user(ANN, path.read_text) == "text"
    assert as_user(ANN, lambda: os.mkdir(below / "new")) is None
    path.unlink()  # the kernel does not ask the daemon to remove the default ACL of a file


COUNTING = """
import collections, os, sys
from cowfs.daemon import operations
from cowfs.cli.main import main

counts = collections.Counter()
handler = operations.Operations.getxattr

async def counting(self, node, name, ctx):
    counts[name.decode(), "root" if node == 1 else "others"] += 1
    return await handler(self, node, name, ctx)

operations.Operations.getxattr = counting
sys.argv = ["cowfs", "mount", "-f", "-o", "allow_other", *sys.argv[1:]]
try:
    main()
finally:
    for key, count in sorted(counts.items()):
        print(*key, count, flush=True)
"""


@pytest.mark.parametrize("user", [ROOT, ANN])
def test_the_kernel_asks_for_acls_once_and_not_for_the_owner(user: User) -> None:
    """Promise: files without ACLs cost their owner no request, others one request for each file.

    The kernel may cache no ACL of the root directory: it made that inode before it knew that cowfs
    has ACLs. Users other than its owner cost one request for each path that they walk from there.
    """
    with open_folder() as folder:
        image, root = folder / "test.img", folder / "mnt"
        root.mkdir()
        require_success(run_command("mkfs", image, "--size", "64M"))
        words = [sys.executable, "-c", COUNTING, str(image), str(root)]
        daemon = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        walks = 0
        try:
            wait_until(lambda: os.path.ismount(root), "it is not mounted")
            root.chmod(0o755)
            (root / "directory").mkdir(mode=0o755)
            files = [root / "directory" / f"{number}" for number in range(100)]
            for file in files:
                file.touch(mode=0o644)

            def look() -> int:
                walks = 0
                for _ in range(3):
                    for file in files:
                        file.stat()
                        os.close(os.open(file, os.O_RDONLY))
                        os.access(file, os.R_OK)
                        walks += 3
                return walks

            walks = as_user(user, look)
        finally:
            require_success(run_command("umount", root))
            output = daemon.communicate(timeout=HANG_SECONDS)[0]
        asked = {"root": 0, "others": 0}
        for line in output.splitlines():
            name, place, count = line.split()
            assert name in (ACCESS, DEFAULT, "security.capability"), line
            if name != "security.capability":
                asked[place] += int(count)
        if user is ROOT:
            assert asked == {"root": 0, "others": 0}
        else:
            assert len(files) <= asked["others"] <= len(files) + 5, "the counter does not count"
            assert asked["root"] <= walks + 5
        require_clean(image)
