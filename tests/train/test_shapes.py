"""Model shapes that are read from a configuration match the model built from it."""

import json
import weakref

import msgspec
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    MptConfig,
    Qwen2Config,
)

from engine import starter
from engine.config import file as config_file
from engine.config.sections.model import LoRAConfig
from engine.errors import UserInputError
from engine.memory.estimate import estimate, forward_activations, kept_for_backward
from engine.memory.model import Layout
from engine.protocol.rank_messages import Placed
from engine.train.models.adapters import dora, lora
from engine.train.models.memory_check import check_memory, facts
from engine.train.models.read_pretrained import ReadOptions
from engine.train.models.shapes import describe_models, models_of, shape_of

SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "vocab_size": 128}
GROUPED = SIZES | {"num_key_value_heads": 2, **SPECIAL}
CONFIGS = {
    "llama": LlamaConfig(num_hidden_layers=3, tie_word_embeddings=True, **GROUPED),
    "llama with an untied head": LlamaConfig(
        num_hidden_layers=3, tie_word_embeddings=False, **GROUPED
    ),
    "qwen2": Qwen2Config(num_hidden_layers=3, **GROUPED),
    "mistral with a window": MistralConfig(num_hidden_layers=3, sliding_window=32, **GROUPED),
    "gpt2": GPT2Config(n_embd=64, n_inner=160, n_layer=3, n_head=4, vocab_size=128, **SPECIAL),
}
UNFUSED = {
    "bloom": BloomConfig(n_layer=3, n_head=4, hidden_size=64, vocab_size=128, **SPECIAL),
    "gemma2": Gemma2Config(num_hidden_layers=3, head_dim=16, **GROUPED),
    "gptj": GPTJConfig(n_embd=64, n_layer=3, n_head=4, rotary_dim=8, vocab_size=128, **SPECIAL),
    "falcon": FalconConfig(num_hidden_layers=3, **SIZES, **SPECIAL),
    "falcon with ALiBi": FalconConfig(num_hidden_layers=3, alibi=True, **SIZES, **SPECIAL),
    "falcon with ALiBi and a key for each head": FalconConfig(
        num_hidden_layers=3, alibi=True, multi_query=False, **SIZES, **SPECIAL
    ),
    "mpt": MptConfig(
        d_model=64, n_layers=3, n_heads=4, expansion_ratio=3, vocab_size=128, max_seq_len=1024,
        **SPECIAL,
    ),
    "llama4": Llama4TextConfig(
        num_hidden_layers=4, head_dim=16, intermediate_size_mlp=160, num_local_experts=2,
        attention_chunk_size=32, **GROUPED,
    ),
}  # fmt: skip
"""Models with tensors of length × length although nothing is padded."""
GPT_OSS = GptOssConfig(
    num_hidden_layers=3, head_dim=16, num_local_experts=2, num_experts_per_tok=1, **GROUPED
)
every_model = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def shape_from(config, folder, kind=AutoModelForCausalLM):
    config.save_pretrained(folder)
    return shape_of(str(folder), "model.policy", kind)


@every_model
@pytest.mark.parametrize(
    "kind", [AutoModelForCausalLM, AutoModelForSequenceClassification], ids=["lm", "classifier"]
)
def test_parameters_are_counted_without_weights(config, kind, tmp_path):
    shape = shape_from(config, tmp_path, kind)
    assert not list(tmp_path.glob("*.safetensors"))
    real = kind.from_config(config)
    assert shape.parameters == sum(p.numel() for p in real.parameters())
    per_layer = sum(p.numel() for n, p in real.named_parameters() if ".0." in n)
    assert shape.largest_layer == per_layer


def test_only_an_untied_head_is_counted(tmp_path):
    tied = shape_from(CONFIGS["llama"], tmp_path / "a")
    untied = shape_from(CONFIGS["llama with an untied head"], tmp_path / "b")
    assert (tied.head, untied.head) == (0, 64 * 128)
    assert untied.parameters == tied.parameters + untied.head


@every_model
@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_have_the_size_that_peft_gives_them(config, use_dora, tmp_path):
    shape = shape_from(config, tmp_path)
    for targets in (sorted(shape.linear), sorted(shape.linear)[:1]):
        settings = LoraConfig(
            r=4,
            target_modules=targets,
            fan_in_fan_out=config.model_type == "gpt2",
            use_dora=use_dora,
        )
        adapted = get_peft_model(AutoModelForCausalLM.from_config(config), settings)
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        of_lengths = use_dora * sum(shape.outputs[t] for t in targets)
        assert trained == 4 * sum(shape.linear[t] for t in targets) + of_lengths


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_dora_keeps_the_outputs_of_the_adapted_layers(dtype, width, tmp_path):
    model, rows, length = CONFIGS["llama"], 4, 48
    outputs = sum(shape_from(model, tmp_path).outputs.values())
    plain, scaled = (
        autograd_keeps(model, dtype, rows, length, LoRAConfig(rank=4, alpha=8, dora=scales))
        for scales in (False, True)
    )
    assert scaled - plain == pytest.approx(rows * length * width * outputs, rel=0.05)


def test_what_dora_keeps_is_in_the_estimate():
    sizes = models_of(config_file.load(starter.FOLDER / "demo.yaml"), 20, torch.device("cpu"))
    found = []
    for keys in (["lora={rank: 4}"], ["lora={rank: 4, dora: true}"]):
        config = config_file.load(starter.FOLDER / "demo.yaml", keys)
        found.append(estimate(config, sizes, Layout(lora_rank=4)).phases["optimise"])
    outputs = sum(sizes.policy.outputs.values())
    tokens = config.ppo.micro_batch_size * (20 + config.rollout.max_new_tokens - 1)
    assert found[1]["activations"] - found[0]["activations"] == tokens * 4 * outputs
    assert found[1]["optimiser"] - found[0]["optimiser"] == 8 * outputs


@every_model
@pytest.mark.parametrize(("dtype", "off"), [("float32", 0.1), ("bfloat16", 0.25)])
def test_the_activation_formula_matches_what_autograd_saves(config, dtype, off, tmp_path):
    rows, length = 4, 48
    shape = shape_from(config, tmp_path)
    kept = autograd_keeps(config, dtype, rows, length)
    width = 4 if dtype == "float32" else 2
    # Of the model as it is: hooks around those of recomputed products would not see them.
    shape = msgspec.structs.replace(shape, recomputes_products=False)
    formula = kept_for_backward(shape, rows, length, width, checkpointing=False)
    if dtype == "bfloat16":  # the formula leaves out autocast's copies of the weights
        formula += width * (shape.layers * shape.largest_layer + shape.hidden * shape.vocabulary)
    assert formula == pytest.approx(kept, rel=off)


def of_length_squared(bytes_at):
    """The coefficient of L² in a quadratic function of the length."""
    step = 64
    one, two, three = (bytes_at(n * step) for n in (1, 2, 3))
    return (three - 2 * two + one) / (2 * step**2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", UNFUSED)
def test_tensors_of_length_times_length_are_counted_as_autograd_saves_them(kind, dtype, tmp_path):
    config, width = UNFUSED[kind], 4 if dtype == "float32" else 2
    shape = shape_from(config, tmp_path)
    kept = of_length_squared(lambda length: autograd_keeps(config, dtype, 2, length))
    formula = of_length_squared(
        lambda length: kept_for_backward(shape, 2, length, width, checkpointing=False)
    )
    # Llama 4 has chunks in three of four layers; a Falcon without a kernel keeps no bfloat16 copy.
    assert kept * 0.95 <= formula <= kept * 2.3


class PeakMemory(TorchDispatchMode):
    """The most bytes of tensors at one time that operations have made."""

    def __init__(self):
        super().__init__()
        self.peak = 0
        self._alive = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._alive[storage.data_ptr()] = storage.nbytes()
                weakref.finalize(storage, self._alive.pop, storage.data_ptr(), None)
        self.peak = max(self.peak, sum(self._alive.values()))
        return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [k for k in [*UNFUSED, "gpt-oss"] if k != "llama4"])
def test_scores_of_a_forward_pass_are_counted_where_no_kernel_is_fused(kind, dtype, tmp_path):
    config, width = (UNFUSED | {"gpt-oss": GPT_OSS})[kind], 4 if dtype == "float32" else 2
    shape = shape_from(config, tmp_path)
    if kind == "falcon" and not shape.score_heads:
        pytest.skip("torch 2.15 has a kernel for one key")
    peak = of_length_squared(lambda length: forward_peak(config, dtype, 2, length))
    formula = of_length_squared(
        lambda length: forward_activations(shape, 2, length, width, masked=shape.needs_mask(length))
    )
    assert peak * 0.95 <= formula <= peak * 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [k for k in UNFUSED if k.startswith("falcon")])
def test_scores_of_a_falcon_with_eager_attention_are_counted(kind, dtype, tmp_path):
    config, width = UNFUSED[kind], 4 if dtype == "float32" else 2
    config.save_pretrained(tmp_path)
    read = ReadOptions(attn_implementation="eager")
    shape = shape_of(str(tmp_path), "model.policy", AutoModelForCausalLM, read)
    peak = of_length_squared(lambda length: forward_peak(config, dtype, 2, length, "eager"))
    formula = of_length_squared(
        lambda length: forward_activations(shape, 2, length, width, masked=True)
    )
    assert peak * 0.95 <= formula <= peak * 1.2


@pytest.mark.parametrize(("version", "on_cpu", "counted"), [
    ((2, 14), True, 4), ((2, 15), True, 0), ((2, 15), False, 4),
])  # fmt: skip
def test_one_key_for_all_heads_has_a_kernel_on_a_cpu_since_torch_2_15(
    version, on_cpu, counted, tmp_path, monkeypatch
):
    monkeypatch.setattr("engine.train.models.shapes.torch_version", lambda: version)
    UNFUSED["falcon"].save_pretrained(tmp_path)
    shape = shape_of(str(tmp_path), "model.policy", AutoModelForCausalLM, on_cpu=on_cpu)
    assert shape.score_heads == counted


def test_shapes_are_those_of_the_device_that_is_planned_for(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.train.models.shapes.torch_version", lambda: (2, 15))
    UNFUSED["falcon"].save_pretrained(tmp_path / "reference")
    demo = starter.FOLDER / "demo.yaml"
    config = config_file.load(demo, [f"model.reference={tmp_path / 'reference'}"])
    for device, counted in (("cpu", 0), ("cuda", 4)):
        found = describe_models(config, torch.device(device))
        assert (found.device, found.reference.score_heads) == (device, counted)


def test_padding_is_ignored_by_classifiers_on_decoders(tmp_path):
    encoder = BertConfig(num_hidden_layers=3, **SIZES, pad_token_id=0)
    ignores = [
        shape_from(c, tmp_path / c.model_type, AutoModelForSequenceClassification).ignores_padding
        for c in (CONFIGS["llama"], encoder)
    ]
    assert ignores == [True, False]


def test_eager_attention_is_counted_if_it_is_configured(tmp_path):
    shape_from(CONFIGS["llama"], tmp_path)
    name, kind = str(tmp_path), AutoModelForCausalLM
    eager = shape_of(name, "model.policy", kind, ReadOptions(attn_implementation="eager"))
    fused = shape_of(name, "model.policy", kind)
    assert (eager.score_heads, fused.score_heads) == (4, 0)


def forward_peak(config, dtype, rows, length, attention=None):
    """The most bytes of tensors at one time in a forward pass without gradients."""
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=attention
    ).eval()
    ids = torch.ones(rows, length, dtype=torch.int64)
    half = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    with torch.no_grad(), half, PeakMemory() as memory:
        model(input_ids=ids, logits_to_keep=1, use_cache=False)
    return memory.peak


def autograd_keeps(config, dtype, rows, length, adapters=None):
    """Bytes that a forward pass saves for its backward pass, without parameters."""
    frozen = torch.bfloat16 if adapters and dtype == "bfloat16" else torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=frozen).eval()
    if adapters:
        lora.add_adapters(model, adapters, seed=0, base="base")
        dora.initialise(lora.adapted_layers(model))
        dora.update_norms(lora.adapted_layers(model))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage
        return tensor

    ids = torch.ones(rows, length, dtype=torch.int64)
    mask = torch.ones(rows, length, dtype=torch.int64)  # padding at the end needs no mask
    half = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), half:
        model(input_ids=ids, attention_mask=mask, logits_to_keep=1, use_cache=False)
    return sum(s.nbytes() for pointer, s in found.items() if pointer not in weights)


def test_a_missing_model_is_an_error_on_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-thing"}))
    for name in (str(tmp_path), str(tmp_path / "nowhere")):
        with pytest.raises(UserInputError, match=r"model\.policy") as error:
            shape_of(name, "model.policy", AutoModelForCausalLM)
        assert "\n" not in str(error.value)


def test_the_longest_prompt_is_exact_for_a_small_file(write_prompts, monkeypatch):
    demo = starter.FOLDER / "demo.yaml"
    text = "".join(json.dumps({"prompt": "so it was " * n}) + "\n" for n in (1, 3))
    config = config_file.load(demo, [f"data.prompts={write_prompts('p.jsonl', text)}"])
    found = describe_models(config)
    assert found.exact_prompts
    assert 9 <= found.prompt_tokens < config.data.max_prompt_tokens
    monkeypatch.setattr("engine.train.models.shapes.MAX_PROMPT_FILE", 1)
    bound = describe_models(config)
    assert (bound.exact_prompts, bound.prompt_tokens) == (False, config.data.max_prompt_tokens)


def test_a_run_has_the_memory_estimate_of_its_layout(make_run):
    run, _ = make_run()
    again = estimate(run.config, models_of(run.config, run.prompts.longest, run.device), Layout())
    assert run.memory.layout == again.layout
    assert run.memory.phases["optimise"]["gradients"] == again.phases["optimise"]["gradients"]


def test_a_model_that_cannot_be_estimated_does_not_end_the_run(make_run, monkeypatch, caplog):
    def unknown(*_arguments, **_options):
        raise UserInputError("model.policy: cannot plan with this")

    monkeypatch.setattr("engine.train.models.memory_check.models_of", unknown)
    run, _ = make_run()
    assert run.memory is None
    assert facts(run.memory) == {}
    assert "cannot plan with this" in caplog.text


class TwoRanks:
    """Rank 0 of a group of two, on the CPU; the other one has some memory, or as much."""

    size, is_lead, device = 2, True, torch.device("cpu")

    def __init__(self, other=None):
        self.other = other

    @staticmethod
    def broadcast(make, _kind):
        return make()

    def all_gather_bytes(self, data):
        return [data, data if self.other is None else str(self.other).encode()]


@pytest.mark.parametrize(
    ("placed", "strategy"),
    [
        (None, "ddp"),
        (Placed(ranks=2, strategy="fsdp"), "fsdp"),
        (Placed(ranks=3, strategy="fsdp"), "ddp"),
    ],
    ids=["first start", "as before", "other number of ranks"],
)
def test_the_chosen_strategy_is_kept_for_as_many_ranks(placed, strategy):
    config = config_file.load(starter.FOLDER / "demo.yaml", ["launch.device=cpu"])
    assert check_memory(config, 8, TwoRanks(), pytest.fail, placed)[0] == strategy


def test_the_rank_with_the_least_memory_decides():
    config = config_file.load(starter.FOLDER / "demo.yaml", ["launch.device=cpu"])
    warnings = []
    assert check_memory(config, 8, TwoRanks(other=1_000_000), warnings.append)[0] == "fsdp"
    (text,) = warnings
    assert "0.00 GB are free" in text
