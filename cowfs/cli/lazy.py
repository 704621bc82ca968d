"""A click group that imports a command only when it is used, and lists commands without importing.

Most of the time of a short command is start-up, so a program knows its commands by name alone.
"""

import importlib
from collections.abc import Mapping
from typing import Any

import click


class LazyGroup(click.Group):
    """A group of commands that are imported on use.

    Args:
        lazy_commands: for each command its place ("module:name") and its one-line help.
    """

    def __init__(self, *arguments: Any, lazy_commands: Mapping[str, tuple[str, str]], **more: Any):
        super().__init__(*arguments, **more)
        self._lazy = lazy_commands

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._lazy:
            return None
        place, _ = self._lazy[cmd_name]
        module, _, name = place.partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, words) for name, (_, words) in self._lazy.items()])
