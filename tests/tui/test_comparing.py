"""An answer beside an earlier one or the reference's, and which is the better one."""

import contextlib
import sqlite3

import pytest
from textual.events import Key

from engine.journal.judgements.labels import LabelReader, Response, prefer
from engine.journal.reader import JournalReader
from engine.journal.samples import SampleQuery
from engine.journal.writer import JournalWriter
from engine.session.folder import SessionFolder
from rlhf_tui.widgets.samples.sample_view import SampleView
from rlhf_tui.widgets.table import Table
from tests.judging import STEPS
from tests.tui.screen import notices

PROMPT = "I watched this one with"


def reference(session, text="the reference's words"):
    """A probe of the prompt, as a finished run has it."""
    journal = JournalWriter(session)
    journal.commands.record("p", "probe", {"text": PROMPT}, "ana")
    journal.commands.accept("p")
    answer = {"response": text, "score": 0.1, "kl": 0.0, "length": 3}
    journal.commands.apply("p", 4, [], {"policy": answer, "reference": answer})
    journal.close()


def beside(app):
    return app.screen.query_one(SampleView).beside


def pane(app):
    return app.screen.query_one(SampleView).text()


def pairs(session):
    with LabelReader(session) as labels:
        return [(p.chosen, p.rejected) for p in labels.preferences()]


def rows(session, count):
    with JournalReader(session) as reader:
        return reader.samples.page(SampleQuery(), count)


async def test_d_goes_from_nothing_to_an_earlier_one_to_the_reference_and_back(
    samples, judged, until
):
    reference(judged)
    async with samples() as (app, pilot):
        assert beside(app) is None
        await pilot.press("d")
        await until(pilot, lambda: beside(app).row is not None)
        assert (beside(app).kind, beside(app).row.index) == ("earlier", 1)
        assert "OTHER, step 6 #1 (1/47)" in pane(app)
        await pilot.press("d")
        await until(pilot, lambda: beside(app).row is not None)
        assert "REFERENCE, asked at step 4" in pane(app)
        assert "the reference's words" in pane(app)
        await pilot.press("d")
        assert beside(app) is None
        assert "THIS" not in pane(app)


@pytest.mark.parametrize(("forth", "back"), [("right", "left"), ("l", "h")])
async def test_each_earlier_response_comes_in_turn(samples, forth, back, until):
    async with samples() as (app, pilot):
        await pilot.press("d")
        await until(pilot, lambda: beside(app).row is not None)
        await pilot.press(*[forth] * 8)
        assert "OTHER, step 5 #1 (9/47)" in pane(app)
        await pilot.press(back)
        assert "OTHER, step 5 #0 (8/47)" in pane(app)
        await pilot.press(*[back] * 9)
        assert "(1/47)" in pane(app)


async def test_the_next_response_has_others_of_its_own(samples, until):
    async with samples() as (app, pilot):
        await pilot.press("d", "n")
        await until(pilot, lambda: beside(app) and beside(app).row is not None)
        await until(pilot, lambda: "THIS, step 6 #1" in pane(app))
        assert "OTHER, step 6 #0 (1/47)" in pane(app)
        await pilot.press("G")
        await until(pilot, lambda: "OTHER, step 1 #0 (1/7)" in pane(app))


async def test_esc_leaves_the_comparison_before_the_response(samples, until):
    async with samples() as (app, pilot):
        await pilot.press("enter", "d")
        await until(pilot, lambda: beside(app).row is not None)
        await pilot.press("escape")
        assert beside(app) is None
        assert app.screen.query_one(SampleView).has_focus
        await pilot.press("escape")
        assert app.screen.query_one(Table).has_focus


async def test_tokens_hide_the_other_response_and_d_shows_it_again(samples, until):
    async with samples() as (app, pilot):
        await pilot.press("d")
        await until(pilot, lambda: beside(app).row is not None)
        await pilot.press("v")
        assert "OTHER" not in pane(app)
        await pilot.press("d")
        assert "(1/47)" in pane(app)


@pytest.mark.parametrize(("key", "better"), [("y", "this"), ("o", "other")])
async def test_a_key_says_which_is_better_and_again_takes_it_back(
    samples, judged, key, better, until
):
    mine, theirs = (Response.of(row) for row in rows(judged, 2))
    async with samples() as (app, pilot):
        await pilot.press("d")
        await until(pilot, lambda: beside(app).row is not None)
        await pilot.press(key)
        assert beside(app).better == better
        assert f"✓ better   {app.who}" in pane(app)
        said = [(mine, theirs) if better == "this" else (theirs, mine)]
        await until(pilot, lambda: pairs(judged) == said)
        await pilot.press(key)
        assert beside(app).better == ""
        await until(pilot, lambda: pairs(judged) == [])


async def test_the_other_key_turns_it_round(samples, judged, until):
    mine, theirs = (Response.of(row) for row in rows(judged, 2))
    async with samples() as (app, pilot):
        await pilot.press("d")
        await until(pilot, lambda: beside(app).row is not None)
        await pilot.press("y", "o")
        assert beside(app).better == "other"
        await until(pilot, lambda: pairs(judged) == [(theirs, mine)])


async def test_the_reference_may_be_the_better_one(samples, judged, until):
    reference(judged)
    async with samples() as (app, pilot):
        await pilot.press("d", "d")
        await until(pilot, lambda: beside(app).row is not None)
        await pilot.press("o")
        chosen = Response(response="the reference's words")
        await until(pilot, lambda: [c for c, _ in pairs(judged)] == [chosen])


async def test_of_the_same_words_neither_is_better(samples, judged, until):
    reference(judged, rows(judged, 1)[0].response)
    async with samples() as (app, pilot):
        await pilot.press("d", "d")
        await until(pilot, lambda: beside(app).row is not None)
        await pilot.press("y")
        await until(pilot, lambda: notices(app))
        assert "are identical" in notices(app)[0]
        assert beside(app).better == ""


async def test_what_another_client_says_of_the_pair_is_seen(samples, judged, until):
    mine, theirs = (Response.of(row) for row in rows(judged, 2))
    async with samples(follow=True) as (app, pilot):
        await pilot.press("d")
        await until(pilot, lambda: beside(app).row is not None)
        prefer(judged, PROMPT, theirs, mine, "ben on pts/2")
        await until(pilot, lambda: "✓ better   ben on pts/2" in pane(app), "the verdict")


@pytest.mark.parametrize("keys", ["ny", "jo"])
async def test_what_is_typed_ahead_never_pairs_responses_to_two_prompts(
    samples, judged, keys, until
):
    with contextlib.closing(sqlite3.connect(judged.samples_file)) as db, db:
        db.execute("UPDATE samples SET prompt = 'another prompt' WHERE idx = 1")
    async with samples() as (app, pilot):
        await pilot.press("d")
        await until(pilot, lambda: beside(app).row is not None)
        for key in keys:  # as they come over a slow line: all at once
            app.post_message(Key(key, key))
        await until(pilot, lambda: app.screen.selected().index == 1)
        await until(pilot, lambda: beside(app).row is not None)
        await until(pilot, lambda: not app.screen.labels.unwritten)
        assert pairs(judged) == []
        await pilot.press(keys[1])
        await until(pilot, lambda: pairs(judged))
        with LabelReader(judged) as labels:
            assert [p.prompt for p in labels.preferences()] == ["another prompt"]
        assert {side.index for side in pairs(judged)[0]} == {1}


@pytest.mark.parametrize("key", ["y", "o", "left", "right"])
async def test_without_a_comparison_its_keys_say_what_comes_first(samples, judged, until, key):
    async with samples() as (app, pilot):
        await pilot.press(key)
        await until(pilot, lambda: notices(app))
        assert notices(app)[0].startswith("press d to compare")
        assert not judged.labels_file.exists()


async def test_the_footer_shows_the_keys_of_a_comparison_while_there_is_one(samples, judged, until):
    reference(judged)
    choice, others = "y this is better  o other is better", "← newer  → older"
    async with samples() as (app, pilot):
        footer = app.screen.query_one("#keys")
        for key, shown in (
            ("d", f"{choice}  {others}  d compare"),  # with an earlier response
            ("d", f"{choice}  d compare"),  # with the reference's
            ("d", "d compare"),
            ("d", f"{choice}  {others}  d compare"),
            ("escape", "d compare"),
        ):
            await pilot.press(key)
            await until(pilot, lambda shown=shown: footer.text().startswith(f" {shown}"))


async def test_while_token_values_are_shown_no_pair_is_judged(samples, judged, until):
    async with samples() as (app, pilot):
        await pilot.press("d")
        await until(pilot, lambda: beside(app).row is not None)
        await pilot.press("v", "y")
        await until(pilot, lambda: "press d to show both" in app.screen.query_one("#keys").text())
        assert not judged.labels_file.exists()


async def test_read_only_no_pair_is_judged(samples, judged, until):
    async with samples(read_only=True) as (app, pilot):
        await pilot.press("d")
        await until(pilot, lambda: beside(app).row is not None)
        await pilot.press("y")
        await until(pilot, lambda: notices(app))
        assert notices(app) == ["read-only: responses cannot be judged"]
        assert not judged.labels_file.exists()


# -- the reference's answer ------------------------------------------------------------------------


async def test_a_live_engine_is_asked_for_the_reference_s_response(samples, engine, until):
    async with samples() as (app, pilot):
        await pilot.press("d", "d")
        await until(pilot, lambda: [c.text for c in engine] == [PROMPT])
        await until(pilot, lambda: beside(app).row is not None)
        assert "reference says" in pane(app)
        assert "REFERENCE, asked at step 201" in pane(app)
        assert len(app.screen_stack) == 1, "no dialog"


async def test_the_probe_s_refusal_is_shown(samples, engine, monkeypatch, until):
    from engine.protocol.client_messages import CommandReply  # noqa: PLC0415
    from rlhf_tui.state import command_sender  # noqa: PLC0415

    reason = "a probe needs 1 to 64 tokens, this has 90"
    monkeypatch.setattr(
        command_sender.Client,
        "send",
        lambda *a: CommandReply(id=a[-1], status="rejected", reason=reason),
    )
    async with samples() as (app, pilot):
        await pilot.press("d", "d")
        await until(pilot, lambda: notices(app))
        assert reason in notices(app)[0]
        await until(pilot, lambda: "press d" in pane(app))


async def test_the_reference_is_asked_by_d_not_by_selecting_a_response(samples, engine, until):
    # This engine writes no journal: what it answered is not found again.
    async with samples() as (app, pilot):
        await pilot.press("d", "d")
        await until(pilot, lambda: beside(app).row is not None)
        await pilot.press("n")
        await until(pilot, lambda: "press d" in pane(app))
        assert len(engine) == 1
        await pilot.press("d")
        await until(pilot, lambda: "reference says" in pane(app))
        assert len(engine) == 2


async def test_the_reference_is_asked_though_others_are_read_again_meanwhile(
    samples, engine, until
):
    """As when the list of responses or a label is read right after the key."""
    async with samples() as (app, pilot):
        screen = app.screen
        for _ in range(2):
            screen.comparison.next_kind()
        screen.comparison.read_again()
        screen.comparison.select(screen.selected())
        await until(pilot, lambda: "reference says" in pane(app))
        assert len(engine) == 1


async def test_what_somebody_else_has_asked_meanwhile_is_not_asked_again(
    samples, judged, engine, until
):
    async with samples() as (app, pilot):
        await pilot.press("d", "d")
        await until(pilot, lambda: beside(app).row is not None)
        await pilot.press("n")
        await until(pilot, lambda: "press d" in pane(app))
        reference(judged)
        await pilot.press("d")
        await until(pilot, lambda: "the reference's words" in pane(app))
        assert len(engine) == 1


async def test_without_an_engine_a_notice_says_how_to_start_one(samples, until):
    async with samples() as (app, pilot):
        await pilot.press("d", "d")
        await until(pilot, lambda: "rlhf-tui resume judged" in pane(app))
        await pilot.press("d")
        assert beside(app) is None


async def test_read_only_the_reference_is_not_asked(samples, engine, monkeypatch, until):
    monkeypatch.setattr(SessionFolder, "is_live", lambda self: True)
    async with samples(read_only=True) as (app, pilot):
        await pilot.press("d", "d")
        await until(pilot, lambda: "read-only" in pane(app))
        assert engine == []


async def test_a_prompt_with_a_single_response_has_no_comparison_and_says_so(
    samples, judged, until
):
    with contextlib.closing(sqlite3.connect(judged.samples_file)) as db, db:
        db.execute("UPDATE samples SET prompt = 'another one' WHERE (step, idx) = (?, 0)", (STEPS,))
    async with samples() as (app, pilot):
        await pilot.press("d")
        await until(pilot, lambda: "no other response to this prompt" in pane(app))
