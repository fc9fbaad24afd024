"""How the commands word what they print: aligned rows, bars, percentages, and names that must fit."""

import math
from collections.abc import Mapping


def aligned(rows: Mapping[str, str], width: int = 12) -> list[str]:
    """Return a line for each row: its name, filled up to `width` characters, and its text."""
    return [f"{name:{width}}{text}" for name, text in rows.items()]


def bar(share: float, width: int) -> str:
    """Draw a share of 1 as up to `width` signs; a share above 0 always shows."""
    return "#" * math.ceil(width * share)


def percent(share: float) -> str:
    """Word a share of 1, as in 12.5 %."""
    return f"{100 * share:.1f} %"


def on_one_line(text: str) -> str:
    """Write line breaks and other characters that do not print, which names of files may hold, as escapes."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def shortened(text: str, most: int) -> str:
    """Put text on one line of at most `most` characters. It is cut in the middle: keys tend to differ at both ends."""
    text = " ".join(text.split())
    tail = (most - 3) // 2
    return text if len(text) <= most else f"{text[: most - 3 - tail]}...{text[-tail:]}"
