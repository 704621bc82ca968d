"""`cowdu du`: what files and directories hold, in total and exclusively; as `btrfs fi du`."""

import os
from collections.abc import Iterator, Sequence

import click
import numpy as np

from cowfs.accounting.path_usage import (
    Argument,
    Place,
    Whole,
    usage_of_path,
    usage_of_snapshots,
    usage_together,
)
from cowfs.accounting.paths import resolve, volume_of
from cowfs.api import connect
from cowfs.cli.output import Numbers, list_options, print_json
from cowfs.errors import UsageError
from cowfs.escapes import escaped_path, printable
from cowfs.storage.format import BLOCK_SIZE_BYTES

from .inside import Inside, Meant, inside, meaning, one_target
from .looking import Look, look_at


@click.command()
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=click.Path())
@click.option("--image", metavar="TARGET", help="Each PATH is inside this image or mount.")
@click.option("-s", "--summarize", is_flag=True, help="Show only one line for each PATH.")
@click.option(
    "-d",
    "--max-depth",
    "depth",
    metavar="N",
    type=click.IntRange(min=0),
    help="Show at most N levels below each PATH.",
)
@click.option("-c", "--total", "together", is_flag=True, help="Also show all PATHs as one set.")
@list_options
def du(
    paths: tuple[str, ...],
    image: str | None,
    summarize: bool,
    depth: int | None,
    together: bool,
    as_json: bool,
    bare: bool,
    exact: bool,
) -> None:
    """Show what files and directories hold, and what deleting them would free.

    \b
    Total       distinct data blocks, each counted once
    Exclusive   what deleting that PATH alone would free
    Set shared  the rest: also held by snapshots, or by files elsewhere

    PATH is on a mount, live or in .snapshots/NAME; .snapshots itself means all snapshots. Only data
    is counted: cowdu TARGET NAME shows what a whole snapshot frees with its metadata.

    \b
    cowdu du -s ~/data/*
    cowdu du -s -c ~/data/.snapshots/monday ~/data/.snapshots/tuesday
    cowdu du --image disk.img /photos
    """
    where = [inside(path, image) for path in paths]
    limit = 0 if summarize else depth
    with connect(one_target(where)) as target, look_at(target) as found:
        meant = [meaning(found.filesystem, target, each.path) for each in where]
        tops = [_usage(found, each, path) for each, path in zip(meant, where, strict=True)]
        rows = [
            (name, place)
            for top, path in zip(tops, where, strict=True)
            for name, place in _rows(top, path.shown, limit)
        ]
        if together:
            rows.append(("total", _together(found, meant, where)))
    if as_json:
        fields = [
            {
                "path": escaped_path(name),
                "total_bytes": place.total * BLOCK_SIZE_BYTES,
                "exclusive_bytes": place.exclusive * BLOCK_SIZE_BYTES,
                "set_shared_bytes": place.shared * BLOCK_SIZE_BYTES,
            }
            for name, place in rows
        ]
        print_json("cowdu du", {"generation": found.generation, "paths": fields})
        return
    numbers = Numbers(exact)
    if not bare:
        click.echo(_line(["Total", "Exclusive", "Set shared", "Filename"]))
    for name, place in rows:
        cells = [
            numbers.size(blocks * BLOCK_SIZE_BYTES)
            for blocks in (place.total, place.exclusive, place.shared)
        ]
        shown = printable(name)
        click.echo("\t".join([*cells, shown]) if bare else _line([*cells, shown]))


def _line(cells: Sequence[str]) -> str:
    *sizes, name = cells
    return "  ".join([*(f"{size:>10}" for size in sizes), name])


def _usage(found: Look, meant: Meant, path: Inside) -> Place:
    if meant.record is None:
        return usage_of_snapshots(found.sets())
    argument = _argument(found, meant, path)
    return usage_of_path(found.filesystem, argument, found.progress)


def _argument(found: Look, meant: Meant, path: Inside) -> Argument:
    assert meant.record is not None
    volume = volume_of(found.filesystem, meant.record)
    inode = resolve(volume, meant.path)
    if inode is None:
        raise UsageError(
            f"there is nothing at {path.shown}; cowdu log lists the snapshots that had a file there"
        )
    return Argument(meant.record, volume, inode, os.fsencode(path.shown), meant.path)


def _rows(top: Place, shown: str, limit: int | None) -> Iterator[tuple[str, Place]]:
    """Yield the places below `top`, down to `limit` levels, each before its parent; `top` last."""

    def below(place: Place, name: str, depth: int) -> Iterator[tuple[str, Place]]:
        if limit is None or depth < limit:
            for child in place.children:
                inner = os.path.join(name, os.fsdecode(child.name))
                yield from below(child, inner, depth + 1)
        yield name, place

    return below(top, shown, 0)


def _together(found: Look, meant: Sequence[Meant], where: Sequence[Inside]) -> Place:
    """Measure all arguments as one set."""
    sets, structure = found.sets(), found.survey().structure
    bits: set[int] = set()
    arguments = []
    for each, path in zip(meant, where, strict=True):
        if each.record is None:
            bits |= set(range(sets.snapshot_count))
        else:
            arguments.append(_argument(found, each, path))
    if not bits:
        return usage_together(found.filesystem, arguments, progress=found.progress)
    reached = ~sets.within(set(range(len(sets.owners))) - bits)
    runs = np.repeat(reached[found.survey().labels], np.diff(structure.run_from))
    count = structure.run_count[runs].astype(np.int64)
    whole = Whole(found.snapshots, structure.run_first[runs], count)
    return usage_together(found.filesystem, arguments, whole, found.progress)
