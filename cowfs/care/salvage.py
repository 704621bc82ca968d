"""Copies out what can still be read, when a mount or a repair is of no use any more.

The image is only read. Roots are looked for in this order: the superblocks of the ring, newest first;
without any whose catalog and main volume can be read, a scan of all blocks for the newest catalog that
is whole; without that, for root nodes of trees by themselves. What lies below lost nodes is
looked for by its keys among all nodes of the image, old ones too.

    DIR/main/...                    the live volume
    DIR/snapshots/NAME/...          its snapshots, if wanted
    DIR/lost+found/ROOT/inode-N     files and directories without a way from the root directory
    DIR/lost+found/ROOT-old/...     from nodes that nothing leads to: may be older than they should be

Every block is verified. What cannot be read is left out (a hole in a file), and is in the report.
"""

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby

from xxhash import xxh3_64_digest

from cowfs.care.copyout import Destination, Path, is_safe_name
from cowfs.care.generations import superblocks
from cowfs.care.reader import MetadataReader
from cowfs.care.scan import FoundNode, Scan, scan_image
from cowfs.errors import CorruptError, DeviceError, ImageError
from cowfs.escapes import escaped
from cowfs.files.items import (
    KEY_BYTES,
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
    key,
    split_key,
)
from cowfs.history.records import MAIN_VOLUME, RootKind, RootRecord, decode_root
from cowfs.storage.device import Device
from cowfs.storage.format import (
    BLOCK_SIZE_BYTES,
    DATA_CHECKSUM_BYTES,
    Pointer,
    Superblock,
    check_pointer,
    decode_pointer,
)

LISTED_MAX = 10_000  # paths and problems that a report names; the others are counted
CATALOGS_TRIED_MAX = 256
DEPTH_MAX = 500  # directories in one path; the memory for paths grows with its square
Item = tuple[bytes, bytes]
Progress = Callable[[str, int, int], None]


@dataclass(slots=True)
class SalvageReport:
    """What was found and copied.

    Attributes:
        source: where the roots came from.
        roots: names of the volumes and snapshots that were read.
        files, directories, others, bytes_copied: what was made (or would be).
        paths: of everything that was made, from the destination, when only listing.
        damaged: files that have holes where data could not be read: path, and byte ranges.
        lost: names whose file could not be read at all.
        problems: everything else that is not as it was, in words.
        left_off: how many entries of these lists there were beyond LISTED_MAX.
    """

    source: str = ""
    roots: list[str] = field(default_factory=list)
    files: int = 0
    directories: int = 0
    others: int = 0
    bytes_copied: int = 0
    paths: list[str] = field(default_factory=list)
    damaged: list[tuple[str, list[tuple[int, int]]]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    left_off: int = 0

    @property
    def complete(self) -> bool:
        """All that the roots name was copied as it was."""
        return not (self.damaged or self.lost or self.problems or self.left_off)

    def note(self, what: str) -> None:
        self._add(self.problems, what)

    def note_lost(self, path: Path) -> None:
        self._add(self.lost, _shown(path))

    def note_path(self, path: Path) -> None:
        self._add(self.paths, _shown(path))

    def note_damaged(self, path: Path, ranges: list[tuple[int, int]]) -> None:
        if len(self.damaged) < LISTED_MAX:
            self.damaged.append((_shown(path), ranges[:LISTED_MAX]))
        else:
            self.left_off += 1

    def _add(self, kept: list[str], what: str) -> None:
        if len(kept) < LISTED_MAX:
            kept.append(what)
        else:
            self.left_off += 1


@dataclass(slots=True)
class _Lost:
    """Keys from `low` up to `high` that a lost node of that birth led to."""

    low: bytes
    high: bytes
    birth: int


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
        dry_run: only list; `folder` is not touched, and file data is not read.
        snapshots: the snapshots too, each as full copies.
        progress: called with what is being done, how much of it is done, and how much there is.

    Raises:
        ImageError: nothing of an image is left.
        UsageError: `folder` cannot be used. DeviceError: the image cannot be read at all.
        OSError: the host cannot hold the copy.
    """
    report = SalvageReport()
    finder = _Finder(device, report, progress)
    roots = finder.roots()
    destination = None if dry_run else Destination(folder)
    try:
        made: set[Path] = set()
        for name, kind, pointer in roots:
            if kind is RootKind.SNAPSHOT and not snapshots:
                continue
            report.roots.append(name)
            base = (b"snapshots", name.encode()) if kind is RootKind.SNAPSHOT else (name.encode(),)
            lost_base = (b"lost+found", name.encode())
            tree = _Tree(finder.reader, finder.identity, pointer, report, name)
            copy = _Copy(device, finder.identity, destination, report, made, progress)
            copy.run(tree.items, base, lost_base)
            if tree.lost:
                recovered = finder.recover(tree)
                if recovered:
                    report.note(
                        f"{name}: what was found of lost nodes is in lost+found/{name}-old; it may "
                        "be older than it should be"
                    )
                    old = (b"lost+found", name.encode() + b"-old")
                    copy.run(lambda items=recovered: iter(items), None, old)  # type: ignore[misc]
    finally:
        if destination is not None:
            destination.close()
    return report


# --- where the roots are ----------------------------------------------------------------------------


class _Finder:
    """Finds the roots of an image that may have lost them."""

    def __init__(self, device: Device, report: SalvageReport, progress: Progress | None) -> None:
        self._device = device
        self._report = report
        self._progress = progress
        self._scan: Scan | None = None
        try:
            self._superblocks = list(superblocks(device).values())
        except (ImageError, DeviceError) as error:
            self._superblocks = []
            report.note(f"the superblocks are lost ({error})")
        self.identity = self._superblocks[0] if self._superblocks else self._scanned().identity
        self.reader = MetadataReader(device, self.identity)

    def roots(self) -> list[tuple[str, RootKind, Pointer]]:
        """Name, kind and root node of each root that can be read, volumes first."""
        for superblock in self._superblocks:
            found = self._catalog(superblock.catalog, superblock.generation)
            if found is not None:
                self._report.source = f"generation {superblock.generation}"
                if superblock is not self._superblocks[0]:
                    self._report.note(
                        f"the roots of generation {self._superblocks[0].generation}, the newest, "
                        f"cannot be read; this is generation {superblock.generation}"
                    )
                return found
        nodes = self._scanned().nodes
        catalogs: dict[int, FoundNode] = {}
        for node in nodes:
            if not node.owner:
                before = catalogs.get(node.pointer.birth)
                if before is None or node.level > before.level:
                    catalogs[node.pointer.birth] = node
        for birth in sorted(catalogs, reverse=True)[:CATALOGS_TRIED_MAX]:
            found = self._catalog(catalogs[birth].pointer, birth)
            if found is not None:
                self._report.source = f"the catalog of generation {birth}, found by a scan"
                return found
        found = self._lone_trees(nodes)
        if not found:
            raise ImageError(f"{self._device.name}: no root of a tree can be read any more")
        self._report.source = "root nodes of trees, found by a scan; no catalog is left"
        self._report.note("no catalog is left: trees are named by their number, newest state each")
        return found

    def _scanned(self) -> Scan:
        if self._scan is None:
            progress = self._progress
            self._scan = scan_image(
                self._device,
                self._superblocks[0] if self._superblocks else None,
                None if progress is None else lambda done, all_: progress("scanning", done, all_),
            )
        return self._scan

    def _catalog(self, pointer: Pointer, birth: int) -> list[tuple[str, RootKind, Pointer]] | None:
        """The roots that a catalog names; None unless it and its main volume's root can be read."""
        problems = SalvageReport()
        tree = _Tree(self.reader, self.identity, pointer, problems, "catalog", birth=birth)
        records: list[RootRecord] = []
        for item, value in tree.entries():
            try:
                if item[:1] == b"R":
                    records.append(decode_root(value))
            except CorruptError as error:
                problems.note(str(error))
        if tree.lost:
            return None
        found = []
        for record in sorted(records, key=lambda record: (record.kind, record.root_id)):
            if _is_readable(self.reader, self.identity, record.pointer):
                found.append((record.name, record.kind, record.pointer))
            elif record.name == MAIN_VOLUME and record.kind is RootKind.VOLUME:
                return None
            else:
                problems.note(f"the root node of {record.name} is lost")
        if not any(kind is RootKind.VOLUME for _, kind, _ in found):
            return None
        self._report.problems += problems.problems
        return found

    def _lone_trees(self, nodes: list[FoundNode]) -> list[tuple[str, RootKind, Pointer]]:
        """Of each owner the newest node that no other leads to and that begins with inode 1."""
        children: set[tuple[int, bytes]] = set()
        for node in nodes:
            if node.level and node.owner:
                image = self.reader.node(node.pointer, None, _ignore)
                if image is not None:
                    for value in image.values:
                        child = decode_pointer(value)
                        children.add((child.block, child.checksum))
        best: dict[int, FoundNode] = {}
        for node in nodes:
            if not node.owner or (node.pointer.block, node.pointer.checksum) in children:
                continue
            before = best.get(node.owner)
            rank = (node.pointer.birth, node.level)
            if before is not None and rank <= (before.pointer.birth, before.level):
                continue
            if self._begins_with_root(node.pointer):
                best[node.owner] = node
        return [
            (f"volume-{owner}", RootKind.VOLUME, best[owner].pointer)
            for owner in sorted(best, key=lambda owner: -best[owner].pointer.birth)
        ]

    def _begins_with_root(self, pointer: Pointer) -> bool:
        silent = SalvageReport()
        tree = _Tree(self.reader, self.identity, pointer, silent, "")
        for item, _ in tree.entries():
            if item > key(ROOT_INO, TYPE_INODE, 0):
                return False
            if item == key(ROOT_INO, TYPE_INODE, 0):
                return True
        return False

    def recover(self, tree: "_Tree") -> list[Item]:
        """Items in the lost ranges of a tree, from any leaf of the image; the newest of each key."""
        newest: dict[bytes, tuple[int, bytes]] = {}
        for node in self._scanned().nodes:
            pointer = node.pointer
            if node.level or not node.owner or (pointer.block, pointer.checksum) in tree.met:
                continue
            image = self.reader.node(pointer, 0, _ignore)
            if image is None or not image.keys:
                continue
            for lost in tree.lost:
                if image.keys[-1] < lost.low or image.keys[0] >= lost.high:
                    continue
                if pointer.birth > lost.birth:
                    continue
                for item, value in zip(image.keys, image.values, strict=True):
                    if lost.low <= item < lost.high and len(item) == KEY_BYTES:
                        before = newest.get(item)
                        if before is None or before[0] < pointer.birth:
                            newest[item] = (pointer.birth, value)
        return [(item, newest[item][1]) for item in sorted(newest)]


def _is_readable(reader: MetadataReader, identity: Superblock, pointer: Pointer) -> bool:
    try:
        check_pointer(pointer, identity.total_blocks, pointer.birth, "root", 0)
    except CorruptError:
        return False
    return reader.node(pointer, None, _ignore) is not None


class _Tree:
    """The items of one tree, as far as its nodes can be read.

    Attributes:
        lost: the ranges of keys below nodes that could not be read.
        met: block and checksum of every node that was read.
    """

    def __init__(
        self,
        reader: MetadataReader,
        identity: Superblock,
        root: Pointer,
        report: SalvageReport,
        name: str,
        *,
        birth: int | None = None,
    ) -> None:
        self.lost: list[_Lost] = []
        self.met: set[tuple[int, bytes]] = set()
        self._reader = reader
        self._total = identity.total_blocks
        self._root = root
        self._birth = root.birth if birth is None else birth
        self._report = report
        self._name = name
        self._told: set[int] = set()

    def items(self) -> Iterator[Item]:
        """All items in key order."""
        return (entry for entry in self.entries() if len(entry[0]) == KEY_BYTES)

    def entries(self) -> Iterator[Item]:
        self.lost, self.met = [], set()
        waiting: list[tuple[Pointer, int, int | None, bytes, bytes]] = [
            (self._root, self._birth, None, b"", b"\xff" * (KEY_BYTES + 1))
        ]
        last = b""
        while waiting:
            pointer, birth, level, low, high = waiting.pop()
            image = None
            if (pointer.block, pointer.checksum) not in self.met:
                self.met.add((pointer.block, pointer.checksum))
                try:
                    check_pointer(pointer, self._total, birth, "node", pointer.block)
                    image = self._reader.node(pointer, level, _ignore)
                except CorruptError:
                    image = None
            if image is None:
                self.lost.append(_Lost(low, high, birth))
                if pointer.block not in self._told:
                    self._told.add(pointer.block)
                    self._report.note(
                        f"{self._name}: a node at block {pointer.block} is lost with all below it"
                    )
                continue
            if image.level:
                lows = [low, *image.keys[1:]]
                highs = [*image.keys[1:], high]
                children = [
                    (decode_pointer(value), image.birth, image.level - 1, lower, upper)
                    for value, lower, upper in zip(image.values, lows, highs, strict=True)
                ]
                waiting += reversed(children)
                continue
            for item, value in zip(image.keys, image.values, strict=True):
                if item > last:  # what stands where it cannot be is not found by its key either
                    last = item
                    yield item, value


# --- copying ----------------------------------------------------------------------------------------


class _Copy:
    """Copies one tree: first all names, then, inode by inode, what belongs to them."""

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
        self._made = made  # directories of our own that are there
        self._progress = progress

    def run(self, items: Callable[[], Iterator[Item]], base: Path | None, lost_base: Path) -> None:
        """Copy the items of a tree.

        Args:
            items: gives them in key order, each time anew.
            base: for what the root directory leads to; None: there is no root directory.
            lost_base: for what it does not lead to.
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
        attributes: dict[int, tuple[Inode, list[tuple[bytes, bytes]]]] = {}
        for ino, group in groupby(items(), key=lambda entry: split_key(entry[0])[0]):
            if ino not in inodes or ino not in places:
                continue
            done += 1
            if self._progress is not None and not done % 64:
                self._progress("copying", done, len(inodes))
            try:
                made = self._inode(ino, group, places[ino])
            except OSError as error:
                self._report.note(f"{_shown(places[ino][0])} was not copied: {error}")
                continue
            if made is not None:
                attributes[ino] = made
        for ino, path in reversed(directories):
            if ino in attributes:
                self._attributes(path, *attributes[ino])

    def _read_names(
        self, items: Callable[[], Iterator[Item]]
    ) -> tuple[dict[int, list[tuple[bytes, int]]], dict[int, int]]:
        """The entries of each directory, and the mode of each inode that is not deleted."""
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
        """A directory, and those of our own above it."""
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
                    self._report.note(f"{_shown(part)} was not made: {error.strerror}")

    def _list(self, path: Path) -> None:
        if self._destination is None:
            self._report.note_path(path)

    def _inode(
        self, ino: int, items: Iterator[Item], paths: list[Path]
    ) -> tuple[Inode, list[tuple[bytes, bytes]]] | None:
        """Make one file under its first path, and links for the others.

        Returns:
            For a directory, which stands already: what is to be set at the end.
        """
        inode: Inode | None = None
        target = b""
        xattrs: list[Item] = []
        path = paths[0]
        file: _File | None = None
        for item, value in items:
            _, type_, offset = split_key(item)
            if type_ == TYPE_INODE:
                inode = decode_inode(ino, value)
                if stat.S_ISREG(inode.mode):
                    file = _File(inode, path)
            elif type_ == TYPE_XATTR:
                xattrs.append((item, value))
            elif type_ == TYPE_SYMLINK and 0 < len(value) <= SYMLINK_BYTES_MAX:
                target = value
            elif type_ in (TYPE_INLINE, TYPE_EXTENT) and file is not None:
                file.parts.append((type_, offset, value))
        if inode is None:
            return None
        attributes = self._xattrs(path, ino, xattrs)
        if stat.S_ISDIR(inode.mode):
            return inode, attributes
        for parent in {path[:-1], *(other[:-1] for other in paths)}:
            self._make_directory(parent)
        self._list(path)
        if file is not None:
            self._report.files += 1
            self._regular(file)
        else:
            self._report.others += 1
            if not self._special(inode, path, target):
                return None
        if self._destination is not None:
            for words in self._destination.set_attributes(path, inode, attributes):
                self._report.note(f"{_shown(path)}: {words} could not be set")
        for other in paths[1:]:
            self._list(other)
            if self._destination is not None:
                self._destination.make_link(path, other)
        return None

    def _attributes(self, path: Path, inode: Inode, xattrs: list[tuple[bytes, bytes]]) -> None:
        if self._destination is None:
            return
        try:
            refused = self._destination.set_attributes(path, inode, xattrs)
        except OSError as error:
            refused = [f"its attributes ({error.strerror})"]
        for words in refused:
            self._report.note(f"{_shown(path)}: {words} could not be set")

    def _special(self, inode: Inode, path: Path, target: bytes) -> bool:
        """Make what is neither file nor directory. Returns whether it was made."""
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
        self._report.note(f"{_shown(path)}: sockets and device nodes are not copied")
        return False

    def _xattrs(self, path: Path, ino: int, items: list[Item]) -> list[tuple[bytes, bytes]]:
        found: list[tuple[bytes, bytes]] = []
        name, value, left, following = b"", b"", 0, 0
        try:
            for item, part in items:
                offset = split_key(item)[2]
                if left:
                    if offset != following or len(part) != min(left, XATTR_CHUNK_BYTES):
                        raise CorruptError(f"xattr of inode {ino}", ino, "a part is missing")
                    value += part
                    left -= len(part)
                else:
                    name, size, value = decode_xattr_first(ino, part)
                    left = size - len(value)
                following = offset + 1
                if not left:
                    found.append((name, value))
            if left:
                raise CorruptError(f"xattr of inode {ino}", ino, "its end is missing")
        except CorruptError as error:
            self._report.note(f"{_shown(path)}: {error}")
        return found

    # --- data ---------------------------------------------------------------------------------------

    def _regular(self, file: "_File") -> None:
        size = file.inode.size_bytes
        holes: list[tuple[int, int]] = []
        inlined = False
        blocks = 0
        if self._destination is None:
            return
        with self._destination.make_file(file.path) as descriptor:
            for type_, offset, value in file.parts:
                if type_ == TYPE_INLINE:
                    inlined = len(value) == size
                    if inlined:
                        os.pwrite(descriptor, value, 0)
                        self._report.bytes_copied += len(value)
                    continue
                blocks += self._extent(file, descriptor, offset, value, holes)
            try:
                os.ftruncate(descriptor, size)
            except OSError as error:
                self._report.note(f"{_shown(file.path)}: its size {size} ({error.strerror})")
        if file.inode.flags and not inlined:
            holes.append((0, size))
        elif blocks < file.inode.data_blocks:
            self._report.note(f"{_shown(file.path)}: a part of its extents is lost")
            holes = holes or [(0, size)]
        if holes:
            self._report.note_damaged(file.path, _merged(holes))

    def _extent(
        self,
        file: "_File",
        descriptor: int,
        offset: int,
        value: bytes,
        holes: list[tuple[int, int]],
    ) -> int:
        """Copy one extent; blocks that are not what was written become holes. Its number of blocks."""
        size = file.inode.size_bytes
        start = offset * BLOCK_SIZE_BYTES
        try:
            extent = decode_extent(file.inode.ino, value)
        except CorruptError as error:
            self._report.note(f"{_shown(file.path)}: {error}")
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
        if first + count > self._end:
            return b""
        try:
            return self._device.read(first * BLOCK_SIZE_BYTES, count * BLOCK_SIZE_BYTES)
        except DeviceError:
            return b""


@dataclass(slots=True)
class _File:
    """A regular file, and its items with data."""

    inode: Inode
    path: Path
    parts: list[tuple[int, int, bytes]] = field(default_factory=list)


def _merged(holes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(holes):
        if merged and merged[-1][1] >= start:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


# --- paths ------------------------------------------------------------------------------------------


def _places(
    names: dict[int, list[tuple[bytes, int]]],
    inodes: dict[int, int],
    base: Path | None,
    lost_base: Path,
) -> dict[int, list[Path]]:
    """The paths of every inode: from the root directory, or from where nothing leads to it.

    A directory has one path, however many names say that they lead to it.
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
                        continue  # what is too deep begins anew below lost+found
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
    # First what nothing leads to, then what is left: directories that lead to each other in a ring.
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
    directories = [ino for ino in places if stat.S_ISDIR(inodes.get(ino, 0))]
    return sorted(directories, key=lambda ino: len(places[ino][0]))


def _shown(path: Path) -> str:
    return "/".join(map(escaped, path))


def _ignore(_invariant: str, _what: str, _block: int) -> None:
    """For reads whose failure the report tells in its own words."""
