"""The losses of PPO compared with slow loops over samples and tokens."""

import math
from typing import get_args, get_type_hints

import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.config.sections.ppo import PPOConfig
from engine.train.ppo import losses, masked
from tests.train.ppo_loops import (
    CLIPS,
    KINDS,
    batches,
    kept,
    masks,
    modest,
    near,
    slow_log_ratio,
    slow_policy,
)


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
    config = PPOConfig(clip_range=clip, ratio=kind)
    got = losses.policy_terms(new, old, advantages, mask, config)
    assert near(got.loss, sum(x[0] for x in terms), sum(abs(x[0]) for x in terms))
    assert float(got.clipped_high + got.clipped_low) == sum(x[1] for x in terms)
    squares = sum(x[2] ** 2 for x in terms)
    assert near(got.squared_log_ratio, squares, squares)
    assert near(got.ratio, sum(x[3] for x in terms), sum(x[3] for x in terms))
    assert near(got.squared_ratio, sum(x[3] ** 2 for x in terms), sum(x[3] ** 2 for x in terms))


@modest
@given(batches(3), CLIPS, st.sampled_from([0.15, 0.28, 3.0]), st.sampled_from([1.01, 3.0]))
def test_the_two_clip_ranges_and_the_dual_clip_bound_each_token(batch, low, high, dual):
    lengths, new, old, advantages = batch
    mask = masked.response_mask(lengths, new.shape[1])
    config = PPOConfig(clip_range=low, clip_range_high=high, dual_clip=dual)
    got = losses.policy_terms(new, old, advantages, mask, config)
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
        "sequence_sum": sum(sums) / n,
        "sequence_sum_constant": sum(s / 11 for s in sums) / n,
    }
    size = losses.MinibatchSize(tokens=len(terms), responses=n, max_new_tokens=11)
    weights = losses.AGGREGATIONS[name](size, lengths)
    got = losses.policy_terms(new, old, advantages, mask, PPOConfig(), weights)
    magnitude = sum(abs(x[0]) for x in terms.values())
    assert near(got.loss / size.tokens, want[name], magnitude)


def test_gmpo_bounds_no_token_without_an_advantage():
    config = PPOConfig(policy_loss="gmpo", ratio="sequence_mean", clip_range=0.2)
    new, old, mask = torch.tensor([[-1.0, -1.0]]), torch.zeros(1, 2), torch.ones(1, 2).bool()
    got = losses.policy_terms(new, old, torch.tensor([[0.0, 1.0]]), mask, config)
    assert near(got.loss, -math.exp(-1))
    assert not got.clipped_low


@modest
@given(batches(3), CLIPS, KINDS)
def test_only_unclipped_tokens_have_a_gradient(batch, clip, kind):
    lengths, new, old, advantages = batch
    mask = masked.response_mask(lengths, new.shape[1])
    leaf = new.clone().requires_grad_()
    config = PPOConfig(clip_range=clip, ratio=kind)
    losses.policy_terms(leaf, old, advantages, mask, config).loss.backward()
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
    config = PPOConfig(policy_loss="cispo", clip_range=low, clip_range_high=high, ratio=kind)
    got = losses.policy_terms(leaf, old, advantages, mask, config)
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
