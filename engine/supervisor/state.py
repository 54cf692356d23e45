"""How things stand with a live session: the plain data that the parts of its supervisor share."""

from dataclasses import dataclass, field
from typing import Any

from engine.launch.start import StartOptions
from engine.protocol.rank_messages import Phase
from engine.supervisor.attempt import Attempt, StepTimer


@dataclass
class SupervisorState:
    """Changed in the event loop's thread alone."""

    settings: dict[str, Any]
    """In force, by name."""
    attempt: Attempt
    """The present one, or the last."""
    next: StartOptions | None
    """Of the attempt that follows; None where none does."""
    paused: bool = False
    stopping: bool = False
    """A stop was accepted; holds over a restart."""
    stop_now: bool = False
    """Stopping, without another save."""
    began: bool = False
    """Some attempt's models were loaded, so that something was or could have been trained."""
    phases: dict[int, Phase] = field(default_factory=dict)
    """The latest of each rank."""
    timer: StepTimer = field(default_factory=StepTimer)
