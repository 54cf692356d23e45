"""Shortens what Textual sends to the terminal.

Textual ends each segment of a line with a reset and begins the next one with all of its style. The
driver here sends only what differs, which takes a third off a frame.
"""

import functools
import re

from textual.drivers.linux_driver import LinuxDriver

_SEGMENT = re.compile(r"\x1b\[([\d;]+)m([^\x1b]*)\x1b\[0m")
_MOVES = re.compile(r"(?:\x1b\[\d+;\d+H)*")
ATTRIBUTES, FOREGROUND, BACKGROUND = 0, 1, 2


class CompactDriver(LinuxDriver):
    """Textual's driver for Linux and macOS, with shorter changes of style."""

    def write(self, data: str) -> None:
        """Writes data in its shorter form."""
        super().write(compact(data))


def compact(data: str) -> str:
    """Merges the reset after a segment with the style of the segment that follows it.

    Between the two may be moves of the cursor, which paint nothing. Text and all other sequences
    stay as they are. The last of such segments is still reset, so nothing depends on the data
    before or after.
    """
    out: list[str] = []
    end, style = 0, ""
    for found in _SEGMENT.finditer(data):
        start = found.start()
        if style and _MOVES.fullmatch(data, end, start):
            out[-1] = data[end:start] + change(style, found[1])  # in place of the reset
        else:
            out += [data[end:start], f"\x1b[{found[1]}m"]
        style = found[1]
        out += [found[2], "\x1b[0m"]
        end = found.end()
    return "".join([*out, data[end:]]) if out else data


@functools.lru_cache(maxsize=4096)
def change(old: str, new: str) -> str:
    """The sequence that leads from one style to another.

    Args:
        old: parameters of the sequence that set the present style, after a reset.
        new: parameters of the wanted style.
    """
    before, after = _parts(old), _parts(new)
    if before[ATTRIBUTES] != after[ATTRIBUTES] or any(
        a and not b for a, b in zip(before, after, strict=True)
    ):
        return f"\x1b[0;{new}m"
    changed = ";".join(b for a, b in zip(before, after, strict=True) if a != b)
    return f"\x1b[{changed}m" if changed else ""


def _parts(parameters: str) -> tuple[str, str, str]:
    """The attributes, the foreground and the background of a style."""
    parts: list[list[str]] = [[], [], []]
    values = parameters.split(";")
    while values:
        size = {"5": 3, "2": 5}.get(values[1], 1) if values[0] in ("38", "48") else 1
        taken, values = values[:size], values[size:]
        number = int(taken[0] or 0)
        kind = ATTRIBUTES
        if 30 <= number <= 39 or 90 <= number <= 97:
            kind = FOREGROUND
        elif 40 <= number <= 49 or 100 <= number <= 107:
            kind = BACKGROUND
        parts[kind] += taken
    return ";".join(parts[0]), ";".join(parts[1]), ";".join(parts[2])
