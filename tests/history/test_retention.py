"""Promises about retention rules: what each keeps, why, and that only the rest is deleted."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowfs.errors import SnapshotError, UsageError
from cowfs.history.retention import (
    DAY_NS,
    FUTURE,
    SECOND_NS,
    Rules,
    choose,
    divide,
    parse_duration,
    require_released,
)

HOUR_NS = 3600 * SECOND_NS


@dataclass(frozen=True)
class Dated:
    name: str
    created_ns: int
    held: bool = False
    automatic: bool = False


@pytest.fixture(autouse=True)
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sets a local time zone with summer time, so that local time is not UTC."""
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def at(text: str) -> int:
    """The local time in `text`, such as 2026-01-05 12:00, in nanoseconds."""
    return int(datetime.fromisoformat(text).timestamp()) * SECOND_NS


def dated(*times: str) -> list[Dated]:
    """Snapshots made at these times, each named by its time."""
    return [Dated(text, at(text)) for text in times]


def kept(rules: Rules, snapshots: Sequence[Dated], now_ns: int) -> dict[str, tuple[str, ...]]:
    """The reasons for each snapshot that is kept, as a command gets them."""
    return divide((), rules, snapshots, now_ns)[1]


def staying(rules: Rules, snapshots: list[Dated], now: str = "2027-01-01") -> list[str]:
    return list(kept(rules, snapshots, at(now)))


# --- durations ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "days"),
    [("30d", 30), ("12h", 0.5), ("2w", 14), ("1y6m", 545), ("1m", 30), ("0d", 0), ("1d12h", 1.5)],
)
def test_duration_is_read_as_it_is_written(text: str, days: float) -> None:
    """Promise: years have 365 days, months 30, and units can be summed."""
    assert parse_duration(text) == days * DAY_NS


def test_duration_of_minutes_is_not_one_of_months() -> None:
    """Promise: `min` is a unit of its own, also beside `m`."""
    assert parse_duration("5min") == 300 * SECOND_NS
    assert parse_duration("1m1min1s") == 30 * DAY_NS + 61 * SECOND_NS


@pytest.mark.parametrize(
    "text",
    [
        "",
        "30",
        "d",
        "d30",
        "-1d",
        "1.5d",
        "1 d",
        "30D",
        "30days",
        "5mi",
        "1dx",
        "٣d",
        "1d\n",
        "1e3s",
    ],
)
def test_duration_that_is_none_is_refused_with_examples(text: str) -> None:
    """Promise: a malformed duration is refused, and the message shows valid ones."""
    with pytest.raises(UsageError, match="not a duration such as 12h, 30d, 2w or 1y6m"):
        parse_duration(text)


def test_duration_beyond_any_calendar_is_refused() -> None:
    """Promise: an absurdly large number is an error, not a rule that keeps all or nothing."""
    assert parse_duration("1000y") == 365_000 * DAY_NS
    with pytest.raises(UsageError, match="thousand years"):
        parse_duration("1001y")


# --- each rule ------------------------------------------------------------------------------------


def test_last_keeps_the_newest_in_the_order_of_creation() -> None:
    """Promise: a clock that once was wrong does not make an old snapshot the newest."""
    snapshots = dated(
        "2026-05-01 12:00", "2030-01-01 12:00", "2026-05-03 12:00", "2026-05-04 12:00"
    )
    now = "2030-02-01"
    assert staying(Rules(keep_last=2), snapshots, now) == ["2026-05-03 12:00", "2026-05-04 12:00"]
    assert len(staying(Rules(keep_last=9), snapshots, now)) == 4


def test_hours_and_days_are_those_of_the_local_clock() -> None:
    """Promise: hours and days are local; only those with a snapshot count; the newest stays."""
    snapshots = dated(
        "2026-05-01 09:00",
        "2026-05-04 00:30",  # the day before in UTC
        "2026-05-04 23:10",
        "2026-05-04 23:50",
        "2026-05-05 00:10",
    )
    assert staying(Rules(keep_daily=1), snapshots) == ["2026-05-05 00:10"]
    assert staying(Rules(keep_daily=2), snapshots) == ["2026-05-04 23:50", "2026-05-05 00:10"]
    assert staying(Rules(keep_daily=3), snapshots) == [
        "2026-05-01 09:00",
        "2026-05-04 23:50",
        "2026-05-05 00:10",
    ]
    assert staying(Rules(keep_hourly=3), snapshots) == [
        "2026-05-04 00:30",
        "2026-05-04 23:50",
        "2026-05-05 00:10",
    ]


def test_hour_that_comes_twice_in_autumn_is_two() -> None:
    """Promise: the hour that repeats when summer time ends counts as two."""
    summer_ns = at("2026-10-25 02:30")
    snapshots = [Dated("summer", summer_ns), Dated("winter", summer_ns + HOUR_NS)]
    assert time.localtime(summer_ns // SECOND_NS).tm_hour == 2
    assert time.localtime(summer_ns // SECOND_NS + 3600).tm_hour == 2
    assert staying(Rules(keep_hourly=2), snapshots) == ["summer", "winter"]
    assert staying(Rules(keep_daily=2), snapshots) == ["winter"]


def test_weeks_are_those_of_the_iso_calendar() -> None:
    """Promise: a week begins on Monday, and new year does not split it."""
    snapshots = dated(
        "2024-12-29 12:00", "2024-12-30 12:00", "2025-01-05 12:00", "2025-01-06 12:00"
    )
    assert staying(Rules(keep_weekly=9), snapshots) == [
        "2024-12-29 12:00",
        "2025-01-05 12:00",
        "2025-01-06 12:00",
    ]


def test_months_and_years_keep_the_last_of_each() -> None:
    """Promise: the same month of another year is another month."""
    snapshots = dated(
        "2024-05-02 12:00", "2025-05-01 12:00", "2025-05-31 23:59", "2025-06-01 00:00"
    )
    assert staying(Rules(keep_monthly=2), snapshots) == ["2025-05-31 23:59", "2025-06-01 00:00"]
    assert staying(Rules(keep_monthly=3), snapshots) == [
        "2024-05-02 12:00",
        "2025-05-31 23:59",
        "2025-06-01 00:00",
    ]
    assert staying(Rules(keep_yearly=2), snapshots) == ["2024-05-02 12:00", "2025-06-01 00:00"]


def test_within_reaches_back_from_the_newest() -> None:
    """Promise: `within` counts from the newest snapshot, so an idle filesystem loses none."""
    snapshots = dated("2026-01-01 12:00", "2026-01-02 12:00", "2026-01-03 12:00")
    rules = Rules(keep_within_ns=DAY_NS)
    assert staying(rules, snapshots, "2030-01-01") == ["2026-01-02 12:00", "2026-01-03 12:00"]
    ahead = [*snapshots, *dated("2040-01-01 12:00")]  # a snapshot made while the clock was wrong
    assert staying(rules, ahead, "2026-01-03 12:00") == [
        "2026-01-02 12:00",
        "2026-01-03 12:00",
        "2040-01-01 12:00",
    ]
    assert staying(rules, []) == []


def test_within_does_not_reach_back_from_a_rollback_or_a_wrong_date() -> None:
    """Promise: an automatic snapshot of today or one dated 2042 does not age the others."""
    rest = dated("2026-02-01 12:00", "2026-02-03 12:00")
    kept_by_rollback = Dated("auto", at("2026-05-05 12:00"), automatic=True)
    wrong = Dated("wrong", at("2042-01-01 12:00"))
    rules = Rules(keep_within_ns=30 * DAY_NS)
    for more in ([wrong], [kept_by_rollback], [kept_by_rollback, wrong]):
        names = [found.name for found in [*rest, *more]]
        assert staying(rules, [*rest, *more], "2026-05-06") == names
    assert kept(rules, [kept_by_rollback], at("2026-07-06")) == {"auto": ("within 30d",)}


def test_future_is_kept_by_any_rule_named_and_counts_for_none() -> None:
    """Promise: a snapshot dated in the future takes no other's place, and no rule deletes it."""
    times = ("2026-05-03 12:00", "2042-01-01 12:00", "2026-05-04 12:00", "2042-01-02 12:00")
    snapshots = dated(*times)
    now_ns = at("2026-05-04 12:00")  # the third snapshot's time: "now" is not in the future
    for rules in (
        Rules(keep_last=1),
        Rules(keep_hourly=1),
        Rules(keep_daily=1),
        Rules(keep_weekly=1, keep=("2026-05-04 12:00",)),
        Rules(keep_monthly=1),
        Rules(keep_yearly=1),
        Rules(keep_within_ns=SECOND_NS),
        Rules(older_than_ns=SECOND_NS),
        Rules(keep=("2026-05-04 12:00",)),
    ):
        reasons = kept(rules, snapshots, now_ns)
        assert list(reasons) == list(times[1:]), rules
        assert reasons[times[1]] == reasons[times[3]] == (FUTURE,)
        assert FUTURE not in reasons[times[2]]
    assert staying(Rules(keep_last=9), snapshots, "1970-01-02") == list(
        times
    )  # a clock that was reset


def test_time_beyond_any_calendar_is_a_time() -> None:
    """Promise: a record's date before the year 1 or after 9999 makes no command fail."""
    year_ns = 31_556_952 * SECOND_NS
    numbers = [-(1 << 200), -30_000 * year_ns, 0, 9_000 * year_ns, 30_000 * year_ns, 1 << 200]
    snapshots = [Dated(str(number), number) for number in numbers]
    everything = Rules(
        keep_hourly=9, keep_daily=9, keep_weekly=9, keep_monthly=9, keep_yearly=9, keep_within_ns=1
    )
    for now_ns in numbers:
        assert list(kept(everything, snapshots, now_ns)) == [str(number) for number in numbers]


def test_older_than_keeps_what_is_not_older_than_that_now() -> None:
    """Promise: age counts from now; a snapshot of exactly that age stays."""
    snapshots = dated("2026-01-01 12:00", "2026-01-02 12:00", "2026-01-03 12:00")
    rules = Rules(older_than_ns=DAY_NS)
    assert staying(rules, snapshots, "2026-01-03 12:00") == ["2026-01-02 12:00", "2026-01-03 12:00"]
    assert staying(rules, snapshots, "2026-02-01") == []
    assert staying(Rules(older_than_ns=0), snapshots, "2026-01-03 12:00") == ["2026-01-03 12:00"]


def test_every_reason_is_told() -> None:
    """Promise: each snapshot's line says everything that keeps it."""
    now_ns = at("2026-05-05 12:00")
    snapshots = [
        Dated("gone", now_ns - 100 * DAY_NS),
        Dated("auto-1", now_ns - 60 * DAY_NS, held=True),
        Dated("release", now_ns - 40 * DAY_NS),
        Dated("auto-2", now_ns - DAY_NS),
    ]
    rules = Rules(
        keep_last=1,
        keep_hourly=1,
        keep_daily=1,
        keep_weekly=1,
        keep_monthly=1,
        keep_yearly=1,
        keep_within_ns=parse_duration("1w"),
        older_than_ns=parse_duration("1m12h"),
        keep=("rel*", "auto-1"),
    )
    assert kept(rules, snapshots, now_ns) == {
        "auto-1": ("held", "named"),
        "release": ("named",),
        "auto-2": (
            "last",
            "hourly",
            "daily",
            "weekly",
            "monthly",
            "yearly",
            "within 7d",
            "newer than 30d12h",
        ),
    }


# --- together -------------------------------------------------------------------------------------

THREE = [Dated("auto-1", 1), Dated("monday", 2, held=True), Dated("auto-2", 3), Dated("auto-3", 4)]


def names(words: list[str], rules: Rules) -> list[str]:
    return [found.name for found in choose(words, rules, THREE, 9)]


def test_words_alone_choose_all_that_they_name_and_rules_alone_all_there_is() -> None:
    """Promise: without a rule held snapshots are chosen too, so that the deletion refuses them."""
    assert names(["auto-*"], Rules()) == ["auto-1", "auto-2", "auto-3"]
    assert names(["monday"], Rules()) == ["monday"]
    assert names([], Rules(keep_last=1)) == ["auto-1", "auto-2"]
    assert names([], Rules()) == []
    assert not Rules().any
    assert Rules(older_than_ns=0).any
    assert kept(Rules(), THREE, 9) == {}


def test_rules_count_only_what_the_words_name() -> None:
    """Promise: a snapshot that was not named is neither chosen nor fills a rule's place."""
    chosen, reasons = divide(["%auto-2"], Rules(keep_last=1), THREE, 9)
    assert [found.name for found in chosen] == ["auto-1"]
    assert reasons == {"monday": ("held",), "auto-2": ("last",)}


def test_held_ones_stay_under_any_rule() -> None:
    """Promise: no rule chooses a held snapshot, even if the rule keeps something else."""
    assert names([], Rules(keep=("auto-1",))) == ["auto-2", "auto-3"]
    assert names(["monday", "auto-3"], Rules(keep=("auto-1",))) == ["auto-3"]
    assert names(["monday"], Rules(keep_last=0, older_than_ns=0)) == []


def test_keep_that_saves_nothing_is_refused() -> None:
    """Promise: a mistyped name to keep is refused, so it deletes nothing."""
    with pytest.raises(SnapshotError, match=r"no snapshot 'mondya' \(there is 'monday'\)"):
        names([], Rules(keep=("mondya",)))
    with pytest.raises(SnapshotError, match="no snapshot matches 'rel-\\*'"):
        names(["auto-*"], Rules(keep=("auto-1", "rel-*")))
    assert names(["auto-*"], Rules(keep=("monday",))) == ["auto-1", "auto-2", "auto-3"]


def test_keep_of_a_name_that_looks_like_a_pattern_is_that_name() -> None:
    """Promise: a snapshot name with pattern characters can be kept by its exact name."""
    snapshots = [Dated("a*", 1), Dated("ab", 2)]
    rules = Rules(keep=("a*",))
    assert kept(rules, snapshots, 9) == {"a*": ("named",)}
    for words in ([], ["a*,ab"], ["ab"]):
        assert [found.name for found in choose(words, rules, snapshots, 9)] == ["ab"]


def test_held_snapshots_are_named_in_the_refusal() -> None:
    """Promise: the refusal names each held snapshot and no others, and says what to do next."""
    require_released([THREE[0], THREE[2]])
    with pytest.raises(SnapshotError) as caught:
        require_released(THREE)
    assert str(caught.value) == "snapshot 'monday' is held; cowfs snapshot release it first"


COUNTS = st.integers(0, 4)
RULES = st.builds(
    Rules,
    keep_last=COUNTS,
    keep_hourly=COUNTS,
    keep_daily=COUNTS,
    keep_weekly=COUNTS,
    keep_monthly=COUNTS,
    keep_yearly=COUNTS,
    keep_within_ns=st.sampled_from([0, HOUR_NS, 40 * DAY_NS]),
    older_than_ns=st.sampled_from([None, 0, 40 * DAY_NS]),
)
TIMES = st.lists(
    st.tuples(
        st.integers(0, 4 * 365 * 24).map(lambda hours: hours * HOUR_NS),
        st.booleans(),
        st.booleans(),
    ),
    max_size=25,
)


@given(rules=RULES, times=TIMES)
def test_more_to_keep_never_chooses_more(rules: Rules, times: list[tuple[int, bool, bool]]) -> None:
    """Promise: a rule only adds to what stays; a snapshot is chosen only if no rule keeps it."""
    snapshots = [Dated(str(index), *each) for index, each in enumerate(times)]
    now_ns = 3 * 365 * DAY_NS
    apart: set[str] = set()
    for name in Rules.__slots__:
        alone = Rules(**{name: getattr(rules, name)})
        apart.update(kept(alone, snapshots, now_ns))
    chosen, reasons = divide([], rules, snapshots, now_ns)
    assert reasons.keys() == apart
    if rules.any:
        assert [found.name for found in chosen] == [
            found.name for found in snapshots if found.name not in apart
        ]
        assert not any(found.held for found in chosen)
    else:
        assert chosen == []
