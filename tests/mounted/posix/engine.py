"""The parts that every table of this folder is written with: users who call, and a counter.

A `Case` is one test on one filesystem. Each of its methods that compares something is one counted
assertion. Failures are collected with their place in the table and reported at the end of the test,
so that one wrong cell does not hide the others.
"""

import contextlib
import errno
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.mounted.posix.caller import receive, send
from tests.sizes import HANG_SECONDS

IS_ROOT = os.geteuid() == 0

RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4
UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2
AT_SYMLINK_NOFOLLOW = 0x100
OLD_TIME = (1_000_000_000, 123_456_789)

TYPES = {
    "file": stat.S_IFREG,
    "dir": stat.S_IFDIR,
    "symlink": stat.S_IFLNK,
    "fifo": stat.S_IFIFO,
    "socket": stat.S_IFSOCK,
    "block": stat.S_IFBLK,
    "char": stat.S_IFCHR,
}
KINDS = tuple(kind for kind in TYPES if IS_ROOT or kind not in ("block", "char"))
NO_DIRS = tuple(kind for kind in KINDS if kind != "dir")
FAILURES_SHOWN = 60


@dataclass(frozen=True)
class User:
    """A user who calls. The numbers belong to nobody on usual systems."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...] = ()


SELF = User("self", os.geteuid(), os.getegid())
ALICE = User("alice", 65531, 65531)
BOB = User("bob", 65532, 65532)
# This user is in alice's group by a supplementary group.
CAROL = User("carol", 65533, 65533, (65531, 64000))
OTHERS = (ALICE, BOB, CAROL)
TEAM_GID = 64000


class Caller:
    """The process that makes one user's calls."""

    def __init__(self, user: User) -> None:
        program = Path(__file__).with_name("caller.py")
        words = [sys.executable, "-I", str(program)]
        if user is not SELF:
            words += [str(user.uid), str(user.gid), ",".join(str(group) for group in user.groups)]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def call(self, name: str, *arguments: Any) -> tuple[int, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        send(self._process.stdin, (name, arguments))  # type: ignore[arg-type]
        answer: tuple[int, Any] | None = receive(self._process.stdout)  # type: ignore[arg-type]
        assert answer is not None, f"the caller ended in {name}{arguments}"
        return answer

    def close(self) -> None:
        self._process.communicate(timeout=HANG_SECONDS)


@dataclass(frozen=True)
class Filesystem:
    """A filesystem that the tables run on.

    Attributes:
        name: cowfs, tmpfs or ext4; the other two show that a table says what Linux does.
        root: its mount point.
        tick_s: how long to wait until a change gets a later time than the one before.
        lag_ns: how far its clock may be behind.
    """

    name: str
    root: Path
    tick_s: float
    lag_ns: int


# The kernel's clock for files advances every few milliseconds; UTIME_NOW always uses that clock.
CLOCK_REALTIME_COARSE = 5  # linux/time.h
TICK_S = time.clock_getres(CLOCK_REALTIME_COARSE) * 1.05
LAG_NS = int(TICK_S * 2e9)


def named(number: int) -> str:
    return errno.errorcode.get(number, str(number)) if number else "success"


class Case:
    """One test in an empty directory of its own, the working directory of all users."""

    def __init__(self, filesystem: Filesystem, callers: dict[User, Caller], folder: Path) -> None:
        self.filesystem = filesystem
        self.is_cowfs = filesystem.name == "cowfs"
        self.folder = folder
        self.count = 0
        self.failures: list[str] = []
        self._callers = callers
        for caller in callers.values():
            assert caller.call("chdir", str(folder))[0] == 0
            caller.call("umask", 0)

    # --- calls ------------------------------------------------------------------------------------

    def ok(self, name: str, *arguments: Any, by: User = SELF) -> Any:
        """Require that the call succeeds; returns its value."""
        number, value = self._callers[by].call(name, *arguments)
        self._hold(number == 0, lambda: f"{by.name}: {name}{arguments}: {named(number)}")
        return value

    def no(self, number: int, name: str, *arguments: Any, by: User = SELF) -> None:
        """Require that the call fails with this errno."""
        found, value = self._callers[by].call(name, *arguments)
        if not found and name in ("open", "open_at"):
            self._callers[by].call("close", value)
        self._hold(
            found == number,
            lambda: f"{by.name}: {name}{arguments}: {named(found)}, not {named(number)}",
        )

    def may(self, number: int, name: str, *arguments: Any, by: User = SELF) -> None:
        """Require that the call fails with this errno, or succeeds if `number` is 0."""
        if number:
            self.no(number, name, *arguments, by=by)
        else:
            self.ok(name, *arguments, by=by)

    # --- what is ----------------------------------------------------------------------------------

    def equal(self, found: Any, expected: Any, what: str = "") -> None:
        self._hold(found == expected, lambda: f"{what}: {found!r}, not {expected!r}")

    def has(self, path: str, **expected: Any) -> None:
        """Require these lstat fields: `mode` (12 bits), `kind` or any by name; each is counted."""
        number, found = self._callers[SELF].call("lstat", path)
        if number:
            self._hold(False, lambda: f"{path}: {named(number)}")
            return
        for field, value in expected.items():
            if field == "kind":
                is_right = stat.S_IFMT(found["mode"]) == TYPES[value]
            elif field == "mode":
                is_right = stat.S_IMODE(found["mode"]) == value
                value = oct(value)
            else:
                is_right = found[field] == value
            shown = oct(found["mode"]) if field in ("mode", "kind") else found.get(field)
            self._hold(is_right, lambda: f"{path}: {field} {shown}, not {value}")  # noqa: B023

    def gone(self, path: str) -> None:
        self.no(errno.ENOENT, "lstat", path)

    def owned(self, path: str, mode: int, user: User | tuple[int, int]) -> None:
        uid, gid = (user.uid, user.gid) if isinstance(user, User) else user
        self.has(path, mode=mode, uid=uid, gid=gid)

    def status(self, path: str) -> dict[str, int]:
        return self._callers[SELF].call("lstat", path)[1] or {}

    # --- setting up -------------------------------------------------------------------------------

    def make(
        self, kind: str, path: str, mode: int | None = None, owner: User | tuple[int, int] = SELF
    ) -> None:
        """Make a file of any kind. It must work, but does not count as an assertion."""
        call = self._callers[SELF].call
        mode = (0o755 if kind == "dir" else 0o644) if mode is None else mode
        if kind == "file":
            done = call("touch_open", path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        elif kind == "dir":
            done = call("mkdir", path)
        elif kind == "symlink":
            done = call("symlink", "nowhere", path)
        elif kind == "socket":
            done = call("make_socket", path)
        else:
            done = call("mknod", path, TYPES[kind], os.makedev(7, 11))
        steps = [done]
        if owner is not SELF:
            uid, gid = (owner.uid, owner.gid) if isinstance(owner, User) else owner
            steps.append(call("lchown", path, uid, gid))
        if kind != "symlink":
            steps.append(call("chmod", path, mode))
        assert not any(number for number, _ in steps), f"{kind} {path}: {steps}"

    def write(self, path: str, data: bytes) -> None:
        """Write contents to a file, which is made if it is missing."""
        flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC
        assert self._callers[SELF].call("put", path, data, flags) == (0, len(data))

    def remove(self, path: str) -> None:
        """Remove a file of any kind; a directory must be empty."""
        call = self._callers[SELF].call
        if call("unlink", path)[0]:
            assert not call("rmdir", path)[0], path

    def without(self, *paths: str) -> None:
        for path in paths:
            self.remove(path)

    # --- times ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def times(self, **expected: str) -> Iterator[None]:
        """Require that exactly these times move while the block runs.

        `name="mc"` means mtime and ctime of `name`. In a name `__` stands for a slash and `dot` for
        the directory itself. An access time that is not listed must not move either.
        """
        paths = {key: "." if key == "dot" else key.replace("__", "/") for key in expected}
        before = {key: self.status(path) for key, path in paths.items()}
        start_ns = time.time_ns() - self.filesystem.lag_ns
        read_ns = time.time_ns()
        time.sleep(self.filesystem.tick_s)
        # On a busy machine the clock that filesystems read may stand still for longer than a tick.
        while time.clock_gettime_ns(CLOCK_REALTIME_COARSE) <= read_ns:
            time.sleep(TICK_S)
        yield
        end_ns = time.time_ns() + 1
        for key, path in paths.items():
            after = self.status(path)
            for letter, field in (("a", "atime_ns"), ("m", "mtime_ns"), ("c", "ctime_ns")):
                old, new = before[key].get(field, 0), after.get(field, 0)
                if letter in expected[key]:
                    is_right = old < new and start_ns <= new <= end_ns
                    said = f"{path}: {field} {old} -> {new}, not moved to now"
                else:
                    is_right = old == new
                    said = f"{path}: {field} moved by {new - old}"
                self._hold(is_right, lambda: said)  # noqa: B023

    def wait_for_clock(self) -> None:
        """Wait until UTIME_NOW gives a time later than all that were given before."""
        time.sleep(TICK_S * 2)

    # --- the count --------------------------------------------------------------------------------

    def _hold(self, is_right: bool, said: Any) -> None:
        self.count += 1
        if not is_right:
            frame = sys._getframe(1)
            places = []
            while frame is not None and len(places) < 3:
                name = Path(frame.f_code.co_filename).name
                if name.startswith("test_"):
                    places.append(f"{name}:{frame.f_lineno}")
                frame = frame.f_back  # type: ignore[assignment]
            self.failures.append(f"{' < '.join(places)}: {said()[:200]}")

    def report(self) -> str:
        shown = "\n".join(self.failures[:FAILURES_SHOWN])
        return f"{len(self.failures)} of {self.count} on {self.filesystem.name}:\n{shown}"
