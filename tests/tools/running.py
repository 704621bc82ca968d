"""Runs cowdu, and takes its answer apart."""

import json
import os
from typing import Any, cast

from tests.commands import Completed, run_command

Words = str | os.PathLike[str]


def cowdu(*words: Words) -> Completed:
    """What it printed, and how it ended."""
    return run_command("cowdu", *words)


def cowdu_answer(*words: Words) -> dict[str, Any]:
    """What it says with --json; it must succeed."""
    result = cowdu(*words, "--json")
    assert result.returncode == 0, result.stderr
    return cast(dict[str, Any], json.loads(result.stdout))
