"""Promises that PostgreSQL keeps its commits through kills of the daemon and in snapshots.

pgbench moves money between accounts and notes each move in a history, with a number of its own.
Whatever happens, balances and history must agree, and all commits that pgbench was told of must be
there.
"""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import FAILED, Mounted, mounted
from tests.mounted.programs import ROUNDS, SECONDS, end_with_children, random_moments, run
from tests.sizes import HANG_SECONDS, wait_until

pytestmark = [
    pytest.mark.mounted,
]

CLIENTS = 2
SETTINGS = {
    "listen_addresses": "''",
    "shared_buffers": "'16MB'",  # small, so that pages are written all the time
    "max_wal_size": "'32MB'",  # small, for a checkpoint every few seconds
    "min_wal_size": "'32MB'",
    "checkpoint_timeout": "'30s'",
    "bgwriter_delay": "'20ms'",
    "max_connections": "10",
    "log_timezone": "'UTC'",
}
# pgbench's own transaction, with a number in the history that its log can be compared with.
TRANSACTION = """
\\set n :n + 1
\\set aid random(1, 100000 * :scale)
\\set bid random(1, 1 * :scale)
\\set tid random(1, 10 * :scale)
\\set delta random(-5000, 5000)
BEGIN;
UPDATE pgbench_accounts SET abalance = abalance + :delta WHERE aid = :aid;
SELECT abalance FROM pgbench_accounts WHERE aid = :aid;
UPDATE pgbench_tellers SET tbalance = tbalance + :delta WHERE tid = :tid;
UPDATE pgbench_branches SET bbalance = bbalance + :delta WHERE bid = :bid;
INSERT INTO pgbench_history (tid, bid, aid, delta, mtime, filler)
    VALUES (:tid, :bid, :aid, :delta, CURRENT_TIMESTAMP,
            (:round)::text || '/' || (:client_id)::text || '/' || (:n)::text);
END;
"""
BALANCES = """
SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(tbalance) FROM pgbench_tellers),
       (SELECT sum(bbalance) FROM pgbench_branches), (SELECT sum(delta) FROM pgbench_history)
"""


def programs_folder() -> Path:
    """The folder of programs that Debian keeps out of PATH, the newest if there are several."""
    found = [*Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    if not found and (elsewhere := shutil.which("initdb")):
        found.append(Path(elsewhere).resolve())
    if not found:
        pytest.fail("PostgreSQL is missing: install it (scripts/setup.sh does)")
    return max(
        found, key=lambda path: int(path.parts[-3]) if path.parts[-3].isdecimal() else 0
    ).parent


class Cluster:
    """A PostgreSQL cluster in a folder of the mount, run by an ordinary user: it refuses root."""

    def __init__(self, place: Path, outside: Path) -> None:
        self.programs = programs_folder()
        self.data = place / "cluster"
        self.sockets = outside / "s"
        self.outside = outside
        self.server: subprocess.Popen[bytes] | None = None
        self.as_user: list[str] = []
        self.data.mkdir(mode=0o700)
        self.sockets.mkdir()
        if os.geteuid() == 0:
            user = pwd.getpwnam("nobody")
            self.as_user = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}"]
            self.as_user += ["--clear-groups", "--"]
            for folder in (self.data, self.sockets, outside):
                os.chown(folder, user.pw_uid, user.pw_gid)
        self.call(
            "initdb", "--data-checksums", "--auth=trust", "--username=p", "--no-locale", self.data
        )
        with open(self.data / "postgresql.conf", "a", encoding="ascii") as file:
            file.writelines(f"{name} = {value}\n" for name, value in SETTINGS.items())

    def words(self, program: str, *words: str | Path) -> list[str]:
        """The command line that runs one of PostgreSQL's programs as its user."""
        return [*self.as_user, str(self.programs / program), *map(str, words)]

    def call(self, program: str, *words: str | Path) -> str:
        """Run one of PostgreSQL's programs, which must succeed; returns its output."""
        return run(*self.words(program, *words), folder=self.outside)

    def query(self, text: str) -> list[tuple[str, ...]]:
        """The rows that a query returns."""
        words = ("--no-psqlrc", "--tuples-only", "--no-align", "--set=ON_ERROR_STOP=1")
        output = self.call("psql", *words, *self.connection(), "--command", text, "postgres")
        return [tuple(line.split("|")) for line in output.splitlines()]

    def connection(self) -> list[str]:
        """The options with which each client finds the server."""
        return [f"--host={self.sockets}", "--username=p"]

    def start(self) -> None:
        """Start the server, and wait until it has recovered."""
        log = self.outside / "log"
        with open(log, "ab") as stream:
            self.server = subprocess.Popen(
                self.words("postgres", "-D", self.data, "-k", self.sockets),
                cwd=self.outside,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
            )
        deadline = time.monotonic() + HANG_SECONDS
        ready = self.words("pg_isready", "--quiet", *self.connection())
        while subprocess.run(ready, check=False, timeout=HANG_SECONDS).returncode != 0:
            said = log.read_text(encoding="utf-8", errors="replace")[-3000:]
            assert self.server.poll() is None, f"the server did not start:\n{said}"
            assert time.monotonic() < deadline, f"the server is not ready:\n{said}"
            time.sleep(0.1)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop the server: SIGINT with a checkpoint, SIGQUIT at once."""
        server, self.server = self.server, None
        if server is None:
            return
        try:
            if server.poll() is None:
                server.send_signal(how)
            server.wait(timeout=HANG_SECONDS)
        finally:
            end_with_children(server.pid)
            server.wait(timeout=HANG_SECONDS)

    @contextlib.contextmanager
    def load(self, number: int, count: int) -> Iterator[subprocess.Popen[str]]:
        """Run pgbench for `count` transactions of each client; `acknowledged` reads its log."""
        script = self.outside / "transaction.sql"
        script.write_text(TRANSACTION, encoding="ascii")
        words = self.words(
            *("pgbench", "--no-vacuum", f"--client={CLIENTS}", f"--transactions={count}"),
            *("--log", f"--log-prefix=round{number}", "--file", script, "--random-seed=1"),
            *("--define=n=-1", f"--define=round={number}", *self.connection(), "postgres"),
        )
        process = subprocess.Popen(
            words, cwd=self.outside, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            yield process
        finally:
            end_with_children(process.pid)
            process.communicate(timeout=HANG_SECONDS)

    def acknowledged(self, number: int) -> set[str]:
        """Names in the history of all transactions of one round that were reported as committed."""
        names = set()
        for file in self.outside.glob(f"round{number}.*"):
            for line in file.read_text(encoding="ascii").splitlines():
                client, transaction, duration, *_ = line.split()
                assert duration.isdecimal(), line
                names.add(f"{number}/{client}/{int(transaction) - 1}")
        return names

    def moves(self) -> int:
        """The number of transactions in the history."""
        ((count,),) = self.query("SELECT count(*) FROM pgbench_history")
        return int(count)

    def history(self) -> set[str]:
        """Names of all transactions in the history; each is there once, and balances agree."""
        ((accounts, tellers, branches, history),) = self.query(BALANCES)
        assert accounts == tellers == branches == history
        names = [name.strip() for (name,) in self.query("SELECT filler FROM pgbench_history")]
        assert len(names) == len(set(names))
        return set(names)

    def verify(self) -> None:
        """Run PostgreSQL's checks: of tables and indexes while it runs, of pages when stopped."""
        self.query("CREATE EXTENSION IF NOT EXISTS amcheck")
        checks = ("--heapallindexed", "--parent-check")
        self.call("pg_amcheck", *checks, *self.connection(), "postgres")
        self.stop()
        assert "Bad checksums:  0" in self.call("pg_checksums", "--check", "-D", self.data)


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Iterator[tuple[Mounted, Path]]:
    """A mount that the server's user may enter, and a folder outside of it with a short path."""
    options = ("-o", "allow_other") if os.geteuid() == 0 else ()
    folder = Path(tempfile.mkdtemp(prefix="cowfs-pg-", dir="/tmp"))
    folder.chmod(0o755)
    (folder / "out").mkdir()

    def has_failed() -> bool:
        return request.node.stash.get(FAILED, False)

    with mounted(folder / "cowfs", has_failed, mount_options=options) as mount:
        mount.path.chmod(0o755)
        yield mount, folder / "out"
    if not has_failed():
        shutil.rmtree(folder)


@pytest.fixture
def cluster(place: tuple[Mounted, Path]) -> Iterator[Cluster]:
    """A running server with accounts for pgbench."""
    mount, outside = place
    made = Cluster(mount.path, outside)
    try:
        made.start()
        made.call(
            *("pgbench", "--initialize", "--quiet", "--scale=2", "--init-steps=dtgvpf"),
            *(*made.connection(), "postgres"),
        )
        yield made
    finally:
        made.stop(signal.SIGQUIT)


@pytest.mark.needs_cowfs
def test_postgres_recovers_every_transaction_when_the_daemon_is_killed(
    place: tuple[Mounted, Path],
    cluster: Cluster,
    record_property: Callable[[str, object], None],
) -> None:
    """Promise C1, C2: the server recovers by itself, with all commits that it reported."""
    mount, _ = place
    moments = random_moments()
    options = mount.mount_options
    acknowledged: set[str] = set()
    for number in range(ROUNDS):
        known = cluster.moves()
        with cluster.load(number, 1_000_000) as load:
            wait_until(lambda: cluster.moves() > known + 30, "the server does nothing")  # noqa: B023
            time.sleep(moments.uniform(0, SECONDS / 2))
            assert load.poll() is None, load.communicate()
            mount.kill()
            output, _ = load.communicate(timeout=HANG_SECONDS)
            assert load.returncode != 0, output
        cluster.stop(signal.SIGQUIT)
        mount.check()
        # The next round uses the other of the two cache modes.
        mount.mount_options = (*options, "-o", "writeback") if number % 2 == 0 else options
        mount.remount()
        cluster.start()
        new = cluster.acknowledged(number)
        assert len(new) > 20, "the server hardly did anything"
        acknowledged |= new
        history = cluster.history()
        assert not acknowledged - history, f"lost: {sorted(acknowledged - history)[:10]}"
        # Each client may have one more commit that it was not told of.
        assert len(history) <= len(acknowledged) + CLIENTS * (number + 1)
    assert "database system was not properly shut down" in (cluster.outside / "log").read_text()
    cluster.verify()
    record_property("count", ("kills of the daemon under PostgreSQL", ROUNDS))
    record_property(
        "count", ("transactions of PostgreSQL, all found after kills", len(acknowledged))
    )


@pytest.mark.long
@pytest.mark.needs_cowfs
def test_postgres_recovers_from_a_snapshot_taken_under_load(
    place: tuple[Mounted, Path], cluster: Cluster
) -> None:
    """Promise C6: a database in a snapshot of a busy server recovers, with all earlier commits."""
    mount, _ = place
    with cluster.load(0, round(100 * SECONDS)) as load:
        wait_until(lambda: cluster.moves() > 20, "the server does nothing")
        before = cluster.history()
        mount.snapshot("busy")
        output, _ = load.communicate(timeout=HANG_SECONDS * SECONDS)
        assert load.returncode == 0, output
    after = cluster.history()
    assert cluster.acknowledged(0) == after
    cluster.stop()

    mount.rollback("busy")
    cluster.start()
    kept = cluster.history()
    assert before <= kept < after
    cluster.verify()

    mount.remount()
    assert mount.cowfs("undo", mount.path).returncode == 0
    cluster.start()
    assert cluster.history() == after
    cluster.verify()
