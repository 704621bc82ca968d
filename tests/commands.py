"""Runs `cowfs`, `cowdu` and `cowdump` in processes of their own, without paying for their imports.

Most of what a short command costs is the start of Python and numpy. So one process, the *server*,
imports the commands once, and each command runs in a fork of it, with arguments, environment,
directory and output of its own: it ends as any process does, and no command sees another. The
server has no threads.

`run_command("mount", ...)` starts the installed program itself, and so does every call with
`program=True`; the mounts that fixtures make come from the server.
"""

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.command_server import MODULES, STATUS
from tests.sizes import HANG_SECONDS

Completed = subprocess.CompletedProcess[str]

# The programs that installing the package made, next to the Python that runs the tests.
COMMANDS = Path(sys.executable).parent
SERVER = Path(__file__).with_name("command_server.py")


def run_command(
    *arguments: str | os.PathLike[str], timeout: float = HANG_SECONDS, program: bool | None = None
) -> Completed:
    """Run `cowfs`, or the `cowdu` or `cowdump` named first; return output and exit status.

    Args:
        program: start the installed program instead of a fork of the server; None: only for mounts.
    """
    words = [os.fspath(argument) for argument in arguments]
    name = words.pop(0) if words[0] in MODULES else "cowfs"
    installed = COMMANDS / name
    if not installed.exists():
        pytest.fail(f"{installed} is missing: install the package (scripts/setup.sh does)")
    try:
        if words[:1] == ["mount"] if program is None else program:
            return subprocess.run(
                [str(installed), *words],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
        return _SERVER.run(name, words, timeout)
    except subprocess.TimeoutExpired as error:
        pytest.fail(
            f"{name} {' '.join(words)}: neither ended nor closed its output in {timeout} s;"
            f" said {error.stdout!r} {error.stderr!r}"
        )


class _Server:
    """The client's side: starts the server with the first command and stops it after the tests."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def run(self, name: str, words: Sequence[str], timeout: float) -> Completed:
        """Run a command.

        Raises:
            subprocess.TimeoutExpired: the command took too long and was killed.
        """
        request = {
            "name": name,
            "program": str(COMMANDS / name),
            "words": words,
            "environment": dict(os.environ),
            "cwd": os.getcwd(),
        }
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        output, output_end = os.pipe()
        errors, errors_end = os.pipe()
        with tempfile.TemporaryFile("w+") as file, ours:
            file.write(json.dumps(request))
            file.flush()
            ends = [theirs.fileno(), file.fileno(), output_end, errors_end]
            socket.send_fds(self._connected(), [b"x"], ends)
            theirs.close()
            os.close(output_end)
            os.close(errors_end)
            (pid,) = STATUS.unpack(ours.recv(STATUS.size))
            streams = {output: bytearray(), errors: bytearray()}
            is_over = _read(streams, time.monotonic() + timeout)
            if not is_over:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                texts = [bytes(text) for text in streams.values()]
                raise subprocess.TimeoutExpired([name, *words], timeout, *texts)
            (status,) = STATUS.unpack(ours.recv(STATUS.size))
        texts = [text.decode() for text in streams.values()]
        return Completed([str(COMMANDS / name), *words], status, *texts)

    def end(self) -> None:
        """Let the server end; no request follows."""
        if self._socket is not None and self._process is not None:
            self._socket.close()
            self._process.wait(timeout=HANG_SECONDS)
            self._process = self._socket = None

    def _connected(self) -> socket.socket:
        if self._socket is None:
            self._socket, theirs = socket.socketpair()
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, SERVER, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    cwd="/",
                    env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
                )
        return self._socket


_SERVER = _Server()
end_server = _SERVER.end


def _read(streams: dict[int, bytearray], deadline: float) -> bool:
    """Read the descriptors to their ends and close them; false if the deadline comes first."""
    with selectors.DefaultSelector() as selector:
        for descriptor in streams:
            selector.register(descriptor, selectors.EVENT_READ)
        try:
            while selector.get_map():
                ready = selector.select(max(0, deadline - time.monotonic()))
                if not ready:
                    return False
                for key, _ in ready:
                    data = os.read(key.fd, 1 << 16)
                    streams[key.fd] += data
                    if not data:
                        selector.unregister(key.fd)
            return True
        finally:
            for descriptor in streams:
                os.close(descriptor)
