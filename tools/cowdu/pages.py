"""The pages of `cowdu top`: the list of snapshots, and the files of one.

A page shows the data it was given and knows nothing of the program. It hands work on through the
callbacks of its constructor; the actions `app.*` of its key bindings are those of the program.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.widgets import Footer, Static

from cowfs.accounting.path_usage import Place
from cowfs.escapes import printable

from .rows import Usage
from .walking import Inside, Line, Root, Roots, shown_name
from .widgets import Ends, Field, Listing, WrittenBars, bar
from .wording import NUMBERS, short_size, short_time, shorter, shown_root, whole_size

WIDE_CELLS = 104  # a list this wide has room for whole titles and times
TALL_LINES = 30  # a screen this high has room for higher bars


class Page(Screen[None]):
    """A title, a list, a line for a message or the details at the cursor, a status line, the keys.

    Attributes:
        said: the message shown instead of the details at the cursor; None without one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.title_line = Ends("title")
        self.listing = Listing()
        self.message_line = Static(id="message")
        self.status_line = Ends("status")
        self.said: Text | None = None

    def say(self, text: str, *, error: bool = False) -> None:
        """Show a message until the cursor moves."""
        self.said = Text(text)
        self.message_line.set_class(error, "error")
        self.draw_lines()

    def be_silent(self) -> None:
        """Show the details at the cursor instead of a message."""
        self.said = None
        self.message_line.remove_class("error")
        self.draw_lines()

    @on(Listing.Moved)
    def _moved(self) -> None:
        self.be_silent()

    def on_resize(self) -> None:
        self.call_after_refresh(self.draw)

    def draw(self) -> None:
        """Draw the list and all lines."""
        raise NotImplementedError  # each page has its own; a Widget cannot be an ABC

    @property
    def message(self) -> Text:
        """The message in full; without one the details at the cursor, cut to one line."""
        if self.said is not None:
            return self.said
        text = Text(self.detail())
        text.truncate(max(1, self.size.width - 2), overflow="ellipsis")
        return text

    def draw_lines(self) -> None:
        """Draw the lines that depend on the cursor."""
        self.message_line.update(self.message)

    def detail(self) -> str:
        """Describe the line at the cursor."""
        raise NotImplementedError  # each page has its own; a Widget cannot be an ABC


ORDERS: dict[str, tuple[str, bool, Callable[[Usage], int | str]]] = {
    # title of the column; whether the largest or newest comes first; the value to sort by
    "name": ("NAME", False, lambda usage: usage.name),
    "created": ("CREATED", True, lambda usage: usage.created_ns or 0),
    "referenced": ("REFERENCED", True, lambda usage: usage.referenced_bytes or 0),
    "exclusive": ("EXCLUSIVE", True, lambda usage: usage.exclusive_bytes),
    "written": ("WRITTEN", True, lambda usage: usage.written_bytes or 0),
}
SHORT_TITLES = {"HELD": "H", "REFERENCED": "REFER", "EXCLUSIVE": "EXCL", "CUMULATIVE": "CUMUL"}


class SnapshotsPage(Page):
    """All snapshots and the live files: what each holds, and what deleting the marked ones frees.

    Args:
        path: the target, shown until the first numbers come in.
        read_only: refuse to delete.
        open_root: called with the root to show the files of.
        delete: called with the ids of the snapshots to delete.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter,right,l", "open", "Open", key_display="enter"),
        Binding("space", "mark", "Mark", key_display="space"),
        Binding("m", "mark_range", "Range"),
        Binding("shift+down", "mark_and_move(1)", "Mark down", show=False),
        Binding("shift+up", "mark_and_move(-1)", "Mark up", show=False),
        Binding("a", "mark_all", "All"),
        Binding("u", "unmark", "None"),
        Binding("d", "delete", "Delete"),
        Binding("c", "sort('created')", "Sort by age", show=False),
        Binding("n", "sort('name')", "Sort by name", show=False),
        Binding("r", "sort('referenced')", "Sort by referenced", show=False),
        Binding("x", "sort('exclusive')", "Sort by exclusive", show=False),
        Binding("w", "sort('written')", "Sort by written", show=False),
        Binding("escape", "app.stop", "Stop", show=False),
        Binding("R", "app.read_again", "Read again", show=False),
        Binding("question_mark", "app.show_help", "Help", key_display="?"),
        Binding("q", "app.quit", "Quit"),
    ]

    def __init__(
        self,
        path: str,
        *,
        read_only: bool,
        open_root: Callable[[Root], None],
        delete: Callable[[Sequence[int]], None],
    ) -> None:
        super().__init__()
        self.totals_line = Ends("totals")
        self.bars = WrittenBars()
        self.roots: Roots | None = None
        self.shown: list[Root] = []
        self.marked: set[int] = set()
        self._path = path
        self._read_only = read_only
        self._open_root = open_root
        self._delete = delete
        self._order, self._descending = "created", True
        self._anchor: int | None = None

    def compose(self) -> ComposeResult:
        yield self.title_line
        yield self.totals_line
        yield self.bars
        yield self.listing
        yield self.message_line
        yield self.status_line
        yield Footer(show_command_palette=False)

    def take(self, roots: Roots) -> None:
        """Show the numbers of another generation; the cursor and the marks stay."""
        at = self.at_cursor
        self.roots = roots
        self.marked &= {root.root_id for root in roots.roots if not root.is_live}
        self._sort(at)

    @property
    def at_cursor(self) -> Root | None:
        return self.shown[self.listing.cursor] if self.shown else None

    @property
    def chosen(self) -> list[Root]:
        """The marked roots, the oldest first; without marks the one at the cursor."""
        if self.roots is None:
            return []
        if self.marked:
            return [root for root in self.roots.roots if root.root_id in self.marked]
        return [self.at_cursor] if self.at_cursor else []

    # --- what the keys do

    def action_open(self) -> None:
        if self.at_cursor is not None:
            self._open_root(self.at_cursor)

    @on(Listing.Chosen)
    def _open_clicked(self) -> None:
        self.action_open()

    def action_mark(self) -> None:
        root = self.at_cursor
        if root is None:
            return
        if root.is_live:
            self.say("the live files are not a snapshot: they cannot be marked")
            return
        self.marked ^= {root.root_id}
        self._anchor = root.root_id
        self.listing.cursor += 1
        self.be_silent()
        self.listing.refresh()

    def action_mark_and_move(self, count: int) -> None:
        if self.at_cursor is not None:
            self._mark([self.at_cursor])
            self._anchor = self.at_cursor.root_id
            self.listing.cursor += count

    def action_mark_range(self) -> None:
        """Mark everything from the last mark to the cursor."""
        ids = [root.root_id for root in self.shown]
        if not ids:
            return
        at = self.listing.cursor
        start = ids.index(self._anchor) if self._anchor in ids else at
        self._mark(self.shown[min(start, at) : max(start, at) + 1])

    def action_mark_all(self) -> None:
        self._mark([root for root in self.shown if not root.usage.held])

    def action_unmark(self) -> None:
        self.marked.clear()
        self._anchor = None
        self._mark([])

    def _mark(self, roots: Sequence[Root]) -> None:
        self.marked |= {root.root_id for root in roots if not root.is_live}
        self.be_silent()
        self.listing.refresh()

    def action_delete(self) -> None:
        chosen = self.chosen
        if self._read_only:
            self.say("nothing is deleted: cowdu top was started with --read-only", error=True)
        elif chosen and chosen[0].is_live:
            self.say("the live files are not a snapshot: they cannot be deleted", error=True)
        elif chosen:
            self._delete([root.root_id for root in chosen])

    def action_sort(self, order: str) -> None:
        """Sort by a column; the same column again reverses the order."""
        descends_first = ORDERS[order][1]
        self._descending = not self._descending if order == self._order else descends_first
        self._order = order
        self._sort(self.at_cursor)

    def _sort(self, at: Root | None) -> None:
        """Sort the list, and put the cursor on `at`."""
        roots = self.roots.roots if self.roots else ()
        snapshots = [root for root in roots if not root.is_live]
        live = [root for root in roots if root.is_live]
        if self._order != "created":  # `roots` is in order of creation already
            value = ORDERS[self._order][2]
            snapshots.sort(key=lambda root: value(root.usage))
        if self._descending:
            snapshots.reverse()
        # The live files come where the newest or largest would be.
        self.shown = live + snapshots if self._descending else snapshots + live
        ids = [root.root_id for root in self.shown]
        cursor = self.listing.cursor
        if at is not None and at.root_id in ids:
            cursor = ids.index(at.root_id)
        self._fill(cursor)

    # --- drawing

    @property
    def _written_most(self) -> int:
        """The end of the scale of written bytes.

        The oldest snapshot wrote everything it holds, so its bar may go beyond the scale.
        """
        written = [root.usage.written_bytes or 0 for root in self.roots.roots] if self.roots else []
        return max(written[1:], default=0) or max(written, default=0)

    def on_resize(self) -> None:
        self.bars.styles.height = 3 if self.size.height < TALL_LINES else 5
        super().on_resize()

    def draw(self) -> None:
        self._fill(self.listing.cursor)

    def _fill(self, cursor: int) -> None:
        wide = self.listing.text_width >= WIDE_CELLS
        number = 10 if wide else 8
        bar_cells = 12 if wide else 4
        most = self._written_most
        size = NUMBERS.size if wide else short_size
        bar_style = self.listing.get_component_rich_style("listing--bar", partial=True)

        def field(title: str, width: int, right: bool = False) -> Field:
            is_order = title == ORDERS[self._order][0]
            if not wide:
                title = SHORT_TITLES.get(title, title)
            return Field(title + ("▼" if self._descending else "▲") * is_order, width, right)

        def number_text(value: int | None) -> Text:
            return Text("-" if value is None else size(value))

        def cells(line: int) -> list[Text]:
            root = self.shown[line]
            usage = root.usage
            created = usage.created_ns or 0
            when = NUMBERS.time(created) if wide else short_time(created)
            return [
                Text("*" if root.root_id in self.marked else " "),
                Text(shorter(shown_root(usage, live=root.is_live), room)),
                Text("-" if root.is_live else when),
                Text(("held" if wide else "H") if usage.held else "-"),
                number_text(usage.referenced_bytes),
                number_text(usage.exclusive_bytes),
                number_text(usage.written_bytes),
                Text(bar(usage.written_bytes or 0, most, bar_cells), bar_style),
                number_text(usage.cumulative_bytes),
            ]

        def class_of(line: int) -> str | None:
            root = self.shown[line]
            if root.root_id in self.marked:
                return "listing--marked"
            return "listing--note" if root.is_live else None

        fields = [
            field("", 1),
            field("NAME", 0),
            field("CREATED", 19 if wide else 11),
            field("HELD", 4 if wide else 1),
            field("REFERENCED", number + wide, right=True),
            field("EXCLUSIVE", number, right=True),
            field("WRITTEN", number, right=True),
            field("", bar_cells),
            field("CUMULATIVE", number, right=True),
        ]
        room = self.listing.room_of(fields)
        self.listing.fill(fields, len(self.shown), cells, class_of, cursor=cursor)
        self.draw_lines()

    def draw_lines(self) -> None:
        super().draw_lines()
        roots = self.roots
        if roots is None:
            self.title_line.show(Text(f"cowdu top  {printable(self._path)}"))
            return
        self.title_line.show(
            Text(f"cowdu top  {printable(roots.image)}"), Text(f"generation {roots.generation}")
        )
        totals = roots.totals
        held = [f"{short_size(totals.allocated_bytes)} held"]
        if totals.snapshots_bytes is not None:
            held.append(f"{short_size(totals.snapshots_bytes)} by snapshots alone")
        held.append(f"{short_size(totals.available_bytes)} available")
        self.totals_line.show(Text(" · ".join(held)))
        at = self.at_cursor
        self.bars.show(
            [root.usage.written_bytes or 0 for root in roots.roots],
            self._written_most,
            None if at is None else [root.root_id for root in roots.roots].index(at.root_id),
        )
        freed = whole_size(roots.frees_bytes(self.marked))
        status = f"{len(self.marked)} marked · deleting exactly these frees {freed}"
        self.status_line.show(Text(status), Text("read-only" if self._read_only else ""))

    def detail(self) -> str:
        root = self.at_cursor
        if root is None:
            return ""
        usage = root.usage
        if root.is_live:
            return "the live files: their exclusive space is in no snapshot"
        words = [shown_root(usage, live=False), NUMBERS.time(usage.created_ns or 0)]
        words += [f"generation {usage.generation}", "held"][: 1 + usage.held]
        if usage.description:
            words.append(printable(usage.description))
        return " · ".join(words)


class InsidePage(Page):
    """The files and directories of a root: what each holds, and how much of it exclusively."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter,right,l", "enter", "Into", key_display="enter"),
        Binding("backspace,left,h", "leave", "Up", key_display="backspace"),
        Binding("x", "sort('exclusive')", "Exclusive", show=False),
        Binding("s", "sort('total')", "Total/exclusive"),
        Binding("n", "sort('name')", "Name"),
        Binding("R", "app.read_again", "Read again", show=False),
        Binding("question_mark", "app.show_help", "Help", key_display="?"),
        Binding("q,escape", "back", "Back"),
    ]

    def __init__(self, inside: Inside) -> None:
        super().__init__()
        self.inside = inside
        self.newest = inside.roots.generation
        self.place = inside.top
        self.lines: list[Line] = []
        self._order = "exclusive"
        self._cursors: dict[Place, int] = {}

    def compose(self) -> ComposeResult:
        yield self.title_line
        yield self.listing
        yield self.message_line
        yield self.status_line
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        self._sort()

    def take(self, inside: Inside) -> None:
        """Show another generation of the root: the same directory, or its nearest ancestor left."""
        names = [place.name for place in self._way()[1:]]
        self.inside, self.place = inside, inside.top
        self.newest = inside.roots.generation
        self._cursors.clear()
        for name in names:
            below = [each for each in self.place.children if each.is_directory]
            found = next((each for each in below if each.name == name), None)
            if found is None:
                break
            self.place = found
        self._sort()

    def take_newest(self, generation: int) -> None:
        """Show in the title that a newer generation exists."""
        self.newest = generation
        self.draw_lines()

    def _way(self) -> list[Place]:
        """The directories from the root to the one shown."""
        way = [self.place]
        while way[-1].parent is not None:
            way.append(way[-1].parent)
        return way[::-1]

    @property
    def at_cursor(self) -> Line | None:
        return self.lines[self.listing.cursor] if self.lines else None

    # --- what the keys do

    def action_enter(self) -> None:
        line = self.at_cursor
        if line is None or line.place is None or not line.place.is_directory:
            return
        self._cursors[self.place] = self.listing.cursor
        self.place = line.place
        self._sort()

    @on(Listing.Chosen)
    def _enter_clicked(self) -> None:
        self.action_enter()

    def action_leave(self) -> None:
        """Go to the directory above; from the root, back to the list of snapshots."""
        if self.place.parent is None:
            self.action_back()
            return
        self.place = self.place.parent
        self._sort()

    def action_back(self) -> None:
        self.app.pop_screen()

    def action_sort(self, order: str) -> None:
        """Sort by a column; the same column again goes back to exclusive."""
        self._order = "exclusive" if order == self._order else order
        self._cursors.clear()
        self._sort()

    def _sort(self) -> None:
        self.lines = self.inside.lines(self.place)
        self.lines.sort(key=lambda line: (line.place is None, line.title))
        if self._order != "name":
            self.lines.sort(key=lambda line: line.total_bytes or 0, reverse=True)
        if self._order == "exclusive":
            self.lines.sort(key=lambda line: line.exclusive_bytes, reverse=True)
        self._fill(self._cursors.get(self.place, 0))

    # --- drawing

    def draw(self) -> None:
        self._fill(self.listing.cursor)

    def _fill(self, cursor: int) -> None:
        bar_cells = 20 if self.listing.text_width >= WIDE_CELLS else 10
        most = max((line.exclusive_bytes for line in self.lines), default=0)
        whole = sum(line.exclusive_bytes for line in self.lines)
        bar_style = self.listing.get_component_rich_style("listing--bar", partial=True)

        def cells(number: int) -> list[Text]:
            line = self.lines[number]
            share = 100 * line.exclusive_bytes / whole if whole else 0.0
            total = line.total_bytes
            return [
                Text(NUMBERS.size(line.exclusive_bytes) if line.exclusive_bytes else "-"),
                Text(f"{share:.1f}%" if line.exclusive_bytes else ""),
                Text(bar(line.exclusive_bytes, most, bar_cells), bar_style),
                Text("-" if total is None else NUMBERS.size(total)),
                Text(line.title),
            ]

        def class_of(number: int) -> str | None:
            return "listing--note" if self.lines[number].place is None else None

        mark = {self._order: "▼" if self._order != "name" else "▲"}
        fields = [
            Field("EXCLUSIVE" + mark.get("exclusive", ""), 10, right=True),
            Field("", 6, right=True),
            Field("", bar_cells),
            Field("TOTAL" + mark.get("total", ""), 10, right=True),
            Field("NAME" + mark.get("name", ""), 0),
        ]
        self.listing.fill(fields, len(self.lines), cells, class_of, cursor=cursor)
        self.draw_lines()

    def draw_lines(self) -> None:
        super().draw_lines()
        root = self.inside.root
        path = "/" + "/".join(shown_name(place.name) for place in self._way()[1:])
        shown = self.inside.roots.generation
        newer = "" if self.newest == shown else f" (now {self.newest}: R)"
        self.title_line.show(
            Text(f"{shown_root(root.usage, live=root.is_live)}  {path}"),
            Text(f"generation {shown}{newer}"),
        )
        exclusive = whole_size(sum(line.exclusive_bytes for line in self.lines))
        entries = len(self.place.children)
        noun = "entry" if entries == 1 else "entries"
        self.status_line.show(Text(f"{entries:,} {noun} · exclusive together: {exclusive}"))

    def detail(self) -> str:
        line = self.at_cursor
        if line is None:
            return "this directory is empty"
        words = [line.title, f"exclusive {line.exclusive_bytes:,} bytes"]
        if line.total_bytes is not None:
            words.append(f"total {line.total_bytes:,} bytes")
        return " · ".join(words)
