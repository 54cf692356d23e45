"""Of two answers the better one, and the pairs that an export makes of what was said."""

import sqlite3
import time
from contextlib import closing

import msgspec
import pytest

from engine.errors import SessionError, UserInputError
from engine.journal import schema
from engine.journal.judgements.labels import (
    LabelReader,
    Response,
    forget_preference,
    prefer,
    set_label,
)
from engine.journal.judgements.preference_pairs import preference_pairs
from engine.journal.samples import SampleReader
from engine.protocol.rank_messages import SampleMessages, StepReport
from tests.judging import answer, judgements

FROM_REFERENCE = Response(response="the reference's")


@pytest.fixture
def session(make_session):
    return make_session()


def test_a_pair_that_is_judged_again_is_replaced(session):
    prefer(session, "p", answer(1), answer(2), "ana")
    prefer(session, "p", answer(2), answer(1), "ben")
    prefer(session, "other", answer(1), answer(2), "ana")
    with LabelReader(session) as labels:
        assert len(labels.preferences()) == 2
        (found,) = labels.preferences("p")
    assert (found.chosen, found.rejected, found.who) == (answer(2), answer(1), "ben")
    forget_preference(session, "p", answer(1), answer(2))
    with LabelReader(session) as labels:
        assert [p.prompt for p in labels.preferences()] == ["other"]


def test_the_same_words_are_no_pair(session):
    with pytest.raises(UserInputError, match="identical"):
        prefer(session, "p", answer(1, response="a"), answer(2, response="a"), "ana")
    assert not session.labels_file.exists()


def test_pairs_come_from_preferences_and_from_labels(session):
    prefer(session, "p", FROM_REFERENCE, answer(1), "ana")
    set_label(session, "p", answer(2), "good", "ana")
    set_label(session, "p", answer(3), "bad", "ben")
    set_label(session, "p", answer(4), "hack", "ana")
    set_label(session, "q", answer(5), "bad", "ana")
    rows = preference_pairs(session).pairs
    assert [(r.source, r.chosen, r.rejected, r.who) for r in rows] == [
        ("pair", "the reference's", "answer 1.0", "ana"),
        ("labels", "answer 2.0", "answer 3.0", "ana and ben"),
        ("labels", "answer 2.0", "answer 4.0", "ana"),
    ]
    first, second = rows[0], rows[1]
    assert (first.chosen_step, first.rejected_step) == (None, 1)
    assert (second.chosen_attempt, second.chosen_step, second.chosen_index) == (1, 2, 0)
    assert {r.prompt for r in rows} == {"p"}


def test_a_pair_tells_where_the_replies_of_an_environment_are(writer):
    given = [[(2, 4)], [], None, [(3, 5), (7, 9)]]
    samples = [writer.sample(1, i, prompt="p", replies=spans) for i, spans in enumerate(given)]
    writer.journal.record_step(StepReport(step=1, metrics={}, samples=samples, settings={}))
    with SampleReader(writer.session) as reader:
        one, turn, without, other = map(Response.of, reader.of_step(1))
    prefer(writer.session, "p", one, turn, "ana")
    prefer(writer.session, "p", without, FROM_REFERENCE, "ana")
    set_label(writer.session, "p", other, "good", "ana")
    set_label(writer.session, "p", one, "bad", "ana")
    expected = [([(2, 4)], []), (None, None), (given[3], [(2, 4)])]
    rows = preference_pairs(writer.session).pairs
    assert [(r.chosen_replies, r.rejected_replies) for r in rows] == expected
    writer.session.samples_file.unlink()
    rows = preference_pairs(writer.session).pairs
    assert [(r.chosen_replies, r.rejected_replies) for r in rows] == [(None, None)] * 3


def test_pairs_of_conversations_are_lists_of_messages(writer):
    """TRL's conversational format; all rows of a file must have the same."""

    def said(*texts):
        roles = ["assistant", "tool"] * len(texts)
        response = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
        return SampleMessages(asked, response)

    asked = [{"role": "user", "content": "p"}]
    given = [said("a"), said("b", "3", "c"), None]
    samples = [writer.sample(1, i, prompt="p", messages=one) for i, one in enumerate(given)]
    writer.journal.record_step(StepReport(step=1, metrics={}, samples=samples, settings={}))
    probed = said("d", "4", "e")
    found = {"response": FROM_REFERENCE.response, "messages": msgspec.to_builtins(probed)}
    writer.order("x", "probe", text="p")
    writer.journal.commands.apply("x", 1, [], {"policy": {}, "reference": found})
    with SampleReader(writer.session) as reader:
        rows = reader.of_step(1)
    assert [row.messages for row in rows] == given
    assert "messages" not in rows[0].as_json()
    one, other, without = map(Response.of, rows)
    prefer(writer.session, "p", one, other, "ana")
    prefer(writer.session, "p", FROM_REFERENCE, one, "ana")
    prefer(writer.session, "p", other, without, "ana")
    exported = preference_pairs(writer.session)
    assert [(r.prompt, r.chosen, r.rejected) for r in exported.pairs] == [
        (asked, given[0].response, given[1].response), (asked, probed.response, given[0].response),
    ]  # fmt: skip
    assert exported.left_out == 1
    # Abandoned branches keep theirs.
    writer.journal.begin_attempt(0, fresh=True)
    assert preference_pairs(writer.session) == exported


def test_no_pair_is_there_twice_and_preferences_count_before_labels(session):
    set_label(session, "p", answer(1), "good", "ana")
    set_label(session, "p", answer(2), "bad", "ana")
    # The same words once more, at other steps.
    set_label(session, "p", answer(3, response="answer 1.0"), "good", "ana")
    set_label(session, "p", answer(4, response="answer 1.0"), "bad", "ana")
    (row,) = preference_pairs(session).pairs
    assert (row.source, row.chosen, row.rejected) == ("labels", "answer 1.0", "answer 2.0")
    prefer(session, "p", answer(2), answer(1), "ben")
    (row,) = preference_pairs(session).pairs
    assert (row.source, row.chosen, row.who) == ("pair", "answer 2.0", "ben")


def test_the_later_judgement_counts_though_the_clock_was_set_back(session, monkeypatch):
    set_label(session, "p", answer(1), "good", "ana")
    set_label(session, "p", answer(2), "bad", "ana")
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    set_label(session, "p", answer(3, response="answer 1.0"), "bad", "ana")
    set_label(session, "p", answer(4, response="answer 2.0"), "good", "ana")
    prefer(session, "p", answer(5), answer(6), "ana")
    first, second = preference_pairs(session).pairs
    assert (first.chosen, first.rejected, first.time) == ("answer 2.0", "answer 1.0", 1000.0)
    assert second.source == "pair"


def test_judgements_of_an_earlier_version_come_first_in_the_order_of_their_times(session):
    columns = "attempt, step, idx, prompt, response, label, who, time"
    with closing(sqlite3.connect(session.labels_file)) as db, db:
        schema.migrate(db, schema.LABELS[: schema.JUDGEMENTS_ARE_NUMBERED - 1], session.labels_file)
        for step, time_ in ((1, 3e9), (2, 2e9)):
            db.execute(
                f"INSERT INTO judgements ({columns}) VALUES (1, ?, 0, 'p', 'r', 'good', 'ana', ?)",  # noqa: S608
                (step, time_),
            )
    assert list(judgements(session)) == [(2, 0), (1, 0)]
    set_label(session, "p", answer(3), "good", "ana")  # migrates the file
    assert list(judgements(session)) == [(2, 0), (1, 0), (3, 0)]


def test_without_a_pair_the_error_says_how_to_make_one(session):
    with pytest.raises(SessionError, match=r"no preferences yet: .* attach run"):
        preference_pairs(session)
    set_label(session, "p", answer(1), "good", "ana")
    with pytest.raises(SessionError, match="no pair of responses to one prompt"):
        preference_pairs(session)
