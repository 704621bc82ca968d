"""cowdu: which snapshots hold the disk, and what would deleting exactly these free?

The numbers are exact: a deletion frees what is told here, to the block, metadata and its
copies included (C11). It runs in its own process on the image, read-only; of a mounted filesystem
the daemon keeps the generation whole that is read. It reads what the snapshots asked for hold
alone, and no more.
"""

from collections.abc import Callable, Sequence
from typing import NoReturn

import click
from msgspec import Struct

from cowfs import __version__
from cowfs.cli.entry import Invocation, run
from cowfs.cli.output import (
    Column,
    Numbers,
    as_fields,
    list_options,
    print_json,
    print_table,
    progress_bar,
)
from cowfs.cli.snapshots import complete_name, target_argument
from cowfs.cli.target import open_target
from cowfs.history.filesystem import Filesystem
from cowfs.history.reports import ReclaimReport, image_name
from cowfs.history.selection import select
from cowfs.history.usage import exclusive_blocks, referenced_blocks, written_blocks
from cowfs.storage.format import BLOCK_SIZE_BYTES

ShowBar = Callable[[str, int, int], None]


class Usage(Struct, frozen=True, kw_only=True):
    """Of one snapshot.

    `referenced`: all that it reaches. `exclusive`: what deleting it alone would free. `written`:
    what it holds and its predecessor did not.
    """

    name: str
    created_ns: int
    generation: int
    referenced_bytes: int
    exclusive_bytes: int
    written_bytes: int


class UsageReport(Struct, frozen=True, kw_only=True):
    """Of a set of snapshots, at one generation; `reclaim` is of exactly this set."""

    image: str
    generation: int
    snapshots: tuple[Usage, ...]
    reclaim: ReclaimReport


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status: 0 done, 1 error, 2 usage, 10 image missing, 130 interrupted.",
)
@target_argument
@click.argument("names", metavar="[NAME]...", nargs=-1, shell_complete=complete_name)
@list_options
@click.option("--debug", is_flag=True, help="Show where an error came from.")
@click.version_option(__version__, "--version", "-V", prog_name="cowdu")
@click.pass_context
def cowdu(
    context: click.Context,
    target: str,
    names: tuple[str, ...],
    as_json: bool,
    bare: bool,
    exact: bool,
    debug: bool,
) -> None:
    """Show what snapshots hold, and what deleting them would free.

    TARGET is a mount point or an image. NAME is a snapshot, a range first%last (%last, first%, %),
    or several with commas; without any it is all snapshots.

    \b
    REFERENCED  all that the snapshot reaches
    EXCLUSIVE   what deleting it alone would free
    WRITTEN     what it holds and the snapshot before it did not

    What several hold together is in none of their EXCLUSIVE numbers: name them, and the last line
    tells what deleting exactly these would free.

    \b
    cowdu ~/data
    cowdu ~/data monday%friday
    cowdu disk.img --json
    """
    invocation = context.find_object(Invocation)
    if invocation is not None:
        invocation.debug = debug
    with (
        open_target(target) as found,
        progress_bar("reading") as bar,
        found.reading() as filesystem,
    ):
        report = _measure(filesystem, names, bar)
    if as_json:
        print_json("cowdu", as_fields(report))
    else:
        _print(report, Numbers(exact), bare=bare)


def measure(filesystem: Filesystem, words: Sequence[str] = ()) -> UsageReport:
    """The usage of the snapshots that the words select, of all when there are none.

    Args:
        filesystem: open read-only, at a generation that stays whole meanwhile.

    Raises:
        SnapshotError, UsageError: the words select nothing.
        CorruptError: no number can be trusted.
    """
    return _measure(filesystem, words, None)


def _measure(filesystem: Filesystem, words: Sequence[str], bar: ShowBar | None) -> UsageReport:
    snapshots = filesystem.catalog.snapshots()
    records = select(words, snapshots) if words else snapshots
    rows = []
    for number, record in enumerate(records):
        if bar is not None:
            bar(record.name, number, len(records) + 1)
        rows.append(
            Usage(
                name=record.name,
                created_ns=record.created_ns,
                generation=record.created_generation,
                referenced_bytes=referenced_blocks(filesystem, record) * BLOCK_SIZE_BYTES,
                exclusive_bytes=exclusive_blocks(filesystem, [record]) * BLOCK_SIZE_BYTES,
                written_bytes=written_blocks(filesystem, record) * BLOCK_SIZE_BYTES,
            )
        )
    # What one snapshot frees is known; only a set needs another look.
    together = (
        rows[0].exclusive_bytes
        if len(rows) == 1
        else exclusive_blocks(filesystem, records) * BLOCK_SIZE_BYTES
    )
    return UsageReport(
        image=image_name(filesystem),
        generation=filesystem.store.superblock.generation,
        snapshots=tuple(rows),
        reclaim=ReclaimReport(names=tuple(row.name for row in rows), reclaim_bytes=together),
    )


def _print(report: UsageReport, numbers: Numbers, *, bare: bool) -> None:
    print_table(
        [
            Column("NAME"),
            Column("CREATED"),
            Column("REFERENCED", right=True),
            Column("EXCLUSIVE", right=True),
            Column("WRITTEN", right=True),
        ],
        [
            [
                row.name,
                numbers.time(row.created_ns),
                numbers.size(row.referenced_bytes),
                numbers.size(row.exclusive_bytes),
                numbers.size(row.written_bytes),
            ]
            for row in report.snapshots
        ],
        bare=bare,
    )
    count = len(report.snapshots)
    if count > 1 and not bare:
        freed = numbers.size(report.reclaim.reclaim_bytes)
        click.echo(f"deleting these {count} snapshots would free {freed}")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run `cowdu` and end the process."""
    run(cowdu, "cowdu", arguments)
