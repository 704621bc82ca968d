"""Promises of `cowfs scrub`, on mounts and on images, and of a mount's own repairs."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cowfs.files.items import ROOT_INO
from cowfs.history.filesystem import Filesystem
from cowfs.history.images import open_filesystem
from cowfs.storage.device import FileDevice
from cowfs.storage.format import BLOCK_SIZE_BYTES, ring_blocks
from tests.commands import COMMANDS, Completed, run_command
from tests.conftest import Mounted, json_of, require_clean, require_success
from tests.image_files import change, make_image, snapshot, write
from tests.sizes import HANG_SECONDS, wait_until

pytestmark = pytest.mark.needs_cowfs


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def flip(image: Path, block: int, at: int = 99) -> None:
    """Damage one bit of an image."""
    with open(image, "r+b", buffering=0) as file:
        file.seek(block * BLOCK_SIZE_BYTES + at)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 16]))


def blocks(image: Path, choose: Callable[[Filesystem], list[int]]) -> list[int]:
    """The blocks of an image that `choose` finds through its trees."""
    filesystem = open_filesystem(FileDevice(image, writable=False), writable=False)
    try:
        return choose(filesystem)
    finally:
        filesystem.close()


def bad_copies(filesystem: Filesystem) -> list[int]:
    """One copy each of a leaf, of a page of counts, and of the newest slot."""
    root = filesystem.live.tree.root_node()
    leaf = root.values[0] if root.level else root
    index = filesystem.store.map.index
    counts = index.pointer(0, int(np.flatnonzero(index.levels[0]["block"])[0]))
    slot = filesystem.store.superblock.slot()
    return [
        leaf.twin,
        counts.block,
        ring_blocks(filesystem.store.superblock.total_blocks)[1] + slot,
    ]


def data_block(name: str) -> Callable[[Filesystem], list[int]]:
    def choose(filesystem: Filesystem) -> list[int]:
        live = filesystem.live
        inode = live.lookup(ROOT_INO, name.encode())
        return [extent.block for _, extent in live.extents.find(inode.ino, 0, 1)]

    return choose


def scrub(*words: str | Path) -> Completed:
    return run_command("scrub", *words)


# Commands come in the middle of a scrub even if each takes many seconds. There is little to read:
# a scrub has the lowest priority, so beside many busy programs it gets next to no processor time.
RATE_BYTES = 1 << 20
SECONDS_OF_SCRUB = 30
DONE_BYTES_MIN = 2 << 20  # the first reads are of what a resumed scrub reads again


def fill(mount: Mounted, large_bytes: int = 3 << 20) -> None:
    for number in range(100):
        (mount.path / str(number)).write_bytes(os.urandom(1500))
    (mount.path / "large").write_bytes(os.urandom(large_bytes))
    require_success(mount.cowfs("sync", mount.path))


def done_bytes(mount: Mounted) -> int:
    """How many bytes the scrub of a mount has done."""
    state = json_of(scrub("status", "--json", mount.path))["scrub"]
    return state["done_bytes"] if state else 0


def test_scrub_of_a_mount_repairs_every_bad_copy_and_its_result_is_kept(mount: Mounted) -> None:
    """Promise C9: a good twin restores each bad copy while programs work; status and info tell."""
    fill(mount)
    hit = blocks(mount.image, bad_copies)
    for block in hit:
        flip(mount.image, block)
    looked = scrub("start", "-B", "-n", "--json", mount.path)
    assert looked.returncode == 1
    assert json.loads(looked.stdout)["scrub"]["unrepaired"] == len(hit)
    first = json_of(scrub("start", "-B", "--json", mount.path))["scrub"]
    assert (first["bad_copies"], first["repaired"], first["unrepaired"]) == (len(hit), len(hit), 0)
    assert first["damaged"] == 0
    status = json_of(scrub("status", "--json", mount.path))["scrub"]
    assert status == first
    assert "3 repaired" in require_success(mount.cowfs("info", mount.path)).stdout
    again = json_of(scrub("start", "-B", "--json", mount.path))["scrub"]
    assert (again["state"], again["bad_copies"]) == ("finished", 0)
    require_clean(mount.image)


def test_mount_repairs_what_it_reads(mount: Mounted) -> None:
    """Promise C9: a copy that a read finds bad is repaired by the next commit."""
    fill(mount)
    mount.umount()

    def leaves(filesystem: Filesystem) -> list[int]:
        root = filesystem.live.tree.root_node()
        return [pointer.block for pointer in root.values]

    hit = blocks(mount.image, leaves)
    for block in hit:
        flip(mount.image, block)
    assert run_command("check", mount.image).returncode == 1
    mount.remount()
    for number in range(100):
        assert len((mount.path / str(number)).read_bytes()) == 1500
    (mount.path / "large").read_bytes()
    mount.umount()
    require_clean(mount.image)
    assert blocks(mount.image, leaves)


def test_scrub_that_is_cancelled_goes_on_after_a_remount(mount: Mounted) -> None:
    """Promise: a scrub resumes without reading again, also in another mount and generation."""
    fill(mount, SECONDS_OF_SCRUB * RATE_BYTES)
    nothing = scrub("resume", "-B", mount.path)
    assert nothing.returncode == 2
    require_success(scrub("start", "--rate", str(RATE_BYTES), mount.path))
    second = scrub("start", mount.path)
    assert second.returncode == 1
    assert "already" in second.stderr
    wait_until(lambda: done_bytes(mount) > DONE_BYTES_MIN, "nothing is read")
    require_success(scrub("cancel", mount.path))
    assert scrub("cancel", mount.path).returncode == 2
    stopped = json_of(scrub("status", "--json", mount.path))["scrub"]
    assert stopped["state"] == "interrupted"
    assert 0 < stopped["done_bytes"] < stopped["total_bytes"]
    mount.remount()
    rest = json_of(scrub("resume", "-B", "--json", mount.path))["scrub"]
    assert rest["state"] == "finished"
    assert rest["done_bytes"] < rest["total_bytes"], "it began anew"


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGINT, signal.SIGHUP]])
def test_scrub_keeps_its_state_through_many_signals(
    mount: Mounted, numbers: list[signal.Signals]
) -> None:
    """Promise: signals after the first do not lose the record of what was read."""
    fill(mount, SECONDS_OF_SCRUB * RATE_BYTES)
    words = ["scrub", "start", "-B", "--rate", str(RATE_BYTES), str(mount.path)]
    with subprocess.Popen(
        [COMMANDS / "cowfs", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as worker:
        wait_until(lambda: done_bytes(mount) > DONE_BYTES_MIN, "nothing is read")
        deadline_s = time.monotonic() + HANG_SECONDS
        while worker.poll() is None:
            assert time.monotonic() < deadline_s
            for number in numbers:
                worker.send_signal(number)
            time.sleep(0.002)
        assert worker.stderr is not None
        said = worker.stderr.read()
    assert "internal error" not in said
    stopped = json_of(scrub("status", "--json", mount.path))["scrub"]
    assert stopped["state"] == "interrupted"
    rest = json_of(scrub("resume", "-B", "--json", mount.path))["scrub"]
    assert rest["state"] == "finished"
    assert rest["done_bytes"] < rest["total_bytes"], "it began anew"


def test_scrub_in_the_background_does_not_keep_its_callers_directory(mount: Mounted) -> None:
    """Promise: a scrub that was started inside the mount does not keep the mount busy."""
    fill(mount)
    (mount.path / "dir").mkdir()
    words = [COMMANDS / "cowfs", "scrub", "start", "--rate", "1M", ".."]
    subprocess.run(
        words, cwd=mount.path / "dir", check=True, stdout=subprocess.DEVNULL, timeout=HANG_SECONDS
    )
    require_success(run_command("umount", mount.path))

    def is_over() -> bool:
        state: str = json_of(scrub("status", "--json", mount.image))["scrub"]["state"]
        return state != "running"

    wait_until(is_over, "the scrub goes on")
    mount.remount()


def test_scrub_names_lost_data_by_all_its_paths(tmp_path: Path) -> None:
    """Promise C9: data without a good copy is reported, in the live volume and every snapshot."""
    image = make_image(tmp_path / "image")
    change(image, write("kept", 50_000), write("lost", 50_000), snapshot("monday"))
    change(image, write("later", 50_000), snapshot("friday"))
    flip(image, blocks(image, data_block("lost"))[0])
    flip(image, blocks(image, data_block("later"))[0])
    found = scrub("start", "-B", image)
    assert found.returncode == 1
    for path in ("/lost", "/.snapshots/monday/lost", "/.snapshots/friday/lost", "/later"):
        assert f"    {path}\n" in found.stdout
    assert "/.snapshots/monday/later" not in found.stdout
    assert "kept" not in found.stdout
    assert scrub("status", image).returncode == 1


@pytest.mark.parametrize("rate", ["0", "fast", "-5M", "5X"])
def test_scrub_refuses_a_rate_that_is_none(tmp_path: Path, rate: str) -> None:
    """Promise: a malformed rate is refused in words."""
    image = make_image(tmp_path / "image")
    refused = scrub("start", "-B", f"--rate={rate}", image)
    assert refused.returncode == 2
    assert "--rate" in refused.stderr
