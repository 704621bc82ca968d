"""Promise C9: a bit flip in any structure is found, and repaired from a good twin, else EIO.

Every kind of structure is flipped in turn: its original, its twin, both. The byte and the bit are
random, with a seed that repeats them.
"""

import errno
import random
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from cowfs.care.check import check_image
from cowfs.care.scrub import Scrub
from cowfs.care.scrub_report import BadCopy
from cowfs.errors import CorruptError, CowfsError
from cowfs.files.items import ROOT_INO, TYPE_EXTENT, decode_extent
from cowfs.files.volume import Volume
from cowfs.history.edits import CreateSnapshot
from cowfs.history.filesystem import Filesystem
from cowfs.history.images import make_filesystem, open_filesystem
from cowfs.storage.format import BLOCK_SIZE_BYTES, NODE_SIZE_BYTES, Pointer, ring_blocks
from tests.model.devices import MemoryDevice
from tests.model.recount import recount
from tests.sizes import sized

TOTAL_BLOCKS = 4096
FLIPS = sized(360, 1500)
ORIGINAL, TWIN, BOTH = "original", "twin", "both"

Content = dict[str, bytes]


@dataclass(frozen=True)
class Place:
    """A structure that is stored once or twice."""

    kind: str
    blocks: tuple[int, ...]
    size_bytes: int


def content_of(filesystem: Filesystem) -> Content:
    """Every file of the live volume and of the snapshot; the errno where it cannot be read."""
    found: Content = {}
    for name, volume in volumes(filesystem):
        for number in range(70):
            path = f"{name}/{number}"
            try:
                inode = volume.lookup(ROOT_INO, b"%d" % number)
                found[path] = volume.read(inode.ino, 0, 1 << 20)
                for attribute in volume.listxattr(inode.ino):
                    found[path] += volume.getxattr(inode.ino, attribute)
            except CorruptError:
                found[path] = b"EIO"
            except OSError as error:
                assert error.errno == errno.ENOENT, error
                found[path] = b"ENOENT"
    return found


def volumes(filesystem: Filesystem) -> Iterator[tuple[str, Volume]]:
    yield "", filesystem.live
    snapshot = filesystem.volume(filesystem.catalog.snapshot("one").root_id)
    assert snapshot is not None
    yield "one", snapshot


def places(device: MemoryDevice, filesystem: Filesystem) -> list[Place]:
    """Every structure that the newest generation reaches."""
    store = filesystem.store
    found: dict[Pointer, Place] = {}
    data: set[int] = set()

    def node(pointer: Pointer, kind: str) -> None:
        found[pointer] = Place(kind, (pointer.block, pointer.twin), NODE_SIZE_BYTES)
        image = store.load(pointer, None)
        for key, value in zip(image.keys, image.values, strict=True):
            if image.level:
                node(value, kind)
            elif kind == "node" and key[8] == TYPE_EXTENT:
                extent = decode_extent(0, value)
                data.update(range(extent.block, extent.block + extent.count))

    node(store.superblock.catalog, "catalog")
    for record in filesystem.catalog.roots():
        node(record.pointer, "node")
    for level, entries in enumerate(store.map.index.levels):
        for number in np.flatnonzero(entries["block"]).tolist():
            pointer = store.map.index.pointer(level, number)
            blocks = (pointer.block, pointer.twin)
            found[pointer] = Place("index" if level else "counts", blocks, BLOCK_SIZE_BYTES)
    slot = store.superblock.slot()
    rings = tuple(first + slot for first in ring_blocks(TOTAL_BLOCKS))
    return [
        Place("superblock", rings, BLOCK_SIZE_BYTES),
        *found.values(),
        *(Place("data", (block,), BLOCK_SIZE_BYTES) for block in sorted(data)),
    ]


@pytest.fixture(scope="module")
def image() -> tuple[MemoryDevice, Content, dict[str, list[Place]]]:
    """A small image with a snapshot, its known content, and the structures that can be flipped."""
    device = MemoryDevice(TOTAL_BLOCKS)
    make_filesystem(device)
    filesystem = open_filesystem(device, writable=True)
    choice = random.Random(3)
    live = filesystem.live
    for number in range(60):
        ino = live.create(ROOT_INO, b"%d" % number, stat.S_IFREG | 0o644, 0, 0).ino
        live.write(ino, 0, choice.randbytes(choice.choice([10, 1800, 5000, 20_000])))
        if not number % 4:
            live.setxattr(ino, b"user.a", choice.randbytes(choice.choice([10, 2000])))
    filesystem.apply(CreateSnapshot("one"))
    for number in range(50, 70):
        inode = live.find(ROOT_INO, b"%d" % number)
        if inode is None:
            inode = live.create(ROOT_INO, b"%d" % number, stat.S_IFREG | 0o644, 0, 0)
        live.write(inode.ino, 0, choice.randbytes(3000))
    filesystem.close()
    filesystem = open_filesystem(device, writable=False)
    by_kind: dict[str, list[Place]] = {}
    for place in places(device, filesystem):
        by_kind.setdefault(place.kind, []).append(place)
    return device, content_of(filesystem), by_kind


def flips() -> list[tuple[int, str, str]]:
    """(seed, kind, which copies) of every flip."""
    kinds = ("superblock", "catalog", "node", "node", "counts", "index")
    turns = [(kind, which) for kind in kinds for which in (ORIGINAL, TWIN, BOTH)]
    turns += [("data", ORIGINAL)] * 3
    return [(seed, *turns[seed % len(turns)]) for seed in range(FLIPS)]


def flip(device: MemoryDevice, place: Place, which: str, choice: random.Random) -> None:
    hit = {ORIGINAL: place.blocks[:1], TWIN: place.blocks[1:], BOTH: place.blocks}[which]
    for block in hit:
        at = choice.randrange(place.size_bytes)
        device.damage(
            block + at // BLOCK_SIZE_BYTES, at % BLOCK_SIZE_BYTES, 1 << choice.randrange(8)
        )


def scrub(device: MemoryDevice, filesystem: Filesystem | None) -> Scrub:
    """A scrub whose repairs go to the filesystem, as in a daemon."""

    def repair(copy: BadCopy) -> None:
        assert filesystem is not None
        checksum = bytes.fromhex(copy.checksum)
        filesystem.store.offer_repair(
            copy.kind, copy.bad_block, copy.good_block, copy.birth, checksum
        )

    found = Scrub(device, repair=None if filesystem is None else repair)
    found.run()
    return found


def test_every_flip_is_found_and_repaired_or_costs_its_own_part(
    image: tuple[MemoryDevice, Content, dict[str, list[Place]]],
    record_property: Callable[[str, object], None],
) -> None:
    """Promise C9: damage is always found, bytes are never wrong; a good twin restores each bit."""
    original, expected, by_kind = image
    assert set(by_kind) == {"superblock", "catalog", "node", "counts", "index", "data"}
    lost = repaired = 0
    for seed, kind, which in flips():
        choice = random.Random(seed)
        place = choice.choice(by_kind[kind])
        device = original.copy()
        flip(device, place, which, choice)
        story = (seed, place, which)
        is_lost = which == BOTH or len(place.blocks) == 1
        try:
            filesystem = open_filesystem(device, writable=True)
        except CowfsError:
            # Without the catalog or the map's index nothing can be read: the error says so.
            assert is_lost, story
            assert kind in ("catalog", "index"), story
            found = scrub(device, None)
            assert found.damaged, story
            lost += 1
            continue
        if kind == "superblock" and is_lost:
            assert filesystem.store.superblock.generation < Scrub(original).superblock.generation
            lost += 1
            continue  # an older generation was mounted, which is whole
        filesystem.store.map.group(0)  # load the page: otherwise it is read only when needed
        got = content_of(filesystem)
        wrong = {path for path in expected if got[path] != expected[path]}
        assert all(got[path] == b"EIO" for path in wrong), story
        if not is_lost:
            assert not wrong, story
        found = scrub(device, filesystem)
        if is_lost:
            assert found.damaged, story
            assert not found.bad_copies, story
            if kind == "data":
                assert wrong, story
                named = {path for damage in found.damage for path in damage.paths}
                assert named == {
                    path if path.startswith("/") else f"/.snapshots/{path}" for path in wrong
                }, story
            if not wrong:
                filesystem.live.create(ROOT_INO, b"after", stat.S_IFREG | 0o644, 0, 0)
            filesystem.commit()
            assert filesystem.store.failed is None, story
            lost += 1
            continue
        assert not found.damaged, story
        assert [copy.bad_block for copy in found.bad_copies] == [
            place.blocks[0 if which == ORIGINAL else 1]
        ], story
        filesystem.commit()
        filesystem.close()
        for block, other in zip(place.blocks, reversed(place.blocks), strict=True):
            for step in range(place.size_bytes // BLOCK_SIZE_BYTES):
                assert device.block(block + step) == device.block(other + step), story
        again = scrub(device, None)
        assert not again.bad_copies, story
        assert not again.damaged, story
        repaired += 1
        if not repaired % 20:
            report = check_image(device)
            assert report.clean, (story, [str(finding) for finding in report.findings])
            recount(device).require_exact()
    assert lost > 100
    assert repaired > 100
    record_property("count", ("bit flips repaired from a twin", repaired))
    record_property("count", ("bit flips in both copies or in data, EIO for their part", lost))


@pytest.mark.parametrize("kind", ["catalog", "node", "counts", "index"])
def test_damage_to_the_header_of_a_twin_is_repaired(
    image: tuple[MemoryDevice, Content, dict[str, list[Place]]], kind: str
) -> None:
    """Promise C9: a twin is also repaired if only the checksum in its own header is wrong."""
    original, _, by_kind = image
    place = by_kind[kind][0]
    block, twin = place.blocks
    for at in range(32):
        device = original.copy()
        device.damage(twin, at, 1)
        filesystem = open_filesystem(device, writable=True)
        found = scrub(device, filesystem)
        assert [copy.bad_block for copy in found.bad_copies] == [twin], at
        filesystem.commit()
        filesystem.close()
        assert device.block(twin) == device.block(block), at
