"""The data of `cowdu top` without its screen: roots, what deleting them frees, the files of one.

A `Source` opens its target anew for each question and closes it with the answer: no generation is
pinned while the user only looks at the screen, and the filesystem may be mounted and unmounted
meanwhile. It answers one question at a time, at a low priority.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from cowfs.accounting.owners import OwnerKind, OwnerSets
from cowfs.accounting.path_usage import Argument, Place, usage_of_path
from cowfs.accounting.structure import Progress
from cowfs.api import Connection, connect
from cowfs.daemon.client import ShowProgress
from cowfs.errors import CorruptError, SnapshotError
from cowfs.escapes import printable
from cowfs.files.items import ROOT_INO
from cowfs.history.filesystem import Filesystem
from cowfs.history.images import open_filesystem
from cowfs.storage.format import BLOCK_SIZE_BYTES

from .looking import Look, lower_priority
from .rows import Totals, Usage, usage_report

TREES_KEPT_MAX = 4  # a tree takes some 200 bytes for each file and directory
READ_ATTEMPTS_MAX = 3  # if another process changes the image while it is read

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Root:
    """A snapshot, or the live files.

    Attributes:
        root_id: stays the same when a snapshot is renamed.
        bit: the root's bit in the owner sets.
    """

    root_id: int
    bit: int
    usage: Usage

    @property
    def is_live(self) -> bool:
        return self.usage.kind == OwnerKind.VOLUME


@dataclass(frozen=True, slots=True)
class Roots:
    """All roots at one generation.

    Attributes:
        roots: the snapshots, the oldest first, then the live files.
    """

    image: str
    generation: int
    roots: tuple[Root, ...]
    totals: Totals
    sets: OwnerSets

    def frees_bytes(self, root_ids: Iterable[int]) -> int:
        """Count what deleting exactly these snapshots would free."""
        chosen = set(root_ids)
        bits = [root.bit for root in self.roots if root.root_id in chosen]
        return self.sets.exclusive(bits).total * BLOCK_SIZE_BYTES


@dataclass(frozen=True, slots=True)
class Line:
    """An entry of a directory, or space that belongs to no single entry.

    Attributes:
        total_bytes: None if the number would have no meaning.
        place: the entry; None for space that belongs to no single one.
    """

    title: str
    exclusive_bytes: int
    total_bytes: int | None
    place: Place | None = None


@dataclass(frozen=True, slots=True)
class Inside:
    """All files and directories of a root, at one generation.

    Attributes:
        roots: all roots at that generation.
        rest: what the root holds besides its files' data. The exclusive bytes of `rest` and of
        `top`
            add up to those of the root.
    """

    root: Root
    roots: Roots
    top: Place
    rest: tuple[Line, ...]

    def lines(self, place: Place) -> list[Line]:
        """List a directory, at the top with `rest`.

        The exclusive bytes of the lines add up to those of the directory (and of `rest`).
        """
        lines = [
            Line(
                shown_name(child.name) + "/" * child.is_directory,
                child.exclusive * BLOCK_SIZE_BYTES,
                child.total * BLOCK_SIZE_BYTES,
                child,
            )
            for child in place.children
        ]
        shared = place.exclusive - sum(child.exclusive for child in place.children)
        if shared and place.is_directory:
            lines.append(Line("(in several of these)", shared * BLOCK_SIZE_BYTES, None))
        if place is self.top:
            lines += self.rest
        return lines


def shown_name(name: bytes) -> str:
    """A file name as one line, with the characters escaped that a terminal would obey."""
    return printable(name.decode("utf-8", "surrogateescape"))


class Source:
    """Answers for a mount point or an image. Every method may be called from any thread."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._trees: OrderedDict[tuple[int, int], Inside] = OrderedDict()

    def generation(self) -> int:
        """The newest durable generation; does not commit. Raises as `cowfs.connect`."""
        with self._lock, connect(self.path) as target:
            return target.info().generation

    def roots(self, progress: Progress | None = None, *, durable: bool = False) -> Roots:
        """Read all roots and their numbers.

        Args:
            durable: read the newest commit; otherwise commit everything written so far first.

        Raises:
            CowfsError: the target cannot be opened or read.
        """
        return self._ask(_roots_of, progress, durable=durable)

    def inside(self, root: Root, roots: Roots, progress: Progress | None = None) -> Inside:
        """Read the files of a root; the tree of an earlier call is used again if nothing changed.

        Raises:
            SnapshotError: the root does not exist any more.
            CowfsError: as `roots`.
        """
        found = self._trees.pop((root.root_id, roots.generation), None)
        if found is None:
            found = self._ask(lambda look: _inside_of(look, root), progress, durable=False)
        self._trees[(root.root_id, found.roots.generation)] = found
        while len(self._trees) > TREES_KEPT_MAX:
            self._trees.popitem(last=False)
        return found

    def delete(self, names: Sequence[str], progress: ShowProgress | None = None) -> None:
        """Delete all of these snapshots, or none, and wait until their space is free.

        Raises:
            SnapshotError: one of them is unknown or held.
            CowfsError: the target cannot be opened or written.
        """
        with self._lock, connect(self.path) as target:
            target.delete_snapshots(names, wait=True, progress=progress)

    def _ask(
        self, question: Callable[[Look], Answer], progress: Progress | None, *, durable: bool
    ) -> Answer:
        lower_priority()
        attempt = 1
        while True:
            with self._lock, connect(self.path) as target:
                generation = target.info().generation
                try:
                    with _reading(target, durable=durable) as filesystem:
                        return question(Look(filesystem, progress))
                except CorruptError:
                    # Without a daemon nothing pins the generation: another process may reuse
                    # blocks.
                    changed = target.daemon is None and target.info().generation != generation
                    if attempt == READ_ATTEMPTS_MAX or not changed:
                        raise
            attempt += 1


@contextmanager
def _reading(target: Connection, *, durable: bool) -> Iterator[Filesystem]:
    if durable:
        with target.device() as (device, generation):
            yield open_filesystem(device, writable=False, generation=generation)
    else:
        with target.reading() as filesystem:
            yield filesystem


def _roots_of(look: Look) -> Roots:
    sets = look.sets()
    report = usage_report(look, look.snapshots, others=True)
    live = look.filesystem.record
    roots = [
        Root(record.root_id, sets.bit(OwnerKind.SNAPSHOT, record.root_id), usage)
        for record, usage in zip(look.snapshots, report.snapshots, strict=True)
    ]
    roots += [
        Root(live.root_id, sets.bit(OwnerKind.VOLUME, live.root_id), usage)
        for usage in report.others
        if usage.kind == OwnerKind.VOLUME and usage.name == live.name
    ]
    return Roots(report.image, report.generation, tuple(roots), report.totals, sets)


def _inside_of(look: Look, asked: Root) -> Inside:
    filesystem = look.filesystem
    roots = _roots_of(look)
    root = next((one for one in roots.roots if one.root_id == asked.root_id), None)
    record = filesystem.catalog.root(asked.root_id)
    volume = filesystem.volume(asked.root_id)
    if root is None or record is None or volume is None:
        raise SnapshotError(f"snapshot {asked.usage.name!r} does not exist any more")
    top = usage_of_path(
        filesystem, Argument(record, volume, volume.get(ROOT_INO), b""), look.progress
    )
    sets = look.sets()
    exclusive, referenced = sets.exclusive([root.bit]), sets.referenced(root.bit)
    rest = [
        Line(
            "(metadata and small files)",
            exclusive.nodes * BLOCK_SIZE_BYTES,
            referenced.nodes * BLOCK_SIZE_BYTES,
        )
    ]
    if referenced.data > top.total or exclusive.data > top.exclusive:
        rest.append(
            Line(
                "(open files without a name)",
                (exclusive.data - top.exclusive) * BLOCK_SIZE_BYTES,
                (referenced.data - top.total) * BLOCK_SIZE_BYTES,
            )
        )
    return Inside(root, roots, top, tuple(rest))
