"""The state machine of a filesystem: every file operation, commits and crashes, against the model.

`tests/files/test_volume_machine.py` runs it as it is; `tests/history/test_history_machine.py` adds
snapshots. Rules pick existing inodes and names by number, so that nearly every step does something.
After each step names, attributes and contents equal the model's. At the end of each run the image
is checked twice: by the checker, and by the counter of tests/model/recount.py.
"""

import errno
import os
import random
import stat
from collections.abc import Callable

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import cowfs.storage.discards as discards_module
from cowfs.care.check import check_image
from cowfs.errors import CowfsError, DeviceError, NoSpaceError
from cowfs.files.attributes import CAPABILITY_XATTR
from cowfs.files.calls import Changes
from cowfs.files.content import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE
from cowfs.files.namespace import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT
from cowfs.files.volume import Volume
from cowfs.history.images import make_filesystem, open_filesystem
from cowfs.storage.discards import DISCARD_BLOCKS_MIN, Sweep
from tests.model.devices import Fault, FaultDevice, MemoryDevice
from tests.model.recount import recount
from tests.model.reference import (
    BLOCK,
    ROOT,
    ReferenceFile,
    ReferenceFiles,
    ReferenceHistory,
)

# Files up to this size are compared whole; larger files only around what was written.
WHOLE_BYTES_MAX = 1 << 20

NAMES = [
    b"a",
    b"b",
    b"c",
    b"long" * 63,
    b"n" * 255,
    "näme".encode(),
    b"\xff\xfe\x01",
    b"...",
]
picks = st.integers(0, 1 << 16)
names = st.one_of(st.sampled_from(NAMES), st.builds(lambda at: b"f%d" % at, st.integers(0, 30)))
modes = st.integers(0, 0o7777)
offsets = st.one_of(
    st.sampled_from([0, 1, 2047, 2048, 2049, 4095, 4096, 4097, 8192, 100_000, (1 << 20) - 1]),
    st.integers(0, 20_000),
    st.integers(0, 2 << 20),
    st.sampled_from([1 << 32, (1 << 44) + 5]),
)
sizes = st.one_of(
    st.sampled_from([0, 1, 2047, 2048, 2049, 4096, 8192, 131_072]), st.integers(0, 20_000)
)
xattr_names = st.sampled_from([b"user.a", b"user.b", b"user." + b"x" * 250, CAPABILITY_XATTR])
xattr_sizes = st.sampled_from([0, 1, 100, 2047, 2048, 2049, 4096, 10_000, 65_536])


def content(size: int, seed: int) -> bytes:
    """Bytes that show their place in a file; never all zero."""
    return random.Random(seed).randbytes(size)


class FilesMachine(RuleBasedStateMachine):
    """One image with its live volume, and the model's state at every commit."""

    total_blocks_choices = (4096, 8192, 16384)

    def __init__(self) -> None:
        super().__init__()
        self.model = ReferenceHistory()
        self.states: dict[int, ReferenceHistory] = {}  # by the generation that stored it
        self.acknowledged = 0
        self.wait_for_data = True

    @initialize(
        data=st.data(),
        copies=st.booleans(),
        cache_bytes=st.sampled_from([1, 100_000, 1 << 27]),
        discard_min=st.sampled_from([1, DISCARD_BLOCKS_MIN]),
    )
    def make(self, data: st.DataObject, copies: bool, cache_bytes: int, discard_min: int) -> None:
        discards_module.DISCARD_BLOCKS_MIN = discard_min
        total = data.draw(st.sampled_from(self.total_blocks_choices))
        self.cache_bytes = cache_bytes
        self.disk = MemoryDevice(total)
        superblock = make_filesystem(self.disk, label="machine", duplicate_metadata=copies)
        self.states[superblock.generation] = self.model.copy()
        self.open(self.disk)

    # --- opening ----------------------------------------------------------------------------------

    def open(self, disk: MemoryDevice) -> None:
        """Mount the disk's content; the model becomes what that generation held."""
        self.disk = disk
        self.device = FaultDevice(disk)
        recount(disk).require_exact()
        self.filesystem = open_filesystem(self.device, writable=True, cache_bytes=self.cache_bytes)
        generation = self.filesystem.store.superblock.generation
        assert generation >= self.acknowledged, "an acknowledged commit is gone (C1)"
        self.acknowledged = generation
        self.model = self.states[generation].copy()
        self._record_commits()
        assert self.volume.orphans == self.files.orphans

    def _record_commits(self) -> None:
        """Remember the model at every freeze, also when a full image makes one by itself."""
        filesystem = self.filesystem
        freeze = filesystem.freeze

        def recorded(checked=None, *, clean=False):  # type: ignore[no-untyped-def]
            generation = filesystem.store.generation
            commit = freeze(checked, clean=clean)
            self.states[generation] = self.model.copy()
            return commit

        filesystem.freeze = recorded  # type: ignore[method-assign]
        relieve = filesystem.store.admission.relieve
        assert relieve is not None

        def relieved() -> bool:
            self.settle()  # no thread writes a frozen commit here while the store waits for it
            return relieve()

        filesystem.store.admission.relieve = relieved

    @property
    def volume(self) -> Volume:
        return self.filesystem.live

    @property
    def files(self) -> ReferenceFiles:
        return self.model.live

    # --- picking ----------------------------------------------------------------------------------

    def _pick(self, pick: int, wanted: Callable[[ReferenceFile], bool]) -> int:
        found = sorted(ino for ino, file in self.files.files.items() if wanted(file))
        return found[pick % len(found)] if found else ROOT

    def directory(self, pick: int) -> int:
        # One time in sixteen, pick a directory that was removed while it was open.
        alive = bool(pick % 16)
        return self._pick(pick, lambda file: file.is_directory and (not alive or bool(file.nlink)))

    def any_file(self, pick: int) -> int:
        return self._pick(pick, lambda file: True)

    def regular(self, pick: int) -> int:
        return self._pick(pick, lambda file: stat.S_ISREG(file.mode))

    def name_in(self, directory: int, pick: int, fallback: bytes) -> bytes:
        """Pick an existing name, most of the time."""
        there = sorted(self.files.files[directory].names)
        return there[pick // 7 % len(there)] if there and pick % 7 else fallback

    def both(self, real: Callable[[], object], model: Callable[[], object]) -> object | None:
        """Do the same to the volume and the model; both must refuse alike. Returns the real answer.

        A full image may refuse more than the model; the model is then left alone.
        """
        try:
            answer = real()
        except NoSpaceError:
            return None
        except CowfsError:
            raise
        except OSError as error:
            try:
                model()
            except OSError as expected:
                assert error.errno == expected.errno, (
                    f"{errno.errorcode[error.errno or 0]} instead of "
                    f"{errno.errorcode[expected.errno or 0]}"
                )
                return None
            raise AssertionError(f"refused with {error!r} what the model does") from error
        model()
        return answer if answer is not None else True

    # --- operations -------------------------------------------------------------------------------

    @rule(
        at=picks,
        name=names,
        kind=st.sampled_from(
            [stat.S_IFREG, stat.S_IFREG, stat.S_IFDIR, stat.S_IFDIR, stat.S_IFIFO, stat.S_IFCHR]
        ),
        mode=modes,
        owner=st.integers(0, 3),
    )
    def create(self, at: int, name: bytes, kind: int, mode: int, owner: int) -> None:
        directory = self.directory(at)
        rdev = 0x0103 if kind == stat.S_IFCHR else 0
        made = []

        def real() -> object:
            made.append(self.volume.create(directory, name, kind | mode, owner, 7, rdev).ino)
            return made[0]

        def model() -> None:
            ino = made[0] if made else 0
            self.files.create(directory, name, kind | mode, owner, 7, ino, rdev)

        self.both(real, model)

    @rule(at=picks, name=names, size=st.sampled_from([1, 60, 4095]), seed=picks)
    def symlink(self, at: int, name: bytes, size: int, seed: int) -> None:
        directory = self.directory(at)
        target = content(size, seed).replace(b"\0", b"x")
        made = []

        def real() -> object:
            made.append(self.volume.symlink(directory, name, target, 1, 2).ino)
            return made[0]

        def model() -> None:
            ino = made[0] if made else 0
            mode = stat.S_IFLNK | 0o777
            self.files.create(directory, name, mode, 1, 2, ino, target=target)

        self.both(real, model)

    @rule(
        at=picks,
        count=st.integers(1, 120),
        length=st.sampled_from([4, 100, 200]),
        size=st.sampled_from([0, 10, 2048, 5000]),
        seed=st.integers(0, 1000),
    )
    def populate(self, at: int, count: int, length: int, size: int, seed: int) -> None:
        """Make many files at once, so that trees have more than one level."""
        directory = self.directory(at | 1)
        for number in range(count):
            name = (b"p%d-%d-" % (seed, number)).ljust(length, b"p")
            if name in self.files.files[directory].names:
                continue
            try:
                inode = self.volume.create(directory, name, stat.S_IFREG | 0o644, 0, 0)
            except NoSpaceError:
                return
            self.files.create(directory, name, stat.S_IFREG | 0o644, 0, 0, inode.ino)
            if size:
                self._write(inode.ino, 0, content(size, number))

    @rule(at=picks, share=st.sampled_from([1, 2, 3]))
    def depopulate(self, at: int, share: int) -> None:
        directory = self.directory(at | 1)
        for name in sorted(self.files.files[directory].names)[::share]:
            if not self.files.named(directory, name).is_directory:
                self._unlink(directory, name)
        self.reclaim_all()

    @rule(at=picks, to=picks, name=names)
    def link(self, at: int, to: int, name: bytes) -> None:
        ino, directory = self.any_file(at), self.directory(to)
        self.both(
            lambda: self.volume.link(ino, directory, name),
            lambda: self.files.link(ino, directory, name),
        )

    @rule(at=picks, which=picks, name=names)
    def unlink(self, at: int, which: int, name: bytes) -> None:
        directory = self.directory(at)
        self._unlink(directory, self.name_in(directory, which, name))

    def _unlink(self, directory: int, name: bytes) -> None:
        self.both(
            lambda: self.volume.unlink(directory, name), lambda: self.files.unlink(directory, name)
        )

    @rule(at=picks, which=picks, name=names)
    def rmdir(self, at: int, which: int, name: bytes) -> None:
        directory = self.directory(at)
        name = self.name_in(directory, which, name)
        self.both(
            lambda: self.volume.rmdir(directory, name), lambda: self.files.rmdir(directory, name)
        )

    @rule(
        at=picks,
        which=picks,
        to=picks,
        into=picks,
        name=names,
        flags=st.sampled_from(
            [
                0,
                0,
                RENAME_NOREPLACE,
                RENAME_EXCHANGE,
                RENAME_WHITEOUT,
                RENAME_WHITEOUT | RENAME_NOREPLACE,
                RENAME_WHITEOUT | RENAME_EXCHANGE,
            ]
        ),
    )
    def rename(self, at: int, which: int, to: int, into: int, name: bytes, flags: int) -> None:
        old_directory, directory = self.directory(at), self.directory(to)
        old_name = self.name_in(old_directory, which, name)
        new_name = name if into % 2 else self.name_in(directory, into, name)
        whiteout = self.volume.inodes.next_ino
        self.both(
            lambda: self.volume.rename(old_directory, old_name, directory, new_name, flags) or True,
            lambda: self.files.rename(
                old_directory, old_name, directory, new_name, flags, whiteout
            ),
        )

    @rule(at=picks, offset=offsets, size=sizes, seed=picks)
    def write(self, at: int, offset: int, size: int, seed: int) -> None:
        self._write(self.regular(at), offset, content(size, seed))

    @rule(at=picks, count=st.integers(1, 40), seed=picks)
    def write_scattered(self, at: int, count: int, seed: int) -> None:
        ino = self.regular(at)
        choice = random.Random(seed)
        for _ in range(count):
            self._write(ino, choice.randrange(1 << 20), content(choice.randrange(1, 9000), seed))

    def _write(self, ino: int, offset: int, data: bytes) -> None:
        self.both(
            lambda: self.volume.write(ino, offset, data),
            lambda: self.files.write(ino, offset, data),
        )

    @rule(
        at=picks,
        mode=st.sampled_from([0, KEEP_SIZE, PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE, 0x11]),
        offset=offsets,
        size=sizes,
    )
    def allocate(self, at: int, mode: int, offset: int, size: int) -> None:
        ino = self.regular(at)
        self.both(
            lambda: self.volume.allocate(ino, mode, offset, size),
            lambda: self.files.allocate(ino, mode, offset, size),
        )

    @rule(at=picks, of=picks, begin=st.integers(0, 8), first=st.integers(0, 8), size=sizes)
    def share(self, at: int, of: int, begin: int, first: int, size: int) -> None:
        source = self.regular(of)
        self._share(self.volume, self.files.file(source), at, begin, first, size)

    def _share(
        self, volume: Volume, source: ReferenceFile, at: int, begin: int, first: int, size: int
    ) -> None:
        """Share a range as far as the volume does; the kernel would copy the rest."""
        ino, offset = self.regular(at), begin * BLOCK
        if not (stat.S_ISREG(self.files.file(ino).mode) and stat.S_ISREG(source.mode)):
            return
        overlaps = source is self.files.file(ino) and abs(begin - first) * BLOCK < size
        try:
            shared = self.volume.reflink(volume, source.ino, offset, ino, first * BLOCK, size)
        except NoSpaceError:
            return
        except OSError as error:
            assert error.errno == errno.EXDEV or (error.errno == errno.EINVAL and overlaps)
            return
        assert not overlaps or not shared
        wanted = max(0, min(size, source.size - offset))
        assert (shared > 0) == (wanted > 0)
        assert wanted - BLOCK < shared <= wanted
        self.files.share(source, offset, ino, first * BLOCK, shared)

    @rule(at=picks, offset=offsets)
    def seek(self, at: int, offset: int) -> None:
        """SEEK_DATA skips only zeros, and every byte is either data or in a hole."""
        ino = self.regular(at)
        file = self.files.file(ino)
        if not stat.S_ISREG(file.mode):
            return
        try:
            hole = self.volume.seek(ino, offset, os.SEEK_HOLE)
        except OSError as error:
            assert error.errno == errno.ENXIO
            assert offset >= file.size
            return
        assert offset <= hole <= file.size
        try:
            data = self.volume.seek(ino, offset, os.SEEK_DATA)
        except OSError as error:
            assert error.errno == errno.ENXIO
            data = file.size
        assert (hole == offset) == (data > offset), "a byte is in a hole or it is not"
        for index, block in file.blocks.items():
            begin, stop = max(index * BLOCK, offset), min((index + 1) * BLOCK, data)
            assert begin >= stop or not any(block[begin % BLOCK :][: stop - begin])

    @rule(at=picks, name=names, keep=st.booleans())
    def create_unnamed(self, at: int, name: bytes, keep: bool) -> None:
        """Make a file as O_TMPFILE does, and maybe give it a name."""
        directory = self.directory(at)
        found: list[int] = []

        def real() -> object:
            found.append(self.volume.create_unnamed(directory, 0o640, 3, 4).ino)
            return True

        def model() -> None:
            self.files.create_unnamed(directory, 0o640, 3, 4, found[0] if found else 0)

        if self.both(real, model) and keep:
            self.both(
                lambda: self.volume.link(found[0], directory, name),
                lambda: self.files.link(found[0], directory, name),
            )

    @rule(at=picks, size=offsets)
    def truncate(self, at: int, size: int) -> None:
        ino = self.any_file(at) if at % 8 == 0 else self.regular(at)
        self.both(
            lambda: self.volume.setattr(ino, Changes(size_bytes=size)),
            lambda: self.files.truncate(ino, size),
        )

    @rule(
        at=picks,
        mode=st.none() | modes,
        owner=st.none() | st.integers(0, 9),
        mtime_ns=st.none() | st.integers(-(1 << 70), 1 << 70),
        clear_bits=st.sampled_from([0, 0, stat.S_ISUID, stat.S_ISGID, stat.S_ISUID | stat.S_ISGID]),
        clear_capability=st.booleans(),
    )
    def setattr(
        self,
        at: int,
        mode: int | None,
        owner: int | None,
        mtime_ns: int | None,
        clear_bits: int,
        clear_capability: bool,
    ) -> None:
        ino = self.any_file(at)

        def model() -> None:
            file = self.files.file(ino)
            if mode is not None:
                file.mode = stat.S_IFMT(file.mode) | mode
            file.mode &= ~clear_bits
            if clear_capability:
                file.xattrs.pop(CAPABILITY_XATTR, None)
            if owner is not None:
                file.uid = owner
            if mtime_ns is not None:
                file.mtime_ns = max(-(1 << 63), min((1 << 63) - 1, mtime_ns))

        changes = Changes(
            mode=mode,
            uid=owner,
            mtime_ns=mtime_ns,
            clear_bits=clear_bits,
            clear_capability=clear_capability,
        )
        self.both(lambda: self.volume.setattr(ino, changes), model)

    @rule(at=picks, name=xattr_names, size=xattr_sizes, seed=picks)
    def setxattr(self, at: int, name: bytes, size: int, seed: int) -> None:
        ino, value = self.any_file(at), content(size, seed)
        self.both(
            lambda: self.volume.setxattr(ino, name, value),
            lambda: self.files.file(ino).xattrs.update({name: value}),
        )

    @rule(at=picks, name=xattr_names)
    def removexattr(self, at: int, name: bytes) -> None:
        ino = self._pick(at, lambda file: bool(file.xattrs))

        def model() -> None:
            if self.files.file(ino).xattrs.pop(name, None) is None:
                raise OSError(errno.ENODATA, "")

        self.both(lambda: self.volume.removexattr(ino, name), model)

    @precondition(lambda self: self.files.orphans)
    @rule(at=picks)
    def reclaim(self, at: int) -> None:
        orphans = sorted(self.files.orphans)
        self._reclaim(orphans[at % len(orphans)])

    def _reclaim(self, ino: int) -> None:
        try:
            while not self.volume.reclaim(ino):
                pass
        except NoSpaceError:
            return
        self.files.reclaim(ino)

    @rule()
    def reclaim_all(self) -> None:
        for ino in sorted(self.files.orphans):
            self._reclaim(ino)

    @rule(at=picks, offset=offsets, size=sizes)
    def read(self, at: int, offset: int, size: int) -> None:
        ino = self.regular(at)
        if stat.S_ISREG(self.files.file(ino).mode):
            found = self.volume.read(ino, offset, size)
            assert found == self.files.file(ino).read(offset, size)

    @rule(number=st.integers(1 << 20, 1 << 21))
    def ask_for_what_never_was(self, number: int) -> None:
        for call in (self.volume.get, self.volume.listxattr, self.volume.readlink):
            try:
                call(number)
            except OSError as error:
                assert error.errno == errno.ESTALE
            else:
                raise AssertionError("an inode that never was")

    # --- commits ----------------------------------------------------------------------------------

    def commit_now(self) -> None:
        self.settle()
        self.filesystem.commit()
        self.acknowledged = self.filesystem.store.superblock.generation
        Sweep.of_released(self.filesystem.store).run()

    @rule()
    def commit(self) -> None:
        self.commit_now()

    @rule()
    def trim(self) -> None:
        """Trim, also in the middle of a transaction and while a commit is being written."""
        Sweep.of_everything(self.filesystem.store).run()

    @rule()
    def freeze_only(self) -> None:
        """Freeze and leave the commit open, as a commit thread does while operations go on."""
        self.settle()
        self.filesystem.freeze()

    @rule()
    def write_frozen(self) -> None:
        commit = self.filesystem.inflight
        if commit is not None and not commit.done.is_set():
            commit.write()
            self.acknowledged = commit.generation

    def settle(self) -> None:
        commit = self.filesystem.inflight
        if commit is not None:
            if not commit.done.is_set():
                commit.write()
            self.filesystem.finish(commit)
            self.acknowledged = commit.generation

    @rule(seed=picks)
    def reopen(self, seed: int) -> None:
        self.settle()
        self.filesystem.close()
        assert self.disk.closed
        self.acknowledged = self.filesystem.store.superblock.generation
        # After an orderly close everything is durable: a power cut changes nothing.
        self.open(self.disk.crash(random.Random(seed)))
        self.compare_all()

    @rule(seed=st.none() | picks)
    def crash(self, seed: int | None) -> None:
        self.open(self.disk.crash(None if seed is None else random.Random(seed)))
        self.check()
        self.compare_all()

    @rule(
        kind=st.sampled_from(["write", "flush"]),
        after=st.integers(0, 15),
        short=st.booleans(),
        seed=picks,
    )
    def crash_in_commit(self, kind: str, after: int, short: bool, seed: int) -> None:
        self.settle()
        self.device.fault = Fault(kind, after, short=short, sticky=True)
        try:
            self.commit_now()
        except DeviceError:
            assert self.device.fault.fired
            assert self.filesystem.store.failed is not None
            try:
                self.filesystem.commit()
            except DeviceError:
                pass
            else:
                raise AssertionError("a commit succeeded after a failed one (C8)") from None
        else:
            assert not self.device.fault.fired, "a failed commit looks durable (C8)"
        self.open(self.disk.crash(random.Random(seed)))
        self.check()
        self.compare_all()

    # --- comparing --------------------------------------------------------------------------------

    @invariant()
    def live_equals_model(self) -> None:
        if not hasattr(self, "filesystem"):
            return
        compare(self.volume, self.files)
        space = self.filesystem.space()
        assert space.used + space.free + space.system + space.pending == space.total, "I6"
        store = self.filesystem.store
        assert store.admission.promised_blocks >= 0
        assert store.admission.promised_items >= 0
        assert store.failed is None, f"the filesystem failed by itself: {store.failed}"

    def compare_all(self) -> None:
        """Compare everything that the image holds; a machine with snapshots adds them."""
        compare(self.volume, self.files)

    def check(self) -> None:
        """Check the image as a crash now would leave it."""
        disk = self.disk.crash()
        recount(disk).require_exact()
        report = check_image(disk)
        assert report.clean, "\n".join(map(str, report.findings[:20]))

    def teardown(self) -> None:
        discards_module.DISCARD_BLOCKS_MIN = DISCARD_BLOCKS_MIN
        if not hasattr(self, "filesystem") or self.filesystem.store.failed is not None:
            return
        self.settle()
        self.commit_now()
        self.compare_all()
        self.check()


def compare(volume: Volume, files: ReferenceFiles) -> None:
    """Require that all names, attributes and contents of a volume equal the model's."""
    assert volume.inodes.count == len(files.files), "inode count"
    extent_blocks = 0
    for ino, file in files.files.items():
        inode = volume.get(ino)
        extent_blocks += inode.data_blocks
        found = (inode.mode, inode.nlink, inode.uid, inode.gid, inode.size_bytes)
        expected = (file.mode, file.nlink, file.uid, file.gid, file.size)
        assert found == expected, f"inode {ino}: mode, nlink, uid, gid, size"
        assert inode.rdev == (file.parent if file.is_directory else file.rdev), f"inode {ino}: rdev"
        if file.mtime_ns is not None:
            assert inode.mtime_ns == file.mtime_ns, f"inode {ino}: mtime"
        if file.is_directory:
            listed = list(volume.listing(ino))
            cookies = [cookie for cookie, _ in listed]
            assert cookies == sorted(set(cookies)), f"directory {ino}: cookies not ascending"
            names = {entry.name: entry.ino for _, entry in listed}
            assert len(names) == len(listed), f"directory {ino}: a name twice"
            assert names == file.names, f"directory {ino}: names"
            for _, entry in listed:
                assert entry.type == files.files[entry.ino].mode >> 12, f"{entry}: type"
        elif stat.S_ISLNK(file.mode):
            assert volume.readlink(ino) == file.target
        elif stat.S_ISREG(file.mode):
            compare_data(volume, file)
        assert inode.xattr_count == len(file.xattrs), f"inode {ino}: number of xattrs"
        if file.xattrs:
            assert sorted(volume.listxattr(ino)) == sorted(file.xattrs)
            for name, value in file.xattrs.items():
                assert volume.getxattr(ino, name) == value, f"inode {ino}: xattr {name!r}"
    assert volume.extents.data_blocks == extent_blocks, "data blocks of the volume"


def compare_data(volume: Volume, file: ReferenceFile) -> None:
    """Compare the contents of a file; of a huge one only what was written and the edges."""
    if file.size <= WHOLE_BYTES_MAX:
        assert volume.read(file.ino, 0, file.size + 10) == file.read(0, file.size + 10)
        return
    near = {0, file.size // BLOCK - 1, file.size // BLOCK}
    for index in file.blocks:
        near |= {index - 1, index, index + 1}
    runs: list[list[int]] = []
    for index in sorted(near):
        if index < 0:
            continue
        if runs and runs[-1][1] == index:
            runs[-1][1] += 1
        else:
            runs.append([index, index + 1])
    for first, stop in runs:
        offset, size = first * BLOCK, (stop - first) * BLOCK
        found = volume.read(file.ino, offset, size)
        assert found == file.read(offset, size), f"inode {file.ino}: data at {offset}"
