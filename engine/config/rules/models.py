"""Rules of the sections `model` and `lora`."""

from pathlib import Path

from engine.config.schema import RunConfig
from engine.errors import ConfigError


def check_models(config: RunConfig) -> None:
    """Checks which models are read, how, and what adapters they get.

    Raises:
        ConfigError: keys contradict each other; the message names them and a remedy.
    """
    model = config.model
    if model.reference_revision is not None and model.reference is None:
        raise ConfigError(
            "model.reference_revision needs model.reference: without it the reference is the "
            "policy, of model.revision"
        )
    if model.gguf_file is not None and Path(model.gguf_file).suffix.lower() != ".gguf":
        raise ConfigError(
            f"model.gguf_file must be the name of a .gguf file in model.policy, not "
            f"'{model.gguf_file}'"
        )
    if model.attn_implementation == "flash_attention_2" and model.dtype == "float32":
        raise ConfigError(
            "model.attn_implementation: flash_attention_2 computes in half precision only: set "
            "model.dtype: bfloat16"
        )
    if model.float32_logits and model.dtype == "float32":
        raise ConfigError(
            "model.float32_logits has no effect with model.dtype: float32, in which everything is "
            "computed in float32: leave it out"
        )
    lora = config.lora
    given = {"alpha": lora.alpha, "targets": lora.targets, "rslora": lora.rslora, "dora": lora.dora}
    if lora.rank is None and (keys := [f"lora.{key}" for key, value in given.items() if value]):
        raise ConfigError(
            f"{' and '.join(keys)} {'needs' if len(keys) == 1 else 'need'} lora.rank: without a "
            "rank there are no adapters"
        )
    if lora.dora and config.parallel.strategy == "fsdp":
        raise ConfigError(
            "lora.dora cannot be combined with parallel.strategy: fsdp, because the length of a "
            "row is computed from the whole weight; use ddp"
        )
    _check_quantised(config)


def _check_quantised(config: RunConfig) -> None:
    if config.lora.quantise == "none":
        return
    key = f"lora.quantise: {config.lora.quantise}"
    if config.lora.rank is None:
        raise ConfigError(f"{key} needs lora.rank: weights in 4 bits cannot be trained themselves")
    if config.parallel.strategy == "fsdp":
        raise ConfigError(
            f"{key} cannot be combined with parallel.strategy: fsdp, because packed weights have "
            "no rows to shard; use ddp"
        )
    if config.rollout.uses_vllm:
        raise ConfigError(
            f"{key} cannot be combined with rollout.engine: {config.rollout.engine}, to which "
            "packed weights cannot be sent; use native"
        )
