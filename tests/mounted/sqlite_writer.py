"""Commits one transaction after the other to an SQLite database, and prints the number of each.

Usage: sqlite_writer.py FILE JOURNAL SYNCHRONOUS. A number is printed when its COMMIT has returned.
Goes on after the number that the database has, until the filesystem ends below it: then it ends with
status 0. `contents_of` tells what belongs to a number.
"""

import random
import sqlite3
import sys

TABLES = """
CREATE TABLE IF NOT EXISTS entries (number INTEGER PRIMARY KEY, contents BLOB);
CREATE TABLE IF NOT EXISTS totals (one INTEGER PRIMARY KEY, count INTEGER, bytes INTEGER);
CREATE INDEX IF NOT EXISTS by_length ON entries (length(contents), number);
INSERT OR IGNORE INTO totals VALUES (1, 0, 0);
"""


def contents_of(number: int) -> bytes:
    """The contents of one entry: some fill many pages."""
    generator = random.Random(number)
    return generator.randbytes(generator.choice((10, 300, 3000, 40_000)))


def main() -> None:
    path, journal, synchronous = sys.argv[1:]
    database = sqlite3.connect(path, isolation_level=None)
    try:
        (found,) = database.execute(f"PRAGMA journal_mode={journal}").fetchone()
        assert found == journal, found
        database.execute(f"PRAGMA synchronous={synchronous}")
        database.execute("PRAGMA wal_autocheckpoint=50")
        database.executescript(TABLES)
        (number,) = database.execute("SELECT count FROM totals").fetchone()
        while True:
            number += 1
            contents = contents_of(number)
            database.execute("BEGIN IMMEDIATE")
            database.execute("INSERT INTO entries VALUES (?, ?)", (number, contents))
            database.execute(
                "UPDATE totals SET count = count + 1, bytes = bytes + ?", [len(contents)]
            )
            # An old one is replaced by zeros of the same size, so pages in the middle change too.
            database.execute(
                "UPDATE entries SET contents = zeroblob(length(contents)) WHERE number = ?",
                [number - 10],
            )
            database.execute("COMMIT")
            print(number, flush=True)
    except sqlite3.OperationalError as error:
        print(error, file=sys.stderr)


if __name__ == "__main__":
    main()
