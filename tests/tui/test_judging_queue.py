"""The queue of unjudged responses: its orders, what it counts, and what it hides."""

import msgspec
import pytest

from engine.journal.judgements.labels import Response, set_label
from engine.journal.rows import Judgement
from rlhf_tui.dialogs.base import InputDialog
from rlhf_tui.dialogs.judging import JudgingDialog, ResponseText
from rlhf_tui.dialogs.judging_queue import JudgingQueue
from rlhf_tui.widgets.lines import Lines
from tests.judging import STEPS, judgements, sample
from tests.tui.screen import notices
from tests.tui.test_judging import newest

ALL = 8 * STEPS


def pool(*scores, **given):
    return [
        sample(step, score=score, **({"response": f"text {step}"} | given))
        for step, score in enumerate(scores, start=1)
    ]


def steps_of(queue):
    """The steps of the rest, skipping to the end."""
    steps = []
    while queue.current is not None:
        steps.append(queue.decide(None).row.step)
    return steps


def test_without_a_second_source_the_uncertain_ones_are_those_near_the_median():
    assert steps_of(JudgingQueue(pool(-9.0, 1.0, 0.1, 0.0, None))) == [3, 4, 2, 1, 5]


def test_with_several_sources_the_uncertain_ones_are_those_on_which_they_disagree():
    parts = [{"a": 1.0, "b": 10.0}, {"a": 5.0, "b": 10.0}, {"a": 5.0, "b": 50.0}]
    rows = [sample(step, parts=p, response=f"text {step}") for step, p in enumerate(parts, start=1)]
    assert steps_of(JudgingQueue(rows))[0] == 2


def test_outliers_are_those_furthest_from_the_median_on_both_sides():
    queue = JudgingQueue(pool(0.0, 0.2, 5.0, -9.0, None))
    queue.cycle_order()
    assert steps_of(queue)[:2] == [4, 3]
    assert queue.current is None


def test_a_text_comes_once_however_often_it_was_generated():
    rows = [sample(3, response="same"), sample(2), sample(1, response="same")]
    assert sorted(steps_of(JudgingQueue(rows))) == [2, 3]  # the newest of it
    other_prompt = [*rows, sample(0, prompt="another", response="same")]
    assert sorted(steps_of(JudgingQueue(other_prompt))) == [0, 2, 3]


def test_a_skipped_response_is_replaced_and_none_comes_twice():
    queue = JudgingQueue(pool(*map(float, range(9))), size=3)
    seen = []
    for label in ("good", None, "bad", None, "hack", "good"):
        if queue.current is not None:
            seen.append(queue.decide(label).row.step)
        queue.cycle_order()
    assert (len(seen), len(set(seen)), queue.judged, queue.total) == (5, 5, 3, 3)


def test_an_undone_decision_comes_again_and_is_not_counted():
    queue = JudgingQueue(pool(0.0, 1.0, 2.0))
    first = queue.current
    queue.decide("good")
    assert queue.undo().row is queue.current is first
    assert (queue.judged, queue.total, queue.agreement()) == (0, 3, (0, 0))
    assert queue.undo() is None


def test_a_note_is_kept_with_its_response_though_another_one_has_come_back():
    queue = JudgingQueue(pool(9.0, 0.0, 0.1))
    decision, noted = queue.decide("good"), queue.current
    queue.take_back(decision)  # it could not be written
    judgement = Judgement(label=None, note="odd", who="ana", time=0.0)
    queue.replace(msgspec.structs.replace(noted, judgement=judgement))
    left = [queue.decide("good").row for _ in range(3)]
    assert {row.step: row.note for row in left if row.note} == {noted.step: "odd"}
    assert sorted(row.step for row in left) == [1, 2, 3]


@pytest.mark.parametrize(
    ("label", "score", "agrees"),
    [
        ("good", 9.0, True), ("bad", 9.0, False), ("hack", 9.0, False), ("bad", -9.0, True),
        ("good", -9.0, False), ("good", None, None), (None, 9.0, None),
    ],
)  # fmt: skip
def test_the_score_agrees_if_good_ones_score_above_the_median(label, score, agrees):
    queue = JudgingQueue(pool(score, 0.0, 0.1, -0.1))
    while queue.current.step != 1:
        queue.decide(None)
    assert queue.agrees(queue.decide(label)) is agrees


def text_of(app):
    """Everything on the dialog."""
    lines = [widget.text() for widget in app.screen.query(Lines)]
    return "\n".join(lines)


async def opened(app, pilot, until):
    await pilot.press("J")
    await until(pilot, lambda: isinstance(app.screen, JudgingDialog))
    await until(pilot, lambda: app.screen.queue is not None and f"/{ALL}" in text_of(app))
    return app.screen.queue


async def test_what_is_counted_is_in_the_file_and_the_score_comes_after_the_judgement(
    samples, judged, until
):
    async with samples((80, 24)) as (app, pilot):
        queue = await opened(app, pilot, until)
        response = app.screen.query_one(ResponseText)
        row = queue.current
        assert row.response.split()[0] in response.text()
        assert not any(word in response.text().lower() for word in ("score", "nats", "reward"))
        await pilot.press("plus")
        await until(pilot, lambda: f" 1/{ALL} judged" in text_of(app))
        assert judgements(judged) == {(row.step, row.index): ("good", None)}
        assert "last: + good   score" in text_of(app)
        assert "agreement" in text_of(app)
        await pilot.press("minus", "s", "exclamation_mark")
        await until(pilot, lambda: f" 3/{ALL - 1} judged" in text_of(app))
        assert sorted(label for label, _ in judgements(judged).values()) == ["bad", "good", "hack"]
        await pilot.press("u")
        await until(pilot, lambda: len(judgements(judged)) == 2)
        assert f" 2/{ALL - 1} judged" in text_of(app)
        await pilot.press("W", *"odd end", "enter")
        await until(pilot, lambda: not isinstance(app.screen, InputDialog))
        await until(pilot, lambda: (None, "odd end") in judgements(judged).values())
        await until(pilot, lambda: "✎ odd end" in text_of(app))
        await pilot.press("o", "escape")
        await until(pilot, lambda: not isinstance(app.screen, JudgingDialog))
        marks = {mark for mark, _ in judgements(judged).values()}
        assert marks == {"good", "bad", None}


async def test_what_cannot_be_written_is_not_counted_and_comes_again(samples, judged, until):
    async with samples() as (app, pilot):
        queue = await opened(app, pilot, until)
        judged.labels_file.mkdir()
        first = queue.current
        await pilot.press("plus")
        await until(pilot, lambda: "cannot write" in text_of(app))
        assert (queue.judged, queue.current) == (0, first)


async def test_judged_responses_are_not_in_the_queue(samples, judged, until):
    row = newest(judged)
    set_label(judged, row.prompt, Response.of(row), "bad", "ben")
    async with samples() as (app, pilot):
        await pilot.press("J")
        await until(pilot, lambda: isinstance(app.screen, JudgingDialog) and app.screen.queue)
        assert app.screen.queue.total == ALL - 1


async def test_read_only_the_queue_does_not_open_and_a_notice_says_so(samples, judged, until):
    async with samples(read_only=True) as (app, pilot):
        await pilot.press("J")
        await until(pilot, lambda: notices(app))
        assert notices(app) == ["read-only: responses cannot be judged"]
