"""Where a daemon logs: standard error in the foreground, a file in the background, or journald.

The file lies beside the control socket. It is removed at a clean end unless it has a WARNING or
worse.
"""

import contextlib
import io
import logging
import logging.handlers
import os

from cowfs.daemon import places
from cowfs.daemon.options import MountOptions
from cowfs.escapes import encodable, printable

JOURNAL_SOCKET = "/dev/log"


def set_up_log(options: MountOptions) -> None:
    """Send the log of this process where the options say.

    Raises:
        LockedError, MountError, ImageError: as `places.prepare_socket`, for a log file.
    """
    handler: logging.Handler
    if options.log == "journald" and os.path.exists(JOURNAL_SOCKET):
        handler = logging.handlers.SysLogHandler(JOURNAL_SOCKET)
        handler.setFormatter(_Line("cowfs[%(process)d]: %(levelname)s: %(message)s"))
    elif options.foreground:
        handler = logging.StreamHandler()
        handler.setFormatter(_Line("cowfs: %(levelname)s: %(message)s"))
    else:
        log_path = places.prepare_socket(options.image).with_suffix(".log")
        handler = _LogFile(log_path)
        handler.setFormatter(_Line("%(asctime)s %(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


class _Line(logging.Formatter):
    """Puts each message on one line. Bytes that are not text are escaped, so no handler fails."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  logging's own name
        return printable(super().formatMessage(record))

    def format(self, record: logging.LogRecord) -> str:
        return encodable(super().format(record))  # a traceback keeps its lines


class _LogFile(logging.FileHandler):
    """A file that the first message creates. The end removes it if it has no WARNING or worse."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path, mode="w", encoding="utf-8", delay=True)
        self._is_wanted = False  # whether it has a WARNING or worse

    def _open(self) -> io.TextIOWrapper:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.baseFilename)  # of an earlier mount, which may still be ending
        return super()._open()

    def emit(self, record: logging.LogRecord) -> None:
        self._is_wanted |= record.levelno >= logging.WARNING
        super().emit(record)

    def close(self) -> None:
        with self.lock or contextlib.nullcontext():
            if self.stream is not None and not self._is_wanted:
                with contextlib.suppress(FileNotFoundError):
                    ours, found = os.fstat(self.stream.fileno()), os.stat(self.baseFilename)
                    if os.path.samestat(ours, found):
                        os.unlink(self.baseFilename)
            super().close()
