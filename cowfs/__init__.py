"""cowfs: a copy-on-write filesystem in one image file.

The folders are floors; each imports only from those before it: errors, storage, files, history,
accounting, care, daemon, api, cli. Programs begin with `connect` (api.py).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cowfs.api import Connection

__all__ = ["connect"]
__version__ = "0.1.0"


def connect(path: str | os.PathLike[str]) -> Connection:
    """Connect to the filesystem at a mount point or in an image (api.py). Use it in `with`.

    Raises:
        ImageMissingError: there is no such file.
        MountError: a directory where no cowfs is mounted, or a mount whose daemon is gone.
    """
    from cowfs.api import (
        connect as find,  # imported late: the floors below must not load api.py
    )

    return find(path)
