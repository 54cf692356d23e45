"""What others wrote reaches the terminal as nothing it would obey, and never ends the app."""

import json
import re
import shutil
import sqlite3

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from rich.cells import cell_len
from rich.style import Style
from textual.events import Paste
from textual.geometry import Region

from engine.journal.rows import Judgement
from engine.session.folder import SessionFolder
from rlhf_tui.app.app import RlhfApp
from rlhf_tui.dialogs.base import InputDialog
from rlhf_tui.widgets.lines import changed_span, render_row
from rlhf_tui.widgets.samples.comparison import ComparisonTarget, comparison
from rlhf_tui.widgets.samples.sample_view import body
from rlhf_tui.widgets.text_input import TextInput
from rlhf_tui.widgets.wrap import wrap
from tests.judging import sample
from tests.tui.screen import press_for

ATTACKS = (
    "\x1b[2J", "\x1b]52;c;aGVsbG8=\x07", "\x1b]0;title\x1b\\", "\x9b31m", "\x9d52;c;x\x9c",
    "\x90q\x9c", "[/nope]", "[red]", "[@click=app.quit]x[/]", "[", "\\[", "\u202etxet",
    "\u2066x\u2069", "\x00",
    "\x07", "\x08", "\x7f", "\r", "\x0b", "\u2028", "漢字", "e\u0301", "👩\u200d👧", "\t",
)  # fmt: skip
RAW = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
hostile = st.lists(
    st.one_of(st.sampled_from(ATTACKS), st.text(max_size=12)), min_size=1, max_size=6
).map("".join)


def shown(app: RlhfApp) -> str:
    """Every character that the screen's widgets would send, covered ones included."""
    strips = [
        strip
        for widget in [app.screen, *app.screen.walk_children()]
        if widget.display and widget.size
        for strip in widget.render_lines(Region(0, 0, *widget.size))
    ]
    return "\n".join(segment.text for strip in strips for segment in strip)


@given(text=hostile, width=st.integers(5, 60))
@settings(max_examples=200, deadline=None)
def test_wrapped_text_has_nothing_to_obey(text, width):
    assert not RAW.search("\n".join(wrap(text, width)).replace("\n", ""))


@given(text=hostile)
@settings(max_examples=60, deadline=None)
def test_a_line_is_as_wide_as_it_says_and_has_nothing_to_obey(text):
    strip = render_row([(text, ""), (text, "dim")], 30, lambda _tone: Style())
    assert not RAW.search("".join(s.text for s in strip))
    assert sum(s.cell_length for s in strip) == 30


@pytest.mark.parametrize(
    "text", ["e\u0301", "👩\u200d👧", "👍🏽", "1\ufe0f\u20e3", "漢字", "क्षि", "\u200b"]
)
def test_a_change_behind_any_characters_is_drawn_in_its_cell(text):
    old, new = (render_row([(f"{text} {n}", "")], 30, lambda _tone: Style()) for n in "12")
    first, end = changed_span(old, new)
    assert first <= cell_len(f"{text} ") < end


def poison(session: SessionFolder, text: str) -> None:
    """The same text wherever others can write."""
    db = sqlite3.connect(session.samples_file)
    with db:
        db.execute("UPDATE samples SET prompt = ?, response = ? WHERE step > 190", (text, text))
    db.close()
    db = sqlite3.connect(session.journal_file)
    with db:
        data = {"text": text, "rule": text, "who": text, "state": text}
        for kind in ("note", "alert", "error", "state"):
            db.execute(
                "INSERT INTO events (time, attempt, step, kind, data) VALUES (1, 2, 200, ?, ?)",
                (kind, json.dumps(data)),
            )
        db.execute("UPDATE commands SET who = ?, reason = ?", (text, text))
        db.execute("INSERT OR REPLACE INTO names (id, name) VALUES (900, ?)", (text,))
        db.execute(
            "INSERT OR REPLACE INTO meta VALUES ('message', json(?))",
            (json.dumps(text),),
        )
        answer = {"response": text, "score": 1.0, "kl": 0.0, "length": 3}
        db.execute(
            "INSERT INTO commands (id, command, args, who, status, queued, attempt, changes, "
            "result) VALUES ('p', 'probe', ?, ?, 'applied', 1, 2, '[]', ?)",
            (json.dumps({"text": text}), text, json.dumps({"reference": answer})),
        )
    db.close()
    db = sqlite3.connect(session.labels_file)
    with db:
        db.execute("UPDATE judgements SET note = ?, who = ?", (text, text))
        db.execute(
            "UPDATE preferences SET prompt = ?, chosen = ?, rejected = '', who = ?", [text] * 3
        )
    db.close()
    session.log_file.write_bytes((text + "\n").encode("utf-8", "surrogatepass") * 50)


async def test_no_screen_shows_anything_raw(make_app, root, tmp_path, until):
    """Each attack at once, and each way of looking at it."""
    shutil.copytree(root, tmp_path / "poisoned")
    session = SessionFolder(tmp_path / "poisoned" / "frozen")
    poison(session, " ".join(ATTACKS))
    app = make_app(root=tmp_path / "poisoned")
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await until(pilot, lambda: app.state.known)
        for keys in (
            ["2", "n"], ["m"], ["escape", "3"], ["j", "d"], ["d"], ["z"], ["v"], ["v"], ["4"],
            ["5"], ["1"], ["question_mark"], ["escape", "2", "ctrl+p"], ["escape"],
        ):  # fmt: skip
            await pilot.press(*keys)
            await pilot.pause(0.15)
            text = shown(app)
            assert not RAW.search(text.replace("\n", "")), keys
        app.say(" ".join(ATTACKS), "error")
        app.say(" ".join(ATTACKS))
        await pilot.pause(0.1)
        assert not RAW.search(shown(app).replace("\n", ""))


async def test_pasted_control_characters_are_drawn_as_symbols_and_stay_in_the_value(run_app, until):
    async with run_app() as (app, pilot):
        await press_for(pilot, InputDialog, "5", "slash")
        field = app.screen.query_one(TextInput)
        pasted = " ".join(ATTACKS)
        field.post_message(Paste(pasted))
        await until(pilot, lambda: field.value)
        assert field.value == " ".join(pasted.splitlines())
        await pilot.press("home")
        assert not RAW.search(shown(app).replace("\n", ""))
        await pilot.press("end")
        assert not RAW.search(shown(app).replace("\n", ""))


@given(text=hostile, replies=st.lists(st.tuples(st.integers(-2, 40), st.integers(-2, 40))))
@settings(max_examples=40, deadline=None)
def test_any_prompt_and_response_can_be_read(text, replies):
    row = sample(1, prompt=text, response=text, parts={text: 1.0, "b": None}, replies=replies)
    assert body(row, None, "text", 40)
    row = replace(row, judgement=Judgement(label="good", note=text, who=text, time=0.0))
    other = replace(row, response=text[::-1], replies=None)
    beside = ComparisonTarget("earlier", text, row, other, better="this", who=text)
    for width in (40, 120):
        assert comparison(row, beside, width)
