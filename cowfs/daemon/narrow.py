"""Directory listings for 32-bit programs: positions that fit into 31 bits.

The position of a name (d_off) is normally a 63-bit cookie made from the hash of the name. It stays
valid while other names come and go, and in any descriptor, as NFS needs it. But a 32-bit program
built without large file support fails with EOVERFLOW at the first position beyond 31 bits. Such a
program gets positions that count the names so far. They are valid only in the descriptor that gave
them.
"""

import os
import sys
import time
from array import array
from collections.abc import Callable
from typing import Any

# A program that opens many directories is checked again only after this time: a check takes 5 us.
SAME_PROGRAM_NS = 5_000_000
_AUXV_BYTES = 8


def is_narrow(pid: int) -> bool:
    """Whether a process runs a 32-bit program. `pid` may also be the id of a thread.

    The auxiliary vector starts with a small number as wide as a pointer, followed by a nonzero
    value. A process that cannot be examined, or is in another PID namespace, counts as 64-bit.
    """
    try:
        descriptor = os.open(f"/proc/{pid}/auxv", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        start = os.read(descriptor, _AUXV_BYTES)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return len(start) == _AUXV_BYTES and int.from_bytes(start, sys.byteorder) >= 1 << 32


class NarrowListing:
    """One directory that a 32-bit program has open: its node, and the cookie for each count."""

    def __init__(self, node: int, reply: Callable[[Any, bytes, Any, int], bool]) -> None:
        self.node = node
        self._reply = reply
        self._cookies = array("Q", [0])  # [n] is the cookie after n names
        self._count = 0  # names before the next one

    def seek(self, count: int) -> int:
        """Continue after `count` names. Returns the cookie there."""
        self._count = min(count, len(self._cookies) - 1)
        return self._cookies[self._count]

    def reply(self, token: Any, name: bytes, attributes: Any, cookie: int) -> bool:
        """`pyfuse3.readdir_reply` with a count in place of the cookie."""
        count = self._count + 1
        if not self._reply(token, name, attributes, count):
            return False
        if count == len(self._cookies):
            self._cookies.append(cookie)
        else:  # listed again, after a rewind
            self._cookies[count] = cookie
        self._count = count
        return True


class NarrowListings:
    """The directories of a mount that 32-bit programs have open.

    Args:
        first_handle: handles are given out from here upwards.
        reply: `pyfuse3.readdir_reply`.
    """

    def __init__(self, first_handle: int, reply: Callable[[Any, bytes, Any, int], bool]) -> None:
        self._next_handle = first_handle
        self._reply = reply
        self._listings: dict[int, NarrowListing] = {}
        self._pid, self._asked_ns, self._is_narrow = 0, 0, False

    def open(self, node: int, pid: int) -> int | None:
        """A handle for a directory that a 32-bit program opens; None for other programs."""
        now_ns = time.monotonic_ns()
        if pid != self._pid or now_ns - self._asked_ns > SAME_PROGRAM_NS:
            self._pid, self._asked_ns, self._is_narrow = pid, now_ns, is_narrow(pid)
        if not self._is_narrow:
            return None
        handle = self._next_handle
        self._next_handle += 1
        self._listings[handle] = NarrowListing(node, self._reply)
        return handle

    def get(self, handle: int) -> NarrowListing | None:
        """The listing of a handle; None if the handle is not from here."""
        return self._listings.get(handle)

    def close(self, handle: int) -> bool:
        """Forget a handle. Returns whether it was from here."""
        return self._listings.pop(handle, None) is not None
