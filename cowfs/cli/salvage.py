"""`cowfs salvage`: copy files out of an image that cannot be mounted or repaired any more."""

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from cowfs.cli.output import Numbers, dry_run_option, json_option, print_json, progress_bar
from cowfs.cli.target import offline_device
from cowfs.errors import EXIT_ERROR, CowfsError
from cowfs.escapes import escaped_path, printable

if TYPE_CHECKING:
    from cowfs.care.salvage_report import SalvageReport
    from cowfs.storage.device import Device


@click.command()
@click.argument("image", metavar="IMG", type=click.Path())
@click.argument("folder", metavar="DIR", type=click.Path())
@click.option("--snapshots", is_flag=True, help="Copy the snapshots too, each in full.")
@dry_run_option
@json_option
@click.pass_context
def salvage(
    context: click.Context,
    image: str,
    folder: str,
    snapshots: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Copy what can still be read into an empty directory. The image is only read.

    Works without superblocks, with a damaged catalog, and with trees that have lost parts: then the
    whole image is searched. Every block is verified; an unreadable one becomes a hole in its file,
    and is listed. Exit status: 0 everything was copied, 1 something is missing.

    \b
    DIR/main/...          the files
    DIR/snapshots/NAME    with --snapshots
    DIR/lost+found        files that have lost their path, by inode number

    \b
    cowfs salvage disk.img /mnt/rescued -n
    cowfs salvage disk.img /mnt/rescued
    """
    from cowfs.care.salvage import salvage_image

    with (
        offline_device(image, writable=False) as device,
        progress_bar("reading") as bar,
    ):
        report = salvage_image(
            _with_log(device), folder, dry_run=dry_run, snapshots=snapshots, progress=bar
        )
    if as_json:
        fields = {
            "image": escaped_path(device.name),
            "dry_run": dry_run,
            "complete": report.complete,
        }
        print_json("cowfs salvage", fields | asdict(report))
    else:
        _print(report, dry_run=dry_run)
    context.exit(0 if report.complete else EXIT_ERROR)


def _with_log(device: "Device") -> "Device":
    """The image with its log in memory, as far as the image can be read."""
    from cowfs.history.images import with_log

    try:
        return with_log(device)
    except CowfsError:
        return device  # the search for what is left says why


def _print(report: "SalvageReport", *, dry_run: bool) -> None:
    for path in report.paths:
        click.echo(printable(path))
    for path, ranges in report.damaged:
        lost = sum(end - start for start, end in ranges)
        first = f"bytes {ranges[0][0]} to {ranges[0][1] - 1}"
        more = f" and {len(ranges) - 1} more ranges" if len(ranges) > 1 else ""
        click.echo(printable(f"damaged: {path}: {lost} bytes could not be read ({first}{more})"))
    for path in report.lost:
        click.echo(printable(f"lost: {path}"))
    for words in report.problems:
        click.echo(printable(f"problem: {words}"))
    if report.left_off:
        click.echo(f"and {report.left_off} more")
    verb = "would copy" if dry_run else "copied"
    size = "" if dry_run else f", {Numbers().size(report.bytes_copied)}"
    click.echo(
        printable(
            f"{verb} {report.files} files, {report.directories} directories, "
            f"{report.others} others{size} from {report.source}"
        )
    )
