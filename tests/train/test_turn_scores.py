"""Scores of turns: they are given at the end of each turn instead of at the end of the response."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.config.sections.ppo import PPOConfig
from engine.train.evaluation.evaluate import evaluate
from engine.train.ppo import masked
from engine.train.ppo.advantages import AdvantageInputs, make_targets
from engine.train.rewards.mix import RewardMix, WeightedReward
from engine.train.rewards.source import RewardCallError, RunsOn
from engine.train.rollout.conversation import Turns
from engine.train.step import train_step
from tests.train.minibatch import SINGLE_RANK
from tests.train.ppo_loops import modest
from tests.train.repeating import ENVIRONMENT, STOPS
from tests.train.reward_inputs import three_responses

BY_TURN = ("reward.model=null", "reward.environment=by_turn")
RECORDED = "log={samples: 8, arrays: 8}"
UNDISCOUNTED = ("ppo={advantage: reinforce_plus_plus, whiten: false}", "kl.beta=0", RECORDED)


def turns_of(samples):
    """The texts of the policy's turns, by sample."""
    for sample in samples:
        ends = [0, *(end for _, end in sample.replies)]
        starts = [*(start for start, _ in sample.replies), len(sample.response)]
        yield [sample.response[a:b] for a, b in zip(ends, starts, strict=True)]


def test_a_token_earns_the_scores_of_its_turn_and_of_later_ones(make_run):
    run, _ = make_run(*ENVIRONMENT, STOPS, *BY_TURN, *UNDISCOUNTED)
    _, samples = train_step(run, 1)
    counts = set()
    for sample, texts in zip(samples, turns_of(samples), strict=True):
        counts.add(len(texts))
        scores = [len(text) / 10 for text in texts]
        if len(texts) != 3:
            scores = [sum(scores)]  # given at the end
            assert sample.turn_scores == {}
        else:
            assert sample.turn_scores["by_turn"] == pytest.approx(scores)
        starts = [0, *sample.arrays.before_replies][: len(scores)]
        want = [
            sum(s for start, s in zip([*starts[1:], 10**6], scores, strict=True) if at < start)
            for at in range(sample.length)
        ]
        assert sample.arrays.advantage == pytest.approx(want, abs=1e-5)
        assert sample.score == pytest.approx(sum(scores))
    assert counts == {1, 2, 3}


def test_scores_of_turns_have_the_scale_of_the_scores_for_training_and_not_their_mean(make_run):
    run, _ = make_run(*ENVIRONMENT, STOPS, *BY_TURN, *UNDISCOUNTED)
    run.state.reward_mean, run.state.reward_std = 1.0, 4.0
    _, samples = train_step(run, 1)
    of_three = [sample for sample in samples if len(sample.replies) == 2]
    assert of_three
    for sample in of_three:
        scores = sample.turn_scores["by_turn"]
        starts = [0, *sample.arrays.before_replies]
        for turn, start in enumerate(starts):
            want = (sum(scores[turn:]) - 1) / 4  # the last token gets the mean
            assert sample.arrays.advantage[start] == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("advantage", ["gae", "grpo"])
def test_an_estimator_that_uses_outcomes_only_sees_the_sum_of_the_turns(make_run, advantage):
    given_at_once = ("reward.model=null", "reward.environment=letters")  # the same sum
    steps = []
    for scored in (BY_TURN, given_at_once):
        run, _ = make_run(
            *ENVIRONMENT, STOPS, *scored, f"ppo.advantage={advantage}", "rollout.per_prompt=4",
            RECORDED,
        )  # fmt: skip
        steps.append(train_step(run, 1))
    (of_turns, samples), (at_once, others) = steps
    assert of_turns["objective/scores"] == pytest.approx(at_once["objective/scores"])
    advantages, wanted = ([s.arrays.advantage for s in found] for found in (samples, others))
    same = advantages == [pytest.approx(row, abs=1e-5) for row in wanted]
    assert same == (advantage == "grpo")


@modest
@given(st.data())
def test_rewards_of_turns_leave_the_sum_of_a_response_s_rewards_as_it_is(data):
    """With a discount, they are nearer to the tokens of their turn."""
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)))
    rows, width = len(lengths), int(lengths.max())
    numbers = st.floats(-4, 4, width=16)
    mask = masked.response_mask(lengths, width)
    scores = torch.tensor(data.draw(st.lists(numbers, min_size=rows, max_size=rows)))
    cells = st.lists(numbers, min_size=width, max_size=width)
    early = torch.tensor(data.draw(st.lists(cells, min_size=rows, max_size=rows))) * mask
    nothing = torch.zeros(rows, width)
    config = PPOConfig(advantage="reinforce_plus_plus", gamma=0.5, whiten=False)
    inputs = AdvantageInputs(
        scores, nothing, nothing, nothing, mask, lengths, config, 0.0, 1, None, turn_rewards=early
    )
    assert torch.allclose(inputs.token_rewards.sum(1), scores, atol=1e-5)
    assert not inputs.token_rewards[~mask].any()
    advantages = make_targets(inputs).advantages
    for i, n in enumerate(lengths.tolist()):
        rewards = early[i, :n].tolist()
        rewards[-1] += float(scores[i]) - sum(rewards)
        for t in range(n):
            want = sum(0.5 ** (k - t) * rewards[k] for k in range(t, n))
            assert float(advantages[i, t]) == pytest.approx(want, abs=1e-4)


@pytest.fixture
def inputs(tokenizer):
    """Three responses of which the second has three turns and the others have one."""
    turns = [Turns([], [(0, 0)] * (n - 1)) for n in (1, 3, 1)]
    return dataclasses.replace(three_responses(tokenizer), turns=turns)


def mix_of(**sources):
    """A mix of sources that return these lists, each with the options of a WeightedReward."""
    return RewardMix(
        {
            name: WeightedReward(weight, RunsOn.RANK_0, lambda *_, s=scores: list(s), **options)
            for name, (weight, scores, options) in sources.items()
        },
        SINGLE_RANK,
    )


def test_scores_of_turns_have_the_weight_and_the_scale_of_their_source(inputs):
    mix = mix_of(
        a=(2.0, [1.0, [1.0, 2.0, 3.0], None], {"normalised": True}),
        b=(1.0, [[4.0], [0.0, 0.0, 8.0], 6.0], {}),
        c=(1.0, [0.0, 1.0, 0.0], {}),
    )
    mix.scales = {"a": (10.0, 4.0)}
    scores = mix(inputs)
    assert scores.parts["a"] == [1.0, 6.0, None]
    assert scores.parts["b"] == [4.0, 8.0, 6.0]  # the only turn's score is the response's
    assert scores.total.tolist() == [2 * (1 - 10) / 4 + 4, 2 * (6 - 10) / 4 + 8 + 1, 6.0]
    totals = mix.turn_totals(scores)
    assert totals == [[], [2 * 1 / 4, 2 * 2 / 4, 2 * 3 / 4 + 8], []]


def test_scores_of_turns_are_divided_by_the_deviation_of_their_group(inputs):
    mix = mix_of(a=(3.0, [1.0, [1.0, 2.0, 3.0], 2.0], {"in_groups": True}))
    scores = mix(inputs)
    (_, totals, _) = mix.turn_totals(scores, per_prompt=3)
    deviation = 7**0.5 + 1e-4  # of 1, 6 and 2
    assert totals == pytest.approx([3 * s / deviation for s in (1, 2, 3)])


@pytest.mark.parametrize(
    "score", [[1.0, 2.0], [], [1.0, 2.0, None], [1.0, 2.0, [3.0]], [3e38] * 3, [1.0, 2.0, "x"]]
)
def test_a_list_that_is_not_one_finite_number_for_each_turn_is_refused(inputs, score):
    with pytest.raises(
        RewardCallError, match="a list of 3, one for each turn of the policy, or None"
    ):
        mix_of(a=(1.0, [0.0, score, 0.0], {}))(inputs)


def test_arrays_are_lists_too(inputs):
    scores = [torch.tensor([0.5]), torch.tensor([1.0, 2.0, 3.0]).numpy(), (2,)]
    found = mix_of(a=(1.0, scores, {}))(inputs)
    assert found.parts["a"] == [0.5, 6.0, 2.0]
    assert found.turns["a"] == [None, [1.0, 2.0, 3.0], None]


class FirstDull:
    """A mix whose first scores are all 0, without turns, so that all prompts are drawn again."""

    def __init__(self, mix):
        self.mix = mix
        self.turn_totals = mix.turn_totals
        self.calls = 0

    def __call__(self, inputs, *args, **options):
        self.calls += 1
        found = self.mix(inputs, *args, **options)
        if self.calls > 1:
            return found
        none = {name: [None] * len(inputs) for name in found.turns}
        return dataclasses.replace(found, total=torch.zeros(len(inputs)), turns=none)


def test_replaced_prompts_bring_the_scores_of_their_turns(make_run):
    run, _ = make_run(
        *ENVIRONMENT, STOPS, *BY_TURN, *UNDISCOUNTED, "rollout.per_prompt=2", "rollout.dynamic=true"
    )
    run.rewards = FirstDull(run.rewards)
    _, samples = train_step(run, 1)
    assert run.rewards.calls > 1
    long = [s for s in samples if len(s.replies) == 2]
    assert long
    for sample, texts in zip(samples, turns_of(samples), strict=True):
        want = {"by_turn": [len(t) / 10 for t in texts]} if sample in long else {}
        assert {k: pytest.approx(v) for k, v in sample.turn_scores.items()} == want


def test_responses_to_held_out_prompts_have_the_scores_of_their_turns(make_run):
    run, _ = make_run(*ENVIRONMENT, STOPS, *BY_TURN, "eval={every: 1, holdout: 8}")
    found = evaluate(run, run.held_out, 1)
    of_three = [sample for sample in found.samples if len(sample.replies) == 2]
    assert of_three
    for sample, texts in zip(of_three, turns_of(of_three), strict=True):
        assert sample.turn_scores["by_turn"] == pytest.approx([len(text) / 10 for text in texts])
