"""`cowdu report`: write one self-contained page for the browser.

The page contains the owner sets, so its script counts any choice of snapshots exactly as cowdu
does. The sets are counted in two ways first, by owner sets and by virtual drop; the page is written
only if both agree. It is put together from page.html, page.css, page.js and the data.
"""

import json
import os
import stat
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import click

from cowfs.accounting.owners import OwnerSets, members
from cowfs.accounting.paths import resolve
from cowfs.accounting.pinned import Pinned, pinned_by
from cowfs.cli.output import Numbers, json_option, print_json
from cowfs.cli.own_files import make_file, replace_file
from cowfs.cli.snapshots import target_argument
from cowfs.errors import CorruptError, CowfsError, UsageError
from cowfs.escapes import escaped_path, printable
from cowfs.history.reports import image_name, space_report
from cowfs.storage.format import BLOCK_SIZE_BYTES

from .looking import Look, look

STYLE_PLACE = "<style></style>"
DATA_PLACE = '<script type="application/json" id="data">{}</script>'
SCRIPT_PLACE = "<script></script>"
FILES_MAX = 50_000  # entries for the treemap; smaller files are added up by directory


@click.command()
@target_argument
@click.option(
    "--html",
    "page",
    metavar="FILE",
    required=True,
    type=click.Path(dir_okay=False),
    help="The page to write; - for standard output.",
)
@click.option("-f", "--force", is_flag=True, help="Replace an existing file.")
@json_option
def report(target: str, page: str, force: bool, as_json: bool) -> None:
    """Write a page for the browser: a timeline, the reclaim curve, a map of the files, tables.

    Choose snapshots in the page, and it shows what deleting exactly these frees, to the byte, and
    the command that deletes them. The page is one file and needs no network and no server.

    \b
    cowdu report ~/data --html disk.html
    """
    to_terminal = page == "-"
    if not to_terminal:
        _require_writable(Path(page), force=force)
    with look(target) as found:
        data = report_data(found, target)
    text = page_of(data)
    if to_terminal:
        click.echo(text)
        return
    write = replace_file if force else make_file
    try:
        write(Path(page), [text.encode()], mode=0o666)
    except OSError as error:
        raise CowfsError(f"cannot write {page}: {error.strerror}") from None
    fields = {
        "path": escaped_path(os.path.abspath(page)),
        "size_bytes": os.path.getsize(page),
        "snapshot_count": len(data["snapshots"]),
        "set_count": len(data["sets"]),
        "path_count": len(data["paths"]),
    }
    if as_json:
        print_json("cowdu report", fields)
    else:
        size = Numbers().size(os.path.getsize(page))
        click.echo(f"wrote {printable(page)}: {size}, {len(data['snapshots'])} snapshots")


def _require_writable(page: Path, *, force: bool) -> None:
    """Refuse, before the image is read, a page that cannot be written.

    A symbolic link, a device or a fifo is never written to or replaced.

    Raises:
        UsageError: something else is at the path, or a file without `force`.
    """
    try:
        mode = page.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise UsageError(f"{page} is not a regular file; name another, or - for standard output")
    if not force:
        raise UsageError(f"{page} exists already; -f replaces it")


def page_of(data: dict[str, Any]) -> str:
    """Put the page together: page.html with page.css, the data and page.js in their elements.

    "<" is escaped in the data, so that no text in it can end the element around it.
    """
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    parts = (
        (STYLE_PLACE, f"<style>\n{_page_part('page.css')}</style>"),
        (DATA_PLACE, DATA_PLACE.replace("{}", text)),
        (SCRIPT_PLACE, f"<script>\n{_page_part('page.js')}</script>"),
    )
    page, rest = "", _page_part("page.html")
    for place, filled in parts:  # in the order of the template, so that no part is searched itself
        before, found, rest = rest.partition(place)
        assert found, f"page.html has no {place}"
        page += before + filled
    return page + rest


def _page_part(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def report_data(found: Look, target: str) -> dict[str, Any]:
    """Collect the data of the page. Sizes are in blocks unless named otherwise.

    Returns:
        `sets`: for each [runs of snapshot numbers as first, last, ..., metadata blocks, data
        blocks]; `paths`: [number of the parent directory, name], the root first; `files`: [number
        of the path, number of the set, blocks]; `gone`: numbers of the paths that the live files do
        not have.

    Raises:
        CorruptError: the two ways of counting do not agree.
    """
    sets = found.sets()
    count = sets.snapshot_count
    pinned = pinned_by(found.filesystem, found.snapshots, found.progress)
    chosen = sets.within(range(count))
    table = members(sets.sets[chosen], count)
    rows = [
        [_runs(row.nonzero()[0].tolist()), nodes, data]
        for row, nodes, data in zip(
            table, sets.nodes[chosen].tolist(), sets.data[chosen].tolist(), strict=True
        )
    ]
    numbers = {
        sum(1 << bit for bit in row.nonzero()[0].tolist()): number
        for number, row in enumerate(table)
    }
    _require_equal(pinned, numbers, rows)
    paths, entries, gone = _files(found, pinned, numbers)
    superblock = found.filesystem.store.superblock
    space = space_report(found.filesystem)
    return {
        "image": image_name(found.filesystem),
        "target": os.fsencode(os.path.abspath(target)).decode("utf-8", "surrogateescape"),
        "label": superblock.label,
        "generation": found.generation,
        "made_ns": time.time_ns(),
        "block_bytes": BLOCK_SIZE_BYTES,
        "total_bytes": space.total_bytes,
        "available_bytes": space.available_bytes,
        "allocated_bytes": space.tree_bytes,
        "snapshots": _snapshots(found, sets),
        "sets": rows,
        "paths": paths,
        "files": entries,
        "gone": gone,
    }


def _snapshots(found: Look, sets: OwnerSets) -> list[dict[str, Any]]:
    each = {
        what: sets.each(what).sum(axis=1).tolist()
        for what in ("referenced", "exclusive", "written", "cumulative")
    }
    return [
        {
            "name": record.name,
            "created_ns": record.created_ns,
            "description": record.description,
            "held": record.held,
            **{what: column[bit] for what, column in each.items()},
        }
        for bit, record in enumerate(found.snapshots)
    ]


def _runs(numbers: Sequence[int]) -> list[int]:
    """Encode ascending numbers as runs: first, last, first, last, ..."""
    runs: list[int] = []
    for number in numbers:
        if runs and runs[-1] + 1 == number:
            runs[-1] = number
        else:
            runs += [number, number]
    return runs


def _require_equal(pinned: Pinned, numbers: dict[int, int], rows: list[list[Any]]) -> None:
    """Compare the virtual drop with the owner sets, set by set. Raises CorruptError."""
    counted = {owners: [blocks, 0] for owners, blocks in pinned.metadata.items()}
    for file in pinned.files:
        counted.setdefault(file.owners, [0, 0])[1] += file.blocks
    expected = {owners: rows[number][1:] for owners, number in numbers.items()}
    if counted != expected:
        raise CorruptError("space map", 0, "two ways of counting do not agree; run cowfs check")


def _files(
    found: Look, pinned: Pinned, numbers: dict[int, int]
) -> tuple[list[list[Any]], list[list[int]], list[int]]:
    """Make `paths`, `files` and `gone` of `report_data`."""
    places: dict[bytes, int] = {b"": 0}
    paths: list[list[Any]] = [[0, ""]]

    def place(path: bytes) -> int:
        number = places.get(path)
        if number is None:
            directory, _, name = path.rpartition(b"/")
            above = place(directory)
            number = places[path] = len(paths)
            paths.append([above, name.decode("utf-8", "surrogateescape")])
        return number

    files = sorted(pinned.files, key=lambda file: (-file.blocks, file.path, file.owners))
    amounts: dict[tuple[int, int], int] = {}
    for position, file in enumerate(files):
        path = file.path if position < FILES_MAX else file.path.rpartition(b"/")[0]
        where = (place(path), numbers[file.owners])
        amounts[where] = amounts.get(where, 0) + file.blocks
    live = found.filesystem.live
    gone = [number for path, number in places.items() if resolve(live, path) is None]
    return paths, [[*where, blocks] for where, blocks in amounts.items()], gone
