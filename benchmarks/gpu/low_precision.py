"""Parts of the GPU check for what is held in 8 and in 4 bits: moments, and frozen weights."""

from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.gpu.findings import Finding, Target, below
from benchmarks.gpu.numerics import moved, score, starter_run
from engine.metrics import GRADIENT_NORM, KL
from engine.train.experience.generation import generate_rollout
from engine.train.models.adapters.quantised_linear import QuantisedLinear
from engine.train.rollout.rollout import Rollout
from engine.train.run import Run
from engine.train.step import train_step

STEPS = 4
NEAR_MOVE = 0.1
"""Distance of the weights that both optimisers end with, over how far they have moved."""
BYTES = 2.3
"""Of the 8-bit moments of a weight; the starter's blocks have 128 numbers or more."""


def eight_bit_moments(target: Target) -> Iterator[Finding]:
    """With 8-bit moments the weights move as with float32 ones; the moments take a quarter."""
    steps = STEPS if target.real else 2
    plain = starter_run(target, target.device, "model.dtype=float32")
    before = weights(plain)
    recorded: list[tuple[Rollout, float]] = []
    for step in range(1, steps + 1):
        rollout = generate_rollout(plain, step)
        metrics, _ = train_step(plain, step, recorded=rollout)
        recorded.append((rollout, metrics[GRADIENT_NORM]))
    eight = starter_run(target, target.device, "model.dtype=float32", "train.optimiser=adamw_8bit")
    off = 0.0
    for step, (rollout, norm) in enumerate(recorded, start=1):
        metrics, _ = train_step(eight, step, recorded=moved(rollout, target.device))
        off = max(off, abs(metrics[GRADIENT_NORM] / norm - 1))
    yield below(f"8-bit moments: gradient norms of {steps} steps, relative", off, 0.02)
    distance = float(torch.dist(weights(eight), weights(plain)))
    move = float(torch.dist(weights(plain), before))
    yield below(
        "8-bit moments: distance of the weights over their move", distance / move, NEAR_MOVE
    )
    size, count = moment_bytes(eight), sum(p.numel() for p in eight.policy.parameters())
    yield below("8-bit moments: bytes a weight", size / count, BYTES)


def four_bit_weights(target: Target) -> Iterator[Finding]:
    """QLoRA: a run starts at its reference, generates as it scores, and moves away in two steps."""
    installed = find_spec("bitsandbytes") is not None
    if not installed or not target.real:
        why = "needs a GPU's kernels" if installed else "not installed, so not checked"
        yield Finding("QLoRA", True, why)
        return
    keys = ("model.dtype=bfloat16", "lora.rank=8", "lora.quantise=nf4", "train.learning_rate=1e-3")
    run = starter_run(target, target.device, *keys)
    layers = [m for m in run.policy.modules() if isinstance(m, QuantisedLinear)]
    size = sum(layer.packed.nbytes + layer.scales.nbytes for layer in layers)
    count = sum(layer.in_features * layer.out_features for layer in layers)
    yield below("QLoRA: bytes a weight", size / count, 0.57)
    first = generate_rollout(run, 1)
    gap = float((score(run, first) - first.logprobs)[first.mask].abs().mean())
    yield below("QLoRA: mean gap of generating and scoring", gap, 0.02, " nats a token")
    metrics, _ = train_step(run, 1, recorded=first)
    yield below("QLoRA: KL before the first update", abs(metrics[KL]), 0.5, " nats")
    off = abs(metrics["val/ratio"] - 1)
    yield below("QLoRA: mean ratio in the first epoch, distance from 1", off, 0.02)
    before = weights(run)
    metrics, _ = train_step(run, 2)
    norm, move = metrics[GRADIENT_NORM], float(torch.dist(weights(run), before))
    yield Finding(
        "QLoRA: two steps", 0 < norm < float("inf") and move > 0,
        f"norm of the gradient {norm:.4f}, KL {metrics[KL]:.4f}, adapters moved by {move:.4f}",
    )  # fmt: skip


def weights(run: Run) -> Tensor:
    """A copy of all weights that are trained, on the host, (n,) float32."""
    trained = [p for p in run.policy.parameters() if p.requires_grad]
    return torch.cat([p.detach().float().cpu().flatten() for p in trained])


def moment_bytes(run: Run) -> int:
    """Bytes of the optimiser's state."""
    return sum(t.nbytes for state in run.optimiser.state.values() for t in state.values())
