"""The one place that imports pyfuse3, and the module `_session`, which adds what pyfuse3 lacks.

`_session` (Cython, built with the package) must be loaded before pyfuse3, with RTLD_GLOBAL. If it
could not be built, or does not fit this libfuse, `session` is None and `session_missing` says why.
A mount then works without fallocate, SEEK_HOLE, copy_file_range, O_TMPFILE and birth times. The
kernel applies the umask also below default ACLs, and programs see node ids as inode numbers.
"""

import os
import sys
from types import ModuleType

# What the module adds to a mount, in the words of `cowfs info`.
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
        session_missing = (
            "the compiled module _session is of another version; install the package again"
        )
except ImportError as error:
    session_missing = str(error)
finally:
    sys.setdlopenflags(_flags)

import pyfuse3 as pyfuse3  # noqa: E402  # after _session


def show_numbers(*, plain_base: int, plain_mask: int, odd_node: int, odd_number: int) -> None:
    """Set the inode numbers that programs see; without the module these are the node ids.

    Args:
        plain_base, plain_mask: if a node id equals `plain_base` outside the bits of the mask,
            programs see only those bits.
        odd_node, odd_number: for this node programs see that number.
    """
    if session is not None:
        session.set_numbers(
            plain_base=plain_base,
            plain_mask=plain_mask,
            odd_node=odd_node,
            odd_number=odd_number,
        )


def umask_is_ours() -> bool:
    """Whether the daemon must apply the umask (FUSE_CAP_DONT_MASK); known after INIT."""
    return session is not None and session.has_dont_mask()


def killpriv_is_ours() -> bool:
    """Whether the daemon must clear set-id bits and capabilities (FUSE_HANDLE_KILLPRIV_V2)."""
    return session is not None and session.has_killpriv()


def times_set_to_now() -> tuple[bool, bool]:
    """Whether the current setattr sets atime, and whether it sets mtime, to the current time.

    For such times the kernel sends its coarse clock, which may be behind the time of a previous
    write.
    """
    valid = session.setattr_valid() if session is not None else 0
    return bool(valid & _ATIME_NOW), bool(valid & _MTIME_NOW)


def write_kills_privileges() -> bool:
    """Whether the current write must clear set-id bits and capabilities, as the kernel says."""
    return session is not None and session.write_kills_privileges()
