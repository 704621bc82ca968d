"""Which snapshots a command of cowdu is about: names, patterns, ranges, and rules of what to keep."""

import time
from collections.abc import Sequence

import click

from cowfs.cli.snapshots import complete_name, warn_of_future
from cowfs.history.records import RootRecord
from cowfs.history.retention import Rules, divide
from cowfs.history.selection import select

LIVE = "(live)"  # how the live files are called beside snapshots

names_argument = click.argument(
    "names", metavar="[NAME]...", nargs=-1, shell_complete=complete_name
)


def chosen_records(
    snapshots: Sequence[RootRecord], names: Sequence[str], rules: Rules
) -> list[RootRecord]:
    """Those that the words and rules choose; all of them without any. Raises as `divide`."""
    if not names and not rules.any:
        return list(snapshots)
    return _divided(snapshots, names, rules)[0]


def kept_records(
    snapshots: Sequence[RootRecord], names: Sequence[str], rules: Rules
) -> tuple[list[RootRecord], dict[str, tuple[str, ...]]]:
    """Of those that the words name (all without any), the ones that may be deleted; why others stay.

    What is held stays, whether there is a rule or not. Raises as `divide`.
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
    """Ascending numbers of roots in words: a name each, neighbours as first%last.

    Only names of snapshots make ranges; what is no snapshot stands in brackets, at the end.
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
