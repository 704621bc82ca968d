"""cowdump: the records of an image in words, one function for each format.

A `Record` is a dict of a record's members for JSON and for tables: numbers, booleans, escaped text,
lists and nested dicts.
"""

import stat
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import numpy as np

from cowfs.care.names import FILE_TYPE_WORDS
from cowfs.escapes import escaped
from cowfs.files.calls import Call, Changes
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
from cowfs.history.records import RootRecord, decode_drop, decode_id, decode_root
from cowfs.storage.format import GROUP_BLOCKS, Pointer, Superblock

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

Record = dict[str, Any]


def call_record(call: Call) -> Record:
    """A call of the log: its name and its members; of data and values the length and a preview."""
    members: Record = {}
    for name in call.__struct_fields__:
        value = getattr(call, name)
        if isinstance(value, Changes):
            for changed in value.__struct_fields__:
                if getattr(value, changed) not in (None, 0, False):
                    members[changed] = getattr(value, changed)
        elif isinstance(value, bytes):
            is_name = "name" in name or name == "target"
            members[name] = escaped(value) if is_name else preview(value)
            if not is_name:
                members[f"{name}_bytes"] = len(value)
        else:
            members[name] = value
    return {"call": type(call).__name__, **members}


def superblock_record(superblock: Superblock) -> Record:
    """All members of a superblock."""
    return {
        "uuid": superblock.uuid.hex(),
        "label": escaped(superblock.label.encode()),
        "generation": superblock.generation,
        "committed": time_text(superblock.committed_ns),
        "created": time_text(superblock.created_ns),
        "total_blocks": superblock.total_blocks,
        "used_blocks": superblock.used_blocks,
        "system_blocks": superblock.system_blocks,
        "catalog_nodes": superblock.catalog_nodes,
        "next_root_id": superblock.next_root_id,
        "features": f"{superblock.compat:#x} {superblock.ro_compat:#x} {superblock.incompat:#x}",
        "duplicated_metadata": superblock.duplicates_metadata,
        "catalog": pointer_record(superblock.catalog),
        "space_map": pointer_record(superblock.space_map),
    }


def root_record(record: RootRecord) -> Record:
    """All members of the catalog record of a root."""
    return {
        "root_id": record.root_id,
        "kind": record.kind.name.lower(),
        "name": record.name,
        "automatic": record.automatic,
        "held": record.held,
        "created": time_text(record.created_ns),
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
        "tree": pointer_record(record.pointer),
    }


def catalog_key(key: bytes) -> str:
    """A key of the catalog in words; hex digits if its kind is unknown."""
    words = {b"R": "root", b"S": "snapshot name", b"V": "volume name", b"D": "drop"}
    word = words.get(key[:1])
    if word is None:
        return key.hex()
    if key[:1] in b"RD":
        return f"{word} {int.from_bytes(key[1:], 'big')}"
    return f"{word} {escaped(key[1:])}"


def catalog_record(key: bytes, value: bytes) -> Record:
    """The members of an entry of the catalog. Raises CorruptError."""
    if key[:1] == b"R":
        return root_record(decode_root(value))
    if key[:1] in (b"S", b"V"):
        return {"root_id": decode_id(value)}
    if key[:1] == b"D":
        drop = decode_drop(value)
        path = [{**pointer_record(step.pointer), "done": step.done} for step in drop.path]
        return {
            "root_id": drop.root_id,
            "name": escaped(drop.name.encode()),
            "deleted": time_text(drop.deleted_ns),
            "freed_blocks": drop.freed_blocks,
            "referenced_blocks": drop.referenced_blocks,
            "path": path,
        }
    return {"bytes": preview(value)}


def item_key(key: bytes) -> str:
    """A key of a volume's tree in words: inode number, type, offset or hash."""
    if len(key) != KEY_BYTES:
        return key.hex()
    ino, type_, offset = split_key(key)
    word = TYPE_WORDS.get(type_, f"type {type_}")
    place = f"{offset:#x}" if type_ in (TYPE_NAME, TYPE_XATTR) else str(offset)
    return f"{ino} {word} {place}"


def item_record(key: bytes, value: bytes) -> Record:
    """The members of an entry of a volume's tree. Raises CorruptError."""
    if len(key) != KEY_BYTES:
        return {"bytes": preview(value)}
    ino, type_, offset = split_key(key)
    if type_ == TYPE_INODE:
        inode = decode_inode(ino, value)
        times = {
            name.removesuffix("_ns"): time_text(number)
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
        return {"name": escaped(name), "size_bytes": size_bytes, "bytes": preview(part)}
    if type_ == TYPE_SYMLINK:
        return {"target": escaped(value)}
    if type_ == TYPE_ORPHAN:
        return {"orphan": offset}
    return {"size_bytes": len(value), "bytes": preview(value)}


def refcount_runs(group: int, page: "np.ndarray[Any, np.dtype[np.uint32]]") -> list[Record]:
    """Runs of blocks with the same refcount in one group; free blocks are left out.

    Args:
        group: the number of the group.
        page: the refcounts of its GROUP_BLOCKS blocks.
    """
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


def pointer_record(pointer: Pointer) -> Record:
    """All members of a pointer."""
    return {
        "block": pointer.block,
        "twin": pointer.twin,
        "birth": pointer.birth,
        "checksum": pointer.checksum.hex(),
    }


def preview(value: bytes) -> str:
    """The first PREVIEW_BYTES as hex digits."""
    return value[:PREVIEW_BYTES].hex() + ("..." if len(value) > PREVIEW_BYTES else "")


def time_text(time_ns: int) -> str:
    """A time in UTC to the nanosecond; the number of nanoseconds if no calendar has it."""
    try:
        moment = datetime.fromtimestamp(time_ns // 10**9, UTC)
    except (OverflowError, ValueError, OSError):
        return f"{time_ns} ns"
    return f"{moment:%Y-%m-%d %H:%M:%S}.{time_ns % 10**9:09d}"
