"""Directories as 32-bit programs read them: positions that fit into 31 bits.

The position after a name (d_off) is made of the hash of the name, 63 bits. It stays valid while other
names come and go, and in any descriptor, as NFS needs it. But the C library of a 32-bit program that
was built without large files ends a listing with EOVERFLOW at the first position beyond 31 bits. Such
a program is given the count of names before instead, which means something in its own descriptor only.
"""

import os
import sys
import time
from array import array
from collections.abc import Callable
from typing import Any

# While a program walks a tree it is asked for once in this time: the look takes 5 us.
SAME_PROGRAM_NS = 5_000_000
_AUXV_BYTES = 8


def is_narrow(pid: int) -> bool:
    """Whether a process, or the one that a thread belongs to, runs a 32-bit program.

    The auxiliary vector begins with a small number, as wide as a pointer, and then something that is not
    zero. What may not be looked at, or is in another PID namespace, counts as 64-bit.
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
    """One directory that a 32-bit program has open: its node, and the real positions by count."""

    def __init__(self, node: int, reply: Callable[[Any, bytes, Any, int], bool]) -> None:
        self.node = node
        self._reply = reply
        self._cookies = array("Q", [0])  # after so many names; the first is the start
        self._count = 0

    def seek(self, count: int) -> int:
        """The real position after `count` names, from which the next `reply` goes on."""
        self._count = min(count, len(self._cookies) - 1)
        return self._cookies[self._count]

    def reply(self, token: Any, name: bytes, attributes: Any, cookie: int) -> bool:
        """`pyfuse3.readdir_reply` with a count in the place of the position."""
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
        first_handle: the handles that are given out go from here upwards.
        reply: `pyfuse3.readdir_reply`.
    """

    def __init__(self, first_handle: int, reply: Callable[[Any, bytes, Any, int], bool]) -> None:
        self._next_handle = first_handle
        self._reply = reply
        self._listings: dict[int, NarrowListing] = {}
        self._pid, self._asked_ns, self._is_narrow = 0, 0, False

    def open(self, node: int, pid: int) -> int | None:
        """A handle for a directory that a process opens; None when it is not a 32-bit program."""
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
        return self._listings.get(handle)

    def close(self, handle: int) -> bool:
        """The handle was released. Returns whether it was one of these."""
        return self._listings.pop(handle, None) is not None
