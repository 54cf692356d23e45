"""Rules of the sections `model` and `lora`."""

from collections.abc import Iterator
from pathlib import Path

from engine.config.schema import RunConfig


def model_mistakes(config: RunConfig) -> Iterator[str]:
    """The mistakes in which models are read, how, and what adapters they get."""
    model = config.model
    if model.reference_revision is not None and model.reference is None:
        yield (
            "model.reference_revision needs model.reference: without it the reference is the "
            "policy, of model.revision"
        )
    if model.gguf_file is not None and Path(model.gguf_file).suffix.lower() != ".gguf":
        yield (
            f"model.gguf_file must be the name of a .gguf file in model.policy, not "
            f"'{model.gguf_file}'"
        )
    if model.attn_implementation == "flash_attention_2" and model.dtype == "float32":
        yield (
            "model.attn_implementation: flash_attention_2 computes in half precision only: set "
            "model.dtype: bfloat16"
        )
    if model.float32_logits and model.dtype == "float32":
        yield (
            "model.float32_logits has no effect with model.dtype: float32, in which everything is "
            "computed in float32: leave it out"
        )
    lora = config.lora
    given = {"alpha": lora.alpha, "targets": lora.targets, "rslora": lora.rslora, "dora": lora.dora}
    if lora.rank is None and (keys := [f"lora.{key}" for key, value in given.items() if value]):
        yield (
            f"{' and '.join(keys)} {'needs' if len(keys) == 1 else 'need'} lora.rank: without a "
            "rank there are no adapters"
        )
    if lora.dora and config.parallel.strategy == "fsdp":
        yield (
            "lora.dora cannot be combined with parallel.strategy: fsdp, because the length of a "
            "row is computed from the whole weight; use ddp"
        )
    yield from _quantise_mistakes(config)


def _quantise_mistakes(config: RunConfig) -> Iterator[str]:
    if config.lora.quantise == "none":
        return
    key = f"lora.quantise: {config.lora.quantise}"
    if config.lora.rank is None:
        yield f"{key} needs lora.rank: weights in 4 bits cannot be trained themselves"
    if config.parallel.strategy == "fsdp":
        yield (
            f"{key} cannot be combined with parallel.strategy: fsdp, because packed weights have "
            "no rows to shard; use ddp"
        )
    if config.rollout.uses_vllm:
        yield (
            f"{key} cannot be combined with rollout.engine: {config.rollout.engine}, to which "
            "packed weights cannot be sent; use native"
        )
