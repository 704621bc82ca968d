"""Promises that killing the daemon loses nothing that was acknowledged (C1, C2, C5 to C7).

Several programs write, make durable, and note outside of the mount what was acknowledged; the
daemon is killed under them again and again. The image must mount without repair, be clean and hold
all of it.
"""

import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Mounted
from tests.mounted.load_writer import read_log, verify
from tests.sizes import HANG_SECONDS, sized, wait_until

ROUNDS = sized(6, 20)
WORKERS = 3

pytestmark = [pytest.mark.mounted]


def test_kill_under_load_loses_nothing_that_was_acknowledged(
    mount: Mounted, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Promise: after each kill everything acknowledged as durable is there and right."""
    folder = mount.path / "load"
    folder.mkdir()
    logs = [tmp_path / f"acknowledged {worker}" for worker in range(WORKERS)]
    generator = random.Random(7)
    acknowledged = 0

    for round_number in range(ROUNDS):
        sizes = [log.stat().st_size if log.exists() else 0 for log in logs]
        writers = [
            subprocess.Popen(
                [
                    sys.executable,
                    Path(__file__).with_name("load_writer.py"),
                    folder,
                    logs[worker],
                    str(worker),
                    str(round_number),
                ],
                stderr=subprocess.PIPE,
                text=True,
            )
            for worker in range(WORKERS)
        ]
        try:
            for log, size in zip(logs, sizes, strict=True):
                wait_until(
                    lambda log=log, size=size: log.exists() and log.stat().st_size > size,
                    "a writer got nothing acknowledged",
                )
            time.sleep(generator.uniform(0.2, 1.2))
            mount.kill()
        finally:
            # On a mount each program ends by itself: none may hang on a daemon that is gone.
            for writer in writers:
                if mount.plain:
                    writer.kill()
                _, message = writer.communicate(timeout=HANG_SECONDS)
                assert writer.returncode == (-9 if mount.plain else 0), message

        mount.check()
        mount.remount()
        for worker, log in enumerate(logs):
            wrong = verify(folder, log, worker)
            assert not wrong, f"round {round_number}:\n" + "\n".join(wrong)
        total = sum(len(log.read_text(encoding="ascii").splitlines()) for log in logs)
        assert total > acknowledged, f"round {round_number}: nothing was acknowledged"
        acknowledged = total

    record_property("count", ("kills of a busy daemon", ROUNDS))
    names = {name.rpartition("-")[0] for log in logs for name in read_log(log)}
    assert any("replaced" in name for name in names)
    assert any("appended" in name for name in names)
    assert any("overwritten" in name for name in names)


@pytest.mark.needs_cowfs
def test_kill_after_sync_keeps_what_was_written_without_fsync(mount: Mounted) -> None:
    """Promise: `cowfs sync` makes durable everything that any program wrote before."""
    for number in range(200):
        (mount.path / f"file {number}").write_bytes(bytes([number]) * 5000)
    assert mount.cowfs("sync", mount.path).returncode == 0
    (mount.path / "after").write_bytes(b"may be lost")
    mount.kill()
    mount.check()
    mount.remount()
    for number in range(200):
        assert (mount.path / f"file {number}").read_bytes() == bytes([number]) * 5000


@pytest.mark.needs_cowfs
def test_kill_keeps_snapshots_and_frees_files_without_a_name(mount: Mounted) -> None:
    """Promise: a snapshot taken is durable (C6); a file unlinked while open is freed (C7)."""
    (mount.path / "kept").write_bytes(b"kept" * 1000)
    with open(mount.path / "nameless", "wb") as nameless:
        nameless.write(b"x" * (8 << 20))
        nameless.flush()
        (mount.path / "nameless").unlink()
        assert mount.cowfs("sync", mount.path).returncode == 0
        mount.snapshot("kept")
        (mount.path / "kept").write_bytes(b"changed")
        mount.kill()
    mount.check()
    mount.remount()
    snapshot = mount.path / ".snapshots" / "kept"
    assert (snapshot / "kept").read_bytes() == b"kept" * 1000
    assert not (mount.path / "nameless").exists()
    mount.delete_snapshot("kept")


@pytest.mark.needs_cowfs
@pytest.mark.parametrize("flag", [os.O_SYNC, os.O_DSYNC], ids=["O_SYNC", "O_DSYNC"])
def test_synchronous_write_is_durable_when_it_returns(mount: Mounted, flag: int) -> None:
    """Promise C4: a kill loses nothing of a synchronous write() that returned, nor its name."""
    descriptor = os.open(mount.path / "log", os.O_CREAT | os.O_WRONLY | flag)
    try:
        for number in range(5):
            os.write(descriptor, bytes([number]) * 3000)
        mount.kill()
    finally:
        with contextlib.suppress(OSError):  # the kernel says that the daemon is gone
            os.close(descriptor)
    mount.check()
    mount.remount()
    found = (mount.path / "log").read_bytes()
    assert found == b"".join(bytes([number]) * 3000 for number in range(5))


@pytest.mark.needs_cowfs
def test_commit_interval_is_all_that_a_kill_may_lose(mount: Mounted) -> None:
    """Promise C5: data older than the commit interval survives a kill without any fsync."""
    (mount.path / "old").write_bytes(b"old" * 10_000)
    (mount.path / "gone").write_bytes(b"gone")
    (mount.path / "gone").unlink()
    mount.wait_for_commit()
    (mount.path / "young").write_bytes(b"may be lost")
    mount.kill()
    mount.check()
    mount.remount()
    assert (mount.path / "old").read_bytes() == b"old" * 10_000
    assert not (mount.path / "gone").exists()
