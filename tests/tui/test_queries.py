"""What the screens ask the journal for."""

import pytest

from engine.journal.reader import JournalReader
from engine.journal.samples import SampleQuery
from engine.session.folder import SessionFolder
from rlhf_tui.screens.parts.sample_filter import check_filter, parse_filter


@pytest.fixture
def reader(root):
    with JournalReader(SessionFolder(root / "frozen")) as reader:
        yield reader


def test_a_left_timeline_is_read_by_attempt(reader):
    rows = reader.metrics.past_series("objective/scores")
    assert [(attempt, step) for attempt, step, _ in rows] == [(1, s) for s in range(101, 118)]


@pytest.mark.parametrize("order", ["step", "score", "kl", "length"])
def test_a_page_is_sorted_and_the_next_one_follows(reader, order):
    rows = []
    for page in range(3):
        rows += reader.samples.page(SampleQuery(order=order, descending=False), 50, 50 * page)
    assert len({(r.step, r.index) for r in rows}) == 150
    assert [getattr(r, order) for r in rows] == sorted(getattr(r, order) for r in rows)


def test_bounds_and_words_narrow_a_page(reader):
    query = parse_filter("score>1.5 kl<=8 LOVED cut", SampleQuery())
    rows = reader.samples.page(query, 500)
    assert rows
    for row in rows:
        assert row.score >= 1.5
        assert row.kl <= 8
        assert "loved" in row.response
        assert not row.ended


def test_a_column_that_is_none_of_ours_is_not_sorted_by(reader):
    rows = reader.samples.page(SampleQuery(order="step; DROP TABLE samples"), 3)
    assert [r.step for r in rows] == [200, 200, 200]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("score>1", ""),
        ("score > abc", "score > abc"),
        ("kl<3 odd end", "odd end"),
        ('very "good" end', "very good end"),
    ],
)
def test_what_is_no_bound_is_a_word(text, words):
    assert parse_filter(text, SampleQuery()).text == words


@pytest.mark.parametrize(
    "text", ["score>x", "kl > ten", "good len>10", "score=2", "step > 5", "kl<"]
)
def test_a_condition_that_is_not_understood_is_refused(text):
    valid, problem = check_filter(text)
    assert not valid
    assert "score or kl, > or <, and a number" in problem


@pytest.mark.parametrize(
    "text", ["", "score>1 kl < 8", "the score was 2", '"score>x" bad', "<b> step by step", "a > b"]
)
def test_conditions_and_words_are_accepted_as_a_filter(text):
    assert check_filter(text) == (True, "")


@pytest.mark.parametrize("spans", [7, 500])
def test_an_outline_has_the_extremes_and_the_newest_value(reader, spans):
    points = reader.metrics.series("objective/scores")
    downsampled = reader.metrics.downsampled(["objective/scores", "no such metric"], spans)
    assert list(downsampled) == ["objective/scores"]
    drawn = downsampled["objective/scores"]
    steps, values = zip(*drawn, strict=True)
    assert list(steps) == sorted(set(steps))
    assert drawn[-1] == points[-1]
    assert max(values) == pytest.approx(max(v for _, v in points))
    assert min(values) == pytest.approx(min(v for _, v in points))


def test_an_outline_of_a_short_run_is_its_curve(reader):
    names = ["objective/scores"]
    downsampled = reader.metrics.downsampled(names, 500)[names[0]]
    curve = reader.metrics.series(names[0])
    assert [s for s, _ in downsampled] == [s for s, _ in curve]
    assert [v for _, v in downsampled] == pytest.approx([v for _, v in curve])
