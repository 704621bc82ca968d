"""`cowfs integrate`: install manual pages, completions, a service and the helpers of mount(8).

A Python package can install only its programs. man, the shells, systemd and mount(8) look for their
files elsewhere; this command writes those: for root below /usr/local, for others below ~/.local,
for packagers below a prefix of their choice.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click

from cowfs.cli.output import dry_run_option, json_option, print_json
from cowfs.errors import CowfsError
from cowfs.escapes import escaped_path, printable

UNIT = "cowfs@.service"


class Piece(NamedTuple):
    """A file to install at an absolute path: either `text`, or a symbolic link to `target`."""

    path: Path
    text: str = ""
    target: Path | None = None


@click.command()
@click.option("--prefix", type=click.Path(path_type=Path), help="Install below this directory.")
@click.option(
    "--programs",
    type=click.Path(path_type=Path),
    help="The directory where cowfs is, or will be. [default: that of this cowfs]",
)
@click.option(
    "--destdir", type=click.Path(path_type=Path), help="Put in front of every path; for packagers."
)
@dry_run_option
@json_option
def integrate(
    prefix: Path | None,
    programs: Path | None,
    destdir: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Install manual pages, completions, a systemd service and the helpers of mount(8).

    For root they go below /usr/local, and the helpers to /usr/sbin, where mount(8) looks for them;
    for others below ~/.local, without helpers. Every path is printed, so -n lists what to remove.

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
    """The directory of the running program."""
    import sys

    return Path(sys.argv[0]).resolve().parent


def _pieces(prefix: Path, programs: Path) -> Iterator[Piece]:
    from cowfs.cli.completion import PROGRAMS, SHELLS, script
    from cowfs.cli.manual import pages
    from cowfs.cli.mount_helper import MOUNT_HELPER, UMOUNT_HELPER

    share = prefix / "share"
    for name, text in pages().items():
        yield Piece(share / "man" / f"man{name[-1]}" / name, text)
    # Debian has a directory of its own for the zsh completions of packages.
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
            path.unlink()  # replace the link; never write to its target
        path.write_text(piece.text, encoding="utf-8")
        path.chmod(0o644)
        return
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        raise CowfsError(f"{path} exists already and is not a link to cowfs; remove it first")
    path.symlink_to(piece.target)
