"""A model stays in its files until it is placed, and each rank reads what it keeps."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from engine import starter
from engine.config.sections.launch import LaunchConfig
from engine.train.distributed.ranks import RankGroup
from engine.train.distributed.sharding import place_model
from engine.train.distributed.stored_tensor import file_digest, stored_tensors
from engine.train.models.pretrained import load_lm
from engine.train.models.read_pretrained import read_pretrained
from engine.train.models.stored_weights import empty_model
from tests.train.adapters import write_adapters
from tests.train.ranks.launch import run_ranks

SINGLE_RANK = RankGroup(LaunchConfig(device="cpu"))
SCRIPT = Path(__file__).parent / "ranks" / "loading.py"
NOISE = 8_000_000
"""Bytes by which the resident memory of a process varies, and the buffers of reading."""
SHAPE = {
    "vocab_size": 4000,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
}
LOADS = (
    "every-rank",
    "bfloat16",
    "rank-0",
    "adapters",
    "adapters-bfloat16",
    "adapters-rank-0",
)
FROZEN = ("frozen", "frozen-adapters-bfloat16")


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def loads(request, tmp_path_factory):
    """What each rank reports of each load, and the bytes of one layer in float32."""
    folder = tmp_path_factory.mktemp("model")
    lm = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True))
    layer = 4 * sum(p.numel() for p in lm.model.layers[0].parameters())
    lm.to(torch.bfloat16).save_pretrained(folder, max_shard_size="20MB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    adapters, results = (tmp_path_factory.mktemp(name) for name in ("adapters", "results"))
    write_adapters(folder, adapters, tokenizer=False, target_modules="all-linear")
    done = run_ranks(request.param, SCRIPT, folder, adapters, results, folder=results)
    assert done.code == 0, done.output
    found = {
        n: [json.loads((results / f"{n}-{r}.json").read_text()) for r in range(request.param)]
        for n in LOADS + FROZEN
    }
    return found, layer


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADS)
def test_a_rank_holds_its_weights_and_at_most_one_layer_more(loads, name):
    found, layer = loads
    for rank in found[name]:
        assert rank["share"] > 2 * layer
        assert rank["growth"] < rank["share"] + layer + NOISE, found[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", FROZEN)
def test_a_frozen_model_that_is_mapped_from_a_file_is_not_held_in_memory_to_get_there(loads, name):
    found, layer = loads
    for rank in found[name]:
        assert rank["share"] > 2 * layer
        assert rank["growth"] < layer + NOISE, found[name]


@pytest.mark.parametrize("name", LOADS + FROZEN)
def test_weights_and_buffers_are_those_that_transformers_loads_and_peft_merges(loads, name):
    found, _ = loads
    assert found[name][0]["different"] == []


def test_rows_are_read_and_converted_as_by_safetensors(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {
        "a": torch.randn(7, 3, 2),
        "b": torch.randn(600_001, dtype=torch.float64).to(torch.bfloat16),  # longer than one piece
        "c": torch.tensor(3.5),
        "d": torch.empty(0, 4),
    }
    save_file(tensors, path)
    stored = stored_tensors(path)
    for name, tensor in load_file(path).items():
        assert torch.equal(stored[name].read(), tensor)
        assert torch.equal(stored[name].read(dtype=torch.float32), tensor.float())
    assert torch.equal(stored["a"].read(2, 3, torch.bfloat16), tensors["a"][2:5].bfloat16())


def test_a_cut_file_is_no_model_and_has_another_digest(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1000)}, path)
    whole = file_digest(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="damaged"):
        stored_tensors(path)
    assert file_digest(path) != whole
    assert file_digest(tmp_path / "missing") == ""


@pytest.mark.parametrize("kind", [AutoModelForCausalLM, AutoModel])
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen2"])
def test_names_and_buffers_of_other_families_are_found(tmp_path, family, kind):
    sizes = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 40,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
    }  # fmt: skip
    config = AutoConfig.for_model(family, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    wanted = kind.from_pretrained(tmp_path, dtype=torch.bfloat16)
    found = empty_model(kind, str(tmp_path), "model.policy", torch.bfloat16)
    assert found is not None
    model, stored = found
    assert stored.tensors.keys() == {n for n, _ in wanted.named_parameters()}
    for name, parameter in wanted.named_parameters():
        assert torch.equal(stored.tensors[name].read(dtype=torch.bfloat16), parameter)
    buffers = dict(wanted.named_buffers())
    assert dict(model.named_buffers()).keys() == buffers.keys()
    for name, buffer in model.named_buffers():
        assert buffer.dtype == buffers[name].dtype
        assert torch.equal(buffer, buffers[name])


def test_a_model_whose_constants_depend_on_the_dtype_it_is_built_in_is_left_to_transformers(
    tmp_path,
):
    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40, "rotary_dim": 4}
    config = AutoConfig.for_model("gptj", **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    kind = AutoModelForCausalLM
    assert empty_model(kind, str(tmp_path), "model.policy", torch.float32) is not None
    assert empty_model(kind, str(tmp_path), "model.policy", torch.bfloat16) is None


@pytest.mark.parametrize("kind", [AutoModelForCausalLM, AutoModel])
@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_each_rank_can_merge_plain_adapters_into_its_rows(tmp_path, family, kind):
    sizes = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 40,
        "num_attention_heads": 2, "num_key_value_heads": 2,
    }  # fmt: skip
    base, first, second = (tmp_path / name for name in ("base", "first", "second"))
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).save_pretrained(base)
    lora = {"target_modules": "all-linear", "tokenizer": False}
    write_adapters(base, first, **lora, alpha_pattern={"c_fc": 5, "q_proj": 5})
    write_adapters(base, second, **lora, use_rslora=True, named=first, seed=1)
    for source in (first, second):
        merged = read_pretrained(kind, str(source), "model.policy", dtype=torch.bfloat16)
        model, stored = empty_model(kind, str(source), "model.policy", torch.bfloat16)
        wanted = dict(merged.named_parameters())
        assert stored.tensors.keys() == wanted.keys() == dict(model.named_parameters()).keys()
        for name, tensor in stored.tensors.items():
            assert torch.equal(tensor.read(dtype=torch.bfloat16), wanted[name]), name
            rows = tensor.read(1, 2, torch.bfloat16)
            assert torch.equal(rows, wanted[name][1:3]), name
        assert all(p.requires_grad for p in model.parameters())


OTHERS = {
    "with magnitudes": {"use_dora": True},
    "with a whole module": {"modules_to_save": ["norm"]},
    "on other weights": {"init_lora_weights": "olora"},
}


@pytest.mark.parametrize("lora", OTHERS.values(), ids=OTHERS.keys())
def test_other_adapters_are_left_to_peft(half_policy, tmp_path, lora):
    write_adapters(half_policy, tmp_path / "sft", tokenizer=False, **lora)
    found = empty_model(AutoModelForCausalLM, str(tmp_path / "sft"), "model.policy", torch.float32)
    assert found is None


def test_a_model_whose_weights_are_converted_or_missing_is_left_to_transformers(tmp_path):
    experts = AutoConfig.for_model(
        "mixtral", hidden_size=16, intermediate_size=16, num_hidden_layers=1, vocab_size=40,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(experts).save_pretrained(tmp_path / "experts")
    source = str(tmp_path / "experts")
    assert empty_model(AutoModelForCausalLM, source, "model.policy", torch.float32) is None
    policy = starter.resolve("starter:policy")
    kind = AutoModelForSequenceClassification  # has a head that the policy's files do not hold
    assert empty_model(kind, policy, "reward.model", torch.float32) is None


def test_a_model_that_computes_constants_from_its_weights_is_left_to_transformers(tmp_path):
    config = AutoConfig.for_model(
        "ibert", hidden_size=16, intermediate_size=16, num_hidden_layers=1, vocab_size=40,
        num_attention_heads=2, num_labels=1,
    )  # fmt: skip
    kind = AutoModelForSequenceClassification
    kind.from_config(config).save_pretrained(tmp_path)
    assert empty_model(kind, str(tmp_path), "reward.model", torch.float32) is None


class WithWeightOfItsOwn(AutoModelForCausalLM):
    """Builds a model of which one weight does not go to `meta`."""

    @classmethod
    def from_config(cls, *args, **options):
        model = super().from_config(*args, **options)
        torch.utils.swap_tensors(model.model.norm.weight, nn.Parameter(torch.ones(256)))
        return model


def test_a_model_that_holds_a_weight_although_it_was_built_without_is_left_to_transformers():
    source = starter.resolve("starter:policy")
    assert empty_model(AutoModelForCausalLM, source, "model.policy", torch.float32) is not None
    assert empty_model(WithWeightOfItsOwn, source, "model.policy", torch.float32) is None


@pytest.mark.parametrize("replaced", ["model.safetensors", "adapter_model.safetensors"])
def test_a_file_that_changes_before_it_is_read_is_not_mixed_with_what_it_was(
    half_policy, tmp_path, replaced
):
    base, source = tmp_path / "base", tmp_path / "sft"
    shutil.copytree(half_policy, base)
    write_adapters(base, source, tokenizer=False)
    lm = load_lm(str(source), "model.policy", SINGLE_RANK)
    (path,) = tmp_path.rglob(replaced)
    other = {name: tensor + 1 for name, tensor in load_file(path).items()}
    save_file(other, tmp_path / "new", metadata={"format": "pt"})
    (tmp_path / "new").replace(path)
    with pytest.raises(OSError, match=f"{replaced} was changed while the model was read"):
        place_model(lm, SINGLE_RANK, "ddp")
