"""The learning-rate schedule, and a minibatch's gradient compared with a loss written as loops.

The model is a Llama of two layers with random float32 weights. Tolerances are 1e-4 of a gradient
tensor's largest entry, and 1e-4 of a sum: the two computations differ only in the order of float32
additions.
"""

import dataclasses
import math

import msgspec
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PhiConfig,
)

from engine.config.schema import RunConfig
from engine.config.sections.launch import LaunchConfig
from engine.config.sections.model import DataConfig, ModelConfig
from engine.config.sections.ppo import KLConfig, PPOConfig
from engine.config.sections.reward import RewardConfig
from engine.config.sections.rollout import RolloutConfig
from engine.config.sections.train import TrainConfig
from engine.train.data.prompts import PromptBatch
from engine.train.distributed.ranks import RankGroup
from engine.train.models.language_model import LanguageModel
from engine.train.models.output_layer import OutputLayer
from engine.train.ppo import chunked_loss, optimise
from engine.train.ppo.advantages import Targets
from engine.train.ppo.forward import MicroBatchLimit, score_tokens
from engine.train.ppo.optimise import backward
from engine.train.ppo.update_stats import LossSums
from engine.train.rollout.conversation import Conversation
from engine.train.rollout.rollout import Rollout

SINGLE_RANK = RankGroup(LaunchConfig(device="cpu"))
VOCABULARY = 32
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
LLAMA = LlamaConfig(**SHAPE)
PROMPTS, RESPONSES = [3, 1, 6, 4, 2, 6, 5], [4, 5, 1, 7, 1, 3, 7]
ALL = torch.arange(len(PROMPTS))
K2 = {"estimator": "k2", "place": "loss"}
K3 = {"estimator": "k3", "place": "loss"}


def run_config(temperature=1.0, kl=None, **of_ppo):
    return RunConfig(
        model=ModelConfig(policy="p"),
        data=DataConfig(prompts="d"),
        reward=RewardConfig(function="m:f"),
        rollout=RolloutConfig(temperature=temperature, max_new_tokens=9),
        kl=kl or KLConfig(),
        ppo=PPOConfig(**of_ppo),
        train=TrainConfig(learning_rate=2e-3),
    )


def make_policy(value):
    torch.manual_seed(3)
    policy = LanguageModel(LlamaForCausalLM(LLAMA), value)
    if value == "separate":
        policy.value_trunk = LlamaModel(LLAMA)
    if value is not None:
        torch.nn.init.normal_(policy.value_head.weight, std=0.5)
    return policy.eval()


def with_replies(rollout):
    """The rollout with replies of an environment after the first, and before the last token."""
    generator = torch.Generator().manual_seed(9)
    places, rows = [], []
    for i, n in enumerate(RESPONSES):
        before = {1: 1 + i % 3} | ({n - 1: 2} if n > 2 else {}) if n > 1 else {}
        row, own = [], []
        for t, token in enumerate(rollout.ids[i, :n].tolist()):
            row += torch.randint(32, (before.get(t, 0),), generator=generator).tolist()
            own.append(len(row))
            row.append(token)
        places.append(torch.tensor(own))
        rows.append(torch.tensor(row))
    return dataclasses.replace(
        rollout,
        conversation=Conversation(
            pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows]),
            pad_sequence(places, batch_first=True), [],
        ),
    )  # fmt: skip


def make_minibatch(policy, left=0, right=0, filler=0, *, replies=False):
    """A rollout and targets close to the policy's, with extra padding filled with `filler`."""
    generator = torch.Generator().manual_seed(8)
    n, p, t = len(PROMPTS), max(PROMPTS) + left, max(RESPONSES) + right
    lengths = torch.tensor(RESPONSES)
    mask = torch.arange(t)[None] < lengths[:, None]
    prompts = torch.full((n, p), filler)
    ids = torch.full((n, t), filler)
    tables = [torch.full((n, t), float(filler)) for _ in range(5)]
    for i in range(n):  # row by row, so that padding does not change the random numbers
        prompts[i, p - PROMPTS[i] :] = torch.randint(32, (PROMPTS[i],), generator=generator)
        ids[i, : RESPONSES[i]] = torch.randint(32, (RESPONSES[i],), generator=generator)
        for table in tables:
            table[i, : RESPONSES[i]] = torch.randn(RESPONSES[i], generator=generator)
    batch, cut = PromptBatch([], prompts, torch.tensor(PROMPTS)), torch.zeros(n, dtype=torch.bool)
    texts = [""] * n
    rollout = Rollout(batch, ids, lengths, cut, cut, tables[0], tables[0], tables[1], texts)
    rollout = with_replies(rollout) if replies else rollout
    with torch.no_grad():
        logprobs, values = score_tokens(policy, rollout, 1.0, MicroBatchLimit(n))
    old = torch.where(mask, logprobs + 0.4 * tables[0], tables[0])
    ref = torch.where(mask, logprobs + 0.4 * tables[4], tables[4])
    if policy.value_head is None:
        return rollout, Targets(old, tables[1], ref_logprobs=ref)
    old_values = torch.where(mask, values + 0.4 * tables[2], tables[2])
    return rollout, Targets(old, tables[1], old_values, tables[3], ref_logprobs=ref)


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


def gradients(policy):
    found = {k: p.grad for k, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad(set_to_none=True)
    return found


def fast(policy, minibatch, config, rows=ALL, warming_up=False):
    sums = backward(SINGLE_RANK, policy, *minibatch, rows, config, warming_up)
    return gradients(policy), sums


def few_logits(_layer, _inputs, logits):
    assert logits.numel() <= 5 * VOCABULARY


def assert_same(got, want):
    for name in {*got[0], *want[0]}:
        a, b = (g[0].get(name, torch.zeros(1)) for g in (got, want))
        atol = 1e-4 * float(b.abs().max()) + 1e-7
        torch.testing.assert_close(a.expand(b.shape), b, rtol=0, atol=atol, msg=name)
    for name, value in vars(want[1]).items():
        assert float(getattr(got[1], name)) == pytest.approx(float(value), rel=1e-4), name


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Synchronising two threads costs far more than multiplying 16 × 16 matrices."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("value", ["shared", "separate", None])
@pytest.mark.parametrize(
    "of_ppo",
    [
        {},
        {"ratio": "sequence", "clip_range": 0.3, "value_clip": 0.2},
        {"value_clip": 0.3, "value_coef": 2.0, "temperature": 0.7},
        {"clip_range": 0.1, "clip_range_high": 0.5, "dual_clip": 1.2},
        {"loss_aggregation": "sequence", "entropy_coef": 0.3, "temperature": 0.7},
        {"loss_aggregation": "sequence_sum_constant", "kl": KLConfig(beta=0.5, **K2)},
        {"loss_aggregation": "sequence", "kl": KLConfig(beta=0.5, **K3), "entropy_coef": 0.1},
        {"kl": KLConfig(beta=0.5, **K3), "ratio": "sequence"},
        {"kl": KLConfig(beta=0.5, **K3, importance_weighted=True), "ratio": "sequence_mean"},
        {"kl": KLConfig(beta=0.5, **K2, importance_weighted=True)},
        {"kl": KLConfig(beta=0.5, estimator="abs", place="loss")},
        {"ratio": "sequence_mean", "loss_aggregation": "sequence", "clip_range": 0.02},
        {"policy_loss": "cispo", "clip_range": 0.1, "clip_range_high": 0.3},
        {"policy_loss": "cispo", "ratio": "sequence", "clip_range": 0.5, "clip_range_high": 0.2},
        {"policy_loss": "sapo", "sapo_temperature": 2.0, "sapo_temperature_negative": 3.0},
        {"policy_loss": "vespo", "ratio": "sequence", "loss_aggregation": "sequence"},
        {"policy_loss": "gmpo", "ratio": "sequence_mean", "clip_range": 0.3},
        {
            "policy_loss": "gmpo",
            "ratio": "sequence_mean",
            "clip_range": 0.2,
            "clip_range_high": 0.4,
            "loss_aggregation": "sequence",
            "entropy_coef": 0.1,
        },
        {"policy_loss": "dppo_tv", "clip_range": 0.01, "clip_range_high": 0.02},
        {"policy_loss": "dppo_kl", "clip_range": 0.004, "dppo_ratio_cap": 1.2},
        {"policy_loss": "dro", "dro_beta": 0.7, "loss_aggregation": "sequence"},
        {"ratio": "sequence_mean", "clip_range": 0.02, "loss_aggregation": "sequence_sum"},
        {"kl_cov": 0.1, "kl_cov_coef": 0.7, "loss_aggregation": "sequence"},
        {"off_policy_mask": 3.5, "kl": KLConfig(beta=0.5, **K3)},
        {"off_policy_mask": 3.5, "policy_loss": "cispo", "loss_aggregation": "sequence"},
    ],
    ids=[
        "defaults",
        "sequence ratio",
        "temperature",
        "clip-higher and dual clip",
        "sequence mean, entropy",
        "constant divisor, k2",
        "sequence mean, k3, entropy",
        "k3",
        "weighted k3, mean ratio",
        "weighted k2",
        "absolute log ratio",
        "mean ratio",
        "cispo",
        "cispo, sequence ratio",
        "sapo",
        "vespo",
        "gmpo",
        "gmpo, clip-higher, sequence mean, entropy",
        "dppo_tv",
        "dppo_kl",
        "dro",
        "mean ratio, sum",
        "kl_cov, sequence mean",
        "off-policy mask, k3",
        "off-policy mask, cispo, sequence mean",
    ],
)
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
    monkeypatch.setattr(chunked_loss, "MOST_LOGITS", 5 * VOCABULARY)
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
    monkeypatch.setattr(chunked_loss, "MOST_LOGITS", 5 * VOCABULARY)
    assert_same(fast(policy, minibatch, config), want)


@pytest.mark.parametrize(
    "of_ppo",
    [
        {"ratio": "token"},
        {"ratio": "sequence"},
        {"ratio": "sequence_mean"},
        {"loss_aggregation": "sequence", "entropy_coef": 0.3, "kl": KLConfig(**K3)},
        {"loss_aggregation": "sequence_sum_constant", "dual_clip": 1.5},
    ],
    ids=[
        "token ratio",
        "sequence ratio",
        "mean ratio",
        "sequence mean, entropy, k3",
        "constant divisor",
    ],
)
@pytest.mark.parametrize("value", ["shared", "separate"])
def test_micro_batches_change_neither_gradient_nor_sums(of_ppo, value):
    policy = make_policy(value)
    minibatch = make_minibatch(policy)
    whole, *parts = [
        fast(
            policy,
            minibatch,
            run_config(**of_ppo, value_clip=0.2, micro_batch_size=size, micro_batch_by=by),
        )
        for size, by in [
            *((size, "responses") for size in (7, 1, 2, 3, 16)),
            *((size, "tokens") for size in (1, 2)),
        ]
    ]
    for part in parts:
        assert_same(part, whole)


class AttentionMasks(TorchDispatchMode):
    """Collects whether attention was called with a mask."""

    def __init__(self):
        super().__init__()
        self.given = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = str(function)
        if "dot_product" in name and "backward" not in name:
            self.given.append(kwargs.get("attn_mask") is not None)
        return function(*args, **kwargs)


def test_attention_needs_no_mask_though_lengths_differ():
    policy = make_policy("separate")
    minibatch = make_minibatch(policy)
    with AttentionMasks() as masks:
        fast(policy, minibatch, run_config(micro_batch_size=3))
    assert masks.given
    assert not any(masks.given)


CAPPED = {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 2.0}
SCALED = {"logits_scaling": 0.3, "tie_word_embeddings": True}
OTHERS = {
    "a soft cap": (Gemma2Config(**SHAPE, **CAPPED), {}),
    "a factor, tied embeddings": (GraniteConfig(**SHAPE, **SCALED), {}),
    "a bias": (PhiConfig(**SHAPE), {}),
    "bfloat16": (LLAMA, {"compute": torch.bfloat16}),
    "bfloat16 but for the logits": (LLAMA, {"compute": torch.bfloat16}),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "adapters"])
def test_the_chunks_of_logits_change_neither_gradient_nor_sums(other, trained, monkeypatch):
    (shape, named), float32 = OTHERS[other], other == "bfloat16 but for the logits"
    torch.manual_seed(3)
    policy = LanguageModel(AutoModelForCausalLM.from_config(shape), "shared", **named).eval()
    if float32:
        policy.output.use_float32()
    policy.lm.get_output_embeddings().weight.requires_grad_(trained)
    config = run_config(entropy_coef=0.1, micro_batch_size=7, temperature=0.7)
    minibatch = make_minibatch(policy)
    whole, sums = fast(policy, minibatch, config)
    logprobs, _ = score_tokens(policy, minibatch[0], 0.7, MicroBatchLimit(7))
    monkeypatch.setattr(chunked_loss, "MOST_LOGITS", 5 * VOCABULARY)
    policy.lm.get_output_embeddings().register_forward_hook(few_logits)
    again, _ = score_tokens(policy, minibatch[0], 0.7, MicroBatchLimit(7))
    close = 1e-5 if not named or float32 else 3e-2
    torch.testing.assert_close(again, logprobs, rtol=0, atol=close)
    close = 1e-5 if not named else 3e-2
    parts, again = fast(policy, minibatch, config)
    assert parts.keys() == whole.keys()
    for name, gradient in whole.items():
        atol = close * max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(parts[name], gradient, rtol=0, atol=atol, msg=name)
    for name, value in vars(sums).items():
        assert getattr(again, name) == pytest.approx(value, rel=close, abs=close), name


@pytest.mark.parametrize("most", [1, 1 << 25], ids=["in chunks", "at once"])
def test_logits_are_only_made_for_tokens_of_responses(most, monkeypatch):
    monkeypatch.setattr(chunked_loss, "MOST_LOGITS", most * VOCABULARY)
    policy = make_policy("shared")
    minibatch = make_minibatch(policy, left=2, right=3)
    hidden = []
    layer = policy.lm.get_output_embeddings()
    layer.register_forward_pre_hook(lambda _layer, inputs: hidden.append(inputs[0]))
    fast(policy, minibatch, run_config(micro_batch_size=len(PROMPTS)))
    score_tokens(policy, minibatch[0], 1.0, MicroBatchLimit(len(PROMPTS)))
    assert [x.shape[:-1].numel() for x in hidden] == [sum(RESPONSES)] * 2


def test_logits_are_made_at_once_where_it_is_unknown_what_a_model_does_to_them():
    lm = LlamaForCausalLM(LLAMA)
    compute = lm.forward

    def forward(**inputs):
        found = compute(**inputs)
        found.logits = found.logits**3
        return found

    lm.forward = forward
    assert OutputLayer(lm, torch.float32).after is None


@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 4), (2, 5)])
@pytest.mark.parametrize("filler", [0, 7])
def test_padding_changes_neither_gradient_nor_sums(left, right, filler):
    policy, config = make_policy("separate"), run_config(value_clip=0.2, micro_batch_size=3)
    bare = fast(policy, make_minibatch(policy), config)
    assert_same(fast(policy, make_minibatch(policy, left, right, filler), config), bare)


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
