"""Images with snapshots in them, made without a mount, for the tests of commands and tools."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from msgspec.structs import replace

from cowfs.care.check import check_image
from cowfs.files.items import ROOT_INO
from cowfs.history.edits import CreateSnapshot
from cowfs.history.filesystem import Filesystem
from cowfs.history.images import make_filesystem, open_filesystem
from cowfs.history.reports import space_report
from cowfs.storage.device import FileDevice, create_file
from tests.model.behind import edit_by_hand

SIZE_BYTES = 64 << 20


def make_image(path: Path, *, duplicate_metadata: bool = True) -> Path:
    """An empty filesystem."""
    create_file(path, SIZE_BYTES)
    device = FileDevice(path, writable=True)
    make_filesystem(device, duplicate_metadata=duplicate_metadata)
    device.close()
    return path


def change(path: Path, *steps: Callable[[Filesystem], object]) -> None:
    """Apply steps to an image that is not mounted."""
    filesystem = open_filesystem(FileDevice(path, writable=True), writable=True)
    try:
        for step in steps:
            step(filesystem)
    finally:
        filesystem.close()


def write(name: str, size_bytes: int, *, offset: int = 0) -> Callable[[Filesystem], None]:
    """A step for `change`: write random bytes into a file in the root directory."""

    def step(filesystem: Filesystem) -> None:
        volume = filesystem.live
        inode = volume.find(ROOT_INO, name.encode())
        if inode is None:
            inode = volume.create(ROOT_INO, name.encode(), 0o100644, 0, 0)
        volume.write(inode.ino, offset, os.urandom(size_bytes))

    return step


def remove(name: str) -> Callable[[Filesystem], None]:
    """A step for `change`: remove a file and give its blocks back."""

    def step(filesystem: Filesystem) -> None:
        inode = filesystem.live.unlink(ROOT_INO, name.encode())
        while not filesystem.live.reclaim(inode.ino):
            pass

    return step


def snapshot(name: str) -> Callable[[Filesystem], None]:
    """A step for `change`: take a snapshot."""

    def step(filesystem: Filesystem) -> None:
        filesystem.apply(CreateSnapshot(name, f"the state {name}"))

    return step


def dated(name: str, created_ns: int) -> Callable[[Filesystem], None]:
    """A step for `change`: set the creation time of a snapshot, as a wrong clock would."""

    def step(filesystem: Filesystem) -> None:
        record = replace(filesystem.catalog.snapshot(name), created_ns=created_ns)
        edit_by_hand(filesystem, lambda frozen: frozen.catalog.put(record))

    return step


def history(
    names: Sequence[str] = ("one", "two", "three", "four"),
) -> list[Callable[[Filesystem], object]]:
    """Steps that make snapshots which share data with the live volume and with each other."""
    steps: list[Callable[[Filesystem], object]] = [write("always", 300_000)]
    for number, name in enumerate(names):
        steps += [
            write(f"file of {name}", 200_000 + 4096 * number),
            write("always", 4096 * 3, offset=8192 * number),
            *[write(f"small {name} {count}", 500) for count in range(60)],
            snapshot(name),
        ]
        if number:
            steps.append(remove(f"file of {names[number - 1]}"))
            steps += [remove(f"small {names[number - 1]} {count}") for count in range(60)]
    steps.append(remove(f"file of {names[-1]}"))
    return steps


def require_clean(path: Path) -> None:
    """Fail the test unless the checker finds the image clean."""
    device = FileDevice(path, writable=False)
    try:
        report = check_image(device)
    finally:
        device.close()
    assert report.clean, "\n".join(map(str, report.findings))


def tree_bytes(path: Path) -> int:
    """The number of bytes that all volumes and snapshots of an image hold."""
    filesystem = open_filesystem(FileDevice(path, writable=False), writable=False)
    try:
        return space_report(filesystem).tree_bytes
    finally:
        filesystem.close()
