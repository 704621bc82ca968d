"""What a command works on: a daemon, or the image itself, behind the same methods.

A mount point leads to its daemon, and so does the path of an image that is mounted. Only an image
without a daemon is opened here; then what changes it holds its lock until the change is durable.
numpy is imported only then: asking a daemon starts fast.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol, cast

import click

from cowfs.daemon import places
from cowfs.daemon.client import Client, ShowProgress
from cowfs.daemon.finding import connect, connect_mount
from cowfs.errors import (
    BusyError,
    CorruptError,
    CowfsError,
    DeviceError,
    ImageError,
    LockedError,
    MountError,
    ReadOnlyError,
    UsageError,
)
from cowfs.escapes import printable
from cowfs.history.reports import (
    DropReport,
    InfoReport,
    ReclaimReport,
    SnapshotReport,
    SpaceReport,
    TrimReport,
)

if TYPE_CHECKING:
    from cowfs.care.scrub_report import BadCopy
    from cowfs.history.filesystem import EditAction, Filesystem
    from cowfs.history.records import RootRecord
    from cowfs.storage.device import FileDevice

    RepairCall = Callable[[BadCopy], None]


class Target(Protocol):
    """A filesystem, mounted or not. Errors are CowfsError; what changes it is durable on return."""

    image: str

    @property
    def daemon(self) -> Client | None:
        """The connection to its daemon; None when it is not mounted."""

    def info(self) -> InfoReport: ...

    def space(self) -> SpaceReport: ...

    def snapshots(self) -> tuple[SnapshotReport, ...]:
        """The oldest first."""

    def drops(self) -> tuple[DropReport, ...]: ...

    def create_snapshot(self, name: str, description: str = "") -> SnapshotReport: ...

    def delete_snapshots(
        self, names: Sequence[str], *, wait: bool = False, progress: ShowProgress | None = None
    ) -> tuple[SnapshotReport, ...]:
        """Returns those deleted. An image without a daemon has no drop queue left afterwards."""

    def rename_snapshot(self, old: str, new: str) -> SnapshotReport: ...

    def hold_snapshots(self, names: Sequence[str], held: bool) -> tuple[SnapshotReport, ...]:
        """Refuse to delete them from now on, or no longer. Returns them as they are then."""

    def rollback(self, name: str, *, force: bool = False) -> SnapshotReport:
        """Returns the automatic snapshot of the state before."""

    def undo(self, *, force: bool = False) -> SnapshotReport:
        """Returns the automatic snapshot of the state that was undone."""

    def sync(self) -> int:
        """Returns the newest durable generation."""

    def trim(self, progress: ShowProgress | None = None) -> TrimReport:
        """Give all free blocks back to the host."""

    def reclaim(self, names: Sequence[str]) -> ReclaimReport:
        """What deleting exactly these snapshots would free."""

    def device(self) -> AbstractContextManager[tuple[FileDevice, int | None]]:
        """The image for reading, and the generation that stays whole while the block runs.

        None stands for the newest: nobody writes.
        """

    def repairing(
        self, *, read_only: bool
    ) -> AbstractContextManager[tuple[FileDevice, int | None, RepairCall | None]]:
        """As `device`, and what to call with each bad copy whose twin is good; None: read only.

        What was repaired is durable when the block ends.
        """

    def reading(self) -> AbstractContextManager[Filesystem]:
        """The filesystem read-only in this process, with all that was written before."""

    def close(self) -> None: ...


@contextmanager
def open_target(path: str | os.PathLike[str]) -> Iterator[Target]:
    """The filesystem at a mount point (or in a directory below one), or in an image.

    Raises:
        ImageMissingError: there is no such file.
        MountError: a directory where no cowfs is mounted, or a mount whose daemon is gone.
    """
    text = os.fspath(path)
    target = _find(text)
    try:
        yield target
    finally:
        target.close()


def _find(path: str) -> Target:
    mount = places.find_mount(path)
    if mount is None:
        try:
            is_directory = stat.S_ISDIR(os.stat(path).st_mode)
        except OSError:
            is_directory = False  # the image's own error is the better one
        if not is_directory:
            client = connect(path)
            return DaemonTarget(client, path) if client else ImageTarget(path)
        mount = places.find_mount(path, inside=True)
    if mount is None:
        raise MountError(f"{os.path.abspath(path)} is a directory where no cowfs is mounted")
    client = connect_mount(mount)
    if client is None:
        raise MountError(
            f"no daemon serves {mount.mount_point} any more; cowfs umount {mount.mount_point} "
            "clears it away, then mount it again"
        )
    return DaemonTarget(client, mount.image)


@contextmanager
def offline_device(image: str, *, writable: bool) -> Iterator[FileDevice]:
    """The image itself, which must not be mounted; locked while the block runs if `writable`.

    Raises:
        LockedError: it is mounted, or in use by another process.
        ImageError: a mount point or a directory, where an image is wanted.
    """
    from cowfs.storage.device import FileDevice

    if os.path.isdir(image):
        raise ImageError(f"{image} is a directory; unmount it, and name the image")
    client = connect(image)  # a daemon that only reads holds no lock
    if client is not None:
        client.close()
        raise LockedError(f"{image} is mounted ({client.daemon}); unmount it first")
    device = FileDevice(image, writable=writable)
    try:
        yield device
    finally:
        device.close()


yes_option = click.option("--yes", is_flag=True, help="Do not ask first.")


def confirm(question: str, *, yes: bool) -> None:
    """Ask before what cannot be taken back; without a terminal --yes is the answer.

    Raises:
        UsageError: nobody can be asked.
        click.Abort: the answer is no.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError("this cannot be taken back: look with -n first, then say --yes")
    click.confirm(printable(question), abort=True, err=True)


class DaemonTarget:
    """A filesystem that is mounted: everything is asked of its daemon."""

    def __init__(self, client: Client, image: str) -> None:
        self.image = os.path.abspath(image)
        self._client = client
        # Requests are the client's own; a name here would only say the same again.
        self.info = client.info
        self.space = client.space
        self.snapshots = client.snapshots
        self.drops = client.drops
        self.create_snapshot = client.create_snapshot
        self.delete_snapshots = client.delete_snapshots
        self.rename_snapshot = client.rename_snapshot
        self.hold_snapshots = client.hold_snapshots
        self.rollback = client.rollback
        self.undo = client.undo
        self.sync = client.sync
        self.trim = client.trim
        self.close = client.close

    @property
    def daemon(self) -> Client | None:
        return self._client

    def reclaim(self, names: Sequence[str]) -> ReclaimReport:
        return _reclaim(self, names)

    @contextmanager
    def device(self) -> Iterator[tuple[FileDevice, int | None]]:
        from cowfs.storage.device import FileDevice

        generation, _ = self._client.pin()
        device = FileDevice(self.image, writable=False)
        try:
            yield device, generation
        except CorruptError:
            self._require_pin()
            raise
        finally:
            device.close()
        self._require_pin()

    def _require_pin(self) -> None:
        generation, holds = self._client.pin()
        if not holds:
            raise BusyError(
                f"the filesystem filled up and let go of generation {generation} while it was "
                "read; delete something and try again"
            )

    @contextmanager
    def reading(self) -> Iterator[Filesystem]:
        try:
            self._client.sync()
        except (DeviceError, ReadOnlyError):
            pass  # nothing will be written any more: the newest generation is all there is
        with self.device() as (device, generation), _opened(device, generation) as filesystem:
            yield filesystem

    @contextmanager
    def repairing(
        self, *, read_only: bool
    ) -> Iterator[tuple[FileDevice, int | None, RepairCall | None]]:
        from cowfs.daemon.messages import RepairCopy

        client = self._client
        refused = False

        def repair(copy: BadCopy) -> None:
            nonlocal refused
            try:
                if not refused:
                    client.repair(
                        RepairCopy(
                            kind=copy.kind,
                            bad_block=copy.bad_block,
                            good_block=copy.good_block,
                            birth=copy.birth,
                            checksum=copy.checksum,
                        )
                    )
            except (DeviceError, ReadOnlyError):
                refused = True  # nothing will be written there any more

        with self.device() as (device, generation):
            yield device, generation, None if read_only else repair
            if not (read_only or refused):
                client.sync()


class ImageTarget:
    """An image without a daemon: opened here, for each call anew."""

    daemon: Client | None = None

    def __init__(self, image: str) -> None:
        self.image = os.path.abspath(image)

    def info(self) -> InfoReport:
        from cowfs.history.reports import info_report

        with self.reading() as filesystem:
            return info_report(filesystem)

    def space(self) -> SpaceReport:
        from cowfs.history.reports import space_report

        with self.reading() as filesystem:
            return space_report(filesystem)

    def snapshots(self) -> tuple[SnapshotReport, ...]:
        from cowfs.history.reports import snapshot_reports

        with self.reading() as filesystem:
            return snapshot_reports(filesystem)

    def drops(self) -> tuple[DropReport, ...]:
        from cowfs.history.reports import drop_reports

        with self.reading() as filesystem:
            return drop_reports(filesystem)

    def create_snapshot(self, name: str, description: str = "") -> SnapshotReport:
        return self._edit(lambda filesystem: filesystem.create_snapshot(name, description))

    def delete_snapshots(
        self, names: Sequence[str], *, wait: bool = False, progress: ShowProgress | None = None
    ) -> tuple[SnapshotReport, ...]:
        with self._writing() as filesystem:
            deleted = _edit_several(filesystem, filesystem.delete_snapshots(names))
            filesystem.work_drops()
        return deleted

    def rename_snapshot(self, old: str, new: str) -> SnapshotReport:
        return self._edit(lambda filesystem: filesystem.rename_snapshot(old, new))

    def hold_snapshots(self, names: Sequence[str], held: bool) -> tuple[SnapshotReport, ...]:
        with self._writing() as filesystem:
            return _edit_several(filesystem, filesystem.hold_snapshots(names, held))

    def rollback(self, name: str, *, force: bool = False) -> SnapshotReport:
        return self._edit(lambda filesystem: filesystem.rollback(name))

    def undo(self, *, force: bool = False) -> SnapshotReport:
        return self._edit(lambda filesystem: filesystem.undo())

    def sync(self) -> int:
        return self.info().generation  # nothing is in anybody's memory

    def trim(self, progress: ShowProgress | None = None) -> TrimReport:
        from cowfs.daemon.messages import Progress
        from cowfs.history.reports import trim_report
        from cowfs.storage.discards import Sweep

        def show(sweep: Sweep) -> None:
            if progress is not None:
                progress(
                    Progress(
                        what="trimming", done_bytes=sweep.done_bytes, total_bytes=sweep.total_bytes
                    )
                )

        with self._writing() as filesystem:
            filesystem.follow_up()
            sweep = Sweep.of_everything(filesystem.store)
            sweep.run(show)
            return trim_report(filesystem, sweep)

    def reclaim(self, names: Sequence[str]) -> ReclaimReport:
        return _reclaim(self, names)

    @contextmanager
    def device(self) -> Iterator[tuple[FileDevice, int | None]]:
        from cowfs.storage.device import FileDevice

        device = FileDevice(self.image, writable=False)
        try:
            yield device, None
        finally:
            device.close()

    @contextmanager
    def repairing(
        self, *, read_only: bool
    ) -> Iterator[tuple[FileDevice, int | None, RepairCall | None]]:
        from cowfs.storage.device import FileDevice
        from cowfs.storage.repairs import Repairs, good_copy
        from cowfs.storage.superblock import read_newest

        device = FileDevice(self.image, writable=not read_only)
        try:
            seed = read_newest(device).seed
            repairs = Repairs()

            def repair(copy: BadCopy) -> None:
                checksum = bytes.fromhex(copy.checksum)
                bad, good = copy.bad_block, copy.good_block
                data = good_copy(device, copy.kind, bad, good, checksum, seed)
                if data is not None:
                    repairs.write(device, [(bad, good, data)])

            yield device, None, None if read_only else repair
        finally:
            device.close()

    @contextmanager
    def reading(self) -> Iterator[Filesystem]:
        with self.device() as (device, generation), _opened(device, generation) as filesystem:
            yield filesystem

    def close(self) -> None:
        pass

    @contextmanager
    def _writing(self) -> Iterator[Filesystem]:
        from cowfs.history.images import open_filesystem
        from cowfs.storage.device import FileDevice

        device = FileDevice(self.image, writable=True)
        try:
            filesystem = open_filesystem(device, writable=True)
        except BaseException:
            device.close()
            raise
        try:
            yield filesystem
        except CowfsError:
            filesystem.close()
            raise
        except BaseException:
            # An interrupt, or a fault of ours, in the middle of a change: what is in memory may be
            # anything, and the image has its last commit.
            device.close()
            raise
        filesystem.close()

    def _edit(self, make: Callable[[Filesystem], EditAction]) -> SnapshotReport:
        from cowfs.history.reports import snapshot_report

        with self._writing() as filesystem:
            record = cast("RootRecord", filesystem.apply(make(filesystem)))
            return snapshot_report(filesystem, record)


@contextmanager
def _opened(device: FileDevice, generation: int | None) -> Iterator[Filesystem]:
    from cowfs.history.images import open_filesystem

    yield open_filesystem(device, writable=False, generation=generation)


def _edit_several(filesystem: Filesystem, action: EditAction) -> tuple[SnapshotReport, ...]:
    from cowfs.history.reports import snapshot_report

    records = cast("list[RootRecord]", filesystem.apply(action))
    return tuple(snapshot_report(filesystem, record) for record in records)


def _reclaim(target: Target, names: Sequence[str]) -> ReclaimReport:
    from cowfs.history.reports import reclaim_report

    with target.reading() as filesystem:
        return reclaim_report(filesystem, names)
