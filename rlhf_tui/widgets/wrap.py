"""Text broken into lines."""

from rich.cells import cell_len

from rlhf_tui.text import sanitise


def wrap(text: str, width: int) -> list[str]:
    """Text in lines, broken between words, where one is too long within it."""
    found: list[str] = []
    for paragraph in sanitise(text).replace("\t", "    ").split("\n"):
        line, used = "", 0
        for word in paragraph.split(" "):
            size = cell_len(word)
            if line and used + 1 + size > width:
                found.append(line)
                line, used = "", 0
            line, used = (f"{line} {word}", used + 1 + size) if line else (word, size)
            if used > width:
                *full, line = pieces(line, width)
                found += full
                used = cell_len(line)
        found.append(line)
    return found


def pieces(word: str, width: int) -> list[str]:
    """A text in pieces of at most `width` cells; one look at each character, however long it is."""
    found, start, size = [], 0, 0
    for i, char in enumerate(word):
        wide = cell_len(char)
        if size + wide > width and i > start:
            found.append(word[start:i])
            start, size = i, 0
        size += wide
    return [*found, word[start:]]
