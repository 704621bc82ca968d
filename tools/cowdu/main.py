"""The program `cowdu`: which snapshots hold the space, why, and what would deleting some free?

The numbers are exact: a deletion frees what cowdu shows, to the block, metadata and its copies
included (C11). cowdu reads the image in its own process; the daemon of a mounted filesystem pins
the generation that is read. Without the name of a command it runs `cowdu list`.
"""

import os
from collections.abc import Sequence
from typing import NoReturn

import click
from click.shell_completion import CompletionItem

from cowfs import __version__
from cowfs.cli.entry import debug_option, run
from cowfs.cli.lazy import LazyGroup

# numpy would start its threads before the priority is lowered, and they would keep the old one.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

_COMMANDS = {
    "list": ("cowfs_tools.cowdu.listing:list_roots", "Show what each snapshot holds (default)."),
    "plan": ("cowfs_tools.cowdu.planning:plan", "Find the snapshots to delete to free SIZE."),
    "why": ("cowfs_tools.cowdu.explaining:why", "List the files that only these snapshots keep."),
    "du": ("cowfs_tools.cowdu.paths:du", "Show what files and directories hold alone."),
    "log": ("cowfs_tools.cowdu.explaining:log", "List the distinct versions of a file."),
    "curve": ("cowfs_tools.cowdu.listing:curve", "Show what deleting the oldest 1, 2, 3... frees."),
    "pairs": ("cowfs_tools.cowdu.listing:pairs", "Show what exactly two snapshots share."),
    "block": ("cowfs_tools.cowdu.explaining:block", "Explain one block: what refers to it."),
    "report": ("cowfs_tools.cowdu.report:report", "Write a page for the browser."),
    "top": ("cowfs_tools.cowdu.top:top", "Walk through the snapshots on the terminal."),
}
_OWN_OPTIONS = ("-h", "--help", "-V", "--version")


class _DefaultGroup(LazyGroup):
    """`cowdu TARGET` is `cowdu list TARGET`; --debug may stand anywhere."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        debug = ["--debug"] * ("--debug" in args[:end])
        rest = [word for word in args[:end] if word != "--debug"] + args[end:]
        if not rest and ctx.resilient_parsing:
            return super().parse_args(ctx, debug)
        if not rest or rest[0] not in (*_COMMANDS, *_OWN_OPTIONS):
            rest.insert(0, "list")
        return super().parse_args(ctx, debug + rest)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete commands, and paths, because a target may come first."""
        path = CompletionItem(incomplete, type="file")
        return [*super().shell_complete(ctx, incomplete), path]


@click.group(
    cls=_DefaultGroup,
    lazy_commands=_COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status: 0 done, 1 error, 2 usage, 10 image missing, 130 interrupted.",
)
@click.version_option(__version__, "--version", "-V", prog_name="cowdu")
@debug_option
def cowdu() -> None:
    """Show what snapshots hold, why, and what deleting them would free.

    TARGET is a mount point or an image. Every number is exact, metadata included: a deletion frees
    what is shown. Without a command, cowdu TARGET is cowdu list TARGET; an image whose name is that
    of a command is written with a directory, as in ./plan.

    \b
    cowdu ~/data                     what each snapshot holds
    cowdu ~/data monday%friday       what deleting exactly these would free
    cowdu plan ~/data --free 2G      which to delete, and why these
    cowdu why ~/data monday          the files that only monday keeps
    cowdu du ~/data/*                what directories hold alone
    cowdu report ~/data --html disk.html
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run `cowdu` and end the process."""
    run(cowdu, "cowdu", arguments)
