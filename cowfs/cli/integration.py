"""`cowfs integrate`: put the manual, completions, a service and the helpers of mount(8) in their places.

A Python package may only install its programs; what man, the shells, systemd and mount(8) look for lies
elsewhere. This writes it: for root below /usr/local, for others below ~/.local, and for whoever makes
a package below a prefix of his choice.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click

from cowfs.cli.output import json_option, print_json
from cowfs.errors import CowfsError
from cowfs.escapes import escaped_path, printable

UNIT = "cowfs@.service"


class Piece(NamedTuple):
    """A file to be: its absolute path, and its text, or what a symbolic link leads to."""

    path: Path
    text: str = ""
    target: Path | None = None


@click.command()
@click.option("--prefix", type=click.Path(path_type=Path), help="Instead of the usual place.")
@click.option(
    "--programs",
    type=click.Path(path_type=Path),
    help="The directory where cowfs is, or will be; that of this cowfs by default.",
)
@click.option(
    "--destdir", type=click.Path(path_type=Path), help="Put in front of every path; for packagers."
)
@click.option("-n", "--dry-run", "dry_run", is_flag=True, help="Only tell what would be written.")
@json_option
def integrate(
    prefix: Path | None,
    programs: Path | None,
    destdir: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Install manual pages, completions, a systemd service and the helpers of mount(8).

    For root below /usr/local, with helpers in /usr/sbin, where mount(8) looks; for others below
    ~/.local, without helpers. Every path is printed, so that -n tells what to remove.

    \b
    sudo ~/cowfs-venv/bin/cowfs integrate
    cowfs integrate --prefix /usr --programs /usr/bin --destdir debian/tmp
    """
    if prefix is None:
        prefix = Path("/usr/local") if os.geteuid() == 0 else Path.home() / ".local"
    prefix = prefix.absolute()
    written = []
    for piece in _pieces(prefix, (programs or _own_directory()).absolute()):
        path = piece.path
        if destdir is not None:
            path = destdir.absolute() / path.relative_to("/")
        if not dry_run:
            _write(piece, path)
        written.append(escaped_path(path))
        if not as_json:
            click.echo(printable(str(path)))
    if as_json:
        print_json("cowfs integrate", {"paths": written, "dry_run": dry_run})


def _own_directory() -> Path:
    """Where the program is that runs."""
    import sys

    return Path(sys.argv[0]).resolve().parent


def _pieces(prefix: Path, programs: Path) -> Iterator[Piece]:
    from cowfs.cli.completion import PROGRAMS, SHELLS, script
    from cowfs.cli.manual import pages
    from cowfs.cli.mount_helper import MOUNT_HELPER, UMOUNT_HELPER

    share = prefix / "share"
    for name, text in pages().items():
        yield Piece(share / "man" / f"man{name[-1]}" / name, text)
    # Debian keeps what packages bring for zsh apart.
    zsh = "vendor-completions" if prefix == Path("/usr") else "site-functions"
    places = {
        "bash": "bash-completion/completions/{}",
        "zsh": f"zsh/{zsh}/_{{}}",
        "fish": "fish/vendor_completions.d/{}.fish",
    }
    for shell in SHELLS:
        for program in PROGRAMS:
            yield Piece(share / places[shell].format(program), script(shell, program))
    unit = (Path(__file__).parent / UNIT).read_text(encoding="utf-8")
    unit = unit.replace("@PROGRAMS@", str(programs))
    if prefix not in (Path("/usr"), Path("/usr/local")):
        yield Piece(share / "systemd" / "user" / UNIT, unit)
        return
    for kind in ("system", "user"):
        yield Piece(prefix / "lib" / "systemd" / kind / UNIT, unit)
    for name in (MOUNT_HELPER, UMOUNT_HELPER):
        yield Piece(Path("/usr/sbin") / name, target=programs / name)


def _write(piece: Piece, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if piece.target is None:
        if path.is_symlink():
            path.unlink()  # never write to where somebody else's link leads
        path.write_text(piece.text, encoding="utf-8")
        path.chmod(0o644)
        return
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        raise CowfsError(f"{path} is there already and is no link of ours; remove it first")
    path.symlink_to(piece.target)
