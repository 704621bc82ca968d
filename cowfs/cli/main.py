"""The program `cowfs`: each command is imported only when it is used (lazy.py)."""

from collections.abc import Sequence
from typing import NoReturn

import click

from cowfs import __version__
from cowfs.cli.entry import debug_option, run
from cowfs.cli.lazy import LazyGroup

# Name: where the command is, and its one-line help.
_COMMANDS = {
    "mkfs": ("cowfs.cli.images:mkfs", "Make an image with an empty filesystem."),
    "mount": ("cowfs.cli.mounting:mount", "Mount an image on a directory."),
    "umount": ("cowfs.cli.mounting:umount", "Unmount, and wait until everything is durable."),
    "snapshot": ("cowfs.cli.snapshots:snapshot", "Create, list, delete, rename, hold snapshots."),
    "rollback": ("cowfs.cli.rollback:rollback", "Go back to a snapshot, while mounted."),
    "undo": ("cowfs.cli.rollback:undo", "Take back the last rollback."),
    "cp": ("cowfs.cli.copying:cp", "Copy files so that the copies share their blocks."),
    "df": ("cowfs.cli.space:df", "Show used, free and reserved space."),
    "info": ("cowfs.cli.space:info", "Show what an image is, and how it is mounted."),
    "trim": ("cowfs.cli.space:trim", "Give free space back to the host."),
    "sync": ("cowfs.cli.space:sync", "Make everything durable."),
    "check": ("cowfs.cli.images:check", "Check every block in use, and every count."),
    "salvage": ("cowfs.cli.salvage:salvage", "Copy files out of a damaged image."),
    "scrub": ("cowfs.cli.scrub:scrub", "Read every copy, repair bad ones, list lost files."),
    "completion": ("cowfs.cli.completion:completion", "Print a shell's completion script."),
    "integrate": ("cowfs.cli.integration:integrate", "Install manual, completions, service."),
}


@click.group(
    cls=LazyGroup,
    lazy_commands=_COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Sizes are in powers of 1024. Exit status: 0 done, 1 error, 2 usage, 10 image missing, "
    "11 image locked, 130 interrupted. Space per snapshot: cowdu.",
)
@click.version_option(__version__, "--version", "-V", prog_name="cowfs")
@debug_option
def cli() -> None:
    """A copy-on-write filesystem in one image file, with snapshots.

    TARGET is a mount point or an image. If it is mounted, a command asks the daemon; otherwise it
    works on the image itself.

    \b
    cowfs mkfs disk.img --size 4G          make an image
    cowfs mount disk.img ~/data            any program can use ~/data now
    cowfs snapshot create ~/data monday    keep this state
    cowfs rollback ~/data monday           go back to it, while mounted
    cowfs undo ~/data                      take the rollback back
    cowfs umount ~/data                    everything is durable in disk.img
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run `cowfs` and end the process."""
    run(cli, "cowfs", arguments)
