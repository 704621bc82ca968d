"""What was learned of an image is kept between calls: the structure of its trees, and the owner sets.

A file for each image in $XDG_CACHE_HOME/cowfs, or where that is not set in /var/cache/cowfs for root and
~/.cache/cowfs for others; it can be deleted at any time. The owner sets count for exactly the
generation and catalog that they were made of; of the structure a later look uses every node whose
checksum is still there (structure.py). A file that is not whole, or of another version, is as good as
none: what it would have saved is done again.
"""

import contextlib
import io
import json
import os
from pathlib import Path
from uuid import UUID

import numpy as np
from xxhash import xxh3_128_digest

from cowfs.history.owners import Blocks, Owner, OwnerKind, OwnerSets, Retained, Survey
from cowfs.history.structure import Structure
from cowfs.storage.format import Superblock

VERSION = 1
CHECKSUM_BYTES = 16
FILE_BYTES_MAX = 2 << 30  # a larger one would take as long to read as it saves

_STRUCTURE = tuple(Structure.__dataclass_fields__)


def cache_directory() -> Path:
    """Where this user's files are."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if os.geteuid() == 0 and not cache:
        return Path("/var/cache/cowfs")
    return (Path(cache) if cache.startswith("/") else Path.home() / ".cache") / "cowfs"


class Kept:
    """What is kept of an image: `load` finds it, `save` replaces it."""

    def __init__(self, superblock: Superblock) -> None:
        self._path = cache_directory() / f"usage-{UUID(bytes=superblock.uuid)}"
        self._state = f"{superblock.generation}:{superblock.catalog.checksum.hex()}"
        self._arrays: np.lib.npyio.NpzFile | None = None
        self._facts: dict[str, object] = {}
        self._load()

    def _load(self) -> None:
        try:
            with open(self._path, "rb") as file:
                status = os.fstat(file.fileno())
                if status.st_uid != os.geteuid() or status.st_size > FILE_BYTES_MAX:
                    return
                data = file.read()
            if xxh3_128_digest(memoryview(data)[CHECKSUM_BYTES:]) != data[:CHECKSUM_BYTES]:
                return
            arrays = np.load(io.BytesIO(data[CHECKSUM_BYTES:]), allow_pickle=False)
            facts = json.loads(arrays["facts"].tobytes())
            if facts["version"] == VERSION:
                self._arrays, self._facts = arrays, facts
        except (OSError, ValueError, KeyError, TypeError):
            return  # as good as none

    def structure(self) -> Structure | None:
        """Of this generation or an earlier one."""
        if self._arrays is None:
            return None
        return Structure(**{name: self._arrays[name] for name in _STRUCTURE})

    def sets(self) -> OwnerSets | None:
        """Of exactly this generation."""
        if self._arrays is None or self._facts["state"] != self._state:
            return None
        owners = self._facts["owners"]
        retained = self._facts["retained"]
        assert isinstance(owners, list)
        return OwnerSets(
            tuple(Owner(OwnerKind(kind), *rest) for kind, *rest in owners),
            self._arrays["sets"],
            self._arrays["set_nodes"],
            self._arrays["set_data"],
            None
            if not isinstance(retained, list)
            else tuple(Retained(number, Blocks(*blocks)) for number, blocks in retained),
        )

    def survey(self) -> Survey | None:
        """All of it, of exactly this generation."""
        sets, structure = self.sets(), self.structure()
        if sets is None or structure is None or self._arrays is None:
            return None
        return Survey(structure, sets, self._arrays["labels"])

    def save(self, survey: Survey) -> None:
        """Keep this instead. What cannot be written is not kept: it was only to save time."""
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
        fresh = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                descriptor = os.open(
                    fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600
                )
                with open(descriptor, "wb") as file:
                    file.write(xxh3_128_digest(data))
                    file.write(data)
                os.replace(fresh, self._path)
            finally:
                fresh.unlink(missing_ok=True)
