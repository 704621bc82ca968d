"""Promises about parts of files: holes, fallocate, shared blocks, and files without a name.

Tests that need no cowfs command also run on a directory of the host (COWFS_TEST_BASE), where the
kernel's own filesystem must pass them: this shows that they say what Linux does.
"""

import contextlib
import ctypes
import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.commands import run_command
from tests.conftest import Mounted, json_of, require_success

pytestmark = [pytest.mark.mounted, pytest.mark.xdist_group("ranges")]

BLOCK = 4096
KEEP_SIZE, PUNCH_HOLE, COLLAPSE, ZERO_RANGE = 0x01, 0x02, 0x08, 0x10
AT_FDCWD, AT_SYMLINK_FOLLOW = -100, 0x400
LIBC = ctypes.CDLL(None, use_errno=True)


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2), for which Python has no function."""
    result = LIBC.fallocate(descriptor, mode, ctypes.c_int64(offset), ctypes.c_int64(length))
    if result != 0:
        raise OSError(ctypes.get_errno(), "fallocate")


def link_unnamed(descriptor: int, name: Path) -> None:
    """linkat(2) of an open file, as open(2) describes it for O_TMPFILE."""
    source = f"/proc/self/fd/{descriptor}".encode()
    if LIBC.linkat(AT_FDCWD, source, AT_FDCWD, os.fsencode(name), AT_SYMLINK_FOLLOW) != 0:
        raise OSError(ctypes.get_errno(), "linkat")


def errno_of(call: Callable[[], object]) -> str:
    try:
        call()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "none"


def copy_range(source: int, target: int, length: int, offset: int = 0, to: int = 0) -> int:
    """copy_file_range(2) until all is copied."""
    done = 0
    while done < length:
        count = os.copy_file_range(source, target, length - done, offset + done, to + done)
        if not count:
            break
        done += count
    return done


def tree_bytes(mount: Mounted) -> int:
    """The space that files and snapshots take in the image, after everything is written."""
    require_success(run_command("sync", mount.path))
    return int(json_of(run_command("df", mount.path, "--json"))["tree_bytes"])


@pytest.fixture
def folder(module_mount: Mounted, request: pytest.FixtureRequest) -> Path:
    """An empty directory on the mount."""
    place: Path = module_mount.path / request.node.name.replace("[", "-").rstrip("]")
    place.mkdir()
    return place


@pytest.fixture
def file(folder: Path) -> Iterator[int]:
    """A descriptor of an empty file."""
    descriptor = os.open(folder / "file", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    yield descriptor
    os.close(descriptor)


# ------------------------------------------------------------------- holes


def test_seek_finds_data_and_holes(file: int) -> None:
    """Promise: SEEK_DATA and SEEK_HOLE are right, before and after the data is on disk."""
    os.pwrite(file, b"a" * (3 * BLOCK), 0)
    os.pwrite(file, b"b" * 100, 100 * BLOCK)
    os.ftruncate(file, 200 * BLOCK)
    for _ in range(2):
        assert os.lseek(file, 0, os.SEEK_DATA) == 0
        assert os.lseek(file, 10, os.SEEK_DATA) == 10
        assert os.lseek(file, 0, os.SEEK_HOLE) == 3 * BLOCK
        assert os.lseek(file, 3 * BLOCK, os.SEEK_HOLE) == 3 * BLOCK
        assert os.lseek(file, 3 * BLOCK, os.SEEK_DATA) == 100 * BLOCK
        assert os.lseek(file, 100 * BLOCK + 5, os.SEEK_HOLE) == 101 * BLOCK
        assert errno_of(lambda: os.lseek(file, 101 * BLOCK, os.SEEK_DATA)) == "ENXIO"
        assert errno_of(lambda: os.lseek(file, 200 * BLOCK, os.SEEK_DATA)) == "ENXIO"
        assert errno_of(lambda: os.lseek(file, 200 * BLOCK, os.SEEK_HOLE)) == "ENXIO"
        assert os.lseek(file, 199 * BLOCK, os.SEEK_HOLE) == 199 * BLOCK
        os.fsync(file)


def test_seek_in_small_files(folder: Path) -> None:
    """Promise: an inline file is data up to its end; an empty one has no data."""
    small, empty = folder / "small", folder / "empty"
    small.write_bytes(b"x" * 300)
    empty.touch()
    descriptor = os.open(small, os.O_RDONLY)
    for _ in range(2):
        assert os.lseek(descriptor, 0, os.SEEK_DATA) == 0
        assert os.lseek(descriptor, 10, os.SEEK_HOLE) == 300
        os.fsync(descriptor)
    os.close(descriptor)
    descriptor = os.open(empty, os.O_RDONLY)
    assert errno_of(lambda: os.lseek(descriptor, 0, os.SEEK_DATA)) == "ENXIO"
    os.close(descriptor)


def test_punched_holes_read_as_zeros_and_free_their_blocks(file: int) -> None:
    """Promise: a hole takes no space; the data beside it and the size stay."""
    os.pwrite(file, b"x" * (64 * BLOCK), 0)
    os.fsync(file)
    before = os.fstat(file).st_blocks
    fallocate(file, PUNCH_HOLE | KEEP_SIZE, 100, 32 * BLOCK)
    for _ in range(2):
        assert os.pread(file, 33 * BLOCK, 0) == b"x" * 100 + bytes(32 * BLOCK) + b"x" * (
            BLOCK - 100
        )
        assert os.fstat(file).st_size == 64 * BLOCK
        assert os.fstat(file).st_blocks == before - 31 * BLOCK // 512
        os.fsync(file)
    fallocate(file, PUNCH_HOLE | KEEP_SIZE, 0, 1 << 40)
    os.fsync(file)
    assert os.fstat(file).st_blocks == 0
    assert os.fstat(file).st_size == 64 * BLOCK


def test_fallocate_modes_and_errors(folder: Path, file: int) -> None:
    """Promise: sizes and errors of fallocate are those that its manual page gives."""
    fallocate(file, 0, 0, 10_000)
    assert os.fstat(file).st_size == 10_000
    fallocate(file, KEEP_SIZE, 0, 1 << 20)
    assert os.fstat(file).st_size == 10_000
    assert os.pread(file, 20_000, 0) == bytes(10_000)
    assert errno_of(lambda: fallocate(file, 0, -1, 10)) == "EINVAL"
    assert errno_of(lambda: fallocate(file, 0, 0, 0)) == "EINVAL"
    assert errno_of(lambda: fallocate(file, PUNCH_HOLE, 0, 10)) == "ENOTSUP"
    assert errno_of(lambda: fallocate(file, 0, (1 << 63) - 2, 2)) == "EFBIG"
    assert errno_of(lambda: fallocate(file, 0, 0, 1 << 50)) in ("ENOSPC", "EFBIG")
    assert os.fstat(file).st_size == 10_000
    reading = os.open(folder / "file", os.O_RDONLY)
    assert errno_of(lambda: fallocate(reading, 0, 0, 10)) == "EBADF"
    os.close(reading)


@pytest.mark.needs_cowfs  # tmpfs knows no ZERO_RANGE
def test_zero_range_may_set_the_size(file: int) -> None:
    """Promise: ZERO_RANGE zeros, and extends the file unless it is told to keep the size."""
    os.pwrite(file, b"x" * (8 * BLOCK), 0)
    fallocate(file, ZERO_RANGE | KEEP_SIZE, 6 * BLOCK + 7, 10 * BLOCK)
    assert os.fstat(file).st_size == 8 * BLOCK
    fallocate(file, ZERO_RANGE, 6 * BLOCK, 10 * BLOCK)
    assert os.fstat(file).st_size == 16 * BLOCK
    assert os.pread(file, 16 * BLOCK, 0) == b"x" * (6 * BLOCK) + bytes(10 * BLOCK)
    assert errno_of(lambda: fallocate(file, COLLAPSE, 0, BLOCK)) == "ENOTSUP"


def test_fallocate_marks_the_file_as_changed(file: int) -> None:
    """Promise: fallocate moves mtime and ctime, as a write does."""
    os.pwrite(file, b"x" * BLOCK, 0)
    os.utime(file, ns=(5, 5))
    before = os.fstat(file)
    fallocate(file, PUNCH_HOLE | KEEP_SIZE, 0, BLOCK)
    after = os.fstat(file)
    assert after.st_mtime_ns > before.st_mtime_ns
    assert after.st_ctime_ns > before.st_ctime_ns


# ------------------------------------------------------------------- sharing


@pytest.mark.needs_cowfs
@pytest.mark.parametrize("command", ["cp", "cp-reflink-auto", "cowfs-cp", "copy_file_range"])
def test_copies_share_blocks(folder: Path, module_mount: Mounted, command: str) -> None:
    """Promise: a copy takes no blocks for its data, and does not change with the original."""
    original, copy = folder / "original", folder / "copy"
    data = random.Random(5).randbytes(20 * 1024 * 1024 + 77)
    original.write_bytes(data)
    before = tree_bytes(module_mount)
    if command == "cowfs-cp":
        require_success(run_command("cp", original, copy))
    elif command == "copy_file_range":
        with open(original, "rb") as source, open(copy, "wb") as target:
            assert copy_range(source.fileno(), target.fileno(), 1 << 40) == len(data)
    else:
        options = ["--reflink=auto"] if command == "cp-reflink-auto" else []
        subprocess.run(["cp", *options, original, copy], check=True)
    grown = tree_bytes(module_mount) - before
    assert grown < 1 << 20, f"the copy took {grown} bytes"
    assert copy.read_bytes() == data
    assert copy.stat().st_blocks == original.stat().st_blocks

    with open(copy, "r+b") as target:
        target.seek(1 << 20)
        target.write(b"changed")
    assert original.read_bytes() == data
    with open(original, "r+b") as target:
        target.truncate(10)
    changed = bytearray(data)
    changed[1 << 20 : (1 << 20) + 7] = b"changed"
    assert copy.read_bytes() == changed
    original.unlink()
    require_success(run_command("sync", module_mount.path))
    assert copy.read_bytes() == changed


@pytest.mark.needs_cowfs
def test_a_file_comes_out_of_a_snapshot_for_nothing(mount: Mounted) -> None:
    """Promise: snapshots, copies and deletions combine, and cowdu is right to the block (C11)."""
    folder = mount.path / "folder"
    folder.mkdir()
    choice = random.Random(6)
    data = {f"file {number}": choice.randbytes(3 << 20) for number in range(4)}
    for name, content in data.items():
        (folder / name).write_bytes(content)
    kept = mount.snapshot("monday")
    shutil.rmtree(folder)
    before = tree_bytes(mount)
    require_success(run_command("cp", kept / "folder", mount.path))
    assert tree_bytes(mount) - before < 1 << 20
    require_success(run_command("cp", folder, mount.path / "twice"))
    for place in (folder, mount.path / "twice"):
        assert {each.name: each.read_bytes() for each in place.iterdir()} == data
    (folder / "file 0").write_bytes(b"new" * 500_000)
    mount.snapshot("tuesday")
    shutil.rmtree(folder)
    shutil.rmtree(mount.path / "twice")
    for names in (["monday"], ["tuesday"]):
        require_success(run_command("sync", mount.path))
        answer = json_of(run_command("snapshot", "delete", "-n", mount.path, *names, "--json"))
        announced = answer["reclaim_bytes"]
        before = tree_bytes(mount)
        mount.delete_snapshot(names[0])
        assert before - tree_bytes(mount) == announced


@pytest.mark.needs_cowfs
def test_cowfs_cp_keeps_what_cp_a_keeps(folder: Path, module_mount: Mounted) -> None:
    """Promise: `cowfs cp` of a tree gives what `cp -a` gives."""
    tree = folder / "tree"
    (tree / "inner").mkdir(parents=True)
    (tree / "file").write_bytes(b"x" * 100_000)
    os.link(tree / "file", tree / "inner" / "link")
    (tree / "inner" / "symlink").symlink_to("nowhere")
    os.mkfifo(tree / "fifo")
    os.setxattr(tree / "file", "user.colour", b"green")
    sparse = tree / "sparse"
    sparse.touch()
    os.truncate(sparse, 1 << 30)
    for path in (tree / "file", tree / "inner", tree):
        os.chmod(path, 0o741)
        os.utime(path, ns=(10**18, 10**18 + 5))
    subprocess.run(["cp", "-a", tree, folder / "expected"], check=True)
    dry = json_of(run_command("cp", "-n", "--json", tree, folder / "copy"))
    assert not (folder / "copy").exists()
    done = json_of(run_command("cp", "--json", tree, folder / "copy"))
    counts = ("files", "directories", "others", "shared_bytes", "copied_bytes", "errors")
    assert [dry[name] for name in counts] == [done[name] for name in counts]
    assert (done["files"], done["directories"], done["others"]) == (3, 2, 2)
    listing = ["find", ".", "-printf", "%p %y %m %n %s %b %U %G %T+ %l\\n"]
    seen = [
        sorted(
            subprocess.run(listing, cwd=each, check=True, capture_output=True).stdout.split(b"\n")
        )
        for each in (folder / "expected", folder / "copy")
    ]
    assert seen[0] == seen[1]
    assert os.getxattr(folder / "copy" / "file", "user.colour") == b"green"
    assert (folder / "copy" / "file").samefile(folder / "copy" / "inner" / "link")


@pytest.mark.needs_cowfs
def test_cowfs_cp_refuses_what_would_surprise(folder: Path, tmp_path: Path) -> None:
    """Promise: unless asked, no file is replaced, copied into itself or from another mount."""
    one, two = folder / "one", folder / "two"
    one.write_bytes(b"1" * 5000)
    two.write_bytes(b"2" * 5000)
    (folder / "inner").mkdir()
    refused = run_command("cp", one, two)
    assert refused.returncode == 1
    assert "-f replaces it" in refused.stderr
    assert two.read_bytes() == b"2" * 5000
    require_success(run_command("cp", "-f", one, two))
    assert two.read_bytes() == b"1" * 5000
    assert "into itself" in run_command("cp", folder, folder / "inner").stderr
    assert "the same file" in run_command("cp", one, one).stderr
    (tmp_path / "host").write_bytes(b"x")
    assert "not on the same mount" in run_command("cp", tmp_path / "host", folder).stderr
    assert "does not exist" in run_command("cp", folder / "missing", folder / "x").stderr
    assert sorted(os.listdir(folder)) == ["inner", "one", "two"]


# ------------------------------------------------------------------- files without a name


def test_unnamed_files_hold_data_and_may_get_a_name(folder: Path, module_mount: Mounted) -> None:
    """Promise: O_TMPFILE makes a file without a name, which can be linked later."""
    descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o640)
    os.write(descriptor, b"hidden" * 1000)
    assert os.fstat(descriptor).st_nlink == 0
    assert os.listdir(folder) == []
    os.fsync(descriptor)
    link_unnamed(descriptor, folder / "seen")
    assert os.fstat(descriptor).st_nlink == 1
    os.close(descriptor)
    assert (folder / "seen").read_bytes() == b"hidden" * 1000
    exclusive = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_EXCL, 0o600)
    assert errno_of(lambda: link_unnamed(exclusive, folder / "never")) == "ENOENT"
    os.close(exclusive)
    assert errno_of(lambda: os.open(folder, os.O_TMPFILE | os.O_RDONLY)) == "EINVAL"
    assert errno_of(lambda: os.open(folder / "seen", os.O_TMPFILE | os.O_RDWR)) == "ENOTDIR"


@pytest.mark.needs_cowfs
def test_unnamed_files_are_gone_after_a_crash(mount: Mounted) -> None:
    """Promise: a file without a name takes no space after its daemon was killed (C7)."""
    descriptor = os.open(mount.path, os.O_TMPFILE | os.O_RDWR, 0o600)
    os.write(descriptor, b"x" * (4 << 20))
    os.fsync(descriptor)
    held = tree_bytes(mount)
    mount.kill()
    with contextlib.suppress(OSError):  # the kernel says that the daemon is gone
        os.close(descriptor)
    mount.remount()
    assert held - tree_bytes(mount) >= 4 << 20


# ------------------------------------------------------------------- without the module

_NO_MODULE = "import sys\nsys.modules['cowfs.daemon._session'] = None\n"
_OLD_MODULE = "import sys, types\nsys.modules['cowfs.daemon._session'] = types.ModuleType('old')\n"


@pytest.mark.needs_cowfs
@pytest.mark.parametrize("instead", [_NO_MODULE, _OLD_MODULE], ids=["none", "old"])
def test_a_mount_without_the_compiled_module_works_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instead: str
) -> None:
    """Promise: without the module, or with a stale one, a mount does all that does not need it."""
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / "sitecustomize.py").write_text(instead, encoding="utf-8")
    known = os.environ.get("PYTHONPATH")
    hidden = [str(tmp_path / "hide"), *([known] if known else [])]
    mount = Mounted(tmp_path / "cowfs")
    try:
        with monkeypatch.context() as context:
            context.setenv("PYTHONPATH", ":".join(hidden))
            mount.starts_program = True
            mount.start()
        assert json_of(run_command("info", mount.path, "--json"))["features"] == []
        one, two = mount.path / "one", mount.path / "two"
        one.write_bytes(b"x" * 100_000)
        os.utime(one)
        descriptor = os.open(one, os.O_RDWR)
        assert errno_of(lambda: fallocate(descriptor, 0, 0, 10)) == "ENOTSUP"
        os.close(descriptor)
        assert errno_of(lambda: os.open(mount.path, os.O_TMPFILE | os.O_RDWR)) == "ENOTSUP"
        refused = run_command("cp", one, two)
        assert refused.returncode == 1
        assert "cannot share blocks" in refused.stderr
        subprocess.run(["cp", one, two], check=True)
        assert two.read_bytes() == one.read_bytes()
    finally:
        assert mount.close() is None
    mount.check()


@pytest.mark.needs_cowfs
def test_this_mount_has_the_module(module_mount: Mounted) -> None:
    """Promise: the module was built here, so the tests above did test it."""
    features = json_of(run_command("info", module_mount.path, "--json"))["features"]
    assert {"fallocate", "seek_hole", "copy_file_range", "tmpfile"} <= set(features), json.dumps(
        [features, sys.path]
    )
