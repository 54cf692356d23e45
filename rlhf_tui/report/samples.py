"""The responses of a report: through time, the best, the worst, and the judged ones."""

import sys

import msgspec
from msgspec import Struct

from engine.journal.judgements.labels import LABELS, LabelReader, Preference, Response
from engine.journal.reader import JournalReader
from engine.journal.rows import SampleRow
from engine.journal.samples import SampleQuery
from engine.metrics import EVAL_SCORE

STEPS_SHOWN = 5
PROMPTS_SHOWN = 3
EXTREMES_SHOWN = 4
JUDGED_SHOWN = 24
PREFERENCES_SHOWN = 8
JUDGED_READ = 2000
"""Maximum number of judged responses, the newest, for the counts and means."""


class LabelCount(Struct, frozen=True):
    """The responses with a label."""

    label: str
    count: int
    mean_score: float | None


class ReportSamples(Struct, frozen=True):
    """The chosen responses."""

    held_out: list[list[SampleRow]] = msgspec.field(default_factory=list)
    """For each of some held-out prompts, its responses at several steps."""
    through_time: list[SampleRow] = msgspec.field(default_factory=list)
    """The first recorded response of several steps; empty if there are held-out prompts."""
    best: list[SampleRow] = msgspec.field(default_factory=list)
    worst: list[SampleRow] = msgspec.field(default_factory=list)
    judged: list[SampleRow] = msgspec.field(default_factory=list)
    judged_total: int = 0
    """All of them; `labels` are of the newest :data:`JUDGED_READ`."""
    labels: list[LabelCount] = msgspec.field(default_factory=list)
    preferences: list[Preference] = msgspec.field(default_factory=list)
    preferences_total: int = 0
    replies: dict[Response, list[tuple[int, int]]] = msgspec.field(default_factory=dict)
    """The replies in judged and compared responses that had an environment."""


def read_samples(reader: JournalReader) -> ReportSamples:
    """Chooses the responses of a session's current timeline."""
    samples = reader.samples
    held_out = _held_out(reader)
    scored = SampleQuery(order="score", score_from=-sys.float_info.max)
    lowest = SampleQuery(order="score", descending=False, score_from=-sys.float_info.max)
    judged = samples.page(SampleQuery(judged=True), JUDGED_READ)
    with LabelReader(reader.session) as labels:
        preferences = labels.preferences()
    return ReportSamples(
        held_out=held_out,
        through_time=[] if held_out else _through_time(reader),
        best=samples.page(scored, EXTREMES_SHOWN),
        worst=samples.page(lowest, EXTREMES_SHOWN),
        judged=judged[:JUDGED_SHOWN],
        judged_total=samples.count_after(SampleQuery(judged=True), 0),
        labels=_counts(judged),
        preferences=preferences[-PREFERENCES_SHOWN:],
        preferences_total=len(preferences),
        replies=samples.replies_of_judged() if preferences else {},
    )


def spread(steps: list[int], count: int) -> list[int]:
    """At most `count` of the steps, evenly spaced, with the first and the last."""
    if len(steps) <= count:
        return steps
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]


def _held_out(reader: JournalReader) -> list[list[SampleRow]]:
    evaluated = [step for step, value in reader.metrics.series(EVAL_SCORE) if value is not None]
    found: dict[tuple[int, str], list[SampleRow]] = {}
    for step in spread(evaluated, STEPS_SHOWN):
        for row in reader.samples.evaluated(step):
            # The index of a prompt is the same at every evaluation.
            found.setdefault((row.index, row.prompt), []).append(row)
    groups: dict[str, list[SampleRow]] = {}
    for (_, prompt), rows in found.items():
        groups.setdefault(prompt, rows)  # one of its responses to each
    return list(groups.values())[:PROMPTS_SHOWN]


def _through_time(reader: JournalReader) -> list[SampleRow]:
    last = reader.samples.newest_step()
    rows = []
    for step in spread(list(range(1, last + 1)), STEPS_SHOWN):
        first = reader.samples.page(SampleQuery(), 1, last_step=step)
        rows += [row for row in first if row not in rows]
    return rows


def _counts(judged: list[SampleRow]) -> list[LabelCount]:
    counts = []
    for label in LABELS:
        rows = [row for row in judged if row.label == label]
        scores = [row.score for row in rows if row.score is not None]
        if rows:
            counts.append(
                LabelCount(label, len(rows), sum(scores) / len(scores) if scores else None)
            )
    return counts
