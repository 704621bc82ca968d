"""Promises that SQLite keeps what it has committed when the daemon is killed under it.

A program commits as fast as it can and prints the number of each transaction; the daemon is killed
at a random moment. The database must be whole, and hold every printed number.
"""

import contextlib
import sqlite3
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Mounted
from tests.mounted.programs import ROUNDS, random_moments, started
from tests.mounted.sqlite_writer import contents_of

pytestmark = [pytest.mark.mounted]

WRITER = Path(__file__).with_name("sqlite_writer.py")


def require_database(file: Path, printed: int) -> None:
    """Require that a database is whole and holds the printed numbers, and at most one more."""
    with contextlib.closing(sqlite3.connect(file)) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        entries = database.execute(
            "SELECT number, contents FROM entries ORDER BY number"
        ).fetchall()
        totals = database.execute("SELECT count, bytes FROM totals").fetchall()
    count = len(entries)
    assert printed <= count <= printed + 1, f"{printed} were acknowledged, {count} are there"
    assert [number for number, _ in entries] == list(range(1, count + 1))
    assert totals == [(count, sum(len(contents) for _, contents in entries))]
    for number, contents in entries:
        expected = contents_of(number)
        assert contents == (bytes(len(expected)) if number <= count - 10 else expected), number


# SQLite makes the removal of a journal durable only with EXTRA.
@pytest.mark.needs_cowfs
@pytest.mark.parametrize(
    ("journal", "synchronous"),
    [("wal", "FULL"), ("delete", "EXTRA"), ("truncate", "FULL"), ("persist", "FULL")],
)
def test_sqlite_loses_nothing_that_was_committed_when_the_daemon_is_killed(
    mount: Mounted,
    journal: str,
    synchronous: str,
    record_property: Callable[[str, object], None],
) -> None:
    """Promise C1, C2: after each kill the database is whole, with all acknowledged transactions."""
    file = mount.path / "data.sqlite"
    moments = random_moments()
    before = 0
    for number in range(ROUNDS):
        with started(sys.executable, WRITER, file, journal, synchronous) as writer:
            assert writer.stdout is not None
            numbers = [int(writer.stdout.readline())]
            time.sleep(moments.uniform(0, 0.8))
            assert writer.poll() is None, writer.communicate()
            mount.kill()
            # If the kernel can no longer read the WAL index, which is mapped, the program ends
            # (SIGBUS).
            numbers += [int(line) for line in writer.stdout]
        printed = numbers[-1]
        assert numbers == list(range(before + 1, printed + 1))
        mount.check()
        # The next round uses the other of the two cache modes.
        mount.mount_options = ("-o", "writeback") if number % 2 == 0 else ()
        mount.remount()
        require_database(file, printed)
        with contextlib.closing(sqlite3.connect(file)) as database:
            (before,) = database.execute("SELECT count FROM totals").fetchone()
    record_property("count", ("kills of the daemon under SQLite", ROUNDS))
