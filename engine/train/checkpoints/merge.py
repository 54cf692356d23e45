"""Merges LoRA adapters into their model.

``python -m engine.train.checkpoints.merge SESSION_FOLDER STEP PART TARGET``

`rlhf-tui export --merged` starts this process, because the command line never imports torch. An
error is one line on standard error; the exit code is that of the exception.
"""

import sys
from pathlib import Path

from peft import PeftModel
from safetensors import SafetensorError
from transformers.utils.logging import disable_progress_bar

from engine import starter
from engine.config.sections.launch import LaunchConfig
from engine.errors import CheckpointError, RlhfError, UserInputError, first_line
from engine.session.checkpoints import checkpoint_path
from engine.session.folder import SessionFolder
from engine.train.checkpoints import folder as checkpoint_folder
from engine.train.distributed.ranks import RankGroup
from engine.train.distributed.sharding import place_model
from engine.train.models.adapters.quantised_linear import dequantise, quantise
from engine.train.models.language_model import LanguageModel, fingerprint
from engine.train.models.pretrained import compute_dtype, load_lm, load_tokenizer, policy_options


def main() -> None:
    """Runs the command line above."""
    disable_progress_bar()
    folder, step, part, target = sys.argv[1:]
    try:
        merge(SessionFolder(Path(folder)), int(step), part, Path(target))
    except RlhfError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)


def merge(session: SessionFolder, step: int, part: str, target: Path) -> None:
    """Writes a policy of a LoRA run's checkpoint as a full model with its tokenizer.

    `part` is `policy`, or `policy-ema` for the averaged one.

    The merged weights are float32, as in a run without LoRA: bfloat16 would round the small changes
    of the adapters away.

    Raises:
        CheckpointError: the checkpoint is damaged, or the base model has changed since training.
        UserInputError: the base model cannot be loaded, or the target cannot be written.
    """
    config = session.config()
    saved = checkpoint_path(session.checkpoints, step)
    state = checkpoint_folder.read_state(saved)
    # In the run's dtype and quantised like it first: the adapters were trained on these weights.
    ranks = RankGroup(LaunchConfig(device="cpu"))
    source = starter.resolve(config.model.policy)
    read = policy_options(config, source)
    lm = load_lm(source, "model.policy", ranks, compute_dtype(config), read)
    quantise(lm, config.lora)
    place_model(lm, ranks, "ddp")
    if fingerprint(LanguageModel(lm)) != state.base:
        raise CheckpointError(
            "the model under the adapters is not the one this run was started with: "
            f"{config.model.policy} has changed; restore it to merge"
        )
    dequantise(lm)
    merged = PeftModel.from_pretrained(lm.float(), str(saved / part)).merge_and_unload()
    folder = str(saved / part)
    tokenizer = load_tokenizer(folder, "model.policy", ranks, policy_options(config, folder))
    try:
        merged.save_pretrained(target)
        tokenizer.save_pretrained(target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserInputError(f"--policy: cannot write {target}: {reason}") from error


if __name__ == "__main__":
    main()
