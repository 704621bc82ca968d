"""Runs external programs, and ends them with all their children whatever happens.

SECONDS is how long a program works on a mount before it is checked, ROUNDS how often daemons are
killed under one, and `--seed` repeats the random moments.
"""

import contextlib
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import wait_for_end
from tests.sizes import HANG_SECONDS, chosen_seed, seconds, sized

SECONDS = seconds(2, 4)
ROUNDS = sized(2, 3)  # at least two: with and without the write-back cache
RUN_SECONDS_MAX = 2 * HANG_SECONDS + 20 * SECONDS  # each of forty stressors gets a quarter of it


def random_moments() -> random.Random:
    """A random generator, different in each run; a failed test prints how to repeat it."""
    seed = chosen_seed(random.randrange(1 << 30))
    print(f"--seed {seed}")
    return random.Random(seed)


def run(
    *words: str | Path,
    folder: Path | None = None,
    given: str | None = None,
    status: int = 0,
    **variables: str,
) -> str:
    """Run a program that must end with `status`; gives its output.

    Args:
        folder: where it runs.
        given: what it reads from its standard input, else nothing.
        variables: of the environment, more than those there are.
    """
    with started(*words, folder=folder, **variables) as process:
        output, errors = process.communicate(given, timeout=RUN_SECONDS_MAX)
    assert process.returncode == status, f"{words}: {process.returncode}\n{output}{errors}"
    return output


@contextlib.contextmanager
def started(
    *words: str | Path,
    folder: Path | None = None,
    **variables: str,
) -> Iterator[subprocess.Popen[str]]:
    """A program that runs during the block; what is left of it afterwards is killed."""
    process = subprocess.Popen(
        [str(word) for word in words],
        cwd=folder,
        env=os.environ | {"LC_ALL": "C.UTF-8", "HOME": "/nonexistent"} | variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="surrogateescape",
    )
    try:
        yield process
    finally:
        end_with_children(process.pid)
        process.communicate(timeout=HANG_SECONDS)


def end_with_children(pid: int) -> None:
    """Kill a process and all its descendants that are still running."""
    family = [pid, *_descendants(pid)]
    for member in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)
    for member in family:
        assert wait_for_end(member), f"process {member} does not end"


def _descendants(pid: int) -> list[int]:
    """The descendants of a process, except those that lost their parent."""
    children: dict[int, list[int]] = {}
    for place in Path("/proc").iterdir():
        if place.name.isdecimal():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                words = (place / "stat").read_text(errors="replace").rpartition(")")[2].split()
                children.setdefault(int(words[1]), []).append(int(place.name))
    found = [pid]
    for member in found:  # the list grows meanwhile
        found += children.get(member, [])
    return found[1:]


def git(folder: Path, *words: str | Path, given: str | None = None, **variables: str) -> str:
    """Run git, ignoring the settings of the user and of the machine."""
    settings = ["user.name=Somebody", "user.email=somebody@example.org", "init.defaultBranch=main"]
    options = [word for setting in settings for word in ("-c", setting)]
    nothing = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1"}
    return run("git", *options, *words, folder=folder, given=given, **nothing, **variables)
