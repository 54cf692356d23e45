"""Parts of the GPU check about generation: graphs, slots and refills give the same tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from benchmarks.gpu.findings import Finding, Target, below
from benchmarks.gpu.numerics import score, starter_run
from engine.train.data.prompts import batch_prompts
from engine.train.data.randomness import sampling_uniforms
from engine.train.models.pretrained import eos_ids
from engine.train.rollout.native import decoder
from engine.train.rollout.native.backend import generate
from engine.train.rollout.native.compiled_layers import CompiledLayers
from engine.train.rollout.native.schedule import EXACT, GRAPHED, Schedule
from engine.train.rollout.request import RolloutRequest
from engine.train.rollout.rollout import Rollout
from engine.train.rollout.stop_criteria import StopCriteria
from engine.train.run import Run


@contextmanager
def without_graphs() -> Iterator[None]:
    """Context in which no CUDA graph is captured."""
    with mock.patch.object(decoder, "can_capture", lambda *_: False):
        yield


def respond(
    run: Run,
    rows: int,
    tokens: int,
    schedule: Schedule,
    *,
    at_once: int | None = None,
    never_end: bool = False,
    compiled: CompiledLayers | None = None,
) -> Rollout:
    """Responses to the first prompts of a run, from the same uniform numbers in every call."""
    prompts = run.prompts.for_step(1)
    batch = batch_prompts((prompts * rows)[:rows], 1, 0)
    uniforms = sampling_uniforms(0, 1, rows, tokens)
    ends = StopCriteria(
        [] if never_end else eos_ids(run.policy.lm, run.tokenizer), [], run.tokenizer
    )
    return generate(
        run.policy, RolloutRequest(batch, uniforms, 1.0), ends, run.tokenizer,
        schedule=schedule, at_once=at_once, compiled=compiled,
    )  # fmt: skip


def same_tokens(target: Target) -> Iterator[Finding]:
    """Graphs change nothing; slots, refills and the plain loop differ by rounding at most."""
    rows, tokens = (256, 64) if target.real else (4, 8)
    run = starter_run(target, target.device, "model.dtype=float32")
    graphs = respond(run, rows, tokens, GRAPHED)
    with without_graphs():
        without = respond(run, rows, tokens, GRAPHED)
    yield equal_rows("with graphs and without", graphs, without, share=1.0)
    again = respond(run, rows, tokens, GRAPHED)
    yield equal_rows("with graphs, twice", graphs, again, share=1.0)
    yield equal_rows(
        "in slots and in the plain loop", graphs, respond(run, rows, tokens, EXACT), share=0.99
    )
    few = respond(run, rows, tokens, GRAPHED, at_once=max(2, rows // 4))
    yield equal_rows("all at once and a quarter at once", graphs, few, share=0.99)
    if target.real:  # the compiler does not know a pretended GPU
        compiled = CompiledLayers("always")
        for _ in range(2):  # the first one also compiles
            other = respond(run, rows, tokens, GRAPHED, compiled=compiled)
        yield equal_rows("with compiled layers and without", graphs, other, share=0.99)
        yield Finding("layers are compiled", compiled.usable, "as the log says")
        half = starter_run(target, target.device, "model.dtype=bfloat16")
        compiled = CompiledLayers("always")
        other = respond(half, rows, tokens, GRAPHED, compiled=compiled)
        mean = float((score(half, other) - other.logprobs)[other.mask].abs().mean())
        yield below(
            "compiled layers in bfloat16: mean gap of generating and scoring", mean, 0.02,
            " nats a token",
        )  # fmt: skip
        yield Finding("layers in bfloat16 are compiled", compiled.usable, "as the log says")


def equal_rows(name: str, one: Rollout, other: Rollout, *, share: float) -> Finding:
    """A finding that at least a share of the responses are equal, token for token."""
    width = min(one.ids.shape[1], other.ids.shape[1])
    same = (one.ids[:, :width] == other.ids[:, :width]).all(1) & (one.lengths == other.lengths)
    equal, count = int(same.sum()), len(same)
    found = torch.isfinite(one.logprobs).all() & torch.isfinite(other.logprobs).all()
    return Finding(
        f"responses {name}", equal >= share * count and bool(found),
        f"{equal} of {count} equal, at least {share:.0%} wanted", {"share": equal / count},
    )  # fmt: skip
