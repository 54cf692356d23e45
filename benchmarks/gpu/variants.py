"""Parts of the GPU check for what a run can do besides: conversations, losses in chunks, no masks.

Each has its own operators, shapes and copies; that they compute the same on a CPU is tested there.
"""

import logging
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.gpu.decoding import equal_rows, without_graphs
from benchmarks.gpu.findings import Finding, Target, below
from benchmarks.gpu.numerics import score, starter_run, step_as_on_cpu
from engine import starter
from engine.train.experience.generation import generate_rollout
from engine.train.rewards.kinds.encoding import RewardEncoding
from engine.train.rewards.kinds.padding import reads_padding
from engine.train.rollout.native.backend import NativeBackend
from engine.train.rollout.rollout import Rollout
from engine.train.run import Run
from tests.train.repeating import ENVIRONMENT, STOPS

CHUNK = 20_000
"""Logits at a time: a few tokens of the starter."""
VARIANTS = {
    "an environment": (*ENVIRONMENT, STOPS),
    "a value function on the reward model's states": (
        "model.value=reward_model", "reward.normalise=reference", "reward.normalise_samples=8",
    ),
    "frozen models on the host and activations recomputed": (
        "parallel.frozen=offload", "parallel.activation_checkpointing=true",
    ),
    "LoRA and a value function of its own": ("lora.rank=8", "model.value=separate"),
}  # fmt: skip
FEW = ("an environment",)
"""On a pretended GPU; tests have the others."""
IN_CHUNKS = (
    "ppo.advantage=grpo", "rollout.per_prompt=2", "ppo.entropy_coef=0.01", "kl.place=loss",
    "kl.estimator=k3",
)  # fmt: skip
ROLLOUTS = 4
"""Batches of conversations by compiled layers; each has turns of new shapes."""


def variants(target: Target) -> Iterator[Finding]:
    """Steps of several kinds have the CPU's numbers."""
    for name, keys in VARIANTS.items():
        if target.real or name in FEW:
            yield from step_as_on_cpu(target, name, *keys)
    loss = "engine.train.ppo.chunked_loss"
    with (
        mock.patch(f"{loss}.MAX_LOGITS", CHUNK),
        mock.patch(f"{loss}.MAX_LOGITS_ON_GPU", CHUNK),
    ):
        yield from step_as_on_cpu(target, "losses in chunks", *IN_CHUNKS)


def conversations(target: Target) -> Iterator[Finding]:
    """Turns generate the same with graphs and without, and in compiled layers as they are scored.

    A turn has another number of responses and other lengths than the one before.
    """
    run = starter_run(target, target.device, "model.dtype=float32", *ENVIRONMENT, STOPS)
    graphs = generate_rollout(run, 1)
    with without_graphs():
        without = generate_rollout(run, 1)
    yield equal_rows("of several turns, with graphs and without", graphs, without, share=0.99)
    most = float(gaps(run, graphs).max())
    yield below("turns in float32: generating and scoring differ by at most", most, 1e-4, " nats")
    when = "always" if target.real else "never"  # the compiler does not know a pretended GPU
    keys = ["model.dtype=bfloat16", f"rollout.compile={when}", *ENVIRONMENT, STOPS]
    if target.real:
        keys += ["rollout.max_new_tokens=64", "environment.max_tokens=200"]
    half = starter_run(target, target.device, *keys)
    seconds: list[float] = []
    means: list[float] = []
    with warnings_of_the_engine() as warned:
        for step in range(1, (ROLLOUTS if target.real else 1) + 1):
            began = time.perf_counter()
            rollout = generate_rollout(half, step)
            seconds.append(time.perf_counter() - began)
            means.append(float(gaps(half, rollout).mean()))
    yield below(
        "turns in bfloat16: mean gap of generating and scoring", max(means), 0.02, " nats a token"
    )
    usable = isinstance(half.backend, NativeBackend) and half.backend.compiled.usable
    yield Finding(
        "turns by compiled layers and graphs",
        usable and not warned,
        "; ".join(warned)
        or f"no warning; the first batch took {seconds[0]:.1f} s, later ones "
        f"{statistics.median(seconds[1:] or seconds):.2f} s",
        {"first": seconds[0], "later": statistics.median(seconds[1:] or seconds)},
    )


def gaps(run: Run, rollout: Rollout) -> torch.Tensor:
    """The distance of log π while generating from that of a full pass, at each token; (N,)."""
    return (score(run, rollout) - rollout.logprobs)[rollout.mask].abs()


@contextmanager
def warnings_of_the_engine() -> Iterator[list[str]]:
    """Context manager that yields a list, which collects the warnings of the engine's log."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("engine")
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


def reward_masks(target: Target) -> Iterator[Finding]:
    """A reward model on a causal decoder gives the same scores without an attention mask."""
    folder = starter.resolve("starter:reward")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype)
        encoding = RewardEncoding(
            tokenizer, model, tokenizer.get_vocab(), max_tokens=64, pair=False
        )  # fmt: skip
        needed = reads_padding(model.to(target.device).eval(), encoding, 0, target.device)
        text = "another score with a mask" if needed else "the same score with a mask and without"
        yield Finding(f"the reward model in {str(dtype).removeprefix('torch.')}", not needed, text)
