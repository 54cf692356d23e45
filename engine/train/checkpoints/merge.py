"""Merges adapters into their model.

``python -m engine.train.checkpoints.merge SESSION_FOLDER STEP TARGET``

A process of its own for `rlhf-tui export --merged`, which never imports torch. What went wrong is
one line on standard error, the exit code that of the error.
"""

import sys
from pathlib import Path

from peft import PeftModel
from transformers.utils.logging import disable_progress_bar

from engine import starter
from engine.config.schema import LaunchConfig
from engine.errors import CheckpointError, RlhfError, UserInputError
from engine.session.folder import Session
from engine.train.checkpoints import folder as checkpoint_folder
from engine.train.distributed.ranks import RankGroup
from engine.train.models.language_model import LanguageModel, fingerprint
from engine.train.models.pretrained import compute_dtype, load_lm, load_tokenizer


def main() -> None:
    """Runs the command line above."""
    disable_progress_bar()
    folder, step, target = sys.argv[1:]
    try:
        merge(Session(Path(folder)), int(step), Path(target))
    except RlhfError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)


def merge(session: Session, step: int, target: Path) -> None:
    """Writes the policy of a LoRA run's checkpoint as one whole model, with its tokenizer.

    In float32, like a run that trains in full: bfloat16 would blur the small changes of adapters.

    Raises:
        CheckpointError: the checkpoint is damaged, or the model is not the one it was trained on.
        UserInputError: the model cannot be loaded, or the folder cannot be written.
    """
    config = session.config()
    saved = checkpoint_folder.folder_of(session.checkpoints, step)
    state = checkpoint_folder.read_state(saved)
    # In the run's dtype first: it is those weights that the adapters were trained on.
    alone = RankGroup(LaunchConfig(device="cpu"))
    source = starter.resolve(config.model.policy)
    lm = load_lm(source, "model.policy", alone, compute_dtype(config))
    if fingerprint(LanguageModel(lm)) != state.base:
        raise CheckpointError(
            "the model under the adapters is not the one this run began with: "
            f"{config.model.policy} was changed; put it back to merge"
        )
    merged = PeftModel.from_pretrained(lm.float(), str(saved / "policy")).merge_and_unload()
    tokenizer = load_tokenizer(str(saved / "policy"), "model.policy", alone)
    try:
        merged.save_pretrained(target)
        tokenizer.save_pretrained(target)
    except OSError as error:
        raise UserInputError(f"--policy: cannot write {target}: {error}") from error


if __name__ == "__main__":
    main()
