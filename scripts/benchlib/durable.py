"""Steps whose every operation is made durable: what databases, package managers and git do.

Used by workloads.py; only the standard library. Each step works in a directory of its own.
"""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Callable
from typing import Any

FILE_BYTES = 4096
CLIENTS = 8
CLIENT_FILE_BYTES = 8 << 20

Parameters = dict[str, Any]
Timing = tuple[float, int]


def _fresh(directory: str, name: str) -> str:
    path = f"{directory}/{name}"
    if os.path.exists(path):
        shutil.rmtree(path)
    os.mkdir(path)
    return path


def make_client_files(directory: str, parameters: Parameters) -> Timing:
    """Make the files that `write_fsync_many` writes to."""
    folder = _fresh(directory, "clients")
    noise = random.Random(11).randbytes(CLIENT_FILE_BYTES)
    start_s = time.perf_counter()
    for number in range(CLIENTS):
        with open(f"{folder}/{number}", "wb") as file:
            file.write(noise)
            file.flush()
            os.fsync(file.fileno())
    return time.perf_counter() - start_s, CLIENTS


def write_fsync_many(directory: str, parameters: Parameters) -> Timing:
    """Random 4 KiB writes with an fsync each, by CLIENTS processes on a file each."""
    folder = f"{directory}/clients"
    count = parameters["synced"]
    data = random.Random(13).randbytes(FILE_BYTES)
    ready, go = os.pipe()  # all clients begin when the writing end is closed
    children = []
    for number in range(CLIENTS):
        child = os.fork()
        if not child:
            status = 1
            try:
                os.close(go)
                choose = random.Random(number)
                blocks = CLIENT_FILE_BYTES // FILE_BYTES
                handle = os.open(f"{folder}/{number}", os.O_WRONLY)
                os.read(ready, 1)
                for _ in range(count):
                    os.pwrite(handle, data, choose.randrange(blocks) * FILE_BYTES)
                    os.fsync(handle)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    time.sleep(0.2)
    start_s = time.perf_counter()
    os.close(go)
    failed = [child for child in children if os.waitpid(child, 0)[1]]
    elapsed_s = time.perf_counter() - start_s
    os.close(ready)
    if failed:
        raise RuntimeError(f"{len(failed)} of {CLIENTS} clients failed")
    return elapsed_s, CLIENTS * count


def _sqlite(directory: str, parameters: Parameters, mode: str) -> Timing:
    folder = _fresh(directory, f"sqlite-{mode}")
    count = parameters["synced"]
    database = sqlite3.connect(f"{folder}/data.db", isolation_level=None)
    (found,) = database.execute(f"PRAGMA journal_mode={mode}").fetchone()
    if found != mode:
        raise RuntimeError(f"SQLite has journal mode {found} and not {mode}")
    database.execute("PRAGMA synchronous=FULL")
    database.execute("CREATE TABLE rows (id INTEGER PRIMARY KEY, text TEXT)")
    start_s = time.perf_counter()
    for number in range(count):
        database.execute("INSERT INTO rows VALUES (?, ?)", (number, "x" * 100))
    elapsed_s = time.perf_counter() - start_s
    database.close()
    return elapsed_s, count


def sqlite_journal(directory: str, parameters: Parameters) -> Timing:
    """One row a transaction, with a rollback journal."""
    return _sqlite(directory, parameters, "delete")


def sqlite_wal(directory: str, parameters: Parameters) -> Timing:
    """One row a transaction, with a write-ahead log that is synced at each."""
    return _sqlite(directory, parameters, "wal")


def git_commits(directory: str, parameters: Parameters) -> Timing:
    """Change a file and commit it, again and again, with every object synced."""
    folder = _fresh(directory, "git")
    environment = os.environ | {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}

    def git(*words: str) -> None:
        settings = ["-c", "core.fsync=all", "-c", "user.name=bench", "-c", "user.email=b@localhost"]
        subprocess.run(["git", "-C", folder, *settings, *words], check=True, env=environment)

    git("init", "-q")
    count = max(10, parameters["synced"] // 10)
    start_s = time.perf_counter()
    for number in range(count):
        with open(f"{folder}/file", "w") as file:
            file.write(f"{number}\n" * 100)
        git("add", "file")
        git("commit", "-q", "-m", f"change {number}")
    return time.perf_counter() - start_s, count


def unpack(directory: str, parameters: Parameters) -> Timing:
    """Install files as dpkg does: write beside the name, fsync, rename."""
    folder = _fresh(directory, "unpacked")
    data = random.Random(12).randbytes(3 * FILE_BYTES)
    count = parameters["synced"]
    start_s = time.perf_counter()
    for number in range(count):
        name = f"{folder}/file-{number:06d}"
        handle = os.open(f"{name}.new", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        os.write(handle, data[: 500 + number * 37 % len(data)])
        os.fsync(handle)
        os.close(handle)
        os.rename(f"{name}.new", name)
    return time.perf_counter() - start_s, count


STEPS: dict[str, Callable[[str, Parameters], Timing]] = {
    step.__name__: step
    for step in (
        make_client_files,
        write_fsync_many,
        sqlite_journal,
        sqlite_wal,
        git_commits,
        unpack,
    )
}
