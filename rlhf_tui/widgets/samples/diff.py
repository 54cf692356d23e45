"""Word diff of two texts, and line breaking with the differing words marked."""

import re
from typing import NamedTuple

from rich.cells import cell_len

from rlhf_tui.text import sanitise
from rlhf_tui.widgets.lines import Piece, Row
from rlhf_tui.widgets.wrap import pieces

MAX_WORDS = 4000
"""Words of a text that are compared. Two texts of this length take about 10 ms."""
_WORD = re.compile(r"[^ \n]+")
_PART = re.compile(r"\n| +|[^ \n]+")


def words_of(text: str) -> list[str]:
    """The words of the sanitised text, separated by blanks and newlines."""
    return _WORD.findall(_plain(text))


class WordDiff(NamedTuple):
    """The words that only one of two texts has, by position."""

    mine: set[int]
    theirs: set[int]
    common: int
    """The number of common words."""
    cut: bool
    """Whether a text has more words than are compared."""


def diff_words(one: str, other: str) -> WordDiff:
    """Compares two texts word by word.

    The common words are a longest common subsequence. Only the first :data:`MAX_WORDS` words are
    compared.
    """
    a, b = words_of(one), words_of(other)
    cut = max(len(a), len(b)) > MAX_WORDS
    a, b = a[:MAX_WORDS], b[:MAX_WORDS]
    in_a, in_b = longest_common_subsequence(a, b)
    return WordDiff(set(range(len(a))) - in_a, set(range(len(b))) - in_b, len(in_a), cut)


def longest_common_subsequence(a: list[str], b: list[str]) -> tuple[set[int], set[int]]:
    """The positions in both lists of a longest common subsequence.

    Bit-parallel, with one row of len(b) bits per word of `a` (Hyyrö 2004): the time does not depend
    on the words. difflib takes 24 s for 2,000 words that repeat the same two; such repetitive
    responses are compared often.
    """
    positions: dict[str, int] = {}
    for j, word in enumerate(b):
        positions[word] = positions.get(word, 0) | 1 << j
    all_bits = (1 << len(b)) - 1
    # Bit j of row i is 0 if b[j] extends the longest common subsequence of a[:i] and b[:j + 1].
    rows = [all_bits]
    for word in a:
        row = rows[-1]
        both = row & positions.get(word, 0)
        rows.append(((row + both) | (row - both)) & all_bits)
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


def marked_lines(text: str, marked_words: set[int], tone: str, width: int) -> list[Row]:
    """Breaks a text into lines of `width` cells, with some words in a tone.

    Args:
        text: the text.
        marked_words: positions of the words to mark. Blanks between two of them are marked as well.
        tone: of the marked words.
        width: cells.
    """
    lines: list[list[Piece]] = [[]]
    used, word, before = 0, -1, False
    blank = ""
    for part in _PART.findall(_plain(text).removeprefix(" ")):  # as `wrap` leaves it out
        if part == "\n":
            lines.append([])
            used, blank, before = 0, "", False
            continue
        if part[0] == " ":
            blank = part
            continue
        word += 1
        marked = word in marked_words
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
