"""Judgements of answers: labels and notes, by attempt, step and index."""

import pytest

from engine.errors import UserInputError
from engine.journal.judgements.labels import LabelReader, set_label, set_note
from engine.journal.reader import JournalReader
from engine.journal.rows import ProbeResponse
from engine.journal.samples import SampleQuery, with_judgements
from tests.judging import answer, judgements, sample


@pytest.fixture
def session(make_session):
    return make_session()


def test_a_session_that_nobody_has_judged_reads_as_empty(session):
    with LabelReader(session) as labels:
        assert labels.judgements() == {}
        assert labels.preferences() == []
    assert not session.labels_file.exists()


def test_a_judgement_has_the_words_who_and_when(session):
    set_label(session, "prompt", answer(3, 1), "hack", "ana on pts/1")
    with LabelReader(session) as labels:
        ((key, found),) = labels.judgements().items()
    assert key == (1, 3, 1)
    assert (found.prompt, found.response) == ("prompt", answer(3, 1))
    judgement = found.judgement
    assert (judgement.label, judgement.note, judgement.who) == ("hack", None, "ana on pts/1")
    assert abs(judgement.time - session.labels_file.stat().st_mtime) < 60


def test_a_later_label_replaces_the_earlier_one_and_a_note_stays(session):
    set_label(session, "p", answer(1), "good", "ana")
    set_note(session, "p", answer(1), " repeats itself ", "ana")
    set_label(session, "p", answer(1), "hack", "ben")
    assert judgements(session) == {(1, 0): ("hack", "repeats itself")}
    with LabelReader(session) as labels:
        assert [j.judgement.who for j in labels.judgements().values()] == ["ben"]


def test_a_judgement_never_stands_on_other_words(session):
    set_label(session, "p", answer(1), "bad", "ana")
    set_note(session, "p", answer(1), "dull", "ana")
    other = answer(1, response="after samples.db was replaced")
    row = sample(1, response=other.response)
    assert next(with_judgements(session, [row])).label is None
    set_label(session, "p", other, "good", "ben")
    with LabelReader(session) as labels:
        (found,) = labels.judgements().values()
    assert (found.response, found.judgement.label, found.judgement.note) == (other, "good", None)


def test_what_is_taken_away_is_gone(session):
    set_label(session, "p", answer(1), "good", "ana")
    set_note(session, "p", answer(1), "fine", "ana")
    set_label(session, "p", answer(1), None, "ana")
    assert judgements(session) == {(1, 0): (None, "fine")}
    set_note(session, "p", answer(1), "", "ana")
    assert judgements(session) == {}


def test_an_unknown_label_is_refused(session):
    with pytest.raises(UserInputError, match="good, bad, hack"):
        set_label(session, "p", answer(1), "nice", "ana")


def test_after_a_roll_back_the_same_step_has_another_response(writer):
    writer.steps(1, 2)
    set_label(writer.session, "prompt 0", answer(2), "bad", "ana")
    writer.journal.begin_attempt(1, fresh=True)
    writer.steps(2)
    set_label(writer.session, "prompt 0", answer(2, attempt=2), "good", "ana")
    with JournalReader(writer.session) as reader:
        rows = list(with_judgements(writer.session, reader.samples.newest()))
        (found,) = reader.samples.page(SampleQuery(judged=True), 10)
        (left,) = [r for r in reader.samples.earlier(found) if r.attempt == 1 and r.step == 2]
    assert [r.label for r in rows] == [None, None, "good", None]
    assert (found.step, found.attempt, found.label) == (2, 2, "good")
    assert left.label == "bad"


def test_a_page_has_the_judgements_and_can_be_narrowed_to_them(writer):
    writer.steps(1, 2, 3)
    with JournalReader(writer.session) as reader:
        everything = reader.samples.page(SampleQuery(), 10)
        assert {r.judgement for r in everything} == {None}
        assert reader.samples.page(SampleQuery(labels="good"), 10) == []
        for step, label in ((1, "good"), (2, "bad"), (3, "hack")):
            set_label(writer.session, "prompt 0", answer(step), label, "ana")
        set_note(writer.session, "prompt 1", answer(3, 1), "look at this", "ben")

        def steps(**asked):
            rows = reader.samples.page(SampleQuery(descending=False, **asked), 10)
            return [(r.step, r.index) for r in rows]

        assert steps(labels="good") == [(1, 0)]
        assert steps(labels="bad hack") == [(2, 0), (3, 0)]
        assert steps(judged=True) == [(1, 0), (2, 0), (3, 0), (3, 1)]
        assert steps(judged=False) == [(1, 1), (2, 1)]
        assert steps(judged=True, text="answer 3.1") == [(3, 1)]
        (noted,) = reader.samples.page(SampleQuery(text="answer 3.1"), 10)
        assert (noted.label, noted.note, noted.judgement.who) == (None, "look at this", "ben")


def test_earlier_responses_are_those_to_the_same_prompt_newest_first(writer):
    writer.steps(1, 2, 3)
    writer.journal.begin_attempt(1, fresh=True)
    writer.steps(2, 3, 4)
    with JournalReader(writer.session) as reader:
        newest = reader.samples.page(SampleQuery(), 1)[0]
        found = [(r.attempt, r.step, r.prompt) for r in reader.samples.earlier(newest)]
        assert found == [
            (2, 3, "prompt 0"), (2, 2, "prompt 0"), (1, 3, "prompt 0"), (1, 2, "prompt 0"),
            (1, 1, "prompt 0"),
        ]  # fmt: skip
        (oldest,) = reader.samples.page(SampleQuery(descending=False), 1)
        assert reader.samples.earlier(oldest) == []


def test_the_reference_s_response_is_that_of_the_last_probe_that_was_carried_out(writer):
    def probe(command_id, text, said):
        writer.order(command_id, "probe", text=text)
        if said is None:
            writer.journal.commands.reject(command_id, "too long")
        else:
            result = {"policy": {"response": "x"}, "reference": {"response": said}}
            writer.journal.commands.apply(command_id, 5, [], result)

    probe("a", "a prompt", "once")
    probe("b", "a prompt", "again")
    probe("c", "a prompt", None)
    probe("d", "another", "other words")
    with JournalReader(writer.session) as reader:
        again = ProbeResponse(response="again", step=5)
        assert reader.last_reference_probe("a prompt") == again
        assert reader.last_reference_probe("never asked") is None
