"""Who uses a mount: processes, loop devices, mounts inside it and other mounts of it, by /proc.

Nothing here accesses the mount itself, which may be stopped or dead: the device of a file comes
from the kernel's memory. Processes of other users are visible only to root.
"""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

from cowfs.daemon import places
from cowfs.daemon.places import MountEntry
from cowfs.errors import BusyError, StillMountedError

NAMED_MAX = 5  # users of a mount that a message names

_AT_FDCWD = -100
_AT_NO_AUTOMOUNT, _AT_STATX_DONT_SYNC = 0x800, 0x4000  # fcntl.h, linux/stat.h
_STATX_BYTES, _DEVICE_OFFSET = 256, 136  # struct statx: stx_dev_major, stx_dev_minor

_libc = ctypes.CDLL(None, use_errno=True)


def open_for_writing(mountpoint: str) -> list[str]:
    """`path (process PID)` of each file below `mountpoint` that is open for writing."""
    found: dict[str, str] = {}  # path: the first process that has it open
    for pid in _processes():
        folder = f"/proc/{pid}/fd"
        try:
            for number in os.listdir(folder):
                path = os.readlink(f"{folder}/{number}")
                if path.startswith(mountpoint + "/") and _writes(pid, number):
                    found.setdefault(path, pid)
        except OSError:
            continue  # the process ended, or may not be examined
    return [f"{path} (process {pid})" for path, pid in sorted(found.items())]


def has_fuse(pid: int) -> bool:
    """Whether a process serves a FUSE mount."""
    try:
        numbers = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return False
    for number in numbers:
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/fd/{number}") == "/dev/fuse":
                return True
    return False


def users(device: str, mount_point: str) -> list[str]:
    """What keeps a mount busy, in words for a message: mounts inside it, loop devices, processes.

    Args:
        device: of the mount, in the form of mountinfo.
        mount_point: of the mount.
    """
    inside = mount_point.rstrip("/") + "/"
    found = [
        f"{entry.mount_point} is mounted in it"
        for entry in places.mount_table()
        if entry.mount_point.startswith(inside)
    ]
    for path in sorted(Path("/sys/block").glob("loop*/loop/backing_file")):
        with contextlib.suppress(OSError):
            backing = os.fsdecode(path.read_bytes().rstrip(b"\n"))
            if backing.startswith(inside):
                found.append(f"the loop device /dev/{path.parts[3]} is on {backing}")
    for pid in _processes():
        if int(pid) != os.getpid():
            use = _use(pid, device)
            if use:
                found.append(f"{named(int(pid))} {use}")
    return found


def other_mounts(device: str, mount_point: str) -> list[str]:
    """Where a mount is still mounted or used after `mount_point` is unmounted, in words.

    Copies in other mount namespaces that are unmounted with it are left out.
    """
    tables: dict[str, tuple[str, dict[int, MountEntry]]] = {}
    for pid in ["self", *_processes()]:
        namespace = _namespace(pid)
        if namespace and namespace not in tables:
            with contextlib.suppress(OSError):
                table = {entry.mount_id: entry for entry in places.mount_table(pid)}
                tables[namespace] = (pid, table)
    own: MountEntry | None = None
    for entry in places.mount_table():
        if entry.device == device and entry.mount_point == mount_point:
            own = entry  # the newest
    goes = _Propagation(own, [table for _, table in tables.values()])
    found = []
    for pid, table in tables.values():
        at = "" if pid == "self" else f" in the mount namespace of {named(int(pid))}"
        seen = [entry for entry in table.values() if entry.device == device and entry != own]
        found += [f"on {entry.mount_point}{at}" for entry in seen if not goes.takes(entry, table)]
        below = [mount_point, *(entry.mount_point for entry in seen)]
        found += [
            f"as a layer of the overlay on {entry.mount_point}{at}"
            for entry in table.values()
            if entry.kind == "overlay"
            and any(_is_below(layer, place) for layer in _layers(entry) for place in below)
        ]
    return found


def busy(directory: str, found: list[str]) -> BusyError:
    """The error that a mount is busy.

    Args:
        found: what uses it, from `users`.
    """
    who = (
        listed(found) if found else "a program that cannot be seen has files or its directory there"
    )
    return BusyError(f"{directory} is busy: {who}")


def still_mounted(
    device: str, mount_point: str, image: str, pid: int, *, is_safe: bool
) -> StillMountedError | None:
    """The error that a mount is still in use after an unmount; None if no user of it is seen.

    Args:
        device, mount_point: of the mount, as for `users`.
        pid: of its daemon, 0 if unknown.
        is_safe: whether all that was written is durable.
    """
    found = other_mounts(device, mount_point) or users(device, mount_point)
    if not found:
        return None
    safe = f" and all that was written there is safe in {image}" if is_safe else ""
    return StillMountedError(
        f"{mount_point} is unmounted{safe}, but it is still in use: {listed(found)}; its daemon "
        f"({named(pid)}) ends when that has ended"
    )


def listed(found: list[str]) -> str:
    """The first NAMED_MAX of a list, and how many more there are."""
    more = len(found) - NAMED_MAX
    return ", ".join(found[:NAMED_MAX]) + (f" and {more} more" if more > 0 else "")


def named(pid: int) -> str:
    """`process PID (NAME)`; for pid 0, a process of another PID namespace."""
    if not pid:
        return "a process of another PID namespace"
    try:
        name = os.fsdecode(Path(f"/proc/{pid}/comm").read_bytes().rstrip(b"\n"))
    except OSError:
        return f"process {pid}"
    return f"process {pid} ({name})"


def _processes() -> Iterator[str]:
    yield from filter(str.isdigit, os.listdir("/proc"))


def holding_directories(mountpoint: str) -> list[str]:
    """What keeps using directories below `mountpoint` as they are now, even after a rollback.

    Each is `process PID in DIRECTORY` or `the bind mount DIRECTORY`. This process is left out.
    Processes of other users are visible only to root; mounts in other namespaces are not visible.
    """
    inside = mountpoint.rstrip("/") + "/"
    found = []
    for pid in sorted(_processes(), key=int):
        if int(pid) == os.getpid():
            continue
        for link in ("cwd", "root"):
            try:
                path = os.readlink(f"/proc/{pid}/{link}")
            except OSError:
                continue  # the process ended, or may not be examined
            if path.startswith(inside):
                found.append(f"{named(int(pid))} in {path}")
                break
    return [*found, *(f"the bind mount {path}" for path in places.bind_mounts(mountpoint))]


def _writes(pid: str, number: str) -> bool:
    with open(f"/proc/{pid}/fdinfo/{number}") as info:
        for line in info:
            if line.startswith("flags:"):
                return int(line.split()[1], 8) & os.O_ACCMODE != os.O_RDONLY
    return False


def _use(pid: str, device: str) -> str:
    """How a process uses files of a device, in words; empty if it does not."""
    folder = f"/proc/{pid}"
    for name, words in (("cwd", "works in"), ("root", "has its root in"), ("exe", "runs")):
        if _device(f"{folder}/{name}") == device:
            return f"{words} {_link(f'{folder}/{name}')}"
    try:
        for number in os.listdir(f"{folder}/fd"):
            if _device(f"{folder}/fd/{number}") == device:
                return f"has {_link(f'{folder}/fd/{number}')} open"
        major, minor = (int(part) for part in device.split(":"))
        wanted = f"{major:02x}:{minor:02x}".encode()
        with open(f"{folder}/maps", "rb") as maps:
            for line in maps:
                fields = line.rstrip(b"\n").split(maxsplit=5)
                if len(fields) == 6 and fields[3] == wanted:
                    return f"has {os.fsdecode(fields[5])} mapped"
    except OSError:
        pass  # the process ended, or may not be examined
    return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return "a file there"


def _device(path: str) -> str:
    """The device of a file in the form of mountinfo, from the kernel's memory; empty if unknown."""
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    flags = _AT_NO_AUTOMOUNT | _AT_STATX_DONT_SYNC
    if _libc.statx(_AT_FDCWD, os.fsencode(path), flags, 0, buffer):
        return ""
    raw = buffer.raw[_DEVICE_OFFSET : _DEVICE_OFFSET + 8]
    return f"{int.from_bytes(raw[:4], 'little')}:{int.from_bytes(raw[4:], 'little')}"


def _namespace(pid: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt")
    except OSError:
        return ""


class _Propagation:
    """Which copies of a mount are unmounted together with it. Source: mount_namespaces(7).

    Args:
        own: the mount; None if this process does not see it.
        tables: the mounts of all mount namespaces by mount id, our own namespace first.
    """

    def __init__(self, own: MountEntry | None, tables: list[dict[int, MountEntry]]) -> None:
        self._parent = tables[0].get(own.parent_id) if own is not None and tables else None
        self._location = _location(own, self._parent)
        self._groups: set[int] = set()
        if self._parent is None or self._parent.peers is None:
            return
        new = {self._parent.peers}
        while new:
            self._groups |= new
            new = {
                entry.peers
                for table in tables
                for entry in table.values()
                if entry.peers is not None and entry.master in self._groups
            } - self._groups

    def takes(self, entry: MountEntry, table: dict[int, MountEntry]) -> bool:
        """Whether a mount of the same device, in that table, is unmounted too."""
        parent = table.get(entry.parent_id)
        return (
            parent is not None
            and parent != self._parent
            and bool(self._groups & {parent.peers, parent.master})
            and _location(entry, parent) == self._location
        )


def _location(entry: MountEntry | None, parent: MountEntry | None) -> tuple[str, str] | None:
    """Where a mount is mounted: the parent's device, and the path in that filesystem."""
    if entry is None or parent is None:
        return None
    inner = os.path.relpath(entry.mount_point, parent.mount_point)
    return parent.device, os.path.normpath(f"{parent.root}/{inner}")


def _layers(entry: MountEntry) -> Iterator[str]:
    for option in entry.super_options.split(","):
        name, _, value = option.partition("=")
        if name in ("lowerdir", "lowerdir+", "datadir+", "upperdir", "workdir"):
            yield from value.split(":")


def _is_below(path: str, place: str) -> bool:
    return path == place or path.startswith(place.rstrip("/") + "/")
