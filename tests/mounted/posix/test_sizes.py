"""Tables of truncate and ftruncate, of sizes and st_blocks, and of statvfs."""

import errno
import os

import pytest

from tests.mounted.posix.engine import ALICE, BOB, KINDS, Case

SIZES = (0, 1, 511, 512, 4095, 4096, 4097, 100_000, 1 << 20)
FAR = {"cowfs": (1 << 63) - 1, "tmpfs": (1 << 63) - 1, "ext4": (1 << 44) - 4096}


@pytest.mark.parametrize("start", SIZES)
@pytest.mark.parametrize("is_open", [False, True], ids=["by name", "by descriptor"])
def test_truncate_sets_any_size(case: Case, start: int, is_open: bool) -> None:
    """Promise: truncating from any size to any other gives the right contents, mtime and ctime."""
    contents = os.urandom(start)
    for size in SIZES:
        case.write("f", contents)
        ino = case.status("f")["ino"]
        target = case.ok("open", "f", os.O_RDWR) if is_open else "f"
        if size == start and not is_open:
            case.ok("truncate", target, size)  # on Linux the times may move or not
        else:
            with case.times(dot="", f="mc"):
                case.ok("truncate", target, size)
        case.has("f", size=size, ino=ino, nlink=1)
        expected = contents[:size].ljust(size, b"\0")
        case.equal(case.ok("take", "f", 2 << 20) == expected, True, "contents")
        if is_open:
            case.ok("close", target)
        case.without("f")


def test_truncate_is_refused_where_it_has_no_meaning(case: Case) -> None:
    """Promise: EISDIR, EINVAL below zero and for files without a size, EFBIG; nothing changes."""
    for kind in KINDS:
        case.make(kind, "f")
        if kind in ("block", "char"):
            case.without("f")
            continue
        number = {"dir": errno.EISDIR, "symlink": errno.ENOENT, "file": 0}.get(kind, errno.EINVAL)
        if number:
            with case.times(**({} if kind == "symlink" else {"f": ""})):
                case.no(number, "truncate", "f", 0)
                case.no(number, "truncate", "f", 10)
        case.without("f")
    case.write("f", b"contents")
    with case.times(f=""):
        for size in (-1, -(1 << 40), -(1 << 63)):
            case.no(errno.EINVAL, "truncate", "f", size)
        descriptor = case.ok("open", "f", os.O_RDWR)
        case.no(errno.EINVAL, "truncate", descriptor, -1)
        case.ok("close", descriptor)
    case.equal(case.ok("take", "f"), b"contents")


def test_the_largest_size(case: Case) -> None:
    """Promise: a file may be as long as its filesystem says; one byte more is EFBIG."""
    largest = FAR[case.filesystem.name]
    case.write("f", b"begin")
    descriptor = case.ok("open", "f", os.O_RDWR)
    case.ok("truncate", "f", largest)
    case.has("f", size=largest)
    case.equal(case.ok("pread", descriptor, 5, largest - 5), bytes(5))
    case.ok("truncate", "f", 5)
    case.equal(case.ok("take", "f"), b"begin")
    if largest < (1 << 63) - 1:
        case.no(errno.EFBIG, "truncate", "f", largest + 4097)
        case.no(errno.EFBIG, "pwrite", descriptor, b"xx", largest)
    case.has("f", size=5)
    case.ok("close", descriptor)


def test_the_limit_of_a_process_is_efbig(case: Case) -> None:
    """Promise: RLIMIT_FSIZE holds for write, pwrite and truncate; the part that fits is written."""
    case.write("f", b"")
    descriptor = case.ok("open", "f", os.O_RDWR)
    case.ok("limit_file_size", 10_000)
    case.equal(case.ok("pwrite", descriptor, b"x" * 20_000, 0), 10_000)
    with case.times(f=""):
        case.no(errno.EFBIG, "pwrite", descriptor, b"x", 10_000)
        case.no(errno.EFBIG, "truncate", "f", 10_001)
        case.no(errno.EFBIG, "truncate", descriptor, 10_001)
    case.ok("truncate", descriptor, 10_000)
    case.has("f", size=10_000)
    case.ok("limit_file_size", -1)
    case.equal(case.ok("pwrite", descriptor, b"x", 10_000), 1)
    case.ok("close", descriptor)


def test_who_may_truncate(users: Case) -> None:
    """Promise: truncate needs write permission; ftruncate needs only an open writer."""
    case = users
    case.write("f", b"contents")
    for mode, number in ((0o644, errno.EACCES), (0o666, 0), (0o444, errno.EACCES), (0o602, 0)):
        case.ok("chmod", "f", mode)
        case.ok("lchown", "f", ALICE.uid, ALICE.gid)
        case.may(number, "truncate", "f", 8, by=BOB)
        case.has("f", size=8)
    case.ok("chmod", "f", 0o666)
    descriptor = case.ok("open", "f", os.O_WRONLY, by=BOB)
    case.ok("chmod", "f", 0)
    case.ok("truncate", descriptor, 3, by=BOB)
    case.has("f", size=3)
    case.no(errno.EACCES, "truncate", "f", 0, by=BOB)
    case.no(errno.EACCES, "truncate", "f", 0, by=ALICE)
    case.ok("close", descriptor, by=BOB)


def test_blocks_count_what_is_stored(case: Case) -> None:
    """Promise: st_blocks counts written and synced blocks, and no holes."""
    for size in (4096, 65536, 1 << 20):
        case.write("f", os.urandom(size))
        descriptor = case.ok("open", "f", os.O_RDWR)
        case.ok("fsync", descriptor)
        blocks = case.status("f")["blocks"]
        case.equal(size <= blocks * 512 <= size + 65536, True, f"{blocks} blocks for {size}")
        case.ok("truncate", "f", size * 16)
        case.ok("fsync", descriptor)
        case.equal(case.status("f")["blocks"] <= blocks + 128, True, "the hole takes nothing")
        case.ok("truncate", "f", 0)
        case.ok("fsync", descriptor)
        case.has("f", blocks=0, size=0)
        case.ok("close", descriptor)
        case.without("f")
    case.make("dir", "d")
    found = case.status("d")
    case.equal(found["blksize"] >= 512, True, "blksize")
    for kind in ("fifo", "socket"):
        case.make(kind, kind)
        case.has(kind, size=0, blocks=0)


def test_statvfs_is_consistent(case: Case) -> None:
    """Promise: free is not above total, available not above free; names have up to 255 bytes."""
    for path in (".", str(case.filesystem.root)):
        _, frsize, blocks, bfree, bavail, files, ffree, favail, _, namemax = case.ok(
            "statvfs", path
        )
        case.equal(blocks * frsize > 100 << 20, True, "size")
        case.equal(0 < bavail <= bfree <= blocks, True, "blocks")
        case.equal(0 < favail <= ffree <= files, True, "files")
        case.equal(namemax, 255)
    before = case.ok("statvfs", ".")
    case.write("f", os.urandom(4 << 20))
    descriptor = case.ok("open", "f", os.O_RDWR)
    case.ok("fsync", descriptor)
    case.ok("close", descriptor)
    after = case.ok("statvfs", ".")
    taken = (before[3] - after[3]) * before[1]
    case.equal(4 << 20 <= taken <= 5 << 20, True, f"taken {taken}")
    case.equal(before[5] - before[6] < after[5] - after[6], True, "files in use")
