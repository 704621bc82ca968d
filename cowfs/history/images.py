"""Make an image, open one, or restore an earlier generation of one."""

import logging
import os
import time

from msgspec.structs import replace

from cowfs.errors import CorruptError, ImageError, NoSpaceError, UsageError
from cowfs.files.items import ROOT_INO, references
from cowfs.files.parts import Parts
from cowfs.files.volume import Volume
from cowfs.history.catalog import Catalog
from cowfs.history.filesystem import Filesystem
from cowfs.history.records import MAIN_VOLUME, RootKind, RootRecord
from cowfs.storage.admission import DEFAULT_LIMITS, Limits
from cowfs.storage.btree import Tree
from cowfs.storage.commit import begin, finish
from cowfs.storage.device import Device
from cowfs.storage.format import (
    BLOCK_SIZE_BYTES,
    INCOMPAT_LOG,
    LABEL_BYTES_MAX,
    MIN_TOTAL_BLOCKS,
    RING_SLOTS,
    Superblock,
    ring_blocks,
)
from cowfs.storage.log import new_log_place, write_zeros
from cowfs.storage.log_records import has_records
from cowfs.storage.node import CACHE_BYTES_DEFAULT
from cowfs.storage.overlay import OverlayDevice, ReplayReport
from cowfs.storage.store import Store
from cowfs.storage.superblock import blank_superblock, read_newest

log = logging.getLogger(__name__)


def open_filesystem(
    device: Device,
    *,
    writable: bool,
    generation: int | None = None,
    cache_bytes: int = CACHE_BYTES_DEFAULT,
    discard: bool = True,
    snapshot: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Filesystem:
    """Open the filesystem in an image.

    Args:
        device: of the image, locked when `writable`. Closed by `Filesystem.close`.
        generation: an older generation to open, read-only; None for the newest.
        cache_bytes: limit of the node cache.
        discard: give free blocks back to the host at `Filesystem.close`.
        snapshot: its tree takes the place of the live volume, read-only.
        limits: of admission.

    A newest generation with a log is shown with its log: the calls are made again and committed, in
    memory alone without `writable`.

    Raises:
        SnapshotError: there is no such snapshot.
        ImageError: not an image, a newer format, or truncated.
        CorruptError: the generation is damaged, or its log does not fit it.
        DeviceError: the image cannot be read.
    """
    if not writable and generation is None:
        device = with_log(device)
    superblock = read_newest(device, generation)
    if writable and superblock.ro_compat:
        raise ImageError(
            "the image uses features that this cowfs can only read; mount it with -o ro"
        )
    store = Store(device, superblock, writable=writable, cache_bytes=cache_bytes, limits=limits)
    filesystem = Filesystem(store, discard=discard, snapshot=snapshot)
    if writable and has_records(device, superblock):
        report = filesystem.replay()
        if report.error is not None:
            raise CorruptError(
                "log",
                superblock.generation,
                f"{report.error}; mount the image with -o ro to see the files as they were before "
                "that call; cowfs check --repair gives up the rest of the log",
            )
        filesystem.commit()
    return filesystem


def with_log(device: Device) -> Device:
    """The device as a mount would show it: with the log replayed in memory, if it has a record.

    Where the log does not fit the files, the calls before the first that does not are shown, and
    `OverlayDevice.replay` says why.

    Raises:
        ImageError: not an image, a newer format, or truncated.
        DeviceError: neither copy of the ring can be read.
    """
    superblock = read_newest(device)
    if superblock.ro_compat or not has_records(device, superblock):
        return device
    overlay = OverlayDevice(device)
    overlay.replay = _commit_log(overlay, superblock)
    if overlay.replay.error is not None:
        log.warning("the log is not shown in full: %s", overlay.replay.error)
    return overlay


def commit_log(device: Device) -> ReplayReport | None:
    """Replay the log as far as it fits the files, and commit: the rest is given up.

    Args:
        device: of the image, locked.

    Returns:
        None where the log has no record.

    Raises:
        ImageError, DeviceError: as `with_log`.
    """
    superblock = read_newest(device)
    return _commit_log(device, superblock) if has_records(device, superblock) else None


def _commit_log(device: Device, superblock: Superblock) -> ReplayReport:
    try:
        filesystem = Filesystem(Store(device, superblock, writable=True), discard=False)
        report = filesystem.replay()
        filesystem.commit()
    except (CorruptError, NoSpaceError) as error:
        return ReplayReport(
            superblock.generation,
            superblock.committed_ns,
            0,
            f"nothing of the log can be made again: {error}",
        )
    return report


def restore_generation(device: Device, generation: int, *, discard: bool = True) -> Superblock:
    """Make an earlier generation the newest again, for good, in one commit.

    Its trees are taken as they are; check them first with `check_image(generation=...)`. The new
    commit has a number above every one in the ring, so the newest superblock still wins. Neither
    this commit nor the next one overwrites what the abandoned generations show.

    Args:
        device: of the image, locked.

    Returns:
        The new superblock.

    Raises:
        ImageError: the ring does not name that generation, or it is the newest.
        CorruptError: its space map or its catalog cannot be read.
    """
    newest, target = read_newest(device), read_newest(device, generation)
    if newest.generation == target.generation:
        raise ImageError(f"generation {generation} is the newest already")
    if newest.uuid != target.uuid:
        raise ImageError(f"generation {generation} belongs to an image that was here before")
    # The target's trees with the newest number; root ids are never used twice. The log changes to
    # the area that the newest generation does not use.
    place = target.log and newest.log
    base = replace(
        target,
        generation=newest.generation,
        oldest_retained=newest.generation,
        next_root_id=max(newest.next_root_id, target.next_root_id),
        flags=0,
        log=place,
        incompat=target.incompat if place else target.incompat & ~INCOMPAT_LOG,
    )
    store = Store(device, base, writable=True)
    others = [newest]
    for number in range(newest.generation - 1, newest.oldest_retained - 1, -1):
        if number == generation:
            continue
        try:
            others.append(read_newest(device, number))
        except ImageError:
            continue
    store.continue_after(others)
    filesystem = Filesystem(store, discard=discard)
    filesystem.commit(clean=True)
    return store.superblock


def make_filesystem(
    device: Device,
    *,
    label: str = "",
    duplicate_metadata: bool = True,
    mode: int = 0o755,
    uid: int = 0,
    gid: int = 0,
    log: bool = True,
) -> Superblock:
    """Make an empty filesystem on the whole device. The old content is lost.

    Args:
        device: of the image, locked.
        label: of the image, LABEL_BYTES_MAX bytes of UTF-8 at most.
        duplicate_metadata: write every node and page twice.
        mode, uid, gid: of the root directory.
        log: keep a log, so that an fsync needs no commit.

    Returns:
        The superblock.

    Raises:
        UsageError: the device is too small or the label too long.
        DeviceError: the host refused.
    """
    total_blocks = device.size_bytes // BLOCK_SIZE_BYTES
    if total_blocks < MIN_TOTAL_BLOCKS:
        raise UsageError(
            f"{device.name} is too small: {device.size_bytes} bytes, an image needs at least "
            f"{MIN_TOTAL_BLOCKS * BLOCK_SIZE_BYTES >> 20} MiB"
        )
    if len(label.encode()) > LABEL_BYTES_MAX or "\0" in label:
        raise UsageError(f"the label is longer than {LABEL_BYTES_MAX} bytes or has a zero byte")
    for first in ring_blocks(total_blocks):  # no superblock of an old image may win
        device.write(first * BLOCK_SIZE_BYTES, [bytes(RING_SLOTS * BLOCK_SIZE_BYTES)])
    device.flush()
    place = new_log_place(total_blocks, 2 if duplicate_metadata else 1) if log else None
    if place is not None:
        write_zeros(device, place)
    blank = blank_superblock(
        total_blocks, label=label, duplicate_metadata=duplicate_metadata, log=place
    )
    store = Store(device, blank, writable=True)
    catalog = Catalog(Tree.empty(store, 0), 1)
    root_id = catalog.take_root_id()
    tree = Tree.empty(store, root_id, references)
    parts = Parts(
        tree, blank.name_seed, next_ino=ROOT_INO, inode_count=0, data_blocks=0, writable=True
    )
    volume = Volume(parts)
    volume.make_root(mode, uid, gid)
    volume.flush()
    nodes = tree.place()
    record = RootRecord(
        root_id=root_id,
        kind=RootKind.VOLUME,
        name=MAIN_VOLUME,
        uuid=os.urandom(16),
        tree=tree.root,
        created_generation=store.generation,
        created_ns=time.time_ns(),
        next_ino=volume.inodes.next_ino,
        node_count=tree.node_count,
        data_blocks=0,
        inode_count=volume.inodes.count,
    )
    with catalog.operation.begin_admitted() as operation:
        operation.change_unlogged()
        catalog.put_new(record)
    nodes += catalog.tree.place()
    commit = begin(
        store,
        nodes,
        catalog_nodes=catalog.tree.node_count,
        next_root_id=catalog.next_root_id,
        clean=True,
    )
    commit.write()
    finish(commit)
    return store.superblock
