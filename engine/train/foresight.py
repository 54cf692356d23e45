"""What a rank that begins will hold in memory, told before it is held."""

import logging
import os
from collections.abc import Callable
from typing import Literal

import psutil
import torch

from engine.advice import shortage
from engine.capacity import Capacity, of_host
from engine.config import RunConfig
from engine.plan import CUDA_CONTEXT, Estimate, configured, estimate
from engine.train.shapes import models_of

log = logging.getLogger("engine")


def foresee(
    config: RunConfig, prompt_tokens: int, device: torch.device, warn: Callable[[str], None]
) -> Estimate:
    """The estimate for this rank; costs the models' shapes, no weights.

    Called when the prompts are known and before any model is loaded: too late would be when the
    kernel has ended the rank.

    Args:
        config: the run's.
        prompt_tokens: of the longest prompt.
        device: where this rank computes.
        warn: is given a sentence where less is free than the run is likely to need.

    Raises:
        UserInputError: a model's configuration cannot be read.
    """
    kind: Literal["cpu", "cuda"] = "cuda" if device.type == "cuda" else "cpu"
    models = models_of(config, prompt_tokens, kind)
    layout = configured(config, int(os.environ.get("WORLD_SIZE", "1")))
    found = estimate(config, models, layout)
    log.info(
        "memory: about %.2f GB at the most, in the phase '%s'; weights gathered: %.2f GB",
        found.metric / 1e9, found.fullest, found.parts.get("gathered", 0) / 1e9,
    )  # fmt: skip
    if (text := shortage(config, models, layout, _free(device, layout.ranks))) is not None:
        log.warning("memory: %s", text)
        warn(text)
    return found


def facts(found: Estimate) -> dict[str, object]:
    """For the event `ready`: to be held against `perf/peak_memory_gb`."""
    told: dict[str, object] = {"planned_memory_gb": round(found.metric / 1e9, 3)}
    if gathered := found.parts.get("gathered", 0):
        told["planned_gather_gb"] = round(gathered / 1e9, 3)
    return told


def _free(device: torch.device, ranks: int) -> Capacity:
    """What is free for the ranks, with what this one holds already."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] + CUDA_CONTEXT  # its own context is made
        return Capacity(device="cuda", total=free, free=free, gpus=ranks)
    host = of_host()
    free = min(host.total, host.free + psutil.Process().memory_info().rss)
    return Capacity(device="cpu", total=free, free=free)
