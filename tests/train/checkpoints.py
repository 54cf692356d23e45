"""Saves checkpoints as a run does."""

from engine.errors import CheckpointError
from engine.session.checkpoints import mark_complete
from engine.train.checkpoints.saver import Saver

DEADLINE = 120
"""Seconds; generous, for a busy machine."""


def begin_save(saver, run, score=1.0, best=None):
    """Begins to save a checkpoint of a run."""
    saver.begin(
        run.saved_state(), run.policy, run.tokenizer, run.optimiser, score=score, kl=0.5,
        reference=run.reference if run.state.reference_updated else None, best=best,
    )  # fmt: skip


def save_checkpoint(run, session, score=1.0, best=None):
    """Saves a complete checkpoint of a run; returns its folder."""
    saver = Saver(session.checkpoints)
    begin_save(saver, run, score, best)
    outcome = saver.wait(DEADLINE)
    if isinstance(outcome, CheckpointError):
        raise outcome
    mark_complete(outcome.folder)
    return outcome.folder
