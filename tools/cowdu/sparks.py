"""Draws small bars in one row of text."""

from collections.abc import Sequence

BARS = "▁▂▃▄▅▆▇█"
WIDTH_MAX = 60


def spark_line(values: Sequence[int], encoding: str | None, width: int = WIDTH_MAX) -> str:
    """Draw values as bars; if there are more than `width`, a bar is the largest of its neighbours.

    Returns:
        The bars; "" if the terminal's encoding lacks the characters.
    """
    try:
        BARS.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return ""
    count = min(len(values), width)
    groups = [
        max(values[number * len(values) // count : (number + 1) * len(values) // count])
        for number in range(count)
    ]
    most = max(groups, default=0)
    if not most:
        return BARS[0] * count
    return "".join(BARS[-(-value * (len(BARS) - 1) // most)] for value in groups)
