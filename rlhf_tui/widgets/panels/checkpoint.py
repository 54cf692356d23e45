"""The selected checkpoint: why it stays, its metrics beside those of now, what came after it."""

from collections.abc import Sequence

from engine import metrics
from engine.journal.rows import CheckpointRow
from engine.metrics import describe, title_of
from rlhf_tui import format as fmt
from rlhf_tui.state.checkpoint_details import CheckpointDetails, changed_settings
from rlhf_tui.state.curves import RECENT_STEPS
from rlhf_tui.state.session_state import SessionState
from rlhf_tui.state.timeline import Marker
from rlhf_tui.widgets.lines import Row, flowed
from rlhf_tui.widgets.panels.latest_samples import response_lines
from rlhf_tui.widgets.panels.panel import Panel, heading
from rlhf_tui.widgets.panels.timeline import MIN_STEP_WIDTH, entry_line
from rlhf_tui.widgets.table import fitted
from rlhf_tui.widgets.wrap import wrap

METRICS_ALWAYS_LISTED = (metrics.SCORE, metrics.KL, metrics.CLIP_FRACTION, metrics.RESPONSE_LENGTH)
"""Metrics that are always listed, before those of the charts."""
METRICS_OF_SETTINGS = (metrics.BETA, metrics.LEARNING_RATE)
"""Metrics that are settings, which have lines of their own."""
MAX_METRICS = 8
NAME, VALUE = 26, 11
"""Cells of a metric's title, and of each of its values."""
MIN_EVENTS = 3
"""Lines of events that are shown before any response."""


class CheckpointPanel(Panel):
    """Shows one checkpoint; empty before :meth:`select` was called."""

    def __init__(self, state: SessionState, charts: Sequence[str]) -> None:
        """`charts`: the metrics of the operator's charts."""
        super().__init__(state, id="checkpoint")
        self.charts = charts
        self._shown: CheckpointRow | None = None
        self._reasons: list[str] = []
        self._details: CheckpointDetails | None = None

    def select(self, checkpoint: CheckpointRow | None, reasons: list[str]) -> None:
        """Shows a checkpoint and why it stays; its details follow with :meth:`take`."""
        self._shown, self._reasons = checkpoint, reasons
        self.update()

    def take(self, details: CheckpointDetails) -> None:
        """Shows details, once and as long as their checkpoint is shown."""
        self._details = details
        self.update()

    def rows(self, width: int, height: int) -> list[Row]:
        """The sections, each below its heading; events and responses share what is left."""
        checkpoint, details = self._shown, self._details
        if checkpoint is None:
            return []
        if details is not None and details.checkpoint != checkpoint:
            details = None
        rows = [
            heading(f"Checkpoint of step {checkpoint.step}", "", width),
            *self._about(checkpoint, details, width),
        ]
        if checkpoint.status == "complete":
            rows += self._metrics(checkpoint, width)
        if height - len(rows) > 1:
            rows += self._settings(details, width)
        samples = details.samples if details is not None else []
        events = self._later(checkpoint)
        room = height - len(rows) - 1
        if events and room > 0:
            most = min(room, max(MIN_EVENTS, room - 1 - len(samples)))
            rows.append(heading(f"After step {checkpoint.step}", "", width))
            rows += _event_lines(events, width, most)
        if samples and height - len(rows) > 1:
            rows.append(heading(f"Responses of step {checkpoint.step}", "", width))
            rows += response_lines(samples, width, height - len(rows))
        return rows

    def _about(
        self, checkpoint: CheckpointRow, details: CheckpointDetails | None, width: int
    ) -> list[Row]:
        state = self.state
        sizes = [c.size for c in state.checkpoints]
        saved = f"saved {fmt.clock(checkpoint.time)} in attempt {checkpoint.attempt}"
        groups: list[Row] = [
            [(saved, "dim")],
            [(fmt.size(checkpoint.size), "")],
            [(f"all {len(sizes)} take ", "dim"), (fmt.size(sum(sizes)), "")],
        ]
        if state.telemetry is not None:
            free = fmt.size(state.telemetry.disk_free)
            groups.append([("disk ", "dim"), (free, ""), (" free", "dim")])
        rows: list[Row] = [[(" ", ""), *row] for row in flowed(groups, width - 1)]
        for reason in self._reasons:
            rows += [[(f" {line}", "good")] for line in wrap(reason, width - 2)]
        if details is not None and details.folder:
            rows.append([(f" {details.folder}", "dim")])
        return rows

    def _metrics(self, checkpoint: CheckpointRow, width: int) -> list[Row]:
        """Means up to the checkpoint's step and up to the last one; held-out metrics as they are.

        One step says little: the scores of a batch scatter.
        """
        step, last = checkpoint.step, self.state.head.step
        named = [
            name
            for name in dict.fromkeys((*METRICS_ALWAYS_LISTED, *self.charts))
            if name not in METRICS_OF_SETTINGS
        ]
        intervals = {describe(name).interval for name in named}
        then = {name: self._value(name, step) for name in named if name not in intervals}
        known = [name for name, value in then.items() if value is not None][:MAX_METRICS]
        if not known:
            return []
        title = heading(f"Metrics, means of {RECENT_STEPS} steps", "", width)
        if last == step:
            return [title, *(_metric(title_of(name), fmt.number(then[name])) for name in known)]
        rows = [title, _metric("", f"step {step:,}", f"step {last:,}", "change", tone="dim")]
        for name in known:
            before, after = then[name], self._value(name, last)
            change = ""
            shown = fmt.number(before), fmt.number(after)
            if before is not None and after is not None:
                change = ("+" if after > before else "") + fmt.number(after - before)
            if shown[0] == shown[1]:  # the digits of a smaller change would be others than theirs
                change = "0"
            rows.append(_metric(title_of(name), *shown, change))
        return rows

    def _value(self, name: str, step: int) -> float | None:
        series = self.state.curves.series(name)
        if name.startswith("eval/"):
            return series.latest(step)
        return series.mean(step - RECENT_STEPS + 1, step)

    def _settings(self, details: CheckpointDetails | None, width: int) -> list[Row]:
        if details is None or not details.settings or self.state.starting:
            return []
        rows = [heading("Settings that a roll back changes", "", width)]
        changed = changed_settings(self.state.head.settings, details.settings)
        if not changed:
            return [*rows, [(" none", "dim")]]
        groups: list[Row] = [
            [(f"{key} ", "dim"), (f"{old} → ", ""), (new, "strong")] for key, old, new in changed
        ]
        return [*rows, *([(" ", ""), *row] for row in flowed(groups, width - 1))]

    def _later(self, checkpoint: CheckpointRow) -> list[Marker]:
        """What a roll back would abandon, newest first, without checkpoints."""
        if checkpoint.status != "complete":
            return []
        return [
            m
            for m in reversed(self.state.timeline.markers())
            if m.step > checkpoint.step and m.kind != "checkpoint" and not m.abandoned
        ]


def _metric(title: str, before: str, after: str = "", change: str = "", tone: str = "") -> Row:
    values = [(f"{fitted(text, VALUE, right=True)}  ", tone) for text in (before, after)]
    last = (fitted(change, VALUE, right=True), "dim")
    return [(f" {fitted(title, NAME)}", "dim"), *values, last]


def _event_lines(events: Sequence[Marker], width: int, most: int) -> list[Row]:
    """The first events; if there are more, the last of several lines has their number."""
    steps = max([MIN_STEP_WIDTH, *(len(str(m.step)) for m in events)])
    shown = events if len(events) <= most else events[: max(most - 1, 1)]
    rows: list[Row] = [entry_line([marker], width, steps) for marker in shown]
    if len(shown) < len(events) and most > 1:
        rows.append([(f"        … and {len(events) - len(shown):,} earlier", "dim")])
    return rows
