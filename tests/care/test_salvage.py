"""Promises of the salvage: readable files come out unchanged, losses are told, nothing escapes."""

import os
import stat
import struct
from pathlib import Path

import pytest

from cowfs.care.salvage import salvage_image
from cowfs.care.salvage_report import SalvageReport
from cowfs.errors import ImageError, UsageError
from cowfs.files.items import ROOT_INO
from cowfs.history.filesystem import Filesystem
from cowfs.history.images import open_filesystem
from cowfs.storage.device import FileDevice
from cowfs.storage.format import BLOCK_SIZE_BYTES, RING_SLOTS
from cowfs.storage.superblock import read_newest
from tests.cli.test_commands import fields, run
from tests.image_files import change, make_image, snapshot, write
from tests.model.behind import changing

FILES = 300


def fill(filesystem: Filesystem) -> None:
    """Files of every kind, enough for a tree of three levels."""
    volume = filesystem.live
    for number in range(FILES):
        parent = ROOT_INO
        if not number % 10:
            inode = volume.create(ROOT_INO, b"folder %d" % number, 0o040750, 0, 0)
            parent = inode.ino
        inode = volume.create(parent, b"file %d" % number, 0o100640, 0, 0)
        volume.write(inode.ino, 0, b"%d " % number * (1 + number * 7))
        volume.setxattr(inode.ino, b"user.number", b"%d" % number)
    inode = volume.create(ROOT_INO, b"large", 0o100600, 0, 0)
    volume.write(inode.ino, 0, os.urandom(3 << 20))
    volume.write(inode.ino, 8 << 20, b"after a hole")
    volume.link(inode.ino, ROOT_INO, b"linked")
    volume.symlink(ROOT_INO, b"link", b"../../etc/passwd", 0, 0)
    volume.create(ROOT_INO, b"fifo", 0o010600, 0, 0)
    volume.create(ROOT_INO, b"\xff\xfe not text", 0o100644, 0, 0)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    image = make_image(tmp_path / "disk.img")
    change(image, fill, snapshot("keep"), write("later", 50_000))
    return image


def contents(image: Path) -> dict[str, bytes]:
    """Every regular file of the live volume by its path, read through the filesystem."""
    filesystem = open_filesystem(FileDevice(image, writable=False), writable=False)
    volume = filesystem.live
    found = {}
    waiting = [(ROOT_INO, "")]
    while waiting:
        directory, path = waiting.pop()
        for _, entry in volume.listing(directory):
            here = f"{path}/{os.fsdecode(entry.name)}"
            inode = volume.get(entry.ino)
            if stat.S_ISDIR(inode.mode):
                waiting.append((entry.ino, here))
            elif stat.S_ISREG(inode.mode):
                found[here] = volume.read(entry.ino, 0, inode.size_bytes)
    filesystem.close()
    return found


def on_disk(folder: Path) -> dict[str, bytes]:
    found = {}
    for parent, _, files in os.walk(folder):
        for name in files:
            path = Path(parent) / name
            if path.is_file() and not path.is_symlink():
                found[f"/{path.relative_to(folder)}"] = path.read_bytes()
    return found


def salvaged(image: Path, folder: Path, **options: bool) -> SalvageReport:
    device = FileDevice(image, writable=False)
    try:
        return salvage_image(device, folder, **options)
    finally:
        device.close()


def overwrite(image: Path, *blocks: int, count: int = 1) -> None:
    with open(image, "r+b") as file:
        for block in blocks:
            if block:
                file.seek(block * BLOCK_SIZE_BYTES)
                file.write(os.urandom(count * BLOCK_SIZE_BYTES))


def lose_rings(image: Path) -> None:
    with open(image, "r+b") as file:
        for offset in (0, image.stat().st_size - RING_SLOTS * BLOCK_SIZE_BYTES):
            file.seek(offset)
            file.write(os.urandom(RING_SLOTS * BLOCK_SIZE_BYTES))


def lose_catalogs(image: Path) -> None:
    """Destroy every copy of every catalog."""
    data = image.read_bytes()
    for block in range(len(data) // BLOCK_SIZE_BYTES):
        at = block * BLOCK_SIZE_BYTES
        if data[at + 16 : at + 20] == b"cowN" and not any(data[at + 48 : at + 56]):
            overwrite(image, block)


def test_sound_image_comes_out_as_it_is(image: Path, tmp_path: Path) -> None:
    """Promise: contents, types, links, modes, times and xattrs come out; no problem is reported."""
    expected = contents(image)
    report = salvaged(image, tmp_path / "out", snapshots=True)
    assert report.complete, report
    assert on_disk(tmp_path / "out" / "main") == expected
    kept = on_disk(tmp_path / "out" / "snapshots" / "keep")
    assert kept == {path: data for path, data in expected.items() if path != "/later"}
    main = tmp_path / "out" / "main"
    assert os.readlink(main / "link") == "../../etc/passwd"
    assert (main / "large").stat().st_ino == (main / "linked").stat().st_ino
    assert (main / "large").stat().st_blocks * 512 < 4 << 20
    assert stat.S_ISFIFO((main / "fifo").stat().st_mode)
    folder, file = main / "folder 30", main / "folder 30" / "file 30"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert os.getxattr(file, "user.number") == b"30"
    filesystem = open_filesystem(FileDevice(image, writable=False), writable=False)
    inode = filesystem.live.find(ROOT_INO, b"folder 30")
    assert inode is not None
    assert folder.stat().st_mtime_ns == inode.mtime_ns
    filesystem.close()


@pytest.mark.parametrize("lose", [lose_rings, lose_catalogs], ids=["rings", "catalogs"])
def test_lost_roots_are_found_by_a_scan(image: Path, tmp_path: Path, lose: object) -> None:
    """Promise: without superblocks or without catalogs all files of the newest state come out."""
    expected = contents(image)
    lose(image)  # type: ignore[operator]
    with pytest.raises(OSError, match=r"."):
        open_filesystem(FileDevice(image, writable=False), writable=False)
    report = salvaged(image, tmp_path / "out")
    assert "scan" in report.source
    (folder,) = [path for path in (tmp_path / "out").iterdir() if path.name in ("main", "volume-1")]
    assert on_disk(folder) == expected
    assert not report.lost
    assert not report.damaged


def test_rings_and_catalogs_lost_together(image: Path, tmp_path: Path) -> None:
    """Promise: the nodes alone are enough to salvage the files."""
    expected = contents(image)
    lose_catalogs(image)
    lose_rings(image)
    salvaged(image, tmp_path / "out")
    assert on_disk(tmp_path / "out" / "volume-1") == expected


def test_damaged_newest_catalog_gives_the_generation_before(image: Path, tmp_path: Path) -> None:
    """Promise: the newest consistent root is salvaged, and the report says which one it was."""
    device = FileDevice(image, writable=False)
    newest = read_newest(device)
    before = contents_of_generation(image, newest.generation - 1)
    device.close()
    overwrite(image, newest.catalog.block, newest.catalog.twin)
    report = salvaged(image, tmp_path / "out")
    assert report.source == f"generation {newest.generation - 1}"
    assert not report.complete
    assert set(on_disk(tmp_path / "out" / "main")) == before


def contents_of_generation(image: Path, generation: int) -> set[str]:
    filesystem = open_filesystem(
        FileDevice(image, writable=False), writable=False, generation=generation
    )
    volume = filesystem.live
    found, waiting = set(), [(ROOT_INO, "")]
    while waiting:
        directory, path = waiting.pop()
        for _, entry in volume.listing(directory):
            here = f"{path}/{os.fsdecode(entry.name)}"
            mode = volume.get(entry.ino).mode
            if stat.S_ISDIR(mode):
                waiting.append((entry.ino, here))
            elif stat.S_ISREG(mode):
                found.add(here)
    filesystem.close()
    return found


def test_damaged_data_is_a_hole_and_told(image: Path, tmp_path: Path) -> None:
    """Promise: damaged data becomes a reported hole; the rest of the file is right."""
    expected = contents(image)["/large"]
    data = image.read_bytes()
    place = data.find(expected[BLOCK_SIZE_BYTES * 5 : BLOCK_SIZE_BYTES * 6])
    assert place > 0
    overwrite(image, place // BLOCK_SIZE_BYTES)
    report = salvaged(image, tmp_path / "out")
    (damaged,) = report.damaged
    assert damaged[1] == [(BLOCK_SIZE_BYTES * 5, BLOCK_SIZE_BYTES * 6)]
    assert "large" in damaged[0] or "linked" in damaged[0]
    found = (tmp_path / "out" / "main" / "large").read_bytes()
    hole = bytes(BLOCK_SIZE_BYTES)
    assert found == expected[: 5 * 4096] + hole + expected[6 * 4096 :]


def test_lost_leaf_is_told_and_what_is_below_a_lost_node_is_found(
    image: Path, tmp_path: Path
) -> None:
    """Promise: a lost leaf costs only its files; nodes below a lost node come out in lost+found."""
    expected = contents(image)
    filesystem = open_filesystem(FileDevice(image, writable=False), writable=False)
    root = filesystem.live.tree.root_node()
    assert root.level
    pointer = root.values[len(root.values) // 2]
    is_inner = root.level > 1
    filesystem.close()
    overwrite(image, pointer.block, pointer.twin)
    report = salvaged(image, tmp_path / "out")
    assert not report.complete
    found = on_disk(tmp_path / "out" / "main")
    assert found
    assert len(found) < len(expected)
    for path, data in found.items():
        assert data == expected[path] or any(name.endswith(path) for name, _ in report.damaged), (
            path
        )
    missing = len(expected) - len(found)
    assert len(report.lost) + len(report.problems) > 0
    recovered = on_disk(tmp_path / "out" / "lost+found")
    assert recovered or not is_inner
    assert missing


ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"
NO_ID = 0xFFFFFFFF
ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", *entry)
    for entry in ((1, 7, NO_ID), (2, 6, 65001), (4, 1, NO_ID), (16, 7, NO_ID), (32, 0, NO_ID))
)


@pytest.mark.parametrize("is_root", [pytest.param(True, marks=pytest.mark.needs_root), False])
def test_acls_come_out_as_root_and_their_loss_opens_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_root: bool
) -> None:
    """Promise: root restores ACLs; else the group gets the rights of its entry, not of the mask."""
    monkeypatch.setattr(os, "geteuid", lambda: 0 if is_root else 65000)

    def make(filesystem: Filesystem) -> None:
        volume = filesystem.live
        for name, type_ in ((b"file", stat.S_IFREG), (b"folder", stat.S_IFDIR)):
            ino = volume.create(ROOT_INO, name, type_ | 0o700, 0, 0).ino
            volume.setxattr(ino, ACCESS.encode(), ACL)
        volume.setxattr(ino, DEFAULT.encode(), ACL)
        broken = volume.create(ROOT_INO, b"broken", 0o100664, 0, 0)
        volume.setxattr(broken.ino, b"user.x", b"x")
        with changing(volume):
            volume.xattrs.set(volume.get(broken.ino), ACCESS.encode(), b"not an ACL")

    image = make_image(tmp_path / "disk.img")
    change(image, make)
    report = salvaged(image, tmp_path / "out")
    file, folder, broken = (
        tmp_path / "out" / "main" / name for name in ("file", "folder", "broken")
    )
    assert stat.S_IMODE(broken.stat().st_mode) == 0o604
    assert os.listxattr(broken) == ["user.x"]
    assert any(f"/broken: its attribute {ACCESS}" in words for words in report.problems)
    if is_root:
        assert os.getxattr(file, ACCESS) == os.getxattr(folder, DEFAULT) == ACL
        assert stat.S_IMODE(folder.stat().st_mode) == 0o770
    else:
        assert os.listxattr(file) == os.listxattr(folder) == []
        assert {stat.S_IMODE(path.stat().st_mode) for path in (file, folder)} == {0o710}


def test_listing_writes_nothing(image: Path, tmp_path: Path) -> None:
    """Promise: salvage -n lists the files and writes nothing."""
    answer = fields("salvage", image, tmp_path / "out", "-n")
    assert answer["complete"]
    assert "main/large" in answer["paths"]
    assert "main/folder 30/file 30" in answer["paths"]
    assert not (tmp_path / "out").exists()
    assert "main/large\n" in run("salvage", image, tmp_path / "out", "-n").stdout


def test_destination_must_be_empty_and_the_image_an_image(image: Path, tmp_path: Path) -> None:
    """Promise: a destination with files in it is refused, and so is a source that is no image."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "there").write_text("before")
    with pytest.raises(UsageError, match="not empty"):
        salvaged(image, tmp_path / "out")
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UsageError):
        salvaged(image, tmp_path / "link")
    (tmp_path / "random").write_bytes(os.urandom(1 << 20))
    with pytest.raises(ImageError):
        salvaged(tmp_path / "random", tmp_path / "other")
