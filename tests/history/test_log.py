"""The log as a whole: what a record made durable is there after a crash, whatever the history.

The crash lab judges the order of writes (tests/crash); here is what the calls mean, and what else
may become of a log: full, too much, unfit, on an image that has none. Guards C2, C8, L1 to L6.
"""

import errno
import os
import stat
from contextlib import suppress

import msgspec
import pytest

from cowfs.care.check import check_image
from cowfs.errors import CorruptError, DeviceError, NoSpaceError
from cowfs.files.acl import (
    DEFAULT_NAME,
    TAG_GROUP_OWNER,
    TAG_OTHER,
    TAG_OWNER,
    AclEntry,
    encode_acl,
)
from cowfs.files.calls import Changes, Make, Reclaim, Unlink, Write, decode_calls
from cowfs.files.content import KEEP_SIZE, ZERO_RANGE
from cowfs.files.items import ROOT_INO, XATTR_VALUE_BYTES_MAX
from cowfs.files.namespace import RENAME_EXCHANGE, RENAME_WHITEOUT
from cowfs.files.volume import Volume
from cowfs.history.edits import CreateSnapshot, Rollback
from cowfs.history.filesystem import Filesystem
from cowfs.history.images import (
    commit_log,
    make_filesystem,
    open_filesystem,
    restore_generation,
    with_log,
)
from cowfs.storage.admission import Limits
from cowfs.storage.format import BLOCK_SIZE_BYTES, Superblock
from cowfs.storage.log import Log, LogWrite
from cowfs.storage.log_records import encode_record, read_log
from cowfs.storage.overlay import OverlayDevice
from cowfs.storage.store import Store
from cowfs.storage.superblock import read_newest
from tests.model.devices import Fault, FaultDevice, MemoryDevice
from tests.model.histories import History
from tests.model.recount import recount
from tests.sizes import seeds, sized

BLOCKS = 8192


def new_image(total_blocks: int = BLOCKS, **settings: bool) -> MemoryDevice:
    device = MemoryDevice(total_blocks)
    make_filesystem(device, **settings)  # type: ignore[arg-type]
    return device


def facts(volume: Volume) -> dict[bytes, tuple[object, ...]]:
    """All that a program can see of a tree, times included, by path."""
    found = {}
    waiting = [(b"", int(ROOT_INO))]
    while waiting:
        path, ino = waiting.pop()
        inode = volume.get(ino)
        content: object = None
        if stat.S_ISREG(inode.mode):
            content = volume.read(ino, 0, inode.size_bytes)
        elif stat.S_ISLNK(inode.mode):
            content = volume.readlink(ino)
        elif stat.S_ISDIR(inode.mode):
            for _, name in volume.listing(ino):
                waiting.append((path + b"/" + name.name, name.ino))
        found[path] = (
            (inode.ino, inode.mode, inode.nlink, inode.uid, inode.gid, inode.rdev),
            (inode.size_bytes, inode.atime_ns, inode.mtime_ns, inode.ctime_ns, inode.btime_ns),
            content,
            {name: volume.getxattr(ino, name) for name in volume.listxattr(ino)},
        )
    return found


def records_of(device: MemoryDevice) -> int:
    return sum(1 for _ in read_log(device, read_newest(device)))


class LoggedHistory(History):
    """A random history in which every kind of call is made, with syncs between."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, small_files=(0, 20, 60)[seed % 3])
        self.records_seen = 0
        self._steps = [(action, weight) for action, weight in self._steps if action != self.commit]
        self._steps += [
            (self.sync, 20),
            (self.commit, 1),
            (self.set_attributes, 5),
            (self.set_xattr, 5),
            (self.make_others, 4),
            (self.make_unnamed, 4),
            (self.name_the_unnamed, 4),
            (self.move_otherwise, 4),
            (self.zero_or_allocate, 4),
            (self.read_something, 3),
            (self.times_of_the_kernel, 1),
            (self.default_acl, 1),
        ]

    def _ino(self) -> int | None:
        ino = super()._ino()
        return ino if ino is not None and stat.S_ISREG(self.live.get(ino).mode) else None

    def sync(self) -> None:
        """Sync, crash, and look: in memory alone, then as a mount does."""
        self.filesystem.sync()
        wanted = facts(self.live)
        orphans = set(self.live.orphans)
        crashed = self.disk.crash()
        records = records_of(crashed)
        self.records_seen += records
        events = len(crashed.events)
        shown = open_filesystem(crashed, writable=False)
        assert facts(shown.live) == wanted
        assert len(crashed.events) == events, "a read-only open wrote to the image"
        assert check_image(crashed).findings == ()
        mounted = open_filesystem(crashed, writable=True)
        assert facts(mounted.live) == wanted
        assert mounted.live.orphans == orphans
        assert records_of(crashed) == 0, "the log is not empty after a mount"
        mounted.reclaim_orphans()
        mounted.close()
        assert check_image(crashed).findings == ()
        recount(crashed).require_exact()

    def set_attributes(self) -> None:
        if (ino := self._ino()) is not None:
            choice = self.choice
            self.live.setattr(
                ino,
                Changes(
                    mode=choice.choice((None, 0o600, 0o4755)),
                    uid=choice.choice((None, 5)),
                    gid=choice.choice((None, 6)),
                    size_bytes=choice.choice((None, choice.randrange(30_000))),
                    atime_ns=choice.choice((None, -1, 1 << 70)),
                    mtime_ns=choice.choice((None, 10**18, -(1 << 80))),
                    ctime_ns=choice.choice((None, 7)),
                    clear_bits=choice.choice((0, stat.S_ISUID)),
                    clear_capability=choice.random() < 0.5,
                ),
            )

    def set_xattr(self) -> None:
        if (ino := self._ino()) is not None:
            name = self.choice.choice((b"user.a", b"user.b", b"security.capability"))
            if self.choice.random() < 0.7:
                size = self.choice.choice((0, 10, 3000, XATTR_VALUE_BYTES_MAX))
                self.live.setxattr(ino, name, self.choice.randbytes(size))
            else:
                with suppress(OSError):
                    self.live.removexattr(ino, name)

    def default_acl(self) -> None:
        entries = (AclEntry(TAG_OWNER, 7), AclEntry(TAG_GROUP_OWNER, 5), AclEntry(TAG_OTHER, 0))
        self.live.setxattr(self._directory(), DEFAULT_NAME, encode_acl(entries))

    def make_others(self) -> None:
        directory = self._directory()
        self.live.symlink(directory, self._name(), b"some/where", 3, 4)
        kind = self.choice.choice((stat.S_IFIFO, stat.S_IFCHR, stat.S_IFSOCK))
        self.live.create(
            directory, self._name(), kind | 0o666, 1, 2, 259, umask=0o022, inherits=True
        )

    def make_unnamed(self) -> None:
        inode = self.live.create_unnamed(self._directory(), 0o600, 1, 2)
        self.live.write(inode.ino, 0, self._bytes(2))

    def name_the_unnamed(self) -> None:
        for ino in sorted(self.live.orphans):
            with suppress(OSError):  # it had a name once
                self.live.link(ino, self._directory(), self._name())

    def move_otherwise(self) -> None:
        entries = self.entries()
        if len(entries) > 1:
            one, other = self.choice.sample(entries, 2)
            with suppress(OSError):
                if self.choice.random() < 0.5:
                    self.live.rename(*one[:2], *other[:2], RENAME_EXCHANGE)
                else:
                    self.live.rename(*one[:2], one[0], self._name(), RENAME_WHITEOUT, uid=8, gid=9)
        empty = [entry for entry in entries if entry[3]]
        if empty:
            with suppress(OSError):
                self.live.rmdir(*self.choice.choice(empty)[:2])

    def zero_or_allocate(self) -> None:
        if (ino := self._ino()) is not None:
            mode = self.choice.choice((0, KEEP_SIZE, ZERO_RANGE))
            self.live.allocate(ino, mode, self.choice.randrange(50_000), 9000)

    def read_something(self) -> None:
        if (ino := self._ino()) is not None:
            self.live.accessed(self.live.get(ino), strict=True)

    def times_of_the_kernel(self) -> None:
        if self.choice.random() < 0.5:
            self.live.leave_times_to_kernel()


@pytest.mark.parametrize("seed", seeds(6, 400))
def test_any_history_shows_after_a_crash_what_the_last_sync_had(seed: int) -> None:
    """Guards C2, L2 and L5: replayed calls give the same files, times and numbers included."""
    history = LoggedHistory(seed)
    history.run(sized(120, 200))
    assert history.records_seen > 10, "hardly anything was a record"


def test_link_of_a_file_made_without_a_name_before_the_commit() -> None:
    """Guards L5: after the base was opened nothing tells such an orphan from others."""
    device = new_image()
    filesystem = open_filesystem(device, writable=True)
    ino = filesystem.live.create_unnamed(ROOT_INO, 0o600, 0, 0).ino
    filesystem.commit()
    filesystem.live.link(ino, ROOT_INO, b"named")
    filesystem.sync()
    again = open_filesystem(device.crash(), writable=True)
    assert again.live.lookup(ROOT_INO, b"named").ino == ino
    assert not again.live.orphans


def test_reflink_of_many_extents_is_replayed_in_full() -> None:
    """Guards L5: how the source lies in blocks may differ, and so may the parts of one call."""
    device = new_image()
    filesystem = open_filesystem(device, writable=True)
    live = filesystem.live
    source = live.create(ROOT_INO, b"source", 0o100644, 0, 0).ino
    for at in range(0, 200, 2):  # more extents than one call shares
        live.write(source, at * BLOCK_SIZE_BYTES, b"%4d" % at * (BLOCK_SIZE_BYTES // 4))
        filesystem.commit()
    for at in range(1, 60, 2):
        live.write(source, at * BLOCK_SIZE_BYTES, b"x" * 100)
    target = live.create(ROOT_INO, b"target", 0o100644, 0, 0).ino
    done = 0
    while done < live.get(source).size_bytes:
        left = live.get(source).size_bytes - done
        done += live.reflink(live, source, done, target, done, left)
    filesystem.sync()
    assert records_of(device) == 1
    again = open_filesystem(device.crash(), writable=True)
    assert facts(again.live) == facts(live)


def test_call_of_a_snapshot_reads_the_same_snapshot_again() -> None:
    """Guards L5 and L6: a record may need a snapshot, and edits are commits."""
    device = new_image()
    filesystem = open_filesystem(device, writable=True)
    ino = filesystem.live.create(ROOT_INO, b"file", 0o100644, 0, 0).ino
    filesystem.live.write(ino, 0, b"old" * 5000)
    filesystem.apply(CreateSnapshot("kept"))
    filesystem.live.write(ino, 0, b"new" * 5000)
    kept = filesystem.volume(filesystem.catalog.snapshot("kept").root_id)
    assert kept is not None
    copy = filesystem.live.create(ROOT_INO, b"copy", 0o100644, 0, 0).ino
    filesystem.live.reflink(kept, ino, 0, copy, 0, 15000)
    filesystem.sync()
    assert records_of(device) == 1
    crashed = device.crash()
    assert open_filesystem(crashed, writable=False).live.read(copy, 0, 6) == b"oldold"
    filesystem.apply(Rollback("kept"))
    assert records_of(device) == 0
    shown = open_filesystem(device.crash(), writable=True).live
    assert shown.find(ROOT_INO, b"copy") is None


def test_reflink_of_a_file_that_is_inline_in_the_replay_copies_it() -> None:
    """Guards L5: whether a small file has blocks depends on when it was flushed."""
    device = new_image()
    filesystem = open_filesystem(device, writable=True)
    live = filesystem.live
    source = live.create(ROOT_INO, b"source", 0o100644, 0, 0).ino
    live.write(source, 0, b"some" * 2048)
    live.flush()  # as an edit does that is refused then
    live.setattr(source, Changes(size_bytes=1000))
    target = live.create(ROOT_INO, b"target", 0o100644, 0, 0).ino
    assert live.reflink(live, source, 0, target, 0, 1000) == 1000
    filesystem.sync()
    assert records_of(device) == 1
    assert facts(open_filesystem(device.crash(), writable=True).live) == facts(live)


def test_replay_asks_for_no_room() -> None:
    """Guards L5: what is in the log was admitted; a commit in the middle would lose the rest."""
    device = new_image()
    filesystem = open_filesystem(device, writable=True)
    ino = filesystem.live.create(ROOT_INO, b"file", 0o100644, 0, 0).ino
    filesystem.live.write(ino, 0, b"data" * 5000)
    filesystem.live.allocate(ino, 0, 1 << 20, 9000)
    filesystem.sync()
    greedy = Limits(reserve_blocks_min=BLOCKS, reserve_blocks_max=BLOCKS)
    again = open_filesystem(device.crash(), writable=True, limits=greedy)
    assert facts(again.live) == facts(filesystem.live)
    with pytest.raises(NoSpaceError):
        again.live.create(ROOT_INO, b"other", 0o100644, 0, 0)


# --- what a record is not -------------------------------------------------------------------------


def counting(filesystem: Filesystem) -> tuple[int, int]:
    """The newest generation, and the records that follow it."""
    device = filesystem.store.device
    assert isinstance(device, MemoryDevice)
    return filesystem.store.superblock.generation, records_of(device)


def test_more_than_the_limit_is_a_commit_and_the_next_sync_a_record() -> None:
    """Promise: what gathers for the log is bounded in memory; nothing is lost by it."""
    device = new_image()
    filesystem = open_filesystem(device, writable=True, limits=Limits(log_bytes=1000))
    generation, _ = counting(filesystem)
    ino = filesystem.live.create(ROOT_INO, b"file", 0o100644, 0, 0).ino
    filesystem.sync()
    assert counting(filesystem) == (generation, 1)
    filesystem.live.write(ino, 0, bytes(1001))
    assert not filesystem.store.log.calls, "the data is kept although no record can take it"
    filesystem.live.setattr(ino, Changes(mode=0o600))
    filesystem.sync()
    assert counting(filesystem) == (generation + 1, 0)
    filesystem.live.setattr(ino, Changes(mode=0o644))
    filesystem.sync()
    assert counting(filesystem) == (generation + 1, 1)


def test_a_log_of_many_calls_or_of_its_size_ends_in_a_commit() -> None:
    """Promise: the replay of a log is bounded, and an area never overflows."""
    device = new_image()
    filesystem = open_filesystem(device, writable=True, limits=Limits(log_calls=10))
    generation, _ = counting(filesystem)
    for _ in range(12):
        filesystem.live.setattr(ROOT_INO, Changes(mode=0o700))
        filesystem.sync()
    assert counting(filesystem) == (generation + 1, 1)
    filesystem.close()
    filesystem = open_filesystem(device, writable=True)
    place = filesystem.store.superblock.log
    assert place is not None
    generation, _ = counting(filesystem)
    for _ in range(place.area_blocks + 1):
        filesystem.live.setattr(ROOT_INO, Changes(mode=0o755))
        filesystem.sync()
    assert counting(filesystem) == (generation + 1, 0)


def test_records_that_no_commit_holds_yet_are_never_overwritten() -> None:
    """Guards L1: whoever forgets the commit after a replay gets one with the first sync."""
    device = new_image()
    filesystem = open_filesystem(device, writable=True)
    filesystem.live.create(ROOT_INO, b"one", 0o100644, 0, 0)
    filesystem.sync()
    superblock = read_newest(device)
    careless = Filesystem(Store(device, superblock, writable=True))
    assert careless.replay().calls == 1
    careless.live.create(ROOT_INO, b"two", 0o100644, 0, 0)
    careless.sync()
    assert read_newest(device).generation == superblock.generation + 1
    shown = open_filesystem(device.crash(), writable=True).live
    assert {name.name for _, name in shown.listing(ROOT_INO)} == {b"one", b"two"}


def test_nothing_to_sync_writes_nothing() -> None:
    """Promise: an fsync after an fsync costs nothing."""
    device = new_image()
    filesystem = open_filesystem(device, writable=True)
    filesystem.live.create(ROOT_INO, b"file", 0o100644, 0, 0)
    filesystem.sync()
    events = len(device.events)
    filesystem.sync()
    assert len(device.events) == events


def test_a_record_is_one_flush_and_two_writes() -> None:
    """Promise: the cost of an fsync of one 4 KiB write: 16 KiB with both copies."""
    device = new_image()
    filesystem = open_filesystem(device, writable=True)
    ino = filesystem.live.create(ROOT_INO, b"file", 0o100644, 0, 0).ino
    filesystem.sync()
    before = len(device.events)
    filesystem.live.write(ino, 0, bytes(BLOCK_SIZE_BYTES))
    filesystem.sync()
    assert [(event.kind, event.block_count) for event in device.events[before:]] == [
        ("write", 2),
        ("write", 2),
        ("flush", 0),
    ]


def test_image_without_a_log_commits_and_gets_one_where_there_is_room() -> None:
    """Promise: images of before the log work as they did, and a mount gives them a log."""
    device = new_image(log=False)
    assert read_newest(device).incompat == 1
    filesystem = open_filesystem(device, writable=True)
    generation, _ = counting(filesystem)
    filesystem.live.create(ROOT_INO, b"file", 0o100644, 0, 0)
    filesystem.sync()
    assert counting(filesystem) == (generation + 1, 0)
    assert filesystem.store.make_log()
    filesystem.commit()
    assert check_image(device).findings == ()
    filesystem.live.create(ROOT_INO, b"other", 0o100644, 0, 0)
    filesystem.sync()
    assert counting(filesystem) == (generation + 2, 1)
    again = open_filesystem(device.crash(), writable=True)
    assert again.live.find(ROOT_INO, b"other") is not None
    again.close()


def test_full_image_without_a_log_goes_on_without() -> None:
    """Promise: a log takes no room that the files need."""
    device = new_image(4096, log=False)
    filesystem = open_filesystem(device, writable=True)
    ino = filesystem.live.create(ROOT_INO, b"file", 0o100644, 0, 0).ino
    with suppress(NoSpaceError):
        for at in range(0, 1 << 30, 1 << 16):
            filesystem.live.write(ino, at, bytes(1 << 16))
    filesystem.commit()
    free = filesystem.store.map.free_blocks
    made = filesystem.store.make_log()
    assert made == (filesystem.store.superblock.log is not None)
    taken = free - filesystem.store.map.free_blocks
    assert taken * 4 <= free
    filesystem.close()
    assert check_image(device).findings == ()


def test_full_image_replays_what_was_admitted() -> None:
    """Guards L5: the replay never fails for want of room."""
    device = new_image(4096)
    filesystem = open_filesystem(device, writable=True)
    ino = filesystem.live.create(ROOT_INO, b"file", 0o100644, 0, 0).ino
    states = []  # crashes just before it is full, each with what it must show

    def sync() -> None:
        nonlocal states
        filesystem.sync()
        if filesystem.store.admission.available_blocks() < 100:
            crashed = device.crash()
            if records_of(crashed):
                states = [*states[-30:], (crashed, facts(filesystem.live))]

    with suppress(NoSpaceError):
        for at in range(0, 1 << 30, 4 * BLOCK_SIZE_BYTES):
            filesystem.live.write(ino, at, b"%8d" % at * (BLOCK_SIZE_BYTES // 2))
            sync()
    with suppress(NoSpaceError):
        for number in range(1 << 20):
            made = filesystem.live.create(ROOT_INO, b"s%d" % number, 0o100644, 0, 0)
            sync()
            filesystem.live.write(made.ino, 0, bytes(700))
            sync()
    assert len(states) > 5, "hardly anything was a record"
    for crashed, wanted in states:
        mounted = open_filesystem(crashed, writable=True)
        assert facts(mounted.live) == wanted
        mounted.close()
        assert check_image(crashed).findings == ()


# --- faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["write", "flush"])
@pytest.mark.parametrize("after", [0, 1, 2, 3])
@pytest.mark.parametrize("short", [False, True])
def test_record_that_cannot_be_written_ends_writing(kind: str, after: int, short: bool) -> None:
    """Guards C8 and L3: no false success, and all that was acknowledged stays."""
    inner = new_image()
    device = FaultDevice(inner)
    filesystem = open_filesystem(device, writable=True)
    acknowledged = []
    device.fault = Fault(kind, after, short=short)

    def make_files() -> None:
        for number in range(10):
            name = b"f%d" % number
            filesystem.live.create(ROOT_INO, name, 0o100644, 0, 0)
            filesystem.sync()
            acknowledged.append(name)

    with pytest.raises(DeviceError):
        make_files()
    assert len(acknowledged) == (after // 2 if kind == "write" else after)
    with pytest.raises(DeviceError):
        filesystem.sync()
    with pytest.raises(DeviceError):
        filesystem.live.create(ROOT_INO, b"later", 0o100644, 0, 0)
    shown = open_filesystem(inner.crash(), writable=True).live
    for name in acknowledged:
        assert shown.find(ROOT_INO, name) is not None


def forged(device: MemoryDevice, *records: bytes) -> MemoryDevice:
    """The device with a log of these bodies, each with a right checksum, of one call."""
    superblock = read_newest(device)
    place = superblock.log
    assert place is not None
    chain = superblock.checksum()
    block = place.block + place.area * place.area_blocks
    for sequence, body in enumerate(records):
        image, chain = encode_record(superblock, block, sequence, 1, chain, body)
        for at in range(0, len(image), BLOCK_SIZE_BYTES):
            piece = image[at : at + BLOCK_SIZE_BYTES]
            device.put(block + at // BLOCK_SIZE_BYTES, piece)
            if place.twin:
                device.put(block - place.block + place.twin + at // BLOCK_SIZE_BYTES, piece)
        block += len(image) // BLOCK_SIZE_BYTES
    return device


def body_of(*calls: object) -> bytes:
    return msgspec.msgpack.encode(list(calls))


GOOD = Make(1, b"good", 0o100644, 0, 0, 0, b"", 0, True, 2, 5)
UNFIT = {
    "no such file": body_of(Unlink(1, b"none", 2, 5)),
    "another inode": body_of(Make(1, b"bad", 0o100644, 0, 0, 0, b"", 0, True, 77, 5)),
    "no type": body_of(Make(1, b"bad", 0o644, 0, 0, 0, b"", 0, True, 3, 5)),
    "name with a slash": body_of(Make(1, b"a/b", 0o100644, 0, 0, 0, b"", 0, True, 3, 5)),
    "write to a directory": body_of(Write(1, 0, b"data", 5)),
    "write past the end of all files": body_of(Write(2, (1 << 63) - 1, b"data", 5)),
    "no msgpack": b"\xc1\xff",
    "unknown kind": b"\x91\x92\x63\x01",
    "two calls, not one": body_of(Reclaim(9), Reclaim(9)),
    "deep": b"\x91" * 5000,
    "empty": b"",
}


@pytest.mark.parametrize("what", UNFIT)
def test_record_that_does_not_fit_is_refused_in_words_and_loses_nothing(what: str) -> None:
    """Promise: a log that lies is an error that says what to do; what is before it is shown."""
    device = forged(new_image(), body_of(GOOD), UNFIT[what])
    before = device.copy()
    with pytest.raises(CorruptError, match=r"mount the image with -o ro.*check --repair"):
        open_filesystem(device, writable=True)
    assert [device.block(at) for at in range(BLOCKS)] == [before.block(at) for at in range(BLOCKS)]
    shown = open_filesystem(device, writable=False)
    assert shown.live.find(ROOT_INO, b"good") is not None
    overlay = with_log(device)
    assert isinstance(overlay, OverlayDevice)
    assert overlay.replay is not None
    assert overlay.replay.calls == 1
    report = check_image(overlay)
    assert [finding.invariant for finding in report.errors] == ["C2"]
    given_up = commit_log(device)
    assert given_up is not None
    assert given_up.error is not None
    again = open_filesystem(device, writable=True)
    assert again.live.find(ROOT_INO, b"good") is not None
    again.close()
    assert check_image(device).findings == ()


@pytest.mark.parametrize("seed", seeds(4, 300, first=1000))
def test_log_with_any_bytes_and_right_checksums_breaks_nothing(seed: int) -> None:
    """Promise: a log that lies is replayed as far as it fits, and what it leaves is consistent."""
    history = LoggedHistory(seed)
    history.run(60)
    choice = history.choice
    for step in (history.write_new, history.rename, history.set_xattr, history.make_others):
        step()
        history.sync()
    base = history.disk.crash()
    calls = [
        call for record in read_log(base, read_newest(base)) for call in decode_calls(record.body)
    ]
    for _ in range(sized(15, 40)):
        lies = []
        for call in choice.sample(calls, len(calls)):
            body = bytearray(body_of(call))
            for _ in range(choice.choice((0, 0, 1, 2))):
                body[choice.randrange(len(body))] = choice.choice(
                    (0, 1, 2, 0xFF, choice.randrange(256))
                )
            lies.append(bytes(body))
        device = forged(base.copy(), *lies)
        report = check_image(with_log(device))
        assert {finding.invariant for finding in report.errors} <= {"C2"}, report.errors
        commit_log(device)
        filesystem = open_filesystem(device, writable=True)
        filesystem.reclaim_orphans()
        filesystem.close()
        assert check_image(device).errors == ()


def test_call_that_cannot_be_encoded_is_a_commit(caplog: pytest.LogCaptureFixture) -> None:
    """Promise: a mistake of ours in a call costs a commit, and no data."""
    device = new_image()
    filesystem = open_filesystem(device, writable=True)
    generation, _ = counting(filesystem)
    filesystem.live.create(ROOT_INO, b"file", 0o100644, 0, 0)
    filesystem.store.log.add(object(), 1)
    filesystem.sync()
    assert counting(filesystem) == (generation + 1, 0)
    assert "cannot be recorded" in caplog.text
    caplog.clear()


def test_log_on_blocks_in_use_is_not_written(caplog: pytest.LogCaptureFixture) -> None:
    """Promise: a superblock that puts the log on data destroys nothing."""
    device = new_image()
    filesystem = open_filesystem(device, writable=True)
    ino = filesystem.live.create(ROOT_INO, b"file", 0o100644, 0, 0).ino
    filesystem.live.write(ino, 0, b"precious" * 4096)
    filesystem.close()
    newest = read_newest(device)
    assert newest.log is not None
    _, extent = next(iter(filesystem.live.extents.find(ino, 0, 8)))
    liar = Superblock(
        **{
            name: getattr(newest, name)
            for name in newest.__struct_fields__
            if name not in ("log", "generation")
        },
        log=newest.log._replace(block=extent.block),
        generation=newest.generation + 1,
    )
    for first in (0, BLOCKS - 64):
        device.put(first + liar.slot(), liar.encode())
    filesystem = open_filesystem(device, writable=True)
    assert "blocks that are in use" in caplog.text
    caplog.clear()
    filesystem.live.create(ROOT_INO, b"other", 0o100644, 0, 0)
    filesystem.sync()
    assert filesystem.store.superblock.generation == liar.generation + 1
    assert filesystem.live.read(ino, 0, 8) == b"precious"
    report = check_image(device)
    assert any("the log lies on blocks in use" in finding.what for finding in report.errors)


def test_an_earlier_generation_is_restored_without_the_log_of_the_newest() -> None:
    """Promise: going back to a commit goes back to that commit."""
    device = new_image()
    filesystem = open_filesystem(device, writable=True)
    filesystem.live.create(ROOT_INO, b"first", 0o100644, 0, 0)
    filesystem.commit()
    kept = filesystem.store.superblock.generation
    filesystem.live.create(ROOT_INO, b"second", 0o100644, 0, 0)
    filesystem.commit()
    filesystem.live.create(ROOT_INO, b"third", 0o100644, 0, 0)
    filesystem.sync()
    crashed = device.crash()
    restore_generation(crashed, kept)
    shown = open_filesystem(crashed, writable=True)
    assert [name.name for _, name in shown.live.listing(ROOT_INO)] == [b"first"]
    shown.live.create(ROOT_INO, b"fourth", 0o100644, 0, 0)
    shown.sync()
    again = open_filesystem(crashed.crash(), writable=True)
    assert {name.name for _, name in again.live.listing(ROOT_INO)} == {b"first", b"fourth"}


def test_collected_calls_are_those_that_were_made() -> None:
    """Promise: a refused operation leaves no call, and flushes between calls none either."""
    device = new_image()
    filesystem = open_filesystem(device, writable=True)
    live = filesystem.live
    ino = live.create(ROOT_INO, b"file", 0o100644, 0, 0).ino
    with pytest.raises(OSError, match=os.strerror(errno.EEXIST)):
        live.create(ROOT_INO, b"file", 0o100644, 0, 0)
    live.write(ino, 0, b"data" * 2000)
    live.settle(ino)
    live.flush()
    filesystem.sync()
    (record,) = read_log(device, read_newest(device))
    assert [type(call) for call in decode_calls(record.body)] == [Make, Write]


def test_record_finished_after_a_commit_moves_nothing() -> None:
    """Promise: a commit made while a record was written in a thread begins a log of its own."""
    device = new_image()
    filesystem = open_filesystem(device, writable=True)
    filesystem.live.create(ROOT_INO, b"one", 0o100644, 0, 0)
    record = filesystem.begin_record()
    assert isinstance(record, LogWrite)
    record.write()
    filesystem.live.create(ROOT_INO, b"two", 0o100644, 0, 0)
    filesystem.commit()  # finishes the record first
    filesystem.finish_record(record)
    filesystem.live.create(ROOT_INO, b"three", 0o100644, 0, 0)
    filesystem.sync()
    assert isinstance(filesystem.store.log, Log)
    assert records_of(device) == 1
    shown = open_filesystem(device.crash(), writable=True).live
    assert {name.name for _, name in shown.listing(ROOT_INO)} == {b"one", b"two", b"three"}
