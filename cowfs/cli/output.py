"""Output of all commands: JSON in an envelope, tables for people, tab-separated rows for scripts.

On a terminal rich draws the tables. Elsewhere they are plain aligned text without control codes,
and rich is not imported.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from cowfs.escapes import printable

if TYPE_CHECKING:
    from cowfs.care.report import CheckProgress
    from cowfs.daemon.messages import Progress

    Bar = Callable[[str, int, int], None]  # moves a progress bar: words, done, total

MAJOR_VERSION = 0
MINOR_VERSION = 1

Function = TypeVar("Function", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
bare_option = click.option(
    "-H", "bare", is_flag=True, help="For scripts: no header, one tab between columns."
)
exact_option = click.option(
    "-p", "exact", is_flag=True, help="Exact numbers: bytes, and seconds since 1970."
)
dry_run_option = click.option(
    "-n", "--dry-run", "dry_run", is_flag=True, help="Only show what would happen."
)


def list_options(function: Function) -> Function:
    """Add the options of every command that prints a list: --json, -H, -p."""
    return json_option(bare_option(exact_option(function)))


def print_json(command: str, fields: Mapping[str, Any]) -> None:
    """Print one JSON object: `output_version` (command and version), then the fields.

    The caller has escaped paths and names (escapes.py), so that a reader can restore their bytes.
    """
    import json

    version = {"command": command, "vers_major": MAJOR_VERSION, "vers_minor": MINOR_VERSION}
    click.echo(json.dumps({"output_version": version, **fields}, indent=2))


def as_fields(report: Any) -> Any:
    """Convert a report (msgspec Struct) to the dict, list or value that JSON has for it."""
    import msgspec

    return msgspec.to_builtins(report)


class Numbers(NamedTuple):
    """Formats sizes and times: exact numbers, or as people read them."""

    exact: bool = False

    def size(self, size_bytes: int) -> str:
        if self.exact:
            return str(size_bytes)
        import humanize

        return humanize.naturalsize(size_bytes, binary=True)

    def time(self, time_ns: int) -> str:
        seconds = time_ns // 10**9
        if self.exact:
            return str(seconds)
        try:
            return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
        except (OverflowError, ValueError):
            return str(seconds)  # a number in an image may be beyond every calendar


def counted(count: int, noun: str) -> str:
    """A count with its noun: 1 snapshot, 2 snapshots."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


class Column(NamedTuple):
    """A column of a table. `right`: aligned right, for numbers."""

    title: str
    right: bool = False


def print_table(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], *, bare: bool = False
) -> None:
    """Print a table: tab-separated if `bare`, by rich on a terminal, plain elsewhere."""
    cells = [[printable(cell) for cell in row] for row in rows]
    if bare:
        for row in cells:
            click.echo("\t".join(row))
    elif sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in columns:
            table.add_column(column.title, justify="right" if column.right else "left")
        for row in cells:
            table.add_row(*map(Text, row))
        Console().print(table)
    else:
        _print_plain(columns, cells)


def _print_plain(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    lines = [[column.title for column in columns], *rows]
    widths = [max(_width(line[at]) for line in lines) for at in range(len(columns))]
    for line in lines:
        padded = []
        for cell, width, column in zip(line, widths, columns, strict=True):
            space = " " * (width - _width(cell))
            padded.append(space + cell if column.right else cell + space)
        click.echo("  ".join(padded).rstrip())


def _width(text: str) -> int:
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Print name and value pairs, one a line."""
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        click.echo(f"{name:<{width}}  {printable(value)}".rstrip())


@contextmanager
def progress_bar(text: str) -> Iterator[Bar | None]:
    """Show a progress bar on standard error while the block runs.

    Yields:
        A function of (words, done, total) that moves the bar; None if standard error is no
        terminal.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(text, total=None)

        def show(words: str, done: int, total: int) -> None:
            progress.update(task, description=printable(words), completed=done, total=total or None)

        yield show


def request_progress(bar: Bar | None) -> Callable[[Progress], None] | None:
    """Make a callback that shows the progress of a request on a bar; None without a bar."""
    if bar is None:
        return None
    return lambda now: bar(now.what, now.done_bytes, now.total_bytes)


def check_progress(bar: Bar | None) -> Callable[[CheckProgress], None] | None:
    """Make a callback that shows the progress of a check on a bar; None without a bar."""
    if bar is None:
        return None
    return lambda now: bar(now.stage, now.done_blocks, now.total_blocks)
