"""`cowfs mkfs` makes an image, `cowfs check` checks and repairs one.

mkfs overwrites data only with --force, and never an image that is in use: it takes the lock before
it looks at the contents. If mkfs fails, it removes a file that it made.
"""

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import click

from cowfs.api import connect
from cowfs.cli.entry import warn
from cowfs.cli.output import (
    Numbers,
    as_fields,
    check_progress,
    counted,
    json_option,
    print_json,
    progress_bar,
)
from cowfs.cli.target import confirm, offline_device, refuse_mounted, yes_option
from cowfs.errors import EXIT_ERROR, ImageError, UsageError
from cowfs.escapes import escaped_path, printable

if TYPE_CHECKING:
    from cowfs.care.report import CheckReport
    from cowfs.storage.device import FileDevice

DEFAULT_SIZE_BYTES = 4 << 30
_PROBE_BYTES = 1 << 20  # any filesystem or partition table has nonzero bytes in here


@click.command()
@click.argument("image", metavar="IMG", type=click.Path())
@click.option(
    "--size",
    metavar="SIZE",
    help="Such as 512M, 4G or 1.5TiB. [default: 4G, or the size of what is there]",
)
@click.option("--label", default="", help="A name for the filesystem, up to 64 bytes.")
@click.option(
    "--no-duplicate-metadata",
    "single",
    is_flag=True,
    help="Keep one copy of metadata, not two: takes less space, but scrub cannot repair it.",
)
@click.option(
    "--preallocate",
    is_flag=True,
    help="Take the space from the host now. Mount with -o nodiscard to keep it.",
)
@click.option("--force", is_flag=True, help="Overwrite an image or other data.")
@json_option
def mkfs(
    image: str,
    size: str | None,
    label: str,
    single: bool,
    preallocate: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Make an image file (or use a block device) and an empty filesystem in it.

    The file is sparse: it takes space from the host as it fills. Only its owner can read it.

    \b
    cowfs mkfs disk.img --size 20G --label photos
    cowfs mkfs disk.img --size 1T --preallocate
    """
    from cowfs.daemon.options import parse_size
    from cowfs.storage.format import (
        BLOCK_SIZE_BYTES,
        LABEL_BYTES_MAX,
        MAX_TOTAL_BLOCKS,
        MIN_TOTAL_BLOCKS,
    )

    minimum_bytes = MIN_TOTAL_BLOCKS * BLOCK_SIZE_BYTES
    size_bytes = None if size is None else parse_size(size) // BLOCK_SIZE_BYTES * BLOCK_SIZE_BYTES
    if size_bytes is not None and size_bytes < minimum_bytes:
        raise UsageError(f"--size {size} is too small: an image needs at least 16 MiB")
    if size_bytes is not None and size_bytes > MAX_TOTAL_BLOCKS * BLOCK_SIZE_BYTES:
        raise UsageError(f"--size {size} is too large: an image has at most 4 PiB")
    if len(label.encode(errors="replace")) > LABEL_BYTES_MAX or not label.isprintable():
        raise UsageError(f"a label is up to {LABEL_BYTES_MAX} bytes of printable text")

    with _target_device(os.path.abspath(image), size_bytes, force=force) as device:
        if preallocate:
            _preallocate(device)
        else:
            _warn_of_small_host(device)
        uuid = _make(device, label, duplicate_metadata=not single)

    if as_json:
        fields = {"image": escaped_path(device.name), "uuid": uuid, "label": label}
        fields_of_size = {"total_bytes": device.size_bytes, "duplicated_metadata": not single}
        print_json("cowfs mkfs", fields | fields_of_size)
    else:
        shown = Numbers().size(device.size_bytes)
        click.echo(f"made {printable(device.name)}: {shown}, empty; cowfs mount mounts it")


def _make(device: "FileDevice", label: str, *, duplicate_metadata: bool) -> str:
    from uuid import UUID

    from cowfs.history.images import make_filesystem

    superblock = make_filesystem(
        device,
        label=label,
        duplicate_metadata=duplicate_metadata,
        uid=os.geteuid(),
        gid=os.getegid(),
    )
    return str(UUID(bytes=superblock.uuid))


@contextmanager
def _target_device(path: str, size_bytes: int | None, *, force: bool) -> "Iterator[FileDevice]":
    """Open and lock the image file or block device, at the size wanted.

    If the block fails, a file that was made here is removed.
    """
    from cowfs.storage.device import FileDevice, create_file

    made = False
    try:
        status = os.stat(path)
    except FileNotFoundError:
        made = True
    except OSError as error:
        raise ImageError(f"cannot open {path}: {error.strerror}") from None
    if made:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise ImageError(f"cannot make {path}: {error.strerror}") from None
    elif stat.S_ISDIR(status.st_mode):
        raise ImageError(f"{path} is a directory; an image is a file or a block device")

    try:
        device = FileDevice(path, writable=True)
        try:
            if not made:
                refuse_mounted(path)
            if not made and not force:
                _refuse_data(device, size_bytes)
            if not made and stat.S_ISBLK(status.st_mode):
                if size_bytes is not None and size_bytes > device.size_bytes:
                    raise UsageError(
                        f"--size is too large: {path} has only {device.size_bytes} bytes"
                    )
                device.size_bytes = size_bytes or device.size_bytes
            else:
                wanted = size_bytes or device.size_bytes or DEFAULT_SIZE_BYTES
                create_file(path, wanted)
                device.size_bytes = wanted
            yield device
        finally:
            device.close()
    except BaseException:
        if made:
            os.unlink(path)
        raise


def _refuse_data(device: "FileDevice", size_bytes: int | None) -> None:
    """Refuse a device that holds an image or other data, or that --size would shorten."""
    from cowfs.errors import CowfsError
    from cowfs.storage.superblock import read_newest

    if not device.size_bytes:
        return
    try:
        superblock = read_newest(device)
    except CowfsError:
        holds_image = False
    else:
        holds_image = True
    if holds_image:
        label = f" ({superblock.label})" if superblock.label else ""
        raise ImageError(f"{device.name} holds a cowfs image{label}; --force overwrites it")
    if any(device.read(0, min(_PROBE_BYTES, device.size_bytes))):
        raise ImageError(f"{device.name} holds data; --force overwrites it")
    if size_bytes is not None and size_bytes < device.size_bytes:
        raise ImageError(f"{device.name} is larger than --size; --force shortens it")


def _preallocate(device: "FileDevice") -> None:
    try:
        descriptor = os.open(device.name, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.posix_fallocate(descriptor, 0, device.size_bytes)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ImageError(f"cannot preallocate {device.name}: {error.strerror}") from None


def _warn_of_small_host(device: "FileDevice") -> None:
    if not os.path.isfile(device.name):
        return
    host = os.statvfs(os.path.dirname(device.name))
    free_bytes = host.f_bavail * host.f_frsize
    if free_bytes < device.size_bytes:
        numbers = Numbers()
        warn(
            "cowfs",
            f"warning: the host has {numbers.size(free_bytes)} free, less than the "
            f"{numbers.size(device.size_bytes)} of the image; writes fail when it is full",
        )


# --- check ----------------------------------------------------------------------------------------


@click.command()
@click.argument("target", metavar="TARGET", type=click.Path())
@click.option("--no-data", is_flag=True, help="Leave out the checksums of file data: faster.")
@click.option(
    "--repair", is_flag=True, help="Write wrong counts and the space map anew; not while mounted."
)
@click.option(
    "-n", "--dry-run", "dry_run", is_flag=True, help="With --repair: only show what would happen."
)
@click.option(
    "--accept-loss", is_flag=True, help="With --repair: go on although nodes are lost for good."
)
@yes_option
@json_option
@click.pass_context
def check(
    context: click.Context,
    target: str,
    no_data: bool,
    repair: bool,
    dry_run: bool,
    accept_loss: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Check an image, or a mount while it is in use. Without --repair nothing is changed.

    Every node and every block in use is read and compared with its checksum; every refcount, link
    count and number of free blocks is counted anew. Exit status: 0 clean, 1 not clean.

    --repair writes the space map and the counts anew from what the files and snapshots reach, and
    bad copies of metadata from the good ones. It overwrites nothing in use, and checks again.

    \b
    cowfs check disk.img
    cowfs check ~/data --no-data
    cowfs check disk.img --repair -n       what would a repair change?
    """
    if repair:
        _repair(
            context,
            target,
            data=not no_data,
            dry_run=dry_run,
            accept_loss=accept_loss,
            yes=yes,
            as_json=as_json,
        )
        return
    if dry_run or accept_loss or yes:
        raise UsageError("-n, --yes and --accept-loss need --repair")
    from cowfs.care.check import check_image

    with (
        connect(target) as filesystem,
        progress_bar("reading") as bar,
        filesystem.device() as (device, generation),
    ):
        report = check_image(
            device, generation=generation, progress=check_progress(bar), data=not no_data
        )

    if as_json:
        image = escaped_path(filesystem.image)
        print_json("cowfs check", {"image": image, **_check_fields(report)})
    else:
        _print_check(filesystem.image, report)
    context.exit(0 if report.clean else EXIT_ERROR)


def _repair(
    context: click.Context,
    image: str,
    *,
    data: bool,
    dry_run: bool,
    accept_loss: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Print what a repair would change, ask, repair, and check again."""
    from cowfs.care.check import check_image
    from cowfs.care.repair import repair_image
    from cowfs.history.images import commit_log, with_log
    from cowfs.storage.overlay import OverlayDevice

    with (
        offline_device(image, writable=not dry_run) as image_device,
        progress_bar("reading") as bar,
    ):
        device = with_log(image_device)
        plan = repair_image(
            device,
            dry_run=True,
            accept_loss=accept_loss,
            data=data,
            progress=check_progress(bar),
        )
    replay = device.replay if isinstance(device, OverlayDevice) else None
    changes = plan.changes
    if replay is not None and replay.error is not None:
        changes = (f"give up the rest of the log: {replay.error}", *changes)
    if replay is not None and changes:
        calls = f"commit the {replay.calls} calls of the log after generation {replay.generation}"
        changes = (calls, *changes)
    if not as_json:
        for words in changes:
            click.echo(f"would {printable(words)}")
        for finding in plan.remaining:
            click.echo(printable(f"cannot be repaired: {finding}"))
    done, clean = plan, not changes and not plan.remaining
    if changes and not dry_run:
        with offline_device(image, writable=True) as writable_device:
            confirm(f"repair {writable_device.name}?", yes=yes)
            committed = commit_log(writable_device)
            done = repair_image(writable_device, accept_loss=accept_loss)
            report = check_image(writable_device, data=data)
            clean = report.clean
            if done.generation is None and committed is not None:
                done = replace(done, generation=report.generation)
    if as_json:
        name = escaped_path(os.path.abspath(image))
        fields = {"image": name, "dry_run": dry_run, "clean": clean}
        repaired = {"generation": done.generation, "changes": list(changes)}
        remaining = [as_fields(asdict(finding)) for finding in plan.remaining]
        print_json("cowfs check", fields | repaired | {"remaining": remaining})
    elif done.generation is not None:
        state = "clean" if clean else "NOT CLEAN"
        click.echo(f"repaired {printable(image)}: generation {done.generation} is {state}")
    elif not changes:
        click.echo(f"{printable(image)}: nothing to repair")
    context.exit(0 if clean else EXIT_ERROR)


def _check_fields(report: "CheckReport") -> dict[str, object]:
    return {"clean": report.clean, **as_fields(asdict(report))}


def _print_check(image: str, report: "CheckReport") -> None:
    for finding in report.findings:
        click.echo(printable(str(finding)))
    if report.findings_left_off:
        click.echo(f"and {report.findings_left_off} more")
    counts = (
        f"generation {report.generation}, {report.roots} roots, {report.inodes} inodes, "
        f"{report.nodes} nodes, {report.data_blocks} data blocks"
    )
    if report.replay is not None:
        click.echo(
            f"the log was made again in memory: {report.replay.calls} calls after generation "
            f"{report.replay.generation}"
        )
    errors = counted(len(report.errors) + report.findings_left_off, "error")
    sys.stdout.flush()
    state = "clean" if report.clean else f"NOT CLEAN, {errors}"
    click.echo(f"{printable(image)} is {state}: {counts}")
    repairable = sum(finding.repairable for finding in report.errors)
    if repairable:
        click.echo(f"{repairable} of the errors can be repaired: see cowfs check --repair -n")
