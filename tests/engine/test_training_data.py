"""The judgements and settings that a reward model is trained with."""

import msgspec
import pytest

from engine.config.reward_training import parse_settings
from engine.config.sections.reward_training import RewardTrainingConfig
from engine.errors import ConfigError, UserInputError
from engine.journal.judgements.labels import Response, prefer, set_label
from engine.journal.judgements.training_data import RESPONSES_FOR_SCALES, collect_judgements
from engine.journal.samples import SampleReader
from engine.protocol.rank_messages import SampleMessages, StepReport
from tests.judging import answer


def label_many(session, count, good=lambda step: step % 2):
    for step in range(1, count + 1):
        label = "good" if good(step) else "bad"
        set_label(session, f"prompt {step}", answer(step), label, "ana")


def test_a_judged_response_has_its_text_its_recorded_score_and_whether_it_ended(writer):
    writer.steps(*range(1, 21))
    session = writer.session
    label_many(session, 20)
    set_label(session, "prompt 1", answer(1, 1), "hack", "ana")
    prefer(session, "prompt 0", Response(response="the reference's"), answer(3), "ana")
    found = collect_judgements([session])
    by_text = {r.response: r for r in found.responses}
    assert (len(found.labels), found.good, len(found.preferences)) == (21, 10, 1)
    (chosen, rejected) = found.preferences[0]
    assert found.responses[chosen].response == "the reference's"
    assert (found.responses[chosen].score, found.responses[rejected].score) == (None, 3.0)
    assert by_text["answer 1.1"].ended is False
    assert by_text["answer 1.0"].ended is True
    assert by_text["answer 7.0"].score == 7.0


def test_the_newest_responses_come_along_whether_they_are_judged_or_not(writer):
    writer.steps(*range(1, 101))
    label_many(writer.session, 20)
    found = collect_judgements([writer.session])
    with SampleReader(writer.session) as reader:
        rows = reader.newest(RESPONSES_FOR_SCALES)
    newest = [found.responses[i] for i in found.newest]
    assert [(r.response, r.score) for r in newest] == [(r.response, r.score) for r in rows]
    assert {i for i, _ in found.labels}.isdisjoint(found.newest)


def test_a_judged_conversation_has_its_messages(writer):
    def said(text):
        return SampleMessages(
            [{"role": "user", "content": "p"}], [{"role": "assistant", "content": text}]
        )

    samples = [writer.sample(1, i, prompt="p", messages=said(f"answer 1.{i}")) for i in range(24)]
    writer.journal.record_step(StepReport(step=1, metrics={}, samples=samples, settings={}))
    with SampleReader(writer.session) as reader:
        for i, row in enumerate(reader.of_step(1)):
            set_label(writer.session, "p", Response.of(row), "good" if i % 2 else "bad", "ana")
    reference = Response(response="the reference's")
    found = {"response": reference.response, "messages": msgspec.to_builtins(said("r"))}
    writer.order("x", "probe", text="p")
    writer.journal.commands.apply("x", 1, [], {"policy": {}, "reference": found})
    prefer(writer.session, "p", reference, answer(7), "ana")
    by_text = {r.response: r.messages for r in collect_judgements([writer.session]).responses}
    assert by_text["answer 1.5"] == said("answer 1.5")
    assert by_text["the reference's"] == said("r")
    assert by_text["answer 7.0"] is None


def test_a_text_that_was_judged_twice_has_its_last_label(writer):
    writer.steps(*range(1, 21))
    label_many(writer.session, 20)
    again = answer(1, 1, response="answer 2.0")
    set_label(writer.session, "prompt 2", again, "good", "ben")
    found = collect_judgements([writer.session])
    labels = {found.responses[i].response: good for i, good in found.labels}
    assert len(labels) == len(found.labels) == 20
    assert labels["answer 2.0"] is True


def test_too_few_judgements_are_refused_with_what_to_do(make_session):
    session = make_session()
    label_many(session, 7)
    with pytest.raises(
        UserInputError, match=r"at least 20 judgements and there are 7 .*counts once.* J on"
    ):
        collect_judgements([session])


def test_labels_of_one_kind_are_refused(make_session):
    session = make_session()
    label_many(session, 30, good=lambda step: step != 1)
    with pytest.raises(UserInputError, match=r"29 labels good, 1 bad or hack"):
        collect_judgements([session])


def test_several_sessions_add_up(make_session):
    sessions = [make_session(name) for name in ("a", "b")]
    for session in sessions:
        label_many(session, 12)
    found = collect_judgements(sessions)
    assert len(found) == 24
    assert {r.session for r in found.responses} == {0, 1}


def test_settings_are_typed_and_the_rest_keeps_its_default():
    found = parse_settings(["epochs=3", "learning_rate=1e-5", "label=good"])
    assert (found.epochs, found.learning_rate, found.label) == (3, 1e-5, "good")
    assert found.batch_size == RewardTrainingConfig().batch_size


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("epochs", "takes key=value"),
        ("epoch=3", "did you mean 'epochs'"),
        ("epochs=many", "epochs must be a whole number, not 'many'"),
        ("holdout=0.9", r"holdout must be a number of at most 0.5"),
        ("epochs=[", "--set epochs"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(item, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_settings([item])
    assert "\n" not in str(caught.value)
