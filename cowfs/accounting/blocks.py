"""Explains one block: what it is, its refcount, its birth, and which roots and files reach it.

Only the newest generation is read. A block that it does not reach is free, or belongs to a retained
generation only.
"""

from dataclasses import dataclass, field

import numpy as np

from cowfs.accounting.owners import Owner, OwnerKind, Survey, members
from cowfs.accounting.paths import PathFinder, volume_of
from cowfs.accounting.structure import Numbers
from cowfs.errors import UsageError
from cowfs.files.items import KEY_BYTES, TYPE_EXTENT, decode_extent, split_key
from cowfs.history.filesystem import Filesystem
from cowfs.history.records import RootRecord
from cowfs.storage.format import BLOCK_SIZE_BYTES, NODE_BLOCKS, RING_SLOTS

PATHS_MAX = 100  # files that a report names


@dataclass(slots=True)
class FilePlace:
    """A file that has the block.

    Attributes:
        root: the newest root in which the file has it.
        path: of the file in that root; None if it has no name there.
        offset_bytes: of the block in the file.
    """

    root: Owner
    path: bytes | None
    ino: int
    offset_bytes: int


@dataclass(slots=True)
class BlockReport:
    """What is known of a block.

    Attributes:
        kind: "data", "node", "superblock ring", "space map", or "free", which includes blocks that
            only retained generations reach.
        references: its refcount.
        birth: the generation that wrote it; None if no node that was read says so.
        level, twin, first: of a node its level, whether the block is in the twin, and the first
            block of that copy.
        owners: the roots that reach it.
        places: files that have it, at most PATHS_MAX.
    """

    block: int
    kind: str
    references: int = 0
    birth: int | None = None
    level: int | None = None
    twin: bool = False
    first: int | None = None
    owners: list[Owner] = field(default_factory=list)
    places: list[FilePlace] = field(default_factory=list)


def explain_block(filesystem: Filesystem, survey: Survey, block: int) -> BlockReport:
    """Explain a block.

    Args:
        filesystem: open read-only. In a writable one, pending blocks look like the space map's own.
        survey: of the same generation.

    Raises:
        UsageError: the image has no such block.
        CorruptError: a node cannot be read.
    """
    store = filesystem.store
    total = store.superblock.total_blocks
    if not 0 <= block < total:
        raise UsageError(f"the image has blocks 0 to {total - 1}, not {block}")
    if block < RING_SLOTS or block >= total - RING_SLOTS:
        return BlockReport(block, "superblock ring")
    references = store.map.refcount(block)
    structure = survey.structure
    nodes = structure.nodes
    for copy in ("block", "twin"):
        start = nodes[copy]
        found = np.flatnonzero((start <= block) & (block < start + NODE_BLOCKS) & (start != 0))
        if len(found):
            index = int(found[0])
            return BlockReport(
                block,
                "node",
                references,
                int(nodes["birth"][index]),
                structure.level_of(index),
                copy == "twin",
                int(start[index]),
                _owners(survey, np.array([index])),
            )
    first = structure.run_first
    runs = np.flatnonzero((first <= block) & (block < first + structure.run_count))
    if len(runs):
        leaves = np.unique(np.searchsorted(structure.run_from, runs, "right") - 1)
        report = BlockReport(block, "data", references, owners=_owners(survey, leaves))
        _find_places(filesystem, survey, leaves, report)
        return report
    if not references and store.map.is_busy(block):
        return BlockReport(block, "space map")
    return BlockReport(block, "free", references)


def _owners(survey: Survey, nodes: Numbers) -> list[Owner]:
    owners = survey.sets.owners
    table = members(survey.sets.sets[survey.labels[nodes]], len(owners)).any(axis=0)
    return [owners[bit] for bit in np.flatnonzero(table)]


def _find_places(
    filesystem: Filesystem, survey: Survey, leaves: Numbers, report: BlockReport
) -> None:
    """Add the files whose extents in these leaves contain the block to `report.places`.

    Each is named by its path in the newest root that reaches the leaf.
    """
    store = filesystem.store
    roots = {record.root_id: record for record in filesystem.catalog.roots()}
    wanted: dict[int, tuple[Owner, RootRecord, list[tuple[int, int]]]] = {}
    for index in leaves.tolist():
        node = store.load(survey.structure.pointer(index), 0)
        shown = [owner for owner in _owners(survey, np.array([index])) if owner.number in roots]
        shown = [owner for owner in shown if owner.kind != OwnerKind.DROP]
        for item, value in zip(node.keys, node.values, strict=True):
            if len(item) != KEY_BYTES or item[8] != TYPE_EXTENT:
                continue
            ino, _, start = split_key(item)
            extent = decode_extent(ino, value)
            if not extent.block <= report.block < extent.block + extent.count:
                continue
            report.birth = extent.birth
            offset = (start + report.block - extent.block) * BLOCK_SIZE_BYTES
            if shown:
                owner = shown[-1]
                record = roots[owner.number]
                wanted.setdefault(owner.number, (owner, record, []))[2].append((ino, offset))
    finder = PathFinder(
        store,
        [(record.pointer, {ino for ino, _ in files}) for _, record, files in wanted.values()],
    )
    for owner, record, files in wanted.values():
        volume = volume_of(filesystem, record)
        paths = finder.paths(volume, {ino for ino, _ in files})
        report.places += [FilePlace(owner, paths.get(ino), ino, offset) for ino, offset in files]
    del report.places[PATHS_MAX:]
