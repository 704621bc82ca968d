"""Describes all that a program can see of a tree of files, so that two trees can be compared.

`tree_state` maps each path to a record of type, mode, owner, times, size, links, extended
attributes and a hash of the contents. It leaves out what may differ between equal trees: inode
numbers (but keeps which names share one), access and change times, the sizes of directories.
"""

import hashlib
import os
import random
import shutil
import stat
import sysconfig
from pathlib import Path

from tests.sizes import is_long

Record = dict[str, object]
State = dict[str, Record]


def tree_state(root: Path, directory_times: bool = True) -> State:
    """The state of everything below and including `root`.

    Args:
        root: a directory.
        directory_times: false if the directories were made by a program that does not keep times.
    """
    state: State = {}
    first_names: dict[tuple[int, int], str] = {}
    for folder, folder_names, file_names in os.walk(os.fsencode(root)):
        folder_names.sort()
        for name in [b"", *folder_names, *sorted(file_names)]:
            if name in folder_names and not os.path.islink(os.path.join(folder, name)):
                continue  # recorded when the walk is inside
            path = os.path.join(folder, name) if name else folder
            relative = os.fsdecode(os.path.relpath(path, os.fsencode(root)))
            information = os.lstat(path)
            record = _record(path, information)
            if not name and not directory_times:
                del record["mtime_ns"]
            if information.st_nlink > 1 and name:
                key = (information.st_dev, information.st_ino)
                record["same_file_as"] = first_names.setdefault(key, relative)
            state[relative] = record
    return state


def _record(path: bytes, information: os.stat_result) -> Record:
    record: Record = {
        "mode": oct(information.st_mode),
        "uid": information.st_uid,
        "gid": information.st_gid,
        "mtime_ns": information.st_mtime_ns,
        "nlink": information.st_nlink,
        "xattrs": {
            name: os.getxattr(path, name, follow_symlinks=False)
            for name in sorted(os.listxattr(path, follow_symlinks=False))
        },
    }
    if stat.S_ISREG(information.st_mode):
        with open(path, "rb") as file:
            record["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        record["size_bytes"] = information.st_size
    elif stat.S_ISLNK(information.st_mode):
        record["target"] = os.readlink(path)
        record["size_bytes"] = information.st_size
    elif stat.S_ISCHR(information.st_mode) or stat.S_ISBLK(information.st_mode):
        record["device"] = information.st_rdev
    return record


def in_snapshot(state: State) -> State:
    """The same tree as `.snapshots` shows it: without bits that lend the owner's rights.

    An old program could open again a hole that was fixed since.
    """
    shown = {}
    for path, record in state.items():
        mode = int(str(record["mode"]), 8)
        if stat.S_ISREG(mode):
            mode &= ~(stat.S_ISUID | stat.S_ISGID)
        shown[path] = {**record, "mode": oct(mode)}
    return shown


def differences(left: State, right: State) -> list[str]:
    """The differences between two trees, in words; empty if they are equal."""
    found = []
    for path in sorted(left.keys() | right.keys()):
        if path not in right:
            found.append(f"only left: {path}")
        elif path not in left:
            found.append(f"only right: {path}")
        else:
            found += [
                f"{path}: {field} {left[path].get(field)!r} -> {right[path].get(field)!r}"
                for field in sorted(left[path].keys() | right[path].keys())
                if left[path].get(field) != right[path].get(field)
            ]
    return found


def assert_same(left: State, right: State) -> None:
    """Require that two trees are equal; names the first differences."""
    found = differences(left, right)
    assert not found, f"{len(found)} differences:\n" + "\n".join(found[:20])


def make_library(target: Path, *, whole: bool = False) -> None:
    """Make a tree of real files, with one of everything that a tree can hold.

    The files are Python's standard library; in the short run a few packages of it, unless `whole`.
    On top come hard links, symlinks (also broken), odd modes, extended attributes, a sparse file,
    a fifo and, made by root, other owners and a device.
    """
    library = Path(sysconfig.get_path("stdlib"))
    # Some machines have each module compiled three times.
    ignore = shutil.ignore_patterns(
        "site-packages", "dist-packages", "config-*", "test", "*.so", "*.opt-?.pyc"
    )
    if whole or is_long():
        shutil.copytree(library, target, symlinks=True, ignore=ignore)
    else:
        target.mkdir()
        for name in ("asyncio", "collections", "ctypes", "email", "json", "logging", "unittest"):
            shutil.copytree(library / name, target / name, symlinks=True, ignore=ignore)
    make_one_of_everything(target)
    # As in `make_one_of_everything`.
    os.utime(target, ns=(0, 1_500_000_000_123_456_789))


def make_one_of_everything(target: Path) -> None:
    """Make a folder with one of everything that a tree can hold, and a hard link to a file in it.

    Made by root, it has other owners and a device too.
    """
    extra = target / "one of everything"
    extra.mkdir(mode=0o1777)
    (extra / "file").write_bytes(b"contents\n")
    os.link(extra / "file", extra / "hard link")
    os.link(extra / "file", target / "hard link elsewhere")
    (extra / "symlink").symlink_to("file")
    (extra / "broken symlink").symlink_to("/nowhere/" + "x" * 300)
    (extra / "symlink to a directory").symlink_to("..")
    (extra / "empty").touch()
    (extra / "empty directory").mkdir()
    (extra / "name with\nnew line and \udcff").write_bytes(b"not UTF-8")
    (extra / "read only").write_bytes(b"r")
    (extra / "read only").chmod(0o444)
    (extra / "set-user-id").write_bytes(b"x")
    (extra / "set-user-id").chmod(0o4755)
    os.mkfifo(extra / "fifo", 0o620)
    os.setxattr(extra / "file", "user.colour", b"blue")
    os.setxattr(extra / "file", "user.empty", b"")
    os.setxattr(extra, "user.binary", bytes(range(256)) * 4)
    with open(extra / "sparse", "wb") as file:
        file.seek(10 << 20)
        file.write(b"island")
        file.truncate(20 << 20)
    if os.geteuid() == 0:
        os.chown(extra / "read only", 1234, 4321)
        os.mknod(extra / "device", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    # rsync takes times that differ by less than a second for equal, except of regular files.
    for path in extra.iterdir():
        if path.is_symlink() or not path.is_file():
            os.utime(path, ns=(3, 1_400_000_000_123_456_789), follow_symlinks=False)
    os.utime(extra / "empty", ns=(1, 1_234_567_890_123_456_789))
    os.utime(extra / "broken symlink", ns=(2, 987_654_321_000_000_001), follow_symlinks=False)
    os.utime(extra, ns=(0, 1_500_000_000_123_456_789))


def change_heavily(root: Path, seed: int) -> None:
    """Change, move and delete a good part of a tree in every way. Same seed, same changes."""
    generator = random.Random(seed)
    files = sorted(path for path in root.rglob("*.py") if path.is_file() and not path.is_symlink())
    generator.shuffle(files)
    count = len(files)
    assert count > 300, "too few files to change"
    assert root.name, "never the root directory"

    shutil.rmtree(files[0].parent if files[0].parent != root else root / "json")
    for number, path in enumerate(files):
        if not path.exists():
            continue
        what = number % 8
        if what == 0:
            path.unlink()
        elif what == 1:
            os.truncate(path, path.stat().st_size // 2)
        elif what == 2:
            with open(path, "ab") as file:
                file.write(generator.randbytes(generator.randrange(1, 60_000)))
        elif what == 3:
            with open(path, "r+b") as file:
                file.seek(path.stat().st_size // 2)
                file.write(generator.randbytes(5000))
        elif what == 4:
            path.rename(path.with_name(f"moved {number}"))
        elif what == 5:
            path.chmod(0o600)
            os.setxattr(path, "user.changed", str(number).encode())
            os.utime(path, ns=(0, number))
        elif what == 6:
            replacement = path.with_name(f".{path.name}.new")
            replacement.write_bytes(generator.randbytes(generator.randrange(20_000)))
            replacement.replace(path)
        else:
            os.link(path, path.with_name(f"link {number}"))
    for number in range(300):
        (root / f"new {number}").write_bytes(generator.randbytes(100 * number))
    deep = root
    for level in range(30):
        deep = deep / f"level {level}"
        deep.mkdir()
        (deep / "leaf").write_text(str(level), encoding="utf-8")
    shutil.rmtree(root / "one of everything")
