"""Promises about mount(8), umount(8) and fstab: they work as for any other filesystem.

The real programs run, as root, in a private mount namespace with its own /etc/fstab.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.commands import run_command
from tests.conftest import json_of, require_clean, require_success, wait_for_end
from tests.mounted.machine import AS_ROOT, NAMESPACES, Machine, machine
from tests.sizes import HANG_SECONDS

pytestmark = [pytest.mark.mounted, pytest.mark.needs_cowfs, NAMESPACES]

USUAL = (
    "defaults,noauto,nofail,_netdev,user,x-systemd.automount,x-systemd.requires=a.mount,"
    "comment=words,relatime,rw,nosuid,nodev,noexec"
)
COMMIT_SECONDS = 0.5


@pytest.fixture(scope="module")
def shared_machine() -> Iterator[Machine]:
    with machine() as made:
        yield made


@pytest.fixture
def place(shared_machine: Machine, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A mount point beside an image `disk.img` of 64 MiB; unmounted and checked at the end."""
    folder = shared_machine.folder / request.node.name.replace("/", "-")
    (folder / "mnt").mkdir(parents=True)
    image = folder / "disk.img"
    require_success(run_command("mkfs", image, "--size", "64M"))
    yield folder / "mnt"
    for _, mount_point, *_ in shared_machine.mounts():
        shared_machine.run("umount", "-i", "-l", mount_point)
    shared_machine.wait_until_empty()
    if image.exists():
        require_clean(image)


def image_of(place: Path) -> Path:
    return place.parent / "disk.img"


def options_of(shared_machine: Machine, place: Path) -> set[str]:
    """The options of the mount there."""
    found = [line for line in shared_machine.mounts() if line[1] == str(place)]
    assert len(found) == 1, shared_machine.mounts()
    assert found[0][0] == str(image_of(place))
    return set(found[0][3].split(","))


def test_mount_with_the_type_and_umount_end_in_a_clean_commit(
    shared_machine: Machine, place: Path
) -> None:
    """Promise: `mount -t fuse.cowfs IMG DIR` mounts; after umount the daemon commits and ends.

    findmnt, mount and df show its type, source and size.
    """
    run = shared_machine
    run.succeed("mount", "-t", "fuse.cowfs", image_of(place), place, "-o", "noatime,commit=60")
    assert options_of(run, place) >= {"rw", "nosuid", "nodev", "default_permissions"}
    run.succeed("sh", "-c", f"echo kept >{place}/file")
    shown = run.succeed("findmnt", "-n", "-r", "-o", "SOURCE,FSTYPE", place)
    assert shown == f"{image_of(place)} fuse.cowfs\n"
    assert f"{image_of(place)} on {place} type fuse.cowfs (rw," in run.succeed("mount")
    row = run.succeed("df", "-T", place).splitlines()[1].split()
    assert (row[0], row[1], row[-1]) == (str(image_of(place)), "fuse.cowfs", str(place))

    run.succeed("umount", place)
    assert not run.mounts()
    run.wait_until_empty()
    assert json_of(run_command("info", image_of(place), "--json"))["clean"] is True
    run.succeed("mount", "-t", "fuse.cowfs", image_of(place), place)
    assert run.succeed("cat", place / "file") == "kept\n"


def test_fstab_line_with_the_usual_words_mounts(shared_machine: Machine, place: Path) -> None:
    """Promise: mount DIR, mount IMG, mount -a and umount use the line, with no environment.

    With a user-space option in the line, umount returns when the last commit is durable.
    """
    run = shared_machine
    run.fstab.write_text(f"{image_of(place)} {place} fuse.cowfs {USUAL} 0 0\n")
    for name in (place, image_of(place)):
        run.succeed("mount", name, environment={})
        assert options_of(run, place) >= {"rw", "nosuid", "nodev", "noexec"}
        run.succeed("umount", name, environment={})
        assert not run.processes(), "umount returned before the daemon had ended"
    run.fstab.write_text(f"{image_of(place)} {place} fuse.cowfs ro,nofail 0 0\n")
    run.succeed("mount", "-a")
    run.succeed("mount", "-a")  # already mounted, so nothing to do
    assert "ro" in options_of(run, place)
    assert run.run("touch", place / "file").returncode
    run.succeed("umount", "-a", "-t", "fuse.cowfs")
    assert not run.processes()


def test_fstab_switches_on_set_id_programs_devices_and_strict_times(
    shared_machine: Machine, place: Path
) -> None:
    """Promise: setuid, devices and strictatime reach the daemon; a read after an open moves atime.

    mount(8) does not pass on suid and dev, since they are its defaults.
    """
    run = shared_machine
    line = f"{image_of(place)} {place} fuse.cowfs {{}} 0 0\n"
    run.fstab.write_text(line.format("suid,dev"))
    run.succeed("mount", place)
    assert options_of(run, place) >= {"nosuid", "nodev"}
    run.succeed("umount", place)
    run.fstab.write_text(line.format("setuid,devices,strictatime"))
    run.succeed("mount", place)
    assert not options_of(run, place) & {"nosuid", "nodev"}
    file = place / "file"
    program = (
        "echo data >{0}; cat {0} >{0}.copy; for n in 1 2; do touch -a -d @1000000000 {0}; "
        "touch -m -d @1 {0}; cat {0} >/dev/null; sleep 0.05; stat -c %X {0}; done; "
        "a=$(stat -c %x {0}); sleep 0.05; cat {0} >/dev/null; b=$(stat -c %x {0}); "
        '[ "$a" != "$b" ] && echo moved'
    )
    shown = run.succeed("sh", "-c", program.format(file)).split()
    assert int(shown[0]) > 10**9
    assert int(shown[1]) > 10**9
    assert shown[2] == "moved"
    run.succeed("umount", place)
    run.fstab.write_text(line.format("defaults"))
    run.succeed("mount", place)
    program = "a=$(stat -c %x {0}); sleep 0.05; cat {0} >/dev/null; b=$(stat -c %x {0}); "
    run.succeed("sh", "-c", program.format(file) + '[ "$a" = "$b" ]')


def test_fstab_given_to_mount_is_used(shared_machine: Machine, place: Path) -> None:
    """Promise: mount -T FILE works, with a path that has a space in it."""
    spaced = place.parent / "with space"
    spaced.mkdir()
    table = place.parent / "table"
    table.write_text(f"{image_of(place)} {place.parent}/with\\040space fuse.cowfs commit=1 0 0\n")
    shared_machine.succeed("mount", "-T", table, spaced)
    assert [line[1] for line in shared_machine.mounts()] == [f"{place.parent}/with\\040space"]
    shared_machine.succeed("umount", spaced)
    shared_machine.wait_until_empty()


def test_flags_of_mount_reach_the_helper(shared_machine: Machine, place: Path) -> None:
    """Promise: mount's -f mounts nothing, -v reports, -s skips unknown options, -n and -r work."""
    run, words = shared_machine, ["-t", "fuse.cowfs", image_of(place), place]
    told = run.succeed("mount", "-f", "-v", *words)
    assert f"mounting {image_of(place)} on {place}" in told
    assert not run.mounts()
    refused = run.run("mount", *words, "-o", "frob")
    assert refused.returncode == 1
    assert "'frob'" in refused.stderr
    run.succeed("mount", "-s", "-n", "-r", *words, "-o", "frob")
    assert "ro" in options_of(run, place)


def test_what_went_wrong_is_the_exit_status_of_mount(shared_machine: Machine, place: Path) -> None:
    """Promise: usage errors are status 1, failed mounts 32, with one line each and no mount."""
    run, image = shared_machine, image_of(place)
    run.fstab.write_text(f"{image}.gone {place} fuse.cowfs nofail 0 0\n")
    for words, status, said in (
        ([image, place, "-o", "commit=x"], 1, "commit=x"),
        ([f"{image}.gone", place], 32, "there is no image"),
        ([image, f"{place}.gone"], 32, "gone"),
        ([image, image.parent], 32, "inside its own mount"),
    ):
        done = run.run("mount", "-t", "fuse.cowfs", *words)
        assert said in done.stderr, done
        assert done.returncode == status, done
        assert "Traceback" not in done.stderr
    assert run.run("mount", place).returncode == 32
    assert not run.mounts()


def info_of(run: Machine, place: Path) -> dict[str, Any]:
    """The daemon's information about the mount and about itself."""
    found: dict[str, Any] = json.loads(run.succeed("cowfs", "info", place, "--json"))
    return found


def require_paused(run: Machine, place: Path) -> None:
    """Require that reading does not write to the image and that edits are refused in words."""
    info = info_of(run, place)
    assert info["clean"] is True
    assert info["daemon_settings"]["read_only"] is True
    assert "Read-only" in run.run("touch", place / "file").stderr
    assert run.succeed("cat", place / "file") == "kept\n"
    refused = run.run("cowfs", "snapshot", "create", place, "no")
    assert refused.returncode
    assert "remount,rw" in refused.stderr
    time.sleep(2.5 * COMMIT_SECONDS)
    later = info_of(run, place)
    assert (later["clean"], later["generation"]) == (True, info["generation"])


def require_writing(run: Machine, place: Path) -> None:
    """Require that files and snapshots can be made, and the image is marked as in use."""
    run.succeed("sh", "-c", f"echo kept >{place}/file")
    run.succeed("cowfs", "sync", place)
    info = info_of(run, place)
    assert info["clean"] is False
    assert info["daemon_settings"]["read_only"] is False


@pytest.mark.parametrize("helper", [True, False], ids=["helper", "kernel"])
def test_remount_makes_read_only_and_writable_again(
    shared_machine: Machine, place: Path, helper: bool
) -> None:
    """Promise: remount,ro commits, then writes nothing; remount,rw resumes in the same daemon.

    Without the helper the daemon notices a little later.
    """
    run = shared_machine
    words = [] if helper else ["-i"]
    # Without the helper mount(8) sets the flags of this line, and clears the others.
    options = f"commit={COMMIT_SECONDS},strictatime,nosuid,nodev,noexec"
    run.fstab.write_text(f"{image_of(place)} {place} fuse.cowfs {options} 0 0\n")
    run.succeed("mount", place)
    daemon = run.processes()
    inside = [*AS_ROOT, "nsenter", f"--target={min(daemon)}", "--mount", "--wd=/", "sh", "-c"]
    require_writing(run, place)
    for _ in range(2):
        with subprocess.Popen(
            [*inside, f"exec 9>{place}/open; echo open; read line"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as user:
            assert user.stdin is not None
            assert user.stdout is not None
            assert user.stdout.readline() == "open\n"
            done = run.run("mount", *words, "-o", "remount,ro", place)
            assert done.returncode == 32
            assert "busy" in done.stderr
            user.stdin.close()
        require_writing(run, place)
        for wanted, require in (("ro", require_paused), ("rw", require_writing)):
            for _ in range(2):  # the second time changes nothing
                run.succeed("mount", *words, "-o", f"remount,{wanted}", place)
            assert options_of(run, place) >= {wanted, "nosuid", "nodev", "noexec"}
            deadline = time.monotonic() + (0 if helper else HANG_SECONDS)
            while info_of(run, place)["clean"] != (wanted == "ro"):
                assert time.monotonic() < deadline, "the daemon does not follow"
                time.sleep(0.05)
            require(run, place)
    assert run.processes() == daemon
    run.succeed("mount", *words, "-o", "remount,ro", place)
    run.succeed("umount", place)
    run.wait_until_empty()


def test_what_was_mounted_read_only_becomes_writable(shared_machine: Machine, place: Path) -> None:
    """Promise: remount,rw of a read-only mount works, unless it is in use or shows the past."""
    run = shared_machine
    run.fstab.write_text(f"{image_of(place)} {place} fuse.cowfs ro,commit={COMMIT_SECONDS} 0 0\n")
    run.succeed("mount", place)
    daemon = min(run.processes())
    inside = [*AS_ROOT, "nsenter", f"--target={daemon}", "--mount", "--wd=/", "sh", "-c"]
    user = subprocess.Popen(
        [*inside, f"cd {place} && echo there && exec sleep 100"],
        stdout=subprocess.PIPE,
    )
    try:
        assert user.stdout is not None
        assert user.stdout.readline() == b"there\n"
        done = run.run("mount", "-o", "remount,rw", place)
        assert done.returncode == 32
        assert "busy" in done.stderr
        assert "ro" in options_of(run, place)
    finally:
        user.kill()
        user.communicate()
    run.succeed("mount", "-o", "remount,rw", place)
    assert "rw" in options_of(run, place)
    require_writing(run, place)
    run.succeed("cowfs", "snapshot", "create", place, "monday")
    run.succeed("umount", place)
    run.wait_until_empty()
    run.fstab.write_text("")
    run.succeed("mount", "-t", "fuse.cowfs", image_of(place), place, "-o", "snapshot=monday")
    done = run.run("mount", "-o", "remount,rw", place)
    assert done.returncode == 1
    assert "past state" in done.stderr


def test_remount_with_other_options_is_refused_and_says_what_to_do(
    shared_machine: Machine, place: Path
) -> None:
    """Promise: other options than ro and rw change nothing, and the error says what to do."""
    run = shared_machine
    run.succeed("mount", "-t", "fuse.cowfs", image_of(place), place)
    for words in ("remount,ro,commit=1", "remount,noatime", "remount,rw,setuid"):
        done = run.run("mount", "-o", words, place)
        assert done.returncode == 1, done
        assert "unmount it, and mount it again" in done.stderr
        assert "rw" in options_of(run, place)
    run.succeed("umount", place)
    done = run.run("mount", "-t", "fuse.cowfs", image_of(place), place, "-o", "remount,ro")
    assert done.returncode == 32
    assert "not a cowfs mount point" in done.stderr


def test_umount_of_a_busy_mount_is_refused_and_lazy_is_not(
    shared_machine: Machine, place: Path
) -> None:
    """Promise: umount says busy and leaves the mount; umount -l ends in a clean commit later."""
    run = shared_machine
    run.succeed("mount", "-t", "fuse.cowfs", image_of(place), place)
    daemon = set(run.processes())
    program = f"exec 9>{place}/open; echo open; read line; echo late >&9"
    with subprocess.Popen(
        [*AS_ROOT, "nsenter", f"--target={min(daemon)}", "--mount", "--wd=/", "sh", "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as user:
        assert user.stdin is not None
        assert user.stdout is not None
        try:
            assert user.stdout.readline() == "open\n"
            done = run.run("umount", place)
            assert done.returncode == 32
            assert "busy" in done.stderr
            assert options_of(run, place)
            run.succeed("umount", "-l", place)
            assert not run.mounts()
            assert daemon <= set(run.processes()), "the daemon left its user alone"
        finally:
            user.stdin.close()
    for pid in daemon:
        assert wait_for_end(pid)
    assert json_of(run_command("info", image_of(place), "--json"))["clean"] is True
    run.succeed("mount", "-t", "fuse.cowfs", image_of(place), place)
    assert run.succeed("cat", place / "open") == "late\n"


def test_mount_after_a_kill_clears_the_dead_mount_away(
    shared_machine: Machine, place: Path
) -> None:
    """Promise: after a kill of the daemon, mount DIR just works, and umount of the dead mount."""
    run = shared_machine
    run.fstab.write_text(f"{image_of(place)} {place} fuse.cowfs x-helper 0 0\n")
    run.succeed("mount", place)
    run.succeed("sh", "-c", f"echo kept >{place}/file; sync {place}/file")
    for how in ("mount", "umount"):
        for pid in run.processes():
            os.kill(pid, signal.SIGKILL)
            assert wait_for_end(pid)
        assert run.run("ls", place).returncode, "somebody still serves"
        run.succeed(how, place)
        assert len(run.mounts()) == (how == "mount")
    run.succeed("mount", place)
    assert run.succeed("cat", place / "file") == "kept\n"


def test_umount_works_when_the_image_was_moved(shared_machine: Machine, place: Path) -> None:
    """Promise: umount works when the image was moved, as a shutdown needs it."""
    run = shared_machine
    run.succeed("mount", "-t", "fuse.cowfs", image_of(place), place, "-o", "x-helper")
    moved = image_of(place).with_suffix(".moved")
    image_of(place).rename(moved)
    done = run.run("umount", place)
    assert done.returncode == 0, done
    assert "was moved, replaced or removed" in done.stderr
    assert not run.processes(), "the last commit was not waited for"
    require_clean(moved)


def test_a_snapshot_is_mounted_by_a_line_in_fstab(shared_machine: Machine, place: Path) -> None:
    """Promise: -o snapshot=NAME shows that snapshot's files, read-only, without .snapshots."""
    run = shared_machine
    run.succeed("mount", "-t", "fuse.cowfs", image_of(place), place)
    run.succeed("sh", "-c", f"echo old >{place}/file")
    run.succeed("cowfs", "snapshot", "create", place, "monday")
    run.succeed("sh", "-c", f"echo new >{place}/file; mkdir {place}/more")
    run.succeed("umount", place)
    run.wait_until_empty()
    run.fstab.write_text(f"{image_of(place)} {place} fuse.cowfs snapshot=monday,nofail 0 0\n")
    run.succeed("mount", place)
    assert "ro" in options_of(run, place)
    assert run.succeed("ls", "-A", place) == "file\n"
    assert run.succeed("cat", place / "file") == "old\n"
    assert run.run("ls", place / ".snapshots").returncode
    assert "Read-only" in run.run("touch", place / "file").stderr
