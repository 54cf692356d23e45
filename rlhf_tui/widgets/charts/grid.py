"""The grid of charts: which are visible, in how many columns, and which one is enlarged."""

from textual.app import ComposeResult
from textual.containers import Container

from rlhf_tui.state.preferences import names_of
from rlhf_tui.state.session_state import SessionState
from rlhf_tui.state.viewport import Viewport
from rlhf_tui.widgets.charts.chart import Chart

MIN_ROWS, MIN_COLUMNS = 5, 30
"""The minimum size of a chart in cells."""


class ChartGrid(Container):
    """Shows as many charts as fit, always including the focused one."""

    def __init__(
        self, state: SessionState, view: Viewport, charts: list[str], log: list[str]
    ) -> None:
        """A grid of charts.

        Args:
            state: the session.
            view: shared by the charts.
            charts: the metric of each chart, or several joined by ` + `, as in the preferences.
            log: metrics with a logarithmic scale.
        """
        super().__init__(id="charts")
        self.state, self.view = state, view
        self.specs, self.log_metrics = charts, log
        self.columns = 0
        self.enlarged = False
        self._current = 0
        self._visible: list[Chart] = []

    def compose(self) -> ComposeResult:
        """Creates the charts."""
        for spec in self.specs:
            yield self._chart(spec)

    def _chart(self, spec: str) -> Chart:
        names = names_of(spec)
        return Chart(names, self.state, self.view, log=names[0] in self.log_metrics)

    @property
    def charts(self) -> list[Chart]:
        """All charts in order, including hidden ones."""
        return list(self.query(Chart))

    @property
    def current(self) -> Chart | None:
        """The chart that has the focus or had it last; None without charts."""
        charts = self.charts
        if not charts:
            return None
        focused = next((i for i, c in enumerate(charts) if c.has_focus), None)
        self._current = min(self._current if focused is None else focused, len(charts) - 1)
        return charts[self._current]

    async def set_charts(self, specs: list[str]) -> None:
        """Replaces the charts; see the constructor's `charts`."""
        self.specs = specs
        self._current = 0
        self._visible = []
        await self.remove_children()
        await self.mount_all([self._chart(spec) for spec in specs])
        self.lay_out()
        if self.charts:
            self.charts[0].focus()

    def read(self, state: SessionState, view: Viewport) -> None:
        """Shows another session, or a changed view."""
        self.state, self.view = state, view
        for chart in self.charts:
            chart.state, chart.view = state, view
        self.update()

    def update(self) -> None:
        """Updates the visible charts."""
        for chart in self.charts:
            if chart.display:
                chart.update()

    def step(self, by: int) -> None:
        """Moves the focus by a number of charts, cyclically."""
        charts = self.charts
        if self.current is None:
            return
        self._current = (self._current + by) % len(charts)
        self.lay_out()
        charts[self._current].focus()

    def on_resize(self) -> None:
        """Lays the charts out for the new size."""
        self.lay_out()

    def lay_out(self) -> None:
        """Chooses the number of columns and the visible charts."""
        charts, width, height = self.charts, self.size.width, self.size.height
        if not charts or not width or not height:
            return
        self._current = min(self._current, len(charts) - 1)
        if self.enlarged:
            shown, columns = [charts[self._current]], 1
        else:
            columns = self.columns or fitting_columns(len(charts), width)
            lines = max(height // MIN_ROWS, 1)
            fit = min(columns * lines, len(charts))
            first = self._current // fit * fit
            shown = charts[first : first + fit]
            columns = min(columns, len(shown))
        if shown != self._visible or self.styles.grid_size_columns != columns:
            self._visible = shown
            self.styles.grid_size_columns = columns
            self.styles.grid_size_rows = -(-len(shown) // columns)
            for i, chart in enumerate(charts, start=1):
                chart.display = chart in shown
                chart.place = f"{i}/{len(charts)}" if len(shown) < len(charts) else ""


def fitting_columns(count: int, width: int) -> int:
    """The number of columns for `count` charts in `width` cells: at most three."""
    fitting = max(width // MIN_COLUMNS, 1)
    wanted = 1 if count == 1 else 2 if count <= 4 or width < 110 else 3
    return min(fitting, wanted)
