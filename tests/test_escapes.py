"""Promises of names as text: any bytes become one printable line and come back unchanged."""

import os
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowfs.daemon import messages
from cowfs.errors import BusyError, CorruptError, UsageError
from cowfs.escapes import (
    encodable,
    escaped,
    escaped_path,
    host_path,
    printable,
    quoted,
    shell_word,
    unescaped,
)
from cowfs.history import edits
from tests.sizes import HANG_SECONDS

NAMES = st.binary(max_size=40) | st.text(max_size=20).map(
    lambda text: text.encode(errors="replace")
)
TEXTS = st.text(st.characters(exclude_categories=()), max_size=20)


@given(name=NAMES)
def test_escaped_name_is_one_line_of_text_and_comes_back(name: bytes) -> None:
    """Promise: an escaped name is printable Unicode; unescaping it gives the same bytes."""
    text = escaped(name)
    assert text.encode().decode() == text
    assert text.isprintable()
    assert unescaped(text) == name


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (b"plain and spaced", "plain and spaced"),
        ("käse 日本".encode(), "käse 日本"),
        (b"\xff\xfe", r"\xff\xfe"),
        (b"a\\xff", r"a\\xff"),
        (b"line\nbreak\x1b[2J", r"line\x0abreak\x1b[2J"),
        ("\u202eturned".encode(), r"\xe2\x80\xaeturned"),
    ],
)
def test_escaped_name_is_what_people_expect(name: bytes, text: str) -> None:
    """Promise: printable characters stay as they are; all others are escaped by their bytes."""
    assert escaped(name) == text
    assert unescaped(text) == name
    assert host_path(escaped_path(os.fsdecode(name))) == os.fsdecode(name)


@given(text=TEXTS)
def test_words_with_any_character_can_be_printed_and_sent(text: str) -> None:
    """Promise: no lone surrogate keeps a message from being printed or sent."""
    assert printable(text).isprintable()
    printable(text).encode()
    encodable(text).encode()
    assert quoted(text, 5).isprintable()
    if text.isprintable():
        assert printable(text) == encodable(text) == text


def test_words_show_bytes_that_are_no_text_by_their_value() -> None:
    """Promise: an invalid byte shows as \\xff; only a log keeps line breaks."""
    word = os.fsdecode(b"a\xff\nb")
    assert printable(word) == r"a\xff\nb"
    assert encodable(word) == "a\\xff\nb"
    assert quoted(word) == r"'a\xff\nb'"
    assert quoted("n" * 90, 40) == f"'{'n' * 40}'..."
    assert encodable("\ud800") == r"\ud800"


@given(name=st.binary(min_size=1, max_size=20).filter(lambda name: b"\0" not in name))
def test_shell_word_is_that_name_to_a_shell(name: bytes) -> None:
    """Promise: a printed command can be pasted into a shell, whatever bytes a path has."""
    word = shell_word(os.fsdecode(name))
    assert word.isprintable()
    told = subprocess.run(
        ["bash", "-c", f"printf %s {word}"], capture_output=True, check=True, timeout=HANG_SECONDS
    )
    assert told.stdout == name


def test_error_with_bytes_that_are_no_text_arrives() -> None:
    """Promise: an error that names a file with invalid bytes arrives as the same kind of error."""
    for error in (
        BusyError(os.fsdecode(b"files are open: /mnt/\xff")),
        CorruptError(os.fsdecode(b"node \xff"), 7, "checksum is wrong"),
    ):
        sent = messages.message_of(error)
        arrived = messages.error_of(messages.msgspec.convert(sent, messages.ErrorMessage))
        messages.msgspec.json.encode(sent)
        assert type(arrived) is type(error)
        assert r"\xff" in str(arrived)


def test_request_that_cannot_be_text_is_refused_in_words() -> None:
    """Promise: text that no image could store is a usage error that shows the text."""
    bad = os.fsdecode(b"d\xff")
    for request, says in (
        (edits.CreateSnapshot(name=bad), r"snapshot name 'd\\xff' is not valid UTF-8"),
        (edits.Rollback(name=bad), r"snapshot name 'd\\xff' is not valid UTF-8"),
        (edits.DeleteSnapshots(names=("a", bad)), r"snapshot name 'd\\xff' is not"),
        (
            edits.CreateSnapshot(name="good", description=bad),
            r"the description 'd\\xff' is not valid UTF-8",
        ),
    ):
        with pytest.raises(UsageError, match=says):
            messages.encode_request(request)
