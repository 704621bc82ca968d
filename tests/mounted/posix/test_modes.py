"""Tables of chmod and chown: who may change what, and which set-id bits are kept or cleared.

Also what clears set-id bits and file capabilities without being asked: writing, truncating, and
opening with O_TRUNC, by a user who may write but is not privileged.
"""

import errno
import os
from typing import Any

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
    Case,
    User,
)

CAPABILITY = "security.capability"
# cap_net_raw=ep, in the kernel's binary form (VFS_CAP_REVISION_2).
CAPABILITY_VALUE = bytes.fromhex("0100000200200000000000000000000000000000")
MODES = (0o000, 0o111, 0o644, 0o755, 0o1777, 0o2755, 0o4755, 0o6755, 0o7777, 0o4000, 0o2000)


@pytest.mark.parametrize("kind", KINDS)
def test_chmod_keeps_all_twelve_bits(case: Case, kind: str) -> None:
    """Promise: chmod keeps every mode; only ctime moves; a symbolic link is followed."""
    if kind == "symlink":
        case.make("file", "nowhere", 0o644)
    case.make(kind, "f")
    path = "nowhere" if kind == "symlink" else "f"
    for mode in MODES:
        with case.times(dot="", **{path: "c"}):
            case.ok("chmod", "f", mode)
        case.has(path, mode=mode)
    if kind == "symlink":
        case.has("f", mode=0o777)
    if kind in ("file", "dir"):
        descriptor = case.ok("open", "f", os.O_RDONLY)
        for mode in MODES:
            case.ok("chmod", descriptor, mode)
            case.has("f", mode=mode)
        case.ok("close", descriptor)


@pytest.mark.parametrize("kind", NO_DIRS)
def test_only_the_owner_and_root_change_a_mode(users: Case, kind: str) -> None:
    """Promise: chmod is EPERM for everybody else, whatever the mode allows; nothing changes."""
    case = users
    if kind == "symlink":
        return  # a symbolic link has no mode of its own
    case.make(kind, "f", 0o777, ALICE)
    for user in OTHERS:
        if user is ALICE:
            case.ok("chmod", "f", 0o640, by=user)
            case.has("f", mode=0o640)
            case.ok("chmod", "f", 0o777, by=user)
            continue
        with case.times(f=""):
            case.no(errno.EPERM, "chmod", "f", 0o600, by=user)
        case.has("f", mode=0o777)
    case.ok("chmod", "f", 0o711)
    case.has("f", mode=0o711)


def test_set_group_id_needs_membership(users: Case) -> None:
    """Promise: chmod by an owner who is not in the group drops S_ISGID, on directories too."""
    case = users
    for kind in ("file", "dir", "fifo"):
        for owner, gid, kept in (
            (ALICE, ALICE.gid, True),
            (ALICE, BOB.gid, False),
            (ALICE, 0, False),
            (CAROL, ALICE.gid, True),
            (CAROL, TEAM_GID, True),
            (CAROL, BOB.gid, False),
            (SELF, BOB.gid, True),
        ):
            case.make(kind, "f", 0o644, (owner.uid, gid))
            for mode in (0o2755, 0o6755, 0o2644, 0o3777):
                case.ok("chmod", "f", mode, by=owner)
                case.has("f", mode=mode if kept else mode & ~0o2000)
            case.remove("f")


def test_the_sticky_bit_is_kept_for_owners(users: Case) -> None:
    """Promise: on Linux any owner may set S_ISVTX on files and directories."""
    case = users
    for kind in ("file", "dir", "fifo", "socket"):
        case.make(kind, "f", 0o644, ALICE)
        for mode in (0o1644, 0o1777, 0o644):
            case.ok("chmod", "f", mode, by=ALICE)
            case.has("f", mode=mode)
        case.remove("f")


# --- chown ----------------------------------------------------------------------------------------

IDS = (0, 1, ALICE.uid, 4_000_000_000, -1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", ["chown", "lchown"])
def test_root_gives_files_to_anybody(users: Case, kind: str, call: str) -> None:
    """Promise: chown keeps uid and gid of 32 bits; -1 changes nothing; only ctime moves."""
    case = users
    if kind == "symlink" and call == "chown":
        case.make("file", "nowhere")
    case.make(kind, "f")
    path = "nowhere" if kind == "symlink" and call == "chown" else "f"
    mode = case.status(path)["mode"] & 0o7777
    owner, group = 0, 0
    for uid in IDS:
        for gid in IDS:
            with case.times(dot="", **{path: "c"}):
                case.ok(call, "f", uid, gid)
            owner, group = owner if uid == -1 else uid, group if gid == -1 else gid
            case.owned(path, mode, (owner, group))
    if path != "f":
        case.has("f", uid=0, gid=0)


def test_an_owner_gives_a_file_only_to_groups_of_his_own(users: Case) -> None:
    """Promise: EPERM for another uid, for a foreign group, and for callers but the owner."""
    case = users
    for kind in NO_DIRS:
        call = "lchown"
        case.make(kind, "f", 0o666, CAROL)
        for number, user, uid, gid in (
            (0, CAROL, -1, -1),
            (0, CAROL, CAROL.uid, -1),
            (0, CAROL, -1, ALICE.gid),
            (0, CAROL, CAROL.uid, TEAM_GID),
            (0, CAROL, -1, CAROL.gid),
            (errno.EPERM, CAROL, ALICE.uid, -1),
            (errno.EPERM, CAROL, 0, 0),
            (errno.EPERM, CAROL, -1, BOB.gid),
            (errno.EPERM, CAROL, -1, 0),
            (errno.EPERM, CAROL, CAROL.uid, BOB.gid),
            (errno.EPERM, ALICE, ALICE.uid, -1),
            (errno.EPERM, ALICE, -1, ALICE.gid),
            (errno.EPERM, BOB, CAROL.uid, -1),
            (errno.EPERM, BOB, -1, CAROL.gid),
        ):
            if number:
                before = case.status("f")
                with case.times(f=""):
                    case.no(number, call, "f", uid, gid, by=user)
                case.has("f", uid=before["uid"], gid=before["gid"])
            else:
                with case.times(f="c"):
                    case.ok(call, "f", uid, gid, by=user)
                case.has("f", uid=CAROL.uid)
                if gid != -1:
                    case.has("f", gid=gid)
        # As on every local filesystem, anybody may ask for a change to nothing.
        case.ok(call, "f", -1, -1, by=BOB)
        case.remove("f")


def after_chown(kind: str, mode: int) -> int:
    """The mode after chown: a directory keeps its bits, a file S_ISGID only without g+x."""
    if kind == "dir":
        return mode
    return mode & ~0o4000 & ~(0o2000 if mode & 0o010 else 0)


@pytest.mark.parametrize("kind", ["file", "dir", "fifo", "socket"])
def test_chown_takes_set_id_bits_away(users: Case, kind: str) -> None:
    """Promise: chown clears set-id bits, for root too, and also if the owner stays the same."""
    case = users
    for mode in (0o4755, 0o2755, 0o6755, 0o6777, 0o7711, 0o6744, 0o2644, 0o6000, 0o1777, 0o755):
        for user, uid, gid in (
            (SELF, 1, 1),
            (SELF, CAROL.uid, CAROL.gid),
            (SELF, -1, 5),
            (SELF, 5, -1),
            (CAROL, -1, CAROL.gid),
            (CAROL, CAROL.uid, ALICE.gid),
            (CAROL, CAROL.uid, -1),
        ):
            case.make(kind, "f", mode, CAROL)
            case.has("f", mode=mode)
            with case.times(f="c"):
                case.ok("chown", "f", uid, gid, by=user)
            case.has("f", mode=after_chown(kind, mode))
            case.remove("f")
        for user in (SELF, CAROL):
            case.make(kind, "f", mode, CAROL)
            case.ok("chown", "f", -1, -1, by=user)
            case.owned("f", after_chown(kind, mode), CAROL)
            case.remove("f")


def test_chown_of_a_file_whose_group_one_is_not_in(users: Case) -> None:
    """Promise: chown by an owner who is not in the group clears S_ISGID even without g+x."""
    case = users
    for mode in (0o2644, 0o6644, 0o2755):
        case.make("file", "f", mode, (CAROL.uid, BOB.gid))
        case.ok("chown", "f", -1, CAROL.gid, by=CAROL)
        case.owned("f", mode & 0o777, CAROL)
        case.remove("f")


# --- what a change of contents takes away ---------------------------------------------------------

CHANGES: dict[str, tuple[Any, ...]] = {
    "write": ("put", "f", b"changed"),
    "append": ("put", "f", b"changed", os.O_WRONLY | os.O_APPEND),
    "truncate": ("truncate", "f", 3),
    "truncate to more": ("truncate", "f", 100_000),
    "truncate to the same": ("truncate", "f", 6),
    "open with O_TRUNC": ("touch_open", "f", os.O_WRONLY | os.O_TRUNC),
    "open to read with O_TRUNC": ("touch_open", "f", os.O_RDONLY | os.O_TRUNC),
}
DIRECT = {"write with O_DIRECT": ("write_direct", "f", 4096)}


def after_change(user: User, mode: int, gid: int) -> int:
    if user is SELF:
        return mode  # because root is privileged
    is_member = gid == user.gid or gid in user.groups
    drops_group = mode & 0o010 or not is_member
    return mode & ~0o4000 & ~(0o2000 if drops_group else 0)


@pytest.mark.parametrize("change", [*CHANGES, *DIRECT])
@pytest.mark.parametrize("gid", [0, ALICE.gid])
def test_changing_a_file_takes_its_set_id_bits_away(users: Case, change: str, gid: int) -> None:
    """Promise: a change by an unprivileged user clears S_ISUID and S_ISGID, root's does not."""
    case = users
    for mode in (0o4777, 0o2777, 0o6777, 0o6666, 0o2666, 0o4666, 0o6767, 0o777, 0o7777):
        for user in (ALICE, BOB, CAROL, SELF):
            case.write("f", b"before")
            case.ok("lchown", "f", 0, gid)
            case.ok("chmod", "f", mode)
            case.has("f", mode=mode)
            case.ok(*{**CHANGES, **DIRECT}[change], by=user)
            case.has("f", mode=after_change(user, mode, gid))
            case.remove("f")


@pytest.mark.parametrize("change", [*CHANGES, *DIRECT, "chown", "chown to nobody else"])
def test_changing_a_file_takes_its_capability_away(users: Case, change: str) -> None:
    """Promise: a change of contents or owner removes `security.capability`, root's too."""
    case = users
    calls = {**CHANGES, **DIRECT}
    calls["chown"] = ("chown", "f", 5, 5)
    calls["chown to nobody else"] = ("chown", "f", -1, -1)
    for user in (SELF, ALICE):
        if change == "chown" and user is not SELF:
            continue
        for mode in (0o777, 0o6777):
            case.write("f", b"before")
            case.ok("lchown", "f", *((ALICE.uid, 0) if "chown" in change else (0, 0)))
            case.ok("chmod", "f", mode)
            case.ok("setxattr", "f", CAPABILITY, CAPABILITY_VALUE)
            case.equal(len(case.ok("getxattr", "f", CAPABILITY)), 20)
            case.has("f", mode=mode)
            case.ok(*calls[change], by=user)
            case.no(errno.ENODATA, "getxattr", "f", CAPABILITY)
            case.equal(CAPABILITY in (case.ok("listxattr", "f") or ()), False)
            case.remove("f")


def test_what_does_not_change_contents_takes_nothing_away(users: Case) -> None:
    """Promise: reads, links, renames, utimens, chmod and refused writes keep set-id bits."""
    case = users
    case.ok("chmod", ".", 0o777)
    case.write("f", b"before")
    case.ok("lchown", "f", ALICE.uid, ALICE.gid)
    case.ok("chmod", "f", 0o6755)
    case.ok("setxattr", "f", CAPABILITY, CAPABILITY_VALUE)
    for user, number, *call in (
        (BOB, 0, "take", "f"),
        (BOB, errno.EACCES, "put", "f", b"x"),
        (BOB, errno.EACCES, "truncate", "f", 0),
        (BOB, errno.EACCES, "touch_open", "f", os.O_WRONLY | os.O_TRUNC),
        (BOB, errno.EPERM, "chown", "f", BOB.uid, -1),
        (BOB, errno.EPERM, "chmod", "f", 0o777),
        (ALICE, 0, "touch_open", "f", os.O_WRONLY),
        (ALICE, 0, "utimens", "f", None),
        (ALICE, 0, "link", "f", "g"),
        (ALICE, 0, "rename", "g", "h"),
        (ALICE, 0, "unlink", "h"),
        (ALICE, 0, "chmod", "f", 0o6755),
    ):
        case.may(number, *call, by=user)  # type: ignore[arg-type]
        case.has("f", mode=0o6755)
        case.ok("getxattr", "f", CAPABILITY)


def test_without_root_the_owner_may_do_no_more(case: Case) -> None:
    """Promise: an ordinary user can give a file to nobody; a write clears its set-id bits."""
    if IS_ROOT:
        case.write("f", b"x")
        case.ok("chmod", "f", 0o6755)
        case.ok("put", "f", b"by root")
        case.has("f", mode=0o6755)
        return
    case.write("f", b"x")
    for uid, gid in ((0, -1), (-1, 0), (0, 0)):
        case.no(errno.EPERM, "chown", "f", uid, gid)
    for change in CHANGES.values():
        case.ok("chmod", "f", 0o6755)
        case.ok(*change)
        case.has("f", mode=0o755)
