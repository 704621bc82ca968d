"""The ACLs of inodes: stored as xattrs of two reserved names, in step with the mode.

An access ACL is stored only if it says more than the mode. Then its entries for owner, other, and
mask or group equal the bits of the mode. The caller admits, reaches and touches the inode. Stored
values are not trusted: a value that acl.py refuses is a CorruptError.
"""

import errno
import stat

from cowfs.errors import CorruptError, posix_error
from cowfs.files import acl
from cowfs.files.items import Inode
from cowfs.files.xattrs import Xattrs


class StoredAcls:
    """The ACLs of all inodes of one tree."""

    def __init__(self, xattrs: Xattrs) -> None:
        self._xattrs = xattrs

    def check(self, inode: Inode, name: bytes, value: bytes) -> None:
        """Raise CorruptError unless a value from the image is a valid ACL."""
        _decode(inode, name, value)

    def reach_set(self, inode: Inode, name: bytes, value: bytes) -> tuple[int, bytes | None]:
        """Reach what `set` changes.

        Returns:
            The new mode of the inode, and the argument for `set`: None if the mode says as much.

        Raises:
            OSError: EINVAL, the ACL is malformed; E2BIG; EOPNOTSUPP for a symlink; EACCES for a
                default ACL of a file that is not a directory; ENOSPC as for any xattr.
            CorruptError, DeviceError: an item cannot be read.
        """
        if stat.S_ISLNK(inode.mode):
            raise posix_error(errno.EOPNOTSUPP)
        if len(value) > acl.ACL_BYTES_MAX:
            raise posix_error(errno.E2BIG)
        try:
            entries = acl.decode_acl(value)
        except ValueError:
            raise posix_error(errno.EINVAL) from None
        mode = inode.mode
        if name == acl.DEFAULT_NAME:
            if not stat.S_ISDIR(mode):
                raise posix_error(errno.EACCES)
        else:
            mode = mode & ~0o777 | acl.mode_of(entries)
            if acl.is_mode_only(entries):
                self._xattrs.reach_remove(inode, name)
                return mode, None
        encoded = acl.encode_acl(entries)
        self._xattrs.reach_set(inode, name, encoded)
        return mode, encoded

    def set(self, inode: Inode, name: bytes, encoded: bytes | None) -> None:
        """Store the ACL that `reach_set` prepared; None removes the one that is stored."""
        if encoded is None:
            self._xattrs.remove(inode, name)
        else:
            self._xattrs.set(inode, name, encoded)

    def reach_mode(self, inode: Inode, mode: int) -> bytes | None:
        """Reach what a change of the mode changes in the access ACL.

        Returns:
            The access ACL to match the new mode, for `put_access`; None if nothing is to be stored.

        Raises:
            CorruptError, DeviceError: the stored ACL is damaged or cannot be read.
        """
        if not inode.xattr_count:
            return None
        value = self._xattrs.get(inode, acl.ACCESS_NAME)
        if value is None:
            return None
        changed = acl.encode_acl(acl.with_mode(_decode(inode, acl.ACCESS_NAME, value), mode))
        if changed == value:
            return None
        self._xattrs.reach_set(inode, acl.ACCESS_NAME, changed)
        return changed

    def put_access(self, inode: Inode, value: bytes | None) -> None:
        """Store an access ACL; None stores nothing."""
        if value is not None:
            self._xattrs.set(inode, acl.ACCESS_NAME, value)

    def default(self, directory: Inode) -> bytes | None:
        """The stored default ACL of a directory, not decoded; None if it has none."""
        if not directory.xattr_count:
            return None
        return self._xattrs.get(directory, acl.DEFAULT_NAME)

    def inherit(self, directory: Inode, default: bytes, mode: int) -> acl.Inherited:
        """The mode and access ACL that a new file gets from its directory's default ACL.

        Raises:
            CorruptError: the default ACL is malformed.
        """
        try:
            return acl.inherit(default, mode)
        except ValueError as error:
            raise _corrupt(directory, acl.DEFAULT_NAME, error) from None

    def put_inherited(self, inode: Inode, access: bytes | None, default: bytes) -> None:
        """Store the inherited ACLs of a new inode; a directory gets the default ACL too."""
        self.put_access(inode, access)
        if stat.S_ISDIR(inode.mode):
            self._xattrs.set(inode, acl.DEFAULT_NAME, default)


def _decode(inode: Inode, name: bytes, value: bytes) -> acl.Acl:
    try:
        return acl.decode_acl(value)
    except ValueError as error:
        raise _corrupt(inode, name, error) from None


def _corrupt(inode: Inode, name: bytes, error: ValueError) -> CorruptError:
    return CorruptError(f"{name.decode()} of inode {inode.ino}", inode.ino, str(error))
