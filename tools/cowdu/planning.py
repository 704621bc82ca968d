"""`cowdu plan`: find the snapshots to delete to free a given size, and lose least."""

from collections.abc import Sequence

import click
from msgspec import Struct

from cowfs.accounting.owners import OwnerKind, OwnerSets
from cowfs.accounting.plan import Loss, NotEnoughError, Plan, plan_reclaim
from cowfs.cli.output import (
    Column,
    Numbers,
    as_fields,
    counted,
    list_options,
    print_json,
    print_table,
)
from cowfs.cli.snapshots import names_argument, retention_options, target_argument
from cowfs.daemon.options import parse_size
from cowfs.errors import CowfsError
from cowfs.escapes import shell_word
from cowfs.history.records import RootRecord
from cowfs.history.reports import image_name
from cowfs.history.retention import Rules
from cowfs.storage.format import BLOCK_SIZE_BYTES

from .choosing import kept_records
from .looking import look

RANGE_MIN = 3  # neighbours that the command names as a range


class PlannedSnapshot(Struct, frozen=True, kw_only=True):
    """A snapshot of the plan.

    Attributes:
        alone_bytes: what deleting this snapshot alone would free.
        needed_bytes: what the plan would free less without this snapshot.
    """

    name: str
    created_ns: int
    alone_bytes: int
    needed_bytes: int
    reason: str


class PlanReport(Struct, frozen=True, kw_only=True):
    """A plan: the snapshots to delete.

    Attributes:
        reclaim_bytes: what deleting exactly these snapshots frees.
        exact: it is proved that no other choice loses less.
        at_least: no set of fewer snapshots than this frees enough.
        linear: there were no rollbacks and no copies out of snapshots, so every plan is exact.
        kept: for each snapshot that must stay, why.
        command: deletes the snapshots of the plan.
    """

    image: str
    generation: int
    wanted_bytes: int
    reclaim_bytes: int
    loss: str
    exact: bool
    at_least: int
    linear: bool
    snapshots: tuple[PlannedSnapshot, ...]
    kept: dict[str, tuple[str, ...]]
    command: str


@click.command()
@target_argument
@names_argument
@click.option(
    "--free", "size", metavar="SIZE", required=True, help="The space to free: 500M, 2G, 1.5T."
)
@click.option(
    "--lose",
    type=click.Choice([each.value for each in Loss]),
    default=Loss.FEWEST.value,
    show_default=True,
    help="Lose the fewest snapshots; or the oldest: only those before some day, and few of them.",
)
@retention_options
@list_options
def plan(
    target: str,
    names: tuple[str, ...],
    size: str,
    lose: str,
    rules: Rules,
    as_json: bool,
    bare: bool,
    exact: bool,
) -> None:
    """Find the snapshots to delete to free SIZE and lose least. Deletes nothing.

    Chooses among the named snapshots (all without names), except held ones and those that a rule
    keeps. Deleting exactly the plan frees the number shown, to the byte. The plan surely has the
    fewest snapshots as long as there was no rollback and nothing was copied out of a snapshot;
    otherwise a line says how many are needed at least.

    \b
    cowdu plan ~/data --free 2G
    cowdu plan ~/data --free 2G --lose oldest --keep-daily 7 --keep 'release-*'
    cowdu plan ~/data 'auto-*' --free 500M --json
    """
    wanted_bytes = parse_size(size)
    wanted_blocks = -(-wanted_bytes // BLOCK_SIZE_BYTES)
    numbers = Numbers(exact)
    with look(target) as found:
        allowed, kept = kept_records(found.snapshots, names, rules)
        sets = found.sets()
        bits = [sets.bit(OwnerKind.SNAPSHOT, record.root_id) for record in allowed]
        try:
            made = plan_reclaim(sets, bits, wanted_blocks, Loss(lose))
        except NotEnoughError as error:
            raise _refusal(sets, allowed, error, wanted_bytes) from None
        planned = _planned(found.snapshots, made, numbers)
        report = PlanReport(
            image=image_name(found.filesystem),
            generation=found.generation,
            wanted_bytes=wanted_bytes,
            reclaim_bytes=made.blocks * BLOCK_SIZE_BYTES,
            loss=lose,
            exact=made.exact,
            at_least=made.at_least,
            linear=made.linear,
            snapshots=planned,
            kept=kept,
            command=deletion_command(target, found.snapshots, {each.name for each in planned}),
        )
    if as_json:
        print_json("cowdu plan", as_fields(report))
    else:
        _print(report, numbers, bare=bare)


def _refusal(
    sets: OwnerSets, allowed: Sequence[RootRecord], error: NotEnoughError, wanted_bytes: int
) -> CowfsError:
    numbers = Numbers()
    everything = sets.exclusive(range(sets.snapshot_count)).total
    most, more = error.most_blocks * BLOCK_SIZE_BYTES, everything - error.most_blocks
    freed = numbers.size(most)
    words = f"deleting all {counted(len(allowed), 'snapshot')} that may be deleted frees {freed}"
    if not allowed:
        words = "there is no snapshot that may be deleted"
    words += f"; {numbers.size(wanted_bytes)} were asked for"
    if more:
        words += f", and the snapshots to keep hold another {numbers.size(more * BLOCK_SIZE_BYTES)}"
    return CowfsError(words)


def _planned(
    snapshots: Sequence[RootRecord], made: Plan, numbers: Numbers
) -> tuple[PlannedSnapshot, ...]:
    rows = []
    for chosen in made.chosen:
        record = snapshots[chosen.bit]
        alone = chosen.alone * BLOCK_SIZE_BYTES
        needed = chosen.needed * BLOCK_SIZE_BYTES
        together = f"{numbers.size(needed - alone)} together with others of the plan"
        if needed == alone:
            reason = f"keeps {numbers.size(alone)} alone"
        elif not alone:
            reason = f"keeps {together}"
        else:
            reason = f"keeps {numbers.size(alone)} alone, {together}"
        rows.append(
            PlannedSnapshot(
                name=record.name,
                created_ns=record.created_ns,
                alone_bytes=alone,
                needed_bytes=needed,
                reason=reason,
            )
        )
    return tuple(rows)


def deletion_command(target: str, snapshots: Sequence[RootRecord], chosen: set[str]) -> str:
    """The command that deletes the chosen snapshots; neighbours are written as a range."""
    words: list[str] = []
    run: list[str] = []
    for name in [*(record.name for record in snapshots), None]:
        if name in chosen and name is not None:
            run.append(name)
            continue
        words += [f"{run[0]}%{run[-1]}"] if len(run) >= RANGE_MIN else run
        run = []
    if not words:
        return ""
    place = target if not target.startswith("-") else f"./{target}"
    return " ".join(map(shell_word, ["cowfs", "snapshot", "delete", place, *words]))


def _print(report: PlanReport, numbers: Numbers, *, bare: bool) -> None:
    print_table(
        [
            Column("NAME"),
            Column("CREATED"),
            Column("ALONE", right=True),
            Column("IN PLAN", right=True),
            Column("WHY"),
        ],
        [
            [
                row.name,
                numbers.time(row.created_ns),
                numbers.size(row.alone_bytes),
                numbers.size(row.needed_bytes),
                row.reason,
            ]
            for row in report.snapshots
        ],
        bare=bare,
    )
    if bare:
        return
    count = len(report.snapshots)
    freed = numbers.size(report.reclaim_bytes)
    if not count:
        click.echo("nothing needs to be deleted for that")
        return
    click.echo(f"deleting {counted(count, 'snapshot')} frees {freed}")
    if not report.exact:
        click.echo(
            "there were rollbacks or copies out of snapshots: perhaps fewer snapshots are enough, "
            f"but at least {report.at_least}"
        )
    elif report.loss == Loss.OLDEST:
        click.echo("no set of older snapshots frees enough, and no fewer of these")
    else:
        click.echo("no fewer snapshots free enough")
    if report.kept:
        click.echo(f"{counted(len(report.kept), 'snapshot')} must stay: held, or kept by a rule")
    click.echo(report.command)
