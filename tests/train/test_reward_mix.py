"""Weighted sums of reward sources."""

import threading

import pytest

from engine.train.distributed import compute_on_rank_0
from engine.train.rewards import calls
from engine.train.rewards.mix import RewardMix, WeightedReward
from engine.train.rewards.source import IncompleteScoresError, RewardCallError, RunsOn
from tests.train.minibatch import SINGLE_RANK
from tests.train.reward_inputs import TEXTS
from tests.train.two_ranks import two_ranks


def returning(*scores):
    """A source that returns these scores of three responses."""
    return lambda _inputs, _report: list(scores)


LENGTH = returning(*map(float, map(len, TEXTS)))
SOMETIMES = returning(1.5, None, None)


def test_a_mix_is_the_weighted_sum_of_the_sources_that_return_a_score(inputs):
    both = RewardMix(
        {
            "a": WeightedReward(0.5, RunsOn.RANK_0, LENGTH),
            "b": WeightedReward(2.0, RunsOn.RANK_0, SOMETIMES),
        },
        SINGLE_RANK,
    )
    scores = both(inputs)
    assert scores.total.tolist() == [5.5 + 3.0, 17.0, 1.5]
    assert scores.parts["b"] == [1.5, None, None]


def test_a_source_of_weight_zero_is_recorded_and_changes_no_score(inputs):
    sources = {
        "obeyed": WeightedReward(1.0, RunsOn.RANK_0, LENGTH),
        "watched": WeightedReward(0.0, RunsOn.RANK_0, returning(7, 7, 7)),
    }
    scores = RewardMix(sources, SINGLE_RANK)(inputs)
    alone = RewardMix({"obeyed": sources["obeyed"]}, SINGLE_RANK)(inputs)
    assert scores.total.tolist() == alone.total.tolist()
    assert scores.parts["watched"] == [7, 7, 7]


def test_a_response_that_only_a_source_of_weight_zero_scores_has_no_score(inputs):
    sources = {
        "obeyed": WeightedReward(1.0, RunsOn.RANK_0, SOMETIMES),
        "watched": WeightedReward(0.0, RunsOn.RANK_0, LENGTH),
    }
    with pytest.raises(RewardCallError, match="scored response 1"):
        RewardMix(sources, SINGLE_RANK)(inputs)


def test_a_source_s_own_normalisation_comes_before_its_weight(inputs):
    length = WeightedReward(3.0, RunsOn.RANK_0, LENGTH, normalised=True)
    mix = RewardMix({"length": length}, SINGLE_RANK)
    assert mix.normalised == ["length"]
    mix.scales = {"length": (10.0, 4.0)}
    scores = mix(inputs)
    assert scores.total.tolist() == [3 * (n - 10) / 4 for n in (11, 34, 3)]
    assert scores.parts["length"] == [11, 34, 3]


def test_a_source_is_normalised_within_groups_only_if_their_size_is_given(inputs):
    sources = {
        "a": WeightedReward(3.0, RunsOn.RANK_0, LENGTH, in_groups=True),
        "b": WeightedReward(1.0, RunsOn.RANK_0, SOMETIMES),
    }
    mix = RewardMix(sources, SINGLE_RANK)
    scores = mix(inputs)
    assert scores.total.tolist() == [3 * 11 + 1.5, 3 * 34, 3 * 3]
    deviation = (((11 - 16) ** 2 + (34 - 16) ** 2 + (3 - 16) ** 2) / 2) ** 0.5 + 1e-4
    got = mix.total(scores.parts, inputs, per_prompt=3).tolist()
    want = [3 * (n - 16) / deviation + b for n, b in ((11, 1.5), (34, 0), (3, 0))]
    assert got == pytest.approx(want, rel=1e-6)
    assert scores.parts["a"] == [11, 34, 3]


def test_remote_sources_are_called_together_and_beside_the_others(inputs):
    meeting = threading.Barrier(3)

    def meets(_inputs, _report):
        meeting.wait(60)  # raises if a call waits for another one to end
        return [1.0, 2.0, 3.0]

    sources = {
        "service": WeightedReward(1.0, RunsOn.RANK_0, meets, remote=True),
        "function": WeightedReward(10.0, RunsOn.RANK_0, meets),
        "judge": WeightedReward(100.0, RunsOn.RANK_0, meets, remote=True),
    }
    scores = RewardMix(sources, SINGLE_RANK)(inputs)
    assert scores.total.tolist() == [111.0, 222.0, 333.0]
    assert list(scores.parts) == ["service", "function", "judge"]


def test_no_more_requests_are_sent_for_a_step_whose_other_source_failed(inputs):
    begun, failed, ended = threading.Event(), threading.Event(), threading.Event()

    def service(_inputs, report):
        begun.set()
        assert failed.wait(60)
        try:
            report(1, 3)
        except calls.AbandonedError:
            ended.set()
            raise
        return [1.0, 1.0, 1.0]

    def function(_inputs, _report):
        assert begun.wait(60)
        raise ValueError

    sources = {
        "service": WeightedReward(1.0, RunsOn.RANK_0, service, remote=True),
        "function": WeightedReward(1.0, RunsOn.RANK_0, function),
    }
    with pytest.raises(RewardCallError):
        RewardMix(sources, SINGLE_RANK)(inputs)
    failed.set()
    assert ended.wait(60)


def test_only_unscored_responses_are_sent_again_to_a_remote_source(inputs, monkeypatch):
    monkeypatch.setattr(calls, "FIRST_DELAY", 0.0)
    texts = []

    def half_down(part, _report):
        texts.append(part.texts)
        if len(texts) == 1:
            raise IncompleteScoresError("down", {1: 5.0}, retry_after=0, works_again=bool)
        return [7.0] * len(part)

    source = WeightedReward(1.0, RunsOn.RANK_0, half_down, remote=True)
    scores = RewardMix({"service": source}, SINGLE_RANK, retries=1)(inputs)
    assert scores.total.tolist() == [7.0, 5.0, 7.0]
    assert texts == [TEXTS, [TEXTS[0], TEXTS[2]]]


def test_the_progress_of_a_remote_source_is_reported_where_the_mix_is_called(inputs, monkeypatch):
    monkeypatch.setattr(calls, "REPORT_INTERVAL", 0.01)
    reports, told = [], threading.Event()

    def slow(_inputs, report):
        report(2, 3)
        assert told.wait(60)
        return [1.0, 1.0, 1.0]

    def report(*progress):
        reports.append((threading.current_thread(), progress))
        if progress == (2, 3):
            told.set()

    source = WeightedReward(1.0, RunsOn.RANK_0, slow, remote=True)
    RewardMix({"service": source}, SINGLE_RANK)(inputs, report)
    assert {thread for thread, _ in reports} == {threading.current_thread()}


def test_the_other_ranks_report_while_a_source_of_rank_0_does(inputs, monkeypatch):
    monkeypatch.setattr(compute_on_rank_0, "WAITING_INTERVAL", 0.0)

    def slow(inputs, report):
        for done in range(5):
            report(done, 5)
        return [1.0] * len(inputs)

    lead, other, sent = two_ranks()
    reports = []
    for rank, reward in ((lead, slow), (other, None)):
        reported = []
        mix = RewardMix({"slow": WeightedReward(1.0, RunsOn.RANK_0, reward)}, rank)
        scores = mix(inputs, lambda *progress, to=reported: to.append(progress))
        assert scores.total.tolist() == [1.0] * len(inputs)
        reports.append(len(reported))
    assert reports == [5, 5]
    assert not sent


def test_all_ranks_raise_the_error_of_a_source_beside_which_others_are_asked(inputs):
    def down(_inputs, _report):
        raise IncompleteScoresError("down", {}, retry_after=0, works_again=bool)

    def broken(_inputs, _report):
        raise ValueError("broken")

    lead, other, sent = two_ranks()
    errors = []
    for rank, service, function in ((lead, down, broken), (other, None, None)):
        sources = {
            "service": WeightedReward(1.0, RunsOn.RANK_0, service, remote=True),
            "function": WeightedReward(1.0, RunsOn.RANK_0, function),
        }
        with pytest.raises(RewardCallError, match="'function' at step 7: ValueError") as raised:
            RewardMix(sources, rank)(inputs)
        errors.append(str(raised.value))
    assert errors[0] == errors[1]
    assert not sent
