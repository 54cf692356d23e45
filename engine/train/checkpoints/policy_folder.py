"""Writes a checkpoint's ``policy/``: a folder that transformers or peft loads."""

import copy
import tempfile
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.train.models import lora
from engine.train.models.language_model import LanguageModel


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


def policy_files(policy: LanguageModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """The files of the configuration and the tokenizer, by path relative to the folder.

    They do not change during a run; call this once.
    """
    lm = policy.lm
    with tempfile.TemporaryDirectory() as folder:
        if lora.adapted_layers(lm):
            lora.save_adapter_config(lm, Path(folder))
        else:
            _save_configs(lm, folder)
        tokenizer.save_pretrained(folder)
        root = Path(folder)
        return {str(f.relative_to(root)): f.read_bytes() for f in root.rglob("*") if f.is_file()}


def _save_configs(lm: PreTrainedModel, folder: str) -> None:
    config = copy.deepcopy(lm.config)
    config.dtype = str(next(lm.parameters()).dtype).removeprefix("torch.")
    # fully_shard prefixes the name of the class.
    config.architectures = [type(lm).__name__.removeprefix("FSDP")]
    config.save_pretrained(folder)
    if lm.can_generate():
        lm.generation_config.save_pretrained(folder)


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
        folder.mkdir(parents=True, exist_ok=True)
        lora.save_adapter_weights(tensors, folder)
    else:
        policy.lm.save_pretrained(folder, state_dict=tensors)
    # These replace what save_pretrained has written: it reads the dtype of the current parameters,
    # which FSDP may have gathered in another dtype by now.
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
