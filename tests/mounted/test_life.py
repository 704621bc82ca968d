"""Promises about the start and end of a mount: it is whole or absent, and leaves nothing behind."""

import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowfs.daemon import places
from tests.commands import COMMANDS, run_command
from tests.conftest import (
    Mounted,
    is_mount_point,
    json_of,
    process_is_alive,
    require_clean,
    require_success,
    wait_for_end,
)
from tests.mounted.machine import NAMESPACES
from tests.sizes import HANG_SECONDS, wait_until

pytestmark = [pytest.mark.mounted, pytest.mark.needs_cowfs, NAMESPACES]


def runtime_files(image: Path) -> set[str]:
    """The names of an image's files in the runtime directory."""
    stem = Path(places.socket_name(image)).stem
    return {entry.name for entry in places.make_directory().iterdir() if stem in entry.name}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    image = tmp_path / "image.img"
    require_success(run_command("mkfs", image, "--size", "256M"))
    return image


@pytest.fixture
def blocked_socket(image: Path) -> Iterator[Path]:
    """A directory at the control socket's path, so that the last step of a start fails."""
    path = places.make_directory() / places.socket_name(image)
    for name in runtime_files(image):  # of a lost image whose inode this one got
        (path.parent / name).unlink()
    path.mkdir()
    yield path
    path.rmdir()


@pytest.mark.parametrize("foreground", [False, True])
def test_mount_whose_start_fails_leaves_nothing_behind(
    image: Path, tmp_path: Path, blocked_socket: Path, foreground: bool
) -> None:
    """Promise: after a failed start there is no mount, daemon or lock, and one line says why."""
    place = tmp_path / "place"
    place.mkdir()
    result = run_command("mount", image, place, *(["-f"] if foreground else []))
    assert result.returncode == 1, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert str(blocked_socket) in result.stderr
    assert not is_mount_point(place)
    assert runtime_files(image) == {blocked_socket.name}
    require_clean(image)
    require_success(run_command("snapshot", "create", image, "no lock is held"))


def test_daemon_killed_during_its_start_leaves_no_mount(image: Path, tmp_path: Path) -> None:
    """Promise: `cowfs mount` removes the mount of a daemon that was killed during its start."""
    place = tmp_path / "place"
    place.mkdir()
    # The first system call on the new mount is never answered.
    program = (
        "import os, signal, sys\n"
        "from cowfs.daemon import mount\n"
        "async def die(self): os.kill(os.getpid(), signal.SIGKILL)\n"
        "mount._Mount._report_ready = die\n"
        "from cowfs.cli.main import main\n"
        "main(sys.argv[1:])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, "mount", image, place],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert result.returncode == 1
    assert "ended before the mount answered" in result.stderr
    assert not is_mount_point(place)
    require_success(run_command("mount", image, place))
    require_success(run_command("umount", place))
    require_clean(image)


@pytest.mark.parametrize("how", ["cowfs umount", "umount", "SIGTERM", "SIGINT", "SIGHUP"])
def test_every_orderly_end_is_a_clean_commit(mount: Mounted, how: str) -> None:
    """Promise: however a mount ends, the image has all data, and no runtime file is left."""
    (mount.path / "file").write_bytes(b"never synced")
    assert len(runtime_files(mount.image)) == 2, "the socket and the log"
    pid = mount.daemon_pid
    assert pid is not None
    if how == "cowfs umount":
        require_success(run_command("umount", mount.path))
    elif how == "umount":
        subprocess.run(["fusermount3", "-u", mount.path], check=True, timeout=HANG_SECONDS)
    else:
        os.kill(pid, signal.Signals[how])
    assert wait_for_end(pid)
    assert not is_mount_point(mount.path)
    assert runtime_files(mount.image) == set()
    assert json_of(run_command("info", mount.image, "--json"))["clean"] is True
    mount.remount()
    assert (mount.path / "file").read_bytes() == b"never synced"


STORMS = {
    "TERM twice": ["SIGTERM", "SIGTERM"],
    "INT twice": ["SIGINT", "SIGINT"],
    "HUP then TERM": ["SIGHUP", "SIGTERM"],
    "all, until the end": ["SIGHUP", "SIGINT", "SIGTERM"] * 1000,
}


@pytest.mark.parametrize("foreground", [False, True], ids=["background", "foreground"])
@pytest.mark.parametrize("storm", STORMS)
def test_signals_after_the_first_do_not_cost_the_last_commit(
    image: Path, tmp_path: Path, storm: str, foreground: bool
) -> None:
    """Promise: later signals neither stop the last commit nor keep the mount from ending."""
    place = tmp_path / "place"
    place.mkdir()
    data = os.urandom(48 << 20)
    daemon = None
    if foreground:
        program = "import sys; from cowfs.cli.main import main; main(sys.argv[1:])"
        words: list[str | Path] = [
            sys.executable,
            "-c",
            program,
            "mount",
            "-f",
            image,
            place,
            "-o",
            "commit=60",
        ]
        daemon = subprocess.Popen(words, stderr=subprocess.PIPE)
        wait_until(lambda: is_mount_point(place), "it is not mounted")
    else:
        require_success(run_command("mount", image, place, "-o", "commit=60"))
    pid = json_of(run_command("info", place, "--json"))["daemon_pid"]
    (place / "file").write_bytes(data)
    for name in STORMS[storm]:
        try:
            os.kill(pid, signal.Signals[name])
        except ProcessLookupError:
            break
        time.sleep(0.005)
        if not process_is_alive(pid):
            break
    assert wait_for_end(pid)
    if daemon is not None:
        _, said = daemon.communicate()
        assert daemon.returncode == 0, said
    assert not is_mount_point(place)
    require_clean(image)
    assert json_of(run_command("info", image, "--json"))["clean"] is True
    require_success(run_command("mount", image, place))
    assert (place / "file").read_bytes() == data
    require_success(run_command("umount", place))


def test_signal_during_the_start_leaves_no_mount(image: Path, tmp_path: Path) -> None:
    """Promise: a signal before the mount answers ends it as a later one does."""
    place = tmp_path / "place"
    place.mkdir()
    program = (
        "import os, signal, sys\n"
        "from cowfs.daemon import mount\n"
        "init = mount.pyfuse3.init\n"
        "def interrupted(*arguments):\n"
        "    init(*arguments)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "mount.pyfuse3.init = interrupted\n"
        "from cowfs.cli.main import main\n"
        "main(sys.argv[1:])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, "mount", "-f", image, place],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert not is_mount_point(place)
    require_clean(image)
    assert json_of(run_command("info", image, "--json"))["clean"] is True


def test_daemon_keeps_no_descriptor_of_its_caller(image: Path, tmp_path: Path) -> None:
    """Promise: the daemon holds no descriptor of its caller, so locks and pipes end with that."""
    place = tmp_path / "place"
    place.mkdir()
    lock = tmp_path / "lock"
    shell = f'(flock -n 9 || exit 9; "{COMMANDS}/cowfs" mount "{image}" "{place}") 9>"{lock}"'
    subprocess.run(["bash", "-c", shell], check=True, timeout=HANG_SECONDS)
    try:
        subprocess.run(["flock", "-n", lock, "true"], check=True, timeout=HANG_SECONDS)
        pid = json_of(run_command("info", place, "--json"))["daemon_pid"]
        opened = {os.readlink(f"/proc/{pid}/fd/{n}") for n in os.listdir(f"/proc/{pid}/fd")}
        assert not [path for path in opened if path.startswith("pipe:")], opened
        assert {path for path in opened if path.startswith("/")} == {
            "/dev/null",
            "/dev/fuse",
            f"/proc/{pid}/mountinfo",
            str(image),
            str(places.make_directory()),
            str(places.make_directory() / Path(places.socket_name(image)).with_suffix(".log")),
        }
    finally:
        require_success(run_command("umount", place))


def test_daemon_has_the_descriptors_that_it_needs_or_says_so(image: Path, tmp_path: Path) -> None:
    """Promise: despite a caller's `ulimit -n 16` the daemon gets enough descriptors, or says so."""
    place = tmp_path / "place"
    place.mkdir()

    def limited(words: list[object], limit: str = "-n 16") -> subprocess.CompletedProcess[str]:
        line = f"ulimit {limit}; {shlex.join(map(str, words))}"
        return subprocess.run(
            ["bash", "-c", line], capture_output=True, text=True, timeout=HANG_SECONDS
        )

    cowfs = COMMANDS / "cowfs"
    refused = limited([cowfs, "mount", image, place])
    assert refused.returncode == 1
    assert "ulimit -n 128" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert not is_mount_point(place)
    refused = limited([cowfs, "mount", image, place], "-f 1024")
    assert refused.returncode == 1
    assert "ulimit -f unlimited" in refused.stderr
    # Set the soft limits only, as a shell's profile does.
    done = limited([cowfs, "mount", image, place], "-S -n 16; ulimit -S -f 1024")
    assert done.returncode == 0, done.stderr
    try:
        pid = json_of(run_command("info", place, "--json"))["daemon_pid"]
        assert resource.prlimit(pid, resource.RLIMIT_NOFILE)[0] >= 128
        for words in (["info"], ["snapshot", "list"], ["df"]):
            done = limited([cowfs, *words, place])
            assert done.returncode == 0, done.stderr
    finally:
        done = limited([cowfs, "umount", place])
    assert done.returncode == 0, done.stderr
    for words in (["info"], ["snapshot", "list"], ["check"]):
        assert limited([cowfs, *words, image]).returncode == 0


def test_two_images_on_one_directory_at_once_are_one_mount_and_one_refusal(
    image: Path, tmp_path: Path
) -> None:
    """Promise: no mount is hidden below another that was started at the same moment."""
    place = tmp_path / "place"
    place.mkdir()
    other = tmp_path / "other.img"
    require_success(run_command("mkfs", other, "--size", "64M"))
    # Both look at the directory before either mounts.
    program = (
        "import sys\n"
        "from cowfs.daemon import mount\n"
        "look = mount.check_place\n"
        "def slow(options):\n"
        "    look(options)\n"
        "    print('looked', flush=True)\n"
        "    sys.stdin.readline()\n"
        "mount.check_place = slow\n"
        "from cowfs.cli.main import main\n"
        "main(sys.argv[1:])\n"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program, "mount", each, place],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for each in (image, other)
    ]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "looked\n"
    for process in both:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate(timeout=HANG_SECONDS)[1] for process in both]
    codes = [process.returncode for process in both]
    stacked = sum(mount.mount_point == str(place) for mount in places.mounts())
    for _ in range(stacked):
        require_success(run_command("umount", place))
    assert sorted(codes) == [0, 1], said
    assert stacked == 1
    assert "mount" in said[codes.index(1)]
    assert str(place) in said[codes.index(1)]
    for each in (image, other):
        require_clean(each)


@pytest.mark.needs_root
def test_dead_mount_of_another_filesystem_is_left_alone(image: Path, tmp_path: Path) -> None:
    """Promise: only a dead mount of a cowfs daemon is cleared away."""
    place = tmp_path / "place"
    place.mkdir()
    program = (
        "import ctypes, os, sys\n"
        "fd = os.open('/dev/fuse', os.O_RDWR)\n"
        "options = f'fd={fd},rootmode=40000,user_id=0,group_id=0'.encode()\n"
        "place = os.fsencode(sys.argv[1])\n"
        "sys.exit(ctypes.CDLL(None).mount(b'other', place, b'fuse.other', 0, options))\n"
    )
    for below in (False, True):
        if below:  # with a living cowfs mount below it
            require_success(run_command("mount", image, place))
        subprocess.run([sys.executable, "-c", program, place], check=True)
        try:
            for refused in (run_command("mount", image, place), run_command("umount", place)):
                assert refused.returncode in (1, 11), refused
            kinds = [e.kind for e in places.mount_table() if e.mount_point == str(place)]
            assert kinds == [*(["fuse.cowfs"] if below else []), "fuse.other"]
        finally:
            subprocess.run(["umount", "-i", "-l", place], check=True)
    (place / "file").write_text("alive")
    require_success(run_command("umount", place))


@pytest.mark.needs_root
def test_rollback_names_who_keeps_the_state_before(mount: Mounted, tmp_path: Path) -> None:
    """Promise: rollback warns about programs in a subdirectory and about a bind mount of one."""
    (mount.path / "inner").mkdir()
    mount.snapshot("before")
    quiet = mount.cowfs("rollback", mount.path, "before")
    assert (quiet.returncode, quiet.stderr) == (0, "")
    bound = tmp_path / "bound"
    bound.mkdir()
    subprocess.run(["mount", "--bind", mount.path / "inner", bound], check=True)
    with subprocess.Popen(["sleep", "60"], cwd=mount.path / "inner") as inside:
        try:
            for words in (("rollback", mount.path, "before"), ("undo", mount.path)):
                said = require_success(mount.cowfs(*words)).stderr
                assert f"the bind mount {bound}" in said
                if words[0] == "rollback":
                    assert f"process {inside.pid} (sleep) in {mount.path}/inner" in said
                assert "still see the state before" in said
        finally:
            inside.kill()
            subprocess.run(["umount", bound], check=True)
