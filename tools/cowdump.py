"""cowdump: look inside an image, record by record, without changing it.

Reads through the formats alone, so it shows what is on disk and not what the filesystem makes of
it. It takes no lock: on a mounted image it shows the newest durable generation. Damage is told on
standard error, one line each, and the rest is shown; the exit status is then 1.
"""

import json
import stat
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import click
import numpy as np
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from cowfs.care.names import FILE_TYPE_WORDS
from cowfs.care.reader import EMPTY, MetadataReader, choose_superblock, read_ring
from cowfs.care.references import index_pointer, pointer_fault
from cowfs.cli.entry import accept_any_text, warn
from cowfs.errors import EXIT_ERROR, CorruptError, CowfsError, UsageError
from cowfs.escapes import escaped
from cowfs.files.items import (
    KEY_BYTES,
    TYPE_EXTENT,
    TYPE_INLINE,
    TYPE_INODE,
    TYPE_NAME,
    TYPE_ORPHAN,
    TYPE_SYMLINK,
    TYPE_XATTR,
    XATTR_CHUNKS,
    decode_extent,
    decode_inode,
    decode_names,
    decode_xattr_first,
    split_key,
)
from cowfs.history.records import (
    RootRecord,
    decode_drop,
    decode_id,
    decode_root,
)
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

VIEWS = ("superblocks", "catalog", "tree", "node", "items", "map")
KIND_WORDS = ("none", "data", "nodes", "twins")
TYPE_WORDS = {
    TYPE_ORPHAN: "orphan",
    TYPE_INODE: "inode",
    TYPE_NAME: "name",
    TYPE_XATTR: "xattr",
    TYPE_SYMLINK: "symlink",
    TYPE_INLINE: "inline",
    TYPE_EXTENT: "extent",
}
PREVIEW_BYTES = 32
DAMAGE_LINES_MAX = 1000
PIPE_WIDTH = 1000  # nobody wants a line broken that goes to another program

Record = dict[str, Any]


@dataclass
class View:
    """What is shown: some facts, and a table whose columns are the members of its rows."""

    title: str
    facts: Record = field(default_factory=dict)
    rows: list[Record] = field(default_factory=list)


class Dump:
    """One image at one generation, and the damage met while reading it."""

    def __init__(self, device: FileDevice, generation: int | None) -> None:
        self.device = device
        self.slots = read_ring(device)
        self.superblock: Superblock = choose_superblock(device, self.slots, generation)
        self.damage: list[str] = []
        self._reader = MetadataReader(device, self.superblock)

    def _tell(self, _invariant: str, what: str, block: int) -> None:
        if len(self.damage) < DAMAGE_LINES_MAX:
            self.damage.append(f"block {block}: {what}")

    # --- views ------------------------------------------------------------------------------------

    def superblocks(self) -> View:
        chosen = self.superblock
        view = View("superblocks", _superblock_facts(chosen))
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
                    "committed": _time(found.committed_ns),
                    "oldest_retained": found.oldest_retained,
                    "used_blocks": found.used_blocks,
                    "system_blocks": found.system_blocks,
                    "catalog": found.catalog.block,
                    "space_map": found.space_map.block,
                }
            )
        return view

    def catalog(self) -> View:
        view = View("catalog", {"generation": self.superblock.generation})
        for image, _ in self._nodes(self.superblock.catalog):
            if image.level:
                continue
            for key, value in zip(image.keys, image.values, strict=True):
                view.rows.append({"key": _catalog_key(key), **self._words(_catalog, key, value)})
        return view

    def tree(self, root_words: str) -> View:
        record = self._root(root_words)
        view = View(f"tree of {record.name}", _root_facts(record))
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
                    "first": _item_key(image.keys[0]) if image.keys else "",
                    "last": _item_key(image.keys[-1]) if image.keys else "",
                }
            )
        return view

    def node(self, block: int) -> View:
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
        key_words, words = (_item_key, _item) if image.owner else (_catalog_key, _catalog)
        for index, (key, value) in enumerate(zip(image.keys, image.values, strict=True)):
            row: Record = {"entry": index, "key": key_words(key)}
            if image.level:
                view.rows.append(row | _pointer(decode_pointer(value)))
            else:
                view.rows.append(row | self._words(words, key, value))
        return view

    def items(self, root_words: str, ino: int) -> View:
        record = self._root(root_words)
        view = View(f"items of inode {ino} in {record.name}")
        first, beyond = ino.to_bytes(8, "big"), (ino + 1).to_bytes(8, "big")
        for image, _ in self._nodes(record.pointer, (first, beyond)):
            if image.level:
                continue
            for key, value in zip(image.keys, image.values, strict=True):
                if len(key) == KEY_BYTES and first <= key < beyond:
                    row = {"key": _item_key(key), "leaf": image.block}
                    view.rows.append(row | self._words(_item, key, value))
        return view

    def map(self, only_group: int | None) -> View:
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
                self._tell(*fault, pointer.block)
                continue
            page = self._reader.refcounts(pointer, self._tell)
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
                        **_pointer(pointer),
                    }
                )
            else:
                view.rows += _refcount_runs(group, page)
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
        """The nodes of a tree, parents first; only those that may hold keys of a range."""
        waiting: list[tuple[Pointer, int | None]] = [(root, None)]
        met = set()
        while waiting:
            pointer, level = waiting.pop()
            if pointer.block in met:
                self._tell("I5", "two ways lead to this node; it is shown once", pointer.block)
                continue
            met.add(pointer.block)
            superblock = self.superblock
            fault = pointer_fault(pointer, NODE_BLOCKS, superblock.generation, superblock)
            if fault is not None:
                self._tell(*fault, pointer.block)
                continue
            image = self._reader.node(pointer, level, self._tell)
            if image is None:
                continue
            yield image, pointer
            if image.level:
                # The first key of a node bounds nothing from below.
                lower, upper = [b"", *image.keys[1:]], [*image.keys[1:], b"\xff" * KEY_BYTES]
                children = [
                    (decode_pointer(value), image.level - 1)
                    for low, high, value in zip(lower, upper, image.values, strict=True)
                    if between is None or (high > between[0] and low < between[1])
                ]
                waiting += reversed(children)

    def _groups(self) -> Iterator[tuple[int, np.void]]:
        """The index entries of all groups that have a page."""
        levels = len(index_shape(self.superblock.total_blocks))
        waiting = [(self.superblock.space_map, levels, 0)]
        while waiting:
            pointer, level, number = waiting.pop()
            fault = pointer_fault(pointer, 1, self.superblock.generation, self.superblock)
            if fault is not None:
                self._tell(*fault, pointer.block)
                continue
            entries = self._reader.index_page(pointer, level, number, self._tell)
            if entries is None:
                continue
            found = np.flatnonzero(entries["block"]).tolist()
            for position in found if level == 1 else reversed(found):
                child = number * INDEX_FANOUT + position
                if level == 1:
                    yield child, entries[position]
                else:
                    waiting.append((index_pointer(entries[position]), level - 1, child))

    def _root(self, words: str) -> RootRecord:
        """The root of that name or number."""
        names = []
        for image, _ in self._nodes(self.superblock.catalog):
            if image.level:
                continue
            for key, value in zip(image.keys, image.values, strict=True):
                if key[:1] != b"R":
                    continue
                record = decode_root(value)
                if words in (record.name, str(record.root_id)):
                    return record
                names.append(record.name)
        raise UsageError(f"there is no root {words}; there are {', '.join(names) or 'none'}")

    def _words(
        self, describe: Callable[[bytes, bytes], Record], key: bytes, value: bytes
    ) -> Record:
        try:
            return describe(key, value)
        except CorruptError as error:
            self.damage.append(str(error))
            return {"damaged": error.reason, "bytes": _preview(value)}


# --- records in words -----------------------------------------------------------------------------


def _superblock_facts(superblock: Superblock) -> Record:
    return {
        "uuid": superblock.uuid.hex(),
        "label": escaped(superblock.label.encode()),
        "generation": superblock.generation,
        "committed": _time(superblock.committed_ns),
        "created": _time(superblock.created_ns),
        "total_blocks": superblock.total_blocks,
        "used_blocks": superblock.used_blocks,
        "system_blocks": superblock.system_blocks,
        "catalog_nodes": superblock.catalog_nodes,
        "next_root_id": superblock.next_root_id,
        "features": f"{superblock.compat:#x} {superblock.ro_compat:#x} {superblock.incompat:#x}",
        "duplicated_metadata": superblock.duplicates_metadata,
        "catalog": _pointer(superblock.catalog),
        "space_map": _pointer(superblock.space_map),
    }


def _root_facts(record: RootRecord) -> Record:
    return {
        "root_id": record.root_id,
        "kind": record.kind.name.lower(),
        "name": record.name,
        "automatic": record.automatic,
        "held": record.held,
        "created": _time(record.created_ns),
        "created_generation": record.created_generation,
        "parent_id": record.parent_id,
        "undo_id": record.undo_id,
        "uuid": record.uuid.hex(),
        "origin_uuid": record.origin_uuid.hex(),
        "next_ino": record.next_ino,
        "node_count": record.node_count,
        "data_blocks": record.data_blocks,
        "inode_count": record.inode_count,
        "description": escaped(record.description.encode()),
        "tree": _pointer(record.pointer),
    }


def _catalog_key(key: bytes) -> str:
    words = {b"R": "root", b"S": "snapshot name", b"V": "volume name", b"D": "drop"}
    word = words.get(key[:1])
    if word is None:
        return key.hex()
    if key[:1] in b"RD":
        return f"{word} {int.from_bytes(key[1:], 'big')}"
    return f"{word} {escaped(key[1:])}"


def _catalog(key: bytes, value: bytes) -> Record:
    if key[:1] == b"R":
        return _root_facts(decode_root(value))
    if key[:1] in (b"S", b"V"):
        return {"root_id": decode_id(value)}
    if key[:1] == b"D":
        drop = decode_drop(value)
        path = [{**_pointer(step.pointer), "done": step.done} for step in drop.path]
        return {
            "root_id": drop.root_id,
            "name": escaped(drop.name.encode()),
            "deleted": _time(drop.deleted_ns),
            "freed_blocks": drop.freed_blocks,
            "referenced_blocks": drop.referenced_blocks,
            "path": path,
        }
    return {"bytes": _preview(value)}


def _item_key(key: bytes) -> str:
    if len(key) != KEY_BYTES:
        return key.hex()
    ino, type_, offset = split_key(key)
    word = TYPE_WORDS.get(type_, f"type {type_}")
    place = f"{offset:#x}" if type_ in (TYPE_NAME, TYPE_XATTR) else str(offset)
    return f"{ino} {word} {place}"


def _item(key: bytes, value: bytes) -> Record:
    """The members of an item of a volume."""
    if len(key) != KEY_BYTES:
        return {"bytes": _preview(value)}
    ino, type_, offset = split_key(key)
    if type_ == TYPE_INODE:
        inode = decode_inode(ino, value)
        times = {
            name.removesuffix("_ns"): _time(number)
            for name, number in asdict(inode).items()
            if name.endswith("_ns")
        }
        plain = {
            name: number
            for name, number in asdict(inode).items()
            if not name.endswith("_ns") and name != "ino"
        }
        return plain | {"mode": stat.filemode(inode.mode)} | times
    if type_ == TYPE_NAME:
        return {
            "names": [
                {
                    "name": escaped(name.name),
                    "ino": name.ino,
                    "type": FILE_TYPE_WORDS[name.type],
                    "slot": name.slot,
                }
                for name in decode_names(ino, value)
            ]
        }
    if type_ == TYPE_EXTENT:
        extent = decode_extent(ino, value)
        return {
            "file_block": offset,
            "block": extent.block,
            "block_count": extent.count,
            "birth": extent.birth,
        }
    if type_ == TYPE_XATTR and not offset % XATTR_CHUNKS:
        name, size_bytes, part = decode_xattr_first(ino, value)
        return {"name": escaped(name), "size_bytes": size_bytes, "bytes": _preview(part)}
    if type_ == TYPE_SYMLINK:
        return {"target": escaped(value)}
    if type_ == TYPE_ORPHAN:
        return {"orphan": offset}
    return {"size_bytes": len(value), "bytes": _preview(value)}


def _refcount_runs(group: int, page: "np.ndarray[Any, np.dtype[np.uint32]]") -> list[Record]:
    """Runs of blocks of the same refcount, the free ones left out."""
    edges = np.flatnonzero(np.diff(page)) + 1
    starts = [0, *edges.tolist()]
    stops = [*edges.tolist(), GROUP_BLOCKS]
    return [
        {
            "first_block": group * GROUP_BLOCKS + start,
            "block_count": stop - start,
            "refcount": int(page[start]),
        }
        for start, stop in zip(starts, stops, strict=True)
        if page[start]
    ]


def _pointer(pointer: Pointer) -> Record:
    return {
        "block": pointer.block,
        "twin": pointer.twin,
        "birth": pointer.birth,
        "checksum": pointer.checksum.hex(),
    }


def _preview(value: bytes) -> str:
    return value[:PREVIEW_BYTES].hex() + ("..." if len(value) > PREVIEW_BYTES else "")


def _time(time_ns: int) -> str:
    """A time in UTC to the nanosecond; as a number where no calendar reaches it."""
    try:
        moment = datetime.fromtimestamp(time_ns // 10**9, UTC)
    except (OverflowError, ValueError, OSError):
        return f"{time_ns} ns"
    return f"{moment:%Y-%m-%d %H:%M:%S}.{time_ns % 10**9:09d}"


# --- printing -------------------------------------------------------------------------------------


def _cell(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={_cell(member)}" for name, member in value.items())
    if isinstance(value, list):
        return "\n".join(_cell(member) for member in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _print(console: Console, view: View) -> None:
    """The facts, then the table; rows of different kinds share one column for their members."""
    console.print(Text(view.title, style="bold"))
    if view.facts:
        facts = Table(show_header=False, box=None, pad_edge=False)
        for name, value in view.facts.items():
            facts.add_row(Text(name, style="dim"), Text(_cell(value)))
        console.print(facts)
    if not view.rows:
        return
    columns = list(view.rows[0])
    uniform = all(list(row) == columns for row in view.rows)
    shared = [name for name in columns if all(name in row for row in view.rows)]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in shared:
        justify: JustifyMethod = "right" if isinstance(view.rows[0][name], int) else "left"
        table.add_column(name, justify=justify, overflow="fold")
    if not uniform:
        table.add_column("", overflow="fold")
    for row in view.rows:
        cells = [Text(_cell(row[name])) for name in shared]
        if not uniform:
            rest = {name: value for name, value in row.items() if name not in shared}
            cells.append(Text(_cell(rest)))
        table.add_row(*cells)
    console.print(table)


def _number(words: str, what: str) -> int:
    try:
        number = int(words, 0)
    except ValueError:
        number = -1
    if number < 0:
        raise UsageError(f"{words} is not {what}")
    return number


def _view(dump: Dump, what: str, words: tuple[str, ...]) -> View:
    wanted = {"tree": (1, 1), "node": (1, 1), "items": (2, 2), "map": (0, 1)}
    fewest, most = wanted.get(what, (0, 0))
    if not fewest <= len(words) <= most:
        forms = {"tree": "ROOT", "node": "BLOCK", "items": "ROOT INO", "map": "[GROUP]"}
        raise UsageError(f"use: cowdump IMAGE {what} {forms.get(what, '')}".rstrip())
    if what == "superblocks":
        return dump.superblocks()
    if what == "catalog":
        return dump.catalog()
    if what == "tree":
        return dump.tree(words[0])
    if what == "node":
        block = _number(words[0], "a block number")
        if block > dump.superblock.total_blocks - NODE_BLOCKS:
            raise UsageError(f"block {block} is not inside the image")
        return dump.node(block)
    if what == "items":
        return dump.items(words[0], _number(words[1], "an inode number"))
    return dump.map(_number(words[0], "a group number") if words else None)


@click.command()
@click.argument("image", type=click.Path())
@click.argument("what", type=click.Choice(VIEWS), default="superblocks")
@click.argument("words", nargs=-1, metavar="[ROOT | BLOCK | ROOT INO | GROUP]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--generation", type=int, help="Show an earlier one that is still in the ring.")
def main(
    image: str, what: str, words: tuple[str, ...], as_json: bool, generation: int | None
) -> None:
    """Look inside IMAGE, which may be mounted; nothing is changed.

    \b
    superblocks      the ring of superblocks, and the newest one in full
    catalog          volumes, snapshots, and what is being deleted
    tree ROOT        the nodes of a volume or snapshot, by name or number
    node BLOCK       one node and its entries
    items ROOT INO   all items of one inode
    map [GROUP]      the space map: groups, or the refcounts of one group
    """
    accept_any_text()
    try:
        device = FileDevice(image, writable=False)
        try:
            dump = Dump(device, generation)
            view = _view(dump, what, words)
        finally:
            device.close()
    except CowfsError as error:
        warn("cowdump", str(error))
        raise SystemExit(error.exit_code) from None
    if as_json:
        click.echo(json.dumps({"title": view.title, **view.facts, "rows": view.rows}, indent=2))
    else:
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=PIPE_WIDTH)
        _print(console, view)
    for line in dump.damage:
        warn("cowdump", line)
    if dump.damage:
        raise SystemExit(EXIT_ERROR)


if __name__ == "__main__":
    main()
