"""Runs cowdu of the checkout in a process of its own, as the command would."""

import json
import os
import subprocess
import sys
from typing import Any, cast

from tests.sizes import HANG_SECONDS

Words = str | os.PathLike[str]


def cowdu(*words: Words) -> subprocess.CompletedProcess[str]:
    """What it printed, and how it ended."""
    program = "from tools.cowdu.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *map(os.fspath, words)],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )


def cowdu_answer(*words: Words) -> dict[str, Any]:
    """What it says with --json; it must succeed."""
    result = cowdu(*words, "--json")
    assert result.returncode == 0, result.stderr
    return cast(dict[str, Any], json.loads(result.stdout))
