"""Builds models whose weights stay in their files until they are placed on a device.

:func:`empty_model` builds a model on the meta device on rank 0, :func:`share_stored` tells the
other ranks where the weights are if each of them reads its own shards, and
:func:`engine.train.distributed.sharding.place_model` reads them. So host memory never holds the
whole of a model that is sharded, that is on a GPU, or whose weights are packed in 4 bits.

This works for models whose parameters are stored under their own names. If transformers has to
convert tensors (joining experts into one tensor, quantised weights) or initialise some, or if the
model computes buffers from its parameters, :func:`empty_model` returns None and rank 0 reads the
whole model.
"""

import copy
import dataclasses
import logging
from pathlib import Path
from typing import Any

import msgspec
import torch
from accelerate import init_empty_weights
from msgspec.structs import replace
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils.hub import cached_file

from engine.config.model_folder import ADAPTER_WEIGHTS
from engine.errors import UserInputError, first_line
from engine.examined import examined
from engine.train.distributed.ranks import RankGroup
from engine.train.distributed.stored_tensor import (
    StoredTensor,
    file_digest,
    mark_stored,
    stored_tensors,
)
from engine.train.models.adapter_folder import (
    MERGED,
    Adapters,
    find_adapters,
    low_rank_changes,
)
from engine.train.models.read_pretrained import (
    NO_OPTIONS,
    ReadOptions,
    check_weights,
    read_pretrained,
)

log = logging.getLogger("engine")

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class StoredModel(msgspec.Struct, frozen=True):
    """The location of a model's weights."""

    tensors: dict[str, StoredTensor]
    """By parameter name; only the first of tied parameters."""
    digests: dict[str, str]
    """Path → :func:`file_digest` on rank 0."""


def empty_model(
    kind: Any, source: str, key: str, dtype: torch.dtype, read: ReadOptions = NO_OPTIONS
) -> tuple[Any, StoredModel] | None:
    """Builds a model with its parameters on the meta device; buffers have their values.

    Call it on rank 0, then :func:`share_stored` on all.

    Args:
        kind: one of the Auto classes.
        source: a folder or a hub id.
        key: the configuration key that names the source, for error messages.
        dtype: dtype of the parameters.
        read: how it is read. Custom code and GGUF files are left to transformers.

    Returns:
        The model and where its weights are; None if transformers has to read it.

    Raises:
        UserInputError: the model cannot be loaded.
    """
    if read.trust_remote_code or read.gguf_file is not None:
        return None
    if (adapters := find_adapters(source, key, read.revision)) is not None:
        return _empty_adapted(kind, adapters, key, dtype, read)
    check_weights(source, key)
    try:
        found = _located(kind, source, key, dtype, read)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # Almost any type. If the model cannot be loaded at all, transformers will report that too.
        log.info("load: rank 0 reads all of %s: %s", source, first_line(error))
        return None
    if found is None:
        log.info("load: rank 0 reads all of %s: its tensors are converted or computed", source)
    return found


def _located(
    kind: Any, source: str, key: str, dtype: torch.dtype, read: ReadOptions
) -> tuple[Any, StoredModel] | None:
    """The result of :func:`empty_model` for a model without adapters; raises anything."""
    config = read_pretrained(AutoConfig, source, key, "configuration", read)
    files = _weight_files(source, read.revision)
    model = _on_meta(kind, config, dtype, read)
    stored = {name: t for f in files for name, t in stored_tensors(f).items()}
    found = _by_parameter(model, stored, dtype)
    if found is None or not _has_exact_constants(model, kind, dtype, read):
        return None
    if any(buffer.is_meta for buffer in model.buffers()):  # computed from parameters
        return None
    if not all(parameter.is_meta for parameter in model.parameters()):  # would keep random values
        return None
    for name, buffer in model.named_buffers():
        if name in found:
            buffer.copy_(found.pop(name).read())
    if model.can_generate():
        _read_generation_config(model, source, read.revision)
    return model.eval(), StoredModel(found, {str(f): file_digest(f) for f in files})


def _on_meta(kind: Any, config: Any, dtype: torch.dtype, read: ReadOptions) -> Any:
    """Builds a model with its parameters on the meta device; raises anything."""
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("its weights are quantised")
    with init_empty_weights(include_buffers=False):
        model = kind.from_config(config, dtype=dtype, trust_remote_code=False, **read.of_model())
    model.tie_weights()  # every registration has created a separate parameter
    return model


def _has_exact_constants(model: Any, kind: Any, dtype: torch.dtype, read: ReadOptions) -> bool:
    """Whether float32 buffers do not depend on the model's dtype.

    GPT-J computes its positions in the dtype in which it is built, then stores them as float32;
    `from_pretrained` computes them again.
    """
    if dtype is torch.float32:
        return True
    exact = _on_meta(kind, copy.deepcopy(model.config), torch.float32, read)
    pairs = zip(model.buffers(), exact.buffers(), strict=True)
    return all(b.dtype != e.dtype or torch.equal(b, e) for b, e in pairs)


def _empty_adapted(
    kind: Any, adapters: Adapters, key: str, dtype: torch.dtype, read: ReadOptions
) -> tuple[Any, StoredModel] | None:
    """Like :func:`empty_model`; each rank merges the adapters into the rows that it reads."""
    whole = AutoModelForCausalLM if kind is AutoModel else kind
    of_base = dataclasses.replace(read, revision=adapters.base.revision)
    try:
        found = empty_model(whole, adapters.base.name, key, dtype, of_base)
    except UserInputError:  # explained when rank 0 reads it
        found = None
    if found is None:
        return None
    model, stored = found
    changes = low_rank_changes(model, adapters)
    if changes is None or not changes.keys() <= stored.tensors.keys():
        log.info("load: rank 0 reads all of %s: peft merges its adapters", adapters.source)
        return None
    tensors = dict(stored.tensors)
    for name, change in changes.items():
        tensors[name] = replace(tensors[name], changes=(*tensors[name].changes, change))
    file = adapters.folder / ADAPTER_WEIGHTS
    digests = stored.digests | {str(file): file_digest(file)}
    if kind is AutoModel:
        prefix = f"{model.base_model_prefix}."
        tensors = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        model = model.base_model
    vars(model)[MERGED] = adapters.config
    log.info("load: each rank merges the adapters in %s into its shards", adapters.source)
    return model, StoredModel(tensors, digests)


def share_stored(
    model: nn.Module, stored: StoredModel | None, ranks: RankGroup, *, sharded: bool
) -> None:
    """Marks a model's parameters with the locations that :func:`empty_model` has found.

    All ranks must call it. Of a model that is going to be sharded, every rank reads its own shards
    if all ranks have the same files, which may not be the case on other machines. Otherwise rank 0
    reads and sends one tensor at a time.

    Args:
        model: on the meta device, on every rank.
        stored: on rank 0; None if it has read the whole model.
        ranks: all ranks of this attempt.
        sharded: whether the model is going to be sharded.
    """
    if not sharded:
        if stored is not None:
            _mark(model, stored, on_every_rank=False)
        return
    with torch.device("cpu"):  # the caller may be building modules on the meta device
        data = ranks.broadcast_bytes(msgspec.msgpack.encode(stored) if ranks.is_lead else b"")
        shared = msgspec.msgpack.decode(data, type=examined(StoredModel | None))
        if shared is None:
            return
        same = all(file_digest(Path(path)) == digest for path, digest in shared.digests.items())
        answers = ranks.all_gather_bytes(b"1" if same else b"0")
    everywhere = all(answer == b"1" for answer in answers)
    if not everywhere:
        log.info("load: rank 0 reads the weights for all, since others do not have the files")
    _mark(model, shared, on_every_rank=everywhere)


def _mark(model: nn.Module, stored: StoredModel, *, on_every_rank: bool) -> None:
    parameters = dict(model.named_parameters())
    for name, tensor in stored.tensors.items():
        found = replace(tensor, on_every_rank=on_every_rank).with_versions()
        mark_stored(parameters[name], found)


def _weight_files(source: str, revision: str | None) -> list[Path]:
    """The files of a model's weights, downloaded if needed. Raises OSError or ValueError."""
    single = _find(source, ONE_FILE, revision)
    if single is not None:
        return [single]
    index = _find(source, INDEX, revision)
    if index is None:
        raise ValueError(f"it has neither {ONE_FILE} nor {INDEX}")
    names = sorted(set(msgspec.json.decode(index.read_bytes())["weight_map"].values()))
    return [Path(str(cached_file(source, name, revision=revision))) for name in names]


def _find(source: str, name: str, revision: str | None) -> Path | None:
    """A file of a folder or of the hub; None if it does not exist."""
    folder = Path(source)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    try:
        return Path(str(cached_file(source, name, revision=revision)))
    except OSError:
        return None


def _by_parameter(
    model: PreTrainedModel, stored: dict[str, StoredTensor], dtype: torch.dtype
) -> dict[str, StoredTensor] | None:
    """Assigns stored tensors to parameters and persistent buffers; None if not one to one."""
    if _is_converted(model, list(stored)):
        return None
    kept_wide = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    if dtype is not torch.float32 and any(getattr(model, name, None) for name in kept_wide):
        return None
    wanted = model.state_dict(keep_vars=True)
    prefix = f"{model.base_model_prefix}."
    names: dict[int, str] = {}
    for name, tensor in wanted.items():
        names.setdefault(id(tensor), name)
    found: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        for candidate in (name, prefix + name, name.removeprefix(prefix)):
            if candidate in wanted:
                first = names[id(wanted[candidate])]
                if first in found:  # both of a tied pair are stored, and might differ
                    return None
                found[first] = tensor
                break
    complete = found.keys() == set(names.values())
    return found if complete and all(_fits(wanted[n], t) for n, t in found.items()) else None


def _fits(target: Tensor, stored: StoredTensor) -> bool:
    return tuple(target.shape) == stored.shape


def _is_converted(model: PreTrainedModel, names: list[str]) -> bool:
    """Whether transformers renames or converts tensors of these names when it loads the model."""
    rules = _conversions(model)
    if rules is None:
        return True
    return any(rule.rename_source_key(name)[1] is not None for rule in rules for name in names)


def joins_tensors(model: PreTrainedModel) -> bool:
    """Whether files of this architecture may have tensors that transformers joins: experts."""
    rules = _conversions(model)
    return rules is None or any(hasattr(rule, "operations") for rule in rules)


def _conversions(model: PreTrainedModel) -> list[Any] | None:
    """The rules of transformers for the tensors of a model; None if its version has none."""
    try:
        from transformers.conversion_mapping import (  # noqa: PLC0415 - not in every version
            get_model_conversion_mapping,
        )
    except ImportError:
        return None
    return list(get_model_conversion_mapping(model))


def _read_generation_config(model: PreTrainedModel, source: str, revision: str | None) -> None:
    """Reads it like `from_pretrained`; without the file, keeps the model configuration's values."""
    if _find(source, "generation_config.json", revision) is not None:
        model.generation_config = GenerationConfig.from_pretrained(
            source, revision=revision or "main"
        )
