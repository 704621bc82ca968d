"""cowfs from a program: `cowfs.connect()` a mount or an image, and ask.

    with cowfs.connect("/home/ann/data") as filesystem:
        filesystem.create_snapshot("monday")
        for snapshot in filesystem.snapshots():
            print(snapshot.name, snapshot.created_ns)
        print(filesystem.reclaim(["monday"]).reclaim_bytes)

A mount point, or a directory below one, leads to its daemon, and so does the path of an image that is
mounted. Only an image without a daemon is opened here; what changes it then holds its lock until the
change is durable. Each method is one request (history/requests.py), the same both ways; the commands use
nothing else. Reports are in history/reports.py: bytes and nanoseconds as numbers, names as text.
numpy is imported only when an image is opened: asking a daemon starts fast.

Errors are `cowfs.errors.CowfsError` with words for users, an errno and an exit code. A connection is
used by one thread at a time.
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
    from cowfs.storage.device import FileDevice

    RepairCall = Callable[[BadCopy], None]

ReplyType = TypeVar("ReplyType")


def connect(path: str | os.PathLike[str]) -> Connection:
    """The filesystem at a mount point (or in a directory below one), or in an image.

    Close it, or use it in `with`.

    Raises:
        ImageMissingError: there is no such file.
        MountError: a directory where no cowfs is mounted, or a mount whose daemon is gone.
    """
    return _find(os.fspath(path))


class Connection(ABC):
    """A filesystem, mounted or not. Errors are CowfsError; what changes it is durable on return.

    Attributes:
        image: the path of its image.
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
        """The connection to its daemon; None when it is not mounted."""

    @abstractmethod
    def ask(self, request: AnyEdit | AnyQuery, expected: type[ReplyType]) -> ReplyType:
        """The answer to a request, of the kind that is expected."""

    # --- looking ------------------------------------------------------------------------------------

    def info(self) -> InfoReport:
        """What the image is, and how it is mounted."""
        return self.ask(Info(), InfoReply).info

    def space(self) -> SpaceReport:
        """Where the space is, as `cowfs df` tells it."""
        return self.ask(Space(), SpaceReply).space

    def snapshots(self) -> tuple[SnapshotReport, ...]:
        """All snapshots, the oldest first."""
        return self.ask(Snapshots(), SnapshotsReply).snapshots

    def drops(self) -> tuple[DropReport, ...]:
        """The deleted snapshots whose blocks are being given back."""
        return self.ask(Drops(), DropsReply).drops

    def reclaim(self, names: Sequence[str]) -> ReclaimReport:
        """What deleting exactly these snapshots would free, to the byte.

        Raises:
            SnapshotError: one of them is unknown.
        """
        from cowfs.accounting.snapshot_usage import reclaim_report

        with self.reading() as filesystem:
            return reclaim_report(filesystem, names)

    # --- changing -----------------------------------------------------------------------------------

    def create_snapshot(self, name: str, description: str = "") -> SnapshotReport:
        """Keep the live volume as it is, under a name.

        Raises:
            UsageError: the name or the description cannot be.
            SnapshotError: the name is taken.
            NoSpaceError: there would be no room to delete what it holds.
        """
        return self._edit(CreateSnapshot(name, description))[0]

    def delete_snapshots(
        self, names: Sequence[str], *, wait: bool = False, progress: ShowProgress | None = None
    ) -> tuple[SnapshotReport, ...]:
        """Delete all of these, or none. An image without a daemon has no drop queue left afterwards.

        Args:
            wait: until a daemon has given all blocks back.
            progress: called now and then while it does.

        Returns:
            Those deleted.

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
        """Refuse to delete them from now on, or no longer. Returns them as they are then."""
        return self._edit(HoldSnapshots(tuple(names), held))

    def rollback(self, name: str, *, force: bool = False) -> SnapshotReport:
        """Let the live volume be what a snapshot holds. Returns the snapshot of the state before.

        Raises:
            BusyError: files are open for writing; with `force` those handles get errors.
        """
        return self._edit(Rollback(name, force))[0]

    def undo(self, *, force: bool = False) -> SnapshotReport:
        """Take back the last rollback. Returns the snapshot of the state that was undone."""
        return self._edit(Undo(force))[0]

    def _edit(self, edit: AnyEdit) -> tuple[SnapshotReport, ...]:
        return self.ask(edit, SnapshotsReply).snapshots

    @abstractmethod
    def wait_drops(self, progress: ShowProgress | None = None) -> None:
        """Return when the blocks of all deleted snapshots are given back, and that is durable."""

    @abstractmethod
    def sync(self) -> int:
        """Make everything durable. Returns the newest durable generation."""

    @abstractmethod
    def trim(self, progress: ShowProgress | None = None) -> TrimReport:
        """Give all free blocks back to the host."""

    # --- reading in this process --------------------------------------------------------------------

    @abstractmethod
    def device(self) -> AbstractContextManager[tuple[FileDevice, int | None]]:
        """The image for reading, and the generation that stays whole while the block runs.

        None stands for the newest: nobody writes.
        """

    @abstractmethod
    def repairing(
        self, *, read_only: bool
    ) -> AbstractContextManager[tuple[FileDevice, int | None, RepairCall | None]]:
        """As `device`, and what to call with each bad copy whose twin is good; None: read only.

        What was repaired is durable when the block ends.
        """

    @abstractmethod
    def reading(self) -> AbstractContextManager[Filesystem]:
        """The filesystem read-only in this process, with all that was written before."""

    @abstractmethod
    def close(self) -> None:
        """Let go of it."""


def _find(path: str) -> Connection:
    mount = places.find_mount(path)
    if mount is None:
        try:
            is_directory = stat.S_ISDIR(os.stat(path).st_mode)
        except OSError:
            is_directory = False  # the image's own error is the better one
        if not is_directory:
            client = finding.connect(path)
            return MountConnection(client, path) if client else ImageConnection(path)
        mount = places.find_mount(path, inside=True)
    if mount is None:
        raise MountError(f"{os.path.abspath(path)} is a directory where no cowfs is mounted")
    client = finding.connect_mount(mount)
    if client is None:
        raise MountError(
            f"no daemon serves {mount.mount_point} any more; cowfs umount {mount.mount_point} "
            "clears it away, then mount it again"
        )
    return MountConnection(client, mount.image)


class MountConnection(Connection):
    """A filesystem that is mounted: everything is asked of its daemon."""

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


class ImageConnection(Connection):
    """An image without a daemon: opened here, for each call anew."""

    def __init__(self, image: str) -> None:
        self.image = os.path.abspath(image)

    @property
    def daemon(self) -> Client | None:
        return None

    def ask(self, request: AnyEdit | AnyQuery, expected: type[ReplyType]) -> ReplyType:
        with self._writing() if isinstance(request, Edit) else self.reading() as filesystem:
            reply = answer(filesystem, request)
            if isinstance(request, Edit):
                filesystem.empty_drops()  # closing commits
        assert isinstance(reply, expected)
        return reply

    def wait_drops(self, progress: ShowProgress | None = None) -> None:
        pass  # each call leaves the queue empty

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


@contextmanager
def _opened(device: FileDevice, generation: int | None) -> Iterator[Filesystem]:
    from cowfs.history.images import open_filesystem

    yield open_filesystem(device, writable=False, generation=generation)
