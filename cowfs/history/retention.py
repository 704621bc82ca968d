"""Which snapshots stay: rules by count and age, as `restic forget` has them, and holds.

A rule says what to keep; a command acts on the rest. The newest snapshot of an hour, a day, a week,
a month or a year (by the local clock) stands for it, and only those that have a snapshot count:
`keep_daily = 7` reaches further back than a week when there were days without. The rules look at all
the snapshots that the words of the command name, so a snapshot that stays for one reason counts for
the other rules too. One that is held always stays. So does one whose date is still to come, made
while a clock was wrong: how old it is cannot be told, so no rule deletes it, counts it, or measures
from it. Pure functions over anything with a name, a time and a hold, the oldest first.
"""

import re
import time
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Protocol, TypeVar

from cowfs.errors import SnapshotError, UsageError
from cowfs.escapes import quoted
from cowfs.history.selection import Named, select

SECOND_NS = 10**9
DAY_NS = 86_400 * SECOND_NS
DURATION_NS_MAX = 1000 * 365 * DAY_NS

# The units of a duration. A month has 30 days, a year 365.
UNITS_NS = {
    "y": 365 * DAY_NS,
    "m": 30 * DAY_NS,
    "w": 7 * DAY_NS,
    "d": DAY_NS,
    "h": 3600 * SECOND_NS,
    "min": 60 * SECOND_NS,
    "s": SECOND_NS,
}
_SHOWN_UNITS = ("d", "h", "min", "s")  # those that are the same length for everybody
_UNIT_WORDS = "|".join(UNITS_NS)
_PART = re.compile(rf"([0-9]{{1,9}})({_UNIT_WORDS})(?![a-z])")
_DURATION = re.compile(rf"(?:[0-9]{{1,9}}(?:{_UNIT_WORDS})(?![a-z]))+")

FUTURE = "dated in the future"  # the reason that keeps what is newer than now


@dataclass(frozen=True, slots=True)
class Rules:
    """What stays. 0, None and () are no rule.

    `keep_within_ns` reaches back from the newest snapshot that somebody made, so that it does not
    lose its effect when no new ones are made: neither one dated in the future nor an automatic one of
    a rollback makes the others look old. `older_than_ns` reaches back from now. `keep` has names and
    patterns.
    """

    keep_last: int = 0
    keep_hourly: int = 0
    keep_daily: int = 0
    keep_weekly: int = 0
    keep_monthly: int = 0
    keep_yearly: int = 0
    keep_within_ns: int = 0
    older_than_ns: int | None = None
    keep: tuple[str, ...] = ()

    @property
    def any(self) -> bool:
        """Whether there is any rule."""
        return self != Rules()


class Dated(Named, Protocol):
    """A snapshot as far as this file cares: a record or a report."""

    @property
    def created_ns(self) -> int: ...

    @property
    def automatic(self) -> bool: ...

    @property
    def held(self) -> bool: ...


Snapshot = TypeVar("Snapshot", bound=Dated)


def parse_duration(text: str) -> int:
    """A length of time in nanoseconds: 30d, 12h, 2w, 1y6m; units are y, m (30 days), w, d, h, min, s.

    Raises:
        UsageError: it is none, or longer than a thousand years.
    """
    if not _DURATION.fullmatch(text):
        raise UsageError(f"{quoted(text, 40)} is not a duration such as 12h, 30d, 2w or 1y6m")
    total_ns = sum(int(count) * UNITS_NS[unit] for count, unit in _PART.findall(text))
    if total_ns > DURATION_NS_MAX:
        raise UsageError(f"{quoted(text, 40)} is longer than a thousand years")
    return total_ns


def choose(
    words: Iterable[str], rules: Rules, snapshots: Sequence[Snapshot], now_ns: int
) -> list[Snapshot]:
    """The snapshots that a command with these words and rules acts on, the oldest first.

    Without words and without a rule there are none. Raises as `divide`.
    """
    return divide(words, rules, snapshots, now_ns)[0]


def divide(
    words: Iterable[str], rules: Rules, snapshots: Sequence[Snapshot], now_ns: int
) -> tuple[list[Snapshot], dict[str, tuple[str, ...]]]:
    """The same, and of those that the words name but the rules keep, the reasons by name.

    Args:
        words: as `select` takes them; none stands for all snapshots if there is any rule.
        rules: without any, all that the words name is chosen, held or not.
        snapshots: all there are, the oldest first.
        now_ns: the time of now.

    Raises:
        UsageError, SnapshotError: as `select`; also for a word of `rules.keep` that no snapshot has
            or matches, since what it was to save would be lost to a slip of the keyboard.
    """
    listed = list(words)
    if not rules.any:
        return select(listed, snapshots), {}
    named = select(listed, snapshots) if listed else list(snapshots)
    keep = {snapshot.name for snapshot in select(rules.keep, snapshots)}
    reasons = _reasons(rules, keep, named, now_ns)
    return [snapshot for snapshot in named if snapshot.name not in reasons], reasons


def require_released(snapshots: Iterable[Dated]) -> None:
    """Refuse to delete what is held.

    Raises:
        SnapshotError: it names every one that is.
    """
    names = [repr(snapshot.name) for snapshot in snapshots if snapshot.held]
    if len(names) == 1:
        raise SnapshotError(f"snapshot {names[0]} is held; cowfs snapshot release it first")
    if names:
        raise SnapshotError(
            f"snapshots {', '.join(names)} are held; cowfs snapshot release them first"
        )


def _reasons(
    rules: Rules, names: Set[str], snapshots: Sequence[Snapshot], now_ns: int
) -> dict[str, tuple[str, ...]]:
    """Why each of the snapshots that must stay does, by name, the oldest first.

    Args:
        names: those that `rules.keep` stands for.
        snapshots: that the rules look at, the oldest first.
    """
    reasons: dict[str, list[str]] = {snapshot.name: [] for snapshot in snapshots}

    def keep(found: Iterable[Snapshot], reason: str) -> None:
        for snapshot in found:
            reasons[snapshot.name].append(reason)

    past = [snapshot for snapshot in snapshots if snapshot.created_ns <= now_ns]
    if rules.keep_last:
        keep(past[-rules.keep_last :], "last")
    for reason, count, period in (
        ("hourly", rules.keep_hourly, _hour),
        ("daily", rules.keep_daily, _day),
        ("weekly", rules.keep_weekly, _week),
        ("monthly", rules.keep_monthly, _month),
        ("yearly", rules.keep_yearly, _year),
    ):
        keep(_newest_of_each(past, period, count), reason)
    if rules.keep_within_ns and past:
        made = [snapshot for snapshot in past if not snapshot.automatic] or past
        newest_ns = max(snapshot.created_ns for snapshot in made)
        keep(
            _not_before(past, newest_ns - rules.keep_within_ns),
            f"within {_duration_text(rules.keep_within_ns)}",
        )
    keep((snapshot for snapshot in snapshots if snapshot.held), "held")
    keep((snapshot for snapshot in snapshots if snapshot.name in names), "named")
    if rules.older_than_ns is not None:
        keep(
            _not_before(past, now_ns - rules.older_than_ns),
            f"newer than {_duration_text(rules.older_than_ns)}",
        )
    keep((snapshot for snapshot in snapshots if snapshot.created_ns > now_ns), FUTURE)
    return {name: tuple(found) for name, found in reasons.items() if found}


# --- time -----------------------------------------------------------------------------------------

Period = tuple[int, ...]
SECONDS_MAX = 1 << 40  # some 34,000 years around 1970


def _newest_of_each(
    snapshots: Sequence[Snapshot], period: Callable[[time.struct_time], Period], count: int
) -> list[Snapshot]:
    """Of each of the `count` newest periods that have a snapshot, the newest one."""
    found: dict[Period, Snapshot] = {}
    # By their times, whatever the clock did between them; of equal ones the last made is the newest.
    order = sorted(range(len(snapshots)), key=lambda index: (snapshots[index].created_ns, index))
    for index in reversed(order):
        if len(found) == count:
            break
        snapshot = snapshots[index]
        found.setdefault(period(_local(snapshot.created_ns)), snapshot)
    return list(found.values())


def _local(time_ns: int) -> time.struct_time:
    # A record may say any number; no clock reaches what is cut off here.
    seconds = min(max(time_ns // SECOND_NS, -SECONDS_MAX), SECONDS_MAX)
    return time.localtime(seconds)


def _not_before(snapshots: Sequence[Snapshot], limit_ns: int) -> list[Snapshot]:
    return [snapshot for snapshot in snapshots if snapshot.created_ns >= limit_ns]


def _hour(local: time.struct_time) -> Period:
    # With the offset the two hours of one number in autumn are two.
    return local.tm_year, local.tm_yday, local.tm_hour, local.tm_gmtoff


def _day(local: time.struct_time) -> Period:
    return local.tm_year, local.tm_yday


def _week(local: time.struct_time) -> Period:
    # Not by datetime.date, which ends with the year 9999.
    year, week = time.strftime("%G %V", local).split()
    return int(year), int(week)


def _month(local: time.struct_time) -> Period:
    return local.tm_year, local.tm_mon


def _year(local: time.struct_time) -> Period:
    return (local.tm_year,)


def _duration_text(duration_ns: int) -> str:
    """A duration as `parse_duration` reads it, in days and smaller units."""
    parts = []
    for unit in _SHOWN_UNITS:
        count, duration_ns = divmod(duration_ns, UNITS_NS[unit])
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts) or "0s"
