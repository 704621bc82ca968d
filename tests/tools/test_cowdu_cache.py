"""Promises of the cache that cowdu keeps between calls: it saves time and changes no number."""

import io
import json
import os
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from xxhash import xxh3_128_digest

from cowfs.accounting.blocks import explain_block
from cowfs.accounting.owners import OwnerKind, OwnerSets, owner_sets
from cowfs.history.images import open_filesystem
from cowfs.storage.device import FileDevice
from tests.image_files import change, history, make_image, snapshot, write
from tests.sizes import HANG_SECONDS
from tools.cowdu.looking import Look

NAMES = ["one", "two", "three", "four"]
NUMBERS = (0, 1, 2, 5, 64, 1000, 1 << 20, (1 << 31) - 1, 1 << 40, (1 << 63) - 1, -1, -(1 << 63))
STRUCTURE = ("level_from", "child_from", "children", "run_from", "run_first", "run_count", "tops")
LIES = 400

Arrays = dict[str, Any]


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An image for which cowdu has filled its cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    image = make_image(tmp_path / "disk.img")
    change(image, *history(NAMES))
    looked(image)
    return image


def kept(image: Path) -> Path:
    (file,) = (image.parent / "cache" / "cowfs").iterdir()
    return file


def told(sets: OwnerSets) -> dict[str, Any]:
    """All numbers that the list shows."""
    columns = ("referenced", "exclusive", "written", "cumulative")
    return {what: sets.each(what).tolist() for what in columns} | {
        "pairs": sets.pairs(),
        "names": [owner.name for owner in sets.owners],
        "retained": sets.retained,
    }


def looked(image: Path, *, survey: bool = True) -> dict[str, Any]:
    """The numbers that a command gets, with the cache if it is of use."""
    filesystem = open_filesystem(FileDevice(image, writable=False), writable=False)
    try:
        look = Look(filesystem)
        found = told(look.sets())
        if survey:
            surveyed = look.survey()
            assert told(surveyed.sets) == found
            for block in range(0, 16384, 1009):
                explain_block(filesystem, surveyed, block)
        return found
    finally:
        filesystem.close()


def counted(image: Path) -> dict[str, Any]:
    """The numbers computed from the image alone, without the cache."""
    filesystem = open_filesystem(FileDevice(image, writable=False), writable=False)
    try:
        return told(owner_sets(filesystem))
    finally:
        filesystem.close()


def read(file: Path) -> Arrays:
    with np.load(io.BytesIO(file.read_bytes()[16:]), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def put(file: Path, data: bytes) -> None:
    """Write a cache file with a right checksum."""
    file.write_bytes(xxh3_128_digest(data) + data)


def packed(arrays: Arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def lie(arrays: Arrays, choice: random.Random) -> str:
    """Put one lie into one array. Returns which."""
    name = choice.choice([name for name in arrays if name != "facts"])
    array = arrays[name].copy()
    how = choice.choice(["value", "value", "value", "cut", "more", "type", "shape", "swap"])
    at = choice.randrange(len(array)) if len(array) else 0
    if how == "value" and len(array):
        if name == "nodes":
            member = choice.choice(["block", "twin", "birth", "sum_low"])
            array[member][at] = np.array(choice.choice(NUMBERS)).astype(array[member].dtype)
        else:
            array[at] = np.array(choice.choice(NUMBERS)).astype(array.dtype)
    elif how == "swap" and len(array):
        other = choice.randrange(len(array))
        array[[at, other]] = array[[other, at]]
    elif how == "cut":
        array = array[: len(array) // 2]
    elif how == "more":
        array = np.concatenate([array, array])
    elif how == "type" and name != "nodes":
        array = array.astype(choice.choice(["<i4", "<u8", "<f8", "S3", ">i8"]))
    else:
        array = array.reshape(1, *array.shape)
    arrays[name] = array
    return f"{name}: {how}"


def test_arrays_that_lie_under_a_right_checksum_change_no_number(image: Path) -> None:
    """Promise: no lie in the arrays causes an internal error or changes a number."""
    file = kept(image)
    good, expected = file.read_bytes(), counted(image)
    assert looked(image) == expected
    for seed in range(LIES):
        file.write_bytes(good)
        arrays = read(file)
        what = lie(arrays, random.Random(seed))
        put(file, packed(arrays))
        assert looked(image, survey=seed % 4 == 0) == expected, f"seed {seed}: {what}"


def test_structure_that_lies_is_not_built_upon(image: Path) -> None:
    """Promise: a lie in the structure of nodes changes no number at a later generation either.

    One lie may: two nodes that swap their runs agree with all that the image counts. It is no
    error.
    """
    file = kept(image)
    good = file.read_bytes()
    change(image, write("later", 90_000), snapshot("later"))
    expected = counted(image)
    for seed in range(LIES // 2):
        file.write_bytes(good)
        arrays = read(file)
        what = lie(arrays, random.Random(seed))
        put(file, packed(arrays))
        found = looked(image, survey=seed % 4 == 0)
        assert found == expected or what == "run_first: swap", f"seed {seed}: {what}"


@pytest.mark.parametrize(
    "change_facts",
    [
        lambda facts: facts.update(owners=[]),
        lambda facts: facts["owners"].pop(),
        lambda facts: facts["owners"].reverse(),
        lambda facts: facts["owners"][0].__setitem__(0, "nothing"),
        lambda facts: facts["owners"][0].__setitem__(1, "renamed"),
        lambda facts: facts["owners"][0].__setitem__(2, 1 << 70),
        lambda facts: facts["owners"][0].__setitem__(3, 99),
        lambda facts: facts.update(retained=[[1, [2]]]),
        lambda facts: facts.update(retained=[[1, [2, 1 << 63]]]),
        lambda facts: facts.update(retained={}),
        lambda facts: facts.update(version="1"),
        lambda facts: facts.update(state=None),
        lambda facts: facts.clear(),
    ],
)
def test_facts_that_lie_change_no_number(
    image: Path, change_facts: Callable[[dict[str, Any]], object]
) -> None:
    """Promise: owners come from the catalog, and impossible numbers in the cache are not used."""
    expected = counted(image)
    arrays = read(kept(image))
    facts = json.loads(arrays["facts"].tobytes())
    assert [owner[1] for owner in facts["owners"]][: len(NAMES)] == NAMES
    change_facts(facts)
    arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    put(kept(image), packed(arrays))
    assert looked(image) == expected


def _compressed(arrays: Arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def _huge_header(arrays: Arrays) -> bytes:
    """A cache whose array claims a size of an exbibyte."""
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (144115188075855872,), }"
    member = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    buffer = io.BytesIO(packed({name: arrays[name] for name in arrays if name != "tops"}))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("tops.npy", member)
    return buffer.getvalue()


def _nested(arrays: Arrays) -> bytes:
    deep = b"[" * 100_000
    return packed(arrays | {"facts": np.frombuffer(deep, np.uint8)})


@pytest.mark.parametrize(
    "made",
    [
        _compressed,
        _huge_header,
        _nested,
        lambda arrays: b"",
        lambda arrays: b"PK\x03\x04" + bytes(100),
        lambda arrays: b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'shape': (1,)}",
        lambda arrays: b"\x80\x04cos\nsystem\n",
        lambda arrays: packed({"facts": arrays["facts"]}),
        lambda arrays: packed(arrays)[:-40],
    ],
    ids=["bomb", "huge", "nested", "empty", "zip", "npy", "pickle", "missing", "cut"],
)
def test_file_of_any_bytes_is_as_good_as_none(image: Path, made: Callable[[Arrays], bytes]) -> None:
    """Promise: any bytes as cache cause no internal error, take little memory, are replaced."""
    expected, size = counted(image), kept(image).stat().st_size
    put(kept(image), made(read(kept(image))))
    assert looked(image, survey=False) == expected
    assert kept(image).stat().st_size == size


@pytest.mark.parametrize("kind", ["fifo", "link", "directory", "dangling"])
def test_what_is_no_file_of_ours_is_neither_read_nor_written(image: Path, kind: str) -> None:
    """Promise: no read waits for a fifo, and no write follows a link."""
    file = kept(image)
    elsewhere = image.parent / "elsewhere"
    content = file.read_bytes()
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "link":
        elsewhere.write_bytes(content)
        file.symlink_to(elsewhere)
    elif kind == "dangling":
        file.symlink_to(elsewhere)
    else:
        file.mkdir()
    change(image, write("more", 5000))
    program = "from tools.cowdu.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, str(image), "--json"],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=True,
    )
    assert len(json.loads(done.stdout)["snapshots"]) == len(NAMES)
    if kind == "link":
        assert elsewhere.read_bytes() == content
    if kind == "dangling":
        assert not elsewhere.exists()
    if kind != "directory":
        assert file.is_file()
        assert not file.is_symlink()


def test_what_is_kept_is_used(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise: a valid cache is used: no node is read again."""
    expected = counted(image)
    filesystem = open_filesystem(FileDevice(image, writable=False), writable=False)

    def refuse(*_: object) -> None:
        raise AssertionError("a node was read")

    look = Look(filesystem)
    monkeypatch.setattr(filesystem.store, "read_image", refuse)
    assert told(look.sets()) == expected
    assert look.survey().sets.bit(OwnerKind.SNAPSHOT, look.snapshots[0].root_id) == 0
    filesystem.close()
