"""`cowfs snapshot`: create, list, delete, rename, hold, release. Each is durable when it returns.

`delete -n` lists what would be deleted and the bytes that this frees; the deletion frees exactly
that number (C11).
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar, cast

import click

from cowfs.api import connect
from cowfs.cli.entry import warn
from cowfs.cli.output import (
    Column,
    Numbers,
    as_fields,
    dry_run_option,
    exact_option,
    json_option,
    list_options,
    print_json,
    print_table,
    progress_bar,
    request_progress,
)
from cowfs.errors import CowfsError, UsageError
from cowfs.escapes import printable
from cowfs.history.reports import SnapshotReport
from cowfs.history.retention import FUTURE, Rules, divide, parse_duration, require_released
from cowfs.history.selection import select

Function = TypeVar("Function", bound=Callable[..., Any])

FUTURE_SHOWN_MAX = 10  # names in one line

target_argument = click.argument("target", metavar="TARGET", type=click.Path())


def complete_name(context: click.Context, parameter: click.Parameter, text: str) -> list[str]:
    """List the snapshot names that begin with `text`, for the shell's completion."""
    try:
        with connect(context.params["target"]) as filesystem:
            names = [snapshot.name for snapshot in filesystem.snapshots()]
    except (CowfsError, OSError, KeyError):
        return []  # completion shows no errors
    return [name for name in names if name.startswith(text)]


names_argument = click.argument(
    "names", metavar="[NAME]...", nargs=-1, shell_complete=complete_name
)


def retention_options(function: Function) -> Function:
    """Add the options that say which snapshots to keep; the command gets them as `rules: Rules`."""

    @functools.wraps(function)
    def with_rules(
        *arguments: Any,
        keep_within: str | None,
        older_than: str | None,
        keep: tuple[str, ...],
        **options: Any,
    ) -> Any:
        counts = {f"keep_{unit}": options.pop(f"keep_{unit}") for unit, _ in _COUNTED}
        rules = Rules(
            **counts,
            keep_within_ns=0 if keep_within is None else parse_duration(keep_within),
            older_than_ns=None if older_than is None else parse_duration(older_than),
            keep=keep,
        )
        return function(*arguments, rules=rules, **options)

    decorated: Callable[..., Any] = with_rules
    for option in reversed(_RETENTION_OPTIONS):
        decorated = option(decorated)
    return cast(Function, decorated)


def warn_of_future(program: str, kept: Mapping[str, Sequence[str]]) -> None:
    """Warn of snapshots that were kept only because their date is in the future.

    Args:
        program: the program's name, for the message.
        kept: for each kept snapshot the reasons, as `divide` returns them.
    """
    names = [name for name, reasons in kept.items() if FUTURE in reasons]
    if not names:
        return
    shown = ", ".join(map(repr, names[:FUTURE_SHOWN_MAX]))
    if len(names) > FUTURE_SHOWN_MAX:
        shown += f" and {len(names) - FUTURE_SHOWN_MAX} more"
    warn(program, f"kept in spite of the rules, because dated in the future: {shown}")


_COUNTED = (
    ("last", "Keep the newest N."),
    ("hourly", "Keep the newest of each hour, for the last N hours that have a snapshot."),
    ("daily", "The same for days."),
    ("weekly", "The same for weeks."),
    ("monthly", "The same for months."),
    ("yearly", "The same for years."),
)
_RETENTION_OPTIONS = (
    *[
        click.option(
            f"--keep-{unit}", metavar="N", type=click.IntRange(min=0), default=0, help=words
        )
        for unit, words in _COUNTED
    ],
    click.option(
        "--keep-within",
        metavar="DURATION",
        help="Keep those made within DURATION before the newest that is not automatic: 12h, 30d.",
    ),
    click.option(
        "--older-than",
        metavar="DURATION",
        help="Delete only snapshots older than DURATION: 2w, 1y6m.",
    ),
    click.option(
        "--keep",
        metavar="NAME",
        multiple=True,
        shell_complete=complete_name,
        help="Keep this snapshot, or all that match a pattern. Repeatable.",
    ),
)


@click.group()
def snapshot() -> None:
    """Keep states of a filesystem: create, list, delete, rename, hold snapshots.

    On a mount their files are below .snapshots/NAME. TARGET is a mount point or an image.
    """


@snapshot.command()
@target_argument
@click.argument("name", metavar="NAME")
@click.option("-m", "--message", metavar="TEXT", default="", help="A description.")
@json_option
def create(target: str, name: str, message: str, as_json: bool) -> None:
    """Keep the present state under a name. Takes no time and no space at any size.

    \b
    cowfs snapshot create ~/data before-upgrade -m 'all tests passed'
    """
    with connect(target) as filesystem:
        made = filesystem.create_snapshot(name, message)
    if as_json:
        print_json("cowfs snapshot create", {"snapshot": as_fields(made)})
    else:
        click.echo(f"created snapshot {printable(made.name)}")


@snapshot.command("list")
@target_argument
@list_options
def list_snapshots(target: str, as_json: bool, bare: bool, exact: bool) -> None:
    """List the snapshots, the oldest first. To see the space that each holds: cowdu TARGET.

    \b
    cowfs snapshot list ~/data
    cowfs snapshot list disk.img -H -p | cut -f 1
    """
    with connect(target) as filesystem:
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
            Column("HELD"),
            Column("DESCRIPTION"),
        ],
        [
            [
                found.name,
                numbers.time(found.created_ns),
                _referenced(found, numbers),
                found.parent or "-",
                "held" if found.held else "-",
                found.description,
            ]
            for found in snapshots
        ],
        bare=bare,
    )


def _referenced(found: SnapshotReport, numbers: Numbers) -> str:
    """Format the referenced size: an upper bound (<=) if files share blocks; cowdu is exact."""
    size = numbers.size(found.referenced_bytes)
    return size if found.referenced_is_exact or numbers.exact else f"<={size}"


@snapshot.command()
@target_argument
@names_argument
@dry_run_option
@click.option("--wait", is_flag=True, help="Return only when the space is free.")
@retention_options
@exact_option
@json_option
def delete(
    target: str,
    names: tuple[str, ...],
    dry_run: bool,
    wait: bool,
    rules: Rules,
    exact: bool,
    as_json: bool,
) -> None:
    """Delete snapshots: all that are named, or none.

    NAME is a name, a pattern such as 'auto-*', a range first%last in the order of creation (%last
    from the oldest, first% to the newest, % all), or several of these with commas. On a mount the
    space becomes free in the background; on an image that is not mounted, before the command ends.

    The options --keep... and --older-than are rules: of the named snapshots (of all if none is
    named) only those that no rule keeps are deleted. Days, weeks and months are those of the local
    clock, and only those with a snapshot count. With rules, held snapshots are kept; without rules,
    naming one is refused. A snapshot dated in the future, because a clock was wrong, is kept by the
    rules and not counted; to delete it, name it without a rule.

    \b
    cowfs snapshot delete -n ~/data monday%friday     how much would this free?
    cowfs snapshot delete ~/data monday%friday --wait
    cowfs snapshot delete disk.img old,older
    cowfs snapshot delete -n ~/data 'auto-*' --keep-last 3 --keep-daily 7
    cowfs snapshot delete ~/data --older-than 30d --keep 'release-*'
    """
    if not (names or rules.any):
        raise UsageError(
            "give a NAME, or a rule such as --keep-last; see cowfs snapshot delete --help"
        )
    with ExitStack() as stack:
        filesystem = stack.enter_context(connect(target))
        found, kept = divide(names, rules, filesystem.snapshots(), time.time_ns())
        warn_of_future("cowfs", kept)
        require_released(found)  # before the first of several requests to the daemon
        chosen = [each.name for each in found]
        reclaim_bytes = None
        if dry_run:
            reclaim_bytes = filesystem.reclaim(chosen).reclaim_bytes if chosen else 0
        elif chosen:
            bar = stack.enter_context(progress_bar("giving back space"))
            filesystem.delete_snapshots(chosen, wait=wait, progress=request_progress(bar))
    if as_json:
        fields = {
            "names": chosen,
            "dry_run": dry_run,
            "reclaim_bytes": reclaim_bytes,
            "kept": kept,
        }
        print_json("cowfs snapshot delete", fields)
        return
    words = "destroy\t" if exact else "would destroy " if dry_run else "destroyed "
    for name in chosen:
        click.echo(words + printable(name))
    if not (chosen or exact):
        click.echo("nothing to delete")
    if dry_run and not exact:
        for name, reasons in kept.items():
            click.echo(f"keep {printable(name)} ({', '.join(reasons)})")
    if reclaim_bytes is not None and (chosen or exact):
        words = "reclaim\t" if exact else "would reclaim "
        click.echo(words + Numbers(exact).size(reclaim_bytes))


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
    with connect(target) as filesystem:
        renamed = filesystem.rename_snapshot(old, new)
    if as_json:
        print_json("cowfs snapshot rename", {"snapshot": as_fields(renamed)})
    else:
        click.echo(f"renamed {printable(old)} to {printable(renamed.name)}")


@snapshot.command()
@target_argument
@click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=complete_name)
@json_option
def hold(target: str, names: tuple[str, ...], as_json: bool) -> None:
    """Protect snapshots from deletion until they are released.

    Holds all that are named, or none; NAME is as with delete. Rules keep held snapshots, and an
    undo leaves them in place. A hold stays when the snapshot is renamed or rolled back to.

    \b
    cowfs snapshot hold ~/data before-upgrade
    cowfs snapshot hold ~/data 'release-*'
    """
    _hold(target, names, held=True, as_json=as_json)


@snapshot.command()
@target_argument
@click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=complete_name)
@json_option
def release(target: str, names: tuple[str, ...], as_json: bool) -> None:
    """Release held snapshots, so that they can be deleted again.

    Releases all that are named, or none; NAME is as with delete. Naming one that is not held is no
    error.

    \b
    cowfs snapshot release ~/data before-upgrade
    cowfs snapshot release ~/data %
    """
    _hold(target, names, held=False, as_json=as_json)


def _hold(target: str, names: tuple[str, ...], *, held: bool, as_json: bool) -> None:
    with connect(target) as filesystem:
        chosen = [found.name for found in select(names, filesystem.snapshots())]
        changed = filesystem.hold_snapshots(chosen, held)
    if as_json:
        command = "cowfs snapshot hold" if held else "cowfs snapshot release"
        print_json(command, {"snapshots": as_fields(changed)})
        return
    for found in changed:
        click.echo(("held " if held else "released ") + printable(found.name))
