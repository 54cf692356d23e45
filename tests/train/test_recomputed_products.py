"""Gated MLPs compute two tensors again in the backward pass instead of keeping them."""

import copy
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import AutoConfig, AutoModelForCausalLM

from engine.train.models.activations.recomputed import is_gated_mlp, recompute_products

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
    "hidden_size_per_layer_input": 0,
}  # fmt: skip


def tiny_model(kind: str) -> nn.Module:
    """A model of an architecture with random weights."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES))


def backward_pass(model: nn.Module, *, bfloat16: bool = False, times: int = 1) -> list[Tensor]:
    """Logits and all gradients of a sum over some random tokens."""
    ids = torch.randint(60, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        logits = model(ids, use_cache=False).logits
    for _ in range(times):
        logits.float().logsumexp(-1).sum().backward(retain_graph=times > 1)
    return [logits, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma2", "mistral", "olmo2"])
def test_outputs_and_gradients_are_the_same_bits(kind: str, bfloat16: bool) -> None:
    usual = tiny_model(kind)
    lean = copy.deepcopy(usual)

    recompute_products(lean)

    assert any("forward" in vars(part) for part in lean.modules())
    found = backward_pass(lean, bfloat16=bfloat16)
    expected = backward_pass(usual, bfloat16=bfloat16)
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


def test_a_second_backward_pass_over_the_same_graph_adds_the_same_gradients() -> None:
    usual = tiny_model("llama")
    lean = copy.deepcopy(usual)

    recompute_products(lean)

    assert all(map(torch.equal, backward_pass(lean, times=2), backward_pass(usual, times=2)))


class Seen(nn.Module):
    """An activation that remembers whether its results still exist."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[weakref.ref[Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        result = silu(x)
        self.results.append(weakref.ref(result))
        return result


def test_activation_and_product_do_not_exist_between_forward_and_backward_pass() -> None:
    model = tiny_model("llama")
    products: list[weakref.ref[Tensor]] = []
    for layer in model.model.layers:
        layer.mlp.act_fn = Seen()
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _part, args: products.append(weakref.ref(args[0]))
        )
    recompute_products(model)

    logits = model(torch.arange(6)[None], use_cache=False).logits

    activations = [ref for layer in model.model.layers for ref in layer.mlp.act_fn.results]
    assert len(activations) == len(products) == 2
    assert logits.requires_grad
    assert [ref() for ref in activations + products] == [None] * 4


def test_without_gradients_nothing_is_computed_again() -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.act_fn = Seen()
    recompute_products(model)

    with torch.no_grad():
        model(torch.arange(6)[None], use_cache=False)

    assert [len(layer.mlp.act_fn.results) for layer in model.model.layers] == [1, 1]


class Gated(nn.Module):
    """A gated MLP with a factor that others do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(4, 8), nn.Linear(4, 8)
        self.down_proj, self.act_fn = nn.Linear(8, 4), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * 0.5


class Clipped(Gated):
    """One that does more than one statement."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clamp(-1, 1)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("other", [Gated(), Clipped(), nn.Linear(4, 4)])
def test_a_module_that_computes_something_else_is_left_alone(other: nn.Module) -> None:
    assert not is_gated_mlp(other)


def test_an_mlp_with_a_forward_of_its_own_is_left_alone() -> None:
    mlp = tiny_model("llama").model.layers[0].mlp
    mlp.forward = lambda x: x  # as Liger's kernels replace it

    assert not is_gated_mlp(mlp)


def test_a_copy_as_large_as_the_products_is_not_taken_for_one() -> None:
    # In bfloat16, a weight's copy is as large if there are as many tokens as hidden states.
    usual = tiny_model("llama")
    lean = copy.deepcopy(usual)
    ids = torch.randint(60, (4, 8), generator=torch.Generator().manual_seed(2))

    recompute_products(lean)

    for model in (usual, lean):
        with torch.autocast("cpu", torch.bfloat16):
            model(ids, use_cache=False).logits.float().logsumexp(-1).sum().backward()
    assert all(
        torch.equal(x.grad, y.grad)
        for x, y in zip(usual.parameters(), lean.parameters(), strict=True)
    )


def test_adapters_in_bfloat16_get_the_same_gradients() -> None:
    usual = tiny_model("llama")
    usual.requires_grad_(False)
    adapted = get_peft_model(
        usual, LoraConfig(r=4, lora_alpha=8, target_modules=["down_proj"], init_lora_weights=False)
    )
    for parameter in adapted.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    lean = copy.deepcopy(adapted)
    ids = torch.randint(60, (4, 33), generator=torch.Generator().manual_seed(2))

    recompute_products(lean)

    gradients = []
    for model in (adapted, lean):
        with torch.autocast("cpu", torch.bfloat16):
            model(ids, use_cache=False).logits.float().logsumexp(-1).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == 4
    assert all(map(torch.equal, *gradients))


def test_an_activation_that_works_in_place_is_left_alone() -> None:
    usual = tiny_model("llama")
    for layer in usual.model.layers:
        layer.mlp.act_fn = nn.ReLU(inplace=True)
    lean = copy.deepcopy(usual)

    recompute_products(lean)

    assert all(map(torch.equal, backward_pass(lean), backward_pass(usual)))
