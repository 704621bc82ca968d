"""Promises of accounting on trees that lie about sharing: an error, in bounded time."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from cowfs.accounting.owners import survey
from cowfs.accounting.path_usage import Argument, usage_of_path
from cowfs.accounting.pinned import pinned_by
from cowfs.accounting.versions import versions_of
from cowfs.accounting.virtual_drop import simulate_deletion
from cowfs.care.check import check_image
from cowfs.errors import CorruptError
from cowfs.files.items import TYPE_EXTENT, key
from cowfs.history.filesystem import Filesystem
from cowfs.history.images import open_filesystem
from cowfs.history.records import DropStep, RootKind
from cowfs.storage.format import BLOCK_SIZE_BYTES, Pointer, encode_node
from tests.care.image_builder import SEED, ImageBuilder, MemoryDevice, VolumeItems
from tests.damage.exercise import account, bounded
from tests.damage.hostile import NUMBERS, Mutation, build
from tests.sizes import sized

KINDS_OF_NUMBERS = (
    "extent",
    "root",
    "drop",
    "pointer",
    "refcount",
    "inode",
    "orphan",
    "target",
    "key number",
)
Entries = list[tuple[bytes, bytes]]
Look = Callable[[Filesystem], object]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Silence the log: these images are damaged, and every warning tells of that."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def virtual_drop(filesystem: Filesystem) -> object:
    return simulate_deletion(filesystem, filesystem.catalog.snapshots()).blocks


def pinned(filesystem: Filesystem) -> object:
    return pinned_by(filesystem, filesystem.catalog.snapshots())


def usage(filesystem: Filesystem) -> object:
    """The usage of the root directory of the first snapshot, asked for as cowdu does."""
    record = filesystem.catalog.snapshots()[0]
    volume = filesystem.volume(record.root_id)
    assert volume is not None
    return usage_of_path(filesystem, Argument(record, volume, volume.get(1), b""))


def versions(filesystem: Filesystem) -> object:
    return versions_of(filesystem, filesystem.catalog.snapshots(), b"file 5")


READS: Sequence[Look] = (survey, virtual_drop, pinned, usage, versions)


def refused(device: MemoryDevice, *reads: Look) -> None:
    """The checker finds the lie, each of `reads` ends in CorruptError, and no read does worse."""
    assert not check_image(device).clean
    for read in READS:
        filesystem = open_filesystem(device, writable=False)
        with bounded(read.__name__):
            try:
                read(filesystem)
            except CorruptError:
                continue
        assert read not in reads, f"{read.__name__} found nothing wrong"


class Liar:
    """A volume of files of one block, with a snapshot whose tree a test can make as it likes."""

    def __init__(self, *, duplicated: bool = True) -> None:
        self.builder = ImageBuilder(duplicated=duplicated)
        self.volume = VolumeItems()
        self.volume.directory(1)
        self.first = 0
        for ino in range(2, 12):
            self.volume.inode(ino, 0o100644, 1, BLOCK_SIZE_BYTES)
            self.volume.name(1, b"file %d" % ino, ino)
            extent = self.builder.data(bytes([ino]) * BLOCK_SIZE_BYTES)
            self.first = self.first or extent.block
            self.volume.extent(ino, 0, extent)

    def leaves(self, per_node: int = 8) -> Entries:
        """Write the volume's leaves; return the entries of a node above them."""
        entries = self.volume.entries()
        groups = [entries[at : at + per_node] for at in range(0, len(entries), per_node)]
        return [(group[0][0], self.builder.node(0, group).encode()) for group in groups]

    def finish(self, top: Pointer) -> MemoryDevice:
        """Finish an image whose snapshot has this tree, and whose live volume shares none of it."""
        nodes = len(self.builder.node_pointers)
        live = VolumeItems()
        live.directory(1)
        self.builder.add_root(live)
        self.builder.add_root(self.volume, "monday", RootKind.SNAPSHOT, tree=(top, nodes))
        return self.builder.finish()

    def encoded(self, pointer: Pointer, level: int, entries: Entries) -> Pointer:
        """Replace the contents of an existing node."""
        data, checksum = encode_node(
            level,
            pointer.birth,
            pointer.block,
            1,
            self.builder.image_id,
            SEED,
            [item for item, _ in entries],
            [value for _, value in entries],
        )
        for block in (pointer.block, pointer.twin):
            if block:
                self.builder.write(block, data)
        return pointer._replace(checksum=checksum)


def test_image_that_does_not_lie_is_answered() -> None:
    """Promise: the sound image is answered, so the refusals below are because of the lies."""
    for duplicated in (True, False):
        liar = Liar(duplicated=duplicated)
        device = liar.finish(liar.builder.node(1, liar.leaves()))
        assert check_image(device).clean
        filesystem = open_filesystem(device, writable=False)
        answers = [read(filesystem) for read in READS]
        nodes = 1 + len(liar.volume.entries()) // 8 + 1
        assert answers[1] == 10 + 4 * nodes * (1 + duplicated)


def test_node_at_two_levels_is_refused() -> None:
    """Promise: a node that is both inner node and leaf for its parents is damage."""
    liar = Liar()
    leaves = liar.leaves()
    middle = liar.builder.node(1, leaves[1:])
    # The highest node has an inner node below it, and also one of the leaves.
    top = liar.builder.node(2, [leaves[0], (leaves[1][0], middle.encode())])
    refused(liar.finish(top), survey, virtual_drop, pinned, usage, versions)


def test_node_that_one_root_has_as_its_top_and_another_below_as_leaf_is_refused() -> None:
    """Promise: a node that is the root of one tree and a leaf of another is damage."""
    liar = Liar()
    leaves = liar.leaves()
    middle = liar.builder.node(1, leaves)
    liar.builder.add_root(liar.volume, "sunday", RootKind.SNAPSHOT, tree=(middle, 1))
    top = liar.builder.node(1, [leaves[0], (leaves[1][0], middle.encode())])
    refused(liar.finish(top), survey, virtual_drop)


def test_inner_node_that_points_at_itself_is_refused() -> None:
    """Promise: an inner node that points at itself is damage, and no walk runs in a circle."""
    liar = Liar()
    leaves = liar.leaves()
    below = liar.builder.node(1, leaves)
    # No node can hold its own checksum, so the circle needs another birth or a lying checksum.
    entries = [leaves[0], (leaves[1][0], below.encode())]
    top = liar.encoded(below, 1, entries)
    refused(liar.finish(top), survey, virtual_drop, usage)


@pytest.mark.parametrize("number", [number for number in NUMBERS if number > 4000 or number < 64])
def test_extent_that_leaves_the_image_is_refused(number: int) -> None:
    """Promise: an extent beyond the end of the image is damage, however far it reaches."""
    liar = Liar()
    item = key(5, TYPE_EXTENT, 0)
    value = liar.volume.items[item]
    liar.volume.items[item] = number.to_bytes(8, "little") + value[8:]
    top = liar.builder.tree(liar.volume.entries(), per_node=8)[0]
    for block in [block for block in liar.builder.references if block >= 4096]:
        del liar.builder.references[block]
    device = liar.finish(top)
    if 64 <= number < 4096 - 64:
        return
    reads = [survey, virtual_drop, pinned, usage] if number >= 4096 else []
    refused(device, *reads)


@pytest.mark.parametrize("member", ["block", "twin", "birth"])
@pytest.mark.parametrize("number", [1 << 31, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 4095])
def test_pointer_that_leaves_the_image_or_its_time_is_refused(member: str, number: int) -> None:
    """Promise: pointers of inner nodes, roots and the drop queue are checked before use."""
    for kind in ("child", "root", "drop"):
        liar = Liar()
        leaves = liar.leaves()
        top = liar.builder.node(1, leaves)
        lied = top._replace(**{member: number})
        if kind == "child":
            extra = (leaves[-1][0] + b"", lied.encode())
            top = liar.encoded(liar.builder.node(2, [leaves[0]], count=False), 2, [extra])
        elif kind == "root":
            top = lied
        else:
            liar.builder.add_drop([DropStep(lied, 0)])
        liar.builder.point_at = lambda pointer: None  # type: ignore[method-assign]
        device = liar.finish(top)
        refused(device, *([survey] if kind == "drop" else READS))


def test_two_pointers_with_different_checksums_are_refused() -> None:
    """Promise: two pointers to one block with different checksums are damage."""
    liar = Liar()
    leaves = liar.leaves()
    right = liar.builder.node_pointers[0]
    wrong = right._replace(checksum=bytes(16))
    other = liar.builder.node(1, [(leaves[0][0], wrong.encode()), *leaves[1:]])
    liar.builder.add_root(liar.volume, "sunday", RootKind.SNAPSHOT, tree=(other, 1))
    top = liar.builder.node(1, leaves)
    refused(liar.finish(top), survey)


@pytest.mark.parametrize("member", ["twin", "birth"])
def test_two_pointers_that_disagree_about_a_node_are_refused(member: str) -> None:
    """Promise: two pointers to one node with another twin or birth are damage."""
    liar = Liar()
    leaves = liar.leaves()
    right = liar.builder.node_pointers[0]
    wrong = right._replace(**{member: 0 if member == "twin" else right.birth - 1})
    other = liar.builder.node(1, [(leaves[0][0], wrong.encode()), *leaves[1:]])
    liar.builder.add_root(liar.volume, "sunday", RootKind.SNAPSHOT, tree=(other, 1))
    refused(liar.finish(liar.builder.node(1, leaves)), survey)


@pytest.mark.parametrize("of", ["root", "leaf", "data"])
def test_refcount_that_is_too_low_is_refused(of: str) -> None:
    """Promise: a block with fewer references than lead to it is damage, not a wrong number."""
    liar = Liar()
    leaves = liar.leaves()
    leaf = liar.builder.node_pointers[0]
    # The snapshot reaches it twice: through both halves of its tree.
    halves = [liar.builder.node(1, leaves[:3]), liar.builder.node(1, [leaves[0], *leaves[3:]])]
    top = liar.builder.node(
        2, [(leaves[0][0], halves[0].encode()), (leaves[3][0], halves[1].encode())]
    )
    liar.builder.add_root(liar.volume, "sunday", RootKind.SNAPSHOT, tree=(top, 1))
    assert liar.builder.references[leaf.block] == 2
    item = key(5, TYPE_EXTENT, 0)
    block = int.from_bytes(liar.volume.items[item][:8], "little")
    blocks = {"root": top.block, "leaf": leaf.block, "data": block}
    original = liar.builder._space_map

    def lying() -> tuple[Pointer, int]:
        liar.builder.references[blocks[of]] -= 1
        return original()

    liar.builder._space_map = lying  # type: ignore[method-assign]
    refused(liar.finish(top), virtual_drop, pinned)


def test_root_records_of_one_number_are_refused() -> None:
    """Promise: a root record that claims the id of another root is damage."""
    liar = Liar()
    sunday = liar.builder.add_root(liar.volume, "sunday", RootKind.SNAPSHOT)
    top = liar.builder.node(1, liar.leaves())
    liar.builder.catalog_items[b"R" + (3).to_bytes(8, "big")] = sunday.encode()
    refused(liar.finish(top), *READS)


@pytest.mark.parametrize("kind", KINDS_OF_NUMBERS)
def test_every_number_of_a_kind_is_answered(kind: str, tmp_path: Path) -> None:
    """Promise: at the limits of arithmetic, accounting answers or refuses, and nothing worse."""
    for what in range(sized(2, 4)):
        for value in [at for at, number in enumerate(NUMBERS) if number > 4000 or number < 3]:
            device = build([Mutation(kind, 2 * what, value, what, value)])
            with bounded(f"account {kind} {what} {value}"):
                account(device, tmp_path)
