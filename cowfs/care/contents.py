"""Holds the contents of volumes against I7: names, links, sizes, extents, xattrs, orphans, data.

Snapshots share nearly all of their nodes, so the work is done once for each distinct node and not
once for each root. Every rule falls in one of three kinds:

- Rules about one inode. Its items follow each other in the tree, so they are checked when its last
  item is met: inside a leaf, or where the parts of two neighbours are joined.
- Rules that compare sums (names with links, with parents; orphan marks with unlinked inodes). Each
  item adds its part, weighted by a random 64-bit hash of the inode number, to a balance; balances
  of subtrees add up, and that of a whole tree is zero, except with probability 2^-60, exactly when
  the rule holds. Only a tree out of balance is read again, to name the culprits.
- Directories reachable from the root. Needs the edges of all directories of a tree; trees with the
  same set of edges (the sum of the edges' hashes) are checked once.
"""

import os
import stat
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_digest, xxh3_64_intdigest

from cowfs.care.references import ROLE_DATA, References, pieces
from cowfs.care.report import Findings
from cowfs.errors import CorruptError, DeviceError
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
from cowfs.storage.device import Device
from cowfs.storage.format import (
    BLOCK_SIZE_BYTES,
    DATA_CHECKSUM_BYTES,
    RING_SLOTS,
    NodeImage,
    Superblock,
    ring_blocks,
)

CULPRITS_MAX = 100  # named per tree and rule
_DIRECTORY = stat.S_IFDIR >> 12
_WORD = struct.Struct("<Q")
_EDGE = struct.Struct("<QQ")
FILE_TYPE_WORDS = {
    stat.S_IFREG >> 12: "regular file",
    stat.S_IFDIR >> 12: "directory",
    stat.S_IFLNK >> 12: "symlink",
    stat.S_IFIFO >> 12: "fifo",
    stat.S_IFSOCK >> 12: "socket",
    stat.S_IFCHR >> 12: "character device",
    stat.S_IFBLK >> 12: "block device",
}


@dataclass(slots=True)
class FilePart:
    """Some consecutive items of one inode: what the rules about one inode need of them."""

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
    """The sum of a subtree. `head` and `tail` are the inodes that may go on outside of it.

    `tail` is None when all items are of one inode, that of `head`; both when there are none.
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

    Attributes:
        inode_count: inode items in distinct leaves so far.
        verified_blocks: data blocks whose checksum was computed.
    """

    def __init__(
        self,
        device: Device,
        superblock: Superblock,
        references: References,
        findings: Findings,
        *,
        data: bool,
    ) -> None:
        self.inode_count = 0
        self.verified_blocks = 0
        self._device = device
        self._seed = superblock.seed
        self._name_seed = superblock.name_seed
        self._end_block = ring_blocks(superblock.total_blocks)[1]
        self._references = references
        self._findings = findings
        self._verify_data = data
        self._secret = int.from_bytes(os.urandom(8), "little")
        self._sound_edge_sums: set[int] = set()

    # --- a leaf -----------------------------------------------------------------------------------

    def leaf(self, image: NodeImage, dropped: int = 0) -> tuple[TreePart, int]:
        """Check the items of a leaf and count the references of its extents.

        Args:
            dropped: how many items at the start no longer count (half-done drop).

        Returns:
            The sum of the leaf, and how many data blocks were met for the first time.
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
                    self._item_error(image, 0, f"no orphan mark under inode 0: {key.hex()}")
                else:
                    total.orphan_balance += self._weight(offset)
                continue
            if ino != part.ino:
                part = FilePart(ino, image.block)
                parts.append(part)
            try:
                if type_ == TYPE_INODE:
                    self._inode(part, total, offset, value, image)
                elif type_ == TYPE_NAME:
                    self._names(part, total, edges, offset, value, image)
                elif type_ == TYPE_EXTENT:
                    extent = decode_extent(ino, value)
                    self._extent(part, offset, extent, image)
                    extents.append((ino, offset, extent))
                elif type_ == TYPE_XATTR:
                    part.xattrs += ((offset, value),)
                elif type_ == TYPE_SYMLINK:
                    part.symlink_bytes = len(value)
                    if offset or not 0 < len(value) <= SYMLINK_BYTES_MAX or b"\0" in value:
                        self._item_error(image, ino, "an impossible symlink target")
                elif type_ == TYPE_INLINE:
                    part.inline_bytes = len(value)
                    if offset:
                        self._item_error(image, ino, f"inline data at offset {offset}")
                else:
                    self._item_error(image, ino, f"an item of unknown type {type_}")
            except CorruptError as error:
                found = "" if error.found is None else f", found {error.found!r}"
                self._item_error(image, ino, f"{error.owner}: {error.reason}{found}")
        for inner in parts[1:-1]:
            self._close(inner)
        if parts:
            total.head = parts[0]
            total.tail = parts[-1] if len(parts) > 1 else None
        if edges:
            total.edges = np.array(edges, np.uint64)
        total.data_blocks = sum(each.extent_blocks for each in parts)
        self.inode_count += total.inodes
        fresh = self._count_extents(extents, image)
        return total, fresh

    def _item_error(self, image: NodeImage, ino: int, what: str) -> None:
        self._findings.error("I7", what, block=image.block, ino=ino)

    def _inode(
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

    def _names(
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

    def _extent(self, part: FilePart, offset: int, extent: Extent, image: NodeImage) -> None:
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
        return xxh3_64_intdigest(_WORD.pack(number & 0xFFFFFFFFFFFFFFFF), self._secret)

    def _edge_weight(self, parent: int, child: int) -> int:
        return xxh3_64_intdigest(_EDGE.pack(parent, child), self._secret)

    # --- data -------------------------------------------------------------------------------------

    def _count_extents(self, extents: list[tuple[int, int, Extent]], image: NodeImage) -> int:
        fresh_blocks = 0
        for ino, offset, extent in extents:
            if not RING_SLOTS <= extent.block <= self._end_block - extent.count:
                self._findings.error(
                    "I5",
                    f"an extent leaves the image, found blocks {extent.block} to "
                    f"{extent.block + extent.count - 1}",
                    block=image.block,
                    ino=ino,
                )
                continue
            self._references.add(extent.block, extent.count)
            fresh, clash = self._references.mark(extent.block, extent.count, ROLE_DATA)
            fresh_blocks += fresh
            if clash:
                self._findings.error("I5", "data lies on a node", block=extent.block, ino=ino)
            if self._verify_data:
                self.verify(ino, offset, extent)
        return fresh_blocks

    def verify(self, ino: int, offset: int, extent: Extent, invariant: str = "C9") -> None:
        """Compare the data of an extent with its checksums, unless that was done before.

        Args:
            offset: of the extent in the file, in blocks.
            invariant: what a wrong checksum breaks.
        """
        sums = np.frombuffer(extent.checksums, ">u8").astype(np.uint64)
        folded = sums ^ (sums >> np.uint64(32))
        tags = (folded ^ (folded >> np.uint64(16))).astype(np.uint16)
        tags[tags == 0] = 1
        pending = []
        for before, group, start, stop in pieces(extent.block, extent.count):
            known = self._references.tags(group)[start:stop]
            wanted = tags[before : before + stop - start]
            if not np.array_equal(known, wanted):
                pending += (np.flatnonzero(known != wanted) + before).tolist()
                known[:] = wanted
        if not pending:
            return
        first, last = pending[0], pending[-1]
        try:
            data = self._device.read(
                (extent.block + first) * BLOCK_SIZE_BYTES, (last - first + 1) * BLOCK_SIZE_BYTES
            )
        except DeviceError:
            data = b""
        view = memoryview(data)
        sum_at = DATA_CHECKSUM_BYTES
        for number in pending:
            start = (number - first) * BLOCK_SIZE_BYTES
            piece: memoryview | bytes = view[start : start + BLOCK_SIZE_BYTES]
            reason = "wrong data checksum"
            if not data:
                try:
                    piece = self._device.read(
                        (extent.block + number) * BLOCK_SIZE_BYTES, BLOCK_SIZE_BYTES
                    )
                except DeviceError as error:
                    piece = b""
                    reason = f"data cannot be read ({error})"
            expected = extent.checksums[number * sum_at : (number + 1) * sum_at]
            if not len(piece) or xxh3_64_digest(piece, self._seed) != expected:
                at = (offset + number) * BLOCK_SIZE_BYTES
                self._findings.error(
                    invariant,
                    f"{reason}, at byte {at} of the file",
                    block=extent.block + number,
                    ino=ino,
                    repairable=invariant == "I2",  # a repair promises no earlier generation
                )
        self.verified_blocks += len(pending)

    # --- sums -------------------------------------------------------------------------------------

    def join(self, parts: Iterable[TreePart]) -> TreePart:
        """The sum of neighbours, in key order; closes the inodes that end between them."""
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
                    self._close(merged)
                    total.tail = part.tail
            else:
                if total.tail is not None:
                    self._close(total.tail)
                if part.tail is not None:
                    self._close(part.head)
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

    def _close(self, part: FilePart) -> None:
        """All items of an inode are known: do they fit each other?"""
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
            there = "none" if part.inline_bytes is None else "some"
            wrong(f"the inode's flags are {inode.flags:#x}, but of inline data there is {there}")
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
        """Check a whole tree.

        Args:
            total: the sum of all its nodes.
            edges: gives the edges of its leaves' directories.
            leaves: reads its leaves again, for the rare tree that is out of balance.
        """
        first = total.head
        if first is None or first.ino != ROOT_INO or first.inode is None:
            self._findings.error("I7", "the tree has no root directory", ino=ROOT_INO)
        elif not stat.S_ISDIR(first.inode.mode) or not first.inode.nlink:
            self._findings.error("I7", "inode 1 is not a directory", ino=ROOT_INO, path="/")
        for open_part in (total.head, total.tail):
            if open_part is not None:
                self._close(open_part)
        if total.link_balance or total.orphan_balance or total.parent_balance:
            self._name_culprits(leaves())
        if total.edge_sum not in self._sound_edge_sums:
            arrays = list(edges())
            detached = detached_directories(np.concatenate(arrays)) if arrays else []
            if not detached:
                self._sound_edge_sums.add(total.edge_sum)
            for ino in detached[:CULPRITS_MAX]:
                self._findings.error(
                    "I7", "a directory that cannot be reached from the root directory", ino=ino
                )

    def _name_culprits(self, leaves: Iterator[NodeImage]) -> None:
        """Read a whole tree, and say which names, links and orphan marks do not fit."""
        inodes: dict[int, Inode] = {}
        links: dict[tuple[int, int], int] = {}
        marks: set[int] = set()
        parents: dict[int, int] = {}
        for image in leaves:
            for key, value in zip(image.keys, image.values, strict=True):
                if len(key) != KEY_BYTES:
                    continue
                ino, type_, offset = split_key(key)
                try:
                    if not ino:
                        marks.add(offset)
                    elif type_ == TYPE_INODE:
                        inodes[ino] = decode_inode(ino, value)
                    elif type_ == TYPE_NAME:
                        for name in decode_names(ino, value):
                            target = (name.ino, name.type)
                            links[target] = links.get(target, 0) + 1
                            if name.type == _DIRECTORY:
                                parents[name.ino] = ino
                except CorruptError:
                    continue  # found when the leaf was first read
        for what, ino in _culprits(inodes, links, marks, parents):
            self._findings.error("I7", what, ino=ino)


def _check_acl(name: bytes, value: bytes, inode: Inode, wrong: Callable[[str], None]) -> None:
    """An ACL is one that the kernel takes, of a file that may have it, and in step with its mode."""
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


def _culprits(
    inodes: dict[int, Inode],
    links: dict[tuple[int, int], int],
    marks: set[int],
    parents: dict[int, int],
) -> Iterator[tuple[str, int]]:
    for (ino, type_), count in links.items():
        target = inodes.get(ino)
        names = f"{count} name{'s' if count > 1 else ''}"
        if target is None:
            yield f"{names} for an inode that does not exist", ino
        elif target.mode >> 12 != type_:
            found, actual = FILE_TYPE_WORDS[type_], FILE_TYPE_WORDS[target.mode >> 12]
            yield f"{names} for a {found}, but the inode is a {actual}", ino
    for ino, inode in inodes.items():
        type_ = inode.mode >> 12
        count = links.get((ino, type_), 0)
        if ino == ROOT_INO:
            if count:
                yield f"{count} names for the root directory", ino
        elif type_ == _DIRECTORY and count != bool(inode.nlink):
            yield f"a directory with nlink {inode.nlink} has {count} names", ino
        elif type_ != _DIRECTORY and count != inode.nlink:
            yield f"nlink is {inode.nlink}, but {count} names point at it", ino
        if type_ == _DIRECTORY and inode.nlink and inode.rdev != parents.get(ino, inode.rdev):
            yield f"a directory in inode {parents[ino]} calls inode {inode.rdev} its parent", ino
        if not inode.nlink and ino not in marks:
            yield "unlinked, but without an orphan mark", ino
    for ino in marks:
        marked = inodes.get(ino)
        if marked is None:
            yield "an orphan mark for an inode that does not exist", ino
        elif marked.nlink:
            yield f"an orphan mark, but nlink is {marked.nlink}", ino


def detached_directories(edges: npt.NDArray[np.uint64]) -> list[int]:
    """The directories that no chain of parents leads to the root directory.

    Args:
        edges: rows of parent and child, both inode numbers of directories.
    """
    numbers = np.unique(np.append(edges.ravel(), np.uint64(ROOT_INO)))
    parents = np.arange(len(numbers))
    parents[np.searchsorted(numbers, edges[:, 1])] = np.searchsorted(numbers, edges[:, 0])
    root = int(np.searchsorted(numbers, np.uint64(ROOT_INO)))
    parents[root] = root
    for _ in range(len(numbers).bit_length()):
        parents = parents[parents]  # twice as far up each time
    return [int(number) for number in numbers[parents != root]]


def paths_of(leaves: Iterator[NodeImage], wanted: set[int]) -> dict[int, str]:
    """A path from the root directory for each of the inodes that has one."""
    parents: dict[int, tuple[int, bytes]] = {}
    for image in leaves:
        for key, value in zip(image.keys, image.values, strict=True):
            if len(key) == KEY_BYTES and key[8] == TYPE_NAME:
                directory = split_key(key)[0]
                try:
                    names = decode_names(directory, value)
                except CorruptError:
                    continue  # found when the leaf was first read
                for name in names:
                    parents.setdefault(name.ino, (directory, name.name))
    paths = {}
    for ino in wanted:
        words: list[bytes] = []
        at = ino
        met = set()
        while at in parents and at != ROOT_INO and at not in met:
            met.add(at)
            at, word = parents[at]
            words.append(word)
        if at == ROOT_INO:
            paths[ino] = "/" + "/".join(escaped(word) for word in reversed(words))
    return paths
