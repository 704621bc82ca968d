"""Walks the trees of an image: every distinct node once, however many roots share it.

The walk counts a reference for every pointer of every distinct node (I1). On every edge, also one
to a node visited before, it checks births (I4), keys, levels, bounds and cycles (I5). Of a node
that it has left it keeps only a `NodeFacts`, so its memory grows with the number of distinct nodes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from cowfs.care.contents import Contents, TreePart
from cowfs.care.reader import INTACT, MetadataReader, ignore_damage
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
    """What the walk keeps of a node that it visited.

    Attributes:
        level: as read; of an unreadable node, the level that its pointer implies.
        catalog: the node belongs to the catalog, not to a volume or snapshot.
        first_key, last_key: of everything below the node; empty bytes when there is nothing.
        nodes: how many nodes the subtree has, shared ones counted at each place.
        empty: a leaf without entries.
        broken: the node or a node below it could not be read, so sums over it prove nothing.
        is_open: the walk is below the node; a pointer at an open node closes a cycle.
        part: the sums over the subtree; None in the catalog, and where the subtree is broken.
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
    """An inner node on the path of the walk, and its children visited so far."""

    facts: NodeFacts
    image: NodeImage
    next_index: int
    children: list[NodeFacts | None] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """An entry of the catalog, with the birth and block of the leaf that holds it."""

    key: bytes
    value: bytes
    birth: int
    block: int


class Walk:
    """One walk over one generation of an image.

    Attributes:
        incomplete: a node could not be read, so references are missing from the count.
        catalog: the entries of the catalog's leaves, once the catalog was walked.
        node_count: distinct nodes read so far.
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
        self._reported_blocks = 0

    def expect_drop(self, record: DropRecord) -> None:
        """Skip the entries that a half-done drop has already dropped, in the nodes of its path.

        Call this before any root is walked that could reach these nodes.
        """
        for number, step in enumerate(record.path):
            if step.done or number + 1 < len(record.path):
                self._dropped[step.pointer.block] = step.done

    def root(self, pointer: Pointer, birth: int, *, catalog: bool = False) -> NodeFacts | None:
        """Count one reference to a root node, and walk the tree below it.

        Args:
            pointer: the pointer at the root node.
            birth: the superblock's generation, or the birth of the catalog leaf with the pointer.
            catalog: the tree is the catalog.

        Returns:
            None if the pointer cannot be followed. A root node that cannot be read is `broken`.
        """
        self._report_progress(force=True)
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
        self._report_progress(force=True)
        return top

    def has_visited(self, pointer: Pointer) -> bool:
        """Whether a pointer equal to this one was followed."""
        facts = self._facts.get(pointer.block)
        return facts is not None and facts.pointer == pointer

    def drop_path(self, record: DropRecord) -> None:
        """Check that each step of a drop record is the next entry of the step before it (I1)."""
        before: tuple[NodeImage, int] | None = None
        for step in record.path:
            level = None if before is None else before[0].level - 1
            if before is not None:
                image, done = before
                values = image.values
                if not image.level or done >= len(values):
                    self._findings.error(
                        "I1",
                        f"a drop record goes on below entry {done}, which does not exist",
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
                return  # the walk reports it
            found = self._reader.node(step.pointer, level, ignore_damage)
            if found is None:
                return  # the walk reports it
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
        """Count a pointer at a node, and read the node if it is new.

        A leaf is checked at once; for an inner node a frame is pushed on `frames`.
        """
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
            return self._visit_again(facts, pointer, level, catalog, parent)
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
            self._report_progress()
        return facts

    def _visit_again(
        self, facts: NodeFacts, pointer: Pointer, level: int | None, catalog: bool, parent: int
    ) -> NodeFacts | None:
        """Compare one more pointer at a node with what is known of the node."""
        findings = self._findings
        if facts.is_open:
            findings.error("I5", f"a cycle: block {pointer.block} is above itself", block=parent)
            return None
        if facts.pointer != pointer:
            findings.error(
                "I5",
                f"two pointers at block {pointer.block} disagree: {_described(pointer)}, "
                f"but {_described(facts.pointer)}",
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
        """Check the key bounds of an inner node whose children were all visited, and sum up."""
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
            # The first key of a node bounds nothing: the parent's key bounds the first child.
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
                    f"not less than the next bound {image.keys[index + 1].hex()}",
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
        self._report_progress()

    def _damage(self, invariant: str, what: str, block: int) -> None:
        self._findings.error(invariant, what, block=block, repairable=what.endswith(INTACT))

    def _report_progress(self, *, force: bool = False) -> None:
        if self._progress is None:
            return
        if force or self._done_blocks - self._reported_blocks >= PROGRESS_BLOCKS:
            self._reported_blocks = self._done_blocks
            self._progress(
                CheckProgress(self._findings.root, self._done_blocks, self._superblock.used_blocks)
            )


def _described(pointer: Pointer) -> str:
    return f"twin {pointer.twin}, birth {pointer.birth}, checksum {pointer.checksum.hex()}"
