"""Resolves paths that people type: to a filesystem, a root in it, and a path in that root.

`.snapshots/NAME/...` below the root leads into that snapshot, on a mount and in an image. The path
need not exist any more. A symbolic link at the end of a path is not followed.
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
    """A path in a filesystem.

    Attributes:
        target: the mount point or image to open.
        path: from the root of the filesystem, without a leading slash.
        shown: the path as it was typed.
    """

    target: str
    path: bytes
    shown: str


class Meant(NamedTuple):
    """A path in a root.

    Attributes:
        record: the root; None for `.snapshots` itself: all snapshots.
        path: from the root's root directory, without a leading slash.
    """

    record: RootRecord | None
    path: bytes


def inside(text: str, image: str | None) -> Inside:
    """Find the filesystem of a path, and the path in it.

    Args:
        image: the target that contains the path; None: the path is on a mount.

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
    """The filesystem that all of these are in. Raises UsageError if there are several."""
    targets = {each.target for each in paths}
    if len(targets) > 1:
        raise UsageError("the paths are in different filesystems; give those of one at a time")
    return targets.pop()


def meaning(filesystem: Filesystem, target: Connection, path: bytes) -> Meant:
    """Find the root that a path leads into, and the path in that root.

    Raises:
        SnapshotError: there is no such snapshot.
    """
    shown = (target.info().daemon_settings or {}).get("snapshot")
    if isinstance(shown, str):  # mounted with -o snapshot: only that snapshot is there
        return Meant(filesystem.catalog.snapshot(shown), path)
    words = [word for word in path.split(b"/") if word not in (b"", b".")]
    if words[:1] != [SNAPSHOTS]:
        return Meant(filesystem.record, b"/".join(words))
    if len(words) == 1:
        return Meant(None, b"")
    record = filesystem.catalog.snapshot(words[1].decode("utf-8", "surrogateescape"))
    return Meant(record, b"/".join(words[2:]))
