"""Requests to a filesystem and their replies, as values: the same mounted and unmounted.

An edit (edits.py) changes the catalog; a query changes nothing. Both are sent over the control
socket as they are, and `answer` answers both. Numbers are in bytes; names are text.
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
    """All snapshots, or the snapshots that an edit returns."""

    snapshots: tuple[SnapshotReport, ...]


class DropsReply(Struct, tag="drops", tag_field="type", frozen=True, forbid_unknown_fields=True):
    drops: tuple[DropReport, ...]


class Query(Struct, frozen=True, tag_field="type", forbid_unknown_fields=True):
    """A question that changes nothing."""

    def answer(self, filesystem: Filesystem) -> Reply:
        """Answer the query from an open filesystem."""
        raise NotImplementedError  # each subclass has its own; a Struct cannot be an ABC


class Info(Query, frozen=True, tag="info"):
    """What the image is; a daemon adds its mount. Answered by InfoReply."""

    def answer(self, filesystem: Filesystem) -> InfoReply:
        return InfoReply(info_report(filesystem))


class Space(Query, frozen=True, tag="space"):
    """The use of space. Answered by SpaceReply."""

    def answer(self, filesystem: Filesystem) -> SpaceReply:
        return SpaceReply(space_report(filesystem))


class Snapshots(Query, frozen=True, tag="snapshots"):
    """All snapshots, oldest first. Answered by SnapshotsReply."""

    def answer(self, filesystem: Filesystem) -> SnapshotsReply:
        return SnapshotsReply(snapshot_reports(filesystem))


class Drops(Query, frozen=True, tag="drops"):
    """The drop queue, in the order of deletion. Answered by DropsReply."""

    def answer(self, filesystem: Filesystem) -> DropsReply:
        return DropsReply(drop_reports(filesystem))


AnyQuery = Info | Space | Snapshots | Drops
Reply = InfoReply | SpaceReply | SnapshotsReply | DropsReply


def answer(filesystem: Filesystem, request: Edit | Query) -> Reply:
    """Answer a request. An edit is durable when this returns.

    Raises:
        CowfsError: the request cannot be answered, and nothing was changed; or the commit failed
            (C8).
    """
    if isinstance(request, Edit):
        return edit_reply(filesystem, filesystem.apply(request))
    return request.answer(filesystem)


def edit_reply(filesystem: Filesystem, records: list[RootRecord]) -> SnapshotsReply:
    """The reply to an edit, from the records that it returned."""
    return SnapshotsReply(tuple(snapshot_report(filesystem, record) for record in records))
