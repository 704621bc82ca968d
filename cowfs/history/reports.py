"""Reports about an image, as values: the same from a daemon and from the image itself.

All numbers are integers with the unit in their name. Reports are sent over the control socket, and
are printed by `--json`, as they are. This file imports no numpy, so that a command that only asks a
daemon starts fast: functions that need the image import what they need.
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
    """One snapshot.

    Attributes:
        generation: in which it was created.
        referenced_is_exact: False where files share blocks: then `referenced_bytes` counts a shared
            block for each file. cowdu counts it once.
        automatic: made by a rollback or undo.
        held: it cannot be deleted before it is released.
        parent: the snapshot that it grew from.
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
    """A deleted snapshot whose blocks are being freed.

    Attributes:
        freed_bytes: so far.
        referenced_bytes: it may free at most this much.
        stuck: damage is in the way: it keeps its blocks until the image is repaired.
    """

    name: str
    freed_bytes: int
    referenced_bytes: int
    stuck: bool


class SpaceReport(Struct, frozen=True, kw_only=True):
    """What the bytes of an image are used for.

    tree + catalog = used; used + system + pending + free = total.

    Attributes:
        tree_bytes: of volumes, snapshots and the drop queue.
        catalog_bytes: of the tree of their records.
        system_bytes: of the superblocks, the log and the space map.
        pending_bytes: freed, and waiting until no retained generation shows them.
        promised_bytes: data in memory.
        reserved_bytes: held back for deleting.
        available_bytes: for new data.
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
    """What an image is. Attributes with a default are set only by a daemon that has it mounted.

    Attributes:
        image, mount_point: paths of the host, escaped (escapes.py).
        generation, committed_ns: of the newest commit.
        log_bytes: size of the log; 0 if the image has none.
        log_calls: of an unmounted image, the calls that its log adds to the newest commit.
        features: what this mount can do and another might not.
        failed_ns, failure: when and why writing ended; null as long as it goes on.
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
    log_bytes: int
    log_calls: int = 0
    mount_point: str | None = None
    daemon_pid: int | None = None
    daemon_settings: dict[str, Setting] | None = None
    features: tuple[str, ...] = ()
    failed_ns: int | None = None
    failure: str | None = None


class ReclaimReport(Struct, frozen=True, kw_only=True):
    """How much deleting exactly these snapshots would free."""

    names: tuple[str, ...]
    reclaim_bytes: int


class TrimReport(Struct, frozen=True, kw_only=True):
    """How much free space was given back to the host.

    Attributes:
        pending_bytes: not given back yet: free after the next commits.
    """

    trimmed_bytes: int
    pending_bytes: int


def image_name(filesystem: Filesystem) -> str:
    """The path of the image, escaped."""
    return escaped_path(filesystem.store.device.name)


def snapshot_report(filesystem: Filesystem, record: RootRecord) -> SnapshotReport:
    """The report of a snapshot's record, which may just have been removed from the catalog."""
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
    """Reports of all snapshots, oldest first."""
    return tuple(each_snapshot(filesystem, filesystem.catalog.snapshots()))


def each_snapshot(
    filesystem: Filesystem, records: Iterable[RootRecord]
) -> Iterator[SnapshotReport]:
    """The reports one by one, for a caller that works between them. The catalog may change."""
    return (snapshot_report(filesystem, record) for record in records)


def drop_reports(filesystem: Filesystem) -> tuple[DropReport, ...]:
    """Reports of the drop queue, in the order of deletion."""
    return tuple(each_drop(filesystem))


def each_drop(filesystem: Filesystem) -> Iterator[DropReport]:
    """The reports of the drop queue one by one. The queue may change between them."""
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
    """The use of space now, the open transaction included.

    Args:
        drops: the reports of the drop queue, if the caller has them.
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
    """What the image is. The arguments are what only a daemon knows."""
    from cowfs.storage.format import (
        BLOCK_SIZE_BYTES,
        FLAG_CLEAN,
        FORMAT_VERSION,
        NODE_SIZE_BYTES,
    )
    from cowfs.storage.overlay import OverlayDevice

    superblock = filesystem.store.superblock
    device = filesystem.store.device
    replay = device.replay if isinstance(device, OverlayDevice) else None
    return InfoReport(
        image=image_name(filesystem),
        label=superblock.label,
        uuid=_uuid_text(superblock.uuid),
        format_version=FORMAT_VERSION,
        block_size_bytes=BLOCK_SIZE_BYTES,
        node_size_bytes=NODE_SIZE_BYTES,
        total_bytes=superblock.total_blocks * BLOCK_SIZE_BYTES,
        generation=superblock.generation if replay is None else replay.generation,
        created_ns=superblock.created_ns,
        committed_ns=superblock.committed_ns if replay is None else replay.committed_ns,
        clean=bool(superblock.flags & FLAG_CLEAN),
        duplicated_metadata=superblock.duplicates_metadata,
        snapshot_count=filesystem.catalog.snapshot_count,
        inode_count=filesystem.live.inodes.count,
        live_root_id=filesystem.record.root_id,
        log_bytes=superblock.log.blocks() * BLOCK_SIZE_BYTES if superblock.log else 0,
        log_calls=0 if replay is None else replay.calls,
        mount_point=mount_point,
        daemon_pid=daemon_pid,
        daemon_settings=daemon_settings,
        features=features,
        failed_ns=filesystem.store.failed_ns,
        failure=str(filesystem.store.failed) if filesystem.store.failed is not None else None,
    )


def trim_report(filesystem: Filesystem, sweep: Sweep) -> TrimReport:
    """The report of a sweep of all groups.

    Raises:
        ImageError: the host cannot take space back.
    """
    from cowfs.storage.format import BLOCK_SIZE_BYTES

    if sweep.is_refused:
        raise ImageError(
            f"the host cannot take back free space of {image_name(filesystem)}: the host's "
            "filesystem has no holes in files, or the block device has no discard"
        )
    return TrimReport(
        trimmed_bytes=sweep.discarded_blocks * BLOCK_SIZE_BYTES,
        pending_bytes=filesystem.store.map.pending_blocks * BLOCK_SIZE_BYTES,
    )


def _uuid_text(uuid: bytes) -> str:
    from uuid import UUID

    return str(UUID(bytes=uuid))
