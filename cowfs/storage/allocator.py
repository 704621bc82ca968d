"""The allocator: finds free runs in the space map.

Data, nodes and the twins of nodes have groups of their own as long as unused groups are left. So
metadata stays dense, and one damaged stretch of the image does not hit both twins. Each kind fills
the lowest groups that have room: a sparse image stays compact, and large writes get long runs.
"""

import numpy as np

from cowfs.errors import NoSpaceError
from cowfs.storage.format import GROUP_BLOCKS, KIND_DATA, KIND_NODES, KIND_NONE, KIND_TWINS
from cowfs.storage.runs import Run
from cowfs.storage.spacemap import SpaceMap

# A large request first looks for groups with this many free blocks (1 MiB).
ROOMY_BLOCKS = 256


class Allocator:
    """Allocates runs of a space map. Keeps a cursor for each kind, in memory only."""

    def __init__(self, space_map: SpaceMap) -> None:
        self._map = space_map
        self._cursors = {KIND_DATA: -1, KIND_NODES: -1, KIND_TWINS: -1}

    def allocate(self, kind: int, count: int, unit: int = 1, *, system: bool = False) -> list[Run]:
        """Allocate `count` blocks as runs inside groups, each a multiple of `unit` long.

        Args:
            kind: KIND_DATA, KIND_NODES or KIND_TWINS.
            count: blocks, a multiple of `unit`.
            unit: blocks that must be in a row.
            system: for pages of the space map, which have no refcounts.

        Raises:
            NoSpaceError: not enough room. The runs taken before stay taken: the caller's
                transaction must not go on.
        """
        take = self._map.take_system if system else self._map.take
        free = b"\0" * unit
        runs = []
        cursor = self._cursors[kind]
        full: set[int] = set()
        while count:
            number, at = divmod(cursor, GROUP_BLOCKS) if cursor >= 0 else (-1, 0)
            found = -1
            if number >= 0 and self._map.free[number] >= unit:
                busy = self._map.group(number).busy
                found = busy.find(free, at)
                if found < 0 and at:
                    found = busy.find(free)
            if found < 0:
                if number >= 0:
                    full.add(number)
                cursor = self._next_group(kind, count, unit, full) * GROUP_BLOCKS
                continue
            stop = busy.find(1, found)
            length = (stop if stop >= 0 else GROUP_BLOCKS) - found
            length = min(count, length - length % unit)
            first = number * GROUP_BLOCKS + found
            take(first, length, kind)
            runs.append((first, length))
            count -= length
            # The cursor stays in this group, also at its end: the next search wraps around in it.
            cursor = min(first + length, (number + 1) * GROUP_BLOCKS - 1)
        self._cursors[kind] = cursor
        return runs

    def _next_group(self, kind: int, count: int, unit: int, full: set[int]) -> int:
        """The group to allocate from next.

        First choice: of this kind or unused, with room for most of the request. Then one with room
        for a unit. Last, a group of another kind.
        """
        space, kinds = self._map.free, self._map.kinds
        own = (kinds == kind) | (kinds == KIND_NONE)
        roomy = min(count, ROOMY_BLOCKS)
        for mask in (own & (space >= max(roomy, unit)), own & (space >= unit), space >= unit):
            mask[list(full)] = False
            number = int(np.argmax(mask))
            if mask[number]:
                return number
        raise NoSpaceError("the image has no free block left")
