"""How `cowdu top` writes sizes, times and names into a limited width."""

import time

from rich.cells import cell_len

from cowfs.cli.entry import error_text
from cowfs.cli.output import Numbers
from cowfs.escapes import printable

from .choosing import LIVE
from .rows import Usage

RECENT_NS = 300 * 24 * 3600 * 10**9  # older times are shown with their year

NUMBERS = Numbers()


def short_size(size_bytes: int) -> str:
    """Format a size in at most eight characters."""
    size, unit = float(size_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    digits = 1 if unit != "B" and size < 99.95 else 0
    return f"{size:.{digits}f} {unit}"


def whole_size(size_bytes: int) -> str:
    """Format a size as people read it, and to the byte."""
    if size_bytes < 1024:
        return f"{size_bytes} bytes"
    return f"{NUMBERS.size(size_bytes)} ({size_bytes:,} bytes)"


def short_time(time_ns: int) -> str:
    """Format a time in up to eleven characters: month, day and time of day; or the date."""
    text = NUMBERS.time(time_ns)
    if abs(time.time_ns() - time_ns) < RECENT_NS:
        return text[5:16]
    return text[:10]


def shorter(text: str, cells: int) -> str:
    """Cut the middle out of a text longer than `cells`: generated names differ at the end."""
    if cell_len(text) <= cells:
        return text
    start, end = text[: cells // 2], text[-(cells // 2) :]
    while cell_len(start) + 1 + cell_len(end) > cells:
        start, end = (start[:-1], end) if cell_len(start) >= cell_len(end) else (start, end[1:])
    return f"{start}…{end}"


def shown_root(usage: Usage, *, live: bool) -> str:
    """The name of a root for the screen."""
    return LIVE if live else printable(usage.name)


def shown_error(error: OSError) -> str:
    """Describe an error in one line for the screen."""
    return printable(error_text(error))
