"""Promises of `cowfs umount`: it claims only what it knows, and names who keeps a mount busy."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowfs.cli.mounting import UMOUNT_WAIT_S_MAX
from cowfs.daemon import places
from tests.commands import COMMANDS, run_command
from tests.conftest import (
    Mounted,
    is_mount_point,
    json_of,
    process_is_alive,
    require_clean,
    require_success,
    unmount_lazily,
    wait_for_end,
)
from tests.mounted.machine import ANNA, AS_ROOT, NAMESPACES, machine
from tests.sizes import HANG_SECONDS

pytestmark = [pytest.mark.mounted, pytest.mark.needs_cowfs, NAMESPACES]

# Less than umount waits for the last commit of a mount that nobody uses.
NAMED_SECONDS_MAX = min(HANG_SECONDS, UMOUNT_WAIT_S_MAX / 2)


def socket_of(mount: Mounted) -> Path:
    return places.make_directory() / places.socket_name(mount.image)


@contextlib.contextmanager
def program(*words: str | os.PathLike[str], cwd: Path | None = None) -> Iterator[int]:
    """A program that runs during the block, once it has said that it is ready. Yields its pid."""
    with subprocess.Popen(
        [*words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=cwd
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            assert process.stdout.readline() == "ready\n"
            yield process.pid
        finally:
            process.stdin.close()
            process.wait(timeout=HANG_SECONDS)


# Copies of other mounts would keep their daemons from ending: $1 is the one to keep.
_ALONE = """
findmnt -n -r -o TARGET -t fuse.cowfs | while read -r place; do
    place="$(printf '%b' "$place")"
    [ "$place" = "$1" ] || umount -i -l "$place"
done
echo ready
read x
"""


@contextlib.contextmanager
def namespace(propagation: str, kept: Path) -> Iterator[int]:
    """A new mount namespace, with a copy of the mount at `kept`."""
    words = ["unshare", "--mount", f"--propagation={propagation}", "bash", "-c", _ALONE, "sh", kept]
    with program(*words) as pid:
        yield pid


# --- a daemon without a socket --------------------------------------------------------------------


def test_socket_that_was_removed_is_made_again(mount: Mounted) -> None:
    """Promise: when a cleaner of /run or /tmp removed the socket, the daemon makes a new one."""
    path = socket_of(mount)
    for number, target in enumerate((mount.path, mount.image)):
        path.unlink()
        require_success(run_command("snapshot", "create", target, f"snapshot {number}"))
        path.unlink()
        assert json_of(run_command("info", target, "--json"))["daemon_pid"] == mount.daemon_pid
    mount.umount()
    assert not path.exists()


def test_umount_without_a_socket_waits_for_the_daemon(mount: Mounted) -> None:
    """Promise: a living daemon is not called gone, and umount waits for its last commit."""
    data = os.urandom(64 << 20)
    assert mount.daemon_pid is not None
    path = socket_of(mount)
    path.unlink()
    path.mkdir()  # so that the socket cannot be made again
    try:
        done = run_command("info", mount.path)
        assert done.returncode == 11
        assert f"process {mount.daemon_pid} (" in done.stderr
        assert "control socket" in done.stderr
        (mount.path / "file").write_bytes(data)
        done = require_success(run_command("umount", mount.path))
        assert "gone" not in done.stderr
        assert not process_is_alive(mount.daemon_pid)
        assert json_of(run_command("info", mount.image, "--json"))["clean"] is True
    finally:
        path.rmdir()
    mount.remount()
    assert (mount.path / "file").read_bytes() == data


def test_umount_of_a_dead_mount_says_that_the_daemon_was_gone(mount: Mounted) -> None:
    """Promise: umount says if the daemon was gone, even when the image is mounted elsewhere."""
    pid, mount.daemon_pid = mount.daemon_pid, None
    assert pid is not None
    other = mount.path.with_name("other")
    other.mkdir()
    os.kill(pid, signal.SIGKILL)
    assert wait_for_end(pid)
    require_success(run_command("mount", mount.image, other))
    try:
        done = require_success(run_command("umount", mount.path))
        assert "was gone" in done.stderr
        assert not is_mount_point(mount.path)
        assert is_mount_point(other)
        (other / "file").write_text("alive")
    finally:
        require_success(run_command("umount", other))


@pytest.mark.parametrize("what", ["moved", "removed", "replaced"])
def test_mount_of_an_image_without_its_name_works_to_the_end(
    mount: Mounted, tmp_path: Path, what: str
) -> None:
    """Promise: commands find the daemon of a mount whatever happened to the image's path."""
    kept = tmp_path / "kept.img"
    os.link(mount.image, kept)
    mount.image.unlink()
    if what == "moved":
        kept.rename(tmp_path / "moved.img")
        kept = tmp_path / "moved.img"
    elif what == "replaced":
        require_success(run_command("mkfs", mount.image, "--size", "64M"))
    (mount.path / "file").write_bytes(b"kept")
    require_success(run_command("snapshot", "create", mount.path, "one"))
    done = require_success(run_command("umount", mount.path))
    assert "was moved, replaced or removed" in done.stderr
    assert "gone" not in done.stderr
    assert not is_mount_point(mount.path)
    assert mount.daemon_pid is not None
    assert not process_is_alive(mount.daemon_pid)
    require_clean(kept)
    os.replace(kept, mount.image)
    mount.remount()
    assert (mount.path / "file").read_bytes() == b"kept"


# --- who is in the way ----------------------------------------------------------------------------


def busy_words(mount: Mounted) -> str:
    done = run_command("umount", mount.path, timeout=NAMED_SECONDS_MAX)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert is_mount_point(mount.path)
    return done.stderr


def test_busy_refusal_names_the_processes(mount: Mounted) -> None:
    """Promise: the error names processes that use its files, directories, mappings or programs."""
    (mount.path / "dir").mkdir()
    (mount.path / "file").write_bytes(bytes(8192))
    shutil.copy(shutil.which("sleep") or "", mount.path / "sleeper")
    with program("sh", "-c", "echo ready; read x", cwd=mount.path / "dir") as pid:
        assert f"process {pid} (sh) works in {mount.path}/dir" in busy_words(mount)
    with program("sh", "-c", f"exec 9<{mount.path}/file; echo ready; read x") as pid:
        assert f"process {pid} (sh) has {mount.path}/file open" in busy_words(mount)
    mapping = (
        "import mmap, os, sys\n"
        "fd = os.open(sys.argv[1], os.O_RDWR)\n"
        "kept = mmap.mmap(fd, 0)\n"
        "os.close(fd)\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    # mmap keeps a descriptor of its own: close it, so that only the mapping is left.
    mapping = mapping.replace("os.close(fd)", "os.closerange(3, 100)")
    with program(sys.executable, "-c", mapping, mount.path / "file") as pid:
        assert f"process {pid} (" in (words := busy_words(mount))
        assert f"has {mount.path}/file mapped" in words
    with subprocess.Popen([mount.path / "sleeper", "60"]) as sleeper:
        try:
            assert f"process {sleeper.pid} (sleeper) runs {mount.path}/sleeper" in busy_words(mount)
        finally:
            sleeper.kill()


@pytest.mark.needs_root
def test_busy_refusal_names_loop_devices_and_inner_mounts(mount: Mounted) -> None:
    """Promise: a busy mount without a process names loop devices and inner mounts."""
    (mount.path / "inner").mkdir()
    with open(mount.path / "disk", "wb") as file:
        file.truncate(8 << 20)
    subprocess.run(["mount", "-t", "tmpfs", "none", mount.path / "inner"], check=True)
    try:
        assert f"{mount.path}/inner is mounted in it" in busy_words(mount)
    finally:
        subprocess.run(["umount", mount.path / "inner"], check=True)
    made = subprocess.run(
        ["losetup", "-f", "--show", mount.path / "disk"], capture_output=True, text=True, check=True
    )
    device = made.stdout.strip()
    try:
        assert f"the loop device {device} is on {mount.path}/disk" in busy_words(mount)
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


@pytest.mark.needs_root
def test_umount_names_who_else_has_the_mount_before_it_takes_it_away(
    mount: Mounted, tmp_path: Path
) -> None:
    """Promise: umount first names bind mounts, copies in other namespaces and overlays."""
    place, upper, work = tmp_path / "place", tmp_path / "upper", tmp_path / "work"
    for folder in (place, upper, work):
        folder.mkdir()
    subprocess.run(["mount", "--bind", mount.path, place], check=True)
    try:
        assert f"in use elsewhere too: on {place};" in busy_words(mount)
        done = require_success(run_command("umount", place))
        assert f"still mounted on {mount.path}" in done.stderr
    finally:
        if is_mount_point(place):
            unmount_lazily(place)
    layers = f"lowerdir={mount.path},upperdir={upper},workdir={work}"
    subprocess.run(["mount", "-t", "overlay", "-o", layers, "overlay", place], check=True)
    try:
        assert f"as a layer of the overlay on {place}" in busy_words(mount)
    finally:
        subprocess.run(["umount", place], check=True)
    with namespace("private", mount.path) as pid:
        words = busy_words(mount)
        assert f"on {mount.path} in the mount namespace of process {pid} (" in words
    require_success(run_command("umount", mount.path))


@pytest.mark.needs_root
def test_copy_that_goes_with_the_mount_is_not_in_the_way(tmp_path: Path) -> None:
    """Promise: a namespace that follows ours, as services have it, does not delay umount."""
    shared = tmp_path / "shared"
    shared.mkdir()
    subprocess.run(["mount", "--bind", shared, shared], check=True)
    subprocess.run(["mount", "--make-shared", shared], check=True)
    try:
        mount = Mounted(shared / "cowfs", "64M")
        mount.start()
        with namespace("slave", mount.path):
            require_success(run_command("umount", mount.path, timeout=NAMED_SECONDS_MAX))
            assert mount.daemon_pid is not None
            assert wait_for_end(mount.daemon_pid)
        require_clean(mount.image)
    finally:
        subprocess.run(["umount", "-l", shared], check=True)


@pytest.mark.needs_root
def test_umount_of_the_last_bind_mount_ends_the_daemon(mount: Mounted, tmp_path: Path) -> None:
    """Promise: the umount of the last bind mount, whichever it is, waits for the last commit."""
    place = tmp_path / "place"
    place.mkdir()
    subprocess.run(["mount", "--bind", mount.path, place], check=True)
    subprocess.run(["umount", "-i", mount.path], check=True)
    (place / "file").write_bytes(b"by the other way")
    require_success(run_command("snapshot", "create", place, "one"))
    require_success(run_command("umount", place))
    assert mount.daemon_pid is not None
    assert not process_is_alive(mount.daemon_pid)
    mount.remount()
    assert (mount.path / "file").read_bytes() == b"by the other way"


@pytest.mark.needs_root
def test_helper_of_umount_leaves_the_other_places_of_a_mount(
    mount: Mounted, tmp_path: Path
) -> None:
    """Promise: umount(8) unmounts the given place, says who else has the mount, and succeeds."""
    place = tmp_path / "place"
    place.mkdir()
    helper = [sys.executable, "-c", "from cowfs.cli.mount_helper import umount_main; umount_main()"]
    subprocess.run(["mount", "--bind", mount.path, place], check=True)
    (mount.path / "file").write_bytes(b"safe")
    done = subprocess.run(
        [*helper, mount.path], capture_output=True, text=True, timeout=NAMED_SECONDS_MAX
    )
    try:
        assert done.returncode == 0, done
        assert f"is safe in {mount.image}" in done.stderr
        assert f"on {place};" in done.stderr
        assert not is_mount_point(mount.path)
    finally:
        done = subprocess.run(
            [*helper, place], capture_output=True, text=True, timeout=HANG_SECONDS
        )
    assert done.returncode == 0, done
    assert mount.daemon_pid is not None
    assert not process_is_alive(mount.daemon_pid)
    mount.remount()
    assert (mount.path / "file").read_bytes() == b"safe"


@pytest.mark.needs_root
def test_busy_refusal_names_what_only_root_sees(tmp_path: Path) -> None:
    """Promise: root's umount names processes that the daemon of an ordinary user cannot see."""
    with machine() as run:
        place = run.folder / "place"
        run.folder.chmod(0o777)
        run.succeed("mkdir", place, user=ANNA)
        image = run.folder / "disk.img"
        run.succeed("cowfs", "mkfs", image, "--size", "64M", user=ANNA)
        run.fuse_conf.write_text("user_allow_other\n")
        run.succeed("cowfs", "mount", image, place, "-o", "allow_other", user=ANNA)
        enter = ["nsenter", f"--target={min(run.processes())}", "--mount", "--wd=/"]
        script = f"cd {place}; echo ready; read x"
        with program(*AS_ROOT, *enter, "sh", "-c", script) as pid:
            done = run.run("cowfs", "umount", place)
            assert done.returncode == 1
            assert f"process {pid} (sh) works in {place}" in done.stderr
        run.succeed("cowfs", "umount", place)


def test_umount_says_at_once_who_holds_a_mount_that_is_gone_from_sight(mount: Mounted) -> None:
    """Promise: umount says at once whom it waits for, and what it calls safe is in the image."""
    (mount.path / "file").write_bytes(b"safe")
    script = f"exec 9<{mount.path}/file; echo ready; read x"
    # As with a lazy unmount by another: the directory is free and the file stays open.
    lazily = (
        "import sys\n"
        "from cowfs.daemon import mount\n"
        "from cowfs.cli.main import main\n"
        "ordinary = mount.unmount\n"
        "mount.unmount = lambda place, **_: ordinary(place, lazy=True)\n"
        "main(sys.argv[1:])\n"
    )
    mount.umount()
    subprocess.run(
        [sys.executable, "-c", lazily, "mount", mount.image, mount.path],
        check=True,
        timeout=HANG_SECONDS,
    )
    mount.daemon_pid = json_of(run_command("info", mount.path, "--json"))["daemon_pid"]
    with program("sh", "-c", script) as pid:
        (mount.path / "more").write_bytes(b"written last")
        began = time.monotonic()
        done = run_command("umount", mount.path)
        assert time.monotonic() - began < NAMED_SECONDS_MAX
        assert done.returncode == 1
        assert f"all that was written there is safe in {mount.image}" in done.stderr
        assert f"process {pid} (sh) has" in done.stderr
        assert mount.daemon_pid is not None
        assert process_is_alive(mount.daemon_pid)
        os.kill(mount.daemon_pid, signal.SIGKILL)
        assert wait_for_end(mount.daemon_pid)
    mount.remount()
    assert (mount.path / "more").read_bytes() == b"written last"


# --- another PID namespace ------------------------------------------------------------------------


@pytest.mark.needs_root
@pytest.mark.parametrize("shares_run", [True, False])
def test_mount_from_another_pid_namespace_leaves_living_sockets_alone(shares_run: bool) -> None:
    """Promise: a container that shares /run does not take our daemons for dead.

    From outside, its own daemons are found and waited for, wherever their sockets are.
    """
    with machine() as run:
        run.succeed("mkdir", "-p", "/run/cowfs")
        run.succeed("mount", "-t", "tmpfs", "-o", "mode=700", "none", "/run/cowfs")
        run.succeed("mount", "--make-rshared", "/")
        outer, inner, third = (run.folder / name for name in ("outer", "inner", "third"))
        third.mkdir()
        for place in (outer, inner):
            place.mkdir()
            run.succeed("cowfs", "mkfs", f"{place}.img", "--size", "64M")
        run.succeed("cowfs", "mount", f"{outer}.img", outer)
        daemon = min(run.processes())
        cowfs = f'"{COMMANDS}/cowfs"'
        says = "another PID namespace" if shares_run else "another process"
        own_run = "mount --make-private /run/cowfs && mount -t tmpfs -o mode=700 x /run/cowfs && "
        script = ("" if shares_run else own_run) + (
            f'{cowfs} mount "{inner}.img" "{inner}" && '
            f'{cowfs} mount "{outer}.img" "{third}" 2>&1 | grep -q "{says}" && '
            "echo ready && read x"
        )
        enter = ["nsenter", f"--target={daemon}", "--mount", "--wd=/"]
        container = ["unshare", "--pid", "--fork", "--mount-proc", "--propagation=shared"]
        with program(*AS_ROOT, *enter, *container, "sh", "-c", script):
            run.succeed("cowfs", "snapshot", "create", outer, "still there")
            run.succeed("sh", "-c", f"echo kept >{inner}/file")
            run.succeed("cowfs", "snapshot", "create", inner, "from outside")
            done = run.run("cowfs", "mount", f"{inner}.img", third)
            assert "in use by process" in done.stderr
            assert "process 0" not in done.stderr
            run.succeed("cowfs", "umount", inner, timeout=NAMED_SECONDS_MAX)
            assert json_of(run_command("info", f"{inner}.img", "--json"))["clean"] is True
        run.succeed("cowfs", "umount", outer)
        for place in (outer, inner):
            require_clean(Path(f"{place}.img"))
