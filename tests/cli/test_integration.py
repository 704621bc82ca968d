"""Promises of `cowfs integrate`: it writes only where man, shells, systemd and mount(8) look."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import run_command
from tests.conftest import json_of, require_success
from tests.sizes import HANG_SECONDS


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def test_a_package_gets_all_files_below_its_prefix(tmp_path: Path) -> None:
    """Promise: with --destdir all files lie below that folder, and each is printed."""
    words = ["--prefix", "/usr", "--programs", "/usr/bin", "--destdir", tmp_path]
    told = json_of(run_command("integrate", *words, "-n", "--json"))["paths"]
    assert files_in(tmp_path) == []
    for _ in range(2):  # a second time changes nothing
        done = require_success(run_command("integrate", *words))
        assert done.stdout.splitlines() == told
        found = files_in(tmp_path)
        assert sorted(told) == sorted(str(tmp_path / name) for name in found)
    for name in (
        "usr/share/man/man1/cowfs-mount.1",
        "usr/share/man/man8/mount.fuse.cowfs.8",
        "usr/share/bash-completion/completions/cowdu",
        "usr/share/zsh/vendor-completions/_cowfs",
        "usr/share/fish/vendor_completions.d/cowdump.fish",
        "usr/lib/systemd/system/cowfs@.service",
        "usr/lib/systemd/user/cowfs@.service",
    ):
        assert name in found
        assert (tmp_path / name).stat().st_size
    for helper in ("mount.fuse.cowfs", "umount.fuse.cowfs"):
        assert os.readlink(tmp_path / "usr/sbin" / helper) == f"/usr/bin/{helper}"


def test_an_ordinary_prefix_gets_no_helpers(tmp_path: Path) -> None:
    """Promise: below ~/.local a user's service is written, and nothing is linked into /usr/sbin."""
    require_success(run_command("integrate", "--prefix", tmp_path))
    found = files_in(tmp_path)
    assert "share/systemd/user/cowfs@.service" in found
    assert "share/zsh/site-functions/_cowfs" in found
    assert not [name for name in found if "sbin" in name or name.startswith("lib")]
    unit = (tmp_path / "share/systemd/user/cowfs@.service").read_text()
    program = next(line for line in unit.splitlines() if line.startswith("ExecStart=")).split()[0]
    assert Path(program.removeprefix("ExecStart=")) == Path(sys.executable).parent / "cowfs"


def test_a_file_that_is_no_link_of_ours_is_left_alone(tmp_path: Path) -> None:
    """Promise: a helper that somebody else put there is named, not replaced."""
    helper = tmp_path / "usr/sbin/mount.fuse.cowfs"
    helper.parent.mkdir(parents=True)
    helper.write_text("theirs")
    refused = run_command("integrate", "--prefix", "/usr", "--destdir", tmp_path)
    assert refused.returncode == 1
    assert str(helper) in refused.stderr
    assert helper.read_text() == "theirs"


@pytest.mark.parametrize("manager", ["--system", "--user"])
def test_service_is_what_systemd_takes(tmp_path: Path, manager: str) -> None:
    """Promise: `systemd-analyze verify` accepts the unit without a remark."""
    programs = Path(sys.executable).parent
    words = ["--prefix", "/usr", "--programs", programs, "--destdir", tmp_path]
    require_success(run_command("integrate", *words))
    unit = tmp_path / f"usr/lib/systemd/{manager.removeprefix('--')}/cowfs@.service"
    instance = tmp_path / "cowfs@data.service"
    instance.write_text(unit.read_text())
    (tmp_path / "run").mkdir(mode=0o700)
    done = subprocess.run(
        ["systemd-analyze", "verify", manager, "--man=no", "--generators=no", instance],
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path / "run")},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    said = [line for line in done.stderr.splitlines() if "cowfs" in line]
    assert (done.returncode, said) == (0, []), done
