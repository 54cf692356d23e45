"""The preview of a session: its curves, last alert, settings that differ, newest responses."""

from collections.abc import Sequence
from pathlib import Path

from textual.app import ComposeResult
from textual.containers import Container, Horizontal

from engine.journal.rows import AlertEvent, SampleRow
from rlhf_tui import format as fmt
from rlhf_tui.state.runs.session_preview import METRICS, SessionPreview
from rlhf_tui.state.session_state import SessionState
from rlhf_tui.state.timeline import short_alert
from rlhf_tui.state.viewport import Viewport
from rlhf_tui.widgets.charts.chart import Chart
from rlhf_tui.widgets.lines import Lines, Row, flowed
from rlhf_tui.widgets.panels.latest_samples import newest_responses
from rlhf_tui.widgets.panels.panel import heading
from rlhf_tui.widgets.wrap import wrap

VALUE_WIDTH = 24
"""Cells of a value that differs; a path may be long."""


class PreviewPanel(Container):
    """Shows a :class:`SessionPreview`; empty before the first."""

    def __init__(self) -> None:
        super().__init__(id="preview")
        self._state = SessionState()

    def compose(self) -> ComposeResult:
        """The charts side by side, the notes, the responses."""
        with Horizontal(id="preview-charts"):
            for name in METRICS:
                chart = Chart([name], self._state, Viewport(weight=0.0))
                chart.can_focus = False
                yield chart
        yield PreviewNotes()
        yield PreviewSamples()

    def show(self, name: str, preview: SessionPreview) -> None:
        """Replaces what is shown."""
        state = SessionState(name)
        state.take(preview.update)
        state.problem = "" if state.known else preview.problem
        for chart in self.query(Chart):
            chart.state = state
            chart.update()
        self.query_one(PreviewNotes).read(state, preview)
        self.query_one(PreviewSamples).read(state)


class PreviewNotes(Lines):
    """The last alert, and the settings that differ."""

    def __init__(self) -> None:
        super().__init__(id="preview-notes")
        self._state = SessionState()
        self._preview = SessionPreview("")

    def read(self, state: SessionState, preview: SessionPreview) -> None:
        """Shows another session."""
        self._state, self._preview = state, preview
        self.update()

    def rows(self, width: int, height: int) -> list[Row]:
        """The alert in a line, the settings in as many as there is room for, if any."""
        preview = self._preview
        if not preview.folder:
            return []
        if preview.problem:
            alert = [self._alert()] if self._state.known else []
            problem = wrap(preview.problem, width - 2)
            return [*alert, *([(f" {line}", "bad")] for line in problem)]
        other = preview.against or "the defaults"
        rows: list[Row] = [self._alert()]
        if height < 3:
            return rows
        rows.append(heading(f"Settings unlike {other}", "", width))
        if not preview.differences:
            return [*rows, [(" none", "dim")]]
        groups = [_difference(d.key, d.value, d.other) for d in preview.differences]
        lines = flowed(groups, width, gap="")
        room = height - len(rows)
        if len(lines) > room > 0:
            lines[room - 1] = [(self._more(), "dim")]
        return [*rows, *lines[:room]]

    def _more(self) -> str:
        """The remark that there are more differences, and the command that prints all."""
        preview = self._preview
        if not preview.against:
            return " … and more"
        root = Path(preview.folder).parent
        return f" … and more: {fmt.command('diff', self._state.name, preview.against, root=root)}"

    def _alert(self) -> Row:
        for event in self._state.timeline.events:
            if isinstance(event.payload, AlertEvent):
                return [(f" ! step {event.step}: {short_alert(event.payload)}", "warn")]
        return [(" no alerts", "dim")]


def _difference(key: str, value: object, other: object) -> Row:
    return [(f" {key} ", "dim"), (_short(value), "strong"), (f" ({_short(other)}) ", "dim")]


def _short(value: object) -> str:
    """Only the end of a path, only the beginning of a list."""
    text = fmt.value_text(value)
    if isinstance(value, list) and len(text) > VALUE_WIDTH:
        return f"{text[: VALUE_WIDTH - 1]}…"
    return text if len(text) <= VALUE_WIDTH else f"…{text[1 - VALUE_WIDTH :]}"


class PreviewSamples(Lines):
    """The newest responses. Not a :class:`Panel`: screens let all panels show the open session."""

    def __init__(self) -> None:
        super().__init__(id="preview-samples")
        self._samples: Sequence[SampleRow] = ()

    def read(self, state: SessionState) -> None:
        """Shows another session."""
        self._samples = state.samples
        self.update()

    def rows(self, width: int, height: int) -> list[Row]:
        """As on the dashboard, but without the key, which would show those of the open session."""
        return newest_responses(self._samples, width, height)
