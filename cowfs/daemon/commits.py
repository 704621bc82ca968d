"""When commits happen: on a timer, for edits, when memory fills, and for what the log cannot take.

An fsync is a record of the log (storage/log.py), shared by all who wait. Where the log cannot take
what is not durable yet, because it is too much or the log is full, an fsync is a commit.

Blocks that a commit frees can be discarded only after two more commits. So an idle mount makes
those too, although they change nothing.

Freezing and finishing a commit are synchronous calls between requests. Writing a large or shared
commit runs in a thread, while requests go on. Keeps C2 (`sync` returns after a commit that was
frozen after the call), C5 (the timer), C6 (edits) and C8 (if a commit fails, every waiter gets
EIO).
"""

import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio

from cowfs.daemon.discards import Discarder, ShowSweep
from cowfs.errors import CowfsError, DeviceError, ReadOnlyError
from cowfs.history.edits import Edit
from cowfs.history.filesystem import Checked, Filesystem
from cowfs.history.records import RootRecord
from cowfs.storage.commit import Commit
from cowfs.storage.discards import Sweep
from cowfs.storage.format import BLOCK_SIZE_BYTES
from cowfs.storage.log import LogWrite

log = logging.getLogger(__name__)

# A commit of at most this size, with one waiter, is written in the loop: a thread would cost more
# time than it saves.
INLINE_BLOCKS_MAX = 256
INLINE_NODES_MAX = 64
# A commit is due above one dirty node for each CACHE_BYTES_PER_DIRTY_NODE of the node cache. When
# names are added all over a large directory, each one dirties another node. If the cache is large
# enough for the directory, later commits make each written node (two copies) serve more changes.
CACHE_BYTES_PER_DIRTY_NODE = 64 << 10
DIRTY_ITEMS_MAX = 32768  # dirty inodes before a commit is due
# Work units of the drop queue between two requests, about 1 ms; opening a file takes several.
DROP_WORK = 16


@dataclass(slots=True, eq=False)
class _Batch:
    """One commit to come: those who wait for it, and the edit that it makes.

    Attributes:
        is_commit: a record of the log is not enough.
        edit: None for a commit without one.
        frozen: called right after the freeze that makes the edit.
        result: the records that the edit returns.
        refusal: why the edit cannot be made; the commit is made without it.
        mark_clean: commit even if nothing changed, so that the image is marked clean (True) or not
            clean (False). None: mark it not clean if there is something to commit.
        is_forced: commit even if nothing changed.
        done: set at the end, also after an error.
        error: the commit failed.
    """

    is_commit: bool = False
    edit: Edit | None = None
    frozen: Callable[[], None] | None = None
    result: list[RootRecord] = field(default_factory=list)
    refusal: CowfsError | None = None
    mark_clean: bool | None = None
    is_forced: bool = False
    waiters: int = 0
    done: trio.Event = field(default_factory=trio.Event)
    error: CowfsError | None = None


class Committer:
    """The commits of one mounted filesystem.

    Args:
        filesystem: open for writing.
        interval_s: time between commits while the filesystem changes.
        dirty_bytes_max: file data in memory above which writers wait.

    Attributes:
        before_timed: awaited before each commit on the timer, to fetch what the kernel's write-back
            cache holds (C5). None if there is no such cache.
        others_wait: whether the kernel has requests queued. If it has none, there is nobody to
            share a record with, and it is written at once, without a turn of the loop.
        paused: the mount was remounted read-only.
        commit_count, record_count, written_bytes: commits, records of the log and bytes of both
            since the mount, for `cowfs info`.
    """

    def __init__(self, filesystem: Filesystem, interval_s: float, dirty_bytes_max: int) -> None:
        self.filesystem = filesystem
        self._discarder = Discarder(filesystem)
        self._interval_s = interval_s
        self._dirty_blocks_max = max(1, dirty_bytes_max // BLOCK_SIZE_BYTES)
        self._dirty_nodes_max = filesystem.store.cache.limit_bytes // CACHE_BYTES_PER_DIRTY_NODE
        self._next = _Batch()
        self._writing: trio.Event | None = None  # set when the commit in flight is finished
        self._due = trio.Event()  # set to commit before the timer ends
        self._drops_wanted = trio.Event()  # set when the drop queue has work
        self.before_timed: Callable[[], Awaitable[None]] | None = None
        self.others_wait: Callable[[], bool] = lambda: True
        self.paused = False
        self.commit_count = 0
        self.record_count = 0
        self.written_bytes = 0

    # --- asking -----------------------------------------------------------------------------------

    async def sync(self) -> None:
        """Make everything durable that was completed before the call (C2).

        Raises:
            DeviceError: a write failed; nothing will be written any more (C8).
        """
        filesystem = self.filesystem
        if filesystem.store.failed is not None:
            raise filesystem.store.failed
        if self._writing is None:
            if not filesystem.unsynced:
                return
            if not self._next.waiters and not self.others_wait() and self._record_now():
                return
        batch = self._next
        batch.waiters += 1
        await self._join(batch)

    async def commit(self) -> None:
        """Commit everything that was completed before the call: a reader of the image finds it.

        Raises:
            DeviceError: a write failed; nothing will be written any more (C8).
        """
        filesystem = self.filesystem
        if filesystem.store.failed is not None:
            raise filesystem.store.failed
        if not filesystem.changed and filesystem.inflight is None:
            return
        batch = self._next
        batch.is_commit = True
        batch.waiters += 1
        await self._join(batch)

    async def pause(self) -> None:
        """Commit, mark the image clean, and write nothing more until `resume`."""
        self.paused = True
        await self._mark(True)

    async def resume(self) -> None:
        """Allow writing again, and mark the image not clean."""
        self.paused = False
        await self._mark(False)
        self.kick_drops()

    async def _mark(self, clean: bool) -> None:
        self.filesystem.store.require_writable()
        batch = self._next
        batch.is_commit = True
        batch.mark_clean = clean
        batch.waiters += 1
        await self._join(batch)

    async def apply(self, edit: Edit, frozen: Callable[[], None] | None = None) -> list[RootRecord]:
        """Make an edit and commit it.

        Args:
            frozen: called right after the freeze that makes the edit, before any request is
                handled. Must not fail.

        Returns:
            The records that the edit returns.

        Raises:
            CowfsError: the edit cannot be made, or the commit failed (C8).
        """
        while self._next.edit is not None:
            await self._next.done.wait()
        self.filesystem.store.require_writable()
        batch = self._next
        batch.is_commit = True
        batch.edit, batch.frozen = edit, frozen
        batch.waiters += 1
        await self._join(batch)
        if batch.refusal is not None:
            raise batch.refusal
        return batch.result

    async def trim(self, show: ShowSweep | None = None) -> Sweep:
        """Discard all free blocks, including those that only the next commits would free.

        Args:
            show: called from time to time with the progress.

        Returns:
            The finished sweep, for its numbers.

        Raises:
            DeviceError: a commit failed (C8), or a page of the space map cannot be read.
        """
        await self.commit()
        await self._follow_up()
        sweep = Sweep.of_everything(self.filesystem.store)
        await self._discarder.sweep(sweep, show)
        return sweep

    async def _follow_up(self) -> None:
        """Commit, even if nothing changed, while much is pending that only a commit would free."""
        for _ in range(self.filesystem.store.admission.limits.retained_generations):
            if not self.filesystem.follow_up_due:
                return
            batch = self._next
            batch.is_commit = batch.is_forced = True
            batch.waiters += 1
            await self._join(batch)

    def kick_if_due(self) -> None:
        """Start a commit soon if there is much dirty data, or many dirty nodes or inodes."""
        store = self.filesystem.store
        admission = store.admission
        if (
            admission.promised_blocks + store.queued_blocks > self._dirty_blocks_max // 16
            or admission.dirty_nodes > self._dirty_nodes_max
            or admission.promised_items - admission.promised_blocks > DIRTY_ITEMS_MAX
        ):
            self._due.set()

    @property
    def over_limit(self) -> bool:
        """Whether there is so much dirty data that writers must wait."""
        store = self.filesystem.store
        return store.admission.promised_blocks + store.queued_blocks > self._dirty_blocks_max

    async def throttle(self) -> None:
        """Commit until the dirty data is below its limit."""
        while self.over_limit and self.filesystem.store.failed is None:
            await self.commit()

    def kick_drops(self) -> None:
        """Start working on the drop queue, if it has work."""
        self._drops_wanted.set()

    # --- working ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Commit on the timer and when due, run the drop queue, discard. Runs until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._run_timer)
            nursery.start_soon(self._run_drops)
            nursery.start_soon(self._discarder.run)

    async def _run_timer(self) -> None:
        while True:
            with trio.move_on_after(self._interval_s) as waiting:
                await self._due.wait()
            self._due = trio.Event()
            if self.paused:
                continue
            try:
                if waiting.cancelled_caught and self.before_timed is not None:
                    await self.before_timed()
                is_idle = waiting.cancelled_caught and not self.filesystem.changed
                await self.commit()
                if is_idle and self.filesystem.discard:
                    await self._follow_up()
            except CowfsError as error:
                log.debug("the commit on the timer failed: %s", error)  # the store has logged it
                await trio.sleep(self._interval_s)

    async def _run_drops(self) -> None:
        filesystem = self.filesystem
        while True:
            may_write = not self.paused and filesystem.store.failed is None
            if filesystem.drops.working and may_write:
                try:
                    filesystem.drops.step(DROP_WORK)
                    if filesystem.store.map.dirty_groups > 512 or not filesystem.drops.working:
                        await self.commit()
                except CowfsError as error:
                    log.error("cannot free the space of deleted snapshots now: %s", error)
                    await trio.sleep(self._interval_s)
                await trio.sleep(0)
            else:
                self._drops_wanted = trio.Event()
                with trio.move_on_after(math.inf):
                    await self._drops_wanted.wait()

    async def wait_drops(self) -> None:
        """Return when the drop queue is empty and that is durable.

        Raises:
            ReadOnlyError: the mount was remounted read-only meanwhile.
            DeviceError: a commit failed (C8).
        """
        self.kick_drops()
        while self.filesystem.drops.working and self.filesystem.store.failed is None:
            if self.paused:
                raise ReadOnlyError(
                    "the mount became read-only; the rest is freed after mount -o remount,rw"
                )
            await trio.sleep(0.01)
        await self.commit()

    async def _join(self, batch: _Batch) -> None:
        """Wait for the record or commit of a batch. The first waiter makes it.

        Raises:
            CowfsError: a write failed.
        """
        if batch.waiters == 1:
            with trio.CancelScope(shield=True):
                await trio.lowlevel.checkpoint()  # requests of the same burst may join the batch
                while self._writing is not None:
                    await self._writing.wait()
                self._next = _Batch()
                await self._write(batch)
        else:
            await batch.done.wait()
        if batch.error is not None:
            raise batch.error

    async def _write(self, batch: _Batch) -> None:
        filesystem = self.filesystem
        writing = self._writing = trio.Event()
        try:
            if batch.is_commit or not await self._record(batch):
                await self._commit(batch)
        except CowfsError as error:
            batch.error = filesystem.store.failed or error
        except Exception as error:
            batch.error = self._fail(error)
        finally:
            self._writing = None
            writing.set()
            batch.done.set()

    def _fail(self, error: Exception) -> DeviceError:
        """End writing after a bug of ours in the middle of a write: the memory may be wrong now."""
        log.error("unexpected error in a commit", exc_info=error)
        store = self.filesystem.store
        if store.failed is None:
            store.fail(DeviceError(f"internal error: {error!r}"))
        assert store.failed is not None
        return store.failed

    def _record_now(self) -> bool:
        """Write a record in this thread. Returns False where a commit is needed instead.

        Raises:
            DeviceError: the write failed (C8).
        """
        try:
            record = self.filesystem.begin_record()
            if record is None:
                return False
            record.write()
            self._finish_record(record)
        except CowfsError:
            raise
        except Exception as error:
            raise self._fail(error) from error
        return True

    def _finish_record(self, record: LogWrite) -> None:
        self.filesystem.finish_record(record)
        self.record_count += 1
        self.written_bytes += record.written_bytes

    async def _record(self, batch: _Batch) -> bool:
        """Write a record of the log. Returns False where a commit is needed instead."""
        filesystem = self.filesystem
        if filesystem.store.failed is not None:
            raise filesystem.store.failed
        if not filesystem.unsynced:
            return True  # the write that ended just now had everything
        if not filesystem.store.log.is_whole or filesystem.inflight is not None:
            return False
        record = filesystem.begin_record()
        if record is None:
            return False
        if batch.waiters > 1:
            await trio.to_thread.run_sync(record.write)
        else:
            record.write()
        self._finish_record(record)
        return True

    async def _commit(self, batch: _Batch) -> None:
        filesystem = self.filesystem
        is_marked = batch.mark_clean is None or batch.mark_clean == filesystem.marked_clean
        checked = await self._check(batch)
        is_due = checked is not None or batch.is_forced or filesystem.changed
        if is_due or not is_marked:
            commit = filesystem.freeze(checked, clean=bool(batch.mark_clean))
            if checked is not None:
                batch.result = checked.result
                if batch.frozen is not None:
                    batch.frozen()
            if batch.waiters > 1 or not _is_small(commit):
                await trio.to_thread.run_sync(commit.write)
            else:
                commit.write()
            filesystem.finish(commit)
            self.commit_count += 1
            self.written_bytes += commit.written_bytes
        elif filesystem.store.failed is not None:
            raise filesystem.store.failed

    async def _check(self, batch: _Batch) -> Checked | None:
        """Check the batch's edit; one that cannot be made is recorded as `refusal`.

        `_writing` is set: no other edit can be made meanwhile.
        """
        edit = batch.edit
        if edit is None:
            return None
        try:
            slices = edit.check_in_slices(self.filesystem)
            plan = None
            while slices is not None:
                try:
                    next(slices)
                except StopIteration as end:
                    plan = end.value
                    break
                await trio.lowlevel.checkpoint()
            return self.filesystem.check(edit, plan)
        except CowfsError as error:
            if self.filesystem.store.failed is not None:
                raise
            batch.refusal = error
            return None


def _is_small(commit: Commit) -> bool:
    """Whether a commit is fast to write, so that the loop can do it."""
    if commit.discard is not None:
        return False  # the write may have to wait until the discard stops
    blocks = sum(len(buffers) for _, buffers in commit.data)
    return blocks <= INLINE_BLOCKS_MAX and len(commit.nodes) <= INLINE_NODES_MAX
