"""Notify the service manager of the state of a mount: the protocol of systemd's sd_notify(3).

A daemon in the foreground with NOTIFY_SOCKET set reports when the mount answers and when its last
commit begins. The variable is removed from the environment, so that programs which this process
starts do not report in its name. A daemon in the background reports nothing: its caller waits for
the command instead.
"""

import logging
import os
import socket

log = logging.getLogger(__name__)

READY, STOPPING = "READY=1", "STOPPING=1"
SEND_TIMEOUT_S = 1.0


class Notifier:
    """Sends messages to the service manager, or nowhere if there is none.

    Args:
        address: as in NOTIFY_SOCKET: a path, or @ and the name of an abstract socket. Empty for
            none.
    """

    def __init__(self, address: str = "") -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        if not address.startswith(("/", "@")):
            if address:
                log.warning(
                    "NOTIFY_SOCKET=%s is neither a path nor an abstract socket; "
                    "the service manager is not notified",
                    address,
                )
            self._address = ""

    @classmethod
    def from_environment(cls) -> "Notifier":
        """A notifier for NOTIFY_SOCKET, which is removed from the environment."""
        return cls(os.environ.pop("NOTIFY_SOCKET", ""))

    def tell(self, state: str, status: str) -> None:
        """Report a state (READY or STOPPING) with a line of text for people.

        Never raises: a failure is logged, and the mount continues.
        """
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
            log.warning("cannot notify the service manager of %s: %s", state, error)
