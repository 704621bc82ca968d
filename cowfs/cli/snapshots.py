"""`cowfs snapshot`: create, list, delete, rename. Returned means durable.

What would be destroyed, and how many bytes that frees, is told before it is done by `delete -n`;
the number is the one that the deletion frees (C11).
"""

from collections.abc import Callable
from contextlib import ExitStack

import click

from cowfs.cli.entry import printable
from cowfs.cli.output import (
    Column,
    Numbers,
    as_fields,
    exact_option,
    json_option,
    list_options,
    print_json,
    print_table,
    progress_bar,
)
from cowfs.cli.target import open_target
from cowfs.daemon.messages import Progress
from cowfs.errors import CowfsError
from cowfs.history.reports import SnapshotReport
from cowfs.history.selection import select

target_argument = click.argument("target", metavar="TARGET", type=click.Path())


def complete_name(context: click.Context, parameter: click.Parameter, text: str) -> list[str]:
    """The names of snapshots that begin with `text`, for the shell."""
    try:
        with open_target(context.params["target"]) as filesystem:
            names = [snapshot.name for snapshot in filesystem.snapshots()]
    except (CowfsError, OSError, KeyError):
        return []  # a hint that cannot be given
    return [name for name in names if name.startswith(text)]


@click.group()
def snapshot() -> None:
    """Keep states of a filesystem: create, list, delete, rename snapshots.

    On a mount they are readable below .snapshots/NAME. TARGET is a mount point or an image.
    """


@snapshot.command()
@target_argument
@click.argument("name", metavar="NAME")
@click.option("-m", "--message", metavar="TEXT", default="", help="A description.")
@json_option
def create(target: str, name: str, message: str, as_json: bool) -> None:
    """Keep the state of now under a name. Takes no time and no space, whatever the size.

    \b
    cowfs snapshot create ~/data before-upgrade -m 'all tests passed'
    """
    with open_target(target) as filesystem:
        made = filesystem.create_snapshot(name, message)
    if as_json:
        print_json("cowfs snapshot create", {"snapshot": as_fields(made)})
    else:
        click.echo(f"created snapshot {printable(made.name)}")


@snapshot.command("list")
@target_argument
@list_options
def list_snapshots(target: str, as_json: bool, bare: bool, exact: bool) -> None:
    """List the snapshots, the oldest first. What each holds alone: cowdu TARGET.

    \b
    cowfs snapshot list ~/data
    cowfs snapshot list disk.img -H -p | cut -f 1
    """
    with open_target(target) as filesystem:
        snapshots = filesystem.snapshots()
    if as_json:
        print_json("cowfs snapshot list", {"snapshots": as_fields(snapshots)})
        return
    numbers = Numbers(exact)
    print_table(
        [
            Column("NAME"),
            Column("CREATED"),
            Column("REFERENCED", right=True),
            Column("PARENT"),
            Column("DESCRIPTION"),
        ],
        [
            [
                found.name,
                numbers.time(found.created_ns),
                _referenced(found, numbers),
                found.parent or "-",
                found.description,
            ]
            for found in snapshots
        ],
        bare=bare,
    )


def _referenced(found: SnapshotReport, numbers: Numbers) -> str:
    """The size, as a bound where files share blocks: then only cowdu counts."""
    size = numbers.size(found.referenced_bytes)
    return size if found.referenced_is_exact or numbers.exact else f"<={size}"


@snapshot.command()
@target_argument
@click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=complete_name)
@click.option("-n", "--dry-run", "dry_run", is_flag=True, help="Only tell what would happen.")
@click.option("--wait", is_flag=True, help="Return when the space is free, not only on its way.")
@exact_option
@json_option
def delete(
    target: str, names: tuple[str, ...], dry_run: bool, wait: bool, exact: bool, as_json: bool
) -> None:
    """Delete snapshots: all that are named, or none.

    NAME is a name, a range first%last in the order of creation (%last from the oldest, first% to
    the newest, % all), or several with commas. The space comes free in the background; on an image
    that is not mounted, before the command ends.

    \b
    cowfs snapshot delete -n ~/data monday%friday     what would that free?
    cowfs snapshot delete ~/data monday%friday --wait
    cowfs snapshot delete disk.img old,older
    """
    with ExitStack() as stack:
        filesystem = stack.enter_context(open_target(target))
        chosen = [found.name for found in select(names, filesystem.snapshots())]
        reclaim_bytes = None
        if dry_run:
            reclaim_bytes = filesystem.reclaim(chosen).reclaim_bytes
        else:
            bar = stack.enter_context(progress_bar("giving back space"))
            filesystem.delete_snapshots(chosen, wait=wait, progress=_shown_by(bar))
    if as_json:
        fields = {"names": chosen, "dry_run": dry_run, "reclaim_bytes": reclaim_bytes}
        print_json("cowfs snapshot delete", fields)
        return
    words = "destroy\t" if exact else "would destroy " if dry_run else "destroyed "
    for name in chosen:
        click.echo(words + printable(name))
    if reclaim_bytes is not None:
        words = "reclaim\t" if exact else "would reclaim "
        click.echo(words + Numbers(exact).size(reclaim_bytes))


def _shown_by(bar: Callable[[str, int, int], None] | None) -> Callable[[Progress], None] | None:
    if bar is None:
        return None
    return lambda progress: bar(progress.what, progress.done_bytes, progress.total_bytes)


@snapshot.command()
@target_argument
@click.argument("old", metavar="OLD", shell_complete=complete_name)
@click.argument("new", metavar="NEW")
@json_option
def rename(target: str, old: str, new: str, as_json: bool) -> None:
    """Give a snapshot another name.

    \b
    cowfs snapshot rename ~/data before-rollback-2026-01-05T12.00.00 keep
    """
    with open_target(target) as filesystem:
        renamed = filesystem.rename_snapshot(old, new)
    if as_json:
        print_json("cowfs snapshot rename", {"snapshot": as_fields(renamed)})
    else:
        click.echo(f"renamed {printable(old)} to {printable(renamed.name)}")
