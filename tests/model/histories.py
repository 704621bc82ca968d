"""Random histories, for tests that examine their result: no model of the content is kept.

`History(seed)` makes an image in memory and lets a user work on it: files with data and small ones,
hard links, directories, renames, blocks shared within a file, between files and out of snapshots,
overwritten middles, holes, truncation, files deleted while open; snapshots, deletions of which the
drop queue did only a part, rollback and undo. The same seed gives the same history.
"""

import random
import stat
from collections.abc import Callable
from contextlib import suppress

from cowfs.files.calls import Changes
from cowfs.files.content import KEEP_SIZE, PUNCH_HOLE
from cowfs.files.items import ROOT_INO
from cowfs.files.volume import Volume
from cowfs.history.edits import CreateSnapshot, DeleteSnapshots, Rollback, Undo
from cowfs.history.filesystem import Filesystem
from cowfs.history.images import make_filesystem, open_filesystem
from cowfs.history.records import RootRecord
from cowfs.storage.format import BLOCK_SIZE_BYTES
from tests.model.devices import MemoryDevice

TOTAL_BLOCKS = 16384
SNAPSHOTS_MAX = 9
FILE_BLOCKS_MAX = 24
Entry = tuple[int, bytes, int, bool]  # directory, name, inode, whether it is a directory


class History:
    """One image and the random user who works on it.

    Args:
        seed: of all random choices.
        linear: without rollback, undo and sharing out of snapshots.
        copies: number of copies of metadata; random when None.
        small_files: number of files made at the start, seven to a leaf; random when None. From 1700
            on the tree has three levels.
    """

    def __init__(
        self,
        seed: int,
        *,
        linear: bool = False,
        copies: int | None = None,
        small_files: int | None = None,
        total_blocks: int = TOTAL_BLOCKS,
    ) -> None:
        self.choice = random.Random(seed)
        self.disk = MemoryDevice(total_blocks)
        twice = self.choice.random() < 0.5 if copies is None else copies == 2
        make_filesystem(self.disk, label="history", duplicate_metadata=twice)
        self.filesystem = open_filesystem(self.disk, writable=True)
        self.made = 0
        self._steps: list[tuple[Callable[[], None], int]] = [
            (self.write_new, 10),
            (self.write_small, 3),
            (self.make_directory, 3),
            (self.link, 5),
            (self.rename, 4),
            (self.overwrite, 6),
            (self.punch, 4),
            (self.truncate, 3),
            (self.unlink, 5),
            (self.reclaim, 2),
            (self.share_in_live, 6),
            (self.snapshot, 7),
            (self.delete, 4),
            (self.drop_some, 4),
            (self.commit, 3),
        ]
        if not linear:
            self._steps += [(self.share_from_snapshot, 5), (self.rollback, 2), (self.undo, 1)]
        if small_files is None:
            small_files = self.choice.choice((0, 20, 60, 150))
        for _ in range(small_files):
            self._make_small(2048)

    @property
    def live(self) -> Volume:
        return self.filesystem.live

    @property
    def records(self) -> list[RootRecord]:
        return self.filesystem.catalog.snapshots()

    def run(self, steps: int) -> None:
        """Do some steps and a commit, so that nothing is in memory only."""
        actions, weights = zip(*self._steps, strict=True)
        for action in self.choice.choices(actions, weights, k=steps):
            action()
        self.commit()

    def fork(self, seed: int) -> "History":
        """Make another history that continues from this one's last commit, on its own device."""
        other = History(seed, small_files=0)
        other.disk = self.disk.copy()
        other.filesystem = open_filesystem(other.disk, writable=True)
        other.made = self.made
        return other

    def copy(self) -> Filesystem:
        """Open a copy of the committed state on its own device, where anything may be tried."""
        return open_filesystem(self.disk.copy(), writable=True)

    # --- what is there ----------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """Every name of the live volume."""
        found = []
        waiting = [int(ROOT_INO)]
        while waiting:
            directory = waiting.pop()
            for _, name in self.live.listing(directory):
                is_directory = name.type == stat.S_IFDIR >> 12
                found.append((directory, name.name, name.ino, is_directory))
                if is_directory:
                    waiting.append(name.ino)
        return sorted(found)

    def _directory(self) -> int:
        found = [ino for _, _, ino, is_directory in self.entries() if is_directory]
        return self.choice.choice([int(ROOT_INO), *found])

    def _ino(self) -> int | None:
        """A random file; one time in eight one without a name."""
        orphans = sorted(self.live.orphans)
        if orphans and not self.choice.randrange(8):
            return self.choice.choice(orphans)
        found = [entry[2] for entry in self.entries() if not entry[3]]
        large = [ino for ino in found if self.live.get(ino).data_blocks]
        found = large if large and self.choice.randrange(6) else found
        return self.choice.choice(found) if found else None

    def _name(self) -> bytes:
        self.made += 1
        return b"f%d" % self.made

    def _bytes(self, blocks: int) -> bytes:
        return self.choice.randbytes(blocks * BLOCK_SIZE_BYTES)

    # --- files ------------------------------------------------------------------------------------

    def write_new(self) -> None:
        ino = self.live.create(self._directory(), self._name(), 0o100644, 0, 0).ino
        size = self.choice.randint(2049, FILE_BLOCKS_MAX * BLOCK_SIZE_BYTES)
        self.live.write(ino, 0, self.choice.randbytes(size))

    def write_small(self) -> None:
        """Write up to a dozen small files, so that leaves fill up and trees grow levels."""
        for _ in range(self.choice.choice((1, 3, 12))):
            self._make_small(self.choice.choice((1, 700, 2048)))

    def _make_small(self, size: int) -> None:
        ino = self.live.create(ROOT_INO, self._name(), 0o100644, 0, 0).ino
        self.live.write(ino, 0, self.choice.randbytes(size))

    def make_directory(self) -> None:
        self.live.create(self._directory(), self._name(), 0o040755, 0, 0)

    def link(self) -> None:
        ino = self._ino()
        if ino is not None and self.live.get(ino).nlink:
            self.live.link(ino, self._directory(), self._name())

    def rename(self) -> None:
        entries = self.entries()
        if not entries:
            return
        directory, name, _, _ = self.choice.choice(entries)
        target = self.choice.choice(entries)
        new = target[1] if self.choice.random() < 0.3 else self._name()
        with suppress(OSError):  # such as into itself, or a directory onto a file
            self.live.rename(directory, name, self._directory(), new, 0)

    def overwrite(self) -> None:
        ino = self._ino()
        if ino is None:
            return
        for _ in range(self.choice.choice((1, 1, 3))):
            first = self.choice.randrange(FILE_BLOCKS_MAX)
            self.live.write(
                ino, first * BLOCK_SIZE_BYTES, self._bytes(self.choice.choice((1, 1, 2, 5)))
            )

    def punch(self) -> None:
        ino = self._ino()
        if ino is not None:
            first = self.choice.randrange(FILE_BLOCKS_MAX) * BLOCK_SIZE_BYTES
            size = self.choice.choice((1, 3, 9)) * BLOCK_SIZE_BYTES
            self.live.allocate(ino, PUNCH_HOLE | KEEP_SIZE, first, size)

    def truncate(self) -> None:
        ino = self._ino()
        if ino is not None:
            size = self.choice.randrange(self.live.get(ino).size_bytes + BLOCK_SIZE_BYTES)
            self.live.setattr(ino, Changes(size_bytes=size))

    def unlink(self) -> None:
        found = [entry for entry in self.entries() if not entry[3]]
        if not found:
            return
        large = [entry for entry in found if self.live.get(entry[2]).data_blocks]
        directory, name, _, _ = self.choice.choice(large if len(large) > 4 else found)
        inode = self.live.unlink(directory, name)
        if not inode.nlink and self.choice.random() < 0.6:
            self._reclaim(inode.ino)

    def reclaim(self) -> None:
        for ino in sorted(self.live.orphans):
            if self.choice.random() < 0.5:
                self._reclaim(ino)

    def _reclaim(self, ino: int) -> None:
        while not self.live.reclaim(ino):
            pass

    def share_in_live(self) -> None:
        """Share blocks within one file or between two."""
        source, target = self._ino(), self._ino()
        if source is not None and target is not None:
            if self.choice.random() < 0.3:
                target = source
            self._share(self.live, source, target)

    def share_from_snapshot(self) -> None:
        if not self.records:
            return
        volume = self.filesystem.volume(self.choice.choice(self.records).root_id)
        assert volume is not None
        found = [
            name.ino
            for _, name in volume.listing(ROOT_INO)
            if stat.S_ISREG(volume.get(name.ino).mode)
        ]
        if not found:
            return
        target = self._ino()
        if target is None or self.choice.random() < 0.5:
            target = self.live.create(ROOT_INO, self._name(), 0o100644, 0, 0).ino
        self._share(volume, self.choice.choice(sorted(found)), target)

    def _share(self, source: Volume, source_ino: int, target: int) -> None:
        blocks = [self.choice.randrange(12) for _ in range(2)]
        size = self.choice.choice((1, 4, FILE_BLOCKS_MAX)) * BLOCK_SIZE_BYTES
        start = 0 if self.choice.random() < 0.4 else blocks[0] * BLOCK_SIZE_BYTES
        with suppress(OSError):  # such as small files, or ranges that overlap
            self.live.reflink(source, source_ino, start, target, blocks[1] * BLOCK_SIZE_BYTES, size)

    # --- history ----------------------------------------------------------------------------------

    def snapshot(self) -> None:
        if len(self.records) < SNAPSHOTS_MAX:
            self.made += 1
            self.filesystem.apply(CreateSnapshot(f"s{self.made}"))

    def delete(self) -> None:
        """Delete one or two snapshots; the drop queue then does a part of its work or all of it."""
        names = [record.name for record in self.records]
        if len(names) > 2:
            chosen = self.choice.sample(names, self.choice.choice((1, 1, 2)))
            self.filesystem.apply(DeleteSnapshots(chosen))
            if self.choice.random() < 0.15:
                self.filesystem.work_drops()
            else:
                self.drop_some()

    def drop_some(self) -> None:
        self.filesystem.drops.step(self.choice.choice((1, 2, 5)))

    def rollback(self) -> None:
        if self.records and len(self.records) < SNAPSHOTS_MAX:
            name = self.choice.choice(self.records).name
            self.filesystem.apply(Rollback(name))

    def undo(self) -> None:
        with suppress(OSError):  # there is no rollback to undo
            self.filesystem.apply(Undo())

    def commit(self) -> None:
        self.filesystem.commit()
