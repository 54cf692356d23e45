"""A reward function controlled by files: it blocks or slows steps, or returns invalid scores.

It kills its process if a prompt equals DEADLY.
"""

import os
import signal
import time
from pathlib import Path

FOLDER = Path(__file__).parent
DEADLY = "the last words of a rank"


def fail_to_update(text):
    """Lets the update of the step raise, which ends the run; an error of a reward pauses it."""
    import torch  # noqa: PLC0415 - not in processes without a model

    def backward(*_arguments, **_options):
        raise RuntimeError(text)

    torch.Tensor.backward = backward


def score(prompts, completions, trainer_state, **_):
    if DEADLY in prompts:
        os.kill(os.getpid(), signal.SIGKILL)
    step = trainer_state.global_step
    (FOLDER / f"at-{step}").touch()
    while (FOLDER / f"hold-{step}").exists():
        time.sleep(0.02)
    if (FOLDER / "slow").exists():
        time.sleep(0.25)
    scores = [len(set(text)) / 10 for text in completions]
    override = FOLDER / f"score-{step}"
    if override.exists() and (text := override.read_text()):
        if text.startswith("raise "):
            raise ValueError(text.removeprefix("raise "))
        if text.startswith("fail "):
            fail_to_update(text.removeprefix("fail "))
            return scores
        return [float(text)] * len(scores)
    return scores
