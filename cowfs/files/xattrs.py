"""Extended attributes: names mapped to values of up to 64 KiB, stored in chunks.

A name is plain bytes here. The daemon decides which namespaces exist and who may use them.
"""

import errno

from cowfs.errors import CorruptError, posix_error
from cowfs.files.items import (
    TYPE_XATTR,
    XATTR_CHUNK_BYTES,
    XATTR_CHUNKS,
    XATTR_COUNT_MAX,
    XATTR_PROBES,
    XATTR_VALUE_BYTES_MAX,
    Inode,
    decode_xattr_first,
    encode_xattr,
    key,
    split_key,
    xattr_hash,
)
from cowfs.storage.btree import Tree

NAME_BYTES_MAX = 255


class Xattrs:
    """The extended attributes of all inodes of one tree. The caller touches the inode.

    Args:
        tree: the tree.
        seed: seed of the name hashes.
    """

    def __init__(self, tree: Tree, seed: int) -> None:
        self._tree = tree
        self._seed = seed

    def get(self, inode: Inode, name: bytes) -> bytes | None:
        """The value of an attribute; None if the inode has none of that name.

        Raises:
            CorruptError, DeviceError: a chunk is missing or damaged, or cannot be read.
        """
        found = self._find(inode, name)[0] if inode.xattr_count else None
        if found is None:
            return None
        _, size, value = decode_xattr_first(inode.ino, self._tree.get(self._key(inode, found)))
        for chunk in range(1, -(-size // XATTR_CHUNK_BYTES)):
            part = self._tree.get(self._key(inode, found + chunk))
            if part is None:
                raise CorruptError(f"xattr of inode {inode.ino}", inode.ino, "a chunk is missing")
            value += part
        if len(value) != size:
            raise CorruptError(f"xattr of inode {inode.ino}", inode.ino, "wrong length", len(value))
        return value

    def reach_set(self, inode: Inode, name: bytes, value: bytes) -> None:
        """Reach what `set` changes.

        Raises:
            OSError: ERANGE, the name is empty, too long, or has a zero byte; E2BIG, the value is
                too long; ENOSPC, the inode has too many attributes, or too many of this hash.
            CorruptError, DeviceError: an item cannot be read.
        """
        if not 0 < len(name) <= NAME_BYTES_MAX or b"\0" in name:
            raise posix_error(errno.ERANGE)
        if len(value) > XATTR_VALUE_BYTES_MAX:
            raise posix_error(errno.E2BIG)
        found, free = self._find(inode, name) if inode.xattr_count else (None, self._hash(name))
        if found is None and (free is None or inode.xattr_count == XATTR_COUNT_MAX):
            raise posix_error(errno.ENOSPC)
        self._reach(inode, free if found is None else found)  # type: ignore[arg-type]

    def set(self, inode: Inode, name: bytes, value: bytes) -> None:
        """Set an attribute. `reach_set` prepared it, or the inode is new."""
        found, free = self._find(inode, name) if inode.xattr_count else (None, self._hash(name))
        if found is not None:
            self._clear(inode, found)
        else:
            assert free is not None
            found = free
            inode.xattr_count += 1
        for chunk, part in enumerate(encode_xattr(name, value)):
            self._tree.put(self._key(inode, found + chunk), part)

    def reach_remove(self, inode: Inode, name: bytes) -> bool:
        """Reach what `remove` changes. Returns whether the attribute exists.

        Raises:
            CorruptError, DeviceError: an item cannot be read (C9).
        """
        found = self._find(inode, name)[0] if inode.xattr_count else None
        if found is None:
            return False
        self._reach(inode, found)
        return True

    def remove(self, inode: Inode, name: bytes) -> bool:
        """Remove an attribute that `reach_remove` prepared. Returns whether it existed."""
        found = self._find(inode, name)[0] if inode.xattr_count else None
        if found is None:
            return False
        self._clear(inode, found)
        inode.xattr_count -= 1
        return True

    def names(self, inode: Inode) -> list[bytes]:
        """The names of all attributes of an inode, in the order of their hashes."""
        if not inode.xattr_count:
            return []
        items = self._tree.items(self._key(inode, 0), key(inode.ino, TYPE_XATTR + 1, 0))
        return [
            decode_xattr_first(inode.ino, value)[0]
            for item, value in items
            if not split_key(item)[2] % XATTR_CHUNKS
        ]

    def remove_all(self, inode: Inode) -> None:
        """Remove all attributes of an inode that is gone; their leaves were reached."""
        start, stop = self._key(inode, 0), key(inode.ino, TYPE_XATTR + 1, 0)
        while inode.xattr_count and self._tree.pop_range(start, stop):
            pass
        inode.xattr_count = 0

    def _hash(self, name: bytes) -> int:
        return xattr_hash(name, self._seed)

    def _key(self, inode: Inode, offset: int) -> bytes:
        return key(inode.ino, TYPE_XATTR, offset)

    def _find(self, inode: Inode, name: bytes) -> tuple[int | None, int | None]:
        """The offset of the attribute, or None; and the first free offset for its name, or None."""
        first = self._hash(name)
        free: int | None = None
        for offset in range(first, first + XATTR_PROBES * XATTR_CHUNKS, XATTR_CHUNKS):
            value = self._tree.get(self._key(inode, offset))
            if value is None:
                free = offset if free is None else free
            elif decode_xattr_first(inode.ino, value)[0] == name:
                return offset, free
        return None, free

    def _reach(self, inode: Inode, offset: int) -> None:
        """Reach all chunks of an attribute, so that changing them cannot fail halfway."""
        last = self._key(inode, offset + XATTR_CHUNKS - 1)
        self._tree.reach_range(self._key(inode, offset), last)
        for _ in self._tree.leaf_slices(self._key(inode, offset), last):
            pass  # raises here, not halfway through the change, if the leaves are damaged

    def _clear(self, inode: Inode, offset: int) -> None:
        start, stop = self._key(inode, offset), self._key(inode, offset + XATTR_CHUNKS)
        while self._tree.pop_range(start, stop):
            pass
