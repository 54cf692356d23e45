"""What lies in a checkpoint's ``policy/``: a folder that plain transformers loads, or peft's.

Everything that depends on how a policy is published is in here.
"""

import copy
import tempfile
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.train.models import lora
from engine.train.models.language_model import LanguageModel


def policy_tensors(policy: LanguageModel) -> dict[str, Tensor]:
    """The tensors whose values make the policy, by their name in the model.

    Not copied. Of weights that are tied only the one that is kept in files is there. Where the
    policy is sharded they are DTensors.
    """
    lm = policy.lm
    if lora.adapted_layers(lm):
        return {k: t.detach() for k, t in lora.adapter_tensors(lm, lm.state_dict()).items()}
    # Asked through state_dict, FSDP puts gathered parameters back into shards first.
    tensors = lm.state_dict(keep_vars=True)
    ignored = set(lm._keys_to_ignore_on_save or ())
    tied = set(getattr(lm, "all_tied_weights_keys", None) or ())
    names: dict[int, str] = {}
    for name in sorted(tensors, key=lambda n: n in tied):  # those to keep come first
        names.setdefault(id(tensors[name]), name)
    kept = set(names.values()) - ignored
    return {name: tensor.detach() for name, tensor in tensors.items() if name in kept}


def policy_files(policy: LanguageModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """The small files beside the weights, by name: configuration and tokenizer.

    They do not change while a run goes on, so they need to be made only once.
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
    # fully_shard puts its name before the class's.
    config.architectures = [type(lm).__name__.removeprefix("FSDP")]
    config.save_pretrained(folder)
    if lm.can_generate():
        lm.generation_config.save_pretrained(folder)


def write_policy(
    folder: Path, policy: LanguageModel, tensors: dict[str, Tensor], files: dict[str, bytes]
) -> None:
    """Writes the folder.

    Args:
        folder: made if need be.
        policy: only its structure is looked at; its weights may be changing meanwhile.
        tensors: copies of :func:`policy_tensors`, whole and on the CPU.
        files: of :func:`policy_files`.
    """
    if lora.adapted_layers(policy.lm):
        folder.mkdir(parents=True, exist_ok=True)
        lora.save_adapter_weights(tensors, folder)
    else:
        policy.lm.save_pretrained(folder, state_dict=tensors)
    # What transformers wrote beside the weights looked at weights that training may have gathered
    # in another dtype by now.
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
