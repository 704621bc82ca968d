"""Paths that people type, and what they mean: a place on a mount, or inside of an image.

`.snapshots/NAME/...` below the root leads into that snapshot, on a mount as in an image. Nothing need be
at the path any more; no symbolic link below the mount is followed at its end.
"""

import os
from typing import NamedTuple

from cowfs.api import Connection
from cowfs.daemon import places
from cowfs.errors import MountError, UsageError
from cowfs.history.filesystem import Filesystem
from cowfs.history.records import RootRecord

SNAPSHOTS = b".snapshots"


class Inside(NamedTuple):
    """A path in a filesystem. `target`: what to open. `path`: from the root, without a slash."""

    target: str
    path: bytes
    shown: str


class Meant(NamedTuple):
    """What a path means. `record` is None for `.snapshots` itself: all of them."""

    record: RootRecord | None
    path: bytes


def inside(text: str, image: str | None) -> Inside:
    """Where a path is.

    Args:
        image: the target that the path is inside of; None: a mount that it lies on.

    Raises:
        MountError: no cowfs is mounted there.
    """
    if image is not None:
        return Inside(image, os.fsencode(text).strip(b"/"), text)
    parent, name = os.path.split(os.path.abspath(text))
    place = os.path.join(os.path.realpath(parent), name)
    mount = places.find_mount(place, inside=True)
    if mount is None:
        raise MountError(
            f"{text} is not on a mounted cowfs; name a path on a mount, or the image with --image"
        )
    below = os.path.relpath(place, mount.mount_point)
    return Inside(mount.mount_point, b"" if below == "." else os.fsencode(below), text)


def one_target(paths: list[Inside]) -> str:
    """The filesystem that all of these are in. Raises UsageError when there are several."""
    targets = {each.target for each in paths}
    if len(targets) > 1:
        raise UsageError("the paths lie in different filesystems; ask about one at a time")
    return targets.pop()


def meaning(filesystem: Filesystem, target: Connection, path: bytes) -> Meant:
    """Which root a path leads into, and where in it.

    Raises:
        SnapshotError: there is no such snapshot.
    """
    shown = (target.info().daemon_settings or {}).get("snapshot")
    if isinstance(shown, str):  # such a mount shows that snapshot and nothing else
        return Meant(filesystem.catalog.snapshot(shown), path)
    words = [word for word in path.split(b"/") if word not in (b"", b".")]
    if words[:1] != [SNAPSHOTS]:
        return Meant(filesystem.record, b"/".join(words))
    if len(words) == 1:
        return Meant(None, b"")
    record = filesystem.catalog.snapshot(words[1].decode("utf-8", "surrogateescape"))
    return Meant(record, b"/".join(words[2:]))
