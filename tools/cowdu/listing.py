"""`cowdu list`, `curve` and `pairs`: the numbers of roots in tables."""

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import click
from msgspec import Struct

from cowfs.accounting.owners import OwnerKind
from cowfs.cli.output import (
    Column,
    Numbers,
    as_fields,
    list_options,
    print_json,
    print_table,
)
from cowfs.cli.snapshots import names_argument, retention_options, target_argument
from cowfs.errors import UsageError
from cowfs.escapes import quoted
from cowfs.history.reports import image_name
from cowfs.history.retention import Rules
from cowfs.storage.format import BLOCK_SIZE_BYTES

from .choosing import LIVE, chosen_records, top_option
from .looking import look
from .rows import Usage, UsageReport, usage_report
from .sparks import spark_line

PAIRS_SHOWN = 20
ORDER = "creation"  # what "older" means: not by date, which a wrong clock may have set


class _Shown(NamedTuple):
    """A column: its title, its value for a row (None is shown as -), and the kind of the value."""

    title: str
    value: Callable[[Usage], int | str | None]
    kind: str = "size"


def _title(row: Usage) -> str:
    return {
        "snapshot": row.name,
        "volume": LIVE,
        "drop": f"(deleted {row.name})",
        "orphans": "(open files without a name)",
        "generation": f"(generation {row.name})",
    }[row.kind]


COLUMNS = {
    "name": _Shown("NAME", _title, "text"),
    "kind": _Shown("KIND", lambda row: row.kind, "text"),
    "created": _Shown("CREATED", lambda row: row.created_ns, "time"),
    "generation": _Shown("GENERATION", lambda row: row.generation, "number"),
    "referenced": _Shown("REFERENCED", lambda row: row.referenced_bytes),
    "exclusive": _Shown("EXCLUSIVE", lambda row: row.exclusive_bytes),
    "shared": _Shown("SHARED", lambda row: row.shared_bytes),
    "written": _Shown("WRITTEN", lambda row: row.written_bytes),
    "cumulative": _Shown("CUMULATIVE", lambda row: row.cumulative_bytes),
    "referenced-metadata": _Shown("REF-META", lambda row: row.referenced_metadata_bytes),
    "exclusive-metadata": _Shown("EXCL-META", lambda row: row.exclusive_metadata_bytes),
    "written-metadata": _Shown("WRITTEN-META", lambda row: row.written_metadata_bytes),
    "held": _Shown("HELD", lambda row: "held" if row.held else None, "text"),
    "description": _Shown("DESCRIPTION", lambda row: row.description, "text"),
}
# The names of these columns in zfs, btrfs and restic.
ALIASES = {
    "refer": "referenced",
    "rfer": "referenced",
    "total": "referenced",
    "excl": "exclusive",
    "used": "exclusive",
    "unique": "exclusive",
    "cum": "cumulative",
    "creation": "created",
    "holds": "held",
    "type": "kind",
}
DEFAULT_COLUMNS = ("name", "created", "referenced", "exclusive", "written")
SPACE = "space"


@click.command("list")
@target_argument
@names_argument
@retention_options
@click.option(
    "-o",
    "column_words",
    metavar="COLUMN,...",
    help=f"Columns: {', '.join(COLUMNS)}; all; or space, as zfs list has it.",
)
@click.option(
    "-a", "--all", "everything", is_flag=True, help="Show earlier generations (for rescue) too."
)
@click.option("-s", "ascending", metavar="COLUMN", help="Sort by a column, the smallest first.")
@click.option("-S", "descending", metavar="COLUMN", help="Sort by a column, the largest first.")
@list_options
def list_roots(
    target: str,
    names: tuple[str, ...],
    rules: Rules,
    column_words: str | None,
    everything: bool,
    ascending: str | None,
    descending: str | None,
    as_json: bool,
    bare: bool,
    exact: bool,
) -> None:
    """Show what snapshots hold, and what deleting them would free.

    TARGET is a mount point or an image. NAME is a snapshot, a pattern such as 'auto-*', a range
    first%last (%last, first%, %), or several with commas. Without a NAME it shows all snapshots,
    and what else holds space: the live files, deleted snapshots whose space is not free yet, and
    open files that have no name any more; with -a also earlier generations, whose space becomes
    free when they expire.

    \b
    REFERENCED  all that the snapshot reaches
    EXCLUSIVE   what deleting it alone would free
    SHARED      the difference of the two
    WRITTEN     what it holds and the snapshot before it did not
    CUMULATIVE  what deleting it and all snapshots created before it would free

    Space that several snapshots share is in none of their EXCLUSIVE numbers: name the snapshots, or
    say what to keep, and the last line shows what deleting exactly these would free. Rows and
    CUMULATIVE are in the order of creation, which the filesystem knows whatever the clock said; the
    dates in CREATED may differ.

    \b
    cowdu ~/data
    cowdu ~/data monday%friday
    cowdu ~/data 'auto-*' --older-than 30d --keep-last 3
    cowdu disk.img -o name,exclusive,cumulative -S exclusive
    cowdu disk.img --json
    """
    columns = _columns(column_words)
    order, falling = _order(ascending, descending)
    wanted = {*columns, order} if order else {*columns}
    with look(target) as found:
        chosen = chosen_records(found.snapshots, names, rules)
        report = usage_report(
            found,
            chosen,
            others=not (names or rules.any),
            cumulative=bool(wanted & {"cumulative", "exclusive-metadata", "written-metadata"}),
        )
    if as_json:
        print_json("cowdu", as_fields(report))
    elif SPACE in columns:
        _print_space(report, Numbers(exact), bare=bare)
    else:
        others = [row for row in report.others if everything or row.kind != "generation"]
        rows = _sorted([*report.snapshots, *others], order, falling)
        _print(report, rows, columns, Numbers(exact), bare=bare)


def _columns(words: str | None) -> tuple[str, ...]:
    if words is None:
        return DEFAULT_COLUMNS
    listed: list[str] = []
    for word in words.lower().split(","):
        if word == "all":
            listed += COLUMNS
        elif word == SPACE:
            return (SPACE,)
        else:
            listed.append(_column(word))
    return tuple(listed)


def _column(word: str) -> str:
    name = ALIASES.get(word, word)
    if name not in COLUMNS:
        raise UsageError(f"there is no column {quoted(word)}; there are {', '.join(COLUMNS)}")
    return name


def _order(ascending: str | None, descending: str | None) -> tuple[str | None, bool]:
    if ascending and descending:
        raise UsageError("sort by -s or by -S, not by both")
    word = ascending or descending
    return (_column(word.lower()) if word else None), descending is not None


def _sorted(rows: list[Usage], order: str | None, falling: bool) -> list[Usage]:
    """Sort rows by a column; rows without a value there come last."""
    if order is None:
        return rows
    value = COLUMNS[order].value
    known = [row for row in rows if value(row) is not None]
    known.sort(key=lambda row: value(row) or 0, reverse=falling)
    return known + [row for row in rows if value(row) is None]


def _print(
    report: UsageReport,
    rows: Sequence[Usage],
    columns: Sequence[str],
    numbers: Numbers,
    *,
    bare: bool,
) -> None:
    shown = [COLUMNS[name] for name in columns]
    print_table(
        [Column(column.title, right=column.kind in ("size", "number")) for column in shown],
        [[_cell(column, row, numbers) for column in shown] for row in rows],
        bare=bare,
    )
    if bare:
        return
    if "cumulative" in columns:
        _say_order([row.created_ns for row in report.snapshots])
    count = len(report.snapshots)
    if count > 1:
        freed = numbers.size(report.reclaim.reclaim_bytes)
        held = sum(row.held for row in report.snapshots)
        words = f" ({held} of them must be released first)" if held else ""
        click.echo(f"deleting these {count} snapshots would free {freed}{words}")
    if count > 1 and sys.stdout.isatty():
        line = spark_line([row.written_bytes or 0 for row in report.snapshots], sys.stdout.encoding)
        if line:
            click.echo(f"written, by age: {line}")


def _say_order(times_ns: Sequence[int | None]) -> None:
    """Explain "older" if the dates of the snapshots are not in the order of creation."""
    known = [time_ns for time_ns in times_ns if time_ns is not None]
    if known != sorted(known):
        click.echo("older means created before; the order of the dates is different")


def _cell(column: _Shown, row: Usage, numbers: Numbers) -> str:
    value = column.value(row)
    if value is None or value == "":
        return "-"
    if isinstance(value, str):
        return value
    if column.kind == "time":
        return numbers.time(value)
    return numbers.size(value) if column.kind == "size" else str(value)


def _print_space(report: UsageReport, numbers: Numbers, *, bare: bool) -> None:
    """Print the columns of `zfs list -o space`."""
    totals = report.totals
    snapshots = totals.snapshots_bytes
    rows = [
        [
            "(all)",
            numbers.size(totals.available_bytes),
            numbers.size(totals.allocated_bytes),
            "-" if snapshots is None else numbers.size(snapshots),
            "-" if snapshots is None else numbers.size(totals.allocated_bytes - snapshots),
        ]
    ]
    rows += [
        [row.name, "-", numbers.size(row.exclusive_bytes), "-", "-"] for row in report.snapshots
    ]
    titles = ("NAME", "AVAIL", "USED", "USEDSNAP", "USEDDS")
    columns = [Column(title, right=title != "NAME") for title in titles]
    print_table(columns, rows, bare=bare)


# --- curve and pairs ------------------------------------------------------------------------------


class CurveStep(Struct, frozen=True, kw_only=True):
    """What deleting the oldest `count` snapshots, up to `name`, frees."""

    count: int
    name: str
    created_ns: int
    reclaim_bytes: int


@click.command()
@target_argument
@names_argument
@retention_options
@list_options
def curve(
    target: str, names: tuple[str, ...], rules: Rules, as_json: bool, bare: bool, exact: bool
) -> None:
    """Show what deleting the oldest 1, 2, 3... snapshots frees if everything else stays.

    Counts the snapshots that the names and rules choose; all without either. The oldest are the
    first in the order of creation, which the filesystem knows whatever the clock said; the dates in
    CREATED may differ.

    \b
    cowdu curve ~/data
    cowdu curve ~/data 'auto-*' --keep-last 3
    """
    steps = []
    with look(target) as found:
        chosen = chosen_records(found.snapshots, names, rules)
        sets = found.sets()
        image = image_name(found.filesystem)
        bits: list[int] = []
        for record in chosen:
            bits.append(sets.bit(OwnerKind.SNAPSHOT, record.root_id))
            steps.append(
                CurveStep(
                    count=len(bits),
                    name=record.name,
                    created_ns=record.created_ns,
                    reclaim_bytes=sets.exclusive(bits).total * BLOCK_SIZE_BYTES,
                )
            )
    if as_json:
        print_json("cowdu curve", {"image": image, "order": ORDER, "steps": as_fields(steps)})
        return
    numbers = Numbers(exact)
    before = 0
    rows = []
    for step in steps:
        more = step.reclaim_bytes - before
        before = step.reclaim_bytes
        rows.append(
            [
                str(step.count),
                step.name,
                numbers.time(step.created_ns),
                numbers.size(step.reclaim_bytes),
                numbers.size(more),
            ]
        )
    columns = [Column("OLDEST", True), Column("UP TO"), Column("CREATED")]
    columns += [Column("FREES", True), Column("MORE", True)]
    print_table(columns, rows, bare=bare)
    if not bare:
        _say_order([step.created_ns for step in steps])
    if len(steps) > 1 and not bare and sys.stdout.isatty():
        line = spark_line([step.reclaim_bytes for step in steps], sys.stdout.encoding)
        if line:
            click.echo(f"freed, by count: {line}")


@click.command()
@target_argument
@names_argument
@top_option(PAIRS_SHOWN, "How many pairs to show, the largest first.")
@click.option("--matrix", is_flag=True, help="Show a table of all snapshots against all.")
@list_options
def pairs(
    target: str,
    names: tuple[str, ...],
    count: int,
    matrix: bool,
    as_json: bool,
    bare: bool,
    exact: bool,
) -> None:
    """Show what exactly two snapshots share: it is freed only if both are deleted.

    \b
    cowdu pairs ~/data
    cowdu pairs ~/data monday%friday --matrix
    """
    with look(target) as found:
        chosen = chosen_records(found.snapshots, names, Rules())
        sets = found.sets()
        image = image_name(found.filesystem)
        bits = [sets.bit(OwnerKind.SNAPSHOT, record.root_id) for record in chosen]
        alone = sets.each("exclusive")[:, :].sum(axis=1) * BLOCK_SIZE_BYTES
        shared = {
            pair: blocks * BLOCK_SIZE_BYTES
            for pair, blocks in sets.pairs().items()
            if {*pair} <= {*bits}
        }
    name_of = {bit: record.name for bit, record in zip(bits, chosen, strict=True)}
    largest = sorted(shared, key=lambda pair: (-shared[pair], pair))
    if as_json:
        fields = [
            {"older": name_of[one], "newer": name_of[other], "shared_bytes": shared[(one, other)]}
            for one, other in largest
        ]
        print_json("cowdu pairs", {"image": image, "pairs": fields})
        return
    numbers = Numbers(exact)
    if matrix:
        columns = [Column(""), *(Column(name_of[bit], right=True) for bit in bits)]
        rows = []
        for one in bits:
            cells = [
                alone[one] if one == other else shared.get((min(one, other), max(one, other)), 0)
                for other in bits
            ]
            rows.append([name_of[one], *(numbers.size(int(cell)) for cell in cells)])
        print_table(columns, rows, bare=bare)
        return
    rows = [
        [name_of[one], name_of[other], numbers.size(shared[(one, other)])]
        for one, other in largest[:count]
    ]
    print_table([Column("OLDER"), Column("NEWER"), Column("SHARED", right=True)], rows, bare=bare)
