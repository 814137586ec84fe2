"""What people read in a terminal: times and sizes in units that suit them, and modest colours.

Colours are for a terminal only: what goes into a pipe or a file has none, nor has anything where
`NO_COLOR` (no-color.org) is set or the terminal says that it is dumb.
"""

import os
import sys
from typing import Any, TextIO

BOLD, DIM, RED, GREEN, YELLOW = "1", "2", "31", "32", "33"

# The units of time, with how many of the next smaller one each has.
UNITS = (("days", 86_400, "h", 3_600), ("h", 3_600, "min", 60), ("min", 60, "s", 1))


def duration(seconds: float) -> str:
    """A length of time: `0.3 s`, `45 s`, `12 min`, `1 h 20 min`, `3 days 4 h`."""
    for unit, size, smaller, smaller_size in UNITS:
        if seconds >= 10 * size:
            return f"{seconds / size:.0f} {unit}"
        # Rounded to the smaller unit first, so that there is no `1 h 60 min`.
        whole, rest = divmod(round(seconds / smaller_size), size // smaller_size)
        if whole:
            unit = unit.removesuffix("s") if whole == 1 else unit
            return f"{whole} {unit}" + (f" {rest} {smaller}" if rest else "")
    digits = 0 if seconds >= 9.95 else 1 if seconds >= 0.095 else 2
    return f"{round(seconds, digits):g} s"


def ago(seconds: float) -> str:
    """How long ago something was, in the one unit that suits it: `3 h ago`."""
    for unit, size, _, _ in UNITS:
        if seconds >= size:
            count = round(seconds / size)
            return f"{count} {unit if count > 1 else unit.removesuffix('s')} ago"
    return f"{max(seconds, 0):.0f} s ago"


def counted(count: int, what: str) -> str:
    """So many of something: `1 step`, `1,000 steps`."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def size(count: float) -> str:
    """A number of bytes: `512 bytes`, `11.6 MB`; a megabyte is 10⁶ bytes."""
    if count < 1_000:
        return f"{count:.0f} bytes"
    unit = "bytes"
    for larger in ("kB", "MB", "GB"):
        if count >= 999.5:
            count, unit = count / 1_000, larger
    return f"{count:.1f} {unit}" if count < 99.95 else f"{count:.0f} {unit}"


def styled(text: str, style: str, stream: TextIO | None = None) -> str:
    """The text in a style, if the stream (standard output where none is said) shows styles."""
    return f"\x1b[{style}m{text}\x1b[0m" if shows_styles(stream or sys.stdout) else text


def printable(values: Any) -> Any:
    """Plain data, somebody else's say, whose texts have no line ends and nothing that a terminal
    obeys.
    """
    if isinstance(values, dict):
        return {printable(key): printable(value) for key, value in values.items()}
    if isinstance(values, list):
        return [printable(value) for value in values]
    if not isinstance(values, str) or values.isprintable():
        return values
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in values)


def printable_lines(text: str) -> str:
    """A text of several lines, in which a file or a name may be quoted, without what is more."""
    return "\n".join(map(printable, text.split("\n")))


def shows_styles(stream: TextIO) -> bool:
    """Whether a stream is a terminal that may have colours."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return stream.isatty()
