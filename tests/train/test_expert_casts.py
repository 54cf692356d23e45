"""Experts with float32 weights compute in bfloat16, and their weights get float32 gradients."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from engine.train.models.language_model import LanguageModel
from engine.train.reward_training.base import read_base
from tests.train.architectures import ARCHITECTURES, VOCABULARY, write_model
from tests.train.test_reward_training import request
from tests.train.test_rewards import SINGLE_RANK

IDS = torch.randint(0, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["mixtral", "qwen3_moe"])
def policy(request):
    torch.manual_seed(0)
    shape = AutoConfig.for_model(
        request.param, vocab_size=VOCABULARY, **ARCHITECTURES[request.param]
    )
    policy = LanguageModel(AutoModelForCausalLM.from_config(shape), compute=torch.bfloat16)
    policy.cast_experts()
    return policy.eval()


def gradients(policy):
    """Of the experts' weights, by name."""
    policy.zero_grad()
    logits = policy(IDS, torch.ones_like(IDS), 4).logits
    logits.float().log_softmax(-1)[..., 7].sum().backward()
    return {n: p.grad.clone() for n, p in policy.named_parameters() if ".experts." in n}


class Products(TorchDispatchMode):
    """Collects the dtypes of the experts' products."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "grouped_mm" in str(function):
            self.dtypes += [x.dtype for x in args[:2]]
        return function(*args, **(kwargs or {}))


def test_products_of_experts_are_computed_in_bfloat16_forward_and_backward(policy):
    with Products() as products:
        gradients(policy)
    assert products.dtypes and set(products.dtypes) == {torch.bfloat16}


def test_gradients_are_those_of_the_plain_loop_over_experts(policy):
    found = gradients(policy)
    policy.lm.set_experts_implementation("eager")
    expected = gradients(policy)
    assert found and found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < 0.02, name


def test_activation_checkpointing_changes_no_gradient(policy):
    expected = gradients(policy)
    policy.lm.gradient_checkpointing_enable({"use_reentrant": False})
    found = gradients(policy.train())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_pass_that_fails_leaves_the_float32_weights_in_place(policy):
    experts = policy.lm.model.layers[0].mlp.experts
    with policy.autocast("cpu"), pytest.raises(RuntimeError):
        experts(torch.zeros(1, 5), torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2))
    assert experts.gate_up_proj.dtype == torch.float32


def test_a_reward_model_that_is_trained_computes_its_experts_in_bfloat16(tmp_path):
    folder = write_model(tmp_path / "base", "mixtral")
    model = read_base(request(base=str(folder)), SINGLE_RANK, print).model
    with Products() as products, torch.autocast("cpu", torch.bfloat16):
        model.config.pad_token_id = 0
        model(input_ids=IDS, attention_mask=torch.ones_like(IDS))
    assert products.dtypes and set(products.dtypes) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_casts_end_with_the_autocast_context(policy):
    mask = torch.ones_like(IDS)
    with torch.no_grad():
        before = policy(IDS, mask, 1).logits
        for weight in policy.parameters():
            weight.mul_(1.5)
        after = policy(IDS, mask, 1).logits
        with policy.autocast("cpu"):
            inside = policy(IDS, mask, 1).logits
    assert not torch.equal(before, after)
    assert torch.equal(after, inside)
