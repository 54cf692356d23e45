"""How far scores agree with judgements, over the steps, and from where they agree less."""

import random

import pytest

from engine.agreement import (
    MIN_JUDGEMENTS,
    Agreement,
    JudgedScore,
    Point,
    find_fall,
    interval,
    placements,
)
from engine.journal.judgements.agreement import read_agreement
from engine.journal.judgements.labels import Response, prefer, set_label
from engine.journal.reader import JournalReader
from engine.protocol.rank_messages import REWARD_CHANGED, REWARD_FAILED
from tests.judging import answer


def agreement_of(session):
    with JournalReader(session) as reader:
        return read_agreement(reader)


def test_the_mean_over_either_kind_of_label_is_the_chance_that_the_better_one_scores_higher():
    rng = random.Random(3)  # noqa: S311 - no secret
    judged = [JudgedScore(i, rng.randrange(8), rng.random() < 0.6) for i in range(60)]
    good = [s.score for s in judged if s.good]
    bad = [s.score for s in judged if not s.good]
    wins = sum((g > b) + (g == b) / 2 for g in good for b in bad) / (len(good) * len(bad))
    found = placements(judged)
    for kind in (True, False):
        mine = [p.agreement for p, s in zip(found, judged, strict=True) if s.good == kind]
        assert sum(mine) / len(mine) == pytest.approx(wins)


def test_labels_of_one_kind_cannot_be_compared():
    assert placements([JudgedScore(1, 1.0, True), JudgedScore(2, 2.0, True)]) == []


def test_the_curve_is_the_mean_of_the_last_judgements_up_to_each_step():
    found = Agreement.of([Point(step, float(step > 1)) for step in (3, 1, 2, 2)])
    assert found.curve == [(1, 0.0), (2, pytest.approx(2 / 3)), (3, 0.75)]
    assert found.mean == 0.75


def test_a_fall_is_found_at_the_step_where_it_begins():
    rng = random.Random(0)  # noqa: S311 - no secret
    points = [Point(i // 2, float(rng.random() < (0.9 if i < 60 else 0.45))) for i in range(100)]
    fall = Agreement.of(points).fall
    assert fall is not None
    assert abs(fall.step - 30) <= 4
    assert fall.before > 0.8
    assert fall.after < 0.6


def test_a_fall_to_nothing_without_any_noise_is_one():
    points = [Point(step, float(step <= 15)) for step in range(1, 31)]
    assert find_fall(points).step == 16


@pytest.mark.parametrize("share", [0.6, 0.9])
def test_noise_alone_is_rarely_a_fall(share):
    rng = random.Random(1)  # noqa: S311 - no secret
    found = [
        find_fall([Point(step, float(rng.random() < share)) for step in range(60)])
        for _ in range(300)
    ]
    assert sum(f is not None for f in found) <= 15


def test_of_few_judgements_no_fall_is_read():
    points = [Point(step, float(step < MIN_JUDGEMENTS // 2)) for step in range(MIN_JUDGEMENTS - 1)]
    assert find_fall(points) is None


def test_the_interval_of_a_share_is_that_of_wilson():
    assert interval(0.75, 12) == (pytest.approx(0.468, abs=1e-3), pytest.approx(0.911, abs=1e-3))
    assert interval(1.0, 4)[1] == 1.0


# -- of a session ----------------------------------------------------------------------------------


def test_a_session_without_judgements_has_no_agreement(writer):
    writer.steps(1, 2)
    assert agreement_of(writer.session) == Agreement()


def test_labels_and_preferences_are_compared_with_the_recorded_scores(writer):
    writer.steps(1, 2, 3, 4)  # the score of each response is its step
    session = writer.session
    set_label(session, "prompt 0", answer(1), "good", "ana")
    set_label(session, "prompt 0", answer(2), "bad", "ana")
    set_label(session, "prompt 0", answer(4), "good", "ana")
    prefer(session, "prompt 0", answer(4), answer(3), "ana")
    prefer(session, "prompt 0", Response(response="the reference's"), answer(3), "ana")
    points = agreement_of(session).points
    assert points == [Point(1, 0.0), Point(2, 0.5), Point(4, 1.0), Point(4, 1.0)]


def test_what_belongs_to_an_abandoned_branch_is_left_out(writer):
    writer.steps(1, 2, 3)
    session = writer.session
    for step, label in ((1, "good"), (3, "bad")):
        set_label(session, "prompt 0", answer(step), label, "ana")
    assert len(agreement_of(session).points) == 2
    writer.journal.begin_attempt(2, fresh=True)
    writer.steps(3)
    assert agreement_of(session).points == []


@pytest.mark.parametrize(
    ("rule", "expected"),
    [(REWARD_CHANGED, [0.0, 0.0, 1.0, 1.0]), (REWARD_FAILED, [0.0, 0.5, 0.5, 1.0])],
)
def test_scores_of_two_rewards_are_never_compared_and_an_outage_makes_no_other_reward(
    writer, rule, expected
):
    writer.steps(1, 2, 3, 4)
    session = writer.session
    for step, label in ((1, "good"), (2, "bad"), (3, "bad"), (4, "good")):
        set_label(session, "prompt 0", answer(step), label, "ana")
    writer.journal.record_event("alert", {"rule": rule, "text": "of the reward"}, 2)
    agreements = [p.agreement for p in agreement_of(session).points]
    assert agreements == expected
