"""`cowdu why`, `log` and `block`: the files, versions and blocks behind the numbers."""

from collections.abc import Sequence

import click
from msgspec import Struct

from cowfs.accounting.blocks import explain_block
from cowfs.accounting.owners import Owner, OwnerKind
from cowfs.accounting.paths import resolve
from cowfs.accounting.pinned import Pinned, pinned_by
from cowfs.accounting.versions import Version, versions_of
from cowfs.api import connect
from cowfs.cli.output import (
    Column,
    Numbers,
    as_fields,
    json_option,
    list_options,
    print_facts,
    print_json,
    print_table,
)
from cowfs.cli.snapshots import names_argument, retention_options, target_argument
from cowfs.errors import UsageError
from cowfs.escapes import escaped, printable
from cowfs.history.reports import image_name
from cowfs.history.retention import Rules
from cowfs.storage.format import BLOCK_SIZE_BYTES

from .choosing import LIVE, chosen_records, spans, top_option
from .inside import inside, meaning
from .looking import Look, look, look_at

METADATA = "(metadata and small files)"
DEPTH_SHOWN = 3
ENTRIES_SHOWN = 10


class PathUsage(Struct, kw_only=True):
    """A file or directory, and the blocks at or below it that only the given snapshots hold.

    Attributes:
        name: escaped (cowfs/escapes.py), as is `path`.
        files: the number of files at or below it that have such blocks.
        deleted: the live files have nothing at the path any more.
    """

    name: str
    path: str
    bytes: int = 0
    files: int = 0
    deleted: bool = False
    children: list["PathUsage"] = []


@click.command()
@target_argument
@names_argument
@retention_options
@click.option(
    "--depth",
    metavar="N",
    type=click.IntRange(min=1),
    default=DEPTH_SHOWN,
    show_default=True,
    help="How many levels of directories to show.",
)
@top_option(ENTRIES_SHOWN, "How many entries of each directory to show, the largest first.")
@click.option("--flat", is_flag=True, help="Show only files, with their whole paths.")
@list_options
def why(
    target: str,
    names: tuple[str, ...],
    rules: Rules,
    depth: int,
    count: int,
    flat: bool,
    as_json: bool,
    bare: bool,
    exact: bool,
) -> None:
    """List the files and directories whose blocks only these snapshots keep, the largest first.

    The sum is what deleting exactly these snapshots frees. A block in several of the snapshots or
    files is counted once, at the newest snapshot's file. STATE is `deleted` if the live files have
    nothing at the path any more, else `changed`. Files of at most 2 KiB are stored in the metadata,
    which belongs to no single file.

    \b
    cowdu why ~/data monday
    cowdu why ~/data monday%friday --depth 5 --top 20
    cowdu why ~/data 'auto-*' --older-than 30d --flat --top 50
    """
    if not (names or rules.any):
        raise UsageError("name a snapshot, or % for all of them")
    with look(target) as found:
        records = chosen_records(found.snapshots, names, rules)
        pinned = pinned_by(found.filesystem, records, found.progress)
        tree = _tree(found, pinned, flat=flat)
        image = image_name(found.filesystem)
    metadata = sum(pinned.metadata.values()) * BLOCK_SIZE_BYTES
    numbers = Numbers(exact)
    if as_json:
        fields = {
            "image": image,
            "names": [record.name for record in records],
            "reclaim_bytes": pinned.blocks * BLOCK_SIZE_BYTES,
            "metadata_bytes": metadata,
            "tree": as_fields(tree),
        }
        print_json("cowdu why", fields)
        return
    rows: list[list[str]] = []
    _lines(tree, 0, depth, count, flat or bare, numbers, rows)
    rows.append([numbers.size(metadata), "-", METADATA])
    print_table([Column("ONLY HERE", right=True), Column("STATE"), Column("PATH")], rows, bare=bare)
    if not bare:
        total = numbers.size(pinned.blocks * BLOCK_SIZE_BYTES)
        which = "this snapshot" if len(records) == 1 else f"these {len(records)} snapshots"
        click.echo(f"deleting {which} would free {total}")


def _tree(found: Look, pinned: Pinned, *, flat: bool) -> PathUsage:
    """Make the tree of directories, each sorted by size; if `flat`, all files are below the top."""
    top = PathUsage(name="/", path="")
    by_path: dict[bytes, PathUsage] = {b"": top}
    amounts: dict[bytes, int] = {}
    for file in pinned.files:
        amounts[file.path] = amounts.get(file.path, 0) + file.blocks * BLOCK_SIZE_BYTES
    for path, amount in amounts.items():
        prefixes = [path] if flat else _prefixes(path)
        above = top
        for at in prefixes:
            found_here = by_path.get(at)
            if found_here is None:
                name = at if flat else at.rpartition(b"/")[2]
                found_here = by_path[at] = PathUsage(name=escaped(name), path=escaped(at))
                above.children.append(found_here)
            above = found_here
        for at in [b"", *prefixes]:
            by_path[at].bytes += amount
            by_path[at].files += 1
    live = found.filesystem.live
    for path, usage in by_path.items():
        usage.children.sort(key=lambda each: (-each.bytes, each.name))
        usage.deleted = resolve(live, path) is None
    return top


def _prefixes(path: bytes) -> list[bytes]:
    """Of a/b/c: a, a/b, a/b/c."""
    words = path.split(b"/")
    return [b"/".join(words[: number + 1]) for number in range(len(words))]


def _lines(
    usage: PathUsage,
    depth: int,
    depth_max: int,
    count: int,
    whole_paths: bool,
    numbers: Numbers,
    rows: list[list[str]],
) -> None:
    """Append the table rows of what is below `usage`, down to `depth_max` levels."""
    indent = "" if whole_paths else "  " * depth
    for child in usage.children[:count]:
        name = child.path if whole_paths else child.name
        slash = "/" if child.children else ""
        state = "deleted" if child.deleted else "changed"
        rows.append([numbers.size(child.bytes), state, f"{indent}{name}{slash}"])
        if depth + 1 < depth_max:
            _lines(child, depth + 1, depth_max, count, whole_paths, numbers, rows)
    rest = usage.children[count:]
    if rest:
        amount = sum(child.bytes for child in rest)
        rows.append([numbers.size(amount), "-", f"{indent}({len(rest)} more)"])


# --- log ------------------------------------------------------------------------------------------


class VersionReport(Struct, frozen=True, kw_only=True):
    """A version of a file.

    Attributes:
        on_disk_bytes: its data blocks.
        new_bytes: those of its data blocks that no earlier version has.
        snapshots: the names of those that contain this version.
        live: the live files contain it.
    """

    kind: str
    inode: int
    size_bytes: int
    on_disk_bytes: int
    new_bytes: int
    modified_ns: int
    snapshots: tuple[str, ...]
    live: bool


@click.command()
@click.argument("path", metavar="PATH", type=click.Path())
@click.option("--image", metavar="TARGET", help="PATH is inside this image or mount.")
@click.option(
    "-a", "--all", "absent", is_flag=True, help="Also list the snapshots without such a file."
)
@list_options
def log(path: str, image: str | None, absent: bool, as_json: bool, bare: bool, exact: bool) -> None:
    """List the distinct versions of a file, the oldest first, and the snapshots that contain each.

    Two states of a file are one version if they consist of the same blocks, whatever their times.
    PATH is on a mount; the file may be deleted there. NEW is what no earlier version has.

    \b
    cowdu log ~/data/report.odt
    cowdu log --image disk.img /report.odt
    """
    where = inside(path, image)
    with connect(where.target) as target, look_at(target) as found:
        meant = meaning(found.filesystem, target, where.path)
        if meant.record is None:
            raise UsageError("name a file, not .snapshots")
        records = [*found.snapshots, found.filesystem.record]
        versions = versions_of(found.filesystem, records, meant.path)
        names = [record.name for record in found.snapshots]
    if all(version.kind == "absent" for version in versions):
        raise UsageError(f"there is nothing at {path}, neither live nor in a snapshot")
    shown = [version for version in versions if absent or version.kind != "absent"]
    reports = [_version_report(version, names) for version in shown]
    if as_json:
        print_json("cowdu log", {"path": escaped(meant.path), "versions": as_fields(reports)})
        return
    numbers = Numbers(exact)
    rows = []
    for number, (version, report) in enumerate(zip(shown, reports, strict=True), 1):
        there = version.kind != "absent"
        rows.append(
            [
                str(number),
                version.kind,
                numbers.size(report.size_bytes) if there else "-",
                numbers.size(report.on_disk_bytes) if there else "-",
                numbers.size(report.new_bytes) if there else "-",
                numbers.time(report.modified_ns) if there else "-",
                spans(version.roots, [*names, LIVE]),
            ]
        )
    columns = [
        Column("#", right=True),
        Column("KIND"),
        Column("SIZE", right=True),
        Column("ON DISK", right=True),
        Column("NEW", right=True),
        Column("MODIFIED"),
        Column("IN"),
    ]
    print_table(columns, rows, bare=bare)


def _version_report(version: Version, names: Sequence[str]) -> VersionReport:
    return VersionReport(
        kind=version.kind,
        inode=version.ino,
        size_bytes=version.size_bytes,
        on_disk_bytes=version.data_blocks * BLOCK_SIZE_BYTES,
        new_bytes=version.fresh_blocks * BLOCK_SIZE_BYTES,
        modified_ns=version.mtime_ns,
        snapshots=tuple(names[root] for root in version.roots if root < len(names)),
        live=len(names) in version.roots,
    )


# --- block ----------------------------------------------------------------------------------------


@click.command()
@target_argument
@click.argument("number", metavar="N", type=int)
@json_option
def block(target: str, number: int, as_json: bool) -> None:
    """Explain one block: its kind, references and age, and the snapshots and files that reach it.

    N is the number of a block of 4 KiB, as cowfs check, cowfs scrub and cowdump print it.

    \b
    cowdu block disk.img 133126
    """
    with look(target) as found:
        survey = found.survey()
        report = explain_block(found.filesystem, survey, number)
        image = image_name(found.filesystem)
    owners = [_owner_words(owner) for owner in report.owners]
    names = [_owner_words(owner) for owner in survey.sets.owners]
    bits = [survey.sets.bit(owner.kind, owner.number) for owner in report.owners]
    places = [
        {
            "in": _owner_words(place.root),
            "path": None if place.path is None else escaped(place.path),
            "inode": place.ino,
            "offset_bytes": place.offset_bytes,
        }
        for place in report.places
    ]
    if as_json:
        fields = {
            "image": image,
            "block": number,
            "kind": report.kind,
            "references": report.references,
            "birth": report.birth,
            "level": report.level,
            "twin": report.twin,
            "first_block": report.first,
            "reached_by": owners,
            "files": places,
        }
        print_json("cowdu block", fields)
        return
    facts = [("block", f"{number}, byte {number * BLOCK_SIZE_BYTES}"), ("kind", report.kind)]
    if report.kind == "node":
        copy = "second copy of a node" if report.twin else "node"
        facts[1] = ("kind", f"{copy}, level {report.level}, from block {report.first}")
    if report.kind in ("node", "data"):
        facts.append(("references", str(report.references)))
        facts.append(("written in generation", str(report.birth)))
        facts.append(("reached by", spans(bits, names)))
    elif report.kind == "free":
        facts[1] = ("kind", "free, or kept for an earlier generation alone")
    for place in places:
        name = place["path"]
        where = f"inode {place['inode']}" if name is None else printable(f"/{name}")
        facts.append(("file", f"{where} at byte {place['offset_bytes']}, in {place['in']}"))
    print_facts(facts)


def _owner_words(owner: Owner) -> str:
    return {
        OwnerKind.SNAPSHOT: owner.name,
        OwnerKind.VOLUME: LIVE,
        OwnerKind.DROP: f"(deleted {owner.name})",
        OwnerKind.CATALOG: "(catalog)",
    }[owner.kind]
