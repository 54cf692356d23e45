"""QLoRA: adapters over frozen weights in 4 bits."""

import importlib.util
import sys

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from engine.config.sections.model import LoRAConfig
from engine.errors import UserInputError
from engine.protocol.rank_messages import Begin
from engine.train.checkpoints.merge import merge
from engine.train.checkpoints.shards import read_unsharded
from engine.train.load import load_run
from engine.train.models.adapters.quantised_linear import QuantisedLinear, dequantise, quantise
from engine.train.models.language_model import (
    AdapterFreePolicy,
    LanguageModel,
    fingerprint,
    parameter_count,
)
from engine.train.models.pretrained import load_lm
from engine.train.step import train_step
from tests.train.checkpoints import save_checkpoint
from tests.train.loaded import SINGLE_RANK, loaded_lm

NF4 = LoRAConfig(rank=4, quantise="nf4")
KEYS = ("lora.rank=4", "lora.quantise=nf4", "train.learning_rate=1e-3")

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def packed_layers(module):
    return {n: m for n, m in module.named_modules() if isinstance(m, QuantisedLinear)}


@torch.no_grad()
def logits(model):
    tokens = torch.arange(5, 23).view(2, 9)
    return model(tokens, torch.ones_like(tokens), 9, want="logits")[0]


def small_gpt2():
    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=50, n_embd=64, n_layer=2, n_head=2, n_positions=16)
    return GPT2LMHeadModel(shape).eval()


@pytest.fixture
def trained(make_run):
    """A run after its first step, its session, the step's metrics and the first weights."""
    run, session = make_run(*KEYS, "ppo.epochs=1", "ppo.minibatches=1", "model.value=separate")
    before = {k: v.detach().clone() for k, v in run.policy.state_dict().items()}
    metrics, _ = train_step(run, 1)
    run.state.step = 1
    return run, session, metrics, before


@needs_bitsandbytes
def test_a_run_starts_at_its_reference_and_trains_its_adapters_alone(trained):
    run, _, first, before = trained
    assert first["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert first["val/ratio"] == pytest.approx(1, abs=1e-4)
    metrics, _ = train_step(run, 2)
    assert metrics["objective/kl"] != pytest.approx(0, abs=1e-4)
    after = run.policy.state_dict()
    changed = {k for k, v in after.items() if not torch.equal(v, before[k])}
    assert changed <= {k for k, v in run.policy.named_parameters() if v.requires_grad}
    assert {k for k in after if k.startswith("lm.") and ".lora_" in k} <= changed


@needs_bitsandbytes
def test_the_linear_layers_of_policy_and_value_trunk_take_half_a_byte_a_weight(trained):
    run, *_ = trained
    assert isinstance(run.reference, AdapterFreePolicy)
    layers = packed_layers(run.policy)
    linear = [m for m in run.policy.modules() if type(m) is nn.Linear and m.weight.dim() == 2]
    assert len(layers) == 2 * 7 * run.policy.lm.config.num_hidden_layers
    assert all(m.weight.requires_grad for m in linear if m is not run.policy.lm.lm_head)
    size = sum(m.packed.nbytes + m.scales.nbytes for m in layers.values())
    assert size == 0.5625 * sum(m.in_features * m.out_features for m in layers.values())


@needs_bitsandbytes
def test_the_next_step_of_a_resumed_run_is_bitwise_equal(trained, assert_same_step):
    run, session, *_ = trained
    folder = save_checkpoint(run, session)
    names = {f.name for f in (folder / "policy").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    saved = read_unsharded(folder / "training")
    assert saved and not any("packed" in name for name in saved), "the frozen weights are saved"
    again = load_run(session, session.config(), Begin(attempt=2, from_step=1), SINGLE_RANK)
    assert_same_step(run, again, 2)


@needs_bitsandbytes
def test_a_merged_policy_has_the_logits_of_the_policy_that_was_trained(trained, tmp_path):
    run, session, *_ = trained
    save_checkpoint(run, session)
    merge(session, 1, "policy", tmp_path / "merged")
    lm = loaded_lm(tmp_path / "merged")
    assert not packed_layers(lm)
    assert (logits(LanguageModel(lm)) - logits(run.policy)).abs().max() < 5e-5


@needs_bitsandbytes
def test_a_packed_layer_has_the_result_and_the_gradient_of_its_unpacked_weight():
    lm = small_gpt2()
    plain = logits(LanguageModel(lm))
    quantise(lm, NF4)
    assert len(packed_layers(lm)) == 8
    x = torch.randn(3, 64, requires_grad=True)
    layer = lm.transformer.h[0].mlp.c_fc
    ours = layer(x)
    (gradient,) = torch.autograd.grad(ours.square().sum(), x)
    theirs = nn.functional.linear(x, layer.weight(), layer.bias)
    assert torch.equal(ours, theirs)
    (wanted,) = torch.autograd.grad(theirs.square().sum(), x)
    assert torch.allclose(gradient, wanted, rtol=1e-5, atol=1e-6)
    packed = logits(LanguageModel(lm))
    assert 0 < (packed - plain).abs().max() < 0.1 * plain.abs().max()
    dequantise(lm)
    assert not packed_layers(lm)
    assert torch.allclose(logits(LanguageModel(lm)), packed, atol=1e-5)


@needs_bitsandbytes
def test_another_rank_gets_the_shapes_of_the_packed_weights_on_the_meta_device():
    here, there = small_gpt2(), small_gpt2().to("meta")
    quantise(here, NF4)
    quantise(there, NF4)
    shapes = [{k: (v.shape, v.dtype) for k, v in lm.state_dict().items()} for lm in (here, there)]
    assert shapes[0] == shapes[1]
    assert all(v.is_meta for k, v in there.state_dict().items() if "packed" in k)


@needs_bitsandbytes
def test_weights_are_packed_from_their_files_without_an_unpacked_model_in_memory(tmp_path):
    small_gpt2().save_pretrained(tmp_path)
    lm, whole = load_lm(str(tmp_path), "model.policy", SINGLE_RANK), loaded_lm(tmp_path)
    done = []
    for model in (lm, whole):
        quantise(model, NF4, lambda part: lambda *progress: done.append((part, *progress)))
    assert all(parameter.is_meta for parameter in lm.parameters())
    packed = {k: v for k, v in lm.state_dict().items() if "packed" in k or "scales" in k}
    assert len(packed) == 2 * 8
    assert done == 2 * [("pack weights", i, 8) for i in range(1, 9)]
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in packed.items())


@needs_bitsandbytes
def test_a_changed_packed_weight_changes_the_fingerprint():
    lm = small_gpt2()
    quantise(lm, NF4)
    first = fingerprint(LanguageModel(lm))
    lm.transformer.h[1].attn.c_attn.packed[5] ^= 1
    assert fingerprint(LanguageModel(lm)) != first


@needs_bitsandbytes
def test_a_model_has_as_many_weights_packed_as_before():
    lm = small_gpt2()
    plain = parameter_count(LanguageModel(lm))
    quantise(lm, NF4)
    assert parameter_count(LanguageModel(lm)) == plain


def test_without_bitsandbytes_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    with pytest.raises(UserInputError, match=r"^lora\.quantise: bits.* 'rlhf-tui\[qlora\]'\)$"):
        quantise(small_gpt2(), NF4)
