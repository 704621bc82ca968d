r"""Bytes as text, and back: the one place for names, paths and words that a host or an image gives.

A path of a host, and a name in an image, is bytes, mostly UTF-8. Three forms of them are text:

- a *host path*: a `str` as Python has it from the command line or the kernel, where a byte that is not
  text is a lone surrogate (`os.fsdecode`). It goes to the kernel, and nowhere else.
- an *escaped* name: what goes into messages, JSON and reports. A byte that is no UTF-8, and each byte
  of a character that does not print, stands there as \xNN, a backslash as \\. It is valid Unicode, one
  line, no terminal obeys it, and it can be turned back into the same bytes.
- *words* for people, of which a name is a part: `printable`. They are not turned back.

This file imports nothing of cowfs.
"""

import os
import re
import shlex

_ESCAPE = re.compile(rb"\\(?:\\|x([0-9a-f]{2}))")


def escaped(name: bytes) -> str:
    """A name as text that is valid Unicode and prints on one line."""
    text = name.decode("utf-8", "surrogateescape")
    if text.isprintable() and "\\" not in text:
        return text
    return "".join("\\\\" if character == "\\" else _shown(character) for character in text)


def unescaped(text: str) -> bytes:
    """The bytes that `escaped` made a text of. Raises UnicodeEncodeError for what it never makes."""
    return _ESCAPE.sub(
        lambda match: b"\\" if match[1] is None else bytes([int(match[1], 16)]), text.encode()
    )


def escaped_path(path: str | os.PathLike[str]) -> str:
    """A path of the host, escaped."""
    return escaped(os.fsencode(path))


def host_path(text: str) -> str:
    """The path of the host that `escaped_path` made a text of. Raises as `unescaped`."""
    return os.fsdecode(unescaped(text))


def printable(text: str) -> str:
    """Words on one line, with whatever a terminal might obey, or is no text, as escapes."""
    if text.isprintable():
        return text
    return "".join(
        character
        if character.isprintable()
        else _shown(character)
        if _is_byte(character)
        else character.encode("unicode_escape", "surrogatepass").decode("ascii")
        for character in text
    )


def quoted(text: str, length_max: int = 80) -> str:
    """A word of the user in single quotes, for a message; cut where it is long."""
    return f"'{printable(text[:length_max])}'" + "..." * (len(text) > length_max)


def encodable(text: str) -> str:
    r"""The text with bytes that are not text as \xNN, and the rest as it is, lines too."""
    if text.isascii():
        return text
    return "".join(
        _shown(character)
        if _is_byte(character)
        else f"\\u{ord(character):04x}"
        if "\ud800" <= character <= "\udfff"
        else character
        for character in text
    )


def shell_word(path: str) -> str:
    r"""A host path, or a name, as a word for a shell: also with bytes that nobody can type ($'\xff')."""
    if path.isprintable():
        return shlex.quote(path)
    shown = (f"\\{character}" if character in "\\'" else _shown(character) for character in path)
    return f"$'{''.join(shown)}'"


def _is_byte(character: str) -> bool:
    return "\udc80" <= character <= "\udcff"


def _shown(character: str) -> str:
    r"""The character, or \xNN for each of its bytes."""
    if character.isprintable():
        return character
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape"))
