"""Tables of rename: every kind over every kind, three flags, sticky directories, permissions."""

import errno

import pytest

from tests.mounted.posix.engine import (
    ALICE,
    BOB,
    CAROL,
    KINDS,
    NO_DIRS,
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    RENAME_WHITEOUT,
    SELF,
    Case,
    User,
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_renamed_file_is_the_same_file(case: Case, kind: str) -> None:
    """Promise: inode, mode and nlink stay; ctime and both directories' times move, no others."""
    case.make("dir", "from")
    case.make("dir", "to")
    case.make(kind, "from/old")
    before = case.status("from/old")
    with case.times(dot="", **{"from": "mc"}, to=""):
        case.ok("rename", "from/old", "from/new")
    case.gone("from/old")
    start = case.status("from/new")
    with case.times(dot="", **{"from": "mc"}, to="mc"):
        case.ok("rename", "from/new", "to/newer")
    case.gone("from/new")
    after = case.status("to/newer")
    for field in ("ino", "mode", "nlink", "uid", "gid", "size", "rdev", "atime_ns", "mtime_ns"):
        case.equal(after[field], before[field], field)
    case.equal(after["ctime_ns"] > start["ctime_ns"] >= before["ctime_ns"], True, "ctime")
    case.has("from", nlink=2)
    case.has("to", nlink=3 if kind == "dir" else 2)
    case.equal(case.ok("listdir", "to"), ["newer"])
    case.equal(case.ok("listdir", "from"), [])


@pytest.mark.parametrize("old", KINDS)
@pytest.mark.parametrize("new", KINDS)
@pytest.mark.parametrize("flags", [0, RENAME_NOREPLACE, RENAME_EXCHANGE])
def test_every_kind_over_every_kind(case: Case, old: str, new: str, flags: int) -> None:
    """Promise: errors are as in rename(2); a replaced file loses a link, a refused one none."""
    case.make("dir", "a")
    case.make("dir", "b")
    case.make(old, "a/old")
    case.make(new, "b/new")
    inos = case.status("a/old")["ino"], case.status("b/new")["ino"]
    number = 0
    if flags == RENAME_NOREPLACE:
        number = errno.EEXIST
    elif not flags and old == "dir" and new != "dir":
        number = errno.ENOTDIR
    elif not flags and old != "dir" and new == "dir":
        number = errno.EISDIR
    if new != "dir":
        case.ok("link", "b/new", "other")
    if number:
        with case.times(a="", b="", a__old="", b__new=""):
            case.no(number, "rename_with_flags", "a/old", "b/new", flags)
    else:
        with case.times(a="mc", b="mc", **({"other": "c"} if new != "dir" else {})):
            case.ok("rename_with_flags", "a/old", "b/new", flags)
    if number:
        case.has("a/old", kind=old, ino=inos[0])
        case.has("b/new", kind=new, ino=inos[1])
    elif flags == RENAME_EXCHANGE:
        case.has("a/old", kind=new, ino=inos[1])
        case.has("b/new", kind=old, ino=inos[0])
    else:
        case.gone("a/old")
        case.has("b/new", kind=old, ino=inos[0])
    if new != "dir":
        case.has("other", ino=inos[1], nlink=1 if not number and not flags else 2)
    for place in ("a", "b"):
        names = case.ok("listdir", place)
        dirs = [name for name in names if case.status(f"{place}/{name}")["mode"] >> 12 == 4]
        case.has(place, nlink=2 + len(dirs))
        for name in dirs:
            parent = case.ok("stat", f"{place}/{name}/..")
            case.equal(parent["ino"], case.status(place)["ino"], "..")


@pytest.mark.parametrize("kind", KINDS)
def test_a_directory_replaces_only_an_empty_one(case: Case, kind: str) -> None:
    """Promise: ENOTEMPTY over a directory with any kind of file in it."""
    case.make("dir", "old")
    case.make("file", "old/kept")
    case.make("dir", "new")
    case.make(kind, "new/inside")
    with case.times(dot="", old="", new="", new__inside=""):
        case.no(errno.ENOTEMPTY, "rename", "old", "new")
    case.has("new/inside", kind=kind)
    case.remove("new/inside")
    case.has(".", nlink=4)
    with case.times(dot="mc"):
        case.ok("rename", "old", "new")
    case.has(".", nlink=3)
    case.has("new/kept", kind="file")
    case.gone("old")


def test_a_directory_does_not_go_below_itself(case: Case) -> None:
    """Promise: EINVAL into its own subtree at any depth, also by exchange; nothing changes."""
    case.make("dir", "a")
    case.make("dir", "a/b")
    case.make("dir", "a/b/c")
    with case.times(dot="", a="", a__b="", a__b__c=""):
        for new in ("a/x", "a/b/x", "a/b/c/x", "a/b/../x", "./a/x"):
            case.no(errno.EINVAL, "rename", "a", new)
            case.no(errno.EINVAL, "rename_with_flags", "a", new, RENAME_NOREPLACE)
        # If the target exists, the other calls must still give their own errors.
        case.no(errno.EINVAL, "rename", "a", "a/b")
        case.no(errno.EINVAL, "rename_with_flags", "a", "a/b", RENAME_EXCHANGE)
        case.no(errno.EINVAL, "rename_with_flags", "a", "a/b/c", RENAME_EXCHANGE)
        case.no(errno.EINVAL, "rename_with_flags", "a/b/c", "a", RENAME_EXCHANGE)
        case.no(errno.ENOTEMPTY, "rename", "a/b/c", "a")
        case.no(errno.ENOTEMPTY, "rename", "a/b", "a")
    case.ok("rename", "a/b/c", "c")
    case.ok("rename", "a/b", "c/b")
    case.has("c", nlink=3)
    case.has("a", nlink=2)


@pytest.mark.parametrize("kind", NO_DIRS)
def test_names_of_one_file_stay_both(case: Case, kind: str) -> None:
    """Promise: a rename onto another name of the same file does nothing; NOREPLACE is EEXIST."""
    case.make(kind, "a")
    case.ok("link", "a", "b")
    case.make("dir", "d")
    case.ok("link", "a", "d/c")
    with case.times(dot="", a="", d=""):
        case.ok("rename", "a", "b")
        case.ok("rename", "a", "d/c")
        case.ok("rename", "a", "a")
        case.no(errno.EEXIST, "rename_with_flags", "a", "b", RENAME_NOREPLACE)
        case.no(errno.EEXIST, "rename_with_flags", "a", "a", RENAME_NOREPLACE)
    case.has("a", nlink=3)
    case.equal(case.ok("listdir", "."), ["a", "b", "d"])
    case.make("dir", "e")
    with case.times(dot="", e=""):
        case.ok("rename", "e", "e")


def test_flags_that_are_refused(case: Case) -> None:
    """Promise: EINVAL for unknown flags and for flags that exclude each other."""
    case.make("file", "a")
    case.make("file", "b")
    both = RENAME_NOREPLACE | RENAME_EXCHANGE
    with case.times(dot="", a="", b=""):
        for flags in (both, 8, 0x80, RENAME_WHITEOUT | RENAME_EXCHANGE):
            case.no(errno.EINVAL, "rename_with_flags", "a", "b", flags)
        case.no(errno.ENOENT, "rename_with_flags", "a", "missing", RENAME_EXCHANGE)
        case.no(errno.ENOENT, "rename_with_flags", "missing", "a", RENAME_EXCHANGE)
        case.no(errno.ENOENT, "rename_with_flags", "missing", "c", RENAME_NOREPLACE)
    case.equal(case.ok("listdir", "."), ["a", "b"])


@pytest.mark.parametrize("kind", ["file", "dir", "symlink"])
@pytest.mark.parametrize("replaced", ["", "empty"])
def test_whiteout_is_left_under_the_old_name(case: Case, kind: str, replaced: str) -> None:
    """Promise: RENAME_WHITEOUT moves the file and leaves a device 0:0 without permissions."""
    case.make("dir", "from")
    case.make("dir", "to")
    case.make(kind, "from/a")
    if replaced:
        case.make("dir" if kind == "dir" else "file", "to/b")
    else:
        case.no(errno.ENOENT, "rename_with_flags", "from/none", "to/b", RENAME_WHITEOUT)
    moved = case.status("from/a")["ino"]
    flags = RENAME_WHITEOUT if replaced else RENAME_WHITEOUT | RENAME_NOREPLACE
    case.ok("rename_with_flags", "from/a", "to/b", flags)
    case.has("to/b", kind=kind, ino=moved)
    case.has("from/a", kind="char", mode=0, rdev=0, nlink=1, uid=0, size=0)
    case.has("from", nlink=2)
    case.no(errno.EEXIST, "rename_with_flags", "to/b", "from/a", flags | RENAME_NOREPLACE)
    case.ok("unlink", "from/a")
    case.equal(case.ok("listdir", "from"), [])
    case.equal(case.ok("listdir", "to"), ["b"])


@pytest.mark.parametrize("flags", [0, RENAME_EXCHANGE])
@pytest.mark.parametrize("kind", ["file", "dir", "symlink"])
@pytest.mark.parametrize("directory_owner", [SELF, ALICE, BOB], ids=lambda user: user.name)
@pytest.mark.parametrize("target_owner", [None, SELF, ALICE, BOB], ids=str)
def test_sticky_directories_guard_both_names(
    users: Case, flags: int, kind: str, directory_owner: User, target_owner: User | None
) -> None:
    """Promise: EPERM for who may not take the old name, or may not replace the new one.

    The test tries every owner of the file, of the two sticky directories and of the target.
    """
    case = users
    case.make("dir", "from", 0o777)
    case.make("dir", "to", 0o1777, directory_owner)
    for file_owner in (ALICE, BOB):
        for user in (ALICE, BOB, CAROL, SELF):
            for source in ("from", "to"):
                case.make(kind, f"{source}/old", 0o777, file_owner)
                if target_owner is not None:
                    case.make(kind, "to/new", 0o777, target_owner)

                def is_guarded(owner: User, user: User = user) -> bool:
                    return user not in (SELF, owner, directory_owner)

                number = 0
                if flags == RENAME_EXCHANGE and target_owner is None:
                    number = errno.ENOENT
                elif (source == "to" and is_guarded(file_owner)) or (
                    target_owner is not None and is_guarded(target_owner)
                ):
                    number = errno.EPERM
                case.may(number, "rename_with_flags", f"{source}/old", "to/new", flags, by=user)
                case.equal(
                    [len(case.ok("listdir", place)) for place in ("from", "to")],
                    [
                        (source == "from") * (number != 0 or flags == RENAME_EXCHANGE),
                        (source == "to") * (number != 0 or flags == RENAME_EXCHANGE)
                        + (target_owner is not None or (number == 0 and not flags)),
                    ],
                    f"names after {user.name} renamed {file_owner.name}'s",
                )
                for place in ("from", "to"):
                    for name in case.ok("listdir", place):
                        case.remove(f"{place}/{name}")


def test_a_directory_changes_its_parent_only_for_who_may_write_to_it(users: Case) -> None:
    """Promise: moving a directory changes its `..`, so it needs write permission on it (EACCES)."""
    case = users
    case.ok("chmod", ".", 0o777)
    case.make("dir", "to", 0o777)
    for mode, number in ((0o755, errno.EACCES), (0o777, 0), (0o757, 0), (0o775, errno.EACCES)):
        case.make("dir", "moving", mode, ALICE)
        case.ok("rename", "moving", "renamed", by=BOB)  # the parent stays the same
        case.may(number, "rename", "renamed", "to/moved", by=BOB)
        case.remove("to/moved" if not number else "renamed")


def test_dead_ends_of_rename(case: Case) -> None:
    """Promise: a missing source is ENOENT for any target; a final slash asks for a directory."""
    for kind in KINDS:
        case.make(kind, "new")
        with case.times(dot="", new=""):
            case.no(errno.ENOENT, "rename", "missing", "new")
        case.has("new", kind=kind)
        case.without("new")
    case.make("dir", "d")
    case.make("file", "f")
    with case.times(dot="", d="", f=""):
        case.no(errno.ENOTDIR, "rename", "d", "f")
        case.no(errno.EISDIR, "rename", "f", "d")
        case.no(errno.ENOTDIR, "rename", "f/", "g")
        case.no(errno.ENOTDIR, "rename", "d/", "f")
        case.no(errno.ENOTDIR, "rename", "f", "d/")
    case.ok("symlink", "d", "l")
    case.ok("rename", "l", "m")
    case.has("m", kind="symlink")
    case.has("d", kind="dir")
