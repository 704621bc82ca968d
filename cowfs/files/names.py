"""Directories: names to inode numbers, keyed by a seeded hash of the name.

The hash and the entry's slot make the readdir cookie, which stays valid while other names come and go.
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
    """The names of all directories of one tree."""

    def __init__(self, tree: Tree, seed: int) -> None:
        self._tree = tree
        self._seed = seed
        # The name looked for last, its item's key and value: a name is nearly always looked up by the
        # kernel right before it is made or removed.
        self._last: tuple[int, bytes] | None = None
        self._last_item = b""
        self._last_value: bytes | None = None

    def _item(self, directory: int, name: bytes) -> bytes | None:
        """The value of the item where the name belongs; its key is in `_last_item`."""
        wanted = (directory, name)
        if wanted == self._last:
            return self._last_value
        item = key(directory, TYPE_NAME, name_hash(name, self._seed))
        self._last = None  # nothing is remembered of a search that fails
        value: bytes | None = self._tree.get(item)
        self._last, self._last_item, self._last_value = wanted, item, value
        return value

    def find(self, directory: int, name: bytes) -> Name | None:
        value = self._item(directory, name)
        return None if value is None else find_name(directory, value, name)

    def add(self, directory: int, name: bytes, ino: int, type_: int) -> None:
        """Add a name whose place `reach_new` reached."""
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
        """Reach the place of a name that is to be added.

        Raises:
            OSError: EEXIST, it is there.
            NoSpaceError: sixteen names of one hash, which only their author can bring about.
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
        """See to it that a change of the name cannot fail. Raises CorruptError, DeviceError."""
        self._item(directory, name)
        self._tree.reach(self._last_item)

    def change(self, directory: int, name: bytes, ino: int, type_: int) -> None:
        """Let an existing name mean another inode; its cookie stays."""
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
        """Remove a name that is there."""
        value = self._item(directory, name) or b""
        item, self._last = self._last_item, None
        if len(value) == NAME_ENTRY_BYTES + len(name) and value.endswith(name):
            self._tree.delete(item)  # alone in its item, as nearly always
            return
        names = [entry for entry in decode_names(directory, value) if entry.name != name]
        self._tree.put(item, encode_names(names))

    def is_empty(self, directory: int) -> bool:
        start, stop = key(directory, TYPE_NAME, 0), key(directory, TYPE_NAME + 1, 0)
        return next(self._tree.leaf_slices(start, stop), None) is None

    def listing(self, directory: int, after: int) -> Iterator[tuple[int, Name]]:
        """(cookie, entry) of each name whose cookie is above `after`; 0 begins at the start.

        An item that is damaged is logged and left out: the other names are still shown.
        """
        start = key(directory, TYPE_NAME, after & ~COOKIE_MASK)
        stop = key(directory, TYPE_NAME + 1, 0)
        for keys, values, first, last in self._tree.leaf_slices(start, stop):
            for at in range(first, last):
                try:
                    base = split_key(keys[at])[2]
                    names = decode_names(directory, values[at])
                except CorruptError as error:
                    log.error("%s; it is left out of the listing, run cowfs check", error)
                    continue
                for entry in names:
                    cookie = base | entry.slot
                    if cookie > after:
                        yield cookie, entry
