"""The parts of the pages of `cowdu top`: a list with columns, bars, and work in a thread.

Every text from an image is a rich Text of printable characters, so nothing in it acts as markup.
"""

import asyncio
import contextlib
import contextvars
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from rich.segment import Segment
from rich.text import Text
from textual import events
from textual.app import RenderResult
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.message import Message
from textual.reactive import reactive
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.widget import Widget

from cowfs.accounting.structure import Progress

from .sparks import BARS

EIGHTHS = " ▏▎▍▌▋▊▉█"
BAR_CELLS_MAX = 5  # width of one bar in the line of bars, the gap included
PROGRESS_S = 0.1  # between two reports of a thread's progress

Result = TypeVar("Result")


# --- work -----------------------------------------------------------------------------------------


class AbandonedError(Exception):
    """Ends the work in a thread whose caller was cancelled."""


async def run_in_thread(
    work: Callable[[Progress], Result], show: Progress | None = None, *, must_end: bool = False
) -> Result:
    """Run `work` in a thread; return its result, or raise its error.

    If the caller is cancelled, the next progress report of `work` raises AbandonedError and ends
    it.

    Args:
        work: gets a function that it calls with its progress.
        show: called in the event loop with the progress of `work`.
        must_end: the process does not exit before `work` has ended. Otherwise it exits without
            waiting: a pass over a large image must not keep the program alive after a quit.
    """
    loop = asyncio.get_running_loop()
    context = contextvars.copy_context()
    future: asyncio.Future[Result] = loop.create_future()
    abandoned = threading.Event()
    shown_at = 0.0

    def progress(words: str, done: int, total: int) -> None:
        nonlocal shown_at
        if abandoned.is_set():
            raise AbandonedError
        if show is not None and time.monotonic() - shown_at > PROGRESS_S:
            shown_at = time.monotonic()
            loop.call_soon_threadsafe(show, words, done, total, context=context)

    def deliver(result: Result | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # without an error it is a Result

    def run() -> None:
        result, failure = None, None
        try:
            result = work(progress)
        except BaseException as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for the result
            loop.call_soon_threadsafe(deliver, result, failure)

    threading.Thread(target=run, daemon=not must_end).start()
    try:
        return await future
    finally:
        abandoned.set()


# --- the list -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Field:
    """A column of a list. `right`: aligned right; a width of 0 takes the room the others leave."""

    title: str
    width: int
    right: bool = False


class Listing(ScrollView, can_focus=True):
    """Lines in columns below a header; one line has the cursor. Only visible lines are rendered."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {
        "listing--header",
        "listing--cursor",
        "listing--marked",
        "listing--bar",
        "listing--note",
    }
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", "Up", show=False),
        Binding("down,j", "move(1)", "Down", show=False),
        Binding("pageup", "page(-1)", "Page up", show=False),
        Binding("pagedown", "page(1)", "Page down", show=False),
        Binding("home,g", "jump(0)", "First", show=False),
        Binding("end,G", "jump(-1)", "Last", show=False),
    ]
    cursor: reactive[int] = reactive(0)

    class Moved(Message):
        """The cursor moved to another line."""

    class Chosen(Message):
        """A line was double-clicked."""

    def __init__(self) -> None:
        super().__init__()
        self._fields: Sequence[Field] = ()
        self._count = 0
        self._cells: Callable[[int], Sequence[Text]] = lambda _: ()
        self._class_of: Callable[[int], str | None] = lambda _: None

    def fill(
        self,
        fields: Sequence[Field],
        count: int,
        cells: Callable[[int], Sequence[Text]],
        class_of: Callable[[int], str | None] = lambda _: None,
        *,
        cursor: int,
    ) -> None:
        """Replace the lines.

        Args:
            count: the number of lines.
            cells: gives the texts of a line, one for each field.
            class_of: gives the component class for the colours of a line.
            cursor: the line that gets the cursor.
        """
        self._fields, self._count = fields, count
        self._cells, self._class_of = cells, class_of
        self.virtual_size = Size(self.size.width, count + 1)  # the header does not scroll
        with self.prevent(self.Moved):  # the user did not move it
            self.cursor = cursor
        self._show_cursor()
        self.refresh()

    def validate_cursor(self, cursor: int) -> int:
        return max(0, min(cursor, self._count - 1))

    def watch_cursor(self) -> None:
        self._show_cursor()
        self.refresh()
        self.post_message(self.Moved())

    def on_resize(self) -> None:
        self._show_cursor()

    def _show_cursor(self) -> None:
        top, seen = self.scroll_offset.y, max(1, self.size.height - 1)
        if self.cursor < top:
            self.scroll_to(y=self.cursor, animate=False)
        elif self.cursor >= top + seen:
            self.scroll_to(y=self.cursor - seen + 1, animate=False)

    def action_move(self, count: int) -> None:
        self.cursor += count

    def action_page(self, count: int) -> None:
        self.cursor += count * max(1, self.size.height - 2)

    def action_jump(self, line: int) -> None:
        self.cursor = line if line >= 0 else self._count + line

    def on_click(self, event: events.Click) -> None:
        line = event.y - 1 + self.scroll_offset.y
        if event.y > 0 and line < self._count:
            self.cursor = line
            if event.chain == 2:
                self.post_message(self.Chosen())

    # --- drawing

    @property
    def text_width(self) -> int:
        """The width of a line; the scrollbar's cell is left free even without a scrollbar."""
        return max(0, self.container_size.width - self.styles.scrollbar_size_vertical - 1)

    def room_of(self, fields: Sequence[Field]) -> int:
        """The width of the field that takes the room the others leave."""
        return max(1, self.text_width - sum(field.width + 1 for field in fields) + 1)

    def text_of(self, line: int) -> str:
        """The text of a line as it is shown."""
        return self._text(self._cells(line)).plain

    def render_line(self, y: int) -> Strip:
        width = self.size.width
        if y == 0:
            text = self._text([Text(field.title) for field in self._fields])
            return self._strip(text, "listing--header", width)
        line = y - 1 + self.scroll_offset.y
        if line >= self._count:
            return Strip.blank(width, self.rich_style)
        return self._strip(
            self._text(self._cells(line)), self._class_of(line), width, line == self.cursor
        )

    def _strip(self, text: Text, name: str | None, width: int, is_at: bool = False) -> Strip:
        style = self.rich_style
        if name is not None:
            style += self.get_component_rich_style(name)
        if is_at:
            style += self.get_component_rich_style("listing--cursor", partial=True)
        segments = list(text.render(self.app.console))
        strip = Strip(segments).adjust_cell_length(width)
        return Strip(Segment.apply_style(strip, style), width)

    def _text(self, cells: Sequence[Text]) -> Text:
        room = self.room_of(self._fields)
        line = Text(end="", no_wrap=True)
        for field, cell in zip(self._fields, cells, strict=True):
            line.append(" ")
            width = field.width or room
            cell = cell.copy()
            cell.truncate(width, overflow="ellipsis")
            if field.right:
                cell.align("right", width)
            else:
                cell.truncate(width, pad=True)
            line.append_text(cell)
        return line


class Ends(Widget):
    """One line with a text at each end. If they do not fit, the left one loses its beginning."""

    def __init__(self, identity: str) -> None:
        super().__init__(id=identity)
        self._left, self._right = Text(), Text()

    def show(self, left: Text, right: Text | None = None) -> None:
        self._left, self._right = left, right or Text()
        self.refresh()

    @property
    def plain(self) -> str:
        """The line as it is shown."""
        return self._text().plain

    def render(self) -> RenderResult:
        return self._text()

    def _text(self) -> Text:
        room = max(1, self.size.width - self._right.cell_len - 2 * bool(self._right))
        left = self._left.copy()
        while left.cell_len > room:
            left = Text.assemble("…", left[2 if left.plain.startswith("…") else 1 :])
        left.truncate(room, pad=True)
        return Text.assemble(left, "  " * bool(self._right), self._right, end="", no_wrap=True)


# --- bars -----------------------------------------------------------------------------------------


def bar(value: int, most: int, cells: int) -> str:
    """Draw a bar of length `value`, where `most` fills all cells and more ends with an arrow.

    A value above 0 is at least one eighth of a cell.
    """
    if value > most:
        return EIGHTHS[8] * (cells - 1) + "→"
    eighths = value * cells * 8 // most if most > 0 else 0
    if value > 0:
        eighths = max(1, eighths)
    full, part = divmod(min(eighths, cells * 8), 8)
    return (EIGHTHS[8] * full + EIGHTHS[part] * (part > 0)).ljust(cells)


class WrittenBars(Widget):
    """A bar for what each snapshot wrote, by age, and a mark below the bar at the cursor.

    If there are more snapshots than cells, neighbours share a bar, which shows the largest. A bar
    beyond the scale ends with an arrow.
    """

    COMPONENT_CLASSES: ClassVar[set[str]] = {"bars--bar", "bars--cursor", "bars--caption"}
    CAPTION = "written, by age"

    def __init__(self) -> None:
        super().__init__()
        self._values: Sequence[int] = ()
        self._most = 0
        self._at: int | None = None

    def show(self, values: Sequence[int], most: int, at: int | None) -> None:
        """Replace the bars.

        Args:
            most: the end of the scale.
            at: the index of the value to mark; None: mark none.
        """
        self._values, self._most, self._at = values, most, at
        self.refresh()

    def render(self) -> RenderResult:
        rows = max(1, self.size.height - 1)
        groups, cells = self._groups(self.size.width)
        plain = self.get_component_rich_style("bars--bar", partial=True)
        chosen = self.get_component_rich_style("bars--cursor", partial=True)
        gap = " " if cells > 1 else ""
        text = Text(end="", no_wrap=True)
        for row in range(rows - 1, -1, -1):
            for group, here in groups:
                glyph = self._glyph(max(group), row, rows) * (cells - len(gap))
                text.append(glyph, chosen if here else plain)
                text.append(gap)
            text.append("\n")
        ground = Text()
        for _, here in groups:
            ground.append("▲".center(cells) if here else " " * cells, chosen)
        ground.truncate(self.size.width, pad=True)
        caption = self.get_component_rich_style("bars--caption")
        size = len(self.CAPTION)
        if ground.plain[-size:].isspace():  # the caption goes to the end without the mark
            ground = Text.assemble(ground[:-size], (self.CAPTION, caption))
        elif ground.plain[:size].isspace():
            ground = Text.assemble((self.CAPTION, caption), ground[size:])
        text.append_text(ground)
        return text

    def _groups(self, width: int) -> tuple[list[tuple[Sequence[int], bool]], int]:
        """For each bar its values and whether it is marked; and the width of a bar in cells."""
        values = self._values
        count = min(len(values), max(1, width))
        cells = max(1, min(BAR_CELLS_MAX, width // count)) if count else 1
        groups = []
        for number in range(count):
            start = number * len(values) // count
            stop = (number + 1) * len(values) // count
            groups.append((values[start:stop], self._at is not None and start <= self._at < stop))
        return groups, cells

    def _glyph(self, value: int, row: int, rows: int) -> str:
        """The character of a bar in a row; row 0 is the lowest."""
        if value > self._most and row == rows - 1:
            return "↑"
        levels = -(-value * rows * len(BARS) // self._most) if self._most else 0
        if row == 0:
            levels = max(levels, 1)  # the base line
        level = min(max(levels - row * len(BARS), 0), len(BARS))
        return BARS[level - 1] if level else " "
