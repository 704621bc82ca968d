r"""Bytes as text, and back: for names, paths and messages from a host or an image.

A path of the host, and a name in an image, are bytes, mostly UTF-8. Three forms of them are text:

- A *host path* is a `str` as Python has it from the command line or the kernel: each byte that is
  not UTF-8 is a lone surrogate (`os.fsdecode`). It goes to the kernel, and nowhere else.
- An *escaped* name goes into messages, JSON and reports. Each byte that is not UTF-8, and each byte
  of a character that does not print, is written as \xNN, and a backslash as \\. The result is valid
  Unicode on one line, has no control sequences for a terminal, and can be turned back into the
  bytes.
- *Printable* text is a message for people with a name inside. It cannot be turned back.

This file imports nothing of cowfs.
"""

import os
import re
import shlex

_ESCAPE = re.compile(rb"\\(?:\\|x([0-9a-f]{2}))")


def escaped(name: bytes) -> str:
    """Escape a name: valid Unicode that prints on one line."""
    text = name.decode("utf-8", "surrogateescape")
    if text.isprintable() and "\\" not in text:
        return text
    return "".join("\\\\" if character == "\\" else _shown(character) for character in text)


def unescaped(text: str) -> bytes:
    """Undo `escaped`. Raises UnicodeEncodeError for text that `escaped` never makes."""
    return _ESCAPE.sub(
        lambda match: b"\\" if match[1] is None else bytes([int(match[1], 16)]), text.encode()
    )


def escaped_path(path: str | os.PathLike[str]) -> str:
    """Escape a path of the host."""
    return escaped(os.fsencode(path))


def host_path(text: str) -> str:
    """Undo `escaped_path`. Raises as `unescaped`."""
    return os.fsdecode(unescaped(text))


def printable(text: str) -> str:
    """Make text printable on one line: control characters and lone surrogates are escaped."""
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
    """A word that the user gave, printable and in single quotes; cut at `length_max`."""
    return f"'{printable(text[:length_max])}'" + "..." * (len(text) > length_max)


def encodable(text: str) -> str:
    r"""Make text encodable as UTF-8: lone surrogates become \xNN or \uNNNN, the rest stays."""
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
    r"""Quote a host path or a name for a shell; unprintable bytes as in $'\xff'."""
    if path.isprintable():
        return shlex.quote(path)
    shown = (f"\\{character}" if character in "\\'" else _shown(character) for character in path)
    return f"$'{''.join(shown)}'"


def _is_byte(character: str) -> bool:
    """Whether the character is a lone surrogate that stands for a byte that is not UTF-8."""
    return "\udc80" <= character <= "\udcff"


def _shown(character: str) -> str:
    r"""The character, or \xNN for each of its bytes."""
    if character.isprintable():
        return character
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape"))
