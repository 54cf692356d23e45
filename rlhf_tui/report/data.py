"""Reads everything that a report shows, of a live or an ended session."""

import time
from collections.abc import Callable

from msgspec import Struct

from engine.agreement import Agreement
from engine.journal.judgements.agreement import read_agreement
from engine.journal.reader import JournalReader
from engine.journal.rows import AttemptRow, CheckpointRow, SessionMeta
from engine.metrics import SCORE
from engine.session.folder import SessionFolder
from rlhf_tui.report.comparison import Comparison, read_comparison
from rlhf_tui.report.curves import Curve, read_curves
from rlhf_tui.report.headlines import Headline, read_headlines, read_held_out
from rlhf_tui.report.interventions import Intervention, read_interventions
from rlhf_tui.report.samples import ReportSamples, read_samples
from rlhf_tui.report.settings import Setting, settings_of_run
from rlhf_tui.state.timeline import Marker, timeline


class ReportCheckpoint(Struct, frozen=True):
    """A checkpoint and its value of `train.best_metric`."""

    row: CheckpointRow
    value: float | None
    best: bool


class Report(Struct, frozen=True):
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
    """The time of the last step."""
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
    agreement: Agreement
    """How far the scores agree with the judgements."""
    comparison: Comparison | None = None
    """The run beside it."""

    @property
    def alerts(self) -> list[Marker]:
        """The alerts, oldest first."""
        return [m for m in self.markers if m.kind == "alert"]

    @property
    def notes(self) -> list[Marker]:
        """The notes, oldest first."""
        return [m for m in self.markers if m.kind == "note"]


def read_report(
    session: SessionFolder, now: Callable[[], float] = time.time, other: SessionFolder | None = None
) -> Report:
    """Reads a session, and another one to put beside it.

    Raises:
        RlhfError: a journal or a configuration cannot be read.
    """
    config = session.config()
    comparison = read_comparison(session, other) if other is not None else None
    with JournalReader(session) as reader:
        state, meta, attempts = reader.state(), reader.meta(), reader.attempts()
        step, newest = reader.last_step(), reader.metrics.rows(last=1)
        origin = reader.fork_origin()
        markers = timeline(
            reader.events(),
            reader.commands(),
            attempts,
            reached=reached_steps(reader),
            crashed_at=step if state == "crashed" else None,
        )
        agreement = read_agreement(reader)
        curves = read_curves(reader, agreement)
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
            headlines=read_headlines(reader, step),
            held_out=read_held_out(reader, step),
            best_metric=config.train.best_metric,
            settings=settings_of_run(config),
            curves=comparison.overlaid(curves) if comparison is not None else curves,
            markers=markers,
            interventions=read_interventions(reader, markers),
            samples=read_samples(reader),
            agreement=agreement,
            checkpoints=_checkpoints(reader, config.train.best_metric),
            comparison=comparison,
        )


def reached_steps(reader: JournalReader) -> dict[int, int]:
    """Attempt → its last step on an abandoned branch."""
    reached: dict[int, int] = {}
    for attempt, step, _ in reader.metrics.past_series(SCORE):
        reached[attempt] = max(reached.get(attempt, 0), step)
    return reached


def _checkpoints(reader: JournalReader, metric: str) -> list[ReportCheckpoint]:
    rows = reader.checkpoints(("complete", "superseded", "removed"))
    values = {row.step: reader.metrics.value_at(metric, row.step) for row in rows}
    best = reader.best_checkpoint(metric)
    return [
        ReportCheckpoint(
            row,
            values[row.step] if row.status != "superseded" else None,
            row.status == "complete" and row.step == best,
        )
        for row in rows
    ]
