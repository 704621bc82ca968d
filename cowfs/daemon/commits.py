"""When commits happen: on a timer, on fsync (shared by all who wait), on edits, and when memory fills;
and two that change nothing, after much came free, so that the host gets it back.

Freezing and finishing are synchronous calls between requests; only the writing of a large or shared
commit runs in a thread, while requests go on. Keeps C2 (sync returns after a commit that was frozen
after it was asked), C5 (the timer), C6 (edits) and C8 (a failed commit answers every waiter with EIO).
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

log = logging.getLogger(__name__)

# A commit of at most this much, with one waiter, is written where it is: a thread's hand-over costs
# more than it gives.
INLINE_BLOCKS_MAX = 256
INLINE_NODES_MAX = 64
# Memory that dirty nodes and inodes may take before a commit is due. With many names that go to places
# all over a large directory, each change dirties a node: more of them, where memory is given for a
# cache that holds the directory, makes each node's two copies serve more changes.
CACHE_BYTES_PER_DIRTY_NODE = 64 << 10
DIRTY_ITEMS_MAX = 32768
DROP_WORK = 16  # of the drop queue, between two requests: about 1 ms; opening a file is several


@dataclass(slots=True, eq=False)
class _Batch:
    """All who wait for the next freeze, and the edit to make in it.

    `is_forced`: to be written though nothing changed.
    """

    edit: Edit | None = None
    frozen: Callable[[], None] | None = None  # to call when the edit is made, before anything else
    result: list[RootRecord] = field(default_factory=list)
    refusal: CowfsError | None = None  # why the edit cannot be made; the commit goes on without it
    mark_clean: bool | None = None  # commit even if nothing changed, so that the mark is right
    is_forced: bool = False
    waiters: int = 0
    done: trio.Event = field(default_factory=trio.Event)
    error: CowfsError | None = None


class Committer:
    """The commits of one mounted filesystem.

    Args:
        filesystem: open for writing.
        interval_s: between commits of a filesystem that changes.
        dirty_bytes_max: of file data in memory; writers wait beyond it.
    """

    def __init__(self, filesystem: Filesystem, interval_s: float, dirty_bytes_max: int) -> None:
        self.filesystem = filesystem
        self._discarder = Discarder(filesystem)
        self._interval_s = interval_s
        self._dirty_blocks_max = max(1, dirty_bytes_max // BLOCK_SIZE_BYTES)
        self._dirty_nodes_max = filesystem.store.cache.limit_bytes // CACHE_BYTES_PER_DIRTY_NODE
        self._next = _Batch()
        self._writing: trio.Event | None = None  # set when the commit in flight is finished
        self._due = trio.Event()
        self._drops_wanted = trio.Event()
        # Awaited before a commit on the timer: fetches what the kernel holds back (C5).
        self.before_timed: Callable[[], Awaitable[None]] | None = None
        self.resting = False  # the mount is read-only for the time being
        self.commit_count = 0
        self.written_bytes = 0

    # --- asking -------------------------------------------------------------------------------------

    async def sync(self) -> None:
        """Everything that completed before the call is durable when it returns.

        Raises:
            DeviceError: it is not, and never will be (C8).
        """
        filesystem = self.filesystem
        store = filesystem.store
        if store.failed is not None:
            raise store.failed
        if not filesystem.changed and filesystem.inflight is None:
            return
        batch = self._next
        batch.waiters += 1
        await self._join(batch)

    async def rest(self) -> None:
        """Commit, mark the image clean, and write nothing more until `wake`."""
        self.resting = True
        await self._mark(True)

    async def wake(self) -> None:
        """The image can be written again, and is marked so."""
        self.resting = False
        await self._mark(False)
        self.kick_drops()

    async def _mark(self, clean: bool) -> None:
        self.filesystem.store.require_writable()
        batch = self._next
        batch.mark_clean = clean
        batch.waiters += 1
        await self._join(batch)

    async def apply(self, edit: Edit, frozen: Callable[[], None] | None = None) -> list[RootRecord]:
        """Make an edit durable.

        Args:
            frozen: called in the same turn as the freeze that makes the edit; must not fail.

        Returns:
            The records of its answer.

        Raises:
            CowfsError: the edit cannot be made, or the commit failed (C8).
        """
        while self._next.edit is not None:
            await self._next.done.wait()
        self.filesystem.store.require_writable()
        batch = self._next
        batch.edit, batch.frozen = edit, frozen
        batch.waiters += 1
        await self._join(batch)
        if batch.refusal is not None:
            raise batch.refusal
        return batch.result

    async def trim(self, show: ShowSweep | None = None) -> Sweep:
        """Discard all free blocks, with what waits for nothing but the next commits to be free.

        Args:
            show: called now and then, with how far it is.

        Returns:
            What was done, for its numbers.

        Raises:
            DeviceError: a commit failed (C8), or a page of the space map cannot be read.
        """
        await self.sync()
        await self._follow_up()
        sweep = Sweep.of_everything(self.filesystem.store)
        await self._discarder.sweep(sweep, show)
        return sweep

    async def _follow_up(self) -> None:
        """Commit, though nothing changed, until no more comes free by that."""
        for _ in range(self.filesystem.store.admission.limits.retained_generations):
            if not self.filesystem.follow_up_due:
                return
            batch = self._next
            batch.is_forced = True
            batch.waiters += 1
            await self._join(batch)

    def kick_if_due(self) -> None:
        """Start a commit soon if a lot is in memory."""
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
        """Whether a writer should wait."""
        store = self.filesystem.store
        return store.admission.promised_blocks + store.queued_blocks > self._dirty_blocks_max

    async def throttle(self) -> None:
        """Wait until there is room in memory for more dirty data."""
        while self.over_limit and self.filesystem.store.failed is None:
            await self.sync()

    def kick_drops(self) -> None:
        """There is work in the drop queue."""
        self._drops_wanted.set()

    # --- working ------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Commit on the timer and when due, and work off the drop queue. Ends by cancellation."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._run_timer)
            nursery.start_soon(self._run_drops)
            nursery.start_soon(self._discarder.run)

    async def _run_timer(self) -> None:
        while True:
            with trio.move_on_after(self._interval_s) as waiting:
                await self._due.wait()
            self._due = trio.Event()
            if self.resting:
                continue
            try:
                if waiting.cancelled_caught and self.before_timed is not None:
                    await self.before_timed()
                is_idle = waiting.cancelled_caught and not self.filesystem.changed
                await self.sync()
                if is_idle and self.filesystem.discard:
                    await self._follow_up()
            except CowfsError as error:
                log.debug("commit on the timer failed: %s", error)  # the store has logged it
                await trio.sleep(self._interval_s)

    async def _run_drops(self) -> None:
        filesystem = self.filesystem
        while True:
            is_asleep = self.resting or filesystem.store.failed is not None
            if filesystem.drops.working and not is_asleep:
                try:
                    filesystem.drops.step(DROP_WORK)
                    if filesystem.store.map.dirty_groups > 512 or not filesystem.drops.working:
                        await self.sync()
                except CowfsError as error:
                    log.error("the drop queue waits: %s", error)
                    await trio.sleep(self._interval_s)
                await trio.sleep(0)
            else:
                self._drops_wanted = trio.Event()
                with trio.move_on_after(math.inf):
                    await self._drops_wanted.wait()

    async def wait_drops(self) -> None:
        """Until the drop queue is empty and that is durable."""
        self.kick_drops()
        while self.filesystem.drops.working and self.filesystem.store.failed is None:
            if self.resting:
                raise ReadOnlyError("the mount became read-only; the rest is freed when it is not")
            await trio.sleep(0.01)
        await self.sync()

    async def _join(self, batch: _Batch) -> None:
        """Wait for the batch; the first of its waiters does the work."""
        if batch.waiters == 1:
            with trio.CancelScope(shield=True):
                await trio.lowlevel.checkpoint()  # who asks in the same burst joins
                while self._writing is not None:
                    await self._writing.wait()
                self._next = _Batch()
                await self._commit(batch)
        else:
            await batch.done.wait()
        if batch.error is not None:
            raise batch.error

    async def _commit(self, batch: _Batch) -> None:
        filesystem = self.filesystem
        writing = self._writing = trio.Event()
        try:
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
        except CowfsError as error:
            batch.error = filesystem.store.failed or error
        except Exception as error:
            # A fault of our own, somewhere in the middle: what is in memory may be anything by now.
            log.error("unexpected error in a commit", exc_info=error)
            if filesystem.store.failed is None:
                filesystem.store.fail(DeviceError(f"internal error: {error!r}"))
            batch.error = filesystem.store.failed
        finally:
            self._writing = None
            writing.set()
            batch.done.set()

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
    if commit.discard is not None:
        return False  # it may have to wait for that
    blocks = sum(len(buffers) for _, buffers in commit.data)
    return blocks <= INLINE_BLOCKS_MAX and len(commit.nodes) <= INLINE_NODES_MAX
