"""A look at one generation of a filesystem, for every command of cowdu.

The process gives way to others, in one thread: a mount that works goes on as if nobody looked. What was
learned at an earlier look is used again (cache.py).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from cowfs.accounting.owners import OwnerSets, Survey, survey
from cowfs.accounting.structure import Progress
from cowfs.api import Connection, connect
from cowfs.cli.output import progress_bar
from cowfs.history.filesystem import Filesystem
from cowfs.history.records import RootRecord

from .cache import Kept, agrees

NICENESS = 10  # about a tenth of a processor that others want too; below that, reading does not end


class Look:
    """A filesystem at one generation, read-only, and who owns its blocks.

    Attributes:
        snapshots: the oldest first; number i is bit i of the owner sets.
    """

    def __init__(self, filesystem: Filesystem, progress: Progress | None = None) -> None:
        self.filesystem = filesystem
        self.progress = progress
        self.snapshots: list[RootRecord] = filesystem.catalog.snapshots()
        self._kept: Kept | None = None
        self._sets: OwnerSets | None = None
        self._survey: Survey | None = None

    @property
    def generation(self) -> int:
        return self.filesystem.store.superblock.generation

    def known_sets(self) -> OwnerSets | None:
        """The owner sets, if an earlier look left them."""
        if self._sets is None:
            self._sets = self._cache().sets()
        return self._sets

    def sets(self) -> OwnerSets:
        """The owner sets. Raises CorruptError: something cannot be read."""
        return self.known_sets() or self.survey().sets

    def survey(self) -> Survey:
        """The owner sets, and the structure that they are of. Raises as `sets`."""
        if self._survey is None:
            kept = self._cache()
            self._survey = kept.survey()
            if self._survey is None:
                known = kept.structure()
                self._survey = survey(self.filesystem, known, self.progress)
                if known is not None and not agrees(self.filesystem, self._survey.sets):
                    self._survey = survey(self.filesystem, None, self.progress)  # it was not true
                kept.save(self._survey)
            self._sets = self._survey.sets
            self._kept = None  # its arrays are in the survey now
        return self._survey

    def _cache(self) -> Kept:
        if self._kept is None:
            self._kept = Kept(self.filesystem)
        return self._kept


def stand_back() -> None:
    """Give way to others in the calling thread, and still come to an end on a machine that is busy."""
    with suppress(OSError):  # who stands back already stays there
        os.setpriority(os.PRIO_PROCESS, 0, NICENESS)


@contextmanager
def look_at(target: Connection) -> Iterator[Look]:
    """The newest state of a target, durable and kept whole while the block runs."""
    with progress_bar("reading") as bar, target.reading() as filesystem:
        yield Look(filesystem, bar)


@contextmanager
def look(path: str) -> Iterator[Look]:
    """The same of a mount point or an image. Raises as `cowfs.connect`."""
    stand_back()
    with connect(path) as target, look_at(target) as found:
        yield found
