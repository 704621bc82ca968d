"""Mount options: their values and defaults, and the parsing of `-o name,name=value`.

Options that mount(8) and fstab(5) give to every filesystem are accepted and ignored where they
change nothing here. An unknown option is refused by name, never silently dropped.
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

# Options of mount(8), fstab(5) or libfuse that are ignored: they are always so here, or are for
# others.
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
    """A sixteenth of the machine's memory, within bounds: enough to keep a large directory fast."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(CACHE_BYTES_DEFAULT_MIN, min(memory // 16, CACHE_BYTES_DEFAULT_MAX))


@dataclass(frozen=True, kw_only=True, slots=True)
class MountOptions:
    """All settings of a mount.

    Attributes:
        image: path of the image file or block device.
        mountpoint: an empty directory.
        foreground: stay in the foreground, log to the terminal.
        read_only: never write to the image.
        allow_other: let other users access the mount. Permissions are always checked.
        commit_interval_s: longest time of changes that a crash may lose (C5).
        snapshots: how `.snapshots` appears at the root of the mount.
        cache_bytes: limit of the node cache.
        dirty_bytes_max: limit of data in memory that waits for a commit.
        discard: give freed blocks back to the host.
        log: where the daemon logs.
        suid, dev, executable: the options suid, dev and exec of mount(8).
        generation: an older generation to mount read-only; None for the newest.
        snapshot: a snapshot to mount read-only; None for the live volume.
        xattrs: support extended attributes.
        acls: support POSIX ACLs. They are xattrs, so they need `xattrs`.
        access_times: update atime by the rules of relatime; False is noatime.
        strict_access_times: update atime at every read that reaches the daemon (strictatime).
        writeback: let the kernel keep written data for a while before it sends it to the daemon.
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


# Options without a value, and the fields that each sets. mount(8) does not pass its defaults `suid`
# and `dev` to its helper; `setuid` and `devices` mean the same and are passed.
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
    """Apply the text of `-o` to options. If two options of the text contradict, the last one wins.

    Args:
        text: `name,name=value,...`; empty words are skipped.
        options: the options to start from.
        sloppy: skip unknown options, as -s of mount(8) asks.

    Raises:
        UsageError: an option is unknown or has an impossible value; the message names it.
    """
    settings: dict[str, Any] = {}
    words = [word for word in (word.strip() for word in text.split(",")) if word]
    if "remount" in words:
        raise UsageError(
            "remount works only with mount(8): mount -o remount,ro DIR; for other options "
            "unmount it, and mount it again"
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
    """All mount options of cowfs itself, as they are written: `ro`, `commit=`, `log=stderr`."""
    words = list(_SWITCHES)
    for name in _VALUES:
        words += [f"{name}={choice}" for choice in _CHOICES.get(name, ("",))]
    return words


def parse_size(text: str) -> int:
    """Parse a size as people write it: 4G, 4GiB, 512M, 1.5 t, 4096. Units are powers of 1024.

    Returns:
        Bytes.

    Raises:
        UsageError: the text is not a size.
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
        raise UsageError(f"mount option {name}={value} is not a generation number")
    return int(value)


def _name(name: str, value: str) -> str:
    if not value:
        raise UsageError(f"mount option {name} needs a value: {name}=...")
    return value


_CHOICES = {"snapshots": ("hidden", "visible", "disabled"), "log": ("stderr", "journald")}

# Options with a value: the field that each sets, and the function that parses the value.
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
