"""Checks the contents of volumes against I7: names, links, sizes, extents, xattrs, orphan marks.

Snapshots share nearly all of their nodes. So each distinct node is checked once, not once for each
root: a leaf gives a `TreePart`, an inner node joins the parts of its children, and rules about the
whole tree read the part of its root. There are three kinds of rules:

- Rules about one inode. Its items follow each other in the tree. They are checked when the last of
  them is known: inside a leaf, or where the parts of two neighbours are joined.
- Rules that compare sums: names with link counts, directory entries with parents, orphan marks
  with unlinked inodes. Each item adds a random 64-bit hash of its inode number to a balance, or
  subtracts it. Balances of subtrees add up. If the rule holds, the balance of the tree is zero; if
  not, it is zero with a probability of 2^-60. Only a tree whose balance is not zero is read again,
  to name what is wrong.
- The rule that every directory is reachable from the root directory. It needs all edges (parent,
  child) between directories of a tree. Trees with the same set of edges, recognized by the sum of
  the edges' hashes, are checked once.
"""

import os
import stat
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from cowfs.care.data import DataCheck
from cowfs.care.names import FILE_TYPE_WORDS, detached_directories, mismatches
from cowfs.care.report import Findings
from cowfs.errors import CorruptError
from cowfs.escapes import escaped
from cowfs.files.acl import DEFAULT_NAME as DEFAULT_ACL_NAME
from cowfs.files.acl import NAMES as ACL_NAMES
from cowfs.files.acl import decode_acl, mode_of
from cowfs.files.items import (
    INLINE_BYTES_MAX,
    INODE_INLINE,
    KEY_BYTES,
    ROOT_INO,
    SYMLINK_BYTES_MAX,
    TYPE_EXTENT,
    TYPE_INLINE,
    TYPE_INODE,
    TYPE_NAME,
    TYPE_ORPHAN,
    TYPE_SYMLINK,
    TYPE_XATTR,
    XATTR_CHUNK_BYTES,
    XATTR_CHUNKS,
    XATTR_PROBES,
    Extent,
    Inode,
    decode_extent,
    decode_inode,
    decode_names,
    decode_xattr_first,
    name_hash,
    split_key,
    xattr_hash,
)
from cowfs.storage.format import BLOCK_SIZE_BYTES, NodeImage, Superblock

DETACHED_MAX = 100  # detached directories that are named for each tree
_DIRECTORY = stat.S_IFDIR >> 12
_WORD = struct.Struct("<Q")
_EDGE = struct.Struct("<QQ")


@dataclass(slots=True)
class FilePart:
    """What the rules about one inode need to know of some consecutive items of it.

    Attributes:
        block: of the leaf that holds the first of the items.
        names_bytes: the sum of the lengths of its directory entries' names.
        xattrs: offset and value of each xattr item.
        symlink_bytes, inline_bytes: size of the symlink target and of inline data; None: no item.
        extent_start, extent_end: the file blocks from the first extent's first to the last one's
            end; meaningless while `extent_blocks` is 0.
        extent_blocks: how many blocks the extents have.
    """

    ino: int
    block: int
    inode: Inode | None = None
    name_count: int = 0
    names_bytes: int = 0
    subdirectories: int = 0
    xattrs: tuple[tuple[int, bytes], ...] = ()
    symlink_bytes: int | None = None
    inline_bytes: int | None = None
    extent_start: int = 0
    extent_end: int = 0
    extent_blocks: int = 0


@dataclass(slots=True)
class TreePart:
    """The sums over a subtree.

    Attributes:
        head, tail: the first and the last inode, which may have more items outside the subtree.
            `tail` is None if all items belong to `head`; both are None if there is no item.
        inodes: inode items.
        data_blocks: blocks of extents.
        link_balance: names minus links.
        orphan_balance: orphan marks minus unlinked inodes.
        parent_balance: (parent, child) of directory entries minus those of directory inodes.
        edge_sum: of the hashes of the edges, a fingerprint of their set.
        edges: rows of (parent, child), of a leaf only; None if it has none.
    """

    head: FilePart | None = None
    tail: FilePart | None = None
    inodes: int = 0
    data_blocks: int = 0
    link_balance: int = 0
    orphan_balance: int = 0
    parent_balance: int = 0
    edge_sum: int = 0
    edges: npt.NDArray[np.uint64] | None = None


class Contents:
    """The rules, for the trees of one image.

    Args:
        data: counts the references of extents.

    Attributes:
        inode_count: inode items in distinct leaves so far.
    """

    def __init__(self, superblock: Superblock, data: DataCheck, findings: Findings) -> None:
        self.inode_count = 0
        self._name_seed = superblock.name_seed
        self._data = data
        self._findings = findings
        self._secret = int.from_bytes(os.urandom(8), "little")
        self._sound_edge_sums: set[int] = set()

    # --- a leaf -----------------------------------------------------------------------------------

    def leaf(self, image: NodeImage, dropped: int = 0) -> tuple[TreePart, int]:
        """Check the items of a leaf, and count the references of its extents.

        Args:
            dropped: the number of leading items that a half-done drop has already dropped.

        Returns:
            The sums over the leaf, and how many data blocks had no reference before.
        """
        total = TreePart()
        parts: list[FilePart] = []
        part = FilePart(-1, image.block)
        edges: list[tuple[int, int]] = []
        extents: list[tuple[int, int, Extent]] = []
        for key, value in zip(image.keys[dropped:], image.values[dropped:], strict=True):
            if len(key) != KEY_BYTES:
                self._item_error(image, 0, f"a key of {len(key)} bytes, expected {KEY_BYTES}")
                continue
            ino, type_, offset = split_key(key)
            if ino == 0:
                if type_ != TYPE_ORPHAN or value:
                    self._item_error(
                        image, 0, f"an item of inode 0 is not an orphan mark, found key {key.hex()}"
                    )
                else:
                    total.orphan_balance += self._weight(offset)
                continue
            if ino != part.ino:
                part = FilePart(ino, image.block)
                parts.append(part)
            try:
                if type_ == TYPE_INODE:
                    self._add_inode(part, total, offset, value, image)
                elif type_ == TYPE_NAME:
                    self._add_names(part, total, edges, offset, value, image)
                elif type_ == TYPE_EXTENT:
                    extent = decode_extent(ino, value)
                    self._add_extent(part, offset, extent, image)
                    extents.append((ino, offset, extent))
                elif type_ == TYPE_XATTR:
                    part.xattrs += ((offset, value),)
                elif type_ == TYPE_SYMLINK:
                    part.symlink_bytes = len(value)
                    if offset or not 0 < len(value) <= SYMLINK_BYTES_MAX or b"\0" in value:
                        self._item_error(image, ino, "a malformed symlink target")
                elif type_ == TYPE_INLINE:
                    part.inline_bytes = len(value)
                    if offset:
                        self._item_error(image, ino, f"inline data at offset {offset}")
                else:
                    self._item_error(image, ino, f"an item of unknown type {type_}")
            except CorruptError as error:
                found = "" if error.found is None else f", found {error.found!r}"
                self._item_error(image, ino, f"{error.owner}: {error.reason}{found}")
        for complete in parts[1:-1]:
            self._check_inode(complete)
        if parts:
            total.head = parts[0]
            total.tail = parts[-1] if len(parts) > 1 else None
        if edges:
            total.edges = np.array(edges, np.uint64)
        total.data_blocks = sum(each.extent_blocks for each in parts)
        self.inode_count += total.inodes
        return total, self._data.count(extents, image)

    def _item_error(self, image: NodeImage, ino: int, what: str) -> None:
        self._findings.error("I7", what, block=image.block, ino=ino)

    def _add_inode(
        self, part: FilePart, total: TreePart, offset: int, value: bytes, image: NodeImage
    ) -> None:
        inode = decode_inode(part.ino, value)
        part.inode = inode
        total.inodes += 1
        type_ = inode.mode >> 12
        if offset:
            self._item_error(image, part.ino, f"an inode at offset {offset}")
        if not 0 < inode.birth <= image.birth:
            self._findings.error(
                "I4",
                f"an inode is newer than its node, found birth {inode.birth}, node {image.birth}",
                block=image.block,
                ino=part.ino,
            )
        names = inode.nlink
        if type_ == _DIRECTORY:
            names = 1 if inode.nlink and part.ino != ROOT_INO else 0
            if names:
                total.parent_balance -= self._edge_weight(inode.rdev, part.ino)
            elif inode.nlink and inode.rdev != ROOT_INO:
                self._item_error(
                    image, part.ino, f"the parent of the root directory is {inode.rdev}"
                )
        total.link_balance -= names * self._weight(part.ino << 4 | type_)
        if not inode.nlink:
            total.orphan_balance -= self._weight(part.ino)

    def _add_names(
        self,
        part: FilePart,
        total: TreePart,
        edges: list[tuple[int, int]],
        offset: int,
        value: bytes,
        image: NodeImage,
    ) -> None:
        seen = set()
        for name, ino, type_, _ in decode_names(part.ino, value):
            part.name_count += 1
            part.names_bytes += len(name)
            total.link_balance += self._weight(ino << 4 | type_)
            if type_ == _DIRECTORY:
                part.subdirectories += 1
                edges.append((part.ino, ino))
                weight = self._edge_weight(part.ino, ino)
                total.edge_sum += weight
                total.parent_balance += weight
            if name_hash(name, self._name_seed) != offset:
                self._item_error(
                    image, part.ino, f"the name {escaped(name)} is filed under another name's hash"
                )
            if name in seen:
                self._item_error(image, part.ino, f"the name {escaped(name)} is there twice")
            seen.add(name)

    def _add_extent(self, part: FilePart, offset: int, extent: Extent, image: NodeImage) -> None:
        if not part.extent_blocks:
            part.extent_start = offset
        elif offset < part.extent_end:
            self._overlap(part, offset)
        part.extent_end = max(part.extent_end, offset + extent.count)
        part.extent_blocks += extent.count
        if not 0 < extent.birth <= image.birth:
            self._findings.error(
                "I4",
                f"data is newer than its node, found birth {extent.birth}, node {image.birth}",
                block=image.block,
                ino=part.ino,
            )

    def _overlap(self, part: FilePart, offset: int) -> None:
        self._findings.error(
            "I7",
            f"extents overlap: one begins at file block {offset}, the one before it ends at "
            f"{part.extent_end}",
            block=part.block,
            ino=part.ino,
        )

    def _weight(self, number: int) -> int:
        """A number's hash, from which whoever writes an image cannot make a balance of zero."""
        return xxh3_64_intdigest(_WORD.pack(number & 0xFFFFFFFFFFFFFFFF), self._secret)

    def _edge_weight(self, parent: int, child: int) -> int:
        return xxh3_64_intdigest(_EDGE.pack(parent, child), self._secret)

    # --- sums -------------------------------------------------------------------------------------

    def join(self, parts: Iterable[TreePart]) -> TreePart:
        """Add up neighbours, given in key order; check the inodes that end between them."""
        total = TreePart()
        for part in parts:
            total.inodes += part.inodes
            total.data_blocks += part.data_blocks
            total.link_balance += part.link_balance
            total.orphan_balance += part.orphan_balance
            total.parent_balance += part.parent_balance
            total.edge_sum += part.edge_sum
            if part.head is None:
                continue
            if total.head is None:
                total.head, total.tail = part.head, part.tail
                continue
            last = total.tail or total.head
            if last.ino == part.head.ino:
                merged = self._merge(last, part.head)
                if total.tail is None:
                    total.head, total.tail = merged, part.tail
                elif part.tail is None:
                    total.tail = merged
                else:
                    self._check_inode(merged)
                    total.tail = part.tail
            else:
                if total.tail is not None:
                    self._check_inode(total.tail)
                if part.tail is not None:
                    self._check_inode(part.head)
                total.tail = part.tail or part.head
        return total

    def _merge(self, left: FilePart, right: FilePart) -> FilePart:
        if left.extent_blocks and right.extent_blocks and right.extent_start < left.extent_end:
            self._overlap(left, right.extent_start)
        return FilePart(
            left.ino,
            left.block,
            left.inode or right.inode,
            left.name_count + right.name_count,
            left.names_bytes + right.names_bytes,
            left.subdirectories + right.subdirectories,
            left.xattrs + right.xattrs,
            right.symlink_bytes if left.symlink_bytes is None else left.symlink_bytes,
            right.inline_bytes if left.inline_bytes is None else left.inline_bytes,
            left.extent_start if left.extent_blocks else right.extent_start,
            max(left.extent_end, right.extent_end),
            left.extent_blocks + right.extent_blocks,
        )

    # --- one inode --------------------------------------------------------------------------------

    def _check_inode(self, part: FilePart) -> None:
        """Check that the items of an inode fit each other; `part` has all of them."""
        inode = part.inode

        def wrong(what: str) -> None:
            self._findings.error("I7", what, block=part.block, ino=part.ino)

        if inode is None:
            wrong("items of an inode that does not exist")
            return
        type_ = inode.mode >> 12
        word = FILE_TYPE_WORDS[type_]
        if part.name_count and type_ != _DIRECTORY:
            wrong(f"a {word} has directory entries")
        if part.symlink_bytes is not None and type_ != stat.S_IFLNK >> 12:
            wrong(f"a {word} has a symlink target")
        if (part.inline_bytes is not None or part.extent_blocks) and type_ != stat.S_IFREG >> 12:
            wrong(f"a {word} has data")
        if (part.inline_bytes is not None) != bool(inode.flags & INODE_INLINE):
            has = "has no" if part.inline_bytes is None else "has"
            wrong(f"the inode's flags are {inode.flags:#x}, but it {has} inline data")
        if inode.data_blocks != part.extent_blocks:
            wrong(f"data_blocks is {inode.data_blocks}, but its extents have {part.extent_blocks}")
        if type_ == _DIRECTORY:
            if inode.size_bytes != part.names_bytes:
                wrong(f"size is {inode.size_bytes}, but its names have {part.names_bytes} bytes")
            links = 2 + part.subdirectories
            if inode.nlink != links and (inode.nlink or part.name_count):
                wrong(f"nlink of the directory is {inode.nlink}, expected {links}")
        elif type_ == stat.S_IFLNK >> 12:
            if part.symlink_bytes is None:
                wrong("a symlink without a target")
            elif inode.size_bytes != part.symlink_bytes:
                wrong(f"size is {inode.size_bytes}, but the target has {part.symlink_bytes} bytes")
        elif type_ == stat.S_IFREG >> 12:
            blocks = -(-inode.size_bytes // BLOCK_SIZE_BYTES)
            if part.extent_blocks and part.extent_end > blocks:
                wrong(
                    f"extents reach to file block {part.extent_end}, "
                    f"beyond the {blocks} blocks of its size"
                )
            if part.inline_bytes is not None:
                if part.extent_blocks:
                    wrong("both inline data and extents")
                if part.inline_bytes > INLINE_BYTES_MAX:
                    wrong(f"inline data of {part.inline_bytes} bytes, at most {INLINE_BYTES_MAX}")
                if part.inline_bytes != inode.size_bytes:
                    wrong(
                        f"size is {inode.size_bytes}, but it has {part.inline_bytes} inline bytes"
                    )
        if part.xattrs or inode.xattr_count:
            self._check_xattrs(part, inode, wrong)

    def _check_xattrs(self, part: FilePart, inode: Inode, wrong: Callable[[str], None]) -> None:
        names: set[bytes] = set()
        acls: dict[bytes, bytes] = {}
        name = b""
        base = next_offset = left = 0
        for offset, value in part.xattrs:
            if left:
                size = min(left, XATTR_CHUNK_BYTES)
                if offset != next_offset or len(value) != size:
                    wrong(f"chunks of an xattr do not follow each other at {offset:#x}")
                    return
                if name in acls:
                    acls[name] += value
            else:
                try:
                    name, value_bytes, first = decode_xattr_first(part.ino, value)
                except CorruptError as error:
                    wrong(f"{error.owner}: {error.reason}")
                    return
                base, size, left = offset, len(first), value_bytes
                next_offset = base
                probe, chunk = divmod(base - xattr_hash(name, self._name_seed), XATTR_CHUNKS)
                if chunk or not 0 <= probe < XATTR_PROBES:
                    wrong(f"the xattr {escaped(name)} is filed under another name's hash")
                if name in names:
                    wrong(f"the xattr {escaped(name)} is there twice")
                names.add(name)
                if name in ACL_NAMES:
                    acls[name] = first
            left -= size
            next_offset += 1
        if left:
            wrong(f"the last {left} bytes of an xattr are missing")
        if inode.xattr_count != len(names):
            wrong(f"xattr_count is {inode.xattr_count}, but it has {len(names)} xattrs")
        for name, value in acls.items():
            _check_acl(name, value, inode, wrong)

    # --- one tree ---------------------------------------------------------------------------------

    def tree(
        self,
        total: TreePart,
        edges: Callable[[], Iterator[npt.NDArray[np.uint64]]],
        leaves: Callable[[], Iterator[NodeImage]],
    ) -> None:
        """Check the rules about a whole tree.

        Args:
            total: the sums over all its nodes.
            edges: gives the edges of each of its leaves.
            leaves: reads its leaves again; called only if a balance is not zero.
        """
        top = total.head
        if top is None or top.ino != ROOT_INO or top.inode is None:
            self._findings.error("I7", "the tree has no root directory", ino=ROOT_INO)
        elif not stat.S_ISDIR(top.inode.mode) or not top.inode.nlink:
            self._findings.error("I7", "inode 1 is not a directory", ino=ROOT_INO, path="/")
        for part in (total.head, total.tail):
            if part is not None:
                self._check_inode(part)
        if total.link_balance or total.orphan_balance or total.parent_balance:
            for what, ino in mismatches(leaves()):
                self._findings.error("I7", what, ino=ino)
        if total.edge_sum not in self._sound_edge_sums:
            arrays = list(edges())
            detached = detached_directories(np.concatenate(arrays)) if arrays else []
            if not detached:
                self._sound_edge_sums.add(total.edge_sum)
            for ino in detached[:DETACHED_MAX]:
                self._findings.error(
                    "I7", "a directory that cannot be reached from the root directory", ino=ino
                )


def _check_acl(name: bytes, value: bytes, inode: Inode, wrong: Callable[[str], None]) -> None:
    """Check that an ACL is well-formed, that the inode may have one, and that its mode agrees."""
    type_ = stat.S_IFMT(inode.mode)
    if type_ == stat.S_IFLNK or (name == DEFAULT_ACL_NAME and type_ != stat.S_IFDIR):
        wrong(f"a {FILE_TYPE_WORDS[type_ >> 12]} has the ACL {escaped(name)}")
    try:
        mode = mode_of(decode_acl(value))
    except ValueError as error:
        wrong(f"the ACL {escaped(name)} is malformed: {error}")
        return
    if name != DEFAULT_ACL_NAME and mode != inode.mode & 0o777:
        wrong(f"the permissions are {inode.mode & 0o777:03o}, but those of its ACL are {mode:03o}")
