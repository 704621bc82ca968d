"""`cowfs rollback` and `cowfs undo`: go back, and take that back. Nothing is lost by either."""

import click

from cowfs.cli.entry import printable
from cowfs.cli.output import Numbers, as_fields, json_option, print_json
from cowfs.cli.snapshots import complete_name, target_argument
from cowfs.cli.target import open_target
from cowfs.errors import UsageError
from cowfs.history.selection import select

force_option = click.option(
    "--force", is_flag=True, help="Even while files are open for writing; their writers get ESTALE."
)


@click.command()
@target_argument
@click.argument("name", metavar="NAME", shell_complete=complete_name)
@force_option
@click.option("-n", "--dry-run", "dry_run", is_flag=True, help="Only tell what would happen.")
@json_option
def rollback(target: str, name: str, force: bool, dry_run: bool, as_json: bool) -> None:
    """Set the filesystem back to a snapshot, also while it is mounted.

    The state of now is kept as an automatic snapshot, and every other snapshot stays, newer ones
    too. `cowfs undo` takes it back.

    \b
    cowfs rollback ~/data before-upgrade
    """
    with open_target(target) as filesystem:
        if dry_run:
            chosen = select([name], filesystem.snapshots())
            if len(chosen) != 1 or chosen[0].name != name:
                raise UsageError(f"{name!r} is not the name of one snapshot")
            kept = None
        else:
            kept = filesystem.rollback(name, force=force)
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


@click.command()
@target_argument
@force_option
@json_option
def undo(target: str, force: bool, as_json: bool) -> None:
    """Take back the last rollback, or the last undo.

    The state that this leaves is kept as an automatic snapshot, as with a rollback.

    \b
    cowfs undo ~/data
    """
    with open_target(target) as filesystem:
        kept = filesystem.undo(force=force)
    if as_json:
        print_json("cowfs undo", {"kept": as_fields(kept)})
    else:
        click.echo(f"undone; the state before is kept as {printable(kept.name)}")
