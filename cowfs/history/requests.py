"""What a filesystem can be asked, as values, and its answers: the same mounted and unmounted.

An edit (edits.py) changes the catalog, a query looks. Both are frozen, travel over the control socket
as they are, and are answered by `answer`. Numbers are in bytes; names are text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from cowfs.history.edits import Edit
from cowfs.history.reports import (
    DropReport,
    InfoReport,
    SnapshotReport,
    SpaceReport,
    drop_reports,
    info_report,
    snapshot_report,
    snapshot_reports,
    space_report,
)

if TYPE_CHECKING:
    from cowfs.history.filesystem import Filesystem
    from cowfs.history.records import RootRecord


class InfoReply(Struct, tag="info", tag_field="type", frozen=True, forbid_unknown_fields=True):
    info: InfoReport


class SpaceReply(Struct, tag="space", tag_field="type", frozen=True, forbid_unknown_fields=True):
    space: SpaceReport


class SnapshotsReply(
    Struct, tag="snapshots", tag_field="type", frozen=True, forbid_unknown_fields=True
):
    """Snapshots: all of them, or those that an edit was about."""

    snapshots: tuple[SnapshotReport, ...]


class DropsReply(Struct, tag="drops", tag_field="type", frozen=True, forbid_unknown_fields=True):
    drops: tuple[DropReport, ...]


class Query(Struct, frozen=True, tag_field="type", forbid_unknown_fields=True):
    """A question that changes nothing."""

    def answer(self, filesystem: Filesystem) -> Reply:
        """The answer of an open filesystem."""
        raise NotImplementedError


class Info(Query, frozen=True, tag="info"):
    """What the image is; a daemon adds how it is mounted. Answered by InfoReply."""

    def answer(self, filesystem: Filesystem) -> InfoReply:
        return InfoReply(info_report(filesystem))


class Space(Query, frozen=True, tag="space"):
    """Where the blocks are. Answered by SpaceReply."""

    def answer(self, filesystem: Filesystem) -> SpaceReply:
        return SpaceReply(space_report(filesystem))


class Snapshots(Query, frozen=True, tag="snapshots"):
    """All snapshots, the oldest first. Answered by SnapshotsReply."""

    def answer(self, filesystem: Filesystem) -> SnapshotsReply:
        return SnapshotsReply(snapshot_reports(filesystem))


class Drops(Query, frozen=True, tag="drops"):
    """The drop queue, in the order of deletion. Answered by DropsReply."""

    def answer(self, filesystem: Filesystem) -> DropsReply:
        return DropsReply(drop_reports(filesystem))


AnyQuery = Info | Space | Snapshots | Drops
Reply = InfoReply | SpaceReply | SnapshotsReply | DropsReply


def answer(filesystem: Filesystem, request: Edit | Query) -> Reply:
    """The answer to a request; an edit is durable when this returns.

    Raises:
        CowfsError: it cannot be answered, and nothing was changed.
    """
    if isinstance(request, Edit):
        return edit_reply(filesystem, filesystem.apply(request))
    return request.answer(filesystem)


def edit_reply(filesystem: Filesystem, records: list[RootRecord]) -> SnapshotsReply:
    """The answer to an edit that was made."""
    return SnapshotsReply(tuple(snapshot_report(filesystem, record) for record in records))
