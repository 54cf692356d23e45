"""The tokens of high covariance compared with slow loops, and what becomes of them."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.config.sections.ppo import PPOConfig
from engine.train.ppo.advantages import Targets
from engine.train.ppo.entropy import (
    clipped_tokens,
    covariance,
    top_tokens,
    with_covariance,
)
from tests.train.ppo_loops import kept, masks, modest, near, slow_moments

SHARES = st.sampled_from([0.01, 0.2, 0.5, 1.0])


@modest
@given(masks(2))
def test_a_covariance_is_the_product_of_the_distances_from_the_means_over_the_mask(batch):
    mask, advantages, logprobs = batch
    means = slow_moments(advantages, mask)[0], slow_moments(logprobs, mask)[0]
    got = covariance(advantages, logprobs, mask)
    for i, t in kept(mask):
        want = (float(advantages[i, t]) - means[0]) * (float(logprobs[i, t]) - means[1])
        assert near(got[i, t], want, 16)


@modest
@given(masks(1), SHARES)
def test_tokens_held_back_are_those_of_the_highest_positive_covariance(batch, share):
    mask, covariances = batch
    numbers = sorted((float(covariances[p]) for p in kept(mask)), reverse=True)
    least = numbers[max(1, int(share * len(numbers))) - 1]
    want = {p for p in kept(mask) if float(covariances[p]) >= least and covariances[p] > 0}
    assert set(kept(top_tokens(covariances, mask, share))) == want


@modest
@given(masks(1), SHARES, st.integers(0, 3))
def test_tokens_left_out_are_drawn_from_those_in_the_range(batch, share, step):
    mask, covariances = batch
    config = PPOConfig(clip_cov=share, clip_cov_range=(0.5, 2.5))
    candidates = {p for p in kept(mask) if 0.5 < float(covariances[p]) < 2.5}
    chosen, again = (
        set(kept(clipped_tokens(covariances, mask, config, seed=7, step=step))) for _ in range(2)
    )
    assert chosen == again
    assert chosen <= candidates
    assert len(chosen) == min(len(candidates), max(1, int(share * len(kept(mask)))))


def test_another_step_draws_other_tokens():
    mask = torch.ones(4, 50, dtype=torch.bool)
    config = PPOConfig(clip_cov=0.1)
    one, two = (
        clipped_tokens(torch.full((4, 50), 2.0), mask, config, seed=0, step=step) for step in (1, 2)
    )
    assert int(one.sum()) == int(two.sum()) == 20
    assert not torch.equal(one, two)


def test_a_token_left_out_has_no_advantage_and_one_held_back_keeps_it():
    mask = torch.tensor([[True, True, True], [True, True, False]])
    advantages = torch.tensor([[2.0, 2.0, 2.0], [-2.0, -2.0, 0.0]])
    logprobs = torch.tensor([[-0.1, -3.0, -3.0], [-0.2, -3.2, 0.0]])
    targets = Targets(logprobs, advantages)
    left_out, held_back = (
        with_covariance(targets, mask, config, seed=0, step=1)
        for config in (PPOConfig(clip_cov=0.5), PPOConfig(kl_cov=0.2))
    )
    # The mean of log π is -1.9: likely tokens with a positive advantage, and unlikely ones with a
    # negative advantage have a covariance of 3 or so.
    assert left_out.advantages.tolist() == [[0.0, 2.0, 2.0], [-2.0, 0.0, 0.0]]
    assert left_out.held_back is None
    assert held_back.advantages is advantages
    assert held_back.held_back.tolist() == [[False, False, False], [False, True, False]]
