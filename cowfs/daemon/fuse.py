"""The one import of pyfuse3, and of what completes it.

`_session` (Cython, built with the package) must be loaded first and with its symbols for all to see.
Where it could not be built, or does not fit this libfuse, `session` is None, `session_missing` says
why, and a mount works without fallocate, SEEK_HOLE, copy_file_range, O_TMPFILE and birth times, with
the umask taken off also below default ACLs, and with node ids for inode numbers.
"""

import os
import sys
from types import ModuleType

# What a mount can do with the module, in the words of `cowfs info`.
SESSION_FEATURES = (
    "fallocate",
    "seek_hole",
    "copy_file_range",
    "tmpfile",
    "plain_inode_numbers",
    "birth_time",
)

_ATIME_NOW, _MTIME_NOW = 1 << 7, 1 << 8  # FATTR_ATIME_NOW, FATTR_MTIME_NOW of linux/fuse.h

_SESSION_VERSION = 4

session: ModuleType | None = None
session_missing = ""

_flags = sys.getdlopenflags()
sys.setdlopenflags(os.RTLD_NOW | os.RTLD_GLOBAL)
try:
    from cowfs.daemon import _session

    if getattr(_session, "VERSION", 0) == _SESSION_VERSION:
        session = _session
    else:
        session_missing = "the compiled module is of another version; install the package again"
except ImportError as error:
    session_missing = str(error)
finally:
    sys.setdlopenflags(_flags)

import pyfuse3 as pyfuse3  # noqa: E402  # after _session


def show_numbers(*, plain_base: int, plain_mask: int, odd_node: int, odd_number: int) -> None:
    """Say what programs see as the numbers of files; without the module those are the node ids.

    Args:
        plain_base, plain_mask: of a node id that is `plain_base` without the bits of the mask, only
            those bits are seen.
        odd_node, odd_number: of this node, that number is seen.
    """
    if session is not None:
        session.set_numbers(
            plain_base=plain_base,
            plain_mask=plain_mask,
            odd_node=odd_node,
            odd_number=odd_number,
        )


def umask_is_ours() -> bool:
    """Whether the kernel leaves the umask to us (FUSE_CAP_DONT_MASK); known once it asks."""
    return session is not None and session.has_dont_mask()


def killpriv_is_ours() -> bool:
    """Whether set-id bits and capabilities are ours to clear (FUSE_HANDLE_KILLPRIV_V2)."""
    return session is not None and session.has_killpriv()


def times_set_to_now() -> tuple[bool, bool]:
    """Whether atime and mtime of the setattr that is being handled are those of now.

    The kernel then sends the time of its coarse clock, which may be before that of a write just made.
    """
    valid = session.setattr_valid() if session is not None else 0
    return bool(valid & _ATIME_NOW), bool(valid & _MTIME_NOW)


def write_kills_privileges() -> bool:
    """Whether the kernel said so of the write that is being handled."""
    return session is not None and session.write_kills_privileges()
