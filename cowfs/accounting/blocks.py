"""One block explained: what it is, how many point at it, how old it is, and who reaches it.

Read through the newest generation: a block that nothing of it reaches is free, or kept for rescue.
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

PATHS_MAX = 100


@dataclass(slots=True)
class FilePlace:
    """Where a file has the block. `root`: an owner that shows it there."""

    root: Owner
    path: bytes | None
    ino: int
    offset_bytes: int


@dataclass(slots=True)
class BlockReport:
    """What a block is.

    Attributes:
        kind: "data", "node", "superblock ring", "space map", or "free" (or kept only by an earlier
            generation, for rescue).
        references: parents that point at it.
        birth: the generation that wrote it; None where only what points at it would know.
        level: of a node; twin: whether it is the second copy of one; first: the node's first block.
        owners: roots that reach it.
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
    """Everything that points at a block.

    Args:
        filesystem: open read-only; a writable one has blocks that wait to be free, which look like those
            of the space map.

    Raises:
        UsageError: the image has no such block.
        CorruptError: something cannot be read.
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
    """The files whose items in these leaves point at the block, by the newest root that shows them."""
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
