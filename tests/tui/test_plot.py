"""A chart as characters and styles."""

import itertools
import math
import random

import pytest

from rlhf_tui.state.marked_steps import MarkedSteps
from rlhf_tui.state.series import Series, Smoothed
from rlhf_tui.state.timeline import MARKER_GLYPHS, Marker
from rlhf_tui.widgets.charts.axis import GUTTER, labels, scale_of
from rlhf_tui.widgets.charts.plot import (
    BAND,
    CURSOR,
    POINT,
    PRIORITY,
    STYLE,
    Line,
    Plot,
    paint,
    steps_text,
)
from rlhf_tui.widgets.charts.raster import BRAILLE, Scale, column_of, decimate

RISE = Series([(s, s / 10) for s in range(1, 101)])


def plot_of(**given):
    base = {"title": "KL", "value": "1.0", "first": 1, "last": 100, "lines": [Line(RISE, "s1")]}
    given["markers"] = MarkedSteps(given.get("markers", []))
    return Plot(**(base | given))


def test_title_and_value_stand_on_top_and_the_window_below():
    picture = paint(plot_of(), 40, 10)
    assert picture.row_text(0).startswith(" KL")
    assert picture.row_text(0).rstrip().endswith("1.0")
    assert picture.row_text(9).strip().startswith("1–100")


@pytest.mark.parametrize(
    ("first", "last", "start", "end"),
    [
        (1, 100, "1–100", "!"),
        (1, 57_500, "1–57.5k", "!"),
        (1, 575_000, "1–575k", "!"),
        (10_000, 57_500, "10,000", "! 57,500"),
    ],
)
def test_the_window_can_be_read_however_many_markers_there_are(first, last, start, end):
    markers = [Marker(round(first + i * (last - first) / 80), "alert", "!") for i in range(81)]
    axis = paint(plot_of(first=first, last=last, markers=markers), 40, 10).row_text(9)
    assert axis.strip().startswith(f"{start} !")
    assert axis.endswith(end)


def test_the_scale_ends_on_round_numbers_beyond_the_values():
    columns = [decimate(RISE, 1, 100, 60)]
    scale = scale_of(columns)
    assert (scale.low, scale.high) == (0.0, 10.0)


def test_labels_are_round_however_many_cells_the_scale_has():
    shifted = Series([(s, 0.89 + s * 0.009) for s in range(1, 101)])  # 0.75 to 2: five cells
    scale = scale_of([decimate(shifted, 1, 100, 60)])
    assert [text for _, text in labels(scale, 20)] == [
        "0.75",
        "1.00",
        "1.25",
        "1.50",
        "1.75",
        "2.00",
    ]
    assert [text for _, text in labels(scale, 8)] == ["0.75", "1.25", "1.75"]
    assert [text for _, text in labels(scale, 4)] == ["0.75", "2.00"]


@pytest.mark.parametrize("cells", [2, 3, 4, 5])
@pytest.mark.parametrize("rows", range(5, 20))
def test_labels_are_apart_by_about_as_many_rows(cells, rows):
    scale = Scale(0.0, float(cells), grid=1.0)
    at = [row for row, _ in labels(scale, rows)]
    apart = [above - below for above, below in itertools.pairwise(at)]
    assert min(apart) >= 2
    assert max(apart) - min(apart) <= 1


def test_labels_of_a_narrow_range_differ():
    for pace in (1e-6, 2e-6, 3e-6):
        narrow = Series([(s, 0.05 - s * pace) for s in range(1, 101)])
        scale = scale_of([decimate(narrow, 1, 100, 60)])
        texts = [text for _, text in labels(scale, 20)]
        assert len(set(texts)) == len(texts) > 2
        assert max(map(len, texts)) < GUTTER


def test_a_curve_that_never_moves_has_room_above_and_below():
    flat = Series([(s, 0.05) for s in range(1, 20)])
    scale = scale_of([decimate(flat, 1, 20, 40)])
    assert scale.low < 0.05 < scale.high


def test_the_band_covers_the_rows_within_a_fifth_of_the_target():
    picture = paint(plot_of(target=5.0), 60, 22)
    banded = [y for y in range(1, 21) if picture.styles[y][GUTTER + 1] & BAND]
    scale = scale_of([decimate(RISE, 1, 100, 104)], target=5.0)
    assert banded == list(range(1 + scale.row(6.0, 80) // 4, 1 + scale.row(4.0, 80) // 4 + 1))


def test_a_point_of_a_sparse_curve_has_the_background_of_its_cell():
    point = Line(Series([(50, 5.0)]), "s2", sparse=True)
    picture = paint(plot_of(target=5.0, lines=[Line(RISE, "s1"), point]), 60, 22)
    ((x, y),) = [(x, y) for y in range(1, 21) for x in range(60) if picture.chars[y][x] == POINT]
    assert picture.styles[y][x] == STYLE["s2"] | BAND


def test_the_band_has_dotted_edges_for_those_who_see_no_colour():
    picture = paint(plot_of(target=5.0), 60, 22)
    targets = sum(s & 31 == STYLE["target"] for row in picture.styles for s in row)
    assert targets > 20


def test_a_dotted_curve_has_the_extremes_of_each_column_and_no_line_between():
    spiky = Series([(s, 9.0 if s % 7 == 0 else 1.0) for s in range(1, 41)])

    def dots(**given):
        picture = paint(plot_of(last=40, lines=[Line(spiky, "raw", **given)]), 60, 12)
        rows = [row[GUTTER:] for row in picture.chars[1:-1]]
        return [
            sum((ord(c) - BRAILLE).bit_count() for c in row if c > chr(BRAILLE)) for row in rows
        ]

    assert sum(dots(dotted=True)) == 40
    assert 40 // 7 in dots(dotted=True)
    assert sum(dots()) > 3 * 40


def test_a_far_target_does_not_squeeze_the_curve():
    scale = scale_of([decimate(RISE, 1, 100, 60)], target=500.0)
    assert scale.high == 10.0


@pytest.mark.parametrize(
    ("low", "high", "rows", "texts"),
    [
        (1, 10, 10, ["1", "2", "5", "10"]),
        (0.08, 0.31, 16, ["0.05", "0.1", "0.2", "0.5"]),
        (0.3, 2.2, 16, ["0.2", "0.5", "1", "2", "5"]),
        (3, 3, 10, ["2", "5"]),
        (1, 1, 10, ["1", "2"]),
        (0.02, 9, 16, ["0.01", "0.1", "1", "10"]),
        (1e-9, 1, 10, ["1.0e-9", "1.0e-6", "0.001", "1"]),
        (0.02, 9, 4, ["0.01", "10"]),
    ],
)
def test_a_logarithmic_axis_has_round_labels(low, high, rows, texts):
    rise = Series([(1, low), (2, high)])
    scale = scale_of([decimate(rise, 1, 2, 60)], log=True)
    assert [text for _, text in labels(scale, rows)] == texts
    assert scale.low <= low <= high <= scale.high


def test_markers_stand_below_their_step_and_an_intervention_has_a_line():
    markers = [Marker(50, "command", "beta"), Marker(75, "checkpoint", "saved")]
    picture = paint(plot_of(markers=markers), 60, 12)
    axis = picture.row_text(11)
    assert axis.index("◆") < axis.index("▲")
    assert sum(row[axis.index("◆")] == "┊" for row in picture.chars) > 5
    assert not any(row[axis.index("▲")] == "┊" for row in picture.chars)


def test_of_markers_on_one_place_the_most_important_is_seen():
    markers = [Marker(50, "alert", "!"), Marker(50, "checkpoint", "saved")]
    assert "!" in paint(plot_of(markers=markers), 60, 12).row_text(11)


def test_the_crosshair_is_a_line_with_its_step():
    picture = paint(plot_of(cursor=50), 60, 12)
    assert "50" in picture.row_text(11)
    column = [row[GUTTER + 25] for row in picture.chars[1:11]]
    assert column.count("│") >= 7
    assert any(s & CURSOR for row in picture.styles for s in row)


def test_markers_outside_the_window_are_not_drawn():
    picture = paint(plot_of(first=60, markers=[Marker(50, "command", "x")]), 60, 12)
    assert "◆" not in picture.row_text(11)


@pytest.mark.parametrize(("first", "last"), [(1, 100), (1, 5000), (37, 1234), (2, 3), (7, 59)])
@pytest.mark.parametrize("width", [13, 60, 61, 110])
def test_each_cell_shows_the_most_important_of_its_markers(first, last, width):
    draw = random.Random(last)  # noqa: S311 - no secret
    markers = [Marker(draw.randint(1, last), draw.choice(PRIORITY), "x") for _ in range(last // 4)]
    cells = width - GUTTER
    seen = {}
    for marker in sorted(markers, key=lambda m: PRIORITY.index(m.kind)):
        if first <= marker.step <= last:
            cell = column_of(marker.step, first, last, 2 * cells) // 2
            seen[cell] = MARKER_GLYPHS[marker.kind]
    axis = paint(plot_of(first=first, last=last, markers=markers, lines=[]), width, 12).row_text(11)
    label = len(steps_text(last)) + 1 if first > 1000 else 0
    assert "".join(seen.get(x, "─") for x in range(cells - label)) == axis[GUTTER : width - label]


def test_of_many_markers_in_a_cell_only_one_of_each_kind_is_looked_at():
    looked_up = []

    class Counted(MarkedSteps):
        def first_from(self, step, kind, *, abandoned):
            looked_up.append(kind)
            return super().first_from(step, kind, abandoned=abandoned)

    markers = Counted(Marker(step, "alert", "!") for step in range(1, 100_001))
    paint(Plot("KL", "", 1, 100_000, [Line(RISE, "s1")], markers=markers), GUTTER + 50, 12)
    assert looked_up.count("alert") <= 2 * 50


def test_markers_of_abandoned_branches_are_only_drawn_with_their_curves():
    markers = [Marker(50, "command", "beta", abandoned=True)]
    assert "◆" in paint(plot_of(markers=markers, past=True), 60, 12).row_text(11)
    assert "◆" not in paint(plot_of(markers=markers), 60, 12).row_text(11)


def test_without_values_it_says_so():
    picture = paint(plot_of(lines=[], empty="no steps yet"), 60, 12)
    assert any("no steps yet" in picture.row_text(y) for y in range(12))


def test_any_size_can_be_painted():
    markers = [Marker(50, "command", "x")]
    for width in range(1, 40, 3):
        for height in range(1, 12):
            paint(plot_of(target=5.0, cursor=20, markers=markers), width, height)


@pytest.mark.parametrize(
    "values", [(0.0, 5e-324), (1e-323, 5e-324), (-1e308, 1e308), (0.0, 1.7e308), (1.79e308,)]
)
@pytest.mark.parametrize("log", [False, True])
def test_the_smallest_and_largest_numbers_can_be_painted(values, log):
    curve = Series(list(enumerate(values, 1)))
    lines = [
        Line(curve, "s2", sparse=True, interval=curve), Line(Smoothed(curve, 0.5), "s3"),
        Line(curve, "s1"),
    ]  # fmt: skip
    paint(plot_of(first=1.5, last=2, lines=lines, log=log), 60, 12)  # cut between two points
    picture = paint(plot_of(last=2, lines=lines, log=log), 60, 12)
    assert any(char > chr(BRAILLE) for row in picture.chars[1:-1] for char in row[GUTTER:])


@pytest.mark.parametrize("value", [0.43753061471029864, -49337.33061151928, 4.3163069862904234e-13])
def test_values_that_differ_by_rounding_are_drawn_as_a_flat_line(value):
    curve = Series([(1, value), (2, math.nextafter(value, math.inf))])
    lines = [Line(curve, "s1")]
    rows = [paint(plot_of(lines=lines), 40, 10).row_text(y) for y in range(1, 9)]
    assert sum(any(ord(c) > BRAILLE for c in row) for row in rows) == 1


def test_curves_that_are_taken_over_from_the_last_painting_look_as_if_they_were_drawn():
    curve = Series([(s, s % 7) for s in range(1, 101)])
    lines = [Line(RISE, "s1"), Line(curve, "s2", "a")]
    before = paint(plot_of(lines=lines), 60, 12)

    def same(plot, size=(60, 12)):
        taken, drawn = paint(plot, *size, before), paint(plot, *size)
        assert (taken.chars, taken.styles) == (drawn.chars, drawn.styles)
        return taken

    moved = same(plot_of(lines=lines, cursor=40, markers=[Marker(20, "alert", "x")], target=None))
    assert moved.drawing is before.drawing
    for changed in ({"last": 90}, {"target": 5.0}, {"log": True}, {"lines": lines[:1]}):
        assert same(plot_of(**({"lines": lines} | changed))).drawing is not before.drawing
    same(plot_of(lines=lines), (50, 12))
    curve.extend([(101, 20.0)])
    assert same(plot_of(lines=lines)).drawing is not before.drawing
