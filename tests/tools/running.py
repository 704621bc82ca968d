"""Runs cowdu and reads its answer."""

import json
import os
from typing import Any, cast

from tests.commands import Completed, run_command

Words = str | os.PathLike[str]


def cowdu(*words: Words) -> Completed:
    """The output and exit status of cowdu."""
    return run_command("cowdu", *words)


def cowdu_answer(*words: Words) -> dict[str, Any]:
    """The answer of cowdu with --json; cowdu must succeed."""
    result = cowdu(*words, "--json")
    assert result.returncode == 0, result.stderr
    return cast(dict[str, Any], json.loads(result.stdout))
