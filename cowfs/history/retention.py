"""Which snapshots to keep: rules by count and age, as in `restic forget`, and holds.

A rule says what to keep; a command acts on the other snapshots. Of each hour, day, week, month or
year (by the local clock), a rule keeps the newest snapshot. It counts only periods that have a
snapshot: `keep_daily = 7` reaches back further than a week if some days have none. The rules look
at all snapshots that the words of the command name: a snapshot kept by one rule counts for the
others too.

Two kinds of snapshots are always kept: held ones, and those dated in the future, which were made
while a clock was wrong. The age of the latter is unknown, so no rule deletes them, counts them, or
measures from them. The functions are pure, and take anything with a name, a time and a hold, oldest
first.
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
_SHOWN_UNITS = ("d", "h", "min", "s")  # units whose length is never in doubt
_UNIT_WORDS = "|".join(UNITS_NS)
_PART = re.compile(rf"([0-9]{{1,9}})({_UNIT_WORDS})(?![a-z])")
_DURATION = re.compile(rf"(?:[0-9]{{1,9}}(?:{_UNIT_WORDS})(?![a-z]))+")

FUTURE = "dated in the future"  # the reason to keep a snapshot that is newer than now


@dataclass(frozen=True, slots=True)
class Rules:
    """What to keep. 0, None and () mean: no such rule.

    Attributes:
        keep_last: number of the newest snapshots.
        keep_hourly, keep_daily, keep_weekly, keep_monthly, keep_yearly: number of periods.
        keep_within_ns: keep what is not older than this, measured from the newest snapshot that is
            neither automatic nor dated in the future. So the rule goes on keeping snapshots when no
            new ones are made, and a rollback does not make the others look old.
        older_than_ns: keep what is not older than this, measured from now.
        keep: names and patterns.
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
        """Whether there is a rule."""
        return self != Rules()


class Dated(Named, Protocol):
    """What this file needs of a snapshot: a record or a report."""

    @property
    def created_ns(self) -> int: ...

    @property
    def automatic(self) -> bool: ...

    @property
    def held(self) -> bool: ...


Snapshot = TypeVar("Snapshot", bound=Dated)


def parse_duration(text: str) -> int:
    """Parse a duration such as 30d, 12h, 2w or 1y6m into nanoseconds.

    The units are y (365 days), m (30 days), w, d, h, min and s.

    Raises:
        UsageError: the text is not a duration, or is longer than a thousand years.
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
    """The snapshots that a command with these words and rules acts on, oldest first.

    Without words and rules there are none. Arguments and errors are those of `divide`.
    """
    return divide(words, rules, snapshots, now_ns)[0]


def divide(
    words: Iterable[str], rules: Rules, snapshots: Sequence[Snapshot], now_ns: int
) -> tuple[list[Snapshot], dict[str, tuple[str, ...]]]:
    """Divide the named snapshots into those to act on and those that the rules keep.

    Args:
        words: as for `select`; no words mean all snapshots if there is a rule.
        rules: without a rule nothing is kept, held or not.
        snapshots: all snapshots, oldest first.
        now_ns: the current time.

    Returns:
        The snapshots to act on, oldest first; and for each kept snapshot, by name, the reasons.

    Raises:
        UsageError, SnapshotError: as `select`. Also for a word in `rules.keep` that names no
            snapshot: a typing error would otherwise lose the snapshot that the word was meant to
            save.
    """
    listed = list(words)
    if not rules.any:
        return select(listed, snapshots), {}
    named = select(listed, snapshots) if listed else list(snapshots)
    keep = {snapshot.name for snapshot in select(rules.keep, snapshots)}
    reasons = _reasons(rules, keep, named, now_ns)
    return [snapshot for snapshot in named if snapshot.name not in reasons], reasons


def require_released(snapshots: Iterable[Dated]) -> None:
    """Refuse to delete held snapshots.

    Raises:
        SnapshotError: some are held; the message names all of them.
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
    """The reasons to keep each snapshot that is kept, by name, oldest first.

    Args:
        names: of the snapshots that `rules.keep` stands for.
        snapshots: that the rules look at, oldest first.
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
SECONDS_MAX = 1 << 40  # about 34,000 years before or after 1970


def _newest_of_each(
    snapshots: Sequence[Snapshot], period: Callable[[time.struct_time], Period], count: int
) -> list[Snapshot]:
    """The newest snapshot of each of the `count` newest periods that have one."""
    found: dict[Period, Snapshot] = {}
    # By time, as the clock may have been set back; of equal times, the one made last is the newest.
    order = sorted(range(len(snapshots)), key=lambda index: (snapshots[index].created_ns, index))
    for index in reversed(order):
        if len(found) == count:
            break
        snapshot = snapshots[index]
        found.setdefault(period(_local(snapshot.created_ns)), snapshot)
    return list(found.values())


def _local(time_ns: int) -> time.struct_time:
    # A damaged record may have any number; no real time is cut off here.
    seconds = min(max(time_ns // SECOND_NS, -SECONDS_MAX), SECONDS_MAX)
    return time.localtime(seconds)


def _not_before(snapshots: Sequence[Snapshot], limit_ns: int) -> list[Snapshot]:
    return [snapshot for snapshot in snapshots if snapshot.created_ns >= limit_ns]


def _hour(local: time.struct_time) -> Period:
    # The offset tells the two hours with one number apart when the clock is set back in autumn.
    return local.tm_year, local.tm_yday, local.tm_hour, local.tm_gmtoff


def _day(local: time.struct_time) -> Period:
    return local.tm_year, local.tm_yday


def _week(local: time.struct_time) -> Period:
    # datetime.date ends with the year 9999.
    year, week = time.strftime("%G %V", local).split()
    return int(year), int(week)


def _month(local: time.struct_time) -> Period:
    return local.tm_year, local.tm_mon


def _year(local: time.struct_time) -> Period:
    return (local.tm_year,)


def _duration_text(duration_ns: int) -> str:
    """Format a duration as `parse_duration` reads it, in days and smaller units."""
    parts = []
    for unit in _SHOWN_UNITS:
        count, duration_ns = divmod(duration_ns, UNITS_NS[unit])
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts) or "0s"
