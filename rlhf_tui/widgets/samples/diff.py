"""Which words two texts have in common, and a text broken into lines with the others marked."""

import re
from typing import NamedTuple

from rich.cells import cell_len

from rlhf_tui.text import sanitise
from rlhf_tui.widgets.lines import Piece, Row
from rlhf_tui.widgets.wrap import pieces

MOST = 4000
"""Words of a text that are compared; two of that length take a hundredth of a second."""
_WORD = re.compile(r"[^ \n]+")
_PART = re.compile(r"\n| +|[^ \n]+")


def words_of(text: str) -> list[str]:
    """The words as they are compared and drawn: what stands between blanks and line ends."""
    return _WORD.findall(_plain(text))


class Own(NamedTuple):
    """The words that only one of two texts has, by their places."""

    mine: set[int]
    theirs: set[int]
    common: int
    """How many both have."""
    cut: bool
    """Whether one of them has more words than were compared."""


def own_words(one: str, other: str) -> Own:
    """Compares two texts word by word.

    What both have is a longest common subsequence. Only the first :data:`MOST` words are compared.
    """
    a, b = words_of(one), words_of(other)
    cut = max(len(a), len(b)) > MOST
    a, b = a[:MOST], b[:MOST]
    in_a, in_b = in_common(a, b)
    return Own(set(range(len(a))) - in_a, set(range(len(b))) - in_b, len(in_a), cut)


def in_common(a: list[str], b: list[str]) -> tuple[set[int], set[int]]:
    """The places in two lists of a longest common subsequence.

    One row of bits for each word of `a` (Hyyrö 2004): len(a) steps, whatever the words are. difflib
    takes 24 s for 2,000 words that are but two, repeated: the answers that most need to be read.
    """
    places: dict[str, int] = {}
    for j, word in enumerate(b):
        places[word] = places.get(word, 0) | 1 << j
    every = (1 << len(b)) - 1
    # Bit j of row i is 0 where b[j] makes the longest one of a[:i] and b[:j + 1] longer.
    rows = [every]
    for word in a:
        row = rows[-1]
        both = row & places.get(word, 0)
        rows.append(((row + both) | (row - both)) & every)
    in_a, in_b = set[int](), set[int]()
    i, j = len(a), len(b)
    while i and j:
        if a[i - 1] == b[j - 1]:
            i, j = i - 1, j - 1
            in_a.add(i)
            in_b.add(j)
        elif rows[i] >> (j - 1) & 1:
            j -= 1
        else:
            i -= 1
    return in_a, in_b


def marked_lines(text: str, own: set[int], tone: str, width: int) -> list[Row]:
    """A text in lines of a width, its own words in a tone, and the blanks between two of them."""
    lines: list[list[Piece]] = [[]]
    used, word, before = 0, -1, False
    blank = ""
    for part in _PART.findall(_plain(text)):
        if part == "\n":
            lines.append([])
            used, blank, before = 0, "", False
            continue
        if part[0] == " ":
            blank = part
            continue
        word += 1
        marked = word in own
        if used and used + len(blank) + cell_len(part) > width:
            lines.append([])
            used, blank = 0, ""
        if blank:
            blank = blank[:width]
            lines[-1].append((blank, tone if marked and before else ""))
            used += len(blank)
        fits = used + cell_len(part) <= width
        for piece in [part] if fits else pieces(part, width):
            if used + cell_len(piece) > width:
                lines.append([])
                used = 0
            lines[-1].append((piece, tone if marked else ""))
            used += cell_len(piece)
        blank, before = "", marked
    return list(lines)


def _plain(text: str) -> str:
    return sanitise(text).replace("\t", "    ")
