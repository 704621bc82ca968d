"""What an image shows, and whether it may: one canonical form for filesystem and model.

A `Picture` is everything a program could see: the live tree and that of each snapshot, as paths to
names, types, modes, owners, sizes, data, xattrs, link counts and, where the model knows them,
times. The same form is made from the model and from an open image, and the two are compared whole.
"""

import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from xxhash import xxh3_64_digest, xxh3_128_digest

from cowfs.errors import CowfsError
from cowfs.files.volume import Volume
from cowfs.history.filesystem import Filesystem
from cowfs.history.records import RootRecord
from tests.model.reference import ROOT, ReferenceFile, ReferenceFiles, ReferenceHistory

LIVE = ""

# ino, mode, nlink, uid, gid, size, device number or parent, contents, xattrs
Facts = tuple[int, int, int, int, int, int, int, bytes, tuple[tuple[bytes, bytes], ...]]
CONTENT = 7
Tree = dict[bytes, Facts]


@dataclass(slots=True)
class Picture:
    """Everything that a filesystem shows at one moment.

    Attributes:
        trees: facts by path, for each snapshot by its name and for the live tree under LIVE.
        times: mtime_ns by tree and path, where the model knows it.
        undo: the snapshot that undo would restore.
        held: the snapshots that are held.
        damaged: trees and paths that could not be read; a damaged directory includes all below it.
        damaged_metadata: those of them that lost more than the data of a file.
    """

    trees: dict[str, Tree]
    times: dict[tuple[str, bytes], int]
    undo: str | None
    held: set[str]
    damaged: set[tuple[str, bytes]]
    damaged_metadata: set[tuple[str, bytes]]


# --- of the model --------------------------------------------------------------------------------


def picture_of_model(history: ReferenceHistory) -> Picture:
    """The picture that an image must show."""
    picture = Picture({}, {}, history.undo, set(history.held), set(), set())
    for name, files in {LIVE: history.live, **history.snapshots}.items():
        tree: Tree = {}
        for path, file in _walk_model(files, ROOT, b""):
            tree[path] = _facts_of_model(file)
            if file.mtime_ns is not None:
                picture.times[name, path] = file.mtime_ns
        picture.trees[name] = tree
    return picture


def _walk_model(
    files: ReferenceFiles, ino: int, path: bytes
) -> Iterator[tuple[bytes, ReferenceFile]]:
    file = files.files[ino]
    yield path, file
    for name, child in file.names.items():
        yield from _walk_model(files, child, path + b"/" + name)


def _facts_of_model(file: ReferenceFile) -> Facts:
    content = file.target or (file.read(0, file.size) if stat.S_ISREG(file.mode) else b"")
    return (
        file.ino,
        file.mode,
        file.nlink,
        file.uid,
        file.gid,
        file.size,
        file.parent if file.is_directory else file.rdev,
        xxh3_128_digest(content),
        tuple((name, xxh3_64_digest(value)) for name, value in sorted(file.xattrs.items())),
    )


# --- of an image ---------------------------------------------------------------------------------


def picture_of(filesystem: Filesystem, *, damage: bool = False) -> Picture:
    """The picture that an image shows.

    Args:
        damage: note damage and go on; otherwise raise it.

    Raises:
        CowfsError: with `damage` too, where the catalog itself cannot be read.
    """
    record = filesystem.record
    undo: RootRecord | None = filesystem.catalog.root(record.undo_id) if record.undo_id else None
    picture = Picture({}, {}, undo.name if undo else None, set(), set(), set())
    _Camera(picture, LIVE, filesystem.live, damage).directory(ROOT, b"")
    for snapshot in filesystem.catalog.snapshots():
        if snapshot.held:
            picture.held.add(snapshot.name)
        volume = filesystem.volume(snapshot.root_id)
        assert volume is not None
        _Camera(picture, snapshot.name, volume, damage).directory(ROOT, b"")
    return picture


class _Camera:
    """Walks one tree with the operations of `Volume`, as a program would."""

    def __init__(self, picture: Picture, name: str, volume: Volume, damage: bool) -> None:
        self._picture = picture
        self._name = name
        self._tree: Tree = {}
        self._volume = volume
        self._damage = damage
        picture.trees[name] = self._tree

    def directory(self, ino: int, path: bytes) -> None:
        self._metadata(path, lambda: self._look(ino, path))

    def _look(self, ino: int, path: bytes) -> None:
        volume = self._volume
        inode = volume.get(ino)
        mode = inode.mode
        content = b""
        if stat.S_ISREG(mode):
            try:
                content = xxh3_128_digest(volume.read(ino, 0, inode.size_bytes))
            except CowfsError:
                if not self._damage:
                    raise
                self._picture.damaged.add((self._name, path))
        elif stat.S_ISLNK(mode):
            content = xxh3_128_digest(volume.readlink(ino))
        else:
            content = xxh3_128_digest(b"")
        xattrs: tuple[tuple[bytes, bytes], ...] = ()
        if inode.xattr_count:
            names = sorted(volume.listxattr(ino))
            xattrs = tuple((name, xxh3_64_digest(volume.getxattr(ino, name))) for name in names)
        self._tree[path] = (
            ino,
            mode,
            inode.nlink,
            inode.uid,
            inode.gid,
            inode.size_bytes,
            inode.rdev,
            content,
            xattrs,
        )
        self._picture.times[self._name, path] = inode.mtime_ns
        if stat.S_ISDIR(mode):
            for _, entry in list(volume.listing(ino)):
                child = path + b"/" + entry.name
                self._metadata(child, lambda: self._look(entry.ino, child))  # noqa: B023

    def _metadata(self, path: bytes, look: Callable[[], None]) -> None:
        try:
            look()
        except CowfsError:
            if not self._damage:
                raise
            self._picture.damaged.add((self._name, path))
            self._picture.damaged_metadata.add((self._name, path))


# --- comparing -----------------------------------------------------------------------------------


def difference(shown: Picture, wanted: Picture) -> str:
    """How an undamaged picture differs from the model's; empty if it does not."""
    if shown.undo != wanted.undo:
        return f"undo would go to {shown.undo}, expected {wanted.undo}"
    if shown.trees != wanted.trees:
        return _tree_difference(shown, wanted)
    if shown.held != wanted.held:
        return f"held are {sorted(shown.held)}, expected {sorted(wanted.held)}"
    for place, mtime_ns in wanted.times.items():
        if shown.times[place] != mtime_ns:
            return f"mtime of {place} is {shown.times[place]}, expected {mtime_ns}"
    return ""


def _tree_difference(shown: Picture, wanted: Picture) -> str:
    if shown.trees.keys() != wanted.trees.keys():
        return f"snapshots are {sorted(shown.trees)}, expected {sorted(wanted.trees)}"
    parts = []
    for name, tree in wanted.trees.items():
        found = shown.trees[name]
        for path in sorted(tree.keys() | found.keys()):
            if tree.get(path) != found.get(path):
                place = f"{path!r} in {name or 'the live tree'}"
                parts.append(f"{place} is {found.get(path)}, expected {tree.get(path)}")
    return "; ".join(parts[:3])


def wrong_in_spite_of_damage(shown: Picture, wanted: Picture) -> str:
    """The same for a picture with damage: what was read must be right, what is missing damaged."""
    if not shown.damaged:
        return difference(shown, wanted)
    if shown.trees.keys() != wanted.trees.keys():
        return f"snapshots are {sorted(shown.trees)}, expected {sorted(wanted.trees)}"
    for name, tree in wanted.trees.items():
        found = shown.trees[name]
        for path in tree.keys() | found.keys():
            if _agree(shown, name, path, found.get(path), tree.get(path)):
                continue
            return (
                f"{path!r} in {name or 'the live tree'} is {found.get(path)}, "
                f"expected {tree.get(path)} or an error"
            )
    return ""


def _agree(
    shown: Picture, name: str, path: bytes, found: Facts | None, wanted: Facts | None
) -> bool:
    if found == wanted:
        return True
    if found is not None and wanted is not None and (name, path) in shown.damaged:
        return found[:CONTENT] == wanted[:CONTENT] and found[CONTENT + 1 :] == wanted[CONTENT + 1 :]
    while found is None and (name, path) not in shown.damaged_metadata:
        if not path:
            return False
        path = path[: path.rindex(b"/")]
    return found is None
