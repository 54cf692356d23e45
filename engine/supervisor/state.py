"""The state of a live session, shared by the parts of its supervisor."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from engine.launch.start_options import StartOptions
from engine.monitoring.step_timer import StepTimer
from engine.protocol.rank_messages import Phase
from engine.supervisor.attempt import Attempt

Parts = list[Callable[[], "Parts"]]
"""The remaining parts of handling a message, in order. A part can be repeated until it succeeds; it
returns the parts that replace it."""


@dataclass
class SupervisorState:
    """Plain data. Only the event loop's thread may change it."""

    settings: dict[str, Any]
    """Settings in force, by name."""
    attempt: Attempt
    """The current or the last attempt."""
    next: StartOptions | None
    """The start of the next attempt: the first one, a restart or a roll back. None if there is
    none, also once the journal has its attempt."""
    rolling_back_to: int | None = None
    """The step of a roll back that is accepted and not carried out yet."""
    paused: bool = False
    pause_reason: str | None = None
    """What asked for the current or coming pause; None if a person did, or without a pause."""
    pause_recovers: bool = False
    """Whether the ranks end the pause by themselves once its reason is gone."""
    stopping: bool = False
    """A stop was accepted. It stays accepted after a restart of the ranks."""
    stop_now: bool = False
    """The run stops without another save."""
    preempted: bool = False
    """A scheduler's signal asked for the stop."""
    in_haste: bool = False
    """Such a signal has arrived, perhaps after another stop: the ranks must not wait for room."""
    began: bool = False
    """Whether any attempt has loaded the models: later errors are not due to the user's input."""
    rollout_restarts: Counter[int] = field(default_factory=Counter)
    """How often each rollout engine has failed since the last finished step."""
    rollout_replaced: Counter[int] = field(default_factory=Counter)
    """How often each has ended with status 0 since then, as when rank 0 asks for a new one."""
    phases: dict[int, Phase] = field(default_factory=dict)
    """The latest phase of each rank."""
    timer: StepTimer = field(default_factory=StepTimer)

    def needed(self) -> set[int]:
        """The steps of checkpoints from which the next attempt starts, or may start.

        Nothing may remove them before the journal has that attempt, which needs them.
        """
        steps = set() if self.next is None else {self.next.from_step}
        return steps if self.rolling_back_to is None else steps | {self.rolling_back_to}
