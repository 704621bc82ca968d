"""Copies the files that can still be read out of an image that can be neither mounted nor repaired.

The image is only read. `salvage_trees.py` finds the roots and reads the trees; this file copies:

    DIR/main/...                    the live volume
    DIR/snapshots/NAME/...          its snapshots, with `snapshots`
    DIR/lost+found/ROOT/inode-N     inodes that no path from the root directory reaches
    DIR/lost+found/ROOT-old/...     items found in leaves that no root reaches: maybe an older state

Every block is compared with its checksum. What cannot be read is left out (in a file: a hole), and
the report names it.
"""

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby

from xxhash import xxh3_64_digest

from cowfs.care.copyout import Destination, Path, is_safe_name
from cowfs.care.salvage_report import Progress, SalvageReport, shown
from cowfs.care.salvage_trees import Item, RootFinder, SalvageTree
from cowfs.errors import CorruptError, DeviceError
from cowfs.files.items import (
    ROOT_INO,
    SYMLINK_BYTES_MAX,
    TYPE_EXTENT,
    TYPE_INLINE,
    TYPE_INODE,
    TYPE_NAME,
    TYPE_SYMLINK,
    TYPE_XATTR,
    XATTR_CHUNK_BYTES,
    Inode,
    decode_extent,
    decode_inode,
    decode_names,
    decode_xattr_first,
    split_key,
)
from cowfs.history.records import RootKind
from cowfs.storage.device import Device
from cowfs.storage.format import BLOCK_SIZE_BYTES, DATA_CHECKSUM_BYTES, Superblock

DEPTH_MAX = 500  # components of a path; the memory for the paths grows with its square
Xattrs = list[tuple[bytes, bytes]]  # names and values


def salvage_image(
    device: Device,
    folder: str | os.PathLike[str],
    *,
    dry_run: bool = False,
    snapshots: bool = False,
    progress: Progress | None = None,
) -> SalvageReport:
    """Copy what can be read into an empty directory.

    Args:
        device: the image; only read from.
        folder: the destination; made if it is missing.
        dry_run: only list what would be copied; `folder` is not touched, file data is not read.
        snapshots: copy the snapshots too, each in full.
        progress: called with what is being done, how much of it is done, and how much there is.

    Raises:
        ImageError: no root of a tree can be found.
        UsageError: `folder` is not empty, or cannot be used.
        DeviceError: the image cannot be read at all.
        OSError: the host cannot hold the copy.
    """
    report = SalvageReport()
    finder = RootFinder(device, report, progress)
    roots = finder.roots()
    destination = None if dry_run else Destination(folder)
    try:
        made: set[Path] = set()
        for root in roots:
            is_snapshot = root.kind is RootKind.SNAPSHOT
            if is_snapshot and not snapshots:
                continue
            name = root.name.encode()
            report.roots.append(root.name)
            base = (b"snapshots", name) if is_snapshot else (name,)
            tree = SalvageTree(finder.reader, finder.identity, root.pointer, report, root.name)
            copy = _TreeCopy(device, finder.identity, destination, report, made, progress)
            copy.run(tree.items, base, (b"lost+found", name))
            if tree.lost:
                recovered = finder.recover(tree)
                if recovered:
                    report.note(
                        f"{root.name}: items of lost nodes were found elsewhere and copied to "
                        f"lost+found/{root.name}-old; they may be an older state"
                    )
                    old = (b"lost+found", name + b"-old")
                    copy.run(lambda items=recovered: iter(items), None, old)  # type: ignore[misc]
    finally:
        if destination is not None:
            destination.close()
    return report


class _TreeCopy:
    """Copies one tree: reads all names first, then makes the files in the order of their inodes.

    Args:
        destination: None only lists.
        made: directories made by all copies so far, those above the trees included; grows.
    """

    def __init__(
        self,
        device: Device,
        identity: Superblock,
        destination: Destination | None,
        report: SalvageReport,
        made: set[Path],
        progress: Progress | None,
    ) -> None:
        self._device = device
        self._seed = identity.seed
        self._end = identity.total_blocks
        self._destination = destination
        self._report = report
        self._made = made
        self._progress = progress

    def run(self, items: Callable[[], Iterator[Item]], base: Path | None, lost_base: Path) -> None:
        """Copy the items of a tree.

        Args:
            items: gives all items in key order; called twice.
            base: where the root directory is copied to; None: the items have no root directory.
            lost_base: where inodes go that no path from the root directory reaches.
        """
        names, inodes = self._read_names(items)
        places = _places(names, inodes, base, lost_base)
        for directory, entries in names.items():
            for name, ino in entries:
                if ino not in inodes:
                    self._report.note_lost((*places.get(directory, [(b"?",)])[0], name))
        directories = []
        done = 0
        for ino in _parents_first(places, inodes):
            directories.append((ino, places[ino][0]))
            self._make_directory(places[ino][0])
        attributes: dict[int, tuple[Inode, Xattrs]] = {}
        for ino, group in groupby(items(), key=lambda entry: split_key(entry[0])[0]):
            if ino not in inodes or ino not in places:
                continue
            done += 1
            if self._progress is not None and not done % 64:
                self._progress("copying", done, len(inodes))
            try:
                of_directory = self._inode(ino, group, places[ino])
            except OSError as error:
                self._report.note(f"{shown(places[ino][0])} was not copied: {error}")
                continue
            if of_directory is not None:
                attributes[ino] = of_directory
        # Children first: once its mode is set, nothing may be put into a directory any more.
        for ino, path in reversed(directories):
            if ino in attributes:
                self._set_directory_attributes(path, *attributes[ino])

    def _read_names(
        self, items: Callable[[], Iterator[Item]]
    ) -> tuple[dict[int, list[tuple[bytes, int]]], dict[int, int]]:
        """The (name, inode number) entries of each directory, and the mode of each linked inode."""
        names: dict[int, list[tuple[bytes, int]]] = {}
        inodes: dict[int, int] = {}
        for item, value in items():
            ino, type_, _ = split_key(item)
            try:
                if type_ == TYPE_INODE:
                    inode = decode_inode(ino, value)
                    if inode.nlink:
                        inodes[ino] = inode.mode
                elif type_ == TYPE_NAME:
                    entries = names.setdefault(ino, [])
                    entries += [(entry.name, entry.ino) for entry in decode_names(ino, value)]
            except CorruptError as error:
                self._report.note(str(error))
        return names, inodes

    def _make_directory(self, path: Path) -> None:
        """Make a directory, and those above it that are missing."""
        for count in range(1, len(path) + 1):
            part = path[:count]
            if part in self._made:
                continue
            self._made.add(part)
            if count == len(path):
                self._report.directories += 1
                self._list(path)
            if self._destination is not None:
                try:
                    self._destination.make_directory(part)
                except OSError as error:
                    self._report.note(f"{shown(part)} was not made: {error.strerror}")

    def _list(self, path: Path) -> None:
        if self._destination is None:
            self._report.note_path(path)

    def _inode(
        self, ino: int, items: Iterator[Item], paths: list[Path]
    ) -> tuple[Inode, Xattrs] | None:
        """Make one file under its first path, and hard links to it under the others.

        Returns:
            For a directory, which exists already: the attributes to set once it is filled.

        Raises:
            OSError: the host cannot make the file.
        """
        inode: Inode | None = None
        target = b""
        xattr_items: list[Item] = []
        path = paths[0]
        file: _File | None = None
        for item, value in items:
            _, type_, offset = split_key(item)
            if type_ == TYPE_INODE:
                inode = decode_inode(ino, value)
                if stat.S_ISREG(inode.mode):
                    file = _File(inode, path)
            elif type_ == TYPE_XATTR:
                xattr_items.append((item, value))
            elif type_ == TYPE_SYMLINK and 0 < len(value) <= SYMLINK_BYTES_MAX:
                target = value
            elif type_ in (TYPE_INLINE, TYPE_EXTENT) and file is not None:
                file.parts.append((type_, offset, value))
        if inode is None:
            return None
        xattrs = self._xattrs(path, ino, xattr_items)
        if stat.S_ISDIR(inode.mode):
            return inode, xattrs
        for parent in {path[:-1], *(other[:-1] for other in paths)}:
            self._make_directory(parent)
        self._list(path)
        if file is not None:
            self._report.files += 1
            self._make_regular(file)
        else:
            self._report.others += 1
            if not self._make_special(inode, path, target):
                return None
        if self._destination is not None:
            for what in self._destination.set_attributes(path, inode, xattrs):
                self._report.note(f"{shown(path)}: {what} could not be set")
        for other in paths[1:]:
            self._list(other)
            if self._destination is not None:
                self._destination.make_link(path, other)
        return None

    def _set_directory_attributes(self, path: Path, inode: Inode, xattrs: Xattrs) -> None:
        if self._destination is None:
            return
        try:
            refused = self._destination.set_attributes(path, inode, xattrs)
        except OSError as error:
            refused = [f"its attributes ({error.strerror})"]
        for what in refused:
            self._report.note(f"{shown(path)}: {what} could not be set")

    def _make_special(self, inode: Inode, path: Path, target: bytes) -> bool:
        """Make a symlink or a fifo; False if the inode is neither, or the symlink has no target."""
        destination = self._destination
        if stat.S_ISLNK(inode.mode):
            if not target or b"\0" in target:
                self._report.note_lost(path)
                return False
            if destination is not None:
                destination.make_symlink(path, target)
            return True
        if stat.S_ISFIFO(inode.mode):
            if destination is not None:
                destination.make_fifo(path)
            return True
        self._report.note(f"{shown(path)}: sockets and device nodes are not copied")
        return False

    def _xattrs(self, path: Path, ino: int, items: list[Item]) -> Xattrs:
        """The xattrs in these items, up to the first that is incomplete, which is reported."""
        found: Xattrs = []
        name, value, left, next_offset = b"", b"", 0, 0
        try:
            for item, chunk in items:
                offset = split_key(item)[2]
                if left:
                    if offset != next_offset or len(chunk) != min(left, XATTR_CHUNK_BYTES):
                        raise CorruptError(f"xattr of inode {ino}", ino, "a chunk is missing")
                    value += chunk
                    left -= len(chunk)
                else:
                    name, size, value = decode_xattr_first(ino, chunk)
                    left = size - len(value)
                next_offset = offset + 1
                if not left:
                    found.append((name, value))
            if left:
                raise CorruptError(f"xattr of inode {ino}", ino, "its last chunk is missing")
        except CorruptError as error:
            self._report.note(f"{shown(path)}: {error}")
        return found

    # --- data -------------------------------------------------------------------------------------

    def _make_regular(self, file: "_File") -> None:
        """Make a regular file with all data that can be read, and holes for the rest."""
        size = file.inode.size_bytes
        holes: list[tuple[int, int]] = []
        inline_found = False
        blocks = 0
        if self._destination is None:
            return
        with self._destination.make_file(file.path) as descriptor:
            for type_, offset, value in file.parts:
                if type_ == TYPE_INLINE:
                    inline_found = len(value) == size
                    if inline_found:
                        os.pwrite(descriptor, value, 0)
                        self._report.bytes_copied += len(value)
                    continue
                blocks += self._copy_extent(file, descriptor, offset, value, holes)
            try:
                os.ftruncate(descriptor, size)
            except OSError as error:
                self._report.note(
                    f"{shown(file.path)}: its size {size} could not be set ({error.strerror})"
                )
        if file.inode.flags and not inline_found:
            holes.append((0, size))
        elif blocks < file.inode.data_blocks:
            self._report.note(f"{shown(file.path)}: some of its extents are lost")
            holes = holes or [(0, size)]
        if holes:
            self._report.note_damaged(file.path, _merged(holes))

    def _copy_extent(
        self,
        file: "_File",
        descriptor: int,
        offset: int,
        value: bytes,
        holes: list[tuple[int, int]],
    ) -> int:
        """Copy the blocks of one extent whose checksum is right; the others become holes.

        Args:
            offset: of the extent in the file, in blocks.
            value: the item.
            holes: gets the byte range (start, end) of each block that was not copied.

        Returns:
            The number of blocks of the extent; 0 if the item cannot be decoded.
        """
        size = file.inode.size_bytes
        start = offset * BLOCK_SIZE_BYTES
        try:
            extent = decode_extent(file.inode.ino, value)
        except CorruptError as error:
            self._report.note(f"{shown(file.path)}: {error}")
            return 0
        if start >= size:
            return extent.count
        data = self._read(extent.block, extent.count)
        for number in range(extent.count):
            at = start + number * BLOCK_SIZE_BYTES
            if at >= size:
                break
            piece = data[number * BLOCK_SIZE_BYTES : (number + 1) * BLOCK_SIZE_BYTES]
            if not data:
                piece = self._read(extent.block + number, 1)
            first = number * DATA_CHECKSUM_BYTES
            expected = extent.checksums[first : first + DATA_CHECKSUM_BYTES]
            end = min(at + BLOCK_SIZE_BYTES, size)
            if piece and xxh3_64_digest(piece, self._seed) == expected:
                os.pwrite(descriptor, piece[: end - at], at)
                self._report.bytes_copied += end - at
            else:
                holes.append((at, end))
        return extent.count

    def _read(self, first: int, count: int) -> bytes:
        """The bytes of `count` blocks; b"" if any of them cannot be read."""
        if first + count > self._end:
            return b""
        try:
            return self._device.read(first * BLOCK_SIZE_BYTES, count * BLOCK_SIZE_BYTES)
        except DeviceError:
            return b""


@dataclass(slots=True)
class _File:
    """A regular file, and its items with data, each as (type, offset in blocks, value)."""

    inode: Inode
    path: Path
    parts: list[tuple[int, int, bytes]] = field(default_factory=list)


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ranges in order, those that touch or overlap made one."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if merged and merged[-1][1] >= start:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


# --- paths ----------------------------------------------------------------------------------------


def _places(
    names: dict[int, list[tuple[bytes, int]]],
    inodes: dict[int, int],
    base: Path | None,
    lost_base: Path,
) -> dict[int, list[Path]]:
    """The paths under which each inode is copied.

    A directory gets one path, however many names lead to it.

    Args:
        names: of each directory its entries, as (name, inode number).
        inodes: the mode of each inode.
        base: the path of the root directory; None: there is no root directory.
        lost_base: the directory for inodes that no path from the root directory reaches.
    """
    places: dict[int, list[Path]] = {}

    def descend(ino: int, path: Path) -> None:
        places[ino] = [path]
        waiting = [(ino, path)]
        while waiting:
            directory, above = waiting.pop()
            taken = set()
            for name, child in names.get(directory, []):
                mode = inodes.get(child)
                if mode is None or name in taken or not is_safe_name(name):
                    continue
                here = (*above, name)
                if stat.S_ISDIR(mode):
                    if child in places or len(here) > DEPTH_MAX:
                        continue  # a directory that is too deep starts anew below `lost_base`
                    places[child] = [here]
                    waiting.append((child, here))
                else:
                    places.setdefault(child, []).append(here)
                taken.add(name)

    if base is not None and stat.S_ISDIR(inodes.get(ROOT_INO, 0)):
        descend(ROOT_INO, base)
    named = {
        child
        for directory, entries in names.items()
        if stat.S_ISDIR(inodes.get(directory, 0))
        for _, child in entries
        if child != directory
    }
    # First the inodes without a name, with what is below them. What then remains lies below
    # directories that contain each other in a ring, or too deep.
    for only_unnamed in (True, False):
        for ino, mode in inodes.items():
            if ino in places or (only_unnamed and ino in named):
                continue
            path = (*lost_base, b"inode-%d" % ino)
            if stat.S_ISDIR(mode):
                descend(ino, path)
            else:
                places[ino] = [path]
    return places


def _parents_first(places: dict[int, list[Path]], inodes: dict[int, int]) -> list[int]:
    """The directories, ordered so that each comes after the one that contains it."""
    directories = [ino for ino in places if stat.S_ISDIR(inodes.get(ino, 0))]
    return sorted(directories, key=lambda ino: len(places[ino][0]))
