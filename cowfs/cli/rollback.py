"""`cowfs rollback` sets a filesystem back to a snapshot; `cowfs undo` takes that back.

Both keep the state before as an automatic snapshot, so nothing is lost.
"""

import click

from cowfs.api import Connection, connect
from cowfs.cli.entry import warn
from cowfs.cli.output import (
    Numbers,
    as_fields,
    check_progress,
    dry_run_option,
    json_option,
    print_json,
    progress_bar,
)
from cowfs.cli.snapshots import complete_name, target_argument
from cowfs.cli.target import confirm, offline_device, yes_option
from cowfs.errors import ImageError, UsageError
from cowfs.escapes import printable, quoted
from cowfs.history.selection import select

NAMED_MAX = 5  # processes and mounts named in a warning

force_option = click.option(
    "--force",
    is_flag=True,
    help="Go on although files are open for writing; their writers get ESTALE.",
)


@click.command()
@target_argument
@click.argument("name", metavar="[NAME]", required=False, shell_complete=complete_name)
@click.option(
    "--generation", type=click.IntRange(min=1), help="Go back to this commit; for rescue."
)
@force_option
@dry_run_option
@yes_option
@json_option
def rollback(
    target: str,
    name: str | None,
    generation: int | None,
    force: bool,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Set the filesystem back to a snapshot, also while it is mounted.

    The present state is kept as an automatic snapshot, and every other snapshot stays, newer ones
    too. `cowfs undo` takes the rollback back.

    Programs whose working directory is below the root of the mount, and bind mounts of directories
    there, still see the state before and cannot write; a warning names them. To see the new state
    they must enter the directory, or mount it, anew.

    With --generation a whole image that is not mounted goes back to an earlier commit: files and
    snapshots made since are gone. That commit is checked first, and must be clean unless --force is
    given. `cowfs info --generations` lists the commits.

    \b
    cowfs rollback ~/data before-upgrade
    cowfs rollback disk.img --generation 41 -n
    """
    if (name is None) == (generation is None):
        raise UsageError("name a snapshot, or give --generation")
    if generation is not None:
        restored = _go_back(target, generation, force=force, dry_run=dry_run, yes=yes)
        if as_json:
            moved = {"generation": generation, "dry_run": dry_run, "new_generation": restored}
            print_json("cowfs rollback", moved)
        elif restored is None:
            click.echo(f"would go back to generation {generation}; all later commits would be gone")
        else:
            click.echo(f"went back to generation {generation}, which is now generation {restored}")
        return
    assert name is not None
    with connect(target) as filesystem:
        if dry_run:
            chosen = select([name], filesystem.snapshots())
            if len(chosen) != 1 or chosen[0].name != name:
                raise UsageError(f"{quoted(name)} is not the name of one snapshot")
            kept = None
        else:
            behind = _staying_behind(filesystem)
            kept = filesystem.rollback(name, force=force)
            _warn_of_staying_behind(behind)
    if as_json:
        fields = {"name": name, "dry_run": dry_run, "kept": as_fields(kept)}
        print_json("cowfs rollback", fields)
    elif kept is None:
        created = Numbers().time(chosen[0].created_ns)
        click.echo(f"would roll back to {printable(name)} of {created}")
    else:
        click.echo(
            f"rolled back to {printable(name)}; the state before is kept as {printable(kept.name)}"
        )


def _staying_behind(filesystem: Connection) -> list[str]:
    """Describe the processes and bind mounts that will still see the state before a rollback."""
    from cowfs.daemon.processes import holding_directories

    if filesystem.daemon is None:
        return []
    mount_point = filesystem.info().mount_point
    return [] if mount_point is None else holding_directories(mount_point)


def _warn_of_staying_behind(behind: list[str]) -> None:
    if behind:
        more = f" and {len(behind) - NAMED_MAX} more" if len(behind) > NAMED_MAX else ""
        warn(
            "cowfs",
            f"warning: {', '.join(behind[:NAMED_MAX])}{more} still see the state before; enter "
            "those directories, or mount them, anew",
        )


def _go_back(target: str, generation: int, *, force: bool, dry_run: bool, yes: bool) -> int | None:
    """Make an earlier commit of an image the newest. Returns its new number; None if `dry_run`."""
    from cowfs.care.check import check_image
    from cowfs.history.images import restore_generation

    with offline_device(target, writable=not dry_run) as device, progress_bar("checking") as bar:
        report = check_image(device, generation=generation, progress=check_progress(bar))
        if not report.clean and not force:
            raise ImageError(
                f"generation {generation} is not whole any more ({report.errors[0]}); "
                f"mount it with -o generation={generation} to look at it, or go back to it in "
                "spite of the damage with --force"
            )
        if dry_run:
            return None
    with offline_device(target, writable=True) as device:
        confirm(
            f"go back to generation {generation}? All later commits of {device.name} are lost",
            yes=yes,
        )
        return restore_generation(device, generation).generation


@click.command()
@target_argument
@force_option
@json_option
def undo(target: str, force: bool, as_json: bool) -> None:
    """Take back the last rollback, or the last undo.

    As with a rollback, the present state is kept as an automatic snapshot.

    \b
    cowfs undo ~/data
    """
    with connect(target) as filesystem:
        behind = _staying_behind(filesystem)
        kept = filesystem.undo(force=force)
        _warn_of_staying_behind(behind)
    if as_json:
        print_json("cowfs undo", {"kept": as_fields(kept)})
    else:
        click.echo(f"undone; the state before is kept as {printable(kept.name)}")
