"""The filesystems that are measured: how to make, mount, remount and remove each.

Promises: `tear_down` may be called at any time, also after a `set_up` that failed halfway. It
leaves no mount, loop device, pool or daemon of this run behind, and ends only processes that this
run started. All targets of a run have their images in the same work directory, and so on the same
disk.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

COMMAND_SECONDS_MAX = 300
DAEMON_END_SECONDS_MAX = 30


class TargetError(Exception):
    """The target is not installed or does not work. The message says why, in one line."""


def run(*command: str | Path, seconds_max: float = COMMAND_SECONDS_MAX) -> str:
    """Run a command, and return its output.

    Raises:
        TargetError: the command is not installed, failed, or took too long.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=seconds_max, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        raise TargetError(f"{words[0]}: not installed") from None
    except subprocess.TimeoutExpired:
        raise TargetError(f"{' '.join(words)}: not finished after {seconds_max:.0f} s") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise TargetError(f"{Path(words[0]).name} {words[1]}: {lines[-1]}")
    return done.stdout


def is_mounted(path: Path) -> bool:
    """Whether something is mounted at `path`. Does not access the mount, so it cannot hang."""
    wanted = str(path).replace(" ", "\\040")
    with open("/proc/self/mounts") as mounts:
        return any(line.split(" ")[1] == wanted for line in mounts)


def drop_caches(what: int) -> None:
    """Drop the kernel's caches, then give daemons time to process the FORGET requests.

    Args:
        what: 1 pages, 2 names and inodes, 3 both.
    """
    run("sync")
    Path("/proc/sys/vm/drop_caches").write_text(str(what))
    time.sleep(0.3)


def cpu_seconds(process_id: int) -> float:
    """CPU time of a process so far, user and system together."""
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def written_bytes(process_id: int) -> int:
    """What a process wrote to storage, as the kernel counts it."""
    lines = Path(f"/proc/{process_id}/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["write_bytes"])


def resident_bytes(process_id: int) -> int:
    """Memory of a process now."""
    return int(Path(f"/proc/{process_id}/statm").read_text().split()[1]) * os.sysconf(
        "SC_PAGE_SIZE"
    )


def end_process(process: subprocess.Popen[bytes]) -> None:
    """End a process that this run started: with SIGTERM, and SIGKILL if that takes too long."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(DAEMON_END_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


class Target:
    """One filesystem. Call `set_up` first, then any other method, and `tear_down` at the end.

    Args:
        work: an empty directory for the image and the mount point.
        size_bytes: size of the filesystem.
    """

    name = ""
    remountable = True  # whether files are still there after `remount`

    def __init__(self, work: Path, size_bytes: int) -> None:
        self.work = work
        self.size_bytes = size_bytes
        self.mountpoint = work / "mount"
        self.image = work / "image"

    def set_up(self) -> None:
        self.mountpoint.mkdir(parents=True)
        self.make()
        self.mount()

    def tear_down(self) -> None:
        """Unmount, end and remove everything. SIGINT and SIGTERM are blocked until that is done."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            self._take_away()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _take_away(self) -> None:
        try:
            self.destroy()
        except TargetError as error:
            print(f"bench: {self.name}: while cleaning up: {error}", file=sys.stderr)
        if is_mounted(self.mountpoint):
            subprocess.run(["umount", "-l", str(self.mountpoint)], check=False)
        if not is_mounted(self.mountpoint):
            shutil.rmtree(self.work, ignore_errors=True)

    def remount(self) -> None:
        self.unmount()
        self.mount()

    def make(self) -> None:
        """Make the empty filesystem."""

    def mount(self) -> None:
        raise NotImplementedError

    def unmount(self) -> None:
        run("umount", self.mountpoint)

    def destroy(self) -> None:
        """Unmount if mounted, and end the processes that were started."""
        if is_mounted(self.mountpoint):
            self.unmount()

    def sync(self) -> None:
        """Make all writes durable."""
        run("sync", "-f", self.mountpoint)

    def daemon(self) -> int | None:
        """The pid of the process that serves the mount; None if the kernel does."""
        return None

    def make_image(self) -> None:
        with open(self.image, "wb") as image:
            image.truncate(self.size_bytes)


class KernelTarget(Target):
    """A filesystem of the kernel, on a loop device that the unmount removes."""

    def make(self) -> None:
        self.make_image()
        run(f"mkfs.{self.name}", *(["-q", "-F"] if self.name == "ext4" else ["-q"]), self.image)

    def mount(self) -> None:
        run("mount", "-t", self.name, "-o", "loop", self.image, self.mountpoint)


class Ext4(KernelTarget):
    name = "ext4"


class Btrfs(KernelTarget):
    name = "btrfs"


class Null(Target):
    """The null filesystem on the burst loop: the upper limit that pyfuse3 allows."""

    name = "null"
    remountable = False
    loop = "burst"
    xattrs = False
    _process: subprocess.Popen[bytes] | None = None

    def mount(self) -> None:
        self._process = subprocess.Popen(
            [
                sys.executable,
                str(Path(__file__).with_name("nullfs.py")),
                str(self.mountpoint),
                f"--loop={self.loop}",
                *(["--xattrs"] if self.xattrs else []),
            ],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            raise TargetError("the null filesystem did not start")

    def destroy(self) -> None:
        super().destroy()
        if self._process is not None:
            end_process(self._process)
            self._process = None

    def sync(self) -> None:
        """Nothing is stored, so nothing needs to be made durable."""

    def daemon(self) -> int | None:
        return None if self._process is None else self._process.pid


class NullXattrs(Null):
    """As Null, with extended attributes: the kernel asks for one before each write."""

    name = "null-xattrs"
    xattrs = True


class NullStock(Null):
    """As Null, on pyfuse3's own loop."""

    name = "null-stock"
    loop = "stock"


class ZfsFuse(Target):
    """zfs-fuse with a pool in a file. Its socket has a fixed path: only one daemon can run."""

    name = "zfs-fuse"
    pool = "cowfsbench"
    _process: subprocess.Popen[bytes] | None = None

    def make(self) -> None:
        program = shutil.which("zfs-fuse", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        if program is None:
            raise TargetError("zfs-fuse: not installed")
        if _runs("zfs-fuse"):
            raise TargetError(
                "another zfs-fuse is running and would get the commands; stop it first"
            )
        self.make_image()
        with open(self.work / "daemon.log", "wb") as log:
            self._process = subprocess.Popen(
                [program, "--no-daemon", "--no-kstat-mount"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        for attempt in range(50):
            try:
                run("zpool", "create", "-f", "-m", self.mountpoint, self.pool, self.image)
                break
            except TargetError:
                if attempt == 49 or self._process.poll() is not None:
                    raise
                time.sleep(0.1)

    def mount(self) -> None:
        if not is_mounted(self.mountpoint):
            run("zpool", "import", "-d", self.work, self.pool)

    def unmount(self) -> None:
        run("zpool", "export", self.pool)

    def destroy(self) -> None:
        if self._process is None:
            return
        try:
            if self._process.poll() is None and self.pool in run("zpool", "list", "-H"):
                run("zpool", "destroy", "-f", self.pool)
        finally:
            end_process(self._process)
            self._process = None

    def sync(self) -> None:
        # syncfs(2) does not reach a FUSE daemon. fsync of one file commits its transaction group.
        with open(self.mountpoint / ".bench-sync", "wb") as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())

    def daemon(self) -> int | None:
        return None if self._process is None else self._process.pid


class Cowfs(Target):
    """cowfs, by its commands. Its daemon is the process that has the image open.

    Attributes:
        program: the command; that of this Python by default.
    """

    name = "cowfs"
    program = Path(sys.executable).parent / "cowfs"

    def command(self, *words: str | Path) -> str:
        """Run a cowfs command, and return its output."""
        if not self.program.exists():
            raise TargetError(f"{self.program}: not installed")
        return run(self.program, *words)

    def make(self) -> None:
        self.command("mkfs", self.image, "--size", str(self.size_bytes))

    def mount(self) -> None:
        self.command("mount", self.image, self.mountpoint)
        if not is_mounted(self.mountpoint):
            raise TargetError("cowfs mount succeeded, but nothing is mounted")

    def unmount(self) -> None:
        process_id = self.daemon()
        self.command("umount", self.mountpoint)
        end_s = time.monotonic() + DAEMON_END_SECONDS_MAX
        while process_id is not None and Path(f"/proc/{process_id}").exists():
            if time.monotonic() > end_s:
                raise TargetError(f"cowfs umount returned, but daemon {process_id} still runs")
            time.sleep(0.01)

    def destroy(self) -> None:
        process_id = self.daemon()
        try:
            super().destroy()
        finally:
            # The image belongs to this run, so the process that has it open is our daemon.
            if process_id is not None and self.daemon() == process_id:
                os.kill(process_id, signal.SIGKILL)

    def sync(self) -> None:
        self.command("sync", self.mountpoint)

    def daemon(self) -> int | None:
        image = str(self.image)
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if any(os.readlink(handle) == image for handle in (process / "fd").iterdir()):
                    return int(process.name)
            except OSError:
                continue  # the process ended, or may not be examined
        return None


class Before(Cowfs):
    """Another cowfs, to compare with: `--before` says which."""

    name = "before"
    program = Path("cowfs of --before")


def _runs(name: str) -> bool:
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            if path.read_text().strip() == name:
                return True
        except OSError:
            continue  # the process ended
    return False


TARGETS: dict[str, type[Target]] = {
    target.name: target
    for target in (Cowfs, Before, Null, NullXattrs, NullStock, ZfsFuse, Ext4, Btrfs)
}
