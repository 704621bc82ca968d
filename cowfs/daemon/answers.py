"""The only place where an exception in a handler becomes an errno for the kernel.

An unexpected exception is logged and answered with EIO, so that a bug does not end the mount.
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
    """The FUSE error for an exception. Damage and unexpected errors are logged."""
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
    """Decorate a handler that never waits: pyfuse3 gets a coroutine."""

    @functools.wraps(function)
    async def handler(*arguments: Any) -> T:
        try:
            return function(*arguments)
        except Exception as error:
            raise errno_of(error) from None

    return handler


def waits(function: Callable[..., Awaitable[T]]) -> Any:
    """Decorate a handler that may wait."""

    @functools.wraps(function)
    async def handler(*arguments: Any) -> T:
        try:
            return await function(*arguments)
        except Exception as error:
            raise errno_of(error) from None

    return handler


def answers_now(function: Callable[..., int]) -> Callable[..., int]:
    """Decorate a handler of `fuse.session`: an error is returned as a negative errno."""

    @functools.wraps(function)
    def handler(*arguments: Any) -> int:
        try:
            return function(*arguments)
        except Exception as error:
            return -errno_of(error).errno

    return handler
