"""Shared by commands that open an unmounted image or ask before they act."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from cowfs.daemon import finding
from cowfs.errors import ImageError, LockedError, UsageError
from cowfs.escapes import printable

if TYPE_CHECKING:
    from cowfs.storage.device import FileDevice


@contextmanager
def offline_device(image: str, *, writable: bool) -> Iterator[FileDevice]:
    """Open an image that must not be mounted; it stays locked while the block runs if `writable`.

    Raises:
        LockedError: the image is mounted, or in use by another process.
        ImageError: the path is a mount point or another directory.
    """
    from cowfs.storage.device import FileDevice

    if os.path.isdir(image):
        raise ImageError(f"{image} is a directory; unmount it, and name the image file")
    refuse_mounted(image)
    device = FileDevice(image, writable=writable)
    try:
        yield device
    finally:
        device.close()


def refuse_mounted(image: str) -> None:
    """Refuse an image that a daemon serves; that of a read-only mount holds no lock.

    Raises:
        LockedError: the image is mounted.
    """
    client = finding.connect(image)
    if client is not None:
        client.close()
        raise LockedError(f"{image} is mounted ({client.daemon}); unmount it first")


yes_option = click.option("--yes", is_flag=True, help="Do not ask first.")


def confirm(question: str, *, yes: bool) -> None:
    """Ask before an action that cannot be taken back. `yes` (--yes) skips the question.

    Raises:
        UsageError: standard input is no terminal, so nobody can answer.
        click.Abort: the answer is no.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError("this cannot be taken back: try it with -n first, then give --yes")
    click.confirm(printable(question), abort=True, err=True)
