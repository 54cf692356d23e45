"""Saves checkpoints as a run does."""

from engine.errors import CheckpointError
from engine.session.checkpoints import mark_complete
from engine.train.checkpoints.saver import SavedMetrics, Saver

DEADLINE = 120
"""Seconds; generous, for a busy machine."""


def begin_save(saver, run, score=1.0, best=None):
    """Begins to save a checkpoint of a run."""
    saver.begin(run.saved_state(), run.saved_models(), SavedMetrics(score, 0.5, best))


def save_checkpoint(run, session, score=1.0, best=None):
    """Saves a complete checkpoint of a run; returns its folder."""
    saver = Saver(session.checkpoints)
    begin_save(saver, run, score, best)
    outcome = saver.wait(DEADLINE)
    if isinstance(outcome, CheckpointError):
        raise outcome
    mark_complete(outcome.folder)
    return outcome.folder
