"""`cowdu top`: the snapshots on the terminal, to walk through, to weigh and to delete."""

import os
import sys

import click

from cowfs.api import connect
from cowfs.cli.snapshots import target_argument
from cowfs.errors import UsageError

REFRESH_S = 2.0


@click.command()
@target_argument
@click.option("-r", "--read-only", is_flag=True, help="Delete nothing.")
@click.option(
    "--refresh",
    "refresh_s",
    metavar="SECONDS",
    type=click.FloatRange(min=0),
    default=REFRESH_S,
    show_default=True,
    help="How often to look whether something changed; 0 for never.",
)
def top(target: str, read_only: bool, refresh_s: float) -> None:
    """Walk through the snapshots on the terminal: what each holds, which files, what goes if it goes.

    Space marks snapshots, and a line tells what deleting exactly these would free, to the byte;
    Enter walks into one; d deletes, after a question; ? shows all keys. What others do to the
    filesystem meanwhile is shown as it is committed.

    \b
    cowdu top ~/data
    cowdu top disk.img --read-only
    """
    # The screen is drawn on standard error, so that one counts too.
    if not all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)):
        raise UsageError("cowdu top needs a terminal; cowdu list is for scripts")
    if os.environ.get("TERM", "dumb") == "dumb":
        raise UsageError("cowdu top needs a terminal that can move its cursor; cowdu list does not")
    with connect(target) as found:
        found.info()  # what cannot be opened is told before the screen is taken

    from .program import Top
    from .walking import Source

    Top(Source(target), read_only=read_only, refresh_s=refresh_s).run_to_end()
