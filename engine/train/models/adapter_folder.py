"""Models that are given as adapters of peft, such as the result of SFT by LoRA.

Their base model is loaded and the adapters are merged into it, so that everything else has an
ordinary model. :mod:`engine.train.models.read_pretrained` reads both.
"""

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from engine.config.model_folder import (
    ADAPTER_CONFIG,
    ADAPTER_PICKLE,
    ADAPTER_WEIGHTS,
    TOKENIZER_FILES,
    AdapterBase,
    adapter_base,
    has_tokenizer,
    no_adapter_weights,
)
from engine.errors import UserInputError, first_line
from engine.train.distributed.ranks import one_thread
from engine.train.distributed.stored_tensor import LowRankChange, stored_tensors

log = logging.getLogger("engine")

PREFIX = "base_model.model."
"""The prefix of parameter names in peft's files."""
MERGED = "merged_adapters"
"""Attribute of a model into which adapters were merged: the path of their configuration."""
PLAIN = (True, False, "gaussian", "orthogonal", "eva")
"""Ways to initialise adapters that leave the weights under them as they are."""
HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
"""Names of the last weight of a classifier's head."""


@dataclass(frozen=True)
class Adapters:
    """The files of adapters."""

    source: str
    """A folder or a hub id."""
    key: str
    """The configuration key that names it, for error messages."""
    folder: Path
    """Where the files are; of the hub, in its cache."""
    base: AdapterBase

    @property
    def config(self) -> Path:
        """The file of their configuration."""
        return self.folder / ADAPTER_CONFIG

    @property
    def has_tokenizer(self) -> bool:
        """Whether they come with a tokenizer."""
        return has_tokenizer(self.folder)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors, by name without peft's prefix."""
        with safe_open(self.folder / ADAPTER_WEIGHTS, "pt") as file:
            return {
                name.removeprefix(PREFIX): tuple(file.get_slice(name).get_shape())
                for name in file.keys()  # noqa: SIM118 - not a dictionary
            }

    def labels(self) -> int | None:
        """The number of labels of a classifier whose head is among the tensors; otherwise None."""
        shapes = self.shapes()
        return next((shapes[head][0] for head in HEADS if head in shapes), None)


def find_adapters(source: str, key: str, revision: str | None) -> Adapters | None:
    """Returns the adapters that a folder or a repository holds; None if it holds none.

    Raises:
        UserInputError: their weights are a pickle or missing, or their base model is unknown.
    """
    config = find_adapter_config_file(source, revision=revision)
    if config is None:
        return None
    folder = Path(config).parent
    local = Path(source).is_dir()
    for name in () if local else (ADAPTER_WEIGHTS, *TOKENIZER_FILES):  # into the hub's cache
        cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        pickle = local and (folder / ADAPTER_PICKLE).is_file()
        raise UserInputError(no_adapter_weights(key, source, pickle=pickle))
    return Adapters(source, key, folder, adapter_base(Path(config), source, key))


def merge_adapters(model: Any, adapters: Adapters) -> Any:
    """Merges adapters into their base model, by peft.

    Args:
        model: the base model in float32, changed in place.
        adapters: of any kind that peft can merge.

    Returns:
        The model, of its transformers class.

    Raises:
        UserInputError: they cannot be merged, or are not adapters of this model. peft raises almost
            any type of exception.
    """
    # With another number of threads a resume would find that the model has changed.
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tied weights, which are checked here
        try:
            merged = _merge(model, adapters)
        except (UserInputError, MemoryError):
            raise
        except Exception as error:
            raise _unusable(adapters, f"they cannot be merged: {first_line(error)}") from error
    vars(merged)[MERGED] = adapters.config
    log.info("load: the adapters in %s are merged into %s", adapters.source, adapters.base.name)
    return merged.requires_grad_(True)


def _merge(model: Any, adapters: Adapters) -> Any:
    from peft import PeftConfig, PeftModel  # noqa: PLC0415 - slow

    config = PeftConfig.from_pretrained(str(adapters.folder))
    if config.is_prompt_learning:
        raise _unusable(adapters, f"a model cannot hold prompts ({config.peft_type.value})")
    _resize_embeddings(model, adapters)
    tied = _are_tied(model)
    wrapped = PeftModel(model, config)
    try:
        result = wrapped.load_adapter(str(adapters.folder), "default", torch_device="cpu")
    except RuntimeError as error:  # other shapes
        raise _unusable(adapters, f"they do not fit the model: {_shapes(error)}") from error
    if wrong := [*result.missing_keys, *result.unexpected_keys]:
        raise _unusable(adapters, f"they do not fit the model, for example {wrong[0]}")
    if tied:
        _check_tied(model, adapters)
    merged = wrapped.merge_and_unload(safe_merge=True)
    if tied:
        _tie_again(merged, adapters)
    return merged


def _shapes(error: RuntimeError) -> str:
    """The first mismatch in the message of `load_state_dict`, which lists them all."""
    lines = str(error).splitlines()
    return lines[min(1, len(lines) - 1)].strip()


def low_rank_changes(model: Any, adapters: Adapters) -> dict[str, LowRankChange] | None:
    """What adapters add to each weight, to be merged by every rank into its rows.

    Args:
        model: the base model on the meta device; of no use any more if the result is None.
        adapters: to be merged.

    Returns:
        By the name of the parameter; None for any but the plain adapters of linear layers, and for
        those that cannot be used, about which :func:`merge_adapters` raises.
    """
    from peft import LoraConfig, PeftConfig, PeftModel  # noqa: PLC0415 - slow
    from peft.tuners.lora import Linear, LoraLayer  # noqa: PLC0415 - slow

    found = {}
    try:
        stored = stored_tensors(adapters.folder / ADAPTER_WEIGHTS)
        config = PeftConfig.from_pretrained(str(adapters.folder))
        # The others begin with other weights under the adapters.
        if not isinstance(config, LoraConfig) or config.init_lora_weights not in PLAIN:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = PeftModel(model, config)
        for name, layer in model.named_modules():
            if not isinstance(layer, LoraLayer):
                continue
            if type(layer) is not Linear or layer.lora_variant:
                return None
            first, second = (stored.pop(f"{PREFIX}{name}.lora_{part}.weight") for part in "AB")
            for part, wanted in ((first, layer.lora_A), (second, layer.lora_B)):
                shape: Any = wanted["default"].weight.shape
                if part.shape != tuple(shape) or not part.read().isfinite().all():
                    return None
            found[f"{name}.weight"] = LowRankChange(
                first, second, layer.scaling["default"], layer.fan_in_fan_out
            )
        wrapped.unload().requires_grad_(True)
    except Exception as error:  # merge_adapters explains it
        log.info("load: the adapters in %s: %s", adapters.source, first_line(error))
        return None
    return None if stored else found


def _unusable(adapters: Adapters, reason: str) -> UserInputError:
    return UserInputError(
        f"{adapters.key}: the adapters in {adapters.source} for {adapters.base.name}: {reason}"
    )


def _resize_embeddings(model: Any, adapters: Adapters) -> None:
    """Gives a model the number of tokens for which there are embeddings among the adapters."""
    embedding = model.get_input_embeddings()
    name = next(n for n, module in model.named_modules() if module is embedding)
    shapes = adapters.shapes()
    rows = shapes.get(f"{name}.weight", tuple(embedding.weight.shape))[0]
    if rows == len(embedding.weight):
        return
    head = model.get_output_embeddings()
    if head is not None and not _are_tied(model):
        output = next(n for n, module in model.named_modules() if module is head)
        if f"{output}.weight" not in shapes:
            raise _unusable(adapters, f"they have {rows} embeddings, and no {output} for them")
    model.resize_token_embeddings(rows, mean_resizing=False)


def _are_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _check_tied(model: Any, adapters: Adapters) -> None:
    """Refuses low-rank adapters of one of two tied layers: a merge would change both."""
    from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: PLC0415 - slow

    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    if any(isinstance(layer, BaseTunerLayer) for layer in layers):
        raise _unusable(
            adapters,
            "they change the embedding or the output layer, which share a weight in the model: "
            "untie the two first, and train the adapters again",
        )


def _tie_again(model: Any, adapters: Adapters) -> None:
    """Ties two layers that peft has replaced by copies."""
    first, second = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if first is not second and not torch.equal(first, second):
        raise _unusable(
            adapters,
            "they hold an embedding and an output layer that differ, and the two share a weight in "
            "the model: merge them with peft into an untied model",
        )
    model.config.tie_word_embeddings = True
    model.tie_weights()


def cast(model: Any, dtype: torch.dtype) -> Any:
    """Converts the parameters like `from_pretrained` with that dtype; buffers stay as they are."""
    wide = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    for name, parameter in model.named_parameters():
        if not wide.intersection(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model
