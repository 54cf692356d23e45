"""Writes a checkpoint's ``policy/``: a folder that transformers or peft loads."""

import errno
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from engine.errors import first_line
from engine.session.access import make_folders
from engine.session.checkpoints import BASE_ADAPTERS
from engine.train.models.adapter_folder import MERGED
from engine.train.models.adapters import lora
from engine.train.models.language_model import LanguageModel
from engine.train.models.pretrained import save_configs

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
"""Errors that fail a save instead of leaving the tokenizer out."""


def policy_tensors(policy: LanguageModel) -> dict[str, Tensor]:
    """The tensors to save for the policy, by their names in the model; not copied.

    Contains one of each group of tied weights. The tensors of a sharded policy are DTensors.
    """
    lm = policy.lm
    if lora.adapted_layers(lm):
        return {k: t.detach() for k, t in lora.adapter_tensors(lm, lm.state_dict()).items()}
    # state_dict makes FSDP reshard gathered parameters first.
    tensors = lm.state_dict(keep_vars=True)
    ignored = set(lm._keys_to_ignore_on_save or ())
    tied = set(getattr(lm, "all_tied_weights_keys", None) or ())
    names: dict[int, str] = {}
    for name in sorted(tensors, key=lambda n: n in tied):  # the names to keep come first
        names.setdefault(id(tensors[name]), name)
    kept = set(names.values()) - ignored
    return {name: tensor.detach() for name, tensor in tensors.items() if name in kept}


def policy_files(
    policy: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    notice: Callable[[str], None] = lambda _text: None,
) -> dict[str, bytes]:
    """The files of the configuration and the tokenizer, by path relative to the folder.

    They do not change during a run; call this once. A tokenizer that cannot be saved, for example
    because files that it was loaded from are gone, is left out: a resume then loads it like a new
    run does. `notice` is called with the reason.

    Raises:
        OSError: there is no room on the disk, or it fails.
    """
    lm = policy.lm
    with tempfile.TemporaryDirectory() as folder:
        if lora.adapted_layers(lm):
            lora.save_adapter_config(lm, Path(folder))
            if (merged := getattr(lm, MERGED, None)) is not None:
                shutil.copyfile(merged, Path(folder) / BASE_ADAPTERS)
        else:
            save_configs(lm, folder)
        files = _read_files(Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:  # tokenizers raise almost any type
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise
            text = f"the tokenizer cannot be saved, checkpoints are without it: {first_line(error)}"
            notice(text)
            return files
        return files | _read_files(Path(folder))


def _read_files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def write_policy(
    folder: Path, policy: LanguageModel, tensors: dict[str, Tensor], files: dict[str, bytes]
) -> None:
    """Writes the folder.

    Args:
        folder: created if it does not exist.
        policy: used for its structure only; its weights may change during the call.
        tensors: copies of :func:`policy_tensors`, unsharded and on the CPU.
        files: the result of :func:`policy_files`.
    """
    if lora.adapted_layers(policy.lm):
        make_folders(folder)
        lora.save_adapter_weights(tensors, folder)
    else:
        policy.lm.save_pretrained(folder, state_dict=tensors)
    # These replace what save_pretrained has written: it reads the dtype of the current parameters,
    # which FSDP may have gathered in another dtype by now.
    for name, content in files.items():
        path = folder / name
        make_folders(path.parent)
        path.write_bytes(content)
