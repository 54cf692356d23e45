"""A response of several turns is split into the policy's turns and the replies between them."""

import pytest

from engine.journal.turns import Turn, turns_of


def test_turns_and_replies_alternate():
    assert turns_of("It is. Why? A plot.", [(6, 11)]) == [
        Turn("It is.", False), Turn(" Why?", True), Turn(" A plot.", False),
    ]  # fmt: skip
    assert turns_of("ab", [(1, 1), (2, 2)]) == [
        Turn("a", False), Turn("", True), Turn("b", False), Turn("", True), Turn("", False),
    ]  # fmt: skip


@pytest.mark.parametrize("replies", [None, []])
def test_a_response_without_replies_is_one_turn(replies):
    assert turns_of("one", replies) == [Turn("one", False)]


@pytest.mark.parametrize("replies", [[(2, 9), (9, 12)], [(-3, 2), (1, 0)], [(5, 1)], [(9, 9)]])
def test_whatever_the_positions_are_no_character_is_lost_or_repeated(replies):
    turns = turns_of("abcde", replies)
    assert "".join(turn.text for turn in turns) == "abcde"
    assert [turn.is_reply for turn in turns] == [False, *[True, False] * len(replies)]
