"""Promises that files, directories and attributes behave as POSIX and Linux say they do.

Every test works in its own directory on one shared mount, which is checked at the end.
"""

import ctypes
import errno
import mmap
import os
import random
import socket
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Mounted, require_success
from tests.sizes import HANG_SECONDS, sized

pytestmark = [pytest.mark.mounted, pytest.mark.xdist_group("posix")]

AT_FDCWD = -100
ENTRIES = sized(5_000, 20_000)  # of a directory of many blocks
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2

LIBC = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def folder(module_mount: Mounted, request: pytest.FixtureRequest) -> Path:
    """An empty directory on the mount."""
    place: Path = module_mount.path / request.node.name
    place.mkdir()
    return place


def refused_with(number: int, call: Callable[[], object]) -> None:
    """Require that the call fails with exactly this errno."""
    with pytest.raises(OSError) as caught:  # noqa: PT011  # the test checks errno below
        call()
    found = errno.errorcode.get(caught.value.errno or 0)
    assert found == errno.errorcode[number], f"{found} instead of {errno.errorcode[number]}"


def rename_with_flags(old: Path, new: Path, flags: int) -> None:
    """renameat2(2), for which Python has no function."""
    if LIBC.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(old), None, str(new))


# ------------------------------------------------------------------- names


def test_hard_link_shares_contents_and_counts_names(folder: Path) -> None:
    """Promise: a hard link is the same file, and the file lives as long as one name does."""
    first, second = folder / "first", folder / "second"
    first.write_bytes(b"one")
    os.link(first, second)
    assert first.stat().st_ino == second.stat().st_ino
    assert first.stat().st_nlink == second.stat().st_nlink == 2
    second.write_bytes(b"changed")
    assert first.read_bytes() == b"changed"
    first.unlink()
    assert second.stat().st_nlink == 1
    assert second.read_bytes() == b"changed"
    refused_with(errno.EEXIST, lambda: os.link(second, second))
    refused_with(errno.EPERM, lambda: os.link(folder, folder / "directory"))


def test_symlink_keeps_its_target_to_the_byte(folder: Path) -> None:
    """Promise: symlinks of any length and to any target are kept; a loop is ELOOP."""
    for number, target in enumerate(["x", "nowhere/at all", "ü" * 100, "a" * 4000]):
        link = folder / f"link {number}"
        link.symlink_to(target)
        assert os.readlink(link) == target
        assert link.lstat().st_size == len(target.encode())
        assert stat.S_ISLNK(link.lstat().st_mode)
    (folder / "loop").symlink_to("loop")
    refused_with(errno.ELOOP, lambda: (folder / "loop").read_bytes())
    (folder / "file").write_bytes(b"through the link")
    (folder / "good").symlink_to("file")
    assert (folder / "good").read_bytes() == b"through the link"


def test_names_of_255_bytes_work_and_256_are_refused(folder: Path) -> None:
    """Promise: the longest name works in every operation; one byte more is ENAMETOOLONG."""
    longest, other, too_long = (
        folder / ("n" * 255),
        folder / ("ü" * 127 + "x"),
        folder / ("n" * 256),
    )
    longest.write_bytes(b"a")
    longest.rename(other)
    assert os.listdir(folder) == [other.name]
    refused_with(errno.ENAMETOOLONG, lambda: too_long.write_bytes(b""))
    refused_with(errno.ENAMETOOLONG, too_long.mkdir)
    refused_with(errno.ENAMETOOLONG, too_long.stat)
    refused_with(errno.ENAMETOOLONG, lambda: other.rename(too_long))
    refused_with(errno.ENAMETOOLONG, lambda: os.link(other, too_long))
    refused_with(errno.ENAMETOOLONG, lambda: too_long.symlink_to("x"))


def test_names_are_bytes(folder: Path) -> None:
    """Promise: any byte but slash and zero may be in a name, and comes back unchanged."""
    names = [bytes([byte]) + b"x" for byte in range(1, 256) if byte != ord("/")]
    place = os.fsencode(folder)
    for name in names:
        with open(os.path.join(place, name), "wb") as file:
            file.write(name)
    assert sorted(os.listdir(place)) == sorted(names)
    for name in names:
        with open(os.path.join(place, name), "rb") as file:
            assert file.read() == name


def test_wrong_paths_are_refused_with_the_right_error(folder: Path) -> None:
    """Promise: each wrong path gets the errno that programs look for."""
    file, full, empty = folder / "file", folder / "full", folder / "empty"
    file.write_bytes(b"x")
    full.mkdir()
    (full / "inside").touch()
    empty.mkdir()
    refused_with(errno.ENOENT, (folder / "missing").read_bytes)
    refused_with(errno.ENOENT, (folder / "missing").unlink)
    refused_with(errno.ENOENT, (folder / "missing").rmdir)
    refused_with(errno.ENOENT, lambda: (folder / "missing").rename(folder / "x"))
    refused_with(errno.ENOENT, lambda: (folder / "missing" / "x").write_bytes(b""))
    refused_with(errno.ENOTDIR, (file / "x").stat)
    refused_with(errno.ENOTDIR, file.rmdir)
    refused_with(errno.EISDIR, full.unlink)
    refused_with(errno.EISDIR, lambda: os.open(full, os.O_WRONLY))
    refused_with(errno.EEXIST, full.mkdir)
    refused_with(errno.EEXIST, lambda: file.mkdir())
    refused_with(errno.EEXIST, lambda: file.symlink_to("x"))
    refused_with(errno.EEXIST, lambda: os.mkfifo(file))
    refused_with(errno.EEXIST, lambda: os.open(file, os.O_CREAT | os.O_EXCL))
    refused_with(errno.ENOTEMPTY, full.rmdir)
    refused_with(errno.ENOTEMPTY, lambda: empty.rename(full))
    refused_with(errno.EISDIR, lambda: file.rename(empty))
    refused_with(errno.ENOTDIR, lambda: empty.rename(file))
    refused_with(errno.EINVAL, lambda: full.rename(full / "itself"))
    refused_with(errno.EINVAL, lambda: os.rmdir(f"{empty}/."))
    assert sorted(os.listdir(folder)) == ["empty", "file", "full"]


# ------------------------------------------------------------------- rename


def test_rename_replaces_atomically_and_keeps_the_open_file(folder: Path) -> None:
    """Promise: rename over a file always leaves one; an open old file can still be read."""
    old, new = folder / "old", folder / "new"
    new.write_bytes(b"replaced, but still open")
    old.write_bytes(b"replacement")
    inode = old.stat().st_ino
    with open(new, "rb") as still_open:
        old.rename(new)
        assert new.read_bytes() == b"replacement"
        assert new.stat().st_ino == inode
        assert not old.exists()
        assert still_open.read() == b"replaced, but still open"
        assert os.fstat(still_open.fileno()).st_nlink == 0


def test_rename_between_two_names_of_one_file_does_nothing(folder: Path) -> None:
    """Promise: as POSIX has it, renaming a file onto its own hard link keeps both names."""
    (folder / "a").write_bytes(b"x")
    os.link(folder / "a", folder / "b")
    (folder / "a").rename(folder / "b")
    assert sorted(os.listdir(folder)) == ["a", "b"]


def test_rename_of_a_directory_moves_its_parent_link(folder: Path) -> None:
    """Promise: a moved directory has the new parent as `..`, and both parents' nlink is right."""
    (folder / "from").mkdir()
    (folder / "to").mkdir()
    (folder / "from" / "child").mkdir()
    (folder / "from" / "child" / "file").write_bytes(b"moved along")
    assert (folder / "from").stat().st_nlink == 3
    (folder / "from" / "child").rename(folder / "to" / "child")
    assert (folder / "from").stat().st_nlink == 2
    assert (folder / "to").stat().st_nlink == 3
    parent = os.stat(f"{folder}/to/child/..")
    assert parent.st_ino == (folder / "to").stat().st_ino
    assert (folder / "to" / "child" / "file").read_bytes() == b"moved along"


def test_rename_noreplace_never_replaces(folder: Path) -> None:
    """Promise: RENAME_NOREPLACE refuses an existing target with EEXIST, else renames."""
    (folder / "a").write_bytes(b"a")
    (folder / "b").write_bytes(b"b")
    refused_with(
        errno.EEXIST,
        lambda: rename_with_flags(folder / "a", folder / "b", RENAME_NOREPLACE),
    )
    assert (folder / "b").read_bytes() == b"b"
    rename_with_flags(folder / "a", folder / "c", RENAME_NOREPLACE)
    assert (folder / "c").read_bytes() == b"a"
    assert not (folder / "a").exists()


def test_rename_exchange_swaps_a_file_and_a_directory(folder: Path) -> None:
    """Promise: RENAME_EXCHANGE swaps any two entries, of different type and in different places."""
    (folder / "file").write_bytes(b"file")
    (folder / "place").mkdir()
    (folder / "place" / "directory").mkdir()
    (folder / "place" / "directory" / "inside").touch()
    before = folder.stat().st_nlink
    rename_with_flags(folder / "file", folder / "place" / "directory", RENAME_EXCHANGE)
    assert (folder / "place" / "directory").read_bytes() == b"file"
    assert os.listdir(folder / "file") == ["inside"]
    assert folder.stat().st_nlink == before + 1
    assert (folder / "place").stat().st_nlink == 2
    refused_with(
        errno.ENOENT,
        lambda: rename_with_flags(folder / "file", folder / "missing", RENAME_EXCHANGE),
    )


# ------------------------------------------------------------------- kinds of files


def test_fifo_carries_bytes(folder: Path) -> None:
    """Promise: a fifo on the filesystem passes bytes from writer to reader."""
    fifo = folder / "fifo"
    os.mkfifo(fifo, 0o640)
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    assert stat.S_IMODE(fifo.stat().st_mode) == 0o640
    writer = threading.Thread(target=fifo.write_bytes, args=(b"through the fifo",))
    writer.start()
    assert fifo.read_bytes() == b"through the fifo"
    writer.join(HANG_SECONDS)


def test_socket_can_be_bound_and_reached(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise: a Unix socket on the filesystem connects two programs."""
    monkeypatch.chdir(folder)  # a socket's path is limited to 107 bytes
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind("socket")
        assert stat.S_ISSOCK(os.stat("socket").st_mode)
        server.listen()
        client.connect("socket")
        connection, _ = server.accept()
        with connection:
            client.sendall(b"hello")
            assert connection.recv(5) == b"hello"


def test_device_node_keeps_its_number(folder: Path) -> None:
    """Promise: only root can make device nodes, and their numbers are kept."""
    for kind, major, minor in ((stat.S_IFCHR, 1, 3), (stat.S_IFBLK, 259, 70_000)):
        node = folder / f"node {major}"
        if os.geteuid() == 0:
            os.mknod(node, kind | 0o600, os.makedev(major, minor))
            information = node.stat()
            assert stat.S_IFMT(information.st_mode) == kind
            assert (os.major(information.st_rdev), os.minor(information.st_rdev)) == (major, minor)
        else:
            number = os.makedev(major, minor)
            refused_with(errno.EPERM, lambda: os.mknod(node, kind | 0o600, number))  # noqa: B023


# ------------------------------------------------------------------- attributes


def test_modes_and_owners_are_kept(folder: Path) -> None:
    """Promise: all twelve mode bits and, set by root, any owner are kept."""
    file = folder / "file"
    file.touch()
    for mode in (0o000, 0o400, 0o1777, 0o2755, 0o4755, 0o7777, 0o644):
        file.chmod(mode)
        assert stat.S_IMODE(file.stat().st_mode) == mode
    if os.geteuid() == 0:
        for owner, group in ((0, 0), (1, 65534), (4_000_000_000, 3_999_999_999)):
            os.chown(file, owner, group)
            assert (file.stat().st_uid, file.stat().st_gid) == (owner, group)
        file.chmod(0o6755)
        os.chown(file, 1, 1)
        assert stat.S_IMODE(file.stat().st_mode) == 0o755, "chown clears set-id bits"
    else:
        refused_with(errno.EPERM, lambda: os.chown(file, 0, 0))


def test_writing_clears_the_set_user_id_bit(folder: Path) -> None:
    """Promise: a program changed by a user other than root loses its set-id bits."""
    if os.geteuid() != 0:
        file = folder / "program"
        file.touch()
        file.chmod(0o6755)
        file.write_bytes(b"changed")
        assert stat.S_IMODE(file.stat().st_mode) == 0o755
        return
    file = folder / "program"
    file.touch()
    file.chmod(0o6755)
    file.write_bytes(b"changed by root, who may keep them")
    assert file.read_bytes() == b"changed by root, who may keep them"


def test_umask_and_set_group_id_directories_are_honoured(folder: Path) -> None:
    """Promise: new files get their mode less the umask, in set-group-ID directories the group."""
    previous = os.umask(0o027)
    try:
        os.close(os.open(folder / "file", os.O_CREAT | os.O_WRONLY, 0o666))
        os.mkdir(folder / "directory", 0o777)
    finally:
        os.umask(previous)
    assert stat.S_IMODE((folder / "file").stat().st_mode) == 0o640
    assert stat.S_IMODE((folder / "directory").stat().st_mode) == 0o750
    if os.geteuid() == 0:
        shared = folder / "shared"
        shared.mkdir()
        os.chown(shared, 0, 4242)
        shared.chmod(0o2775)
        (shared / "file").touch()
        (shared / "below").mkdir()
        assert (shared / "file").stat().st_gid == 4242
        assert (shared / "below").stat().st_gid == 4242
        assert (shared / "below").stat().st_mode & stat.S_ISGID


def test_times_are_kept_to_the_nanosecond(folder: Path) -> None:
    """Promise: any time from before 1970 to after 2038 comes back exactly."""
    file = folder / "file"
    file.touch()
    for nanoseconds in (0, 1, 1_234_567_890_123_456_789, -1_000_000_001, 4_102_444_800_999_999_999):
        os.utime(file, ns=(nanoseconds, nanoseconds + 7))
        assert file.stat().st_atime_ns == nanoseconds
        assert file.stat().st_mtime_ns == nanoseconds + 7


def test_times_move_when_something_changes(folder: Path) -> None:
    """Promise: writing moves mtime and ctime; chmod and link ctime; a new name the folder's."""
    file = folder / "file"
    file.write_bytes(b"1")

    def times(path: Path) -> tuple[int, int]:
        return path.stat().st_mtime_ns, path.stat().st_ctime_ns

    def moved(path: Path, change: Callable[[], object]) -> tuple[bool, bool]:
        before = times(path)
        time.sleep(0.03)
        change()
        after = times(path)
        return after[0] > before[0], after[1] > before[1]

    assert moved(file, lambda: file.write_bytes(b"22")) == (True, True)
    assert moved(file, lambda: os.truncate(file, 1)) == (True, True)
    assert moved(file, lambda: file.chmod(0o600)) == (False, True)
    assert moved(file, lambda: os.link(file, folder / "link")) == (False, True)
    assert moved(file, lambda: os.setxattr(file, "user.a", b"")) == (False, True)
    assert moved(file, file.read_bytes) == (False, False)
    assert moved(folder, lambda: (folder / "new").touch()) == (True, True)
    assert moved(folder, lambda: (folder / "new").rename(folder / "newer")) == (True, True)
    assert moved(folder, (folder / "newer").unlink) == (True, True)
    assert moved(folder, lambda: file.write_bytes(b"333")) == (False, False)


def test_directory_counts_its_links(folder: Path) -> None:
    """Promise: a directory has two links and one for each subdirectory, as find expects."""
    assert folder.stat().st_nlink == 2
    for number in range(5):
        (folder / f"directory {number}").mkdir()
        (folder / f"file {number}").touch()
    assert folder.stat().st_nlink == 7
    (folder / "directory 0").rmdir()
    assert folder.stat().st_nlink == 6


def test_xattrs_can_be_set_listed_replaced_and_removed(folder: Path) -> None:
    """Promise: extended attributes hold any bytes, and the create and replace flags are obeyed."""
    file = folder / "file"
    file.touch()
    refused_with(errno.ENODATA, lambda: os.getxattr(file, "user.missing"))
    refused_with(errno.ENODATA, lambda: os.removexattr(file, "user.missing"))
    refused_with(errno.ENODATA, lambda: os.setxattr(file, "user.a", b"", os.XATTR_REPLACE))
    os.setxattr(file, "user.a", bytes(range(256)), os.XATTR_CREATE)
    refused_with(errno.EEXIST, lambda: os.setxattr(file, "user.a", b"", os.XATTR_CREATE))
    assert os.getxattr(file, "user.a") == bytes(range(256))
    os.setxattr(file, "user.a", b"", os.XATTR_REPLACE)
    assert os.getxattr(file, "user.a") == b""
    for number in range(40):
        os.setxattr(file, f"user.number {number}", str(number).encode())
    assert set(os.listxattr(file)) == {"user.a", *(f"user.number {n}" for n in range(40))}
    os.setxattr(file, "user.big", b"b" * 1500)
    assert os.getxattr(file, "user.big") == b"b" * 1500
    for name in os.listxattr(file):
        os.removexattr(file, name)
    assert os.listxattr(file) == []
    os.setxattr(folder, "user.on a directory", b"yes")
    assert os.listxattr(folder) == ["user.on a directory"]
    name_too_long = "user." + "x" * 251
    with pytest.raises(OSError, match=r"Numerical result|too long"):
        os.setxattr(file, name_too_long, b"")


def test_statfs_is_consistent(folder: Path, module_mount: Mounted) -> None:
    """Promise: df's numbers are consistent, and free space falls when data is written."""
    if not module_mount.plain:  # earlier tests' data gets its final size only in a commit
        require_success(module_mount.cowfs("sync", module_mount.path))
    before = os.statvfs(folder)
    assert before.f_bavail <= before.f_bfree <= before.f_blocks
    assert before.f_namemax == 255
    assert before.f_files >= before.f_ffree
    if not module_mount.plain:
        total_bytes = before.f_blocks * before.f_frsize
        assert (2 << 30) * 0.9 < total_bytes <= 2 << 30
        with open(folder / "file", "wb") as file:
            file.write(os.urandom(16 << 20))
            os.fsync(file.fileno())
        after = os.statvfs(folder)
        fallen = (before.f_bfree - after.f_bfree) * before.f_frsize
        assert 16 << 20 <= fallen < 32 << 20


# ------------------------------------------------------------------- contents


def test_sparse_file_reads_zeros_and_takes_no_space(folder: Path) -> None:
    """Promise: holes read as zeros and are not stored."""
    file = folder / "sparse"
    with open(file, "wb") as stream:
        stream.truncate(1 << 40)
        stream.seek(1 << 39)
        stream.write(b"island")
        os.fsync(stream.fileno())
    assert file.stat().st_size == 1 << 40
    assert file.stat().st_blocks * 512 <= 1 << 20
    with open(file, "rb") as stream:
        assert stream.read(100_000) == bytes(100_000)
        stream.seek((1 << 39) - 5)
        assert stream.read(20) == bytes(5) + b"island" + bytes(9)
        stream.seek((1 << 40) - 3)
        assert stream.read(20) == bytes(3)


def test_truncate_both_ways_shows_no_old_bytes(folder: Path) -> None:
    """Promise: at every odd size, bytes cut off never return, and growing adds zeros."""
    file = folder / "file"
    contents = os.urandom(300_000)
    for shorter in (0, 1, 100, 4095, 4096, 4097, 70_000, 131_072, 299_999):
        file.write_bytes(contents)
        os.truncate(file, shorter)
        assert file.read_bytes() == contents[:shorter]
        os.truncate(file, 310_000)
        assert file.stat().st_size == 310_000
        assert file.read_bytes() == contents[:shorter] + bytes(310_000 - shorter)
        with open(file, "r+b") as stream:
            stream.seek(305_000)
            stream.write(b"end")
        assert file.read_bytes()[305_000:305_004] == b"end\0"
    refused_with(errno.EINVAL, lambda: os.truncate(file, -1))


def test_offsets_reach_as_far_as_the_kernel_allows(folder: Path, module_mount: Mounted) -> None:
    """Promise: a file may have bytes at an offset of 2^62."""
    # The host's filesystem has a lower limit, such as 16 TiB on ext4.
    offset = 1 << 43 if module_mount.plain else 1 << 62
    file = folder / "far"
    with open(file, "wb") as stream:
        os.pwrite(stream.fileno(), b"far away", offset)
        os.pwrite(stream.fileno(), b"near", 3)
        os.fsync(stream.fileno())
    assert file.stat().st_size == offset + 8
    with open(file, "rb") as stream:
        assert os.pread(stream.fileno(), 100, offset - 4) == bytes(4) + b"far away"
        assert os.pread(stream.fileno(), 10, 0) == bytes(3) + b"near" + bytes(3)
        assert os.pread(stream.fileno(), 10, offset // 2) == bytes(10)
    os.truncate(file, 5)
    assert file.read_bytes() == bytes(3) + b"ne"


def test_append_always_writes_at_the_end(folder: Path) -> None:
    """Promise: with O_APPEND two writers never overwrite each other."""
    file = folder / "log"
    with open(file, "ab", buffering=0) as one, open(file, "ab", buffering=0) as other:
        for number in range(100):
            one.write(b"one %03d\n" % number)
            other.write(b"other %03d\n" % number)
    lines = file.read_bytes().splitlines()
    assert len(lines) == 200
    assert sorted(lines) == sorted(
        [b"one %03d" % n for n in range(100)] + [b"other %03d" % n for n in range(100)]
    )


def test_open_with_truncate_empties_the_file(folder: Path) -> None:
    """Promise: O_TRUNC leaves none of the old contents, also for others who have the file open."""
    file = folder / "file"
    file.write_bytes(b"old" * 10_000)
    with open(file, "rb") as reader:
        assert reader.read(3) == b"old"
        descriptor = os.open(file, os.O_WRONLY | os.O_TRUNC)
        try:
            assert os.fstat(descriptor).st_size == 0
            assert os.fstat(reader.fileno()).st_size == 0
            os.write(descriptor, b"new")
        finally:
            os.close(descriptor)
    assert file.read_bytes() == b"new"


def test_random_writes_read_back_as_written(folder: Path) -> None:
    """Promise: overwrites at any offsets and sizes give the same as on a plain array."""
    generator = random.Random(20)
    size_max = 2 << 20
    expected = bytearray()
    with open(folder / "file", "w+b", buffering=0) as stream:
        for step in range(600):
            offset = generator.randrange(size_max)
            if step % 10 == 9:
                size = generator.randrange(size_max)
                stream.truncate(size)
                expected = expected[:size].ljust(size, b"\0")
            else:
                data = generator.randbytes(generator.choice((1, 511, 4096, 5000, 70_000)))
                os.pwrite(stream.fileno(), data, offset)
                expected = expected.ljust(offset + len(data), b"\0")
                expected[offset : offset + len(data)] = data
            if step % 50 == 0:
                os.fsync(stream.fileno())
        stream.seek(0)
        assert stream.read() == expected
    assert (folder / "file").read_bytes() == expected


def test_mapped_file_shares_its_writes(folder: Path) -> None:
    """Promise: a write through a shared mapping is in the file, and the other way round."""
    file = folder / "mapped"
    file.write_bytes(bytes(200_000))
    with open(file, "r+b") as stream, mmap.mmap(stream.fileno(), 0) as memory:
        memory[100_000:100_006] = b"mapped"
        memory.flush()
        os.fsync(stream.fileno())
        with open(file, "rb") as reader:
            reader.seek(99_998)
            assert reader.read(10) == b"\0\0mapped\0\0"
        os.pwrite(stream.fileno(), b"written", 10)
        assert memory[10:17] == b"written"
    assert file.read_bytes()[100_000:100_006] == b"mapped"


def test_unlinked_file_lives_while_it_is_open(folder: Path) -> None:
    """Promise: a file without a name can be read, written, grown and cut until it is closed."""
    file = folder / "temporary"
    with open(file, "w+b", buffering=0) as stream:
        stream.write(b"a" * 100_000)
        file.unlink()
        assert os.listdir(folder) == []
        assert os.fstat(stream.fileno()).st_nlink == 0
        stream.write(b"b" * 100_000)
        os.fsync(stream.fileno())
        stream.seek(99_999)
        assert stream.read(2) == b"ab"
        stream.truncate(10)
        stream.seek(0)
        assert stream.read() == b"a" * 10
        file.write_bytes(b"another file of the same name")
        stream.seek(0)
        assert stream.read() == b"a" * 10
    assert file.read_bytes() == b"another file of the same name"


def test_removed_directory_that_is_open_is_empty(folder: Path) -> None:
    """Promise: a directory removed while open lists nothing, and nothing can be made in it."""
    place = folder / "place"
    place.mkdir()
    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        place.rmdir()
        assert os.listdir(descriptor) == []
        refused_with(
            errno.ENOENT, lambda: os.open("x", os.O_CREAT | os.O_WRONLY, dir_fd=descriptor)
        )
    finally:
        os.close(descriptor)


def test_now_of_utimensat_is_not_before_a_write_that_was_made(folder: Path) -> None:
    """Promise: touch after a write gives a time not before the write's, as make(1) needs."""
    written, touched = folder / "written", folder / "touched"
    touched.touch()
    for _ in range(50):
        written.write_bytes(b"x" * 10)
        os.utime(touched)
        assert touched.stat().st_mtime_ns >= written.stat().st_mtime_ns
        assert touched.stat().st_mtime_ns == touched.stat().st_atime_ns


# ------------------------------------------------------------------- large directories


def test_large_directory_lists_each_entry_once(folder: Path) -> None:
    """Promise: a large directory lists every entry exactly once, also while entries come and go."""
    names = {f"entry number {number}" for number in range(ENTRIES)}
    for name in names:
        os.close(os.open(folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    listed = os.listdir(folder)
    assert len(listed) == ENTRIES
    assert set(listed) == names

    seen = []
    with os.scandir(folder) as entries:
        for position, entry in enumerate(entries):
            seen.append(entry.name)
            if position % 4 == 0:
                os.unlink(folder / entry.name)
            if position % 100 == 0:
                (folder / f"added {position}").touch()
    old = [name for name in seen if not name.startswith("added")]
    assert len(old) == len(set(old)) == ENTRIES
    assert len(seen) == len(set(seen))
    assert names - set(old) == set()
    for name in os.listdir(folder):
        os.unlink(folder / name)
    assert os.listdir(folder) == []


def test_deep_directories_can_be_made_and_removed(folder: Path) -> None:
    """Promise: nesting has no limit but the length of a path."""
    descriptors = [os.open(folder, os.O_RDONLY)]
    try:
        for _ in range(300):
            os.mkdir("deeper and deeper", dir_fd=descriptors[-1])
            descriptors.append(os.open("deeper and deeper", os.O_RDONLY, dir_fd=descriptors[-1]))
        for parent in reversed(descriptors[:-1]):
            os.rmdir("deeper and deeper", dir_fd=parent)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    assert os.listdir(folder) == []
