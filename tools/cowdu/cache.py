"""The cache of cowdu: the structure of an image's trees, and the owner sets, kept between calls.

There is one file for each image in $XDG_CACHE_HOME/cowfs; if that is not set, in /var/cache/cowfs
for root and ~/.cache/cowfs for others. It can be deleted at any time. The owner sets are valid only
for the generation and catalog they were made of; of the structure a later look uses every node
whose checksum is still in use (structure.py). A file that is damaged, of another version, or not
written by this user is ignored, and its contents are read from the image again. A correct checksum
is no proof: every array is checked before use, the owners must be those of the catalog, and the
sums must be the image's own counts. (A false structure that agrees with all of these is believed:
only reading the nodes would show it.)
"""

import contextlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import numpy as np
import numpy.typing as npt
from xxhash import xxh3_128_digest

from cowfs.accounting.owners import (
    Blocks,
    Owner,
    OwnerKind,
    OwnerSets,
    Retained,
    Survey,
    are_sound,
    owners_of,
)
from cowfs.accounting.structure import Structure, is_sound
from cowfs.cli.own_files import own_directory, read_own, replace_file
from cowfs.history.filesystem import Filesystem
from cowfs.history.records import RootKind
from cowfs.storage.format import MAX_TOTAL_BLOCKS

VERSION = 1
CHECKSUM_BYTES = 16
FILE_BYTES_MAX = 2 << 30  # reading a larger one would take as long as it saves

_STRUCTURE = tuple(Structure.__dataclass_fields__)
_SETS = ("sets", "set_nodes", "set_data", "labels")

Arrays = dict[str, npt.NDArray[Any]]


class _Facts(msgspec.Struct, frozen=True):
    """The part of a file that is not arrays. An owner: kind, name, number, parent."""

    version: int
    state: str
    owners: tuple[tuple[OwnerKind, str, int, int | None], ...]
    retained: tuple[tuple[int, tuple[int, int]], ...] | None


def cache_directory() -> Path:
    """The directory of this user's cache files."""
    return own_directory("XDG_CACHE_HOME", root="/var/cache", home=".cache")


class Cache:
    """The cache file of one image: the constructor reads it, `save` replaces it.

    Args:
        filesystem: the image's, open read-only.
    """

    def __init__(self, filesystem: Filesystem) -> None:
        superblock = filesystem.store.superblock
        self._filesystem = filesystem
        self._total_blocks = superblock.total_blocks
        self._path = cache_directory() / f"usage-{UUID(bytes=superblock.uuid)}"
        self._state = f"{superblock.generation}:{superblock.catalog.checksum.hex()}"
        self._structure: Structure | None = None
        self._sets: OwnerSets | None = None
        self._labels: npt.NDArray[Any] | None = None
        with contextlib.suppress(OSError):
            data = read_own(self._path, FILE_BYTES_MAX)
            if data is not None:
                self._take(memoryview(data))

    def _take(self, data: memoryview) -> None:
        if xxh3_128_digest(data[CHECKSUM_BYTES:]) != bytes(data[:CHECKSUM_BYTES]):
            return
        try:
            arrays, facts = _decoded(data[CHECKSUM_BYTES:])
        except (
            Exception
        ):  # zipfile, numpy and msgspec raise many kinds for false bytes: ignore the file
            return
        structure = Structure(**{name: arrays[name] for name in _STRUCTURE})
        if facts.version != VERSION or not is_sound(structure, self._total_blocks):
            return
        self._structure = structure
        if facts.state != self._state:
            return
        sets = OwnerSets(
            tuple(Owner(*owner) for owner in facts.owners),
            arrays["sets"],
            arrays["set_nodes"],
            arrays["set_data"],
            _retained(facts),
        )
        labels = arrays["labels"]
        if (
            are_sound(sets)
            and sets.owners == owners_of(self._filesystem)
            and len(structure.tops) == len(sets.owners)
            and labels.dtype == np.int64
            and labels.shape == structure.nodes.shape
            and ((labels >= 0) & (labels < len(sets.sets))).all()
            and agrees(self._filesystem, sets)
        ):
            self._sets, self._labels = sets, labels

    def structure(self) -> Structure | None:
        """The structure of this generation or an earlier one; None if not cached."""
        return self._structure

    def sets(self) -> OwnerSets | None:
        """The owner sets of exactly this generation; None if not cached."""
        return self._sets

    def survey(self) -> Survey | None:
        """The whole survey of exactly this generation; None if not cached."""
        if self._sets is None or self._structure is None or self._labels is None:
            return None
        return Survey(self._structure, self._sets, self._labels)

    def save(self, survey: Survey) -> None:
        """Replace the file. An error is ignored: the cache only saves time."""
        structure, sets = survey.structure, survey.sets
        facts = {
            "version": VERSION,
            "state": self._state,
            "owners": [[each.kind, each.name, each.number, each.parent] for each in sets.owners],
            "retained": sets.retained,
        }
        buffer = io.BytesIO()
        np.savez(
            buffer,
            allow_pickle=False,
            facts=np.frombuffer(json.dumps(facts).encode(), np.uint8),
            sets=sets.sets,
            set_nodes=sets.nodes,
            set_data=sets.data,
            labels=survey.labels,
            **{name: getattr(structure, name) for name in _STRUCTURE},
        )
        data = buffer.getbuffer()
        if len(data) > FILE_BYTES_MAX:
            return
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            replace_file(self._path, [xxh3_128_digest(data), data])


def agrees(filesystem: Filesystem, sets: OwnerSets) -> bool:
    """Check owner sets against the image's own counts.

    The sets must add up to all allocated blocks, and each root must have as many as its record
    says, where the record is exact.
    """
    if sets.total().total != filesystem.space().tree:
        return False
    referenced = sets.each("referenced").sum(axis=1)
    for record in filesystem.catalog.roots():
        kind = OwnerKind.VOLUME if record.kind is RootKind.VOLUME else OwnerKind.SNAPSHOT
        counted = referenced[sets.bit(kind, record.root_id)]
        if not record.shares and counted != record.referenced_blocks(filesystem.store.copies):
            return False
    return True


def _decoded(data: memoryview) -> tuple[Arrays, _Facts]:
    """Decode the arrays and facts of a file. Raises whatever zipfile, numpy and msgspec raise."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        # `save` does not compress. Refusing it here bounds memory by the size of the file.
        if any(each.compress_type != zipfile.ZIP_STORED for each in archive.infolist()):
            raise ValueError("compressed")
    kept = np.load(io.BytesIO(data), allow_pickle=False)
    arrays = {name: kept[name] for name in (*_STRUCTURE, *_SETS)}
    facts = msgspec.json.decode(kept["facts"].tobytes(), type=_Facts)
    numbers = [number for _, _, number, _ in facts.owners]
    for generation, blocks in facts.retained or ():
        numbers += [generation, *blocks]
    if not all(0 <= number <= MAX_TOTAL_BLOCKS << 16 for number in numbers):
        raise ValueError("a number out of range")
    return arrays, facts


def _retained(facts: _Facts) -> tuple[Retained, ...] | None:
    if facts.retained is None:
        return None
    return tuple(Retained(number, Blocks(*blocks)) for number, blocks in facts.retained)
