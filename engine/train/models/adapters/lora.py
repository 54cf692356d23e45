"""LoRA adapters (Hu et al. 2021) through peft, also rank-stabilised and as DoRA.

peft replaces the linear layers in place, so the model keeps its transformers class and interface.
Adapters are float32 regardless of the model's dtype. Only runs with adapters import peft, which
takes several tenths of a second.
"""

import copy
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from engine.config.sections.model import LoRAConfig
from engine.errors import CheckpointError, UserInputError, first_line
from engine.train.data.randomness import derived_key
from engine.train.distributed.sharding import full_tensor
from engine.train.models.adapters import dora

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

WEIGHTS = "adapter_model.safetensors"
LINEAR = (nn.Linear, Conv1D)
PREFIX = "base_model.model."
"""The prefix of parameter names in peft's files."""


def add_adapters(lm: PreTrainedModel, config: LoRAConfig, *, seed: int, base: str) -> None:
    """Freezes a model and adds adapters to its linear layers; its outputs do not change.

    With DoRA, call :func:`.dora.initialise` once the frozen weights have their final values.

    Args:
        lm: the model, changed in place.
        config: the configuration, with `rank` set.
        seed: determines the initial values of the adapters.
        base: the model's folder or hub id, written to the saved adapters' configuration.

    Raises:
        UserInputError: a target matches no linear layer; the message lists the available ones.
    """
    from peft import LoraConfig, inject_adapter_in_model  # noqa: PLC0415 - slow, see above

    linear = _adaptable_layers(lm)
    for target in config.targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            found = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
            raise UserInputError(
                f"lora.targets: {type(lm).__name__} has no linear layer '{target}'; it has: {found}"
            )
    routers = [n for n, m in lm.named_modules() if isinstance(m, LINEAR) and _is_router(m)]
    adapters = LoraConfig(
        r=config.rank or 0,
        lora_alpha=config.alpha or 0,
        use_rslora=config.rslora,
        use_dora=config.dora,
        target_modules=config.targets or list(linear),
        exclude_modules=routers or None,
        lora_dropout=0.0,  # old and new log-probabilities must come from the same function
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in linear.values()),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )
    try:
        inject_adapter_in_model(adapters, lm)
    except ValueError as error:  # a target also matches layers of other types
        raise UserInputError(f"lora.targets: {first_line(error)}") from error
    for name, layer in _named_layers(lm):
        _initialise(layer, derived_key(seed, f"adapter {name}"))
        if config.dora:
            dora.add_lengths(layer)


def _adaptable_layers(lm: PreTrainedModel) -> dict[str, nn.Module]:
    """The linear layers to which peft adds adapters if it is given their names.

    Where transformers joins the experts of a mixture into one tensor, peft takes the names of the
    layers that they once were, such as `gate_proj`, and `all-linear`, for that tensor, whose
    adapters cannot be merged here. Other layers of these names, as in shared experts, have none
    either: peft would load theirs into the experts.
    """
    from peft import LoraConfig  # noqa: PLC0415 - slow, see above
    from peft.utils.transformers_weight_conversion import (  # noqa: PLC0415
        convert_peft_config_for_transformers,
    )
    from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: PLC0415

    conversions = get_model_conversion_mapping(lm)

    def is_kept(leaf: str) -> bool:
        config = LoraConfig(target_modules=[leaf])
        try:
            convert_peft_config_for_transformers(config, model=lm, conversions=conversions)
        except ValueError:  # one of two layers that are joined
            return False
        return leaf in (config.target_modules or ())

    layers = linear_layers(lm)
    leaves = {name.rpartition(".")[2] for name in layers}
    kept = {leaf for leaf in leaves if is_kept(leaf)}
    return {name: layer for name, layer in layers.items() if name.rpartition(".")[2] in kept}


def linear_layers(lm: nn.Module) -> dict[str, nn.Module]:
    """The layers that can have adapters, by name: all linear layers except the output layer.

    The output layer often shares its weight with the embedding, which a merge would also change.
    Nor can routers of experts that are subclasses of linear layers: they return more than a tensor.
    """
    head = lm.get_output_embeddings() if isinstance(lm, PreTrainedModel) else None
    return {
        n: m
        for n, m in lm.named_modules()
        if isinstance(m, LINEAR) and not _is_router(m) and m is not head
    }


def _is_router(module: nn.Module) -> bool:
    return "router" in type(module).__name__.lower()


def base_layers(lm: nn.Module) -> dict[str, nn.Module]:
    """Like :func:`linear_layers`, but the model may have adapters, whose layers are excluded."""
    adapters = _adapter_prefixes(lm)
    return {n: m for n, m in linear_layers(lm).items() if not n.startswith(adapters)}


def adapted_layers(module: nn.Module) -> "list[LoraLayer]":
    """The layers with adapters; empty for a model that is trained in full."""
    return [layer for _, layer in _named_layers(module)]


@contextmanager
def disabled(layers: "list[LoraLayer]") -> Iterator[None]:
    """Context manager in which the layers compute without their adapters.

    The adapters do not require gradients inside the context; DDP and FSDP2 support this even before
    the first training pass. Takes about 50 µs per layer.
    """
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def base_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The weights under the adapters, with the names they have in a model without adapters."""
    adapters = _adapter_prefixes(module)
    tensors = module.state_dict().items()
    return {k.replace(".base_layer.", "."): v for k, v in tensors if not k.startswith(adapters)}


def mergeable_weights(module: nn.Module) -> "dict[str, tuple[nn.Parameter, LoraLayer | None]]":
    """Returns each weight and its adapter layer, by its name in a model without adapters.

    Also works without adapters. Tied weights appear under each of their names, as the same object.
    """
    layers = {f"{name}.weight": layer for name, layer in _named_layers(module)}
    adapters = _adapter_prefixes(module)
    found = {}
    # keep_vars: tied weights stay one object. FSDP reshards gathered parameters first.
    for key, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, nn.Parameter) and not key.startswith(adapters):
            name = key.replace(".base_layer.", ".")
            found[name] = (tensor, layers.get(name))
    return found


def merged_weight(weight: nn.Parameter, layer: "LoraLayer | None") -> Tensor:
    """Merges a weight with its adapter in float32; unchanged without one.

    The result is W + scale · B·A, with DoRA its rows at their trained lengths.

    In a sharded model the weight is gathered; all ranks must call this in the same order.
    """
    whole = full_tensor(weight.detach())
    if layer is None:
        return whole
    transposed = getattr(layer, "fan_in_fan_out", False)
    change = dora.low_rank_change(layer)
    lengths = dora.row_lengths(layer)
    if lengths is None:
        return whole.float() + (change.T if transposed else change)
    rows = dora.adapted_rows(layer)
    rows *= (lengths.weight.detach() / torch.linalg.vector_norm(rows, dim=1))[:, None]
    return rows.T if transposed else rows


def adapter_tensors(
    lm: nn.Module, state_dict: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The tensors of the adapters, by peft's names.

    Args:
        lm: the model with adapters.
        state_dict: its state dict, if the caller has one already.
    """
    from peft import get_peft_model_state_dict  # noqa: PLC0415 - slow, see above

    # Embeddings never have adapters. With the default, peft would query the hub to find out.
    tensors: dict[str, Tensor] = get_peft_model_state_dict(
        lm, state_dict=state_dict, save_embedding_layers=False
    )
    return tensors


def save_adapter_config(lm: Any, folder: Path) -> None:
    """Writes peft's `adapter_config.json`."""
    config: Any = copy.copy(lm.peft_config["default"])
    config.target_modules = sorted(config.target_modules)  # a set has no stable order
    config.inference_mode = True  # loaded adapters are frozen, as with peft's own save_pretrained
    config.save_pretrained(str(folder))


def save_adapter_weights(tensors: dict[str, Tensor], folder: Path) -> None:
    """Writes :func:`adapter_tensors`, unsharded and on the CPU, in peft's format."""
    named = {PREFIX + k: v.contiguous() for k, v in tensors.items()}
    save_file(named, folder / WEIGHTS, metadata={"format": "pt"})


def load_adapters(lm: PreTrainedModel, folder: Path) -> None:
    """Loads saved adapters into a model that has adapters.

    Raises:
        CheckpointError: the folder holds no adapters, or their names and shapes do not match.
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


def _named_layers(module: nn.Module) -> "list[tuple[str, LoraLayer]]":
    if "peft" not in sys.modules:  # then there can be no adapter layers
        return []
    from peft.tuners.lora import LoraLayer  # noqa: PLC0415 - slow, see above

    return [(name, m) for name, m in module.named_modules() if isinstance(m, LoraLayer)]


def _adapter_prefixes(module: nn.Module) -> tuple[str, ...]:
    """Returns the prefixes of the names of the adapters' modules and tensors."""
    return tuple(
        f"{name}.{part}."
        for name, layer in _named_layers(module)
        for part in layer.adapter_layer_names
    )


def _initialise(layer: "LoraLayer", key: int) -> None:
    """Initialises as peft does (A uniform in ±1/√in, B zero), from a random stream per layer."""
    device = torch.empty(0).device  # the default one: `meta` on ranks that receive the adapters
    # peft uses the layer's dtype for adapters; in bfloat16 small updates would be rounded away.
    inner, outer = (
        # They are on the device of the base layer, which may still be in its file (`meta`).
        part["default"].float().to_empty(device=device).get_parameter("weight")
        for part in (layer.lora_A, layer.lora_B)
    )
    shape = tuple(inner.shape)
    draw = np.random.Generator(np.random.Philox(key=key)).random(shape, dtype=np.float32)
    with torch.no_grad():
        inner.copy_(torch.from_numpy((2 * draw - 1) / math.sqrt(shape[1])))
        outer.zero_()
