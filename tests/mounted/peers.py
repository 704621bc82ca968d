"""cowfs beside the kernel's filesystems, and other users: for tables that must hold on all.

Needs root, to mount ext4 on a loop device and to become other users.
"""

import contextlib
import errno
import marshal
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Mounted, require_clean
from tests.sizes import HANG_SECONDS

KINDS = ("cowfs", "ext4", "tmpfs")
needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can mount ext4 and become other users"
)


@dataclass(frozen=True)
class User:
    """A user who calls; the numbers belong to nobody on usual systems."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


ROOT = User(0, 0)
ANN = User(64001, 64001)
BOB = User(64002, 64002, (64001,))
CARL = User(64003, 64010, (64011, 64012))
DORA = User(64004, 64010)
USERS = (ROOT, ANN, BOB, CARL, DORA)


@contextlib.contextmanager
def open_folder() -> Iterator[Path]:
    """A new folder that all users can reach."""
    # Not below tmp_path: every pytest run closes that to others when it starts.
    with tempfile.TemporaryDirectory(prefix="cowfs-peers-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


@contextlib.contextmanager
def open_mount(size: str = "512M") -> Iterator[Mounted]:
    """A cowfs mount of an image of that size that all users can reach; checked at the end."""
    with open_folder() as folder:
        mount = Mounted(folder, size, ("-o", "allow_other"))
        try:
            mount.start()
            mount.path.chmod(0o755)
            yield mount
        finally:
            trouble = mount.close()
        assert trouble is None, trouble
        require_clean(mount.image)


@contextlib.contextmanager
def peer(kind: str) -> Iterator[Path]:
    """An empty filesystem of one of KINDS, mounted while the block runs; all users can reach it."""
    if kind == "cowfs":
        with open_mount() as mount:
            yield mount.path
        return
    with open_folder() as folder:
        root = folder / "mnt"
        root.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", "size=256m,mode=755", "none", str(root)]
        if kind == "ext4":
            image = folder / "image"
            with open(image, "wb") as file:
                file.truncate(128 << 20)
            make = ["mkfs.ext4", "-q", "-F", "-b", "4096", str(image)]
            subprocess.run(make, check=True, timeout=HANG_SECONDS)
            words = ["mount", "-t", "ext4", "-o", "loop", str(image), str(root)]
        subprocess.run(words, check=True, timeout=HANG_SECONDS)
        try:
            yield root
        finally:
            subprocess.run(["umount", "-l", str(root)], check=True, timeout=HANG_SECONDS)


def outcome(call: Callable[[], Any]) -> Any:
    """The value that a call returns, or the name of its errno."""
    try:
        return call()
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def as_user(user: User, call: Callable[[], Any]) -> Any:
    """The value that a call returns to a user, or the name of its errno. Plain values only."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.close(reader)
            os.setgroups(user.groups)
            os.setresgid(user.gid, user.gid, user.gid)
            os.setresuid(user.uid, user.uid, user.uid)
            with open(writer, "wb") as file:
                marshal.dump(outcome(call), file)
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader, "rb") as file:
        answer = file.read()
    _, status = os.waitpid(child, 0)
    assert not status, f"the process of {user} ended with {status}"
    return marshal.loads(answer)
