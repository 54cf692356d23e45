"""The state of a live session that the parts of its supervisor share."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from engine.launch.start import StartOptions
from engine.protocol.rank_messages import Phase
from engine.supervisor.attempt import Attempt, StepTimer

Parts = list[Callable[[], "Parts"]]
"""What is left to do of a message, in order. A part can be repeated until it succeeds; it returns
the parts that take its place."""


@dataclass
class SupervisorState:
    """Plain data. Only the event loop's thread may change it."""

    settings: dict[str, Any]
    """In force, by name."""
    attempt: Attempt
    """The current or the last attempt."""
    next: StartOptions | None
    """The attempt that follows: the run's first, a restart or a roll back; None if none does."""
    paused: bool = False
    pause_reason: str | None = None
    """What asked for the pause that holds or is to come; None if a person did, or without one."""
    pause_recovers: bool = False
    """Whether the ranks end the pause by themselves once its reason is gone."""
    stopping: bool = False
    """A stop was accepted. It stays accepted after a restart of the ranks."""
    stop_now: bool = False
    """Stopping without another save."""
    preempted: bool = False
    """A scheduler's signal asked for the stop."""
    began: bool = False
    """Whether the models were loaded in any attempt: from then on an error is not the user's."""
    rollout_restarts: Counter[int] = field(default_factory=Counter)
    """How often each rollout engine has failed since the last finished step."""
    rollout_replaced: Counter[int] = field(default_factory=Counter)
    """How often each one has ended with status 0, as when rank 0 asks for another, since then."""
    phases: dict[int, Phase] = field(default_factory=dict)
    """The latest phase of each rank."""
    timer: StepTimer = field(default_factory=StepTimer)
