"""The KL in the reward and the controller of its coefficient, compared with slow loops."""

import math
from typing import get_args, get_type_hints

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config.sections.ppo import KLConfig
from engine.kl import next_beta
from engine.train.ppo import advantages, masked
from engine.train.ppo.kl_estimators import KL_ESTIMATORS
from engine.train.ppo.logprobs import token_logprobs, token_logprobs_and_entropies

modest = settings(max_examples=60, deadline=None, derandomize=True)
BETAS = st.sampled_from([0.0, 0.05, 0.5, 2.0])


def controller(**values):
    return KLConfig(controller="adaptive", **values)


def slow_step(beta, kl, episodes, *, target, horizon, low, high):
    """One step of the controller of Ziegler et al. with bounds; from 0 it restarts at `low`."""
    if beta == 0:
        return low
    error = kl / target - 1
    error = min(0.2, max(-0.2, error))
    beta *= 1 + error * episodes / horizon
    return min(high, max(low, beta))


@st.composite
def responses(draw):
    """Lengths and scores (B,); log π, log π_ref and values (B, T). Multiples of 1/64."""
    b, t = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    lengths = torch.tensor(draw(st.lists(st.integers(1, t), min_size=b, max_size=b)))

    def numbers(n):
        return torch.tensor(draw(st.lists(st.integers(-256, 256), min_size=n, max_size=n))) / 64

    return lengths, numbers(b), *(numbers(b * t).reshape(b, t) for _ in range(3))


def masked_gaps(logprobs, ref, lengths):
    """log π − log π_ref, 0 beyond the lengths."""
    return (logprobs - ref) * masked.response_mask(lengths, ref.shape[1])


def slow_kl(logprobs, ref, lengths, i):
    return sum(float(logprobs[i, t]) - float(ref[i, t]) for t in range(int(lengths[i])))


@modest
@given(st.data(), st.sampled_from([0.25, 0.7, 1.0, 3.0]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_log_probabilities_are_those_of_the_softmax_in_float32(dtype, data, temperature):
    n, v = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 12))
    numbers = data.draw(st.lists(st.integers(-2560, 2560), min_size=n * v, max_size=n * v))
    tokens = data.draw(st.lists(st.integers(0, v - 1), min_size=n, max_size=n))
    logits = (torch.tensor(numbers).reshape(1, n, v) / 64).to(dtype)
    got = token_logprobs(logits, torch.tensor([tokens]), temperature)
    assert got.dtype is torch.float32
    for t, token in enumerate(tokens):
        scaled = [x / temperature for x in logits[0, t].tolist()]
        top = max(scaled)
        want = scaled[token] - top - math.log(math.fsum(math.exp(x - top) for x in scaled))
        # Logits are up to 160 after the temperature: twice a rounding error of 160 · 6e-8.
        assert abs(float(got[0, t]) - want) <= 5e-5


@modest
@given(responses())
def test_the_kl_of_a_response_is_the_sum_over_its_tokens(batch):
    lengths, _, logprobs, ref, _ = batch
    got = masked.sequence_kl(logprobs, ref, masked.response_mask(lengths, ref.shape[1]))
    assert got.shape == lengths.shape
    for i in range(len(lengths)):
        assert abs(float(got[i]) - slow_kl(logprobs, ref, lengths, i)) <= 1e-5


@modest
@given(responses(), BETAS)
def test_every_token_has_its_kl_penalty_the_last_one_the_score_and_those_beyond_it_nothing(
    batch, beta
):
    lengths, scores, logprobs, ref, _ = batch
    got = advantages.token_rewards(scores, masked_gaps(logprobs, ref, lengths), lengths, beta)
    want = torch.zeros_like(ref)
    for i, n in enumerate(lengths.tolist()):
        for t in range(n):
            want[i, t] = -beta * (float(logprobs[i, t]) - float(ref[i, t]))
        want[i, n - 1] += float(scores[i])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert not got[~masked.response_mask(lengths, ref.shape[1])].any()


@modest
@given(responses(), BETAS)
def test_the_first_undiscounted_advantage_is_the_score_minus_kl_and_value(batch, beta):
    lengths, scores, logprobs, ref, values = batch
    mask = masked.response_mask(lengths, ref.shape[1])
    rewards = advantages.token_rewards(scores, masked_gaps(logprobs, ref, lengths), lengths, beta)
    got = advantages.generalised_advantages(rewards, values, mask, 1.0, 1.0)
    for i in range(len(lengths)):
        kl = slow_kl(logprobs, ref, lengths, i)
        want = float(scores[i]) - beta * kl - float(values[i, 0])
        # Up to 7 tokens with rewards of 16 and values of 4, each with a relative error of 6e-8.
        assert abs(float(got[i, 0]) - want) <= 1e-4


@modest
@given(
    st.floats(1e-3, 5),
    st.lists(st.floats(-5, 500), min_size=1, max_size=30),
    st.integers(1, 128),
    st.floats(0.1, 100),
    st.floats(30, 1e5),
)
def test_the_adaptive_controller_matches_the_slow_loop(beta, kls, episodes, target, horizon):
    bounds = {"beta_min": 1e-2, "beta_max": 1.0}
    ours = controller(beta=beta, target=target, horizon=horizon, **bounds)
    for kl in kls:
        beta = slow_step(beta, kl, episodes, target=target, horizon=horizon, low=1e-2, high=1.0)
        ours = msgspec.structs.replace(ours, beta=next_beta(ours, kl, episodes))
        assert math.isclose(ours.beta, beta, rel_tol=1e-12)
        assert 1e-2 <= ours.beta <= 1.0


@pytest.mark.parametrize(("kl", "factor"), [(6.0, 1.0), (6.6, 1.05), (60.0, 1.1), (-60.0, 0.9)])
def test_the_relative_error_is_clipped_to_a_fifth(kl, factor):
    ours = controller(beta=0.3, target=6.0, horizon=100.0)
    assert next_beta(ours, kl, 50) == pytest.approx(0.3 * factor, rel=1e-12)


@given(kl=st.floats(0, 1000), episodes=st.integers(1, 128))
@modest
def test_from_beta_zero_the_controller_restarts_at_its_minimum(kl, episodes):
    ours = controller(beta=0.0, beta_min=0.003)
    assert next_beta(ours, kl, episodes) == 0.003


def test_after_a_restart_from_zero_beta_grows_while_the_kl_is_too_large():
    ours = controller(beta=0.0, beta_min=0.003, target=6.0, horizon=100.0)
    seen = []
    for _ in range(4):
        ours = msgspec.structs.replace(ours, beta=next_beta(ours, 20.0, 50))
        seen.append(ours.beta)
    assert seen == pytest.approx([0.003, 0.0033, 0.00363, 0.003993], rel=1e-9)


@pytest.mark.parametrize("beta", [0.0, 1e-6, 0.05, 50.0])
@pytest.mark.parametrize("kl", [0.0, 6.0, 600.0])
def test_the_fixed_controller_does_not_change_beta(beta, kl):
    ours = msgspec.structs.replace(controller(beta=beta), controller="fixed")
    assert next_beta(ours, kl, 64) == beta


@pytest.mark.parametrize(("beta", "want"), [(1e-6, 0.01), (50.0, 1.0)])
def test_a_beta_set_beyond_a_bound_is_clipped_to_it(beta, want):
    ours = controller(beta=beta, beta_min=0.01, beta_max=1.0)
    assert next_beta(ours, 6.0, 64) == want


def test_a_token_that_the_model_forbids_adds_nothing_to_the_entropy_or_its_gradient():
    logits = torch.randn(1, 3, 7, generator=torch.Generator().manual_seed(1))
    forbidden = torch.cat([logits, torch.full((1, 3, 2), -math.inf)], 2)
    results = []
    for values in (logits, forbidden):
        leaf = values.clone().requires_grad_()
        logprobs, entropies = token_logprobs_and_entropies(
            leaf * 1.0, torch.tensor([[0, 1, 2]]), 0.7
        )
        (3 * entropies - logprobs).sum().backward()
        results.append((logprobs.detach(), entropies.detach(), leaf.grad[..., :7]))
        assert torch.equal(leaf.grad[..., 7:], torch.zeros_like(leaf.grad[..., 7:]))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_gradients_of_log_probability_and_entropy_add_up_as_in_float64(temperature):
    generator = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(2, 3, 11, generator=generator)
    tokens = torch.randint(11, (2, 3), generator=generator)
    of_logprob, of_entropy = torch.randn(2, 2, 3, generator=generator)

    plain = logits.double().requires_grad_()
    logprobs = torch.log_softmax(plain / temperature, -1)
    chosen = logprobs.gather(-1, tokens[..., None]).squeeze(-1)
    entropies = -(logprobs.exp() * logprobs).sum(-1)
    (chosen * of_logprob + entropies * of_entropy).sum().backward()

    leaf = logits.clone().requires_grad_()
    got = token_logprobs_and_entropies(leaf * 1.0, tokens, temperature)
    (got[0] * of_logprob + got[1] * of_entropy).sum().backward()
    torch.testing.assert_close(got[0].double(), chosen, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1].double(), entropies, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(leaf.grad.double(), plain.grad, rtol=1e-4, atol=1e-5)


def test_the_declared_estimators_are_those_of_the_key():
    assert get_args(get_type_hints(KLConfig)["estimator"]) == tuple(KL_ESTIMATORS)


@pytest.mark.parametrize("name", ["k2", "k3", "abs"])
def test_a_penalty_never_moves_a_token_away_from_the_reference(name):
    log_ratio = torch.tensor([-1000.0, -25.0, -20.0, -1.0, 0.0, 1.0, 25.0], requires_grad=True)
    penalty = KL_ESTIMATORS[name](log_ratio)
    (gradient,) = torch.autograd.grad(penalty.sum(), log_ratio)
    assert penalty.isfinite().all()
    assert (gradient * log_ratio.detach() >= 0).all()


@pytest.mark.parametrize(
    ("name", "unbiased"), [("k1", True), ("k2", False), ("k3", True), ("abs", False)]
)
def test_over_the_whole_distribution_an_unbiased_estimator_is_the_kl(name, unbiased):
    p, q = (
        torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
        torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64),
    )
    want = float((p * (p / q).log()).sum())
    got = float((p * KL_ESTIMATORS[name]((p / q).log())).sum())
    assert (abs(got - want) < 1e-12) == unbiased


@pytest.mark.parametrize(
    ("name", "weighted", "right"),
    [("k1", False, False), ("k2", False, True), ("k1", True, True), ("k3", True, True)],
)
def test_in_the_loss_some_estimators_have_the_gradient_of_the_kl(name, weighted, right):
    """With weights, in expectation over the samples of an older policy; else over the policy's."""
    z = torch.tensor([0.5, -0.3, 0.2], dtype=torch.float64).requires_grad_()
    q = torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64)
    p = z.softmax(0)
    (want,) = torch.autograd.grad((p * (p / q).log()).sum(), z, retain_graph=True)
    old = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64) if weighted else p.detach()
    rho = p / old if weighted else 1.0
    (got,) = torch.autograd.grad((old * rho * KL_ESTIMATORS[name]((p / q).log())).sum(), z)
    assert torch.allclose(got, want if right else torch.zeros(3).double(), atol=1e-12)


def test_rounding_does_not_decide_on_the_gradient_of_the_absolute_log_ratio():
    d = torch.tensor([-1e-6, 0.0, 1e-6, -0.002, 0.5], requires_grad=True)
    found = KL_ESTIMATORS["abs"](d)
    (gradient,) = torch.autograd.grad(found.sum(), d)
    assert found.tolist() == pytest.approx([0, 0, 0, 0.002, 0.5], abs=1e-8)
    assert gradient.tolist() == pytest.approx([0, 0, 0, -1, 1], abs=2e-3)


def test_in_the_loss_the_absolute_log_ratio_has_the_gradient_of_twice_the_total_variation():
    z = torch.tensor([0.5, -0.3, 0.2], dtype=torch.float64).requires_grad_()
    q = torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64)
    p = z.softmax(0)
    (want,) = torch.autograd.grad((p - q).abs().sum(), z, retain_graph=True)
    (got,) = torch.autograd.grad((p.detach() * KL_ESTIMATORS["abs"]((p / q).log())).sum(), z)
    assert torch.allclose(got, want, atol=1e-12)
