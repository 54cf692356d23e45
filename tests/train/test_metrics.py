"""A step's metrics compared with slow loops over samples and tokens.

The relative tolerance is 1e-5: float32 sums of at most 32 numbers.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config.schema import RunConfig
from engine.config.sections.model import DataConfig, ModelConfig
from engine.config.sections.ppo import KLConfig, PPOConfig
from engine.config.sections.reward import RewardConfig
from engine.config.sections.rollout import RolloutConfig
from engine.train.data.prompts import PromptBatch
from engine.train.ppo.advantages import Targets
from engine.train.ppo.metrics import distinct_2, group_metrics, source_metrics, step_metrics
from engine.train.ppo.update_stats import LossSums, UpdateStats
from engine.train.rollout.rollout import Rollout

modest = settings(max_examples=40, deadline=None, derandomize=True)


def optimised(**sums):
    total = LossSums(**{"tokens": 40.0, "ratio": 40.0, "squared_ratio": 41.0, **sums})
    return UpdateStats(sums=total, grad_norms=[1.0, 3.0], updates=2)


@st.composite
def steps(draw, min_responses=1):
    """A rollout with scores, reference log-probabilities and targets; 0 beyond the lengths."""
    b, t = draw(st.integers(min_responses, 4)), draw(st.integers(1, 6))
    lengths = torch.tensor(draw(st.lists(st.integers(1, t), min_size=b, max_size=b)))
    mask = torch.arange(t)[None] < lengths[:, None]

    def numbers(*shape):
        n = math.prod(shape)
        values = draw(st.lists(st.integers(-256, 256), min_size=n, max_size=n))
        return torch.tensor(values).reshape(shape) / 64

    def flags():
        return torch.tensor(draw(st.lists(st.booleans(), min_size=b, max_size=b)))

    eos = flags()
    logprobs = -numbers(b, t).abs() * mask
    rollout = Rollout(
        batch=PromptBatch([], torch.zeros(b, 1, dtype=torch.int64), torch.ones(b).long()),
        ids=torch.ones(b, t, dtype=torch.int64) * mask,
        lengths=lengths,
        eos=eos,
        ended=eos | flags(),
        logprobs=logprobs,
        entropies=numbers(b, t).abs() * mask,
        values=numbers(b, t) * mask,
        texts=[f"a b {i}" for i in range(b)],
    )
    targets = Targets(logprobs, numbers(b, t) * mask, rollout.values, numbers(b, t) * mask)
    return rollout, numbers(b), -numbers(b, t).abs() * mask, targets


def config_with(**sections):
    return RunConfig(
        model=ModelConfig(policy="p"),
        data=DataConfig(prompts="d"),
        reward=RewardConfig(function="m:f"),
        **sections,
    )


def measure(step, beta=0.5, stats=None):
    return step_metrics(*step, stats or optimised(), config_with(kl=KLConfig(beta=beta)))


def tokens(rollout):
    return [(i, t) for i, n in enumerate(rollout.lengths.tolist()) for t in range(n)]


def same(got, want):
    return math.isclose(got, want, rel_tol=1e-5, abs_tol=1e-5)


def mean(numbers):
    return math.fsum(numbers) / len(numbers)


@modest
@given(steps())
def test_the_kl_is_summed_over_a_response_and_averaged_over_the_batch(step):
    rollout, _, ref, targets = step
    gaps = [float(targets.old_logprobs[p]) - float(ref[p]) for p in tokens(rollout)]
    metrics = measure(step)
    assert same(metrics["objective/kl"], math.fsum(gaps) / len(rollout.lengths))
    assert same(metrics["objective/kl_per_token"], mean(gaps))


@modest
@given(steps(), st.sampled_from([0.0, 0.05, 3.0]))
def test_the_rlhf_reward_is_the_score_minus_beta_times_the_kl(step, beta):
    rollout, scores, ref, targets = step
    penalties = [
        -beta * sum(float(targets.old_logprobs[i, t]) - float(ref[i, t]) for t in range(n))
        for i, n in enumerate(rollout.lengths.tolist())
    ]
    metrics = measure(step, beta)
    assert metrics["objective/kl_coef"] == beta
    assert same(metrics["objective/scores"], mean(scores.tolist()))
    assert same(metrics["objective/non_score_reward"], mean(penalties))
    assert same(metrics["objective/rlhf_reward"], mean(scores.tolist()) + mean(penalties))


@modest
@given(steps(min_responses=2))
def test_the_scores_standard_deviation_is_that_of_the_batch(step):
    scores = step[1].tolist()
    squares = math.fsum((s - mean(scores)) ** 2 for s in scores)
    assert same(measure(step)["objective/scores_std"], math.sqrt(squares / len(scores)))


@modest
@given(st.integers(2, 4), st.integers(1, 4), st.data())
def test_the_spread_of_scores_is_that_within_prompts(group, prompts, data):
    n = group * prompts
    numbers = data.draw(st.lists(st.integers(-2, 2), min_size=n, max_size=n))
    groups = [numbers[i : i + group] for i in range(0, n, group)]
    deviations = [math.sqrt(mean([(x - mean(g)) ** 2 for x in g])) for g in groups]
    scores = torch.tensor(numbers, dtype=torch.float32)
    metrics = group_metrics(scores, scores, group)
    assert same(metrics["objective/group_std"], mean(deviations))
    assert same(metrics["objective/zero_std_frac"], mean([len(set(g)) == 1 for g in groups]))


def test_a_source_has_the_mean_of_the_responses_that_it_scores():
    parts = {"some": [1.0, None, 4.0], "none": [None, None, None], "all": [0.0, 1.0, 5.0]}
    assert source_metrics(parts) == {"reward/some": 2.5, "reward/all": 2.0}
    assert source_metrics({"alone": [1.0, 2.0]}) == {}  # the score itself


def test_scores_that_differ_by_rounding_have_no_variance():
    scores = torch.tensor([100.0, 100.00001, 0.0, 1e-3])
    assert group_metrics(scores, scores, 2)["objective/zero_std_frac"] == 0.5
    assert group_metrics(scores, scores, 1) == {}


@modest
@given(steps(), st.sampled_from(["k2", "k3"]), st.sampled_from(["reward", "loss"]))
def test_the_kl_stays_k1_and_the_penalised_estimate_is_beside_it(step, estimator, place):
    rollout, scores, ref, targets = step
    kl = KLConfig(beta=0.5, estimator=estimator, place=place)
    metrics = step_metrics(
        *step, optimised(), config_with(kl=kl, rollout=RolloutConfig(per_prompt=1))
    )
    plain = measure(step)
    gaps = [float(targets.old_logprobs[p]) - float(ref[p]) for p in tokens(rollout)]
    estimates = [d**2 / 2 if estimator == "k2" else math.exp(-d) - 1 + d for d in gaps]
    want = math.fsum(estimates) / len(scores)
    assert metrics["objective/kl"] == plain["objective/kl"]
    assert metrics["objective/rlhf_reward"] == plain["objective/rlhf_reward"]
    assert math.isclose(metrics["objective/kl_penalty"], want, rel_tol=1e-4, abs_tol=1e-4)
    assert "objective/kl_penalty" not in plain


@modest
@given(steps())
def test_the_two_entropies_are_per_response_and_per_token(step):
    rollout, _, _, targets = step
    metrics = measure(step)
    negative_logprobs = [-float(targets.old_logprobs[p]) for p in tokens(rollout)]
    assert same(metrics["objective/entropy"], math.fsum(negative_logprobs) / len(rollout.lengths))
    entropies = [float(rollout.entropies[p]) for p in tokens(rollout)]
    assert same(metrics["policy/entropy_avg"], mean(entropies))


@modest
@given(steps())
def test_lengths_and_truncation_are_averaged_over_responses(step):
    rollout = step[0]
    metrics = measure(step)
    cut = [not ended for ended in rollout.ended.tolist()]
    assert same(metrics["tokens/response_len_mean"], mean(rollout.lengths.tolist()))
    assert same(metrics["tokens/truncated_frac"], mean(cut))
    assert metrics["val/num_eos_tokens"] == sum(rollout.eos.tolist())


@modest
@given(steps())
def test_the_explained_variance_is_that_of_the_values_before_the_update(step):
    rollout, _, _, targets = step
    returns = [float(targets.returns[p]) for p in tokens(rollout)]
    rest = [float(targets.returns[p]) - float(targets.old_values[p]) for p in tokens(rollout)]

    def variance(numbers):
        return mean([(n - mean(numbers)) ** 2 for n in numbers])

    metrics = measure(step)
    if variance(returns) == 0:
        assert "val/explained_var" not in metrics
    else:
        want = 1 - variance(rest) / variance(returns)
        assert math.isclose(metrics["val/explained_var"], want, rel_tol=1e-3, abs_tol=1e-3)


@modest
@given(steps())
def test_advantages_returns_and_values_are_described_over_response_tokens(step):
    rollout, _, _, targets = step
    metrics = measure(step)
    described = {
        "advantages": targets.advantages,
        "returns": targets.returns,
        "values": targets.old_values,
    }
    for name, tensor in described.items():
        numbers = [float(tensor[p]) for p in tokens(rollout)]
        assert same(metrics[f"{name}/mean"], mean(numbers))
        deviation = math.sqrt(mean([(n - mean(numbers)) ** 2 for n in numbers]))
        assert math.isclose(metrics[f"{name}/std"], deviation, rel_tol=1e-4, abs_tol=1e-5)
        assert metrics[f"{name}/min"] == min(numbers)
        assert metrics[f"{name}/max"] == max(numbers)


@modest
@given(steps(), st.floats(-1e4, 1e4, width=32))
def test_padding_beyond_the_lengths_changes_no_metric(step, junk):
    rollout, scores, ref, targets = step
    mask = rollout.mask
    clean = measure(step)
    for name in ("entropies", "logprobs", "values"):
        setattr(rollout, name, torch.where(mask, getattr(rollout, name), torch.tensor(junk)))
    dirty = [
        torch.where(mask, x, torch.tensor(junk))
        for x in (targets.old_logprobs, targets.advantages, targets.old_values, targets.returns)
    ]
    ref = torch.where(mask, ref, torch.tensor(-junk))
    assert measure((rollout, scores, ref, Targets(*dirty))) == pytest.approx(clean, rel=1e-5)


@pytest.fixture
def plain_step():
    mask = torch.ones(2, 2)
    rollout = Rollout(
        batch=PromptBatch([], torch.zeros(2, 1, dtype=torch.int64), torch.ones(2).long()),
        ids=mask.long(),
        lengths=torch.tensor([2, 2]),
        eos=torch.tensor([True, False]),
        ended=torch.tensor([True, False]),
        logprobs=-mask,
        entropies=mask,
        values=mask,
        texts=["one two", "one two three"],
    )
    returns = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    return rollout, torch.ones(2), -mask, Targets(-mask, mask, mask, returns)


def test_the_optimisers_sums_become_means_over_all_trained_tokens(plain_step):
    stats = optimised(
        policy_loss=-8.0,
        value_loss=20.0,
        clipped_high=3.0,
        clipped_low=1.0,
        dual_clipped=2.0,
        entropy=60.0,
        kl=12.0,
        value_clipped=6.0,
        squared_log_ratio=1.6,
        ratio=44.0,
        squared_ratio=50.0,
    )
    config = config_with(
        ppo=PPOConfig(dual_clip=3.0, entropy_coef=0.1),
        kl=KLConfig(place="loss", estimator="k3"),
    )
    metrics = step_metrics(*plain_step, stats, config)
    want = {
        "policy/clipfrac_high": 0.075,
        "policy/clipfrac_low": 0.025,
        "policy/dual_clipfrac": 0.05,
        "loss/entropy_avg": 1.5,
        "loss/kl_avg": 0.3,
        "loss/policy_avg": -0.2,
        "loss/value_avg": 0.5,
        "policy/clipfrac_avg": 0.1,
        "val/clipfrac_avg": 0.15,
        "policy/approxkl_avg": 0.02,
        "val/ratio": 1.1,
        "val/ratio_var": 1.25 - 1.21,
        "grad_norm": 2.0,
    }
    assert {name: metrics[name] for name in want} == pytest.approx(want, rel=1e-5)


def test_without_a_value_function_its_metrics_are_left_out(plain_step):
    rollout, scores, ref, targets = plain_step
    without = Targets(targets.old_logprobs, targets.advantages)
    metrics = measure((rollout, scores, ref, without))
    of_values = {"loss/value_avg", "val/clipfrac_avg", "val/explained_var", "returns/mean"}
    assert not (of_values | {"values/mean"}) & set(metrics)
    assert {"loss/policy_avg", "advantages/mean"} <= set(metrics)


def test_when_every_minibatch_was_skipped_no_metric_is_undefined(plain_step):
    metrics = measure(plain_step, stats=UpdateStats(skipped=4))
    assert all(math.isfinite(value) for value in metrics.values())
    assert "loss/policy_avg" not in metrics


@modest
@given(st.lists(st.lists(st.sampled_from(["a", "b", "c"]), max_size=6), max_size=4))
def test_distinct_2_is_the_fraction_of_different_word_pairs(responses):
    pairs = []
    for words in responses:
        for i in range(len(words) - 1):
            pairs.append((words[i], words[i + 1]))  # noqa: PERF401
    want = len(set(pairs)) / len(pairs) if pairs else None
    assert distinct_2([" ".join(words) for words in responses]) == pytest.approx(want)


def test_responses_of_one_word_have_no_fraction_of_different_word_pairs(plain_step):
    rollout, *others = plain_step
    pairs, single = (replace(rollout, texts=[text] * 2) for text in ("two words", "word"))
    assert measure((pairs, *others))["text/distinct_2"] == 0.5
    assert "text/distinct_2" not in measure((single, *others))
