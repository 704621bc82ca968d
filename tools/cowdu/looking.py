"""Opens one generation of a filesystem for the commands of cowdu.

The process works in one thread at a low priority, so that a busy mount is not slowed down. Results
of earlier runs are used again (cache.py).
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

from .cache import Cache, agrees

# About a tenth of a processor that others want too; with less, reading would hardly end.
NICENESS = 10


class Look:
    """A filesystem at one generation, read-only, and who owns its blocks.

    Attributes:
        snapshots: the oldest first; number i is bit i of the owner sets.
    """

    def __init__(self, filesystem: Filesystem, progress: Progress | None = None) -> None:
        self.filesystem = filesystem
        self.progress = progress
        self.snapshots: list[RootRecord] = filesystem.catalog.snapshots()
        self._opened_cache: Cache | None = None
        self._sets: OwnerSets | None = None
        self._survey: Survey | None = None

    @property
    def generation(self) -> int:
        return self.filesystem.store.superblock.generation

    def known_sets(self) -> OwnerSets | None:
        """The owner sets if they are cached, else None."""
        if self._sets is None:
            self._sets = self._cache().sets()
        return self._sets

    def sets(self) -> OwnerSets:
        """The owner sets, cached or counted now. Raises CorruptError: a node cannot be read."""
        return self.known_sets() or self.survey().sets

    def survey(self) -> Survey:
        """The owner sets and the structure they were counted from. Raises as `sets`."""
        if self._survey is None:
            cache = self._cache()
            self._survey = cache.survey()
            if self._survey is None:
                known = cache.structure()
                self._survey = survey(self.filesystem, known, self.progress)
                if known is not None and not agrees(self.filesystem, self._survey.sets):
                    # The cached structure was false: count without it.
                    self._survey = survey(self.filesystem, None, self.progress)
                cache.save(self._survey)
            self._sets = self._survey.sets
            self._opened_cache = None  # the survey holds its arrays now
        return self._survey

    def _cache(self) -> Cache:
        if self._opened_cache is None:
            self._opened_cache = Cache(self.filesystem)
        return self._opened_cache


def lower_priority() -> None:
    """Lower the priority of the calling thread to NICENESS."""
    with suppress(OSError):  # a thread of lower priority cannot raise it to NICENESS
        os.setpriority(os.PRIO_PROCESS, 0, NICENESS)


@contextmanager
def look_at(target: Connection) -> Iterator[Look]:
    """Look at the newest state of a target, which is durable and pinned while the block runs."""
    with progress_bar("reading") as bar, target.reading() as filesystem:
        yield Look(filesystem, bar)


@contextmanager
def look(path: str) -> Iterator[Look]:
    """Look at a mount point or an image, at low priority. Raises as `cowfs.connect`."""
    lower_priority()
    with connect(path) as target, look_at(target) as found:
        yield found
