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
    return FAULTS[what](scores, fault)


def fail(_scores, _fault):
    raise ValueError("\x1b[31mno score\x1b[0m")


def hang(scores, fault):
    while fault.exists():
        time.sleep(0.05)
    return scores


def leave(_scores, fault):
    fault.unlink()
    os._exit(3)


def leave_by_exception(_scores, fault):
    fault.unlink()
    raise SystemExit(3)


def fork(scores, fault):
    fault.unlink()
    if os.fork() == 0:
        time.sleep(600)
        os._exit(0)
    return scores


FAULTS = {
    "raise": fail,
    "hang": hang,
    "exit": leave,
    "sysexit": leave_by_exception,
    "fork": fork,
    "none": lambda scores, _fault: [None] * len(scores),
    "nan": lambda scores, _fault: [float("nan")] * len(scores),
    "huge": lambda scores, _fault: [10**400] * len(scores),
    "short": lambda scores, _fault: scores[:-1],
    "words": lambda scores, _fault: ["good"] * len(scores),
}
