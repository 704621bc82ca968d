"""What the service manager is told of a mount: sd_notify(3) of systemd, in a few lines.

A daemon in the foreground that was started with NOTIFY_SOCKET says when the mount answers and when
its last commit begins. The variable is taken out of the environment, so that nothing this process
starts speaks in its name. In the background nothing is said: whoever waits there waits for the
command, not for the daemon.
"""

import logging
import os
import socket

log = logging.getLogger(__name__)

READY, STOPPING = "READY=1", "STOPPING=1"
SEND_TIMEOUT_S = 1.0


class Notifier:
    """The way to the service manager; says nothing where there is none.

    Args:
        address: as in NOTIFY_SOCKET: a path, or @ and the name of an abstract socket.
    """

    def __init__(self, address: str = "") -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        if not address.startswith(("/", "@")):
            if address:
                log.warning("NOTIFY_SOCKET=%s is not a socket that can be spoken to", address)
            self._address = ""

    @classmethod
    def from_environment(cls) -> "Notifier":
        """The one that this process was started with, for this process alone."""
        return cls(os.environ.pop("NOTIFY_SOCKET", ""))

    def tell(self, state: str, status: str) -> None:
        """Tell a state (READY, STOPPING) and a line for people. Never raises: a mount goes on."""
        if not self._address:
            return
        line = " ".join(status.splitlines())
        message = f"{state}\nSTATUS={line}".encode(errors="surrogateescape")
        kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
        try:
            with socket.socket(socket.AF_UNIX, kind) as connection:
                connection.settimeout(SEND_TIMEOUT_S)
                connection.sendto(message, os.fsencode(self._address))
        except (OSError, ValueError) as error:
            log.warning("the service manager could not be told %s: %s", state, error)
