"""Terminal output of text and SGR sequences as cells."""

import re
from dataclasses import dataclass, replace
from typing import Any

from rich.cells import cell_len

PIECES = re.compile(r"\x1b\[([\d;:]*)m|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|[\x0e\x0f]|([^\x1b])")

Colour = int | tuple[int, int, int] | None
"""A number of the 256 colours, red, green and blue, or the terminal's own."""


@dataclass(frozen=True)
class Style:
    """The attributes of a cell."""

    fore: Colour = None
    back: Colour = None
    bold: bool = False
    dim: bool = False
    italic: bool = False
    underline: bool = False
    reverse: bool = False


@dataclass(frozen=True)
class Cell:
    """A character with its style. The second cell of a wide character has no text."""

    text: str
    style: Style


ON = {1: "bold", 2: "dim", 3: "italic", 4: "underline", 7: "reverse"}
OFF = {22: ("bold", "dim"), 23: ("italic",), 24: ("underline",), 27: ("reverse",)}


def cells_of(output: str) -> list[list[Cell]]:
    """The lines of an output that has no sequences but SGR."""
    style = Style()
    rows = []
    for line in output.splitlines():
        row: list[Cell] = []
        for found in PIECES.finditer(line):
            parameters, char = found.groups()
            if parameters is not None:
                style = _styled(style, [int(n or 0) for n in re.split("[;:]", parameters)])
            elif char is not None:
                row += [Cell(char, style), *[Cell("", style)] * (cell_len(char) - 1)]
        rows.append(row)
    return rows


def _replaced(style: Style, name: str, value: Any) -> Style:
    return replace(style, **{name: value})


def _styled(style: Style, numbers: list[int]) -> Style:
    while numbers:
        n, numbers = numbers[0], numbers[1:]
        if n == 0:
            style = Style()
        elif n in ON:
            style = _replaced(style, ON[n], value=True)
        elif n in OFF:
            for name in OFF[n]:
                style = _replaced(style, name, value=False)
        elif n in (38, 48):
            size = 2 if numbers[0] == 5 else 4
            given, numbers = numbers[1:size], numbers[size:]
            colour: Colour = given[0] if size == 2 else (given[0], given[1], given[2])
            style = _replaced(style, "fore" if n == 38 else "back", colour)
        elif n in (39, 49):
            style = _replaced(style, "fore" if n == 39 else "back", None)
        else:
            for first, name, base in ((30, "fore", 0), (40, "back", 0), (90, "fore", 8),
                                      (100, "back", 8)):  # fmt: skip
                if first <= n < first + 8:
                    style = _replaced(style, name, n - first + base)
    return style
