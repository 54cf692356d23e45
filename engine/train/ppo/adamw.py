"""The optimiser and its learning-rate schedule."""

import math
from functools import partial
from typing import Any

import torch

from engine.config.schema import RunConfig
from engine.config.sections.train import TrainConfig
from engine.train.models.language_model import LanguageModel
from engine.train.ppo.adamw_8bit import AdamW8bit


def learning_rate(config: TrainConfig, step: int) -> float:
    """Returns the learning rate of step `step`, counted from 1.

    It rises linearly over `warmup_steps`, then follows `schedule`: `constant`, or `linear` or
    `cosine` towards `final_rate` times the rate at the end of the run.
    """
    rate = config.learning_rate
    if step <= config.warmup_steps:
        return rate * step / config.warmup_steps
    span = max(1, config.steps - config.warmup_steps)
    remaining = 1 - (step - 1 - config.warmup_steps) / span
    if config.schedule == "constant":
        return rate
    if config.schedule == "cosine":
        remaining = 0.5 * (1 - math.cos(math.pi * remaining))
    return rate * (config.final_rate + (1 - config.final_rate) * remaining)


def make_optimiser(policy: LanguageModel, config: RunConfig) -> torch.optim.Optimizer:
    """Creates AdamW, fused or with 8-bit moments (`train.optimiser`), with three parameter groups.

    They are the policy, the value head, and the value function's own transformer, if it has one.

    Each group has the key `lr_scale`, a factor on :func:`learning_rate`. It is 1 for the policy and
    `ppo.value_head_rate` for the value head, which is initialised to zero. AdamW moves a weight by
    about the learning rate per update, so at a rate that suits a pretrained model the value head
    would be far from the returns for most of a run. It is `ppo.value_rate` for the transformer.
    (OpenRLHF's examples train a whole critic at 9 and 18 times the actor's rate.)

    The default of `train.adam_eps` is 1e-5: torch's default, 1e-8, gave about six times the
    approximate KL in early steps.
    """
    head, trunk = (
        {id(p) for p in module.parameters()} if module is not None else set[int]()
        for module in (policy.value_head, policy.value_trunk)
    )
    trainable = [p for p in policy.parameters() if p.requires_grad]
    head_scale = config.ppo.value_head_rate or 1.0  # engine.config.file sets it if omitted
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if id(p) not in head | trunk], "lr_scale": 1.0},
        {"params": [p for p in trainable if id(p) in head], "lr_scale": head_scale},
        {"params": [p for p in trainable if id(p) in trunk], "lr_scale": config.ppo.value_rate},
    ]
    train = config.train
    kind = AdamW8bit if train.optimiser == "adamw_8bit" else partial(torch.optim.AdamW, fused=True)
    return kind(
        groups,
        lr=train.learning_rate,
        betas=train.adam_betas,
        eps=train.adam_eps,
        weight_decay=train.weight_decay,
    )
