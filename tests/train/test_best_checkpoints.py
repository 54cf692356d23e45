"""By what checkpoints are compared, and which are kept."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.metrics import SCORE
from engine.protocol.rank_messages import Begin
from engine.train.checkpoints import folder as checkpoint_folder
from engine.train.checkpoints.folder import MetricValue
from engine.train.distributed.ranks import RankGroup
from engine.train.load import load_run
from tests.train.checkpoints import save_checkpoint


@pytest.fixture
def trained(shared_run):
    """A run after its first step, which no test trains further."""
    return shared_run(steps=1)


def test_checkpoints_are_compared_by_the_metric_that_is_best_metric_now(trained):
    run, session = trained
    folder = save_checkpoint(run, session, score=2.0, best=MetricValue("eval/score", 3.0))
    metrics, own = ("eval/score", SCORE, "eval/kl"), run.state.scored_by
    assert [checkpoint_folder.read_best(folder, m, own) for m in metrics] == [3.0, 2.0, -math.inf]


def test_scores_of_another_reward_are_not_compared(trained):
    run, session = trained
    folder = save_checkpoint(run, session, score=2.0, best=MetricValue("eval/reward/judge", 3.0))
    metrics = (SCORE, "eval/score", "eval/reward/judge")
    found = [checkpoint_folder.read_best(folder, m, "another one") for m in metrics]
    assert found == [-math.inf, -math.inf, 3.0]


def test_a_checkpoint_of_a_step_whose_metrics_are_not_finite_can_be_read(trained):
    run, session = trained
    folder = save_checkpoint(run, session, score=math.nan, best=MetricValue(SCORE, math.nan))
    assert checkpoint_folder.read_best(folder, SCORE, run.state.scored_by) == -math.inf
    config = session.config()
    begin = Begin(attempt=2, from_step=1)
    assert load_run(session, config, begin, RankGroup(config.launch)).state.step == 1


@given(
    scores=st.dictionaries(st.integers(1, 50), st.floats(-5, 5), min_size=1),
    last=st.integers(1, 4),
    best=st.integers(0, 3),
)
def test_the_newest_and_the_best_checkpoints_are_kept(scores, last, best):
    removed = checkpoint_folder.to_remove(scores, last, best)
    remaining = set(scores) - set(removed)
    assert max(scores) in remaining
    assert len(remaining) <= last + best
    if best and removed:
        assert max(scores.values()) in {scores[s] for s in remaining}
    assert len(remaining) >= min(len(scores), last)


@pytest.mark.parametrize(
    ("alerts", "removed"),
    [
        ([], [10, 20, 30]),
        ([25], [10, 30]),
        ([20], [20, 30]),
        ([5, 35, 45], [10, 20]),
        ([5], [10, 20, 30]),
    ],
)
def test_the_newest_checkpoint_before_the_first_alert_that_has_one_is_kept(alerts, removed):
    scores = dict.fromkeys((10, 20, 30, 40, 50), 0.0)
    assert checkpoint_folder.to_remove(scores, 2, 0, alerts) == removed


@pytest.mark.parametrize(
    ("kept", "removed"),
    [([], [10, 20, 30]), ([10], [20, 30]), ([50], [10, 20]), ([20, 40], [10]), ([40, 50], [10])],
)
def test_what_an_operator_saved_is_kept_and_does_not_count(kept, removed):
    scores = dict.fromkeys((10, 20, 30, 40, 50), 0.0)
    assert checkpoint_folder.to_remove(scores, 2, 0, kept=kept) == removed


def test_one_that_an_operator_saved_before_an_alert_is_enough():
    scores = dict.fromkeys((10, 20, 30, 40, 50), 0.0)
    assert checkpoint_folder.to_remove(scores, 1, 0, [35], kept=[30]) == [10, 20, 40]
