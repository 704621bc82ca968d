"""Finds the roots of a damaged image, and reads their trees around nodes that are lost.

Roots are looked for in three places, until one gives any:

1. The superblocks of the ring, the newest first. One serves if its whole catalog and the root node
   of the main volume can be read.
2. The catalogs that a scan of all blocks finds, the newest first, under the same condition.
3. The root nodes of trees that the scan finds, without a catalog.

Where a tree has lost a node, `RootFinder.recover` searches all leaves of the image, old ones too,
for items whose keys lie in the range that the lost node covered.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from cowfs.care.generations import superblocks
from cowfs.care.reader import MetadataReader, ignore_damage
from cowfs.care.salvage_report import Progress, SalvageReport
from cowfs.care.scan import FoundNode, Scan, scan_image
from cowfs.errors import CorruptError, DeviceError, ImageError
from cowfs.files.items import KEY_BYTES, ROOT_INO, TYPE_INODE, key
from cowfs.history.records import MAIN_VOLUME, RootKind, RootRecord, decode_root
from cowfs.storage.device import Device
from cowfs.storage.format import Pointer, Superblock, check_pointer, decode_pointer

CATALOGS_TRIED_MAX = 256

Item = tuple[bytes, bytes]  # key and value, as they are in a leaf


@dataclass(frozen=True, slots=True)
class FoundRoot:
    """A volume or snapshot whose root node can be read."""

    name: str
    kind: RootKind
    pointer: Pointer


@dataclass(slots=True)
class LostRange:
    """The keys that a lost node covered: `low` up to, not including, `high`.

    `birth` is that of the node above it: the lost node was not newer.
    """

    low: bytes
    high: bytes
    birth: int


class RootFinder:
    """Finds the roots of one image.

    Args:
        device: the image; only read from.
        report: gets what was found, and what could not be read.
        progress: called while the image is scanned.

    Attributes:
        identity: a superblock with the id, seed and size of the image. After a scan without any
            superblock, its other fields mean nothing.
        reader: reads nodes of the image.

    Raises:
        ImageError: there is neither a superblock nor a node that can be verified.
    """

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

    def roots(self) -> list[FoundRoot]:
        """The roots whose root node can be read, volumes before snapshots.

        Raises:
            ImageError: no root of any tree can be read.
        """
        for superblock in self._superblocks:
            found = self._catalog_roots(superblock.catalog, superblock.generation)
            if found is not None:
                self._report.source = f"generation {superblock.generation}"
                if superblock is not self._superblocks[0]:
                    self._report.note(
                        f"the roots of generation {self._superblocks[0].generation}, the newest, "
                        f"cannot be read; this is generation {superblock.generation}"
                    )
                return found
        nodes = self._scanned().nodes
        catalogs: dict[int, FoundNode] = {}  # by birth: the highest node of the catalog
        for node in nodes:
            if not node.owner:
                best = catalogs.get(node.pointer.birth)
                if best is None or node.level > best.level:
                    catalogs[node.pointer.birth] = node
        for birth in sorted(catalogs, reverse=True)[:CATALOGS_TRIED_MAX]:
            found = self._catalog_roots(catalogs[birth].pointer, birth)
            if found is not None:
                self._report.source = f"the catalog of generation {birth}, found by a scan"
                return found
        found = self._roots_without_catalog(nodes)
        if not found:
            raise ImageError(f"{self._device.name}: no root of a tree can be read any more")
        self._report.source = "root nodes of trees, found by a scan; no catalog is left"
        self._report.note(
            "no catalog is left, so names of volumes and snapshots are lost: each tree is named by "
            "its number, and only its newest state was looked for"
        )
        return found

    def recover(self, tree: "SalvageTree") -> list[Item]:
        """Items of a tree's lost ranges, found in any leaf of the image: the newest of each key.

        Args:
            tree: one whose items were read to the end, so that its lost ranges are known.

        Returns:
            The items in key order.
        """
        newest: dict[bytes, tuple[int, bytes]] = {}
        for node in self._scanned().nodes:
            pointer = node.pointer
            identity = (pointer.block, pointer.checksum)
            if node.level or not node.owner or identity in tree.visited:
                continue
            image = self.reader.node(pointer, 0, ignore_damage)
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

    def _scanned(self) -> Scan:
        if self._scan is None:
            progress = self._progress
            self._scan = scan_image(
                self._device,
                self._superblocks[0] if self._superblocks else None,
                None if progress is None else lambda done, all_: progress("scanning", done, all_),
            )
        return self._scan

    def _catalog_roots(self, pointer: Pointer, birth: int) -> list[FoundRoot] | None:
        """The roots that a catalog names.

        Args:
            pointer: the root node of the catalog.
            birth: the generation that no node of the catalog may be newer than.

        Returns:
            None if a node of the catalog is lost, if the root node of the main volume is lost, or
            if no volume is left.
        """
        problems = SalvageReport()
        tree = SalvageTree(self.reader, self.identity, pointer, problems, "catalog", birth=birth)
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
                found.append(FoundRoot(record.name, record.kind, record.pointer))
            elif record.name == MAIN_VOLUME and record.kind is RootKind.VOLUME:
                return None
            else:
                problems.note(f"the root node of {record.name} is lost")
        if not any(root.kind is RootKind.VOLUME for root in found):
            return None
        self._report.problems += problems.problems
        return found

    def _roots_without_catalog(self, nodes: list[FoundNode]) -> list[FoundRoot]:
        """Of each owner the newest node that no other node points at and that begins with inode 1.

        Such a node is the root of a tree. The trees are given newest first.
        """
        children: set[tuple[int, bytes]] = set()
        for node in nodes:
            if node.level and node.owner:
                image = self.reader.node(node.pointer, None, ignore_damage)
                if image is not None:
                    for value in image.values:
                        child = decode_pointer(value)
                        children.add((child.block, child.checksum))
        newest: dict[int, FoundNode] = {}
        for node in nodes:
            if not node.owner or (node.pointer.block, node.pointer.checksum) in children:
                continue
            before = newest.get(node.owner)
            rank = (node.pointer.birth, node.level)
            if before is not None and rank <= (before.pointer.birth, before.level):
                continue
            if self._begins_with_root_directory(node.pointer):
                newest[node.owner] = node
        return [
            FoundRoot(f"volume-{owner}", RootKind.VOLUME, newest[owner].pointer)
            for owner in sorted(newest, key=lambda owner: -newest[owner].pointer.birth)
        ]

    def _begins_with_root_directory(self, pointer: Pointer) -> bool:
        ignored = SalvageReport()
        tree = SalvageTree(self.reader, self.identity, pointer, ignored, "")
        for item, _ in tree.entries():
            if item > key(ROOT_INO, TYPE_INODE, 0):
                return False
            if item == key(ROOT_INO, TYPE_INODE, 0):
                return True
        return False


def _is_readable(reader: MetadataReader, identity: Superblock, pointer: Pointer) -> bool:
    try:
        check_pointer(pointer, identity.total_blocks, pointer.birth, "root", 0)
    except CorruptError:
        return False
    return reader.node(pointer, None, ignore_damage) is not None


class SalvageTree:
    """Reads the items of one tree, and goes on behind nodes that are lost.

    Args:
        root: the root node.
        report: gets one problem for each lost node.
        name: of the tree, for those problems.
        birth: the generation that the root node may not be newer than; by default its own birth.

    Attributes:
        lost: the key ranges below lost nodes, filled while items are read.
        visited: block and checksum of every pointer that was followed, filled while items are read.
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
        self.lost: list[LostRange] = []
        self.visited: set[tuple[int, bytes]] = set()
        self._reader = reader
        self._total = identity.total_blocks
        self._root = root
        self._birth = root.birth if birth is None else birth
        self._report = report
        self._name = name
        self._reported_blocks: set[int] = set()

    def items(self) -> Iterator[Item]:
        """The items of files, in key order: entries whose key has the length of an item's key."""
        return (entry for entry in self.entries() if len(entry[0]) == KEY_BYTES)

    def entries(self) -> Iterator[Item]:
        """All entries of the leaves, in strictly ascending key order.

        An entry whose key is not above the one before it is left out: a lookup by its key would
        not find it either. A node is read once; a second pointer at it counts as a lost node.
        """
        self.lost, self.visited = [], set()
        # Pointer, birth of its parent, level (None: any), and the key range that it covers.
        waiting: list[tuple[Pointer, int, int | None, bytes, bytes]] = [
            (self._root, self._birth, None, b"", b"\xff" * (KEY_BYTES + 1))
        ]
        last = b""
        while waiting:
            pointer, birth, level, low, high = waiting.pop()
            image = None
            if (pointer.block, pointer.checksum) not in self.visited:
                self.visited.add((pointer.block, pointer.checksum))
                try:
                    check_pointer(pointer, self._total, birth, "node", pointer.block)
                    image = self._reader.node(pointer, level, ignore_damage)
                except CorruptError:
                    image = None
            if image is None:
                self.lost.append(LostRange(low, high, birth))
                if pointer.block not in self._reported_blocks:
                    self._reported_blocks.add(pointer.block)
                    self._report.note(
                        f"{self._name}: the node at block {pointer.block} is lost, with everything "
                        "below it"
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
                if item > last:
                    last = item
                    yield item, value
