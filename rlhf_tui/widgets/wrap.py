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
            while used > width:
                cut = next(i for i in range(len(line), 0, -1) if cell_len(line[:i]) <= width)
                found.append(line[:cut])
                line = line[cut:]
                used = cell_len(line)
        found.append(line)
    return found
