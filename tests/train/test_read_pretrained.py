"""Models and tokenizers that cannot be used: one sentence each, and nothing of theirs is run."""

import json
import pickle
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    dynamic_module_utils,
)

from engine import starter
from engine.config.sections.launch import LaunchConfig
from engine.errors import UserInputError
from engine.train.checkpoints.policy_folder import policy_files, policy_tensors, write_policy
from engine.train.distributed.ranks import RankGroup
from engine.train.models.language_model import LanguageModel
from engine.train.models.pretrained import load_lm, load_tokenizer
from engine.train.models.read_pretrained import ReadOptions, read_pretrained
from tests.train.architectures import write_model

RANKS = RankGroup(LaunchConfig(device="cpu"))


@pytest.fixture
def folder(tmp_path):
    """A copy of the starter policy, to break."""
    return Path(shutil.copytree(starter.resolve("starter:policy"), tmp_path / "policy"))


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def truncate(path):
    path.write_bytes(path.read_bytes()[:1000])


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def as_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(folder / "it-ran")))


def with_code(folder):
    (folder / "own.py").write_text(f"open({str(folder / 'it-ran')!r}, 'w')")
    change_config(folder, model_type="own", auto_map={"AutoConfig": "own.Config"})


def quantised(folder):
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def without(folder, name):
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


MODELS = {
    "a tensor is missing": (
        lambda f: without(f, "model.norm.weight"), r"has no weights for model\.norm\.weight"
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "weights|no model that can be"),
    "truncated weights": (lambda f: truncate(f / "model.safetensors"), "no model that can be"),
    "weights of garbage": (
        lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 99), "no model that can be"
    ),
    "a pickle": (as_pickle, r"pytorch_model\.bin, and a pickle can run code"),
    "code of its own": (with_code, "needs Python code of its own, which is never run unless you"),
    "a note of adapters": (
        lambda f: (f / "adapter_config.json").write_text("{}"), "no adapter_model.safetensors"
    ),
    "quantised weights": (quantised, "no model that can be loaded"),
    "a configuration of garbage": (
        lambda f: (f / "config.json").write_text("{"), "no model that can be loaded"
    ),
    "an unknown kind": (lambda f: change_config(f, model_type="x"), "no model that can be"),
    "numbers that do not fit": (lambda f: change_config(f, hidden_size="many"), "no model that"),
    "a negative size": (lambda f: change_config(f, hidden_size=-64), "no model that can be"),
    "weights whose header is a list": (
        lambda f: (f / "model.safetensors").write_bytes(b"\2" + bytes(7) + b"[]"), "no model that"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), MODELS.values(), ids=MODELS.keys())
def test_a_model_that_cannot_be_used_is_one_sentence(folder, damage, message):
    damage(folder)
    with pytest.raises(UserInputError, match=message) as caught:
        load_lm(str(folder), "model.policy", RANKS, torch.float32)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("model.policy: ")
    assert "weights_only" not in str(caught.value), "advice that would load a pickle"
    assert not (folder / "it-ran").exists()


TOKENIZERS = {
    "garbage": lambda f: (f / "tokenizer.json").write_text("[]"),
    "truncated": lambda f: truncate(f / "tokenizer.json"),
    "no model": lambda f: (f / "tokenizer.json").write_text('{"version": "1.0"}'),
    "code of its own": lambda f: (f / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Tokenizer", null]}}'
    ),
}


@pytest.mark.parametrize("damage", TOKENIZERS.values(), ids=TOKENIZERS.keys())
def test_a_tokenizer_that_cannot_be_used_is_one_sentence(folder, damage):
    damage(folder)
    try:
        load_tokenizer(str(folder), "model.policy", RANKS)
    except UserInputError as error:
        assert str(error).startswith("model.policy: ")
        assert "\n" not in str(error)


def test_a_folder_without_a_tokenizer_says_what_it_needs(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserInputError, match=r"holds no tokenizer\.json; save the model's"):
        load_tokenizer(str(folder), "model.policy", RANKS)


@pytest.mark.parametrize("kind", ["sdpa", "flash_attention_2"])
def test_attention_that_a_model_cannot_be_computed_with_is_not_its_folders_fault(tmp_path, kind):
    folder = write_model(tmp_path, "bloom")  # adds a bias to its scores
    read = ReadOptions(attn_implementation=kind)
    with pytest.raises(UserInputError, match=f"^model.attn_implementation: .* with {kind}, leave"):
        read_pretrained(AutoModelForCausalLM, str(folder), "model.policy", read=read)


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_attention_whose_package_is_missing_is_one_sentence(folder):
    read = ReadOptions(attn_implementation="flash_attention_2")
    with pytest.raises(UserInputError, match=r"^model\.attn_implementation: .*be installed"):
        load_lm(str(folder), "model.policy", RANKS, torch.float32, read)


@pytest.mark.parametrize("text", ["{", ""])
def test_a_damaged_generation_configuration_does_not_matter(folder, text):
    (folder / "generation_config.json").write_text(text)
    lm = load_lm(str(folder), "model.policy", RANKS)
    assert lm.generation_config.eos_token_id == lm.config.eos_token_id


def test_a_language_model_is_no_reward_model(folder):
    with pytest.raises(
        UserInputError, match=r"^reward\.model: .* has no weights for score\.weight"
    ):
        read_pretrained(AutoModelForSequenceClassification, str(folder), "reward.model")


OWN_CONFIG = """
from transformers import LlamaConfig
class Config(LlamaConfig):
    model_type = "own"
"""
OWN_MODEL = """
from transformers import LlamaForCausalLM
from .own_config import Config
class Model(LlamaForCausalLM):
    config_class = Config
"""


def test_trusted_code_is_run_and_a_checkpoint_of_its_model_brings_it_along(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    (folder / "own_config.py").write_text(OWN_CONFIG)
    (folder / "own_model.py").write_text(OWN_MODEL)
    code = {"AutoConfig": "own_config.Config", "AutoModelForCausalLM": "own_model.Model"}
    change_config(folder, model_type="own", auto_map=code)
    read, ours = ReadOptions(trust_remote_code=True), str(folder)
    lm = load_lm(ours, "model.policy", RANKS, torch.float32, read)
    assert type(lm).__name__ == "Model"
    policy, tokenizer = LanguageModel(lm), load_tokenizer(ours, "model.policy", RANKS, read)
    saved = tmp_path / "saved"
    write_policy(saved, policy, policy_tensors(policy), policy_files(policy, tokenizer))
    shutil.rmtree(folder)
    again = load_lm(str(saved), "model.policy", RANKS, torch.float32, read)
    assert type(again).__name__ == "Model"
    assert all(map(torch.equal, lm.state_dict().values(), again.state_dict().values()))


def test_a_gguf_file_that_cannot_be_read_is_one_sentence(folder):
    (folder / "x.gguf").write_bytes(b"GGUF, or not")
    read = ReadOptions(gguf_file="x.gguf")
    with pytest.raises(UserInputError, match=r"^model\.gguf_file(: x| needs the)") as caught:
        load_lm(str(folder), "model.policy", RANKS, torch.float32, read)
    assert "\n" not in str(caught.value)
