"""Layers compiled for decoding: the same responses, one compilation, and a way back.

A backend that returns the captured graph as it is stands for inductor, whose code takes half a
minute to build; `benchmarks/gpu` runs the real one.
"""

import itertools

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from engine.config.sections.model import LoRAConfig
from engine.train.data.prompts import Prompt, batch_prompts
from engine.train.data.randomness import sampling_uniforms
from engine.train.models.adapters import dora, lora
from engine.train.models.language_model import LanguageModel
from engine.train.rollout.native import decoder
from engine.train.rollout.native.backend import generate
from engine.train.rollout.native.cast_weights import cast_weights
from engine.train.rollout.native.compiled_layers import CompiledLayers
from engine.train.rollout.native.cuda_graph import GraphedFunction
from engine.train.rollout.native.schedule import Schedule
from engine.train.rollout.request import RolloutRequest
from engine.train.rollout.stop_criteria import StopCriteria
from tests.train.architectures import ARCHITECTURES

VOCABULARY, LIMIT, ROWS = 64, 80, 20
FIXED = Schedule(8, fixed_shapes=True, read_step=16)


class Backend:
    """Runs captured graphs as they are, and counts them."""

    def __init__(self, change=0.0, error=None):
        self.graphs, self._change, self._error = 0, change, error

    def __call__(self, graph, _inputs):
        self.graphs += 1
        if self._error:
            raise self._error
        return lambda *inputs: tuple(
            x + self._change if x.is_floating_point() else x for x in graph(*inputs)
        )


class Failing:
    """Compiles, and fails when that is run."""

    def __init__(self, error, before=lambda: None):
        self._error, self._before = error, before

    def __call__(self, _graph, _inputs):
        return self._run

    def _run(self, *_inputs):
        self._before()
        raise self._error


@pytest.fixture
def policy():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    return lambda dtype: LanguageModel(
        AutoModelForCausalLM.from_config(config), "shared", dtype
    ).eval()


@pytest.fixture
def experts():
    """A mixture of experts that computes in bfloat16."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_moe", **(ARCHITECTURES["qwen3_moe"] | {"vocab_size": VOCABULARY, "eos_token_id": 3})
    )
    model = LanguageModel(AutoModelForCausalLM.from_config(config), compute=torch.bfloat16)
    model.cast_experts()
    return model.eval()


def respond(model, compiled, schedule=FIXED, limits=None):
    """Responses of at most LIMIT tokens; with `limits`, one of each length."""
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words)))
    rows = ROWS if limits is None else len(limits)
    prompts = [Prompt(ids=list(range(5, 6 + n % 7)), text="", row={}) for n in range(rows)]
    uniforms = sampling_uniforms(0, 1, rows, LIMIT)
    return generate(
        model, RolloutRequest(batch_prompts(prompts, 1, 0), uniforms, 1.0, limits=limits),
        StopCriteria([3, 4] if limits is None else [], [], tokenizer), tokenizer,
        schedule=schedule, compiled=compiled,
    )  # fmt: skip


def test_responses_are_the_same_and_all_layers_and_lengths_share_compilations(policy):
    model, backend = policy(torch.float32), Backend()
    compiled = CompiledLayers("always", backend=backend)
    plain = respond(model, None)
    for _ in range(2):
        other = respond(model, compiled)
        assert torch.equal(plain.ids, other.ids)
        torch.testing.assert_close(plain.logprobs, other.logprobs, rtol=0, atol=1e-5)
    # The number of slots is halved on the way, and three lengths of the cache are read.
    shapes = compiled.shapes_of(model)
    assert len({slots for slots, *_ in shapes}) == 2
    assert len({length for *_, length, _ in shapes}) == 3
    # The first compilation takes the slots for all rows of the cache, which ends when they are
    # halved. One more is of the sampling.
    assert backend.graphs == 3


def test_compiled_layers_with_dora_follow_the_weights(policy):
    lm = policy(torch.float32).lm
    lora.add_adapters(lm, LoRAConfig(rank=2, alpha=4, dora=True), seed=0, base="base")
    layers = lora.adapted_layers(lm)
    dora.initialise(layers)
    model, compiled = (
        LanguageModel(lm, "shared").eval(),
        CompiledLayers("always", backend=Backend()),
    )
    found = []
    for _ in range(2):
        with torch.no_grad():
            for layer in layers:
                layer.lora_B["default"].weight.add_(0.3)
        plain, other = respond(model, None), respond(model, compiled)
        assert compiled.shapes_of(model), "nothing was compiled"
        assert torch.equal(plain.ids, other.ids)
        torch.testing.assert_close(plain.logprobs, other.logprobs, rtol=0, atol=1e-5)
        found.append(plain.ids)
    assert not torch.equal(*found)


def test_a_short_cache_is_read_to_one_length(policy):
    model, compiled = policy(torch.float32), CompiledLayers("always", backend=Backend())
    respond(model, compiled, Schedule(8, fixed_shapes=True))
    assert len({length for *_, length, _ in compiled.shapes_of(model)}) == 1


@pytest.fixture
def late(monkeypatch):
    """The shapes in which something was compiled where a GPU captures a graph; and a backend."""
    found, backend = [], Backend()
    torch.compiler.reset()  # a function is only compiled some times

    class Uncaptured(GraphedFunction):
        """On a CPU nothing is captured: each call runs the function."""

        def __init__(self, function, *, usable, compiled):
            super().__init__(function, usable=usable, compiled=compiled)
            self.ran, self.shapes = False, compiled

        def __call__(self, key):
            known, before = self.ran and key in self.shapes, backend.graphs
            super().__call__(key)
            self.ran = True
            if known and backend.graphs > before:
                found.append(key)

    monkeypatch.setattr(decoder, "GraphedFunction", Uncaptured)
    return found, backend


def test_nothing_is_compiled_in_shapes_that_a_graph_captures(policy, late):
    """A compiler cannot run during the capture of a CUDA graph; that of a known shape is next."""
    found, backend = late
    compiled = CompiledLayers("always", backend=backend)
    for model, rows in itertools.product([policy(torch.float32), policy(torch.bfloat16)], (8, 16)):
        limits = torch.tensor([40] * 8 + [10] * (rows - 8))  # 16 are halved to the 8 of before
        respond(model, compiled, Schedule(8, fixed_shapes=True), limits)
    assert backend.graphs >= 5  # of each model for all rows and for fewer, and of the sampling
    assert found == []


def test_layers_of_one_input_are_one_product(policy):
    model, products = policy(torch.bfloat16), []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            products.append(function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm))
            return function(*args, **(kwargs or {}))

    attention, mlp = model.lm.model.layers[0].self_attn, model.lm.model.layers[0].mlp
    x, other = torch.randn(2, 5, 64, dtype=torch.bfloat16)
    with torch.no_grad(), model.autocast("cpu"):
        expected = [layer(x) for layer in (attention.q_proj, attention.k_proj, mlp.up_proj)]
        of_other = attention.k_proj(other)
        with cast_weights(list(model.lm.model.layers), torch.device("cpu")), Count():
            q, k, v = (layer(x) for layer in (attention.q_proj, attention.k_proj, attention.v_proj))
            gate, up = mlp.gate_proj(x), mlp.up_proj(x)
            assert sum(products) == 2
            # A layer that is called by itself, with another tensor, does not take what is there.
            found = attention.k_proj(other)
    torch.testing.assert_close([q, k, up, found], [*expected, of_other], rtol=0.02, atol=0.02)
    assert (v.shape, gate.shape) == (k.shape, up.shape)


def test_layers_with_products_in_common_share_a_compilation(policy):
    backend = Backend()
    compiled = CompiledLayers("always", backend=backend)
    respond(policy(torch.bfloat16), compiled)
    assert compiled.usable
    assert backend.graphs <= 3  # as in float32


@pytest.mark.slow
def test_layers_with_experts_share_a_compilation_in_bfloat16(experts):
    backend = Backend()
    compiled = CompiledLayers("always", backend=backend)
    respond(experts, compiled)
    assert compiled.usable
    assert backend.graphs <= 3


def test_experts_have_weights_in_bfloat16_while_layers_are_compiled(experts):
    before = dict(experts.named_parameters())
    layers = list(experts.lm.model.layers)
    with experts.autocast("cpu"), cast_weights(layers, torch.device("cpu")):
        assert {p.dtype for p in layers[0].mlp.experts.parameters()} == {torch.bfloat16}
    assert all(before[name] is p for name, p in experts.named_parameters())


def test_in_bfloat16_the_model_is_as_it_was_afterwards(policy):
    model = policy(torch.bfloat16)
    before = {name: (p, p.dtype) for name, p in model.named_parameters()}
    attention = model.lm.config._attn_implementation
    compiled = CompiledLayers("always", backend=Backend())
    rollout = respond(model, compiled)
    assert compiled.shapes_of(model)
    assert rollout.logprobs.isfinite().all()
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is p and p.dtype is dtype for name, (p, dtype) in before.items())
    assert model.lm.config._attn_implementation == attention
    assert not any("forward" in vars(layer) for layer in model.lm.model.layers)


@pytest.mark.parametrize(
    ("backend", "word"),
    [(Backend(error=RuntimeError("no compiler")), "no compiler"), (Backend(change=1), "off by")],
)
def test_layers_that_do_not_compile_or_compute_otherwise_are_used_as_they_are(
    policy, caplog, backend, word
):
    model, compiled = policy(torch.float32), CompiledLayers("always", backend=backend)
    plain = respond(model, None)
    other = respond(model, compiled)
    assert torch.equal(plain.ids, other.ids)
    torch.testing.assert_close(plain.logprobs, other.logprobs, rtol=0, atol=1e-5)
    told = [r for r in caplog.records if "without compiled layers" in r.getMessage()]
    assert len(told) == 1
    assert word in told[0].getMessage()


def test_memory_that_runs_out_in_a_compiled_layer_is_told_as_that(policy):
    """A step that runs out is repeated with less; layers that are not compiled need no less."""
    compiled = CompiledLayers("always", backend=Failing(torch.OutOfMemoryError("CUDA out of")))
    with pytest.raises(torch.OutOfMemoryError):
        respond(policy(torch.float32), compiled)
    assert compiled.usable


def test_an_error_during_a_capture_ends_the_capture(policy, monkeypatch):
    """What would run instead could be captured only in part."""

    def capturing():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    compiled = CompiledLayers("always", backend=Failing(ValueError("in a kernel"), capturing))
    with pytest.raises(ValueError, match="in a kernel"):
        respond(policy(torch.float32), compiled)
    assert compiled.usable
