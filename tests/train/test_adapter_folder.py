"""A model that is given as a folder of adapters is its base model with them merged."""

import importlib.util
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from engine.config.sections.launch import LaunchConfig
from engine.errors import CheckpointError, UserInputError
from engine.protocol.rank_messages import Begin
from engine.session.checkpoints import BASE_ADAPTERS
from engine.train.checkpoints.merge import merge
from engine.train.distributed.ranks import RankGroup
from engine.train.load import load_run
from engine.train.models.language_model import fingerprint
from engine.train.models.pretrained import load_tokenizer
from engine.train.models.read_pretrained import read_pretrained
from engine.train.reward_training.base import read_base
from engine.train.step import train_step
from tests.train.adapters import write_adapters
from tests.train.checkpoints import save_checkpoint
from tests.train.test_reward_training import request

RANKS = RankGroup(LaunchConfig(device="cpu"))
IDS = torch.arange(3, 15).view(2, 6)
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def sft(half_policy, tmp_path):
    """A folder of adapters for the half policy."""
    write_adapters(half_policy, tmp_path / "sft")
    return tmp_path / "sft"


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def read(source, kind=AutoModelForCausalLM, **options):
    return read_pretrained(kind, str(source), "model.policy", **options).eval()


def change(folder):
    """Changes one weight of the adapters."""
    tensors = load_file(folder / WEIGHTS)
    next(t for name, t in tensors.items() if "lora_B" in name)[0, 0] += 1e-3
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


KINDS = {
    "linear layers": {},
    "scaled by the root of the rank": {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "with magnitudes (DoRA)": {"use_dora": True},
    "whole modules": {"modules_to_save": ["norm"]},
    "some tokens": {"trainable_token_indices": [5, 7]},
}


@pytest.mark.parametrize("lora", KINDS.values(), ids=KINDS.keys())
def test_the_merged_model_computes_what_peft_computes(half_policy, tmp_path, lora):
    adapted = write_adapters(half_policy, tmp_path / "sft", **lora)
    merged = read(tmp_path / "sft")
    assert type(merged) is type(adapted.get_base_model())
    assert not any("lora" in name for name, _ in merged.named_modules())
    assert (logits(merged) - logits(adapted)).abs().max() < 1e-3
    with adapted.disable_adapter():
        assert (logits(merged) - logits(adapted)).abs().max() > 0.1


def test_transposed_layers_are_merged(tmp_path):
    shape = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32)
    GPT2LMHeadModel(shape).save_pretrained(tmp_path / "base")
    adapted = write_adapters(
        tmp_path / "base", tmp_path / "sft", tokenizer=False, target_modules=["c_attn", "c_proj"]
    )
    assert torch.allclose(logits(read(tmp_path / "sft")), logits(adapted), atol=1e-4)


def test_weights_are_merged_before_they_are_rounded(sft):
    exact, rounded = read(sft, dtype=torch.float32), read(sft, dtype=torch.bfloat16)
    for one, other in zip(exact.parameters(), rounded.parameters(), strict=True):
        assert torch.equal(one.bfloat16(), other)
    kept = zip(exact.buffers(), rounded.buffers(), strict=True)
    assert all(torch.equal(one, other) for one, other in kept), "rotary frequencies are rounded"


def test_the_number_of_threads_does_not_change_a_bit(sft):
    torch.set_num_threads(2)
    try:
        two = fingerprint(read(sft))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert two == fingerprint(read(sft))


def test_the_transformer_of_a_value_function_is_merged_too(sft):
    whole, trunk = read(sft), read(sft, AutoModel)
    assert type(trunk).__name__ == "LlamaModel"
    assert fingerprint(trunk) == fingerprint(whole.base_model)


def test_adapters_for_adapters_are_merged_in_turn(half_policy, sft, tmp_path):
    read(sft).save_pretrained(tmp_path / "whole")
    adapted = write_adapters(
        tmp_path / "whole", tmp_path / "second", named="sft", tokenizer=False, seed=1
    )
    assert (logits(read(tmp_path / "second")) - logits(adapted)).abs().max() < 1e-3


def test_a_tokenizer_comes_from_the_adapters_and_otherwise_from_the_base(half_policy, tmp_path):
    def edit(_model, tokenizer):
        tokenizer.chat_template = "{{ messages[0].content }}!"

    write_adapters(half_policy, tmp_path / "with", edit=edit)
    write_adapters(half_policy, tmp_path / "without", tokenizer=False)
    of_adapters = load_tokenizer(str(tmp_path / "with"), "model.policy", RANKS)
    of_base = load_tokenizer(str(tmp_path / "without"), "model.policy", RANKS)
    assert of_adapters.chat_template == "{{ messages[0].content }}!"
    base = AutoTokenizer.from_pretrained(half_policy)
    assert of_base.chat_template == base.chat_template
    assert type(of_adapters) is type(of_base) is type(base)
    assert of_adapters.get_vocab() == of_base.get_vocab() == base.get_vocab()


def test_added_tokens_get_their_trained_embeddings(half_policy, tmp_path):
    def edit(model, tokenizer):
        tokenizer.add_tokens(["<user>", "<bot>"])
        model.resize_token_embeddings(len(tokenizer))

    adapted = write_adapters(half_policy, tmp_path / "sft", edit=edit)
    merged = read(tmp_path / "sft")
    rows = len(adapted.get_input_embeddings().weight)
    assert merged.config.vocab_size == len(merged.get_input_embeddings().weight) == rows
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert (logits(merged) - logits(adapted)).abs().max() < 1e-3


def test_a_reward_model_gets_its_head_from_the_adapters(half_policy, tmp_path):
    adapted = write_adapters(
        half_policy, tmp_path / "reward", kind=AutoModelForSequenceClassification
    )
    adapted.config.pad_token_id = 0
    merged = read(tmp_path / "reward", AutoModelForSequenceClassification)
    merged.config.pad_token_id = 0
    assert merged.config.num_labels == 1
    assert torch.allclose(logits(merged), logits(adapted), atol=1e-3)


def of_another_shape(folder, _base):
    tensors = load_file(folder / WEIGHTS)
    save_file({k: t[:, :8].contiguous() for k, t in tensors.items()}, folder / WEIGHTS)


def of_fewer_layers(folder, _base):
    tensors = load_file(folder / WEIGHTS)
    kept = {k: t for k, t in tensors.items() if "layers.0" in k}
    save_file(kept, folder / WEIGHTS)


def of_more_layers(folder, _base):
    tensors = load_file(folder / WEIGHTS)
    more = {k.replace("layers.1", "layers.7"): t.clone() for k, t in tensors.items()}
    save_file(tensors | more, folder / WEIGHTS)


def without_a_number(folder, _base):
    tensors = load_file(folder / WEIGHTS)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, folder / WEIGHTS)


def as_pickle(folder, _base):
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))


def describe(folder, name="adapter_config.json", **values):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def with_embedding(folder, base):
    write_adapters(base, folder, target_modules=["embed_tokens", "q_proj"])


def with_own_embedding(folder, base):
    adapted = write_adapters(base, folder, modules_to_save=["embed_tokens"])
    with torch.no_grad():
        adapted.get_input_embeddings().weight.add_(1)
    adapted.save_pretrained(folder)


def as_prompt(folder, base):
    model = AutoModelForCausalLM.from_pretrained(base)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(model, config).save_pretrained(folder)


def as_classifier(folder, base):
    write_adapters(base, folder, kind=AutoModelForSequenceClassification)


UNUSABLE = {
    "another shape": (of_another_shape, "do not fit the model: size mismatch"),
    "fewer layers": (of_fewer_layers, r"do not fit the model, for example .*layers\.1"),
    "more layers": (of_more_layers, r"do not fit the model, for example .*layers\.7"),
    "a classifier's": (as_classifier, r"do not fit the model, for example .*score"),
    "NaN": (without_a_number, "cannot be merged: NaNs"),
    "a pickle": (as_pickle, "a pickle can run code"),
    "no weights": (lambda f, _b: (f / WEIGHTS).unlink(), f"holds no {WEIGHTS}"),
    "truncated weights": (
        lambda f, _b: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:999]), "header|truncat"
    ),
    "an unknown kind": (lambda f, _b: describe(f, peft_type="OTHER"), "cannot be merged: "),
    "biases without a place": (
        lambda f, b: write_adapters(b, f, lora_bias=True), "cannot be merged: "
    ),
    "a tied embedding": (with_embedding, "untie the two"),
    "an embedding that is no longer tied": (with_own_embedding, "into an untied model"),
    "prompts": (as_prompt, "cannot hold prompts"),
    "a configuration of garbage": (
        lambda f, _b: (f / "adapter_config.json").write_text("{"), "cannot be read"
    ),
    "a base with packed weights": (
        lambda _f, b: describe(b, "config.json", quantization_config={"quant_method": "gptq"}),
        "its weights are packed; name the model",
    ),
    "no base": (lambda f, _b: describe(f, base_model_name_or_path=None), "an unknown model"),
    "a base that is gone": (
        lambda f, _b: describe(f, base_model_name_or_path="../gone"),
        r"trained on \.\./gone, which is not a model folder here: write its path",
    ),
    "a base that cannot be read": (
        lambda _f, b: (b / "config.json").write_text("{"),
        r"in their adapter_config\.json says: the folder",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), UNUSABLE.values(), ids=UNUSABLE.keys())
def test_adapters_that_cannot_be_used_are_one_sentence(half_policy, tmp_path, damage, message):
    base = Path(shutil.copytree(half_policy, tmp_path / "base"))
    write_adapters(base, tmp_path / "sft")
    damage(tmp_path / "sft", base)
    with pytest.raises(UserInputError, match=message) as caught:
        read(tmp_path / "sft")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("model.policy: ")


def test_a_reward_model_without_a_head_is_refused(sft):
    with pytest.raises(UserInputError, match=r"has no weights for score\.weight"):
        read(sft, AutoModelForSequenceClassification)


@pytest.mark.parametrize("keys", [(), ("lora.rank=4",)], ids=["all weights", "new adapters"])
def test_a_run_starts_from_the_merged_model_which_is_its_reference(make_run, sft, keys):
    run, _ = make_run(f"model.policy={sft}", *keys)
    metrics, _ = train_step(run, 1)
    assert metrics["objective/kl"] == pytest.approx(0, abs=1e-4)
    merged = read(sft)
    ids = IDS.to(run.device)
    with torch.no_grad():
        reference = run.reference(ids, torch.ones_like(ids), 6, want="logits")[0]
    assert torch.allclose(reference, logits(merged), atol=1e-3)


PACKED = pytest.param(
    ("lora.rank=4", "lora.quantise=nf4"),
    marks=pytest.mark.skipif(
        importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
    ),
)


@pytest.mark.parametrize(
    "keys", [(), ("lora.rank=4",), PACKED], ids=["all weights", "new adapters", "packed weights"]
)
def test_a_run_goes_on_with_the_same_bits_and_notices_other_adapters(
    make_run, sft, keys, assert_same_step
):
    run, session = make_run(f"model.policy={sft}", *keys)
    train_step(run, 1)
    run.state.step = 1
    save_checkpoint(run, session)
    again = load_run(session, session.config(), Begin(attempt=2, from_step=1), RANKS)
    assert_same_step(run, again, 2)
    change(sft)
    with pytest.raises(CheckpointError, match=r"sft was changed; put it back to resume"):
        load_run(session, session.config(), Begin(attempt=2, from_step=1), RANKS)


@pytest.mark.parametrize("head", [False, True], ids=["of a policy", "of a classifier"])
def test_training_of_a_reward_model_can_start_from_adapters(half_policy, tmp_path, head):
    kind = AutoModelForSequenceClassification if head else AutoModelForCausalLM
    adapted = write_adapters(half_policy, tmp_path / "sft", kind=kind)
    base = read_base(request(base=str(tmp_path / "sft")), RANKS, print)
    assert base.new_head is not head
    trunk, trained = base.model.base_model, adapted.merge_and_unload().base_model
    assert fingerprint(trunk) == fingerprint(trained)


def test_new_adapters_are_exported_with_those_under_them(make_run, sft, half_policy, tmp_path):
    run, session = make_run(f"model.policy={sft}", "lora.rank=4", "train.learning_rate=1e-3")
    train_step(run, 1)
    run.state.step = 1
    saved = save_checkpoint(run, session)
    assert (saved / "policy" / BASE_ADAPTERS).read_bytes() == (
        sft / "adapter_config.json"
    ).read_bytes()
    merge(session, 1, "policy", tmp_path / "whole")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    trained = PeftModel.from_pretrained(read(sft), str(saved / "policy"))
    assert torch.allclose(logits(whole), logits(trained), atol=1e-3)
    base = AutoModelForCausalLM.from_pretrained(half_policy, dtype=torch.float32)
    assert (logits(whole) - logits(base)).abs().max() > 0.1
