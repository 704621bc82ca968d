"""One run of every operation of cowfs beside a model, on a device that fails at a chosen call.

`Workload.run` makes the operations of `PARTS` in order. An operation that returns is made in the
model too; one that fails with EIO is not, and must have changed nothing. `Workload.end` then judges
what a power cut leaves: a generation no older than the last acknowledged one, with exactly the
history of its freeze, that checks clean and can be written to.
"""

import errno
import random
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cowfs.care.check import check_image
from cowfs.daemon.options import CACHE_BYTES_MIN
from cowfs.errors import CowfsError, DeviceError, NoSpaceError
from cowfs.files.calls import Changes
from cowfs.files.content import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE
from cowfs.files.namespace import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT
from cowfs.files.volume import Volume
from cowfs.history.edits import (
    CreateSnapshot,
    DeleteSnapshots,
    Edit,
    RenameSnapshot,
    Rollback,
    Undo,
)
from cowfs.history.filesystem import Checked, Filesystem
from cowfs.history.images import make_filesystem, open_filesystem
from cowfs.storage.device import Device
from tests.model.devices import MemoryDevice
from tests.model.files_machine import compare, content
from tests.model.reference import ROOT, ReferenceFiles, ReferenceHistory

NAME = b"n" * 180
# Every run begins with an empty cache, of the size of the smallest mount. The cache keeps what an
# operation reads before its first change, so reading that again cannot fail.
CACHE_BYTES = CACHE_BYTES_MIN
REG = stat.S_IFREG | 0o644
DIRECTORY = stat.S_IFDIR | 0o755


@dataclass(slots=True)
class Base:
    """An image to begin with, and the model of its contents."""

    disk: MemoryDevice
    model: ReferenceHistory


@dataclass(slots=True)
class Workload:
    """The filesystem of one run, and the model that it must equal.

    Args:
        device: a device that may fail.
        model: the model of the image on it.
    """

    device: Device
    model: ReferenceHistory
    cache_bytes: int = CACHE_BYTES
    filesystem: Filesystem | None = None
    states: dict[int, ReferenceHistory] = field(default_factory=dict)
    acknowledged: int = 0
    failures: int = 0  # operations that answered EIO

    # --- running ----------------------------------------------------------------------------------

    def run(self, script: Sequence["Step"]) -> None:
        """Mount, make all steps, unmount; end early if the filesystem failed for good (C8)."""
        self.open()
        if self.filesystem is None:
            self.open()  # once more, as its user would
        if self.filesystem is None:
            return
        for step in [*script, close]:
            if self.filesystem.store.failed is not None:
                return
            try:
                step(self)
            except CowfsError as error:
                assert error.errno == errno.EIO, str(error)
                self.failures += 1
            if self.filesystem is None:
                return

    def open(self) -> None:
        """Mount; the model becomes that of the generation that was mounted."""
        self.filesystem = None
        try:
            filesystem = open_filesystem(self.device, writable=True, cache_bytes=self.cache_bytes)
        except CowfsError as error:
            assert error.errno == errno.EIO
            self.failures += 1
            return
        generation = filesystem.store.superblock.generation
        if self.states:
            assert generation >= self.acknowledged, "an acknowledged commit is gone (C1)"
            self.model = self.states[generation].copy()
        else:
            self.states[generation] = self.model.copy()
        self.acknowledged = generation
        self.filesystem = filesystem

    @property
    def opened(self) -> Filesystem:
        assert self.filesystem is not None
        return self.filesystem

    @property
    def volume(self) -> Volume:
        return self.opened.live

    @property
    def files(self) -> ReferenceFiles:
        return self.model.live

    def both(self, real: Callable[[], object], model: Callable[[], object]) -> None:
        """Do the same to both; an error of the one must be the same error of the other.

        Raises:
            DeviceError: the device failed below the filesystem; the model is unchanged.
        """
        try:
            real()
        except (DeviceError, NoSpaceError):
            raise
        except OSError as error:
            try:
                model()
            except OSError as expected:
                assert error.errno == expected.errno, f"{error!r} instead of {expected!r}"
                return
            raise AssertionError(f"refused with {error!r} what the model does") from error
        model()

    def commit(
        self, checked: Checked | None = None, model: Callable[..., None] | None = None
    ) -> None:
        """Commit, with an edit if given; the model records its state under the new generation."""
        filesystem = self.opened
        commit = filesystem.freeze(checked)
        if model is not None and checked is not None:
            model(checked.result[0] if checked.edit.returns_one else checked.result)
        self.states[commit.generation] = self.model.copy()
        commit.write()
        filesystem.finish(commit)
        self.acknowledged = commit.generation

    def edit(self, edit: Edit, model: Callable[..., None]) -> None:
        self.commit(self.opened.check(edit), model)

    # --- judging ----------------------------------------------------------------------------------

    def require_failed_for_good(self) -> None:
        """C8: after a failed write or flush every change is EIO, and nothing looks durable."""
        filesystem = self.opened
        assert filesystem.store.failed is not None, "a failed write was not the end (C8)"
        volume = filesystem.live
        for change in (
            lambda: volume.create(ROOT, b"late", REG, 0, 0),
            lambda: volume.unlink(ROOT, b"inline"),
            lambda: volume.setattr(ROOT, Changes(mode=0o700)),
            lambda: volume.setxattr(ROOT, b"user.late", b""),
            lambda: volume.rename(ROOT, b"inline", ROOT, b"late"),
            filesystem.commit,
            lambda: filesystem.apply(CreateSnapshot("late")),
            lambda: filesystem.freeze(),
        ):
            try:
                change()
            except DeviceError as error:
                assert error.errno == errno.EIO
            else:
                raise AssertionError("something changed after a failed commit (C8)")

    def require_whole(self) -> None:
        """Fail unless the volume in memory equals the model: a failed operation left nothing."""
        compare(self.volume, self.files)

    def end(self, disk: MemoryDevice) -> None:
        """Fail unless `disk`, after a power cut or a stop, holds a legal history and is clean."""
        judged = Workload(disk, self.model, 1 << 24, None, self.states, self.acknowledged)
        judged.open()
        assert judged.filesystem is not None, "the image does not mount afterwards (C1)"
        compare_all(judged.filesystem, judged.model)
        report = check_image(disk)
        assert report.clean, "\n".join(map(str, report.findings[:20]))


def compare_all(filesystem: Filesystem, model: ReferenceHistory) -> None:
    """Fail unless the live volume and every snapshot equal the model's."""
    compare(filesystem.live, model.live)
    records = {record.name: record for record in filesystem.catalog.snapshots()}
    assert records.keys() == model.snapshots.keys()
    for name, files in model.snapshots.items():
        volume = filesystem.volume(records[name].root_id)
        assert volume is not None
        compare(volume, files)


def close(work: Workload) -> None:
    """Unmount cleanly."""
    filesystem = work.opened
    work.states[filesystem.store.generation] = work.model.copy()
    filesystem.close()
    work.acknowledged = filesystem.store.superblock.generation
    work.filesystem = None


# --- steps ----------------------------------------------------------------------------------------

Step = Callable[[Workload], None]


def find(work: Workload, path: bytes) -> int:
    """The inode number of a path in the model; 0 when a failure left it out."""
    ino = ROOT
    for name in path.split(b"/"):
        ino = work.files.files[ino].names.get(name, 0)
        if not ino:
            return 0
    return ino


def _split(work: Workload, path: bytes) -> tuple[int, bytes]:
    directory, _, name = path.rpartition(b"/")
    return (find(work, directory) if directory else ROOT), name


def create(path: bytes, mode: int = REG, target: bytes = b"") -> Step:
    def step(work: Workload) -> None:
        directory, name = _split(work, path)
        made = []

        def real() -> None:
            if target:
                inode = work.volume.symlink(directory, name, target, 0, 0)
            else:
                inode = work.volume.create(directory, name, mode, 0, 0)
            made.append(inode.ino)

        kind = stat.S_IFLNK | 0o777 if target else mode
        if directory:
            work.both(
                real,
                lambda: work.files.create(
                    directory, name, kind, 0, 0, made[0] if made else 0, 0, target
                ),
            )

    return step


def write(path: bytes, offset: int, size: int) -> Step:
    data = content(size, size + offset)

    def step(work: Workload) -> None:
        if ino := find(work, path):
            work.both(
                lambda: work.volume.write(ino, offset, data),
                lambda: work.files.write(ino, offset, data),
            )

    return step


def truncate(path: bytes, size: int) -> Step:
    def step(work: Workload) -> None:
        if ino := find(work, path):
            work.both(
                lambda: work.volume.setattr(ino, Changes(size_bytes=size)),
                lambda: work.files.truncate(ino, size),
            )

    return step


def allocate(path: bytes, mode: int, offset: int, size: int) -> Step:
    def step(work: Workload) -> None:
        if ino := find(work, path):
            work.both(
                lambda: work.volume.allocate(ino, mode, offset, size),
                lambda: work.files.allocate(ino, mode, offset, size),
            )

    return step


def share(source: bytes, path: bytes, begin: int, offset: int, size: int) -> Step:
    """Reflink; both files exist, blocks are whole, and `size` lies within the source."""

    def step(work: Workload) -> None:
        from_ino, ino = find(work, source), find(work, path)
        if from_ino and ino:
            work.both(
                lambda: work.volume.reflink(work.volume, from_ino, begin, ino, offset, size),
                lambda: work.files.share(work.files.file(from_ino), begin, ino, offset, size),
            )

    return step


def create_unnamed(size: int, path: bytes = b"") -> Step:
    """Make a file without a name, and link it at `path` if given."""
    data = content(size, size)

    def step(work: Workload) -> None:
        made: list[int] = []

        def real() -> None:
            made.append(work.volume.create_unnamed(ROOT, 0o600, 0, 0).ino)

        def model() -> None:
            work.files.create_unnamed(ROOT, 0o600, 0, 0, made[0] if made else 0)

        work.both(real, model)
        if not made or made[0] not in work.files.files:
            return
        ino = made[0]
        work.both(lambda: work.volume.write(ino, 0, data), lambda: work.files.write(ino, 0, data))
        if path:
            directory, name = _split(work, path)
            work.both(
                lambda: work.volume.link(ino, directory, name),
                lambda: work.files.link(ino, directory, name),
            )

    return step


def chmod(path: bytes, mode: int) -> Step:
    def step(work: Workload) -> None:
        def model() -> None:
            file = work.files.file(ino)
            file.mode = stat.S_IFMT(file.mode) | mode

        if ino := find(work, path):
            work.both(lambda: work.volume.setattr(ino, Changes(mode=mode)), model)

    return step


def setxattr(path: bytes, name: bytes, size: int) -> Step:
    value = content(size, size)

    def step(work: Workload) -> None:
        if ino := find(work, path):
            work.both(
                lambda: work.volume.setxattr(ino, name, value),
                lambda: work.files.file(ino).xattrs.update({name: value}),
            )

    return step


def removexattr(path: bytes, name: bytes) -> Step:
    def step(work: Workload) -> None:
        def model() -> None:
            if work.files.file(ino).xattrs.pop(name, None) is None:
                raise OSError(errno.ENODATA, "")

        if ino := find(work, path):
            work.both(lambda: work.volume.removexattr(ino, name), model)

    return step


def link(path: bytes, to: bytes) -> Step:
    def step(work: Workload) -> None:
        ino, (directory, name) = find(work, path), _split(work, to)
        if ino and directory:
            work.both(
                lambda: work.volume.link(ino, directory, name),
                lambda: work.files.link(ino, directory, name),
            )

    return step


def rename(path: bytes, to: bytes, flags: int = 0) -> Step:
    def step(work: Workload) -> None:
        (old_directory, old_name), (directory, name) = _split(work, path), _split(work, to)
        if old_directory and directory:
            whiteout = work.volume.inodes.next_ino
            work.both(
                lambda: work.volume.rename(old_directory, old_name, directory, name, flags),
                lambda: work.files.rename(
                    old_directory, old_name, directory, name, flags, whiteout
                ),
            )

    return step


def unlink(path: bytes) -> Step:
    """Remove a name; a file that is open stays."""

    def step(work: Workload) -> None:
        directory, name = _split(work, path)
        if directory:
            work.both(
                lambda: work.volume.unlink(directory, name),
                lambda: work.files.unlink(directory, name),
            )

    return step


def rmdir(path: bytes) -> Step:
    def step(work: Workload) -> None:
        directory, name = _split(work, path)
        if directory:
            work.both(
                lambda: work.volume.rmdir(directory, name),
                lambda: work.files.rmdir(directory, name),
            )

    return step


def reclaim(work: Workload) -> None:
    # An orphan mark that could not be read on mounting waits for the next mount.
    for ino in sorted(work.files.orphans & work.volume.orphans):
        while not work.volume.reclaim(ino):
            pass
        work.files.reclaim(ino)


def read_all(work: Workload) -> None:
    compare(work.volume, work.files)


def commit(work: Workload) -> None:
    work.commit()


def snapshot(name: str) -> Step:
    def step(work: Workload) -> None:
        def model(_record: object) -> None:
            work.model.snapshots[name] = work.files.copy()

        if name not in work.model.snapshots:
            work.edit(CreateSnapshot(name, "text"), model)

    return step


def rename_snapshot(old: str, new: str) -> Step:
    def step(work: Workload) -> None:
        def model(_record: object) -> None:
            work.model.snapshots[new] = work.model.snapshots.pop(old)

        if old in work.model.snapshots and new not in work.model.snapshots:
            work.edit(RenameSnapshot(old, new), model)

    return step


def delete_snapshots(*names: str) -> Step:
    def step(work: Workload) -> None:
        there = [name for name in names if name in work.model.snapshots]

        def model(_records: object) -> None:
            for name in there:
                del work.model.snapshots[name]
                work.model.undo = None if work.model.undo == name else work.model.undo

        if there:
            work.edit(DeleteSnapshots(tuple(there)), model)

    return step


def _switched(work: Workload, target: ReferenceFiles, kept: str) -> None:
    work.model.snapshots[kept] = work.files
    work.model.live = target.copy()
    work.model.undo = kept


def rollback(name: str) -> Step:
    def step(work: Workload) -> None:
        if name in work.model.snapshots:
            work.edit(
                Rollback(name),
                lambda kept: _switched(work, work.model.snapshots[name], kept.name),
            )

    return step


def undo(work: Workload) -> None:
    def model(kept: object) -> None:
        assert work.model.undo is not None
        target = work.model.snapshots.pop(work.model.undo)
        _switched(work, target, kept.name)  # type: ignore[attr-defined]

    if work.model.undo is not None:
        work.edit(Undo(), model)


def drop_some(work: Workload) -> None:
    work.opened.drops.step(3)


def drop_all(work: Workload) -> None:
    """Drop everything; a drop that is stuck keeps its blocks, and the others go on."""
    while work.opened.drops.working:
        work.opened.drops.step(64)
    work.commit()


BASE: list[Step] = [
    create(b"inline"),
    write(b"inline", 0, 900),
    create(b"large"),
    write(b"large", 0, 300_000),
    write(b"large", 1_000_000, 9000),
    create(b"dir", DIRECTORY),
    *[create(b"dir/%03d" % number + NAME) for number in range(150)],
    create(b"attributes"),
    setxattr(b"attributes", b"user.large", 30_000),
    snapshot("old"),
    write(b"large", 50_000, 20_000),
    *[unlink(b"dir/%03d" % number + NAME) for number in range(0, 150, 9)],
    reclaim,
    snapshot("second"),
    create(b"open"),
    write(b"open", 0, 70_000),
]

# Each part begins with the image that the parts before it left, and ends by unmounting.
PARTS: list[list[Step]] = [
    [
        create(b"dir/new"),
        write(b"dir/new", 0, 10_000),
        write(b"large", 4000, 9000),
        write(b"inline", 100, 200),
        create(b"sub", DIRECTORY),
        create(b"sub/link", target=b"t" * 200),
        link(b"inline", b"sub/hard"),
        commit,
        unlink(b"dir/010" + NAME),
        reclaim,
    ],
    [
        rename(b"dir/001" + NAME, b"sub/moved"),
        rename(b"dir/002" + NAME, b"dir/003" + NAME),
        rename(b"dir/004" + NAME, b"dir/new", RENAME_EXCHANGE),
        rename(b"inline", b"large", RENAME_NOREPLACE),
        rename(b"sub", b"dir/sub"),
        rename(b"dir/005" + NAME, b"dir/006" + NAME, RENAME_WHITEOUT),
        unlink(b"open"),
        reclaim,
    ],
    [
        truncate(b"large", 40_001),
        setxattr(b"attributes", b"user.small", 10),
        snapshot("new"),
        setxattr(b"attributes", b"user.large", 5000),
        removexattr(b"attributes", b"user.large"),
        chmod(b"dir", 0o700),
    ],
    [
        write(b"inline", 0, 5000),
        truncate(b"inline", 100),
        truncate(b"large", 200_000),
        rename_snapshot("old", "oldest"),
        unlink(b"attributes"),
        reclaim,
        unlink(b"dir/sub/link"),
        rename(b"dir/sub/moved", b"moved"),
        unlink(b"dir/sub/hard"),
        rmdir(b"dir/sub"),
        read_all,
    ],
    [
        share(b"large", b"open", 0, 8192, 40 * 4096),
        allocate(b"large", PUNCH_HOLE | KEEP_SIZE, 10_000, 100_000),
        commit,
        share(b"open", b"large", 4096, 4096, 8 * 4096),
        allocate(b"open", ZERO_RANGE, 3000, 200_000),
        create_unnamed(30_000, b"named"),
        create_unnamed(20_000),
        commit,
        allocate(b"named", 0, 0, 100_000),
        reclaim,
    ],
    [
        rollback("second"),
        write(b"large", 0, 5000),
        create(b"after"),
        commit,
        undo,
    ],
    [
        delete_snapshots("oldest", "second"),
        drop_some,
        unlink(b"large"),
        reclaim,
        commit,
        drop_all,
    ],
    [
        truncate(b"inline", 0),
        delete_snapshots("new"),
        drop_all,
    ],
]


def make_bases(*, copies: bool) -> list[Base]:
    """The images that the parts begin with, each with a history."""
    disk = MemoryDevice(4096)
    make_filesystem(disk, duplicate_metadata=copies)
    bases = []
    model = ReferenceHistory()
    for part in [BASE, *PARTS]:
        work = Workload(disk, model)
        work.run(part)
        assert not work.failures
        assert work.filesystem is None, "the run did not end by unmounting"
        disk, model = disk.copy(), work.model
        bases.append(Base(disk.copy(), model.copy()))
    return bases[:-1]


def crash_seeds(number: int) -> list[random.Random | None]:
    """Choices of the unflushed blocks that a power cut keeps: none of them, and random ones."""
    return [None, random.Random(number)]
