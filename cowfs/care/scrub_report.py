"""What a scrub found, as values, and the marks of what it has read.

Imports no numpy: commands that only show a result start fast.
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct

# What a file may say: a result is kept between commands, and is not trusted.
Number = Annotated[int, Meta(ge=0, le=(1 << 62))]
State = Literal["running", "finished", "interrupted"]


class BadCopy(Struct, frozen=True, kw_only=True):
    """A bad copy of a node, a page or a slot whose other copy is good.

    `kind` is "node", "page" or "slot". The checksum, in hex, is that of the pointer at it; a slot has
    none.
    """

    kind: str
    bad_block: int
    good_block: int
    birth: int = 0
    checksum: str = ""


class Damage(Struct, frozen=True, kw_only=True):
    """Something that no copy is good of: what it is, where, and the paths at which it is met.

    A path is that in the live volume (/a/b), or below .snapshots/NAME.
    """

    what: str
    block: Number
    paths: tuple[str, ...] = ()


class ScrubReport(Struct, frozen=True, kw_only=True):
    """How far a scrub is, or how it ended. Sizes count copies: what is kept twice is read twice.

    `state` is "running", "finished" or "interrupted". `repaired`: bad copies written again, and found
    good; `unrepaired`: bad copies with a good twin that were not (read-only, or the device refused).
    """

    uuid: str
    image: str
    state: State
    generation: Number
    started_ns: Number
    ended_ns: Number = 0
    done_bytes: Number = 0
    total_bytes: Number = 0
    bad_copies: Number = 0
    repaired: Number = 0
    unrepaired: Number = 0
    damaged: Number = 0
    damage: tuple[Damage, ...] = ()

    @property
    def clean(self) -> bool:
        """Nothing is left that is wrong."""
        return not (self.damaged or self.unrepaired)


class Marks:
    """Which blocks were read, one bit each.

    Attributes:
        generation: marks count for what was born in it or before.
    """

    def __init__(self, total_blocks: int, generation: int, bits: bytes | None = None) -> None:
        size = -(-total_blocks // 8)
        self.generation = generation
        self.bits = bytearray(size) if bits is None or len(bits) != size else bytearray(bits)
        self._newer: set[int] = set()

    def has(self, block: int, birth: int) -> bool:
        if birth > self.generation:
            return block in self._newer
        return bool(self.bits[block >> 3] >> (block & 7) & 1)

    def add(self, block: int, birth: int) -> None:
        if birth > self.generation:
            self._newer.add(block)
        else:
            self.bits[block >> 3] |= 1 << (block & 7)
