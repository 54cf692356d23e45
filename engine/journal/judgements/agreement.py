"""How far a session's scores agree with its judgements, over the steps.

The score of a response is the one used in training, from the reward in force at its step.
Scores of different rewards are never compared: a fork or a resume with another reward begins a new
part.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence

from msgspec import Struct

from engine.agreement import Agreement, JudgedScore, Point, placements, preference_agreement
from engine.journal.judgements.labels import LabelReader, Preference, Response
from engine.journal.reader import JournalReader
from engine.journal.rows import SampleRow
from engine.journal.samples import SampleReader


def read_agreement(reader: JournalReader) -> Agreement:
    """Compares the judgements of the current timeline with the recorded scores.

    Raises:
        JournalError: the judgements cannot be read.
    """
    changes = reader.reward_changes()
    # A reader of its own: the file of judgements may have been replaced since the other was opened.
    with SampleReader(reader.session) as samples, LabelReader(reader.session) as labels:
        rows, preferences = samples.judged(), labels.preferences()
    scored = [s for row in rows if not row.left and (s := _scored(row, changes)) is not None]
    parts: dict[int, list[JudgedScore]] = {}
    for each in scored:
        if (label := each.row.label) is not None:
            judged = JudgedScore(each.row.step, each.score, label == "good")
            parts.setdefault(each.part, []).append(judged)
    points = [point for judged in parts.values() for point in placements(judged)]
    return Agreement.of(points + _of_preferences(preferences, scored))


class _Scored(Struct, frozen=True):
    """A response with a finite score."""

    row: SampleRow
    score: float
    part: int
    """Number of changes of the reward before its step."""


def _scored(row: SampleRow, changes: Sequence[int]) -> _Scored | None:
    if row.score is None or not math.isfinite(row.score):
        return None
    return _Scored(row, row.score, bisect_left(changes, row.step))


def _of_preferences(preferences: list[Preference], scored: list[_Scored]) -> list[Point]:
    """The agreement with each preference between two responses scored by the same reward."""
    known = {Response.of(s.row): s for s in scored}
    points = []
    for preference in preferences:
        chosen, rejected = known.get(preference.chosen), known.get(preference.rejected)
        if chosen is not None and rejected is not None and chosen.part == rejected.part:
            agreement = preference_agreement(chosen.score, rejected.score)
            points.append(Point(max(chosen.row.step, rejected.row.step), agreement))
    return points
