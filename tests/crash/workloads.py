"""Workloads: short histories of operations, as text, so that a failure can be repeated by hand.

Each operation is one line of `Session.perform`: it is done to an open filesystem and to the model,
and marked in the device's log. A workload is a base image (`bases.py`) and a list of operations. As
ACE does (Mohan et al., OSDI 2018): every single operation, and every pair of them, on few files in
few directories, with every way to make it durable; here with snapshots, rollback, undo and the drop
queue among the operations.
"""

import errno
import random
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cowfs.errors import SnapshotError
from cowfs.files.calls import Changes
from cowfs.files.content import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE
from cowfs.files.namespace import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT
from cowfs.files.volume import Volume
from cowfs.history.edits import (
    CreateSnapshot,
    DeleteSnapshots,
    Edit,
    HoldSnapshots,
    RenameSnapshot,
    Rollback,
    Undo,
)
from cowfs.history.filesystem import Checked, Filesystem
from cowfs.history.images import open_filesystem
from cowfs.storage.commit import Commit
from cowfs.storage.discards import Sweep
from tests.crash.oracle import Picture, picture_of_model
from tests.crash.recording import RecordingDevice
from tests.model.reference import ROOT, ReferenceFile, ReferenceFiles, ReferenceHistory

CACHE_BYTES = 1 << 20

# One of each operation; the names are those of the base images.
FILE_OPERATIONS = (
    "create A/new",
    "create new",
    "mkdir A/dir",
    "fifo B/pipe",
    "symlink A/link some/where",
    "link A/foo B/hard",
    "link B/bar A/hard",
    "unlink A/foo",
    "unlink B/bar",
    "unlink A/inline",
    "unlink A/sparse",
    "unlink-open A/foo",
    "forget",
    "rmdir A/empty",
    "rename A/foo A/moved",
    "rename A/foo B/bar",
    "rename B/bar A/foo",
    "rename A/sub B/sub",
    "rename A/sub B/empty",
    "rename-noreplace A/foo B/moved",
    "rename-exchange A/foo B/bar",
    "rename-exchange A/sub B/bar",
    "rename-whiteout A/foo B/moved",
    "rename-whiteout A/sub B/empty",
    "write A/foo 0 100",
    "write A/foo 4096 9000",
    "write A/inline 0 1000",
    "write A/inline 1500 4000",
    "write B/bar 30000 5000",
    "write A/sparse 50000 4096",
    "punch A/foo 4096 8192",
    "punch A/inline 0 100",
    "punch B/bar 100 20000",
    "zero A/sparse 50000 9000",
    "zero A/foo 1000 50000",
    "allocate A/inline 0 9000",
    "share B/bar A/foo 4096 16384",
    "share A/foo A/copy 0 100000",
    "share-kept old A/foo B/bar 4096 8192",
    "unnamed A/named 9000 keep",
    "unnamed A/named 9000 forget",
    "truncate A/foo 0",
    "truncate A/foo 5000",
    "truncate A/inline 3000",
    "truncate A/sparse 1000",
    "setxattr A/foo user.new 300",
    "setxattr B/bar user.big 5000",
    "removexattr A/foo user.old",
    "chmod A/foo 600",
    "chmod A 700",
    "chown B/bar 7",
    "utimens A/foo 1234567890123456789",
)
HISTORY_OPERATIONS = (
    "snapshot new",
    "delete old",
    "delete middle",
    "delete old,middle",
    "rename-snapshot old other",
    "hold old",
    "rollback old",
    "rollback middle",
    "undo",
    "drop 2",
    "drop-all",
    "remount",
)
OPERATIONS = FILE_OPERATIONS + HISTORY_OPERATIONS

# The ways to make operations durable: fsync after each (a record of the log), one fsync at the end,
# a commit after each, a commit that is written while the next operation runs, or no commit before
# the clean end.
MODES = ("each", "commit", "last", "overlap", "none")


@dataclass(frozen=True, slots=True)
class Workload:
    """A base image and what is done to it."""

    base: str
    operations: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.base}: {'; '.join(self.operations)}"


def parse(text: str) -> Workload:
    """The workload of a text that `str` made."""
    base, _, operations = text.partition(":")
    return Workload(base.strip(), tuple(part.strip() for part in operations.split(";")))


def with_mode(base: str, operations: Sequence[str], mode: str) -> Workload:
    """A workload of these operations, made durable in that way."""
    parts: list[str] = []
    for number, operation in enumerate(operations):
        parts.append(operation)
        if mode == "each":
            parts.append("fsync")
        elif mode == "commit":
            parts.append("commit")
        elif mode == "overlap":
            parts += ["land", "freeze"] if number else ["freeze"]
    if mode == "last":
        parts.append("fsync")
    return Workload(base, (*parts, "end"))


def single_operations(seed: int, bases: Sequence[str]) -> Iterator[Workload]:
    """Every operation alone, on one base after the other; the seed chooses the mode."""
    mode = MODES[seed % len(MODES)]
    for number, operation in enumerate(OPERATIONS):
        yield with_mode(bases[number % len(bases)], [operation], mode)


def pairs(seed: int, bases: Sequence[str]) -> Iterator[Workload]:
    """All pairs of operations, in an order chosen by the seed; base and mode rotate."""
    choice = random.Random(seed)
    both = [(first, second) for first in OPERATIONS for second in OPERATIONS]
    choice.shuffle(both)
    for number, pair in enumerate(both):
        base = bases[number % len(bases)]
        yield with_mode(base, pair, MODES[number // len(bases) % len(MODES)])


def walks(seed: int, bases: Sequence[str], steps: int = 30) -> Iterator[Workload]:
    """Long random histories, without end."""
    number = 0
    while True:
        choice = random.Random(seed << 20 | number)
        yield Workload(
            bases[number % len(bases)],
            (*[_random_operation(choice) for _ in range(steps)], "end"),
        )
        number += 1


def _random_operation(choice: random.Random) -> str:
    kind = choice.random()
    if kind < 0.12:
        return choice.choice(["fsync", "fsync", "fsync", "commit", "freeze", "land"])
    if kind < 0.25:
        snapshots = ("old", "middle", "new", "other")
        return choice.choice(
            [
                f"snapshot {choice.choice(snapshots)}",
                f"snapshot {choice.choice(snapshots)}",
                f"delete {choice.choice(snapshots)}",
                f"rollback {choice.choice(snapshots)}",
                "undo",
                f"drop {choice.randrange(1, 4)}",
                "drop-all",
                "remount",
                "crash",
            ]
        )
    directories = ("", "A/", "B/", "A/sub/", "B/sub/")
    files = ("foo", "bar", "inline", "sparse", "new", "moved", "hard", "f1", "f2")

    def path() -> str:
        return choice.choice(directories) + choice.choice(files)

    offset = choice.choice([0, 1, 2000, 4096, 8192, choice.randrange(40_000)])
    size = choice.choice([1, 100, 2048, 4096, 10_000, choice.randrange(1, 30_000)])
    return choice.choice(
        [
            f"create {path()}",
            f"mkdir {path()}",
            f"link {path()} {path()}",
            f"unlink {path()}",
            f"unlink-open {path()}",
            "forget",
            f"rename {path()} {path()}",
            f"rename {choice.choice(['A/sub', 'B/sub'])} {choice.choice(['A/sub', 'B/sub'])}",
            f"rename-exchange {path()} {path()}",
            f"write {path()} {offset} {size}",
            f"write {path()} {offset} {size}",
            f"write {path()} {offset} {size}",
            f"truncate {path()} {offset}",
            f"punch {path()} {offset} {size}",
            f"zero {path()} {offset} {size}",
            f"share {path()} {path()} {offset // 4096 * 4096} {size}",
            f"share-kept old {path()} {path()} {offset // 4096 * 4096} {size}",
            f"unnamed {path()} {size} {choice.choice(['keep', 'forget'])}",
            f"setxattr {path()} user.{choice.choice('ab')} {size}",
            f"chmod {path()} {choice.choice(['600', '755', '4711'])}",
            choice.choice(OPERATIONS),
        ]
    )


def content(size: int, seed: int) -> bytes:
    """Bytes that show where they belong; never all zero."""
    return random.Random(seed).randbytes(size)


class Session:
    """A filesystem on a recording device beside its model.

    Args:
        device: a device with an image.
        history: the model of that image; the session changes it.

    Attributes:
        pictures: the expected picture after each operation, by its number; 0 is the beginning.
    """

    def __init__(self, device: RecordingDevice, history: ReferenceHistory) -> None:
        self.device = device
        self.model = history
        self.number = 0
        self.durable = 0
        self._inflight: tuple[Commit, int] | None = None
        self.pictures: list[Picture] = [picture_of_model(history)]
        self._committed: dict[int, ReferenceHistory] = {}  # models by generation, for `crash`
        self.filesystem = self._mount()
        self._operations: dict[str, Callable[..., bool | None]] = {
            name.removeprefix("_do_").replace("_", "-"): getattr(self, name)
            for name in dir(self)
            if name.startswith("_do_")
        }

    @property
    def files(self) -> ReferenceFiles:
        return self.model.live

    def run(self, operations: Sequence[str]) -> None:
        for operation in operations:
            self.perform(operation)

    def perform(self, operation: str) -> None:
        """Do one operation; the log records when it was started and when it was durable."""
        word, *arguments = operation.split(" ")
        self.number += 1
        self.device.mark("started", self.number)
        lasting = self._operations[word](*arguments)
        self.pictures.append(picture_of_model(self.model))
        if lasting:
            self._acknowledge(self.number)

    def _acknowledge(self, number: int) -> None:
        self.device.mark("durable", number)
        self.durable = number

    # --- mounting and commits ---------------------------------------------------------------------

    def _mount(self) -> Filesystem:
        """Mount as the daemon does: one commit, then reclaim the orphans of the last mount."""
        filesystem = mount(self.device)
        for ino in list(self.files.orphans):
            self.files.reclaim(ino)
        freeze = filesystem.freeze

        def remembered(checked: Checked | None = None, *, clean: bool = False) -> Commit:
            commit = freeze(checked, clean=clean)
            self._committed[commit.generation] = self.model.copy()
            return commit

        filesystem.freeze = remembered  # type: ignore[method-assign]
        self._committed[filesystem.store.superblock.generation] = self.model.copy()
        return filesystem

    def _land(self) -> None:
        """Write the commit that is in flight."""
        if self._inflight is not None:
            commit, number = self._inflight
            self._inflight = None
            commit.write()
            self.filesystem.finish(commit)
            self._acknowledge(number)
            self._discard()

    def _discard(self) -> None:
        """Discard freed blocks, as a daemon does somewhat later."""
        Sweep.of_released(self.filesystem.store).run()

    def _do_freeze(self) -> None:
        self._land()
        self._inflight = (self.filesystem.freeze(), self.number - 1)

    def _do_land(self) -> None:
        self._land()

    def _do_fsync(self) -> bool:
        """Sync by a record of the log, where that is possible."""
        self._land()
        self.filesystem.sync()
        self._committed[self.filesystem.store.superblock.generation] = self.model.copy()
        self._discard()
        return True

    def _do_commit(self) -> bool:
        self._land()
        if self.filesystem.changed:
            self.filesystem.commit()
        self._discard()
        return True

    def _do_end(self) -> bool:
        self._land()
        self.filesystem.close()
        return True

    def _do_remount(self) -> bool:
        self._land()
        self.filesystem.close()
        self.filesystem = self._mount()
        return True

    def _do_crash(self) -> None:
        """Kill the program and start it again; the machine runs on, so no write is lost."""
        self._inflight = None
        self.model = self._committed[self.filesystem.store.superblock.generation].copy()
        self.filesystem = self._mount()

    # --- history ----------------------------------------------------------------------------------

    def _edit(self, edit: Edit, model: Callable[..., None]) -> bool:
        self._land()
        try:
            records = self.filesystem.apply(edit)
        except SnapshotError:
            return False
        model(records[0] if edit.returns_one else records)
        generation = self.filesystem.store.superblock.generation
        self._committed[generation] = self.model.copy()
        return True

    def _do_snapshot(self, name: str) -> bool:
        def model(_record: object) -> None:
            self.model.snapshots[name] = self.files.copy()

        return self._edit(CreateSnapshot(name), model)

    def _do_delete(self, names: str) -> bool:
        def model(_records: object) -> None:
            for name in names.split(","):
                del self.model.snapshots[name]
                if self.model.undo == name:
                    self.model.undo = None

        return self._edit(DeleteSnapshots(tuple(names.split(","))), model)

    def _do_rename_snapshot(self, old: str, new: str) -> bool:
        return self._edit(
            RenameSnapshot(old, new),
            lambda _record: self.model.rename_snapshot(old, new),
        )

    def _do_hold(self, name: str) -> bool:
        return self._edit(
            HoldSnapshots((name,), True),
            lambda _records: self.model.held.add(name),
        )

    def _do_release(self, name: str) -> bool:
        return self._edit(
            HoldSnapshots((name,), False),
            lambda _records: self.model.held.discard(name),
        )

    def _replace_live(self, kept_name: str, target: ReferenceFiles) -> None:
        self.model.snapshots[kept_name] = self.files
        self.model.live = target.copy()
        self.model.undo = kept_name

    def _do_rollback(self, name: str) -> bool:
        return self._edit(
            Rollback(name),
            lambda kept: self._replace_live(kept.name, self.model.snapshots[name]),
        )

    def _do_undo(self) -> bool:
        def model(kept: object) -> None:
            assert self.model.undo is not None
            target = self.model.snapshots.pop(self.model.undo)
            self._replace_live(kept.name, target)  # type: ignore[attr-defined]

        return self._edit(Undo(), model)

    def _do_drop(self, nodes: str) -> None:
        self.filesystem.drops.step(int(nodes))

    def _do_drop_all(self) -> bool:
        self._land()
        self.filesystem.work_drops()
        if self.filesystem.changed:
            self.filesystem.commit()
        return True

    # --- files ------------------------------------------------------------------------------------

    def _place(self, path: str) -> tuple[int, bytes]:
        """The directory's inode number and the name; FileNotFoundError, NotADirectoryError."""
        *parents, name = path.encode().split(b"/")
        ino = ROOT
        for parent in parents:
            ino = self.files.named(ino, parent).ino
        self.files.directory(ino)
        return ino, name

    def _file(self, path: str) -> ReferenceFile:
        if not path:
            return self.files.files[ROOT]
        return self.files.named(*self._place(path))

    def _both(
        self, make: Callable[[], tuple[Callable[[], object], Callable[..., object]]]
    ) -> object:
        """Do an operation on both, or see both refuse it; nothing if `make` finds no file."""
        try:
            real, model = make()
        except OSError:
            return None
        try:
            answer = real()
        except OSError as error:
            try:
                model(None)
            except OSError as expected:
                assert error.errno == expected.errno, f"{error!r} instead of {expected!r}"
                return None
            raise
        model(answer)
        return answer

    def _create(self, path: str, mode: int) -> None:
        def make():  # type: ignore[no-untyped-def]
            place = self._place(path)
            return (
                lambda: self.filesystem.live.create(*place, mode, 1, 2),
                lambda made: self.files.create(*place, mode, 1, 2, made.ino if made else 0),
            )

        self._both(make)

    def _do_create(self, path: str) -> None:
        self._create(path, stat.S_IFREG | 0o644)

    def _do_mkdir(self, path: str) -> None:
        self._create(path, stat.S_IFDIR | 0o755)

    def _do_fifo(self, path: str) -> None:
        self._create(path, stat.S_IFIFO | 0o600)

    def _do_symlink(self, path: str, target: str) -> None:
        def make():  # type: ignore[no-untyped-def]
            place, mode, to = self._place(path), stat.S_IFLNK | 0o777, target.encode()
            return (
                lambda: self.filesystem.live.symlink(*place, to, 1, 2),
                lambda made: self.files.create(
                    *place, mode, 1, 2, made.ino if made else 0, target=to
                ),
            )

        self._both(make)

    def _do_link(self, old: str, new: str) -> None:
        def make():  # type: ignore[no-untyped-def]
            ino, place = self._file(old).ino, self._place(new)
            return (
                lambda: self.filesystem.live.link(ino, *place),
                lambda _: self.files.link(ino, *place),
            )

        self._both(make)

    def _remove(self, path: str, kind: str) -> None:
        def make():  # type: ignore[no-untyped-def]
            place = self._place(path)
            return (
                lambda: getattr(self.filesystem.live, kind)(*place),
                lambda _: getattr(self.files, kind)(*place),
            )

        self._both(make)

    def _do_unlink_open(self, path: str) -> None:
        """Unlink a file that stays open, so it is an orphan until `forget`."""
        self._remove(path, "unlink")

    def _do_unlink(self, path: str) -> None:
        self._remove(path, "unlink")
        self._do_forget()

    def _do_rmdir(self, path: str) -> None:
        self._remove(path, "rmdir")
        self._do_forget()

    def _do_forget(self) -> None:
        """Close all unlinked files."""
        self.filesystem.reclaim_orphans()
        for ino in list(self.files.orphans):
            self.files.reclaim(ino)

    def _do_rename(self, old: str, new: str, flags: int = 0) -> None:
        def make():  # type: ignore[no-untyped-def]
            places = (*self._place(old), *self._place(new), flags)
            whiteout = self.filesystem.live.inodes.next_ino
            return (
                lambda: self.filesystem.live.rename(*places),
                lambda _: self.files.rename(*places, whiteout),
            )

        self._both(make)
        self._do_forget()

    def _do_rename_noreplace(self, old: str, new: str) -> None:
        self._do_rename(old, new, RENAME_NOREPLACE)

    def _do_rename_exchange(self, old: str, new: str) -> None:
        self._do_rename(old, new, RENAME_EXCHANGE)

    def _do_rename_whiteout(self, old: str, new: str) -> None:
        self._do_rename(old, new, RENAME_WHITEOUT)

    def _do_write(self, path: str, offset: str, size: str) -> None:
        def make():  # type: ignore[no-untyped-def]
            ino, at = self._file(path).ino, int(offset)
            data = content(int(size), self.number)
            return (
                lambda: self.filesystem.live.write(ino, at, data),
                lambda _: self.files.write(ino, at, data),
            )

        self._both(make)

    def _allocate(self, path: str, mode: int, offset: str, size: str) -> None:
        def make():  # type: ignore[no-untyped-def]
            ino, at, length = self._file(path).ino, int(offset), int(size)
            return (
                lambda: self.filesystem.live.allocate(ino, mode, at, length),
                lambda _: self.files.allocate(ino, mode, at, length),
            )

        self._both(make)

    def _do_punch(self, path: str, offset: str, size: str) -> None:
        self._allocate(path, PUNCH_HOLE | KEEP_SIZE, offset, size)

    def _do_zero(self, path: str, offset: str, size: str) -> None:
        self._allocate(path, ZERO_RANGE, offset, size)

    def _do_allocate(self, path: str, offset: str, size: str) -> None:
        self._allocate(path, 0, offset, size)

    def _do_share(self, source: str, path: str, offset: str, size: str) -> None:
        """Reflink the beginning of one file into another, which is made if it does not exist."""
        try:
            file = self._file(source)
        except OSError:
            return
        self._share(self.filesystem.live, file, path, int(offset), int(size))

    def _do_share_kept(self, name: str, source: str, path: str, offset: str, size: str) -> None:
        """The same from a file of a snapshot."""
        record = self.filesystem.catalog.find(name)
        kept = self.model.snapshots.get(name)
        volume = None if record is None else self.filesystem.volume(record.root_id)
        if kept is None or volume is None:
            return
        try:
            ino = ROOT
            for part in source.encode().split(b"/"):
                ino = kept.named(ino, part).ino
        except OSError:
            return
        self._share(volume, kept.file(ino), path, int(offset), int(size))

    def _share(
        self, volume: Volume, source: ReferenceFile, path: str, offset: int, size: int
    ) -> None:
        self._do_create(path)
        try:
            ino = self._file(path).ino
            live = self.filesystem.live
            shared = live.reflink(volume, source.ino, 0, ino, offset, size)
        except OSError as error:
            assert error.errno in (
                errno.EXDEV,
                errno.EINVAL,
                errno.EISDIR,
                errno.ENOENT,
                errno.ENOTDIR,
            )
            return
        self.files.share(source, 0, ino, offset, shared)

    def _do_unnamed(self, path: str, size: str, then: str) -> None:
        """Make a file with O_TMPFILE and data; then link it under a name, or close it."""
        made: list[int] = []

        def make():  # type: ignore[no-untyped-def]
            directory, _ = self._place(path)
            return (
                lambda: self.filesystem.live.create_unnamed(directory, 0o644, 1, 2),
                lambda inode: (
                    made.append(inode.ino if inode else 0)
                    or self.files.create_unnamed(directory, 0o644, 1, 2, made[-1])
                ),
            )

        self._both(make)
        if not made or not made[-1]:
            return
        ino, data = made[-1], content(int(size), self.number)
        self.filesystem.live.write(ino, 0, data)
        self.files.write(ino, 0, data)
        if then == "keep":

            def name():  # type: ignore[no-untyped-def]
                place = self._place(path)
                return (
                    lambda: self.filesystem.live.link(ino, *place),
                    lambda _: self.files.link(ino, *place),
                )

            self._both(name)

    def _do_truncate(self, path: str, size: str) -> None:
        def make():  # type: ignore[no-untyped-def]
            ino = self._file(path).ino
            return (
                lambda: self.filesystem.live.setattr(ino, Changes(size_bytes=int(size))),
                lambda _: self.files.truncate(ino, int(size)),
            )

        self._both(make)

    def _set(self, path: str, changes: Changes, model: Callable[[ReferenceFile], None]) -> None:
        def make():  # type: ignore[no-untyped-def]
            file = self._file(path)
            return (
                lambda: self.filesystem.live.setattr(file.ino, changes),
                lambda _: model(file),
            )

        self._both(make)

    def _do_chmod(self, path: str, mode: str) -> None:
        bits = int(mode, 8)

        def model(file: ReferenceFile) -> None:
            file.mode = stat.S_IFMT(file.mode) | bits

        self._set(path, Changes(mode=bits), model)

    def _do_chown(self, path: str, uid: str) -> None:
        def model(file: ReferenceFile) -> None:
            file.uid = int(uid)

        self._set(path, Changes(uid=int(uid)), model)

    def _do_utimens(self, path: str, mtime_ns: str) -> None:
        def model(file: ReferenceFile) -> None:
            file.mtime_ns = int(mtime_ns)

        self._set(path, Changes(mtime_ns=int(mtime_ns)), model)

    def _do_setxattr(self, path: str, name: str, size: str) -> None:
        def make():  # type: ignore[no-untyped-def]
            file, value = self._file(path), content(int(size), self.number)
            return (
                lambda: self.filesystem.live.setxattr(file.ino, name.encode(), value),
                lambda _: file.xattrs.update({name.encode(): value}),
            )

        self._both(make)

    def _do_removexattr(self, path: str, name: str) -> None:
        def make():  # type: ignore[no-untyped-def]
            file = self._file(path)
            if name.encode() not in file.xattrs:
                raise FileNotFoundError
            return (
                lambda: self.filesystem.live.removexattr(file.ino, name.encode()),
                lambda _: file.xattrs.pop(name.encode()),
            )

        self._both(make)


def mount(device: RecordingDevice) -> Filesystem:
    """Open an image for writing, with the work that the daemon does before it serves requests."""
    filesystem = open_filesystem(device, writable=True, cache_bytes=CACHE_BYTES)
    filesystem.commit()
    filesystem.reclaim_orphans()
    return filesystem
