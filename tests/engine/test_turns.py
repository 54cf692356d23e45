"""A response of several turns is split into the policy's turns and the replies between them."""

import msgspec
import pytest

from engine.journal.samples import SampleReader
from engine.journal.turns import Turn, turns_of
from engine.protocol.rank_messages import StepReport


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


@pytest.mark.parametrize("replies", [None, [], [(3, 9), (12, 12)]])
def test_the_replies_of_an_environment_are_read_as_they_were_written(writer, replies):
    row = writer.sample(1, 0, replies=replies)
    report = StepReport(step=1, metrics={}, settings={}, samples=[row], evaluated=[row])
    writer.journal.record_step(report)
    with SampleReader(writer.session) as samples:
        (training,), (held_out,) = samples.newest(), samples.evaluated()
    assert training.replies == held_out.replies == replies
    writer.journal.begin_attempt(0, fresh=True)  # abandons the step
    with SampleReader(writer.session) as samples:
        assert not samples.newest()
        earlier = samples.earlier(msgspec.structs.replace(training, attempt=2))
    assert [each.replies for each in earlier] == [replies]
