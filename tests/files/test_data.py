"""The data of files, one case at a time: inline and extents, holes, parts of blocks, damage."""

import errno
import random
import stat
import threading

import pytest

from cowfs.care.check import check_image
from cowfs.errors import CorruptError, DeviceError
from cowfs.files.calls import Changes
from cowfs.files.items import (
    EXTENT_BLOCKS_MAX,
    FILE_SIZE_MAX,
    INLINE_BYTES_MAX,
    INODE_INLINE,
    TYPE_EXTENT,
    decode_extent,
    key,
    split_key,
)
from cowfs.files.volume import Volume
from cowfs.history.edits import CreateSnapshot
from cowfs.history.filesystem import Filesystem
from cowfs.history.images import make_filesystem, open_filesystem
from cowfs.storage.format import Pointer
from tests.model.devices import Fault, FaultDevice, MemoryDevice
from tests.model.recount import recount
from tests.sizes import HANG_SECONDS

ROOT = 1
BLOCK = 4096


def make(total_blocks: int = 16384) -> tuple[MemoryDevice, FaultDevice, Filesystem, int]:
    disk = MemoryDevice(total_blocks)
    make_filesystem(disk)
    device = FaultDevice(disk)
    filesystem = open_filesystem(device, writable=True)
    ino = filesystem.live.create(ROOT, b"file", stat.S_IFREG | 0o644, 0, 0).ino
    return disk, device, filesystem, ino


def extents(volume: Volume, ino: int) -> list[tuple[int, int, int]]:
    """(first file block, count, first block on the device) of each extent."""
    found = []
    for item, value in volume.tree.items(key(ino, TYPE_EXTENT, 0), key(ino, TYPE_EXTENT + 1, 0)):
        extent = decode_extent(ino, value)
        found.append((split_key(item)[2], extent.count, extent.block))
    return found


def content(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.mark.parametrize("size", [1, 2047, INLINE_BYTES_MAX])
def test_small_file_is_inline_and_takes_no_block(size: int) -> None:
    """Promise: the data of a small file is stored inline in its leaf."""
    disk, _, filesystem, ino = make()
    filesystem.live.write(ino, 0, content(size))
    filesystem.commit()
    inode = filesystem.live.get(ino)
    assert inode.flags & INODE_INLINE
    assert inode.data_blocks == 0
    again = open_filesystem(disk.crash(), writable=False)
    assert again.live.read(ino, 0, 9999) == content(size)


@pytest.mark.parametrize("committed", [False, True])
@pytest.mark.parametrize("size", [2049, 4096, 4097, 100_000])
def test_file_that_grows_past_inline_and_shrinks_again_keeps_its_bytes(
    size: int, committed: bool
) -> None:
    """Promise: bytes stay the same as a file changes from inline to extents and back."""
    disk, _, filesystem, ino = make()
    volume = filesystem.live
    expected = b""
    for grown in (content(100, 1), content(size, 2), content(50, 3), content(size, 4)):
        if len(grown) < len(expected):
            volume.setattr(ino, Changes(size_bytes=len(grown)))
        volume.write(ino, 0, grown)
        expected = grown
        assert volume.read(ino, 0, size + 1) == expected
        if committed:
            filesystem.commit()
            assert volume.read(ino, 0, size + 1) == expected
    volume.setattr(ino, Changes(size_bytes=0))
    filesystem.commit()
    assert volume.get(ino).data_blocks == 0
    volume.write(ino, 0, b"end")
    filesystem.commit()
    assert volume.get(ino).flags & INODE_INLINE
    recount(disk).require_exact()
    assert open_filesystem(disk.crash(), writable=False).live.read(ino, 0, 10) == b"end"


def test_sequential_writes_make_long_extents() -> None:
    """Promise: many small writes in file order become a few long extents."""
    _, _, filesystem, ino = make()
    for at in range(0, 4 << 20, 4096):
        filesystem.live.write(ino, at, content(4096, at))
    filesystem.commit()
    found = extents(filesystem.live, ino)
    assert len(found) <= 1024 // EXTENT_BLOCKS_MAX + 2
    stops = [first + count for first, count, _ in found]
    assert [first for first, _, _ in found] == [0, *stops[:-1]]


def test_overwritten_middle_of_an_extent_is_freed_at_once() -> None:
    """Promise: overwriting the middle of an extent frees the overwritten blocks at once."""
    disk, _, filesystem, ino = make()
    volume = filesystem.live
    volume.write(ino, 0, content(100 * BLOCK))
    filesystem.commit()
    used = filesystem.space().used
    volume.write(ino, 40 * BLOCK, content(20 * BLOCK, 2))
    filesystem.commit()
    assert [(first, count) for first, count, _ in extents(volume, ino)] == [
        (0, 40),
        (40, 20),
        (60, 40),
    ]
    assert filesystem.space().used == used
    volume.setattr(ino, Changes(size_bytes=50 * BLOCK + 1))
    filesystem.commit()
    assert volume.get(ino).data_blocks == 51
    recount(disk).require_exact()


@pytest.mark.parametrize("cold", [False, True])
def test_partial_write_keeps_the_rest_of_its_blocks(cold: bool) -> None:
    """Promise: a partial write keeps the other bytes of its blocks, cached or read from disk."""
    disk, _, filesystem, ino = make()
    model = bytearray(content(10 * BLOCK))
    filesystem.live.write(ino, 0, bytes(model))
    choice = random.Random(4)
    for turn in range(60):
        if cold and turn % 3 == 0:
            filesystem.commit()
            disk = disk.crash()
            filesystem = open_filesystem(disk, writable=True, cache_bytes=1)
        at, part = choice.randrange(9 * BLOCK), choice.randbytes(choice.choice([1, 4096, 4097]))
        filesystem.live.write(ino, at, part)
        model[at : at + len(part)] = part
        assert filesystem.live.read(ino, 0, 1 << 20) == bytes(model)


def test_hole_is_zero_and_takes_nothing() -> None:
    """Promise: holes read as zeros and take no blocks, up to the largest file size."""
    disk, _, filesystem, ino = make()
    volume = filesystem.live
    far = FILE_SIZE_MAX - 10
    volume.write(ino, far, b"0123456789")
    volume.write(ino, 1 << 40, b"middle")
    with pytest.raises(OSError, match=r".") as caught:
        volume.write(ino, far, b"01234567890")
    assert caught.value.errno == errno.EFBIG
    filesystem.commit()
    assert volume.get(ino).data_blocks == 2
    for again in (filesystem, open_filesystem(disk.crash(), writable=False)):
        assert again.live.read(ino, 0, 10_000) == bytes(10_000)
        assert again.live.read(ino, (1 << 40) - 5, 20) == bytes(5) + b"middle" + bytes(9)
        assert again.live.read(ino, far, 100) == b"0123456789"
        assert again.live.get(ino).size_bytes == FILE_SIZE_MAX


def test_truncated_tail_never_comes_back() -> None:
    """Promise: bytes cut off by truncate are zeros when the file grows again."""
    for start in (100, 1000, 3000, 5000, 9000):
        for commits in range(4):
            _, _, filesystem, ino = make(4096)
            volume = filesystem.live
            volume.write(ino, 0, content(10_000))
            if commits & 1:
                filesystem.commit()
            volume.setattr(ino, Changes(size_bytes=start))
            if commits & 2:
                filesystem.commit()
            volume.setattr(ino, Changes(size_bytes=20_000))
            expected = content(10_000)[:start].ljust(20_000, b"\0")
            assert volume.read(ino, 0, 30_000) == expected
            filesystem.commit()
            assert volume.read(ino, 0, 30_000) == expected


def test_damaged_data_block_is_an_error_for_its_range_alone() -> None:
    """Promise C9: a damaged data block is EIO and never wrong bytes; its neighbours read right."""
    disk, _, filesystem, ino = make()
    expected = content(10 * BLOCK)
    filesystem.live.write(ino, 0, expected)
    filesystem.commit()
    (_, _, block), *_ = extents(filesystem.live, ino)
    for at, mask in ((0, 1), (4095, 128), (2000, 255)):
        damaged = disk.crash()
        damaged.damage(block + 4, at, mask)
        volume = open_filesystem(damaged, writable=True).live
        with pytest.raises(CorruptError, match=f"data of inode {ino} at block {block + 4}"):
            volume.read(ino, 4 * BLOCK, 10)
        with pytest.raises(CorruptError):
            volume.read(ino, 0, 10 * BLOCK)
        assert volume.read(ino, 0, 4 * BLOCK) == expected[: 4 * BLOCK]
        assert volume.read(ino, 5 * BLOCK, 5 * BLOCK) == expected[5 * BLOCK :]


@pytest.mark.parametrize("where", [0, 2, 4])
def test_write_into_a_damaged_block_is_refused_whole(where: int) -> None:
    """Promise C9: a write that must read a damaged block is refused and changes nothing."""
    disk, _, filesystem, ino = make()
    expected = content(6 * BLOCK)
    filesystem.live.write(ino, 0, expected)
    filesystem.commit()
    (_, _, block), *_ = extents(filesystem.live, ino)
    disk.damage(block + where)
    filesystem = open_filesystem(disk.crash(), writable=True)
    volume = filesystem.live
    with pytest.raises(CorruptError):
        # The write covers part of the first and the last block, and all of the three between them.
        volume.write(ino, 100, bytes(4 * BLOCK)) if where in (0, 4) else volume.write(
            ino, 2 * BLOCK + 1, b"x"
        )
    assert filesystem.store.admission.promised_blocks == 0
    for index in range(6):
        if index != where:
            found = volume.read(ino, index * BLOCK, BLOCK)
            assert found == expected[index * BLOCK :][:BLOCK], f"block {index} was changed"
    filesystem.commit()
    assert (
        filesystem.store.admission.promised_blocks == filesystem.store.admission.promised_items == 0
    )
    volume.write(ino, where * BLOCK, bytes(BLOCK))  # overwriting the whole block heals it
    assert volume.read(ino, where * BLOCK, BLOCK) == bytes(BLOCK)
    filesystem.commit()
    assert volume.read(ino, where * BLOCK, BLOCK) == bytes(BLOCK)


def test_unreadable_data_block_is_an_error_and_nothing_more() -> None:
    """Promise: when the host fails a read with EIO, only that read fails."""
    _, device, filesystem, ino = make()
    filesystem.live.write(ino, 0, content(10 * BLOCK))
    filesystem.commit()
    device.fault = Fault("read", 0)
    with pytest.raises(DeviceError):
        filesystem.live.read(ino, 0, 100)
    assert filesystem.live.read(ino, 0, 100) == content(10 * BLOCK)[:100]
    filesystem.live.write(ino, 0, b"x")
    filesystem.commit()


def test_read_that_would_wait_says_so() -> None:
    """Promise: a read that may not wait answers from memory or says that it would wait."""
    _, device, filesystem, ino = make()
    filesystem.live.write(ino, 0, content(10 * BLOCK))
    reading = filesystem.live.reading(ino, 0, BLOCK)
    assert reading.fetch(wait=False) == content(10 * BLOCK)[:BLOCK], "it is in memory"
    filesystem.commit()
    reading = filesystem.live.reading(ino, 5, BLOCK)
    device.read_cached = lambda offset, size: None  # type: ignore[method-assign]
    assert reading.fetch(wait=False) is None
    assert reading.fetch(wait=True) == content(10 * BLOCK)[5 : BLOCK + 5]


def test_reads_while_a_commit_is_written_see_what_was_written() -> None:
    """Promise: data on its way to the disk is read from memory, by any thread."""
    _, device, filesystem, ino = make()
    gate = threading.Event()
    device.before_write = lambda: gate.wait(HANG_SECONDS) and None
    filesystem.live.write(ino, 0, content(300 * BLOCK))
    commit = filesystem.freeze()
    thread = threading.Thread(target=commit.write, daemon=True)
    thread.start()
    reading = filesystem.live.reading(ino, 0, 300 * BLOCK)
    assert reading.fetch(wait=True) == content(300 * BLOCK)
    gate.set()
    thread.join()
    filesystem.finish(commit)
    assert reading.fetch(wait=True) == content(300 * BLOCK)
    assert not filesystem.store.unwritten


def test_write_where_the_extents_cannot_be_read_is_refused_and_nothing_else_is_lost() -> None:
    """Promise C9: damaged extents fail the writes to their own file, not the next commit."""
    disk = MemoryDevice(16384)
    make_filesystem(disk, duplicate_metadata=False)
    filesystem = open_filesystem(disk, writable=True)
    live = filesystem.live
    ino = live.create(ROOT, b"large", stat.S_IFREG | 0o644, 0, 0).ino
    for megabyte in range(24):  # enough extents to fill leaves of their own
        live.write(ino, megabyte << 20, content(1 << 20, megabyte))
    filesystem.commit()
    leaves = live.tree.root_node().values
    middle = leaves[len(leaves) // 2]  # a leaf of extents alone
    pointer = middle if isinstance(middle, Pointer) else middle.pointer()
    disk.write(pointer.block * BLOCK, [bytes(BLOCK)])
    disk.flush()

    filesystem = open_filesystem(disk, writable=True)
    live = filesystem.live
    refused = 0
    for megabyte in range(24):
        try:
            live.write(ino, megabyte << 20, content(BLOCK, 99))
        except CorruptError:
            refused += 1
    other = live.create(ROOT, b"other", stat.S_IFREG | 0o644, 0, 0).ino
    live.write(other, 0, b"still works")
    filesystem.commit()
    assert 0 < refused < 24
    assert filesystem.store.failed is None
    assert open_filesystem(disk, writable=False).live.read(other, 0, 100) == b"still works"


def test_overwrites_that_cut_extents_in_one_leaf_and_across_two_keep_the_rest() -> None:
    """Promise: overwriting keeps all other bytes, however extents, runs and leaves meet."""
    disk = MemoryDevice(32768)
    make_filesystem(disk, duplicate_metadata=True)
    filesystem = open_filesystem(disk, writable=True)
    live = filesystem.live
    ino = live.create(ROOT, b"large", stat.S_IFREG | 0o644, 0, 0).ino
    expected = bytearray(content(24 << 20, 1))
    live.write(ino, 0, bytes(expected))  # 24 extents; seven fill a leaf
    filesystem.commit()
    assert filesystem.live.tree.root_node().level, "one leaf is no test"
    choice = random.Random(5)
    for round_number in range(4):
        if round_number == 2:
            filesystem.apply(CreateSnapshot("held"))
        for half in range(1, 47, 3):
            at, size = half << 19, choice.choice((BLOCK, 1 << 19, 1 << 20, 2 << 20))
            at += choice.randrange(100) * BLOCK
            data = content(min(size, len(expected) - at), round_number * 100 + half)
            live.write(ino, at, data)
            expected[at : at + len(data)] = data
            if half % 2:
                filesystem.commit()
        filesystem.commit()
        assert live.read(ino, 0, len(expected)) == expected
        recount(disk).require_exact()
    assert check_image(disk).clean


def test_runs_that_begin_and_end_anywhere_are_read_back_as_written() -> None:
    """Promise I5, I7: runs overwritten at any place keep the tree sound and read back right."""
    generator = random.Random(4)
    blocks = 3000
    places = sorted(generator.sample(range(blocks), 40))
    disk, _, filesystem, ino = make(32768)
    expected = bytearray(blocks * BLOCK)
    filesystem.live.write(ino, 0, expected)
    filesystem.commit()
    for step in range(120):
        for _ in range(generator.randint(1, 4)):
            # pick from a few places, so that runs end where others began
            first, stop = sorted(generator.sample(places, 2))
            count = min(stop - first, 300)
            data = generator.randbytes(16).ljust(count * BLOCK, bytes([step % 251]))
            filesystem.live.write(ino, first * BLOCK, data)
            expected[first * BLOCK : (first + count) * BLOCK] = data
        filesystem.commit()
        assert filesystem.live.read(ino, 0, blocks * BLOCK) == expected, step
    report = check_image(disk)
    assert report.clean, "\n".join(map(str, report.findings[:9]))
    again = open_filesystem(disk.crash(), writable=True)
    assert again.live.read(ino, 0, blocks * BLOCK) == expected
