"""cowdump: reads an image through its formats alone, and makes the views that are printed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import msgspec
import numpy as np

from cowfs.care.reader import EMPTY, MetadataReader, choose_superblock, read_ring
from cowfs.care.references import index_pointer, pointer_fault
from cowfs.errors import CorruptError, UsageError
from cowfs.files.calls import decode_calls
from cowfs.files.items import KEY_BYTES
from cowfs.history.records import RootRecord, decode_root
from cowfs.storage.device import FileDevice
from cowfs.storage.format import (
    BLOCK_SIZE_BYTES,
    FLAG_CLEAN,
    GROUP_BLOCKS,
    INDEX_FANOUT,
    NODE_BLOCKS,
    NODE_HEADER,
    NODE_MAGIC,
    NODE_SIZE_BYTES,
    NodeImage,
    Pointer,
    Superblock,
    decode_node,
    decode_pointer,
    index_shape,
)
from cowfs.storage.log_records import read_log

from .records import (
    Record,
    call_record,
    catalog_key,
    catalog_record,
    item_key,
    item_record,
    pointer_record,
    preview,
    refcount_runs,
    root_record,
    superblock_record,
    time_text,
)

KIND_WORDS = ("none", "data", "nodes", "twins")
DAMAGE_LINES_MAX = 1000


@dataclass
class View:
    """What is printed: some facts, and a table with the members of `rows` as columns."""

    title: str
    facts: Record = field(default_factory=dict)
    rows: list[Record] = field(default_factory=list)


class Dump:
    """One image at one generation.

    Args:
        device: the image.
        generation: one that is still in the ring of superblocks; None: the newest.

    Attributes:
        damage: a line for each damaged block found so far, up to DAMAGE_LINES_MAX.

    Raises:
        ImageError: no superblock fits.
    """

    def __init__(self, device: FileDevice, generation: int | None) -> None:
        self.device = device
        self.slots = read_ring(device)
        self.superblock: Superblock = choose_superblock(device, self.slots, generation)
        self.damage: list[str] = []
        self._reader = MetadataReader(device, self.superblock)

    def _note(self, _invariant: str, what: str, block: int) -> None:
        """Add a line to `damage`."""
        if len(self.damage) < DAMAGE_LINES_MAX:
            self.damage.append(f"block {block}: {what}")

    # --- views ------------------------------------------------------------------------------------

    def superblocks(self) -> View:
        """The ring of superblocks, and the chosen one in full."""
        chosen = self.superblock
        view = View("superblocks", superblock_record(chosen))
        for slot in self.slots:
            row: Record = {"copy": "AB"[slot.copy], "slot": slot.number, "block": slot.block}
            if slot.superblock is None:
                if slot.problem != EMPTY:
                    view.rows.append(row | {"problem": slot.problem})
                continue
            found = slot.superblock
            view.rows.append(
                row
                | {
                    "generation": found.generation,
                    "shown": found.generation == chosen.generation,
                    "clean": bool(found.flags & FLAG_CLEAN),
                    "committed": time_text(found.committed_ns),
                    "oldest_retained": found.oldest_retained,
                    "used_blocks": found.used_blocks,
                    "system_blocks": found.system_blocks,
                    "catalog": found.catalog.block,
                    "space_map": found.space_map.block,
                }
            )
        return view

    def catalog(self) -> View:
        """All entries of the catalog."""
        view = View("catalog", {"generation": self.superblock.generation})
        for image, _ in self._nodes(self.superblock.catalog):
            if image.level:
                continue
            for key, value in zip(image.keys, image.values, strict=True):
                view.rows.append(
                    {"key": catalog_key(key), **self._described(catalog_record, key, value)}
                )
        return view

    def tree(self, root: str) -> View:
        """All nodes of the tree of a root (name or number), parents first. Raises UsageError."""
        record = self._root(root)
        view = View(f"tree of {record.name}", root_record(record))
        for image, pointer in self._nodes(record.pointer):
            view.rows.append(
                {
                    "level": image.level,
                    "block": image.block,
                    "twin": pointer.twin,
                    "birth": image.birth,
                    "owner": image.owner,
                    "entries": len(image.keys),
                    "used_bytes": image.used_bytes,
                    "first": item_key(image.keys[0]) if image.keys else "",
                    "last": item_key(image.keys[-1]) if image.keys else "",
                }
            )
        return view

    def node(self, block: int) -> View:
        """The node at a block, and its entries. Raises CorruptError: no whole node is there."""
        data = self.device.read(block * BLOCK_SIZE_BYTES, NODE_SIZE_BYTES)
        header = NODE_HEADER.unpack_from(data)
        if header[1] != NODE_MAGIC:
            raise CorruptError("node", block, "no node begins here")
        checksum, birth, own_block = header[0], header[7], header[8]
        superblock = self.superblock
        pointer = Pointer(own_block, 0, birth, checksum)
        image = decode_node(data, pointer, superblock.image_id, superblock.seed, None)
        view = View(
            f"node at block {block}",
            {
                "written_for_block": own_block,
                "level": image.level,
                "birth": birth,
                "owner": image.owner or "catalog",
                "entries": len(image.keys),
                "used_bytes": image.used_bytes,
                "checksum": checksum.hex(),
            },
        )
        key_text, describe = (
            (item_key, item_record) if image.owner else (catalog_key, catalog_record)
        )
        for index, (key, value) in enumerate(zip(image.keys, image.values, strict=True)):
            row: Record = {"entry": index, "key": key_text(key)}
            if image.level:
                view.rows.append(row | pointer_record(decode_pointer(value)))
            else:
                view.rows.append(row | self._described(describe, key, value))
        return view

    def items(self, root: str, ino: int) -> View:
        """All items of an inode of a root (name or number). Raises UsageError."""
        record = self._root(root)
        view = View(f"items of inode {ino} in {record.name}")
        first, beyond = ino.to_bytes(8, "big"), (ino + 1).to_bytes(8, "big")
        for image, _ in self._nodes(record.pointer, (first, beyond)):
            if image.level:
                continue
            for key, value in zip(image.keys, image.values, strict=True):
                if len(key) == KEY_BYTES and first <= key < beyond:
                    row = {"key": item_key(key), "leaf": image.block}
                    view.rows.append(row | self._described(item_record, key, value))
        return view

    def map(self, only_group: int | None) -> View:
        """The groups of the space map; with `only_group` the refcounts of that group."""
        superblock = self.superblock
        histogram: dict[int, int] = {}
        kinds: dict[str, int] = {}
        view = View("space map" if only_group is None else f"group {only_group} of the space map")
        for group, entry in self._groups():
            if only_group is not None and group != only_group:
                continue
            pointer = index_pointer(entry)
            fault = pointer_fault(pointer, 1, superblock.generation, superblock)
            if fault is not None:
                self._note(*fault, pointer.block)
                continue
            page = self._reader.refcounts(pointer, self._note)
            if page is None:
                continue
            word = KIND_WORDS[min(int(entry["kind"]), len(KIND_WORDS) - 1)]
            kinds[word] = kinds.get(word, 0) + 1
            counts, times = np.unique(page, return_counts=True)
            for count, blocks in zip(counts.tolist(), times.tolist(), strict=True):
                if count:
                    histogram[count] = histogram.get(count, 0) + blocks
            if only_group is None:
                view.rows.append(
                    {
                        "group": group,
                        "first_block": group * GROUP_BLOCKS,
                        "kind": word,
                        "free_blocks": int(entry["free"]),
                        "refcount_max": int(page.max()),
                        **pointer_record(pointer),
                    }
                )
            else:
                view.rows += refcount_runs(group, page)
        view.facts = {
            "total_blocks": superblock.total_blocks,
            "used_blocks": superblock.used_blocks,
            "system_blocks": superblock.system_blocks,
            "index_levels": len(index_shape(superblock.total_blocks)),
            "groups_with_page": len(view.rows) if only_group is None else sum(kinds.values()),
            "groups_by_kind": kinds,
            "blocks_by_refcount": {str(count): histogram[count] for count in sorted(histogram)},
        }
        return view

    # --- reading ----------------------------------------------------------------------------------

    def _nodes(
        self, root: Pointer, between: tuple[bytes, bytes] | None = None
    ) -> Iterator[tuple[NodeImage, Pointer]]:
        """Yield the readable nodes of a tree with their pointers, parents first.

        Args:
            between: a range of keys (first, beyond); skip nodes that cannot hold keys in it.
        """
        waiting: list[tuple[Pointer, int | None]] = [(root, None)]
        visited = set()
        while waiting:
            pointer, level = waiting.pop()
            if pointer.block in visited:
                self._note("I5", "two ways lead to this node; it is shown once", pointer.block)
                continue
            visited.add(pointer.block)
            superblock = self.superblock
            fault = pointer_fault(pointer, NODE_BLOCKS, superblock.generation, superblock)
            if fault is not None:
                self._note(*fault, pointer.block)
                continue
            image = self._reader.node(pointer, level, self._note)
            if image is None:
                continue
            yield image, pointer
            if image.level:
                # The first key of a node is no lower bound of what is below it.
                lower, upper = [b"", *image.keys[1:]], [*image.keys[1:], b"\xff" * KEY_BYTES]
                children = [
                    (decode_pointer(value), image.level - 1)
                    for low, high, value in zip(lower, upper, image.values, strict=True)
                    if between is None or (high > between[0] and low < between[1])
                ]
                waiting += reversed(children)

    def _groups(self) -> Iterator[tuple[int, np.void]]:
        """Yield the number and the index entry of each group that has a page of refcounts."""
        levels = len(index_shape(self.superblock.total_blocks))
        waiting = [(self.superblock.space_map, levels, 0)]
        while waiting:
            pointer, level, number = waiting.pop()
            fault = pointer_fault(pointer, 1, self.superblock.generation, self.superblock)
            if fault is not None:
                self._note(*fault, pointer.block)
                continue
            entries = self._reader.index_page(pointer, level, number, self._note)
            if entries is None:
                continue
            found = np.flatnonzero(entries["block"]).tolist()
            for position in found if level == 1 else reversed(found):
                child = number * INDEX_FANOUT + position
                if level == 1:
                    yield child, entries[position]
                else:
                    waiting.append((index_pointer(entries[position]), level - 1, child))

    def log(self) -> View:
        """The records of the log that follows the chosen commit, a row for each call."""
        place = self.superblock.log
        facts: Record = {"generation": self.superblock.generation}
        if place is None:
            return View("log", facts | {"log": "none"})
        view = View("log", facts | place._asdict())
        for record in read_log(self.device, self.superblock):
            for bad in record.bad_copies:
                self._note("C9", f"a copy of record {record.sequence} is not whole", bad)
            row: Record = {"record": record.sequence, "block": record.block}
            try:
                calls = decode_calls(record.body)
            except (msgspec.DecodeError, RecursionError) as error:
                self._note("I5", f"record {record.sequence}: {error}", record.block)
                view.rows.append(row | {"call": "damaged", "bytes": preview(record.body)})
                continue
            view.rows += [row | call_record(call) for call in calls]
        return view

    def _root(self, name_or_id: str) -> RootRecord:
        """Find a root by name or number. Raises UsageError."""
        names = []
        for image, _ in self._nodes(self.superblock.catalog):
            if image.level:
                continue
            for key, value in zip(image.keys, image.values, strict=True):
                if key[:1] != b"R":
                    continue
                record = decode_root(value)
                if name_or_id in (record.name, str(record.root_id)):
                    return record
                names.append(record.name)
        raise UsageError(f"there is no root {name_or_id}; there are {', '.join(names) or 'none'}")

    def _described(
        self, describe: Callable[[bytes, bytes], Record], key: bytes, value: bytes
    ) -> Record:
        """Describe an entry; of a damaged one the reason and a preview, noted as damage."""
        try:
            return describe(key, value)
        except CorruptError as error:
            self.damage.append(str(error))
            return {"damaged": error.reason, "bytes": preview(value)}
