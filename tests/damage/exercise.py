"""Uses an image that may lie in every way a user could, and keeps each step within bounds.

Allowed are answers and `OSError` (a `CowfsError` is one). Any other exception, a step of more than
STEP_SECONDS_MAX of CPU time (the device is in memory, so a busy machine is no fault), or memory
beyond MEMORY_BYTES_MAX more than before, is a fault of cowfs. The walk itself enters no directory
twice, as no program on a mount could.
"""

import contextlib
import os
import resource
import signal
import stat
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from click.testing import CliRunner

from cowfs.accounting.blocks import explain_block
from cowfs.accounting.owners import Survey, owner_sets, survey
from cowfs.accounting.path_usage import (
    Argument,
    usage_of_orphans,
    usage_of_path,
    usage_of_snapshots,
    usage_together,
)
from cowfs.accounting.paths import volume_of
from cowfs.accounting.pinned import pinned_by
from cowfs.accounting.plan import plan_reclaim
from cowfs.accounting.snapshot_usage import written_blocks
from cowfs.accounting.versions import versions_of
from cowfs.accounting.virtual_drop import simulate_deletion
from cowfs.care.check import check_image
from cowfs.care.generations import generation_reports
from cowfs.care.repair import repair_image
from cowfs.care.salvage import salvage_image
from cowfs.files.acl import (
    ACCESS_NAME,
    DEFAULT_NAME,
    TAG_GROUP_OWNER,
    TAG_MASK,
    TAG_OTHER,
    TAG_OWNER,
    TAG_USER,
    AclEntry,
    encode_acl,
)
from cowfs.files.calls import Changes
from cowfs.files.items import ROOT_INO
from cowfs.files.volume import Volume
from cowfs.history.edits import CreateSnapshot, DeleteSnapshots, RenameSnapshot, Rollback, Undo
from cowfs.history.filesystem import Filesystem
from cowfs.history.images import open_filesystem
from cowfs.history.records import RootKind, RootRecord
from cowfs.history.reports import info_report, snapshot_reports, space_report
from tests.care.image_builder import MemoryDevice
from tests.damage.hostile import write_image

STEP_SECONDS_MAX = 2.0
ACL = encode_acl(
    (
        AclEntry(TAG_OWNER, 7),
        AclEntry(TAG_USER, 5, 1000),
        AclEntry(TAG_GROUP_OWNER, 5),
        AclEntry(TAG_MASK, 5),
        AclEntry(TAG_OTHER, 0),
    )
)
MEMORY_BYTES_MAX = 512 << 20
READ_BYTES = 1 << 20


class TooSlow(BaseException):
    """A step took too long; no handler in the code under test catches this."""


def exercise(device: MemoryDevice, folder: Path) -> None:
    """Run every step on a copy of the image; raise whatever a user must never meet.

    Args:
        folder: an empty folder for the files of salvage and cowdump.
    """
    for step in (look, measure, account, mend, work, rescue):
        with bounded(step.__name__):
            step(_copy(device), folder)


def _copy(device: MemoryDevice) -> MemoryDevice:
    copy = MemoryDevice(device.size_bytes // 4096)
    copy.blocks = dict(device.blocks)
    return copy


@contextlib.contextmanager
def bounded(name: str) -> Iterator[None]:
    """Fail with TooSlow or MemoryError if the block exceeds its bounds."""

    def expire(_number: int, _frame: types.FrameType | None) -> None:
        raise TooSlow(f"{name} took more than {STEP_SECONDS_MAX} s")

    before = signal.signal(signal.SIGPROF, expire)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    bound = pages * resource.getpagesize() + MEMORY_BYTES_MAX
    if limits[1] != resource.RLIM_INFINITY:
        bound = min(bound, limits[1])
    resource.setrlimit(resource.RLIMIT_AS, (bound, limits[1]))
    signal.setitimer(signal.ITIMER_PROF, STEP_SECONDS_MAX)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def attempt(action: Callable[..., object], *arguments: object) -> object:
    """The answer of an action, or None if it was refused with an OSError."""
    try:
        return action(*arguments)
    except OSError:
        return None


# --- the steps ------------------------------------------------------------------------------------


def look(device: MemoryDevice, _folder: Path) -> None:
    """Read everything that can be read through the engine."""
    try:
        filesystem = open_filesystem(device, writable=False)
    except OSError:
        return
    attempt(walk, filesystem.live)
    attempt(lambda: [walk(volume) for volume in _snapshots(filesystem)])


def _snapshots(filesystem: Filesystem) -> Iterator[Volume]:
    for record in filesystem.catalog.roots():
        if record.kind is RootKind.SNAPSHOT:
            volume = attempt(filesystem.volume, record.root_id)
            if isinstance(volume, Volume):
                yield volume


def walk(volume: Volume) -> set[bytes]:
    """Look at every file below the root directory. Returns the paths."""
    paths: set[bytes] = set()
    waiting = [(ROOT_INO, b"")]
    met = set()
    while waiting:
        directory, path = waiting.pop()
        if directory in met:
            continue
        met.add(directory)
        attempt(volume.lookup, directory, b"..")
        try:
            for _, entry in volume.listing(directory):
                name = entry.name
                assert name not in (b"", b".", b".."), name
                assert b"/" not in name, name
                assert b"\0" not in name, name
                paths.add(path + b"/" + name)
                attempt(volume.lookup, directory, name)
                inode = attempt(volume.get, entry.ino)
                attempt(look_at, volume, entry.ino)
                if inode is not None and stat.S_ISDIR(inode.mode):  # type: ignore[attr-defined]
                    waiting.append((entry.ino, path + b"/" + name))
        except OSError:
            continue
    return paths


def look_at(volume: Volume, ino: int) -> None:
    """Read attributes, xattrs, target and data of one inode."""
    inode = volume.get(ino)
    attempt(volume.stat_blocks, inode)
    for name in attempt(volume.listxattr, ino) or ():  # type: ignore[attr-defined]
        attempt(volume.getxattr, ino, name)
    attempt(volume.readlink, ino)
    for offset in (0, 4096, inode.size_bytes - READ_BYTES, (1 << 62) + 5):
        if offset >= 0:
            data = attempt(volume.read, ino, offset, READ_BYTES)
            assert data is None or len(data) <= READ_BYTES  # type: ignore[arg-type]


def measure(device: MemoryDevice, folder: Path) -> None:
    """Ask for everything that describes the image: check, generations, usage, cowdump."""
    from cowfs_tools.cowdu.rows import measure as usage
    from cowfs_tools.cowdump.main import cowdump

    report = attempt(check_image, device)
    assert report is None or str(report)
    attempt(generation_reports, device)
    filesystem = attempt(lambda: open_filesystem(device, writable=False))
    if isinstance(filesystem, Filesystem):
        for action in (info_report, snapshot_reports, space_report, owner_sets, usage):
            attempt(action, filesystem)
        records = attempt(lambda: list(filesystem.catalog.snapshots()))
        for record in records or ():  # type: ignore[attr-defined]
            attempt(simulate_deletion, filesystem, [record])
            attempt(written_blocks, filesystem, record)
    image = folder / "cowdump.img"
    write_image(device, image)
    for words in (["superblocks"], ["catalog"], ["map"], ["items", "main", "3"], ["tree", "main"]):
        result = CliRunner().invoke(cowdump, [str(image), *words, "--json"])
        error = result.exception
        if error is not None and not isinstance(error, (SystemExit, OSError)):
            raise error
    image.unlink()


def account(device: MemoryDevice, _folder: Path) -> None:
    """Ask what snapshots, files and blocks cost, in every way there is."""
    filesystem = attempt(lambda: open_filesystem(device, writable=False))
    if not isinstance(filesystem, Filesystem):
        return
    records = attempt(filesystem.catalog.snapshots)
    snapshots = list(records) if isinstance(records, list) else []
    surveyed = attempt(survey, filesystem)
    if isinstance(surveyed, Survey):
        again = attempt(survey, filesystem, surveyed.structure)
        assert isinstance(again, Survey)
        assert (again.sets.sets == surveyed.sets.sets).all()
        attempt(usage_of_snapshots, surveyed.sets)
        attempt(surveyed.sets.pairs)
        attempt(surveyed.sets.each, "written")
        attempt(plan_reclaim, surveyed.sets, range(surveyed.sets.snapshot_count), 20)
        for block in range(0, device.size_bytes // 4096, 97):
            attempt(explain_block, filesystem, surveyed, block)
    live = filesystem.record
    for chosen in (*([record] for record in snapshots), snapshots, [live]):
        attempt(simulate_deletion, filesystem, chosen)
        attempt(pinned_by, filesystem, chosen)
    attempt(usage_of_orphans, filesystem)
    arguments = []
    for record in (*snapshots, live):
        argument = attempt(_root_of, filesystem, record)
        if isinstance(argument, Argument):
            attempt(usage_of_path, filesystem, argument)
            arguments.append(argument)
    attempt(usage_together, filesystem, arguments)
    for path in (b"", b"big", b"hello", b"sub/hard", b"link", b"many"):
        attempt(versions_of, filesystem, [*snapshots, live], path)


def _root_of(filesystem: Filesystem, record: RootRecord) -> Argument:
    volume = volume_of(filesystem, record)
    return Argument(record, volume, volume.get(ROOT_INO), b"")


def work(device: MemoryDevice, _folder: Path) -> None:
    """Work on the image as a user: every kind of change, snapshots, a rollback, commits."""
    filesystem = attempt(lambda: open_filesystem(device, writable=True))
    if not isinstance(filesystem, Filesystem):
        return
    attempt(filesystem.commit)
    attempt(filesystem.reclaim_orphans)
    attempt(lambda: filesystem.apply(CreateSnapshot("made")))
    _change(filesystem.live)
    attempt(filesystem.commit)
    for name in ("monday", "tuesday"):
        attempt(lambda name=name: filesystem.apply(Rollback(name)))
        _change(filesystem.live)
        attempt(filesystem.commit)
    attempt(lambda: filesystem.apply(Undo()))
    attempt(lambda: filesystem.apply(RenameSnapshot("monday", "sunday")))
    for name in ("made", "sunday", "tuesday"):
        attempt(lambda name=name: filesystem.apply(DeleteSnapshots((name,))))
    attempt(filesystem.work_drops)
    _remove_all(filesystem.live)
    attempt(filesystem.close)


def _change(volume: Volume) -> None:
    made = attempt(volume.create, ROOT_INO, b"made", 0o100644, 0, 0)
    if made is not None:
        ino = made.ino  # type: ignore[attr-defined]
        attempt(volume.write, ino, 100, b"x" * 10000)
        attempt(volume.setxattr, ino, b"user.made", b"y" * 3000)
        attempt(volume.link, ino, ROOT_INO, b"linked")
    attempt(volume.create, ROOT_INO, b"folder", 0o040755, 0, 0)
    attempt(volume.symlink, ROOT_INO, b"pointer", b"hello", 0, 0)
    for ino in (ROOT_INO, 20):
        inherited = attempt(volume.create, ino, b"inheriting", 0o040770, 0, 0)
        if inherited is not None:
            attempt(volume.rmdir, ino, b"inheriting")
        attempt(volume.setxattr, ino, ACCESS_NAME, ACL)
        attempt(volume.setxattr, ino, DEFAULT_NAME, ACL)
        attempt(volume.setattr, ino, Changes(mode=0o700))
    for directory, name in ((1, b"big"), (1, b"hello"), (20, b"file 21"), (20, b"file 25")):
        inode = attempt(volume.find, directory, name)
        if inode is not None:
            ino = inode.ino  # type: ignore[attr-defined]
            attempt(volume.write, ino, 5000, b"z" * 9000)
            attempt(volume.setattr, ino, Changes(size_bytes=4097, mode=0o600, mtime_ns=5))
            attempt(volume.removexattr, ino, b"user.large")
            attempt(volume.setattr, ino, Changes(size_bytes=1 << 40))
    attempt(volume.rename, ROOT_INO, b"sub", 20, b"moved")
    attempt(volume.rename, 20, b"file 22", ROOT_INO, b"hello")
    attempt(volume.rename, 20, b"file 23", ROOT_INO, b"big", 2)
    attempt(volume.rename, ROOT_INO, b"many", 5, b"below")
    attempt(volume.rmdir, ROOT_INO, b"folder")
    _remove(volume, ROOT_INO, b"made")
    _remove(volume, ROOT_INO, b"linked")
    _remove(volume, ROOT_INO, b"link")


def _remove(volume: Volume, directory: int, name: bytes) -> None:
    gone = attempt(volume.unlink, directory, name)
    if gone is not None and not gone.nlink:  # type: ignore[attr-defined]
        for _ in range(100):
            if attempt(volume.reclaim, gone.ino) is not False:  # type: ignore[attr-defined]
                return


def _remove_all(volume: Volume) -> None:
    for _ in range(5):
        for directory in (6, 5, 20, 1):
            names = attempt(lambda at=directory: [entry.name for _, entry in volume.listing(at)])
            for name in names or ():  # type: ignore[attr-defined]
                _remove(volume, directory, name)
                attempt(volume.rmdir, directory, name)


def mend(device: MemoryDevice, _folder: Path) -> None:
    """Repair the image; what the repair promises to mend must be clean, and nothing overwritten."""
    try:
        plan = repair_image(device, dry_run=True)
        done = repair_image(device)
    except OSError:
        return
    assert plan.changes == done.changes
    again = repair_image(device, dry_run=True)
    assert not again.changes, again.changes


def rescue(device: MemoryDevice, folder: Path) -> None:
    """Salvage, with the rings and without; no file may appear outside its directory."""
    for number, rings in enumerate((True, False)):
        if not rings:
            total = device.size_bytes // 4096
            for block in (*range(64), *range(total - 64, total)):
                device.blocks.pop(block, None)
        inside = folder / f"salvaged {number}" / "in" / "here"
        inside.mkdir(parents=True)
        attempt(salvage_image, device, inside)
        for parent, names in (
            (inside.parent, ["here"]),
            (inside.parent.parent, ["in"]),
            (folder, _numbered(number)),
        ):
            assert sorted(os.listdir(parent)) == sorted(names), (parent, os.listdir(parent))


def _numbered(number: int) -> Sequence[str]:
    return [f"salvaged {before}" for before in range(number + 1)]
