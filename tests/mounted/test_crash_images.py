"""Promises that the image under a mount is good whenever the daemon may die (C1, C2).

The daemon is stopped again and again while a program works, and its image is copied as it is then:
every copy is the prefix of some commit. tests/crash/ enumerates all other states, without a mount.
"""

import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from cowfs.files.items import ROOT_INO
from cowfs.history.images import open_filesystem
from cowfs.storage.device import FileDevice
from tests.conftest import Mounted
from tests.image_files import require_clean

pytestmark = [pytest.mark.mounted, pytest.mark.needs_cowfs]

COPIES = 25
DEEP = 8  # files that exist at the same time


def content(number: int) -> bytes:
    return random.Random(number).randbytes(100 + number * 2311 % 30_000)


class Writer(threading.Thread):
    """Makes file after file under another name, renames it into place, and makes it durable."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.durable = -1  # the last file whose fsync returned
        self.ending = False
        self.error: OSError | None = None

    def run(self) -> None:
        number = 0
        try:
            while not self.ending:
                temporary = self.folder / "temporary"
                with open(temporary, "wb") as file:
                    file.write(content(number))
                    file.flush()
                    os.rename(temporary, self.folder / f"{number}")
                    if number >= DEEP:
                        os.unlink(self.folder / f"{number - DEEP}")
                    os.fsync(file.fileno())
                self.durable = number
                number += 1
        except OSError as error:
            self.error = error


def stop_and_copy(mount: Mounted, copy: Path) -> None:
    """Stop the daemon at any point, and copy the image as written so far."""
    assert mount.daemon_pid is not None
    os.kill(mount.daemon_pid, signal.SIGSTOP)
    try:
        state = Path(f"/proc/{mount.daemon_pid}/stat")
        while state.read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.001)
        subprocess.run(["cp", "--sparse=always", mount.image, copy], check=True)
    finally:
        os.kill(mount.daemon_pid, signal.SIGCONT)


def test_image_copied_at_any_moment_holds_what_was_acknowledged(
    mount: Mounted, tmp_path: Path
) -> None:
    """Promise C1, C2: every file that was fsynced is there and whole."""
    generator = random.Random(5)
    writer = Writer(mount.path)
    writer.start()
    copy = tmp_path / "copy.img"
    moments = set()  # the newest file that each copy shows
    try:
        for _ in range(COPIES):
            time.sleep(generator.uniform(0.02, 0.1))
            durable = writer.durable
            stop_and_copy(mount, copy)
            require_clean(copy)
            filesystem = open_filesystem(FileDevice(copy, writable=True), writable=True)
            volume = filesystem.live
            shown = {entry.name: entry.ino for _, entry in volume.listing(ROOT_INO)}
            shown.pop(b"temporary", None)
            numbers = sorted(int(name) for name in shown)
            assert not numbers or numbers == list(range(numbers[0], numbers[-1] + 1))
            assert not shown or numbers[-1] >= durable
            assert shown or durable < 0
            moments.add(numbers[-1] if numbers else -1)
            for name, ino in shown.items():
                assert volume.read(ino, 0, 1 << 20) == content(int(name)), f"file {name!r}"
            filesystem.close()
            require_clean(copy)
    finally:
        writer.ending = True
        writer.join()
    assert writer.error is None
    assert writer.durable > COPIES, "the program hardly worked"
    assert len(moments) > COPIES // 2, "the copies are of a few moments only"
