"""Mount options: what can be set, and how `-o name,name=value` is read.

Words that mount(8) and fstab(5) give to every filesystem are accepted and ignored where they change
nothing here; a word that nobody knows is refused by name, never silently dropped.
"""

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cowfs.errors import UsageError
from cowfs.escapes import quoted

SnapshotsOption = Literal["hidden", "visible", "disabled"]
LogOption = Literal["stderr", "journald"]

MIB = 1 << 20
COMMIT_INTERVAL_S_MIN = 0.05
COMMIT_INTERVAL_S_MAX = 3600.0
CACHE_BYTES_MIN = 4 * MIB
CACHE_BYTES_DEFAULT_MIN = 128 * MIB
CACHE_BYTES_DEFAULT_MAX = 1024 * MIB
DIRTY_BYTES_MIN = 4 * MIB

# Said by mount(8), fstab(5) or libfuse; true already, or none of a filesystem's business.
_TOLERATED = frozenset(
    {
        "defaults",
        "auto",
        "noauto",
        "user",
        "nouser",
        "users",
        "nousers",
        "owner",
        "noowner",
        "group",
        "nogroup",
        "_netdev",
        "nofail",
        "async",
        "nodiratime",
        "diratime",
        "norelatime",
        "lazytime",
        "nolazytime",
        "default_permissions",
        "silent",
        "loud",
    }
)
_TOLERATED_BEGINNINGS = ("x-", "X-", "comment=", "fsname=", "subtype=")

_SIZE = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([kmgtp]?)(?:i?b)?\s*", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}


def default_cache_bytes() -> int:
    """A sixteenth of the machine's memory, within bounds: what a large directory needs to stay fast."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(CACHE_BYTES_DEFAULT_MIN, min(memory // 16, CACHE_BYTES_DEFAULT_MAX))


@dataclass(frozen=True, kw_only=True, slots=True)
class MountOptions:
    """Everything that a mount is told.

    Attributes:
        image: path of the image file or block device.
        mountpoint: an empty directory.
        foreground: stay in the foreground, log to the terminal.
        read_only: never write to the image.
        allow_other: other users may look too (permissions always hold).
        commit_interval_s: how much a crash may lose at the most (C5).
        snapshots: how `.snapshots` appears at the root of the mount.
        cache_bytes: bound of the node cache.
        dirty_bytes_max: data in memory that waits for a commit.
        discard: tell the host what the image no longer needs.
        suid, dev, executable: what mount(8) calls suid, dev and exec.
        generation: an older generation to look at, read-only.
        snapshot: the snapshot whose tree is mounted, read-only; None for the live volume.
        xattrs: extended attributes are stored.
        acls: POSIX ACLs hold; they are xattrs, so without those they do not.
        access_times: kept as relatime does; False is noatime.
        strict_access_times: kept at every read that reaches the daemon, not as relatime does.
        writeback: the kernel may keep written data for a while before it comes to us.
    """

    image: str
    mountpoint: str
    foreground: bool = False
    read_only: bool = False
    allow_other: bool = False
    commit_interval_s: float = 5.0
    snapshots: SnapshotsOption = "hidden"
    cache_bytes: int = field(default_factory=default_cache_bytes)
    dirty_bytes_max: int = 256 * MIB
    discard: bool = True
    log: LogOption = "stderr"
    suid: bool = False
    dev: bool = False
    executable: bool = True
    generation: int | None = None
    snapshot: str | None = None
    xattrs: bool = True
    acls: bool = True
    access_times: bool = True
    strict_access_times: bool = False
    writeback: bool = False


# Words without a value, and the fields that each sets. mount(8) keeps `suid` and `dev` to itself, which
# are its defaults: `setuid` and `devices` say the same and reach its helper.
_SWITCHES: dict[str, dict[str, bool]] = {
    "noatime": {"access_times": False, "strict_access_times": False},
    "relatime": {"access_times": True, "strict_access_times": False},
    "strictatime": {"access_times": True, "strict_access_times": True},
    "nostrictatime": {"strict_access_times": False},
    "writeback": {"writeback": True},
    "nowriteback": {"writeback": False},
    "ro": {"read_only": True},
    "rw": {"read_only": False},
    "allow_other": {"allow_other": True},
    "discard": {"discard": True},
    "nodiscard": {"discard": False},
    "suid": {"suid": True},
    "nosuid": {"suid": False},
    "setuid": {"suid": True},
    "nosetuid": {"suid": False},
    "dev": {"dev": True},
    "nodev": {"dev": False},
    "devices": {"dev": True},
    "nodevices": {"dev": False},
    "exec": {"executable": True},
    "noexec": {"executable": False},
    "acl": {"acls": True},
    "noacl": {"acls": False},
    "user_xattr": {"xattrs": True},
    "xattrs": {"xattrs": True},
    "noxattrs": {"xattrs": False},
    "nouser_xattr": {"xattrs": False},
}


def parse_options(text: str, options: MountOptions, *, sloppy: bool = False) -> MountOptions:
    """The options with those of a `-o` text applied; the last of two that contradict wins.

    Args:
        text: `name,name=value,...`; empty words are skipped.
        options: what to start from.
        sloppy: skip unknown words, as mount(8) asks with -s.

    Raises:
        UsageError: naming the word that is unknown or has an impossible value.
    """
    settings: dict[str, Any] = {}
    words = [word for word in (word.strip() for word in text.split(",")) if word]
    if "remount" in words:
        raise UsageError(
            "remount is for mount(8): mount -o remount,ro DIR; for other options unmount it, "
            "and mount it again"
        )
    for word in words:
        name, separator, value = word.partition("=")
        if word in _TOLERATED or word.startswith(_TOLERATED_BEGINNINGS):
            continue
        if word in _SWITCHES:
            settings |= _SWITCHES[word]
        elif separator and name in _VALUES:
            field, read = _VALUES[name]
            settings[field] = read(name, value)
        elif not sloppy:
            if name in _VALUES:
                raise UsageError(f"mount option {name} needs a value: {name}=...")
            raise UsageError(f"unknown mount option {quoted(word)}; cowfs mount --help lists them")
    for name in ("generation", "snapshot"):
        if name in settings:
            if settings.get("read_only") is False:
                raise UsageError(f"mount options rw and {name} contradict each other")
            settings["read_only"] = True
    if "snapshot" in settings and settings.setdefault("snapshots", "disabled") != "disabled":
        raise UsageError("mount options snapshot and snapshots contradict each other")
    return replace(options, **settings)


def option_words() -> list[str]:
    """Every mount option of cowfs's own, as it is written: `ro`, `commit=`, `log=stderr`."""
    words = list(_SWITCHES)
    for name in _VALUES:
        words += [f"{name}={choice}" for choice in _CHOICES.get(name, ("",))]
    return words


def parse_size(text: str) -> int:
    """Bytes of a size as people write it: 4G, 4GiB, 512M, 1.5 t, 4096. Units are powers of 1024.

    Raises:
        UsageError: not a size.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(f"{quoted(text)} is not a size; write it as 512M, 4G or 1.5TiB")
    unit = 1024 ** _POWERS[match[2].lower()]
    return int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit


def _size(name: str, value: str, minimum_bytes: int) -> int:
    try:
        size = parse_size(value)
    except UsageError as error:
        raise UsageError(f"mount option {name}: {error}") from None
    if size < minimum_bytes:
        raise UsageError(
            f"mount option {name}={value} is too small, at least {minimum_bytes >> 20}M"
        )
    return size


def _seconds(name: str, value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not COMMIT_INTERVAL_S_MIN <= seconds <= COMMIT_INTERVAL_S_MAX:
        raise UsageError(
            f"mount option {name}={value} is not a number of seconds from "
            f"{COMMIT_INTERVAL_S_MIN} to {COMMIT_INTERVAL_S_MAX:.0f}"
        )
    return seconds


def _choice(name: str, value: str) -> str:
    choices = _CHOICES[name]
    if value not in choices:
        raise UsageError(f"mount option {name} is one of {', '.join(choices)}, not {quoted(value)}")
    return value


def _generation(name: str, value: str) -> int:
    if not re.fullmatch(r"[0-9]{1,19}", value) or not int(value):
        raise UsageError(f"mount option {name}={value} is not the number of a generation")
    return int(value)


def _name(name: str, value: str) -> str:
    if not value:
        raise UsageError(f"mount option {name} needs a value: {name}=...")
    return value


_CHOICES = {"snapshots": ("hidden", "visible", "disabled"), "log": ("stderr", "journald")}

# Options with a value: the field, and what reads the value.
_VALUES: dict[str, tuple[str, Callable[[str, str], Any]]] = {
    "commit": ("commit_interval_s", _seconds),
    "commit_interval": ("commit_interval_s", _seconds),
    "snapshots": ("snapshots", _choice),
    "cache": ("cache_bytes", lambda name, value: _size(name, value, CACHE_BYTES_MIN)),
    "dirty": ("dirty_bytes_max", lambda name, value: _size(name, value, DIRTY_BYTES_MIN)),
    "log": ("log", _choice),
    "generation": ("generation", _generation),
    "snapshot": ("snapshot", _name),
}
