"""Promises that FORMAT.md and the code say the same: offsets, sizes, fields, constants, examples.

The test encodes a record with distinct values for each table, and must find every field at the
offset and in the size that its row gives.
"""

import re
import struct
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from xxhash import xxh3_64_digest, xxh3_128_digest

from cowfs.files import acl, calls, items
from cowfs.history import records
from cowfs.storage import format as storage_format
from cowfs.storage import index_pages
from cowfs.storage.format import Pointer
from cowfs.storage.log_records import encode_record

DOCUMENT = (Path(storage_format.__file__).parent.parent / "FORMAT.md").read_text(encoding="utf-8")
HEADER = ["offset", "size", "field", "meaning", "valid range"]

Row = tuple[int, int, str]


def sections() -> dict[str, str]:
    """The text of each section, by its title."""
    pieces = re.split(r"^#+ (.+)$", DOCUMENT, flags=re.MULTILINE)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def tables(text: str, header: list[str]) -> list[list[list[str]]]:
    """The tables of a text with that header, as rows of cells."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        rows = [
            [cell.strip() for cell in line.strip().strip("|").split("|")]
            for line in block.splitlines()
        ]
        if rows[0] == header:
            found.append(rows[2:])
    return found


def record_rows(title: str) -> list[Row]:
    (table,) = tables(sections()[title], HEADER)
    assert all(len(row) == 5 for row in table), title
    return [(int(row[0]), int(row[1]), row[2]) for row in table]


def sizes_of(layout: struct.Struct) -> list[int]:
    """The size of each member of a struct, padding included."""
    words = re.findall(r"(\d*)([a-zA-Z])", layout.format.lstrip("<>"))
    sizes = []
    for count, code in words:
        if code in "sx":
            sizes.append(int(count or 1))
        else:
            sizes += [struct.calcsize("<" + code)] * int(count or 1)
    return sizes


# --- a record with distinct values for each table -----------------------------------------------

CATALOG = Pointer(101, 102, 33, b"catalog-checksum")
SPACE_MAP = Pointer(103, 104, 34, b"spacemapchecksum")
SUPERBLOCK = storage_format.Superblock(
    uuid=b"uuid-of-an-image",
    seed=0x1111111111111101,
    name_seed=0x1111111111111102,
    generation=70,
    total_blocks=5000,
    flags=1,
    committed_ns=-0x1111111111111103,
    created_ns=-0x1111111111111104,
    oldest_retained=68,
    catalog=CATALOG,
    space_map=SPACE_MAP,
    used_blocks=205,
    catalog_nodes=206,
    system_blocks=207,
    next_root_id=208,
    label="a label",
    compat=0x11,
    ro_compat=0x12,
    incompat=0x3,
    log=storage_format.LogPlace(209, 409, 16, 1),
)
LOG_RECORD = encode_record(SUPERBLOCK, 225, 2, 3, b"checksum-before!", b"calls")[0]
ROOT = records.RootRecord(
    root_id=301,
    kind=records.RootKind.SNAPSHOT,
    name="name",
    uuid=b"uuid-of-the-root",
    tree=CATALOG,
    created_generation=302,
    created_ns=-303,
    next_ino=304,
    node_count=305,
    data_blocks=306,
    inode_count=307,
    parent_id=308,
    undo_id=309,
    origin_uuid=b"uuid-of-a-origin",
    flags=1,
    description="described",
)
STEP = records.DropStep(CATALOG, 77)
DROP = records.DropRecord(401, 402, "gone", -403, 404, (STEP, STEP), 405)
INODE = items.Inode(9, 0o100644, *range(501, 507), 507, -508, -509, -510, -511, 512, 513)
NODE = storage_format.encode_node(0, 601, 602, 603, 604, 605, [b"k1", b"k2"], [b"v", b""])
ENTRIES = np.zeros(storage_format.INDEX_FANOUT, index_pages.INDEX_ENTRY)
ENTRIES[0] = (701, 702, 703, np.void(b"checksum-of-page"), 704, 3, b"")
INDEX = index_pages.encode_index_page(2, 801, 802, 803, 804, 805, ENTRIES.tobytes())
ALL_BYTES = SUPERBLOCK.encode()

RECORDS: dict[str, tuple[struct.Struct | int, bytes, dict[str, Any]]] = {
    "Pointer": (
        storage_format.POINTER,
        CATALOG.encode(),
        {"block": 101, "twin": 102, "birth": 33, "checksum": b"catalog-checksum"},
    ),
    "Superblock": (
        storage_format.SUPERBLOCK,
        ALL_BYTES,
        {
            "magic": b"cowfs\0\x1a\n",
            "checksum": xxh3_128_digest(ALL_BYTES[24:4096]),
            "version": 1,
            "block_size": 4096,
            "node_size": 16384,
            "label": b"a label",
            "catalog": CATALOG.encode(),
            "space_map": SPACE_MAP.encode(),
            "log_block": 209,
            "log_twin": 409,
            "log_area_blocks": 16,
            "log_area": 1,
            **{
                name: getattr(SUPERBLOCK, name)
                for name in [
                    "compat",
                    "ro_compat",
                    "incompat",
                    "uuid",
                    "seed",
                    "name_seed",
                    "generation",
                    "total_blocks",
                    "flags",
                    "committed_ns",
                    "created_ns",
                    "oldest_retained",
                    "used_blocks",
                    "catalog_nodes",
                    "system_blocks",
                    "next_root_id",
                ]
            },
        },
    ),
    "Log record": (
        storage_format.LOG_HEADER,
        LOG_RECORD,
        {
            "checksum": xxh3_128_digest(LOG_RECORD[16:], SUPERBLOCK.seed),
            "magic": b"cowL",
            "sequence": 2,
            "image_id": SUPERBLOCK.image_id,
            "generation": 70,
            "block": 225,
            "body_bytes": 5,
            "call_count": 3,
            "previous": b"checksum-before!",
        },
    ),
    "Node header": (
        storage_format.NODE_HEADER,
        NODE[0],
        {
            "checksum": NODE[1],
            "magic": b"cowN",
            "level": 0,
            "flags": 0,
            "count": 2,
            "used_bytes": 13,
            "birth": 601,
            "block": 602,
            "owner": 603,
            "image_id": 604,
        },
    ),
    "Index page header": (
        storage_format.INDEX_HEADER,
        INDEX[0],
        {
            "checksum": INDEX[1],
            "magic": b"cowI",
            "level": 2,
            "number": 801,
            "birth": 802,
            "block": 803,
            "image_id": 804,
        },
    ),
    "Index entry": (
        storage_format.INDEX_ENTRY_BYTES,
        INDEX[0][storage_format.INDEX_HEADER_BYTES :],
        {
            "block": 701,
            "twin": 702,
            "birth": 703,
            "checksum": b"checksum-of-page",
            "free": 704,
            "kind": 3,
        },
    ),
    "Root record": (
        records.ROOT,
        ROOT.encode(),
        {
            "kind": 2,
            "tree": CATALOG.encode(),
            "name_length": 4,
            "description_length": 9,
            **{
                name: getattr(ROOT, name)
                for name in [
                    "root_id",
                    "flags",
                    "uuid",
                    "origin_uuid",
                    "parent_id",
                    "undo_id",
                    "created_generation",
                    "created_ns",
                    "next_ino",
                    "node_count",
                    "data_blocks",
                    "inode_count",
                ]
            },
        },
    ),
    "Drop record": (
        records.DROP,
        DROP.encode(),
        {
            "number": 401,
            "root_id": 402,
            "deleted_ns": -403,
            "freed_blocks": 404,
            "referenced_blocks": 405,
            "step_count": 2,
            "name_length": 4,
        },
    ),
    "Drop step": (
        records.DROP_STEP,
        DROP.encode()[records.DROP_BYTES + 4 :],
        {"pointer": CATALOG.encode(), "done": 77},
    ),
    "Item key": (
        items.KEY,
        items.key(901, 6, 902),
        {"ino": (901).to_bytes(8, "big"), "type": 6, "offset": (902).to_bytes(8, "big")},
    ),
    "Inode": (
        items.INODE,
        INODE.encode(),
        {
            name: getattr(INODE, name)
            for name in [
                "mode",
                "nlink",
                "uid",
                "gid",
                "rdev",
                "size_bytes",
                "data_blocks",
                "birth",
                "atime_ns",
                "mtime_ns",
                "ctime_ns",
                "btime_ns",
                "flags",
                "xattr_count",
            ]
        },
    ),
    "Name entry": (
        items.NAME_ENTRY,
        items.encode_names([items.Name(b"four", 1001, 8, 5)]),
        {"ino": 1001, "type": 8, "slot": 5, "length": 4},
    ),
    "Xattr header": (
        items.XATTR_HEADER,
        items.encode_xattr(b"user.name", b"v" * 3000)[0],
        {"value_length": 3000, "name_length": 9},
    ),
    "ACL header": (acl.ACL_HEADER, acl.encode_acl(()), {"version": 2}),
    "ACL entry": (
        acl.ACL_ENTRY,
        acl.encode_acl((acl.AclEntry(8, 5, 70_001),))[acl.ACL_HEADER.size :],
        {"tag": 8, "permissions": 5, "id": 70_001},
    ),
    "Extent": (
        items.EXTENT,
        items.Extent(1101, 2, 1102, bytes(16)).encode(),
        {
            "block": 1101,
            "count": 2,
            "birth": 1102,
            "algorithm": 0,
            "stored_blocks": 0,
            "skipped_blocks": 0,
        },
    ),
}


def test_every_record_table_of_the_document_is_tested() -> None:
    """Promise: every table of a record in the document is tested here."""
    with_table = {title for title, text in sections().items() if tables(text, HEADER)}
    assert with_table == set(RECORDS)


@pytest.mark.parametrize("title", RECORDS)
def test_record_table_is_contiguous_and_has_the_size_of_the_record(title: str) -> None:
    """Promise: every byte of a record is in exactly one row."""
    layout, _, _ = RECORDS[title]
    at = 0
    for offset, size, field in record_rows(title):
        assert offset == at, field
        at += size
    assert at == (layout.size if isinstance(layout, struct.Struct) else layout)


@pytest.mark.parametrize(
    "title", [title for title, record in RECORDS.items() if title != "Index entry"]
)
def test_record_table_has_the_members_of_the_struct(title: str) -> None:
    """Promise: each row is one member of the struct in the code."""
    layout = RECORDS[title][0]
    assert isinstance(layout, struct.Struct)
    assert [size for _, size, _ in record_rows(title)] == sizes_of(layout)


def test_index_entry_table_has_the_members_of_the_array_type() -> None:
    """Promise: the same for the index entry, the one record that is a numpy type."""
    fields = index_pages.INDEX_ENTRY.fields
    assert fields is not None
    assert {name: (member[1], member[0].itemsize) for name, member in fields.items()} == {
        field: (offset, size) for offset, size, field in record_rows("Index entry")
    }


@pytest.mark.parametrize("title", RECORDS)
def test_every_field_is_found_at_its_offset(title: str) -> None:
    """Promise: the encoder writes each field where its row says; reserved bytes are zero."""
    _, data, values = RECORDS[title]
    rows = record_rows(title)
    assert {field for _, _, field in rows} - {"reserved"} == set(values)
    for offset, size, field in rows:
        value = values.get(field, 0)
        if isinstance(value, bytes):
            expected = value.ljust(size, b"\0")
        else:
            expected = int(value).to_bytes(size, "little", signed=value < 0)
        assert data[offset : offset + size] == expected, field


def test_distinct_values_tell_fields_apart() -> None:
    """Promise: two fields of a record that swapped places would be noticed."""
    for title, (_, _, values) in RECORDS.items():
        told = [value for value in values.values() if value not in (0, 1, 2, 3, 4, 4096, 16384)]
        assert len(told) == len(set(told)), title


def test_constants_of_the_document_are_those_of_the_code() -> None:
    """Promise: every constant has the same value in the document and in the code."""
    (table,) = tables(sections()["Constants"], ["constant", "value", "meaning"])
    names = [row[0].strip("`") for row in table]
    assert len(names) == len(set(names))
    for name, row in zip(names, table, strict=True):
        owners = [
            module for module in (storage_format, items, acl, records) if hasattr(module, name)
        ]
        assert owners, f"{name} is in no file of the format"
        assert all(getattr(owner, name) == int(row[1]) for owner in owners), name
    for module, prefix in (
        (items, "TYPE_"),
        (items, "INODE_"),
        (storage_format, "KIND_"),
        (storage_format, "INCOMPAT_"),
    ):
        for name in vars(module):
            assert not name.startswith(prefix) or name in {*names, "INODE_BYTES"}, (
                f"{name} is not in the document"
            )


def test_acl_tags_of_the_document_are_those_of_the_code() -> None:
    """Promise: the document names each ACL tag with its number."""
    words = sections()["ACL entry"].splitlines()[4].split("|")[4]
    numbers = [int(word) for word in re.findall(r"\d+", words)]
    assert numbers == [value for name, value in vars(acl).items() if name.startswith("TAG_")]


def test_known_feature_flags_are_documented() -> None:
    """Promise: every feature flag of the code has its paragraph in the document."""
    assert storage_format.KNOWN_COMPAT == 0
    assert storage_format.KNOWN_RO_COMPAT == 0
    duplicated, log = storage_format.INCOMPAT_DUPLICATED_METADATA, storage_format.INCOMPAT_LOG
    assert duplicated | log == storage_format.KNOWN_INCOMPAT
    assert (duplicated, log) == (1 << 0, 1 << 1)
    text = sections()["Superblock"]
    assert "compat none, ro_compat none, incompat bit 0" in text
    assert "incompat bit 1 (there is a log" in " ".join(text.split())


def test_calls_of_the_document_are_those_of_the_code() -> None:
    """Promise: the table of calls has each kind, with as many members as the code encodes."""
    (table,) = tables(sections()["Calls"], ["kind", "call", "members"])
    documented = {int(kind): members for kind, _, members in table}
    kinds = {call.__struct_config__.tag: call for call in get_args(calls.Call)}
    assert documented.keys() == kinds.keys()
    for kind, members in documented.items():
        inner = re.sub(r"\[.*?\]", "changes", re.sub(r"\(.*?\)", "", members))
        words = [part for item in inner.split(",") for part in item.split(" and ")]
        assert len(words) == len(kinds[kind].__struct_fields__), members


def test_item_types_of_the_document_are_those_of_the_code() -> None:
    """Promise: the table of items has every item type of the code."""
    (table,) = tables(sections()["Item key"], ["type", "item", "offset", "value"])
    assert {int(row[0]) for row in table} == items.TYPES


def test_body_of_a_node_is_as_described() -> None:
    """Promise: a node's body is lengths of keys, lengths of values, keys, values, zeros."""
    data = NODE[0]
    assert data[64:77] == struct.pack("<4H", 2, 2, 1, 0) + b"k1k2v"
    assert not any(data[77:])
    assert NODE[1] == xxh3_128_digest(data[16:16384], 605)
    assert INDEX[1] == xxh3_128_digest(INDEX[0][16:4096], 805)


def test_catalog_keys_are_as_described() -> None:
    """Promise: a catalog key is a letter, then a number or a name."""
    assert records.root_key(258) == b"R" + bytes([0, 0, 0, 0, 0, 0, 1, 2])
    assert records.drop_key(258) == b"D" + bytes([0, 0, 0, 0, 0, 0, 1, 2])
    assert records.snapshot_key("né") == b"Sn\xc3\xa9"
    assert records.volume_key("main") == b"Vmain"
    assert records.encode_id(258) == bytes([0, 0, 0, 0, 0, 0, 1, 2])


def dump(data: bytes) -> str:
    """Bytes in the notation of the document's dumps."""
    lines = []
    for at in range(0, len(data), 16):
        piece = data[at : at + 16]
        halves = [piece[:8].hex(" "), piece[8:].hex(" ")]
        lines.append(f"{at:08x}  {'  '.join(half for half in halves if half)}")
    return "\n".join(lines)


def examples() -> dict[str, str]:
    """The dumps that the document must show, made by the encoders."""
    superblock = storage_format.Superblock(
        uuid=bytes(range(16)),
        seed=1,
        name_seed=2,
        generation=70,
        total_blocks=4096,
        flags=1,
        committed_ns=0,
        created_ns=0,
        oldest_retained=68,
        catalog=Pointer(64, 68, 70, bytes(16)),
        space_map=Pointer(72, 73, 70, bytes(16)),
        used_blocks=8,
        catalog_nodes=1,
        system_blocks=132,
        next_root_id=2,
        label="",
    )
    extent = items.Extent(4660, 1, 9, xxh3_64_digest(b"a" * 4096, 1))
    return {
        "key": dump(items.key(258, items.TYPE_EXTENT, 7)),
        "extent": dump(extent.encode()),
        "superblock": dump(superblock.encode()[:96]),
    }


@pytest.mark.parametrize("name", ["key", "extent", "superblock"])
def test_worked_example_is_what_the_encoders_write(name: str) -> None:
    """Promise: each dump in the document is what the encoders write."""
    found = re.search(rf"^```hex {name}\n(.*?)\n```", DOCUMENT, flags=re.MULTILINE | re.DOTALL)
    assert found
    assert found[1] == examples()[name]
