"""Forks the commands that tests run; tests/commands.py starts this process and says why.

Run as a program: `command_server.py DESCRIPTOR`. Each message on that socket brings four
descriptors: a socket to answer on, a file with the request as JSON, and the command's standard
output and error. The answers are the process id of the command and then its exit status, as
`subprocess` reports it.
"""

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import struct
import sys

MODULES = {
    "cowfs": "cowfs.cli.main",
    "cowdu": "cowfs_tools.cowdu.main",
    "cowdump": "cowfs_tools.cowdump.main",
}
# What the commands import when they need it.
_PRELOADED = (
    "cowfs.cli.images",
    "cowfs.cli.space",
    "cowfs.cli.snapshots",
    "cowfs.cli.rollback",
    "cowfs.cli.mounting",
    "cowfs.cli.scrub",
    "cowfs.care.check",
    "cowfs.daemon.mount",
    "cowfs.history.images",
    "cowfs_tools.cowdu.listing",
    "cowfs_tools.cowdu.explaining",
)
STATUS = struct.Struct("<i")


def serve(requests: socket.socket) -> None:
    """Fork for each request until the client closes its end. Never returns, in a fork either."""
    for module in (*MODULES.values(), *_PRELOADED):
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # else each fork copies the pages that its collector touches
    # A fork of the server waits for the command; the server itself waits for no one.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, 1, 4)
        if not message:
            sys.exit(0)
        if os.fork() == 0:
            break
        for descriptor in descriptors:
            os.close(descriptor)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    requests.close()
    answer, request, output, errors = descriptors
    pid = os.fork()
    if pid:
        os.close(output)
        os.close(errors)
        os.write(answer, STATUS.pack(pid))
        _, status = os.waitpid(pid, 0)
        with contextlib.suppress(BrokenPipeError):
            os.write(answer, STATUS.pack(os.waitstatus_to_exitcode(status)))
        os._exit(0)
    os.close(answer)
    with open(request, encoding="utf-8") as file:
        file.seek(0)
        wanted = json.load(file)
    for descriptor, standard in ((output, 1), (errors, 2)):
        os.dup2(descriptor, standard)
        os.close(descriptor)
    # The inherited objects describe other files: those that the server had at these descriptors.
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  for as long as the process
    sys.stderr = open(2, "w", closefd=False, errors="backslashreplace", buffering=1)  # noqa: SIM115
    os.chdir(wanted["cwd"])
    os.environ.clear()
    os.environ.update(wanted["environment"])
    sys.argv = [wanted["program"], *wanted["words"]]
    # A command that lowers its priority gets no processor time beside busy programs, and its test
    # waits in vain. The installed programs, which some tests start, do lower it.
    os.nice = os.setpriority = lambda *_: 0
    try:
        importlib.import_module(MODULES[wanted["name"]]).main()
    except SystemExit as end:
        assert isinstance(end.code, int)
        sys.stdout.flush()
        os._exit(end.code)  # shutting Python down takes longer than most commands


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
