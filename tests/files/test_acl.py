"""Promises about POSIX ACLs without a kernel: their bytes, their mode, inheritance, chmod, damage.

The reference implementation below states the rules of acl(5) a second time, with dictionaries and
letters.
"""

import errno
import re
import stat
import struct
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cowfs.care.check import check_image
from cowfs.errors import CorruptError, NoSpaceError
from cowfs.files.acl import (
    ACCESS_NAME,
    ACL_BYTES_MAX,
    DEFAULT_NAME,
    NAMES,
    Acl,
    AclEntry,
    decode_acl,
    encode_acl,
    inherit,
    is_mode_only,
    mode_of,
    mode_without,
    with_mode,
)
from cowfs.files.calls import Changes
from cowfs.files.volume import Volume
from cowfs.history.filesystem import Filesystem
from cowfs.history.images import make_filesystem, open_filesystem
from tests.model.behind import changing
from tests.model.devices import MemoryDevice

ROOT = 1
NO_ID = 0xFFFFFFFF
LETTERS = {0x01: "o", 0x02: "u", 0x04: "p", 0x08: "g", 0x10: "m", 0x20: "x"}
VALID = re.compile(r"o(u*p(g*)mx|px)")

permissions = st.integers(0, 7)
modes = st.integers(0, 0o7777)
ids = st.lists(st.integers(0, NO_ID - 1), max_size=4)


@st.composite
def acls(draw: st.DrawFn) -> Acl:
    """Any valid ACL."""
    users = [AclEntry(0x02, draw(permissions), id_) for id_ in draw(ids)]
    groups = [AclEntry(0x08, draw(permissions), id_) for id_ in draw(ids)]
    masked = bool(users or groups) or draw(st.booleans())
    mask = [AclEntry(0x10, draw(permissions))] if masked else []
    owner, group, other = (AclEntry(tag, draw(permissions)) for tag in (0x01, 0x04, 0x20))
    return (owner, *users, group, *groups, *mask, other)


def raw(*entries: tuple[int, int, int], version: int = 2) -> bytes:
    """Entries (tag, permissions, id) as bytes, right or wrong."""
    body = b"".join(struct.pack("<HHI", *entry) for entry in entries)
    return struct.pack("<I", version) + body


def classes(acl: Acl) -> dict[str, int]:
    """The permissions of owner, group class and others."""
    found = {LETTERS[entry.tag]: entry.permissions for entry in acl if entry.tag not in (2, 8)}
    return {"user": found["o"], "group": found.get("m", found["p"]), "other": found["x"]}


def octal(acl: Acl) -> int:
    three = classes(acl)
    return int(f"{three['user']}{three['group']}{three['other']}", 8)


# --- the values themselves ------------------------------------------------------------------------


@given(acls())
def test_acl_survives_its_bytes(acl: Acl) -> None:
    """Promise: an ACL survives encoding and decoding."""
    value = encode_acl(acl)
    assert value == raw(*acl)
    assert decode_acl(value) == acl


@example(
    (AclEntry(1, 7), AclEntry(4, 7), AclEntry(16, 7), AclEntry(32, 7)), [("repeat", 2, 0)], 2, 0
)
@given(
    acls(),
    st.lists(
        st.tuples(
            st.sampled_from(["swap", "drop", "repeat", "tag", "permissions", "id"]),
            st.integers(0, 12),
            st.sampled_from([*LETTERS, *range(16), 0xFFFF, NO_ID]),
        ),
        max_size=2,
    ),
    st.sampled_from([2, 2, 2, 2, 1, 3, 0]),
    st.sampled_from([0, 0, 0, 0, 1, -1, -3]),
)
def test_only_what_the_kernel_takes_is_an_acl(
    acl: Acl, edits: list[tuple[str, int, int]], version: int, cut: int
) -> None:
    """Promise: by the kernel's rules any bytes are either a valid ACL or raise ValueError."""
    entries = [tuple(entry) for entry in acl]
    for edit, place, number in edits:
        at = place % len(entries)
        tag, bits, id_ = entries[at]
        if edit == "swap":
            entries[at], entries[at - 1] = entries[at - 1], entries[at]
        elif edit == "drop" and len(entries) > 1:
            del entries[at]
        elif edit == "repeat":
            entries.insert(at, entries[at])
        elif edit == "tag":
            entries[at] = (number & 0xFFFF, bits, id_)
        elif edit == "permissions":
            entries[at] = (tag, number & 0xFFFF, id_)
        elif edit == "id":
            entries[at] = (tag, bits, number)
    value = raw(*entries, version=version)
    value = value[:cut] if cut < 0 else value + bytes(cut)
    tags = "".join(LETTERS.get(tag, "?") for tag, _, _ in entries)
    allowed = (
        version == 2
        and not cut
        and VALID.fullmatch(tags) is not None
        and all(bits < 8 for _, bits, _ in entries)
        and all(id_ != NO_ID for tag, _, id_ in entries if tag in (2, 8))
    )
    if not allowed:
        with pytest.raises(ValueError):  # noqa: PT011  # its message is for people
            decode_acl(value)
        return
    assert [entry.tag for entry in decode_acl(value)] == [tag for tag, _, _ in entries]


@given(st.binary(max_size=80))
def test_any_bytes_are_an_acl_or_refused(value: bytes) -> None:
    """Promise: a hostile value raises ValueError and nothing else."""
    try:
        acl = decode_acl(value)
    except ValueError:
        return
    assert decode_acl(encode_acl(acl)) == acl


def test_an_acl_has_an_end() -> None:
    """Promise: an ACL longer than the kernel could read back is refused."""
    most = (ACL_BYTES_MAX - 4) // 8
    named = [(2, 7, number) for number in range(most - 4)]
    fits = raw((1, 7, NO_ID), *named, (4, 7, NO_ID), (16, 7, NO_ID), (32, 7, NO_ID))
    assert len(decode_acl(fits)) == most
    with pytest.raises(ValueError, match="too many"):
        decode_acl(fits[:12] + raw((2, 7, 9))[4:] + fits[12:])


@given(acls(), modes)
def test_mode_and_acl_go_together(acl: Acl, mode: int) -> None:
    """Promise: the mode shows owner, mask (or group) and other; chmod sets exactly these."""
    assert mode_of(acl) == octal(acl)
    assert is_mode_only(acl) == (len(acl) == 3)
    group = next(entry.permissions for entry in acl if entry.tag == 0x04)
    assert mode_without(acl) == octal(acl) & ~0o070 | octal(acl) & group << 3
    changed = with_mode(acl, mode)
    assert mode_of(changed) == mode & 0o777
    assert with_mode(acl, mode_of(acl)) == acl
    assert [(entry.tag, entry.id) for entry in changed] == [(entry.tag, entry.id) for entry in acl]
    kept = {0x02, 0x08} | ({0x04} if "m" in (LETTERS[entry.tag] for entry in acl) else set())
    for old, new in zip(acl, changed, strict=True):
        if old.tag in kept:
            assert old == new


@given(acls(), modes, st.sampled_from([stat.S_IFREG, stat.S_IFDIR, stat.S_IFIFO]))
def test_inheritance_is_the_default_acl_limited_by_the_mode(
    acl: Acl, mode: int, file_type: int
) -> None:
    """Promise: each class of the new file gets what both the default ACL and the mode allow."""
    new_mode, access = inherit(encode_acl(acl), file_type | mode)
    assert new_mode == file_type | mode & 0o7000 | octal(acl) & mode
    assert (access is None) == (len(acl) == 3)
    if access is not None:
        new = decode_acl(access)
        assert octal(new) == new_mode & 0o777
        named = [entry for entry in acl if entry.tag in (2, 8, 4)]
        assert [entry for entry in new if entry.tag in (2, 8, 4)] == named
    assert octal(acl) & 0o777 == inherit(encode_acl(acl), file_type | 0o777).mode & 0o777


# --- files that have them -------------------------------------------------------------------------

U7 = (2, 7, 77)
PLAIN = raw((1, 6, NO_ID), (4, 4, NO_ID), (32, 0, NO_ID))
NAMED = raw((1, 7, NO_ID), U7, (4, 5, NO_ID), (8, 3, 99), (16, 6, NO_ID), (32, 1, NO_ID))
MALFORMED = [b"", b"\2\0\0\0", NAMED[:-1], NAMED[:-8], NAMED + NAMED[4:], b"\3" + NAMED[1:]]


@pytest.fixture
def filesystem() -> Filesystem:
    disk = MemoryDevice(8192)
    make_filesystem(disk)
    return open_filesystem(disk, writable=True)


@pytest.fixture
def volume(filesystem: Filesystem) -> Volume:
    return filesystem.live


def make(volume: Volume, name: bytes, mode: int = stat.S_IFREG | 0o644, at: int = ROOT) -> int:
    return volume.create(at, name, mode, 5, 6).ino


def refused(number: int, call: Callable[[], object]) -> None:
    with pytest.raises(OSError) as caught:  # noqa: PT011  # the test checks errno
        call()
    assert errno.errorcode[caught.value.errno or 0] == errno.errorcode[number]


def test_setting_an_access_acl_sets_the_mode(volume: Volume) -> None:
    """Promise: an ACL sets the mode, and is stored only if the mode cannot express it."""
    ino = make(volume, b"f", stat.S_IFREG | 0o4777)
    volume.setxattr(ino, ACCESS_NAME, PLAIN)
    assert volume.get(ino).mode == stat.S_IFREG | 0o4640
    assert volume.listxattr(ino) == []
    assert volume.get(ino).xattr_count == 0
    volume.setxattr(ino, ACCESS_NAME, NAMED)
    assert volume.get(ino).mode == stat.S_IFREG | 0o4761
    assert volume.getxattr(ino, ACCESS_NAME) == NAMED
    volume.setxattr(ino, ACCESS_NAME, PLAIN)
    assert volume.listxattr(ino) == []
    assert volume.get(ino).mode == stat.S_IFREG | 0o4640
    refused(errno.ENODATA, lambda: volume.getxattr(ino, ACCESS_NAME))


def test_what_names_nobody_is_stored_the_same_whatever_number_it_came_with(volume: Volume) -> None:
    """Promise: ids of entries that name nobody are ignored, so equal ACLs are stored the same."""
    ino = make(volume, b"f")
    volume.setxattr(ino, ACCESS_NAME, NAMED.replace(struct.pack("<I", NO_ID), bytes(4)))
    assert volume.getxattr(ino, ACCESS_NAME) == NAMED


def test_set_group_id_goes_when_the_caller_may_not_keep_it(volume: Volume) -> None:
    """Promise: only setting an access ACL clears S_ISGID, and only with keep_setgid=False."""
    ino = make(volume, b"d", stat.S_IFDIR | 0o2755)
    volume.setxattr(ino, DEFAULT_NAME, NAMED, keep_setgid=True)
    volume.setxattr(ino, ACCESS_NAME, NAMED)
    assert volume.get(ino).mode == stat.S_IFDIR | 0o2761
    volume.setxattr(ino, ACCESS_NAME, PLAIN, keep_setgid=False)
    assert volume.get(ino).mode == stat.S_IFDIR | 0o640


def test_chmod_changes_the_stored_acl(volume: Volume) -> None:
    """Promise: mode and access ACL never contradict each other; chmod keeps the default ACL."""
    ino = make(volume, b"d", stat.S_IFDIR | 0o755)
    volume.setxattr(ino, ACCESS_NAME, NAMED)
    volume.setxattr(ino, DEFAULT_NAME, NAMED)
    volume.setxattr(ino, b"user.x", b"x")
    for mode in (0o777, 0o000, 0o124, 0o1124):
        volume.setattr(ino, Changes(mode=mode))
        assert volume.get(ino).mode == stat.S_IFDIR | mode
        acl = decode_acl(volume.getxattr(ino, ACCESS_NAME))
        assert octal(acl) == mode & 0o777
        assert AclEntry(*U7) in acl
        assert volume.getxattr(ino, DEFAULT_NAME) == NAMED
    volume.setattr(ino, Changes(uid=1, size_bytes=None))
    assert octal(decode_acl(volume.getxattr(ino, ACCESS_NAME))) == 0o124


@pytest.mark.parametrize("value", MALFORMED)
@pytest.mark.parametrize("name", sorted(NAMES))
def test_malformed_acls_are_refused_and_change_nothing(
    volume: Volume, name: bytes, value: bytes
) -> None:
    """Promise: a malformed ACL is refused with EINVAL, and the file stays as it was."""
    ino = make(volume, b"d", stat.S_IFDIR | 0o2755)
    refused(errno.EINVAL, lambda: volume.setxattr(ino, name, value))
    assert volume.get(ino).mode == stat.S_IFDIR | 0o2755
    assert volume.listxattr(ino) == []
    refused(errno.E2BIG, lambda: volume.setxattr(ino, name, bytes(ACL_BYTES_MAX + 1)))


def test_acls_are_refused_where_there_can_be_none(volume: Volume) -> None:
    """Promise: a default ACL on a file is EACCES; any ACL on a symlink is EOPNOTSUPP."""
    ino = make(volume, b"f")
    refused(errno.EACCES, lambda: volume.setxattr(ino, DEFAULT_NAME, NAMED))
    link = volume.symlink(ROOT, b"l", b"f", 0, 0).ino
    for name in NAMES:
        refused(errno.EOPNOTSUPP, lambda name=name: volume.setxattr(link, name, NAMED))


def test_removing_an_acl_that_is_not_there_is_no_error(volume: Volume) -> None:
    """Promise: removing an absent ACL succeeds; removing any other absent xattr is an error."""
    ino = make(volume, b"f")
    before = volume.get(ino).ctime_ns
    for name in NAMES:
        volume.removexattr(ino, name)
    assert volume.get(ino).ctime_ns == before
    refused(errno.ENODATA, lambda: volume.removexattr(ino, b"user.x"))
    volume.setxattr(ino, ACCESS_NAME, NAMED)
    volume.removexattr(ino, ACCESS_NAME)
    assert volume.listxattr(ino) == []
    assert volume.get(ino).mode & 0o777 == 0o761


def test_new_files_inherit(filesystem: Filesystem) -> None:
    """Promise: all types but symlinks inherit; a directory also inherits the default ACL itself."""
    volume = filesystem.live
    parent = make(volume, b"d", stat.S_IFDIR | 0o2755)
    volume.setxattr(parent, DEFAULT_NAME, NAMED)
    for type_ in (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFDIR):
        inode = volume.create(parent, b"%o" % type_, type_ | 0o640, 1, 2, umask=0o777)
        setgid = stat.S_ISGID if type_ == stat.S_IFDIR else 0
        assert inode.mode == type_ | setgid | 0o640
        assert inode.gid == 6
        names = set(volume.listxattr(inode.ino))
        assert names == (NAMES if type_ == stat.S_IFDIR else {ACCESS_NAME})
        access = decode_acl(volume.getxattr(inode.ino, ACCESS_NAME))
        assert access == with_mode(decode_acl(NAMED), 0o640)
        if type_ == stat.S_IFDIR:
            assert volume.getxattr(inode.ino, DEFAULT_NAME) == NAMED
    link = volume.symlink(parent, b"l", b"f", 0, 0)
    assert (link.mode, link.xattr_count) == (stat.S_IFLNK | 0o777, 0)
    filesystem.commit()
    device = filesystem.store.device
    filesystem.close()
    assert check_image(device).clean
    again = open_filesystem(device, writable=False).live
    inode = again.lookup(again.lookup(ROOT, b"d").ino, b"%o" % stat.S_IFDIR)
    assert again.getxattr(inode.ino, DEFAULT_NAME) == NAMED
    assert octal(decode_acl(again.getxattr(inode.ino, ACCESS_NAME))) == 0o640


def test_default_acl_without_names_leaves_only_a_mode(volume: Volume) -> None:
    """Promise: a file stores no ACL if its mode says it all; a directory keeps its default ACL."""
    parent = make(volume, b"d", stat.S_IFDIR | 0o755)
    volume.setxattr(parent, DEFAULT_NAME, PLAIN)
    file = volume.create(parent, b"f", stat.S_IFREG | 0o666, 0, 0, umask=0o777)
    assert (file.mode & 0o777, file.xattr_count) == (0o640, 0)
    directory = volume.create(parent, b"d", stat.S_IFDIR | 0o777, 0, 0, umask=0o777)
    assert (directory.mode & 0o777, directory.xattr_count) == (0o640, 1)
    assert volume.getxattr(directory.ino, DEFAULT_NAME) == PLAIN


@pytest.mark.parametrize("attribute", [None, b"user.x", ACCESS_NAME, DEFAULT_NAME])
def test_the_umask_counts_where_no_default_acl_does(
    volume: Volume, attribute: bytes | None
) -> None:
    """Promise: where a default ACL applies the umask is ignored, elsewhere it is taken off."""
    parent = make(volume, b"d", stat.S_IFDIR | 0o755)
    if attribute is not None:
        volume.setxattr(parent, attribute, NAMED)
    inherits = attribute == DEFAULT_NAME
    file = volume.create(parent, b"f", stat.S_IFREG | 0o777, 0, 0, umask=0o027)
    assert file.mode & 0o777 == (0o761 if inherits else 0o750)
    assert file.xattr_count == inherits
    without = volume.create(parent, b"g", stat.S_IFREG | 0o777, 0, 0, umask=0o027, inherits=False)
    assert (without.mode & 0o777, without.xattr_count) == (0o750, 0)


# --- images that lie ------------------------------------------------------------------------------


@pytest.mark.parametrize("value", MALFORMED)
def test_malformed_acls_in_an_image_are_an_error_of_what_needs_them(
    volume: Volume, value: bytes
) -> None:
    """Promise C9: a malformed ACL is EIO for what needs it, nothing is half done, removal works."""
    ino = make(volume, b"d", stat.S_IFDIR | 0o755)
    for name in NAMES:
        with changing(volume):
            volume.xattrs.set(volume.get(ino), name, value)  # as if the image held it
    count = volume.inodes.count
    for call in (
        lambda: volume.getxattr(ino, ACCESS_NAME),
        lambda: volume.getxattr(ino, DEFAULT_NAME),
        lambda: volume.setattr(ino, Changes(mode=0o700, uid=9)),
        lambda: volume.create(ino, b"f", stat.S_IFREG | 0o644, 0, 0),
        lambda: volume.create(ino, b"e", stat.S_IFDIR | 0o755, 0, 0),
    ):
        with pytest.raises(CorruptError):
            call()
    assert volume.inodes.count == count
    assert (volume.get(ino).mode, volume.get(ino).uid) == (stat.S_IFDIR | 0o755, 5)
    assert list(volume.listing(ino)) == []
    volume.symlink(ino, b"l", b"target", 0, 0)
    assert set(volume.listxattr(ino)) == NAMES
    volume.removexattr(ino, DEFAULT_NAME)
    volume.create(ino, b"f", stat.S_IFREG | 0o644, 0, 0)
    volume.setxattr(ino, ACCESS_NAME, NAMED)
    volume.setattr(ino, Changes(mode=0o700))


def test_a_full_filesystem_makes_no_half_inherited_files(filesystem: Filesystem) -> None:
    """Promise C10: a file is created with its ACLs or not at all; chmod still works when full."""
    volume = filesystem.live
    parent = make(volume, b"d", stat.S_IFDIR | 0o755)
    named = [(2, 7, number) for number in range(500)]
    large = raw((1, 7, NO_ID), *named, (4, 7, NO_ID), (16, 7, NO_ID), (32, 7, NO_ID))
    volume.setxattr(parent, DEFAULT_NAME, large)
    made = []
    try:
        while len(made) < 100_000:
            name = b"%d" % len(made)
            made.append(volume.create(parent, name, stat.S_IFDIR | 0o750, 0, 0).ino)
    except NoSpaceError:
        assert len(made) > 100
    else:
        pytest.fail("it never got full")
    assert len(list(volume.listing(parent))) == len(made)
    for ino in made:
        assert set(volume.listxattr(ino)) == NAMES
    volume.setattr(made[0], Changes(mode=0o700))
    assert octal(decode_acl(volume.getxattr(made[0], ACCESS_NAME))) == 0o700
    filesystem.commit()
    assert check_image(filesystem.store.device).clean
