"""A private mount namespace, for tests of what only root and the system can do.

The namespace has its own helpers of mount(8) in /usr/sbin, its own /etc/fstab and /etc/fuse.conf, a
/dev/fuse that every user may open, and two more users, anna and bert; outside nothing changes. It
ends with all its mounts and processes; a daemon that does not end by itself fails the test.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.commands import COMMANDS, Completed
from tests.conftest import wait_for_end
from tests.sizes import HANG_SECONDS

# A mount namespace copies all mounts, so tests that make namespaces run in turn with those they
# disturb.
NAMESPACES = pytest.mark.xdist_group("mount namespaces")
AS_ROOT = [] if os.geteuid() == 0 else ["sudo", "-n"]
PYTHONPATH = os.environ.get("PYTHONPATH", "")
HELPERS = {"mount.fuse.cowfs": "main", "umount.fuse.cowfs": "umount_main"}
ANNA, BERT = 60_001, 60_002

# Shell program that sets up the namespace: $1 is the folder with `sbin`, `fuse.conf`, `fstab`.
_SET_UP = """
set -e
# Copies of the mounts of others would keep their daemons from ending.
findmnt -n -r -o TARGET -t fuse.cowfs | while read -r place; do
    umount -i -l "$(printf '%b' "$place")"
done
mount -t overlay -o "lowerdir=$1/sbin:/usr/sbin" overlay /usr/sbin
mount -t tmpfs -o mode=755 tmpfs "$1/dev"
mknod -m 666 "$1/dev/fuse" c 10 229
mount --bind "$1/dev/fuse" /dev/fuse
touch /etc/fuse.conf
mount --bind "$1/fuse.conf" /etc/fuse.conf
mount --bind "$1/fstab" /etc/fstab
mount --bind "$1/passwd" /etc/passwd
"""
# If the interpreter lies in a home that others may not enter: $2 is that home, $3 the needed part.
_OPEN_A_WAY = """
mount -t tmpfs -o mode=755 tmpfs "$1/way"
mkdir -p "$1/way/$4"
mount --bind "$3" "$1/way/$4"
mount --rbind "$1/way" "$2"
"""


class Machine:
    """The namespace. `folder` is a directory that every user may enter."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.chmod(0o755)
        self.fstab = folder / "fstab"
        self.fuse_conf = folder / "fuse.conf"
        self.fstab.write_text("")
        self.fuse_conf.write_text("")
        users = Path("/etc/passwd").read_text(encoding="utf-8")
        for name, number in (("anna", ANNA), ("bert", BERT)):
            users += f"{name}:x:{number}:{number}::/nonexistent:/bin/sh\n"
        (folder / "passwd").write_text(users)
        for name in ("sbin", "dev", "way"):
            (folder / name).mkdir()
        for name, function in HELPERS.items():
            program = f"from cowfs.cli.mount_helper import {function}; {function}()"
            words = [str(COMMANDS / "python"), "-c", program]
            helper = folder / "sbin" / name
            helper.write_text(
                f'#!/bin/sh\nPYTHONPATH={shlex.quote(PYTHONPATH)} exec {shlex.join(words)} "$@"\n'
            )
            helper.chmod(0o755)
        script, arguments = _SET_UP, [str(folder)]
        closed = _closed_ancestor(Path(sys.base_prefix))
        if closed is not None:
            script += _OPEN_A_WAY
            inner = str(Path(sys.base_prefix).relative_to(closed))
            arguments += [str(closed), sys.base_prefix, inner]
        script += "echo ready; exec sleep infinity"
        self._holder = subprocess.Popen(
            [
                *AS_ROOT,
                "unshare",
                "--mount",
                "--propagation=slave",
                "bash",
                "-c",
                script,
                "sh",
                *arguments,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "ready\n":
            pytest.fail(f"no private mount namespace: {self._holder.communicate()[1]}")

    def run(
        self,
        *words: str | os.PathLike[str],
        user: int = 0,
        environment: Mapping[str, str] | None = None,
        timeout: float = HANG_SECONDS,
    ) -> Completed:
        """Run a program in the namespace, as a user, with exactly this environment or our own."""
        settings = {
            "PATH": f"{COMMANDS}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "PYTHONPATH": PYTHONPATH,
            "PYTHONDONTWRITEBYTECODE": "1",
            "LC_ALL": "C.UTF-8",
        }
        if environment is not None:
            settings = dict(environment)
        return subprocess.run(
            [*AS_ROOT, "nsenter", f"--target={self._holder.pid}", "--mount", "--wd=/"]
            + [f"--setuid={user}", f"--setgid={user}", "--"]
            + ["env", "-i", *(f"{name}={value}" for name, value in settings.items())]
            + [os.fspath(word) for word in words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def succeed(self, *words: str | os.PathLike[str], **settings: Any) -> str:
        """What a program printed that must end with 0."""
        done = self.run(*words, **settings)
        assert done.returncode == 0, (words, done)
        return done.stdout

    def processes(self) -> list[int]:
        """Who lives in the namespace, without the process that holds it."""
        wanted = os.readlink(f"/proc/{self._holder.pid}/ns/mnt")
        found = []
        for entry in filter(str.isdigit, os.listdir("/proc")):
            try:
                if os.readlink(f"/proc/{entry}/ns/mnt") == wanted:
                    found.append(int(entry))
            except OSError:
                continue  # it ended
        return [pid for pid in found if pid != self._holder.pid]

    def mounts(self) -> list[list[str]]:
        """The cowfs mounts: source, mount point, type, options, as findmnt prints them."""
        table = Path(f"/proc/{self._holder.pid}/mounts").read_text(encoding="utf-8")
        return [line.split()[:4] for line in table.splitlines() if " fuse.cowfs " in line]

    def wait_until_empty(self) -> None:
        """Wait for every daemon to end."""
        for pid in self.processes():
            assert wait_for_end(pid), f"process {pid} did not end"

    def close(self) -> None:
        """End everything in it. Fails when a daemon does not end after its mount is gone."""
        try:
            for _, place, *_ in self.mounts():
                self.run("umount", "-i", "-l", place)
            stubborn = [pid for pid in self.processes() if not wait_for_end(pid)]
            for pid in stubborn:
                os.kill(pid, signal.SIGKILL)
        finally:
            self._holder.kill()
            self._holder.communicate()
            for user in (ANNA, BERT):  # where their daemons had sockets
                shutil.rmtree(f"/tmp/cowfs-{user}", ignore_errors=True)
        assert not stubborn, "daemons outlived their mounts"


def _closed_ancestor(path: Path) -> Path | None:
    """The highest directory on the way to `path` that other users may not enter."""
    for parent in [*reversed(path.parents), path]:
        if not parent.stat().st_mode & 0o001:
            return parent
    return None


@contextmanager
def machine() -> Iterator[Machine]:
    """A machine for the time of a block."""
    # Not below tmp_path: pytest closes that to other users.
    with tempfile.TemporaryDirectory(prefix="cowfs-machine-") as name:
        made = Machine(Path(name))
        try:
            yield made
        finally:
            made.close()
