"""Masked statistics and advantage estimators compared with slow loops over samples and tokens."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.config.sections.ppo import ADVANTAGES, PPOConfig
from engine.train.ppo import advantages, losses, masked
from engine.train.ppo.advantages import AdvantageInputs, generalised_advantages, make_targets
from tests.train.ppo_loops import (
    KINDS,
    batches,
    kept,
    masks,
    modest,
    near,
    slow_gae,
    slow_moments,
)


@modest
@given(batches(1))
def test_the_response_mask_covers_exactly_the_first_tokens(batch):
    lengths, x = batch
    mask = masked.response_mask(lengths, x.shape[1])
    want = [[t < n for t in range(x.shape[1])] for n in lengths.tolist()]
    assert mask.dtype is torch.bool
    assert mask.tolist() == want


@modest
@given(masks(1))
def test_a_masked_mean_counts_only_the_mask(batch):
    mask, x = batch
    assert near(masked.masked_mean(x, mask), slow_moments(x, mask)[0], 4)


@modest
@given(masks(1), st.booleans())
def test_whitening_scales_by_the_deviation_of_the_whole_batch(batch, shift):
    mask, x = batch
    mean, var = slow_moments(x, mask)
    scale = 1 / math.sqrt(var + 1e-8)
    got = masked.whiten(x, mask, shift_mean=shift)
    for i, t in kept(mask):
        want = (float(x[i, t]) - mean) * scale + (0.0 if shift else mean)
        # The float32 mean has an error of about 1e-7 · 4, which the scale multiplies.
        assert abs(float(got[i, t]) - want) <= 1e-5 * (1 + abs(want)) + 1e-6 * scale


@modest
@given(masks(1))
def test_whitening_without_its_scale_subtracts_the_mean(batch):
    mask, x = batch
    config = PPOConfig(advantage="reinforce_plus_plus", whiten=True, whiten_scale=False)
    rows, nothing = len(x), torch.zeros_like(x)
    inputs = AdvantageInputs(
        torch.zeros(rows), x, nothing, nothing, mask, mask.sum(1), config, 1.0, 1, None
    )
    raw = advantages.rewards_to_go(inputs)
    mean, _ = slow_moments(raw, mask)
    got = make_targets(inputs).advantages
    for i, t in kept(mask):
        assert near(got[i, t], float(raw[i, t]) - mean, 32)
    assert not got[~mask].any()


@pytest.mark.parametrize("value", [0.0, 0.5, -3.0, 100.7, 1000.7])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (40, 50)])
@pytest.mark.parametrize("shift", [True, False])
def test_whitening_constant_numbers_leaves_only_their_mean(value, shape, shift):
    x, mask = torch.full(shape, value), torch.ones(shape, dtype=torch.bool)
    got = masked.whiten(x, mask, shift_mean=shift)
    # Scores that do not vary teach nothing. The scale is 10,000: a rounded mean would be seen.
    assert got.tolist() == torch.full(shape, 0.0 if shift else value).tolist()
    assert got.dtype is torch.float32


@modest
@given(masks(2), st.sampled_from([0.0, 0.5, 0.99, 1.0]), st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_advantages_are_those_of_the_recursion_over_the_kept_tokens(batch, gamma, lam):
    mask, rewards, values = batch
    got = advantages.generalised_advantages(rewards, values, mask, gamma, lam)
    for (i, t), want in slow_gae(rewards, values, mask, gamma, lam).items():
        assert near(got[i, t], want, 64)


@pytest.mark.parametrize("width", [1, 2, 63, 64, 65, 700])
@pytest.mark.parametrize("lam", [0.95, 1.0])
def test_advantages_of_long_responses_are_those_of_the_recursion(width, lam):
    numbers = torch.Generator().manual_seed(width)
    rewards, values = torch.randn(2, 3, width, generator=numbers)
    mask = torch.rand(3, width, generator=numbers) < 0.9
    got = advantages.generalised_advantages(rewards, values, mask, 1.0, lam)
    for (i, t), want in slow_gae(rewards, values, mask, 1.0, lam).items():
        assert float(got[i, t]) == pytest.approx(want, abs=1e-4)
    assert not got[~mask].any()


@modest
@given(masks(1), st.sampled_from([0.01, 0.2, 0.5, 0.99]))
def test_tokens_of_top_entropy_are_the_share_that_no_other_token_exceeds(batch, share):
    mask, entropies = batch
    top = advantages.top_entropy(entropies, mask, share)
    chosen, others = entropies[top], entropies[mask & ~top]
    assert not (top & ~mask).any()
    assert len(others) == 0 or others.max() < chosen.min()
    wanted = max(1, round(share * int(mask.sum())))
    assert (entropies[mask] > chosen.min()).sum() < wanted <= len(chosen)


def test_only_tokens_of_top_entropy_have_an_advantage():
    scores = torch.tensor([1.0, -1.0])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    entropies = torch.tensor([[0.1, 3.0, 0.2], [2.0, 0.3, 9.0]])
    nothing = torch.zeros(mask.shape)
    inputs = advantages.AdvantageInputs(
        scores=scores, old_logprobs=nothing, ref_logprobs=nothing, values=nothing, mask=mask,
        lengths=mask.sum(1), config=PPOConfig(advantage="reward", baseline="none", top_entropy=0.4),
        beta=0.0, per_prompt=1, baseline=None, entropies=entropies,
    )  # fmt: skip
    targets = advantages.make_targets(inputs)
    assert targets.advantages.tolist() == [[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]]


def test_a_gap_in_the_mask_does_not_change_the_advantages():
    rewards = torch.tensor([[1.0, 500.0, 2.0, 500.0]])
    values = torch.tensor([[0.5, 700.0, 0.25, 700.0]])
    mask = torch.tensor([[True, False, True, False]])
    gapless = advantages.generalised_advantages(
        rewards[:, [0, 2]], values[:, [0, 2]], mask[:, [0, 2]], 0.9, 0.8
    )
    gap = advantages.generalised_advantages(rewards, values, mask, 0.9, 0.8)
    assert gap[0, [0, 2]].tolist() == gapless[0].tolist()
    # By hand: 2 − 0.25 at the last; 1 + 0.9·0.25 − 0.5 + 0.9·0.8·1.75 at the first.
    assert gapless[0].tolist() == pytest.approx([1.985, 1.75], abs=1e-6)


@modest
@given(batches(2), st.sampled_from([0.0, 0.9, 1.0]))
def test_with_lambda_zero_an_advantage_is_the_one_step_td_error(batch, gamma):
    lengths, rewards, values = batch
    mask = masked.response_mask(lengths, rewards.shape[1])
    got = advantages.generalised_advantages(rewards, values, mask, gamma, 0.0)
    for i, t in kept(mask):
        following = float(values[i, t + 1]) if t + 1 < lengths[i] else 0.0
        want = float(rewards[i, t]) + gamma * following - float(values[i, t])
        assert near(got[i, t], want, 12)


@modest
@given(batches(2), st.sampled_from([0.9, 1.0]))
def test_with_lambda_one_an_advantage_is_the_discounted_return_minus_the_value(batch, gamma):
    lengths, rewards, values = batch
    mask = masked.response_mask(lengths, rewards.shape[1])
    got = advantages.generalised_advantages(rewards, values, mask, gamma, 1.0)
    for i, t in kept(mask):
        rest = sum(gamma ** (s - t) * float(rewards[i, s]) for s in range(t, int(lengths[i])))
        assert near(got[i, t], rest - float(values[i, t]), 64)


@modest
@given(st.integers(2, 5), st.integers(1, 4), st.data())
def test_leave_one_out_subtracts_the_mean_of_the_prompts_other_responses(group, prompts, data):
    n = group * prompts
    numbers = data.draw(st.lists(st.integers(-512, 512), min_size=n, max_size=n))
    returns = torch.tensor(numbers) / 64
    got = advantages.leave_one_out(returns, group)
    for i in range(n):
        first = i - i % group
        others = [numbers[j] / 64 for j in range(first, first + group) if j != i]
        assert near(got[i], numbers[i] / 64 - sum(others) / (group - 1), 16)
        assert got.shape == returns.shape


@modest
@given(st.integers(2, 5), st.integers(1, 4), st.sampled_from(["group", "batch", "none"]), st.data())
def test_group_advantages_are_differences_to_the_group_s_mean(group, prompts, scale, data):
    n = group * prompts
    numbers = [x / 64 for x in data.draw(st.lists(st.integers(-512, 512), min_size=n, max_size=n))]
    got = advantages.group_advantages(torch.tensor(numbers), group, scale)
    for i in range(n):
        first = i - i % group
        of_group = numbers[first : first + group]
        over = {"group": of_group, "batch": numbers, "none": None}[scale]
        want = numbers[i] - sum(of_group) / group
        if over is not None:
            mean = sum(over) / len(over)
            want /= math.sqrt(sum((x - mean) ** 2 for x in over) / (len(over) - 1)) + 1e-4
        assert abs(float(got[i]) - want) <= 1e-4 * (1 + abs(want))


LENGTHS = torch.tensor([3, 7, 1, 3, 7, 1])


@pytest.mark.parametrize("score", [0.1, 100.7, 1000.7])  # their sums round in float32
@pytest.mark.parametrize(
    "estimate",
    [
        lambda scores: advantages.group_advantages(scores, 3, "group"),
        lambda scores: advantages.group_advantages(scores, 3, "none"),
        lambda scores: advantages.leave_one_out(scores, 3),
        lambda scores: scores - advantages.length_weighted_mean(scores, LENGTHS, 3),
    ],
    ids=["group", "none", "leave-one-out", "by length"],
)
def test_a_group_without_variance_gets_no_advantage(estimate, score):
    scores = torch.tensor([score, score, score, 0.0, 1.0, 2.0])
    got = estimate(scores)
    assert got[:3].tolist() == [0.0, 0.0, 0.0]
    assert got.dtype == scores.dtype
    assert advantages.constant_groups(scores, 3).tolist() == [True, False]


@modest
@given(st.integers(2, 5), st.integers(1, 4), st.sampled_from(["group", "batch", "none"]), st.data())
def test_pass_at_k_rewards_the_best_of_a_group_by_what_the_second_lacks(
    group, prompts, scale, data
):
    n = group * prompts
    scores = [x / 64 for x in data.draw(st.lists(st.integers(-512, 512), min_size=n, max_size=n))]
    config = PPOConfig(advantage="grpo_passk", scale_rewards=scale)
    got = make_targets(inputs_of(scores, config, per_prompt=group)).advantages
    assert torch.equal(got[:, 0], got[:, 1])
    for first in range(0, n, group):
        of_group = scores[first : first + group]
        best, second = sorted(of_group, reverse=True)[:2]
        over = {"group": of_group, "batch": scores, "none": None}[scale]
        want = best - second
        if over is not None:
            mean = sum(over) / len(over)
            want /= math.sqrt(sum((x - mean) ** 2 for x in over) / (len(over) - 1)) + 1e-4
        found = got[first : first + group, 0].tolist()
        assert found.pop(of_group.index(best)) == pytest.approx(want, rel=1e-4, abs=1e-4)
        assert not any(found)


@modest
@given(batches(3))
def test_opo_subtracts_the_group_s_mean_in_which_each_token_counts_alike(batch):
    lengths, old, ref, extra = batch
    scores, mask = extra[:, 0], masked.response_mask(lengths, old.shape[1])
    inputs = AdvantageInputs(  # two groups, of which the second scores 1 more
        torch.cat([scores, scores + 1]), old.repeat(2, 1), ref.repeat(2, 1),
        torch.zeros_like(old).repeat(2, 1), mask.repeat(2, 1), lengths.repeat(2),
        PPOConfig(advantage="opo"), 0.25, len(lengths), None,
    )  # fmt: skip
    got, second = make_targets(inputs).advantages.split(len(lengths))
    torch.testing.assert_close(second, got, rtol=1e-4, atol=1e-4)
    outcomes = [
        float(scores[i]) - 0.25 * float((old[i, :n] - ref[i, :n]).sum())
        for i, n in enumerate(lengths.tolist())
    ]
    of_tokens = [x for x, n in zip(outcomes, lengths.tolist(), strict=True) for _ in range(n)]
    for i, n in enumerate(lengths.tolist()):
        want = outcomes[i] - sum(of_tokens) / len(of_tokens)
        torch.testing.assert_close(got[i, :n], torch.full((n,), want), rtol=1e-4, atol=1e-4)
        assert not got[i, n:].any()


@modest
@given(st.integers(2, 3), st.sampled_from([1.0, 0.9]), st.data())
def test_the_optimal_token_baseline_is_the_mean_by_the_squared_norms_so_far(group, gamma, data):
    rows, width = group * data.draw(st.integers(1, 2)), data.draw(st.integers(1, 5))

    def numbers(low, high):
        n = rows * width
        drawn = data.draw(st.lists(st.integers(low, high), min_size=n, max_size=n))
        return torch.tensor(drawn).reshape(rows, width) / 64

    lengths = torch.tensor(data.draw(st.lists(st.integers(1, width), min_size=rows, max_size=rows)))
    old, ref, scores = numbers(-256, -1), numbers(-256, -1), numbers(-256, 256)[:, 0]
    squared = torch.maximum(old.exp() ** 2, numbers(1, 64))
    mask = masked.response_mask(lengths, width)
    config = PPOConfig(advantage="optimal_token_baseline", gamma=gamma)
    got = make_targets(
        AdvantageInputs(
            scores, old, ref, torch.zeros_like(old), mask, lengths, config, 0.25, group, None,
            squared_probs=squared,
        )
    ).advantages  # fmt: skip
    returns, weights = {}, {}
    for i, n in enumerate(lengths.tolist()):
        total = 0.0
        for t in reversed(range(n)):
            kl = float(old[i, t]) - float(ref[i, t])
            total = gamma * total - 0.25 * kl + (float(scores[i]) if t == n - 1 else 0.0)
            returns[i, t] = total
        so_far = 0.0
        for t in range(n):
            so_far += 1 - 2 * math.exp(float(old[i, t])) + float(squared[i, t])
            weights[i, t] = so_far
    for (i, t), own in returns.items():
        first = i - i % group
        there = [(j, t) for j in range(first, first + group) if (j, t) in returns]
        mean = sum(weights[p] * returns[p] for p in there) / (sum(weights[p] for p in there) + 1e-8)
        want = own - (mean if len(there) > 1 else 0.0)
        assert abs(float(got[i, t]) - want) <= 1e-3
    assert not got[~mask].any()


@modest
@given(batches(3), st.sampled_from([1.0, 0.9]), st.sampled_from(["k1", "k2", "k3", "abs"]))
def test_reinforce_plus_plus_sums_the_rewards_from_each_token_on(batch, gamma, estimator):
    lengths, old, ref, extra = batch
    scores, mask = extra[:, 0], masked.response_mask(lengths, old.shape[1])
    config = PPOConfig(advantage="reinforce_plus_plus", gamma=gamma, whiten=False)
    inputs = AdvantageInputs(
        scores, old, ref, torch.zeros_like(old), mask, lengths, config, 0.25, 1, None, estimator
    )
    got = make_targets(inputs).advantages
    for i, n in enumerate(lengths.tolist()):
        total = 0.0
        for t in reversed(range(n)):
            d = float(old[i, t]) - float(ref[i, t])
            kl = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d, "abs": abs(d)}[estimator]
            total = gamma * total - 0.25 * kl + (float(scores[i]) if t == n - 1 else 0.0)
            assert near(got[i, t], total, 32 * math.exp(8))
    assert not got[~mask].any()


@modest
@given(
    batches(4),
    st.sampled_from([None, 0.5, 1.0]),
    st.sampled_from([None, 0.05, 0.4]),
)
def test_advantages_and_returns_may_have_lambdas_of_their_own(batch, lam_value, alpha):
    lengths, old, values, extra = batch[:4]
    scores, mask = extra[:, 0], masked.response_mask(lengths, old.shape[1])
    config = PPOConfig(lam=0.9, lam_value=lam_value, lam_alpha=alpha, whiten=False)
    targets = make_targets(
        AdvantageInputs(scores, old, old, values, mask, lengths, config, 0.1, 1, None)
    )
    for i, n in enumerate(lengths.tolist()):
        row = slice(i, i + 1)
        rewards = torch.zeros_like(values[row])
        rewards[0, n - 1] = scores[i]
        lam = 0.9 if alpha is None else max(0.0, 1 - 1 / (alpha * n))
        for_policy = slow_gae(rewards, values[row], mask[row], 1.0, lam)
        for_value = slow_gae(
            rewards, values[row], mask[row], 1.0, 0.9 if lam_value is None else lam_value
        )
        for _, t in for_policy:
            assert near(targets.advantages[i, t], for_policy[0, t], 64)
            assert near(targets.returns[i, t], for_value[0, t] + float(values[i, t]), 64)


@modest
@given(masks(2))
def test_explained_variance_is_one_minus_the_unexplained_fraction(batch):
    mask, values, returns = batch
    _, var = slow_moments(returns, mask)
    got = float(masked.explained_variance(values, returns, mask))
    if var == 0:
        assert math.isnan(got)
    else:
        unexplained = slow_moments(returns - values, mask)[1] / var
        assert abs(got - (1 - unexplained)) <= 1e-4 * (1 + unexplained + 1e-4 / var)


def test_returns_that_do_not_vary_have_no_explained_variance():
    returns, mask = torch.full((40, 50), 100.7), torch.ones(40, 50, dtype=torch.bool)
    assert math.isnan(float(masked.explained_variance(torch.zeros_like(returns), returns, mask)))


@modest
@given(batches(4), KINDS, st.floats(-1e4, 1e4, width=32))
def test_padding_beyond_the_length_changes_nothing(batch, kind, junk):
    lengths, new, old, advantage, returns = batch
    mask = masked.response_mask(lengths, new.shape[1])
    clean, dirty = [
        [torch.where(mask, x, filler) for x in (new, old, advantage, returns)]
        for filler in (torch.zeros(()), torch.tensor(junk))
    ]

    def everything(new, old, advantage, returns):
        terms = losses.policy_terms(new, old, advantage, mask, PPOConfig(ratio=kind))
        gae = generalised_advantages(new, old, mask, 0.9, 0.8)
        tables = [gae, masked.whiten(advantage, mask), losses.log_ratio(new, old, mask, kind)]
        return [
            *[x[mask] for x in tables],
            *[torch.as_tensor(x) for x in vars(terms).values()],
            *losses.value_terms(new, old, returns, mask, 0.2),
            masked.explained_variance(new, returns, mask),
        ]

    for a, b in zip(everything(*clean), everything(*dirty), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, equal_nan=True)


def inputs_of(scores, config, baseline=None, per_prompt=2):
    """Responses of two tokens with a KL of 0: their outcomes are their scores."""
    b = len(scores)
    zeros, lengths = torch.zeros(b, 2), torch.full((b,), 2)
    mask = torch.ones(b, 2, dtype=torch.bool)
    return AdvantageInputs(
        torch.tensor(scores), zeros, zeros, zeros, mask, lengths, config, 0.1, per_prompt, baseline,
        greedy_scores=torch.arange(float(b)), squared_probs=zeros,
    )  # fmt: skip


def test_remax_subtracts_the_score_of_the_greedy_response_from_the_rewards_to_go():
    config = PPOConfig(advantage="remax", gamma=0.5, whiten=False)
    logprobs = torch.tensor([[1.0, 2.0, 0.0], [4.0, 0.0, 0.0]])
    inputs = AdvantageInputs(
        torch.tensor([8.0, 6.0]), logprobs, torch.zeros(2, 3), torch.zeros(2, 3),
        torch.tensor([[True, True, False], [True, False, False]]), torch.tensor([2, 1]), config,
        0.25, 1, None, greedy_scores=torch.tensor([1.0, 10.0]),
    )  # fmt: skip
    first = -0.25 + 0.5 * (8 - 0.5)
    assert make_targets(inputs).advantages.tolist() == [[first - 1, 6.5, 0.0], [5.0 - 10, 0.0, 0.0]]


def test_every_declared_estimator_has_a_function_and_every_function_is_declared():
    assert set(advantages.ESTIMATORS) == set(ADVANTAGES)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_an_estimator_returns_values_exactly_where_it_declares_a_value_function(name):
    targets = make_targets(inputs_of([1.0, 3.0], PPOConfig(advantage=name, whiten=False)))
    assert (targets.returns is not None) == ADVANTAGES[name].value_function
    assert (targets.old_values is not None) == ADVANTAGES[name].value_function
    assert targets.advantages.shape == (2, 2)


@pytest.mark.parametrize(
    ("trait", "value"),
    [("baseline", "none"), ("scale_rewards", "none"), ("scale_rewards", "batch")],
)
@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_key_of_some_estimators_has_an_effect_exactly_on_those_that_declare_it(
    name, trait, value
):
    changed, default = (
        make_targets(inputs_of([1.0, 3.0, 2.0, 9.0], PPOConfig(advantage=name, **keys))).advantages
        for keys in ({trait: value}, {})
    )
    assert (not changed.equal(default)) == getattr(ADVANTAGES[name], trait)


def test_the_baseline_of_the_batch_is_the_mean_of_its_scores_less_their_kl():
    config = PPOConfig(advantage="reward", baseline="batch", whiten=False)
    logprobs = torch.tensor([[1.0, 2.0], [3.0, 4.0]])  # a KL of 3 and of 7
    inputs = dataclasses.replace(inputs_of([4.0, 8.0], config), old_logprobs=logprobs)
    got = make_targets(inputs).advantages[:, 0].tolist()
    assert got == pytest.approx([3.7 - 5.5, 7.3 - 5.5])


def test_the_running_baseline_is_a_moving_average_with_decay_nine_tenths():
    config = PPOConfig(advantage="reward", baseline="running", whiten=False)
    first = make_targets(inputs_of([1.0, 3.0], config))
    assert first.advantages[:, 0].tolist() == [-1.0, 1.0]
    assert first.baseline == 2.0
    second = make_targets(inputs_of([12.0, 12.0], config, first.baseline))
    assert second.advantages[:, 0].tolist() == [10.0, 10.0]
    assert second.baseline == pytest.approx(0.9 * 2.0 + 0.1 * 12.0)
