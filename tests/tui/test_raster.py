"""From values to dots."""

import random

from rlhf_tui.state.series import Series
from rlhf_tui.widgets.charts.raster import Raster, Scale, column_of, decimate, step_of


def test_no_spike_is_lost_however_many_points_share_a_column():
    values = [0.0] * 100_000
    values[41_234], values[77_777] = 9.0, -5.0
    columns = decimate(Series(enumerate(values, start=1)), 1, 100_000, 160)
    assert max(c.high for c in columns) == 9.0
    assert min(c.low for c in columns) == -5.0
    assert len(columns) == 160


def test_every_point_is_in_exactly_one_column():
    rng = random.Random(3)  # noqa: S311 - no secret
    points = [(s, rng.random()) for s in range(1, 5001)]
    columns = decimate(Series(points), 1, 5000, 100)
    for x, step in ((0, 1), (50, 2525), (99, 5000)):
        assert column_of(step, 1, 5000, 100) == x
        low, high = columns[x].low, columns[x].high
        assert low <= dict(points)[step] <= high


def test_few_points_stand_in_their_own_columns():
    columns = decimate(Series([(1, 1.0), (51, 2.0), (101, 3.0)]), 1, 101, 101)
    assert [c.x for c in columns] == [0, 50, 100]


def test_points_outside_the_window_are_left_out():
    columns = decimate(Series([(1, 1.0), (50, 2.0), (99, 3.0)]), 40, 60, 20)
    assert [c.first for c in columns] == [2.0]


def test_a_column_and_its_step_belong_together():
    for column in range(80):
        assert column_of(step_of(column, 10, 500, 80), 10, 500, 80) == column


def test_a_line_has_no_holes():
    raster = Raster(20, 8)
    values = Series([(1, 0.0), (20, 10.0), (21, 0.0), (40, 5.0)])
    raster.draw(decimate(values, 1, 40, 40), Scale(0, 10), 1)
    before = None
    for x in range(40):
        rows = _dots(raster, x)
        assert rows, f"nothing in column {x}"
        if before:
            assert min(rows) <= max(before) + 1
            assert max(rows) >= min(before) - 1
        before = rows


def test_a_cell_shows_the_line_that_was_drawn_last():
    raster = Raster(4, 2)
    raster.fill(0, 0, 7, owner=1)
    raster.fill(0, 0, 0, owner=2)
    assert raster.owner[0] == 2
    assert raster.bits[0] == 0x01
    assert raster.owner[4] == 1


def test_a_logarithmic_scale_gives_each_decade_the_same_height():
    scale = Scale(0.01, 100.0, log=True)
    rows = [scale.row(v, 41) for v in (100, 10, 1, 0.1, 0.01)]
    assert rows == [0, 10, 20, 30, 40]
    assert scale.row(0.0, 41) == 40


def _dots(raster, x):
    bits = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))[x & 1]
    return [
        4 * y + i
        for y in range(raster.height)
        for i, bit in enumerate(bits)
        if raster.bits[y * raster.width + (x >> 1)] & bit
    ]
