"""The result of a check, as values: findings, counts, progress.

A finding says which promise is broken (DESIGN.md "Invariants"; "C9" for bytes that are not what was
written), where, and in one line what is wrong. An image is clean if no finding is an error. At most
FINDINGS_MAX findings are kept; the others are counted.
"""

from dataclasses import dataclass, replace
from typing import Literal

from cowfs.storage.overlay import ReplayReport

Severity = Literal["error", "warning"]

FINDINGS_MAX = 1000


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault of an image.

    Attributes:
        severity: "error": a promise is broken. "warning": worth knowing, but harmless.
        invariant: "I1" to "I7", "C9" for damaged or unreadable bytes, or "C2" for calls of the log
            that cannot be made again.
        what: the fault, in words, with the value found and the value expected.
        root: where it is: "volume main", "snapshot x", "catalog", "space map", "superblock". For a
            node that several roots share, the first root that was walked.
        path: of the file in that root, escaped (escapes.py); "" if unknown.
        ino: of the file; 0 if the fault is not about one file.
        block: the first block concerned; None if there is none.
        repairable: `repair_image` can fix it from other parts of the image that are intact.
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
    """How far a check is.

    Attributes:
        stage: the root being walked, as in `Finding.root`.
        total_blocks: the number of used blocks that the superblock counts.
    """

    stage: str
    done_blocks: int
    total_blocks: int


@dataclass(frozen=True, slots=True)
class CheckReport:
    """The result of a check. All numbers are of distinct things: what roots share counts once.

    Attributes:
        findings: in the order in which they were found, at most FINDINGS_MAX.
        findings_left_off: how many findings were not kept.
        roots: volumes, snapshots and entries of the drop queue that were walked.
        nodes: nodes read, of the catalog and of all trees.
        inodes: inode items in distinct leaves.
        data_blocks: blocks that extents point at.
        used_blocks: blocks with at least one reference, as counted by the walk.
        system_blocks: blocks of the rings, of the log, refcount pages and index pages.
        verified_blocks: data blocks whose checksum was computed; 0 if data was not verified.
        retained_generations: the earlier generations that were checked too (I2).
        replay: what became of the log, if the image was checked with its log in memory; the
            generation is then one that only the memory has.
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
    replay: ReplayReport | None = None

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == "warning")

    @property
    def clean(self) -> bool:
        """Whether no promise is broken; there may be warnings."""
        return not self.errors and not self.findings_left_off


class Findings:
    """Collects at most FINDINGS_MAX findings, equal ones once.

    Attributes:
        root: the `root` of the findings that are added next.
        left_off: how many findings were not kept.
    """

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
        """The inode numbers in findings from number `first` on that have an inode but no path."""
        return {found.ino for found in self._found[first:] if found.ino and not found.path}

    def give_paths(self, first: int, paths: dict[int, str]) -> None:
        """Set the path, given by inode number, of the findings from number `first` on."""
        for number in range(first, len(self._found)):
            found = self._found[number]
            if found.ino in paths and not found.path:
                self._found[number] = replace(found, path=paths[found.ino])

    def all(self) -> tuple[Finding, ...]:
        return tuple(self._found)
