"""The size of a rollout engine of its own: responses at once, and its key-value cache."""

from engine.config.sections.rollout import RolloutConfig

MOST_SEATS = 256
"""Responses at once unless `rollout.at_once` says otherwise; vLLM's own default."""
BLOCK = 128
"""Tokens; vLLM rounds each response's cache up to blocks, of 16 to 128 by device."""
MOST_CACHE = 4_000_000_000
"""Bytes of the key-value cache unless `rollout.cache_gb` says otherwise; responses wait for it."""
WIDTH = {"float32": 4, "bfloat16": 2}


def seats(rollout: RolloutConfig) -> int:
    """The most responses that the engine generates at once."""
    return min(rollout.at_once or MOST_SEATS, rollout.batch_size)


def cache_bytes(
    rollout: RolloutConfig, dtype: str, layers: int, key_value: int, tokens: int
) -> int:
    """Bytes of the engine's key-value cache.

    Args:
        rollout: the configuration.
        dtype: `model.dtype`.
        layers: of the policy.
        key_value: key-value heads × head size.
        tokens: of the longest prompt with its response.

    Returns:
        What all responses that are generated at once need, but no more than `rollout.cache_gb`; in
        every case enough for one response.
    """
    one = 2 * layers * key_value * WIDTH[dtype] * BLOCK * (-(-tokens // BLOCK) + 1)
    most = MOST_CACHE if rollout.cache_gb is None else int(rollout.cache_gb * 1e9)
    return max(2 * one, min(seats(rollout) * one, most))
