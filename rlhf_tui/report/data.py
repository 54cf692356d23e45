"""Reads everything that a report shows, of a live or an ended session."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

from engine.journal.reader import JournalReader
from engine.journal.rows import AttemptRow, CheckpointRow, SessionMeta
from engine.metrics import (
    BETA,
    ENTROPY,
    EVAL_KL,
    EVAL_SCORE,
    EVAL_SCORE_CI,
    KL,
    RESPONSE_LENGTH,
    SCORE,
    STEP_TIME,
    title_of,
)
from engine.session.folder import Session
from rlhf_tui.report.curves import Curve, read_curves
from rlhf_tui.report.interventions import Intervention, read_interventions
from rlhf_tui.report.samples import ReportSamples, read_samples
from rlhf_tui.report.settings import Setting, settings_of_run
from rlhf_tui.state.timeline import Marker, timeline

HEADLINES = (SCORE, KL, BETA, RESPONSE_LENGTH, ENTROPY, STEP_TIME)
HELD_OUT = (EVAL_SCORE, EVAL_KL)
STEPS_AVERAGED = 10
"""Steps of the mean at the start and at the end of a run, as in the dashboard."""


@dataclass(frozen=True)
class Headline:
    """A metric at the start and at the end."""

    title: str
    first: float | None
    last: float | None
    half_width: float | None = None
    """Of the 95 % interval of `last`."""
    steps: tuple[int, int] | None = None
    """Of the two values; None for means of :data:`STEPS_AVERAGED` steps."""


@dataclass(frozen=True)
class ReportCheckpoint:
    """A checkpoint and its value of `train.best_metric`."""

    row: CheckpointRow
    value: float | None
    best: bool


@dataclass(frozen=True)
class Report:
    """The contents of a report."""

    name: str
    made: float
    state: str
    meta: SessionMeta
    step: int
    total_steps: int
    attempts: list[AttemptRow]
    forked_from: tuple[str, int] | None
    """Session and step."""
    first_time: float | None
    last_time: float | None
    """Of the last step."""
    headlines: list[Headline]
    held_out: list[Headline]
    best_metric: str
    settings: list[Setting]
    curves: list[Curve]
    markers: list[Marker]
    """The whole timeline, oldest first."""
    interventions: list[Intervention]
    samples: ReportSamples
    checkpoints: list[ReportCheckpoint]

    @property
    def alerts(self) -> list[Marker]:
        """The alerts, oldest first."""
        return [m for m in self.markers if m.kind == "alert"]

    @property
    def notes(self) -> list[Marker]:
        """The notes, oldest first."""
        return [m for m in self.markers if m.kind == "note"]


def read_report(session: Session, now: Callable[[], float] = time.time) -> Report:
    """Reads a session.

    Raises:
        RlhfError: its journal or its configuration cannot be read.
    """
    config = session.config()
    with JournalReader(session) as record:
        state, meta, attempts = record.state(), record.meta(), record.attempts()
        step, newest = record.last_step(), record.metrics(last=1)
        origin = record.fork_origin()
        markers = timeline(
            record.events(),
            record.commands(),
            attempts,
            reached=_reached(record),
            crashed_at=step if state == "crashed" else None,
        )
        return Report(
            name=session.name,
            made=now(),
            state=state,
            meta=meta,
            step=step,
            total_steps=meta.total_steps or config.train.steps,
            attempts=attempts,
            forked_from=(origin.session, origin.step) if origin is not None else None,
            first_time=attempts[0].started if attempts else None,
            last_time=newest[0].time if newest else None,
            headlines=[h for name in HEADLINES if (h := _headline(record, name, step))],
            held_out=[h for name in HELD_OUT if (h := _held_out(record, name))],
            best_metric=config.train.best_metric,
            settings=settings_of_run(config),
            curves=read_curves(record),
            markers=markers,
            interventions=read_interventions(record, markers),
            samples=read_samples(record),
            checkpoints=_checkpoints(record, config.train.best_metric),
        )


def _reached(record: JournalReader) -> dict[int, int]:
    """Attempt → its last step on an abandoned branch."""
    reached: dict[int, int] = {}
    for attempt, step, _ in record.past_series(SCORE):
        reached[attempt] = max(reached.get(attempt, 0), step)
    return reached


def _headline(record: JournalReader, name: str, last: int) -> Headline | None:
    first = _mean(record.series(name, 0, STEPS_AVERAGED))
    end = _mean(record.series(name, last - STEPS_AVERAGED, last))
    return None if first is None and end is None else Headline(title_of(name), first, end)


def _mean(points: list[tuple[int, float | None]]) -> float | None:
    known = [value for _, value in points if value is not None]
    return fmean(known) if known else None


def _held_out(record: JournalReader, name: str) -> Headline | None:
    points = [(step, value) for step, value in record.series(name) if value is not None]
    if not points:
        return None
    (first_step, first), (last_step, last) = points[0], points[-1]
    widths = dict(record.series(EVAL_SCORE_CI, last_step - 1, last_step))
    width = widths.get(last_step) if name == EVAL_SCORE else None
    return Headline(title_of(name), first, last, width, (first_step, last_step))


def _checkpoints(record: JournalReader, metric: str) -> list[ReportCheckpoint]:
    rows = record.checkpoints(("complete", "superseded", "removed"))
    values = {
        row.step: dict(record.series(metric, row.step - 1, row.step)).get(row.step) for row in rows
    }
    kept = [v for r in rows if r.status == "complete" and (v := values[r.step]) is not None]
    best = max(kept, default=None)
    return [
        ReportCheckpoint(
            row,
            values[row.step] if row.status != "superseded" else None,
            row.status == "complete" and best is not None and values[row.step] == best,
        )
        for row in rows
    ]
