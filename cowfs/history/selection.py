"""Which snapshots a person means: names, comma lists and ranges, as `zfs destroy` takes them.

`a%d` is everything from a to d, both included, in the order of creation; `%d` begins at the oldest,
`a%` ends at the newest, `%` is all. Pure functions over anything with a name, the oldest first. No
snapshot name contains `%` or `,` (records.py), so a word can be read in one way only.
"""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Protocol, TypeVar

from cowfs.errors import SnapshotError, UsageError


class Named(Protocol):
    """A snapshot as far as this file cares: a record or a report."""

    @property
    def name(self) -> str: ...


Snapshot = TypeVar("Snapshot", bound=Named)

NEAR_NAMES_MAX = 3
NAMES_COMPARED_MAX = 2000  # each costs about 20 us


def select(words: Iterable[str], snapshots: Sequence[Snapshot]) -> list[Snapshot]:
    """The snapshots that the words name, each once, in the order of `snapshots`.

    Args:
        words: names, ranges, and comma lists of both.
        snapshots: all there are, the oldest first.

    Raises:
        UsageError: a word is empty, or has more than one `%`.
        SnapshotError: an unknown name, a range that runs backwards, or a `%` with no snapshots.
    """
    positions = {snapshot.name: index for index, snapshot in enumerate(snapshots)}
    chosen: set[int] = set()
    for word in words:
        for part in word.split(","):
            chosen.update(_range(part, word, positions))
    return [snapshots[index] for index in sorted(chosen)]


def unknown(name: str, names: Iterable[str]) -> SnapshotError:
    """The error for a name that no snapshot has, with those of `names` that look like it."""
    import difflib

    near = difflib.get_close_matches(name, list(islice(names, NAMES_COMPARED_MAX)), NEAR_NAMES_MAX)
    hint = f" (there is {', '.join(map(repr, near))})" if near else ""
    return SnapshotError(f"there is no snapshot {name!r}{hint}; cowfs snapshot list shows them")


def _range(part: str, word: str, positions: dict[str, int]) -> range:
    if not part:
        raise UsageError(
            "a snapshot name must not be empty" if not word else f"an empty name in {word!r}"
        )
    first, separator, last = part.partition("%")
    if not separator:
        index = _position(part, positions)
        return range(index, index + 1)
    if "%" in last:
        raise UsageError(f"a range has one %, as in first%last: {part!r}")
    if not positions:
        raise SnapshotError(f"there are no snapshots for {part!r}")
    start = _position(first, positions) if first else 0
    stop = _position(last, positions) if last else len(positions) - 1
    if start > stop:
        raise SnapshotError(f"{first!r} is newer than {last!r}; a range is oldest%newest")
    return range(start, stop + 1)


def _position(name: str, positions: dict[str, int]) -> int:
    index = positions.get(name)
    if index is None:
        raise unknown(name, positions)
    return index
