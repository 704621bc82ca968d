"""Promises of `cowdu top` as installed: on a real terminal, and on a mounted filesystem."""

import asyncio
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from textual.pilot import Pilot

from cowfs_tools.cowdu.dialogs import Question
from cowfs_tools.cowdu.pages import InsidePage
from cowfs_tools.cowdu.program import Top
from cowfs_tools.cowdu.walking import Source
from tests.commands import COMMANDS, run_command
from tests.conftest import Mounted, json_of, require_success
from tests.image_files import change, history, make_image
from tests.sizes import HANG_SECONDS

pytestmark = [pytest.mark.mounted, pytest.mark.needs_cowfs]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the cache of earlier looks separate for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class Terminal:
    """A program on a pseudo terminal of 80 by 24."""

    def __init__(self, *words: str | Path) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        self.program = subprocess.Popen(
            list(map(os.fspath, words)),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "xterm-256color"},
            start_new_session=True,
        )
        self.output = ""

    def read_until(self, ended: Callable[[], bool]) -> None:
        deadline = time.monotonic() + HANG_SECONDS
        while not ended():
            assert time.monotonic() < deadline, self.output[-4000:]
            if select.select([self.master], [], [], 0.05)[0]:
                self.output += os.read(self.master, 65536).decode(errors="replace")

    def text(self) -> str:
        """The output, without the sequences that move the cursor and set colours."""
        return re.sub(r"\x1b(\[[0-9;?<>=]*[a-zA-Z]|\].*?(\x07|\x1b\\)|.)", "", self.output)

    def send(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def close(self) -> None:
        if self.program.poll() is None:
            self.program.kill()
        self.program.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.mark.parametrize("key", ["q", "\x03"], ids=["q", "ctrl+c"])
def test_installed_command_on_a_terminal_shows_the_list_and_leaves_it_as_it_was(
    tmp_path: Path, key: str
) -> None:
    """Promise: it exits with 0 on the former screen, prints nothing, and restores the terminal."""
    image = make_image(tmp_path / "disk.img")
    change(image, *history())
    terminal = Terminal(COMMANDS / "cowdu", "top", image)
    try:
        words = ("(live)", "one", "two", "three", "four", "0 marked · deleting exactly these frees")
        terminal.read_until(lambda: all(word in terminal.text() for word in words))
        assert "\x1b[?1049h" in terminal.output
        terminal.send(key)
        terminal.read_until(lambda: terminal.program.poll() is not None)
        assert terminal.program.returncode == 0
        after = terminal.output.rpartition("\x1b[?1049l")
        assert after[1]
        assert "Traceback" not in terminal.text()
        assert termios.tcgetattr(terminal.slave) == terminal.before
    finally:
        terminal.close()


@pytest.mark.parametrize(("target", "status"), [("no.img", 10), ("foreign.img", 1)])
def test_installed_command_tells_a_wrong_target_before_it_takes_the_screen(
    tmp_path: Path, target: str, status: int
) -> None:
    """Promise: the error is one line, with the error's exit status."""
    (tmp_path / "foreign.img").write_bytes(b"something else" * 100_000)
    terminal = Terminal(COMMANDS / "cowdu", "top", tmp_path / target)
    try:
        terminal.read_until(lambda: terminal.program.poll() is not None)
        assert terminal.program.returncode == status
        assert "\x1b[?1049h" not in terminal.output
    finally:
        terminal.close()


def allocated(mount: Mounted) -> int:
    """The space that volumes and snapshots hold, when all is written and freed."""
    require_success(run_command("sync", mount.path))
    return int(json_of(run_command("df", mount.path, "--json"))["tree_bytes"])


def test_delete_of_a_mounted_filesystem_goes_through_its_daemon(mount: Mounted) -> None:
    """Promise (C11): the daemon frees exactly the announced space, and nothing stays pinned."""
    for name in ("monday", "tuesday", "wednesday"):
        if name == "wednesday":
            (mount.path / "monday").unlink()
        (mount.path / name).write_bytes(os.urandom(400_000))
        (mount.path / "each").write_bytes(os.urandom(100_000))
        mount.snapshot(name)
    (mount.path / "each").write_bytes(b"not committed yet" * 10_000)
    top = Top(Source(str(mount.path)), read_only=False, refresh_s=0.05)

    def names() -> list[str]:
        return [root.usage.name for root in top.page.shown]

    async def until(pilot: "Pilot[None]", condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(HANG_SECONDS):
            while not condition():
                await asyncio.sleep(0.005)
        await pilot.pause()

    async def session() -> None:
        async with top.run_test(size=(80, 24)) as pilot:
            await until(pilot, lambda: not top.is_working)
            assert names() == ["main", "wednesday", "tuesday", "monday"]
            mount.snapshot("thursday")  # another user's snapshot
            await until(pilot, lambda: "thursday" in names())
            for name in ("monday", "tuesday"):
                top.page.listing.cursor = names().index(name)
                await pilot.press("space")
            before = await asyncio.to_thread(allocated, mount)
            await pilot.press("d")
            await until(pilot, lambda: isinstance(top.screen, Question))
            assert isinstance(top.screen, Question)
            told = top.screen.freed_bytes
            assert told > 400_000  # both snapshots have the file of monday
            await pilot.press("y")
            await until(pilot, lambda: not top.is_working)
            assert names() == ["main", "thursday", "wednesday"]
            assert "deleted 2 snapshots" in top.page.message.plain
            assert before - await asyncio.to_thread(allocated, mount) == told
            top.page.listing.cursor = 2
            await pilot.press("enter")
            await until(pilot, lambda: isinstance(top.screen, InsidePage))
            inside = top.screen
            assert isinstance(inside, InsidePage)
            exclusive = inside.inside.root.usage.exclusive_bytes
            assert sum(line.exclusive_bytes for line in inside.lines) == exclusive
            assert "each" in [line.title for line in inside.lines]

    asyncio.run(session())
    assert top.failure is None
    listed = json_of(require_success(run_command("snapshot", "list", mount.path, "--json")))
    assert [found["name"] for found in listed["snapshots"]] == ["wednesday", "thursday"]


def test_list_of_a_mounted_filesystem_does_not_make_it_commit(mount: Mounted) -> None:
    """Promise: checking for changes causes no commit; R shows what is not yet committed."""
    mount.mount_options = ("-o", "commit=3600")
    mount.remount()
    (mount.path / "file").write_bytes(os.urandom(400_000))
    top = Top(Source(str(mount.path)), read_only=True, refresh_s=0.02)

    def generation() -> int:
        return int(json_of(run_command("info", mount.path, "--json"))["generation"])

    async def session() -> None:
        async with top.run_test(size=(80, 24)) as pilot:
            while top.is_working:
                await pilot.pause(0.01)
            first = await asyncio.to_thread(generation)
            (mount.path / "file").write_bytes(os.urandom(500_000))
            await pilot.pause(0.4)  # time for many checks
            assert await asyncio.to_thread(generation) == first
            # Another program commits, and writes on before the list can refresh.
            mount.snapshot("somebody")
            (mount.path / "file").write_bytes(os.urandom(600_000))
            second = generation()
            assert second > first
            async with asyncio.timeout(HANG_SECONDS):
                while top.page.roots is None or top.page.roots.generation < second:
                    await pilot.pause(0.01)
            assert await asyncio.to_thread(generation) == second
            await pilot.press("R")
            await pilot.pause()
            while top.is_working:
                await pilot.pause(0.01)
            assert top.page.roots is not None
            assert top.page.roots.generation > second

    asyncio.run(session())
    assert top.failure is None
