"""Error types, with the errno a program sees and the words a person sees.

Every error that cowfs raises on purpose is a `CowfsError`. POSIX answers (no such file, directory not
empty) are plain `OSError` made by `posix_error`. `exit_code` is what a command ends with: 1 error,
2 usage, 10 image missing, 11 locked. This file imports nothing of cowfs.
"""

import errno
import os

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_IMAGE_MISSING = 10
EXIT_LOCKED = 11


class CowfsError(OSError):
    """What happened, to what, and what to do next, in one line."""

    exit_code = EXIT_ERROR
    default_errno = errno.EIO

    def __init__(self, message: str) -> None:
        super().__init__(self.default_errno, message)
        self.message = message

    def __str__(self) -> str:
        return self.message


class UsageError(CowfsError):
    """The caller asked for something that cannot be: a bad name, size or option."""

    exit_code = EXIT_USAGE
    default_errno = errno.EINVAL


class ImageError(CowfsError):
    """The image cannot be opened as it is: foreign, newer, truncated, mounted elsewhere."""


class ImageMissingError(ImageError):
    """There is no file of that name."""

    exit_code = EXIT_IMAGE_MISSING
    default_errno = errno.ENOENT


class LockedError(ImageError):
    """Another process writes to the image."""

    exit_code = EXIT_LOCKED
    default_errno = errno.EBUSY


class MountError(CowfsError):
    """The mount cannot be made, found or ended."""


class StillMountedError(MountError):
    """Unmounted where it was asked for, with all data safe, and still mounted or used elsewhere."""


class BusyError(CowfsError):
    """Refused because somebody is using it; the message names who."""

    default_errno = errno.EBUSY


class SnapshotError(CowfsError):
    """No such snapshot, or one too many of that name."""

    default_errno = errno.EINVAL


class NoSpaceError(CowfsError):
    """No block can be allocated before the next commit, or at all."""

    default_errno = errno.ENOSPC


class ReadOnlyError(CowfsError):
    """A change was asked of something that cannot change."""

    default_errno = errno.EROFS


class DeviceError(CowfsError):
    """The host failed to read, write or flush the image. Terminal for writers (C8)."""


class CorruptError(CowfsError):
    """Bytes of the image are not what was written there.

    Args:
        owner: what the bytes belong to ("node", "space map page", "data of inode 7").
        block: the first block of the damaged bytes.
        reason: what is wrong with them.
        found: the bad value.
        expected: the value that would have been right, where one is known.
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
    """The plain OSError that a POSIX call answers with `number`."""
    return OSError(number, os.strerror(number))
