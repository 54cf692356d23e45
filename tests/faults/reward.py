"""The reward of the fault runs. A file `fault` beside it makes it misbehave, once or until removed.

Its first word is what to do, its second the step at which it is done.
"""

import os
import time
from pathlib import Path

FOLDER = Path(__file__).parent


def score(prompts, completions, trainer_state, **_):
    scores = [len(set(text)) / 10 for text in completions]
    fault = FOLDER / "fault"
    if not fault.exists():
        return scores
    what, _, step = fault.read_text().partition(" ")
    if trainer_state.global_step < int(step or 0):
        return scores
    match what:
        case "raise":
            raise ValueError("\x1b[31mno score\x1b[0m")
        case "hang":
            while fault.exists():
                time.sleep(0.05)
        case "exit":
            fault.unlink()
            os._exit(3)
        case "sysexit":
            fault.unlink()
            raise SystemExit(3)
        case "fork":
            fault.unlink()
            if os.fork() == 0:
                time.sleep(600)
                os._exit(0)
        case "none":
            return [None] * len(scores)
        case "nan":
            return [float("nan")] * len(scores)
        case "huge":
            return [10**400] * len(scores)
        case "short":
            return scores[:-1]
        case "words":
            return ["good"] * len(scores)
    return scores
