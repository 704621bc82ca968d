"""Runs a command and ends the process: an error is one line on standard error and an exit code.

0 done; 1 error; 2 usage; 10 the image is missing; 11 the image is locked; 130 interrupted. Only
--debug shows a traceback.
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
    """The options that hold for every command."""

    def __init__(self) -> None:
        self.debug = False


def _set_debug(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    invocation = context.find_object(Invocation)
    if invocation is not None and value:
        invocation.debug = True


debug_option = click.option(
    "--debug",
    is_flag=True,
    is_eager=True,  # so that it holds for errors in the other options
    expose_value=False,
    callback=_set_debug,
    help="Show where an error came from.",
)


def run(command: click.Command, name: str, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and end the process with its exit code.

    Args:
        name: the program's name, for messages.
        arguments: without the program's name; by default those of the process.
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
        # The reader closed the pipe. Python would report that again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_ERROR)
    except OSError as error:
        _fail(name, error_text(error), EXIT_ERROR, invocation)
    except Exception as error:
        words = f"internal error: {type(error).__name__}: {error}; run with --debug to see where"
        _fail(name, words, EXIT_ERROR, invocation)


def error_text(error: OSError) -> str:
    """Describe an error in one line: the message, and the file that the system names."""
    if isinstance(error, CowfsError):
        return str(error)
    place = f": {error.filename}" if error.filename else ""
    return f"{error.strerror or error}{place}"


def accept_any_text() -> None:
    r"""Print \uNNNN for characters that the terminal's encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def warn(name: str, message: str) -> None:
    """Print a message on standard error."""
    click.echo(f"{name}: {printable(message)}", err=True)


def _fail(name: str, message: str, code: int, invocation: Invocation) -> NoReturn:
    if invocation.debug:
        import traceback

        traceback.print_exc()
    warn(name, message)
    sys.exit(code)
