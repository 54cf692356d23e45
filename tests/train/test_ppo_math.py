"""The PPO numerics compared with slow loops over samples and tokens.

The drawn numbers are multiples of 1/64, which are exact in float32. So float32 and the loops, in
double precision, take the same branch of every max and clip. The tolerance of a sum is 1e-5 of the
sum of its terms' magnitudes: a few float32 roundings (6e-8 each) over at most 32 terms, and the
error of `exp`.
"""

import math
from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config.sections.ppo import ADVANTAGES, PPOConfig
from engine.train.ppo import advantages, losses, masked
from engine.train.ppo.advantages import AdvantageInputs, generalised_advantages, make_targets

CLIPS = st.sampled_from([0.1, 0.2, 0.3])
KINDS = st.sampled_from(["token", "sequence", "sequence_mean"])
modest = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def batches(draw, tables, limit=4):
    """Lengths (B,), a width T that may exceed them all, and `tables` tables (B, T)."""
    b, t = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    some = st.lists(st.integers(1, t), min_size=b, max_size=b)
    lengths = draw(st.one_of(some, st.just([t] * b), st.just([1] * b)))
    size = 64 * limit
    numbers = st.lists(st.integers(-size, size), min_size=b * t, max_size=b * t)
    values = [torch.tensor(draw(numbers)).reshape(b, t) / 64 for _ in range(tables)]
    return (torch.tensor(lengths), *values)


@st.composite
def masks(draw, tables):
    """A mask with gaps and at least one token per row, and `tables` tables (B, T)."""
    lengths, *values = draw(batches(tables))
    b, t = values[0].shape
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=b * t, max_size=b * t)))
    mask = mask.reshape(b, t)
    mask[torch.arange(b), lengths - 1] = True
    return (mask, *values)


def near(got, want, size=1.0):
    return abs(float(got) - want) <= 1e-5 * (1.0 + size)


def kept(mask):
    """The (row, token) pairs of a mask."""
    return [(i, t) for i, row in enumerate(mask.tolist()) for t, on in enumerate(row) if on]


def slow_log_ratio(new, old, mask, kind):
    """{(i, t): log ρ}."""
    result = {}
    for i, t in kept(mask):
        tokens = [t] if kind == "token" else [s for j, s in kept(mask) if j == i]
        total = sum(float(new[i, s]) - float(old[i, s]) for s in tokens)
        total /= len(tokens) if kind == "sequence_mean" else 1
        result[i, t] = min(20.0, max(-20.0, total))
    return result


def slow_policy(new, old, advantages, mask, clip, kind, high=None):
    """{(i, t): (loss, whether the clip is active, log ρ, ρ)}."""
    high = clip if high is None else high
    result = {}
    for (i, t), log_rho in slow_log_ratio(new, old, mask, kind).items():
        rho, a = math.exp(log_rho), float(advantages[i, t])
        unclipped, clipped = -a * rho, -a * min(1 + high, max(1 - clip, rho))
        result[i, t] = (max(unclipped, clipped), clipped > unclipped, log_rho, rho)
    return result


def slow_gae(rewards, values, mask, gamma, lam):
    """{(i, t): advantage}, over the tokens of the mask alone."""
    result = {}
    for i in range(len(rewards)):
        advantage = following = 0.0
        for t in reversed([t for j, t in kept(mask) if j == i]):
            delta = float(rewards[i, t]) + gamma * following - float(values[i, t])
            advantage = delta + gamma * lam * advantage
            following = float(values[i, t])
            result[i, t] = advantage
    return result


def slow_moments(x, mask):
    numbers = [float(x[i, t]) for i, t in kept(mask)]
    mean = math.fsum(numbers) / len(numbers)
    return mean, math.fsum((n - mean) ** 2 for n in numbers) / len(numbers)


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


@pytest.mark.parametrize("score", [0.1, 100.7])  # their sums round in float32
@pytest.mark.parametrize("scale", ["group", "none"])
def test_a_group_without_variance_gets_no_advantage(scale, score):
    scores = torch.tensor([score, score, score, 0.0, 1.0, 2.0])
    got = advantages.group_advantages(scores, 3, scale)
    assert got[:3].tolist() == [0.0, 0.0, 0.0]
    assert advantages.constant_groups(scores, 3).tolist() == [True, False]


@modest
@given(batches(3), st.sampled_from([1.0, 0.9]), st.sampled_from(["k1", "k2", "k3"]))
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
            kl = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[estimator]
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
@given(batches(2, limit=32), KINDS)
def test_log_ratios_are_clamped_to_twenty_and_zero_outside_the_mask(batch, kind):
    lengths, new, old = batch
    mask = masked.response_mask(lengths, new.shape[1])
    got = losses.log_ratio(new, old, mask, kind)
    want = slow_log_ratio(new, old, mask, kind)
    for i in range(len(new)):
        for t in range(new.shape[1]):
            assert near(got[i, t], want.get((i, t), 0.0))


@modest
@given(st.one_of(masks(3), batches(3, limit=32)), CLIPS, KINDS)
def test_policy_terms_are_the_sums_of_the_clipped_objective(batch, clip, kind):
    first, new, old, advantages = batch
    mask = first if first.dtype is torch.bool else masked.response_mask(first, new.shape[1])
    terms = list(slow_policy(new, old, advantages, mask, clip, kind).values())
    got = losses.policy_terms(new, old, advantages, mask, clip, kind)
    assert near(got.loss, sum(x[0] for x in terms), sum(abs(x[0]) for x in terms))
    assert float(got.clipped) == sum(x[1] for x in terms)
    squares = sum(x[2] ** 2 for x in terms)
    assert near(got.squared_log_ratio, squares, squares)
    assert near(got.ratio, sum(x[3] for x in terms), sum(x[3] for x in terms))
    assert near(got.squared_ratio, sum(x[3] ** 2 for x in terms), sum(x[3] ** 2 for x in terms))


@modest
@given(batches(3), CLIPS, st.sampled_from([0.15, 0.28, 3.0]), st.sampled_from([1.01, 3.0]))
def test_the_two_clip_ranges_and_the_dual_clip_bound_each_token(batch, low, high, dual):
    lengths, new, old, advantages = batch
    mask = masked.response_mask(lengths, new.shape[1])
    got = losses.policy_terms(new, old, advantages, mask, low, clip_range_high=high, dual_clip=dual)
    loss, counts = 0.0, {"high": 0, "low": 0, "dual": 0}
    for (i, t), (term, active, _, rho) in slow_policy(
        new, old, advantages, mask, low, "token", high
    ).items():
        counts["high"] += active and rho > 1
        counts["low"] += active and rho < 1
        a = float(advantages[i, t])
        bounded = a < 0 and -a * dual < term
        counts["dual"] += bounded
        loss += -a * dual if bounded else term
        assert not (bounded and active)
    assert near(got.loss, loss, float((advantages.abs() * mask).sum()) * math.exp(8))
    assert float(got.clipped_high) == counts["high"]
    assert float(got.clipped_low) == counts["low"]
    assert float(got.dual_clipped) == counts["dual"]


def test_every_policy_loss_and_aggregation_can_be_chosen():
    keys = get_type_hints(PPOConfig)
    assert set(get_args(keys["policy_loss"])) == set(losses.POLICY_LOSSES)
    assert set(get_args(keys["loss_aggregation"])) == set(losses.AGGREGATIONS)


@modest
@given(batches(3), st.sampled_from(sorted(losses.AGGREGATIONS)))
def test_an_aggregation_is_the_mean_that_its_name_says(batch, name):
    lengths, new, old, advantages = batch
    mask, n = masked.response_mask(lengths, new.shape[1]), len(lengths)
    terms = slow_policy(new, old, advantages, mask, 0.2, "token")
    sums = [sum(x[0] for (j, _), x in terms.items() if j == i) for i in range(n)]
    want = {
        "token": sum(sums) / len(terms),
        "sequence": sum(s / k for s, k in zip(sums, lengths.tolist(), strict=True)) / n,
        "sequence_sum_constant": sum(s / 11 for s in sums) / n,
    }
    size = losses.MinibatchSize(tokens=len(terms), responses=n, max_new_tokens=11)
    weights = losses.AGGREGATIONS[name](size, lengths)
    got = losses.policy_terms(new, old, advantages, mask, 0.2, row_weights=weights)
    magnitude = sum(abs(x[0]) for x in terms.values())
    assert near(got.loss / size.tokens, want[name], magnitude)


@modest
@given(batches(3), CLIPS, KINDS)
def test_only_unclipped_tokens_have_a_gradient(batch, clip, kind):
    lengths, new, old, advantages = batch
    mask = masked.response_mask(lengths, new.shape[1])
    leaf = new.clone().requires_grad_()
    losses.policy_terms(leaf, old, advantages, mask, clip, kind).loss.backward()
    expected = dict.fromkeys([(i, t) for i in range(len(new)) for t in range(new.shape[1])], 0.0)
    sizes = dict(expected)
    for (i, t), (_, clipped, log_rho, rho) in slow_policy(
        new, old, advantages, mask, clip, kind
    ).items():
        if clipped or abs(log_rho) >= 20:
            continue
        tokens = [t] if kind == "token" else range(int(lengths[i]))
        share = rho / len(tokens) if kind == "sequence_mean" else rho
        for s in tokens:
            expected[i, s] -= float(advantages[i, t]) * share
            sizes[i, s] += abs(float(advantages[i, t])) * share
    for (i, t), want in expected.items():
        log_rho = slow_log_ratio(new, old, mask, kind).get((i, t), 0.0)
        if abs(log_rho) != 20:  # at the clamp either one-sided derivative is right
            assert near(leaf.grad[i, t], want, sizes[i, t])


@modest
@given(batches(3), st.sampled_from([0.2, 1.0]), st.sampled_from([0.3, 4.0]), KINDS)
def test_with_cispo_each_token_has_the_gradient_of_its_clipped_ratio(batch, low, high, kind):
    lengths, new, old, advantages = batch
    mask = masked.response_mask(lengths, new.shape[1])
    leaf = new.clone().requires_grad_()
    got = losses.policy_terms(
        leaf, old, advantages, mask, low, kind, policy_loss="cispo", clip_range_high=high
    )
    got.loss.backward()
    loss, size, gradient, counts = 0.0, 0.0, torch.zeros_like(new), [0, 0]
    for (i, t), log_rho in slow_log_ratio(new, old, mask, kind).items():
        a, bounded = float(advantages[i, t]), min(1 + high, max(1 - low, math.exp(log_rho)))
        gradient[i, t] = -a * bounded
        loss += -a * bounded * float(new[i, t])
        size += abs(a * bounded * float(new[i, t]))
        counts[0] += a != 0 and math.exp(log_rho) > 1 + high
        counts[1] += a != 0 and math.exp(log_rho) < 1 - low
    torch.testing.assert_close(leaf.grad, gradient, rtol=1e-5, atol=1e-5)
    assert near(got.loss.detach(), loss, size)
    assert [float(got.clipped_high), float(got.clipped_low)] == counts


@modest
@given(batches(3), st.sampled_from([None, 0.2, 0.25, 1.0]))
def test_value_terms_are_half_the_larger_squared_error(batch, clip):
    lengths, values, old, returns = batch
    mask = masked.response_mask(lengths, values.shape[1])
    loss, active = 0.0, 0
    for i, t in kept(mask):
        v, v_old, r = float(values[i, t]), float(old[i, t]), float(returns[i, t])
        unclipped = (v - r) ** 2
        clipped = unclipped
        if clip is not None:
            clipped = (min(v_old + clip, max(v_old - clip, v)) - r) ** 2
        # 0.2 is not exact in float32, so the two are equal only where V was not clipped.
        loss += 0.5 * max(unclipped, clipped)
        active += clipped > unclipped
    got_loss, got_active = losses.value_terms(values, old, returns, mask, clip)
    assert near(got_loss, loss, loss)
    assert float(got_active) == active


def test_values_within_the_range_do_not_count_as_clipped_by_rounding():
    old, values = torch.rand(2, 8, 400, generator=torch.Generator().manual_seed(0)) * 0.19
    returns, mask = torch.ones_like(old), torch.ones_like(old, dtype=torch.bool)
    loss, clipped = losses.value_terms(values, old, returns, mask, 0.2)
    assert clipped == 0
    assert loss == losses.value_terms(values, old, returns, mask, None)[0]


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
        terms = losses.policy_terms(new, old, advantage, mask, 0.2, kind)
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


def inputs_of(scores, config, baseline=None):
    """Responses of two tokens with a KL of 0: their outcomes are their scores."""
    b = len(scores)
    zeros, lengths = torch.zeros(b, 2), torch.full((b,), 2)
    mask = torch.ones(b, 2, dtype=torch.bool)
    return AdvantageInputs(
        torch.tensor(scores), zeros, zeros, zeros, mask, lengths, config, 0.1, 2, baseline,
        greedy_scores=torch.arange(float(b)),
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


def test_the_running_baseline_is_a_moving_average_with_decay_nine_tenths():
    config = PPOConfig(advantage="reward", baseline="running", whiten=False)
    first = make_targets(inputs_of([1.0, 3.0], config))
    assert first.advantages[:, 0].tolist() == [-1.0, 1.0]
    assert first.baseline == 2.0
    second = make_targets(inputs_of([12.0, 12.0], config, first.baseline))
    assert second.advantages[:, 0].tolist() == [10.0, 10.0]
    assert second.baseline == pytest.approx(0.9 * 2.0 + 0.1 * 12.0)
