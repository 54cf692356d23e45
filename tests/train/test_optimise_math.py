"""A minibatch's gradient compared with a loss written as loops over its tokens."""

import dataclasses
import math

import msgspec
import pytest
import torch

from engine.config.sections.ppo import KLConfig
from engine.train.ppo import chunked_loss, optimise
from engine.train.ppo.forward import MicroBatchLimit, score_tokens
from engine.train.ppo.optimise import backward
from engine.train.ppo.update_stats import LossSums
from tests.train.minibatch import (
    ALL,
    K2,
    K3,
    PROMPTS,
    RESPONSES,
    SINGLE_RANK,
    VOCABULARY,
    assert_same,
    fast,
    few_logits,
    gradients,
    make_minibatch,
    make_policy,
    run_config,
)


def slow_outputs(policy, rollout, i, temperature):
    """[(log π, V, entropy)] of row i's tokens as scalars: one row, no padding, no cache."""
    n, p = RESPONSES[i], PROMPTS[i]
    prompt = rollout.batch.ids[i, rollout.batch.ids.shape[1] - p :]
    after, places = rollout.ids[i, :n], range(n)
    if (conversation := rollout.conversation) is not None:
        after = conversation.ids[i, : conversation.lengths[i]]
        places = conversation.positions[i, :n].tolist()
    ids = torch.cat([prompt, after])
    hidden = policy.lm.model(ids[None]).last_hidden_state[0]
    trunk = policy.value_trunk
    value_hidden = hidden if trunk is None else trunk(ids[None]).last_hidden_state[0]
    outputs = []
    for t in places:
        logits = policy.lm.lm_head(hidden[p + t - 1]) / temperature
        top = logits.max()
        logprobs = logits - top - sum((x - top).exp() for x in logits).log()
        value = None
        if policy.value_head is not None:
            weight, bias = policy.value_head.weight[0], policy.value_head.bias[0]
            value = (value_hidden[p + t - 1] * weight).sum() + bias
        entropy = -sum(x.exp() * x for x in logprobs)
        outputs.append((logprobs[ids[p + t]], value, entropy))
    return outputs


def slow_term(ppo, targets, at, logprob, rho, gaps):
    """A token's policy loss, whether it is clipped, and the ratio that is."""
    clip, high, (i, t) = ppo.clip_range, ppo.clip_range_high or ppo.clip_range, at
    a, active, of = targets.advantages[at], False, rho
    bounded = rho.clamp(1 - clip, 1 + high)
    match ppo.policy_loss:
        case "cispo":
            term, active = -a * bounded.detach() * logprob, bounded != rho
        case "sapo":
            tau = ppo.sapo_temperature if a > 0 else ppo.sapo_temperature_negative
            term = -a * 4 / tau / (1 + (-tau * (rho - 1)).exp())
        case "vespo":
            k, lam = (2.0, 3.0) if a >= 0 else (3.0, 2.0)
            term = -a * (rho**k * (lam * (1 - rho)).exp()).detach() * logprob
        case "gmpo":
            bounds = [
                gap.clamp(max=high) if targets.advantages[i, s] > 0 else gap.clamp(min=-clip)
                for s, gap in enumerate(gaps)
            ]
            term = -a * (sum(bounds) / len(bounds)).exp()
            active, of = bounds[t] != gaps[t], gaps[t].exp()
        case "dppo_tv" | "dppo_kl":
            p, q = math.exp(logprob.item()), math.exp(targets.old_logprobs[at].item())
            far = abs(p - q)
            if ppo.policy_loss == "dppo_kl":
                far = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
            active = (a > 0 and p > q and far > high) or (a < 0 and p < q and far > clip)
            term = -a * (0.0 if active else min(p / q, ppo.dppo_ratio_cap)) * logprob
        case "dro":
            term = -a * logprob + ppo.dro_beta / 2 * gaps[t] ** 2
        case _:
            active = -a * rho < -a * bounded
            term = -a * (bounded if active else rho)
    return term, bool(active), of


def slow_sums(policy, rollout, targets, rows, config):
    """The minibatch's loss (with gradient) and sums, by the formulas in loops."""
    c, dual, sums, loss = config.ppo.value_clip, config.ppo.dual_clip, LossSums(), 0.0
    tokens = sum(RESPONSES[i] for i in rows)
    for i in rows.tolist():
        weight = {  # times tokens, because the sum is divided by them below
            "token": 1.0,
            "sequence": tokens / len(rows) / RESPONSES[i],
            "sequence_sum": tokens / len(rows),
            "sequence_sum_constant": tokens / len(rows) / config.rollout.max_new_tokens,
        }[config.ppo.loss_aggregation]
        outputs = slow_outputs(policy, rollout, i, config.rollout.temperature)
        gaps = [logp - targets.old_logprobs[i, t] for t, (logp, *_) in enumerate(outputs)]
        away = sum(rollout.logprobs[i, t] - logp for t, (logp, *_) in enumerate(outputs))
        for t, (logprob, value, entropy) in enumerate(outputs):
            log_rho = {
                "token": gaps[t], "sequence": sum(gaps), "sequence_mean": sum(gaps) / len(gaps)
            }[config.ppo.ratio]  # fmt: skip
            rho, a = log_rho.clamp(-20, 20).exp(), targets.advantages[i, t]
            term, active, of = slow_term(config.ppo, targets, (i, t), logprob, rho, gaps)
            if dual is not None and a < 0 and term > -a * dual:
                term = -a * dual
                sums.dual_clipped += 1
            limit = config.ppo.off_policy_mask
            if limit is not None and a < 0 and away / len(outputs) > limit:
                term, active = 0.0 * term, False
                sums.off_policy += 1
            if targets.held_back is not None and targets.held_back[i, t]:
                term = term + config.ppo.kl_cov_coef * gaps[t].abs()
            sums.tokens += 1
            sums.policy_loss += weight * term.item()
            sums.clipped_high += bool(active and of > 1)
            sums.clipped_low += bool(active and of < 1)
            if config.ppo.entropy_coef:
                sums.entropy += weight * entropy.item()
                term = term - config.ppo.entropy_coef * entropy
            if config.kl.place == "loss":
                d = logprob - targets.ref_logprobs[i, t]
                kl = {"k2": d**2 / 2, "k3": (-d).exp() - 1 + d, "abs": d.abs()}[config.kl.estimator]
                kl = kl * rho if config.kl.importance_weighted else kl
                sums.kl += weight * kl.item()
                term = term + config.kl.beta * kl
            sums.squared_log_ratio += log_rho.item() ** 2
            sums.ratio += rho.item()
            sums.squared_ratio += rho.item() ** 2
            loss = loss + weight * term
            if value is None:
                continue
            old, target = targets.old_values[i, t], targets.returns[i, t]
            error = (value - target) ** 2
            if c is not None:
                clipped = (torch.minimum(torch.maximum(value, old - c), old + c) - target) ** 2
                sums.value_clipped += bool(clipped > error)
                error = clipped if clipped > error else error
            sums.value_loss += 0.5 * error.item()
            loss = loss + config.ppo.value_coef * 0.5 * error
    return loss / sums.tokens, sums


CASES = {
    "defaults": {},
    "sequence ratio": {"ratio": "sequence", "clip_range": 0.3, "value_clip": 0.2},
    "temperature": {"value_clip": 0.3, "value_coef": 2.0, "temperature": 0.7},
    "clip-higher and dual clip": {"clip_range": 0.1, "clip_range_high": 0.5, "dual_clip": 1.2},
    "sequence mean, entropy": {
        "loss_aggregation": "sequence",
        "entropy_coef": 0.3,
        "temperature": 0.7,
    },
    "constant divisor, k2": {
        "loss_aggregation": "sequence_sum_constant",
        "kl": KLConfig(beta=0.5, **K2),
    },
    "sequence mean, k3, entropy": {
        "loss_aggregation": "sequence",
        "kl": KLConfig(beta=0.5, **K3),
        "entropy_coef": 0.1,
    },
    "k3": {"kl": KLConfig(beta=0.5, **K3), "ratio": "sequence"},
    "weighted k3, mean ratio": {
        "kl": KLConfig(beta=0.5, **K3, importance_weighted=True),
        "ratio": "sequence_mean",
    },
    "weighted k2": {"kl": KLConfig(beta=0.5, **K2, importance_weighted=True)},
    "absolute log ratio": {"kl": KLConfig(beta=0.5, estimator="abs", place="loss")},
    "mean ratio": {"ratio": "sequence_mean", "loss_aggregation": "sequence", "clip_range": 0.02},
    "cispo": {"policy_loss": "cispo", "clip_range": 0.1, "clip_range_high": 0.3},
    "cispo, sequence ratio": {
        "policy_loss": "cispo",
        "ratio": "sequence",
        "clip_range": 0.5,
        "clip_range_high": 0.2,
    },
    "sapo": {"policy_loss": "sapo", "sapo_temperature": 2.0, "sapo_temperature_negative": 3.0},
    "vespo": {"policy_loss": "vespo", "ratio": "sequence", "loss_aggregation": "sequence"},
    "gmpo": {"policy_loss": "gmpo", "ratio": "sequence_mean", "clip_range": 0.3},
    "gmpo, clip-higher, sequence mean, entropy": {
        "policy_loss": "gmpo",
        "ratio": "sequence_mean",
        "clip_range": 0.2,
        "clip_range_high": 0.4,
        "loss_aggregation": "sequence",
        "entropy_coef": 0.1,
    },
    "dppo_tv": {"policy_loss": "dppo_tv", "clip_range": 0.01, "clip_range_high": 0.02},
    "dppo_kl": {"policy_loss": "dppo_kl", "clip_range": 0.004, "dppo_ratio_cap": 1.2},
    "dro": {"policy_loss": "dro", "dro_beta": 0.7, "loss_aggregation": "sequence"},
    "mean ratio, sum": {
        "ratio": "sequence_mean",
        "clip_range": 0.02,
        "loss_aggregation": "sequence_sum",
    },
    "kl_cov, sequence mean": {"kl_cov": 0.1, "kl_cov_coef": 0.7, "loss_aggregation": "sequence"},
    "off-policy mask, k3": {"off_policy_mask": 3.5, "kl": KLConfig(beta=0.5, **K3)},
    "off-policy mask, cispo, sequence mean": {
        "off_policy_mask": 3.5,
        "policy_loss": "cispo",
        "loss_aggregation": "sequence",
    },
}
"""Keys of `ppo`, with the temperature and the section `kl`."""


@pytest.mark.parametrize("value", ["shared", "separate", None])
@pytest.mark.parametrize("of_ppo", CASES.values(), ids=CASES)
def test_the_gradient_is_that_of_the_minibatchs_mean_loss_over_tokens(value, of_ppo, monkeypatch):
    policy, config = make_policy(value), run_config(**of_ppo)
    minibatch = make_minibatch(policy)
    if config.ppo.kl_cov:
        rollout, targets = minibatch
        minibatch = rollout, dataclasses.replace(targets, held_back=targets.advantages > 0.3)
    rows = torch.tensor([5, 0, 2, 3])
    loss, sums = slow_sums(policy, *minibatch, rows, config)
    assert 0 < sums.clipped < sums.tokens or config.ppo.policy_loss in ("sapo", "vespo", "dro")
    assert bool(sums.dual_clipped) == (config.ppo.dual_clip is not None)
    assert bool(sums.off_policy) == (config.ppo.off_policy_mask is not None)
    assert bool(sums.entropy) == bool(config.ppo.entropy_coef)
    assert bool(sums.kl) == (config.kl.place == "loss")
    assert value is None or config.ppo.value_clip is None or sums.value_clipped > 0
    loss.backward()
    want = gradients(policy), sums
    for size in (1, 3, 4):
        sized = msgspec.structs.replace(
            config, ppo=msgspec.structs.replace(config.ppo, micro_batch_size=size)
        )
        assert_same(fast(policy, minibatch, sized, rows), want)
    monkeypatch.setattr(chunked_loss, "MAX_LOGITS", 5 * VOCABULARY)
    policy.lm.lm_head.register_forward_hook(few_logits)
    assert_same(fast(policy, minibatch, config, rows), want)


@pytest.mark.parametrize("value", ["shared", "separate", None])
@pytest.mark.parametrize(
    "of_ppo",
    [
        {"value_clip": 0.3, "micro_batch_by": "tokens"},
        {"loss_aggregation": "sequence", "kl": KLConfig(beta=0.5, **K3), "entropy_coef": 0.1},
        {"ratio": "sequence_mean", "clip_range": 0.02, "loss_aggregation": "sequence_sum"},
    ],
    ids=["by tokens", "sequence mean, k3, entropy", "mean ratio, sum"],
)
def test_the_gradient_of_responses_with_replies_is_that_of_the_policys_tokens(
    value, of_ppo, monkeypatch
):
    policy, config = make_policy(value), run_config(**of_ppo)
    minibatch = make_minibatch(policy, replies=True)
    loss, sums = slow_sums(policy, *minibatch, ALL, config)
    assert sums.tokens == sum(RESPONSES)
    loss.backward()
    want = gradients(policy), sums
    for size in (1, 3, 7):
        sized = msgspec.structs.replace(
            config, ppo=msgspec.structs.replace(config.ppo, micro_batch_size=size)
        )
        assert_same(fast(policy, minibatch, sized), want)
    monkeypatch.setattr(chunked_loss, "MAX_LOGITS", 5 * VOCABULARY)
    assert_same(fast(policy, minibatch, config), want)


def test_a_minibatchs_gradient_is_the_token_weighted_mean_over_its_parts():
    policy, config = make_policy("shared"), run_config()
    minibatch = make_minibatch(policy)
    whole, sums = fast(policy, minibatch, config)
    parts = [fast(policy, minibatch, config, rows) for rows in (ALL[:2], ALL[2:])]
    added = {name: sum(g[name] * (s.tokens / sums.tokens) for g, s in parts) for name in whole}
    total = LossSums()
    for _, part in parts:
        total.add(part)
    assert_same((whole, sums), (added, total))


@pytest.mark.parametrize("ratio", ["token", "sequence", "sequence_mean"])
def test_before_any_update_the_ratio_is_one_and_nothing_is_clipped(ratio):
    policy, config = make_policy("shared"), run_config(ratio=ratio)
    rollout, targets = make_minibatch(policy)
    with torch.no_grad():
        old, _ = score_tokens(policy, rollout, 1.0, MicroBatchLimit(2))
    _, sums = fast(policy, (rollout, dataclasses.replace(targets, old_logprobs=old)), config)
    assert sums.ratio / sums.tokens == pytest.approx(1, abs=1e-5)
    assert sums.clipped == 0
    assert sums.approx_kl < 1e-9


@pytest.mark.parametrize("value", ["shared", "separate"])
def test_during_value_warm_up_only_the_value_function_has_a_gradient(value):
    policy, config = make_policy(value), run_config(value_clip=0.2)
    minibatch = make_minibatch(policy)
    loss, sums = slow_sums(policy, *minibatch, ALL, config)
    loss.backward()  # the policy loss has no gradient in the value function's weights
    of_value = {k: g for k, g in gradients(policy).items() if k.startswith("value_")}
    assert_same(fast(policy, minibatch, config, warming_up=True), (of_value, sums))


@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
def test_the_gradient_of_a_separate_value_function_can_be_clipped_apart(apart):
    policy, config = make_policy("separate"), run_config()
    backward(SINGLE_RANK, policy, *make_minibatch(policy), ALL, config)
    before = {k: p.grad.clone() for k, p in policy.named_parameters()}
    limits = (0.1, 0.2) if apart else (0.1,)
    squares = {True: 0.0, False: 0.0}
    for name, gradient in before.items():
        squares[name.startswith("value_")] += float((gradient**2).sum())
    norm = optimise.clip_gradient(policy, *limits)
    whole = math.sqrt(squares[True] + squares[False])
    assert norm == pytest.approx(whole, rel=1e-5)
    factors = dict.fromkeys((True, False), 0.1 / whole)
    if apart:
        factors = {False: 0.1 / math.sqrt(squares[False]), True: 0.2 / math.sqrt(squares[True])}
    assert max(factors.values()) < 1
    for name, parameter in policy.named_parameters():
        want = before[name] * factors[name.startswith("value_")]
        torch.testing.assert_close(parameter.grad, want, rtol=1e-4, atol=1e-7, msg=name)
