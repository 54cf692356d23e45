"""The changes by operators and guard rails, with the metrics before and after."""

from collections.abc import Sequence

import msgspec
from msgspec import Struct

from engine.journal.reader import JournalReader
from engine.metrics import ENTROPY, KL, RESPONSE_LENGTH, SCORE
from rlhf_tui.report.headlines import mean_of_known
from rlhf_tui.state.timeline import Marker

COMPARED_METRICS = (SCORE, KL, RESPONSE_LENGTH, ENTROPY)
"""The metrics whose means before and after are shown."""
STEPS_COMPARED = 10
"""Steps of each mean, as in the dashboard."""
NOTE_STEPS = 3
"""Maximum distance of a note from its intervention; commands apply a step or two after sending."""
MAX_INTERVENTIONS = 100
"""Interventions that are listed; of more, the latest."""


class Effect(Struct, frozen=True):
    """A metric's means over the steps before an intervention and over those from it on."""

    before: float | None
    after: float | None


class Intervention(Struct, frozen=True):
    """A command that took effect."""

    number: int
    """Number by which the charts refer to it, from 1."""
    marker: Marker
    effects: dict[str, Effect]
    """By metric; empty on abandoned branches."""
    notes: list[str] = msgspec.field(default_factory=list)
    """Notes at nearby steps, which usually give the reason."""


def read_interventions(reader: JournalReader, markers: Sequence[Marker]) -> list[Intervention]:
    """The latest interventions, in order, with their effects."""
    commands = [m for m in markers if m.kind == "command"]
    notes = [m for m in markers if m.kind == "note"]
    first = max(0, len(commands) - MAX_INTERVENTIONS)
    return [
        Intervention(
            number,
            marker,
            {} if marker.abandoned else _effects(reader, marker.step),
            [n.text for n in notes if abs(n.step - marker.step) <= NOTE_STEPS],
        )
        for number, marker in enumerate(commands[first:], start=first + 1)
    ]


def _effects(reader: JournalReader, step: int) -> dict[str, Effect]:
    effects = {}
    for name in COMPARED_METRICS:
        points = reader.metrics.series(name, step - STEPS_COMPARED - 1, step + STEPS_COMPARED - 1)
        before = mean_of_known(value for at, value in points if at < step)
        after = mean_of_known(value for at, value in points if at >= step)
        if before is not None or after is not None:
            effects[name] = Effect(before, after)
    return effects
