"""The catalog: the tree of all roots. The superblock has a pointer to its root node.

The catalog is changed only in a freeze (filesystem.py), so it always describes whole trees. The
keys that the freeze will change are reached before.
"""

import logging
from collections.abc import Container, Iterator, Sequence

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
    parent_of,
    root_key,
    snapshot_generation,
    snapshot_key,
    volume_key,
)
from cowfs.history.selection import unknown
from cowfs.storage.btree import Tree
from cowfs.storage.operation import Operation

log = logging.getLogger(__name__)

DECODED_MAX = 32768  # root records kept decoded: about 700 bytes each


class Catalog:
    """Roots by id and by name, and the records of the drop queue."""

    def __init__(self, tree: Tree, next_root_id: int) -> None:
        self.tree = tree
        self.operation = tree.operation = Operation(
            tree.store.admission, tree.store.fail, tree.store.log
        )
        self._next_root_id = next_root_id
        self._next_is_checked = False  # against the tree, not only from the superblock
        # By key: the bytes of a root record, and the decoded record.
        self._known: dict[bytes, tuple[bytes, RootRecord]] = {}

    @property
    def next_root_id(self) -> int:
        """A number above the id of every root, also where the superblock has a wrong one."""
        if not self._next_is_checked:
            try:
                last = self.tree.floor(root_key((1 << 64) - 1))
            except (CorruptError, DeviceError):
                return self._next_root_id  # no root is made while the catalog cannot be read
            self._next_is_checked = True
            found = int.from_bytes(last[0][1:9], "big") if last and last[0][:1] == b"R" else 0
            if found >= self._next_root_id and self._next_root_id <= ROOT_ID_MAX:
                log.warning(
                    "the next root id is said to be %d, but root %d exists; continuing after it",
                    self._next_root_id,
                    found,
                )
                # A key may say any 64-bit number; above ROOT_ID_MAX no id is left.
                self._next_root_id = min(found, ROOT_ID_MAX) + 1
        return self._next_root_id

    def require_root_id(self) -> int:
        """The id that `take_root_id` gives next. Raises SnapshotError if no id is left."""
        if self.next_root_id > ROOT_ID_MAX:
            raise SnapshotError(
                "the image has used up its eight million root ids; copy its files to a new image"
            )
        return self.next_root_id

    def take_root_id(self) -> int:
        """Take an id that no root has had. Call `require_root_id` before."""
        self._next_root_id = self.next_root_id + 1
        return self._next_root_id - 1

    def root(self, root_id: int) -> RootRecord | None:
        """The record of a root, or None."""
        value = self.tree.get(root_key(root_id))
        if value is None or isinstance(value, RootRecord):
            return value
        return self._decoded(root_key(root_id), value)

    def _decoded(self, item: bytes, value: bytes) -> RootRecord:
        known = self._known.get(item)
        if known is not None and known[0] == value:
            return known[1]
        record = decode_root(value)
        if item != root_key(record.root_id):
            raise CorruptError("catalog", 0, "a root record has another id", record.root_id)
        if known is not None or len(self._known) < DECODED_MAX:
            self._known[item] = (value, record)
        return record

    def find(self, name: str) -> RootRecord | None:
        """The snapshot of that name, or None; also None for an invalid name."""
        try:
            value = self.tree.get(snapshot_key(name))
        except UnicodeEncodeError:
            return None
        return None if value is None else self._named(value, name)

    def snapshot(self, name: str) -> RootRecord:
        """The snapshot of that name. Raises SnapshotError if there is none."""
        record = self.find(name)
        if record is None:
            raise unknown(name, (each.name for each in self.snapshots()))
        return record

    def volume(self, name: str) -> RootRecord:
        """The volume of that name. Raises CorruptError if there is none."""
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
        return self.roots_from(0)

    def roots_from(self, root_id: int) -> Iterator[RootRecord]:
        """All roots with this id or a higher one, in the order of their ids."""
        for item, value in self.tree.items(root_key(root_id), b"S"):
            yield value if isinstance(value, RootRecord) else self._decoded(item, value)

    @property
    def snapshot_count(self) -> int:
        return sum(last - first for _, _, first, last in self.tree.leaf_slices(b"S", b"T"))

    def snapshots(self) -> list[RootRecord]:
        """All snapshots, oldest first."""
        found = [record for record in self.roots() if record.kind == RootKind.SNAPSHOT]
        return sorted(found, key=lambda record: (record.created_generation, record.root_id))

    def roots_grown_from(self, parents: Container[int], first_id: int = 0) -> Iterator[RootRecord]:
        """The roots with ids from `first_id` that are not in `parents` and whose parent is.

        Only those are decoded.
        """
        for item, value in self.tree.items(root_key(first_id), b"S"):
            if int.from_bytes(item[1:], "big") in parents:
                continue
            if isinstance(value, RootRecord):
                if value.parent_id in parents:
                    yield value
            elif parent_of(value) in parents:
                yield self._decoded(item, value)

    def newest_snapshot_generation(self) -> int:
        """The generation of the newest snapshot; 0 if there is none."""
        newest = 0
        for item, value in self.tree.items(b"R", b"S"):
            record = value if isinstance(value, RootRecord) else None
            if record is None and snapshot_generation(value) > newest:
                record = self._decoded(item, value)
            if record is not None and record.kind == RootKind.SNAPSHOT:
                newest = max(newest, record.created_generation)
        return newest

    def put(self, record: RootRecord) -> None:
        """Put a root record, without its name."""
        self.tree.put(root_key(record.root_id), record)

    def put_name(self, record: RootRecord) -> None:
        key = volume_key if record.kind == RootKind.VOLUME else snapshot_key
        self.tree.put(key(record.name), encode_id(record.root_id))

    def remove_name(self, record: RootRecord) -> None:
        self.tree.delete(snapshot_key(record.name))

    def put_new(self, record: RootRecord) -> None:
        """Put a root record and its name."""
        self.put(record)
        self.put_name(record)

    def remove(self, records: Sequence[RootRecord]) -> None:
        """Remove the records and the names of snapshots."""
        self.tree.delete_ascending(sorted(snapshot_key(record.name) for record in records))
        self.tree.delete_ascending(sorted(root_key(record.root_id) for record in records))
        for record in records:
            self._known.pop(root_key(record.root_id), None)

    def drops(self) -> list[DropRecord]:
        """The drop queue, in the order of deletion."""
        return [
            value if isinstance(value, DropRecord) else decode_drop(value)
            for _, value in self.tree.items(b"D", b"E")
        ]

    def put_drop(self, record: DropRecord) -> None:
        self.tree.put(drop_key(record.number), record)

    def put_drops(self, records: Sequence[DropRecord]) -> None:
        """Put several drop records, with one descent for each leaf."""
        entries = [(drop_key(record.number), record) for record in records]
        self.tree.put_ascending(sorted(entries, key=lambda entry: entry[0]))

    def remove_drop(self, number: int) -> None:
        self.tree.delete(drop_key(number))
