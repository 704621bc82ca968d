"""Promises that a word selects exactly the snapshots that it names, or says why it names none."""

from dataclasses import dataclass

import pytest

from cowfs.errors import SnapshotError, UsageError
from cowfs.history.selection import is_pattern, select


@dataclass(frozen=True)
class Named:
    name: str


SNAPSHOTS = [Named(name) for name in ("c", "a", "two words", "d", "b")]  # oldest first


def names(*words: str) -> list[str]:
    return [found.name for found in select(words, SNAPSHOTS)]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a"], ["a"]),
        (["d", "c"], ["c", "d"]),
        (["a", "a", "a,a"], ["a"]),
        (["a%d"], ["a", "two words", "d"]),
        (["a%a"], ["a"]),
        (["%a"], ["c", "a"]),
        (["d%"], ["d", "b"]),
        (["%"], ["c", "a", "two words", "d", "b"]),
        (["b,c%a"], ["c", "a", "b"]),
        (["c%a", "a%two words"], ["c", "a", "two words"]),
        (["two words"], ["two words"]),
    ],
)
def test_select_gives_what_is_named_in_order_of_creation(
    words: list[str], expected: list[str]
) -> None:
    """Promise: each snapshot is given once, oldest first; ranges include both ends."""
    assert names(*words) == expected


PATTERNED = [Named(name) for name in ("auto-2", "manual", "auto-1", "a*", "Auto-3", "[x]")]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["auto-*"], ["auto-2", "auto-1"]),
        (["auto-[13]"], ["auto-1"]),
        (["auto-[!1]"], ["auto-2"]),
        (["?anual"], ["manual"]),
        (["*"], ["auto-2", "manual", "auto-1", "a*", "Auto-3", "[x]"]),
        (["*-1,m*", "manual"], ["manual", "auto-1"]),
        (["a*"], ["a*"]),
        (["[x]"], ["[x]"]),
        (["a[*]"], ["a*"]),
        (["manual%a*"], ["manual", "auto-1", "a*"]),
    ],
    ids=str,
)
def test_select_pattern_matches_whole_names_unless_it_is_one(
    words: list[str], expected: list[str]
) -> None:
    """Promise: patterns match as in a shell, case-sensitive; an exact name is never a pattern."""
    assert [found.name for found in select(words, PATTERNED)] == expected


@pytest.mark.parametrize("word", ["b*", "auto", "*-4", "manual,b*", "[y]", "[", "auto-?x"])
def test_select_pattern_that_matches_nothing_is_refused(word: str) -> None:
    """Promise: a pattern without a match is an error that quotes it, not an empty selection."""
    says = "no snapshot matches" if is_pattern(word) else "there is no snapshot"
    with pytest.raises(SnapshotError, match=says):
        select(["manual", word], PATTERNED)


@pytest.mark.parametrize("word", ["auto-*%", "%auto-?", "manual%m*", "[m]anual%auto-1"])
def test_select_pattern_at_the_end_of_a_range_is_a_usage_error(word: str) -> None:
    """Promise: a pattern at the end of a range is a usage error; no match is picked by guess."""
    with pytest.raises(UsageError, match="no patterns"):
        select([word], PATTERNED)


@pytest.mark.parametrize("word", ["x", "a%x", "x%a", "x%", "%x", "a,x", "two", "A"])
def test_select_unknown_name_is_refused_by_name(word: str) -> None:
    """Promise: one wrong name selects nothing at all."""
    with pytest.raises(SnapshotError, match="there is no snapshot"):
        names("a", word)


@pytest.mark.parametrize("word", ["", ",", "a,", ",a", "a%b%c", "%%"])
def test_select_malformed_word_is_a_usage_error(word: str) -> None:
    """Promise: a malformed word is a usage error, not guessed at."""
    with pytest.raises(UsageError):
        names(word)


def test_select_range_backwards_is_refused() -> None:
    """Promise: a range in the wrong order is an error, not an empty selection."""
    with pytest.raises(SnapshotError, match="'d' is newer than 'a'"):
        names("d%a")


def test_select_all_of_none_is_refused() -> None:
    """Promise: `%` on a filesystem without snapshots is an error that says so."""
    with pytest.raises(SnapshotError, match="no snapshots"):
        select(["%"], [])


def test_select_of_no_words_is_nothing() -> None:
    """Promise: no words select no snapshots."""
    assert select([], SNAPSHOTS) == []
