"""Importance weights for responses that were sampled with slightly other log-probabilities."""

import dataclasses
import itertools
import math

import pytest
import torch

from engine.config.sections.ppo import PPOConfig
from engine.train.experience.generation import generate_rollout
from engine.train.ppo.advantages import Targets
from engine.train.ppo.losses import policy_terms
from engine.train.ppo.rollout_correction import (
    correction,
    gap_metrics,
    normalised,
    rejected,
    with_rollout_correction,
)
from engine.train.step import train_step

OLD = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, -0.2, -9.0]])
SAMPLED = torch.tensor([[-1.2, -3.5, -0.4], [-3.0, -0.1, 0.0]])
MASK = torch.tensor([[True, True, True], [True, True, False]])


def by_hand(kind, cap, floor=0.0):
    """Token by token, as the definition reads: the weights, and which of them are bounded."""
    weights, bounded = torch.ones_like(OLD), torch.zeros_like(MASK)
    for i, j in MASK.nonzero().tolist():
        gaps = {t: float(OLD[i, t] - SAMPLED[i, t]) for t in MASK[i].nonzero().flatten().tolist()}
        ratio = math.exp(sum(gaps.values()) if kind.startswith("sequence") else gaps[j])
        bounded[i, j] = not floor <= ratio <= cap
        if kind == "sequence_mean_mask":
            bounded[i, j] = not floor <= math.exp(sum(gaps.values()) / len(gaps)) <= cap
            weights[i, j] = 0.0 if bounded[i, j] else math.exp(gaps[j])
            continue
        weights[i, j] = min(max(ratio, floor), cap)
        if kind.endswith("mask") and bounded[i, j]:
            weights[i, j] = 0.0
    return weights, bounded


@pytest.mark.parametrize(
    "kind", ["truncate", "mask", "sequence_truncate", "sequence_mask", "sequence_mean_mask"]
)
@pytest.mark.parametrize(("cap", "floor"), [(1.0, 0.0), (2.0, 0.95), (10.0, 0.5)])
def test_the_weights_are_those_of_the_definition(kind, cap, floor):
    config = PPOConfig(
        rollout_correction=kind, rollout_correction_cap=cap, rollout_correction_floor=floor
    )
    found, (weights, bounded) = correction(OLD, SAMPLED, MASK, config), by_hand(kind, cap, floor)
    assert torch.allclose(found.weights, weights)
    assert torch.equal(found.bounded, bounded)


@pytest.mark.parametrize("kind", ["truncate", "mask", "sequence_truncate", "sequence_mean_mask"])
def test_normalised_weights_have_a_mean_of_one_over_tokens_or_responses(kind):
    config = PPOConfig(rollout_correction=kind, rollout_correction_cap=2.0)
    weights, _ = by_hand(kind, 2.0)
    tokens = [float(weights[i, j]) for i, j in MASK.nonzero().tolist()]
    of = [float(w) for w in weights[:, 0]] if kind == "sequence_truncate" else tokens
    got = normalised(weights, MASK, config)
    torch.testing.assert_close(got[MASK], weights[MASK] * len(of) / sum(of))


def test_weights_that_are_all_zero_stay_zero():
    nothing = torch.zeros_like(OLD)
    assert not normalised(nothing, MASK, PPOConfig(rollout_correction="mask")).any()


@pytest.mark.parametrize("over", ["token", "sequence_mean", "sequence_sum", "sequence_max"])
@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("limit", [0.015, 0.3, 0.9, 10.0])
def test_rejected_tokens_are_those_whose_divergence_is_above_the_limit(over, estimator, limit):
    config = PPOConfig(rollout_rejection=f"{over}_{estimator}", rollout_rejection_limit=limit)
    got = rejected(OLD, SAMPLED, MASK, config)
    for i, j in itertools.product(range(2), range(3)):
        tokens = MASK[i].nonzero().flatten().tolist()
        gaps = {t: float(OLD[i, t] - SAMPLED[i, t]) for t in tokens}
        found = {
            t: gap**2 / 2 if estimator == "k2" else math.exp(gap) - 1 - gap
            for t, gap in gaps.items()
        }
        of_response = {
            "token": found.get(j, 0.0),
            "sequence_mean": sum(found.values()) / len(found),
            "sequence_sum": sum(found.values()),
            "sequence_max": max(found.values()),
        }[over]
        assert bool(got[i, j]) == (j in tokens and of_response > limit)


@pytest.mark.parametrize("kind", ["none", "truncate"])
def test_rejected_tokens_have_no_weight_and_the_others_keep_theirs(shared_run, kind):
    run, _ = shared_run()
    rollout = generate_rollout(run, 1)
    old = rollout.logprobs.clone()
    rollout.logprobs[:, 0] -= 0.5
    plain = PPOConfig(rollout_correction=kind)
    config = PPOConfig(
        rollout_correction=kind, rollout_rejection="token_k3", rollout_rejection_limit=0.1
    )
    before, after = (
        with_rollout_correction(Targets(old, old), rollout, c).token_weights
        for c in (plain, config)
    )
    assert not after[:, 0].any()
    torch.testing.assert_close(
        after[:, 1:], torch.ones_like(old)[:, 1:] if before is None else before[:, 1:]
    )
    frac = gap_metrics(Targets(old, old), rollout, config)["policy/rollout_rejected_frac"]
    assert frac == pytest.approx(len(old) / int(rollout.lengths.sum()))


@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_a_weighted_advantage_weights_the_clipped_loss_of_its_token(dual_clip):
    torch.manual_seed(0)
    logprobs, advantages = OLD + 0.4 * torch.randn_like(OLD), torch.randn_like(OLD)
    weights, _ = by_hand("truncate", 2.0)
    config = PPOConfig(dual_clip=dual_clip)

    def loss(i, j, advantage):
        alone = torch.zeros_like(MASK)
        alone[i, j] = MASK[i, j]
        return policy_terms(logprobs, OLD, advantage, alone, config).loss

    for i, j in MASK.nonzero().tolist():
        expected = weights[i, j] * loss(i, j, advantages)
        assert torch.allclose(loss(i, j, advantages * weights), expected, atol=1e-7)


def test_a_step_is_corrected_by_what_sampled_it(make_run):
    """The rollout's log-probabilities are moved, as by another engine; log π_old is recomputed."""
    losses = {}
    for kind in ("none", "truncate", "mask"):
        run, _ = make_run(f"ppo.rollout_correction={kind}", "ppo.epochs=1", "ppo.minibatches=1")
        run.backend = dataclasses.replace(run.backend, separate=True)
        rollout = generate_rollout(run, 1)
        rollout.logprobs[:, 0] -= 1.0  # e > 2: the first token of each response is beyond the cap
        metrics, _ = train_step(run, 1, recorded=rollout)
        losses[kind] = metrics["loss/policy_avg"]
        firsts, tokens = len(rollout.lengths), int(rollout.lengths.sum())
        assert metrics["val/rollout_logprob_gap"] == pytest.approx(1.0, abs=1e-3)
        if kind == "none":
            assert "policy/rollout_weight" not in metrics
            continue
        assert metrics["policy/rollout_capped_frac"] == pytest.approx(firsts / tokens)
        mean = (tokens - firsts + (2.0 * firsts if kind == "truncate" else 0)) / tokens
        assert metrics["policy/rollout_weight"] == pytest.approx(mean, abs=1e-3)
    assert len({round(loss, 6) for loss in losses.values()}) == 3


def test_the_weights_of_a_step_are_normalised_if_configured(shared_run):
    run, _ = shared_run()
    rollout = generate_rollout(run, 1)
    old = rollout.logprobs.clone()
    rollout.logprobs[:, 0] -= 1.0
    for normalise in (False, True):
        config = PPOConfig(rollout_correction="truncate", rollout_correction_normalise=normalise)
        found = with_rollout_correction(Targets(old, old), rollout, config)
        mean = float(found.token_weights[rollout.mask].mean())
        assert (mean == pytest.approx(1, abs=1e-5)) == normalise


def test_without_correction_no_token_has_a_weight():
    assert PPOConfig().rollout_correction == "none"
    assert Targets(OLD, OLD).token_weights is None
