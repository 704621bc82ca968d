"""The life of a mount: checks, start in the background, serving, and shutdown with a clean commit.

`mount` returns once the mount answers, or raises with the reason why it does not. The serving
process ends when the directory is unmounted, or on SIGTERM, SIGINT or SIGHUP. It finishes the
requests at hand, commits, marks the image clean and leaves no mount behind. Further signals have no
effect.
"""

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Iterator

import msgspec
import trio

from cowfs import errors
from cowfs.daemon import places, server
from cowfs.daemon.commits import Committer
from cowfs.daemon.fuse import pyfuse3, session, session_missing
from cowfs.daemon.logs import set_up_log
from cowfs.daemon.loop import install_burst_loop, requests_queued
from cowfs.daemon.mount_point import Claim, check_place, clear_dead_mount, unmount
from cowfs.daemon.notify import READY, STOPPING, Notifier
from cowfs.daemon.operations import Operations
from cowfs.daemon.options import MountOptions
from cowfs.daemon.own_process import (
    OWN_DESCRIPTORS_MAX,
    EndSignals,
    close_descriptors,
    end_signals_blocked,
    keep_memory,
    leave_terminal,
    raise_limits,
    require_file_size,
    stderr_captured,
    take_no_new_privileges,
)
from cowfs.daemon.remounts import Remounts
from cowfs.daemon.service import MountService
from cowfs.errors import CowfsError, LockedError, MountError
from cowfs.escapes import encodable
from cowfs.history.filesystem import Filesystem
from cowfs.history.images import open_filesystem
from cowfs.storage.device import FileDevice

log = logging.getLogger(__name__)

READ_AHEAD_BYTES = 1 << 20
WORKERS_MAX = 16  # each keeps a buffer of 1 MiB
WORKERS_IDLE_MAX = 4
# Read-ahead and direct I/O requests in flight, enough for several programs; libfuse's default is
# 12.
BACKGROUND_REQUESTS = 64
# How long a computing thread may hold the interpreter while the session loop waits, and vice versa.
SWITCH_INTERVAL_S = 0.0005
CLOSING_WAIT_S = 30.0  # for the kernel's write-back cache, after a signal


class _StartFailure(msgspec.Struct, frozen=True):
    """Why a start in the background failed: sent to the process that waits for it."""

    message: str
    exit_code: int


# --- starting -------------------------------------------------------------------------------------


def mount(options: MountOptions) -> None:
    """Mount an image.

    In the foreground, return when it was unmounted. In the background, return when the mount
    answers; the daemon continues in a session of its own.

    Raises:
        CowfsError: there is no mount, and why.
    """
    check_place(options)
    claim = Claim(options.mountpoint)
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
            clear_dead_mount(options.mountpoint)
            raise MountError(
                "the daemon ended before the mount answered; try again with -f to see why"
            )
        failure = msgspec.json.decode(answer, type=_StartFailure)
        error = MountError(failure.message)
        error.exit_code = failure.exit_code
        raise error
    os.close(reader)
    code = 1
    try:
        os.setsid()
        os.chdir("/")
        leave_terminal()
        close_descriptors({writer, claim.descriptor})
        _run(options, writer, Notifier(), claim)
        code = 0
    except BaseException as error:
        _report_failure(writer, error)
    finally:
        logging.shutdown()
        os._exit(code)


def _run(options: MountOptions, ready: int | None, notifier: Notifier, claim: Claim) -> None:
    """Be the daemon: set up limits and log, then serve.

    Args:
        ready: pipe to the process that waits for the start; None in the foreground.
    """
    raise_limits(server.CONNECTIONS_MAX + OWN_DESCRIPTORS_MAX)
    try:
        set_up_log(options)
        _serve(options, ready, notifier, claim)
    except LockedError as error:
        raise _mounted_elsewhere(options, error) or error from None


def _report_failure(writer: int, error: BaseException) -> None:
    """Send the reason to the process that waits for the start."""
    if isinstance(error, CowfsError):
        failure = _StartFailure(encodable(error.message), error.exit_code)
    else:
        words = encodable(f"the daemon failed with an internal error: {error!r}")
        failure = _StartFailure(words, errors.EXIT_ERROR)
        log.error("the daemon failed", exc_info=error)
    with contextlib.suppress(OSError):
        os.write(writer, msgspec.json.encode(failure))


# --- serving --------------------------------------------------------------------------------------


def _serve(options: MountOptions, ready: int | None, notifier: Notifier, claim: Claim) -> None:
    """Open the image, mount it, serve until the end, unmount, close the image."""
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
            if filesystem.store.superblock.log is None:
                filesystem.store.make_log()
            filesystem.commit()  # from here on only this generation is guaranteed to be complete
            filesystem.reclaim_orphans()
        keep_memory()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        serving = _Mount(filesystem, options, ready, notifier, signals, claim)
        try:
            trio.run(serving.run)
        except BaseExceptionGroup as group:
            raise _only_error(group) from None
    finally:
        notifier.tell(STOPPING, f"{options.mountpoint}: writing the last commit")
        filesystem.close()
        signals.ignore()


def _mounted_elsewhere(options: MountOptions, error: LockedError) -> LockedError | None:
    """The error to raise if the image is mounted: it names the mount. None if no mount is seen."""
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
    """The error in a group, if nested groups hold just one; else the innermost common group."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


class _Mount:
    """One mount, from the call that mounts it until it is unmounted.

    Args:
        filesystem: open.
        ready: pipe to the process that waits for the start; None in the foreground.
        signals: installed.
        claim: of the mount point; released once it is mounted.
    """

    def __init__(
        self,
        filesystem: Filesystem,
        options: MountOptions,
        ready: int | None,
        notifier: Notifier,
        signals: EndSignals,
        claim: Claim,
    ) -> None:
        self._filesystem = filesystem
        self._options = options
        self._ready = ready
        self._notifier = notifier
        self._signals = signals
        self._claim = claim
        self._answers = trio.Event()  # set when the mount answers
        self._committer = (
            Committer(filesystem, options.commit_interval_s, options.dirty_bytes_max)
            if filesystem.store.writable
            else None
        )
        self._operations = Operations(filesystem, self._committer, options)
        # Paths are looked up before mounting: afterwards a lookup could wait for this very process.
        self._socket_path = places.prepare_socket(options.image)
        self._service = MountService(
            filesystem, self._committer, self._operations, options, unmount
        )

    async def run(self) -> None:
        """Mount, serve until unmounted or told to end, unmount."""
        install_burst_loop()
        if self._committer is not None:
            self._committer.others_wait = requests_queued
        if session is None:
            log.warning(
                "the mount has no fallocate, SEEK_HOLE, copy_file_range and O_TMPFILE: %s",
                session_missing,
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
            take_no_new_privileges()
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
        printed: list[str] = []
        try:
            with stderr_captured(printed):
                pyfuse3.init(self._operations, self._options.mountpoint, self._fuse_options())
        except RuntimeError as error:
            reason = "; ".join(printed) or str(error)
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
        # Always explicit: libfuse's default depends on the user who mounts.
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
        """Remove large deleted files step by step, between requests."""
        while True:
            more = self._operations.nodes.reclaim_some()
            await trio.sleep(0 if more else 0.1)

    async def _follow_remounts(self) -> None:
        await self._answers.wait()
        assert self._service.remounts is not None
        await self._service.remounts.run()

    async def _report_ready(self) -> None:
        """Wait until the mount answers, set what depends on its device, report that it is ready."""
        mountpoint = self._options.mountpoint
        # If serving ends first, the thread is abandoned: it returns when the directory is
        # unmounted.
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
                raise MountError("the command that started the mount is gone") from None
            os.close(self._ready)
            self._ready = None


class _Utf8(str):
    """A mount option that may be more than ASCII, which is all that pyfuse3 can encode."""

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return os.fsencode(str(self))  # the bytes of the path


def _raise_read_ahead(device: int) -> None:
    """Set the kernel's read-ahead to 1 MiB, if this process may: only root can."""
    path = f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb"
    with contextlib.suppress(OSError), open(path, "w") as file:
        file.write(str(READ_AHEAD_BYTES >> 10))
