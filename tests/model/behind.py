"""Changing a volume or a catalog as no operation would: what an image could hold all the same."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cowfs.files.volume import Volume
from cowfs.history.edits import Edit, Plan
from cowfs.history.filesystem import Filesystem
from cowfs.history.records import RootRecord, root_key


@contextmanager
def changing(volume: Volume) -> Iterator[None]:
    """While the block runs the parts of the volume may be changed by hand, admitted or not."""
    with volume.operation.begin_admitted() as operation:
        operation.change()
        yield
        volume.changed = True


class AnyEdit(Edit, frozen=True):
    """Whatever a function does to the records of roots, as the last thing before a commit."""

    change: Any  # called with the filesystem

    def check(self, filesystem: Filesystem) -> Plan:
        return Plan([root_key(record.root_id) for record in filesystem.catalog.roots()])

    def apply(self, filesystem: Filesystem, plan: Plan) -> list[RootRecord]:
        self.change(filesystem)
        return []


def edit_by_hand(filesystem: Filesystem, change: Callable[[Filesystem], object]) -> None:
    """Make a commit whose last step is `change`."""
    filesystem.apply(AnyEdit(change))
