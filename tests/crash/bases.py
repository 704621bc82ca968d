"""The images that workloads begin with, each made by a workload of its own, and their models.

All have the smallest allowed size. Each is made once per seed, and the same seed gives the same
image.
"""

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from unittest import mock

import cowfs.storage.discards as discards_module
from cowfs.history.images import make_filesystem
from cowfs.storage.format import MIN_TOTAL_BLOCKS
from tests.crash.recording import Blocks, RecordingDevice
from tests.crash.workloads import Session
from tests.model.reference import ReferenceHistory

TOTAL_BLOCKS = MIN_TOTAL_BLOCKS
FIRST_NS = 1_700_000_000 * 10**9

FLAT = (
    "mkdir A",
    "mkdir B",
    "mkdir A/sub",
    "mkdir A/empty",
    "mkdir B/empty",
    "create A/foo",
    "write A/foo 0 12000",
    "create B/bar",
    "write B/bar 0 6000",
    "create A/inline",
    "write A/inline 0 1500",
    "create A/sparse",
    "write A/sparse 40000 3000",
    "setxattr A/foo user.old 20",
    "create A/sub/deep",
    "write A/sub/deep 0 5000",
    "fsync",
    "snapshot old",
    "write A/foo 4096 4096",
    "create B/later",
    "snapshot middle",
    "write B/bar 0 100",
    "symlink B/link ../A/foo",
    "fsync",
)
# Inline files fill leaves quickly, so the tree has more than one level.
LEAVES = (
    "mkdir C",
    *[f"{do}" for at in range(9) for do in (f"create C/{at}", f"write C/{at} 0 2000")],
)
BASES = {
    "flat": (*FLAT, "end"),
    "deep": (*LEAVES, *FLAT, "write C/3 0 2000", "write C/7 100 50", "fsync", "end"),
    # A rollback that can be undone, and a tree of which half is shared.
    "turned": (*LEAVES[:9], *FLAT, "write A/foo 0 300", "rollback middle", "write C/1 0 9", "end"),
    # Stopped in the middle of reclaiming a snapshot, with unlinked files open.
    "busy": (
        *LEAVES,
        *FLAT,
        "snapshot gone",
        *[f"write C/{at} 0 1999" for at in range(9)],
        "create A/open",
        "write A/open 0 20000",
        "setxattr A/open user.x 3000",
        "unlink-open A/open",
        "delete gone",
        "drop 3",
        "fsync",
    ),
    # Metadata in one copy.
    "single": (*LEAVES, *FLAT, "end"),
}


@dataclass(frozen=True, slots=True)
class Base:
    """An image and the model of it. Neither may be changed."""

    blocks: Blocks
    history: ReferenceHistory


@contextmanager
def repeatable(seed: int) -> Iterator[None]:
    """Make clock and random numbers repeatable, and let even single blocks be discarded."""
    choice = random.Random(seed)
    now_ns = FIRST_NS

    def time_ns() -> int:
        nonlocal now_ns
        now_ns += 1000
        return now_ns

    with (
        mock.patch.object(os, "urandom", choice.randbytes),
        mock.patch.object(time, "time_ns", time_ns),
        mock.patch.object(discards_module, "DISCARD_BLOCKS_MIN", 1),
    ):
        yield


@lru_cache(maxsize=16)
def base(name: str, seed: int) -> Base:
    """The base image of that name; another seed gives other checksums and other hashes of names."""
    with repeatable(seed):
        device = RecordingDevice(TOTAL_BLOCKS, {})
        make_filesystem(device, duplicate_metadata=name != "single")
        session = Session(device, ReferenceHistory())
        session.run(BASES[name])
    return Base(device.durable_content(), session.model)
