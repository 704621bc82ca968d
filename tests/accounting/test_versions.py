"""Promises of the versions of a path, against what every root has in each block of the file."""

import random
import stat

import pytest

from cowfs.accounting.versions import KINDS, Version, versions_of
from cowfs.files.content import KEEP_SIZE, PUNCH_HOLE
from cowfs.files.items import INODE_INLINE
from cowfs.history.edits import CreateSnapshot
from cowfs.storage.format import BLOCK_SIZE_BYTES
from tests.accounting.test_accounting import each_moment
from tests.model.histories import History
from tests.model.holdings import Held, holdings
from tests.sizes import seeds


def identity_of(held: Held, paths: dict[bytes, int], path: bytes) -> object:
    """What one root has at the path: equal values are the same version."""
    ino = paths.get(path)
    if ino is None:
        return None
    inode = held.inodes[ino]
    kind = stat.S_IFMT(inode.mode)
    if kind == stat.S_IFDIR:
        names = {
            (name, below)
            for below, edges in held.names.items()
            for directory, name in edges
            if directory == ino
        }
        return (kind, ino, frozenset(names))
    if inode.flags & INODE_INLINE:
        return (kind, inode.size_bytes, held.inline.get(ino))
    return (kind, inode.size_bytes, tuple(sorted(held.extents.get(ino, {}).items())))


@pytest.mark.parametrize("seed", seeds(4, 10))
def test_versions_are_the_distinct_states_of_a_path(seed: int) -> None:
    """Promise: each state is a version once, in the order of the roots, with roots and blocks."""
    changed = 0

    def look(history: History, choice: random.Random) -> None:
        nonlocal changed
        found = holdings(history.disk)
        records = [*history.records, history.filesystem.record]
        held = [found.held["snapshot", record.root_id] for record in history.records]
        held.append(found.live)
        paths = [one.paths() for one in held]
        every = sorted({path for each in paths for path in each})
        for path in [b"", b"none", *choice.sample(every, min(25, len(every)))]:
            versions = versions_of(history.filesystem, records, path)
            states = [identity_of(one, each, path) for one, each in zip(held, paths, strict=True)]
            distinct = list(dict.fromkeys(states))
            assert [version.roots for version in versions] == [
                tuple(number for number, each in enumerate(states) if each == state)
                for state in distinct
            ], path
            changed += len(versions) > 2
            seen: set[int] = set()
            for version in versions:
                first = version.roots[0]
                ino = paths[first].get(path)
                blocks = held[first].data.get(ino, set()) if ino is not None else set()
                assert version.data_blocks == len(blocks)
                assert version.fresh_blocks == len(blocks - seen)
                seen |= blocks
                require_facts(version, held[first], ino)

    each_moment(seed, look)
    assert changed, "no file ever changed"


def require_facts(version: Version, held: Held, ino: int | None) -> None:
    if ino is None:
        assert (version.kind, version.ino, version.size_bytes) == ("absent", 0, 0)
        return
    inode = held.inodes[ino]
    assert version.kind == KINDS[stat.S_IFMT(inode.mode)]
    assert (version.ino, version.size_bytes, version.mtime_ns) == (
        ino,
        inode.size_bytes,
        inode.mtime_ns,
    )


def test_versions_tell_changes_of_content_only() -> None:
    """Promise: data, holes and sizes make versions; times, modes, names and other files do not."""
    history = History(0, small_files=0)
    live, filesystem = history.live, history.filesystem
    ino = live.create(1, b"file", 0o100644, 0, 0).ino
    number = 0

    def snapshot() -> None:
        nonlocal number
        number += 1
        filesystem.apply(CreateSnapshot(f"s{number}"))

    snapshot()  # 0: empty
    live.write(ino, 0, b"small")
    snapshot()  # 1: small
    live.write(ino, 0, b"1" * 8 * BLOCK_SIZE_BYTES)
    snapshot()  # 2: eight blocks
    live.write(live.create(1, b"other", 0o100644, 0, 0).ino, 0, b"2" * 10000)
    live.link(ino, 1, b"again")
    snapshot()  # 3: the same
    live.write(ino, 3 * BLOCK_SIZE_BYTES, b"1" * BLOCK_SIZE_BYTES)
    snapshot()  # 4: a block, written again with the same bytes
    live.allocate(ino, PUNCH_HOLE | KEEP_SIZE, 0, BLOCK_SIZE_BYTES)
    snapshot()  # 5: a hole
    live.unlink(1, b"file")
    snapshot()  # absent, though the file is there under another name
    live.rename(1, b"again", 1, b"file", 0)
    history.commit()
    records = [*history.records, filesystem.record]
    versions = versions_of(filesystem, records, b"file")
    assert [
        (version.kind, version.roots, version.data_blocks, version.fresh_blocks)
        for version in versions
    ] == [
        ("file", (0,), 0, 0),
        ("file", (1,), 0, 0),
        ("file", (2, 3), 8, 8),
        ("file", (4,), 8, 1),
        ("file", (5, 7), 7, 0),
        ("absent", (6,), 0, 0),
    ]
    (version,) = versions_of(filesystem, records, b"nothing/at/all")
    assert (version.kind, version.roots) == ("absent", tuple(range(8)))
    assert versions_of(filesystem, [], b"file") == []


def test_version_does_not_depend_on_how_extents_are_cut() -> None:
    """Promise: the same blocks at the same places are one version, in however many extents."""
    history = History(0, small_files=0)
    live, filesystem = history.live, history.filesystem
    one = live.create(1, b"file", 0o100644, 0, 0).ino
    live.write(one, 0, b"1" * 8 * BLOCK_SIZE_BYTES)
    filesystem.apply(CreateSnapshot("whole"))
    two = live.create(1, b"pieces", 0o100644, 0, 0).ino
    for at in (0, 3, 6):
        size = min(3, 8 - at) * BLOCK_SIZE_BYTES
        start = at * BLOCK_SIZE_BYTES
        assert live.reflink(live, one, start, two, start, size) == size
    live.rename(1, b"pieces", 1, b"file", 0)
    filesystem.apply(CreateSnapshot("pieces"))
    assert len(list(live.extents.find(two, 0, 100))) > 1
    versions = versions_of(filesystem, history.records, b"file")
    assert [version.roots for version in versions] == [(0, 1)]


def test_symlinks_and_replaced_kinds_are_versions() -> None:
    """Promise: a new target of a symlink, or another file type at the path, is a new version."""
    history = History(0, small_files=0)
    live, filesystem = history.live, history.filesystem
    for number, target in enumerate((b"one", b"two", b"one")):
        live.symlink(1, b"link", target, 0, 0)
        filesystem.apply(CreateSnapshot(f"s{number}"))
        live.reclaim(live.unlink(1, b"link").ino)
    live.create(1, b"link", 0o040755, 0, 0)
    filesystem.apply(CreateSnapshot("directory"))
    live.rmdir(1, b"link")
    live.create(1, b"link", 0o010644, 0, 0)
    filesystem.apply(CreateSnapshot("pipe"))
    versions = versions_of(filesystem, history.records, b"link")
    assert [(version.kind, version.roots) for version in versions] == [
        ("symlink", (0, 2)),
        ("symlink", (1,)),
        ("directory", (3,)),
        ("other", (4,)),
    ]
