"""The process that commands of tests are forked from; tests/commands.py starts it, and says why.

Run as a program: `command_server.py DESCRIPTOR`. Each message on that socket comes with a socket to
answer on, a file with the request as JSON, and the command's standard output and error. The answers are
the number of the process, and then its exit status as subprocess gives it.
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
    "cowdump": "cowfs_tools.cowdump",
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
    """Fork for each request until the client's end is closed. Does not return, in a fork neither."""
    for module in (*MODULES.values(), *_PRELOADED):
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # or each fork copies what its collections touch
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # who waits for a command is its own parent
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
    # Not those of the server: what they know of their descriptors is that of other files.
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  for as long as the process
    sys.stderr = open(2, "w", closefd=False, errors="backslashreplace", buffering=1)  # noqa: SIM115
    os.chdir(wanted["cwd"])
    os.environ.clear()
    os.environ.update(wanted["environment"])
    sys.argv = [wanted["program"], *wanted["words"]]
    try:
        importlib.import_module(MODULES[wanted["name"]]).main()
    except SystemExit as end:
        assert isinstance(end.code, int)
        sys.stdout.flush()
        os._exit(end.code)  # taking Python down takes longer than most commands


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
