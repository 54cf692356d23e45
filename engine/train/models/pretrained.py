"""Loads models and tokenizers from folders and the hub; rank 0 reads and broadcasts them."""

import copy
import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from engine import starter
from engine.config.schema import RunConfig
from engine.config.sections.reward import RewardSource
from engine.errors import UserInputError
from engine.progress import BeginPart, no_progress
from engine.train.data.chat_template import read_chat_template
from engine.train.distributed.broadcast_files import broadcast_files, without_weights
from engine.train.distributed.ranks import RankGroup
from engine.train.distributed.sharding import place_model
from engine.train.models.activations.offloaded import OffloadedActivations
from engine.train.models.activations.recomputed import recompute_products
from engine.train.models.adapters import dora, lora
from engine.train.models.adapters.quantised_linear import quantise
from engine.train.models.cpu_layers import use_cpu_layers
from engine.train.models.fused_kernels import use_fused_kernels
from engine.train.models.language_model import (
    AdapterFreePolicy,
    AnyModel,
    LanguageModel,
    cache_name,
)
from engine.train.models.mixed_precision import keep_hidden_states_float32
from engine.train.models.read_pretrained import NO_OPTIONS, ReadOptions, read_pretrained
from engine.train.models.stored_weights import StoredModel, empty_model, share_stored

DROPOUT_BEFORE = "dropout_before"
"""Attribute of a loaded model's configuration: its file's original dropout values, by key."""


def load_policy(
    config: RunConfig,
    source: str,
    ranks: RankGroup,
    strategy: str,
    value_model: tuple[nn.Module, nn.Linear] | None = None,
    begin: BeginPart = no_progress,
) -> LanguageModel:
    """Loads the trainable policy, with a value function if the advantage estimator needs one.

    Trained weights are float32. With `lora.rank` only the adapters and the value head are trained,
    and the frozen weights are stored in `model.dtype`, or as `lora.quantise` says; a separate value
    trunk has its own copy.

    Args:
        config: the configuration of the run.
        source: the model to start from, or a checkpoint's `policy/` folder.
        ranks: all ranks of this attempt.
        strategy: `ddp` or `fsdp`.
        value_model: trunk and head of a separate value function, if it does not start from the
            policy.
        begin: called when a part begins that can take minutes.

    Raises:
        UserInputError: the model or the adapters' targets cannot be used.
        CheckpointError: the checkpoint's adapters are missing or do not match the configuration.
    """
    has_value = config.trained_value is not None
    value = config.model.value if has_value else None
    adapted = config.lora.rank is not None
    base = starter.resolve(config.model.policy) if adapted else source
    dtype = compute_dtype(config) if adapted else torch.float32
    read, sharded = policy_options(config, base), shards_weights(ranks, strategy)
    lm = load_lm(base, "model.policy", ranks, dtype, read, sharded=sharded)
    if config.model.kernels == "liger":
        use_fused_kernels(lm, ranks.device)
    with without_weights(ranks):
        if adapted:
            lora.add_adapters(lm, config.lora, seed=config.seed, base=base)
            quantise(lm, config.lora, begin)
            dora.initialise(lora.adapted_layers(lm))
            if source != base and ranks.is_lead:
                lora.load_adapters(lm, Path(source))
        policy = LanguageModel(lm, value, compute_dtype(config))
        if value_model is not None:
            policy.value_trunk, policy.value_head = value_model
        elif value == "separate":
            trunk = _load_trunk(base, lm, ranks, dtype, read, sharded=sharded)
            if adapted:
                lora.add_adapters(trunk, config.lora, seed=config.seed, base=base)
                quantise(trunk, config.lora, begin)
                dora.initialise(lora.adapted_layers(trunk))
            policy.value_trunk = trunk
    policy.cast_experts()
    if config.parallel.activation_checkpointing:
        _checkpoint_activations(policy)
    else:
        recompute_products(policy)
    if config.parallel.activations == "offload":
        policy.offloaded = OffloadedActivations(lm.get_output_embeddings().in_features)
    place_model(_disable_dropout(policy), ranks, strategy, compute_dtype(config))
    use_cpu_layers(policy, ranks)
    if config.model.float32_logits:
        policy.output.use_float32()
    return policy


def load_reference(
    config: RunConfig, policy: LanguageModel, ranks: RankGroup, strategy: str
) -> AnyModel:
    """Loads the frozen reference: `model.reference`, or the initial policy by default.

    With LoRA, a reference that is the same model as the policy shares the policy's weights.
    """
    if config.lora.rank is not None and config.model.reference_is_policy:
        return AdapterFreePolicy(policy)
    name = config.model.reference or config.model.policy
    key = "model.reference" if config.model.reference else "model.policy"
    dtype = compute_dtype(config)
    source, sharded = starter.resolve(name), shards_weights(ranks, strategy)
    read = policy_options(config, source)
    if config.model.reference is not None:
        read = replace(read, revision=config.model.reference_revision, gguf_file=None)
    lm = load_lm(source, key, ranks, dtype, read, sharded=sharded)
    if config.model.kernels == "liger":
        use_fused_kernels(lm, ranks.device)
    if dtype is not torch.float32 and not sharded:
        keep_hidden_states_float32(lm)
    reference = LanguageModel(lm, compute=dtype)
    reference.requires_grad_(False)
    on_host = config.parallel.frozen == "offload"
    place_model(_disable_dropout(reference), ranks, strategy, dtype, frozen=True, on_host=on_host)
    use_cpu_layers(reference, ranks)
    if config.model.float32_logits:
        reference.output.use_float32()
    return reference


def compute_dtype(config: RunConfig) -> torch.dtype:
    """The torch dtype for `model.dtype`."""
    return torch.bfloat16 if config.model.dtype == "bfloat16" else torch.float32


def policy_options(config: RunConfig, source: str) -> ReadOptions:
    """Returns the options to read the policy as configured, or from a checkpoint's folder."""
    model = config.model
    original = source == starter.resolve(model.policy)
    return ReadOptions(
        revision=model.revision if original else None,
        gguf_file=model.gguf_file if original else None,
        trust_remote_code=model.trust_remote_code,
        attn_implementation=model.attn_implementation,
    )


def reward_options(source: RewardSource) -> ReadOptions:
    """Returns the options to read a reward model."""
    return ReadOptions(revision=source.revision, trust_remote_code=source.trust_remote_code)


def shards_weights(ranks: RankGroup, strategy: str) -> bool:
    """Whether models are sharded, so that each rank reads its own part."""
    return ranks.size > 1 and strategy == "fsdp"


def load_lm(
    source: str,
    key: str,
    ranks: RankGroup,
    dtype: torch.dtype = torch.float32,
    read: ReadOptions = NO_OPTIONS,
    *,
    sharded: bool = False,
) -> PreTrainedModel:
    """Loads a causal language model on rank 0; the other ranks build it on the meta device.

    Args:
        source: a folder or a hub id.
        key: the configuration key that names the model, for error messages.
        ranks: all ranks; all must call this.
        dtype: dtype of the weights.
        read: how it is read.
        sharded: whether the model is going to be sharded.

    Returns:
        The model. Place it (:func:`engine.train.distributed.sharding.place_model`) before using
        it: where that is possible, its weights are still in their files.

    Raises:
        UserInputError: the model cannot be loaded or used.
    """
    lm, stored = None, None
    if ranks.is_lead:
        lm, stored = read_model(AutoModelForCausalLM, source, key, dtype, read)
        _check_usable(lm, key)
    with broadcast_files(ranks, *((lm.config, lm.generation_config) if lm else ())) as folder:
        if lm is None:
            with without_weights(ranks):
                config = read_shape(source, folder, key, read)
                lm = AutoModelForCausalLM.from_config(
                    config,
                    dtype=dtype,
                    trust_remote_code=read.trust_remote_code,
                    **read.of_model(),
                )
            lm.generation_config = GenerationConfig.from_pretrained(folder)
    share_stored(lm, stored, ranks, sharded=sharded)
    return lm


def read_shape(source: str, received: Path, key: str, read: ReadOptions) -> Any:
    """Reads, on a rank other than 0, the configuration that rank 0 has broadcast.

    For a model with custom code it is read from the source, where the code is.
    """
    if read.trust_remote_code:
        return read_pretrained(AutoConfig, source, key, "configuration", read)
    return read_pretrained(AutoConfig, str(received), key, "configuration")


def read_model(
    kind: Any,
    source: str,
    key: str,
    dtype: torch.dtype,
    read: ReadOptions,
) -> tuple[Any, StoredModel | None]:
    """Builds a model on rank 0 and locates its weights, or reads it whole.

    Args:
        kind: one of the Auto classes.
        source: a folder or a hub id.
        key: the configuration key that names the source, for error messages.
        dtype: dtype of the weights.
        read: how it is read.

    Returns:
        The model, and where its weights are, for `share_stored`; None if it holds them.

    Raises:
        UserInputError: the model cannot be loaded.
    """
    if (empty := empty_model(kind, source, key, dtype, read)) is not None:
        return empty
    return copy_weights(read_pretrained(kind, source, key, read=read, dtype=dtype)), None


def _check_usable(lm: PreTrainedModel, key: str) -> None:
    if lm.config.model_type == "cpmant":  # also fails in transformers' own `generate`
        raise UserInputError(
            f"{key}: {type(lm).__name__} cannot be used, it cannot generate with a key-value "
            "cache: choose another model"
        )
    parameters = inspect.signature(lm.forward).parameters
    for needed in (cache_name(parameters), "logits_to_keep"):
        if needed not in parameters:
            raise UserInputError(f"{key}: {type(lm).__name__} cannot be used, it has no {needed}")


def _load_trunk(
    source: str,
    lm: PreTrainedModel,
    ranks: RankGroup,
    dtype: torch.dtype,
    read: ReadOptions,
    *,
    sharded: bool,
) -> Any:
    trunk, stored = None, None
    if ranks.is_lead:
        trunk, stored = read_model(AutoModel, source, "model.policy", dtype, read)
    else:
        trunk = AutoModel.from_config(
            lm.config, dtype=dtype, trust_remote_code=read.trust_remote_code, **read.of_model()
        )
    share_stored(trunk, stored, ranks, sharded=sharded)
    return trunk


def load_policy_tokenizer(
    config: RunConfig, source: str, ranks: RankGroup
) -> PreTrainedTokenizerBase:
    """Loads the policy's tokenizer, with `data.chat_template` if that is given.

    All ranks must call it.

    Args:
        config: the configuration of the run.
        source: the policy's folder or hub id, or a checkpoint's `policy/` folder.
        ranks: all ranks.

    Raises:
        UserInputError: the tokenizer or the template cannot be read.
    """
    tokenizer = load_tokenizer(source, "model.policy", ranks, policy_options(config, source))
    template = b""
    if ranks.is_lead and config.data.chat_template is not None:
        template = read_chat_template(config.data.chat_template).encode()
    if template := ranks.broadcast_bytes(template):
        tokenizer.chat_template = template.decode()
    return tokenizer


def load_tokenizer(
    source: str, key: str, ranks: RankGroup, read: ReadOptions = NO_OPTIONS
) -> PreTrainedTokenizerBase:
    """Loads a tokenizer on rank 0 and broadcasts it; all ranks must call it.

    Raises:
        UserInputError: the tokenizer cannot be loaded.
    """
    tokenizer = None
    if ranks.is_lead:
        tokenizer = read_pretrained(AutoTokenizer, source, key, "tokenizer", read)
    with broadcast_files(ranks, tokenizer) as folder:
        if tokenizer is not None:
            return tokenizer
        if read.trust_remote_code:  # its code is not among the broadcast files
            return read_pretrained(AutoTokenizer, source, key, "tokenizer", read)
        return read_pretrained(AutoTokenizer, str(folder), key, "tokenizer")


def eos_ids(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the sorted ids of all tokens that end a response; chat models have several."""
    eos = getattr(lm.generation_config, "eos_token_id", None)
    ids = eos if isinstance(eos, list) else [eos]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


def save_configs(lm: PreTrainedModel, folder: str) -> None:
    """Writes a model's configuration and generation configuration for transformers to read."""
    config = copy.deepcopy(lm.config)
    vars(config).update(vars(config).pop(DROPOUT_BEFORE, {}))
    config.dtype = str(next(lm.parameters()).dtype).removeprefix("torch.")
    # fully_shard prefixes the name of the class.
    config.architectures = [type(lm).__name__.removeprefix("FSDP")]
    config.save_pretrained(folder)
    if lm.can_generate():
        lm.generation_config.save_pretrained(folder)


def copy_weights(module: nn.Module) -> Any:
    """Copies the weights from the mapped file to memory.

    `from_pretrained` maps them at unaligned offsets, which selects other kernels: products of one
    row would then differ in the last bit between a first run and a resumed one.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return module


def _disable_dropout(module: LanguageModel) -> LanguageModel:
    """Sets every dropout to 0: old and new log-probabilities must come from the same function."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name, value in vars(part).items():
            # Floats that a forward pass reads in training mode: dropout and layer drop.
            if "drop" in name and isinstance(value, float):
                vars(part)[name] = 0.0
    for model in (module.lm, module.value_trunk):
        if isinstance(model, PreTrainedModel):
            _disable_dropout_of_config(model.config)
    return module.eval()


def _disable_dropout_of_config(config: PretrainedConfig) -> None:
    """Sets dropout to 0 in the configuration, where falcon and gpt_neo layers read it at run time.

    :func:`save_configs` writes the original values.
    """
    found = {k: v for k, v in vars(config).items() if "drop" in k and isinstance(v, float) and v}
    if found:
        vars(config).update(dict.fromkeys(found, 0.0))
        vars(config)[DROPOUT_BEFORE] = found


def _checkpoint_activations(policy: LanguageModel) -> None:
    """Enables activation checkpointing, which takes effect in training mode only."""
    settings = {"use_reentrant": False}
    for part in (policy.lm, policy.value_trunk):
        if not isinstance(part, PreTrainedModel):
            continue
        if hasattr(part, "activation_checkpointing_enable"):  # since transformers 5.23
            part.activation_checkpointing_enable(settings)
        else:
            part.gradient_checkpointing_enable(settings)
