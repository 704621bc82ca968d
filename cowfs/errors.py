"""Error types: each has an errno for programs and a message for people.

Every error that cowfs raises on purpose is a `CowfsError`. POSIX answers (no such file, directory
not empty) are plain `OSError`s made by `posix_error`. The exit codes of commands are: 1 error, 2
usage, 10 image missing, 11 locked. This file imports nothing of cowfs.
"""

import errno
import os

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_IMAGE_MISSING = 10
EXIT_LOCKED = 11


class CowfsError(OSError):
    """An error whose message says what happened, to what, and what to do next, in one line.

    Attributes:
        exit_code: of a command that ends with this error.
        message: without the errno.
    """

    exit_code = EXIT_ERROR
    default_errno = errno.EIO

    def __init__(self, message: str) -> None:
        super().__init__(self.default_errno, message)
        self.message = message

    def __str__(self) -> str:
        return self.message


class UsageError(CowfsError):
    """The caller gave an invalid name, size or option."""

    exit_code = EXIT_USAGE
    default_errno = errno.EINVAL


class ImageError(CowfsError):
    """The image cannot be opened: not an image, a newer format, truncated, in use."""


class ImageMissingError(ImageError):
    """There is no image file of that name."""

    exit_code = EXIT_IMAGE_MISSING
    default_errno = errno.ENOENT


class LockedError(ImageError):
    """Another process has locked the image."""

    exit_code = EXIT_LOCKED
    default_errno = errno.EBUSY


class MountError(CowfsError):
    """A mount cannot be made, found or ended."""


class StillMountedError(MountError):
    """The mount point is unmounted and all data safe, but the mount is still in use elsewhere."""


class BusyError(CowfsError):
    """Refused because something is in use; the message names what uses it."""

    default_errno = errno.EBUSY


class SnapshotError(CowfsError):
    """A snapshot is missing, exists already, is held, or is otherwise unfit for the request."""

    default_errno = errno.EINVAL


class NoSpaceError(CowfsError):
    """There is no room: for the operation before the next commit, or at all."""

    default_errno = errno.ENOSPC


class ReadOnlyError(CowfsError):
    """The image, or the snapshot, cannot be changed."""

    default_errno = errno.EROFS


class DeviceError(CowfsError):
    """The host failed to read, write or flush the image. Ends all writing (C8)."""


class CorruptError(CowfsError):
    """The image is damaged: its bytes are not what was written there.

    Args:
        owner: what the bytes belong to ("node", "space map page", "data of inode 7").
        block: the first block of the damaged bytes; 0 where it is not known.
        reason: what is wrong.
        found: the bad value.
        expected: the right value, where it is known.
    """

    def __init__(
        self, owner: str, block: int, reason: str, found: object = None, expected: object = None
    ) -> None:
        text = f"corrupt {owner} at block {block}: {reason}"
        if found is not None:
            text += f", found {found}"
        if expected is not None:
            text += f", expected {expected}"
        super().__init__(text)
        self.owner = owner
        self.block = block
        self.reason = reason
        self.found = found
        self.expected = expected


def posix_error(number: int) -> OSError:
    """Make the plain OSError with which a POSIX call answers `number`."""
    return OSError(number, os.strerror(number))
