"""The catalog: the tree of all roots, the superblock's one pointer into the image.

Changed only while a transaction is frozen (filesystem.py), so that it always describes whole trees.
"""

import logging
from collections.abc import Iterator

from cowfs.errors import CorruptError, DeviceError, SnapshotError
from cowfs.history.records import (
    ROOT_ID_MAX,
    DropRecord,
    RootKind,
    RootRecord,
    decode_drop,
    decode_id,
    decode_root,
    drop_key,
    encode_id,
    root_key,
    snapshot_key,
    volume_key,
)
from cowfs.history.selection import unknown
from cowfs.storage.btree import Tree

log = logging.getLogger(__name__)


class Catalog:
    """Roots by id and by name, and the drop queue's records."""

    def __init__(self, tree: Tree, next_root_id: int) -> None:
        self.tree = tree
        self._next_root_id = next_root_id
        self._next_is_free = False  # looked up in the tree, not only told by the superblock

    def load(self) -> None:
        """Read all of it. Raises CorruptError, DeviceError when some of it cannot be read."""
        for _ in self.tree.leaf_slices(b"", b"\xff"):
            pass

    @property
    def next_root_id(self) -> int:
        """A number above that of every root, whatever the superblock said."""
        if not self._next_is_free:
            try:
                last = self.tree.floor(root_key((1 << 64) - 1))
            except (CorruptError, DeviceError):
                return self._next_root_id  # no root is made before the catalog is read
            self._next_is_free = True
            found = int.from_bytes(last[0][1:9], "big") if last and last[0][:1] == b"R" else 0
            if found >= self._next_root_id:
                log.warning(
                    "the next root id is said to be %d, but there is %d already; going on from there",
                    self._next_root_id,
                    found,
                )
                self._next_root_id = found + 1
        return self._next_root_id

    def take_root_id(self) -> int:
        """A number that no root has had. Raises SnapshotError when there is none left."""
        if self.next_root_id > ROOT_ID_MAX:
            raise SnapshotError(
                "the image has used up its eight million root ids; copy it to a new one"
            )
        self._next_root_id += 1
        return self._next_root_id - 1

    def root(self, root_id: int) -> RootRecord | None:
        value = self.tree.get(root_key(root_id))
        if value is None or isinstance(value, RootRecord):
            return value
        return self._decoded(root_key(root_id), value)

    def _decoded(self, item: bytes, value: bytes) -> RootRecord:
        record = decode_root(value)
        if item != root_key(record.root_id):
            raise CorruptError("catalog", 0, "a root record has another id", record.root_id)
        return record

    def find(self, name: str) -> RootRecord | None:
        """The snapshot of that name; None for what no snapshot can be called, too."""
        try:
            value = self.tree.get(snapshot_key(name))
        except UnicodeEncodeError:
            return None
        return None if value is None else self._named(value, name)

    def snapshot(self, name: str) -> RootRecord:
        """The same. Raises SnapshotError when there is none."""
        record = self.find(name)
        if record is None:
            raise unknown(name, (each.name for each in self.snapshots()))
        return record

    def volume(self, name: str) -> RootRecord:
        value = self.tree.get(volume_key(name))
        if value is None:
            raise CorruptError("catalog", 0, f"there is no volume {name!r}")
        return self._named(value, name)

    def _named(self, value: bytes, name: str) -> RootRecord:
        record = self.root(decode_id(value))
        if record is None or record.name != name:
            raise CorruptError("catalog", 0, f"the name {name!r} has no root")
        return record

    def roots(self) -> Iterator[RootRecord]:
        """All roots, in the order of their ids."""
        for item, value in self.tree.items(b"R", b"S"):
            yield value if isinstance(value, RootRecord) else self._decoded(item, value)

    def snapshots(self) -> list[RootRecord]:
        """All snapshots, the oldest first."""
        found = [record for record in self.roots() if record.kind == RootKind.SNAPSHOT]
        return sorted(found, key=lambda record: (record.created_generation, record.root_id))

    def put(self, record: RootRecord) -> None:
        self.tree.put(root_key(record.root_id), record)

    def put_name(self, record: RootRecord) -> None:
        key = volume_key if record.kind == RootKind.VOLUME else snapshot_key
        self.tree.put(key(record.name), encode_id(record.root_id))

    def remove_name(self, record: RootRecord) -> None:
        self.tree.delete(snapshot_key(record.name))

    def remove(self, record: RootRecord) -> None:
        self.remove_name(record)
        self.tree.delete(root_key(record.root_id))

    def drops(self) -> list[DropRecord]:
        """The drop queue, in the order of deletion."""
        return [
            value if isinstance(value, DropRecord) else decode_drop(value)
            for _, value in self.tree.items(b"D", b"E")
        ]

    def put_drop(self, record: DropRecord) -> None:
        self.tree.put(drop_key(record.number), record)

    def remove_drop(self, number: int) -> None:
        self.tree.delete(drop_key(number))
