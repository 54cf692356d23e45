"""Estimates a rank's memory before it loads any model, and selects the parallel strategy."""

import logging
import os
from collections.abc import Callable

import psutil
import torch
from msgspec.structs import replace

from engine.config.schema import RunConfig
from engine.errors import UserInputError
from engine.memory.advice import can_choose, layout_at_start, shortage
from engine.memory.capacity import Capacity, of_host
from engine.memory.estimate import CUDA_CONTEXT, estimate
from engine.memory.model import Estimate, Layout, Models, configured
from engine.protocol.rank_messages import Placed
from engine.train.distributed.ranks import RankGroup
from engine.train.models.shapes import models_of

log = logging.getLogger("engine")


def check_memory(
    config: RunConfig,
    prompt_tokens: int,
    ranks: RankGroup,
    warn: Callable[[str], None],
    placed: Placed | None = None,
) -> tuple[str, Models | None, Estimate | None]:
    """Selects the parallel strategy and estimates the peak memory of one rank.

    Call it once the prompts are known and before a model is loaded: a rank that runs out of memory
    is killed without an error message. Builds the models on the meta device, which takes a tenth of
    a second and reads no weights. All ranks must call it.

    Args:
        config: the configuration of the run.
        prompt_tokens: length of the longest prompt.
        ranks: the ranks; rank 0 decides.
        warn: called on rank 0 with a sentence if the run probably needs more memory than is free.
        placed: how the previous attempt placed the models. With the same number of ranks, `auto`
            keeps that choice, because free memory varies between starts.

    Returns:
        `ddp` or `fsdp`, the models that the estimate is based on, and the estimate. The last two
        are None on the other ranks, and for a model whose shapes cannot be determined.
    """
    free = least_free_memory(ranks)
    strategy, models, estimated = (
        _check_memory(config, prompt_tokens, ranks, warn, placed, free)
        if ranks.is_lead
        else ("", None, None)
    )
    return ranks.broadcast(lambda: strategy, str), models, estimated


def _check_memory(
    config: RunConfig,
    prompt_tokens: int,
    ranks: RankGroup,
    warn: Callable[[str], None],
    placed: Placed | None,
    free: Capacity,
) -> tuple[str, Models | None, Estimate | None]:
    layout = configured(config, ranks.size)
    chosen = can_choose(config, ranks.size)
    if chosen and placed is not None and placed.ranks == ranks.size:
        chosen = False
        layout = replace(layout, strategy="fsdp" if placed.strategy == "fsdp" else "ddp")
    try:
        models = models_of(config, prompt_tokens, ranks.device)
    except UserInputError as error:
        # An estimate must not end the run. If the model is unusable, loading it raises the error.
        log.warning("memory: not estimated: %s", error)
        return _strategy(layout), None, None
    if chosen:
        layout = layout_at_start(config, models, ranks.size, free)
    warning = shortage(config, models, layout, free)
    estimated = estimate(config, models, layout)
    gathered = estimated.parts.get("gathered", 0)  # with fsdp only
    log.info(
        "memory: estimated peak %.2f GB, in the phase '%s'%s",
        estimated.metric / 1e9, estimated.fullest,
        f"; gathered weights: {gathered / 1e9:.2f} GB" if gathered else "",
    )  # fmt: skip
    if warning is not None:
        log.warning("memory: %s", warning)
        warn(warning)
    return _strategy(layout), models, estimated


def _strategy(layout: Layout) -> str:
    return "fsdp" if layout.strategy == "fsdp" else "ddp"


def facts(estimated: Estimate | None) -> dict[str, object]:
    """Formats the estimate for the event `ready`, in GB; comparable with `perf/peak_memory_gb`."""
    if estimated is None:
        return {}
    values: dict[str, object] = {"planned_memory_gb": round(estimated.metric / 1e9, 3)}
    if gathered := estimated.parts.get("gathered", 0):
        values["planned_gather_gb"] = round(gathered / 1e9, 3)
    return values


def least_free_memory(ranks: RankGroup) -> Capacity:
    """Memory available to the rank that has least: GPUs and machines can differ, or be in use.

    All ranks must call it.
    """
    here = free_memory(ranks.device, ranks.size)
    least = min(map(int, ranks.all_gather_bytes(str(here.free).encode())))
    return replace(here, total=least, free=least)


def free_memory(device: torch.device, ranks: int) -> Capacity:
    """Memory available to the ranks, including what this process already uses."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        free += CUDA_CONTEXT  # it exists already
        return Capacity(device="cuda", total=free, free=free, gpus=ranks)
    host = of_host()
    free = min(host.total, host.free + psutil.Process().memory_info().rss)
    # Scaled to all ranks: only those on this machine share its memory.
    free = free * ranks // int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    return Capacity(device="cpu", total=free, free=free)
