"""The step of a checkpoint as an argument of commands: a number, `last` or `best`."""

from typing import Literal

import click

from engine.errors import NoSuchSessionError
from engine.journal.reader import JournalReader
from engine.launch.start_checkpoints import checkpoint_steps, last_checkpoint
from engine.session.folder import SessionFolder

StepChoice = int | Literal["last", "best"]


def step_choice(text: str) -> StepChoice:
    """The `type` of an argument that chooses a checkpoint. Raises `click.BadParameter`."""
    if text == "last":
        return "last"
    if text == "best":
        return "best"
    try:
        step = int(text)
    except ValueError:
        step = 0
    if step < 1:
        raise click.BadParameter(
            f"{text!r} is not the step of a checkpoint: give a number from 1 on, last or best"
        )
    return step


def checkpoint_step(session: SessionFolder, choice: StepChoice) -> int:
    """The step of a chosen checkpoint. A number is not checked for existence.

    Raises:
        NoSuchSessionError: there is no checkpoint, or none has a value of `train.best_metric`.
        JournalError: the journal cannot be read.
    """
    if isinstance(choice, int):
        return choice
    return _best(session) if choice == "best" else _last(session)


def _last(session: SessionFolder) -> int:
    step = last_checkpoint(session)
    if not step:
        others = ", ".join(map(str, checkpoint_steps(session)))
        lacks = f"no checkpoint in its journal, but of steps {others}" if others else ""
        raise NoSuchSessionError(f"session '{session.name}' has {lacks or 'no checkpoint yet'}")
    return step


def _best(session: SessionFolder) -> int:
    metric = session.config().train.best_metric
    with JournalReader(session) as reader:
        best = reader.best_checkpoint(metric)
    if best is None:
        raise NoSuchSessionError(f"no checkpoint of session '{session.name}' has {metric}")
    return best
