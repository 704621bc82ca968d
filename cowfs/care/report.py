"""What a check of an image found, as values: findings, counts, progress.

A finding names the promise that is broken (DESIGN.md "Invariants"; "C9" for bytes that are not what
was written), where, and what is wrong in one line. An image is clean when no finding is an error.
The number of findings kept is bounded; those left off are counted.
"""

from dataclasses import dataclass, replace
from typing import Literal

Severity = Literal["error", "warning"]

FINDINGS_MAX = 1000


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        severity: "error" breaks a promise; "warning" is worth knowing and harms nothing.
        invariant: "I1" to "I7", or "C9" for damaged or unreadable bytes.
        what: the fault, in words, with the value found and the value expected.
        root: what it belongs to: "volume main", "snapshot x", "catalog", "space map", "superblock".
            Of nodes that several roots share, the first root that reaches them.
        path: of the file, from the root directory of that root, escaped (escapes.py); "" if unknown.
        ino: of the file, 0 where it is no matter of one file.
        block: the first block concerned, None where there is none.
        repairable: `repair_image` can mend it, from what is intact elsewhere in the image.
    """

    severity: Severity
    invariant: str
    what: str
    root: str = ""
    path: str = ""
    ino: int = 0
    block: int | None = None
    repairable: bool = False

    def __str__(self) -> str:
        places = [self.root] if self.root else []
        if self.path:
            places.append(self.path)
        if self.ino:
            places.append(f"inode {self.ino}")
        if self.block is not None:
            places.append(f"block {self.block}")
        place = ", ".join(places)
        return f"{self.severity} {self.invariant}: {place + ': ' if place else ''}{self.what}"


@dataclass(frozen=True, slots=True)
class CheckProgress:
    """How far a check is. `total_blocks` is what the superblock counts as used."""

    stage: str
    done_blocks: int
    total_blocks: int


@dataclass(frozen=True, slots=True)
class CheckReport:
    """The result of a check. Counts are of distinct things: what roots share counts once.

    Attributes:
        findings: in the order in which they were met, at most FINDINGS_MAX.
        findings_left_off: how many more there were.
        roots: volumes, snapshots and entries of the drop queue that were walked.
        nodes: distinct nodes read, of the catalog and of all trees.
        inodes: inode items in distinct leaves.
        data_blocks: distinct blocks that extents point at.
        used_blocks: blocks with at least one reference, as counted by the walk.
        system_blocks: rings, refcount pages and index pages.
        verified_blocks: data blocks whose checksum was computed, 0 when data was left out.
        retained_generations: earlier generations that were walked too (I2).
    """

    generation: int
    findings: tuple[Finding, ...]
    findings_left_off: int
    roots: int
    nodes: int
    inodes: int
    data_blocks: int
    used_blocks: int
    system_blocks: int
    verified_blocks: int
    retained_generations: tuple[int, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == "warning")

    @property
    def clean(self) -> bool:
        """No promise is broken; warnings may remain."""
        return not self.errors and not self.findings_left_off


class Findings:
    """Collects findings: each text once, no more than FINDINGS_MAX."""

    def __init__(self) -> None:
        self.root = ""
        self.left_off = 0
        self._found: list[Finding] = []
        self._seen: set[tuple[str, str, int, int | None]] = set()

    def __len__(self) -> int:
        return len(self._found)

    def add(self, finding: Finding) -> None:
        identity = (finding.invariant, finding.what, finding.ino, finding.block)
        if identity in self._seen:
            return
        if len(self._found) >= FINDINGS_MAX:
            self.left_off += 1
            return
        self._seen.add(identity)
        self._found.append(finding)

    def error(
        self,
        invariant: str,
        what: str,
        *,
        block: int | None = None,
        ino: int = 0,
        path: str = "",
        repairable: bool = False,
    ) -> None:
        self.add(Finding("error", invariant, what, self.root, path, ino, block, repairable))

    def warning(self, invariant: str, what: str, *, block: int | None = None) -> None:
        self.add(Finding("warning", invariant, what, self.root, block=block))

    def without_path(self, first: int) -> set[int]:
        """The inodes of the findings from number `first` on that name an inode but no path."""
        return {found.ino for found in self._found[first:] if found.ino and not found.path}

    def give_paths(self, first: int, paths: dict[int, str]) -> None:
        """Write the paths, by inode, into the findings from number `first` on."""
        for number in range(first, len(self._found)):
            found = self._found[number]
            if found.ino in paths and not found.path:
                self._found[number] = replace(found, path=paths[found.ino])

    def all(self) -> tuple[Finding, ...]:
        return tuple(self._found)
