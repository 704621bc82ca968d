"""The life of a mount: checks, start in the background, serving, and an end in a clean commit.

`mount` returns only when the mount answers, or raises with the reason why it does not. The process that
serves ends when the directory is unmounted, or on SIGTERM, SIGINT or SIGHUP: it finishes the requests
at hand, commits, marks the image clean and leaves no mount behind. More of these signals change nothing.
"""

import contextlib
import ctypes
import fcntl
import functools
import io
import logging
import logging.handlers
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator

import msgspec
import trio

from cowfs import errors
from cowfs.daemon import places, server
from cowfs.daemon.commits import Committer
from cowfs.daemon.fuse import pyfuse3, session, session_missing
from cowfs.daemon.loop import install_burst_loop
from cowfs.daemon.notify import READY, STOPPING, Notifier
from cowfs.daemon.operations import Operations
from cowfs.daemon.options import MountOptions
from cowfs.daemon.own_process import (
    OWN_DESCRIPTORS_MAX,
    EndSignals,
    close_descriptors,
    end_signals_blocked,
    raise_limits,
    require_file_size,
)
from cowfs.daemon.processes import busy, users
from cowfs.daemon.remounts import Remounts
from cowfs.daemon.service import MountService
from cowfs.errors import CowfsError, LockedError, MountError
from cowfs.escapes import encodable, printable
from cowfs.history.filesystem import Filesystem
from cowfs.history.images import open_filesystem
from cowfs.storage.device import FileDevice

log = logging.getLogger(__name__)

READ_AHEAD_BYTES = 1 << 20
WORKERS_MAX = 16  # each keeps a buffer of 1 MiB
WORKERS_IDLE_MAX = 4
BACKGROUND_REQUESTS = (
    64  # reading ahead and direct I/O of several programs; libfuse's default is 12
)
# How long a computing thread may keep the interpreter from the session loop, and the other way round.
SWITCH_INTERVAL_S = 0.0005
CLOSING_WAIT_S = 30.0
MALLOC_KEEP_BYTES = 64 << 20
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1  # malloc.h
_PR_SET_NO_NEW_PRIVS = 38  # linux/prctl.h
JOURNAL_SOCKET = "/dev/log"


class _StartFailure(msgspec.Struct, frozen=True):
    """How a start in the background failed, for the process that waits for it."""

    message: str
    exit_code: int


# --- before the start -------------------------------------------------------------------------------


def check_place(options: MountOptions) -> None:
    """Refuse what cannot be a mount, with the reason; clear a dead mount that a crash left behind.

    Raises:
        MountError: the mount point is missing, not a directory, not empty, not ours or in use; FUSE is
            not there; the image would lie inside its own mount.
    """
    directory = options.mountpoint
    _clear_dead_mount(directory)
    _require_no_mount(directory)
    try:
        status = os.stat(directory)
    except FileNotFoundError:
        raise MountError(f"the mount point {directory} does not exist; mkdir it first") from None
    except OSError as error:
        found = places.mount_at(directory)
        on_it = f" (a mount of {found.kind})" if found is not None else ""
        raise MountError(f"cannot use {directory}{on_it}: {error.strerror}") from None
    if not stat.S_ISDIR(status.st_mode):
        raise MountError(f"the mount point {directory} is not a directory")
    if os.getuid() and (status.st_uid != os.getuid() or not os.access(directory, os.W_OK)):
        raise MountError(f"the mount point {directory} does not belong to you")
    image = os.path.realpath(options.image)
    if os.path.commonpath([image, os.path.realpath(directory)]) == os.path.realpath(directory):
        raise MountError(f"the image {image} would lie inside its own mount {directory}")
    with os.scandir(directory) as listing:
        if next(listing, None) is not None:
            raise MountError(f"the mount point {directory} is not empty")
    if not os.path.exists("/dev/fuse"):
        raise MountError(
            "there is no /dev/fuse here; load the kernel's fuse module (modprobe fuse)"
        )
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise MountError(
            "you may not open /dev/fuse; root can allow it to everybody: chmod 666 /dev/fuse"
        )
    if os.getuid() and shutil.which("fusermount3") is None:
        raise MountError("fusermount3 is not installed; apt-get install fuse3")


def _clear_dead_mount(directory: str) -> None:
    """Unmount what a cowfs daemon that was killed left behind, if it did."""
    mount = places.find_mount(directory)
    if mount is not None and places.cover(mount) is None and places.is_dead(mount):
        unmount(directory, lazy=True)


def _require_no_mount(directory: str) -> None:
    mount = places.find_mount(directory)
    if mount is not None:
        raise MountError(f"{directory} is a mount point already, of {mount.image}")


class _Claim:
    """A lock on a mount point, from before the last look at it until there is a mount.

    Of two who mount on one directory at once, one would lie hidden below the other.

    Raises:
        MountError: somebody else has the lock, or has mounted there meanwhile.
    """

    def __init__(self, directory: str) -> None:
        self.descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise MountError(
                f"{directory} is locked by another program, which may be mounting there just now; "
                "look, and try again"
            ) from None
        except OSError as error:
            # Some network filesystems have no such locks, and their mounts go without.
            log.debug("locking %s: %s", directory, error)
        try:
            _require_no_mount(directory)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let go of it, in this process; what was forked meanwhile has it still."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def unmount(directory: str, *, lazy: bool = False, force: bool = False) -> None:
    """Unmount as whoever we are. Raises BusyError while files are open, MountError else.

    Args:
        lazy: from the tree at once, and for good when nobody uses it any more.
        force: also if the daemon does not answer; only root can.
    """
    command = ["umount", *(["-l"] if lazy else []), *(["-f"] if force else []), "-i", directory]
    if os.getuid():
        command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", directory]
    path = os.environ.get("PATH", "") + ":/usr/bin:/bin:/usr/sbin:/sbin"
    environment = {**os.environ, "PATH": path, "LC_ALL": "C"}  # the reason is read below
    done = subprocess.run(
        command, capture_output=True, text=True, errors="surrogateescape", env=environment
    )
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["umount failed"]
        if "busy" in reason[0]:
            mount = places.find_mount(directory)
            found = users(mount.device, mount.mount_point) if mount is not None else []
            raise busy(directory, found)
        raise MountError(f"cannot unmount {directory}: {reason[0]}")


# --- starting ---------------------------------------------------------------------------------------


def mount(options: MountOptions) -> None:
    """Mount an image.

    In the foreground, returns when it was unmounted. In the background, returns when the mount answers;
    the daemon goes on in a session of its own.

    Raises:
        MountError, ImageError, LockedError, ...: why there is no mount.
    """
    check_place(options)
    claim = _Claim(options.mountpoint)
    if options.foreground:
        try:
            _run(options, None, Notifier.from_environment(), claim)
        finally:
            claim.release()
        return
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    if os.fork():
        os.close(writer)
        claim.release()
        with open(reader, "rb") as pipe:
            answer = pipe.read()
        if answer == b"ready":
            return
        if not answer:
            _clear_dead_mount(options.mountpoint)
            raise MountError("the daemon ended before the mount answered; try again with -f")
        failure = msgspec.json.decode(answer, type=_StartFailure)
        error = MountError(failure.message)
        error.exit_code = failure.exit_code
        raise error
    os.close(reader)
    code = 1
    try:
        os.setsid()
        os.chdir("/")
        _leave_terminal()
        close_descriptors({writer, claim.descriptor})
        _run(options, writer, Notifier(), claim)
        code = 0
    except BaseException as error:
        _report_failure(writer, error)
    finally:
        logging.shutdown()
        os._exit(code)


def _run(options: MountOptions, ready: int | None, notifier: Notifier, claim: _Claim) -> None:
    """The daemon's life, with its log."""
    raise_limits(server.CONNECTIONS_MAX + OWN_DESCRIPTORS_MAX)
    try:
        _set_up_log(options)
        _serve(options, ready, notifier, claim)
    except LockedError as error:
        raise _mounted_elsewhere(options, error) or error from None


def _leave_terminal() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)


def _report_failure(writer: int, error: BaseException) -> None:
    if isinstance(error, CowfsError):
        failure = _StartFailure(encodable(error.message), error.exit_code)
    else:
        failure = _StartFailure(encodable(f"the daemon failed: {error!r}"), errors.EXIT_ERROR)
        log.error("the daemon failed", exc_info=error)
    with contextlib.suppress(OSError):
        os.write(writer, msgspec.json.encode(failure))


class _Line(logging.Formatter):
    """A message on one line, with bytes of paths that are not text as escapes: no handler fails."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  logging's own name
        return printable(super().formatMessage(record))

    def format(self, record: logging.LogRecord) -> str:
        return encodable(super().format(record))  # where it came from has lines of its own


class _LogFile(logging.FileHandler):
    """A new file, made at its first message, and removed at the end unless somebody must act on it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path, mode="w", encoding="utf-8", delay=True)
        self._is_wanted = False

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


def _set_up_log(options: MountOptions) -> None:
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


# --- serving ----------------------------------------------------------------------------------------


def _serve(options: MountOptions, ready: int | None, notifier: Notifier, claim: _Claim) -> None:
    """Open, mount, serve until the end, unmount, close."""
    writable = not options.read_only
    device = FileDevice(options.image, writable=writable, steady=True)
    try:
        filesystem = open_filesystem(
            device,
            writable=writable,
            generation=options.generation,
            cache_bytes=options.cache_bytes,
            discard=options.discard,
            snapshot=options.snapshot,
        )
    except BaseException:
        device.close()
        raise
    signals = EndSignals()
    signals.install()
    try:
        if writable:
            if device.is_file:
                require_file_size(device.size_bytes, device.name)
            filesystem.commit()  # from here on only this generation is promised to be whole
            filesystem.reclaim_orphans()
        _keep_memory()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        serving = _Mount(filesystem, options, ready, notifier, signals, claim)
        try:
            trio.run(serving.run)
        except BaseExceptionGroup as group:
            raise _only_error(group) from None
    finally:
        notifier.tell(STOPPING, f"{options.mountpoint}: the last commit is being written")
        filesystem.close()
        signals.ignore()


def _mounted_elsewhere(options: MountOptions, error: LockedError) -> LockedError | None:
    """What to do instead, when it is a mount that has the image; None when no mount is seen."""
    who = error.message.partition(";")[0]
    image = os.path.realpath(options.image)
    for mount in places.mounts():
        if mount.image == image:
            place = mount.mount_point
            if options.snapshot is not None and not mount.read_only:
                place = os.path.join(place, ".snapshots", options.snapshot)
            return LockedError(
                f"{who}: it is mounted on {mount.mount_point} already; look into {place}"
            )
    return None


def _only_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What a group of groups says, when it is one thing."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


class _Mount:
    """One mount while it lasts."""

    def __init__(
        self,
        filesystem: Filesystem,
        options: MountOptions,
        ready: int | None,
        notifier: Notifier,
        signals: EndSignals,
        claim: _Claim,
    ) -> None:
        self._filesystem = filesystem
        self._options = options
        self._ready = ready
        self._notifier = notifier
        self._signals = signals
        self._claim = claim
        self._answers = trio.Event()
        self._committer = (
            Committer(filesystem, options.commit_interval_s, options.dirty_bytes_max)
            if filesystem.store.writable
            else None
        )
        self._operations = Operations(filesystem, self._committer, options)
        # All paths are looked at before the mount: it would wait for us to answer.
        self._socket_path = places.prepare_socket(options.image)
        self._service = MountService(
            filesystem, self._committer, self._operations, options, unmount
        )

    async def run(self) -> None:
        install_burst_loop()
        if session is None:
            log.warning(
                "without fallocate, SEEK_HOLE, copy_file_range and O_TMPFILE: %s", session_missing
            )
        else:
            session.install(
                self._operations,
                background=BACKGROUND_REQUESTS,
                cache_symlinks=not self._options.access_times,
                dont_mask=True,
                killpriv=True,
            )
        with self._mounted():
            _take_no_new_privileges()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._end_on_signal)
                if self._committer is not None:
                    nursery.start_soon(self._committer.run)
                    nursery.start_soon(self._reclaim)
                await nursery.start(server.serve, self._socket_path, self._service)
                nursery.start_soon(self._report_ready)
                nursery.start_soon(self._follow_remounts)
                await pyfuse3.main(WORKERS_IDLE_MAX, WORKERS_MAX)
                self._service.ended.set()
                nursery.cancel_scope.cancel()

    @contextlib.contextmanager
    def _mounted(self) -> Iterator[None]:
        said: list[str] = []
        try:
            with _caught_stderr(said):
                pyfuse3.init(self._operations, self._options.mountpoint, self._fuse_options())
        except RuntimeError as error:
            reason = "; ".join(said) or str(error)
            raise MountError(f"cannot mount on {self._options.mountpoint}: {reason}") from None
        self._claim.release()
        try:
            yield
        finally:
            with end_signals_blocked():
                pyfuse3.close(unmount=True)

    def _fuse_options(self) -> set[str]:
        options = self._options
        source = os.path.realpath(options.image).replace("\\", "\\\\").replace(",", "\\,")
        chosen = {_Utf8(f"fsname={source}"), "subtype=cowfs", "default_permissions"}
        if options.read_only:
            chosen.add("ro")
        if options.allow_other:
            chosen.add("allow_other")
        # Both said each time: libfuse's own default depends on who mounts.
        chosen.add("suid" if options.suid else "nosuid")
        chosen.add("dev" if options.dev else "nodev")
        if not options.executable:
            chosen.add("noexec")
        return chosen

    async def _end_on_signal(self) -> None:
        number = await self._signals.wait()
        log.info("%s: unmounting", number.name)
        if self._operations.writeback is not None:
            with trio.move_on_after(CLOSING_WAIT_S):
                await self._operations.writeback.fetch()
        pyfuse3.terminate()

    async def _reclaim(self) -> None:
        """Give back large deleted files between requests."""
        while True:
            more = self._operations.nodes.reclaim_some()
            await trio.sleep(0 if more else 0.1)

    async def _follow_remounts(self) -> None:
        await self._answers.wait()
        assert self._service.remounts is not None
        await self._service.remounts.run()

    async def _report_ready(self) -> None:
        """When the mount answers, say so to the process that waits for it."""
        mountpoint = self._options.mountpoint
        # Abandoned when serving ends first: then only the unmounting lets it return.
        status = await trio.to_thread.run_sync(os.stat, mountpoint, abandon_on_cancel=True)
        _raise_read_ahead(status.st_dev)
        self._service.device = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
        self._service.remounts = Remounts(
            status.st_dev, self._options.read_only, self._service.follow_remount
        )
        self._answers.set()
        writeback = self._operations.writeback
        if writeback is not None and self._committer is not None:
            writeback.device = status.st_dev
            self._committer.before_timed = functools.partial(writeback.fetch, whole=False)
        log.info(
            "%s is mounted on %s, generation %d",
            self._options.image,
            mountpoint,
            self._filesystem.store.superblock.generation,
        )
        self._notifier.tell(READY, f"{self._options.image} is mounted on {mountpoint}")
        if self._ready is not None:
            try:
                os.write(self._ready, b"ready")
            except BrokenPipeError:
                raise MountError("nobody waits for the mount any more") from None
            os.close(self._ready)
            self._ready = None


@contextlib.contextmanager
def _caught_stderr(lines: list[str]) -> Iterator[None]:
    """Collect what libfuse and fusermount3 print on standard error: the only place with the reason."""
    before = os.dup(2)
    caught = os.memfd_create("stderr")
    os.dup2(caught, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        with open(caught, "rb") as file:
            file.seek(0)
            lines += os.fsdecode(file.read()).splitlines()


def _keep_memory() -> None:
    """Let malloc keep the buffers of large requests: a fresh map for each costs 256 page faults a MiB.

    Halves the CPU of large reads and writes. What is kept is bounded by what was in use at once.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, MALLOC_KEEP_BYTES)
    libc.mallopt(_M_TRIM_THRESHOLD, MALLOC_KEEP_BYTES)


def _take_no_new_privileges() -> None:
    """Nothing that this process may ever start gains rights from a file: prctl(2).

    Only as root, who unmounts by a system call. An ordinary user's daemon needs the set-uid
    fusermount3 at its end.
    """
    if os.geteuid() == 0:
        ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


class _Utf8(str):
    """A mount option with bytes beyond ASCII, which pyfuse3 would refuse to encode."""

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return os.fsencode(str(self))  # as the kernel has the path


def _raise_read_ahead(device: int) -> None:
    """Let the kernel ask for 1 MiB at a time, where we may say so."""
    path = f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb"
    with contextlib.suppress(OSError), open(path, "w") as file:
        file.write(str(READ_AHEAD_BYTES >> 10))
