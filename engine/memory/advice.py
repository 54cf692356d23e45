"""What would fit a machine, and what to change where nothing does."""

from collections.abc import Iterator

from msgspec.structs import replace

from engine.config.schema import RunConfig
from engine.memory.capacity import Capacity
from engine.memory.estimate import estimate
from engine.memory.model import WHAT_IF_RANK, Estimate, Layout, Models

MARGIN = 1.1
"""A run fits where this multiple of its estimate does."""
USEFUL = 0.98
"""A change that leaves more than this share of the memory is not worth making."""


def fits(found: Estimate, capacity: Capacity) -> bool:
    """Whether each rank has room, with a margin for what an estimate is off."""
    return found.peak * MARGIN <= capacity.room(found.layout.ranks)


def can_start(layout: Layout, capacity: Capacity) -> bool:
    """Whether there is a GPU for each rank; of processors there are always enough."""
    return capacity.device == "cpu" or layout.ranks <= capacity.gpus


def changes_to_fit(
    config: RunConfig, models: Models, layout: Layout, capacity: Capacity
) -> tuple[list[str], Estimate]:
    """Configuration keys to change, the least harmful first, until the run fits.

    Returns:
        `key=value`, as `-o` takes them, and the estimate with all of them; it may still not fit.
    """
    found, made = estimate(config, models, layout), dict[str, str]()
    for key, value, changed, arranged in _smaller(config, layout):
        if fits(found, capacity):
            break
        merged = _merge(config, changed)
        tried = estimate(merged, models, arranged or layout)
        if tried.peak <= USEFUL * found.peak:
            config, layout, found = merged, arranged or layout, tried
            made[key] = value
    return [f"{k}={v}" for k, v in made.items()], found


Change = tuple[str, dict[str, object]]


def _smaller(
    config: RunConfig, layout: Layout
) -> Iterator[tuple[str, str, Change | None, Layout | None]]:
    """Key, value, how the configuration or the layout becomes so."""
    size = min(config.ppo.micro_batch_size, config.rollout.batch_size // config.ppo.minibatches)
    while size > 1:
        size //= 2
        yield "ppo.micro_batch_size", str(size), ("ppo", {"micro_batch_size": size}), None
    size = config.reward.batch_size
    while size > 1:
        size //= 2
        yield "reward.batch_size", str(size), ("reward", {"batch_size": size}), None
    again: Change = ("parallel", {"activation_checkpointing": True})
    yield "parallel.activation_checkpointing", "true", again, None
    yield "reward.dtype", "bfloat16", ("reward", {"dtype": "bfloat16"}), None
    yield "model.dtype", "bfloat16", ("model", {"dtype": "bfloat16"}), None
    yield "model.value", "shared", ("model", {"value": "shared"}), None
    if layout.lora_rank is None:
        yield "lora.rank", str(WHAT_IF_RANK), None, replace(layout, lora_rank=WHAT_IF_RANK)
    size = config.rollout.batch_size
    step = config.responses_per_prompt * config.ppo.minibatches
    while size % (2 * step) == 0:
        size //= 2
        yield "rollout.batch_size", str(size), ("rollout", {"batch_size": size}), None


def _merge(config: RunConfig, change: Change | None) -> RunConfig:
    if change is None:
        return config
    section, values = change
    return replace(config, **{section: replace(getattr(config, section), **values)})


def shortage(config: RunConfig, models: Models, layout: Layout, free: Capacity) -> str | None:
    """A warning in words, where a run that begins is likely to end for want of memory.

    `free`: what is free for the ranks now, as both of its sizes.
    """
    found = estimate(config, models, layout)
    if fits(found, free):
        return None
    kind = "of a GPU" if free.device == "cuda" else "of memory"
    room = free.room(layout.ranks)
    text = (
        f"each rank is estimated to need {found.peak / 1e9:.2f} GB {kind} "
        f"(most in the phase '{found.fullest}') and {room / 1e9:.2f} GB are free for it"
    )
    changes, smaller = changes_to_fit(config, models, layout, free)
    if fits(smaller, free):
        return f"{text}; {smaller.peak / 1e9:.2f} GB would do with " + ", ".join(changes)
    return f"{text}; see rlhf-tui plan"
