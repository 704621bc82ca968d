"""What a salvage found, copied and could not copy, as values."""

from collections.abc import Callable
from dataclasses import dataclass, field

from cowfs.care.copyout import Path
from cowfs.escapes import escaped

LISTED_MAX = 10_000  # entries in each list of a report; the rest is only counted
Progress = Callable[[str, int, int], None]  # what is being done, amount done, amount in all


@dataclass(slots=True)
class SalvageReport:
    """What a salvage found and copied.

    Attributes:
        source: where the roots were found.
        roots: names of the volumes and snapshots that were read.
        files, directories, others: how many were made; with `dry_run`, how many would be.
        bytes_copied: file data written.
        paths: every path that would be made, relative to the destination; only with `dry_run`.
        damaged: files with holes where data could not be read: path, and byte ranges (start, end).
        lost: paths of directory entries whose inode could not be read.
        problems: every other difference between the image and the copy, one sentence each.
        left_off: how many entries were left out because their list already held LISTED_MAX.
    """

    source: str = ""
    roots: list[str] = field(default_factory=list)
    files: int = 0
    directories: int = 0
    others: int = 0
    bytes_copied: int = 0
    paths: list[str] = field(default_factory=list)
    damaged: list[tuple[str, list[tuple[int, int]]]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    left_off: int = 0

    @property
    def complete(self) -> bool:
        """Whether everything below the roots was copied unchanged."""
        return not (self.damaged or self.lost or self.problems or self.left_off)

    def note(self, problem: str) -> None:
        self._add(self.problems, problem)

    def note_lost(self, path: Path) -> None:
        self._add(self.lost, shown(path))

    def note_path(self, path: Path) -> None:
        self._add(self.paths, shown(path))

    def note_damaged(self, path: Path, ranges: list[tuple[int, int]]) -> None:
        if len(self.damaged) < LISTED_MAX:
            self.damaged.append((shown(path), ranges[:LISTED_MAX]))
        else:
            self.left_off += 1

    def _add(self, entries: list[str], entry: str) -> None:
        if len(entries) < LISTED_MAX:
            entries.append(entry)
        else:
            self.left_off += 1


def shown(path: Path) -> str:
    """A path as text, its components escaped (escapes.py)."""
    return "/".join(map(escaped, path))
