"""What is kept of scrubs: the last result of each image, how far one got, and who is at work.

Beside the image nothing of this is needed, and a scrub that only reads must not write into the image; so
it is kept as Btrfs keeps it, in files named after the image's uuid: in $XDG_STATE_HOME/cowfs, or where
that is not set in /var/lib/cowfs for root and ~/.local/state/cowfs for others. A lock on a file says
that a scrub is running, and the kernel tells by which process.
"""

import contextlib
import fcntl
import os
import struct
import zlib
from pathlib import Path

import msgspec

from cowfs.care.scrub_report import Marks, ScrubReport
from cowfs.cli.own_files import read_own, replace_file
from cowfs.errors import BusyError, CowfsError

_FLOCK = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length, pid
_GENERATION = struct.Struct("<Q")
REPORT_BYTES_MAX = 64 << 20


def state_directory() -> Path:
    """Where the files of this user's scrubs are."""
    state = os.environ.get("XDG_STATE_HOME", "")
    if os.geteuid() == 0 and not state:
        return Path("/var/lib/cowfs")
    return (Path(state) if state.startswith("/") else Path.home() / ".local/state") / "cowfs"


class ScrubState:
    """The files of one image.

    Args:
        uuid: of the image, as text.
    """

    def __init__(self, uuid: str) -> None:
        self._base = state_directory() / f"scrub-{uuid}"
        self._lock: int | None = None

    def report(self) -> ScrubReport | None:
        """The last scrub; None when there was none, or what is kept of it cannot be read.

        A scrub that calls itself running and is not was killed: it is "interrupted".
        """
        try:
            data = read_own(self._path("json"), REPORT_BYTES_MAX)
            report = msgspec.json.decode(data or b"", type=ScrubReport)
        except (OSError, msgspec.MsgspecError, RecursionError):
            return None
        if report.state == "running" and self.worker() is None:
            report = msgspec.structs.replace(report, state="interrupted")
        return report

    def save(self, report: ScrubReport) -> None:
        """Keep a report."""
        self._replace("json", msgspec.json.encode(report))

    def save_marks(self, marks: Marks | None) -> None:
        """Keep the marks to go on from; None when there is nothing to go on with."""
        if marks is not None:
            packed = zlib.compress(bytes(marks.bits), 1)
            self._replace("marks", _GENERATION.pack(marks.generation) + packed)
        else:
            self._path("marks").unlink(missing_ok=True)

    def marks(self, total_blocks: int) -> Marks | None:
        """The marks of a scrub that was interrupted; None when there are none."""
        try:
            data = read_own(self._path("marks"), _GENERATION.size + total_blocks // 4 + 1024) or b""
            (generation,) = _GENERATION.unpack_from(data)
            unpacked = zlib.decompressobj().decompress(data[8:], -(-total_blocks // 8) + 1)
        except (OSError, struct.error, zlib.error):
            return None
        if len(unpacked) != -(-total_blocks // 8):
            return None
        return Marks(total_blocks, generation, unpacked)

    def worker(self) -> int | None:
        """The process that scrubs the image now, 0 if its PID namespace is another; None: nobody."""
        try:
            descriptor = os.open(self._path("lock"), os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            wanted = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_GETLK, wanted))
            return None if kind == fcntl.F_UNLCK else int(pid)
        finally:
            os.close(descriptor)

    def begin(self) -> None:
        """Be the one that scrubs. Raises BusyError when another process does."""
        try:
            self._base.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(
                self._path("lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
            )
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(
                f"process {self.worker()} scrubs this image already; cowfs scrub status shows it"
            ) from None
        except OSError as error:
            raise CowfsError(
                f"cannot keep the state of a scrub in {self._base.parent}: {error.strerror}"
            ) from None

    def end(self) -> None:
        """Let others scrub."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _path(self, suffix: str) -> Path:
        return self._base.with_name(f"{self._base.name}.{suffix}")

    def _replace(self, suffix: str, data: bytes) -> None:
        with contextlib.suppress(OSError):  # a scrub is worth more than its record
            replace_file(self._path(suffix), [data])
