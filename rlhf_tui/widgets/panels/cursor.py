"""The lines below the charts: the values at the crosshair, or the effect of an intervention."""

from rich.cells import cell_len

from engine import metrics
from rlhf_tui import format as fmt
from rlhf_tui.state.curves import RECENT_STEPS
from rlhf_tui.state.session_state import SessionState
from rlhf_tui.state.timeline import MARKER_GLYPHS, MARKER_TONES, Marker, in_app
from rlhf_tui.state.viewport import Viewport
from rlhf_tui.text import one_line
from rlhf_tui.widgets.lines import Piece, Row, flowed, justified, row_width, shorten_middle
from rlhf_tui.widgets.panels.panel import Panel

MEASURED = (
    (metrics.SCORE, "score"),
    (metrics.KL, "KL"),
    (metrics.CLIP_FRACTION, "clip"),
    (metrics.RESPONSE_LENGTH, "length"),
)

MIN_NAME_WIDTH = 6
"""Cells of an overlaid session's name in the legend, if there are many."""


class CursorPanel(Panel):
    """Two lines: a marker, and the means of some metrics before and after it."""

    def __init__(self, state: SessionState, view: Viewport) -> None:
        """A panel for the marker at the view's crosshair; for the newest change without one."""
        super().__init__(state, id="cursor")
        self.view = view

    def rows(self, width: int, height: int) -> list[Row]:
        """The selected event or the marker at the crosshair; without one, values or the keys."""
        cursor = self.view.cursor
        if cursor is None:
            changes = [
                m
                for m in self.state.timeline.markers()
                if m.kind == "command" and "→" in m.text and not m.abandoned
            ]
            if self.view.others:
                return [*_hint(), self._overlays(width)]
            return self._marker(changes[-1], width) if changes else _hint()
        if (selected := self.view.marker(self.state)) is not None:
            return self._marker(selected, width)
        first, last = self.view.window(self.state)
        reach = max((last - first) / max(width, 1), 0.5)
        near = [m for m in self.state.timeline.markers() if abs(m.step - cursor) <= reach]
        if not near:
            values = self._values(cursor, width)
            return [values[0], self._overlays(width)] if self.view.others else values
        near.sort(key=lambda m: (m.abandoned, abs(m.step - cursor), m.kind != "command"))
        return self._marker(near[0], width)

    def _place(self, marker: Marker) -> Row:
        """The key that shows the whole text, and the event's number among those of its step."""
        keys = [m.key for m in self.state.timeline.markers() if m.step == marker.step]
        several = len(keys) > 1 and marker.key in keys
        of = f"  {keys.index(marker.key) + 1} of {len(keys)}  " if several else "  "
        return [(of, "dim"), ("enter", "key"), (" open ", "dim")]

    def _overlays(self, width: int) -> Row:
        """The legend of the overlaid sessions, whose curves end in these letters.

        If their names do not fit, the long ones are cut, so that more of the letters are there.
        """
        overlays = [(f"  {mark} ", one_line(name)) for mark, name, _ in self.view.overlays()]
        row: list[Piece] = [(" overlay", "dim")]
        keys: Row = [("   O", "key"), (" changes it", "dim")]
        room = width - row_width([*row, *keys]) - sum(cell_len(mark) for mark, _ in overlays)
        longest = room
        if sum(cell_len(name) for _, name in overlays) > room:
            longest = max(room // len(overlays), MIN_NAME_WIDTH)
        for mark, name in overlays:
            shown = name if cell_len(name) <= longest else shorten_middle(name, longest)
            row += [(mark, "key"), (shown, "")]
        return [*row, *keys]

    def _values(self, step: int, width: int) -> list[Row]:
        """The values at a step, on a second line what the first has no room for."""
        groups: list[Row] = [[(f"step {step}", "strong")]]
        for name, label in (*MEASURED, (metrics.BETA, "beta")):
            value = self.state.curves.series(name).at(step)
            groups.append([(f"{label} ", "dim"), (fmt.number(value), "")])
        held_out = self.state.curves.series(metrics.EVAL_SCORE).at(step)
        if held_out is not None:
            interval = self.state.curves.series(metrics.EVAL_SCORE_CI).at(step)
            groups.append([("held-out ", "dim"), (fmt.with_interval(held_out, interval), "")])
        return [[(" ", ""), *row] for row in flowed(groups, width - 1)]

    def _marker(self, marker: Marker, width: int) -> list[Row]:
        who = f" by {marker.who}" if marker.who else ""
        when = f" · {fmt.clock(marker.time)[11:16]}" if marker.time else ""
        first: Row = [
            (f" {MARKER_GLYPHS[marker.kind]} step {marker.step} ", MARKER_TONES[marker.kind]),
            (in_app(marker.text), "strong"),
            (f"{who}{when}", "dim"),
        ]
        if marker.key == self.view.selected:
            first = justified(first, self._place(marker), width)
        if marker.abandoned:
            return [first, [("   on an abandoned branch", "dim")]]
        return [first, *self._around(marker.step, width)]

    def _around(self, step: int, width: int) -> list[Row]:
        """The means before and after a step; before the first step there are none."""
        means = {name: self.state.curves.before_and_after(name, step) for name, _ in MEASURED}
        if all(mean is None for pair in means.values() for mean in pair):
            return []
        starts = all(before is None for before, _ in means.values())
        row: list[Piece] = [
            (f"   {RECENT_STEPS} steps {'' if starts else 'before → '}after: ", "dim")
        ]
        if width < 100:
            steps = f"  {'+' if starts else '±'}{RECENT_STEPS}"
            row = [(f"{steps} steps" if width > 78 else steps, "dim")]
        for name, label in MEASURED:
            if width < 100 and name == metrics.RESPONSE_LENGTH:
                label = "len"
            before, after = means[name]
            values = _short(after) if starts else f"{_short(before)}→{_short(after)}"
            more: Row = [(f"  {label} ", "dim"), (values, "")]
            if row_width(row) + row_width(more) <= width:
                row += more
        return [row]


def _short(value: float | None) -> str:
    if value is None:
        return "–"
    size = abs(value)
    if size < 1e-3:
        return fmt.number(value, 1)
    return fmt.number(value, 3 if size < 1 else 2 if size < 10 else 1 if size < 1000 else 0)


def _hint() -> list[Row]:
    keys = (
        ("← →", "crosshair"),
        ("n N", "event"),
        ("+ -", "zoom"),
        ("m", "metrics"),
        ("z", "enlarge"),
    )
    row: list[Piece] = []
    for key, description in keys:
        row += [("   " if row else " ", ""), (key, "key"), (f" {description}", "dim")]
    return [row]
