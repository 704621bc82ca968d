"""cowdump: prints a view as a list of facts and a table."""

from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from .dump import View

PIPE_WIDTH = 1000  # into a pipe, lines are not broken to the width of a terminal


def print_view(view: View) -> None:
    """Print the facts, then the table.

    Rows may have different members: those that not all rows have share the last column.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PIPE_WIDTH)
    console.print(Text(view.title, style="bold"))
    if view.facts:
        facts = Table(show_header=False, box=None, pad_edge=False)
        for name, value in view.facts.items():
            facts.add_row(Text(name, style="dim"), Text(_cell(value)))
        console.print(facts)
    if not view.rows:
        return
    columns = list(view.rows[0])
    uniform = all(list(row) == columns for row in view.rows)
    shared = [name for name in columns if all(name in row for row in view.rows)]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in shared:
        justify: JustifyMethod = "right" if isinstance(view.rows[0][name], int) else "left"
        table.add_column(name, justify=justify, overflow="fold")
    if not uniform:
        table.add_column("", overflow="fold")
    for row in view.rows:
        cells = [Text(_cell(row[name])) for name in shared]
        if not uniform:
            rest = {name: value for name, value in row.items() if name not in shared}
            cells.append(Text(_cell(rest)))
        table.add_row(*cells)
    console.print(table)


def _cell(value: object) -> str:
    """A member of a record as text: dicts as name=value, lists one element a line."""
    if isinstance(value, dict):
        return " ".join(f"{name}={_cell(member)}" for name, member in value.items())
    if isinstance(value, list):
        return "\n".join(_cell(member) for member in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
