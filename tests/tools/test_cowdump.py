"""Promises that cowdump shows what is in an image, as text and as JSON, and fails in one line."""

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from cowfs.history.records import DropStep, RootKind
from cowfs.storage.format import BLOCK_SIZE_BYTES
from tests.care.image_builder import ImageBuilder, sample_volume
from tools.cowdump.main import VIEWS, main


class Image:
    """An image file of a volume and its snapshot, and the records it was made from."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.builder = builder = ImageBuilder()
        volume = sample_volume(builder)
        self.record = builder.add_root(volume, per_node=6)
        shared = (self.record.pointer, self.record.node_count)
        builder.add_root(volume, "monday", RootKind.SNAPSHOT, tree=shared)
        builder.add_drop([DropStep(self.record.pointer, 0)], "gone")
        self.device = builder.finish()
        self.write()

    def write(self) -> None:
        with self.path.open("wb") as file:
            file.truncate(self.device.size_bytes)
            for block, data in self.device.blocks.items():
                file.seek(block * BLOCK_SIZE_BYTES)
                file.write(data)


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return Image(tmp_path / "disk.img")


@click.command(add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def program(words: tuple[str, ...]) -> None:
    """Run the whole program, with its own handling of errors."""
    main(list(words))


def run(image: Image, *words: str) -> Result:
    return CliRunner().invoke(program, [str(image.path), *words])


def shown(image: Image, *words: str) -> dict[str, Any]:
    """The JSON answer to these words."""
    result = run(image, *words, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert isinstance(found, dict)
    return found


def test_superblocks_shows_the_ring_and_the_newest(image: Image) -> None:
    """Promise: without a command cowdump shows the ring, without its empty slots."""
    found = shown(image)
    assert found["generation"] == 70
    assert found["label"] == "hand-made"
    assert found["catalog"]["birth"] == 70
    assert [(row["copy"], row["slot"], row["shown"]) for row in found["rows"]] == [
        ("A", 6, True),
        ("B", 6, True),
    ]
    text = run(image).output
    assert "hand-made" in text
    assert "000102030405060708090a0b0c0d0e0f" in text


def test_damaged_superblock_is_shown_as_such(image: Image) -> None:
    """Promise: a torn slot has a row with the reason."""
    image.device.damage(6)
    image.write()
    rows = shown(image, "superblocks")["rows"]
    assert rows[0]["problem"] == "checksum is wrong"
    assert rows[1]["shown"] is True


def test_catalog_shows_roots_names_and_drops(image: Image) -> None:
    """Promise: catalog shows every entry in words."""
    rows = {row["key"]: row for row in shown(image, "catalog")["rows"]}
    assert rows["root 1"]["kind"] == "volume"
    assert rows["root 2"]["kind"] == "snapshot"
    assert rows["root 2"]["tree"]["block"] == image.record.pointer.block
    assert rows["snapshot name monday"]["root_id"] == 2
    assert rows["volume name main"]["root_id"] == 1
    assert rows["drop 1"]["name"] == "gone"
    assert rows["drop 1"]["path"][0]["done"] == 0
    assert "snapshot name monday" in run(image, "catalog").output


def test_tree_shows_every_node_by_name_and_by_number(image: Image) -> None:
    """Promise: a root may be named or numbered; trees that are shared look the same."""
    found = shown(image, "tree", "monday")
    assert found["rows"] == shown(image, "tree", "1")["rows"]
    assert len(found["rows"]) == image.record.node_count
    assert found["rows"][0]["level"] == 1
    assert found["rows"][0]["block"] == image.record.pointer.block
    leaves = found["rows"][1:]
    assert {row["level"] for row in leaves} == {0}
    assert sum(row["entries"] for row in leaves) == 26
    assert leaves[0]["first"] == "0 orphan 7"


def test_node_shows_entries_of_inner_nodes_leaves_and_twins(image: Image) -> None:
    """Promise: any node can be shown by its block; a twin shows its original's number."""
    pointer = image.record.pointer
    inner = shown(image, "node", str(pointer.block))
    assert inner["level"] == 1
    assert inner["checksum"] == pointer.checksum.hex()
    twin = shown(image, "node", hex(pointer.twin))
    assert twin["written_for_block"] == pointer.block
    assert twin["rows"] == inner["rows"]
    leaf = shown(image, "node", str(inner["rows"][0]["block"]))
    assert leaf["rows"][0]["orphan"] == 7
    catalog = shown(image, "superblocks")["catalog"]["block"]
    assert shown(image, "node", str(catalog))["owner"] == "catalog"


def test_items_shows_all_items_of_an_inode_in_words(image: Image) -> None:
    """Promise: inode, names, xattrs, symlink, inline data and extents are shown, across leaves."""
    rows = shown(image, "items", "main", "3")["rows"]
    assert [row["key"].split()[1] for row in rows] == [
        "inode",
        *["xattr"] * 4,
        *["extent"] * 2,
    ]
    assert rows[0]["mode"] == "-rw-------"
    assert rows[0]["mtime"] == "2023-11-14 22:13:20.000000000"
    assert {row["name"] for row in rows if "name" in row} == {"user.small", "user.large"}
    assert [(row["file_block"], row["block_count"]) for row in rows[-2:]] == [(0, 3), (7, 3)]
    assert shown(image, "items", "main", "4")["rows"][1]["target"] == "hello"
    inline = shown(image, "items", "main", "2")["rows"][1]
    assert bytes.fromhex(inline["bytes"]) == b"hello world"
    names = [
        name["name"]
        for row in shown(image, "items", "main", "1")["rows"]
        for name in row.get("names", [])
    ]
    assert sorted(names) == ["big", "empty", "fifo", "hello", "link", "sub"]
    assert shown(image, "items", "main", "0")["rows"][0]["orphan"] == 7
    assert shown(image, "items", "main", "77")["rows"] == []


def test_map_shows_groups_and_histogram(image: Image) -> None:
    """Promise: the numbers of the space map add up to those of the superblock."""
    found = shown(image, "map")
    assert sum(found["blocks_by_refcount"].values()) == found["used_blocks"]
    assert found["blocks_by_refcount"]["3"] == 8
    (group,) = found["rows"]
    assert (group["group"], group["kind"], group["refcount_max"]) == (0, "nodes", 3)
    assert group["free_blocks"] == 1024 - found["used_blocks"]


def test_map_of_a_group_shows_runs_of_equal_refcount(image: Image) -> None:
    """Promise: a group is shown in detail, as runs of equal refcount without the free blocks."""
    found = shown(image, "map", "0")
    pointer = image.record.pointer
    assert {"first_block": pointer.block, "block_count": 8, "refcount": 3} in found["rows"]
    assert sum(row["block_count"] for row in found["rows"]) == found["used_blocks"]
    assert shown(image, "map", "3")["rows"] == []


def test_earlier_generation_is_shown_on_demand(image: Image) -> None:
    """Promise: --generation picks a slot; a missing generation is an error that says so."""
    assert shown(image, "superblocks", "--generation", "70")["generation"] == 70
    result = run(image, "catalog", "--generation", "9")
    assert result.exit_code == 1
    assert "no superblock of generation 9" in result.stderr


def test_damage_is_told_and_the_rest_is_shown(image: Image) -> None:
    """Promise: a bad copy is one line on stderr; the twin is shown, and the status is 1."""
    image.device.damage(image.record.pointer.block)
    image.write()
    result = run(image, "tree", "main", "--json")
    assert result.exit_code == 1
    assert len(json.loads(result.stdout)["rows"]) == image.record.node_count
    assert result.stderr.splitlines() == [
        f"cowdump: block {image.record.pointer.block}: node: checksum is wrong; "
        "the other copy is intact"
    ]


@pytest.mark.parametrize(
    ("words", "exit_code", "text"),
    [
        (("tree", "nowhere"), 2, "there is no root nowhere; there are main, monday"),
        (("tree",), 2, "use: cowdump IMAGE tree ROOT"),
        (("items", "main"), 2, "use: cowdump IMAGE items ROOT INO"),
        (("items", "main", "x"), 2, "x is not an inode number"),
        (("node", "-1"), 2, "-1"),
        (("node", "99999"), 2, "block 99999 is not inside the image"),
        (("node", "1000"), 1, "no node begins here"),
        (("catalog", "x"), 2, "use: cowdump IMAGE catalog"),
        (("map", "0", "1"), 2, "use: cowdump IMAGE map [GROUP]"),
        (("nonsense",), 2, "nonsense"),
    ],
)
def test_wrong_use_is_told_in_one_line(
    image: Image, words: tuple[str, ...], exit_code: int, text: str
) -> None:
    """Promise: usage errors end with 2, damage with 1, none with a traceback."""
    result = run(image, *words)
    assert result.exit_code == exit_code
    assert text in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_missing_or_foreign_image_is_told(tmp_path: Path) -> None:
    """Promise: a missing image ends with 10, a foreign file with 1."""
    result = CliRunner().invoke(program, [str(tmp_path / "none.img")])
    assert result.exit_code == 10
    assert "there is no image" in result.stderr
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"x" * (1 << 20))
    result = CliRunner().invoke(program, [str(foreign)])
    assert result.exit_code == 1
    assert "is not a cowfs image" in result.stderr


def test_image_is_not_written_to(image: Image) -> None:
    """Promise: cowdump changes nothing, and needs no write permission."""
    before = image.path.read_bytes()
    image.path.chmod(0o444)
    for what in VIEWS:
        words = {"tree": ["main"], "node": ["70"], "items": ["main", "1"]}.get(what, [])
        assert run(image, what, *words).exit_code == 0
    assert image.path.read_bytes() == before


def test_names_cannot_play_with_the_terminal(tmp_path: Path) -> None:
    """Promise: control characters and markup in names are shown as text."""
    image = Image(tmp_path / "disk.img")
    builder = ImageBuilder()
    volume = sample_volume(builder)
    volume.name(1, b"\x1b[31mred[bold]\xff", 9)
    volume.inodes[9].nlink = 2
    builder.add_root(volume)
    image.device = builder.finish()
    image.write()
    output = run(image, "items", "main", "1").output
    assert r"\x1b[31mred[bold]\xff" in output
    assert "\x1b" not in output
