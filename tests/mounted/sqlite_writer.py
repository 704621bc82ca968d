"""Commits one transaction after the other to an SQLite database, and prints the number of each.

Usage: sqlite_writer.py FILE JOURNAL SYNCHRONOUS. A number is printed when its COMMIT has returned
and an fsync of the directory, which was opened before, has succeeded. SQLite reports a transaction
as committed even if it could not open the directory to make the removal of its journal durable,
which happens when the daemon dies at that moment. The program continues after the database's last
number until the filesystem goes away, and then ends with status 0. `contents_of` gives the contents
that belong to a number.
"""

import errno
import os
import random
import sqlite3
import sys

# The kernel's error when the daemon of a FUSE mount is gone. EIO would come from the daemon.
GONE = {errno.ENOTCONN, errno.ECONNABORTED}

TABLES = """
CREATE TABLE IF NOT EXISTS entries (number INTEGER PRIMARY KEY, contents BLOB);
CREATE TABLE IF NOT EXISTS totals (one INTEGER PRIMARY KEY, count INTEGER, bytes INTEGER);
CREATE INDEX IF NOT EXISTS by_length ON entries (length(contents), number);
INSERT OR IGNORE INTO totals VALUES (1, 0, 0);
"""


def contents_of(number: int) -> bytes:
    """The contents of one entry; some of them fill many pages."""
    generator = random.Random(number)
    return generator.randbytes(generator.choice((10, 300, 3000, 40_000)))


def main() -> None:
    path, journal, synchronous = sys.argv[1:]
    directory = os.open(os.path.dirname(path), os.O_RDONLY)
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
            # Replace an old entry by zeros of the same size, so that pages in the middle change
            # too.
            database.execute(
                "UPDATE entries SET contents = zeroblob(length(contents)) WHERE number = ?",
                [number - 10],
            )
            database.execute("COMMIT")
            os.fsync(directory)
            print(number, flush=True)
    except sqlite3.OperationalError as error:
        print(error, file=sys.stderr)
    except OSError as error:
        if error.errno not in GONE:
            raise


if __name__ == "__main__":
    main()
