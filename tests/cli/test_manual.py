"""Promises of the manual pages: they hold all of --help, in a form that man accepts."""

import re
import subprocess
from pathlib import Path

import click
import pytest

from cowfs.cli import manual
from cowfs.cli.completion import PROGRAMS
from cowfs.cli.main import cli
from tests.commands import run_command
from tests.conftest import require_success
from tests.sizes import HANG_SECONDS


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All pages by name, in a directory tree as man expects it."""
    folder = tmp_path_factory.mktemp("man")
    found = {}
    for name, text in manual.pages().items():
        found[name] = folder / f"man{name[-1]}" / name
        found[name].parent.mkdir(exist_ok=True)
        found[name].write_text(text)
    return found


def commands() -> list[tuple[str, click.Command, click.Context]]:
    """Every command of every program, with the name of its page."""
    found = []
    waiting = [(name, manual._command(name), None) for name in PROGRAMS]
    while waiting:
        name, command, parent = waiting.pop()
        context = click.Context(command, info_name=name, parent=parent)
        found.append((context.command_path.replace(" ", "-"), command, context))
        if isinstance(command, click.Group):
            for inner in command.list_commands(context):
                each = command.get_command(context, inner)
                assert each is not None
                waiting.append((inner, each, context))
    return found


def shown(page: Path, *more: str) -> str:
    """The text that man shows for a page, without line breaks inside paragraphs."""
    done = subprocess.run(
        ["man", "--warnings=all", "-E", "UTF-8", "-l", page],
        env={"PATH": "/usr/bin:/bin", "MANWIDTH": "2000", "LC_ALL": "C.UTF-8"},
        cwd=page.parent.parent,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), (page, done.stderr)
    return done.stdout


def words_of(text: str) -> list[str]:
    return text.replace("\b", "").split()


def test_every_page_shows_all_that_help_says(pages: dict[str, Path]) -> None:
    """Promise: every command has a page with all words of its --help, and no page has warnings."""
    found = commands()
    assert len(found) > len(PROGRAMS)
    names = {f"{name}.1" for name, *_ in found}
    assert set(pages) == names | {"mount.fuse.cowfs.8", "umount.fuse.cowfs.8"}
    for name, command, context in found:
        text = " ".join(shown(pages[f"{name}.1"]).split())
        assert " ".join(words_of(command.get_usage(context))[1:]) in text, name
        for paragraph in (command.help or "").split("\n\n"):
            assert " ".join(words_of(paragraph)) in text, (name, paragraph)
        for parameter in command.get_params(context):
            if isinstance(parameter, click.Option):
                assert " ".join((parameter.help or "").split()) in text, (name, parameter)
        # In a process of its own: click caches the help option that it makes first.
        told = require_success(run_command(*context.command_path.split(), "--help")).stdout
        options = re.findall(r"(?m)^  (-\S.*?)(?:  .*)?$", told.partition("\nOptions:\n")[2])
        assert options, told
        for option in options:
            assert f" {option} " in text, (name, option)
        if isinstance(command, click.Group):
            for inner in command.list_commands(context):
                assert f" {inner} " in text, (name, inner)
    for name in ("mount.fuse.cowfs.8", "umount.fuse.cowfs.8"):
        text = shown(pages[name])
        assert "-o snapshot=NAME" in text
        assert "umount.fuse.cowfs DIRECTORY [-flnrv]" in text


def test_index_of_man_reads_every_page(pages: dict[str, Path]) -> None:
    """Promise: apropos and whatis find each command by its name."""
    done = subprocess.run(["lexgrog", *pages.values()], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(pages) + 2  # the page of the helpers has two names, in two files
    for name in pages:
        assert any(f'"{name.rpartition(".")[0]} - ' in line for line in lines), name


def test_characters_that_man_would_take_for_commands_are_shown() -> None:
    """Promise: leading dots, backslashes, quotes and dashes are shown, not taken as commands."""
    text = ".TH is no title\n'quoted\n-o a\\b \"~^`"
    page = f".TH A 1\n.SH NAME\na \\- b\n.SH X\n.nf\n{manual._text(text)}\n.fi\n"
    done = subprocess.run(
        ["man", "--warnings=all", "-E", "UTF-8", "-l", "-"],
        input=page,
        env={"PATH": "/usr/bin:/bin", "MANWIDTH": "200", "LC_ALL": "C.UTF-8"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    for line in text.splitlines():
        assert f" {line}\n" in done.stdout


def test_commands_of_the_group_are_those_of_the_pages() -> None:
    """Promise: the generator also sees the commands that are imported only when used."""
    context = click.Context(cli, info_name="cowfs")
    assert {name for name, _ in manual._inner(cli, context)} == set(cli.list_commands(context))
