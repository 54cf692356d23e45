"""Parts of the GPU check that compare numbers: with the CPU's, and with what theory says."""

from collections.abc import Iterator
from dataclasses import fields, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.findings import Finding, Target, below
from engine import starter
from engine.config import file as config_file
from engine.metrics import GRADIENT_NORM
from engine.protocol.rank_messages import Begin
from engine.session.folder import create
from engine.train.distributed.ranks import RankGroup
from engine.train.experience.generation import generate_rollout
from engine.train.load import load_run
from engine.train.ppo.forward import MicroBatchLimit, score_tokens
from engine.train.reward_scales import fit_scales
from engine.train.rollout.conversation import Conversation
from engine.train.rollout.rollout import Rollout
from engine.train.rollout.sampling import sample
from engine.train.run import Run
from engine.train.step import train_step

SIZE = ["rollout.batch_size=32", "rollout.max_new_tokens=24", "ppo.minibatches=2"]
SMALL_SIZE = ["rollout.batch_size=4", "rollout.max_new_tokens=6", "ppo.minibatches=1"]
STEP_TOLERANCE = 1e-4
"""Relative, in float32: another order of sums."""
SMALLEST = 0.1
"""Smaller values are compared as if they were this large. The KL of the first step is a sum over
the tokens of a response whose log-probabilities differ by rounding, about 1e-7 each."""


def starter_run(target: Target, device: torch.device, *overrides: str) -> Run:
    """A run of the starter models on a device, in this process."""
    size = SIZE if target.real else SMALL_SIZE
    keys = [*size, "ppo.epochs=1", "log.tensorboard=false", "launch.device=cpu", *overrides]
    config = config_file.load(starter.FOLDER / "demo.yaml", keys)
    sessions = target.folder / "in-process"
    number = len(list(sessions.iterdir())) if sessions.exists() else 0
    session = create(sessions, f"run-{number}", config)
    ranks = RankGroup(config.launch)
    ranks.device = device
    run = load_run(session, config, Begin(attempt=1, from_step=0), ranks)
    fit_scales(run, config)
    return run


def moved(rollout: Rollout, device: torch.device) -> Rollout:
    """A rollout with all its tensors on another device."""
    changed = _tensors_on(rollout, device)
    if rollout.conversation is not None:
        there = _tensors_on(rollout.conversation, device)
        changed["conversation"] = replace(rollout.conversation, **there)
    return replace(rollout, batch=rollout.batch.to(device), **changed)


def _tensors_on(holder: Rollout | Conversation, device: torch.device) -> dict[str, Any]:
    return {
        f.name: value.to(device)
        for f in fields(holder)
        if isinstance(value := getattr(holder, f.name), Tensor)
    }


def recorded_step(target: Target) -> Iterator[Finding]:
    """A step on a recorded rollout has the CPU's numbers, in float32."""
    yield from step_as_on_cpu(target, "")


def step_as_on_cpu(target: Target, name: str, *overrides: str) -> Iterator[Finding]:
    """A step with some keys, on a rollout of the CPU, has the CPU's numbers, in float32.

    `name` is that of the keys, for the findings.
    """
    of = f" with {name}" if name else ""
    on_cpu = starter_run(target, torch.device("cpu"), "model.dtype=float32", *overrides)
    rollout = generate_rollout(on_cpu, 1)
    expected, _ = train_step(on_cpu, 1, recorded=rollout)
    on_gpu = starter_run(target, target.device, "model.dtype=float32", *overrides)
    devices = {p.device.type for p in on_gpu.policy.parameters()}
    yield Finding(f"the policy{of} is on the GPU", devices == {"cuda"}, ", ".join(sorted(devices)))
    found, _ = train_step(on_gpu, 1, recorded=moved(rollout, target.device))
    worst, metric = 0.0, ""
    for key, value in expected.items():
        if not key.startswith(("time/", "perf/")):
            gap = abs(found[key] - value) / max(abs(value), SMALLEST)
            worst, metric = max((worst, metric), (gap, key))
    yield below(
        f"metrics of a step{of}, GPU and CPU ({metric} differs most)", worst, STEP_TOLERANCE
    )
    there = score(on_gpu, moved(rollout, target.device))
    gap = float((there.cpu() - score(on_cpu, rollout)).abs().max())
    yield below(f"log-probabilities after the step{of}, GPU and CPU", gap, 1e-3, " nats")


def score(run: Run, rollout: Rollout) -> Tensor:
    """Log π of a rollout by the run's policy, (B, T) float32."""
    return score_tokens(run.policy, rollout, 1.0, MicroBatchLimit(4), want="logits")[0]


def bfloat16_gap(target: Target) -> Iterator[Finding]:
    """In bfloat16 the log-probabilities while generating are near those of a full forward pass."""
    run = starter_run(target, target.device, "model.dtype=bfloat16")
    rollout = generate_rollout(run, 1)
    gap = (score(run, rollout) - rollout.logprobs)[rollout.mask]
    mean = float(gap.abs().mean())
    yield below("bfloat16: mean gap of generating and scoring", mean, 0.02, " nats a token")
    metrics, _ = train_step(run, 1, recorded=rollout)
    ratio = metrics["val/ratio"]
    yield below("bfloat16: mean ratio in the first epoch, distance from 1", abs(ratio - 1), 0.02)


def sampled_distribution(target: Target) -> Iterator[Finding]:
    """A million draws over a large vocabulary follow the softmax; chi-square."""
    words, rows, calls = (152_000, 1024, 977) if target.real else (500, 100, 40)
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(words, generator=generator)
    logits[torch.randperm(words, generator=generator)[: words // 10]] = -torch.inf
    expected = torch.softmax(logits.double(), 0) * rows * calls
    there = logits.to(target.device).expand(rows, -1)
    counts = torch.zeros(words, dtype=torch.int64, device=target.device)
    for _ in range(calls):
        uniforms = torch.rand(rows, generator=generator, dtype=torch.float64).to(target.device)
        token = sample(there, uniforms, 1.0, "gumbel")[0]
        counts.scatter_add_(0, token, torch.ones_like(token))
    found = counts.cpu()
    impossible = int(found[expected == 0].sum())
    yield Finding("tokens of probability 0 are never sampled", impossible == 0, f"{impossible}")
    often = expected >= 5
    observed = torch.cat([found[often], found[~often].sum()[None]]).double()
    wanted = torch.cat([expected[often], expected[~often].sum()[None]])
    kept = wanted > 0
    chi = float(((observed - wanted).square() / wanted)[kept].sum())
    freedom = int(kept.sum()) - 1
    z = (chi - freedom) / (2 * freedom) ** 0.5
    name = f"{rows * calls:,} draws over {words:,} words, chi-square in standard deviations"
    yield below(name, z, 5.0)


def fused_kernels(target: Target) -> Iterator[Finding]:
    """With liger-kernel's kernels a model has the log-probabilities of torch's, to rounding."""
    if find_spec("liger_kernel") is None or not target.real:
        yield Finding("fused kernels", True, "not installed, so not checked")
        return
    run = starter_run(target, target.device, "model.dtype=float32")
    rollout = generate_rollout(run, 1)
    expected = score(run, rollout)
    fused = starter_run(target, target.device, "model.dtype=float32", "model.kernels=liger")
    gap = float((score(fused, rollout) - expected).abs().max())
    yield below("log-probabilities with fused kernels and without", gap, 1e-3, " nats")
    generated = generate_rollout(fused, 1)
    gap = float((score(fused, generated) - generated.logprobs * generated.mask).abs().max())
    yield below("fused kernels: generating and scoring", gap, 1e-4, " nats")
    metrics, _ = train_step(fused, 1, recorded=rollout)
    norm = metrics[GRADIENT_NORM]
    train_step(run, 1, recorded=rollout)
    yield Finding("a step with fused kernels", norm > 0, f"norm of the gradient {norm:.4f}")
