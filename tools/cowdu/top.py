"""`cowdu top`: the command that starts the terminal program (program.py).

textual, which draws the screen, is an optional package, and slow to import. It is imported only
when the program starts; without it the command says how to install it.
"""

import importlib.util
import os
import sys

import click

from cowfs.api import connect
from cowfs.cli.snapshots import target_argument
from cowfs.errors import CowfsError, UsageError
from cowfs.escapes import shell_word

REFRESH_S = 2.0


@click.command()
@target_argument
@click.option("-r", "--read-only", is_flag=True, help="Refuse to delete snapshots.")
@click.option(
    "--refresh",
    "refresh_s",
    metavar="SECONDS",
    type=click.FloatRange(min=0),
    default=REFRESH_S,
    show_default=True,
    help="How often to look for a new generation; 0: never.",
)
def top(target: str, read_only: bool, refresh_s: float) -> None:
    """Walk through the snapshots on the terminal: what each holds, which files, what it would free.

    Space marks snapshots, and a line shows what deleting exactly these would free, to the byte;
    Enter opens one; d deletes, after a question; ? shows all keys. Changes that others make appear
    when they are committed.

    Needs the Python package textual; the extra [top] of cowfs installs it.

    \b
    cowdu top ~/data
    cowdu top disk.img --read-only
    """
    if importlib.util.find_spec("textual") is None:
        raise CowfsError(
            "cowdu top needs the Python package textual, which is not installed; run: "
            f"{shell_word(sys.executable)} -m pip install 'cowfs-image[top]'"
        )
    # textual draws on standard error, so that must be a terminal too.
    if not all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)):
        raise UsageError("cowdu top needs a terminal; cowdu list is for scripts")
    if os.environ.get("TERM", "dumb") == "dumb":
        raise UsageError("cowdu top needs a terminal that can move its cursor; cowdu list does not")
    with connect(target) as found:
        found.info()  # a target that cannot be opened is refused before the screen is taken

    from .program import Top
    from .walking import Source

    Top(Source(target), read_only=read_only, refresh_s=refresh_s).run_to_end()
