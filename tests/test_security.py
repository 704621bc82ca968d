"""Promises of cowfs/docs/security.md: what the code never does, and what other users may not do.

The second half needs root, because it runs commands as another user.
"""

import ast
import os
import pwd
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cowfs.daemon import places
from tests.commands import run_command
from tests.conftest import Mounted, require_success
from tests.sizes import HANG_SECONDS

CHECKOUT = Path(__file__).resolve().parent.parent
# Functions that turn bytes into behaviour. None may be used on data of an image or a socket.
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "yaml", "jsonpickle", "code", "runpy"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}

IS_ROOT = os.geteuid() == 0


def dangers(source: str) -> list[str]:
    """The calls in a Python source that could execute the data they read."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "").partition(".")[0]]
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
                found.append(f"line {node.lineno}: {node.func.id}()")
            if any(
                word.arg == "shell" and getattr(word.value, "value", True) for word in node.keywords
            ):
                found.append(f"line {node.lineno}: shell=True")
        found += [
            f"line {node.lineno}: import {name}" for name in names if name in FORBIDDEN_MODULES
        ]
    return found


@pytest.mark.parametrize("folder", ["cowfs", "tools"])
def test_nothing_that_is_read_is_ever_run(folder: str) -> None:
    """Promise: no pickle, marshal, eval, exec or shell anywhere in the program."""
    files = sorted((CHECKOUT / folder).rglob("*.py"))
    assert files
    wrong = {str(file): found for file in files if (found := dangers(file.read_text()))}
    assert not wrong


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from yaml import load",
        "eval(x)",
        "def f():\n  exec(x)",
        "run(a, shell=True)",
    ],
)
def test_what_would_run_data_is_noticed(text: str) -> None:
    """Promise: the rule above can fail."""
    assert dangers(text)


@pytest.fixture
def shared_mount() -> Iterator[Mounted]:
    """A mount that other users can reach, as far as permissions let them."""
    # Not below tmp_path: pytest closes that directory to other users at each start.
    with tempfile.TemporaryDirectory(prefix="cowfs-shared-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        mount = Mounted(folder, "64M", ("-o", "allow_other"))
        try:
            mount.start()
            yield mount
        finally:
            trouble = mount.close()
        assert trouble is None, trouble


def as_nobody(*command: str | os.PathLike[str]) -> subprocess.CompletedProcess[str]:
    """Run a command as another user; for that an ordinary user needs sudo."""
    words = [os.fspath(word) for word in command]
    user: dict[str, Any] = {}
    if IS_ROOT:
        nobody = pwd.getpwnam("nobody")
        user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    else:
        words = ["sudo", "-n", "-u", "nobody", "--", *words]
    return subprocess.run(words, **user, capture_output=True, text=True, timeout=HANG_SECONDS)


@pytest.mark.mounted
@pytest.mark.needs_cowfs
def test_another_user_gets_what_permissions_say_and_nothing_of_the_past(
    shared_mount: Mounted,
) -> None:
    """Promise: permissions and sticky bits bind other users; only the owner sees snapshots."""
    root = shared_mount.path
    root.chmod(0o755)
    secret, public, sticky = root / "secret", root / "public", root / "sticky"
    secret.write_text("secret")
    secret.chmod(0o600)
    public.write_text("public")
    public.chmod(0o644)
    sticky.mkdir()
    sticky.chmod(0o1777)
    (sticky / "mine").write_text("mine")
    past = shared_mount.snapshot("past")

    done = as_nobody("cat", public)
    assert done.stdout == "public", done.stderr
    assert as_nobody("cat", secret).returncode
    assert as_nobody("rm", "-f", sticky / "mine").returncode, "a sticky directory is open"
    assert as_nobody("mv", sticky / "mine", sticky / "theirs").returncode
    assert (sticky / "mine").exists()
    assert not as_nobody("touch", sticky / "theirs").returncode
    assert not as_nobody("rm", sticky / "theirs").returncode
    assert as_nobody("ls", root / ".snapshots").returncode, "snapshots are open to others"
    assert as_nobody("cat", past / "public").returncode


@pytest.mark.mounted
@pytest.mark.needs_cowfs
def test_nothing_that_roots_daemon_starts_can_gain_rights(shared_mount: Mounted) -> None:
    """Promise: with no_new_privs a hijacked root daemon gains nothing from set-uid programs.

    The daemon of an ordinary user can still run fusermount3.
    """
    status = Path(f"/proc/{shared_mount.daemon_pid}/status").read_text(encoding="utf-8")
    assert f"NoNewPrivs:\t{IS_ROOT:d}\n" in status


@pytest.mark.mounted
@pytest.mark.needs_cowfs
def test_another_user_cannot_reach_the_control_socket(shared_mount: Mounted) -> None:
    """Promise: only the daemon's own user and root command a mount."""
    folder = places.make_directory()
    sockets = places.find_sockets(shared_mount.image)
    assert sockets
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    connect = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    for path in sockets:
        assert stat.S_IMODE(path.lstat().st_mode) == 0o600
        done = as_nobody("/usr/bin/env", "python3", "-c", connect, path)
        assert "PermissionError" in done.stderr, done.stderr
    require_success(run_command("info", shared_mount.path))


@pytest.mark.mounted
@pytest.mark.needs_cowfs
def test_set_id_bits_go_with_a_write_and_are_never_in_a_snapshot(shared_mount: Mounted) -> None:
    """Promise: nosuid, nodev; another user's write clears set-id bits; snapshots have none."""
    program = shared_mount.path / "program"
    program.write_text("old")
    program.chmod(0o6777)
    past = shared_mount.snapshot("past")
    assert stat.S_IMODE((past / "program").stat().st_mode) == 0o777
    assert not as_nobody("sh", "-c", f"echo more >> {program}").returncode
    assert not program.stat().st_mode & (stat.S_ISUID | stat.S_ISGID)
    program.chmod(0o4777)
    os.chown(program, *((1234, 1234) if IS_ROOT else (-1, os.getgid())))
    assert not program.stat().st_mode & stat.S_ISUID
    for name in (b"trusted.x", b"security.capability"):
        done = as_nobody("setfattr", "-n", name.decode(), "-v", "1", program)
        assert done.returncode
    options = Path("/proc/self/mounts").read_text()
    line = next(line for line in options.splitlines() if str(shared_mount.path) in line)
    assert "nosuid" in line
    assert "nodev" in line
