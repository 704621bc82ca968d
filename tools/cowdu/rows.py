"""The numbers of `cowdu list`: a row for each root, from the owner sets or by virtual drop.

A virtual drop is used for a few snapshots if the owner sets are not cached: it reads only what
these snapshots hold alone. Both ways give the same numbers.
"""

from collections.abc import Sequence

from msgspec import Struct

from cowfs.accounting.owners import OwnerKind, OwnerSets
from cowfs.accounting.path_usage import usage_of_orphans
from cowfs.accounting.snapshot_usage import referenced_blocks, written_blocks
from cowfs.accounting.virtual_drop import simulate_deletion
from cowfs.history.filesystem import Filesystem
from cowfs.history.records import RootRecord
from cowfs.history.reports import ReclaimReport, image_name, space_report
from cowfs.history.selection import select
from cowfs.storage.format import BLOCK_SIZE_BYTES, NODE_BLOCKS

from .looking import Look

FEW_SNAPSHOTS = 8  # up to this many are measured by virtual drop


class Usage(Struct, frozen=True, kw_only=True, omit_defaults=False):
    """The numbers of one root, in bytes.

    A number is None if it has no meaning for the root, or would need a pass over the whole image
    that nobody asked for. Each number includes metadata; `..._metadata_bytes` is that part of it.

    Attributes:
        kind: "snapshot", "volume" (the live files), "drop" (a deleted snapshot whose blocks are not
            all free yet), "orphans" (files deleted while open), "generation" (an earlier commit,
            kept for rescue until it expires).
        referenced_bytes: all that the root reaches.
        exclusive_bytes: what deleting it alone would free.
        shared_bytes: the difference of the two.
        written_bytes: what it holds and the snapshot it grew from did not.
        cumulative_bytes: what deleting it and all created before it would free, whatever their
        dates.
    """

    kind: str
    name: str
    created_ns: int | None = None
    generation: int | None = None
    held: bool = False
    description: str = ""
    referenced_bytes: int | None = None
    exclusive_bytes: int
    shared_bytes: int | None = None
    written_bytes: int | None = None
    cumulative_bytes: int | None = None
    referenced_metadata_bytes: int | None = None
    exclusive_metadata_bytes: int | None = None
    written_metadata_bytes: int | None = None


class Totals(Struct, frozen=True, kw_only=True):
    """The numbers of the whole image, in bytes.

    Attributes:
        allocated_bytes: what all volumes, snapshots and the drop queue hold.
        snapshots_bytes: the part of it that deleting all snapshots would free; None if not counted.
        available_bytes: for new data.
        total_bytes: the size of the image.
    """

    allocated_bytes: int
    snapshots_bytes: int | None
    available_bytes: int
    total_bytes: int


class UsageReport(Struct, frozen=True, kw_only=True):
    """The numbers at one generation.

    Attributes:
        others: the roots that are not snapshots.
        reclaim: what deleting exactly the listed snapshots would free.
    """

    image: str
    generation: int
    snapshots: tuple[Usage, ...]
    others: tuple[Usage, ...]
    totals: Totals
    reclaim: ReclaimReport


def measure(filesystem: Filesystem, words: Sequence[str] = ()) -> UsageReport:
    """Measure the snapshots that the words select; without words all roots.

    Args:
        filesystem: open read-only, at a pinned generation.

    Raises:
        SnapshotError, UsageError: the words select nothing.
        CorruptError: the image is damaged, so no number can be trusted.
    """
    look = Look(filesystem)
    chosen = select(words, look.snapshots) if words else look.snapshots
    return usage_report(look, chosen, others=not words)


def usage_report(
    look: Look, chosen: Sequence[RootRecord], *, others: bool, cumulative: bool = False
) -> UsageReport:
    """Measure the chosen snapshots.

    Args:
        others: measure the roots that are not snapshots too.
        cumulative: the columns that only the owner sets give are wanted.
    """
    sets = look.known_sets()
    if sets is None and (others or cumulative or len(chosen) > FEW_SNAPSHOTS):
        sets = look.sets()
    space = space_report(look.filesystem)
    if sets is not None:
        rows = _rows_of_sets(look, sets, chosen)
        bits = [sets.bit(OwnerKind.SNAPSHOT, record.root_id) for record in chosen]
        together = sets.exclusive(bits).total
        held = sets.exclusive(range(sets.snapshot_count)).total * BLOCK_SIZE_BYTES
    else:
        rows = [_measured(look.filesystem, record) for record in chosen]
        held = None
        # The row of one snapshot says what it frees; several need a virtual drop of all together.
        together = (
            rows[0].exclusive_bytes // BLOCK_SIZE_BYTES
            if len(rows) == 1
            else simulate_deletion(look.filesystem, chosen).blocks
        )
    names = tuple(record.name for record in chosen)
    return UsageReport(
        image=image_name(look.filesystem),
        generation=look.generation,
        snapshots=tuple(rows),
        others=_others(look, sets) if others and sets is not None else (),
        totals=Totals(
            allocated_bytes=space.tree_bytes,
            snapshots_bytes=held,
            available_bytes=space.available_bytes,
            total_bytes=space.total_bytes,
        ),
        reclaim=ReclaimReport(names=names, reclaim_bytes=together * BLOCK_SIZE_BYTES),
    )


def _rows_of_sets(look: Look, sets: OwnerSets, chosen: Sequence[RootRecord]) -> list[Usage]:
    return [
        _row(
            sets,
            sets.bit(OwnerKind.SNAPSHOT, record.root_id),
            "snapshot",
            record.name,
            record,
            cumulative=True,
        )
        for record in chosen
    ]


def _row(
    sets: OwnerSets,
    bit: int,
    kind: str,
    name: str,
    record: RootRecord | None = None,
    *,
    cumulative: bool = False,
) -> Usage:
    referenced, exclusive, written, up_to = (
        sets.each(what)[bit] * BLOCK_SIZE_BYTES
        for what in ("referenced", "exclusive", "written", "cumulative")
    )
    is_drop = kind == OwnerKind.DROP
    return Usage(
        kind=kind,
        name=name,
        created_ns=None if record is None else record.created_ns,
        generation=None if record is None else record.created_generation,
        held=record is not None and record.held,
        description="" if record is None else record.description,
        referenced_bytes=int(referenced.sum()),
        exclusive_bytes=int(exclusive.sum()),
        shared_bytes=int(referenced.sum() - exclusive.sum()),
        written_bytes=None if is_drop else int(written.sum()),
        cumulative_bytes=int(up_to.sum()) if cumulative else None,
        referenced_metadata_bytes=int(referenced[0]),
        exclusive_metadata_bytes=int(exclusive[0]),
        written_metadata_bytes=None if is_drop else int(written[0]),
    )


def _measured(filesystem: Filesystem, record: RootRecord) -> Usage:
    referenced = referenced_blocks(filesystem, record) * BLOCK_SIZE_BYTES
    exclusive = simulate_deletion(filesystem, [record]).blocks * BLOCK_SIZE_BYTES
    nodes = record.node_count * NODE_BLOCKS * filesystem.store.copies
    return Usage(
        kind="snapshot",
        name=record.name,
        created_ns=record.created_ns,
        generation=record.created_generation,
        held=record.held,
        description=record.description,
        referenced_bytes=referenced,
        exclusive_bytes=exclusive,
        shared_bytes=referenced - exclusive,
        written_bytes=written_blocks(filesystem, record) * BLOCK_SIZE_BYTES,
        referenced_metadata_bytes=nodes * BLOCK_SIZE_BYTES,
    )


def _others(look: Look, sets: OwnerSets) -> tuple[Usage, ...]:
    """The roots that are not snapshots: the live volume, and what will become free by itself."""
    rows = []
    for bit, owner in enumerate(sets.owners):
        if owner.kind == OwnerKind.VOLUME:
            record = look.filesystem.catalog.root(owner.number)
            rows.append(_row(sets, bit, "volume", owner.name, record))
        elif owner.kind == OwnerKind.DROP:
            rows.append(_row(sets, bit, "drop", owner.name))
    orphans = usage_of_orphans(look.filesystem)
    if orphans is not None:
        total, exclusive = orphans.total * BLOCK_SIZE_BYTES, orphans.exclusive * BLOCK_SIZE_BYTES
        rows.append(
            Usage(
                kind="orphans",
                name="",
                referenced_bytes=total,
                exclusive_bytes=exclusive,
                shared_bytes=total - exclusive,
                referenced_metadata_bytes=0,
                exclusive_metadata_bytes=0,
            )
        )
    for generation, blocks in sets.retained or ():
        rows.append(
            Usage(
                kind="generation",
                name=str(generation),
                generation=generation,
                exclusive_bytes=blocks.total * BLOCK_SIZE_BYTES,
                exclusive_metadata_bytes=blocks.nodes * BLOCK_SIZE_BYTES,
            )
        )
    return tuple(rows)
