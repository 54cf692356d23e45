"""Reads models, their configurations and tokenizers from folders and the hub.

All of the code reads them through :func:`read_pretrained`: no code of theirs is run, no pickle is
loaded, and whatever is wrong with them is one sentence for the user.
"""

from pathlib import Path
from typing import Any

import torch
from transformers.utils.peft_utils import find_adapter_config_file

from engine.config.model_folder import folder_error
from engine.errors import UserInputError, first_line

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Extensions of weights that a pickle holds."""


def read_pretrained(kind: Any, source: str, key: str, what: str = "model", **options: Any) -> Any:
    """Calls `from_pretrained` of a transformers class, such that nothing that is read can run code.

    Args:
        kind: one of the Auto classes.
        source: a folder or a hub id.
        key: the configuration key that names the source, for error messages.
        what: `model`, `tokenizer` or `configuration`.
        options: for `from_pretrained`.

    Raises:
        UserInputError: it cannot be loaded. transformers, tokenizers and safetensors raise almost
            any type of exception for a file that is damaged or not what they expect.
    """
    try:
        if what == "model":
            check_weights(source, key)
            options["use_safetensors"] = True
        return kind.from_pretrained(source, trust_remote_code=False, **options)
    except (UserInputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserInputError(_explain(source, key, what, error)) from error


def check_weights(source: str, key: str) -> None:
    """Refuses what is no whole model, or holds its weights in pickles.

    Raises:
        UserInputError: with what to do instead.
    """
    if find_adapter_config_file(source) is not None:
        raise UserInputError(
            f"{key}: {source} holds adapters for another model; merge the two first "
            "(rlhf-tui export NAME --policy DIR --merged, or peft)"
        )
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


def _explain(source: str, key: str, what: str, error: Exception) -> str:
    first = first_line(error)
    if "trust_remote_code" in str(error):
        return (
            f"{key}: {source} needs Python code of its own, which is never run; choose a model "
            "whose architecture is part of transformers"
        )
    if source.startswith(("/", ".", "~")):
        return folder_error(key, Path(source), what, first)
    if "safetensors" in first and "pytorch_model" not in first:
        return _pickle_refused(key, f"'{source}'", "other files than .safetensors")
    return f"{key}: '{source}' is neither a {what} folder nor available from the hub: {first}"
