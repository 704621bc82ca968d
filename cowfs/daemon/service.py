"""The requests of the control socket, carried out on the mounted filesystem.

Edits go through the committer, so they are durable before the answer is sent (C6). A rollback is
refused while files are open for writing. Before it is answered, the kernel has forgotten the old
live volume.
"""

import contextlib
import itertools
import logging
import os
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

import trio

from cowfs.daemon import messages, server
from cowfs.daemon.commits import Committer
from cowfs.daemon.fuse import SESSION_FEATURES, session
from cowfs.daemon.nodes import Stale, invalidate
from cowfs.daemon.operations import Operations
from cowfs.daemon.options import MountOptions
from cowfs.daemon.processes import open_for_writing, still_mounted
from cowfs.daemon.remounts import Remounts
from cowfs.errors import (
    BusyError,
    CorruptError,
    CowfsError,
    DeviceError,
    ReadOnlyError,
    StillMountedError,
    UsageError,
)
from cowfs.escapes import escaped_path
from cowfs.files.items import ROOT_INO
from cowfs.files.volume import Volume
from cowfs.history import reports
from cowfs.history.edits import CreateSnapshot, Edit, Rollback, Undo
from cowfs.history.filesystem import Filesystem
from cowfs.history.records import RootRecord
from cowfs.history.requests import (
    Drops,
    DropsReply,
    Info,
    InfoReply,
    Snapshots,
    SnapshotsReply,
    Space,
    SpaceReply,
)
from cowfs.storage.discards import Sweep
from cowfs.storage.format import BLOCK_SIZE_BYTES

log = logging.getLogger(__name__)

ProgressCall = Callable[[messages.Progress], Awaitable[None]]
Report = TypeVar("Report")
SLICE_REPORTS = 128  # reports made between two checkpoints: about 1 ms
NAMED_MAX = 5  # open files named in a refusal
NAMES_AT_ONCE = 1000  # names of a root directory read between two checkpoints: about 1 ms
# After an unmount the session normally ends at once. If it does not, look this often who has the
# mount.
UNMOUNTED_WAIT_S = 1.0
UNMOUNTED_LOOKS = 5


class MountService:
    """The service of one mount. Implements server.Service.

    Args:
        committer: None when the mount is read-only.
        unmount: unmounts a directory from outside, as the user would.

    Attributes:
        ended: set when the session has ended.
        device: of the mount, in the form of mountinfo; empty until the mount answers.
        remounts: None until the mount answers.
    """

    def __init__(
        self,
        filesystem: Filesystem,
        committer: Committer | None,
        operations: Operations,
        options: MountOptions,
        unmount: Callable[[str], None],
    ) -> None:
        self._filesystem = filesystem
        self._committer = committer
        self._operations = operations
        self._options = options
        self._unmount = unmount
        self._mountpoint = os.path.realpath(options.mountpoint)
        self.ended = trio.Event()
        self.device = ""
        self.remounts: Remounts | None = None

    # --- pins -------------------------------------------------------------------------------------

    def pin(self) -> server.Pin:
        store = self._filesystem.store
        pin = server.Pin(store.superblock.generation)
        store.pins[pin] = pin.generation
        return pin

    def unpin(self, pin: server.Pin) -> None:
        self._filesystem.store.pins.pop(pin, None)

    def holds(self, pin: server.Pin) -> bool:
        return pin in self._filesystem.store.pins

    # --- requests ---------------------------------------------------------------------------------

    async def handle(self, request: messages.Request, progress: ProgressCall) -> messages.Reply:
        filesystem = self._filesystem
        match request:
            case Edit():
                return await self._edit(request)
            case Info():
                return InfoReply(self._info())
            # These as history.requests.answer does, but long lists are made in slices.
            case Space():
                await self._fetch_written()
                return SpaceReply(reports.space_report(filesystem, await self._drops()))
            case Snapshots():
                return await self._snapshots(filesystem.catalog.snapshots())
            case Drops():
                return DropsReply(await self._drops())
            case messages.WaitDrops():
                await self._wait_drops(progress)
                return messages.Done(generation=filesystem.store.superblock.generation)
            case messages.Sync():
                await self._fetch_written()
                if self._committer is not None:
                    await self._committer.commit()
                return messages.Done(generation=filesystem.store.superblock.generation)
            case messages.FollowRemount():
                if self.remounts is not None:
                    await self.remounts.look()
                return messages.Done(generation=filesystem.store.superblock.generation)
            case messages.Trim():
                return await self._trim(progress)
            case messages.RepairCopy():
                return messages.RepairReply(accepted=self._repair(request))
            case messages.Stop():
                await self._stop()
                return messages.Done(generation=filesystem.store.superblock.generation)
            case _:
                raise CowfsError(f"the daemon does not know the request {type(request).__name__}")

    async def _stop(self) -> None:
        """Unmount, and return when nothing uses the mount any more.

        Raises:
            StillMountedError: it is unmounted, but somebody still uses it.
        """
        writeback = self._operations.writeback
        async with writeback.lock if writeback is not None else contextlib.nullcontext():
            await trio.to_thread.run_sync(self._unmount, self._mountpoint)
        with trio.CancelScope(shield=True):
            for _ in range(UNMOUNTED_LOOKS):
                with trio.move_on_after(UNMOUNTED_WAIT_S):
                    await self.ended.wait()
                if self.ended.is_set():
                    return
                if self._committer is not None:
                    await self._fetch_written()
                    await self._committer.commit()
                error = await trio.to_thread.run_sync(self._still_mounted)
                if error is not None:
                    raise error
        raise StillMountedError(
            f"{self._mountpoint} is unmounted and all that was written there is safe in "
            f"{self._options.image}, but a program that cannot be seen still uses it"
        )

    def _still_mounted(self) -> StillMountedError | None:
        image = self._options.image
        return still_mounted(self.device, self._mountpoint, image, os.getpid(), is_safe=True)

    async def _fetch_written(self) -> None:
        """Fetch what the kernel's write-back cache holds, so that the next commit has it (C6)."""
        if self._operations.writeback is not None:
            await self._operations.writeback.fetch()

    async def follow_remount(self, read_only: bool) -> None:
        """Pause or resume writing, after a remount."""
        if self._committer is None:
            if not read_only:
                log.warning(
                    "%s was mounted read-only, and remount,rw cannot change that; unmount it, and "
                    "mount it again",
                    self._mountpoint,
                )
        elif read_only:
            await self._fetch_written()
            await self._committer.pause()
            log.info("%s is read-only until it is remounted", self._mountpoint)
        else:
            await self._committer.resume()
            log.info("%s can be written again", self._mountpoint)

    def _repair(self, copy: messages.RepairCopy) -> bool:
        try:
            checksum = bytes.fromhex(copy.checksum)
        except ValueError:
            raise UsageError("the repair request has a malformed checksum") from None
        return self._filesystem.store.offer_repair(
            copy.kind, copy.bad_block, copy.good_block, copy.birth, checksum
        )

    def _info(self) -> reports.InfoReport:
        settings = {
            name: getattr(self._options, name)
            for name in MountOptions.__dataclass_fields__
            if name not in ("image", "mountpoint")
        }
        settings["device"] = self.device
        if self._committer is not None:
            settings["read_only"] = self._committer.paused
            settings["commits"] = self._committer.commit_count
            settings["log_records"] = self._committer.record_count
            settings["commit_bytes"] = self._committer.written_bytes
        return reports.info_report(
            self._filesystem,
            mount_point=escaped_path(self._mountpoint),
            daemon_pid=os.getpid(),
            daemon_settings=settings,
            features=SESSION_FEATURES if session is not None else (),
        )

    def _writer(self) -> Committer:
        """The committer. Raises ReadOnlyError if the mount may not write."""
        if self._committer is None:
            raise ReadOnlyError(f"{self._mountpoint} is mounted read-only")
        if self._committer.paused:
            raise ReadOnlyError(
                f"{self._mountpoint} was remounted read-only; mount -o remount,rw makes it writable"
            )
        return self._committer

    async def _snapshots(self, records: list[RootRecord]) -> SnapshotsReply:
        return SnapshotsReply(await sliced(reports.each_snapshot(self._filesystem, records)))

    async def _drops(self) -> tuple[reports.DropReport, ...]:
        return await sliced(reports.each_drop(self._filesystem))

    async def _edit(self, edit: Edit) -> SnapshotsReply:
        """Make an edit durable, and answer with the snapshots that it returns."""
        committer = self._writer()
        if edit.replaces_live or isinstance(edit, CreateSnapshot):
            await self._fetch_written()
        if isinstance(edit, Rollback | Undo):
            return await self._replace_live(committer, edit)
        records = await committer.apply(edit)
        committer.kick_drops()
        return await self._snapshots(records)

    async def _wait_drops(self, progress: ProgressCall) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._show_drops, progress)
            await self._writer().wait_drops()
            nursery.cancel_scope.cancel()

    async def _trim(self, progress: ProgressCall) -> messages.TrimReply:
        async def show(sweep: Sweep) -> None:
            await progress(
                messages.Progress(
                    what="trimming", done_bytes=sweep.done_bytes, total_bytes=sweep.total_bytes
                )
            )

        committer = self._writer()
        await self._fetch_written()
        sweep = await committer.trim(show)
        return messages.TrimReply(trim=reports.trim_report(self._filesystem, sweep))

    async def _show_drops(self, progress: ProgressCall) -> None:
        while True:
            await trio.sleep(0.2)
            drops = self._filesystem.drops
            await progress(
                messages.Progress(
                    what="giving back blocks",
                    done_bytes=drops.freed_blocks * BLOCK_SIZE_BYTES,
                    total_bytes=drops.referenced_blocks * BLOCK_SIZE_BYTES,
                )
            )

    async def _replace_live(self, committer: Committer, edit: Rollback | Undo) -> SnapshotsReply:
        """Make an edit that replaces the live volume, and make the kernel forget the old one.

        Raises:
            BusyError: files are open for writing, and the edit is not forced.
        """
        writers = self._operations.nodes.writer_inos()
        if writers and not edit.force:
            named = await trio.to_thread.run_sync(open_for_writing, self._mountpoint)
            shown = named[:NAMED_MAX] or [f"inode {ino}" for ino in writers[:NAMED_MAX]]
            more = len(writers) - len(shown)
            rest = f" and {more} more" if more > 0 else ""
            raise BusyError(
                f"files are open for writing: {', '.join(shown)}{rest}; close them, or use "
                "--force: then writes to them fail"
            )
        stale: list[Stale] = []
        # The switch comes right after the freeze, so no request sees one without the other.
        records = await committer.apply(edit, lambda: stale.append(self._operations.nodes.switch()))
        names: set[bytes] = set()
        for volume in stale[0].volumes:
            await _add_root_names(volume, names)
        await trio.to_thread.run_sync(invalidate, stale[0], sorted(names))
        return await self._snapshots(records)


async def _add_root_names(volume: Volume, names: set[bytes]) -> None:
    """Add the names in a volume's root directory to `names`, with checkpoints for other requests.

    Names in damaged leaves are left out: the kernel could not have looked them up either.
    """
    after = 0
    try:
        while part := list(itertools.islice(volume.listing(ROOT_INO, after), NAMES_AT_ONCE)):
            names.update(entry.name for _, entry in part)
            after = part[-1][0]
            await trio.lowlevel.checkpoint()
    except (CorruptError, DeviceError) as error:
        log.error("cannot read all names of a root directory: %s; run cowfs check", error)


async def sliced(each: Iterable[Report]) -> tuple[Report, ...]:
    """All items of an iterable, with checkpoints in between so that other requests are served."""
    made = []
    for report in each:
        made.append(report)
        if len(made) % SLICE_REPORTS == 0:
            await trio.lowlevel.checkpoint()
    return tuple(made)
