"""`cowfs scrub`: read every copy of every block, repair bad copies, list what is lost.

A process of its own reads the image at the lowest priority, with the generation pinned. The daemon
is asked only about bad copies: it verifies each one itself and writes it again with its next
commit. If the image is not mounted, the scrubbing process writes the copies under the image's lock.
"""

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import click

from cowfs.api import Connection, connect
from cowfs.cli.output import Numbers, as_fields, json_option, print_json, progress_bar
from cowfs.cli.snapshots import target_argument
from cowfs.errors import EXIT_ERROR, CowfsError, UsageError
from cowfs.escapes import escaped_path, printable

if TYPE_CHECKING:
    from cowfs.care.scrub import Scrub
    from cowfs.care.scrub_report import BadCopy, ScrubReport, State
    from cowfs.cli.scrub_state import ScrubState

REPORT_INTERVAL_S = 1.0
MARKS_INTERVAL_S = 10.0  # the marks are 32 MiB per TiB of image, compressed
START_WAIT_S = 30.0
EXIT_NOTHING = 2  # nothing to cancel or to resume; the same as with Btrfs


rate_option = click.option(
    "--rate", metavar="BYTES", help="Read at most BYTES per second: 50M, 1G."
)
read_only_option = click.option(
    "-n", "--readonly", "read_only", is_flag=True, help="Only read; repair nothing."
)
wait_option = click.option(
    "-B", "wait", is_flag=True, help="Stay in the foreground until the scrub ends."
)


class _StopError(Exception):
    """A signal asked the scrub to stop."""


@click.group()
def scrub() -> None:
    """Read every copy of every block; repair bad copies; list what is lost.

    Metadata has two copies (unless made with mkfs --no-duplicate-metadata): a bad one is written
    again from the good one. File data has one copy: a damaged block is listed with the paths of all
    files that contain it. TARGET is a mount point, which stays in use, or an image.
    """


@scrub.command()
@target_argument
@wait_option
@rate_option
@read_only_option
@json_option
def start(target: str, wait: bool, rate: str | None, read_only: bool, as_json: bool) -> None:
    """Start a scrub, in the background unless -B is given.

    With -B the exit status is 0 if all damage was repaired or none was found, else 1.

    \b
    cowfs scrub start ~/data
    cowfs scrub start -B disk.img --rate 50M
    """
    _begin(target, wait=wait, rate=rate, read_only=read_only, as_json=as_json, resume=False)


@scrub.command()
@target_argument
@wait_option
@rate_option
@read_only_option
@json_option
def resume(target: str, wait: bool, rate: str | None, read_only: bool, as_json: bool) -> None:
    """Go on with a scrub that was cancelled or interrupted, also after a remount.

    Exit status 2: there is no such scrub.

    \b
    cowfs scrub resume ~/data
    """
    _begin(target, wait=wait, rate=rate, read_only=read_only, as_json=as_json, resume=True)


@scrub.command()
@target_argument
@json_option
def status(target: str, as_json: bool) -> None:
    """Show the progress of the scrub, or the result of the last. Exit status 1: damage is left.

    \b
    cowfs scrub status ~/data
    """
    from cowfs.cli.scrub_state import ScrubState

    with connect(target) as found:
        uuid = found.info().uuid
    report = ScrubState(uuid).report()
    if as_json:
        print_json("cowfs scrub status", {"scrub": None if report is None else as_fields(report)})
    elif report is None:
        click.echo(f"this user has not scrubbed {printable(target)} yet; cowfs scrub start does")
    else:
        _print(report)
    if report is not None and not report.clean:
        click.get_current_context().exit(EXIT_ERROR)


@scrub.command()
@target_argument
def cancel(target: str) -> None:
    """Stop the running scrub; resume goes on with it. Exit status 2: no scrub is running.

    \b
    cowfs scrub cancel ~/data
    """
    from cowfs.cli.scrub_state import ScrubState

    with connect(target) as found:
        uuid = found.info().uuid
    state = ScrubState(uuid)
    worker = state.worker()
    if worker is None:
        click.echo("no scrub is running", err=True)
        click.get_current_context().exit(EXIT_NOTHING)
    if not worker:
        raise CowfsError("a process in another PID namespace runs the scrub; cancel it there")
    os.kill(worker, signal.SIGTERM)
    deadline_s = time.monotonic() + START_WAIT_S
    while state.worker() == worker:
        if time.monotonic() > deadline_s:
            raise CowfsError(
                f"the scrub (process {worker}) did not stop within {START_WAIT_S:.0f} s"
            )
        time.sleep(0.02)


def _begin(
    target: str, *, wait: bool, rate: str | None, read_only: bool, as_json: bool, resume: bool
) -> None:
    from cowfs.cli.scrub_state import ScrubState

    rate_bytes = _rate_bytes(rate)
    with connect(target) as found:
        state = ScrubState(found.info().uuid)
        last = state.report()
        if resume and (last is None or last.state != "interrupted"):
            click.echo("there is no interrupted scrub to resume", err=True)
            click.get_current_context().exit(EXIT_NOTHING)
        if wait:
            report = _scrub(found, state, rate_bytes, read_only=read_only, resume=resume)
            if as_json:
                print_json("cowfs scrub", {"scrub": as_fields(report)})
            else:
                _print(report)
            if not report.clean or report.state != "finished":
                code = EXIT_ERROR if report.state == "finished" else 130
                click.get_current_context().exit(code)
            return
        if state.worker() is not None:
            state.begin()  # raises BusyError, which names the process
    _spawn(target, state, rate, read_only=read_only, resume=resume)
    if as_json:
        print_json("cowfs scrub", {"scrub": None, "worker": state.worker()})
    else:
        click.echo(f"scrub started; cowfs scrub status {printable(target)} shows its progress")


def _spawn(
    target: str, state: "ScrubState", rate: str | None, *, read_only: bool, resume: bool
) -> None:
    """Start the same command with -B in a session of its own; return when it has begun."""
    before = state.report()
    words = [
        sys.executable,
        os.path.abspath(sys.argv[0]),
        "scrub",
        "resume" if resume else "start",
        "-B",
    ]
    words += ["--rate", rate] if rate else []
    words += ["-n"] if read_only else []
    worker = subprocess.Popen(
        [*words, "--", os.path.abspath(target)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        cwd="/",  # else the worker could keep the mount busy
        text=True,
        errors="surrogateescape",
    )
    deadline_s = time.monotonic() + START_WAIT_S
    while time.monotonic() < deadline_s:
        report = state.report()
        if state.worker() == worker.pid or (report is not None and report != before):
            return
        if worker.poll() is not None:
            _, errors = worker.communicate()
            reason = errors.strip() or f"exit status {worker.returncode}"
            raise CowfsError(f"the scrub did not start: {reason}")
        time.sleep(0.02)
    raise CowfsError(f"the scrub (process {worker.pid}) did not begin within {START_WAIT_S:.0f} s")


def _scrub(
    target: Connection,
    state: "ScrubState",
    rate_bytes: int | None,
    *,
    read_only: bool,
    resume: bool,
) -> "ScrubReport":
    """Scrub in this process and return the report, which is also saved in `state`."""
    from cowfs.care.scrub import Scrub, report_of

    state.begin()
    stop = _Stop()
    started_ns = time.time_ns()
    started_s = reported_s = saved_s = time.monotonic()
    os.nice(19)
    try:
        with (
            progress_bar("reading") as bar,
            target.repairing(read_only=read_only) as (device, generation, repair),
        ):

            def work(scrub: Scrub) -> None:
                nonlocal reported_s, saved_s
                now_s = time.monotonic()
                report = report_of(scrub, escaped_path(target.image), "running", started_ns, 0)
                if now_s - reported_s > REPORT_INTERVAL_S:
                    reported_s = now_s
                    state.save(report)
                if now_s - saved_s > MARKS_INTERVAL_S:
                    saved_s = now_s
                    state.save_marks(scrub.marks)
                if bar is not None:
                    bar("scrub", report.done_bytes, report.total_bytes)
                if rate_bytes is not None:
                    time.sleep(max(0.0, report.done_bytes / rate_bytes - (now_s - started_s)))

            scrub = Scrub(device, generation=generation, progress=work, repair=repair)
            if resume:
                kept = state.marks(scrub.superblock.total_blocks)
                if kept is not None:
                    scrub.marks = kept
            state.save(report_of(scrub, escaped_path(target.image), "running", started_ns, 0))
            state.save_marks(scrub.marks)
            ended: State = "finished" if _run(scrub, stop) else "interrupted"
        repaired = _count_good(target, scrub.bad_copies) if scrub.bad_copies else 0
        report = report_of(scrub, escaped_path(target.image), ended, started_ns, repaired)
        state.save(report)
        state.save_marks(scrub.marks if ended == "interrupted" else None)
        return report
    finally:
        state.end()


class _Stop:
    """Catches SIGINT, SIGTERM and SIGHUP until the process ends.

    They interrupt only the reading: a signal that arrives while the result is saved is noted and
    does not interrupt that.

    Attributes:
        is_requested: a signal has arrived.
        interrupts: a signal raises _StopError now.
    """

    def __init__(self) -> None:
        self.is_requested = False
        self.interrupts = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._handle)

    def _handle(self, _number: int, _frame: object) -> None:
        self.is_requested = True
        if self.interrupts:
            self.interrupts = False
            raise _StopError


def _run(scrub: "Scrub", stop: _Stop) -> bool:
    """Run the scrub; False if a signal stopped it before the end."""
    try:
        stop.interrupts = True
        if stop.is_requested:
            return False
        scrub.run()
        stop.interrupts = False
    except _StopError:
        return False
    return True


def _count_good(target: Connection, copies: "list[BadCopy]") -> int:
    """Count the copies that were bad and now hold the same bytes as their twin."""
    from cowfs.storage.format import BLOCK_SIZE_BYTES, NODE_SIZE_BYTES

    count = 0
    with target.device() as (device, _):
        for copy in copies:
            size = NODE_SIZE_BYTES if copy.kind == "node" else BLOCK_SIZE_BYTES
            try:
                good = device.read(copy.good_block * BLOCK_SIZE_BYTES, size)
                count += device.read(copy.bad_block * BLOCK_SIZE_BYTES, size) == good
            except CowfsError:
                continue
    return count


def _rate_bytes(text: str | None) -> int | None:
    """Bytes per second of --rate; None without a limit. Raises UsageError."""
    from cowfs.daemon.options import parse_size

    if text is None:
        return None
    try:
        rate_bytes = parse_size(text)
    except UsageError as error:
        raise UsageError(f"--rate: {error}") from None
    if not rate_bytes:
        raise UsageError("--rate 0 would never end; leave --rate out for no limit")
    return rate_bytes


def _print(report: "ScrubReport") -> None:
    numbers = Numbers()
    done, total = numbers.size(report.done_bytes), numbers.size(report.total_bytes)
    when = numbers.time(report.started_ns)
    click.echo(f"scrub of {printable(report.image)}, generation {report.generation}")
    took_s = (report.ended_ns - report.started_ns) / 1e9
    took = f" after {took_s:.0f} s" if report.ended_ns else ""
    click.echo(f"  started {when}, {report.state}{took}: {done} of about {total} read")
    click.echo(
        f"  bad copies: {report.bad_copies}, repaired: {report.repaired}, "
        f"not repaired: {report.unrepaired}, lost: {report.damaged}"
    )
    for damage in report.damage:
        click.echo(f"  block {damage.block}: {printable(damage.what)}")
        for path in damage.paths:
            click.echo(f"    {printable(path)}")
    if report.damaged > len(report.damage):
        click.echo(f"  and {report.damaged - len(report.damage)} more")
