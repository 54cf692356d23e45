"""The operator's labels and notes: keys on the samples, and what other clients say."""

import queue
from types import SimpleNamespace

import pytest

from engine.journal.judgements.labels import Response, set_label, set_note
from engine.journal.reader import JournalReader
from engine.journal.rows import Judgement
from engine.journal.samples import SampleQuery
from engine.journal.writer import JournalWriter
from rlhf_tui.dialogs.base import InputDialog
from rlhf_tui.screens.parts.sample_filter import parse_filter
from rlhf_tui.screens.parts.sample_labels import SampleLabels
from rlhf_tui.state.label_writer import LabelWriter
from rlhf_tui.widgets.samples.judgement import mark
from rlhf_tui.widgets.samples.sample_view import SampleView
from rlhf_tui.widgets.table import Table
from tests.judging import STEPS, judgements, sample
from tests.tui.screen import cells, notices


def newest(session):
    with JournalReader(session) as reader:
        return reader.samples.page(SampleQuery(), 1)[0]


def shown(app):
    """What the table's marks and the pane say."""
    table, reading = app.screen.query_one(Table), app.screen.query_one(SampleView)
    marks = [cells(table, index)[6] for index in range(table.count())]
    return marks, [line.strip() for line in reading.text().splitlines()]


@pytest.mark.parametrize(
    ("key", "label", "glyph"),
    [("plus", "good", "+"), ("minus", "bad", "-"), ("exclamation_mark", "hack", "!")],
)
async def test_a_key_labels_the_response_and_again_removes_the_label(
    samples, judged, key, label, glyph, until
):
    async with samples() as (app, pilot):
        await pilot.press("j", key)
        assert shown(app)[0][:3] == ["", glyph, ""]
        said = f"{glyph} {label}   {app.who}, "
        await until(pilot, lambda: any(line.startswith(said) for line in shown(app)[1]))
        await until(pilot, lambda: judgements(judged) == {(STEPS, 1): (label, None)})
        await pilot.press(key)
        assert shown(app)[0][:3] == ["", "", ""]
        await until(pilot, lambda: judgements(judged) == {})


async def test_another_label_replaces_the_first(samples, judged, until):
    async with samples() as (app, pilot):
        await pilot.press("plus", "minus", "exclamation_mark")
        await until(pilot, lambda: judgements(judged) == {(STEPS, 0): ("hack", None)})
        assert shown(app)[0][0] == "!"


async def test_a_note_is_written_and_an_empty_one_takes_it_away(samples, judged, until):
    async with samples() as (app, pilot):
        await pilot.press("plus", "W", *"odd end", "enter")
        await until(pilot, lambda: judgements(judged) == {(STEPS, 0): ("good", "odd end")})
        marks, lines = shown(app)
        assert marks[0] == "+✎"
        assert "✎ odd end" in lines
        await pilot.press("plus")
        await until(pilot, lambda: judgements(judged) == {(STEPS, 0): (None, "odd end")})
        assert shown(app)[0][0] == "✎"
        await pilot.press("W")
        await until(pilot, lambda: isinstance(app.screen, InputDialog))
        assert app.screen.query_one("#field").value == "odd end"
        await pilot.press("delete", "enter")
        await until(pilot, lambda: judgements(judged) == {})


async def test_after_a_roll_back_every_order_shows_what_there_is_now(samples, judged, until):
    async with samples(follow=True) as (app, pilot):
        await pilot.press("s")
        await until(pilot, lambda: app.screen.query_one(Table).sorted_by == "score")
        journal = JournalWriter(judged)
        journal.begin_attempt(3, fresh=True)
        journal.close()
        await until(pilot, lambda: app.screen.query_one(Table).count() == 8 * 3)


def test_whatever_goes_wrong_in_writing_is_reported():
    told = queue.Queue()
    judge = LabelWriter(told.put)
    judge.write("\ud800".encode)
    judge.write(lambda: None)
    problem = told.get(timeout=60).problem
    assert problem.startswith("this judgement was not written: UnicodeEncodeError")
    assert told.get(timeout=60).problem == ""


async def test_what_no_longer_fits_the_filter_stays_until_the_list_is_read_again(
    samples, judged, until
):
    async with samples() as (app, pilot):
        table = app.screen.query_one(Table)
        await pilot.press("slash", *"unjudged", "enter")
        await until(pilot, lambda: "only unjudged" in app.screen.query_one("#filter").text())
        await pilot.press("plus")
        await until(pilot, lambda: judgements(judged) == {(STEPS, 0): ("good", None)})
        assert (table.count(), app.screen.selected().index) == (8 * STEPS, 0)
        await pilot.press("F")
        await until(pilot, lambda: table.count() == 8 * STEPS - 1)
        await pilot.press("slash", *"good", "enter")
        await until(pilot, lambda: table.count() == 1)


async def test_a_filter_by_a_label_that_no_response_has_says_how_to_search_for_the_word(
    samples, until
):
    async with samples() as (app, pilot):
        table = app.screen.query_one(Table)
        await pilot.press("slash", *"good", "enter")
        await until(pilot, lambda: table.count() == 0)
        assert table.text().splitlines()[-2:] == [
            " no response matches 'good'; esc removes the filter",
            ' good is a keyword; to search for a word, quote it: "good"',
        ]


async def test_read_only_nothing_is_judged_and_a_notice_says_so(samples, judged, until):
    async with samples(read_only=True) as (app, pilot):
        for key in ("plus", "minus", "exclamation_mark", "W"):
            app.clear_notifications()
            await until(pilot, lambda: not notices(app))
            await pilot.press(key)
            await until(pilot, lambda: notices(app))
            assert notices(app) == ["read-only: responses cannot be judged"]
        assert shown(app)[0] == [""] * 8 * STEPS
        assert not judged.labels_file.exists()


async def test_what_others_say_is_seen_without_an_engine_and_without_a_restart(
    samples, judged, until
):
    async with samples(follow=True) as (app, pilot):
        row = newest(judged)
        set_label(judged, row.prompt, Response.of(row), "bad", "ben on pts/2")
        await until(pilot, lambda: shown(app)[0][0] == "-", "the label")
        set_note(judged, row.prompt, Response.of(row), "see\x1b[2J here", "ana")
        await until(pilot, lambda: shown(app)[0][0] == "-✎", "the note")
        assert any("see␛ here" in line for line in shown(app)[1])


async def test_what_cannot_be_written_is_reported_and_not_shown(samples, judged, until):
    async with samples() as (app, pilot):
        judged.labels_file.mkdir()
        await pilot.press("plus")
        await until(pilot, lambda: notices(app))
        assert "you need write permission" in notices(app)[0]
        await until(pilot, lambda: shown(app)[0][0] == "")


def test_what_could_not_be_written_is_not_shown_after_a_change_of_session(judged):
    said, shown = queue.Queue(), []
    context = SimpleNamespace(
        session=judged, who="me", now=lambda: 0.0, say=lambda text, _kind: said.put(text)
    )
    posted = queue.Queue()
    screen = SimpleNamespace(post_message=posted.put)
    labels = SampleLabels(
        screen, context, selected=lambda: sample(1), show=shown.append, read_again=lambda: None
    )
    judged.labels_file.mkdir()
    labels.toggle("good")
    labels.session_changed()
    shown.clear()
    labels.written(posted.get(timeout=60))
    assert "you need write permission" in said.get_nowait()
    assert not shown


def test_words_of_the_filter_and_the_same_in_quotes():
    query = parse_filter('good hack "bad cut" unjudged dull', SampleQuery())
    assert (query.labels, query.judged, query.text, query.cut_off) == (
        "good hack", False, "bad cut dull", False,
    )  # fmt: skip
    assert parse_filter("judged", SampleQuery()).judged is True
    assert parse_filter("", query) == SampleQuery()


@pytest.mark.parametrize("label", [None, "good", "bad", "hack"])
def test_a_mark_is_distinguished_without_colour(label):
    def shown(name, note):
        judgement = Judgement(label=name, note=note, who="ana", time=0.0)
        return mark(sample(1, judgement=judgement))[0]

    assert len({shown(name, None) for name in (None, "good", "bad", "hack")}) == 4
    assert shown(label, "x").endswith("✎")
