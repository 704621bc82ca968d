"""How a handler's end becomes the kernel's answer: exceptions to errnos, in one place.

What is not a known error is logged and answered EIO, so that no bug ends the mount.
"""

import errno
import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from cowfs.daemon.fuse import pyfuse3
from cowfs.errors import CorruptError

log = logging.getLogger(__name__)

T = TypeVar("T")


def errno_of(error: BaseException) -> pyfuse3.FUSEError:
    """The FUSE answer for an exception, logged when it says that something is wrong."""
    if isinstance(error, pyfuse3.FUSEError):
        return error
    if isinstance(error, CorruptError):
        log.error("%s", error)
        return pyfuse3.FUSEError(errno.EIO)
    if isinstance(error, OSError) and error.errno:
        return pyfuse3.FUSEError(error.errno)
    log.error("unexpected error in an operation", exc_info=error)
    return pyfuse3.FUSEError(errno.EIO)


def answers(function: Callable[..., T]) -> Any:
    """A handler that never waits. (Any: pyfuse3 wants coroutines where we write plain methods.)"""

    @functools.wraps(function)
    async def handler(*arguments: Any) -> T:
        try:
            return function(*arguments)
        except Exception as error:
            raise errno_of(error) from None

    return handler


def waits(function: Callable[..., Awaitable[T]]) -> Any:
    """A handler that may wait."""

    @functools.wraps(function)
    async def handler(*arguments: Any) -> T:
        try:
            return await function(*arguments)
        except Exception as error:
            raise errno_of(error) from None

    return handler


def answers_now(function: Callable[..., int]) -> Callable[..., int]:
    """A handler of `fuse.session`, which takes an error as a negative errno."""

    @functools.wraps(function)
    def handler(*arguments: Any) -> int:
        try:
            return function(*arguments)
        except Exception as error:
            return -errno_of(error).errno

    return handler
