"""Two answers word by word."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from rlhf_tui.widgets.samples.comparison import SIDE_BY_SIDE, ComparisonTarget, comparison
from rlhf_tui.widgets.samples.diff import (
    MAX_WORDS,
    diff_words,
    longest_common_subsequence,
    marked_lines,
    words_of,
)
from rlhf_tui.widgets.tones import TONES
from tests.judging import sample
from tests.tui.panels import lines_of

few_words = st.lists(st.sampled_from("abcd"), max_size=14)
any_text = st.text(st.one_of(st.sampled_from(" \n\tab字"), st.characters()), max_size=60)


def longest(a, b):
    """The length of a longest common subsequence, by the state."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, one in enumerate(a):
        for j, other in enumerate(b):
            table[i + 1][j + 1] = (
                table[i][j] + 1 if one == other else max(table[i][j + 1], table[i + 1][j])
            )
    return table[-1][-1]


def toned(rows, tone):
    return [piece for row in rows for piece, t in row if t == tone and piece.strip(" ")]


@given(few_words, few_words)
def test_what_two_responses_have_in_common_is_a_longest_subsequence_of_both(a, b):
    in_a, in_b = longest_common_subsequence(a, b)
    assert [a[i] for i in sorted(in_a)] == [b[i] for i in sorted(in_b)]
    assert len(in_a) == longest(a, b)


def test_the_words_of_each_alone_are_found():
    own = diff_words("the film was good and warm", "the film was dull and loud and warm")
    assert own.mine == {3}
    assert own.theirs == {3, 4, 5}
    assert (own.common, own.cut) == (5, False)


def test_long_responses_that_repeat_themselves_are_compared_as_far_as_it_goes():
    # difflib would be at it for hours.
    one, other = "a b " * 5 * MAX_WORDS, "b a a " * 5 * MAX_WORDS
    own = diff_words(one, other)
    assert own.cut
    assert max(own.mine | own.theirs) < MAX_WORDS
    assert own.common > MAX_WORDS // 2


@given(any_text, st.integers(2, 20))
def test_every_word_is_drawn_once_and_no_line_is_too_long(words, width):
    every = set(range(len(words_of(words))))
    for own, tone in ((every, "mine"), (set(), "")):
        rows = marked_lines(words, own, "mine", width)
        assert all(cell_len(line) <= width for line in lines_of(rows))
        assert "".join(toned(rows, tone)) == "".join(words_of(words))


def test_lines_stay_lines_and_long_words_are_broken():
    rows = marked_lines("one\n\n  two abcdefghij", {2}, "mine", 6)
    assert lines_of(rows) == ["one", "", "  two", "abcdef", "ghij"]
    assert toned(rows, "mine") == ["abcdef", "ghij"]


def answer(response):
    return sample(7, index=1, prompt="a prompt", response=response)


def held(one, other, **given):
    return ComparisonTarget(
        "earlier", "OTHER, step 3 #1 (1/1)", answer(one), answer(other), **given
    )


def test_responses_are_side_by_side_where_there_is_room_and_below_each_other_elsewhere():
    one, other = "the film was good", "the film was dull"
    wide = lines_of(comparison(answer(one), held(one, other), SIDE_BY_SIDE))
    assert any("good" in line and "dull" in line for line in wide)
    narrow = lines_of(comparison(answer(one), held(one, other), SIDE_BY_SIDE - 1))
    assert not any("good" in line and "dull" in line for line in narrow)
    for lines in (wide, narrow):
        assert lines.index("PROMPT") > max(i for i, line in enumerate(lines) if "dull" in line)


def test_the_tones_of_the_two_are_distinguished_without_colour():
    looks = {TONES[name].style for name in ("mine", "theirs", "")}
    assert len(looks) == 3


def test_the_words_of_each_have_a_tone_of_their_own():
    one, other = "the film was good", "the film was dull"
    rows = comparison(answer(one), held(one, other), 60)
    assert toned(rows, "mine") == ["good", "only in this"]
    assert toned(rows, "theirs") == ["dull", "only in other"]


@pytest.mark.parametrize("width", [60, 120])
@pytest.mark.parametrize("better", ["this", "other"])
def test_the_preferred_one_is_marked_with_who_preferred_it(width, better):
    one, other = "the film was good", "the film was dull"
    lines = lines_of(comparison(answer(one), held(one, other, better=better, who="ana"), width))
    (line,) = [x for x in lines if "better" in x and "ana" in x]
    at = line.index("✓ better")
    assert (at >= width // 2) == (better == "other") or width < SIDE_BY_SIDE
    if width < SIDE_BY_SIDE:
        assert (lines.index(line) > lines.index("the film was good")) == (better == "other")


def test_responses_of_any_length_keep_to_the_width():
    rng = random.Random(3)  # noqa: S311 - no secret
    one = " ".join(rng.choice(["good", "字" * 40, "x"]) for _ in range(300))
    other = " ".join(rng.choice(["good", "dull", "x"]) for _ in range(10))
    for width in (58, 78, 100, 150):
        lines = lines_of(comparison(answer(one), held(one, other), width))
        assert all(cell_len(line) <= width for line in lines)
