"""How long decoding takes on a GPU, against reading weights and cache once."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from benchmarks import machine
from benchmarks.engine_side import load, settings
from benchmarks.gpu.decoding import respond, without_graphs
from benchmarks.gpu.findings import Finding, Target
from benchmarks.task import TINY, Shape, Task
from engine.train.models.language_model import LanguageModel
from engine.train.rollout.native.compiled_layers import CompiledLayers
from engine.train.rollout.native.schedule import GRAPHED
from engine.train.run import Run

HALF = ["model.dtype=bfloat16", "reward.dtype=bfloat16"]
SHARE = 0.25
"""Of the bandwidth limit. For 0.5 B the quickest kernels known for the products take twice the
limit together (RESULTS.md)."""
LARGER = {
    "1.5 B": Shape(1536, 8960, 28, 12, 2, 151936),
    "7 B": Shape(3584, 18944, 28, 28, 4, 152064),
}
"""The shapes of Qwen2.5's."""
BYTES_PER_WEIGHT = 7
"""For decoding alone: float32, a bfloat16 copy, and some room for the cache."""


def parameters(task: Task) -> tuple[int, int]:
    """Weights of the layers, and of the output layer."""
    shape = task.shape
    head = shape.hidden // shape.heads
    attention = shape.hidden * head * (2 * shape.heads + 2 * shape.kv_heads)
    layer = attention + 3 * shape.hidden * shape.intermediate
    return shape.layers * layer, shape.vocabulary * shape.hidden


def bytes_per_token(task: Task) -> float:
    """Bytes read to decode one token of all responses: bfloat16 weights and a half-filled cache."""
    shape = task.shape
    length = task.prompt_tokens + task.new_tokens / 2
    head = shape.hidden // shape.heads
    cache = 2 * shape.layers * shape.kv_heads * head * task.prompts * length
    return 2 * (sum(parameters(task)) + cache)


def decoding(task: Task, target: Target) -> Iterator[Finding]:
    """Milliseconds per token of all responses, by kernels and settings."""
    yield _decoding(task, target, "torch", "never")
    if target.real:  # the compiler does not know a pretended GPU
        yield _decoding(task, target, "torch", "always")
        yield _decoding(task, target, "torch", "always", "model.float32_logits=true")
    if target.real and find_spec("liger_kernel") is not None:
        yield _decoding(task, target, "liger", "never")


def _decoding(task: Task, target: Target, kernels: str, compiled: str, *more: str) -> Finding:
    name = ", ".join(["decoding", f"kernels of {kernels}", f"compiled: {compiled}", *more])
    run = _load(task, target, name, f"model.kernels={kernels}", *more)
    return _measure(name, run, task, compiled, target)


def larger_models(task: Task, target: Target) -> Iterator[Finding]:
    """The same for larger policies; their weights are made on the GPU, and nothing is trained."""
    run = _load(task, target, "larger models")
    shapes = LARGER if target.real else {"tiny": TINY}
    for size, shape in shapes.items():
        larger = replace(task, shape=shape)
        needed = BYTES_PER_WEIGHT * sum(parameters(larger)) / 1e9
        free = torch.cuda.mem_get_info()[0] / 1e9 if target.real else needed
        if free < needed:
            yield Finding(f"decoding, {size}", True, f"not measured: {needed:.0f} GB are not free")
            continue
        del run.policy  # frees the memory of the last one
        run.policy = _policy(shape, target.device)
        compiled = "always" if target.real else "never"
        yield _measure(f"decoding, {size}, compiled: {compiled}", run, larger, compiled, target)


def _policy(shape: Shape, device: torch.device) -> LanguageModel:
    torch.manual_seed(0)
    with torch.device(device):
        lm = LlamaForCausalLM(shape.config())
    return LanguageModel(lm, "shared", torch.bfloat16).to(device).eval()


def _load(task: Task, target: Target, name: str, *keys: str) -> Run:
    sessions = Path(target.folder, name)
    sessions.mkdir()
    return load(target.folder, sessions, [*settings(task), *HALF, *keys])


def _measure(name: str, run: Run, task: Task, compiled: str, target: Target) -> Finding:
    layers = CompiledLayers(compiled)
    first = _seconds(run, task, layers)
    least = bytes_per_token(task) / machine.bandwidth_peak() / 1e9 if target.real else 0.0

    def milliseconds() -> float:
        times = [_seconds(run, task, layers) for _ in range(3 if target.real else 1)]
        return 1000 * statistics.median(times) / task.new_tokens

    with_graphs = milliseconds()
    with without_graphs():
        without = milliseconds()
    figures = {
        "ms": with_graphs, "ms_without_graphs": without, "ms_least": 1000 * least,
        "first_seconds": first, "compiled": float(layers.usable and compiled == "always"),
    }  # fmt: skip
    share = 1000 * least / with_graphs
    return Finding(
        name,
        share >= SHARE or not target.real or compiled == "never",
        f"{with_graphs:.2f} ms per token of {task.prompts} responses, {without:.2f} ms without "
        f"graphs; reading weights and cache once takes {1000 * least:.2f} ms, {share:.0%}; "
        f"the first batch took {first:.0f} s", figures,
    )  # fmt: skip


def _seconds(run: Run, task: Task, layers: CompiledLayers) -> float:
    began = time.perf_counter()
    respond(run, task.prompts, task.new_tokens, GRAPHED, never_end=True, compiled=layers)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
