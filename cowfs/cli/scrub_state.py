"""The state of scrubs, in files: the last report of each image, marks to resume from, a lock.

A scrub that only reads must not write into the image, so its state is kept in files named after the
image's uuid, as Btrfs does. They are in $XDG_STATE_HOME/cowfs; if that is not set, in
/var/lib/cowfs for root and ~/.local/state/cowfs for others. The lock is held while a scrub runs,
and the kernel names the process that holds it.
"""

import contextlib
import fcntl
import os
import struct
import zlib
from pathlib import Path

import msgspec

from cowfs.care.scrub_report import Marks, ScrubReport
from cowfs.cli.own_files import own_directory, read_own, replace_file
from cowfs.errors import BusyError, CowfsError

_FLOCK = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length, pid
_GENERATION = struct.Struct("<Q")
REPORT_BYTES_MAX = 64 << 20


def state_directory() -> Path:
    """The directory of the state files of this user's scrubs."""
    return own_directory("XDG_STATE_HOME", root="/var/lib", home=".local/state")


class ScrubState:
    """The state files of one image.

    Args:
        uuid: the image's uuid as text.
    """

    def __init__(self, uuid: str) -> None:
        self._base = state_directory() / f"scrub-{uuid}"
        self._lock: int | None = None

    def report(self) -> ScrubReport | None:
        """Read the report of the last scrub; None if there is none that can be read.

        A report that says "running" although no scrub runs is of a killed scrub: "interrupted".
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
        """Write the report."""
        self._replace("json", msgspec.json.encode(report))

    def save_marks(self, marks: Marks | None) -> None:
        """Write the marks to resume from; None removes them."""
        if marks is not None:
            packed = zlib.compress(bytes(marks.bits), 1)
            self._replace("marks", _GENERATION.pack(marks.generation) + packed)
        else:
            self._path("marks").unlink(missing_ok=True)

    def marks(self, total_blocks: int) -> Marks | None:
        """Read the marks of an interrupted scrub; None if there are none that fit the image."""
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
        """The pid of the running scrub; 0 if it is in another PID namespace; None if none runs."""
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
        """Take the lock.

        Raises:
            BusyError: another process scrubs this image.
            CowfsError: the state directory cannot be written.
        """
        try:
            self._base.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(
                self._path("lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
            )
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(
                f"process {self.worker()} scrubs this image already; cowfs scrub status shows its "
                "progress"
            ) from None
        except OSError as error:
            raise CowfsError(
                f"cannot write the state of the scrub to {self._base.parent}: {error.strerror}"
            ) from None

    def end(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _path(self, suffix: str) -> Path:
        return self._base.with_name(f"{self._base.name}.{suffix}")

    def _replace(self, suffix: str, data: bytes) -> None:
        with contextlib.suppress(OSError):  # a scrub goes on although its state cannot be written
            replace_file(self._path(suffix), [data])
