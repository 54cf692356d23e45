"""Line breaking."""

from rich.cells import cell_len

from rlhf_tui.text import sanitise


def wrap(text: str, width: int) -> list[str]:
    """Sanitised text in lines of at most `width` cells, broken between words if possible."""
    lines: list[str] = []
    for paragraph in sanitise(text).replace("\t", "    ").split("\n"):
        line, used = "", 0
        for word in paragraph.split(" "):
            size = cell_len(word)
            if line and used + 1 + size > width:
                lines.append(line)
                line, used = "", 0
            line, used = (f"{line} {word}", used + 1 + size) if line else (word, size)
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
