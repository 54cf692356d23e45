"""Decides whether a run fits a machine, and which settings to change if it does not."""

from collections.abc import Iterator

from msgspec.structs import replace

from engine.config.rules.run_config import check_config
from engine.config.schema import RunConfig
from engine.errors import ConfigError
from engine.memory.capacity import Capacity
from engine.memory.estimate import estimate
from engine.memory.model import WHAT_IF_RANK, Estimate, Layout, Models, configured

MARGIN = 1.1
"""A run fits if this multiple of its estimate fits."""
USEFUL_SHARE = 0.98
"""A change is proposed only if it reduces the estimate to this fraction or less."""


def fits(found: Estimate, capacity: Capacity) -> bool:
    """Whether each rank fits, with a margin for the estimate's error."""
    return found.peak * MARGIN <= capacity.room(found.layout.ranks)


def can_start(layout: Layout, capacity: Capacity) -> bool:
    """Whether there is a GPU for each rank; on a CPU always true."""
    return capacity.device == "cpu" or layout.ranks <= capacity.gpus * capacity.nodes


def can_choose(config: RunConfig, ranks: int) -> bool:
    """Whether a run chooses its strategy itself: with `auto`, if its weights can be sharded."""
    return config.parallel.strategy == "auto" and ranks > 1 and config.lora.can_shard


def layout_at_start(config: RunConfig, models: Models, ranks: int, capacity: Capacity) -> Layout:
    """The layout of a run that starts: with `auto`, fsdp if ddp does not fit."""
    layout = configured(config, ranks)
    if can_choose(config, ranks) and not fits(estimate(config, models, layout), capacity):
        return replace(layout, strategy="fsdp")
    return layout


def changes_to_fit(
    config: RunConfig, models: Models, layout: Layout, capacity: Capacity
) -> tuple[list[str], Estimate]:
    """Finds configuration changes that make a run fit, least harmful first.

    Returns:
        The changes as `key=value`, the format of `-o`, and the estimate with all of them, which may
        still not fit.
    """
    found, changes = estimate(config, models, layout), dict[str, str]()
    for key, value, change, new_layout in _smaller(config, layout):
        if fits(found, capacity):
            break
        merged = _merge(config, change)
        if not _is_allowed(merged):
            continue
        tried = estimate(merged, models, new_layout or layout)
        if tried.peak <= USEFUL_SHARE * found.peak:
            config, layout, found = merged, new_layout or layout, tried
            changes[key] = value
    return [f"{k}={v}" for k, v in changes.items()], found


def _is_allowed(config: RunConfig) -> bool:
    """Whether the keys of a configuration do not contradict each other."""
    try:
        check_config(config)
    except ConfigError:
        return False
    return True


def room_for_micro_batch(
    config: RunConfig, models: Models, layout: Layout, capacity: Capacity
) -> int | None:
    """Finds the largest micro-batch that fits a GPU, by doubling the configured one.

    Returns None on a CPU, and if it is not larger. With a small micro-batch, a small model's
    kernels take less time than launching them, so that a GPU waits for the host
    (benchmarks/RESULTS.md).
    """
    rows = -(-config.rollout.batch_size // config.ppo.minibatches // layout.ranks)
    found, size = None, config.ppo.micro_batch_size
    while capacity.device == "cuda" and size < rows:
        size = min(2 * size, rows)
        larger = _merge(config, ("ppo", {"micro_batch_size": size}))
        if not fits(estimate(larger, models, layout), capacity):
            break
        found = size
    return found


Change = tuple[str, dict[str, object]]


def _smaller(config: RunConfig, layout: Layout) -> Iterator[tuple[str, str, Change, Layout | None]]:
    """Yields key, value, and the change of the configuration or of the layout."""
    size = min(config.ppo.micro_batch_size, config.rollout.batch_size // config.ppo.minibatches)
    while size > 1:
        size //= 2
        yield "ppo.micro_batch_size", str(size), ("ppo", {"micro_batch_size": size}), None
    size = config.reward.batch_size
    while size > 1:
        size //= 2
        yield "reward.batch_size", str(size), ("reward", {"batch_size": size}), None
    recompute: Change = ("parallel", {"activation_checkpointing": True})
    yield "parallel.activation_checkpointing", "true", recompute, None
    yield "parallel.activations", "offload", ("parallel", {"activations": "offload"}), None
    yield "reward.dtype", "bfloat16", ("reward", {"dtype": "bfloat16"}), None
    yield "model.dtype", "bfloat16", ("model", {"dtype": "bfloat16"}), None
    eight: Change = ("train", {"optimiser": "adamw_8bit"})
    yield "train.optimiser", "adamw_8bit", eight, None
    yield "model.value", "shared", ("model", {"value": "shared"}), None
    if layout.lora_rank is None:
        lora: Change = ("lora", {"rank": WHAT_IF_RANK})
        yield "lora.rank", str(WHAT_IF_RANK), lora, replace(layout, lora_rank=WHAT_IF_RANK)
    size = config.rollout.batch_size
    step = config.responses_per_prompt * config.ppo.minibatches
    while size % (2 * step) == 0:
        size //= 2
        yield "rollout.batch_size", str(size), ("rollout", {"batch_size": size}), None


def _merge(config: RunConfig, change: Change) -> RunConfig:
    section, values = change
    return replace(config, **{section: replace(getattr(config, section), **values)})


def shortage(config: RunConfig, models: Models, layout: Layout, free: Capacity) -> str | None:
    """Returns a warning if a run is likely to run out of memory, else None.

    Args:
        config: the run's configuration.
        models: its models.
        layout: its layout.
        free: the memory that is free now, in both `total` and `free`.
    """
    found = estimate(config, models, layout)
    if fits(found, free):
        return None
    kind = "of a GPU" if free.device == "cuda" else "of memory"
    room = free.room(layout.ranks)
    text = (
        f"each rank is estimated to need {found.peak / 1e9:.2f} GB {kind} "
        f"(most in the phase '{found.fullest}') and {room / 1e9:.2f} GB are free"
    )
    changes, smaller = changes_to_fit(config, models, layout, free)
    if fits(smaller, free):
        return f"{text}; {smaller.peak / 1e9:.2f} GB would suffice with " + ", ".join(changes)
    return f"{text}; see rlhf-tui plan"
