"""The chart of a metric: a Braille picture that is sent to the terminal where it has changed."""

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget

from engine import metrics
from rlhf_tui import format as fmt
from rlhf_tui.state.messages import CursorMoved
from rlhf_tui.state.session_state import SessionState
from rlhf_tui.state.viewport import Viewport
from rlhf_tui.text import one_line
from rlhf_tui.widgets.charts.plot import GROUNDS, GUTTER, STYLES, Canvas, Line, Plot, paint
from rlhf_tui.widgets.charts.raster import step_of
from rlhf_tui.widgets.tones import style_of


class Chart(Widget, can_focus=True):
    """One metric, or several on one scale."""

    def __init__(
        self, names: list[str], state: SessionState, view: Viewport, *, log: bool = False
    ) -> None:
        """A chart of the state's metrics; the first one's value stands in the title."""
        super().__init__(markup=False)
        self.names = names
        self.state = state
        self.view = view
        self.log_scale = log
        self.place = ""
        """`2/6` where not all charts are in sight."""
        self._canvas: Canvas | None = None
        self._style_cache: dict[int, Style] = {}

    @property
    def cells(self) -> int:
        """How wide the plot itself is."""
        return max(self.size.width - GUTTER, 1)

    def update(self) -> None:
        """Paints again and sends what has changed."""
        width, height = self.size
        if not width or not height:
            return
        old, new = self._canvas, paint(self.plot(), width, height)
        self._canvas = new
        if old is None or (old.width, old.height) != (width, height):
            self.refresh()
        elif regions := changed(old, new):
            self.refresh(*regions)

    def text(self) -> str:
        """What is shown, as plain text."""
        canvas = self._canvas
        return "\n".join(map(canvas.row_text, range(canvas.height))) if canvas else ""

    def plot(self) -> Plot:
        """What is to be painted: curves, markers, title, window."""
        first, last = self.view.window(self.state)
        name = self.names[0]
        title = " + ".join(metrics.title_of(n) for n in self.names)
        return Plot(
            title="".join(c if cell_len(c) == 1 else "?" for c in one_line(title)),
            value=" · ".join(self._value(n) for n in self.names),
            first=first,
            last=last,
            lines=self._lines(name),
            legend=[f"s{i}" for i in range(1, len(self.names) + 1)][:6],
            unit=metrics.describe(name).chart_unit if len(self.names) == 1 else "",
            note=self._note(),
            log=self.log_scale,
            target=self.state.setting("target") if name == metrics.KL else None,
            markers=self.state.markers(),
            cursor=self.view.cursor,
            focused=self.has_focus,
            empty=self._empty(name),
        )

    def _value(self, name: str) -> str:
        series = self.state.outline(name) or self.state.series(name)
        cursor = self.view.cursor
        value = series.last if cursor is None else series.at(cursor)
        return fmt.number(value, metrics.describe(name).digits)

    def _note(self) -> str:
        words = [self.place] if self.place and self.has_focus else []
        words += ["log"] if self.log_scale else []
        if self.view.weight and not metrics.describe(self.names[0]).is_set:
            words.append(f"ema {self.view.weight:g}")
        return " ".join(words)

    def _empty(self, name: str) -> str:
        if self.state.problem:
            return "cannot be read"
        if self.state.names and name not in self.state.names:
            return "not a metric of this run"
        return "no steps yet" if not self.state.head.step else "no values yet"

    def _lines(self, name: str) -> list[Line]:
        state, view = self.state, self.view
        found: list[Line] = []
        if view.past:
            found += [Line(s, "past") for s in state.past.get(name, [])]
        for i, curves in enumerate(view.others.values()):
            if name in curves:
                found.append(Line(curves[name], f"s{min(6, 2 + i)}"))
        weight = 0.0 if metrics.describe(name).is_set else view.weight
        for i, each in enumerate(self.names):
            if (outline := state.outline(each)) is not None:
                # An average over the extremes would not be that over the values.
                found.append(
                    Line(outline, "raw" if weight and len(self.names) == 1 else f"s{min(6, i + 1)}")
                )
                continue
            if weight and len(self.names) == 1 and len(state.series(each)) > 2:
                found.append(Line(state.series(each), "raw"))
            found.append(Line(state.smoothed(each, weight), f"s{min(6, i + 1)}"))
        return found

    # -- Textual's questions -------------------------------------------------------------------

    def render_line(self, y: int) -> Strip:
        """One line of the cached picture."""
        picture = self._canvas
        if picture is None or y >= picture.height:
            return Strip.blank(self.size.width, self.rich_style)
        segments = []
        chars, styles = picture.chars[y], picture.styles[y]
        begin = 0
        for x in range(1, picture.width + 1):
            if x == picture.width or styles[x] != styles[begin]:
                segments.append(Segment("".join(chars[begin:x]), self._style_of(styles[begin])))
                begin = x
        return Strip(segments, picture.width)

    def _style_of(self, number: int) -> Style:
        if number not in self._style_cache:
            style = style_of(self, STYLES[number & 31])
            for flag, name in GROUNDS.items():
                if number & flag:
                    over = style_of(self, name)
                    style += Style(bgcolor=over.bgcolor, bold=over.bold, reverse=over.reverse)
            self._style_cache[number] = style
        return self._style_cache[number]

    def notify_style_update(self) -> None:
        """A new theme, other styles."""
        self._style_cache.clear()
        super().notify_style_update()

    def on_resize(self) -> None:
        """Another size, another picture."""
        self.update()

    def on_focus(self) -> None:
        """The title says so."""
        self.update()

    def on_blur(self) -> None:
        """The title says so."""
        self.update()

    def on_mouse_down(self, event: events.MouseDown) -> None:
        """Puts the crosshair where the pointer is."""
        self._point(event)

    def on_mouse_move(self, event: events.MouseMove) -> None:
        """Drags the crosshair."""
        if event.button:
            self._point(event)

    def _point(self, event: events.MouseEvent) -> None:
        first, last = self.view.window(self.state)
        if event.x >= GUTTER:
            step = step_of(event.x - GUTTER, first, last, self.cells)
            self.post_message(CursorMoved(round(step)))


def changed(old: Canvas, new: Canvas) -> list[Region]:
    """The part of each row that differs between two pictures of one size."""
    found = []
    for y in range(new.height):
        a, b, c, d = old.chars[y], new.chars[y], old.styles[y], new.styles[y]
        if a == b and c == d:
            continue
        differ = [x for x in range(new.width) if a[x] != b[x] or c[x] != d[x]]
        found.append(Region(differ[0], y, differ[-1] + 1 - differ[0], 1))
    return found
