"""A small policy, a minibatch for it, and the gradient and sums of its update."""

import dataclasses

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

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
from engine.train.ppo.advantages import Targets
from engine.train.ppo.forward import MicroBatchLimit, score_tokens
from engine.train.ppo.optimise import backward
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
    """A Llama of two layers with random float32 weights."""
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


def gradients(policy):
    found = {k: p.grad for k, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad(set_to_none=True)
    return found


def fast(policy, minibatch, config, rows=ALL, warming_up=False):
    """The gradients, by name, and the sums of one minibatch."""
    sums = backward(SINGLE_RANK, policy, *minibatch, rows, config, warming_up)
    return gradients(policy), sums


def few_logits(_layer, _inputs, logits):
    """A hook of an output layer, for chunks of at most 5 tokens."""
    assert logits.numel() <= 5 * VOCABULARY


def assert_same(got, want):
    """Compares gradients and sums.

    Tolerances are 1e-4 of a gradient tensor's largest entry, and 1e-4 of a sum: the two differ only
    in the order of float32 additions.
    """
    for name in {*got[0], *want[0]}:
        a, b = (g[0].get(name, torch.zeros(1)) for g in (got, want))
        atol = 1e-4 * float(b.abs().max()) + 1e-7
        torch.testing.assert_close(a.expand(b.shape), b, rtol=0, atol=atol, msg=name)
    for name, value in vars(want[1]).items():
        assert float(getattr(got[1], name)) == pytest.approx(float(value), rel=1e-4), name
