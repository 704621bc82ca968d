"""Promises about a full filesystem through a mount (C10)."""

import errno
import os

import pytest

from tests.commands import run_command
from tests.conftest import Mounted, json_of, require_success


@pytest.mark.mounted
@pytest.mark.needs_cowfs
def test_full_mount_names_the_snapshots_to_delete_and_can_be_emptied(mount: Mounted) -> None:
    """Promise C10: ENOSPC comes at write or fsync, `df` names what helps, and rm works."""
    mount.umount()
    mount.image.unlink()
    require_success(run_command("mkfs", mount.image, "--size", "64M"))
    mount.remount()
    (mount.path / "first").write_bytes(os.urandom(4 << 20))
    mount.snapshot("holds")
    (mount.path / "first").unlink()
    written = 0
    refused = 0
    for number in range(200):
        try:
            with open(mount.path / f"file{number}", "wb") as file:
                file.write(os.urandom(1 << 20))
                file.flush()
                os.fsync(file.fileno())
            written += 1
        except OSError as error:
            assert error.errno == errno.ENOSPC
            refused += 1
            if refused > 3:
                break
    assert written > 20
    assert refused
    report = json_of(run_command("df", mount.path, "--json"))
    assert [each["names"] for each in report["largest_snapshots"]] == [["holds"]]
    assert report["largest_snapshots"][0]["reclaim_bytes"] >= 4 << 20
    assert "deleting holds frees" in require_success(run_command("df", mount.path)).stdout
    mount.remount()
    assert len(list(mount.path.glob("file*"))) >= written
    for path in mount.path.glob("file*"):
        path.unlink()
    mount.delete_snapshot("holds")
    (mount.path / "fits").write_bytes(bytes(8 << 20))
    mount.umount()
    mount.check()
