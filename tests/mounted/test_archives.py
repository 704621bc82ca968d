"""Promises that rsync, tar and cp carry everything a tree can hold onto a mount and back.

The tests compare all that a program can see of a file, ACLs and capabilities included, and the
places of holes.
"""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Mounted
from tests.mounted.programs import run
from tests.mounted.tree_state import assert_same, make_one_of_everything, tree_state

pytestmark = [pytest.mark.mounted]

BLOCK = 4096
Copy = Callable[[Path, Path], None]


def make_tree(root: Path) -> None:
    """Make one file of every kind, and what is hardest for copying programs."""
    generator = random.Random(5)
    root.mkdir()
    make_one_of_everything(root)

    run("setfacl", "-m", "u:1234:rw-,g:4321:r--,m::r-x", root / "one of everything" / "file")
    private = root / "private"
    private.mkdir(mode=0o750)
    run("setfacl", "-m", "u:1234:rwx,d:u:1234:rwx,d:g::---,d:o::---", private)
    for number in range(5):
        (private / f"inherits {number}").write_bytes(b"x" * number)
    (private / "inherits too").mkdir()
    if os.geteuid() == 0:
        os.setxattr(private, "trusted.colour", b"only root sees it")
        capability = bytes.fromhex("0000000200040000000000000000000000000000")  # net_bind_service
        os.setxattr(root / "one of everything" / "empty", "security.capability", capability)
        for number in range(3):
            os.chown(private / f"inherits {number}", 1234 + number, 4321)

    # Hard links across folders, of a file and of a symbolic link.
    names = []
    for number in range(40):
        folder = root / f"folder {number % 4}" / f"{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        names.append(folder / f"linked {number}")
        if number < 5:
            names[-1].write_bytes(generator.randbytes(3000 * number))
        else:
            os.link(names[number % 5], names[-1])
    (root / "pointer").symlink_to("folder 0/0")
    os.utime(root / "pointer", ns=(0, 1_300_000_000_000_000_001), follow_symlinks=False)
    os.link(root / "pointer", root / "folder 1" / "pointer too", follow_symlinks=False)

    with open(root / "holes", "wb") as file:
        for number in range(30):
            file.seek((number * 20 + generator.randrange(8)) * BLOCK)
            file.write(generator.randbytes(BLOCK * generator.randrange(1, 5)))
        file.truncate(700 * BLOCK + 17)
    with open(root / "nothing but a hole", "wb") as file:
        file.truncate(50 << 20)
    (root / "large").write_bytes(generator.randbytes(3 << 20))
    os.setxattr(root / "large", "user.large", generator.randbytes(3000))

    (root / ("n" * 255)).write_bytes(b"a name as long as they get")
    deep = root
    for level in range(60):
        deep = deep / f"level {level}"
        deep.mkdir()
    (deep / "bottom").write_bytes(b"bottom")
    modes = [0o400, 0o644, 0o755, 0o2755, 0o4711]
    if os.geteuid() == 0:
        modes.append(0)  # only root could read them
    for number in range(300):
        path = root / f"folder {number % 4}" / f"small {number}"
        path.write_bytes(generator.randbytes(generator.randrange(5000)))
        path.chmod(generator.choice(modes))
        os.utime(path, ns=(0, generator.randrange(1 << 60)))
    for folder, _, _ in os.walk(root, topdown=False):
        os.utime(folder, ns=(0, generator.randrange(1 << 60)))


def islands(path: Path) -> list[tuple[int, int]]:
    """The ranges of a file that hold data: begin and end, in blocks."""
    found: list[tuple[int, int]] = []
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        end = 0
        while end < size:
            try:
                begin = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError:
                break  # the rest is a hole
            end = os.lseek(file.fileno(), begin, os.SEEK_HOLE)
            found.append((begin // BLOCK, -(-end // BLOCK)))
    return found


def rsync(source: Path, target: Path) -> None:
    """rsync with all that it can keep; a second run must find nothing to do."""
    options = ("--archive", "--hard-links", "--acls", "--xattrs", "--sparse", "--itemize-changes")
    assert run("rsync", *options, f"{source}/", target)
    assert run("rsync", *options, "--checksum", "--delete", f"{source}/", target) == ""


def tar(source: Path, target: Path) -> None:
    """tar through a pipe, with all that it can keep."""
    target.mkdir()
    keep = "--sparse --acls --xattrs --xattrs-include='*' --numeric-owner"
    script = (
        f'set -o pipefail; tar --create --format=posix {keep} -C "$1" . |'
        f' tar --extract --same-permissions {keep} -C "$2"'
    )
    run("bash", "-c", script, "bash", source, target)


def cp(source: Path, target: Path) -> None:
    """cp with all that it can keep; between filesystems, so no blocks are shared."""
    run("cp", "--archive", "--sparse=always", source, target)


@pytest.mark.long
@pytest.mark.parametrize("copy", [rsync, tar, cp], ids=["rsync", "tar", "cp"])
def test_copies_onto_a_mount_and_back_are_the_tree(
    mount: Mounted, tmp_path: Path, copy: Copy
) -> None:
    """Promise: after the copy, a remount and the copy back, nothing visible has changed."""
    make_tree(tmp_path / "original")
    expected = tree_state(tmp_path / "original")
    sparse = ("holes", "nothing but a hole", "one of everything/sparse", "large")
    data = {name: islands(tmp_path / "original" / name) for name in sparse}
    assert len(data["holes"]) > 20
    assert "system.posix_acl_default" in str(expected["private"]["xattrs"])

    copy(tmp_path / "original", mount.path / "copy")
    for _ in range(2):
        assert_same(expected, tree_state(mount.path / "copy"))
        for name in sparse:
            assert islands(mount.path / "copy" / name) == data[name], name
        mount.remount()

    copy(mount.path / "copy", tmp_path / "back")
    assert_same(expected, tree_state(tmp_path / "back"))
    for name in sparse:
        assert islands(tmp_path / "back" / name) == data[name], name

    # Within the mount cp may share blocks.
    copy(mount.path / "copy", mount.path / "second")
    assert_same(expected, tree_state(mount.path / "second"))


@pytest.mark.needs_cowfs
def test_rsync_and_tar_find_in_a_snapshot_what_was_there(mount: Mounted, tmp_path: Path) -> None:
    """Promise: a backup from a snapshot, made while the tree changes, is the tree of that time."""
    make_tree(mount.path / "tree")
    # A snapshot hides the set-id bits, since it lends nobody the rights of a file's owner.
    run("chmod", "-R", "u-s,g-s", mount.path / "tree")
    expected = tree_state(mount.path / "tree")
    snapshot = mount.snapshot("kept")
    run("rm", "-r", mount.path / "tree" / "private", mount.path / "tree" / "folder 1")
    with open(mount.path / "tree" / "large", "r+b") as file:
        file.write(b"changed" * 100_000)
    rsync(snapshot / "tree", tmp_path / "rsync")
    assert_same(expected, tree_state(tmp_path / "rsync"))
    tar(snapshot / "tree", tmp_path / "tar")
    assert_same(expected, tree_state(tmp_path / "tar"))
