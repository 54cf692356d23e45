"""The curves of a report, downsampled to a size that does not depend on the run's length."""

from collections.abc import Sequence

import msgspec
from msgspec import Struct

from engine import metrics
from engine.agreement import Agreement
from engine.journal.reader import JournalReader
from engine.metrics import (
    APPROXIMATE_KL,
    BETA,
    CLIP_FRACTION,
    DISTINCT_2,
    ENTROPY,
    EVAL_DISTINCT_2,
    EVAL_KL,
    EVAL_LENGTH,
    EVAL_SCORE,
    EXPLAINED_VARIANCE,
    GRADIENT_NORM,
    KL,
    LEARNING_RATE,
    RESPONSE_LENGTH,
    SCORE,
    SCORE_STD,
    TRUNCATED,
)

SPANS = 240
"""Spans of a downsampled curve; each has a minimum and a maximum."""
CURVES = (
    SCORE, EVAL_SCORE, KL, EVAL_KL, BETA, ENTROPY, RESPONSE_LENGTH, EVAL_LENGTH,
    TRUNCATED, DISTINCT_2, EVAL_DISTINCT_2, SCORE_STD, CLIP_FRACTION,
    APPROXIMATE_KL, EXPLAINED_VARIANCE, GRADIENT_NORM, LEARNING_RATE,
)  # fmt: skip
"""The metrics in order; those that a run lacks are left out."""
SOURCES = ("reward/", "eval/reward/")
MAX_SOURCES = 8
MAX_TITLE = 100
MAX_BRANCHES = 8
"""Maximum number of abandoned branches that are drawn, the latest."""
BRANCH_POINTS = 120

Point = tuple[int, float]


class Curve(Struct, frozen=True):
    """One metric over the steps."""

    name: str
    points: list[Point]
    """Exact for runs of at most :data:`SPANS` steps, otherwise extremes."""
    branches: list[list[Point]] = msgspec.field(default_factory=list)
    """The same of abandoned branches."""
    other: list[Point] = msgspec.field(default_factory=list)
    """The curve of the run beside it."""

    @property
    def title(self) -> str:
        """The title, with the unit if there is one. A reward source may have any name."""
        declared = metrics.describe(self.name)
        unit = f", {declared.chart_unit}" if declared.chart_unit else ""
        return f"{metrics.title_of(self.name)}{unit}"[:MAX_TITLE]

    @property
    def is_set(self) -> bool:
        """Whether the value is set rather than measured."""
        return metrics.describe(self.name).is_set


def read_curves(reader: JournalReader, agreement: Agreement) -> list[Curve]:
    """Reads the curves of a session's current timeline and of its abandoned branches.

    Args:
        reader: the session's journal.
        agreement: of its scores with the judgements; its curve is the last one.
    """
    known = reader.metrics.names()
    sources = [name for name in known if name.startswith(SOURCES)][:MAX_SOURCES]
    names = [name for name in CURVES if name in known] + sources
    recorded = reader.metrics.downsampled(names, SPANS)
    several = len(reader.attempts()) > 1
    curves = []
    for name in names:
        points = [(step, v) for step, v in recorded.get(name, []) if v is not None]
        if points:
            branches = _branches(reader, name) if several else []
            curves.append(Curve(name, points, branches))
    if agreement.points:
        curves.append(Curve(metrics.AGREEMENT, downsampled(agreement.curve)))
    return curves


def _branches(reader: JournalReader, name: str) -> list[list[Point]]:
    found: dict[int, list[Point]] = {}
    for attempt, step, value in reader.metrics.past_series(name):
        if value is not None:
            found.setdefault(attempt, []).append((step, value))
    return [downsampled(points) for points in list(found.values())[-MAX_BRANCHES:]]


def downsampled(points: Sequence[Point]) -> list[Point]:
    """At most :data:`BRANCH_POINTS` of the points, evenly spaced, and the last one."""
    every = max(1, -(-len(points) // BRANCH_POINTS))
    kept = list(points[::every])
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]
