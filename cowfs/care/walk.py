"""Walks the trees of an image: every distinct node once, however many roots share it.

The walk counts a reference for every pointer of every distinct node (I1), and checks births (I4),
keys, levels, bounds and cycles (I5) on every edge, also on those to nodes met before. It holds no
node after leaving it, only its facts, so its memory is proportional to the number of distinct
nodes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from cowfs.care.contents import Contents, TreePart
from cowfs.care.reader import INTACT, MetadataReader
from cowfs.care.references import ROLE_NODE, References, pointer_fault
from cowfs.care.report import CheckProgress, Findings
from cowfs.history.records import DropRecord
from cowfs.storage.format import (
    NODE_BLOCKS,
    NodeImage,
    Pointer,
    Superblock,
    decode_pointer,
)

PROGRESS_BLOCKS = 4096  # between two calls of the progress function


@dataclass(slots=True)
class NodeFacts:
    """What is remembered of a node that was visited.

    `first_key` and `last_key` are those of everything below it, empty when there is nothing.
    `broken` says that something below could not be read, so that sums over it prove nothing.
    """

    pointer: Pointer
    level: int
    catalog: bool
    first_key: bytes = b""
    last_key: bytes = b""
    nodes: int = 1
    empty: bool = False
    broken: bool = False
    is_open: bool = False
    part: TreePart | None = None
    children: "tuple[NodeFacts, ...]" = ()


@dataclass(slots=True)
class _Frame:
    """An inner node on the path of the walk, and its children so far."""

    facts: NodeFacts
    image: NodeImage
    next_index: int
    children: list[NodeFacts | None] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """An entry of the catalog, with the birth and place of the leaf that holds it."""

    key: bytes
    value: bytes
    birth: int
    block: int


class Walk:
    """One walk over one generation of an image.

    Attributes:
        incomplete: something could not be read, so references are missing from the count.
        catalog: the entries of the catalog's leaves, after that was walked.
        node_count: distinct nodes that were read.
    """

    def __init__(
        self,
        reader: MetadataReader,
        superblock: Superblock,
        references: References,
        contents: Contents,
        findings: Findings,
        progress: Callable[[CheckProgress], None] | None,
    ) -> None:
        self.incomplete = False
        self.catalog: list[CatalogEntry] = []
        self.node_count = 0
        self._reader = reader
        self._superblock = superblock
        self._references = references
        self._contents = contents
        self._findings = findings
        self._progress = progress
        self._facts: dict[int, NodeFacts] = {}
        self._dropped: dict[int, int] = {}
        self._done_blocks = 0
        self._told_blocks = 0

    def expect_drop(self, record: DropRecord) -> None:
        """Note which entries of the nodes on the path of a half-done drop no longer count."""
        for number, step in enumerate(record.path):
            if step.done or number + 1 < len(record.path):
                self._dropped[step.pointer.block] = step.done

    def root(self, pointer: Pointer, birth: int, *, catalog: bool = False) -> NodeFacts | None:
        """Count one reference to a root and walk what is below it; None if it cannot be read.

        Args:
            pointer: of the root node.
            birth: of the superblock, or of the catalog leaf that holds the pointer.
        """
        self._tell(force=True)
        frames: list[_Frame] = []
        top = self._arrive(pointer, birth, None, catalog, frames)
        while frames:
            frame = frames[-1]
            index = frame.next_index
            if index < len(frame.image.keys):
                frame.next_index += 1
                child = decode_pointer(frame.image.values[index])
                frame.children.append(
                    self._arrive(
                        child, frame.facts.pointer.birth, frame.facts.level - 1, catalog, frames
                    )
                )
            else:
                frames.pop()
                self._leave(frame)
        self._tell(force=True)
        return top

    def has_met(self, pointer: Pointer) -> bool:
        """Whether that very node was walked."""
        facts = self._facts.get(pointer.block)
        return facts is not None and facts.pointer == pointer

    def drop_path(self, record: DropRecord) -> None:
        """Check that each step of a drop record is an entry of the step before it (I1)."""
        before: tuple[NodeImage, int] | None = None
        for step in record.path:
            level = None if before is None else before[0].level - 1
            if before is not None:
                image, done = before
                values = image.values
                if not image.level or done >= len(values):
                    self._findings.error(
                        "I1",
                        f"a drop record goes on below entry {done}, which is none",
                        block=image.block,
                    )
                    return
                if decode_pointer(values[done]) != step.pointer:
                    self._findings.error(
                        "I1", f"a drop record's next step is not entry {done}", block=image.block
                    )
                    return
            if pointer_fault(
                step.pointer, NODE_BLOCKS, self._superblock.generation, self._superblock
            ):
                return  # the walk tells
            found = self._reader.node(step.pointer, level, _ignore)
            if found is None:
                return  # the walk tells
            if step.done > len(found.keys):
                self._findings.error(
                    "I1",
                    f"a drop record has dropped {step.done} entries of {len(found.keys)}",
                    block=found.block,
                )
                return
            before = found, step.done

    def _arrive(
        self,
        pointer: Pointer,
        birth: int,
        level: int | None,
        catalog: bool,
        frames: list[_Frame],
    ) -> NodeFacts | None:
        """Count a pointer at a node; if it is new, read it and do a leaf's work or push a frame."""
        findings = self._findings
        fault = pointer_fault(pointer, NODE_BLOCKS, birth, self._superblock)
        parent = frames[-1].image.block if frames else pointer.block
        if fault is not None:
            findings.error(*fault, block=parent)
            if fault[0] != "I4":
                self.incomplete = True
                return None
        self._references.add(pointer.block, NODE_BLOCKS)
        if pointer.twin:
            self._references.add(pointer.twin, NODE_BLOCKS)
        facts = self._facts.get(pointer.block)
        if facts is not None:
            return self._met_again(facts, pointer, level, catalog, parent)
        image = self._reader.node(pointer, level, self._damage)
        facts = NodeFacts(pointer, image.level if image else level or 0, catalog)
        self._facts[pointer.block] = facts
        self._mark(pointer)
        if image is None:
            self.incomplete = True
            facts.broken = True
            return facts
        self.node_count += 1
        dropped = self._dropped.get(pointer.block, 0)
        if image.level:
            facts.is_open = True
            facts.first_key = image.keys[0]
            frames.append(_Frame(facts, image, dropped))
            return facts
        if image.keys:
            facts.first_key, facts.last_key = image.keys[0], image.keys[-1]
        else:
            facts.empty = True
        if catalog:
            self.catalog += [
                CatalogEntry(key, value, image.birth, image.block)
                for key, value in zip(image.keys, image.values, strict=True)
            ]
        else:
            facts.part, fresh = self._contents.leaf(image, dropped)
            self._done_blocks += fresh
            self._tell()
        return facts

    def _met_again(
        self, facts: NodeFacts, pointer: Pointer, level: int | None, catalog: bool, parent: int
    ) -> NodeFacts | None:
        findings = self._findings
        if facts.is_open:
            findings.error("I5", f"a cycle: block {pointer.block} is above itself", block=parent)
            return None
        if facts.pointer != pointer:
            findings.error(
                "I5",
                f"two pointers at block {pointer.block} disagree: {_words(pointer)}, "
                f"but {_words(facts.pointer)}",
                block=parent,
            )
        if level is not None and facts.level != level and not facts.broken:
            findings.error(
                "I5", f"level is wrong, found {facts.level}, expected {level}", block=pointer.block
            )
        if facts.catalog != catalog:
            findings.error(
                "I5", "a node belongs to the catalog and to a volume", block=pointer.block
            )
            return None
        if pointer.block in self._dropped:
            findings.error(
                "I1", "a half-dropped node has more than one pointer", block=pointer.block
            )
        return facts

    def _leave(self, frame: _Frame) -> None:
        """All children of an inner node are known: check the keys of its edges, and sum up."""
        facts, image, findings = frame.facts, frame.image, self._findings
        facts.is_open = False
        children = [child for child in frame.children if child is not None]
        facts.children = tuple(children)
        facts.nodes = 1 + sum(child.nodes for child in children)
        facts.broken = len(children) < len(frame.children) or any(
            child.broken for child in children
        )
        start = len(image.keys) - len(frame.children)
        for index, child in enumerate(frame.children, start):
            if child is None or child.broken:
                continue
            if child.empty:
                findings.error("I5", "a leaf below the root is empty", block=child.pointer.block)
                continue
            # The first key of a node bounds nothing; what is below it is bound by the parent's key.
            if index and child.first_key < image.keys[index]:
                findings.error(
                    "I5",
                    f"key {child.first_key.hex()} of the child at block {child.pointer.block} is "
                    f"below its bound {image.keys[index].hex()}",
                    block=image.block,
                )
            if index + 1 < len(image.keys) and child.last_key >= image.keys[index + 1]:
                findings.error(
                    "I5",
                    f"key {child.last_key.hex()} below the child at block {child.pointer.block} is "
                    f"not below the next bound {image.keys[index + 1].hex()}",
                    block=image.block,
                )
        facts.last_key = max((child.last_key for child in children), default=b"")
        if children and not facts.broken:
            facts.first_key = children[0].first_key
        if not facts.catalog and not facts.broken:
            parts = [child.part for child in children if child.part is not None]
            facts.part = self._contents.join(parts)

    def _mark(self, pointer: Pointer) -> None:
        for block in (pointer.block, pointer.twin):
            if block:
                fresh, clash = self._references.mark(block, NODE_BLOCKS, ROLE_NODE)
                self._done_blocks += fresh
                if clash:
                    self._findings.error(
                        "I5", "a node lies on data or on another node", block=block
                    )
        self._tell()

    def _damage(self, invariant: str, what: str, block: int) -> None:
        self._findings.error(invariant, what, block=block, repairable=what.endswith(INTACT))

    def _tell(self, *, force: bool = False) -> None:
        if self._progress is None:
            return
        if force or self._done_blocks - self._told_blocks >= PROGRESS_BLOCKS:
            self._told_blocks = self._done_blocks
            self._progress(
                CheckProgress(self._findings.root, self._done_blocks, self._superblock.used_blocks)
            )


def _words(pointer: Pointer) -> str:
    return f"twin {pointer.twin}, birth {pointer.birth}, checksum {pointer.checksum.hex()}"


def _ignore(_invariant: str, _what: str, _block: int) -> None:
    """For reads whose damage another read has told or will tell."""
