"""The result of a scrub, as values, and the marks of the blocks that it has read.

This file imports no numpy, so that commands that only show a result start fast.
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct

# The range of numbers in a result. Results are kept in files, which are not trusted.
Number = Annotated[int, Meta(ge=0, le=(1 << 62))]
State = Literal["running", "finished", "interrupted"]


class BadCopy(Struct, frozen=True, kw_only=True):
    """A bad copy of a node, page or slot whose other copy is good.

    Attributes:
        kind: "node", "page" or "slot".
        birth: of the pointer at it; of a slot the generation of the good copy.
        checksum: of the pointer at it, in hex; "" for a slot.
    """

    kind: str
    bad_block: int
    good_block: int
    birth: int = 0
    checksum: str = ""


class Damage(Struct, frozen=True, kw_only=True):
    """A node, page or data block without a good copy.

    Attributes:
        what: what it is, in words.
        paths: of the files concerned, escaped: /a/b in the live volume, /.snapshots/NAME/a/b in a
            snapshot.
    """

    what: str
    block: Number
    paths: tuple[str, ...] = ()


class ScrubReport(Struct, frozen=True, kw_only=True):
    """How far a scrub is, or how it ended.

    Attributes:
        image: the path of the image.
        done_bytes, total_bytes: of everything that is kept twice, both copies are counted.
        bad_copies: how many bad copies with a good twin were found.
        repaired: how many of them were rewritten and then verified.
        unrepaired: how many were not (read-only, or the device refused); 0 while the scrub runs.
        damaged: how many nodes, pages and data blocks have no good copy.
        damage: the first DAMAGE_MAX of these (scrub.py).
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
        """Whether nothing is damaged, and every bad copy was repaired."""
        return not (self.damaged or self.unrepaired)


class Marks:
    """The blocks that were read and found good, one bit each.

    A bit counts only for a block born in `generation` or before. Newer blocks are in a set of
    their own, which is not saved: a scrub that goes on reads them again.

    Args:
        total_blocks: of the image.
        generation: the one that the scrub began with.
        bits: those of a saved scrub; ignored if their length does not fit.
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
