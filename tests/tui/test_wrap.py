"""Rows of pieces that are broken between words, and cells that are cut or padded."""

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from rlhf_tui.text import sanitise
from rlhf_tui.widgets.lines import row_width
from rlhf_tui.widgets.table import fitted
from rlhf_tui.widgets.wrap import wrap, wrap_row

PIECES = st.lists(
    st.tuples(st.text("ab 界", max_size=30), st.sampled_from(["", "dim"])), max_size=5
)


def words(row):
    return "".join(text for text, _ in row).replace(" ", "")


@given(row=PIECES, width=st.integers(2, 40))
def test_no_row_is_too_wide_and_no_word_is_lost(row, width):
    broken = wrap_row(row, width)
    assert all(row_width(line) <= width for line in broken)
    assert "".join(map(words, broken)) == words(row)


def test_lines_of_code_keep_their_indentation():
    code = " def f(x):\n    if x:\n\treturn 1\n\n  a  b"
    assert wrap(code, 40) == ["def f(x):", "    if x:", "    return 1", "", "  a  b"]
    assert wrap("x\n" + " " * 30 + "abc def", 8) == ["x", "    abc", "def"]


@given(
    text=st.text(st.one_of(st.sampled_from(" \n\tab字"), st.characters()), max_size=60),
    width=st.integers(2, 40),
)
def test_no_line_of_a_text_is_too_wide_and_no_word_is_lost(text, width):
    broken = wrap(text, width)
    assert all(cell_len(line) <= width for line in broken)
    assert "".join("".join(broken).split()) == "".join(sanitise(text).split())


def test_a_text_without_a_blank_is_wrapped_in_one_pass():
    # Looked at from its end at each cut, one of this length would be at it for days.
    assert wrap("!" * 100_000, 60) == ["!" * 60] * 1_666 + ["!" * 40]


def test_a_word_keeps_its_tone():
    row = [("Its journal and ", ""), ("12 checkpoints", "strong"), (" are deleted.", "")]
    first, second, _ = wrap_row(row, 18)
    assert ("12", "strong") in first
    assert ("checkpoints", "strong") in second


@given(
    text=st.text("ab 界", max_size=10),
    width=st.integers(0, 12),
    right=st.booleans(),
    both_ends=st.booleans(),
)
def test_a_cell_has_its_width_whatever_its_letters(text, width, right, both_ends):
    assert row_width([(fitted(text, width, right=right, both_ends=both_ends), "")]) == width
