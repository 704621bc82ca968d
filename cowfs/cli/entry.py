"""How every command of cowfs ends: what went wrong is one line on standard error, and an exit code.

0 done; 1 error; 2 usage; 10 the image is missing; 11 it is locked; 130 interrupted. A traceback is
shown to those who ask with --debug, and to nobody else.
"""

import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from cowfs.errors import EXIT_ERROR, EXIT_USAGE, CowfsError
from cowfs.escapes import printable

EXIT_INTERRUPTED = 130


class Invocation:
    """What the whole command line asks for, whatever the command."""

    def __init__(self) -> None:
        self.debug = False


def run(command: click.Command, name: str, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and end the process.

    Args:
        name: of the program, for messages.
        arguments: without the program's name; the process's own by default.
    """
    invocation = Invocation()
    accept_any_text()
    try:
        code = command.main(
            list(sys.argv[1:] if arguments is None else arguments),
            prog_name=name,
            obj=invocation,
            standalone_mode=False,
        )
        sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Exit as end:
        sys.exit(end.exit_code)
    except click.UsageError as error:
        hint = ""
        if error.ctx is not None:
            hint = f"; see {error.ctx.command_path} --help"
        _fail(name, error.format_message().rstrip(".") + hint, EXIT_USAGE, invocation)
    except click.ClickException as error:
        _fail(name, error.format_message(), EXIT_ERROR, invocation)
    except (click.Abort, KeyboardInterrupt):
        _fail(name, "interrupted", EXIT_INTERRUPTED, invocation)
    except CowfsError as error:
        _fail(name, str(error), error.exit_code, invocation)
    except BrokenPipeError:
        # The reader has enough. Python would complain once more when it closes its output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_ERROR)
    except OSError as error:
        place = f": {error.filename}" if error.filename else ""
        _fail(name, f"{error.strerror or error}{place}", EXIT_ERROR, invocation)
    except Exception as error:
        words = f"internal error: {type(error).__name__}: {error}; --debug shows where"
        _fail(name, words, EXIT_ERROR, invocation)


def accept_any_text() -> None:
    r"""Give a terminal of few characters, as of Latin-1, \uNNNN for others: no list ends there."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def warn(name: str, message: str) -> None:
    """Tell on standard error, and go on."""
    click.echo(f"{name}: {printable(message)}", err=True)


def _fail(name: str, message: str, code: int, invocation: Invocation) -> NoReturn:
    if invocation.debug:
        import traceback

        traceback.print_exc()
    warn(name, message)
    sys.exit(code)
