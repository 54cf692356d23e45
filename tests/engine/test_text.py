"""The one gate for text that is not ours: no terminal obeys what comes out of it."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_tui.text import one_line, sanitise

modest = settings(max_examples=300, deadline=None, derandomize=True)
SPICE = st.sampled_from(
    ["\x1b", "\x1b[31m", "\x1b]0;title\x07", "\x1bP", "\x1b\\", "\x9b", "\x9d", "\x9c", "\x07",
     "\r", "\b", "\x7f", "\x00", "\u202e", "\u2066", "\u200f", "\u2028", "\x85", "\ud800", "\udfff",
     "\x1b(0", "\x1bc", "[", "]", "m", "\n", "\t", "a", "é", "漢", "🙂"]
)  # fmt: skip
HOSTILE = st.lists(SPICE | st.text(max_size=3), max_size=30).map("".join)
PLAIN = st.text(
    st.characters(blacklist_categories=("Cc", "Cs", "Zl", "Zp", "Cf"), whitelist_characters="\n\t")
)


@modest
@given(HOSTILE)
def test_nothing_that_a_terminal_obeys_survives(text):
    out = sanitise(text)
    assert all(unicodedata.category(c) not in ("Cc", "Cs") or c in "\n\t" for c in out)
    assert not any(unicodedata.bidirectional(c) in BIDI for c in out)
    assert not set(out) & set("\u061c\u200e\u200f\u2028\u2029")
    out.encode()


BIDI = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


@modest
@given(PLAIN)
def test_plain_text_stays_as_it_is(text):
    assert sanitise(text) == text


@modest
@given(HOSTILE)
def test_what_went_through_goes_through_unchanged(text):
    assert sanitise(sanitise(text)) == sanitise(text)
    assert sanitise(one_line(text)) == one_line(text)


@modest
@given(HOSTILE, st.integers(0, 20))
def test_one_line_is_one_line_of_at_most_that_width(text, width):
    line = one_line(text, width)
    assert len(line.splitlines()) <= 1
    assert "\t" not in line
    assert len(line) <= max(width, 1)


@pytest.mark.parametrize(
    "sequence",
    ["\x1b[31m", "\x1b[2J", "\x1b]0;owned\x07", "\x1b]52;c;aGk=\x1b\\", "\x9b31m", "\x1b(0",
     "\x1bP1$q\x1b\\", "\x1b]8;;http://x\x07"],
)  # fmt: skip
def test_a_whole_sequence_becomes_one_symbol(sequence):
    assert sanitise(f"a{sequence}b") == "a\u241bb"


def test_an_unfinished_sequence_takes_nothing_of_the_terminals_along():
    assert "\x1b" not in sanitise("a\x1b]0;never ends")
    assert "\x1b" not in sanitise("a\x1b")
    assert sanitise("a\x1b") == "a\u241b"
