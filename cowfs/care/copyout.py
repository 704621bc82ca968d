"""Writes salvaged files below one directory, and nowhere else.

Every component of a path is opened relative to its parent directory, without following links.
Files are only created, with O_EXCL; no existing file is opened for writing. So no name, link or
race leads out of the directory. The caller sets the attributes of a directory once it is filled.
"""

import contextlib
import os
import stat
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from cowfs.errors import UsageError
from cowfs.escapes import escaped
from cowfs.files.acl import ACCESS_NAME, decode_acl, mode_without
from cowfs.files.items import Inode

Path = tuple[bytes, ...]

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_MAX = 64  # directories kept open


def is_safe_name(name: bytes) -> bool:
    """Whether a name is a single path component that does not lead elsewhere."""
    return name not in (b"", b".", b"..") and b"/" not in name and b"\0" not in name


class Destination:
    """An empty directory that files are copied into.

    Paths are relative to it. Methods raise OSError if the host refuses.

    Args:
        folder: made if it is missing.

    Raises:
        UsageError: `folder` is not empty, is no directory, or cannot be made or opened.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.is_root = os.geteuid() == 0
        try:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            self._base = os.open(folder, _DIRECTORY)
        except OSError as error:
            raise UsageError(f"cannot use {os.fspath(folder)}: {error.strerror}") from None
        if os.listdir(self._base):
            os.close(self._base)
            raise UsageError(f"{os.fspath(folder)} is not empty; name an empty directory")
        self._open: OrderedDict[Path, int] = OrderedDict()

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()
        os.close(self._base)

    def _directory(self, path: Path) -> int:
        """A descriptor of a directory below the base. It stays in `_open`; do not close it."""
        if not path:
            return self._base
        descriptor = self._open.get(path)
        if descriptor is not None:
            self._open.move_to_end(path)
            return descriptor
        at = os.dup(self._base)
        for name in path:
            try:
                deeper = os.open(name, _DIRECTORY, dir_fd=at)
            finally:
                os.close(at)
            at = deeper
        self._open[path] = at
        if len(self._open) > _OPEN_MAX:
            os.close(self._open.popitem(last=False)[1])
        return at

    def _parent(self, path: Path) -> tuple[int, bytes]:
        assert path
        assert all(map(is_safe_name, path)), path
        return self._directory(path[:-1]), path[-1]

    def make_directory(self, path: Path) -> None:
        parent, name = self._parent(path)
        os.mkdir(name, 0o700, dir_fd=parent)

    @contextlib.contextmanager
    def make_file(self, path: Path) -> Iterator[int]:
        """A new file, open for writing while the block runs."""
        parent, name = self._parent(path)
        descriptor = os.open(name, _FILE, 0o600, dir_fd=parent)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def make_symlink(self, path: Path, target: bytes) -> None:
        parent, name = self._parent(path)
        os.symlink(target, name, dir_fd=parent)

    def make_fifo(self, path: Path) -> None:
        parent, name = self._parent(path)
        os.mkfifo(name, 0o600, dir_fd=parent)

    def make_link(self, old: Path, path: Path) -> None:
        old_parent, old_name = self._parent(old)
        parent, name = self._parent(path)
        os.link(old_name, name, src_dir_fd=old_parent, dst_dir_fd=parent, follow_symlinks=False)

    def set_attributes(
        self, path: Path, inode: Inode, xattrs: Sequence[tuple[bytes, bytes]]
    ) -> list[str]:
        """Set owner, xattrs, mode and times of a file or directory.

        Returns:
            What could not be set, each worded like "its times".
        """
        refused = []
        parent, name = self._parent(path)
        times = (inode.atime_ns, inode.mtime_ns)
        if self.is_root:
            os.chown(name, inode.uid, inode.gid, dir_fd=parent, follow_symlinks=False)
        file_type = stat.S_IFMT(inode.mode)
        if file_type in (stat.S_IFREG, stat.S_IFDIR):
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
            try:
                names = self._set_xattrs(descriptor, xattrs)
                refused = [f"its attribute {escaped(name)}" for name in names]
                mode = inode.mode & 0o7777
                if ACCESS_NAME in names:
                    mode &= 0o7000 | _mode_mask_without(dict(xattrs)[ACCESS_NAME])
                if not self.is_root and file_type == stat.S_IFREG:
                    mode &= 0o1777  # a set-id bit means nothing without its owner
                os.fchmod(descriptor, mode)
            finally:
                os.close(descriptor)
        elif xattrs:
            refused = ["its extended attributes"]
        try:
            os.utime(name, ns=times, dir_fd=parent, follow_symlinks=False)
        except (OSError, OverflowError):
            refused.append("its times")
        return refused

    def _set_xattrs(self, descriptor: int, xattrs: Sequence[tuple[bytes, bytes]]) -> list[bytes]:
        """Set xattrs; the names of those that could not be set."""
        refused = []
        for name, value in xattrs:
            if not (self.is_root or name.startswith(b"user.")):
                refused.append(name)
                continue
            try:
                os.setxattr(descriptor, name, value)
            except (OSError, ValueError):
                refused.append(name)
        return refused


def _mode_mask_without(access: bytes) -> int:
    """The permission bits that a file may keep if its access ACL cannot be set.

    With an ACL, the group bits of the mode are the ACL's mask. Without it they would give the
    group rights that it did not have.
    """
    try:
        return mode_without(decode_acl(access))
    except ValueError:
        return 0o707
