"""A chart of one or several metrics. Only changed cells are sent to the terminal."""

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget

from engine import metrics
from rlhf_tui import format as fmt
from rlhf_tui.state.messages import ChartPanned, ChartZoomed, CursorMoved
from rlhf_tui.state.series import Series
from rlhf_tui.state.session_state import SessionState
from rlhf_tui.state.viewport import Viewport
from rlhf_tui.text import one_line
from rlhf_tui.widgets.charts.axis import GUTTER
from rlhf_tui.widgets.charts.plot import (
    BACKGROUNDS,
    POINT,
    STYLES,
    Canvas,
    Line,
    Plot,
    paint,
)
from rlhf_tui.widgets.charts.raster import step_of
from rlhf_tui.widgets.tones import style_of

CURVE_COLOURS = 6
"""Number of curve colours. Overlaid runs cycle through the unused ones; letters also mark them."""
WHEEL_FACTOR, WHEEL_SHARE = 1.25, 0.1
"""Of the steps shown, per notch of the mouse wheel: by how much they become more, and the share by
which they move."""


class Chart(Widget, can_focus=True):
    """One metric, or several on a common scale."""

    def __init__(
        self, names: list[str], state: SessionState, view: Viewport, *, log: bool = False
    ) -> None:
        """A chart.

        Args:
            names: the metrics.
            state: the session.
            view: the window of steps and the crosshair, shared with other charts.
            log: logarithmic scale.
        """
        super().__init__(markup=False)
        self.names = names
        self.state = state
        self.view = view
        self.log_scale = log
        self.place = ""
        """`2/6` if not all charts are visible."""
        self._canvas: Canvas | None = None
        self._style_cache: dict[int, Style] = {}
        self._blank_cache: dict[int, Style] = {}

    @property
    def cells(self) -> int:
        """The width of the plot without the labels of its scale."""
        return max(self.size.width - GUTTER, 1)

    def update(self) -> None:
        """Repaints the chart. Only changed cells are sent."""
        width, height = self.size
        if not width or not height:
            return
        old = self._canvas
        new = paint(self.plot(), width, height, old)
        self._canvas = new
        if old is None or (old.width, old.height) != (width, height):
            self.refresh()
        elif regions := changed(old, new):
            self.refresh(*regions)

    def text(self) -> str:
        """The chart as plain text."""
        canvas = self._canvas
        return "\n".join(map(canvas.row_text, range(canvas.height))) if canvas else ""

    def plot(self) -> Plot:
        """Everything to paint: curves, markers, title and window of steps."""
        first, last = self.view.window(self.state)
        name = self.names[0]
        title = " + ".join(metrics.title_of(n) for n in self.names)
        return Plot(
            title=one_cell_each(title),
            value=" · ".join(
                [
                    *(self._value(n) for n in self.names),
                    *(f"{POINT}{self._value(n)}" for n in self._held_out()),
                ]
            ),
            first=first,
            last=last,
            lines=self._lines(name),
            legend=[f"s{i}" for i in range(1, len(self.names) + 1)][:6],
            overlays=[
                *((POINT, "held-out", self._style(len(self.names))) for _ in self._held_out()),
                *(
                    (mark, session, style)
                    for mark, session, style, curves in self._others()
                    if name in curves
                ),
            ],
            unit=metrics.describe(name).chart_unit if len(self.names) == 1 else "",
            note=self._note(),
            log=self.log_scale,
            target=self.state.setting("target") if name == metrics.KL else None,
            markers=self.state.timeline.marked_steps(),
            past=self.view.past,
            cursor=self.view.cursor,
            focused=self.has_focus,
            empty=one_cell_each(self._empty(name)),
        )

    def _companion(self) -> str:
        """The held-out metric drawn with this chart's only metric; empty if there is none."""
        return metrics.describe(self.names[0]).held_out if len(self.names) == 1 else ""

    def _held_out(self) -> list[str]:
        """The held-out metric drawn with a training metric, if the run has one."""
        name = self._companion()
        return [name] if name and self.state.curves.shape(name) else []

    @staticmethod
    def _style(number: int) -> str:
        """The style of the curve with this number, from 0."""
        return f"s{min(CURVE_COLOURS, number + 1)}"

    def _value(self, name: str) -> str:
        curves, cursor, metric = self.state.curves, self.view.cursor, metrics.describe(name)
        series = curves.shape(name)
        if not metric.is_sparse:
            return fmt.number(series.last if cursor is None else series.at(cursor), metric.digits)
        step = self.state.head.step if cursor is None else cursor
        interval = curves.shape(metric.interval).latest(step) if metric.interval else None
        return fmt.with_interval(series.latest(step), interval)

    def _note(self) -> str:
        notes = [self.place] if self.place and self.has_focus else []
        notes += ["log"] if self.log_scale else []
        if self.view.others and self.view.alignment != "step":
            notes.append(f"overlay by {self.view.alignment}")
        if self._weight(self.names[0]):
            notes.append(f"ema {self.view.weight:g}")
        if metrics.AGREEMENT in self.names and (fall := self.state.agreement.fall) is not None:
            notes.append(f"falls from {fall.step:,}")
        return " ".join(notes)

    def _empty(self, name: str) -> str:
        if self.state.problem:
            return "cannot be read"
        if self.state.unread:
            return self.state.unread
        if name == metrics.AGREEMENT:
            return self.state.agreement.problem or "no judgements to compare yet"
        if self.state.curves.names and name not in self.state.curves.names:
            return "not a metric of this run"
        return "no steps yet" if not self.state.head.step else "no values yet"

    def _others(self) -> list[tuple[str, str, str, dict[str, Series]]]:
        """Mark, name, style and curves of each overlaid session."""
        # One colour is kept for held-out values, whether or not this chart has some: a session has
        # the same colour on all charts of one metric.
        own = min(len(self.names) + 1, CURVE_COLOURS - 1)
        return [
            (mark, one_cell_each(session), self._style(own + i % (CURVE_COLOURS - own)), curves)
            for i, (mark, session, curves) in enumerate(self.view.overlays())
        ]

    def _lines(self, name: str) -> list[Line]:
        lines: list[Line] = []
        if self.view.past:
            lines += [Line(s, "past") for s in self.state.curves.past.get(name, [])]
        for mark, _, style, curves in self._others():
            if name in curves:
                lines.append(Line(curves[name], style, mark))
            if (held_out := self._companion()) in curves:
                lines.append(Line(curves[held_out], style, sparse=True))
        for i, each in enumerate(self.names):
            lines += self._own(each, self._style(i))
        # Below the curve of training, in whose cells only the points of this one are visible.
        for each in self._held_out():
            lines[-1:-1] = self._own(each, self._style(len(self.names)))
        return lines

    def _own(self, name: str, style: str) -> list[Line]:
        """The lines of a metric of this run."""
        curves, metric, weight = self.state.curves, metrics.describe(name), self._weight(name)
        if metric.is_sparse:
            interval = curves.shape(metric.interval) if metric.interval else None
            return [Line(curves.shape(name), style, sparse=True, interval=interval)]
        if (downsampled := curves.downsampled(name)) is not None:
            # Not smoothed: it has extremes, whose average is not that of the values.
            return [Line(downsampled, "raw" if weight and len(self.names) == 1 else style)]
        smoothed = Line(curves.smoothed(name, weight), style)
        if weight and len(self.names) == 1 and len(curves.series(name)) > 2:
            # Without colours the two curves would look alike.
            return [Line(curves.series(name), "raw", dotted=self.app.no_color), smoothed]
        return [smoothed]

    def _weight(self, name: str) -> float:
        """The weight of a metric's moving average; 0: it has none."""
        metric = metrics.describe(name)
        return 0.0 if metric.is_set or metric.is_sparse else self.view.weight

    # -- called by Textual ---------------------------------------------------------------------

    def render_line(self, y: int) -> Strip:
        """One line of the painted chart."""
        canvas = self._canvas
        if canvas is None or y >= canvas.height:
            return Strip.blank(self.size.width, self.rich_style)
        segments = []
        chars, styles = canvas.chars[y], canvas.styles[y]
        begin = 0
        for x in range(1, canvas.width + 1):
            if x < canvas.width and (
                styles[x] == styles[begin]
                or (chars[x] == " " and self._on_blank(styles[x]) == self._on_blank(styles[begin]))
            ):
                continue
            segments.append(Segment("".join(chars[begin:x]), self._style_of(styles[begin])))
            begin = x
        return Strip(segments, canvas.width)

    def _style_of(self, number: int) -> Style:
        if number not in self._style_cache:
            style = style_of(self, STYLES[number & 31])
            for flag, name in BACKGROUNDS.items():
                if number & flag:
                    added = style_of(self, name)
                    style += Style(bgcolor=added.bgcolor, bold=added.bold, reverse=added.reverse)
            self._style_cache[number] = style
        return self._style_cache[number]

    def _on_blank(self, number: int) -> Style:
        """The visible part of a style on a blank: no text colour, unless reversed.

        A blank between two dots is drawn in the style of the first one, which halves a frame.
        """
        if number not in self._blank_cache:
            style = self._style_of(number)
            self._blank_cache[number] = Style(
                color=style.color if style.reverse else None,
                bgcolor=style.bgcolor, reverse=bool(style.reverse),
                underline=bool(style.underline),
            )  # fmt: skip
        return self._blank_cache[number]

    def notify_style_update(self) -> None:
        """Drops cached styles when the theme changes."""
        self._style_cache.clear()
        self._blank_cache.clear()
        super().notify_style_update()

    def on_resize(self) -> None:
        """Paints the chart in its new size."""
        self.update()

    def on_focus(self) -> None:
        """Marks the title."""
        self.call_next(self.update)  # `has_focus` is set after this

    def on_blur(self) -> None:
        """Removes the mark of the title."""
        self.call_next(self.update)

    def on_mouse_down(self, event: events.MouseDown) -> None:
        """Moves the crosshair to the pointer."""
        self._move_crosshair(event)

    def on_mouse_move(self, event: events.MouseMove) -> None:
        """Drags the crosshair."""
        if event.button:
            self._move_crosshair(event)

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        """Zooms in; with shift, shows earlier steps."""
        self._turn_wheel(event, -1)

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        """Zooms out; with shift, shows later steps."""
        self._turn_wheel(event, 1)

    def on_mouse_scroll_left(self, event: events.MouseScrollLeft) -> None:
        """Shows earlier steps."""
        self._pan(event, -1)

    def on_mouse_scroll_right(self, event: events.MouseScrollRight) -> None:
        """Shows later steps."""
        self._pan(event, 1)

    def _turn_wheel(self, event: events.MouseEvent, way: int) -> None:
        if event.shift:
            self._pan(event, way)
            return
        event.stop()
        self.post_message(ChartZoomed(WHEEL_FACTOR**way, self._step_at(max(event.x, GUTTER))))

    def _pan(self, event: events.MouseEvent, way: int) -> None:
        event.stop()
        self.post_message(ChartPanned(way * WHEEL_SHARE))

    def _move_crosshair(self, event: events.MouseEvent) -> None:
        if event.x >= GUTTER:
            self.post_message(CursorMoved(round(self._step_at(event.x))))

    def _step_at(self, x: int) -> float:
        """The step under a column of the chart."""
        first, last = self.view.window(self.state)
        return step_of(x - GUTTER, first, last, self.cells)


def one_cell_each(text: str) -> str:
    """Sanitised text for a canvas, on which each character has one cell."""
    return "".join(c if cell_len(c) == 1 else "?" for c in one_line(text))


def changed(old: Canvas, new: Canvas) -> list[Region]:
    """The region of each row that differs between two canvases of the same size."""
    regions = []
    for y in range(new.height):
        a, b, c, d = old.chars[y], new.chars[y], old.styles[y], new.styles[y]
        if a == b and c == d:
            continue
        differ = [x for x in range(new.width) if a[x] != b[x] or c[x] != d[x]]
        regions.append(Region(differ[0], y, differ[-1] + 1 - differ[0], 1))
    return regions
