"""Reads models, their configurations and tokenizers from folders and the hub.

A source may hold adapters (:mod:`engine.train.models.adapter_folder`): what is read then is their
base model with the adapters merged, its configuration, or the tokenizer of either.

All reads go through :func:`read_pretrained`: custom code runs only if the user allows it, no pickle
is loaded, and any problem is reported to the user in one sentence.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from engine.config.model_folder import folder_error
from engine.errors import UserInputError, first_line
from engine.train.models.adapter_folder import Adapters, cast, find_adapters, merge_adapters

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""File extensions of weights stored in pickles."""
ABOUT_ATTENTION = re.compile(r"(?i)flash.?attention|flash_attn|attention implementation")
"""In transformers' errors about `attn_implementation`."""


@dataclass(frozen=True)
class ReadOptions:
    """How a model, its configuration and its tokenizer are read."""

    revision: str | None = None
    """Branch, tag or commit on the hub."""
    gguf_file: str | None = None
    """Name of the GGUF file that holds all of them."""
    trust_remote_code: bool = False
    """Whether to allow running code that comes with them."""
    attn_implementation: str | None = None
    """Name of the transformers attention implementation; None for transformers' choice."""

    def of_any(self) -> dict[str, Any]:
        """Returns the arguments common to every `from_pretrained`."""
        options: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if self.revision is not None:
            options["revision"] = self.revision
        if self.gguf_file is not None:
            options["gguf_file"] = self.gguf_file
        return options

    def of_model(self) -> dict[str, Any]:
        """Returns the additional arguments of a model's `from_pretrained` and `from_config`."""
        if self.attn_implementation is None:
            return {}
        return {"attn_implementation": self.attn_implementation}


NO_OPTIONS = ReadOptions()


def read_pretrained(
    kind: Any,
    source: str,
    key: str,
    what: str = "model",
    read: ReadOptions = NO_OPTIONS,
    *,
    new_head: bool = False,
    **options: Any,
) -> Any:
    """Calls `from_pretrained` of a transformers class so that no file that is read can run code.

    The exception is `read.trust_remote_code`.

    Args:
        kind: one of the Auto classes.
        source: a folder or a hub id.
        key: the configuration key that names the source, for error messages.
        what: `model`, `tokenizer` or `configuration`.
        read: the user's options for the source.
        new_head: whether the weights of a classifier's head may be missing; they are then random.
        options: for `from_pretrained`.

    Raises:
        UserInputError: it cannot be loaded. transformers, tokenizers and safetensors raise almost
            any type of exception for damaged or unexpected files.
    """
    try:
        adapters = None if read.gguf_file else find_adapters(source, key, read.revision)
        if adapters is not None:
            return _read_adapted(kind, adapters, key, what, read, new_head=new_head, **options)
        if what != "model":
            return kind.from_pretrained(source, **read.of_any(), **options)
        return _read_model(kind, source, key, read, new_head=new_head, **options)
    except (UserInputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if read.attn_implementation is not None and _is_about_attention(error):
            raise UserInputError(
                f"model.attn_implementation: '{source}' cannot be loaded with "
                f"{read.attn_implementation}, leave the key out for another: {first_line(error)}"
            ) from error
        if read.gguf_file is not None:
            raise UserInputError(_explain_gguf(source, read.gguf_file, error)) from error
        raise UserInputError(_explain(source, key, what, error)) from error


def _read_adapted(
    kind: Any,
    adapters: Adapters,
    key: str,
    what: str,
    read: ReadOptions,
    *,
    new_head: bool,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Any:
    """Reads the base model of adapters and merges them in float32, or reads what else is asked."""
    base, of_base = adapters.base.name, replace(read, revision=adapters.base.revision)
    try:
        if what == "configuration" or (what == "tokenizer" and not adapters.has_tokenizer):
            return read_pretrained(kind, base, key, what, of_base, **options)
        config = read_pretrained(AutoConfig, base, key, "configuration", of_base)
        if what == "tokenizer":
            return kind.from_pretrained(adapters.source, config=config, **read.of_any(), **options)
        _check_not_packed(config)
        labels = adapters.labels() if kind is not AutoModelForCausalLM else None
        if labels is not None:
            options["num_labels"], new_head = labels, True
        whole = AutoModelForCausalLM if kind is AutoModel else kind
        model = read_pretrained(
            whole, base, key, what, of_base, new_head=new_head, dtype=torch.float32, **options
        )
    except UserInputError as error:
        reason = str(error).removeprefix(f"{key}: ")
        raise UserInputError(
            f"{key}: the adapters in {adapters.source} were trained on {base}, as "
            f"base_model_name_or_path in their adapter_config.json says: {reason}"
        ) from error
    model = cast(merge_adapters(model, adapters), dtype)
    return model.base_model if kind is AutoModel else model


def _check_not_packed(config: Any) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise UserInputError("its weights are packed; name the model from which it was made there")


def _read_model(
    kind: Any, source: str, key: str, read: ReadOptions, *, new_head: bool, **options: Any
) -> Any:
    if read.gguf_file is None:
        check_weights(source, key)
        options["use_safetensors"] = True
    elif hasattr(transformers, "GgufConfig"):  # older versions always dequantise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model, found = kind.from_pretrained(
        source, output_loading_info=True, **read.of_any(), **read.of_model(), **options
    )
    missing = sorted(found["missing_keys"])
    if new_head:
        missing = [name for name in missing if not _is_of_head(name, model.base_model_prefix)]
    if missing:
        # transformers would silently use random weights in their place.
        where = f"{read.gguf_file} in {source}" if read.gguf_file else f"'{source}'"
        raise UserInputError(
            f"{key}: {where} has no weights for {missing[0]}"
            + (f" and {len(missing) - 1} others" if len(missing) > 1 else "")
            + f", which {type(model).__name__} needs"
        )
    if read.gguf_file is not None:
        # The weights are now plain tensors, and are trained and saved as such.
        vars(model.config).pop("quantization_config", None)
    return model


def _is_of_head(name: str, base: str) -> bool:
    """Whether a weight belongs to a head: it is outside the base model, or in its pooler."""
    return not name.startswith(f"{base}.") or ".pooler." in name


def _is_about_attention(error: Exception) -> bool:
    """Whether an error says that a way to compute attention is not installed or not supported."""
    return ABOUT_ATTENTION.search(str(error)) is not None


def _explain_gguf(source: str, name: str, error: Exception) -> str:
    if isinstance(error, ImportError):
        return f"model.gguf_file needs the package gguf: pip install 'rlhf-tui[gguf]' ({error})"
    return (
        f"model.gguf_file: {name} in {source} cannot be trained: {first_line(error)} "
        "(a model folder with safetensors can)"
    )


def check_weights(source: str, key: str) -> None:
    """Checks that a source does not store its weights in pickles.

    Raises:
        UserInputError: it does; the message says what to do instead.
    """
    folder = Path(source)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLES)
    if pickles:
        raise UserInputError(_pickle_refused(key, source, pickles[0]))


def _pickle_refused(key: str, source: str, file: str) -> str:
    return (
        f"{key}: {source} holds its weights in {file}, and a pickle can run code when it is "
        "loaded: convert it to safetensors first, on a machine that may run it "
        "(AutoModel.from_pretrained(...).save_pretrained(DIR))"
    )


def _trust_setting(key: str) -> str:
    """Returns the setting that allows custom code, e.g. `model.trust_remote_code: true`."""
    if key.startswith("--"):  # an option of the command line
        return "--set trust_remote_code=true"
    return f"{key.rpartition('.')[0]}.trust_remote_code: true"


def _explain(source: str, key: str, what: str, error: Exception) -> str:
    first = first_line(error)
    if "trust_remote_code" in str(error):
        return (
            f"{key}: {source} needs Python code of its own, which is never run unless you trust it "
            f"({_trust_setting(key)}); choose a model whose architecture is part of transformers"
        )
    if source.startswith(("/", ".", "~")):
        return folder_error(key, Path(source), what, first)
    if "safetensors" in first and "pytorch_model" not in first:
        return _pickle_refused(key, f"'{source}'", "other files than .safetensors")
    return f"{key}: '{source}' is neither a model folder nor available from the hub: {first}"
