"""The value function that is fitted to the reward model's hidden states."""

import pytest
import torch

from engine.config.sections.launch import LaunchConfig
from engine.train.distributed.ranks import RankGroup
from engine.train.ppo.advantages import Targets
from engine.train.ppo.linear_value import fitted_weights, linear_values
from engine.train.rewards.model import states_before
from engine.train.rewards.source import RewardInputs
from engine.train.rollout.token_states import TokenStates
from engine.train.step import generate_rollout, train_step

LINEAR = "model.value=reward_model"


def rollout_of(run):
    return generate_rollout(run, 1, lambda _done, _total: None)


def test_a_value_begins_as_the_score_of_what_precedes_the_token(make_run):
    run, _ = make_run(LINEAR, "reward.normalise=reference", "reward.normalise_samples=8")
    rollout = rollout_of(run)
    inputs = RewardInputs.of(rollout, 1)
    with run.rewards.reward_model().recorded_states() as states:
        run.rewards(inputs)
    values = linear_values(run.state.value_weights, states, rollout.logprobs, run.ranks)
    assert set(rollout.lengths.tolist()) != {int(rollout.lengths[0])}  # rows are sorted by length
    for t in (1, 4):
        before = RewardInputs(
            inputs.batch, [ids[:t] for ids in inputs.ids], inputs.texts, inputs.eos, 1
        )
        raw, _ = run.rewards(before)
        want = (raw - run.state.reward_mean) / run.state.reward_std
        longer = rollout.lengths > t
        torch.testing.assert_close(values[longer, t], want[longer], atol=1e-4, rtol=1e-4)
    assert not values[~rollout.mask].any()


def test_the_fit_is_the_minimum_of_its_penalised_squares():
    ranks = RankGroup(LaunchConfig())
    generator = torch.Generator().manual_seed(0)
    lengths, width = [3, 5, 1, 4], 6

    def drawn(*shape):
        return torch.randn(*shape, generator=generator)

    states = TokenStates([2, 0, 3, 1], [drawn(lengths[i], width) for i in (2, 0, 3, 1)])
    old, returns = drawn(4, 5), drawn(4, 5)
    weights = drawn(width + 1).tolist()
    old = linear_values(weights, states, old, ranks)  # as in a step
    targets = Targets(old, returns - old, old, returns)
    fitted = torch.tensor(fitted_weights(weights, states, targets, ranks))

    x = torch.cat(states.states).double()
    y = torch.cat([returns[i, : lengths[i]] for i in states.rows]).double()
    w = fitted.double().requires_grad_()
    penalty = x.pow(2).mean() * (w - torch.tensor(weights).double())[:-1].pow(2).sum()
    loss = (x @ w[:-1] + w[-1] - y).pow(2).mean() + penalty
    (gradient,) = torch.autograd.grad(loss, w)
    assert gradient.abs().max() < 1e-5
    assert (fitted - torch.tensor(weights)).abs().max() > 0.01


def test_a_step_fits_the_value_and_leaves_it_out_of_policy_and_optimiser(make_run):
    run, _ = make_run(LINEAR)
    before = list(run.state.value_weights)
    metrics, _ = train_step(run, 1)
    assert run.state.value_weights != before
    assert run.policy.value_head is None
    assert {"val/explained_var", "loss/value_avg"} <= metrics.keys()


@pytest.mark.parametrize("rows", [3, 7])
def test_states_of_a_sequence_that_is_cut_off_are_those_before_its_tokens(rows):
    states = torch.arange(6.0)[:, None]
    found = states_before(states, rows).squeeze(1).tolist()
    assert found == ([2, 3, 4] if rows == 3 else [0, 0, 0, 1, 2, 3, 4])
