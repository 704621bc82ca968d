"""The program of `cowdu top`: does the work that its pages ask for, and polls for new generations.

It does one piece of work at a time, in a thread (widgets.py). New numbers come in by themselves,
but never while work that the user asked for is under way.
"""

import shlex
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, ClassVar

from textual.app import App
from textual.binding import Binding, BindingType

from cowfs.cli.output import counted
from cowfs.errors import SnapshotError
from cowfs.escapes import printable

from .dialogs import Help, Question
from .pages import InsidePage, Page, SnapshotsPage
from .walking import Inside, Root, Roots, Source
from .widgets import AbandonedError, run_in_thread
from .wording import NUMBERS, shown_error, whole_size

REST_FACTOR = 5  # after a refresh that took a second, the next waits at least five


class Top(App[None]):
    """`cowdu top`.

    Args:
        read_only: refuse to delete.
        refresh_s: how often to look for a new generation; 0: never.

    Attributes:
        failure: the error that ended the program; None without one.
    """

    TITLE = "cowdu top"
    CSS_PATH = "top.tcss"
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+c", "quit", "Quit", show=False, priority=True)
    ]

    def __init__(self, source: Source, *, read_only: bool, refresh_s: float) -> None:
        super().__init__()
        self.source = source
        self.page = SnapshotsPage(
            source.path, read_only=read_only, open_root=self.open_root, delete=self.delete
        )
        self.failure: Exception | None = None
        self._refresh_s = refresh_s
        self._rest_until = 0.0
        self.is_refreshing = False
        self._refresh_failed = False
        self.is_working = False
        self._can_stop = True

    def run_to_end(self) -> None:
        """Run until the user quits. Raises the error that ended the program."""
        self.run()
        if self.failure is not None:
            raise self.failure

    def on_mount(self) -> None:
        self.push_screen(self.page)
        self.work(self._read_first)
        if self._refresh_s:
            self.set_interval(self._refresh_s, self._look_again)

    def say(self, text: str, *, error: bool = False) -> None:
        """Show a message on the topmost page."""
        pages = [screen for screen in self.screen_stack if isinstance(screen, Page)]
        for page in pages[-1:]:
            page.say(text, error=error)

    def be_silent(self) -> None:
        for screen in self.screen_stack:
            if isinstance(screen, Page):
                screen.be_silent()

    # --- work, one piece at a time

    def work(self, piece: Callable[[], Awaitable[None]]) -> None:
        """Do what the user asked for, if nothing else is under way.

        An OSError is shown as a message. Any other error, or an OSError of the first read, ends the
        program.
        """
        if self.is_working:
            self.say("cowdu is busy with something else" + "; Escape stops it" * self._can_stop)
            return
        self.workers.cancel_group(self, "refresh")
        self.is_working = True

        async def guarded() -> None:
            try:
                await piece()
            except OSError as error:  # a CowfsError is one
                if self.page.roots is None:
                    self._fail(error)
                self.say(shown_error(error), error=True)
            except Exception as error:
                self._fail(error)
            finally:
                self.is_working = False
                self._can_stop = True

        whole: Any = guarded
        self.run_worker(whole, group="work")

    def _fail(self, error: Exception) -> None:
        self.failure = error
        self.exit()

    def action_stop(self) -> None:
        if self.is_working and self._can_stop:
            self.workers.cancel_group(self, "work")
            self.say("stopped")

    def _show_nodes(self, words: str, done: int, total: int) -> None:
        self.say(f"{printable(words)}: {done:,}" + f" of {total:,}" * bool(total))

    def _show_bytes(self, words: str, done: int, total: int) -> None:
        self.say(f"{printable(words)}: {NUMBERS.size(done)} of at most {NUMBERS.size(total)}")

    def _take(self, roots: Roots) -> None:
        self.page.take(roots)
        for screen in self.screen_stack:
            if isinstance(screen, InsidePage):
                screen.take_newest(roots.generation)

    # --- reading

    async def _read_first(self) -> None:
        self.say("reading")
        await self._read()
        self.be_silent()

    async def _read(self) -> Roots:
        roots = await run_in_thread(self.source.roots, self._show_nodes)
        self._take(roots)
        return roots

    def action_read_again(self) -> None:
        page = self.screen

        async def piece() -> None:
            self.say("reading")
            if isinstance(page, InsidePage):
                roots = await self._read()
                page.take(await self._read_inside(page.inside.root, roots))
            else:
                await self._read()
            self.be_silent()

        self.work(piece)

    def open_root(self, root: Root) -> None:
        """Show the files of a root."""

        async def piece() -> None:
            assert self.page.roots is not None
            self.say("reading")
            inside = await self._read_inside(root, self.page.roots)
            self.be_silent()
            self.push_screen(InsidePage(inside))

        self.work(piece)

    async def _read_inside(self, root: Root, roots: Roots) -> Inside:
        inside = await run_in_thread(
            lambda progress: self.source.inside(root, roots, progress), self._show_nodes
        )
        if inside.roots.generation != roots.generation:
            self._take(inside.roots)
        return inside

    def _look_again(self) -> None:
        if not (self.is_working or self.is_refreshing or time.monotonic() < self._rest_until):
            # The method is passed, not a coroutine: a worker cancelled before it starts then leaves
            # neither a coroutine that nobody awaits nor a flag that is never reset.
            piece: Any = self._refresh_roots  # textual's type for it fits no coroutine function
            self.run_worker(piece, group="refresh", exclusive=True)

    async def _refresh_roots(self) -> None:
        self.is_refreshing = True
        try:
            started = time.monotonic()
            generation = await run_in_thread(lambda _: self.source.generation())
            if self.page.roots is None or self.page.roots.generation != generation:
                roots = await run_in_thread(
                    lambda progress: self.source.roots(progress, durable=True)
                )
                ended = time.monotonic()
                self._rest_until = ended + REST_FACTOR * (ended - started)
                self._take(roots)
            if self._refresh_failed:
                self._refresh_failed = False
                self.be_silent()
        except AbandonedError:
            pass
        except OSError as error:
            self._refresh_failed = True
            self.say(shown_error(error), error=True)
        except Exception as error:
            self._fail(error)
        finally:
            self.is_refreshing = False

    # --- deleting

    def delete(self, root_ids: Sequence[int]) -> None:
        """Delete snapshots, after a question."""

        async def piece() -> None:
            self.say("reading")
            roots = await self._read()  # the question names the bytes freed at this moment
            self.be_silent()
            chosen = [root for root in roots.roots if root.root_id in root_ids]
            if len(chosen) < len(root_ids):
                raise SnapshotError(
                    "some of these snapshots were deleted meanwhile; nothing was deleted"
                )
            self._require_released(chosen)
            names = [root.usage.name for root in chosen]
            freed = roots.frees_bytes(root_ids)
            self._can_stop = False
            if not await self.push_screen_wait(Question(names, freed)):
                self.say("nothing was deleted")
                return
            self.say("deleting")
            await run_in_thread(
                lambda progress: self.source.delete(
                    names, lambda at: progress(at.what, at.done_bytes, at.total_bytes)
                ),
                self._show_bytes,
                must_end=True,
            )
            await self._read()
            self.say(f"deleted {counted(len(names), 'snapshot')}, which freed {whole_size(freed)}")

        self.work(piece)

    def _require_released(self, roots: Sequence[Root]) -> None:
        """Refuse held snapshots, with the command that releases them. Raises SnapshotError."""
        held = [shlex.quote(root.usage.name) for root in roots if root.usage.held]
        if held:
            are = "is" if len(held) == 1 else "are"
            raise SnapshotError(
                f"{len(held)} of {len(roots)} {are} held; to release: cowfs snapshot release "
                f"{shlex.quote(self.source.path)} {' '.join(held)}"
            )

    def action_show_help(self) -> None:
        self.push_screen(Help())
