"""Changing a volume as no operation of it would: what an image could hold all the same."""

from collections.abc import Iterator
from contextlib import contextmanager

from cowfs.files.volume import Volume


@contextmanager
def changing(volume: Volume) -> Iterator[None]:
    """While the block runs the parts of the volume may be changed by hand, admitted or not."""
    with volume.operation.begin_admitted() as operation:
        operation.change()
        yield
        volume.changed = True
