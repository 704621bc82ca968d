"""Damage every copy of one node, each node in turn: what is lost, and what still works.

Each operation after the damage happens whole or is refused with EIO, and every commit succeeds. The
proof comes from healing: once the node's bytes are put back, the image checks clean and holds what
the model holds.
"""

import contextlib
import errno
import random
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from cowfs.care.check import check_image
from cowfs.errors import CorruptError, DeviceError
from cowfs.files.acl import (
    ACCESS_NAME,
    DEFAULT_NAME,
    AclEntry,
    decode_acl,
    encode_acl,
    inherit,
    with_mode,
)
from cowfs.files.attributes import CAPABILITY_XATTR
from cowfs.files.calls import Changes
from cowfs.files.items import ROOT_INO
from cowfs.files.volume import Volume
from cowfs.history.edits import CreateSnapshot
from cowfs.history.filesystem import Filesystem
from cowfs.history.images import make_filesystem, open_filesystem
from cowfs.storage.admission import TIER_ADD
from cowfs.storage.format import BLOCK_SIZE_BYTES, Pointer
from cowfs.storage.node import CACHE_BYTES_DEFAULT, NodeCache
from cowfs.storage.operation import CHANGING, IDLE
from tests.model.devices import Fault, FaultDevice, MemoryDevice
from tests.sizes import is_long, sized

TOTAL_BLOCKS = 16384
FILES = sized(150, 240)
LARGE_BLOCKS = sized(500, 900)  # of two files; their many extents fill leaves of their own
OPERATIONS = 60
FAILING = sized(6, 30)  # operations, with each of their reads failing in turn
MODE = stat.S_IFREG | 0o644
# The default ACL of one directory: every new file there gets one.
ACL = encode_acl(
    (
        AclEntry(1, 7),
        *(AclEntry(2, 7, user) for user in range(20)),
        AclEntry(4, 5),
        AclEntry(16, 7),
        AclEntry(32, 5),
    )
)


@dataclass
class File:
    """What a file should hold."""

    data: bytearray = field(default_factory=bytearray)
    xattrs: dict[bytes, bytes] = field(default_factory=dict)


Model = dict[tuple[bytes, bytes], File]  # by directory and name


def directories(volume: Volume) -> dict[bytes, int]:
    return {b"": ROOT_INO} | {
        entry.name: entry.ino for _, entry in volume.listing(ROOT_INO) if entry.type == 4
    }


def inherited(directory: bytes) -> dict[bytes, bytes]:
    """The xattrs that a new file inherits from its directory."""
    access = inherit(ACL, MODE).access
    return {ACCESS_NAME: access} if directory == b"two" and access is not None else {}


def populate(volume: Volume, model: Model, choice: random.Random) -> None:
    """Make directories and files of all kinds, enough to fill some dozens of leaves."""
    places = {b"": ROOT_INO}
    for name in (b"one", b"two"):
        places[name] = volume.create(ROOT_INO, name, stat.S_IFDIR | 0o755, 0, 0).ino
    volume.setxattr(places[b"two"], DEFAULT_NAME, ACL)
    for number in range(FILES):
        directory = choice.choice(list(places))
        name = b"file %d " % number + b"x" * choice.choice([0, 0, 100])
        file = model[directory, name] = File(xattrs=inherited(directory))
        ino = volume.create(places[directory], name, MODE, 0, 0).ino
        size = choice.choice([0, 10, 1500, 2048, 5000, 40_000])
        file.data += choice.randbytes(size)
        volume.write(ino, 0, bytes(file.data))
        if not number % 5:
            file.xattrs[b"user.a"] = choice.randbytes(choice.choice([10, 3000]))
            volume.setxattr(ino, b"user.a", file.xattrs[b"user.a"])
        if not number % 3:
            file.xattrs[CAPABILITY_XATTR] = choice.randbytes(20)
            volume.setxattr(ino, CAPABILITY_XATTR, file.xattrs[CAPABILITY_XATTR])
    for number in range(2):
        file = model[b"", b"large %d" % number] = File(bytearray(LARGE_BLOCKS * BLOCK_SIZE_BYTES))
        ino = volume.create(ROOT_INO, b"large %d" % number, stat.S_IFREG | 0o644, 0, 0).ino
        for offset in range(0, len(file.data), 2 * BLOCK_SIZE_BYTES):
            file.data[offset : offset + BLOCK_SIZE_BYTES] = choice.randbytes(BLOCK_SIZE_BYTES)
            volume.write(ino, offset, bytes(file.data[offset : offset + BLOCK_SIZE_BYTES]))
        volume.setattr(ino, Changes(size_bytes=len(file.data)))


KINDS = (
    *("create", "unlink", "rename", "replace", "write", "truncate"),
    *("set_xattr", "remove_xattr", "chmod", "set_acl"),
)


def operate(volume: Volume, model: Model, choice: random.Random, only: str | None = None) -> None:
    """Do one random operation on both; if the volume raises, so does this, the model unchanged.

    Args:
        only: the kind of operation (one of KINDS); None picks any.
    """
    places = directories(volume)
    directory, name = choice.choice(list(model))
    file = model[directory, name]
    new = (choice.choice(list(places)), b"new %d" % choice.randrange(10**6))
    ino = volume.lookup(places[directory], name).ino

    def create() -> None:
        volume.create(places[new[0]], new[1], MODE, 0, 0)
        model[new] = File(xattrs=inherited(new[0]))

    def unlink() -> None:
        volume.unlink(places[directory], name)
        del model[directory, name]
        while not volume.reclaim(ino):
            pass

    def rename() -> None:
        volume.rename(places[directory], name, places[new[0]], new[1])
        model[new] = model.pop((directory, name))

    def replace() -> None:
        target = choice.choice([each for each in model if each != (directory, name)])
        lost = volume.rename(places[directory], name, places[target[0]], target[1])
        model[target] = model.pop((directory, name))
        assert lost is not None
        while not volume.reclaim(lost.ino):
            pass

    def write() -> None:
        offset = choice.randrange(len(file.data) + 5000)
        data = choice.randbytes(choice.choice([1, 100, 4096, 9000, 600_000]))
        volume.write(ino, offset, data)
        file.data.extend(bytes(max(0, offset - len(file.data))))
        file.data[offset : offset + len(data)] = data

    def truncate() -> None:
        size = choice.randrange(len(file.data) + 3000)
        clear = choice.random() < 0.8
        volume.setattr(ino, Changes(size_bytes=size, clear_capability=clear))
        del file.data[size:]
        file.data.extend(bytes(size - len(file.data)))
        if clear:
            file.xattrs.pop(CAPABILITY_XATTR, None)

    def chmod() -> None:
        mode = choice.randrange(0o1000)
        volume.setattr(ino, Changes(mode=mode))
        if ACCESS_NAME in file.xattrs:
            acl = decode_acl(file.xattrs[ACCESS_NAME])
            file.xattrs[ACCESS_NAME] = encode_acl(with_mode(acl, mode))

    def set_acl() -> None:
        volume.setxattr(ino, ACCESS_NAME, ACL)
        file.xattrs[ACCESS_NAME] = ACL

    def set_xattr() -> None:
        value = choice.randbytes(choice.choice([5, 2500, 9000]))
        volume.setxattr(ino, b"user.b", value)
        file.xattrs[b"user.b"] = value

    def remove_xattr() -> None:
        if b"user.b" in file.xattrs:
            volume.removexattr(ino, b"user.b")
            del file.xattrs[b"user.b"]

    kinds: list[Callable[[], None]] = [create, create, unlink, unlink, rename, replace, write]
    kinds += [write, write, truncate, set_xattr, remove_xattr, chmod, set_acl]
    assert {kind.__name__ for kind in kinds} == set(KINDS)
    choice.choice([kind for kind in kinds if only in (None, kind.__name__)])()


def tree_nodes(filesystem: Filesystem) -> Iterator[Pointer]:
    """Every node of the live tree except its root."""

    def below(node_pointer: Pointer | None) -> Iterator[Pointer]:
        tree = filesystem.live.tree
        node = (
            tree.root_node() if node_pointer is None else filesystem.store.load(node_pointer, None)
        )
        for child in node.values if node.level else ():
            yield child
            yield from below(child)

    yield from below(None)


def read_all(volume: Volume, model: Model, *, may_fail: bool) -> int:
    """Check that each file of the model reads right or gives EIO. Returns how many read right."""
    whole = 0
    for (directory, name), file in model.items():
        try:
            place = ROOT_INO if not directory else volume.lookup(ROOT_INO, directory).ino
            inode = volume.lookup(place, name)
            assert inode.size_bytes == len(file.data)
            assert volume.read(inode.ino, 0, len(file.data) + 1) == file.data
            assert set(volume.listxattr(inode.ino)) == set(file.xattrs)
            for attribute, value in file.xattrs.items():
                assert volume.getxattr(inode.ino, attribute) == value
            whole += 1
        except CorruptError:
            assert may_fail
    return whole


@pytest.fixture(scope="module", params=[False, True], ids=["alone", "shared"])
def populated(request: pytest.FixtureRequest) -> tuple[MemoryDevice, Model, list[Pointer]]:
    """An image and its tree nodes: once all the live volume's own, once shared by a snapshot."""
    device = MemoryDevice(TOTAL_BLOCKS)
    make_filesystem(device, duplicate_metadata=False)
    filesystem = open_filesystem(device, writable=True)
    model: Model = {}
    populate(filesystem.live, model, random.Random(7))
    if request.param:
        filesystem.apply(CreateSnapshot("before"))
    filesystem.commit()
    nodes = list(tree_nodes(filesystem))
    filesystem.close()
    return device, model, nodes


def read_all_inodes(volume: Volume) -> None:
    for place in directories(volume).values():
        for _, entry in volume.listing(place):
            volume.get(entry.ino)


def copy_of(model: Model) -> Model:
    return {place: File(bytearray(file.data), dict(file.xattrs)) for place, file in model.items()}


def test_one_lost_node_costs_its_own_items_and_nothing_else(
    populated: tuple[MemoryDevice, Model, list[Pointer]],
) -> None:
    """Promise C9: only the damaged part gives EIO; operations are whole; every commit succeeds."""
    original, first_model, nodes = populated
    assert len(nodes) > 20
    refused = 0
    for number, pointer in enumerate(nodes):
        device = original.copy()
        model = copy_of(first_model)
        choice = random.Random(number)
        kept = device.block(pointer.block)
        filesystem = open_filesystem(device, writable=True)
        if number % 2:  # the inodes are in memory when the damage happens
            read_all(filesystem.live, model, may_fail=False)
            filesystem.store.cache = NodeCache()
        device.damage(pointer.block, choice.randrange(BLOCK_SIZE_BYTES), 1 << choice.randrange(8))
        fresh = open_filesystem(device, writable=False)
        before = read_all(fresh.live, model, may_fail=True)
        untouched = copy_of(model)
        done = 0
        for step in range(OPERATIONS):
            try:
                operate(filesystem.live, model, choice)
                done += 1
            except CorruptError as error:
                assert error.errno == errno.EIO
                refused += 1
            if step % 20 == 19:
                filesystem.commit()
        assert filesystem.store.failed is None
        assert done or before == 0
        unchanged = {place: file for place, file in untouched.items() if model.get(place) == file}
        filesystem.close()

        device = device.crash()
        filesystem = open_filesystem(device, writable=False)
        read_all(filesystem.live, model, may_fail=True)
        still = read_all(filesystem.live, unchanged, may_fail=True)
        assert still >= before - (len(untouched) - len(unchanged)), "damage has spread"

        device.put(pointer.block, kept)
        report = check_image(device)
        assert report.clean, (number, [str(finding) for finding in report.findings])
        healed = open_filesystem(device, writable=True)
        assert read_all(healed.live, model, may_fail=False) == len(model)
    assert refused > len(nodes)


def test_lost_last_leaf_does_not_stop_the_making_of_files() -> None:
    """Promise C9: creating a file needs nothing that is damaged."""
    device = MemoryDevice(TOTAL_BLOCKS)
    make_filesystem(device)
    filesystem = open_filesystem(device, writable=True)
    directory = filesystem.live.create(ROOT_INO, b"place", stat.S_IFDIR | 0o755, 0, 0).ino
    for number in range(600):
        ino = filesystem.live.create(ROOT_INO, b"%d" % number, stat.S_IFREG | 0o644, 0, 0).ino
        filesystem.live.write(ino, 0, b"v" * 1000)
    filesystem.commit()
    last = filesystem.live.tree.root_node()
    while last.level:
        pointer = last.values[-1]
        last = filesystem.store.load(pointer, last.level - 1)
    filesystem.close()
    kept = {block: device.block(block) for block in (pointer.block, pointer.twin)}
    for block in kept:
        device.damage(block)

    filesystem = open_filesystem(device, writable=True)
    with pytest.raises((CorruptError, DeviceError)):
        filesystem.live.get(last_ino := ino)
    for number in range(50):
        ino = filesystem.live.create(directory, b"%d" % number, stat.S_IFREG | 0o644, 0, 0).ino
        filesystem.live.write(ino, 0, b"w" * 1500)
    filesystem.close()
    for block, data in kept.items():
        device.put(block, data)
    report = check_image(device)
    assert report.clean, [str(finding) for finding in report.findings]
    again = open_filesystem(device, writable=False).live
    assert again.read(ino, 0, 2000) == b"w" * 1500
    assert again.read(last_ino, 0, 2000) == b"v" * 1000


@pytest.mark.parametrize("cache_bytes", [CACHE_BYTES_DEFAULT, 1], ids=["cached", "uncached"])
def test_read_that_fails_at_any_moment_leaves_an_operation_undone(
    populated: tuple[MemoryDevice, Model, list[Pointer]], cache_bytes: int
) -> None:
    """Promise C9: an operation is whole or not done, whichever of its reads the device fails.

    The cache is next to nothing, so that a node read a moment ago must be read again.
    """
    original, first_model, _ = populated
    failures = 0
    for seed in range(FAILING):
        reads = 0
        while True:
            fault = Fault("read", after=reads)
            device = FaultDevice(original.copy())
            model = copy_of(first_model)
            filesystem = open_filesystem(device, writable=True)
            read_all_inodes(filesystem.live)
            filesystem.store.cache = NodeCache(cache_bytes)
            device.fault = fault
            with contextlib.suppress(DeviceError):
                operate(filesystem.live, model, random.Random(seed))
            device.fault = None
            filesystem.close()
            if not fault.fired:
                break
            failures += 1
            reads += 1
            report = check_image(device.device)
            assert report.clean, (seed, reads, [str(finding) for finding in report.findings])
            again = open_filesystem(device.device, writable=False)
            assert read_all(again.live, model, may_fail=False) == len(model)
    assert failures > 2 * FAILING


class NotInMemoryError(Exception):
    """Raised by a store that must not wait, in place of a read from disk."""


@dataclass
class Wait:
    """Makes the read after the first `reads` raise, unless an operation is changing by then."""

    filesystem: Filesystem
    reads: int
    fired: bool = False
    over: bool = False

    def instead_of(self, read: Callable[..., object]) -> Callable[..., object]:
        def refuse(*args: object, **options: object) -> object:
            if not self.over and self.filesystem.live.operation.step != CHANGING:
                if not self.reads and not self.fired:
                    self.fired = True
                    raise NotInMemoryError
                self.reads -= 1
            return read(*args, **options)

        return refuse


@pytest.mark.parametrize("cache_bytes", [CACHE_BYTES_DEFAULT, 1], ids=["cached", "uncached"])
def test_operation_that_would_wait_is_given_up_without_a_trace_and_tried_again(
    populated: tuple[MemoryDevice, Model, list[Pointer]],
    cache_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Promise: before its first change an operation can be given up; a retry then does it once.

    Each read of a node, of data and of refcounts raises "not in memory" in turn.
    """
    original, first_model, _ = populated
    # Four runs of this test, with and without twins and cache: in the short run each takes half.
    kinds = KINDS if is_long() else KINDS[(cache_bytes == 1) :: 2]
    waits = 0
    for seed, only in enumerate(kinds):
        reads = 0
        while True:
            model = copy_of(first_model)
            filesystem = open_filesystem(original.copy(), writable=True)
            store, volume = filesystem.store, filesystem.live
            read_all_inodes(volume)
            wait = Wait(filesystem, reads)
            store.cache = NodeCache(cache_bytes)
            for owner, name in (
                (store, "read_image"),
                (store, "read_data"),
                (store.map.index, "read_refcounts"),
            ):
                monkeypatch.setattr(owner, name, wait.instead_of(getattr(owner, name)))
            try:
                operate(volume, model, random.Random(seed), only)
            except NotInMemoryError:
                waits += 1
                assert volume.operation.step == IDLE
                if model == first_model:
                    assert not volume.inodes.dirty, "an inode was changed before the third step"
                    assert not volume.data.dirty, "data was changed before the third step"
                    assert store.admission.promised_items == store.admission.promised_blocks == 0
                    operate(volume, model, random.Random(seed), only)
            wait.over = True
            assert read_all(volume, model, may_fail=False) == len(model)
            filesystem.reclaim_orphans()
            filesystem.close()
            device = store.device
            assert isinstance(device, MemoryDevice)
            report = check_image(device)
            assert report.clean, (seed, reads, [str(finding) for finding in report.findings])
            again = open_filesystem(device, writable=False)
            assert read_all(again.live, model, may_fail=False) == len(model)
            if not wait.fired:
                break
            reads += 1
    assert waits > 15


def test_exception_while_an_operation_changes_ends_all_writing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Promise C8: half an operation is never written, whichever of our bugs interrupted it."""
    device = MemoryDevice(TOTAL_BLOCKS)
    make_filesystem(device)
    filesystem = open_filesystem(device, writable=True)
    volume = filesystem.live
    volume.create(ROOT_INO, b"before", MODE, 0, 0)
    filesystem.commit()

    def broken(*_: object) -> None:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(volume.names, "add", broken)
    with pytest.raises(RuntimeError):
        volume.create(ROOT_INO, b"half", MODE, 0, 0)
    with pytest.raises(DeviceError):
        filesystem.commit()
    with pytest.raises(DeviceError):
        volume.unlink(ROOT_INO, b"before")
    again = open_filesystem(device.crash(), writable=False).live
    assert [entry.name for _, entry in again.listing(ROOT_INO)] == [b"before"]
    assert again.inodes.count == 2
    assert "the filesystem is read-only now" in caplog.text
    caplog.clear()


def test_tree_asserts_that_an_operation_reaches_and_then_changes() -> None:
    """The tree asserts the order of an operation's steps, so a wrong order is found at once."""
    device = MemoryDevice(TOTAL_BLOCKS)
    make_filesystem(device)
    volume = open_filesystem(device, writable=True).live
    key = b"\0" * 17
    with pytest.raises(AssertionError):
        volume.tree.reach(key)  # before the operation was admitted; admission may commit
    with volume.operation.begin(TIER_ADD) as operation:
        for change in (
            lambda: volume.tree.put(key, b""),
            lambda: volume.tree.put_ascending([(key, b"")]),
            lambda: volume.tree.delete(key),
            lambda: volume.tree.pop_range(b"", b"\xff"),
            lambda: volume.tree.rewrite(key, key, lambda keys, values: []),
            lambda: volume.operation.begin(TIER_ADD),
        ):
            with pytest.raises(AssertionError):
                change()
        volume.tree.reach(key)
        operation.change_unlogged()
        with pytest.raises(AssertionError):
            volume.tree.reach(key)
