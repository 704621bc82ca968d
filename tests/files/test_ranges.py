"""Sharing and allocating ranges of files: how much one call does, and what is refused at once."""

import stat

import pytest

from cowfs.care.check import check_image
from cowfs.errors import NoSpaceError
from cowfs.files.content import KEEP_SIZE
from cowfs.files.ranges import SHARE_BLOCKS_MAX, SHARE_EXTENTS_MAX
from cowfs.history.filesystem import Filesystem
from cowfs.history.images import make_filesystem, open_filesystem
from tests.model.devices import MemoryDevice

ROOT = 1
BLOCK = 4096
ANSWER_BYTES_MAX = (1 << 32) - 1  # fuse_write_out.size of linux/fuse.h


def make() -> tuple[MemoryDevice, Filesystem, int, int]:
    """An image with two empty files."""
    disk = MemoryDevice(16384)
    make_filesystem(disk)
    filesystem = open_filesystem(disk, writable=True)
    create = filesystem.live.create
    one, two = (create(ROOT, name, stat.S_IFREG | 0o644, 0, 0).ino for name in (b"one", b"two"))
    return disk, filesystem, one, two


def share_all(filesystem: Filesystem, one: int, two: int) -> list[int]:
    """Share all of one file into the other, call by call. Returns the size of each call."""
    live = filesystem.live
    size = live.get(one).size_bytes
    done = [0]
    while sum(done) < size:
        at = sum(done)
        done.append(live.reflink(live, one, at, two, at, size - at))
        assert done[-1] > 0, "a call that shares nothing would be the end of the file"
    return done[1:]


def test_long_holes_are_shared_in_parts_that_an_answer_can_tell() -> None:
    """Promise: sharing a sparse file of any size copies all of it, in calls of bounded size."""
    disk, filesystem, one, two = make()
    live = filesystem.live
    live.write(one, 0, b"first" * 1000)
    live.write(one, 5 << 30, b"last" * 1000)
    done = share_all(filesystem, one, two)
    assert max(done) == SHARE_BLOCKS_MAX * BLOCK <= ANSWER_BYTES_MAX
    assert live.get(two).size_bytes == live.get(one).size_bytes
    assert live.read(two, 0, 5000) == b"first" * 1000
    assert live.read(two, 5 << 30, 5000) == b"last" * 1000
    assert live.stat_blocks(live.get(two)) == live.stat_blocks(live.get(one))
    filesystem.close()
    assert check_image(disk).clean


def test_files_in_many_pieces_are_shared_in_several_calls() -> None:
    """Promise: no call takes long, however many extents a file has."""
    disk, filesystem, one, two = make()
    live = filesystem.live
    pieces = 3 * SHARE_EXTENTS_MAX + 5
    for number in range(pieces):
        live.write(one, 2 * number * BLOCK, b"%d" % number * 1000)
    assert len(share_all(filesystem, one, two)) == 4
    size = live.get(one).size_bytes
    assert live.read(two, 0, size) == live.read(one, 0, size)
    filesystem.close()
    assert check_image(disk).clean


@pytest.mark.parametrize("mode", [0, KEEP_SIZE])
def test_what_never_could_be_allocated_is_refused_without_commits_or_alarm(mode: int) -> None:
    """Promise: an allocation that could never fit is ENOSPC at once, and does not report "full"."""
    _, filesystem, one, _ = make()
    told: list[None] = []
    filesystem.store.admission.on_full = lambda: told.append(None)
    generation = filesystem.store.generation
    with pytest.raises(NoSpaceError, match="do not fit"):
        filesystem.live.allocate(one, mode, 0, 1 << 40)
    assert not told
    assert filesystem.store.generation == generation
    assert filesystem.live.get(one).size_bytes == 0
    filesystem.live.allocate(one, mode, 0, 1 << 20)
