"""Optimised implementations compute the same as the plain ones."""

import copy
import ctypes
import json
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from engine.config.sections.launch import LaunchConfig
from engine.launch.environment import rank_environment
from engine.train.distributed.file_backed import back_by_file, drop_pages
from engine.train.distributed.ranks import RankGroup
from engine.train.models import cpu_matmul
from engine.train.models.cpu_layers import use_cpu_layers
from engine.train.models.cpu_matmul import layer_output
from engine.train.ppo.logprobs import CHUNK, token_logprobs
from engine.train.rollout.native.transposed_weights import WORTHWHILE, transposed_weights

MAKING = {"aten::zeros_like", "aten::fill_", "aten::embedding_dense_backward", "aten::add"}
"""Operators by which autograd would make and add a gradient of an embedding."""
SINGLE_RANK = RankGroup(LaunchConfig(device="cpu"))
needs_onednn = pytest.mark.skipif(not cpu_matmul.has_onednn(), reason="torch without oneDNN")
needs_mallinfo = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="a C library without mallinfo2"
)
PRODUCTS_OF_MANY_SHAPES = """
import ctypes, json
import torch
from engine.train.models.cpu_matmul import onednn_linear
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "abcdefghij"]
info = ctypes.CDLL(None).mallinfo2
info.restype = Info
weight = torch.ones(64, 64)
in_use = []
for rows in range(1, 601):
    onednn_linear(torch.ones(rows, 64), weight)
    if rows % 200 == 0:
        in_use.append(info().h)
print(json.dumps(in_use))
"""
"""Prints the bytes of allocated blocks after 200, 400 and 600 shapes."""


def ranks_with(**changes):
    """A group of ranks that differs from a single one on a CPU; has no collectives."""
    ranks = copy.copy(SINGLE_RANK)
    vars(ranks).update(changes)
    return ranks


@pytest.fixture
def onednn(monkeypatch):
    """As on a processor on which oneDNN is faster."""
    monkeypatch.setattr(cpu_matmul, "ONEDNN_IS_QUICKER", True)


def small_model(seed=0):
    """A model whose embedding is also its output layer; token 1 is padding."""
    torch.manual_seed(seed)
    shape = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=50, tie_word_embeddings=True, pad_token_id=1,
        attention_bias=True,
    )  # fmt: skip
    return LlamaForCausalLM(shape)


def checkpoint_activations(model):
    with warnings.catch_warnings():  # transformers 5.23 renames it; earlier ones lack the new name
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})


def add_gradients(model, micro_batches):
    for tokens in micro_batches:
        model(input_ids=tokens).logits.square().mean().backward()


@needs_onednn
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 24), (3, 5, 24)])
def test_a_linear_layer_by_onednn_has_the_same_result_and_gradients(onednn, bias, shape, size):
    torch.manual_seed(0)
    plain = nn.Linear(24, 40, bias=bias)
    quick = nn.Linear(24, 40, bias=bias)
    quick.load_state_dict(plain.state_dict())
    use_cpu_layers(quick, ranks_with(size=size))
    x, weights = torch.randn(shape), torch.randn(*shape[:-1], 40)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for layer, given in zip((plain, quick), inputs, strict=True):
        (layer(given) * weights).sum().backward()
    torch.testing.assert_close(plain(x), quick(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-5, atol=1e-5)
    for a, b in zip(plain.parameters(), quick.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)


@needs_onednn
@needs_mallinfo
def test_the_memory_of_a_rank_does_not_grow_with_the_number_of_shapes():
    printed = subprocess.run(
        [sys.executable, "-c", PRODUCTS_OF_MANY_SHAPES], env=rank_environment(LaunchConfig()),
        stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    first, *later = json.loads(printed.stdout)
    assert max(later) < first + 10e6


def test_a_layer_without_rows_has_a_result_without_rows():
    model = nn.Sequential(nn.Linear(24, 16))
    use_cpu_layers(model, SINGLE_RANK)
    x = torch.zeros(3, 0, 24, requires_grad=True)
    model(x).sum().backward()
    assert model(x).shape == (3, 0, 16)


@needs_onednn
def test_an_output_layer_by_onednn_has_the_same_result(monkeypatch):
    monkeypatch.setattr(cpu_matmul, "ONEDNN_IS_QUICKER_IF_WIDE", True)
    monkeypatch.setattr(cpu_matmul, "WIDE", 40)
    x, weight = torch.randn(3, 24), torch.randn(40, 24)
    torch.testing.assert_close(layer_output(x, weight), x @ weight.t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(16, 1, 64), (2, 64), (32, 64), (33, 64), (1, 64)])
def test_a_layer_in_blocks_has_the_same_result_for_few_rows(monkeypatch, shape, bias):
    monkeypatch.setattr(cpu_matmul, "BLOCKS_ARE_QUICKER", True)
    monkeypatch.setattr(cpu_matmul, "LARGE", 1)
    products = []
    monkeypatch.setattr(torch, "bmm", lambda *x, made=torch.bmm: products.append(1) or made(*x))
    torch.manual_seed(0)
    plain = nn.Linear(64, 192, bias=bias)
    quick = copy.deepcopy(plain)
    use_cpu_layers(quick, SINGLE_RANK)
    x = torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(quick(x), plain(x), rtol=1e-5, atol=1e-6)
    assert len(products) == (1 < x.numel() // 64 <= 32)


def test_a_layer_of_other_sizes_than_blocks_has_the_same_result(monkeypatch):
    monkeypatch.setattr(cpu_matmul, "BLOCKS_ARE_QUICKER", True)
    monkeypatch.setattr(cpu_matmul, "LARGE", 1)
    x, weight = torch.randn(3, 24), torch.randn(100, 24)
    torch.testing.assert_close(layer_output(x, weight), x @ weight.t(), rtol=1e-5, atol=1e-5)


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_under_adapters_has_the_same_result_and_gradient_of_its_input(onednn, bias):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(24, 40, bias=bias).requires_grad_(False), nn.Linear(40, 3))
    quick = copy.deepcopy(plain)
    use_cpu_layers(quick, SINGLE_RANK)
    assert quick[0].weight.t().is_contiguous()
    assert quick[1].weight.is_contiguous()
    inputs = [torch.ones(3, 24, requires_grad=True) for _ in range(2)]
    outputs = [layer(x) for layer, x in zip((plain, quick), inputs, strict=True)]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trained", [True, False], ids=["policy", "reference"])
def test_weights_of_the_policy_and_of_the_reference_have_the_same_order(onednn, trained):
    model = small_model().requires_grad_(trained)
    use_cpu_layers(model, SINGLE_RANK)
    assert all(p.is_contiguous() for p in model.parameters())


def test_an_embedding_under_adapters_keeps_its_order(onednn):
    model = small_model().requires_grad_(False)
    model.model.norm.requires_grad_(True)
    use_cpu_layers(model, SINGLE_RANK)
    assert model.get_input_embeddings().weight.is_contiguous()
    assert model.model.layers[0].mlp.up_proj.weight.t().is_contiguous()


@needs_onednn
def test_layers_with_weights_in_transposed_order_have_the_same_results(onednn):
    model = small_model().eval()
    use_cpu_layers(model, SINGLE_RANK)
    weights, tokens = list(model.parameters()), torch.arange(8).view(2, 4)
    with torch.no_grad():
        before = model(tokens).logits
        with transposed_weights(list(model.model.layers), WORTHWHILE):
            assert model.model.layers[1].mlp.up_proj.weight.t().is_contiguous()
            torch.testing.assert_close(model(tokens).logits, before, rtol=0, atol=1e-5)
    assert all(a is b for a, b in zip(model.parameters(), weights, strict=True))


def test_after_an_error_layers_have_their_own_weights(onednn):
    model = small_model()
    weights = list(model.parameters())
    with pytest.raises(KeyError), transposed_weights(list(model.model.layers), WORTHWHILE):
        assert any(a is not b for a, b in zip(model.parameters(), weights, strict=True))
        raise KeyError
    assert all(a is b for a, b in zip(model.parameters(), weights, strict=True))


@pytest.mark.parametrize(("tokens", "half"), [(WORTHWHILE - 1, False), (WORTHWHILE, True)])
def test_weights_are_not_copied_for_short_responses_or_for_products_of_bfloat16(
    onednn, tokens, half
):
    model = small_model()
    weights = list(model.parameters())
    blocks = list(model.model.layers)
    with torch.autocast("cpu", torch.bfloat16, enabled=half), transposed_weights(blocks, tokens):
        assert all(a is b for a, b in zip(model.parameters(), weights, strict=True))


@needs_onednn
def test_other_dtypes_than_float32_do_not_use_onednn(onednn):
    layer = nn.Linear(8, 8)
    use_cpu_layers(layer, SINGLE_RANK)
    x = torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
    assert layer.to(torch.float64)(x.double()).dtype is torch.float64


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_added_in_place_are_those_of_autograd(checkpointing):
    plain, ours = small_model(), small_model()
    use_cpu_layers(ours, SINGLE_RANK)
    micro_batches = [
        torch.tensor([[1, 1, 4, 5], [7, 4, 4, 1]]),
        torch.tensor([[2, 3, 9], [4, 1, 6]]),
    ]
    for model in (plain, ours):
        model.train()
        if checkpointing:
            checkpoint_activations(model)
        add_gradients(model, micro_batches)
    for (name, a), b in zip(plain.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6, msg=name)


def test_a_later_micro_batch_makes_no_other_gradient_of_the_embedding():
    ours, plain = small_model(), small_model()
    use_cpu_layers(ours, SINGLE_RANK)
    assert gradients_made(plain)  # what this test looks for
    assert not gradients_made(ours)


def gradients_made(model):
    """Operators of a second micro-batch that make a tensor of the embedding's shape."""
    add_gradients(model, [torch.tensor([[2, 3, 4]])])
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        add_gradients(model, [torch.tensor([[5, 3, 4]])])
    shape = list(model.get_input_embeddings().weight.shape)
    return [e.name for e in profiler.events() if e.name in MAKING and shape in e.input_shapes[:1]]


def test_with_several_ranks_gradients_pass_through_autograd_which_averages_them():
    model = small_model()
    use_cpu_layers(model, ranks_with(size=2))
    seen = []
    for parameter in model.parameters():
        parameter.register_hook(lambda grad, parameter=parameter: seen.append(parameter))
    add_gradients(model, [torch.tensor([[2, 3, 4]])])
    assert {id(p) for p in seen} == {id(p) for p in model.parameters()}


def test_frozen_weights_get_no_gradient():
    model = small_model()
    use_cpu_layers(model, SINGLE_RANK)
    trained = model.model.layers[0].mlp.down_proj.weight
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is trained)
    add_gradients(model, [torch.tensor([[2, 3, 4]])] * 2)
    assert [p for p in model.parameters() if p.grad is not None] == [trained]


def test_layers_on_a_gpu_stay_as_they_are():
    model = small_model()
    use_cpu_layers(model, ranks_with(device=torch.device("cuda")))
    assert not any("forward" in vars(part) for part in model.modules())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_and_their_gradient_are_those_of_log_softmax(temperature, dtype):
    torch.manual_seed(0)
    raw = 4 * torch.randn(2, 3, 50).to(dtype)
    tokens, weights = torch.randint(50, (2, 3)), torch.randn(2, 3)
    slow = raw.clone().requires_grad_()
    logprobs = torch.log_softmax(slow.double() / temperature, -1)
    expected = logprobs.gather(2, tokens[:, :, None]).squeeze(2)
    (expected * weights).sum().backward()
    quick = raw.clone().requires_grad_()
    got = token_logprobs(quick * 1, tokens, temperature)
    (got * weights).sum().backward()
    assert got.dtype is torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)
    close = 1e-5 if dtype is torch.float32 else 1e-2
    torch.testing.assert_close(quick.grad, slow.grad, rtol=close, atol=close)


def test_rows_computed_in_several_chunks_are_the_same_as_one_by_one():
    torch.manual_seed(0)
    logits = torch.randn(1, 5, CHUNK // 2)  # two rows per chunk
    tokens = torch.randint(CHUNK // 2, (1, 5))
    together = token_logprobs(logits.clone(), tokens, 1.0)
    for t in range(5):
        alone = token_logprobs(logits[:, t : t + 1].clone(), tokens[:, t : t + 1], 1.0)
        assert float(alone) == float(together[0, t])


def test_a_file_backed_model_computes_the_same():
    model = small_model().eval().requires_grad_(False)
    tokens = torch.arange(12).view(2, 6)
    before = model(input_ids=tokens).logits
    back_by_file(model)
    for _ in range(2):
        assert torch.equal(model(input_ids=tokens).logits, before)
        drop_pages(model)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert not any(p.data_ptr() % 64 for p in model.parameters())


def test_without_disk_space_for_the_file_the_model_stays_in_memory(monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("engine.train.distributed.file_backed.os.posix_fallocate", full)
    model = nn.Linear(3, 3)
    weight = model.weight.data_ptr()
    back_by_file(model)
    assert model.weight.data_ptr() == weight
    drop_pages(model)
