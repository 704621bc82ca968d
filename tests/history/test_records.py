"""Promises that every record of the catalog survives a round trip, and that damage is refused.

There is one test case for each reason that a decoder can give.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from cowfs.errors import CorruptError, UsageError
from cowfs.history.records import (
    COUNTER_MAX,
    DROP_BYTES,
    ROOT_BYTES,
    ROOT_ID_MAX,
    DropRecord,
    DropStep,
    RootKind,
    RootRecord,
    check_snapshot_name,
    decode_drop,
    decode_id,
    decode_root,
    drop_key,
    encode_id,
    root_key,
    snapshot_key,
    volume_key,
)
from cowfs.storage.format import GENERATION_MAX, NODE_BLOCKS, NODE_LEVEL_MAX, Pointer

U32 = st.integers(0, (1 << 32) - 1)
U64 = st.integers(0, (1 << 64) - 1)
COUNTER = st.integers(0, COUNTER_MAX)
I64 = st.integers(-(1 << 63), (1 << 63) - 1)
UUIDS = st.binary(min_size=16, max_size=16)
POINTERS = st.builds(Pointer, U64, U64, U64, UUIDS)


def is_name(text: str) -> bool:
    try:
        check_snapshot_name(text)
    except UsageError:
        return False
    return True


NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=60).filter(is_name)
ROOTS = st.builds(
    RootRecord,
    root_id=st.integers(1, ROOT_ID_MAX),
    kind=st.sampled_from(RootKind),
    name=NAMES,
    uuid=UUIDS,
    tree=POINTERS,
    created_generation=st.integers(0, GENERATION_MAX),
    created_ns=I64,
    next_ino=COUNTER,
    node_count=COUNTER,
    data_blocks=COUNTER,
    inode_count=COUNTER,
    parent_id=U64,
    undo_id=U64,
    origin_uuid=UUIDS,
    flags=st.integers(0, 7),
    description=st.text(st.characters(codec="utf-8"), max_size=200),
).filter(lambda root: root.kind is RootKind.SNAPSHOT or not root.held)


# --- root ---------------------------------------------------------------------------------------


@given(ROOTS)
def test_root_round_trip(root: RootRecord) -> None:
    """Promise: every member survives; the encoded length is known before encoding."""
    data = root.encode()
    assert decode_root(data) == root
    assert len(root) == len(data)
    assert root.automatic == bool(root.flags & 1)
    assert root.shares == bool(root.flags & 2)
    assert root.held == bool(root.flags & 4)


def root(**changes: object) -> RootRecord:
    record = RootRecord(
        root_id=5,
        kind=RootKind.SNAPSHOT,
        name="monday",
        uuid=bytes(16),
        tree=Pointer(64, 68, 3, bytes(16)),
        created_generation=3,
        created_ns=4,
        next_ino=2,
        node_count=7,
        data_blocks=100,
        inode_count=1,
        description="x",
    )
    return replace(record, **changes)


@pytest.mark.parametrize("member", ["next_ino", "node_count", "data_blocks", "inode_count"])
def test_root_counter_out_of_range_is_refused(member: str) -> None:
    """Promise: counting on from an image's number never exceeds 64 bits."""
    decode_root(root(**{member: COUNTER_MAX}).encode())
    with pytest.raises(CorruptError, match="out of range"):
        decode_root(root(**{member: COUNTER_MAX + 1}).encode())


def test_referenced_blocks_count_nodes_with_their_twins() -> None:
    """Promise: referenced blocks count whole nodes with their twins, and data (accounting.md)."""
    assert root().referenced_blocks(2) == 7 * NODE_BLOCKS * 2 + 100
    assert root().referenced_blocks(1) == 7 * NODE_BLOCKS + 100


def test_root_takes_the_pointer_of_a_tree_that_is_written_later() -> None:
    """Promise: a root record may be made before its tree is written; the pointer comes later."""

    class Later:
        def pointer(self) -> Pointer:
            return Pointer(80, 84, 3, b"sixteen-bytes-ok")

    assert decode_root(root(tree=Later()).encode()).tree == Later().pointer()


def changed(at: int, value: bytes) -> bytes:
    data = root().encode()
    return data[:at] + value + data[at + len(value) :]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"", "cut short"),
        (root().encode()[: ROOT_BYTES - 1], "cut short"),
        (root().encode()[:-1], "wrong length"),
        (root().encode() + b"?", "wrong length"),
        (changed(8, b"\0"), "unknown kind"),
        (changed(8, b"\3"), "unknown kind"),
        (changed(0, bytes(8)), "unknown kind"),
        (changed(12, b"\x08"), "unknown flags"),
        (root(kind=RootKind.VOLUME, flags=4).encode(), "a volume is held"),
        (changed(9, b"\1"), "reserved bytes are not zero"),
        (changed(10, b"\1"), "reserved bytes are not zero"),
        (changed(160, b"\1"), "reserved bytes are not zero"),
        (changed(170, b"\1"), "reserved bytes are not zero"),
        (changed(180, b"\1"), "reserved bytes are not zero"),
        (changed(182, b"\1"), "reserved bytes are not zero"),
        (changed(ROOT_BYTES, b"\xff"), "impossible name"),
        (changed(ROOT_BYTES, b"/"), "impossible name"),
        (changed(ROOT_BYTES + 6, b"\xff"), "impossible name"),
    ],
)
def test_impossible_root_is_refused(value: bytes, reason: str) -> None:
    """Promise: each member of a root record is checked."""
    with pytest.raises(CorruptError, match=reason):
        decode_root(value)


# --- names and keys -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("", "must not be empty"),
        ("x" * 256, "too long: 256 bytes, at most 255"),
        ("é" * 128, "too long: 256 bytes"),
        (".", "cannot be named"),
        ("..", "cannot be named"),
        ("a/b", "must not contain /"),
        ("a\nb", "control characters"),
        ("a\x9bb", "control characters"),
        ("a\u2028b", "control characters"),
        ("50%", "% or ,"),
        ("a,b", "% or ,"),
        ("-a", "must not begin with -"),
        ("\udcff", "not valid UTF-8"),
    ],
)
def test_name_that_breaks_a_rule_is_refused_with_the_rule(name: str, rule: str) -> None:
    """Promise: the message says what to change, and is safe to print."""
    with pytest.raises(UsageError, match=rule) as caught:
        check_snapshot_name(name)
    assert str(caught.value).isprintable()


def test_longest_name_and_odd_names_are_fine() -> None:
    """Promise: the longest names and unusual names are allowed."""
    for name in ("x" * 255, "é" * 127, "a b", "...", "日曜日", "a-b", "#1"):
        assert check_snapshot_name(name) == name


@given(U64, U64)
def test_keys_sort_by_number(first: int, second: int) -> None:
    """Promise: roots and drops are listed in the order in which they were made."""
    assert (root_key(first) < root_key(second)) == (first < second)
    assert (drop_key(first) < drop_key(second)) == (first < second)
    assert decode_id(encode_id(first)) == first


def test_kinds_of_keys_are_apart() -> None:
    """Promise: a snapshot and a volume may have the same name."""
    keys = {root_key(1), drop_key(1), snapshot_key("a"), volume_key("a")}
    assert len({key[:1] for key in keys}) == 4


def test_root_id_of_a_wrong_length_is_refused() -> None:
    """Promise: a snapshot's name leads to a root id of the right length, or to an error."""
    for length in (0, 7, 9):
        with pytest.raises(CorruptError, match="root id has the wrong length"):
            decode_id(bytes(length))


# --- drop queue ---------------------------------------------------------------------------------


@given(
    COUNTER,
    U64,
    st.text(st.characters(codec="utf-8"), max_size=60),
    I64,
    COUNTER,
    st.lists(st.builds(DropStep, POINTERS, U32), min_size=1, max_size=NODE_LEVEL_MAX + 1),
    COUNTER,
)
def test_drop_round_trip(
    number: int,
    root_id: int,
    name: str,
    deleted_ns: int,
    freed_blocks: int,
    path: list[DropStep],
    referenced_blocks: int,
) -> None:
    """Promise: the progress of a deletion survives a round trip."""
    record = DropRecord(
        number, root_id, name, deleted_ns, freed_blocks, tuple(path), referenced_blocks
    )
    data = record.encode()
    assert decode_drop(data) == record
    assert len(record) == len(data)


STEP = DropStep(Pointer(64, 68, 3, bytes(16)), 2)
DROP = DropRecord(1, 5, "gone", 4, 0, (STEP, STEP))


@pytest.mark.parametrize("member", ["number", "freed_blocks", "referenced_blocks"])
def test_drop_counter_out_of_range_is_refused(member: str) -> None:
    """Promise: the counters of a deletion are checked too."""
    decode_drop(replace(DROP, **{member: COUNTER_MAX}).encode())
    with pytest.raises(CorruptError, match="out of range"):
        decode_drop(replace(DROP, **{member: COUNTER_MAX + 1}).encode())


def test_drop_with_another_path_keeps_the_rest() -> None:
    """Promise: progress changes the path and the count, nothing else."""
    moved = DROP.with_path((STEP,), 77)
    assert (moved.path, moved.freed_blocks) == ((STEP,), 77)
    assert replace(moved, path=DROP.path, freed_blocks=DROP.freed_blocks) == DROP


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (DROP.encode()[: DROP_BYTES - 1], "cut short"),
        (DROP.encode()[:-1], "wrong length"),
        (DROP.encode()[:41] + b"\1" + DROP.encode()[42:], "wrong length"),
        (replace(DROP, path=()).encode(), "path length out of range"),
        (replace(DROP, path=(STEP,) * (NODE_LEVEL_MAX + 2)).encode(), "path length out of range"),
        (
            DROP.encode()[:DROP_BYTES] + b"\xff" + DROP.encode()[DROP_BYTES + 1 :],
            "impossible name",
        ),
    ],
)
def test_impossible_drop_is_refused(value: bytes, reason: str) -> None:
    """Promise: a deletion resumes from a valid record or not at all."""
    with pytest.raises(CorruptError, match=reason):
        decode_drop(value)
