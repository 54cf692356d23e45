"""The size of separate rollout engines: concurrent responses, and their key-value caches."""

from engine.config.schema import RunConfig
from engine.config.sections.rollout import RolloutConfig
from engine.memory.estimate import WIDTH
from engine.memory.model import Models

MAX_RESPONSES = 256
"""Default of concurrent responses without `rollout.at_once`; the same as vLLM's."""
BLOCK_TOKENS = 128
"""Tokens; vLLM rounds each response's cache up to blocks, of 16 to 128 by device."""
MAX_CACHE = 4_000_000_000
"""Bytes of the key-value cache unless `rollout.cache_gb` says otherwise; responses wait for it."""


def max_responses(rollout: RolloutConfig) -> int:
    """The most responses that an engine generates at once."""
    share = -(-rollout.batch_size // rollout.engines)
    return min(rollout.at_once or MAX_RESPONSES, share)


def cache_bytes(
    rollout: RolloutConfig, dtype: str, layers: int, key_value: int, tokens: int
) -> int:
    """Bytes of the key-value cache of an engine.

    Args:
        rollout: the configuration.
        dtype: `model.dtype`.
        layers: of the policy.
        key_value: key-value heads × head size.
        tokens: of the longest prompt with its response.

    Returns:
        What all concurrent responses need, but at most `rollout.cache_gb`; always enough for one
        response.
    """
    one = 2 * layers * key_value * WIDTH[dtype] * BLOCK_TOKENS * (-(-tokens // BLOCK_TOKENS) + 1)
    most = MAX_CACHE if rollout.cache_gb is None else int(rollout.cache_gb * 1e9)
    return max(2 * one, min(max_responses(rollout) * one, most))


PROGRAM_BYTES = 900_000_000
"""Bytes of host memory of the engine's process without a model: vLLM, torch and transformers."""


def engine_memory(config: RunConfig, models: Models) -> dict[str, int]:
    """Bytes that each separate rollout engine needs besides the ranks, by part; empty for native.

    On a CPU all of it is host memory. On GPUs each of `rollout.tensor_parallel` has its share of
    `weights` and `cache`; `program` is host memory in every case, and `handover`, the copy that is
    sent, unless it stays on a GPU (`rollout.transfer: ipc`). With `broadcast` there is none. Of
    `handover` there is one for all engines.
    """
    rollout, policy = config.rollout, models.policy
    if not rollout.uses_vllm:
        return {}
    width = WIDTH[config.model.dtype]
    tokens = models.prompt_tokens + config.reply_tokens + rollout.max_new_tokens
    # A tied output layer is sent again, and on a CPU packed in a copy of its own.
    tied = 0 if policy.head else policy.vocabulary * policy.hidden
    weights = width * (policy.parameters + (tied if models.device == "cpu" else 0))
    cache = cache_bytes(rollout, config.model.dtype, policy.layers, policy.key_value, tokens)
    return {
        "weights": weights // rollout.tensor_parallel,
        "cache": cache // rollout.tensor_parallel,
        "program": PROGRAM_BYTES,
        "handover": 0 if rollout.transfer == "broadcast" else width * (policy.parameters + tied),
    }


def beside_ranks(config: RunConfig, models: Models) -> int:
    """The part of it that is taken from the memory in which the ranks must fit.

    That is nothing on GPUs that the engine has for itself (`rollout.gpus`). Sleep mode is not
    counted on: the ranks hold the policy and the optimiser while the engine generates.
    """
    parts, here = engine_memory(config, models), config.rollout.local_engines
    if models.device == "cpu":
        handover = parts.pop("handover", 0)
        return here * sum(parts.values()) + handover
    ours, ranks = set(config.rollout.gpus), set(config.launch.gpus)
    apart = ours and ranks and not ours & ranks
    shared = ["weights", "cache", *(["handover"] if config.rollout.transfer == "ipc" else [])]
    return 0 if apart or not here else sum(parts.get(name, 0) for name in shared)
