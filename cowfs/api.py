"""The Python interface: `cowfs.connect()` opens a mounted filesystem or an image.

    with cowfs.connect("/home/ann/data") as filesystem:
        filesystem.create_snapshot("monday")
        for snapshot in filesystem.snapshots():
            print(snapshot.name, snapshot.created_ns)
        print(filesystem.reclaim(["monday"]).reclaim_bytes)

A mount point, a directory below one, and the path of a mounted image all connect to the daemon. An
image that is not mounted is opened in this process; a change then holds the image's lock until the
change is durable. Each method sends one request (history/requests.py), the same to a daemon and to
an image; the commands use only these methods. Reports are in history/reports.py: sizes in bytes,
times in nanoseconds, names as text. numpy is imported only when an image is opened, so that a
request to a daemon starts fast.

Errors are `cowfs.errors.CowfsError`: a message for users, an errno and an exit code. A connection
must be used by one thread at a time.
"""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from cowfs.daemon import finding, places
from cowfs.daemon.client import Client, ShowProgress
from cowfs.errors import (
    BusyError,
    CorruptError,
    CowfsError,
    DeviceError,
    MountError,
    ReadOnlyError,
)
from cowfs.history.edits import (
    AnyEdit,
    CreateSnapshot,
    DeleteSnapshots,
    Edit,
    HoldSnapshots,
    RenameSnapshot,
    Rollback,
    Undo,
)
from cowfs.history.reports import (
    DropReport,
    InfoReport,
    ReclaimReport,
    SnapshotReport,
    SpaceReport,
    TrimReport,
)
from cowfs.history.requests import (
    AnyQuery,
    Drops,
    DropsReply,
    Info,
    InfoReply,
    Snapshots,
    SnapshotsReply,
    Space,
    SpaceReply,
    answer,
)

if TYPE_CHECKING:
    from cowfs.care.scrub_report import BadCopy
    from cowfs.history.filesystem import Filesystem
    from cowfs.storage.device import Device

    RepairCall = Callable[[BadCopy], None]

ReplyType = TypeVar("ReplyType")


def connect(path: str | os.PathLike[str]) -> Connection:
    """Connect to the filesystem at a mount point (or in a directory below one), or in an image.

    Close the connection, or use it in `with`.

    Raises:
        ImageMissingError: there is no such file.
        MountError: the path is a directory where no cowfs is mounted, or the daemon of the mount
            has ended.
    """
    return _find(os.fspath(path))


class Connection(ABC):
    """A filesystem, mounted or not. Errors are CowfsError; a change is durable on return.

    Attributes:
        image: the absolute path of the image.
    """

    image: str

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    @abstractmethod
    def daemon(self) -> Client | None:
        """The connection to the daemon; None if the filesystem is not mounted."""

    @abstractmethod
    def ask(self, request: AnyEdit | AnyQuery, expected: type[ReplyType]) -> ReplyType:
        """Send a request and return the reply, which is of the type `expected`."""

    # --- reading
    # ------------------------------------------------------------------------------------

    def info(self) -> InfoReport:
        """Report what the image is, and how it is mounted."""
        return self.ask(Info(), InfoReply).info

    def space(self) -> SpaceReport:
        """Report used, free and reserved space, as `cowfs df` shows it."""
        return self.ask(Space(), SpaceReply).space

    def snapshots(self) -> tuple[SnapshotReport, ...]:
        """List all snapshots, the oldest first."""
        return self.ask(Snapshots(), SnapshotsReply).snapshots

    def drops(self) -> tuple[DropReport, ...]:
        """List the drop queue: deleted snapshots whose blocks are not all free yet."""
        return self.ask(Drops(), DropsReply).drops

    def reclaim(self, names: Sequence[str]) -> ReclaimReport:
        """Count what deleting exactly these snapshots would free, to the byte.

        Raises:
            SnapshotError: one of them is unknown.
        """
        from cowfs.accounting.snapshot_usage import reclaim_report

        with self.reading() as filesystem:
            return reclaim_report(filesystem, names)

    # --- changing
    # -----------------------------------------------------------------------------------

    def create_snapshot(self, name: str, description: str = "") -> SnapshotReport:
        """Snapshot the live volume.

        Raises:
            UsageError: the name or the description is not valid.
            SnapshotError: the name is taken.
            NoSpaceError: there would be no room left to delete the snapshot's files.
        """
        return self._edit(CreateSnapshot(name, description))[0]

    def delete_snapshots(
        self, names: Sequence[str], *, wait: bool = False, progress: ShowProgress | None = None
    ) -> tuple[SnapshotReport, ...]:
        """Delete all of these snapshots, or none.

        A daemon frees their blocks in the background. An image that is not mounted has an empty
        drop queue on return.

        Args:
            wait: return only when the daemon has emptied the drop queue.
            progress: called now and then during that wait.

        Returns:
            The deleted snapshots.

        Raises:
            SnapshotError: one of them is unknown or held.
        """
        deleted = self._edit(DeleteSnapshots(tuple(names)))
        if wait:
            self.wait_drops(progress)
        return deleted

    def rename_snapshot(self, old: str, new: str) -> SnapshotReport:
        """Give a snapshot another name."""
        return self._edit(RenameSnapshot(old, new))[0]

    def hold_snapshots(self, names: Sequence[str], held: bool) -> tuple[SnapshotReport, ...]:
        """Hold snapshots against deletion, or release them. Returns them as they are now."""
        return self._edit(HoldSnapshots(tuple(names), held))

    def rollback(self, name: str, *, force: bool = False) -> SnapshotReport:
        """Set the live volume back to a snapshot.

        Args:
            force: roll back although files are open for writing; their writers get ESTALE.

        Returns:
            The automatic snapshot that keeps the state before.

        Raises:
            BusyError: files are open for writing, and `force` is not set.
        """
        return self._edit(Rollback(name, force))[0]

    def undo(self, *, force: bool = False) -> SnapshotReport:
        """Take back the last rollback. Returns the automatic snapshot of the undone state."""
        return self._edit(Undo(force))[0]

    def _edit(self, edit: AnyEdit) -> tuple[SnapshotReport, ...]:
        return self.ask(edit, SnapshotsReply).snapshots

    @abstractmethod
    def wait_drops(self, progress: ShowProgress | None = None) -> None:
        """Return when the drop queue is empty and that is durable."""

    @abstractmethod
    def sync(self) -> int:
        """Commit everything written so far. Returns the newest durable generation."""

    @abstractmethod
    def trim(self, progress: ShowProgress | None = None) -> TrimReport:
        """Discard all free blocks: the host gets their space."""

    # --- reading in this process
    # --------------------------------------------------------------------

    @abstractmethod
    def device(self) -> AbstractContextManager[tuple[Device, int | None]]:
        """Open the image read-only, with its log in memory.

        Yields:
            The device, and the generation pinned while the block runs: no block of it is reused.
            The generation is None if the image is not mounted; read the newest.

        Raises:
            BusyError: at the end of the block, if the filesystem filled up and the pin was lost.
        """

    @abstractmethod
    def repairing(
        self, *, read_only: bool
    ) -> AbstractContextManager[tuple[Device, int | None, RepairCall | None]]:
        """Open the image as `device` does, and repair bad copies of metadata.

        Yields:
            The device, the pinned generation, and a function to call with each bad copy whose
            twin is good (None if `read_only`). Repairs are durable when the block ends.
        """

    @abstractmethod
    def reading(self) -> AbstractContextManager[Filesystem]:
        """Open the filesystem read-only in this process, with everything written until now."""

    @abstractmethod
    def close(self) -> None:
        """Close the connection."""


def _find(path: str) -> Connection:
    mount = places.find_mount(path)
    if mount is None:
        try:
            is_directory = stat.S_ISDIR(os.stat(path).st_mode)
        except OSError:
            is_directory = False  # opening the image raises the better error
        if not is_directory:
            client = finding.connect(path)
            return MountConnection(client, path) if client else ImageConnection(path)
        mount = places.find_mount(path, inside=True)
    if mount is None:
        raise MountError(f"{os.path.abspath(path)} is a directory where no cowfs is mounted")
    client = finding.connect_mount(mount)
    if client is None:
        raise MountError(
            f"the daemon of {mount.mount_point} has ended; run cowfs umount {mount.mount_point}, "
            "then mount the image again"
        )
    return MountConnection(client, mount.image)


class MountConnection(Connection):
    """A mounted filesystem: every request goes to its daemon."""

    def __init__(self, client: Client, image: str) -> None:
        self.image = os.path.abspath(image)
        self._client = client

    @property
    def daemon(self) -> Client | None:
        return self._client

    def ask(self, request: AnyEdit | AnyQuery, expected: type[ReplyType]) -> ReplyType:
        return self._client.ask(request, expected)

    def wait_drops(self, progress: ShowProgress | None = None) -> None:
        self._client.wait_drops(progress)

    def sync(self) -> int:
        return self._client.sync()

    def trim(self, progress: ShowProgress | None = None) -> TrimReport:
        return self._client.trim(progress)

    def close(self) -> None:
        self._client.close()

    @contextmanager
    def device(self) -> Iterator[tuple[Device, int | None]]:
        from cowfs.storage.device import FileDevice

        generation, _ = self._client.pin()
        device = FileDevice(self.image, writable=False)
        try:
            yield _with_generation(device, generation), generation
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
                f"the filesystem filled up and released generation {generation} while it was being "
                "read; delete something and try again"
            )

    @contextmanager
    def reading(self) -> Iterator[Filesystem]:
        try:
            self._client.sync()
        except (DeviceError, ReadOnlyError):
            pass  # this mount writes no more; what follows the newest commit is in its log
        with self.device() as (device, generation), _opened(device, generation) as filesystem:
            yield filesystem

    @contextmanager
    def repairing(
        self, *, read_only: bool
    ) -> Iterator[tuple[Device, int | None, RepairCall | None]]:
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
                refused = True  # this mount cannot write any more: send no further requests

        with self.device() as (device, generation):
            yield device, generation, None if read_only else repair
            if not (read_only or refused):
                client.sync()


class ImageConnection(Connection):
    """An image that is not mounted: each call opens it in this process."""

    def __init__(self, image: str) -> None:
        self.image = os.path.abspath(image)

    @property
    def daemon(self) -> Client | None:
        return None

    def ask(self, request: AnyEdit | AnyQuery, expected: type[ReplyType]) -> ReplyType:
        with self._writing() if isinstance(request, Edit) else self.reading() as filesystem:
            reply = answer(filesystem, request)
            if isinstance(request, Edit):
                filesystem.empty_drops()  # made durable by the commit of close()
        assert isinstance(reply, expected)
        return reply

    def wait_drops(self, progress: ShowProgress | None = None) -> None:
        pass  # each change leaves the drop queue empty

    def sync(self) -> int:
        return self.info().generation  # no daemon: nothing waits in memory for a commit

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

    @contextmanager
    def device(self) -> Iterator[tuple[Device, int | None]]:
        from cowfs.history.images import with_log
        from cowfs.storage.device import FileDevice

        device = FileDevice(self.image, writable=False)
        try:
            yield with_log(device), None
        finally:
            device.close()

    @contextmanager
    def repairing(
        self, *, read_only: bool
    ) -> Iterator[tuple[Device, int | None, RepairCall | None]]:
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
            # An interrupt or a bug in the middle of a change: the state in memory cannot be
            # trusted. Close without a commit; the image keeps its last one.
            device.close()
            raise
        filesystem.close()


def _with_generation(device: Device, generation: int) -> Device:
    """The device with the generation that a daemon names.

    A read-only mount of an image with a log shows a commit that only its memory has. Nobody writes
    such an image, so the same commit is made here.
    """
    from cowfs.history.images import with_log
    from cowfs.storage.superblock import read_newest

    return with_log(device) if read_newest(device).generation < generation else device


@contextmanager
def _opened(device: Device, generation: int | None) -> Iterator[Filesystem]:
    from cowfs.history.images import open_filesystem

    yield open_filesystem(device, writable=False, generation=generation)
