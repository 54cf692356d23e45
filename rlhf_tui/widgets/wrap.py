"""Line breaking."""

import re

from rich.cells import cell_len

from rlhf_tui.text import one_line, sanitise
from rlhf_tui.widgets.lines import Piece, Row, row_width

_WORDS = re.compile(r" *[^ ]+| +")


def wrap(text: str, width: int) -> list[str]:
    """Sanitised text in lines of at most `width` cells, broken between words if possible.

    Lines keep their indentation, up to half of the width. One leading space of the first line is
    dropped: with most tokenizers a response begins with one.
    """
    lines: list[str] = []
    text = sanitise(text).replace("\t", "    ").removeprefix(" ")
    for paragraph in text.split("\n"):
        words = paragraph.lstrip(" ")
        used = min(len(paragraph) - len(words), width // 2) if words else 0
        line, empty = " " * used, True
        for word in words.split(" "):
            size = cell_len(word)
            if not empty and used + 1 + size > width:
                lines.append(line)
                line, used, empty = "", 0, True
            joint = "" if empty else " "
            line, used = f"{line}{joint}{word}", used + len(joint) + size
            empty = empty and not word
            if used > width:
                *full, line = pieces(line, width)
                lines += full
                used = cell_len(line)
        lines.append(line)
    return lines


def pieces(word: str, width: int) -> list[str]:
    """A word in pieces of at most `width` cells, in linear time."""
    found, start, size = [], 0, 0
    for i, char in enumerate(word):
        wide = cell_len(char)
        if size + wide > width and i > start:
            found.append(word[start:i])
            start, size = i, 0
        size += wide
    return [*found, word[start:]]


def wrap_row(row: Row, width: int) -> list[Row]:
    """A row in as many rows of at most `width` cells as it needs; each word keeps its tone."""
    if row_width(row) <= width:
        return [row]
    lines: list[list[Piece]] = [[]]
    used = 0
    for text, tone in row:
        for word in _WORDS.findall(one_line(text)):
            if used and used + cell_len(word) > width:
                lines.append([])
                word, used = word.lstrip(" "), 0
            *full, rest = pieces(word, width)
            for piece in full:
                lines[-1].append((piece, tone))
                lines.append([])
            lines[-1].append((rest, tone))
            used = cell_len(rest) if full else used + cell_len(rest)
    return list(lines)
