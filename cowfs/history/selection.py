"""Which snapshots a user means: names, patterns, comma lists and ranges.

`a%d` is every snapshot from a to d, both included, in the order of creation; `%d` begins at the
oldest, `a%` ends at the newest, `%` is all, as in `zfs destroy`. `auto-*` is a shell pattern: `*`,
`?` and `[...]` match whole names. The functions are pure, and take anything with a name, oldest
first. No snapshot name contains `%` or `,` (records.py), and a word that is the name of a snapshot
is not a pattern. So each word has one meaning.
"""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from itertools import islice
from typing import Protocol, TypeVar

from cowfs.errors import SnapshotError, UsageError
from cowfs.escapes import quoted


class Named(Protocol):
    """What this file needs of a snapshot: a record or a report."""

    @property
    def name(self) -> str: ...


Snapshot = TypeVar("Snapshot", bound=Named)

NEAR_NAMES_MAX = 3
NAMES_COMPARED_MAX = 2000  # each costs about 20 us


def select(words: Iterable[str], snapshots: Sequence[Snapshot]) -> list[Snapshot]:
    """The snapshots that `words` name, each once, in the order of `snapshots`.

    Args:
        words: names, patterns, ranges, and comma lists of them.
        snapshots: all snapshots, oldest first.

    Raises:
        UsageError: a word is empty, has more than one `%`, or has a pattern at an end of a range.
        SnapshotError: an unknown name, a pattern that no name matches, a range that runs backwards,
            or a `%` where there are no snapshots.
    """
    positions = {snapshot.name: index for index, snapshot in enumerate(snapshots)}
    chosen: set[int] = set()
    for word in words:
        for part in word.split(","):
            chosen.update(_positions(part, word, positions))
    return [snapshots[index] for index in sorted(chosen)]


def is_pattern(word: str) -> bool:
    """Whether a word that is not the name of a snapshot is a pattern."""
    return any(character in word for character in "*?[")


def unknown(name: str, names: Iterable[str]) -> SnapshotError:
    """The error for an unknown name, with those of `names` that look like it."""
    import difflib

    near = difflib.get_close_matches(name, list(islice(names, NAMES_COMPARED_MAX)), NEAR_NAMES_MAX)
    hint = f" (there is {', '.join(map(quoted, near))})" if near else ""
    return SnapshotError(
        f"there is no snapshot {quoted(name)}{hint}; cowfs snapshot list shows them"
    )


def _positions(part: str, word: str, positions: dict[str, int]) -> Sequence[int]:
    if not part:
        raise UsageError(
            "a snapshot name must not be empty" if not word else f"an empty name in {quoted(word)}"
        )
    first, separator, last = part.partition("%")
    if not separator:
        if part in positions or not is_pattern(part):
            return [_position(part, positions)]
        return _matching(part, positions)
    if "%" in last:
        raise UsageError(f"a range has one %, as in first%last: {quoted(part)}")
    if not positions:
        raise SnapshotError(f"there are no snapshots for {quoted(part)}")
    for end in (first, last):
        if end not in positions and is_pattern(end):
            raise UsageError(f"a range has names at its ends, no patterns: {quoted(part)}")
    start = _position(first, positions) if first else 0
    stop = _position(last, positions) if last else len(positions) - 1
    if start > stop:
        raise SnapshotError(
            f"{quoted(first)} is newer than {quoted(last)}; a range is oldest%newest"
        )
    return range(start, stop + 1)


def _matching(pattern: str, positions: dict[str, int]) -> list[int]:
    found = [index for name, index in positions.items() if fnmatchcase(name, pattern)]
    if not found:
        raise SnapshotError(
            f"no snapshot matches {quoted(pattern)}; cowfs snapshot list shows them"
        )
    return found


def _position(name: str, positions: dict[str, int]) -> int:
    index = positions.get(name)
    if index is None:
        raise unknown(name, positions)
    return index
