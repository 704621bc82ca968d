"""Runs of blocks, each as (first block, count)."""

import numpy as np

from cowfs.storage.format import GROUP_BLOCKS

Run = tuple[int, int]


def split_run(first: int, count: int) -> list[tuple[int, int, int]]:
    """Cut a run at group boundaries: (group, offset in it, count) of each part."""
    number, at = divmod(first, GROUP_BLOCKS)
    if at + count <= GROUP_BLOCKS:
        return [(number, at, count)]
    parts = []
    while count:
        here = min(count, GROUP_BLOCKS - at)
        parts.append((number, at, here))
        count -= here
        number, at = number + 1, 0
    return parts


def zero_runs(part: np.ndarray, base: int) -> list[Run]:
    """The runs of zeros in `part`, whose first element stands for block `base`."""
    edges = np.flatnonzero(np.diff(np.concatenate(([1], part, [1])) == 0)).tolist()
    return [
        (base + start, stop - start) for start, stop in zip(edges[::2], edges[1::2], strict=True)
    ]


def merge_runs(runs: list[Run]) -> list[Run]:
    """Join sorted runs that touch or overlap."""
    merged: list[Run] = []
    for first, count in runs:
        if merged and merged[-1][0] + merged[-1][1] >= first:
            start, before = merged[-1]
            merged[-1] = (start, max(before, first + count - start))
        else:
            merged.append((first, count))
    return merged
