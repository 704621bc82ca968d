"""Promises that mount options do what they say, and that unknown ones are refused by name."""

import re
from dataclasses import replace
from typing import Any

import pytest

from cowfs.cli.mounting import mount
from cowfs.daemon.options import MountOptions, option_words, parse_options, parse_size
from cowfs.errors import UsageError

BASE = MountOptions(image="/i", mountpoint="/m")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("ro", {"read_only": True}),
        ("ro,rw", {"read_only": False}),
        ("allow_other", {"allow_other": True}),
        ("commit=0.5", {"commit_interval_s": 0.5}),
        ("snapshots=visible", {"snapshots": "visible"}),
        ("cache=1GiB,dirty=64M", {"cache_bytes": 1 << 30, "dirty_bytes_max": 64 << 20}),
        ("nodiscard", {"discard": False}),
        ("suid,dev", {"suid": True, "dev": True}),
        ("suid,nosuid,dev,nodev", {}),
        ("setuid,devices", {"suid": True, "dev": True}),
        ("devices,nodevices,suid,nosetuid", {}),
        ("noexec", {"executable": False}),
        ("strictatime", {"strict_access_times": True}),
        ("strictatime,relatime", {}),
        ("noatime,strictatime", {"strict_access_times": True}),
        ("strictatime,noatime", {"access_times": False}),
        ("strictatime,nostrictatime", {}),
        ("log=journald", {"log": "journald"}),
        ("generation=12", {"generation": 12, "read_only": True}),
        ("noxattrs", {"xattrs": False}),
        ("noacl", {"acls": False}),
        ("noacl,acl", {}),
        ("defaults,auto,noauto,user,users,_netdev,nofail,noatime,relatime", {}),
        ("x-systemd.automount,x-gvfs-show,comment=a word, ,fsname=a,subtype=b", {}),
    ],
)
def test_options_set_what_they_name(text: str, expected: dict[str, Any]) -> None:
    """Promise: each option sets its field and no other; the words of mount(8) are accepted."""
    assert parse_options(text, BASE) == replace(BASE, **expected)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("frob", "'frob'"),
        ("ro,frob=1,rw", "'frob=1'"),
        ("sync", "'sync'"),
        ("ro=1", "'ro=1'"),
        ("commit", "commit needs a value"),
        ("commit=", "commit="),
        ("commit=-1", "commit=-1"),
        ("commit=inf", "commit=inf"),
        ("cache=", "cache"),
        ("cache=1M", "at least 4M"),
        ("snapshots=", "hidden, visible, disabled"),
        ("generation=0", "generation=0"),
        ("generation=-1", "generation=-1"),
        ("rw,generation=1", "contradict"),
    ],
)
def test_impossible_options_are_refused_by_name(text: str, says: str) -> None:
    """Promise: an invalid option is refused by name; only -s of mount(8) may skip one."""
    with pytest.raises(UsageError, match=says):
        parse_options(text, BASE)


def test_sloppy_skips_only_what_is_unknown() -> None:
    """Promise: -s skips unknown words but refuses wrong values."""
    assert parse_options("frob,ro", BASE, sloppy=True) == replace(BASE, read_only=True)
    with pytest.raises(UsageError):
        parse_options("commit=x", BASE, sloppy=True)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("4096", 4096),
        ("4k", 4096),
        ("4 KiB", 4096),
        ("4KB", 4096),
        ("1.5m", 3 << 19),
        ("2T", 2 << 40),
        ("1 PiB", 1 << 50),
        ("0", 0),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, size_bytes: int) -> None:
    """Promise: sizes use powers of 1024, with or without iB, in upper or lower case."""
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["", " ", "M", "1.M", ".5M", "1e3", "1 2", "4X", "٤", "0x10", "1M1"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    """Promise: a word that is not a size is refused."""
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text)


def test_snapshot_is_read_only_and_has_no_snapshots_below() -> None:
    """Promise: the mount of a snapshot is read-only, and contradicting options are named."""
    found = parse_options("snapshot=monday,generation=7", BASE)
    assert found == replace(
        BASE, snapshot="monday", generation=7, read_only=True, snapshots="disabled"
    )
    for text in ("snapshot=a,rw", "snapshot=a,snapshots=visible", "snapshot=", "snapshot"):
        with pytest.raises(UsageError, match="snapshot"):
            parse_options(text, BASE)


@pytest.mark.parametrize("sloppy", [False, True])
def test_remount_is_refused_also_among_words_that_only_a_kernel_knows(sloppy: bool) -> None:
    """Promise: the refusal names the remount, whatever words mount(8) adds from /proc."""
    with pytest.raises(UsageError, match="unmount it, and mount it again"):
        parse_options("rw,user_id=0,remount,ro", BASE, sloppy=sloppy)


def test_every_option_is_in_the_help_of_mount() -> None:
    """Promise: `cowfs mount --help` lists every option (except old spellings and opposites)."""
    assert mount.help is not None
    shown = set(re.findall(r"[a-z_]+=?[a-z]*", mount.help.partition("Words that")[0]))
    assert set(option_words()) - shown == {"commit_interval=", "user_xattr", "nouser_xattr"}
