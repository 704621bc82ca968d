"""Images that earlier versions of cowfs made: they open, show what they had, and can be used.

The images are in tests/golden, compressed. Each was made by the last version before a change of the
format, and is never made again.
"""

import lzma
from pathlib import Path

from cowfs.care.check import check_image
from cowfs.files.items import ROOT_INO
from cowfs.history.images import open_filesystem
from cowfs.storage.format import BLOCK_SIZE_BYTES, INCOMPAT_DUPLICATED_METADATA, INCOMPAT_LOG
from cowfs.storage.superblock import read_newest
from tests.model.devices import MemoryDevice

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(name: str) -> MemoryDevice:
    data = lzma.decompress((GOLDEN / f"{name}.img.xz").read_bytes())
    pieces = [data[at : at + BLOCK_SIZE_BYTES] for at in range(0, len(data), BLOCK_SIZE_BYTES)]
    return MemoryDevice(len(pieces), {at: piece for at, piece in enumerate(pieces) if any(piece)})


def test_image_of_before_the_log_opens_and_gets_one() -> None:
    """Promise: an older image is read as it is; a mount gives it a log and loses nothing."""
    device = golden("without-log")
    assert read_newest(device).incompat == INCOMPAT_DUPLICATED_METADATA
    assert check_image(device).findings == ()
    filesystem = open_filesystem(device, writable=False)
    for _ in range(2):  # as it is, and with a log
        live = filesystem.live
        data = live.lookup(live.lookup(ROOT_INO, b"dir").ino, b"data")
        assert live.read(data.ino, 0, 14) == b"changeddata\ngo"
        assert (data.nlink, data.uid, data.mode & 0o777) == (2, 1000, 0o640)
        assert live.getxattr(data.ino, b"user.x") == b"value"
        assert live.find(ROOT_INO, b"inline") is None
        kept = filesystem.volume(filesystem.catalog.snapshot("before").root_id)
        assert kept is not None
        assert kept.read(kept.lookup(ROOT_INO, b"inline").ino, 0, 9) == b"small"
        assert kept.read(data.ino, 0, 24) == b"golden data\ngolden data\n"
        filesystem = open_filesystem(device, writable=True)
        if filesystem.store.superblock.log is None:
            assert filesystem.store.make_log()
            filesystem.commit()
    assert read_newest(device).incompat & INCOMPAT_LOG
    filesystem.live.create(ROOT_INO, b"new", 0o100644, 0, 0)
    generation = filesystem.store.superblock.generation
    filesystem.sync()
    assert read_newest(device).generation == generation, "the fsync was a commit"
    again = open_filesystem(device.crash(), writable=True)
    assert again.live.find(ROOT_INO, b"new") is not None
    again.close()
    filesystem.close()
    assert check_image(device).findings == ()
