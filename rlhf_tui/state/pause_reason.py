"""Why a run is paused, found in its journal: older engines do not record the reason."""

import re
from collections.abc import Iterable

from engine.journal.rows import AlertEvent, CommandRow, EventRow
from engine.metrics import title_of
from engine.protocol.commands import Pause, Unpause
from rlhf_tui.state.command_text import GUARD_RAIL

_BOUND = re.compile(r"(?P<metric>\S+) is (?P<value>\S+), (?P<side>above|below) (?P<bound>.+)")
PAUSED_STATES = ("paused", "pausing")


def pause_reason(
    state: str, events: Iterable[EventRow], commands: Iterable[CommandRow]
) -> str | None:
    """Returns `kl_runs_away at step 4: KL 7.26 > 6`; None if a person paused, or nobody.

    Args:
        state: of the session.
        events: oldest first.
        commands: in order of arrival.
    """
    if state not in PAUSED_STATES:
        return None
    holds = (Pause.name(), Unpause.name())
    done = [c for c in commands if c.command in holds and c.status in ("accepted", "applied")]
    if not done or done[-1].command != Pause.name() or not done[-1].who.startswith(GUARD_RAIL):
        return None
    rule = done[-1].who.removeprefix(GUARD_RAIL)
    for event in reversed(list(events)):
        alert = event.payload
        if isinstance(alert, AlertEvent) and alert.rule == rule and alert.action == "pause":
            return f"{rule} at step {event.step}: {short_condition(alert.text)}"
    return rule


def short_condition(text: str) -> str:
    """Shortens `objective/kl is 7.26, above 6` to `KL 7.26 > 6`; other texts stay as they are."""
    found = _BOUND.fullmatch(text)
    if found is None:
        return text
    sign = ">" if found["side"] == "above" else "<"
    return f"{title_of(found['metric'])} {found['value']} {sign} {found['bound']}"
