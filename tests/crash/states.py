"""The images that a power cut may leave behind a recorded log; each one is a `CrashState`.

Between two flushes the device may carry out its calls in any order and in part. I3 (no block is
written twice in one epoch, the ring aside) makes every order equal to a subset, so the subsets are
all there is to try:

- *prefix*: the first n writes and discards of an epoch arrived;
- *subset*: any of them, all 2^n for n <= SUBSETS_ALL_MAX, else all but one, one alone, and random
  ones;
- *blocks*: any blocks of any of them;
- *tear*: one write arrived in part, cut at 512 bytes or 4 KiB: its head, its tail, or all but a
  hole; what did not arrive is the old content, zeros, or random bytes;
- *ring*: both copies of a superblock slot torn, or one torn and one missing;
- *lost*, *misdirected*: a write that was acknowledged did not happen, or happened elsewhere. No
  order of writes defends against these, so damage may be reported then, but never wrong bytes (C9);
- *size*: the image was cut off or grew.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from xxhash import xxh3_128_digest

from cowfs.storage.format import BLOCK_SIZE_BYTES, RING_SLOTS
from tests.crash.recording import (
    ZERO_BLOCK,
    Blocks,
    Discard,
    Entry,
    Flush,
    Mark,
    Resize,
    Write,
)

SECTOR_BYTES = 512
LOG_MAGIC = b"cowL"
SUBSETS_ALL_MAX = 10
SUBSETS_RANDOM = 64
BLOCK_SUBSETS = 16
TEARS_OF_LARGE_WRITE = 6  # cut positions per granularity, for writes of more than one block

Kind = Literal["rest", "prefix", "subset", "blocks", "tear", "ring", "lost", "misdirected", "size"]
Change = Write | Discard | Resize


@dataclass(frozen=True, slots=True)
class CrashState:
    """One image that a crash may leave.

    Attributes:
        kind, name: what happened; the name is unique in a log and is enough to repeat the state.
        oldest, newest: the range of operations whose result is legal: from the last one
        acknowledged as durable to the last one started.
        build: makes its content.
        total_blocks: the size of the image.
        victim: the write that was lost or misdirected.
        spotless: everything written was flushed, so `check` must have no remark.
    """

    kind: Kind
    name: str
    oldest: int
    newest: int
    build: Callable[[], Blocks] = field(repr=False)
    total_blocks: int
    victim: Write | None = field(default=None, repr=False)
    spotless: bool = False

    @property
    def may_be_damaged(self) -> bool:
        """Whether this is a fault of the device that no order of writes could have prevented."""
        return self.kind in ("lost", "misdirected")


@dataclass(slots=True)
class Epoch:
    """What happened between two flushes.

    Attributes:
        number: from 0.
        before: the durable content at the flush that began the epoch.
        pending: each change, with the last operation that was started before it.
        started: the last operation that was started before the epoch.
        durable: the last operation that was acknowledged as durable when the epoch ended.
        total_blocks: the size of the device.
        is_flushed: whether a flush ended the epoch.
    """

    number: int
    before: Blocks
    pending: list[tuple[Change, int]]
    started: int
    durable: int
    total_blocks: int
    is_flushed: bool = False

    def after(self) -> Blocks:
        content = dict(self.before)
        for change, _ in self.pending:
            change.apply(content)
        return content

    def size_with(self, indices: Sequence[int]) -> int:
        """The size of the device if only these changes arrived."""
        total_blocks = self.total_blocks
        for index in sorted(indices):
            change = self.pending[index][0]
            if isinstance(change, Resize):
                total_blocks = change.total_blocks
        return total_blocks

    def is_ring(self, write: Change) -> bool:
        first = write.first_block
        return first < RING_SLOTS or first >= self.total_blocks - RING_SLOTS

    @property
    def commits(self) -> bool:
        """Whether a superblock was written in this epoch."""
        return any(self.is_ring(change) for change, _ in self.pending)

    @property
    def records_twice(self) -> bool:
        """Whether a record of the log was written, and flushed, in two copies."""
        records = [
            change.data
            for change, _ in self.pending
            if isinstance(change, Write) and change.data[16:20] == LOG_MAGIC
        ]
        return self.is_flushed and len(records) == 2


def epochs(log: Sequence[Entry], before: Blocks, total_blocks: int) -> list[Epoch]:
    """The log, cut at its flushes. The last epoch holds what was never flushed."""
    found = []
    content = dict(before)
    started = durable = 0
    epoch = Epoch(0, content, [], 0, 0, total_blocks)
    for entry in log:
        if isinstance(entry, Mark):
            if entry.kind == "started":
                started = entry.number
            else:
                epoch.durable = durable = entry.number
        elif isinstance(entry, Flush):
            epoch.is_flushed = True
            found.append(epoch)
            total_blocks = epoch.size_with(range(len(epoch.pending)))
            epoch = Epoch(len(found), epoch.after(), [], started, durable, total_blocks)
        else:
            epoch.pending.append((entry, started))
    found.append(epoch)
    return found


def crash_states(log: Sequence[Entry], before: Blocks, total_blocks: int) -> Iterator[CrashState]:
    """All states of a log, of every kind. The random choices depend on the log's length alone."""
    earlier: Epoch | None = None
    all_epochs = epochs(log, before, total_blocks)
    for epoch in all_epochs:
        choice = random.Random(epoch.number)
        yield from _arrived(epoch, choice)
        for index, (change, _) in enumerate(epoch.pending):
            if isinstance(change, Write):
                yield from _torn(epoch, index, change, choice)
        yield from _torn_ring(epoch)
        if epoch.commits:
            later = all_epochs[epoch.number + 1]
            for part in (earlier, epoch):
                if part is not None:
                    yield from _broken_promises(part, epoch, later.durable, choice)
        elif epoch.records_twice:
            later = all_epochs[epoch.number + 1]
            yield from _broken_promises(epoch, epoch, later.durable, choice)
        earlier = epoch
    yield from _other_sizes(all_epochs[-1])


# --- writes that were not acknowledged -----------------------------------------------------------


def _legal(epoch: Epoch, indices: Sequence[int]) -> tuple[int, int]:
    """The first and last operation whose result may be seen if only these changes arrived."""
    newest = epoch.pending[max(indices)][1] if indices else epoch.started
    return epoch.durable, max(newest, epoch.durable)


def _state(epoch: Epoch, kind: Kind, what: str, indices: Sequence[int]) -> CrashState:
    def build() -> Blocks:
        content = dict(epoch.before)
        for index in sorted(indices):
            epoch.pending[index][0].apply(content)
        return content

    name = f"epoch {epoch.number} {kind} {what}".rstrip()
    size = epoch.size_with(indices)
    spotless = kind == "rest"
    return CrashState(kind, name, *_legal(epoch, indices), build, size, spotless=spotless)


def _arrived(epoch: Epoch, choice: random.Random) -> Iterator[CrashState]:
    count = len(epoch.pending)
    yield _state(epoch, "rest", "", [])
    for length in range(1, count + 1):
        yield _state(epoch, "prefix", f"{length}", range(length))
    everything = range(count)
    if count <= SUBSETS_ALL_MAX:
        subsets = [[at for at in everything if mask >> at & 1] for mask in range(1, 1 << count)]
    else:
        subsets = [[at for at in everything if at != one] for one in everything]
        subsets += [[one] for one in everything]
        subsets += [
            [at for at in everything if choice.random() < share]
            for share in (choice.random() for _ in range(SUBSETS_RANDOM))
        ]
    for subset in subsets:
        if subset != list(range(len(subset))):
            yield _state(epoch, "subset", ",".join(map(str, subset)), subset)
    if any(change.block_count > 1 for change, _ in epoch.pending):
        for number in range(BLOCK_SUBSETS):
            yield _some_blocks(epoch, number)


def _some_blocks(epoch: Epoch, number: int) -> CrashState:
    def build() -> Blocks:
        choice = random.Random(epoch.number << 16 | number)
        share = choice.random()
        content = dict(epoch.before)
        after = epoch.after()
        for change, _ in epoch.pending:
            for block in change.blocks:
                if choice.random() < share:
                    content[block] = after.get(block, ZERO_BLOCK)
        return content

    everything = range(len(epoch.pending))
    return CrashState(
        "blocks",
        f"epoch {epoch.number} blocks {number}",
        *_legal(epoch, everything),
        build,
        epoch.total_blocks,
    )


def _fill(size: int, old: bytes, kind: str, seed: int) -> bytes:
    if kind == "old":
        return old
    return bytes(size) if kind == "zero" else random.Random(seed).randbytes(size)


def _tear(data: bytes, old: bytes, start: int, stop: int, fill: str) -> bytes:
    """`data`, in which the bytes from `start` to `stop` did not arrive."""
    return data[:start] + _fill(stop - start, old[start:stop], fill, start) + data[stop:]


def _cuts(size: int, choice: random.Random) -> list[tuple[int, int]]:
    """The byte ranges of a write of `size` that do not arrive: tails, heads, holes."""
    missing = []
    for unit in (SECTOR_BYTES, BLOCK_SIZE_BYTES):
        inside = list(range(unit, size, unit))
        if size > BLOCK_SIZE_BYTES and len(inside) > TEARS_OF_LARGE_WRITE:
            inside = sorted(choice.sample(inside, TEARS_OF_LARGE_WRITE))
        missing += [(cut, size) for cut in inside]
        missing += [(0, cut) for cut in inside]
        missing += [(cut, cut + unit) for cut in inside if cut + unit < size]
    return missing


def _old_bytes(epoch: Epoch, write: Write) -> bytes:
    return b"".join([epoch.before.get(number, ZERO_BLOCK) for number in write.blocks])


def _torn(epoch: Epoch, index: int, write: Write, choice: random.Random) -> Iterator[CrashState]:
    """States in which all writes before this one arrived, and a part of this one."""
    total = epoch.size_with(range(index))
    for start, stop in _cuts(len(write.data), choice):
        for fill in ("old", "zero", "random"):

            def build(start: int = start, stop: int = stop, fill: str = fill) -> Blocks:
                content = dict(epoch.before)
                for change, _ in epoch.pending[:index]:
                    change.apply(content)
                data = _tear(write.data, _old_bytes(epoch, write), start, stop, fill)
                Write(write.first_block, data).apply(content)
                return content

            name = f"epoch {epoch.number} tear {index} {start}-{stop} {fill}"
            yield CrashState("tear", name, *_legal(epoch, range(index + 1)), build, total)


def _torn_ring(epoch: Epoch) -> Iterator[CrashState]:
    """States with both copies of the slot torn, or the second torn and the first missing."""
    slots = [
        change
        for change, _ in epoch.pending
        if isinstance(change, Write) and epoch.is_ring(change) and change.block_count == 1
    ]
    if len(slots) != 2:
        return
    others = [change for change, _ in epoch.pending if change not in slots]
    for first_cut in range(0, BLOCK_SIZE_BYTES, SECTOR_BYTES):
        for second_cut in (SECTOR_BYTES, 4 * SECTOR_BYTES):
            for fill in ("old", "zero", "random"):

                def build(
                    cuts: tuple[int, int] = (first_cut, second_cut), fill: str = fill
                ) -> Blocks:
                    content = dict(epoch.before)
                    for change in others:
                        change.apply(content)
                    for write, cut in zip(slots, cuts, strict=True):
                        if cut:
                            old = _old_bytes(epoch, write)
                            data = _tear(write.data, old, cut, BLOCK_SIZE_BYTES, fill)
                            Write(write.first_block, data).apply(content)
                    return content

                name = f"epoch {epoch.number} ring {first_cut} {second_cut} {fill}"
                everything = range(len(epoch.pending))
                size = epoch.size_with(everything)
                yield CrashState("ring", name, *_legal(epoch, everything), build, size)


# --- broken promises of the device ---------------------------------------------------------------


def _broken_promises(
    part: Epoch, commit: Epoch, durable: int, choice: random.Random
) -> Iterator[CrashState]:
    """States in which one write of a durable commit or record was lost, or happened elsewhere.

    Args:
        part: the epoch of the write.
        commit: the epoch of the superblock of the same commit; of a record, the same epoch.
        durable: the operation acknowledged after the commit, which may hold later ones too.
    """
    after = commit.after()
    newest = max(durable, *(started for _, started in commit.pending))
    used = sorted(after)
    total_blocks = commit.total_blocks
    for index, (write, _) in enumerate(part.pending):
        if not isinstance(write, Write):
            continue
        single = [
            Write(number, write.data[at * BLOCK_SIZE_BYTES :][:BLOCK_SIZE_BYTES])
            for at, number in enumerate(write.blocks)
        ]
        victims = [(f"{index}", write)]
        if len(single) > 1:
            at = choice.randrange(len(single))
            victims.append((f"{index}.{at}", single[at]))
        for what, victim in victims:
            targets = {
                "beside": victim.first_block + victim.block_count,
                "used": choice.choice(used),
                "ring": choice.choice([0, total_blocks - RING_SLOTS])
                + choice.randrange(RING_SLOTS),
            }
            for target_name, target in {"": None, **targets}.items():
                if target is not None and target + victim.block_count > total_blocks:
                    continue

                def build(victim: Write = victim, target: int | None = target) -> Blocks:
                    content = dict(after)
                    for number in victim.blocks:
                        old = part.before.get(number)
                        if old is None:
                            content.pop(number, None)
                        else:
                            content[number] = old
                    if target is not None:
                        Write(target, victim.data).apply(content)
                    return content

                kind: Kind = "lost" if target is None else "misdirected"
                name = f"epoch {part.number} {kind} {what} {target_name}".rstrip()
                yield CrashState(kind, name, durable, newest, build, total_blocks, victim)


def _other_sizes(epoch: Epoch) -> Iterator[CrashState]:
    """States in which the image was cut short, or grew."""
    total = epoch.total_blocks
    for size in (total // 2, total - RING_SLOTS, total - 1, total + 1, total + 1024):

        def build(size: int = size) -> Blocks:
            return {number: data for number, data in epoch.before.items() if number < size}

        name = f"epoch {epoch.number} size {size}"
        yield CrashState("size", name, *_legal(epoch, []), build, size)


# --- telling states apart ------------------------------------------------------------------------


class Fingerprints:
    """Hashes of whole images; cheap, because states share their blocks.

    Keeps references to the blocks it has hashed, so that no other block gets the same identity.
    """

    KEPT_MAX = 10_000

    def __init__(self) -> None:
        self._known: dict[int, tuple[bytes, bytes]] = {}

    def _digest(self, data: bytes) -> bytes:
        known = self._known.get(id(data))
        if known is not None:
            return known[1]
        if len(self._known) >= self.KEPT_MAX:
            self._known.clear()
        digest = xxh3_128_digest(data)
        self._known[id(data)] = (data, digest)
        return digest

    def of(self, content: Blocks, total_blocks: int) -> bytes:
        """The hash of an image. A block of zeros counts as one that was never written."""
        parts = [total_blocks.to_bytes(8, "little")]
        digest = self._digest
        for number in sorted(content):
            data = content[number]
            if data is not ZERO_BLOCK and data != ZERO_BLOCK:
                parts.append(number.to_bytes(8, "little") + digest(data))
        return xxh3_128_digest(b"".join(parts))
