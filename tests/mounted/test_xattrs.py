"""Promises about extended attributes on a mount: answers are those of ext4 and tmpfs.

Every table runs on all three where their limits allow; what only cowfs can hold runs on it alone.
"""

import ctypes
import os
import random
import re
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.commands import run_command
from tests.conftest import Mounted, require_clean, require_success
from tests.mounted.peers import (
    ANN,
    BOB,
    CARL,
    KINDS,
    ROOT,
    as_user,
    needs_root,
    open_mount,
    outcome,
    peer,
)
from tests.sizes import HANG_SECONDS

pytestmark = [
    pytest.mark.mounted,
    pytest.mark.needs_cowfs,
    pytest.mark.xdist_group("xattrs"),
    needs_root,
]

LIBC = ctypes.CDLL(None, use_errno=True)
VALUE_MAX = 65536
LIST_MAX = 65536
ALL = (ROOT, ANN, BOB, CARL)
NAMESPACES = ("user", "trusted", "security")


@pytest.fixture(scope="module")
def places() -> Iterator[dict[str, Path]]:
    with peer("cowfs") as cowfs, peer("ext4") as ext4, peer("tmpfs") as tmpfs:
        yield {"cowfs": cowfs, "ext4": ext4, "tmpfs": tmpfs}


@pytest.fixture(params=KINDS)
def folder(places: dict[str, Path], request: pytest.FixtureRequest) -> Path:
    """An empty directory, on each kind of filesystem in turn; everybody may write to it."""
    place: Path = places[request.param] / re.sub(r"\W", "-", request.node.name)
    place.mkdir()
    place.chmod(0o777)
    return place


@pytest.fixture
def file(folder: Path) -> Path:
    """A file that belongs to ANN."""
    path = folder / "file"
    path.touch()
    os.chown(path, ANN.uid, ANN.gid)
    path.chmod(0o644)
    return path


def get_into(path: Path, name: str, size: int) -> int | str:
    """getxattr(2) with a buffer of that size: the returned length, or the name of the errno."""
    buffer = ctypes.create_string_buffer(max(size, 1))
    return told(LIBC.getxattr(os.fsencode(path), name.encode(), buffer, ctypes.c_size_t(size)))


def list_into(path: Path, size: int) -> int | str:
    buffer = ctypes.create_string_buffer(max(size, 1))
    return told(LIBC.listxattr(os.fsencode(path), buffer, ctypes.c_size_t(size)))


def told(result: int) -> int | str:
    if result >= 0:
        return result

    def fail() -> str:
        raise OSError(ctypes.get_errno(), "")

    answer: str = outcome(fail)
    return answer


def setter(path: Path, name: str, value: bytes = b"x", flags: int = 0) -> Callable[[], None]:
    return lambda: os.setxattr(path, name, value, flags, follow_symlinks=False)


def getter(path: Path, name: str) -> Callable[[], bytes]:
    return lambda: os.getxattr(path, name, follow_symlinks=False)


def remover(path: Path, name: str) -> Callable[[], None]:
    return lambda: os.removexattr(path, name, follow_symlinks=False)


# --- who may --------------------------------------------------------------------------------------


def test_trusted_attributes_are_roots_alone(file: Path) -> None:
    """Promise: others, even the file's owner, cannot see, read, set or remove them."""
    os.setxattr(file, "trusted.t", b"secret")
    os.setxattr(file, "user.u", b"open")
    assert sorted(os.listxattr(file)) == ["trusted.t", "user.u"]
    for user in (ANN, BOB):
        assert as_user(user, lambda: sorted(os.listxattr(file))) == ["user.u"]
        assert as_user(user, getter(file, "trusted.t")) == "ENODATA"
        assert as_user(user, setter(file, "trusted.t")) == "EPERM"
        assert as_user(user, remover(file, "trusted.t")) == "EPERM"
        assert as_user(user, lambda: list_into(file, 0)) == len("user.u") + 1
    assert os.getxattr(file, "trusted.t") == b"secret"


def test_security_attributes_are_set_by_root_and_read_by_all(file: Path) -> None:
    """Promise: only root sets security attributes; everybody can read them."""
    os.setxattr(file, "security.s", b"label")
    for user in (ANN, BOB):
        assert as_user(user, getter(file, "security.s")) == b"label"
        assert as_user(user, setter(file, "security.s")) == "EPERM"
        assert as_user(user, remover(file, "security.s")) == "EPERM"
        assert as_user(user, lambda: os.listxattr(file)) == ["security.s"]
        assert as_user(user, setter(file, "security.capability", CAPABILITY)) == "EPERM"


CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")


def test_a_capability_goes_with_a_write(file: Path) -> None:
    """Promise: a program that is changed loses its file capability."""
    os.setxattr(file, "security.capability", CAPABILITY)
    assert os.getxattr(file, "security.capability") == CAPABILITY
    assert as_user(ANN, lambda: file.write_bytes(b"changed")) == 7
    assert outcome(getter(file, "security.capability")) == "ENODATA"
    assert outcome(setter(file, "security.capability", b"nonsense")) == "EINVAL"


@pytest.mark.parametrize(
    ("mode", "reads", "writes"), [(0o644, True, False), (0o600, False, False), (0o622, False, True)]
)
def test_user_attributes_follow_the_mode(file: Path, mode: int, reads: bool, writes: bool) -> None:
    """Promise: readers of the file read them, writers set them; everybody sees the names."""
    os.setxattr(file, "user.u", b"v")
    file.chmod(mode)
    assert as_user(BOB, getter(file, "user.u")) == (b"v" if reads else "EACCES")
    assert as_user(BOB, setter(file, "user.u", b"v")) == (None if writes else "EACCES")
    assert as_user(CARL, setter(file, "user.w", b"v")) == (None if writes else "EACCES")
    assert as_user(CARL, remover(file, "user.u")) == (None if writes else "EACCES")
    wanted = ["user.w"] if writes else ["user.u"]
    assert as_user(CARL, lambda: os.listxattr(file)) == wanted
    assert as_user(ANN, setter(file, "user.a", b"v")) is None
    assert as_user(ROOT, setter(file, "user.r", b"v")) is None


def test_a_sticky_directory_takes_attributes_from_its_owner_only(folder: Path) -> None:
    """Promise: in a sticky directory, such as /tmp, only its owner sets attributes of it."""
    os.chown(folder, ANN.uid, ANN.gid)
    assert as_user(BOB, setter(folder, "user.b")) is None
    folder.chmod(0o1777)
    assert as_user(BOB, setter(folder, "user.c")) == "EPERM"
    assert as_user(BOB, remover(folder, "user.b")) == "EPERM"
    assert as_user(BOB, getter(folder, "user.b")) == b"x"
    assert as_user(ANN, setter(folder, "user.c")) is None
    assert as_user(ROOT, setter(folder, "user.d")) is None


@pytest.mark.parametrize("kind", ["symlink", "dangling", "fifo", "socket", "character", "block"])
def test_user_attributes_are_for_files_and_directories(folder: Path, kind: str) -> None:
    """Promise: user attributes are EPERM on other types; root's namespaces work on all."""
    path = folder / kind
    types = {"fifo": stat.S_IFIFO, "socket": stat.S_IFSOCK, "character": stat.S_IFCHR}
    if kind in ("symlink", "dangling"):
        (folder / "target").touch() if kind == "symlink" else None
        path.symlink_to("target")
    else:
        os.mknod(path, types.get(kind, stat.S_IFBLK) | 0o666, os.makedev(1, 3))
    assert outcome(setter(path, "user.u")) == "EPERM"
    assert outcome(getter(path, "user.u")) == "ENODATA"
    assert outcome(remover(path, "user.u")) == "EPERM"
    for name in ("trusted.t", "security.s"):
        assert outcome(getter(path, name)) == "ENODATA"
        os.setxattr(path, name, b"v", follow_symlinks=False)
        assert os.getxattr(path, name, follow_symlinks=False) == b"v"
    listed = os.listxattr(path, follow_symlinks=False)
    assert sorted(listed) == ["security.s", "trusted.t"]
    if kind == "symlink":
        os.setxattr(path, "user.u", b"of the target")
        assert os.listxattr(folder / "target") == ["user.u"]
    os.removexattr(path, "trusted.t", follow_symlinks=False)


# --- names and flags ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("other.x", "ENOTSUP"),
        ("nothing", "ENOTSUP"),
        ("system.x", "ENOTSUP"),
        ("system.posix_acl_other", "ENOTSUP"),
        ("usr.x", "ENOTSUP"),
        ("User.x", "ENOTSUP"),
        (".x", "ENOTSUP"),
        ("user.", "EINVAL"),
        ("trusted.", "EINVAL"),
        ("security.", "EINVAL"),
        ("", "ERANGE"),
        ("user." + "x" * 251, "ERANGE"),
    ],
)
def test_impossible_names_are_refused(file: Path, name: str, answer: str) -> None:
    """Promise: names in other namespaces are EOPNOTSUPP, and nothing is stored."""
    assert outcome(setter(file, name)) == answer
    assert outcome(getter(file, name)) == answer
    assert outcome(remover(file, name)) == answer
    assert os.listxattr(file) == []


@pytest.mark.parametrize(
    "name",
    [
        "user.x",
        "user." + "x" * 250,
        "user.with a space and a newline\n",
        'user.="quoted"',
        "user.ünïcödé ☃",
        "user.a.b.c",
        "user.user.",
        "trusted." + "t" * 247,
        "security.nobody",
        "user.\udcff\udc80",
    ],
)
def test_any_name_keeps_its_value(file: Path, name: str) -> None:
    """Promise: names are bytes, up to 255 of them."""
    for value in (b"", b"\0", b"value", bytes(range(256))):
        os.setxattr(file, name, value)
        assert os.getxattr(file, name) == value
        assert os.listxattr(file) == [name]
    os.removexattr(file, name)
    assert os.listxattr(file) == []
    assert outcome(getter(file, name)) == "ENODATA"


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_create_and_replace(file: Path, namespace: str) -> None:
    """Promise: XATTR_CREATE never replaces and XATTR_REPLACE never creates."""
    name = f"{namespace}.flags"
    assert outcome(setter(file, name, b"1", os.XATTR_REPLACE)) == "ENODATA"
    assert outcome(getter(file, name)) == "ENODATA"
    assert outcome(setter(file, name, b"2", os.XATTR_CREATE)) is None
    assert outcome(setter(file, name, b"3", os.XATTR_CREATE)) == "EEXIST"
    assert os.getxattr(file, name) == b"2"
    assert outcome(setter(file, name, b"4", os.XATTR_REPLACE)) is None
    assert os.getxattr(file, name) == b"4"
    assert outcome(setter(file, name, b"5", 8)) == "EINVAL"
    assert outcome(setter(file, name, b"", os.XATTR_REPLACE)) is None
    assert outcome(setter(file, name, b"6", os.XATTR_CREATE)) == "EEXIST"
    assert os.getxattr(file, name) == b""
    assert outcome(remover(file, name)) is None
    assert outcome(remover(file, name)) == "ENODATA"
    assert outcome(setter(file, name, b"", os.XATTR_CREATE)) is None
    assert os.getxattr(file, name) == b""


def test_small_buffers_and_questions_of_size(file: Path) -> None:
    """Promise: size 0 asks for the length; a small buffer is ERANGE; one that fits is filled."""
    assert list_into(file, 0) == 0
    for size in (0, 1, 2, 100, 1000, 2000):
        name = f"user.{size}"
        os.setxattr(file, name, b"v" * size)
        assert get_into(file, name, 0) == size
        if size:
            assert get_into(file, name, size) == size
            assert get_into(file, name, size + 1) == size
        if size > 1:
            assert get_into(file, name, size - 1) == "ERANGE"
            assert get_into(file, name, 1) == "ERANGE"
    names = sum(len(f"user.{size}") + 1 for size in (0, 1, 2, 100, 1000, 2000))
    assert list_into(file, 0) == names
    assert list_into(file, names) == names
    assert list_into(file, names - 1) == "ERANGE"
    assert get_into(file, "user.none", 10) == "ENODATA"


def test_what_an_attribute_does_to_times(file: Path) -> None:
    """Promise: setting or removing an attribute moves ctime, not mtime; reading moves none."""

    def times() -> tuple[int, int]:
        status = file.stat()
        return status.st_mtime_ns, status.st_ctime_ns

    before = times()
    for call, moves in (
        (setter(file, "user.u"), True),
        (getter(file, "user.u"), False),
        (lambda: os.listxattr(file), False),
        (remover(file, "user.u"), True),
        (remover(file, "user.u"), False),
        (setter(file, "user.u", b"", os.XATTR_REPLACE), False),
    ):
        time.sleep(0.012)  # the clock of files advances every 10 ms at most
        outcome(call)
        after = times()
        assert after[0] == before[0]
        assert (after[1] > before[1]) == moves
        before = after


def test_descriptors_hard_links_and_renames(folder: Path) -> None:
    """Promise: attributes belong to the inode, whatever name or descriptor is used."""
    path, link, moved = folder / "a", folder / "b", folder / "c"
    path.touch()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.setxattr(descriptor, "user.fd", b"1")
        os.link(path, link)
        assert os.getxattr(link, "user.fd") == b"1"
        os.rename(path, moved)
        os.setxattr(moved, "user.name", b"2")
        assert sorted(os.listxattr(descriptor)) == ["user.fd", "user.name"]
        link.unlink()
        moved.unlink()
        assert os.getxattr(descriptor, "user.name") == b"2"
        os.removexattr(descriptor, "user.fd")
        assert os.listxattr(descriptor) == ["user.name"]
    finally:
        os.close(descriptor)
    path.touch()
    assert os.listxattr(path) == []


def test_attributes_follow_a_model(file: Path) -> None:
    """Promise: after any settings, larger or smaller, and removals they equal a dictionary."""
    choice = random.Random(11)
    model: dict[str, bytes] = {}
    names = [f"{space}.{number}" for space in NAMESPACES for number in range(4)]
    for _ in range(250):
        name = choice.choice(names)
        if choice.random() < 0.25:
            assert outcome(remover(file, name)) == (None if name in model else "ENODATA")
            model.pop(name, None)
        else:
            model[name] = choice.randbytes(choice.choice([0, 1, 10, 100, 200]))
            os.setxattr(file, name, model[name])
    assert {name: os.getxattr(file, name) for name in os.listxattr(file)} == model
    assert len(os.listxattr(file)) == len(model)


# --- limits: cowfs alone, for ext4 ends at a block ------------------------------------------------


@pytest.fixture
def large(places: dict[str, Path], request: pytest.FixtureRequest) -> Path:
    path = places["cowfs"] / re.sub(r"\W", "-", request.node.name)
    path.touch()
    return path


def test_values_up_to_64_kib(large: Path) -> None:
    """Promise: every size around a chunk and up to Linux's limit works, replacing any other."""
    choice = random.Random(3)
    sizes = [0, 1, 2047, 2048, 2049, 4095, 4096, 4097, 30_000, VALUE_MAX - 1, VALUE_MAX]
    for size in sizes + choice.sample(sizes, len(sizes)) + [VALUE_MAX, 0, VALUE_MAX, 1]:
        value = choice.randbytes(size)
        os.setxattr(large, "user.v", value)
        assert os.getxattr(large, "user.v") == value
        assert get_into(large, "user.v", 0) == size
    assert outcome(setter(large, "user.v", bytes(VALUE_MAX + 1))) == "E2BIG"
    assert os.getxattr(large, "user.v") == value
    for number in range(20):
        os.setxattr(large, f"user.{number}", bytes([number]) * VALUE_MAX)
    for number in range(20):
        assert os.getxattr(large, f"user.{number}") == bytes([number]) * VALUE_MAX


def test_thousands_on_one_file(large: Path) -> None:
    """Promise: thousands can be set, read, removed; a list over 64 KiB is E2BIG as elsewhere."""
    names = [f"user.number {number:06d}" for number in range(5000)]
    size = len(names[0]) + 1
    fits = LIST_MAX // size
    for number, name in enumerate(names):
        os.setxattr(large, name, name.encode())
        if number + 1 == fits:
            assert sorted(os.listxattr(large)) == names[:fits]
            assert list_into(large, 0) == fits * size
    assert outcome(lambda: os.listxattr(large)) == "E2BIG"
    assert list_into(large, LIST_MAX) == "E2BIG"
    for name in names[::97]:
        assert os.getxattr(large, name) == name.encode()
        os.setxattr(large, name, b"new", os.XATTR_REPLACE)
        assert os.getxattr(large, name) == b"new"
    for name in names[fits:]:
        os.removexattr(large, name)
    assert sorted(os.listxattr(large)) == names[:fits]
    for name in names[:fits]:
        os.removexattr(large, name)
    assert os.listxattr(large) == []


def test_a_full_filesystem_refuses_attributes_whole() -> None:
    """Promise C10: ENOSPC, never half a value; removing works and makes room."""
    with open_mount(size="64M") as mount:
        root = mount.path
        path = root / "file"
        path.touch()
        value, made, answer = os.urandom(VALUE_MAX), 0, None
        while answer is None:
            if made % 100 == 0:
                path = root / f"file {made}"
                path.touch()
            answer = outcome(setter(path, f"user.{made}", value))
            made += answer is None
        assert answer == "ENOSPC"
        assert made > 200
        last = made - 1
        assert os.getxattr(root / f"file {last // 100 * 100}", f"user.{last}") == value
        assert outcome(getter(path, f"user.{made}")) == "ENODATA"
        for number in range(100):
            os.removexattr(root / "file 0", f"user.{number}")
        require_success(run_command("sync", root))
        os.setxattr(root / "file 0", "user.again", value)


# --- the past, and crashes ------------------------------------------------------------------------


@pytest.fixture
def own() -> Iterator[Mounted]:
    with open_mount() as mount:
        yield mount


def everything(path: Path) -> dict[str, bytes]:
    return {name: os.getxattr(path, name) for name in os.listxattr(path)}


def test_snapshots_and_rollback_keep_attributes(own: Mounted) -> None:
    """Promise: a snapshot keeps names and values; rollback restores them, and undo reverts that."""
    file, root = own.path / "file", own.path
    file.touch()
    old = {"user.large": os.urandom(VALUE_MAX), "user.empty": b"", "trusted.t": b"t"}
    for name, value in old.items():
        os.setxattr(file, name, value)
        os.setxattr(root, name, value[:100])
    past = own.snapshot("past")
    os.setxattr(file, "user.large", b"small now")
    os.setxattr(file, "user.empty", b"not any more")
    os.removexattr(file, "trusted.t")
    os.removexattr(root, "user.large")
    new = everything(file)
    assert everything(past / "file") == old
    for call in (setter(past / "file", "user.x"), remover(past / "file", "user.large")):
        assert outcome(call) == "EROFS"
    assert outcome(setter(past.parent, "user.x")) == "EROFS"
    assert os.listxattr(past.parent) == []
    own.rollback("past")
    assert everything(file) == old
    assert everything(root) == {name: value[:100] for name, value in old.items()}
    require_success(run_command("undo", root))
    assert everything(file) == new
    assert "user.large" not in os.listxattr(root)


@pytest.mark.parametrize("turn", range(3))
def test_attributes_survive_a_crash_after_fsync(own: Mounted, turn: int) -> None:
    """Promise C1, C2: fsync makes attributes durable; later ones are there whole or not at all."""
    file = own.path / "file"
    file.touch()
    choice = random.Random(turn)
    for number in range(30):
        os.setxattr(file, f"user.{number}", choice.randbytes(choice.choice([10, 3000, VALUE_MAX])))
    for number in range(0, 30, 3):
        os.removexattr(file, f"user.{number}")
    kept = everything(file)
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    later = {"user.later": choice.randbytes(VALUE_MAX), "user.1": b"replaced"}
    for name, value in later.items():
        os.setxattr(file, name, value)
    own.kill()
    require_clean(own.image)
    own.remount()
    assert everything(file) in (kept, kept | {"user.later": later["user.later"]}, kept | later)


def test_programs_carry_attributes_over(places: dict[str, Path], tmp_path: Path) -> None:
    """Promise: getfattr and setfattr dump and restore; cp, rsync and tar copy all namespaces."""
    source, roots = places["cowfs"] / "source", [places["ext4"], places["cowfs"]]
    source.mkdir()
    for number in range(8):
        path = source / f"file {number}"
        path.touch()
        for space in NAMESPACES:
            os.setxattr(path, f"{space}.n{number}", os.urandom(number * 20))
    wanted = {path.name: everything(path) for path in source.iterdir()}

    def run(*words: str | os.PathLike[str], at: Path) -> str:
        done = subprocess.run(
            [os.fspath(word) for word in words],
            cwd=at,
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
        )
        assert not done.returncode, done.stderr
        return done.stdout

    for number, root in enumerate(roots):
        copies = [root / f"{name}-{number}" for name in ("cp", "rsync", "tar", "dump")]
        for copy in copies:
            copy.mkdir()
        run("cp", "-a", f"{source}/.", copies[0], at=source)
        run("rsync", "-aX", f"{source}/", copies[1], at=source)
        archive = tmp_path / "archive"
        run("tar", "--xattrs", "--create", "--file", archive, ".", at=source)
        run("tar", "--xattrs", "--xattrs-include=*", "-xpf", archive, at=copies[2])
        dump = tmp_path / "dump"
        dump.write_text(run("getfattr", "-R", "-d", "-m", "-", ".", at=source))
        for name in wanted:
            (copies[3] / name).touch()
        run("setfattr", f"--restore={dump}", at=copies[3])
        for copy in copies:
            assert {path.name: everything(path) for path in copy.iterdir()} == wanted, copy
