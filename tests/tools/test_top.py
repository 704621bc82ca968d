"""Promises of `cowdu top`: its numbers are those of cowdu, and it deletes only what it is told."""

import asyncio
import html
import itertools
import os
import re
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot

from cowfs.accounting.path_usage import Argument, Place, usage_of_path
from cowfs.accounting.virtual_drop import simulate_deletion
from cowfs.daemon.messages import Progress
from cowfs.errors import CorruptError
from cowfs.files.items import ROOT_INO
from cowfs.history.edits import DeleteSnapshots, HoldSnapshots, RenameSnapshot
from cowfs.history.filesystem import Filesystem
from cowfs.history.images import open_filesystem
from cowfs.storage.device import FileDevice
from cowfs.storage.format import BLOCK_SIZE_BYTES
from cowfs_tools.cowdu.dialogs import Question
from cowfs_tools.cowdu.pages import InsidePage, SnapshotsPage
from cowfs_tools.cowdu.program import Top
from cowfs_tools.cowdu.rows import measure
from cowfs_tools.cowdu.walking import Source
from cowfs_tools.cowdu.wording import short_size
from tests.image_files import (
    change,
    history,
    make_image,
    snapshot,
    tree_bytes,
    write,
)
from tests.sizes import HANG_SECONDS

NAMES = ["one", "two", "three", "four"]
Session = Callable[[Top, "Pilot[None]"], Awaitable[None]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache directory for one test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An image with four snapshots that share data, the snapshot `two` held, as bytes."""
    path = make_image(tmp_path_factory.mktemp("original") / "disk.img")
    change(path, *history(NAMES), hold("two"))
    return path.read_bytes()


def hold(*names: str) -> Callable[[Filesystem], object]:
    """A step for `change`: hold snapshots."""
    return lambda filesystem: filesystem.apply(HoldSnapshots(names, True))


def asked(image: Path, question: Callable[[Filesystem], Any]) -> Any:
    """The answer of an image, computed without cowdu top."""
    device = FileDevice(image, writable=False)
    try:
        return question(open_filesystem(device, writable=False))
    finally:
        device.close()


def run(
    image: Path,
    session: Session,
    *,
    read_only: bool = False,
    refresh_s: float = 0.0,
    size: tuple[int, int] = (80, 24),
) -> Top:
    """Run cowdu top while a session runs, which begins when the list is shown."""
    top = Top(Source(str(image)), read_only=read_only, refresh_s=refresh_s)

    async def whole() -> None:
        async with top.run_test(size=size) as pilot:
            await until(pilot, lambda: not top.is_working)
            await session(top, pilot)

    asyncio.run(whole())
    if top.failure is not None:
        raise top.failure
    return top


async def until(pilot: "Pilot[None]", condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(HANG_SECONDS):
        while not condition():
            await asyncio.sleep(0.005)
    await pilot.pause()


async def press(top: Top, pilot: "Pilot[None]", *keys: str) -> None:
    """Press keys, and wait until the work they began has ended or asks a question."""
    await pilot.press(*keys)
    await until(pilot, lambda: not top.is_working or isinstance(top.screen, Question))


async def go_to(top: Top, pilot: "Pilot[None]", name: str) -> None:
    """Move the cursor to a root."""
    top.page.listing.cursor = shown_names(top).index(name)
    await pilot.pause()


def seen(top: Top) -> list[str]:
    """The lines of the screen."""
    drawing = top.export_screenshot()
    lines: dict[float, list[tuple[float, str]]] = {}
    for x, y, text in re.findall(
        r'<text class="[^"]*" x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]*)</text>', drawing
    ):
        lines.setdefault(float(y), []).append((float(x), html.unescape(text)))
    return [
        "".join(text for _, text in sorted(lines[y])).replace("\xa0", " ") for y in sorted(lines)
    ]


def shown_names(top: Top) -> list[str]:
    return [root.usage.name for root in top.page.shown]


# --- the list -------------------------------------------------------------------------------------


def test_list_shows_what_cowdu_measures(image: Path) -> None:
    """Promise C11: every number of the list is that of cowdu list, which has the live files too."""
    expected = asked(image, measure)
    live = next(usage for usage in expected.others if usage.kind == "volume")

    async def session(top: Top, pilot: "Pilot[None]") -> None:
        rows = {root.usage.name: root.usage for root in top.page.shown}
        assert shown_names(top) == ["main", "four", "three", "two", "one"]  # newest first
        assert rows["main"] == live
        for usage in expected.snapshots:
            line = shown_names(top).index(usage.name)
            words = top.page.listing.text_of(line).split()
            assert rows[usage.name] == usage
            assert words[0] == usage.name
            assert words[3] == ("H" if usage.held else "-")
            for size in (usage.referenced_bytes, usage.exclusive_bytes, usage.written_bytes):
                assert short_size(size) in " ".join(words)
            assert words[-2:] == short_size(usage.cumulative_bytes).split()
        text = "\n".join(seen(top))
        for title in ("NAME", "CREATED", "REFER", "EXCL", "WRITTEN", "CUMUL"):
            assert title in text
        assert f"generation {expected.generation}" in text

    run(image, session)


def test_list_on_a_wide_terminal_has_whole_titles_and_times(image: Path) -> None:
    """Promise: titles and times that 80 columns shorten are whole where there is room."""

    async def session(top: Top, pilot: "Pilot[None]") -> None:
        text = "\n".join(seen(top))
        for title in ("HELD", "REFERENCED", "EXCLUSIVE", "CUMULATIVE"):
            assert title in text
        assert re.search(r"two +\d{4}-\d\d-\d\d \d\d:\d\d:\d\d held ", text)

    run(image, session, size=(130, 40))


def test_marking_any_set_tells_what_deleting_it_frees(image: Path) -> None:
    """Promise C11: for every set of marks the freed bytes are exact; held ones can be marked."""

    def frees(names: tuple[str, ...]) -> Callable[[Filesystem], int]:
        return lambda filesystem: (
            simulate_deletion(
                filesystem, [filesystem.catalog.snapshot(name) for name in names]
            ).blocks
            * BLOCK_SIZE_BYTES
        )

    async def session(top: Top, pilot: "Pilot[None]") -> None:
        assert "0 marked · deleting exactly these frees 0 bytes" in top.page.status_line.plain
        marked: set[str] = set()
        met = set()
        for number in range(1, 16):  # from each set to the next, one mark changes
            name = NAMES[(number & -number).bit_length() - 1]
            marked ^= {name}
            met.add(frozenset(marked))
            await go_to(top, pilot, name)
            await pilot.press("space")
            status = top.page.status_line.plain
            assert status.startswith(f"{len(marked)} marked · deleting exactly these frees ")
            assert f"({asked(image, frees(tuple(marked))):,} bytes)" in status
        assert len(met) == 15

    run(image, session)


def test_marks_by_every_key(image: Path) -> None:
    """Promise: keys mark all that are not held, none, a range, or while moving; not live files."""

    async def session(top: Top, pilot: "Pilot[None]") -> None:
        def marked() -> set[str]:
            return {root.usage.name for root in top.page.shown if root.root_id in top.page.marked}

        await press(top, pilot, "space")  # on the live files
        assert marked() == set()
        assert "not a snapshot" in top.page.message.plain
        await press(top, pilot, "a")
        assert marked() == {"one", "three", "four"}
        await press(top, pilot, "u")
        assert marked() == set()
        await go_to(top, pilot, "four")
        await press(top, pilot, "space", "down", "m")
        assert marked() == {"four", "three", "two"}
        assert sum(line.startswith(" *") for line in seen(top)) == 3
        await press(top, pilot, "u", "end", "shift+up", "shift+up")
        assert marked() == {"one", "two"}
        await press(top, pilot, "down", "space")
        assert marked() == {"one"}

    run(image, session)


def test_sorting_keeps_the_cursor_where_it_is(image: Path) -> None:
    """Promise: keys sort by age, name, numbers, then in reverse; live files are first or last."""
    usages = asked(image, measure).snapshots

    async def session(top: Top, pilot: "Pilot[None]") -> None:
        await go_to(top, pilot, "three")
        for key, value in (
            ("x", lambda usage: usage.exclusive_bytes),
            ("w", lambda usage: usage.written_bytes),
            ("r", lambda usage: usage.referenced_bytes),
        ):
            await press(top, pilot, key)
            values = [value(root.usage) for root in top.page.shown[1:]]
            assert values == sorted(map(value, usages), reverse=True)
            assert shown_names(top)[0] == "main"
            await press(top, pilot, key)
            assert [value(root.usage) for root in top.page.shown[:-1]] == values[::-1]
            assert shown_names(top)[-1] == "main"
            assert top.page.at_cursor.usage.name == "three"
        await press(top, pilot, "n")
        assert shown_names(top) == [*sorted(NAMES), "main"]
        await press(top, pilot, "c")
        assert shown_names(top) == ["main", *NAMES[::-1]]
        await press(top, pilot, "c")
        assert shown_names(top) == [*NAMES, "main"]
        assert top.page.at_cursor.usage.name == "three"

    run(image, session)


def test_bars_show_every_snapshot_and_which_is_at_the_cursor(image: Path) -> None:
    """Promise: each snapshot has a bar, by age and from zero, with a sign below that of the cursor.

    The oldest snapshot wrote far more than the others, whose bars must still be visible.
    """
    written = [usage.written_bytes for usage in asked(image, measure).snapshots]
    assert written[0] > max(written[1:])

    async def session(top: Top, pilot: "Pilot[None]") -> None:
        for place, name in enumerate([*NAMES, "main"]):
            await go_to(top, pilot, name)
            await pilot.pause()
            high, low, ground = str(top.page.bars.render()).split("\n")
            assert high == "↑↑↑↑ ████ ████ ████      "
            assert low == "████ ████ ████ ████ ▃▃▃▃ "
            assert ground.index("▲") // 5 == place

    run(image, session)


# --- inside ---------------------------------------------------------------------------------------


def tree(filesystem: Filesystem) -> None:
    """Directories of files, one of which is linked in two of them."""
    live = filesystem.live
    inner = None
    for name in (b"first", b"second"):
        directory = live.create(ROOT_INO, name, 0o040755, 0, 0)
        for number in range(3):
            file = live.create(directory.ino, b"file %d" % number, 0o100644, 0, 0)
            live.write(file.ino, 0, os.urandom(50_000 * (number + 1)))
        inner = live.create(directory.ino, b"inner", 0o040755, 0, 0)
        file = live.create(inner.ino, b"deep", 0o100644, 0, 0)
        live.write(file.ino, 0, os.urandom(10_000))
    assert inner is not None
    both = live.create(inner.ino, b"both", 0o100644, 0, 0)
    live.write(both.ino, 0, os.urandom(70_000))
    live.link(both.ino, live.find(ROOT_INO, b"first").ino, b"both too")


def test_inside_a_snapshot_the_parts_are_the_whole(image: Path) -> None:
    """Promise C11: the lines' exclusive bytes sum to the root's, and each is that of cowdu du."""
    change(image, tree, snapshot("five"), write("always", 4096 * 9))

    def usage(name: str) -> Callable[[Filesystem], Place]:
        def question(filesystem: Filesystem) -> Place:
            record = filesystem.record if name == "main" else filesystem.catalog.snapshot(name)
            volume = filesystem.volume(record.root_id)
            assert volume is not None
            return usage_of_path(filesystem, Argument(record, volume, volume.get(ROOT_INO), b""))

        return question

    def facts(place: Place) -> Any:
        below = [facts(child) for child in place.children]
        return (place.name, place.exclusive, place.total, below)

    async def session(top: Top, pilot: "Pilot[None]") -> None:
        for name in ("main", "five", "four", "two"):
            await go_to(top, pilot, name)
            root = top.page.at_cursor
            assert root is not None
            await press(top, pilot, "enter")
            page = top.screen
            assert isinstance(page, InsidePage)
            assert facts(page.inside.top) == facts(asked(image, usage(name)))
            assert sum(line.exclusive_bytes for line in page.lines) == root.usage.exclusive_bytes
            assert f"({root.usage.exclusive_bytes:,} bytes)" in page.status_line.plain
            shown = "\n".join(page.listing.text_of(at) for at in range(len(page.lines)))
            assert "(metadata and small files)" in shown
            values = [line.exclusive_bytes for line in page.lines]
            assert values == sorted(values, reverse=True)
            for place in page.inside.top.walk():
                if place.is_directory and place is not page.inside.top:
                    total = sum(line.exclusive_bytes for line in page.inside.lines(place))
                    assert total == place.exclusive * BLOCK_SIZE_BYTES
            await press(top, pilot, "q")
            assert isinstance(top.screen, SnapshotsPage)

    run(image, session)


def test_files_that_are_open_without_a_name_are_a_line(image: Path) -> None:
    """Promise: open files without a name are a line, so that the sum is right."""

    def unlink(filesystem: Filesystem) -> None:
        filesystem.live.unlink(ROOT_INO, b"always")  # nothing reclaims it

    change(image, write("nameless", 90_000), lambda filesystem: None)
    change(image, unlink)

    async def session(top: Top, pilot: "Pilot[None]") -> None:
        await press(top, pilot, "enter")
        page = top.screen
        assert isinstance(page, InsidePage)
        root = page.inside.root
        assert root.is_live
        assert sum(line.exclusive_bytes for line in page.lines) == root.usage.exclusive_bytes
        titles = [line.title for line in page.lines]
        assert "(open files without a name)" in titles

    run(image, session)


def test_directories_are_walked_through(image: Path) -> None:
    """Promise: Enter goes in, Backspace and Left go back up; s and n sort."""
    change(image, tree)

    async def session(top: Top, pilot: "Pilot[None]") -> None:
        await press(top, pilot, "enter")
        page = top.screen
        assert isinstance(page, InsidePage)

        async def enter(title: str) -> None:
            line = [each.title for each in page.lines].index(title)
            await press(top, pilot, "home", *["down"] * line, "enter")

        await enter("second/")
        await enter("inner/")
        assert "/second/inner" in page.title_line.plain
        assert {line.title for line in page.lines} == {"deep", "both"}
        await press(top, pilot, "enter")  # a file cannot be entered
        assert page.place.name == b"inner"
        await press(top, pilot, "backspace")
        assert page.at_cursor.title == "inner/"
        await press(top, pilot, "s")
        totals = [line.total_bytes for line in page.lines]
        assert totals == sorted(totals, reverse=True)
        await press(top, pilot, "n")
        assert [line.title for line in page.lines] == ["file 0", "file 1", "file 2", "inner/"]
        await press(top, pilot, "left")
        assert page.place is page.inside.top
        assert [line.title for line in page.lines if line.place is None] == [
            "(in several of these)",
            "(metadata and small files)",
        ]
        await press(top, pilot, "left")
        assert isinstance(top.screen, SnapshotsPage)

    run(image, session)


def test_inside_an_older_generation_says_so_and_reads_again(image: Path) -> None:
    """Promise: the view stays at its generation; R shows the newest in the same directory."""
    change(image, tree)

    def grow(filesystem: Filesystem) -> None:
        directory = filesystem.live.find(ROOT_INO, b"first")
        assert directory is not None
        file = filesystem.live.create(directory.ino, b"new", 0o100644, 0, 0)
        filesystem.live.write(file.ino, 0, os.urandom(400_000))

    async def session(top: Top, pilot: "Pilot[None]") -> None:
        await press(top, pilot, "enter")
        page = top.screen
        assert isinstance(page, InsidePage)
        line = [each.title for each in page.lines].index("first/")
        await press(top, pilot, *["down"] * line, "enter")
        change(image, grow)
        await until(pilot, lambda: "R)" in page.title_line.plain)
        assert "new" not in [each.title for each in page.lines]
        await press(top, pilot, "R")
        assert page.lines[0].title == "new"
        assert page.place.name == b"first"
        assert "R)" not in page.title_line.plain

    run(image, session, refresh_s=0.05)


# --- deleting -------------------------------------------------------------------------------------


def announced(top: Top) -> int:
    """The bytes that the question names."""
    (found,) = re.findall(r"This frees exactly .*?([\d,]+) bytes", "\n".join(seen(top)))
    return int(found.replace(",", ""))


@pytest.mark.parametrize("answer", [["y"], ["right", "enter"]], ids=["y", "button"])
def test_delete_frees_the_bytes_it_asks_about(image: Path, answer: list[str]) -> None:
    """Promise C11: after a yes exactly the marked ones are gone, and exactly those bytes free."""
    before = tree_bytes(image)
    alone = sum(usage.exclusive_bytes for usage in asked(image, measure).snapshots[2:])
    told = 0

    async def session(top: Top, pilot: "Pilot[None]") -> None:
        nonlocal told
        for name in ("three", "four"):
            await go_to(top, pilot, name)
            await pilot.press("space")
        await press(top, pilot, "d")
        told = announced(top)
        text = "\n".join(seen(top))
        assert "Delete 2 snapshots?" in text
        assert all(re.search(rf"  {name}\b", text) for name in ("three", "four"))
        assert tree_bytes(image) == before
        await press(top, pilot, *answer)
        assert shown_names(top) == ["main", "two", "one"]
        assert top.page.marked == set()
        assert f"deleted 2 snapshots, which freed {told / 1024:.1f} KiB" in top.page.message.plain

    run(image, session)
    assert before - tree_bytes(image) == told > alone  # also what only the two share
    assert [usage.name for usage in asked(image, measure).snapshots] == ["one", "two"]


def test_delete_asks_about_what_is_there_now(image: Path) -> None:
    """Promise: the question is about the newest state; snapshots that are gone are left out."""

    def delete(*names: str) -> Callable[[Filesystem], None]:
        def step(filesystem: Filesystem) -> None:
            filesystem.apply(DeleteSnapshots(names))
            filesystem.work_drops()

        return step

    async def session(top: Top, pilot: "Pilot[None]") -> None:
        await go_to(top, pilot, "three")
        exclusive = top.page.at_cursor.usage.exclusive_bytes
        change(image, delete("four"))  # `three` alone has now what the two shared
        await press(top, pilot, "d")
        assert announced(top) > exclusive
        assert announced(top) == asked(image, measure).snapshots[-1].exclusive_bytes
        await press(top, pilot, "escape")
        change(image, delete("three"))
        await press(top, pilot, "d")
        assert isinstance(top.screen, SnapshotsPage)
        assert "were deleted meanwhile; nothing was deleted" in top.page.message.plain

    run(image, session)


def test_delete_waits_for_the_space_and_tells_how_far_it_is(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: the daemon's progress in freeing space is shown until all is free."""
    from cowfs.api import ImageConnection

    may_end = threading.Event()
    waits = []

    def slow(target: Any, names: Any, *, wait: bool = False, progress: Any = None) -> None:
        waits.append((names, wait))
        progress(Progress(what="giving back space", done_bytes=1 << 20, total_bytes=2 << 20))
        assert may_end.wait(HANG_SECONDS)

    monkeypatch.setattr(ImageConnection, "delete_snapshots", slow)

    async def session(top: Top, pilot: "Pilot[None]") -> None:
        await go_to(top, pilot, "four")
        await press(top, pilot, "d")
        await pilot.press("y")
        says = "giving back space: 1.0 MiB of at most 2.0 MiB"
        await until(pilot, lambda: top.page.message.plain == says)
        await pilot.press("escape")  # too late to stop the deletion
        assert top.is_working
        may_end.set()
        await until(pilot, lambda: not top.is_working)
        assert "deleted 1 snapshot," in top.page.message.plain

    run(image, session)
    assert waits == [(["four"], True)]


@pytest.mark.parametrize("answer", ["enter", "escape", "n", "q"])
def test_delete_without_a_yes_deletes_nothing(image: Path, answer: str) -> None:
    """Promise: without a yes nothing is deleted."""
    contents = image.read_bytes()

    async def session(top: Top, pilot: "Pilot[None]") -> None:
        await go_to(top, pilot, "four")
        await press(top, pilot, "d")
        assert isinstance(top.screen, Question)
        assert top.screen.names == ["four"]
        await press(top, pilot, answer)
        assert isinstance(top.screen, SnapshotsPage)
        assert "nothing was deleted" in top.page.message.plain
        assert "four" in shown_names(top)

    run(image, session)
    assert image.read_bytes() == contents


def test_delete_refuses_what_is_held_live_or_read_only(image: Path) -> None:
    """Promise: no question is asked; the line says why, and how to release a held snapshot."""
    contents = image.read_bytes()

    async def session(top: Top, pilot: "Pilot[None]") -> None:
        await press(top, pilot, "d")
        assert "the live files are not a snapshot" in top.page.message.plain
        await go_to(top, pilot, "one")
        await press(top, pilot, "space", "up", "space")
        assert "2 marked" in top.page.status_line.plain
        await press(top, pilot, "d")
        assert isinstance(top.screen, SnapshotsPage)
        said = top.page.message.plain
        assert said == f"1 of 2 is held; to release: cowfs snapshot release {image} two"
        whole = "".join(line.strip() for line in seen(top)[-5:-2])
        assert whole.replace(" ", "").endswith(said.replace(" ", ""))

    async def read_only(top: Top, pilot: "Pilot[None]") -> None:
        assert "read-only" in top.page.status_line.plain
        await go_to(top, pilot, "four")
        await press(top, pilot, "d")
        assert isinstance(top.screen, SnapshotsPage)
        assert "--read-only" in top.page.message.plain

    run(image, session)
    run(image, read_only, read_only=True)
    assert image.read_bytes() == contents


def test_delete_that_fails_is_one_line(image: Path) -> None:
    """Promise: a locked image is not changed; the error is one line, and the program goes on."""

    async def session(top: Top, pilot: "Pilot[None]") -> None:
        await go_to(top, pilot, "four")
        await press(top, pilot, "d")
        device = FileDevice(image, writable=True)  # holds the lock
        try:
            await press(top, pilot, "y")
        finally:
            device.close()
        assert "is in use" in top.page.message.plain
        assert "four" in shown_names(top)
        await press(top, pilot, "d", "y")
        assert "four" not in shown_names(top)

    run(image, session)


# --- what others do -------------------------------------------------------------------------------


def test_refresh_shows_what_others_did_and_keeps_marks_and_cursor(image: Path) -> None:
    """Promise: new snapshots appear and deleted ones go; marks and cursor keep their snapshots."""

    async def session(top: Top, pilot: "Pilot[None]") -> None:
        for name in ("one", "three"):
            await go_to(top, pilot, name)
            await pilot.press("space")
        await go_to(top, pilot, "two")
        change(image, write("more", 300_000), snapshot("five"))
        await until(pilot, lambda: "five" in shown_names(top))
        assert len(top.page.marked) == 2
        assert top.page.at_cursor.usage.name == "two"
        assert top.page.roots.roots[-2].usage == asked(image, measure).snapshots[-1]

        def delete(filesystem: Filesystem) -> None:
            filesystem.apply(RenameSnapshot("one", "uno"))
            filesystem.apply(DeleteSnapshots(("three",)))
            filesystem.work_drops()

        change(image, delete)
        await until(pilot, lambda: "three" not in shown_names(top))
        marked = [root for root in top.page.shown if root.root_id in top.page.marked]
        assert [root.usage.name for root in marked] == ["uno"]
        freed = asked(image, measure).snapshots[0].exclusive_bytes
        assert f"({freed:,} bytes)" in top.page.status_line.plain
        assert top.page.at_cursor.usage.name == "two"

    run(image, session, refresh_s=0.05)


def test_without_refresh_only_the_key_reads_again(image: Path) -> None:
    """Promise: with --refresh 0 the image is read only when R is pressed."""

    async def session(top: Top, pilot: "Pilot[None]") -> None:
        change(image, snapshot("five"))
        await pilot.pause(0.3)
        assert "five" not in shown_names(top)
        await press(top, pilot, "R")
        assert "five" in shown_names(top)

    run(image, session)


def test_refresh_that_fails_is_one_line_and_the_next_one_helps(image: Path) -> None:
    """Promise: an image that is missing for a moment ends nothing."""
    away = image.with_name("away.img")

    async def session(top: Top, pilot: "Pilot[None]") -> None:
        image.rename(away)
        await until(pilot, lambda: "there is no" in top.page.message.plain.lower())
        away.rename(image)
        await until(pilot, lambda: "there is no" not in top.page.message.plain.lower())

    run(image, session, refresh_s=0.05)


def test_damage_ends_it_with_the_error(tmp_path: Path, original: bytes) -> None:
    """Promise: on damage no number is shown, and the command ends with the error in one line."""
    image = tmp_path / "damaged.img"
    image.write_bytes(original)
    damage(image, "three")

    async def session(top: Top, pilot: "Pilot[None]") -> None:
        assert top.page.roots is None

    with pytest.raises(CorruptError):
        run(image, session)


def damage(image: Path, name: str) -> None:
    """Overwrite the root node of a snapshot and its twin."""
    pointer = asked(image, lambda filesystem: filesystem.catalog.snapshot(name).pointer)
    with image.open("r+b") as file:
        for block in {pointer.block, pointer.twin or pointer.block}:
            file.seek(block * BLOCK_SIZE_BYTES)
            file.write(b"damage" * 100)


def test_image_that_changes_while_it_is_read_is_read_again(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: blocks reused while reading are no damage; real damage is still found."""
    from cowfs_tools.cowdu import walking

    honest = walking._roots_of
    calls = 0

    def disturbed(look: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            change(image, snapshot("five"))
            raise CorruptError("node", 1, "it was overwritten")
        return honest(look)

    monkeypatch.setattr(walking, "_roots_of", disturbed)
    roots = Source(str(image)).roots()
    assert calls == 2
    assert roots.roots[-2].usage.name == "five"

    def damaged(look: Any) -> Any:
        nonlocal calls
        calls += 1
        raise CorruptError("node", 1, "it is damaged")

    monkeypatch.setattr(walking, "_roots_of", damaged)
    with pytest.raises(CorruptError):
        Source(str(image)).roots()
    assert calls == 3


def test_escape_stops_reading(image: Path) -> None:
    """Promise: Escape ends a long pass over the image at once, and so does leaving."""
    ended = threading.Event()

    class SlowSource(Source):
        def inside(self, root: Any, roots: Any, progress: Any = None) -> Any:
            try:
                for number in itertools.count():
                    progress("reading", number, 0)
                    ended.wait(0.01)
            finally:
                ended.set()

    async def session(top: Top, pilot: "Pilot[None]") -> None:
        top.source = SlowSource(str(image))
        await pilot.press("enter")
        await until(pilot, lambda: "reading: " in top.page.message.plain)
        await press(top, pilot, "escape")
        assert "stopped" in top.page.message.plain
        assert await asyncio.to_thread(ended.wait, HANG_SECONDS)

    run(image, session)


# --- names ----------------------------------------------------------------------------------------


def test_hostile_names_are_shown_and_not_obeyed(image: Path) -> None:
    """Promise: markup, escape sequences, bytes and bidi text are shown as letters on one line."""
    names = [b"[bold red]x", b"[[", b"\x1b[2Jcleared", b"two\nlines", b"\xff\xfe", b"long" * 60]
    names += ["\u202eturned".encode(), b"[@click=app.quit]here"]

    def step(filesystem: Filesystem) -> None:
        for name in names:
            file = filesystem.live.create(ROOT_INO, name, 0o100644, 0, 0)
            filesystem.live.write(file.ino, 0, os.urandom(900_000))
        directory = filesystem.live.create(ROOT_INO, b"[dir]\x07", 0o040755, 0, 0)
        file = filesystem.live.create(directory.ino, b"in it", 0o100644, 0, 0)
        filesystem.live.write(file.ino, 0, os.urandom(2_000_000))

    change(image, step, snapshot("[bold]s"), snapshot("\u202e[red]"))

    async def session(top: Top, pilot: "Pilot[None]") -> None:
        text = "\n".join(seen(top))
        assert "[bold]s" in text
        assert "\\u202e[red]" in text
        await press(top, pilot, "down", "space", "space", "d")
        text = "\n".join(seen(top))
        assert "Delete 2 snapshots?" in text
        assert "\\u202e[red]" in text
        assert "[bold]s" in text
        await press(top, pilot, "escape", "home", "enter", "s")
        lines = seen(top)
        text = "\n".join(lines)
        for shown in (
            "[bold red]x",
            "[[",
            r"\x1b[2Jcleared",
            r"two\nlines",
            r"\xff\xfe",
            r"\u202eturned",
            "[@click=app.quit]here",
            "[dir]\\x07/",
            "longlong",
        ):
            assert shown in text, shown
        assert len(lines) == 24
        page = top.screen
        assert isinstance(page, InsidePage)
        assert page.at_cursor.title == "[dir]\\x07/"
        await press(top, pilot, "enter")
        assert "[dir]\\x07" in "\n".join(seen(top))

    run(image, session)


def test_a_thousand_files_need_only_what_is_seen(image: Path) -> None:
    """Promise: the cursor stays visible in a list of any length, whatever key moved it."""

    def step(filesystem: Filesystem) -> None:
        for number in range(1000):
            filesystem.live.create(ROOT_INO, b"file %04d" % number, 0o100644, 0, 0)

    change(image, step)

    async def session(top: Top, pilot: "Pilot[None]") -> None:
        await press(top, pilot, "enter", "n")
        page = top.screen
        assert isinstance(page, InsidePage)
        for key in ("end", "home", "pagedown", "pagedown", "down", "end", "pageup", "up", "k"):
            await press(top, pilot, key)
            title = page.lines[page.listing.cursor].title
            assert any(line.rstrip().endswith(title) for line in seen(top)[1:-3]), key

    run(image, session)


def test_help_comes_and_goes(image: Path) -> None:
    """Promise: ? shows all keys on a screen of 80 by 24, and the next key hides them."""

    async def session(top: Top, pilot: "Pilot[None]") -> None:
        await press(top, pilot, "?")
        text = "\n".join(seen(top))
        assert "mark all that are not held; unmark all" in text
        assert "sort by age, name, referenced, exclusive, written" in text
        assert "freed with all older ones" in text
        assert "Older means created before, whatever the dates say." in text
        await press(top, pilot, "q")
        assert isinstance(top.screen, SnapshotsPage)
        assert "mark all that are not held" not in "\n".join(seen(top))

    run(image, session)


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize("has_keyboard", [False, True], ids=["no terminal", "only input"])
def test_without_a_terminal_it_refuses_and_textual_is_not_imported(
    image: Path, has_keyboard: bool
) -> None:
    """Promise: without a terminal it is a usage error in one line; textual is not imported."""
    program = (
        "import sys; from cowfs_tools.cowdu.main import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: assert not [name for name in sys.modules if name.startswith('textual')]"
    )
    keyboard = os.openpty()
    try:
        result = subprocess.run(
            [sys.executable, "-c", program, "top", image],
            stdin=keyboard[1] if has_keyboard else subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
            check=False,
        )
    finally:
        os.close(keyboard[0])
        os.close(keyboard[1])
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == "cowdu: cowdu top needs a terminal; cowdu list is for scripts\n"


def test_without_textual_it_says_how_to_install_it(image: Path) -> None:
    """Promise: without textual the error is one line with the command that installs it."""
    program = (
        "import sys; from cowfs_tools.cowdu.main import main\n"
        "sys.modules['textual'] = None\n"  # hides it from every import
        "main(sys.argv[1:])"
    )
    keyboard, terminal = os.openpty()
    try:
        result = subprocess.run(
            [sys.executable, "-c", program, "top", image],
            stdin=terminal,
            stdout=terminal,
            stderr=subprocess.PIPE,
            text=True,
            timeout=HANG_SECONDS,
            check=False,
        )
    finally:
        os.close(keyboard)
        os.close(terminal)
    assert result.returncode == 1
    assert result.stderr == (
        "cowdu: cowdu top needs the Python package textual, which is not installed; run: "
        f"{sys.executable} -m pip install 'cowfs-image[top]'\n"
    )
