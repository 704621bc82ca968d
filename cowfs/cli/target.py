"""What commands that need the image itself, or an answer first, have in common."""

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
    """The image itself, which must not be mounted; locked while the block runs if `writable`.

    Raises:
        LockedError: it is mounted, or in use by another process.
        ImageError: a mount point or a directory, where an image is wanted.
    """
    from cowfs.storage.device import FileDevice

    if os.path.isdir(image):
        raise ImageError(f"{image} is a directory; unmount it, and name the image")
    client = finding.connect(image)  # a daemon that only reads holds no lock
    if client is not None:
        client.close()
        raise LockedError(f"{image} is mounted ({client.daemon}); unmount it first")
    device = FileDevice(image, writable=writable)
    try:
        yield device
    finally:
        device.close()


yes_option = click.option("--yes", is_flag=True, help="Do not ask first.")


def confirm(question: str, *, yes: bool) -> None:
    """Ask before what cannot be taken back; without a terminal --yes is the answer.

    Raises:
        UsageError: nobody can be asked.
        click.Abort: the answer is no.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError("this cannot be taken back: look with -n first, then say --yes")
    click.confirm(printable(question), abort=True, err=True)
