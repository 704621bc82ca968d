"""`cowfs df`, `cowfs info`, `cowfs sync` and `cowfs trim`."""

import os
import stat

import click

from cowfs.api import Connection, connect
from cowfs.cli.output import (
    Column,
    Numbers,
    as_fields,
    json_option,
    list_options,
    print_facts,
    print_json,
    print_table,
    progress_bar,
    request_progress,
)
from cowfs.cli.snapshots import target_argument
from cowfs.escapes import escaped_path, printable
from cowfs.history.reports import InfoReport, ReclaimReport, SpaceReport

NEARLY_FULL_DIVISOR = 20  # nearly full: less than 1/20 of the image is available
SNAPSHOTS_MEASURED_MAX = 64  # the oldest ones; cowdu measures all
SNAPSHOTS_NAMED_MAX = 3  # in each list, that of the drop queue included

_SPACE = {
    "TOTAL": "total_bytes",
    "USED": "used_bytes",
    "TREE": "tree_bytes",
    "CATALOG": "catalog_bytes",
    "SYSTEM": "system_bytes",
    "PENDING": "pending_bytes",
    "FREE": "free_bytes",
    "PROMISED": "promised_bytes",
    "RESERVED": "reserved_bytes",
    "AVAILABLE": "available_bytes",
}


@click.command()
@target_argument
@list_options
def df(target: str, as_json: bool, bare: bool, exact: bool) -> None:
    """Show used, free and reserved space. To see which snapshots hold it: cowdu TARGET.

    When little is available, also names the snapshots whose deletion frees most.

    \b
    USED       TREE (files of all volumes and snapshots) and CATALOG (their records)
    SYSTEM     superblocks and the space map
    PENDING    freed, but kept until the retained generations that reach it expire
    PROMISED   for data in memory that waits for a commit
    RESERVED   held back, so that a full filesystem can delete; grows with what snapshots share
    AVAILABLE  for new data

    \b
    cowfs df ~/data
    cowfs df ~/data -H -p | cut -f 10
    """
    with connect(target) as filesystem:
        space = filesystem.space()
        largest = _largest(filesystem, space)
    if as_json:
        fields = {**as_fields(space), "largest_snapshots": [as_fields(each) for each in largest]}
        print_json("cowfs df", fields)
        return
    numbers = Numbers(exact)
    row = [numbers.size(getattr(space, field)) for field in _SPACE.values()]
    print_table([Column(title, right=True) for title in _SPACE], [row], bare=bare)
    if not bare:
        _print_drops(space, numbers)
        for each in largest:
            freed = numbers.size(each.reclaim_bytes)
            click.echo(f"nearly full: deleting {_named(each.names)} frees {freed}")
        if len(largest) > 1:
            click.echo("to find the fewest that free SIZE: cowdu plan TARGET --free SIZE")


def _largest(filesystem: Connection, space: SpaceReport) -> list[ReclaimReport]:
    """Measure which snapshots' deletion frees most, if the filesystem is nearly full.

    This process reads the image, at a generation that the daemon pins.

    Returns:
        The SNAPSHOTS_NAMED_MAX largest, each alone, then all measured ones together. Empty if the
        filesystem is not nearly full.
    """
    if space.available_bytes * NEARLY_FULL_DIVISOR > space.total_bytes:
        return []
    # The snapshots whose deletion frees most are seldom among the newest.
    names = [each.name for each in filesystem.snapshots()][:SNAPSHOTS_MEASURED_MAX]
    if not names:
        return []
    from cowfs.accounting.snapshot_usage import reclaim_report  # reads the image: needs numpy

    with filesystem.reading() as opened:
        alone = [reclaim_report(opened, [name]) for name in names]
        together = [reclaim_report(opened, names)] if len(names) > 1 else []
    alone.sort(key=lambda report: report.reclaim_bytes, reverse=True)
    return [*alone[:SNAPSHOTS_NAMED_MAX], *together]


def _print_drops(space: SpaceReport, numbers: Numbers) -> None:
    stuck_first = sorted(space.drops, key=lambda drop: not drop.stuck)
    for drop in stuck_first[:SNAPSHOTS_NAMED_MAX]:
        state = "cannot be freed, run cowfs check" if drop.stuck else "is being freed"
        click.echo(
            f"deleted snapshot {printable(drop.name)} {state}: {numbers.size(drop.freed_bytes)} "
            f"of at most {numbers.size(drop.referenced_bytes)}"
        )
    rest = stuck_first[SNAPSHOTS_NAMED_MAX:]
    if rest:
        stuck = sum(drop.stuck for drop in rest)
        words = f" ({stuck} cannot be freed, run cowfs check)" if stuck else ""
        click.echo(
            f"{len(rest)} more deleted snapshots are being freed{words}: "
            f"{numbers.size(sum(drop.freed_bytes for drop in rest))} of at most "
            f"{numbers.size(sum(drop.referenced_bytes for drop in rest))}"
        )


def _named(names: tuple[str, ...]) -> str:
    """List the names if few; else name the oldest snapshots as a range that commands accept."""
    if len(names) <= SNAPSHOTS_NAMED_MAX:
        return ",".join(map(printable, names))
    return f"the {len(names)} oldest (%{printable(names[-1])})"


@click.command()
@target_argument
@click.option(
    "--generations", is_flag=True, help="List the commits still in the image, the newest first."
)
@list_options
def info(target: str, generations: bool, as_json: bool, bare: bool, exact: bool) -> None:
    """Show what an image is, and how it is mounted.

    With --generations it lists the commits that are still in the image. Those marked KEPT are
    whole; of the others, blocks may have been reused. STATE says whether their roots are readable.

    \b
    cowfs info disk.img
    cowfs info ~/data --json
    cowfs info disk.img --generations
    cowfs mount disk.img ~/look -o generation=41      look at one, read-only
    cowfs rollback disk.img --generation 41           go back to it for good
    """
    if generations:
        _show_generations(target, Numbers(exact), as_json=as_json, bare=bare)
        return
    with connect(target) as filesystem:
        report = filesystem.info()
    if as_json:
        print_json("cowfs info", as_fields(report))
    else:
        print_facts(_facts(report))


def _show_generations(target: str, numbers: Numbers, *, as_json: bool, bare: bool) -> None:
    from dataclasses import asdict

    from cowfs.care.generations import generation_reports

    with (
        connect(target) as filesystem,
        progress_bar("reading") as bar,
        filesystem.device() as (device, _),
    ):
        reports = generation_reports(
            device, None if bar is None else lambda done, total: bar("reading", done, total)
        )
    if as_json:
        image = escaped_path(filesystem.image)
        fields = {"image": image, "generations": [asdict(found) for found in reports]}
        print_json("cowfs info", fields)
        return
    print_table(
        [
            Column("GENERATION", right=True),
            Column("COMMITTED"),
            Column("KEPT"),
            Column("SNAPSHOTS", right=True),
            Column("USED", right=True),
            Column("LOG", right=True),
            Column("STATE"),
        ],
        [
            [
                str(found.generation),
                numbers.time(found.committed_ns),
                "newest" if found.newest else "yes" if found.retained else "no",
                "-" if found.snapshot_count is None else str(found.snapshot_count),
                numbers.size(found.used_bytes),
                str(found.log_calls) if found.log_calls else "-",
                found.problem or "readable",
            ]
            for found in reports
        ],
        bare=bare,
    )


def _facts(report: InfoReport) -> list[tuple[str, str]]:
    numbers = Numbers()
    copies = "two copies" if report.duplicated_metadata else "one copy"
    facts = [
        ("image", report.image),
        ("label", report.label or "-"),
        ("uuid", report.uuid),
        ("format", str(report.format_version)),
        ("size", f"{numbers.size(report.total_bytes)} ({report.total_bytes} bytes)"),
        ("blocks", f"{report.block_size_bytes} bytes, nodes {report.node_size_bytes} bytes"),
        ("metadata", copies),
        ("generation", f"{report.generation} of {numbers.time(report.committed_ns)}"),
        ("log", _log(report, numbers)),
        ("created", numbers.time(report.created_ns)),
        ("clean", "yes" if report.clean else "no"),
        ("snapshots", str(report.snapshot_count)),
        ("inodes", str(report.inode_count)),
        ("scrub", _last_scrub(report.uuid)),
    ]
    if report.mount_point is not None:
        facts += [
            ("mounted on", report.mount_point),
            ("daemon", f"process {report.daemon_pid}"),
            ("writing", _writing(report, numbers)),
            ("able to", ", ".join(report.features) or "nothing that needs the compiled module"),
        ]
        settings = report.daemon_settings or {}
        facts += [("", f"{name} = {value}") for name, value in settings.items()]
    else:
        facts.append(("mounted", "no"))
    return facts


def _log(report: InfoReport, numbers: Numbers) -> str:
    if not report.log_bytes:
        return "none; a writable mount makes one, if there is room"
    size = numbers.size(report.log_bytes)
    if not report.log_calls:
        return size
    return f"{size}, with {report.log_calls} calls after generation {report.generation}"


def _writing(report: InfoReport, numbers: Numbers) -> str:
    if report.failure is not None:
        ended = "" if report.failed_ns is None else f" at {numbers.time(report.failed_ns)}"
        return f"ended{ended}: {report.failure}"
    settings = report.daemon_settings or {}
    return "no: mounted read-only" if settings.get("read_only") else "yes"


def _last_scrub(uuid: str) -> str:
    from cowfs.cli.scrub_state import ScrubState

    last = ScrubState(uuid).report()
    if last is None:
        return "never"
    return (
        f"{last.state}, started {Numbers().time(last.started_ns)}: {last.repaired} repaired, "
        f"{last.unrepaired} not repaired, {last.damaged} lost"
    )


@click.command()
@target_argument
@json_option
def sync(target: str, as_json: bool) -> None:
    """Make everything written so far durable. (sync(1) does not reach a FUSE filesystem.)

    \b
    cowfs sync ~/data
    """
    with connect(target) as filesystem:
        generation = filesystem.sync()
    if as_json:
        print_json("cowfs sync", {"generation": generation})


@click.command()
@target_argument
@json_option
def trim(target: str, as_json: bool) -> None:
    """Give all free space of an image back to the host, mounted or not.

    A mount does this by itself for large free runs, some seconds after they became free, unless it
    has -o nodiscard. This command gives back every free block, also those freed in earlier mounts.
    The space of a deleted snapshot is free once cowfs df no longer lists the snapshot; cowfs
    snapshot delete --wait waits for that.

    \b
    cowfs trim ~/data
    cowfs trim disk.img --json
    """
    with connect(target) as filesystem, progress_bar("trimming") as bar:
        report = filesystem.trim(request_progress(bar))
        host_bytes = _host_bytes(filesystem.image)
    if as_json:
        fields = {"image": filesystem.image, **as_fields(report), "host_bytes": host_bytes}
        print_json("cowfs trim", fields)
        return
    numbers = Numbers()
    takes = "" if host_bytes is None else f"; the image now takes {numbers.size(host_bytes)} there"
    click.echo(f"gave {numbers.size(report.trimmed_bytes)} of free space to the host{takes}")


def _host_bytes(image: str) -> int | None:
    """The bytes that an image takes on the host; None if it is no regular file or was removed."""
    try:
        status = os.stat(image)
    except OSError:
        return None
    return status.st_blocks * 512 if stat.S_ISREG(status.st_mode) else None
