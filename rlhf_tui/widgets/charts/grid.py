"""The grid of charts: which metrics, how many beside one another, which one is enlarged."""

from textual.app import ComposeResult
from textual.containers import Container

from rlhf_tui.state.session_state import SessionState
from rlhf_tui.state.viewport import Viewport
from rlhf_tui.widgets.charts.chart import Chart

LOWEST, NARROW = 5, 30
"""Rows and columns below which a chart says too little."""


class ChartGrid(Container):
    """Shows as many charts as fit; the one with the focus is always among them."""

    def __init__(
        self, state: SessionState, view: Viewport, charts: list[str], log: list[str]
    ) -> None:
        """`charts` as in the preferences: a metric, or several joined by ` + `."""
        super().__init__(id="charts")
        self.state, self.view = state, view
        self.specs, self.log_metrics = charts, log
        self.columns = 0
        self.enlarged = False
        self._at = 0
        self._seen: list[Chart] = []

    def compose(self) -> ComposeResult:
        """A chart for each spec."""
        for spec in self.specs:
            yield self._chart(spec)

    def _chart(self, spec: str) -> Chart:
        names = [n.strip() for n in spec.split(" + ")]
        return Chart(names, self.state, self.view, log=names[0] in self.log_metrics)

    @property
    def charts(self) -> list[Chart]:
        """All of them, in order."""
        return list(self.query(Chart))

    @property
    def current(self) -> Chart | None:
        """The one that has the focus, or had it last."""
        charts = self.charts
        if not charts:
            return None
        focused = next((i for i, c in enumerate(charts) if c.has_focus), None)
        self._at = min(self._at if focused is None else focused, len(charts) - 1)
        return charts[self._at]

    async def set_charts(self, specs: list[str]) -> None:
        """Other metrics."""
        self.specs = specs
        self._at = 0
        self._seen = []
        await self.remove_children()
        await self.mount_all([self._chart(spec) for spec in specs])
        self.lay_out()
        if self.charts:
            self.charts[0].focus()

    def read(self, state: SessionState, view: Viewport) -> None:
        """Another session was opened, or the state has changed."""
        self.state, self.view = state, view
        for chart in self.charts:
            chart.state, chart.view = state, view
        self.update()

    def update(self) -> None:
        """Draws what is in sight."""
        for chart in self.charts:
            if chart.display:
                chart.update()

    def step(self, by: int) -> None:
        """The focus to the next chart or the one before."""
        charts = self.charts
        if self.current is None:
            return
        self._at = (self._at + by) % len(charts)
        self.lay_out()
        charts[self._at].focus()

    def on_resize(self) -> None:
        """Another size, perhaps another number of columns."""
        self.lay_out()

    def lay_out(self) -> None:
        """Decides how many beside one another, and which are in sight."""
        charts, width, height = self.charts, self.size.width, self.size.height
        if not charts or not width or not height:
            return
        self._at = min(self._at, len(charts) - 1)
        if self.enlarged:
            shown, columns = [charts[self._at]], 1
        else:
            columns = self.columns or fitting_columns(len(charts), width)
            lines = max(height // LOWEST, 1)
            fit = min(columns * lines, len(charts))
            first = self._at // fit * fit
            shown = charts[first : first + fit]
            columns = min(columns, len(shown))
        if shown != self._seen or self.styles.grid_size_columns != columns:
            self._seen = shown
            self.styles.grid_size_columns = columns
            self.styles.grid_size_rows = -(-len(shown) // columns)
            for i, chart in enumerate(charts, start=1):
                chart.display = chart in shown
                chart.place = f"{i}/{len(charts)}" if len(shown) < len(charts) else ""


def fitting_columns(count: int, width: int) -> int:
    """Charts beside one another: two where they fit, more where there are many."""
    most = max(width // NARROW, 1)
    wish = 1 if count == 1 else 2 if count <= 4 or width < 110 else 3
    return min(most, wish)
