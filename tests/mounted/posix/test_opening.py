"""Tables of open: every flag on every kind of file, and how reading and writing change times."""

import errno
import os

import pytest

from tests.mounted.posix.engine import ALICE, BOB, IS_ROOT, KINDS, Case

WRITING = {"to write": os.O_WRONLY, "to read and write": os.O_RDWR}
OLD = [(1_000_000_000, 5), (1_000_000_000, 7)]


@pytest.mark.parametrize("kind", KINDS)
def test_open_of_every_kind(case: Case, kind: str) -> None:
    """Promise: open gives EISDIR, ENXIO, ELOOP and ENOTDIR where open(2) says so."""
    case.make(kind, "f")
    wait = os.O_NONBLOCK
    is_device = kind in ("block", "char")
    reading = {"symlink": errno.ENOENT, "socket": errno.ENXIO}.get(kind, 0)
    writing = {"symlink": errno.ENOENT, "dir": errno.EISDIR}.get(kind, 0)
    if kind in ("socket", "fifo"):
        writing = errno.ENXIO  # a fifo without a reader
    if not is_device:
        case.may(reading, "touch_open", "f", os.O_RDONLY | wait)
        case.may(writing, "touch_open", "f", os.O_WRONLY | wait)
        case.may(0 if kind == "fifo" else writing, "touch_open", "f", os.O_RDWR | wait)
        truncating = 0 if kind == "fifo" else writing
        case.may(truncating, "touch_open", "f", os.O_RDWR | os.O_TRUNC | wait)
        nofollow = errno.ELOOP if kind == "symlink" else reading
        case.may(nofollow, "touch_open", "f", os.O_RDONLY | os.O_NOFOLLOW | wait)
    number = 0 if kind == "dir" else errno.ENOENT if kind == "symlink" else errno.ENOTDIR
    case.may(number, "touch_open", "f", os.O_RDONLY | os.O_DIRECTORY)
    both = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
    case.may(0 if kind == "dir" else errno.ENOTDIR, "touch_open", "f", both)
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY):
        case.no(errno.EEXIST, "touch_open", "f", flags | os.O_CREAT | os.O_EXCL | wait)
    if kind == "dir":
        for flags in (os.O_RDONLY | os.O_CREAT, os.O_WRONLY | os.O_CREAT, os.O_RDONLY | os.O_TRUNC):
            case.no(errno.EISDIR, "touch_open", "f", flags)
    path_only = os.O_PATH | os.O_NOFOLLOW
    case.ok("touch_open", "f", path_only)
    case.has("f", kind=kind, size=7 if kind == "symlink" else case.status("f")["size"])


def test_opening_changes_no_times(case: Case) -> None:
    """Promise: open and close move no times of the file or its directory, with O_CREAT neither."""
    case.write("f", b"contents")
    case.make("dir", "d")
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_APPEND, os.O_SYNC):
        for more in (0, os.O_CREAT):
            with case.times(dot="", f=""):
                case.ok("touch_open", "f", flags | more)
    with case.times(dot="", d=""):
        case.ok("touch_open", "d", os.O_RDONLY | os.O_DIRECTORY)
    case.has("f", size=8)


@pytest.mark.parametrize("size", [0, 1, 100, 4096, 100_000])
def test_truncating_by_open_marks_the_file_changed(case: Case, size: int) -> None:
    """Promise: O_TRUNC empties the file, and moves mtime and ctime even if it was empty."""
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY):
        for more in (0, os.O_CREAT):
            case.write("f", b"x" * size)
            ino = case.status("f")["ino"]
            with case.times(dot="", f="mc"):
                case.ok("touch_open", "f", flags | os.O_TRUNC | more)
            case.has("f", size=0, ino=ino, blocks=0)
            case.equal(case.ok("take", "f"), b"")
            case.without("f")


def test_writing_and_reading_move_their_own_times(case: Case) -> None:
    """Promise: a write moves mtime and ctime, a read atime (relatime); 0 bytes move nothing."""
    for size in (1, 100, 4096, 70_000):
        case.write("f", b"x" * size)
        descriptor = case.ok("open", "f", os.O_RDWR)
        with case.times(dot="", f="mc"):
            case.equal(case.ok("pwrite", descriptor, b"y" * size, 0), size)
        with case.times(f="mc"):
            case.equal(case.ok("pwrite", descriptor, b"y", size + 5000), 1)
        case.has("f", size=size + 5001)
        with case.times(f=""):
            case.equal(case.ok("pwrite", descriptor, b"", 10), 0)
        case.has("f", size=size + 5001)
        case.ok("utimens", "f", OLD)
        with case.times(dot="", f="a"):
            case.equal(case.ok("pread", descriptor, 1, 0), b"y")
        with case.times(f=""):  # relatime: already read since the last change
            case.equal(case.ok("pread", descriptor, 1, 0), b"y")
        case.ok("close", descriptor)
        noatime = case.ok("open", "f", os.O_RDONLY | os.O_NOATIME)
        case.ok("utimens", "f", OLD)
        case.ok("close", noatime)
        case.without("f")


def test_reading_a_directory_or_a_link_moves_its_access_time(case: Case) -> None:
    """Promise: readdir and readlink move atime as relatime has it: once after each change."""
    case.make("dir", "d")
    case.make("file", "d/f")
    case.ok("listdir", "d")
    case.make("file", "d/g")
    with case.times(dot="", d="a"):
        case.equal(case.ok("listdir", "d"), ["f", "g"])
    case.ok("symlink", "target", "l")
    case.ok("readlink", "l")
    case.ok("rename", "l", "m")
    with case.times(dot="", m="a"):
        case.equal(case.ok("readlink", "m"), "target")


def test_append_writes_at_the_end_whatever_the_offset(case: Case) -> None:
    """Promise: with O_APPEND two descriptors never overwrite, and write at the end after a cut."""
    one = case.ok("open", "f", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    other = case.ok("open", "f", os.O_RDWR | os.O_APPEND)
    for number in range(20):
        case.ok("write", one, b"one%02d" % number)
        case.ok("lseek", other, 0, os.SEEK_SET)
        case.ok("write", other, b"two%02d" % number)
    expected = b"".join(b"one%02dtwo%02d" % (number, number) for number in range(20))
    case.equal(case.ok("take", "f"), expected)
    case.ok("truncate", "f", 7)
    case.ok("write", one, b"end")
    case.equal(case.ok("take", "f"), expected[:7] + b"end")
    for descriptor in (one, other):
        case.ok("close", descriptor)


def test_a_descriptor_does_what_it_was_opened_for(case: Case) -> None:
    """Promise: writing to a reader or reading a writer is EBADF, ftruncate of a reader EINVAL."""
    case.write("f", b"contents")
    reader = case.ok("open", "f", os.O_RDONLY)
    writer = case.ok("open", "f", os.O_WRONLY)
    with case.times(f=""):
        case.no(errno.EBADF, "pwrite", reader, b"x", 0)
        case.no(errno.EBADF, "pread", writer, 1, 0)
        case.no(errno.EINVAL, "truncate", reader, 0)
        case.no(errno.EINVAL, "pread", reader, 1, -1)
        case.no(errno.EINVAL, "pwrite", writer, b"x", -1)
        case.no(errno.EINVAL, "lseek", reader, -1, os.SEEK_SET)
    case.make("dir", "d")
    directory = case.ok("open", "d", os.O_RDONLY)
    case.no(errno.EISDIR, "pread", directory, 1, 0)
    case.no(errno.EBADF, "pwrite", directory, b"x", 0)
    case.no(errno.EINVAL, "truncate", directory, 0)
    for descriptor in (reader, writer, directory):
        case.ok("close", descriptor)
    case.equal(case.ok("take", "f"), b"contents")


def test_a_descriptor_outlives_rights_and_names(users: Case) -> None:
    """Promise: only open checks permissions; a file made with mode 000 is open for its maker."""
    case = users
    case.ok("chmod", ".", 0o777)
    for mode in (0o000, 0o400, 0o200, 0o777):
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR
        descriptor = case.ok("open", "f", flags, mode, by=ALICE)
        case.owned("f", mode, ALICE)
        case.ok("pwrite", descriptor, b"mine", 0, by=ALICE)
        case.ok("chmod", "f", 0)
        case.ok("lchown", "f", 0, 0)
        case.equal(case.ok("pread", descriptor, 10, 0, by=ALICE), b"mine")
        case.ok("unlink", "f")
        case.equal(case.ok("pread", descriptor, 10, 0, by=ALICE), b"mine")
        case.ok("truncate", descriptor, 2, by=ALICE)
        case.ok("close", descriptor, by=ALICE)
    case.make("file", "theirs", 0o666, ALICE)
    case.no(errno.EPERM, "touch_open", "theirs", os.O_RDONLY | os.O_NOATIME, by=BOB)
    case.ok("touch_open", "theirs", os.O_RDONLY | os.O_NOATIME, by=ALICE)


def test_synchronous_flags_change_nothing_but_when(case: Case) -> None:
    """Promise: O_SYNC, O_DSYNC and O_DIRECT write the same bytes as a plain write."""
    for flags in (os.O_SYNC, os.O_DSYNC, os.O_SYNC | os.O_APPEND):
        case.write("f", b"begin")
        case.equal(case.ok("put", "f", b"BEG", os.O_WRONLY | flags), 3)
        expected = b"beginBEG" if flags & os.O_APPEND else b"BEGin"
        case.equal(case.ok("take", "f"), expected)
        case.without("f")
    case.write("f", b"x" * 10_000)
    with case.times(f="mc"):
        case.equal(case.ok("write_direct", "f", 4096), 4096)
    case.equal(case.ok("take", "f"), bytes(4096) + b"x" * 5904)
    case.has("f", size=10_000)


def test_a_running_program_is_not_written_to(users: Case) -> None:
    """Promise: ETXTBSY for writing to a running program, and for running one open for writing."""
    case = users
    with open("/bin/sleep", "rb") as program:
        case.write("sleep", program.read())
    case.ok("chmod", "sleep", 0o755)
    path = str(case.folder / "sleep")
    case.ok("start_program", path, "60")
    case.ok("await_sleep")  # the program has read what it needs of its file
    case.ok("take", "sleep")  # relatime: no later reading moves a time
    with case.times(sleep=""):
        case.no(errno.ETXTBSY, "touch_open", "sleep", os.O_WRONLY)
        case.no(errno.ETXTBSY, "touch_open", "sleep", os.O_RDWR)
        case.no(errno.ETXTBSY, "touch_open", "sleep", os.O_WRONLY | os.O_TRUNC)
        case.no(errno.ETXTBSY, "truncate", "sleep", 0)
    case.ok("touch_open", "sleep", os.O_RDONLY)
    case.ok("rename", "sleep", "moved")
    case.ok("link", "moved", "linked")
    case.ok("unlink", "moved")
    case.ok("end_program")
    descriptor = case.ok("open", "linked", os.O_WRONLY)
    path = str(case.folder / "linked")
    case.no(errno.ETXTBSY, "start_program", path, "0")
    case.ok("close", descriptor)
    case.ok("start_program", path, "60")
    case.ok("end_program")
    for mode, number in ((0o644, errno.EACCES), (0o744, errno.EACCES), (0o711, 0), (0o001, 0)):
        case.ok("chmod", "linked", mode)
        case.may(number, "start_program", path, "60", by=ALICE)
        if not number:
            case.ok("end_program", by=ALICE)
    assert IS_ROOT
