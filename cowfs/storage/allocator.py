"""The allocator: finds free runs in the space map.

Data, nodes and the twins of nodes live in groups of their own as long as there are groups to choose
from, so that metadata stays dense and a damaged stretch of image does not hit both twins. Within a
kind it fills the lowest groups that have room, which keeps a sparse image compact and gives large
writes long runs.
"""

import numpy as np

from cowfs.errors import NoSpaceError
from cowfs.storage.format import GROUP_BLOCKS, KIND_DATA, KIND_NODES, KIND_NONE, KIND_TWINS
from cowfs.storage.runs import Run
from cowfs.storage.spacemap import SpaceMap

# A large request looks first for groups with this much room: runs of 1 MiB and more.
ROOMY_BLOCKS = 256


class Allocator:
    """Takes runs from a space map. One cursor for each kind, forgotten when the image is closed."""

    def __init__(self, space_map: SpaceMap) -> None:
        self._map = space_map
        self._cursors = {KIND_DATA: -1, KIND_NODES: -1, KIND_TWINS: -1}

    def allocate(self, kind: int, count: int, unit: int = 1, *, system: bool = False) -> list[Run]:
        """Take `count` blocks as runs whose lengths are multiples of `unit`, none across a group.

        Args:
            kind: KIND_DATA, KIND_NODES or KIND_TWINS.
            count: blocks, a multiple of `unit`.
            system: for the space map itself: not counted in it.

        Raises:
            NoSpaceError: not that many; what was taken until then is given back by the caller's
                failing transaction, which must not go on.
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
            # The group's last block is where the search goes on when it is used up: it then wraps.
            cursor = min(first + length, (number + 1) * GROUP_BLOCKS - 1)
        self._cursors[kind] = cursor
        return runs

    def _next_group(self, kind: int, count: int, unit: int, full: set[int]) -> int:
        """The group to go on in: own kind or unused, with room; at last any that has a free unit."""
        space, kinds = self._map.free, self._map.kinds
        own = (kinds == kind) | (kinds == KIND_NONE)
        roomy = min(count, ROOMY_BLOCKS)
        for mask in (own & (space >= max(roomy, unit)), own & (space >= unit), space >= unit):
            mask[list(full)] = False
            number = int(np.argmax(mask))
            if mask[number]:
                return number
        raise NoSpaceError("no free block is left in the image")
