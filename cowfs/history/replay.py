"""Replay: makes the calls of the log again, in memory, when an image is opened (L5).

A writable open then commits, before its first request. A read-only open commits on an overlay in
memory (storage/overlay.py). So a crash during the replay changes nothing, and whoever reads the
image finds a commit.

What the calls need was admitted before the crash, so nothing is refused for want of room. Each call
is checked against the files. One that does not fit, or that meets damage, ends the replay: what
follows could reach the wrong file. The calls before it are whole.
"""

import errno
import stat
from collections.abc import Callable

import msgspec

from cowfs.errors import CorruptError, CowfsError, DeviceError, posix_error
from cowfs.files.calls import (
    Accessed,
    Allocate,
    Call,
    Link,
    Make,
    MakeUnnamed,
    Reclaim,
    Reflink,
    RemoveDirectory,
    RemoveXattr,
    Rename,
    SetAttributes,
    SetXattr,
    Unlink,
    Write,
    decode_calls,
)
from cowfs.files.volume import Volume
from cowfs.storage.device import Device
from cowfs.storage.format import Superblock
from cowfs.storage.log_records import LogRecord, read_log
from cowfs.storage.overlay import ReplayReport

_TYPES = (
    stat.S_IFREG,
    stat.S_IFDIR,
    stat.S_IFCHR,
    stat.S_IFBLK,
    stat.S_IFIFO,
    stat.S_IFSOCK,
)

VolumeOf = Callable[[int], Volume | None]


def calls_of(record: LogRecord) -> list[Call]:
    """The calls of a record. Raises CorruptError if they are malformed."""
    try:
        calls = decode_calls(record.body)
    except (msgspec.DecodeError, RecursionError, OverflowError) as error:
        raise CorruptError("log", record.block, f"malformed calls: {error}") from None
    if len(calls) != record.call_count:
        raise CorruptError("log", record.block, "count of calls", len(calls), record.call_count)
    return calls


def replay(
    device: Device, superblock: Superblock, volume: Volume, volume_of: VolumeOf
) -> ReplayReport:
    """Make the calls of the log that follows a generation again.

    Args:
        volume: the live volume, opened for writing in that generation.
        volume_of: gives the volume or snapshot of a root id, or None.

    Raises:
        DeviceError: the image cannot be read.
    """
    made = 0
    base = superblock.generation, superblock.committed_ns
    admission = volume.store.admission
    player = _Player(volume, volume_of)
    admission.is_replaying = True
    try:
        for record in read_log(device, superblock):
            for call in calls_of(record):
                player.make(call)
                made += 1
    except DeviceError:
        raise
    except (CowfsError, OSError) as error:
        return ReplayReport(
            *base, made, f"call {made + 1} of the log cannot be made again: {error}"
        )
    finally:
        admission.is_replaying = False
        player.close()
    return ReplayReport(*base, made)


class _Player:
    """Makes calls on one volume."""

    def __init__(self, volume: Volume, volume_of: VolumeOf) -> None:
        self._volume = volume
        self._volume_of = volume_of
        # A file that the base has as an orphan may have been made without a name: only `link` can
        # tell, and it was allowed to.
        self._orphans = volume.allow_links_to_orphans()

    def close(self) -> None:
        self._volume.forbid_links_to_orphans(self._orphans)
        self._volume.set_clock(None, kernel_keeps_times=False)

    def make(self, call: Call) -> None:
        """Make one call.

        Raises:
            CorruptError: the call does not fit the files, or a part of them is damaged.
            OSError: as the operation.
        """
        volume = self._volume
        if isinstance(call, Reclaim):
            while call.ino in volume.orphans:
                if volume.reclaim(call.ino):
                    return
            return
        volume.set_clock(call.now_ns, kernel_keeps_times=call.now_ns is None)
        match call:
            case Make():
                self._make_file(call)
            case MakeUnnamed():
                _require_same(
                    call,
                    volume.create_unnamed(
                        call.directory,
                        call.mode,
                        call.uid,
                        call.gid,
                        umask=call.umask,
                        inherits=call.inherits,
                    ).ino,
                )
            case Link():
                volume.link(call.ino, call.directory, call.name)
            case Unlink():
                _require_same(call, volume.lookup(call.directory, call.name).ino)
                volume.unlink(call.directory, call.name)
            case RemoveDirectory():
                _require_same(call, volume.lookup(call.directory, call.name).ino)
                volume.rmdir(call.directory, call.name)
            case Rename():
                _require_same(call, volume.lookup(call.old_directory, call.old_name).ino)
                volume.rename(
                    call.old_directory,
                    call.old_name,
                    call.directory,
                    call.name,
                    call.flags,
                    uid=call.uid,
                    gid=call.gid,
                )
            case SetAttributes():
                volume.setattr(call.ino, call.changes)
            case Accessed():
                volume.set_accessed(call.ino)
            case SetXattr():
                volume.setxattr(call.ino, call.name, call.value, keep_setgid=call.keep_setgid)
            case RemoveXattr():
                volume.removexattr(call.ino, call.name)
            case Write():
                volume.write(call.ino, call.offset, call.data)
            case Allocate():
                volume.allocate(call.ino, call.mode, call.offset, call.length)
            case Reflink():
                self._reflink(call)

    def _make_file(self, call: Make) -> None:
        volume = self._volume
        if call.target:
            made = volume.symlink(call.directory, call.name, call.target, call.uid, call.gid)
        else:
            if stat.S_IFMT(call.mode) not in _TYPES or not 0 <= call.rdev < 1 << 64:
                raise posix_error(errno.EINVAL)
            made = volume.create(
                call.directory,
                call.name,
                call.mode,
                call.uid,
                call.gid,
                call.rdev,
                umask=call.umask,
                inherits=call.inherits,
            )
        _require_same(call, made.ino)

    def _reflink(self, call: Reflink) -> None:
        """Share the range, or copy the part of it that lies in blocks otherwise than it did."""
        volume = self._volume
        source = self._volume_of(call.root_id)
        if source is None:
            raise CorruptError("log", call.root_id, "no such snapshot")
        done = 0
        while done < call.length:
            where = call.source_ino, call.source_offset + done
            to = call.ino, call.offset + done
            left = call.length - done
            try:
                count = volume.reflink(source, *where, *to, left)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                data = source.read(*where, min(left, 1 << 20))
                volume.write(*to, data)
                count = len(data)
            if not count:
                raise CorruptError(f"inode {call.source_ino}", call.source_ino, "is too short")
            done += count


def _require_same(call: Make | MakeUnnamed | Unlink | RemoveDirectory | Rename, ino: int) -> None:
    """Raise CorruptError unless the call reached the inode that it reached before the crash."""
    if ino != call.ino:
        raise CorruptError("log", call.ino, "a call reaches another inode", ino, call.ino)
