"""Recorders of steps besides the journal: TensorBoard event files and experiment trackers."""

from collections.abc import Callable
from functools import partial
from typing import Protocol

from engine.config.schema import RunConfig
from engine.protocol.rank_messages import Sample
from engine.session.folder import SessionFolder
from engine.train.reports.trackers import TrackerProcess


class StepRecorder(Protocol):
    """Records steps somewhere."""

    def step(self, step: int, metrics: dict[str, float], samples: list[Sample]) -> None:
        """Records one step; step 0 is before the first."""

    def close(self) -> None:
        """Ends the recording, at the end of the run."""


def open_recorders(
    session: SessionFolder,
    config: RunConfig,
    from_step: int,
    notify: Callable[[str, int, str], None],
) -> list[StepRecorder]:
    """Opens the recorders that the section `log` asks for; rank 0 calls it.

    Args:
        session: the session.
        config: as the run was started.
        from_step: the last completed step.
        notify: called from any thread with the name of a rule, a step and one line when a recorder
            has a problem.
    """
    recorders: list[StepRecorder] = []
    if config.log.tensorboard:
        # The import takes a quarter of a second, which a rank without event files saves.
        from engine.train.reports.tensorboard import EventFiles  # noqa: PLC0415

        events = EventFiles(session.tensorboard, from_step, partial(notify, "tensorboard"))
        if not from_step:
            events.hparams(config)
        recorders.append(events)
    if config.log.trackers:
        try:
            recorders.append(TrackerProcess(session, config, partial(notify, "trackers")))
        except OSError as error:
            notify("trackers", from_step, f"trackers cannot be started: {error}")
    return recorders
