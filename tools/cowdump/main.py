"""cowdump: look inside an image, record by record, without changing it.

It reads through the formats alone, so it shows what is on disk, not what the filesystem makes of
it. It takes no lock: of a mounted image it shows the newest durable generation and its log. Damage
is reported on standard error, one line each, and the rest is shown; the exit status is then 1.
"""

import json
from collections.abc import Sequence
from typing import NoReturn

import click

from cowfs.cli.entry import debug_option, run, warn
from cowfs.cli.output import json_option
from cowfs.errors import EXIT_ERROR, UsageError
from cowfs.storage.device import FileDevice
from cowfs.storage.format import NODE_BLOCKS

from .dump import Dump, View
from .printing import print_view

# Each view, and the arguments that it takes.
VIEWS = {
    "superblocks": (),
    "catalog": (),
    "tree": ("ROOT",),
    "node": ("BLOCK",),
    "items": ("ROOT", "INO"),
    "map": ("[GROUP]",),
    "log": (),
}


@click.command()
@click.argument("image", type=click.Path())
@click.argument("what", type=click.Choice(list(VIEWS)), default="superblocks")
@click.argument("words", nargs=-1, metavar="[ROOT | BLOCK | ROOT INO | GROUP]")
@json_option
@click.option("--generation", type=int, help="Show an earlier generation, still in the ring.")
@debug_option
def cowdump(
    image: str, what: str, words: tuple[str, ...], as_json: bool, generation: int | None
) -> None:
    """Look inside IMAGE, which may be mounted; nothing is changed.

    \b
    superblocks      the ring of superblocks, and the newest one in full
    catalog          volumes, snapshots, and the drop queue
    tree ROOT        the nodes of a volume or snapshot, by name or number
    node BLOCK       one node and its entries
    items ROOT INO   all items of one inode
    map [GROUP]      the space map: groups, or the refcounts of one group
    log              the records of the log after the commit, and their calls
    """
    device = FileDevice(image, writable=False)
    try:
        dump = Dump(device, generation)
        view = _view(dump, what, words)
    finally:
        device.close()
    if as_json:
        click.echo(json.dumps({"title": view.title, **view.facts, "rows": view.rows}, indent=2))
    else:
        print_view(view)
    for line in dump.damage:
        warn("cowdump", line)
    if dump.damage:
        raise SystemExit(EXIT_ERROR)


def _view(dump: Dump, what: str, words: tuple[str, ...]) -> View:
    """Make the view `what` with its arguments. Raises UsageError."""
    forms = VIEWS[what]
    fewest = sum(not form.startswith("[") for form in forms)
    if not fewest <= len(words) <= len(forms):
        raise UsageError(f"use: {' '.join(['cowdump IMAGE', what, *forms])}")
    if what == "superblocks":
        return dump.superblocks()
    if what == "catalog":
        return dump.catalog()
    if what == "tree":
        return dump.tree(words[0])
    if what == "node":
        block = _number(words[0], "a block number")
        if block > dump.superblock.total_blocks - NODE_BLOCKS:
            raise UsageError(f"block {block} is not inside the image")
        return dump.node(block)
    if what == "items":
        return dump.items(words[0], _number(words[1], "an inode number"))
    if what == "log":
        return dump.log()
    return dump.map(_number(words[0], "a group number") if words else None)


def _number(words: str, what: str) -> int:
    try:
        number = int(words, 0)
    except ValueError:
        number = -1
    if number < 0:
        raise UsageError(f"{words} is not {what}")
    return number


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run `cowdump` and end the process."""
    run(cowdump, "cowdump", arguments)
