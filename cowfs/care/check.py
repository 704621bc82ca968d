"""Checks an image against the invariants, and shares no code with the filesystem that wrote it.

The check only reads, through the formats and the device. It uses neither the allocator nor the
B+tree nor the space map of the filesystem. It checks I1, I4, I5, I6 and I7 in full, C9 for every
byte in use, and the part of I2 that an image can show: the retained generations are still whole. I3
is about the order of writes and leaves no trace in an image.

Nobody may write the image during the check, except a writer that retains the generation checked.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from cowfs.care.contents import Contents, TreePart
from cowfs.care.data import DataCheck
from cowfs.care.names import paths_of
from cowfs.care.reader import (
    EMPTY,
    MetadataReader,
    Slot,
    choose_superblock,
    ignore_damage,
    read_ring,
    size_is_impossible,
)
from cowfs.care.references import References, SpaceMapCheck, index_pointer, pointer_fault
from cowfs.care.report import CheckProgress, CheckReport, Finding, Findings
from cowfs.care.walk import CatalogEntry, NodeFacts, Walk
from cowfs.errors import CorruptError
from cowfs.escapes import escaped
from cowfs.files.calls import decode_calls
from cowfs.files.items import INO_MAX, KEY_BYTES, TYPE_EXTENT, decode_extent, split_key
from cowfs.history.records import (
    COUNTER_MAX,
    MAIN_VOLUME,
    ROOT_ID_MAX,
    DropRecord,
    RootKind,
    RootRecord,
    decode_drop,
    decode_id,
    decode_root,
    drop_key,
    root_key,
    snapshot_key,
    volume_key,
)
from cowfs.storage.device import Device
from cowfs.storage.format import (
    INDEX_FANOUT,
    NODE_BLOCKS,
    NodeImage,
    Pointer,
    Superblock,
    decode_pointer,
    index_shape,
)
from cowfs.storage.log_records import read_log
from cowfs.storage.overlay import OverlayDevice

__all__ = ["CheckProgress", "CheckReport", "Finding", "check_image"]


def check_image(
    device: Device,
    *,
    generation: int | None = None,
    progress: Callable[[CheckProgress], None] | None = None,
    data: bool = True,
) -> CheckReport:
    """Check an image, and report everything that is wrong with it.

    Each distinct node is read once, in both copies, and each distinct data block once, however many
    snapshots share it. One more snapshot costs only the nodes and blocks that it does not share.

    Args:
        device: the image; only read from.
        generation: the generation to check, which must still be in the ring; None: the newest.
        progress: called about every PROGRESS_BLOCKS blocks (walk.py).
        data: also compare file data with its checksums.

    Raises:
        ImageError: the device holds no image, one of an unknown format, or not that generation.
        DeviceError: neither copy of the superblock ring can be read.
    """
    return inspect_image(device, generation=generation, progress=progress, data=data).report


@dataclass(frozen=True, slots=True)
class Inspection:
    """The report of a check, and the counts that a repair needs.

    Attributes:
        corrections: by root id, the root records whose counters are wrong, with the right ones.
        next_root_id: that of the superblock, raised above every root id that was found.
        catalog_nodes: counted nodes of the catalog; 0 if part of it could not be read.
        sound: there is no I5 error that a repair could not fix: no overlapping nodes or data, no
            wrong key, level or pointer.
    """

    report: CheckReport
    slots: list[Slot]
    superblock: Superblock
    reader: MetadataReader
    references: References
    walk: Walk
    space_map: SpaceMapCheck
    corrections: dict[int, RootRecord]
    next_root_id: int
    catalog_nodes: int
    sound: bool


def inspect_image(
    device: Device,
    *,
    generation: int | None = None,
    progress: Callable[[CheckProgress], None] | None = None,
    data: bool = True,
) -> Inspection:
    """Check an image as `check_image` does, and return the counts too."""
    slots = read_ring(device)
    superblock = choose_superblock(device, slots, generation)
    findings = Findings()
    findings.root = "superblock"
    _check_ring(slots, superblock, findings)
    impossible = size_is_impossible(device, superblock)
    if impossible:
        findings.error("I5", impossible)

    reader = MetadataReader(device, superblock)
    references = References()
    data_check = DataCheck(device, superblock, references, findings, verify=data)
    contents = Contents(superblock, data_check, findings)
    walk = Walk(reader, superblock, references, contents, findings, progress)
    roots = _Roots(reader, superblock, walk, contents, findings)
    roots.run()

    sound = not any(
        finding.invariant == "I5" and not finding.repairable for finding in findings.all()
    )
    findings.root = "space map"
    space_map = SpaceMapCheck(reader, superblock, references, findings, incomplete=walk.incomplete)
    system_blocks = space_map.run()

    if generation is None:
        findings.root = "log"
        _check_log(device, superblock, findings)
    retained = []
    if generation is None:
        retained_check = _RetainedCheck(device, walk, data_check, findings, data=data)
        for earlier in _retained_superblocks(slots, superblock):
            findings.root = f"generation {earlier.generation}"
            retained_check.run(earlier)
            retained.append(earlier.generation)
    report = CheckReport(
        generation=superblock.generation,
        findings=findings.all(),
        findings_left_off=findings.left_off,
        roots=roots.count,
        nodes=walk.node_count,
        inodes=contents.inode_count,
        data_blocks=references.data_blocks(),
        used_blocks=references.used_blocks(),
        system_blocks=system_blocks,
        verified_blocks=data_check.verified_blocks,
        retained_generations=tuple(retained),
        replay=device.replay if isinstance(device, OverlayDevice) else None,
    )
    return Inspection(
        report=report,
        slots=slots,
        superblock=superblock,
        reader=reader,
        references=references,
        walk=walk,
        space_map=space_map,
        corrections=roots.corrections,
        next_root_id=roots.next_root_id,
        catalog_nodes=roots.catalog_nodes,
        sound=sound,
    )


def _check_ring(slots: list[Slot], superblock: Superblock, findings: Findings) -> None:
    """Warn of bad slots, and of slots whose copies differ.

    A torn or stale copy of a slot is only a warning: the other copy, or another slot, is valid.
    """
    by_number: dict[int, list[Slot]] = {}
    for slot in slots:
        by_number.setdefault(slot.number, []).append(slot)
    for number, (first, second) in sorted(by_number.items()):
        for slot in (first, second):
            if slot.problem and slot.problem != EMPTY:
                copy = "AB"[slot.copy]
                findings.warning(
                    "C9", f"slot {number}, copy {copy}: {slot.problem}", block=slot.block
                )
            elif slot.superblock and slot.superblock.uuid != superblock.uuid:
                findings.warning("C9", f"slot {number} is of another image", block=slot.block)
        if first.superblock != second.superblock and not (first.problem and second.problem):
            generations = " and ".join(
                f"generation {slot.superblock.generation}" if slot.superblock else slot.problem
                for slot in (first, second)
            )
            findings.warning(
                "C9", f"the copies of slot {number} differ: {generations}", block=first.block
            )


def _check_log(device: Device, superblock: Superblock, findings: Findings) -> None:
    """Check that the records of the log are whole, in both copies, and have calls that were made.

    A crash may leave the last record whole in one copy alone, so that is only a warning.
    """
    replay = device.replay if isinstance(device, OverlayDevice) else None
    if replay is not None and replay.error is not None:
        findings.error("C2", replay.error, repairable=True)
    for record in read_log(device, superblock):
        for block in record.bad_copies:
            findings.warning("C9", f"record {record.sequence}: a copy is not whole", block=block)
        try:
            calls = decode_calls(record.body)
        except msgspec.DecodeError as error:
            findings.error("I5", f"record {record.sequence}: {error}", block=record.block)
            return
        if len(calls) != record.call_count:
            findings.error(
                "I5",
                f"record {record.sequence} has {len(calls)} calls, expected {record.call_count}",
                block=record.block,
            )


class _Roots:
    """Walks the catalog and every root that it names, and checks their records.

    Attributes: `count` is the number of roots walked; the others are those of `Inspection`.
    """

    def __init__(
        self,
        reader: MetadataReader,
        superblock: Superblock,
        walk: Walk,
        contents: Contents,
        findings: Findings,
    ) -> None:
        self.count = 0
        self.corrections: dict[int, RootRecord] = {}
        self.next_root_id = superblock.next_root_id
        self.catalog_nodes = 0
        self._reader = reader
        self._superblock = superblock
        self._walk = walk
        self._contents = contents
        self._findings = findings
        self._roots: dict[int, tuple[RootRecord, CatalogEntry]] = {}
        self._drops: list[tuple[DropRecord, CatalogEntry]] = []

    def run(self) -> None:
        superblock, walk, findings = self._superblock, self._walk, self._findings
        findings.root = "catalog"
        top = walk.root(superblock.catalog, superblock.generation, catalog=True)
        if top is None or top.broken:
            findings.error("C9", "the catalog cannot be read in full")
        else:
            self.catalog_nodes = top.nodes
            if top.nodes != superblock.catalog_nodes:
                findings.error(
                    "I6",
                    f"the superblock counts {superblock.catalog_nodes} catalog nodes, "
                    f"expected {top.nodes}",
                    repairable=True,
                )
        self._read_catalog(complete=top is not None and not top.broken)
        for drop, _ in self._drops:
            walk.expect_drop(drop)
        # Volumes before snapshots: a finding in a shared node then names the path in the volume.
        for root_id in sorted(self._roots, key=self._volumes_first):
            record, entry = self._roots[root_id]
            self._check_root(record, entry)
        for drop, entry in self._drops:
            findings.root = f"drop queue, {drop.name or drop.number}"
            walk.drop_path(drop)
            walk.root(drop.path[0].pointer, entry.birth)
            self.count += 1

    def _volumes_first(self, root_id: int) -> tuple[bool, int]:
        return self._roots[root_id][0].kind is not RootKind.VOLUME, root_id

    def _read_catalog(self, *, complete: bool) -> None:
        """Decode every entry of the catalog, and check that names and root records fit each other.

        Args:
            complete: the whole catalog was read; otherwise its names are not checked.
        """
        findings = self._findings
        named: dict[int, list[bytes]] = {}
        for entry in self._walk.catalog:
            key, value = entry.key, entry.value
            try:
                if key[:1] == b"R":
                    record = decode_root(value)
                    if key != root_key(record.root_id):
                        raise CorruptError(
                            "root record", entry.block, "is under another root's key"
                        )
                    self._roots[record.root_id] = (record, entry)
                elif key[:1] in (b"S", b"V"):
                    named.setdefault(decode_id(value), []).append(key)
                elif key[:1] == b"D":
                    drop = decode_drop(value)
                    if key != drop_key(drop.number):
                        raise CorruptError("drop record", entry.block, "is under another key")
                    self._drops.append((drop, entry))
                else:
                    raise CorruptError("catalog", entry.block, "unknown key", key.hex())
            except CorruptError as error:
                found = "" if error.found is None else f", found {error.found}"
                findings.error("I5", f"{error.owner}: {error.reason}{found}", block=entry.block)
                self._walk.incomplete = True
        if not complete:
            return
        for root_id, (record, entry) in self._roots.items():
            volume = record.kind is RootKind.VOLUME
            wanted = volume_key(record.name) if volume else snapshot_key(record.name)
            keys = named.pop(root_id, [])
            if keys != [wanted]:
                found = ", ".join(f"'{escaped(key)}'" for key in keys) or "none"
                findings.error(
                    "I7",
                    f"root {root_id} is called {record.name}, but its catalog names are {found}",
                    block=entry.block,
                )
        for root_id, keys in named.items():
            names = ", ".join(f"'{escaped(key[1:])}'" for key in keys)
            findings.error(
                "I7", f"the catalog name {names} points at root {root_id}, which does not exist"
            )
        if not any(
            record.kind is RootKind.VOLUME and record.name == MAIN_VOLUME
            for record, _ in self._roots.values()
        ):
            findings.warning("I7", f"there is no volume {MAIN_VOLUME}")

    def _check_root(self, record: RootRecord, entry: CatalogEntry) -> None:
        findings = self._findings
        findings.root = f"{record.kind.name.lower()} {record.name}"
        self.count += 1
        first_finding = len(findings)
        next_root_id = self._superblock.next_root_id
        for what, root_id in (("root id", record.root_id), ("parent", record.parent_id)):
            if root_id >= next_root_id:
                repairable = root_id <= ROOT_ID_MAX
                if repairable:
                    self.next_root_id = max(self.next_root_id, root_id + 1)
                findings.error(
                    "I7",
                    f"{what} is {root_id}, but the next root id is {next_root_id}",
                    block=entry.block,
                    repairable=repairable,
                )
        if record.created_generation > self._superblock.generation:
            findings.error(
                "I4",
                f"created in generation {record.created_generation}, but the image is at "
                f"{self._superblock.generation}",
                block=entry.block,
            )
        elif record.kind is RootKind.SNAPSHOT and record.pointer.birth > record.created_generation:
            findings.error(
                "I4",
                f"a snapshot of generation {record.created_generation} has a tree born in "
                f"{record.pointer.birth}",
                block=entry.block,
            )
        top = self._walk.root(record.pointer, entry.birth)
        if top is not None and top.part is not None and not top.broken:
            self._check_counters(record, top, top.part, entry)
            self._contents.tree(
                top.part,
                lambda: _edges(top),
                lambda: self._leaves(record.pointer),
            )
        wanted = findings.without_path(first_finding)
        if wanted:
            findings.give_paths(first_finding, paths_of(self._leaves(record.pointer), wanted))

    def _check_counters(
        self, record: RootRecord, top: NodeFacts, part: TreePart, entry: CatalogEntry
    ) -> None:
        for what, found, expected in (
            ("nodes", record.node_count, top.nodes),
            ("data blocks", record.data_blocks, part.data_blocks),
            ("inodes", record.inode_count, part.inodes),
        ):
            if found != expected:
                self._findings.error(
                    "I7",
                    f"the root record counts {found} {what}, expected {expected}",
                    block=entry.block,
                    repairable=True,
                )
        last = split_key(top.last_key)[0] if len(top.last_key) == KEY_BYTES else 0
        next_ino = record.next_ino
        if next_ino <= last:
            repairable = last <= INO_MAX
            if repairable:
                next_ino = last + 1
            self._findings.error(
                "I7",
                f"next inode number is {record.next_ino}, but {last} exists",
                block=entry.block,
                repairable=repairable,
            )
        corrected = replace(
            record,
            node_count=top.nodes,
            data_blocks=part.data_blocks,
            inode_count=part.inodes,
            next_ino=next_ino,
        )
        if corrected != record and max(top.nodes, part.data_blocks) <= COUNTER_MAX:
            self.corrections[record.root_id] = corrected

    def _leaves(self, pointer: Pointer) -> Iterator[NodeImage]:
        """The readable leaves of a tree in key order, each once."""
        waiting: list[tuple[Pointer, int | None]] = [(pointer, None)]
        visited = set()
        while waiting:
            here, level = waiting.pop()
            if here.block in visited:
                continue  # only in a forged or damaged tree do two pointers lead to one node
            visited.add(here.block)
            if pointer_fault(here, NODE_BLOCKS, self._superblock.generation, self._superblock):
                continue  # the walk reported it
            image = self._reader.node(here, level, ignore_damage)
            if image is None:
                continue
            if image.level:
                waiting += [
                    (decode_pointer(value), image.level - 1) for value in reversed(image.values)
                ]
            else:
                yield image


def _edges(top: NodeFacts) -> Iterator[npt.NDArray[np.uint64]]:
    """The directory edges of all leaves below a node."""
    waiting = [top]
    visited = set()
    while waiting:
        facts = waiting.pop()
        if facts.pointer.block in visited:
            continue
        visited.add(facts.pointer.block)
        waiting += facts.children
        if facts.part is not None and facts.part.edges is not None:
            yield facts.part.edges


# --- retained generations -------------------------------------------------------------------------


def _retained_superblocks(slots: list[Slot], newest: Superblock) -> list[Superblock]:
    """The superblocks of the earlier generations that the newest one retains, newest first."""
    found = {
        slot.superblock.generation: slot.superblock
        for slot in slots
        if slot.superblock is not None
        and slot.superblock.uuid == newest.uuid
        and newest.oldest_retained <= slot.superblock.generation < newest.generation
    }
    return [found[generation] for generation in sorted(found, reverse=True)]


class _RetainedCheck:
    """Checks that every node, page and data block of retained generations has its checksum (I2).

    Nodes that the newest generation shares with them were read by the walk and are skipped.

    Args:
        data: also compare file data with its checksums.
    """

    def __init__(
        self, device: Device, walk: Walk, data_check: DataCheck, findings: Findings, *, data: bool
    ) -> None:
        self._device = device
        self._walk = walk
        self._data_check = data_check
        self._findings = findings
        self._data = data
        self._visited: set[Pointer] = set()

    def run(self, superblock: Superblock) -> None:
        reader = MetadataReader(self._device, superblock)
        dropped: dict[int, int] = {}
        roots = []
        for image in self._leaves(reader, superblock, superblock.catalog, dropped):
            for key, value in zip(image.keys, image.values, strict=True):
                try:
                    if key[:1] == b"R":
                        roots.append(decode_root(value).pointer)
                    elif key[:1] == b"D":
                        drop = decode_drop(value)
                        dropped |= {step.pointer.block: step.done for step in drop.path}
                        roots.append(drop.path[0].pointer)
                except CorruptError as error:
                    self._damaged("I2", str(error), image.block)
        for root in roots:
            for image in self._leaves(reader, superblock, root, dropped):
                if self._data:
                    self._verify(image, dropped.get(image.block, 0))
        self._space_map(reader, superblock)

    def _damaged(self, _invariant: str, what: str, block: int) -> None:
        # Repairable: the commit that a repair makes retains no earlier generation.
        self._findings.error(
            "I2", f"a retained generation is not whole: {what}", block=block, repairable=True
        )

    def _may_follow(self, pointer: Pointer, blocks: int, superblock: Superblock) -> bool:
        if pointer in self._visited or self._walk.has_visited(pointer):
            return False
        self._visited.add(pointer)
        fault = pointer_fault(pointer, blocks, superblock.generation, superblock)
        if fault is not None:
            self._damaged("I2", fault[1], pointer.block)
        return fault is None

    def _leaves(
        self,
        reader: MetadataReader,
        superblock: Superblock,
        root: Pointer,
        dropped: dict[int, int],
    ) -> Iterator[NodeImage]:
        """The leaves below a root that were not visited before.

        Args:
            dropped: by block of a node, how many of its leading entries a half-done drop dropped.
        """
        waiting: list[tuple[Pointer, int | None]] = [(root, None)]
        while waiting:
            pointer, level = waiting.pop()
            if not self._may_follow(pointer, NODE_BLOCKS, superblock):
                continue
            image = reader.node(pointer, level, self._damaged)
            if image is None:
                continue
            if image.level:
                values = image.values[dropped.get(image.block, 0) :]
                waiting += [(decode_pointer(value), image.level - 1) for value in reversed(values)]
            else:
                yield image

    def _verify(self, image: NodeImage, dropped: int) -> None:
        for key, value in zip(image.keys[dropped:], image.values[dropped:], strict=True):
            if len(key) == KEY_BYTES and key[8] == TYPE_EXTENT:
                ino, _, offset = split_key(key)
                try:
                    extent = decode_extent(ino, value)
                except CorruptError as error:
                    self._damaged("I2", str(error), image.block)
                    continue
                self._data_check.verify(ino, offset, extent, "I2")

    def _space_map(self, reader: MetadataReader, superblock: Superblock) -> None:
        top_level = len(index_shape(superblock.total_blocks))
        waiting = [(superblock.space_map, top_level, 0)]
        while waiting:
            pointer, level, number = waiting.pop()
            if not self._may_follow(pointer, 1, superblock):
                continue
            if not level:
                reader.refcounts(pointer, self._damaged)
                continue
            entries = reader.index_page(pointer, level, number, self._damaged)
            if entries is None:
                continue
            for position in np.flatnonzero(entries["block"]).tolist():
                child = number * INDEX_FANOUT + position
                waiting.append((index_pointer(entries[position]), level - 1, child))
