"""The dashboard: current phase, charts, steering, timeline and machine."""

import functools
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container, Vertical
from textual.widget import Widget

from rlhf_tui.screens.base import SessionScreen
from rlhf_tui.screens.parts.overlaying import OverlaysRead, RunOverlays
from rlhf_tui.state.messages import (
    ChartPanned,
    ChartZoomed,
    CursorMoved,
    RowHighlighted,
    RowSelected,
)
from rlhf_tui.state.preferences import names_of
from rlhf_tui.state.viewport import WEIGHTS
from rlhf_tui.widgets.charts.chart import Chart
from rlhf_tui.widgets.charts.grid import ChartGrid
from rlhf_tui.widgets.panels.cursor import CursorPanel
from rlhf_tui.widgets.panels.latest_samples import LatestSamplesPanel
from rlhf_tui.widgets.panels.machine import MachinePanel
from rlhf_tui.widgets.panels.phases import PhaseStrip
from rlhf_tui.widgets.panels.steering import SteeringPanel
from rlhf_tui.widgets.panels.timeline import TimelinePanel

PAGES = ("timeline", "latest", "machine")
"""Panels that a narrow terminal shows one at a time."""


class DashboardScreen(SessionScreen):
    """Shows the open session; the screen of the key 2."""

    MODE = "dashboard"
    AUTO_FOCUS = "Chart"
    WRITES = frozenset({"resume"})
    READ_ONLY = "nothing can be started"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left,h", "cursor(-1)", "crosshair left", show=False),
        Binding("right,l", "cursor(1)", "crosshair right", show=False),
        Binding("shift+left,H", "cursor(-10)", "crosshair left, ten cells", show=False),
        Binding("shift+right", "cursor(10)", "crosshair right, ten cells", show=False),
        Binding("home,g", "cursor_to(0)", "crosshair to the first step", show=False),
        Binding("end,G", "cursor_to(1)", "crosshair to the newest step", show=False),
        Binding("n", "marker(1)", "next event", show=False),
        Binding("N", "marker(-1)", "previous event", show=False),
        Binding("down,j", "chart(1)", "next chart", show=False),
        Binding("up,k", "chart(-1)", "previous chart", show=False),
        Binding("plus,equals_sign", "zoom(0.5)", "zoom in", show=False),
        Binding("minus", "zoom(2.0)", "zoom out", show=False),
        Binding("comma", "pan(-0.5)", "earlier", show=False),
        Binding("full_stop", "pan(0.5)", "later", show=False),
        Binding("0", "fit", "the whole run", show=False),
        Binding("z", "enlarge", "full screen", show=False),
        Binding("enter", "open", "open the event, or full screen", show=False),
        Binding("r", "resume", "resume"),
        Binding("m", "metrics", "metrics"),
        Binding("d", "columns", "chart columns", show=False),
        Binding("L", "log", "logarithmic", show=False),
        Binding("s", "smooth", "smoothing", show=False),
        Binding("o", "past", "earlier attempts on/off", show=False),
        Binding("O", "others", "overlay other sessions", show=False),
        Binding("A", "align", "align what is overlaid", show=False),
        Binding("v", "page", "switch the lower right panel", show=False),
        Binding("escape", "back", "back: crosshair off, whole run", show=False),
    ]

    def compose_body(self) -> ComposeResult:
        """Phases, charts, panels."""
        state, prefs = self.context.state, self.context.preferences
        yield PhaseStrip(state, id="phases")
        with Container(id="body"):
            with Vertical(id="curves"):
                grid = ChartGrid(state, self.context.view, list(prefs.charts), prefs.log)
                grid.columns = prefs.columns
                yield grid
                yield CursorPanel(state, self.context.view)
            with Container(id="side", classes="timeline"):
                steering = SteeringPanel(state, id="steering")
                steering.read_only = not self.context.steers
                yield steering
                yield MachinePanel(state, id="machine")
                timeline = TimelinePanel(state, self.context.view)
                timeline.read_only = not self.context.steers
                yield timeline
                yield LatestSamplesPanel(state, id="latest")

    def why_disabled(self, action: str) -> str:
        """Only a run without an engine can be resumed, and only some panels are hidden."""
        if reason := super().why_disabled(action):
            return reason
        if action == "resume" and self.context.state.live:
            return f"'{self.context.state.name}' has an engine: nothing to resume"
        if action == "page" and not self.has_class("-narrow"):
            return "all panels are shown already"
        return ""

    def action_resume(self) -> None:
        """Asks for overrides, then resumes the run from its last checkpoint."""
        self.context.engines.ask_resume(self.context.state.name)

    @property
    def focus_chain(self) -> list[Widget]:
        """The stops of the tab key: the charts are one stop, within which j and k move."""
        chart = self.grid.current
        return [w for w in super().focus_chain if w is chart or not isinstance(w, Chart)]

    @functools.cached_property
    def overlays(self) -> RunOverlays:
        """The runs that are drawn over the open one."""
        return RunOverlays(self, self.context, self.refresh_view)

    @property
    def grid(self) -> ChartGrid:
        """The charts."""
        return self.query_one(ChartGrid)

    def draw(self, *, only_live: bool = False) -> None:
        """Shows the state. Gives the phases a line for each rank, up to a tenth of the screen."""
        ranks = len(self.context.state.progress.phases)
        most = max(1, self.size.height // 10)
        self.query_one(PhaseStrip).styles.height = min(max(ranks, 1), most)
        self._fit_machine()
        super().draw(only_live=only_live)

    def _fit_machine(self) -> None:
        """Gives the machine a line for each device and rank, up to a third of the screen."""
        machine = self.query_one(MachinePanel)
        if self.has_class("-narrow"):
            machine.styles.clear_rule("height")
            return
        most = max(5, self.size.height // 3)
        machine.styles.height = min(max(machine.wanted(), 5), most)

    def refresh_content(self) -> None:
        """Draws the charts and the timeline."""
        self.overlays.refresh()
        self.grid.read(self.context.state, self.context.view)
        self.query_one(TimelinePanel).read(self.context.state, self.context.view)

    def session_changed(self) -> None:
        """Uses the viewport of the new session."""
        self.query_one(CursorPanel).view = self.context.view

    def refresh_view(self) -> None:
        """Draws what depends on the viewport."""
        self.grid.update()
        self.query_one(CursorPanel).update()
        self.query_one(TimelinePanel).update()

    def on_cursor_moved(self, message: CursorMoved) -> None:
        """Puts the crosshair on the step under the mouse."""
        self.context.view.put(self.context.state, message.step)
        self.refresh_view()

    def on_chart_zoomed(self, message: ChartZoomed) -> None:
        """Zooms around the step under the mouse."""
        self.context.view.zoom(self.context.state, message.factor, message.step)
        self.refresh_view()

    def on_chart_panned(self, message: ChartPanned) -> None:
        """Moves the window of steps."""
        self.action_pan(message.share)

    # -- the crosshair -------------------------------------------------------------------------

    def action_cursor(self, cells: int) -> None:
        """Moves the crosshair by cells of a chart, at least one step for each cell."""
        chart = self.grid.current
        stride = self.context.view.stride(self.context.state, chart.cells if chart else 1)
        self.context.view.move(self.context.state, cells * stride)
        self.refresh_view()

    def action_cursor_to(self, end: int) -> None:
        """Moves the crosshair to the first or the newest step."""
        self.context.view.put(self.context.state, self.context.state.head.step if end else 0)
        self.refresh_view()

    def action_marker(self, way: int) -> None:
        """Selects the next event on the charts, also among those of one step; first the newest."""
        view, state = self.context.view, self.context.state
        # Before the first step no event is on the charts, and an alert may have paused the run.
        markers = state.timeline.markers() or state.timeline.entries()
        if not markers:
            none = "no events yet: changes, alerts, checkpoints and notes are marked"
            self.context.say(state.unread or none)
            return
        keys = [m.key for m in markers]
        if view.selected in keys:
            found = markers[(keys.index(view.selected) + way) % len(markers)]
        elif (at := view.cursor) is None:
            found = next(m for m in reversed(state.timeline.entries()) if m in markers)
        elif way > 0:
            found = next((m for m in markers if m.step > at), markers[0])
        else:
            found = next((m for m in reversed(markers) if m.step < at), markers[-1])
        view.select(state, found)
        self.refresh_view()

    # -- events --------------------------------------------------------------------------------

    def on_row_highlighted(self, message: RowHighlighted) -> None:
        """An entry of the timeline was selected."""
        self.refresh_view()

    def on_row_selected(self, message: RowSelected) -> None:
        """Opens an entry of the timeline: enter, or a second click."""
        self._open_event()

    def action_open(self) -> None:
        """Opens the selected event; without one, shows one chart alone."""
        if self.context.view.marker(self.context.state) is None:
            self.action_enlarge()
        else:
            self._open_event()

    def _open_event(self) -> None:
        """Shows the whole text of the selected event. n and N move to the next and previous one."""
        from rlhf_tui.dialogs.event import EventDialog  # noqa: PLC0415 - keeps start-up short

        state = self.context.state
        if (marker := self.context.view.marker(state)) is None:
            return

        def closed(way: str | None) -> None:
            if way:
                self.action_marker(int(way))
                self._open_event()

        self.app.push_screen(EventDialog(state, marker), closed)

    # -- the window ----------------------------------------------------------------------------

    def action_zoom(self, factor: float) -> None:
        """Zooms in or out."""
        self.context.view.zoom(self.context.state, factor)
        self.refresh_view()

    def action_pan(self, share: float) -> None:
        """Moves the window to earlier or later steps."""
        self.context.view.pan(self.context.state, share)
        self.refresh_view()

    def action_fit(self) -> None:
        """Shows the whole run."""
        self.context.view.all()
        self.refresh_view()

    def action_back(self) -> None:
        """Leaves one level: full screen, the crosshair, the zoom."""
        view = self.context.view
        if self.grid.enlarged:
            self.action_enlarge()
        elif view.cursor is not None:
            view.clear()
        else:
            view.all()
        self.refresh_view()

    # -- the charts ----------------------------------------------------------------------------

    def action_chart(self, by: int) -> None:
        """Gives the focus to another chart."""
        self.grid.step(by)
        self.refresh_view()

    def action_enlarge(self) -> None:
        """Shows one chart alone, or all of them again."""
        chart = self.grid.current
        self.grid.enlarged = not self.grid.enlarged
        self.grid.lay_out()
        if chart is not None:
            chart.focus()

    def action_columns(self) -> None:
        """Cycles through the number of columns: as many as fit, one to four."""
        prefs = self.context.preferences
        prefs.columns = (prefs.columns + 1) % 5
        self.grid.columns = prefs.columns
        self.grid.lay_out()
        self.context.save_preferences()
        self.context.say(f"chart columns: {prefs.columns or 'as many as fit'}")

    def action_log(self) -> None:
        """Switches the scale of the focused chart between linear and logarithmic."""
        chart = self.grid.current
        if chart is None:
            return
        chart.log_scale = not chart.log_scale
        prefs, name = self.context.preferences, chart.names[0]
        prefs.log = [n for n in prefs.log if n != name] + ([name] if chart.log_scale else [])
        self.context.save_preferences()
        chart.update()

    def action_smooth(self) -> None:
        """Cycles through the smoothing: off and three strengths."""
        view, prefs = self.context.view, self.context.preferences
        after = [w for w in WEIGHTS if w > view.weight + 1e-9]
        view.weight = prefs.weight = after[0] if after else 0.0
        self.context.save_preferences()
        self.refresh_view()

    def action_past(self) -> None:
        """Shows or hides earlier attempts."""
        view = self.context.view
        view.past = self.context.preferences.past = not view.past
        self.context.save_preferences()
        self.context.say(f"earlier attempts: {'shown' if view.past else 'hidden'}")
        self.refresh_view()

    def action_page(self) -> None:
        """Shows the next of :data:`PAGES` on a narrow terminal."""
        side = self.query_one("#side")
        now = next(p for p in PAGES if side.has_class(p))
        side.remove_class(now)
        side.add_class(PAGES[(PAGES.index(now) + 1) % len(PAGES)])

    def action_metrics(self) -> None:
        """Asks which metrics have a chart."""
        from rlhf_tui.dialogs.metrics import ChartPicker  # noqa: PLC0415 - keeps start-up short

        async def take(result: str | None) -> None:
            if result:
                charts = result.split("\n")
                self.context.preferences.charts = charts
                self.context.save_preferences()
                self.context.read_metrics()
                await self.grid.set_charts(charts)

        dialog = ChartPicker(self.context.state, [names_of(chart) for chart in self.grid.specs])
        self.app.push_screen(dialog, take)
        if dialog.unread and (session := self.context.session) is not None:
            self.read_in_thread("newest", functools.partial(dialog.read_newest, session))

    def action_others(self) -> None:
        """Asks which sessions' curves are overlaid."""
        self.overlays.choose()

    def action_align(self) -> None:
        """Aligns overlaid sessions by step, by responses or by hours."""
        self.overlays.next_alignment()

    def on_overlays_read(self, message: OverlaysRead) -> None:
        """Overlays the sessions that were read."""
        self.overlays.take(message)
