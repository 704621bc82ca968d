"""POSIX ACLs as values: encoding, the mode that goes with an ACL, and inheritance by new files.

Pure functions. On disk and on the wire an ACL has the bytes of the kernel's system.posix_acl_access
and system.posix_acl_default (linux/posix_acl_xattr.h, version 2): FORMAT.md "ACL". Names and rules
follow the kernel's fs/posix_acl.c, so programs see the same behaviour as on the kernel's own
filesystems. The kernel reads these values and decides who may do what.
"""

import functools
import struct
from typing import NamedTuple

ACCESS_NAME = b"system.posix_acl_access"
DEFAULT_NAME = b"system.posix_acl_default"
NAMES = frozenset((ACCESS_NAME, DEFAULT_NAME))

ACL_HEADER = struct.Struct("<I")
ACL_ENTRY = struct.Struct("<HHI")
ACL_VERSION = 2
ACL_BYTES_MAX = 4096  # the kernel asks FUSE for no more than one page
ACL_NO_ID = 0xFFFFFFFF  # id of an entry without a named user or group

TAG_OWNER = 0x01  # entries are sorted by tag
TAG_USER = 0x02
TAG_GROUP_OWNER = 0x04
TAG_GROUP = 0x08
TAG_MASK = 0x10
TAG_OTHER = 0x20

_NAMED = (TAG_USER, TAG_GROUP)
_TAGS = (TAG_OWNER, TAG_USER, TAG_GROUP_OWNER, TAG_GROUP, TAG_MASK, TAG_OTHER)
_PERMISSIONS = 0o7


class AclEntry(NamedTuple):
    """`permissions`: 0 to 7, as in a mode. `id`: the named user or group, or ACL_NO_ID."""

    tag: int
    permissions: int
    id: int = ACL_NO_ID


Acl = tuple[AclEntry, ...]


class Inherited(NamedTuple):
    """Mode and access ACL of a new file. `access` is None if it would say no more than the mode."""

    mode: int
    access: bytes | None


def decode_acl(value: bytes) -> Acl:
    """Decode an ACL that is valid by the rules of the kernel's posix_acl_valid().

    Raises:
        ValueError: what is wrong with the ACL, in words.
    """
    if len(value) > ACL_BYTES_MAX:
        raise ValueError(f"{len(value)} bytes are too many")
    if len(value) < ACL_HEADER.size or (len(value) - ACL_HEADER.size) % ACL_ENTRY.size:
        raise ValueError(f"{len(value)} bytes are not a whole number of entries")
    (version,) = ACL_HEADER.unpack_from(value)
    if version != ACL_VERSION:
        raise ValueError(f"its version is {version}")
    entries = []
    for tag, permissions, id_ in ACL_ENTRY.iter_unpack(value[ACL_HEADER.size :]):
        if tag not in _TAGS:
            raise ValueError(f"unknown tag {tag:#x}")
        if permissions & ~_PERMISSIONS:
            raise ValueError(f"unknown permissions {permissions:#o}")
        if tag not in _NAMED:
            id_ = ACL_NO_ID
        elif id_ == ACL_NO_ID:
            raise ValueError("an entry for a named user or group has no id")
        entries.append(AclEntry(tag, permissions, id_))
    _check_tags([entry.tag for entry in entries])
    return tuple(entries)


def _check_tags(tags: list[int]) -> None:
    if tags != sorted(tags):
        raise ValueError("its entries are not in order")
    for tag in (TAG_OWNER, TAG_GROUP_OWNER, TAG_OTHER):
        if tags.count(tag) != 1:
            raise ValueError(f"{tags.count(tag)} entries with the tag {tag:#x}")
    masks = tags.count(TAG_MASK)
    if masks > 1 or (not masks and (TAG_USER in tags or TAG_GROUP in tags)):
        raise ValueError(f"{masks} masks")


def encode_acl(acl: Acl) -> bytes:
    """The bytes of a valid ACL."""
    return ACL_HEADER.pack(ACL_VERSION) + b"".join([ACL_ENTRY.pack(*entry) for entry in acl])


def mode_of(acl: Acl) -> int:
    """The permission bits of a file with that access ACL. A mask stands for the group's bits."""
    mode = 0
    for tag, permissions, _ in acl:
        if tag == TAG_OWNER:
            mode |= permissions << 6
        elif tag in (TAG_GROUP_OWNER, TAG_MASK):
            mode = mode & ~0o070 | permissions << 3
        elif tag == TAG_OTHER:
            mode |= permissions
    return mode


def mode_without(acl: Acl) -> int:
    """The permission bits for a file that loses that access ACL, so that nobody gains access."""
    group = next(permissions for tag, permissions, _ in acl if tag == TAG_GROUP_OWNER)
    return mode_of(acl) & (0o707 | group << 3)


def is_mode_only(acl: Acl) -> bool:
    """Whether the ACL says no more than its mode."""
    return all(tag not in (*_NAMED, TAG_MASK) for tag, _, _ in acl)


def with_mode(acl: Acl, mode: int) -> Acl:
    """The access ACL of a file after chmod. The group's bits go to the mask if there is one."""
    group = TAG_MASK if any(tag == TAG_MASK for tag, _, _ in acl) else TAG_GROUP_OWNER
    shifts = {TAG_OWNER: 6, group: 3, TAG_OTHER: 0}
    return tuple(
        AclEntry(tag, mode >> shifts[tag] & _PERMISSIONS, id_)
        if tag in shifts
        else AclEntry(tag, permissions, id_)
        for tag, permissions, id_ in acl
    )


@functools.lru_cache(maxsize=256)
def inherit(default: bytes, mode: int) -> Inherited:
    """Mode and access ACL of a file made in a directory with a default ACL. The umask is ignored.

    Args:
        default: the directory's default ACL, encoded.
        mode: the mode asked for, with the file type.

    Raises:
        ValueError: the default ACL is malformed.
    """
    acl = decode_acl(default)
    allowed = mode & mode_of(acl)
    access = with_mode(acl, allowed)
    return Inherited(mode & ~0o777 | allowed, None if is_mode_only(access) else encode_acl(access))
