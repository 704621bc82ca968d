"""The dialogs of `cowdu top`: the question before a deletion, and the help on keys."""

from collections.abc import Sequence
from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Button, Static

from cowfs.cli.output import counted
from cowfs.escapes import printable

from .wording import whole_size

NAMES_SHOWN_MAX = 500  # names listed in the question before a deletion


class Question(ModalScreen[bool]):
    """Asks before a deletion, naming the snapshots and the bytes freed. Only Yes deletes."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)", "Yes", show=False),
        Binding("n,q,escape", "answer(False)", "No", show=False),
        Binding("left,right,h,l", "app.focus_next", "Other answer", show=False),
        Binding("up,k", "scroll_names(-1)", "Up", show=False),
        Binding("down,j", "scroll_names(1)", "Down", show=False),
    ]

    def __init__(self, names: Sequence[str], freed_bytes: int) -> None:
        super().__init__()
        self.names = names
        self.freed_bytes = freed_bytes

    def compose(self) -> ComposeResult:
        shown = [f"  {printable(name)}" for name in self.names[:NAMES_SHOWN_MAX]]
        if len(self.names) > NAMES_SHOWN_MAX:
            shown.append(f"  and {len(self.names) - NAMES_SHOWN_MAX:,} more")
        with Vertical(id="box"):
            yield Static(Text(f"Delete {counted(len(self.names), 'snapshot')}?"), id="question")
            with VerticalScroll(id="names", can_focus=False):
                yield Static(Text("\n".join(shown), no_wrap=True, overflow="ellipsis"))
            yield Static(
                Text(
                    f"This frees exactly {whole_size(self.freed_bytes)}.\nIt cannot be taken back."
                ),
                id="freed",
            )
            with Horizontal(id="answers"):
                yield Button("No", id="no")
                yield Button("Yes, delete", id="yes", variant="error")

    def on_mount(self) -> None:
        self.query_one("#no").focus()

    def action_scroll_names(self, count: int) -> None:
        self.query_one("#names").scroll_relative(y=count, animate=False)

    def action_answer(self, yes: bool) -> None:
        self.dismiss(yes)

    @on(Button.Pressed)
    def _answered(self, event: Button.Pressed) -> None:
        self.dismiss(event.button.id == "yes")


HELP = """\
↑ ↓ PgUp PgDn Home End   move (k, j, g, G too)
Enter →                  open a snapshot or directory
Backspace ←              go up
q Escape                 go back; in the list of snapshots q quits

Space                    mark or unmark, and move down
m                        mark from the last mark to the cursor
Shift ↓   Shift ↑        mark while moving
a   u                    mark all that are not held; unmark all
d                        delete the marked, or the one at the cursor

c n r x w                sort by age, name, referenced, exclusive, written
                         the same key again reverses the order
s n x                    in a snapshot: by total, name, exclusive
R   Escape               commit and read again; stop

REFERENCED  all that it reaches      EXCLUSIVE   freed by deleting it alone
WRITTEN     new since the one before CUMULATIVE  freed with all older ones
Older means created before, whatever the dates say."""


class Help(ModalScreen[None]):
    """Shows the keys until a key is pressed."""

    def compose(self) -> ComposeResult:
        with Vertical(id="box"):
            yield Static(Text(HELP, no_wrap=True))

    def on_key(self) -> None:
        self.dismiss()

    def on_click(self) -> None:
        self.dismiss()
