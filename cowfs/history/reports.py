"""What cowfs tells about an image, as values: the same from a daemon and from the image itself.

Integers throughout, each named with its unit; they travel over the control socket and come out of
`--json` as they are. This file imports no numpy, so that a command which only asks a daemon starts
fast: whatever needs the image is imported where a `Filesystem` exists already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from cowfs.errors import ImageError
from cowfs.escapes import escaped_path

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from cowfs.history.filesystem import Filesystem
    from cowfs.history.records import RootRecord
    from cowfs.storage.discards import Sweep

Setting = bool | int | float | str | None


class SnapshotReport(Struct, frozen=True, kw_only=True):
    """One snapshot. `generation` is that of its creation, `parent` the snapshot it grew from.

    `referenced_is_exact`: otherwise files share blocks, which are counted for each of them; cowdu
    counts them once. `held`: it is not deleted before it is released.
    """

    name: str
    id: int
    uuid: str
    created_ns: int
    generation: int
    referenced_bytes: int
    referenced_is_exact: bool
    description: str
    automatic: bool
    held: bool
    parent: str | None


class DropReport(Struct, frozen=True, kw_only=True):
    """A deleted snapshot whose blocks are being given back: so far, and at the most.

    `stuck`: damage is in the way; what it holds is kept until the image is repaired.
    """

    name: str
    freed_bytes: int
    referenced_bytes: int
    stuck: bool


class SpaceReport(Struct, frozen=True, kw_only=True):
    """Where the bytes of an image are.

    tree + catalog = used; used + system + pending + free = total. `tree` is what all volumes,
    snapshots and the drop queue hold, `catalog` the tree of their records, `system` the superblocks
    and the space map; `pending` was freed and waits for its generation to go; `promised` is data in
    memory; `reserved` is held back for deleting; `available` is for new data.
    """

    total_bytes: int
    used_bytes: int
    tree_bytes: int
    catalog_bytes: int
    system_bytes: int
    pending_bytes: int
    free_bytes: int
    promised_bytes: int
    reserved_bytes: int
    available_bytes: int
    drops: tuple[DropReport, ...] = ()


class InfoReport(Struct, frozen=True, kw_only=True):
    """What an image is. The last ones are null or empty when no daemon has it mounted.

    `image` and `mount_point` are paths of the host, escaped (escapes.py).
    `features`: what this mount can do that others may not. `failed_ns`, `failure`: when and why the
    mount ended writing; null while it goes on.
    """

    image: str
    label: str
    uuid: str
    format_version: int
    block_size_bytes: int
    node_size_bytes: int
    total_bytes: int
    generation: int
    created_ns: int
    committed_ns: int
    clean: bool
    duplicated_metadata: bool
    snapshot_count: int
    inode_count: int
    live_root_id: int
    mount_point: str | None = None
    daemon_pid: int | None = None
    daemon_settings: dict[str, Setting] | None = None
    features: tuple[str, ...] = ()
    failed_ns: int | None = None
    failure: str | None = None


class ReclaimReport(Struct, frozen=True, kw_only=True):
    """What deleting exactly these snapshots would free."""

    names: tuple[str, ...]
    reclaim_bytes: int


class TrimReport(Struct, frozen=True, kw_only=True):
    """What was given back to the host: all that is free. `pending`: is free after the next commits."""

    trimmed_bytes: int
    pending_bytes: int


def image_name(filesystem: Filesystem) -> str:
    """The path of the image; bytes that are not UTF-8 as escapes."""
    return escaped_path(filesystem.store.device.name)


def snapshot_report(filesystem: Filesystem, record: RootRecord) -> SnapshotReport:
    """The report of one snapshot's record, of the catalog or just removed from it."""
    from cowfs.history.records import RootKind
    from cowfs.storage.format import BLOCK_SIZE_BYTES

    parent = filesystem.catalog.root(record.parent_id) if record.parent_id else None
    is_snapshot = parent is not None and parent.kind == RootKind.SNAPSHOT
    return SnapshotReport(
        name=record.name,
        id=record.root_id,
        uuid=_uuid_text(record.uuid),
        created_ns=record.created_ns,
        generation=record.created_generation,
        referenced_bytes=record.referenced_blocks(filesystem.store.copies) * BLOCK_SIZE_BYTES,
        referenced_is_exact=not record.shares,
        description=record.description,
        automatic=record.automatic,
        held=record.held,
        parent=parent.name if parent is not None and is_snapshot else None,
    )


def snapshot_reports(filesystem: Filesystem) -> tuple[SnapshotReport, ...]:
    """All snapshots, the oldest first."""
    return tuple(each_snapshot(filesystem, filesystem.catalog.snapshots()))


def each_snapshot(
    filesystem: Filesystem, records: Iterable[RootRecord]
) -> Iterator[SnapshotReport]:
    """The reports one by one, for whoever has other things to do between; the catalog may change."""
    return (snapshot_report(filesystem, record) for record in records)


def drop_reports(filesystem: Filesystem) -> tuple[DropReport, ...]:
    """The drop queue, in the order of deletion."""
    return tuple(each_drop(filesystem))


def each_drop(filesystem: Filesystem) -> Iterator[DropReport]:
    """The same one by one; the queue may go on between."""
    from cowfs.storage.format import BLOCK_SIZE_BYTES

    for drop in filesystem.drops.each():
        yield DropReport(
            name=drop.name,
            freed_bytes=drop.freed_blocks * BLOCK_SIZE_BYTES,
            referenced_bytes=drop.referenced_blocks * BLOCK_SIZE_BYTES,
            stuck=drop.stuck,
        )


def space_report(
    filesystem: Filesystem, drops: tuple[DropReport, ...] | None = None
) -> SpaceReport:
    """The space of an open image as it is now, the open transaction included.

    Args:
        drops: the drop queue, when it was listed already.
    """
    from cowfs.storage.format import BLOCK_SIZE_BYTES

    space = filesystem.space()
    return SpaceReport(
        total_bytes=space.total * BLOCK_SIZE_BYTES,
        used_bytes=space.used * BLOCK_SIZE_BYTES,
        tree_bytes=space.tree * BLOCK_SIZE_BYTES,
        catalog_bytes=space.catalog * BLOCK_SIZE_BYTES,
        system_bytes=space.system * BLOCK_SIZE_BYTES,
        pending_bytes=space.pending * BLOCK_SIZE_BYTES,
        free_bytes=space.free * BLOCK_SIZE_BYTES,
        promised_bytes=space.promised * BLOCK_SIZE_BYTES,
        reserved_bytes=space.reserved * BLOCK_SIZE_BYTES,
        available_bytes=space.available * BLOCK_SIZE_BYTES,
        drops=drop_reports(filesystem) if drops is None else drops,
    )


def info_report(
    filesystem: Filesystem,
    *,
    mount_point: str | None = None,
    daemon_pid: int | None = None,
    daemon_settings: dict[str, Setting] | None = None,
    features: tuple[str, ...] = (),
) -> InfoReport:
    """What the image of an open filesystem is; the daemon adds what it knows of itself."""
    from cowfs.storage.format import (
        BLOCK_SIZE_BYTES,
        FLAG_CLEAN,
        FORMAT_VERSION,
        NODE_SIZE_BYTES,
    )

    superblock = filesystem.store.superblock
    return InfoReport(
        image=image_name(filesystem),
        label=superblock.label,
        uuid=_uuid_text(superblock.uuid),
        format_version=FORMAT_VERSION,
        block_size_bytes=BLOCK_SIZE_BYTES,
        node_size_bytes=NODE_SIZE_BYTES,
        total_bytes=superblock.total_blocks * BLOCK_SIZE_BYTES,
        generation=superblock.generation,
        created_ns=superblock.created_ns,
        committed_ns=superblock.committed_ns,
        clean=bool(superblock.flags & FLAG_CLEAN),
        duplicated_metadata=superblock.duplicates_metadata,
        snapshot_count=filesystem.catalog.snapshot_count,
        inode_count=filesystem.live.inodes.count,
        live_root_id=filesystem.record.root_id,
        mount_point=mount_point,
        daemon_pid=daemon_pid,
        daemon_settings=daemon_settings,
        features=features,
        failed_ns=filesystem.store.failed_ns,
        failure=str(filesystem.store.failed) if filesystem.store.failed is not None else None,
    )


def trim_report(filesystem: Filesystem, sweep: Sweep) -> TrimReport:
    """What a sweep of everything did.

    Raises:
        ImageError: the host cannot take anything back.
    """
    from cowfs.storage.format import BLOCK_SIZE_BYTES

    if sweep.is_refused:
        raise ImageError(
            f"the host cannot take back free space of {image_name(filesystem)}: its filesystem makes "
            "no holes in files, or the block device does not discard"
        )
    return TrimReport(
        trimmed_bytes=sweep.discarded_blocks * BLOCK_SIZE_BYTES,
        pending_bytes=filesystem.store.map.pending_blocks * BLOCK_SIZE_BYTES,
    )


def _uuid_text(uuid: bytes) -> str:
    from uuid import UUID

    return str(UUID(bytes=uuid))
