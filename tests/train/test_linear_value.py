"""The value function that is fitted to the reward model's hidden states."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from engine.config.sections.launch import LaunchConfig
from engine.config.sections.ppo import PPOConfig
from engine.config.settings import change_settings
from engine.train.distributed.ranks import RankGroup
from engine.train.experience.generation import generate_rollout
from engine.train.ppo.advantages import AdvantageInputs, make_targets
from engine.train.ppo.linear_value import features, fit_linear_value, with_all_features
from engine.train.reward_scales import fit_scales
from engine.train.rewards.kinds.model import states_before
from engine.train.rewards.source import RewardInputs
from engine.train.rollout.token_states import TokenStates
from engine.train.step import train_step
from tests.train.gpu.pretend import GPU, pretend_gpu

LINEAR = "model.value=reward_model"
WIDTH, MAX_TOKENS = 4, 6


def rollout_of(run):
    return generate_rollout(run, 1)


def recorded(run, rollout):
    with run.rewards.reward_model().recorded_states() as states:
        run.rewards(RewardInputs.of(rollout, 1))
    return states


def drawn_step(lengths=(3, 5, 1, 4)):
    """Weights, states and inputs of a step with such responses; the rows in another order."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator)

    rows = [*range(1, len(lengths)), 0]
    states = TokenStates(rows, [drawn(lengths[i], 2, WIDTH) for i in rows])
    counts = torch.tensor(lengths)
    mask = torch.arange(max(lengths)) < counts[:, None]
    old, reference = (drawn(*mask.shape) * mask for _ in range(2))
    inputs = AdvantageInputs(
        drawn(len(lengths)), old, reference, torch.zeros_like(old), mask, counts,
        PPOConfig(lam=0.9, lam_value=0.7), beta=0.1, per_prompt=1, baseline=None,
    )  # fmt: skip
    return drawn(3 * WIDTH + 3).tolist(), states, inputs


def test_the_responses_of_a_fit_on_a_gpu_are_not_copied_one_by_one():
    def copies(*lengths):
        weights, states, inputs = drawn_step(lengths)
        there = {
            name: value.to(GPU)
            for name, value in vars(inputs).items()
            if isinstance(value, torch.Tensor)
        }
        states.states = [x.to(GPU) for x in states.states]
        before = gpu.counts()
        fit_linear_value(weights, states, dataclasses.replace(inputs, **there), ranks, MAX_TOKENS)
        return (gpu.counts() - before).copies

    ranks = RankGroup(LaunchConfig(device="cpu"))
    with pretend_gpu() as gpu:
        assert copies(3, 5) == copies(3, 5, 1, 4)


def fitted_by_hand(weights, states, inputs, without=None):
    """The weights by one dense system, and the returns of each row."""
    w = torch.tensor(weights, dtype=torch.float64)
    x = {row: features(s, MAX_TOKENS) for row, s in zip(states.rows, states.states, strict=True)}
    before = torch.zeros_like(inputs.values)
    for row, of_row in x.items():
        before[row, : len(of_row)] = (of_row @ w).float()
    returns = make_targets(dataclasses.replace(inputs, values=before)).returns.double()
    every = torch.cat(list(x.values()))
    squares = every.pow(2).mean(0)
    penalties = [
        max(3 * squares[a:b].mean().item(), 1e-6)
        for a, b in ((0, 4), (4, 8), (8, 12), (12, 13), (13, 14))
        for _ in range(a, b)
    ]
    penalty = torch.diag(torch.tensor([*penalties, 1e-6], dtype=torch.float64)) * len(every)
    none = x[0][:0]
    used = torch.cat([none, *(x[row] for row in x if row != without)])
    wanted = torch.cat([none[:, 0], *(returns[r, : len(x[r])] for r in x if r != without)])
    change = torch.linalg.solve(used.T @ used + penalty, used.T @ (wanted - used @ w))
    return w + change, x


def test_a_value_begins_as_the_score_of_what_precedes_the_token(make_run):
    run, _ = make_run(LINEAR, "reward.normalise=reference", "reward.normalise_samples=8")
    rollout = rollout_of(run)
    inputs = RewardInputs.of(rollout, 1)
    states = recorded(run, rollout)
    weights = torch.tensor(run.state.value_weights, dtype=torch.float64)
    for t in (1, 4):
        before = RewardInputs(
            inputs.batch, [ids[:t] for ids in inputs.ids], inputs.texts, inputs.eos, 1
        )
        raw = run.rewards(before).total
        want = (raw - run.state.reward_mean) / run.state.reward_std
        for row, x in zip(states.rows, states.states, strict=True):
            if len(x) > t:
                value = float(features(x, 32)[t] @ weights)
                assert value == pytest.approx(float(want[row]), abs=1e-4, rel=1e-4)


def test_states_are_those_of_the_last_and_of_the_middle_layer(make_run):
    run, _ = make_run(LINEAR)
    rollout = rollout_of(run)
    states = recorded(run, rollout)
    path = run.config.reward.model
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
    row, of_row = states.rows[0], states.states[0]
    prompt = rollout.batch.prompts[row].ids
    ids = torch.tensor([[*prompt, *rollout.ids[row][: len(of_row)].tolist()]])
    every = model(input_ids=ids, output_hidden_states=True).hidden_states
    last, middle = (h[0, len(prompt) - 1 : -1] for h in (every[-1], every[len(every) // 2]))
    middle = middle / middle.pow(2).mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(of_row, torch.stack([last, middle], 1), atol=1e-4, rtol=1e-4)


def test_the_fit_is_the_minimum_of_its_penalised_squares():
    weights, states, inputs = drawn_step()
    fit = fit_linear_value(weights, states, inputs, RankGroup(LaunchConfig()), MAX_TOKENS)
    want, _ = fitted_by_hand(weights, states, inputs)
    torch.testing.assert_close(torch.tensor(fit.weights).double(), want, atol=1e-6, rtol=1e-6)
    assert (want - torch.tensor(weights)).abs().max() > 0.01


def test_the_values_of_a_response_are_those_of_a_fit_to_the_others():
    weights, states, inputs = drawn_step()
    fit = fit_linear_value(weights, states, inputs, RankGroup(LaunchConfig()), MAX_TOKENS)
    for row in range(4):
        others, x = fitted_by_hand(weights, states, inputs, without=row)
        torch.testing.assert_close(
            fit.values[row, : len(x[row])].double(), x[row] @ others, atol=1e-5, rtol=1e-5
        )
    assert not fit.values[~inputs.mask].any()


@pytest.mark.parametrize("lengths", [(5,), (1, 1, 1)])
def test_a_fit_without_others_or_without_positions_has_a_solution(lengths):
    weights, states, inputs = drawn_step(lengths)
    fit = fit_linear_value(weights, states, inputs, RankGroup(LaunchConfig()), MAX_TOKENS)
    for row in range(len(lengths)):
        others, x = fitted_by_hand(weights, states, inputs, without=row)
        torch.testing.assert_close(
            fit.values[row, : len(x[row])].double(), x[row] @ others, atol=1e-5, rtol=1e-5
        )


def test_weights_of_the_last_layer_alone_go_on_as_they_were(make_run):
    run, _ = make_run(LINEAR)
    last = torch.randn(257, generator=torch.Generator().manual_seed(0)).tolist()
    run.state.value_weights = last  # as in a checkpoint of a version with these features alone
    fit_scales(run, run.config)
    assert run.state.value_weights == with_all_features(last)
    of_row = recorded(run, rollout_of(run)).states[0]
    values = features(of_row, 32) @ torch.tensor(run.state.value_weights).double()
    want = of_row[:, 0].double() @ torch.tensor(last[:-1]).double() + last[-1]
    torch.testing.assert_close(values, want)


def test_weights_mean_the_same_after_a_change_of_the_longest_response(make_run):
    run, _ = make_run(LINEAR)
    train_step(run, 1)
    before = run.state.value_positions
    run.config = change_settings(run.config, {"max_new_tokens": 2 * before})
    fit_scales(run, run.config)
    assert run.state.value_positions == before


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
