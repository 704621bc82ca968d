"""Tables of utimensat and futimens: which times are set, by whom, and in what range."""

import errno
import os

import pytest

from tests.mounted.posix.engine import (
    ALICE,
    AT_SYMLINK_NOFOLLOW,
    BOB,
    CAROL,
    KINDS,
    SELF,
    UTIME_NOW,
    UTIME_OMIT,
    Case,
)

SECOND = 10**9
NOW, OMIT = (0, UTIME_NOW), (0, UTIME_OMIT)
SET = (1_234_567_890, 987_654_321)
SET_NS = 1_234_567_890_987_654_321


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("follows", [False, True])
def test_every_pair_of_times(case: Case, kind: str, follows: bool) -> None:
    """Promise: each time is set, set to now, or left alone on its own; ctime moves with any."""
    case.make(kind, "f")
    path, flags = "f", 0 if follows else AT_SYMLINK_NOFOLLOW
    if kind == "symlink" and follows:
        case.make("file", "nowhere")
        path = "nowhere"
    for atime in (SET, NOW, OMIT):
        for mtime in (SET, NOW, OMIT):
            case.ok("utimens", "f", [(5, 6), (7, 8)], flags)
            case.has(path, atime_ns=5 * SECOND + 6, mtime_ns=7 * SECOND + 8)
            moves = "".join(
                letter for letter, wanted in (("a", atime), ("m", mtime)) if wanted is NOW
            )
            keys = {"dot": "", path: moves + ("" if atime is OMIT and mtime is OMIT else "c")}
            if SET in (atime, mtime):
                case.ok("utimens", "f", [atime, mtime], flags)
            else:
                with case.times(**keys):
                    case.ok("utimens", "f", [atime, mtime], flags)
            if atime is SET:
                case.has(path, atime_ns=SET_NS)
            if mtime is SET:
                case.has(path, mtime_ns=SET_NS)
            if atime is OMIT:
                case.has(path, atime_ns=5 * SECOND + 6)
            if mtime is OMIT:
                case.has(path, mtime_ns=7 * SECOND + 8)
    case.wait_for_clock()
    with case.times(dot="", **{path: "amc"}):
        case.ok("utimens", "f", None, flags)


def test_a_descriptor_sets_times_as_a_name_does(case: Case) -> None:
    """Promise: futimens works like utimensat, also on an unlinked file and a directory."""
    case.make("file", "f")
    case.make("dir", "d")
    for path in ("f", "d"):
        descriptor = case.ok("open", path, os.O_RDONLY)
        case.ok("utimens", descriptor, [SET, (3, 4)])
        case.has(path, atime_ns=SET_NS, mtime_ns=3 * SECOND + 4)
        case.wait_for_clock()
        with case.times(**{path: "amc"}):
            case.ok("utimens", descriptor, None)
        case.remove(path)
        case.ok("utimens", descriptor, [(9, 10), (11, 12)])
        found = case.ok("fstat", descriptor)
        case.equal((found["atime_ns"], found["mtime_ns"]), (9 * SECOND + 10, 11 * SECOND + 12))
        case.ok("close", descriptor)


@pytest.mark.parametrize(
    "seconds",
    [0, 1, -1, -2, 1 - (1 << 31), (1 << 31) - 1, 1 << 31, (1 << 32) + 5, 9_214_646_400],
)
def test_far_times_come_back(case: Case, seconds: int) -> None:
    """Promise: times from 1901 to 2262, also below zero, come back to the nanosecond."""
    case.make("file", "f")
    for nanoseconds in (0, 1, 999_999_999, 500_000_000):
        case.ok("utimens", "f", [(seconds, nanoseconds), (seconds, nanoseconds)])
        expected = seconds * SECOND + nanoseconds
        case.has("f", atime_ns=expected, mtime_ns=expected)


def test_times_beyond_the_range_are_cut_off_and_not_wrapped(case: Case) -> None:
    """Promise: a year of 5 digits gives the last possible time, in 2262, never one in the past."""
    case.make("file", "f")
    largest, smallest = (1 << 63) - 1, -(1 << 63)
    if case.is_cowfs:  # the range of other filesystems differs
        for seconds in (9_223_372_037, 1 << 40, 1 << 62):
            case.ok("utimens", "f", [(seconds, 0), (seconds, 5)])
            case.has("f", atime_ns=largest, mtime_ns=largest)
        for seconds in (-9_223_372_038, -(1 << 40), -(1 << 62)):
            case.ok("utimens", "f", [(seconds, 0), (seconds, 5)])
            case.has("f", atime_ns=smallest, mtime_ns=smallest)
    for nanoseconds in (-1, 1_000_000_000, 2_000_000_000):
        with case.times(f=""):
            case.no(errno.EINVAL, "utimens", "f", [(1, nanoseconds), SET])
            case.no(errno.EINVAL, "utimens", "f", [SET, (1, nanoseconds)])
    case.no(errno.EINVAL, "utimens", "f", [SET, SET], 0x8000_0000 - 1)


@pytest.mark.parametrize("mode", [0o000, 0o444, 0o600, 0o622, 0o666, 0o066, 0o777])
def test_who_may_set_times(users: Case, mode: int) -> None:
    """Promise: only the owner sets a given time (EPERM); a writer may set now (else EACCES)."""
    case = users
    for kind in ("file", "dir", "fifo", "socket"):
        case.make(kind, "f", mode, ALICE)
        for user in (ALICE, BOB, CAROL, SELF):
            is_owner = user in (ALICE, SELF)
            shift = 3 if user is CAROL else 0
            given = 0 if is_owner else errno.EPERM
            now = 0 if is_owner or mode >> shift & 2 else errno.EACCES
            for number, times in (
                (now, None),
                (now, [NOW, NOW]),
                (given, [SET, SET]),
                (given, [NOW, OMIT]),
                (given, [OMIT, NOW]),
                (given, [NOW, SET]),
                (given, [SET, OMIT]),
                (0, [OMIT, OMIT]),
            ):
                if number or times == [OMIT, OMIT]:
                    with case.times(f=""):
                        case.may(number, "utimens", "f", times, by=user)
                else:
                    case.ok("utimens", "f", times, by=user)
        case.remove("f")
    case.ok("symlink", "nowhere", "l")
    case.ok("lchown", "l", ALICE.uid, ALICE.gid)
    case.ok("utimens", "l", [SET, SET], AT_SYMLINK_NOFOLLOW, by=ALICE)
    case.has("l", atime_ns=SET_NS, mtime_ns=SET_NS)
    case.no(errno.EPERM, "utimens", "l", [SET, SET], AT_SYMLINK_NOFOLLOW, by=BOB)
    case.no(errno.ENOENT, "utimens", "l", [SET, SET], by=ALICE)


def test_extended_attributes_move_the_change_time(case: Case) -> None:
    """Promise: setting and removing an xattr moves ctime alone; a refusal moves nothing."""
    case.make("file", "f")
    name = "user.x"
    with case.times(dot="", f="c"):
        case.ok("setxattr", "f", name, b"value")
    with case.times(f="c"):
        case.ok("setxattr", "f", name, b"other value")
    with case.times(f=""):
        case.equal(case.ok("getxattr", "f", name), b"other value")
        case.ok("listxattr", "f")
        case.no(errno.ENODATA, "getxattr", "f", "user.y")
        case.no(errno.ENODATA, "removexattr", "f", "user.y")
        case.no(errno.EEXIST, "setxattr", "f", name, b"x", os.XATTR_CREATE)
        case.no(errno.ENODATA, "setxattr", "f", "user.y", b"x", os.XATTR_REPLACE)
    with case.times(f="c"):
        case.ok("removexattr", "f", name)
