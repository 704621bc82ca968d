"""The commits that the ring still names, and whether each can still be read.

Each commit is only looked over: the whole catalog, the root node of every volume and snapshot, and
the index pages of the space map. `check_image(generation=...)` checks one in full.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cowfs.care.reader import (
    MetadataReader,
    Report,
    choose_superblock,
    read_ring,
    size_is_impossible,
)
from cowfs.care.references import index_pointer, pointer_fault
from cowfs.errors import CorruptError
from cowfs.history.records import RootKind, decode_drop, decode_root
from cowfs.storage.device import Device
from cowfs.storage.format import (
    BLOCK_SIZE_BYTES,
    FLAG_CLEAN,
    INDEX_FANOUT,
    NODE_BLOCKS,
    NodeImage,
    Pointer,
    Superblock,
    decode_pointer,
    index_shape,
)
from cowfs.storage.log_records import read_log
from cowfs.storage.overlay import OverlayDevice


@dataclass(frozen=True, slots=True)
class GenerationReport:
    """One commit of the ring.

    Attributes:
        newest: this commit is the state of the image.
        retained: promised to be whole; none of its blocks was reused.
        clean: the commit was made by a clean unmount.
        problem: the first thing found that cannot be read; "" if there is none.
        snapshot_count: None if its catalog cannot be read.
        used_bytes: as its superblock says.
        log_calls: calls in the log that follows it. Of the newest commit, they belong to the state
            of the image; an earlier commit is shown without them.
    """

    generation: int
    committed_ns: int
    newest: bool
    retained: bool
    clean: bool
    problem: str
    snapshot_count: int | None
    used_bytes: int
    log_calls: int


def superblocks(device: Device) -> dict[int, Superblock]:
    """The valid superblocks of the image by generation, the newest first.

    Raises:
        ImageError: there is no valid superblock.
        DeviceError: neither copy of the ring can be read.
    """
    slots = read_ring(device)
    newest = choose_superblock(device, slots)
    found = {
        slot.superblock.generation: slot.superblock
        for slot in slots
        if slot.superblock is not None and slot.superblock.uuid == newest.uuid
    }
    return {generation: found[generation] for generation in sorted(found, reverse=True)}


def generation_reports(
    device: Device, progress: Callable[[int, int], None] | None = None
) -> tuple[GenerationReport, ...]:
    """Look over all commits that the ring names, the newest first. The image is only read.

    Args:
        progress: called with the number of commits done, and the number of all.

    Raises:
        ImageError: the device holds no image.
        DeviceError: neither copy of the ring can be read.
    """
    if isinstance(device, OverlayDevice):
        device = device.below  # the commit on the overlay is not one of the image
    found = list(superblocks(device).values())
    newest = found[0]
    reports = []
    problems: dict[Pointer, str] = {}
    for number, superblock in enumerate(found):
        glance = _Glance(device, superblock, problems)
        glance.run()
        reports.append(
            GenerationReport(
                generation=superblock.generation,
                committed_ns=superblock.committed_ns,
                newest=superblock is newest,
                retained=superblock.generation >= newest.oldest_retained,
                clean=bool(superblock.flags & FLAG_CLEAN),
                problem=glance.problem,
                snapshot_count=glance.snapshot_count,
                used_bytes=superblock.used_blocks * BLOCK_SIZE_BYTES,
                log_calls=sum(record.call_count for record in read_log(device, superblock)),
            )
        )
        if progress is not None:
            progress(number + 1, len(found))
    return tuple(reports)


class _Glance:
    """One look over one commit.

    Args:
        problems: of every pointer followed so far, in any commit, what is wrong with its block;
            "" if nothing is. Grows.
    """

    def __init__(
        self, device: Device, superblock: Superblock, problems: dict[Pointer, str]
    ) -> None:
        self.problem = size_is_impossible(device, superblock)
        self.snapshot_count: int | None = 0
        self._reader = MetadataReader(device, superblock)
        self._superblock = superblock
        self._problems = problems

    def run(self) -> None:
        if self.problem:
            self.snapshot_count = None
            return
        self._index()
        for pointer in self._catalog():
            if self._may_read(pointer, NODE_BLOCKS) and pointer not in self._problems:
                self._node(pointer, None)
            self._note(self._problems.get(pointer, ""))

    def _note(self, problem: str) -> None:
        self.problem = self.problem or problem

    def _may_read(self, pointer: Pointer, blocks: int) -> bool:
        fault = pointer_fault(pointer, blocks, self._superblock.generation, self._superblock)
        if fault is not None:
            self._problems[pointer] = fault[1]
        return fault is None

    def _node(self, pointer: Pointer, level: int | None) -> NodeImage | None:
        reported: list[str] = []
        image = self._reader.node(pointer, level, _collect(reported))
        self._problems[pointer] = "" if image is not None else reported[0]
        return image

    def _catalog(self) -> list[Pointer]:
        """Read the catalog; the root nodes that it names."""
        roots: list[Pointer] = []
        snapshots = 0
        waiting: list[tuple[Pointer, int | None]] = [(self._superblock.catalog, None)]
        visited = set()
        while waiting:
            pointer, level = waiting.pop()
            if pointer.block in visited:
                continue
            visited.add(pointer.block)
            image = self._node(pointer, level) if self._may_read(pointer, NODE_BLOCKS) else None
            if image is None:
                self._note(f"catalog, {self._problems[pointer]}")
                self.snapshot_count = None
                continue
            if image.level:
                waiting += [(decode_pointer(value), image.level - 1) for value in image.values]
                continue
            for key, value in zip(image.keys, image.values, strict=True):
                try:
                    if key[:1] == b"R":
                        record = decode_root(value)
                        roots.append(record.pointer)
                        snapshots += record.kind is RootKind.SNAPSHOT
                    elif key[:1] == b"D":
                        roots.append(decode_drop(value).path[0].pointer)
                except CorruptError as error:
                    self._note(str(error))
        if self.snapshot_count is not None:
            self.snapshot_count = snapshots
        return roots

    def _index(self) -> None:
        """Read the index pages of the space map."""
        waiting = [(self._superblock.space_map, len(index_shape(self._superblock.total_blocks)), 0)]
        while waiting:
            pointer, level, number = waiting.pop()
            if pointer in self._problems:
                self._note(self._problems[pointer])
                continue
            reported: list[str] = []
            entries = None
            if self._may_read(pointer, 1):
                entries = self._reader.index_page(pointer, level, number, _collect(reported))
                self._problems[pointer] = "" if entries is not None else reported[0]
            self._note(self._problems[pointer])
            if entries is not None and level > 1:
                waiting += [
                    (index_pointer(entries[at]), level - 1, number * INDEX_FANOUT + at)
                    for at in np.flatnonzero(entries["block"]).tolist()
                ]


def _collect(reported: list[str]) -> Report:
    def report(_invariant: str, what: str, block: int) -> None:
        reported.append(f"block {block}: {what}")

    return report
