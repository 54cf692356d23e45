"""A notification for operators, of an alert or of a change of the session's state."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from engine.errors import RlhfError
from engine.monitoring.guardrails import Alert
from engine.protocol.rank_messages import LAST_SAVE_WAITS
from engine.session.states import State

Level = Literal["info", "warning", "error"]
LEVELS: tuple[Level, ...] = ("info", "warning", "error")
"""From the least to the most important."""
Kind = Literal["alert", "restart", "pause", "end", "failure", "test"]

RESTART_RULE = "restart"
"""The rule of the alert with which the supervisor reports a restart of the ranks."""
STATE_KINDS: dict[State, Kind] = {
    "paused": "pause",
    "finished": "end",
    "stopped": "end",
    "failed": "failure",
}
"""State → kind of its notification; no other state is notified."""
EFFECTS = {"pause": "the run pauses: ", "stop": "the run stops: "}
"""Action of an alert → prefix of its text for people; the JSON has the journal's text."""


class NotificationError(RlhfError):
    """A channel could not send a notification. The message holds no secret."""


@dataclass(frozen=True)
class Notification:
    """A message to operators."""

    session: str
    kind: Kind
    level: Level
    text: str
    step: int
    data: dict[str, Any] = field(default_factory=dict)
    """Further keys of the JSON, such as the evidence of an alert."""
    unsent: int = 0
    """Alerts before this one that the rate limit kept back."""
    root: Path | None = None
    """The folder of sessions, an absolute path; None if the message concerns no session."""

    @property
    def title(self) -> str:
        """The message in one line: `run-7 step 120: kl_high: KL is 7.3, above 6`."""
        more = f" (after {self.unsent} more that were not sent)" if self.unsent else ""
        return one_line(f"{self.session} step {self.step}: {self.text}{more}")

    def as_json(self) -> dict[str, Any]:
        """The object that commands and generic webhooks receive; its keys are a contract."""
        own = {
            "session": self.session,
            "step": self.step,
            "kind": self.kind,
            "level": self.level,
            "unsent": self.unsent,
        }
        return {"rule": self.kind, "action": "notify", "text": self.text} | self.data | own


def of_alert(session: str, alert: Alert) -> Notification:
    """The notification of an alert; one that stops or halts the run is an error."""
    kind: Kind = "restart" if alert.rule == RESTART_RULE else "alert"
    effect = EFFECTS.get(alert.action, "")
    level: Level = "error" if effect or alert.rule == LAST_SAVE_WAITS else "warning"
    return Notification(session, kind, level, effect + alert.text, alert.step, alert.as_data())


def of_state(session: str, state: State, reason: str, step: int) -> Notification | None:
    """The notification of a new state; None if the state needs none.

    Args:
        session: the session's name.
        state: the new state.
        reason: the reason for it; empty for a pause that a person asked for.
        step: the last finished step.
    """
    kind = STATE_KINDS.get(state)
    if kind is None:
        return None
    text = f"{state}: {reason}" if reason else state
    urgent = state == "failed" or (state == "paused" and bool(reason))
    data = {"rule": state, "state": state}
    return Notification(session, kind, "error" if urgent else "info", text, step, data)


def trial(session: str) -> Notification:
    """A test message, to try the channels."""
    return Notification(session, "test", "info", "test message: this channel works", 0)


def one_line(text: str) -> str:
    """The text on one line, without control characters."""
    words = "".join(c if c.isprintable() else " " for c in text).split()
    return " ".join(words)
