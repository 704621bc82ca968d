"""The ACLs of inodes: stored as xattrs of two reserved names, in step with the mode.

An access ACL is stored only if it says more than the mode, and its entries for owner, other, and mask
or group are then the mode's bits. The caller admits, reaches and touches the inode. A stored value is
not trusted: what acl.py refuses is a CorruptError.
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
        """Raise CorruptError unless a value from the image is an ACL."""
        _decode(inode, name, value)

    def reach_set(self, inode: Inode, name: bytes, value: bytes) -> tuple[int, bytes | None]:
        """Prepare the storing of an ACL.

        Returns:
            The mode that the inode must be given, and what `set` stores: None if the mode says it all.

        Raises:
            OSError: EINVAL it is malformed, E2BIG; EOPNOTSUPP for a symlink; EACCES a default ACL for
                what is no directory. ENOSPC as any xattr.
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
        """Store what `reach_set` prepared, or remove the ACL there is."""
        if encoded is None:
            self._xattrs.remove(inode, name)
        else:
            self._xattrs.set(inode, name, encoded)

    def reach_mode(self, inode: Inode, mode: int) -> bytes | None:
        """Prepare a change of the mode.

        Returns:
            The access ACL that goes with it, for `put_access`; None if nothing is to be stored.
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
        """Store the access ACL that goes with a new mode."""
        if value is not None:
            self._xattrs.set(inode, acl.ACCESS_NAME, value)

    def default(self, directory: Inode) -> bytes | None:
        """The default ACL of a directory."""
        if not directory.xattr_count:
            return None
        return self._xattrs.get(directory, acl.DEFAULT_NAME)

    def inherit(self, directory: Inode, default: bytes, mode: int) -> acl.Inherited:
        """What a new file gets from the default ACL of its directory."""
        try:
            return acl.inherit(default, mode)
        except ValueError as error:
            raise _corrupt(directory, acl.DEFAULT_NAME, error) from None

    def put_inherited(self, inode: Inode, access: bytes | None, default: bytes) -> None:
        """Give a new inode its ACLs."""
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
