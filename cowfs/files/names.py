"""Directory entries: names mapped to inode numbers, keyed by a seeded hash of the name.

The hash and the entry's slot form the readdir cookie. It stays valid while other names come and go.
"""

import errno
import logging
from collections.abc import Iterator

from cowfs.errors import CorruptError, NoSpaceError, posix_error
from cowfs.files.items import (
    NAME_ENTRY_BYTES,
    NAME_SLOTS,
    TYPE_NAME,
    Name,
    decode_names,
    encode_name,
    encode_names,
    find_name,
    key,
    name_hash,
    split_key,
)
from cowfs.storage.btree import Tree

COOKIE_MASK = NAME_SLOTS - 1

log = logging.getLogger(__name__)


class Names:
    """The names of all directories of one tree.

    Args:
        tree: the tree.
        seed: seed of the name hashes.
    """

    def __init__(self, tree: Tree, seed: int) -> None:
        self._tree = tree
        self._seed = seed
        # The last name searched for, with the key and value of its item. The kernel nearly always
        # looks a name up right before it is made or removed.
        self._last: tuple[int, bytes] | None = None
        self._last_item = b""
        self._last_value: bytes | None = None

    def _item(self, directory: int, name: bytes) -> bytes | None:
        """The value of the item for the name's hash, or None. Sets `_last_item` to its key."""
        wanted = (directory, name)
        if wanted == self._last:
            return self._last_value
        item = key(directory, TYPE_NAME, name_hash(name, self._seed))
        self._last = None  # in case the search raises
        value: bytes | None = self._tree.get(item)
        self._last, self._last_item, self._last_value = wanted, item, value
        return value

    def find(self, directory: int, name: bytes) -> Name | None:
        """The entry of a name in a directory, or None."""
        value = self._item(directory, name)
        return None if value is None else find_name(directory, value, name)

    def add(self, directory: int, name: bytes, ino: int, type_: int) -> None:
        """Add a name that `reach_new` prepared."""
        value = self._item(directory, name)
        item, self._last = self._last_item, None
        if value is None:
            self._tree.put(item, encode_name(name, ino, type_, 0))
            return
        names = decode_names(directory, value)
        taken = {entry.slot for entry in names}
        slot = next(slot for slot in range(NAME_SLOTS) if slot not in taken)
        names.append(Name(name, ino, type_, slot))
        self._tree.put(item, encode_names(sorted(names, key=lambda entry: entry.slot)))

    def reach_new(self, directory: int, name: bytes) -> None:
        """Reach what `add` changes.

        Raises:
            OSError: EEXIST, the name exists.
            NoSpaceError: the directory has NAME_SLOTS names of this hash. That does not happen by
                chance; somebody chose those names.
            CorruptError, DeviceError: the item cannot be read, or is damaged.
        """
        value = self._item(directory, name)
        if value is not None:
            names = decode_names(directory, value)
            if any(entry.name == name for entry in names):
                raise posix_error(errno.EEXIST)
            if len(names) >= NAME_SLOTS:
                raise NoSpaceError("too many names of one hash in the directory")
        self._tree.reach(self._last_item)

    def reach(self, directory: int, name: bytes) -> None:
        """Reach what `change` and `remove` change. Raises CorruptError, DeviceError."""
        self._item(directory, name)
        self._tree.reach(self._last_item)

    def change(self, directory: int, name: bytes, ino: int, type_: int) -> None:
        """Point an existing name at another inode. Its cookie stays."""
        names = decode_names(directory, self._item(directory, name) or b"")
        item, self._last = self._last_item, None
        self._tree.put(
            item,
            encode_names(
                [
                    entry._replace(ino=ino, type=type_) if entry.name == name else entry
                    for entry in names
                ]
            ),
        )

    def remove(self, directory: int, name: bytes) -> None:
        """Remove an existing name."""
        value = self._item(directory, name) or b""
        item, self._last = self._last_item, None
        if len(value) == NAME_ENTRY_BYTES + len(name) and value.endswith(name):
            self._tree.delete(item)  # nearly always: the only name of its hash
            return
        names = [entry for entry in decode_names(directory, value) if entry.name != name]
        self._tree.put(item, encode_names(names))

    def is_empty(self, directory: int) -> bool:
        """Whether a directory has no entries."""
        start, stop = key(directory, TYPE_NAME, 0), key(directory, TYPE_NAME + 1, 0)
        return next(self._tree.leaf_slices(start, stop), None) is None

    def listing(self, directory: int, after: int) -> Iterator[tuple[int, Name]]:
        """(cookie, entry) of each name with a cookie above `after`, in cookie order.

        A damaged item is logged and skipped, so that the other names are still shown.
        """
        start = key(directory, TYPE_NAME, after & ~COOKIE_MASK)
        stop = key(directory, TYPE_NAME + 1, 0)
        for keys, values, first, last in self._tree.leaf_slices(start, stop):
            for at in range(first, last):
                try:
                    base = split_key(keys[at])[2]
                    names = decode_names(directory, values[at])
                except CorruptError as error:
                    log.error("%s; the listing leaves its names out; run cowfs check", error)
                    continue
                for entry in names:
                    cookie = base | entry.slot
                    if cookie > after:
                        yield cookie, entry
