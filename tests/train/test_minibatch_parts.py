"""A minibatch's gradient and sums do not depend on how it is divided, computed and padded."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GraniteConfig,
    LlamaForCausalLM,
    PhiConfig,
)

from engine.config.sections.ppo import KLConfig
from engine.train.models.language_model import LanguageModel
from engine.train.models.output_layer import OutputLayer
from engine.train.ppo import chunked_loss
from engine.train.ppo.forward import MicroBatchLimit, score_tokens
from tests.train.minibatch import (
    K3,
    LLAMA,
    PROMPTS,
    RESPONSES,
    SHAPE,
    VOCABULARY,
    assert_same,
    fast,
    few_logits,
    make_minibatch,
    make_policy,
    run_config,
)

CASES = {
    "token ratio": {"ratio": "token"},
    "sequence ratio": {"ratio": "sequence"},
    "mean ratio": {"ratio": "sequence_mean"},
    "sequence mean, entropy, k3": {
        "loss_aggregation": "sequence",
        "entropy_coef": 0.3,
        "kl": KLConfig(**K3),
    },
    "constant divisor": {"loss_aggregation": "sequence_sum_constant", "dual_clip": 1.5},
}
"""Keys of `ppo`, with the section `kl`."""


@pytest.mark.parametrize("of_ppo", CASES.values(), ids=CASES)
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


@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 4), (2, 5)])
@pytest.mark.parametrize("filler", [0, 7])
def test_padding_changes_neither_gradient_nor_sums(left, right, filler):
    policy, config = make_policy("separate"), run_config(value_clip=0.2, micro_batch_size=3)
    bare = fast(policy, make_minibatch(policy), config)
    assert_same(fast(policy, make_minibatch(policy, left, right, filler), config), bare)


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
    monkeypatch.setattr(chunked_loss, "MAX_LOGITS", 5 * VOCABULARY)
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
    monkeypatch.setattr(chunked_loss, "MAX_LOGITS", most * VOCABULARY)
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
