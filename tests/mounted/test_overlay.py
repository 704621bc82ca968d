"""Promises that overlayfs takes a cowfs directory as its upper layer, as container programs do.

The image's lower layers are read-only. A container's changes go to the upper layer: whiteouts for
deletions, opaque directories for directories made anew, redirects for directories that were moved.
"""

import os
import shlex
import stat
import subprocess
from pathlib import Path

import pytest

from tests.conftest import Mounted
from tests.mounted.machine import NAMESPACES
from tests.sizes import HANG_SECONDS

pytestmark = [pytest.mark.mounted, pytest.mark.needs_root, NAMESPACES]

OPTIONS = "lowerdir={0}/two:{0}/one,upperdir={1}/upper,workdir={1}/work,redirect_dir=on,index=off"


def in_overlay(layers: Path, place: Path, program: str) -> str:
    """Run a shell program in the merged tree, in a new mount namespace; returns its output."""

    for each in (place / "upper", place / "work", layers / "merged"):
        each.mkdir(exist_ok=True)
    merged = layers / "merged"
    options = OPTIONS.format(layers, place)
    script = (
        f"set -e; mount -t overlay overlay -o {shlex.quote(options)} {shlex.quote(str(merged))}; "
        f"cd {shlex.quote(str(merged))}; {program}\n"
        f"cd /; umount {shlex.quote(str(merged))}"
    )
    done = subprocess.run(
        ["unshare", "--mount", "--propagation=slave", "sh", "-c", script],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, done
    return done.stdout


@pytest.fixture
def layers(tmp_path: Path) -> Path:
    """Two lower layers on the host."""
    top = tmp_path / "layers"
    for layer in ("one", "two"):
        for folder in ("etc", "lib/deep", "srv"):
            (top / layer / folder).mkdir(parents=True)
            for name in (f"{layer}-a", f"{layer}-b", "both"):
                (top / layer / folder / name).write_text(f"{layer} {folder} {name}\n")
    os.link(top / "one" / "etc" / "one-a", top / "one" / "etc" / "hard")
    return top


def test_files_deleted_renamed_and_changed_in_a_container_stay_so(
    layers: Path, mount: Mounted
) -> None:
    """Promise: deletes, renames and writes in the merged tree are the same after a remount."""
    place = mount.path / "container"
    place.mkdir()
    in_overlay(
        layers,
        place,
        "rm etc/one-a; mv etc/one-b etc/renamed; mv etc/two-a srv/moved; echo more >>etc/both; "
        "mv -T srv/both etc/two-b; rm -r lib/deep; mkdir lib/deep; echo new >lib/deep/new; "
        "mv srv served; ln etc/both etc/linked; chmod 600 etc/hard; touch -h etc/hard; "
        "mkdir -p made/by; mv made/by by; rmdir made; mkfifo fifo; ln -s etc symlink",
    )
    upper = place / "upper"
    for name in ("etc/one-a", "etc/one-b", "etc/two-a", "srv"):
        status = (upper / name).lstat()
        assert (status.st_mode, status.st_rdev) == (stat.S_IFCHR, 0), name
    assert os.getxattr(upper / "lib" / "deep", "trusted.overlay.opaque") == b"y"
    assert os.getxattr(upper / "served", "trusted.overlay.redirect") == b"srv"
    expected = (
        "./by ./etc ./etc/both ./etc/hard ./etc/linked ./etc/renamed ./etc/two-b ./fifo ./lib "
        "./lib/deep ./lib/deep/new ./served ./served/moved ./served/one-a ./served/one-b "
        "./served/two-a ./served/two-b ./symlink"
    )
    look = (
        "find . -mindepth 1 | LC_ALL=C sort | tr '\\n' ' '; echo; "
        "cat etc/both etc/two-b etc/renamed; "
        "stat -c %h etc/linked; cat served/moved"
    )
    for step in ("again", "remounted", "rolled back"):
        if step == "remounted":
            mount.remount()
        elif step == "rolled back":
            mount.snapshot("clean")
            in_overlay(layers, place, "rm -rf etc served symlink; echo gone >lib/deep/new")
            assert in_overlay(layers, place, "ls").split() == ["by", "fifo", "lib"]
            mount.rollback("clean")
        shown = in_overlay(layers, place, look).splitlines()
        assert shown[0].split() == expected.split(), step
        assert shown[1:] == [
            "two etc both",
            "more",
            "two srv both",
            "one etc one-b",
            "2",
            "two etc two-a",
        ], step


def test_tree_of_a_container_is_deleted_whole(layers: Path, mount: Mounted) -> None:
    """Promise: rm -rf of everything leaves an empty merged tree, and it can be filled again."""
    place = mount.path / "container"
    place.mkdir()
    assert in_overlay(layers, place, "rm -rf -- *; ls -A") == ""
    many = "for n in $(seq 200); do echo $n >f$n; mv f$n g$n; done; mkdir etc; ls | wc -l; ls etc"
    assert in_overlay(layers, place, many).split() == ["201"]
