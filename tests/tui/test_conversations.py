"""Responses of several turns: the environment's replies are told apart from the policy's words."""

import pytest
from click.testing import CliRunner
from rich.cells import cell_len

from engine.journal.rows import ProbeResponse
from engine.journal.writer import JournalWriter
from engine.protocol.programs.check_result import CheckedSample
from engine.protocol.rank_messages import TokenArrays
from rlhf_tui.cli import cli
from rlhf_tui.commands.check import sample_lines
from rlhf_tui.dialogs.event import EventDialog
from rlhf_tui.dialogs.judging import JudgingDialog, ResponseText
from rlhf_tui.screens.parts.sample_table import cells_of
from rlhf_tui.state.feeds.updates import SessionUpdate
from rlhf_tui.state.session_state import SessionState
from rlhf_tui.widgets.lines import plain_text
from rlhf_tui.widgets.panels.latest_samples import LatestSamplesPanel
from rlhf_tui.widgets.samples.common_affixes import CommonAffixes
from rlhf_tui.widgets.samples.comparison import ComparisonTarget, comparison
from rlhf_tui.widgets.samples.heat import HeatScale
from rlhf_tui.widgets.samples.sample_view import (
    END_OF_PROMPT,
    LONG_PROMPT,
    VIEWS,
    SampleView,
    body,
)
from rlhf_tui.widgets.samples.turns import MARK
from rlhf_tui.widgets.scroll_list import ScrollText
from rlhf_tui.widgets.table import Table
from tests.judging import sample
from tests.tui.conftest import freeze
from tests.tui.panels import lines_of

FIRST, REPLY, LAST = " It is slow.", "\nWhy is\nthat?\n", " It has no end."
LENGTH = 7


def conversation(first=FIRST, reply=REPLY, last=LAST, **given):
    """A sample of two turns."""
    replies = [(len(first), len(first + reply))]
    return sample(3, response=first + reply + last, replies=replies, **given)


def arrays(values=(0.1,) * LENGTH, before=3):
    return TokenArrays(
        tokens=f"{FIRST}{LAST}".replace(" ", "| ").split("|")[1:], token_ids=list(range(LENGTH)),
        logprob=list(values), ref_logprob=[0.0] * LENGTH, advantage=list(values),
        value=list(values), before_replies=[before],
    )  # fmt: skip


def text(rows):
    return [line.rstrip() for line in lines_of(rows)]


def response_lines(lines):
    """The lines from the heading of the response on."""
    return lines[next(i for i, line in enumerate(lines) if line.startswith("RESPONSE")) :]


def test_each_reply_is_on_lines_of_its_own_that_have_the_mark():
    assert response_lines(text(body(conversation(), None, VIEWS[0], 60))) == [
        "RESPONSE   │ reply", "  It is slow.", "│ Why is", "│ that?", "  It has no end.",
    ]  # fmt: skip


@pytest.mark.parametrize("mode", VIEWS)
def test_no_word_of_the_policy_is_in_the_column_of_the_mark(mode):
    forged = conversation(first="well\n│ Why?\n", last="│ Why?")
    tokens = ["well\n", "│", " Why?\n", "│", " Why", "?", "\n"]
    given = TokenArrays(
        tokens=tokens, token_ids=list(range(LENGTH)), logprob=[0.5] * LENGTH,
        ref_logprob=[0.0] * LENGTH, advantage=[0.5] * LENGTH, value=[0.5] * LENGTH,
        before_replies=[3],
    )  # fmt: skip
    lines = response_lines(text(body(forged, given, mode, 60)))
    marked = [line for line in lines if line.startswith(MARK)]
    assert [line for line in marked if "reply" not in line] == ["│ Why is", "│ that?"]
    assert sum(line.startswith("  ") and "│ Why" in line for line in lines) >= 2


def test_a_response_of_one_turn_is_shown_as_without_an_environment():
    alone = body(sample(3, response=FIRST, replies=[]), None, VIEWS[0], 60)
    without = body(sample(3, response=FIRST), None, VIEWS[0], 60)
    assert response_lines(text(alone)) == response_lines(text(without)) == ["RESPONSE", FIRST[1:]]


def test_the_number_of_turns_is_shown_only_with_an_environment():
    shown = [
        text(body(sample(3, replies=replies), None, VIEWS[0], 70))[0]
        for replies in (None, [], [(0, 1)])
    ]
    assert ["turns" in line for line in shown] == [False, True, True]
    assert "length 2   turns 2" in shown[2]


def test_the_scores_of_turns_are_in_their_order_and_named_if_several_sources_gave_them():
    shown = [
        text(body(sample(3, replies=[(0, 1)], turn_scores=scores), None, VIEWS[0], 70))
        for scores in ({}, {"a": [0.5, -1.0]}, {"a": [0.5, -1.0], "b": [0.0, 2.0]})
    ]
    by_turn = [[line for line in lines if "by turn" in line] for lines in shown]
    assert by_turn == [
        [], ["by turn  0.500  -1.000"], ["a by turn  0.500  -1.000", "b by turn  0.000  2.000"],
    ]  # fmt: skip


@pytest.mark.parametrize("mode", VIEWS[1:])
def test_replies_stand_between_the_tokens_without_values(mode):
    rows = body(conversation(), arrays(), mode, 60)
    lines = text(rows)
    at = lines.index("│ Why is")
    assert lines[at - 1 : at + 3] == ["   It is slow.", "│ Why is", "│ that?", "   It has no end."]
    assert {tone for row in rows[at : at + 2] for _, tone in row} == {"dim"}
    scale = HeatScale.of([0.1] * LENGTH, centred=mode == "value")
    tones = {tone for row in (rows[at - 1], rows[at + 2]) for _, tone in row[1:]}
    assert tones == {scale.tone(0.1)}


@pytest.mark.parametrize("mode", VIEWS[:2])
def test_of_a_long_prompt_the_end_is_before_the_response_and_all_of_it_after(mode):
    def shown(count):
        prompt = "\n".join(f"line {i}" for i in range(count))
        return text(body(conversation(prompt=prompt), arrays(), mode, 60))

    lines = shown(LONG_PROMPT + 1)
    response = next(i for i, line in enumerate(lines) if "It is slow." in line)
    before, after = lines[:response], lines[response:]
    assert [line for line in before if line.startswith(("line", "…"))] == [
        f"… {LONG_PROMPT + 1 - END_OF_PROMPT} lines, see below",
        *(f"line {i}" for i in range(LONG_PROMPT + 1 - END_OF_PROMPT, LONG_PROMPT + 1)),
    ]
    assert after[after.index("PROMPT") + 1 :] == [f"line {i}" for i in range(LONG_PROMPT + 1)]
    lines = shown(LONG_PROMPT)
    assert lines.count("PROMPT") == 1
    assert sum(line.startswith("line") for line in lines) == LONG_PROMPT


def test_token_values_without_positions_of_replies_are_shown_nevertheless():
    lines = text(body(conversation(), arrays(before=99), "KL", 60))
    assert any("It is slow. It has no end." in line for line in lines)


@pytest.mark.parametrize("width", [12, 33, 80])
@pytest.mark.parametrize("mode", VIEWS)
def test_lines_of_replies_keep_to_the_width(mode, width):
    long = conversation(reply="字" * 40 + " and more words of it")
    lines = response_lines([*text(body(long, arrays(), mode, width)), ""])
    shown = lines[1 : lines.index("")]
    assert "".join("".join(shown).split()).count("字") == 40
    assert all(cell_len(line) <= width for line in shown)


def test_a_control_sequence_that_a_reply_completes_is_not_sent():
    hostile = conversation(first="a\x1b", reply="[2Jb\x9d", last="0;title\x07c")
    for mode in VIEWS:
        assert not {"\x1b", "\x9d"} & set(plain_text(body(hostile, arrays(), mode, 60), 60))


def compared(one, other, width=60):
    return comparison(one, ComparisonTarget("earlier", "OTHER", one, other), width)


def toned(rows, tone):
    return [piece for row in rows for piece, found in row if found == tone]


@pytest.mark.parametrize("width", [43, 60, 120])
def test_only_the_words_of_the_policy_are_compared(width):
    one = conversation()
    other = conversation(reply=" It has no actors.", last=" It has no story.", index=1)
    rows = compared(one, other, width)
    assert toned(rows, "mine") == ["end.", "only in this"]
    assert toned(rows, "theirs") == ["story.", "only in other"]
    lines = text(rows)
    assert any("6 words in common" in line for line in lines)
    assert any("│ Why is" in line for line in lines)
    assert any("│ It has no actors." in line for line in lines)
    assert "".join(lines).count("2 turns") == 2
    assert any("│ reply" in line for line in lines)
    assert all(cell_len(line) <= width for line in lines if "OTHER" not in line)


def test_a_conversation_is_compared_with_that_of_the_reference():
    text_of_both = " It is slow. Go on. It ends."
    found = ProbeResponse(response=text_of_both, length=6, step=2, replies=[(12, 19)])
    rows = compared(conversation(), found)
    assert "│ Go on." in "".join(text(rows))
    assert "ends." in toned(rows, "theirs")
    assert "".join(text(rows)).count("2 turns") == 2


def test_on_one_line_a_reply_is_between_marks():
    row = conversation()
    assert cells_of(row, CommonAffixes())[-1][0] == (
        "It is slow. │Why is\nthat?│ It has no end."
    )  # fmt: skip
    state = SessionState("run")
    state.take(SessionUpdate(samples=[row]))
    pieces = LatestSamplesPanel(state).rows(100, 5)[1]
    assert (" │Why is\nthat?│ ", "dim") in pieces


def test_the_command_line_prints_each_turn_on_a_line_of_its_own(talk):
    arguments = ["samples", talk.name, "--sessions", str(talk.folder.parent), "--last", "3"]
    assert CliRunner().invoke(cli, arguments).output.splitlines() == [
        "step 2 #0  score 0.000  KL 1.00  3 turns",
        "  I watched this one with│ The plot is thin.",
        "  reply │␤Why?␤",
        "  policy│ It has no end.",
        "  reply │ And the actors?",
        "  policy│ I left early.",
        "step 2 #1  score 0.500  KL 1.00  2 turns",
        "  I watched this one with│ a friend.",
        "  reply │␤Why?␤",
        "  policy│ It was warm.",
        "step 2 #2  score 1.000  KL 1.00  1 turn",
        "  I watched this one with│ some doubts.",
    ]


def test_check_prints_each_turn_on_a_line_of_its_own():
    checked = CheckedSample("It was", " dull.\nreply  x Why? So.", 0.5, [(15, 20)])
    assert sample_lines(checked) == [
        "prompt    It was",
        "response   dull.␤reply  x",
        "reply      Why?",
        "response   So.  (0.500)",
    ]


def test_check_prints_the_end_of_a_long_prompt():
    checked = CheckedSample("tools " * 100 + "Who?", "I.", 0.5)
    prompt = sample_lines(checked)[0]
    assert prompt.startswith("prompt    …")
    assert prompt.endswith("tools Who?")
    assert len(prompt) == len("prompt    ") + 200


@pytest.fixture
def talking(make_app, talk):
    """The app on the session with an environment."""
    return make_app("talk", root=talk.folder.parent)


@pytest.mark.parametrize("size", [(80, 24), (120, 40)])
async def test_the_screen_shows_replies_as_text_and_between_tokens(talking, running, until, size):
    async with running(talking, size) as pilot:
        await pilot.press("3", "z")
        view = talking.screen.query_one(SampleView)
        await until(pilot, lambda: view.arrays is not None)
        assert "\n │ And the actors?\n   I left early." in view.text()
        for mode in VIEWS[1:]:
            await pilot.press("v")
            assert view.mode == mode
            assert "\n │ And the actors?\n    I left early." in view.text()


@pytest.mark.parametrize(("name", "shown"), [("talk", True), ("frozen", False)])
async def test_the_list_has_the_number_of_turns_only_with_an_environment(
    run_app, root, talk, until, name, shown
):
    async with run_app(
        name, root=talk.folder.parent if name == "talk" else root, size=(80, 24)
    ) as (app, pilot):
        await pilot.press("3")
        table = app.screen.query_one(Table)
        await until(pilot, table.count)
        header, first = table.text().splitlines()[:2]
        assert ("turns" in header) == shown
        assert not shown or first.split()[:6] == ["2", "0", "0.00", "1.0", "11", "3"]


async def test_the_list_finds_words_of_replies(talking, running, until):
    async with running(talking) as pilot:
        await pilot.press("3")
        table = talking.screen.query_one(Table)
        await until(pilot, lambda: table.count() == 6)
        await pilot.press("slash", *"actors", "enter")
        await until(pilot, lambda: table.count() == 2)
        assert "And the actors?" in talking.screen.query_one(SampleView).text()


async def test_the_queue_shows_what_is_a_reply(talking, running, until):
    async with running(talking) as pilot:
        await pilot.press("3")
        await until(pilot, lambda: talking.screen.query_one(SampleView).sample is not None)
        await pilot.press("J")
        await until(pilot, lambda: isinstance(talking.screen, JudgingDialog))
        shown = talking.screen.query_one(ResponseText)
        await until(pilot, lambda: "RESPONSE" in shown.text())
        for _ in range(3):  # four texts are unjudged, two of them of three turns
            if "3 turns" not in shown.text():
                await pilot.press("s")
        assert "3 turns" in shown.text()
        assert f"{MARK}And the actors?" in shown.text()


async def test_an_alert_shows_what_is_a_reply(run_app, session_maker, tmp_path, until):
    session = session_maker(tmp_path / "sessions", "alerts", 5)
    evidence = {"index": 3, "prompt": "p", "response": "a Why? b", "score": 1.0, "kl": 9.5}
    journal = JournalWriter(session)
    data = {"rule": "r", "text": "t", "samples": [evidence | {"replies": [(1, 6)]}]}
    journal.record_event("alert", data, 4)
    journal.close()
    freeze(session)
    async with run_app("alerts", root=session.folder.parent) as (app, pilot):
        await pilot.press("g", "n", "enter")
        await until(pilot, lambda: isinstance(app.screen, EventDialog))
        shown = app.screen.query_one(ScrollText)
        await until(pilot, lambda: f"{MARK}Why?" in shown.text())
