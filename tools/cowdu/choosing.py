"""Chooses the snapshots that a command of cowdu works on, by names, patterns, ranges and rules."""

import time
from collections.abc import Callable, Sequence

import click

from cowfs.cli.snapshots import Function, warn_of_future
from cowfs.history.records import RootRecord
from cowfs.history.retention import Rules, divide
from cowfs.history.selection import select

LIVE = "(live)"  # the name of the live files beside those of snapshots


def top_option(default: int, words: str) -> Callable[[Function], Function]:
    """Make the option --top N, which a command gets as `count`."""
    return click.option(
        "--top",
        "count",
        metavar="N",
        type=click.IntRange(min=1),
        default=default,
        show_default=True,
        help=words,
    )


def chosen_records(
    snapshots: Sequence[RootRecord], names: Sequence[str], rules: Rules
) -> list[RootRecord]:
    """Choose snapshots by names and rules; all of them without either. Raises as `divide`."""
    if not names and not rules.any:
        return list(snapshots)
    return _divided(snapshots, names, rules)[0]


def kept_records(
    snapshots: Sequence[RootRecord], names: Sequence[str], rules: Rules
) -> tuple[list[RootRecord], dict[str, tuple[str, ...]]]:
    """Divide the named snapshots (all without names) into those to delete and those to keep.

    Held snapshots are kept, with and without rules. Raises as `divide`.

    Returns:
        The snapshots that may be deleted; and for each other one the reasons to keep it.
    """
    if rules.any:
        return _divided(snapshots, names, rules)
    named = select(names, snapshots) if names else list(snapshots)
    held: dict[str, tuple[str, ...]] = {each.name: ("held",) for each in named if each.held}
    return [record for record in named if not record.held], held


def _divided(
    snapshots: Sequence[RootRecord], names: Sequence[str], rules: Rules
) -> tuple[list[RootRecord], dict[str, tuple[str, ...]]]:
    may_go, reasons = divide(names, rules, snapshots, time.time_ns())
    warn_of_future("cowdu", reasons)
    return may_go, reasons


def spans(chosen: Sequence[int], names: Sequence[str]) -> str:
    """Name roots briefly: neighbours as a range first%last.

    Args:
        chosen: ascending indices into `names`.
        names: of all roots. The snapshots come first; other names are in brackets and make no
        ranges.
    """
    words = []
    start = 0
    while start < len(chosen):
        stop = start
        while (
            stop + 1 < len(chosen)
            and chosen[stop + 1] == chosen[stop] + 1
            and not names[chosen[stop + 1]].startswith("(")
        ):
            stop += 1
        first, last = names[chosen[start]], names[chosen[stop]]
        words.append(first if start == stop else f"{first}%{last}")
        start = stop + 1
    return ", ".join(words)
