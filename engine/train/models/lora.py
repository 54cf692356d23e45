"""LoRA: small trained matrices beside frozen linear layers (Hu et al. 2021), by peft.

The layers are replaced in place, so the model stays the transformers model it was, entered and
asked for its head like any other. Adapters are float32 whatever the model's dtype.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from engine.config.schema import LoRAConfig
from engine.errors import CheckpointError, UserInputError
from engine.train.data.randomness import derived_key

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What peft's files have before a parameter's own name."""


def add_adapters(lm: PreTrainedModel, config: LoRAConfig, *, seed: int, base: str) -> None:
    """Freezes a model and puts adapters beside its linear layers; what it computes is unchanged.

    Args:
        lm: changed in place.
        config: with a rank.
        seed: decides the adapters' first values, and nothing else does.
        base: the model's folder or hub id, which the saved adapters name.

    Raises:
        UserInputError: a target names no linear layer; says which there are.
    """
    linear = linear_layers(lm)
    for target in config.targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            there = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
            raise UserInputError(
                f"lora.targets: {type(lm).__name__} has no linear layer '{target}'; it has: {there}"
            )
    adapters = LoraConfig(
        r=config.rank or 0,
        lora_alpha=config.alpha or 0,
        target_modules=config.targets or "all-linear",
        lora_dropout=0.0,  # old and new log-probabilities must be of the same function
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in linear.values()),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )
    try:
        inject_adapter_in_model(adapters, lm)
    except ValueError as error:  # a name that fits other kinds of layers as well
        raise UserInputError(f"lora.targets: {str(error).splitlines()[0]}") from error
    for name, layer in _named_layers(lm):
        _initialise(layer, derived_key(seed, f"adapter {name}"))


def linear_layers(lm: nn.Module) -> dict[str, nn.Module]:
    """What can have adapters, by name: every linear layer but the output's.

    The output layer often is the embedding's own matrix, which a merge would change with it.
    """
    head = lm.get_output_embeddings() if isinstance(lm, PreTrainedModel) else None
    kinds = (nn.Linear, Conv1D)
    return {n: m for n, m in lm.named_modules() if isinstance(m, kinds) and m is not head}


def adapted_layers(module: nn.Module) -> list[LoraLayer]:
    """The layers with adapters; none in a model that is trained in full."""
    return [layer for _, layer in _named_layers(module)]


@contextmanager
def switched_off(layers: list[LoraLayer]) -> Iterator[None]:
    """The layers compute what they did without adapters, until this is left, however it is left.

    The adapters are frozen meanwhile, which DDP and FSDP2 bear also before their first training
    pass. About 50 µs a layer.
    """
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def base_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The weights without the adapters, by the names they had before there were any."""
    adapters = tuple(
        f"{name}.{part}."
        for name, layer in _named_layers(module)
        for part in layer.adapter_layer_names
    )
    tensors = module.state_dict().items()
    return {k.replace(".base_layer.", "."): v for k, v in tensors if not k.startswith(adapters)}


def adapter_tensors(
    lm: nn.Module, state_dict: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The adapters' own, by peft's names; `state_dict` is the model's, where there is one."""
    # Embeddings are never adapted; asked to find out for itself, peft would ask the hub.
    found: dict[str, Tensor] = get_peft_model_state_dict(
        lm, state_dict=state_dict, save_embedding_layers=False
    )
    return found


def save_adapter_config(lm: Any, folder: Path) -> None:
    """Writes peft's description of the adapters."""
    config: Any = copy.copy(lm.peft_config["default"])
    config.target_modules = sorted(config.target_modules)  # a set, in another order each time
    config.inference_mode = True  # those who load it get it frozen, as from peft itself
    config.save_pretrained(str(folder))


def save_adapter_weights(tensors: dict[str, Tensor], folder: Path) -> None:
    """Writes :func:`adapter_tensors`, whole and on the CPU, as peft and transformers load them."""
    named = {PREFIX + k: v.contiguous() for k, v in tensors.items()}
    save_file(named, folder / WEIGHTS, metadata={"format": "pt"})


def load_adapters(lm: PreTrainedModel, folder: Path) -> None:
    """Puts saved adapters in place of those a model has, bit for bit.

    Raises:
        CheckpointError: the folder holds none, or such as fit another model or configuration.
    """
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder} holds no adapters, but lora.rank is set")
    saved = {k.removeprefix(PREFIX): v for k, v in load_file(folder / WEIGHTS).items()}
    ours = adapter_tensors(lm)
    if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in ours.items()}:
        raise CheckpointError(f"{folder} holds adapters of another model, rank or targets")
    with torch.no_grad():
        for name, tensor in saved.items():
            ours[name].copy_(tensor)


def _named_layers(module: nn.Module) -> list[tuple[str, LoraLayer]]:
    return [(name, m) for name, m in module.named_modules() if isinstance(m, LoraLayer)]


def _initialise(layer: LoraLayer, key: int) -> None:
    """As peft does (A uniform in ±1/√in, B zero), from a random stream of the layer's own."""
    # peft gives adapters the dtype of their layer; in bfloat16 small updates would be rounded away.
    inner, outer = (
        part["default"].float().get_parameter("weight") for part in (layer.lora_A, layer.lora_B)
    )
    shape = tuple(inner.shape)
    draw = np.random.Generator(np.random.Philox(key=key)).random(shape, dtype=np.float32)
    with torch.no_grad():
        inner.copy_(torch.from_numpy((2 * draw - 1) / math.sqrt(shape[1])))
        outer.zero_()
