"""`cowfs cp`: copies that share their blocks with the originals.

Sources and destination are on one mount, `.snapshots` included: a file comes back out of a snapshot
in milliseconds, and the copy takes no space until one of the two changes. A copy keeps what `cp -a`
keeps: modes, owners, times, extended attributes, symbolic and hard links, holes.
"""

import os
import shutil
import stat
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import click

from cowfs.api import connect
from cowfs.cli.entry import warn
from cowfs.cli.output import Numbers, dry_run_option, json_option, print_json, progress_bar
from cowfs.errors import EXIT_ERROR, CowfsError, UsageError
from cowfs.escapes import printable
from cowfs.files.items import INLINE_BYTES_MAX

SHARE = "copy_file_range"  # the feature that a mount needs, as `cowfs info` names it


@click.command()
@click.argument(
    "sources", metavar="SOURCE...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@click.argument("destination", type=click.Path(path_type=Path))
@dry_run_option
@click.option("-f", "--force", is_flag=True, help="Replace existing files, each atomically.")
@json_option
def cp(
    sources: tuple[Path, ...], destination: Path, dry_run: bool, force: bool, as_json: bool
) -> None:
    """Copy files and directories so that the copies share the blocks of the originals.

    Copies into DESTINATION if it is a directory, else to the name DESTINATION. All paths must be on
    one mount; its snapshots are below .snapshots in its root. Modes, owners, times, extended
    attributes and links are kept.

    \b
    cowfs cp ~/data/vm.img ~/data/vm-test.img          two files, the space of one
    cowfs cp ~/data/.snapshots/monday/notes ~/data/    a folder comes back from Monday
    """
    plan = _plan(sources, destination)
    _require_sharing(plan)
    copier = _Copier(dry_run=dry_run, force=force)
    with progress_bar("copying") as bar:
        for number, (source, target) in enumerate(plan):
            if bar is not None:
                bar(source.name, number, len(plan))
            copier.copy(source, target)
    done = copier.done
    if as_json:
        fields = {name: getattr(done, name) for name in _Done.__slots__}
        print_json("cowfs cp", {"dry_run": dry_run, **fields})
    else:
        size = Numbers().size
        click.echo(
            f"{'would copy' if dry_run else 'copied'} {done.files} files, {done.directories} "
            f"directories, {done.others} others: {size(done.shared_bytes)} shared, "
            f"{size(done.copied_bytes)} in files too small to share"
        )
    if done.errors:
        raise SystemExit(EXIT_ERROR)


@dataclass(slots=True)
class _Done:
    files: int = 0
    directories: int = 0
    others: int = 0
    shared_bytes: int = 0
    copied_bytes: int = 0
    errors: list[str] = field(default_factory=list)


def _plan(sources: tuple[Path, ...], destination: Path) -> list[tuple[Path, Path]]:
    """Pair each source with its target path.

    Raises:
        UsageError: a source does not exist, is its own target, or contains its target; or there are
            several sources and the destination is not a directory.
    """
    into = destination.is_dir()
    if len(sources) > 1 and not into:
        raise UsageError(f"{destination} is not a directory, which several sources need")
    plan = []
    for source in sources:
        if not os.path.lexists(source):
            raise UsageError(f"{source} does not exist")
        name = source.name or source.resolve().name
        target = destination / name if into else destination
        origin, place = source.resolve(), target.resolve()
        if source.is_dir() and not source.is_symlink() and place.is_relative_to(origin):
            raise UsageError(f"{source} cannot be copied into itself")
        if origin == place and not source.is_symlink():
            raise UsageError(f"{source} and {target} are the same file")
        plan.append((source, target))
    return plan


def _require_sharing(plan: list[tuple[Path, Path]]) -> None:
    """Require that all sources and targets are on one cowfs mount that can share blocks."""
    parent = plan[0][1].parent
    try:
        device = parent.stat().st_dev
    except OSError as error:
        raise UsageError(f"cannot copy to {parent}: {error.strerror}") from None
    for source, _ in plan:
        if source.lstat().st_dev != device:
            raise UsageError(f"{source} and {parent} are not on the same mount; use cp")
    mountpoint = parent.resolve()
    while not os.path.ismount(mountpoint):
        mountpoint = mountpoint.parent
    with connect(str(mountpoint)) as filesystem:
        info = filesystem.info()
    if SHARE not in info.features:
        raise CowfsError(f"this mount of {info.image} cannot share blocks; use cp")


class _Copier:
    """Copies files and directories. A failure is printed, kept in `done.errors`, and skipped."""

    def __init__(self, *, dry_run: bool, force: bool) -> None:
        self.done = _Done()
        self._dry_run = dry_run
        self._force = force
        self._linked: dict[int, Path] = {}  # inode number of a hard-linked file -> its first copy

    def copy(self, source: Path, target: Path) -> None:
        """Copy a file, or a directory with all that is in it."""
        try:
            status = source.lstat()
            if stat.S_ISDIR(status.st_mode):
                self._directory(source, target, status)
            else:
                self._file(source, target, status)
        except OSError as error:
            words = f"{source}: {error.strerror or error}"
            self.done.errors.append(printable(words))
            warn("cowfs cp", words)

    def _directory(self, source: Path, target: Path, status: os.stat_result) -> None:
        if not self._dry_run and not target.is_dir():
            target.mkdir(0o700)
        self.done.directories += 1
        for name in sorted(os.listdir(source)):
            self.copy(source / name, target / name)
        if not self._dry_run:
            _keep(source, target, status)

    def _file(self, source: Path, target: Path, status: os.stat_result) -> None:
        there = os.path.lexists(target)
        if there and not self._force:
            raise FileExistsError(0, f"{target} exists already; -f replaces it")
        first = self._linked.get(status.st_ino) if status.st_nlink > 1 else None
        self._count(status, is_link=first is not None)
        if status.st_nlink > 1:
            self._linked.setdefault(status.st_ino, target)
        if self._dry_run:
            return
        made = target.with_name(f".cowfs-cp-{os.getpid()}") if there else target
        try:
            if first is not None:
                os.link(first, made, follow_symlinks=False)
            else:
                self._make(source, made, status)
                _keep(source, made, status)
            if made != target:
                made.rename(target)
        except BaseException:
            with suppress(FileNotFoundError):
                made.unlink()
            self._linked.pop(status.st_ino, None)
            raise

    def _make(self, source: Path, made: Path, status: os.stat_result) -> None:
        if stat.S_ISLNK(status.st_mode):
            made.symlink_to(os.readlink(source))
        elif not stat.S_ISREG(status.st_mode):
            os.mknod(made, stat.S_IFMT(status.st_mode) | 0o600, status.st_rdev)
        else:
            reading = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                writing = os.open(made, flags, 0o600)
                try:
                    _share(reading, writing)
                finally:
                    os.close(writing)
            finally:
                os.close(reading)

    def _count(self, status: os.stat_result, *, is_link: bool) -> None:
        if not stat.S_ISREG(status.st_mode):
            self.done.others += 1
            return
        self.done.files += 1
        if is_link:
            return
        if status.st_size > INLINE_BYTES_MAX:
            self.done.shared_bytes += status.st_size
        else:
            self.done.copied_bytes += status.st_size


def _share(reading: int, writing: int) -> None:
    """Share all blocks of the file `reading` with `writing`, even if the first grows meanwhile."""
    at = 0
    while True:
        size = os.fstat(reading).st_size
        if at >= size:
            return
        count = os.copy_file_range(reading, writing, size - at, at, at)
        if not count:
            return
        at += count


def _keep(source: Path, made: Path, status: os.stat_result) -> None:
    """Give a copy the owner, extended attributes, mode and times of its original."""
    with suppress(PermissionError):  # as with cp -a, the copy then belongs to the calling user
        os.chown(made, status.st_uid, status.st_gid, follow_symlinks=False)
    shutil.copystat(source, made, follow_symlinks=False)
