"""The optimiser and its learning rates."""

import math

import torch

from engine.config.schema import RunConfig, TrainConfig
from engine.train.models.language_model import LanguageModel


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of step `step` (from 1): linear warm-up, then the schedule down to 0 at the end."""
    rate = config.learning_rate
    if step <= config.warmup_steps:
        return rate * step / config.warmup_steps
    span = max(1, config.steps - config.warmup_steps)
    left = 1 - (step - 1 - config.warmup_steps) / span
    if config.schedule == "linear":
        return rate * left
    if config.schedule == "cosine":
        return rate * 0.5 * (1 - math.cos(math.pi * left))
    return rate


def make_optimiser(policy: LanguageModel, config: RunConfig) -> torch.optim.Optimizer:
    """AdamW, fused. eps 1e-5: 1e-8 gave about six times the early approximate KL.

    The value head has a rate of its own, `ppo.value_head_rate` times the others': it starts from
    zero, and AdamW moves a weight by about the rate an update, so that at a rate made for a
    trained model it is far from the returns for most of a run. (OpenRLHF's examples have 9 and 18
    times for a whole critic.)
    """
    head = {id(p) for p in policy.value_head.parameters()} if policy.value_head is not None else ()
    learning = [p for p in policy.parameters() if p.requires_grad]
    times = config.ppo.value_head_rate or 1.0  # filled in by engine.config.file
    return torch.optim.AdamW(
        [
            {"params": [p for p in learning if id(p) not in head], "times": 1.0},
            {"params": [p for p in learning if id(p) in head], "times": times},
        ],
        lr=config.train.learning_rate,
        betas=config.train.adam_betas,
        eps=config.train.adam_eps,
        weight_decay=config.train.weight_decay,
        fused=True,
    )
