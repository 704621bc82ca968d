"""Change a volume or a catalog by hand, to states that an image may hold but no operation makes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cowfs.files.volume import Volume
from cowfs.history.edits import Edit, Plan
from cowfs.history.filesystem import Filesystem
from cowfs.history.records import RootRecord, root_key


@contextmanager
def changing(volume: Volume) -> Iterator[None]:
    """While the block runs, the test may change parts of the volume by hand, admitted or not."""
    with volume.operation.begin_admitted() as operation:
        operation.change_unlogged()
        yield
        volume.changed = True


class AnyEdit(Edit, frozen=True):
    """An edit that applies any function to the root records, as the last step before a commit."""

    change: Any  # called with the filesystem

    def check(self, filesystem: Filesystem) -> Plan:
        return Plan([root_key(record.root_id) for record in filesystem.catalog.roots()])

    def apply(self, filesystem: Filesystem, plan: Plan) -> list[RootRecord]:
        self.change(filesystem)
        return []


def edit_by_hand(filesystem: Filesystem, change: Callable[[Filesystem], object]) -> None:
    """Make a commit whose last step is `change`."""
    filesystem.apply(AnyEdit(change))
