"""Optimised implementations compute the same as the plain ones."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from engine.train.distributed.file_backed import back_by_file, drop_pages
from engine.train.models import onednn_linear
from engine.train.ppo.logprobs import CHUNK, token_logprobs

needs_onednn = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="torch without oneDNN"
)


@pytest.fixture
def onednn(monkeypatch):
    """As on a processor on which oneDNN is faster."""
    monkeypatch.setattr(onednn_linear, "onednn_is_quicker", lambda: True)


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 24), (3, 5, 24)])
def test_a_linear_layer_by_onednn_has_the_same_result_and_gradients(onednn, bias, shape):
    torch.manual_seed(0)
    plain = nn.Linear(24, 40, bias=bias)
    quick = nn.Linear(24, 40, bias=bias)
    quick.load_state_dict(plain.state_dict())
    onednn_linear.use_onednn(quick)
    x, weights = torch.randn(shape), torch.randn(*shape[:-1], 40)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for layer, given in zip((plain, quick), inputs, strict=True):
        (layer(given) * weights).sum().backward()
    torch.testing.assert_close(plain(x), quick(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-5, atol=1e-5)
    for a, b in zip(plain.parameters(), quick.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)


@needs_onednn
def test_other_dtypes_than_float32_do_not_use_onednn(onednn):
    layer = nn.Linear(8, 8)
    onednn_linear.use_onednn(layer)
    x = torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
    assert layer.to(torch.float64)(x.double()).dtype is torch.float64


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
    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=50, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(shape).eval().requires_grad_(False)
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
