"""What a rank that begins will hold in memory, told before it is held."""

import logging
import os
from collections.abc import Callable
from typing import Literal

import psutil
import torch
from msgspec.structs import replace

from engine.config.schema import RunConfig
from engine.errors import UserInputError
from engine.memory.advice import shortage
from engine.memory.capacity import Capacity, of_host
from engine.memory.estimate import CUDA_CONTEXT, estimate
from engine.memory.model import Estimate, Layout, configured
from engine.train.distributed.ranks import RankGroup
from engine.train.models.shapes import models_of

log = logging.getLogger("engine")


def check_memory(
    config: RunConfig, prompt_tokens: int, ranks: RankGroup, warn: Callable[[str], None]
) -> tuple[str, Estimate | None]:
    """How the models will lie on the ranks, and what that will take one of them.

    Called when the prompts are known and before any model is loaded: too late would be when the
    kernel has ended the rank. Costs the models' shapes, a tenth of a second, and no weights.

    Args:
        config: the run's.
        prompt_tokens: of the longest prompt.
        ranks: the ranks; rank 0 decides.
        warn: is given a sentence where less is free than the run is likely to need.

    Returns:
        `ddp` or `fsdp`, and the estimate: None for a model that cannot be planned with.
    """
    strategy, found = (
        _check_memory(config, prompt_tokens, ranks, warn) if ranks.is_lead else ("", None)
    )
    return ranks.broadcast_bytes(strategy.encode()).decode(), found


def _check_memory(
    config: RunConfig, prompt_tokens: int, ranks: RankGroup, warn: Callable[[str], None]
) -> tuple[str, Estimate | None]:
    device = ranks.device
    kind: Literal["cpu", "cuda"] = "cuda" if device.type == "cuda" else "cpu"
    layout = configured(config, ranks.size)
    try:
        models = models_of(config, prompt_tokens, kind)
    except UserInputError as error:
        # An onlooker must not end the run; loading will, in its own words, if the model is wrong.
        log.warning("memory: not estimated: %s", error)
        return _strategy(layout), None
    free = _free(device, layout.ranks)
    lacking = shortage(config, models, layout, free)
    if lacking is not None and config.parallel.strategy == "auto" and ranks.size > 1:
        layout = replace(layout, strategy="fsdp")
        lacking = shortage(config, models, layout, free)
    found = estimate(config, models, layout)
    log.info(
        "memory: about %.2f GB at the most, in the phase '%s'; weights gathered: %.2f GB",
        found.metric / 1e9, found.fullest, found.parts.get("gathered", 0) / 1e9,
    )  # fmt: skip
    if lacking is not None:
        log.warning("memory: %s", lacking)
        warn(lacking)
    return _strategy(layout), found


def _strategy(layout: Layout) -> str:
    return "fsdp" if layout.strategy == "fsdp" else "ddp"


def facts(found: Estimate | None) -> dict[str, object]:
    """For the event `ready`: to be held against `perf/peak_memory_gb`."""
    if found is None:
        return {}
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
    # Only the ranks of this machine share its memory.
    free = free * ranks // int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    return Capacity(device="cpu", total=free, free=free)
