"""A part of the GPU check: what must hold at the start of a run, for many architectures."""

from collections.abc import Iterator

import torch

from benchmarks.gpu.decoding import equal_rows, respond
from benchmarks.gpu.findings import Finding, Target
from benchmarks.gpu.numerics import score, starter_run
from engine.train.experience.generation import generate_rollout
from engine.train.rollout.native.schedule import EXACT, GRAPHED
from engine.train.step import train_step
from tests.train.architectures import ARCHITECTURES, write_model

FEW = ("gpt2", "qwen3_moe")
"""On a pretended GPU; a test has the others."""
SCORING_GAP = {"float32": 1e-4, "bfloat16": 0.05}
"""Nats a token, mean; weights are large and random, so rounding shows more than in a real model."""


def architectures(target: Target) -> Iterator[Finding]:
    """Per architecture one finding in float32 and one in bfloat16, and one about its tokens."""
    for kind in ARCHITECTURES if target.real else FEW:
        yield from start_of(kind, target)


def start_of(kind: str, target: Target) -> Iterator[Finding]:
    """For one architecture: KL 0, ratio 1, generating as scoring, slots as the plain loop.

    Its files have bfloat16 weights, so that the KL is 0 in bfloat16, too.
    """
    folder = write_model(target.folder / f"{kind} model", kind, torch.bfloat16)
    for dtype, limit in SCORING_GAP.items():
        run = starter_run(target, target.device, f"model.policy={folder}", f"model.dtype={dtype}")
        if dtype == "float32":
            rows, tokens = (64, 32) if target.real else (4, 6)
            yield equal_rows(
                f"of {kind} in slots and in the plain loop",
                respond(run, rows, tokens, GRAPHED), respond(run, rows, tokens, EXACT), share=0.95,
            )  # fmt: skip
        rollout = generate_rollout(run, 1)
        gap = float((score(run, rollout) - rollout.logprobs)[rollout.mask].abs().mean())
        metrics, _ = train_step(run, 1, recorded=rollout)
        kl, ratio = metrics["objective/kl"], metrics["val/ratio"]
        close = 1e-3 if dtype == "float32" else 0.0
        yield Finding(
            f"{kind} in {dtype}",
            gap <= limit and abs(kl) <= close and abs(ratio - 1) <= 0.02,
            f"KL {kl:.2g} (at most {close:g}), ratio {ratio:.4f}, generating and scoring differ by "
            f"{gap:.2g} nats a token (at most {limit:g})",
            {"kl": kl, "ratio": ratio, "gap": gap},
        )
