"""An answer token by token, and a step whose numbers are undefined."""

import math

import pytest
from rich.cells import cell_len

from engine.protocol.rank_messages import TokenArrays
from rlhf_tui.state.feeds.updates import SessionSummary, SessionUpdate
from rlhf_tui.state.session_state import SessionState
from rlhf_tui.widgets.lines import plain_text, row_width
from rlhf_tui.widgets.panels.latest_samples import LatestSamplesPanel
from rlhf_tui.widgets.panels.steering import SteeringPanel
from rlhf_tui.widgets.samples.common_affixes import common_affixes
from rlhf_tui.widgets.samples.heat import COLD, HEAT, UNDEFINED, HeatScale
from rlhf_tui.widgets.samples.sample_view import EXTREMES, VIEWS, body, token_rows
from tests.judging import sample
from tests.tui.panels import lines_of


def arrays_of(*values):
    return TokenArrays(
        tokens=[f"t{i}" for i in range(len(values))], token_ids=list(range(len(values))),
        logprob=list(values), ref_logprob=[-1.0] * len(values), advantage=list(values),
        value=list(values),
    )  # fmt: skip


@pytest.mark.parametrize("mode", VIEWS[1:])
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_is_shown_as_such_before_the_largest(mode, odd):
    rows = token_rows(arrays_of(-1.0, odd, -4.0), mode, 80)
    assert ("t1", UNDEFINED) in rows[2]
    assert [tone for piece, tone in rows[2] if piece in ("t0", "t2")].count(UNDEFINED) == 0
    title = EXTREMES.get(mode, f"largest {mode}")
    first = lines_of(rows)[lines_of(rows).index(title) + 1]
    assert str(odd) in first
    assert "t1" in first


def test_a_response_of_nothing_but_undefined_numbers_can_be_read():
    assert "– … –" in lines_of(token_rows(arrays_of(math.nan, math.nan), "value", 60))[1]


def test_the_legend_has_the_tones_of_the_tokens():
    values = [-4.0, -2.0, -0.5, 0.25, 1.0, 3.9, 4.0]
    rows = token_rows(arrays_of(*values), "advantage", 80)
    assert rows[1][0] == ("scale ", "dim")
    legend = {tone for piece, tone in rows[1][1:] if piece.strip()}
    assert legend == {*HEAT, *COLD}
    assert {tone for piece, tone in rows[2] if piece.startswith("t")} <= legend
    assert rows[1][2] == (" -4.00 ", "cold3")


def test_values_of_one_size_do_not_all_have_one_tone():
    scale = HeatScale.of([1.00, 1.01, 1.02, 1.05], centred=True)
    assert [scale.tone(v) for v in (1.00, 1.02, 1.05)] == ["cold2", "", "heat3"]


def test_numbers_near_the_largest_there_are_can_be_read():
    assert token_rows(arrays_of(1e308, 1.0), "value", 60)


def test_a_kl_that_is_undefined_is_no_zero():
    state = SessionState("run")
    state.take(SessionUpdate(samples=[sample(3, score=None, kl=None)]))
    row = lines_of(LatestSamplesPanel(state).rows(80, 5))[1]
    assert row.split()[:2] == ["–", "–"]


SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n"
CHAT = SYSTEM + "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
ASKED = ("How is tea made ?", "How is soup made ?")


@pytest.mark.parametrize(
    ("prompts", "shown"),
    [
        ([CHAT.format(asked) for asked in ASKED], ASKED),
        ([f"<s><|User|>{asked}<|Assistant|>" for asked in ASKED], ASKED),
        ([f"Q: 1 + 1\nA: 2\n\nQ: {asked}\nA:" for asked in ASKED], [f"Q: {a}" for a in ASKED]),
        (ASKED, ASKED),  # words that all have are part of the prompt
        ([CHAT.format("same")] * 2, [CHAT.format("same").strip()] * 2),
        (["a\n", "a\na\n"], ["a", "a"]),  # what both begin with overlaps what both end with
    ],
)
def test_markup_that_all_prompts_of_a_list_share_is_left_out(prompts, shown):
    affixes = common_affixes(prompts)
    assert [affixes.removed_from(prompt) for prompt in prompts] == list(shown)


def test_the_newest_responses_show_what_was_asked():
    state = SessionState("run")
    rows = [sample(3, index=i, prompt=CHAT.format(a)) for i, a in enumerate(ASKED)]
    state.take(SessionUpdate(samples=rows))
    shown = lines_of(LatestSamplesPanel(state).rows(80, 5))[1:]
    assert [asked in line for asked, line in zip(ASKED, shown, strict=True)] == [True, True]


@pytest.mark.parametrize("prompt", ["how was the film " * 9, "电影怎么样" * 9, "a line\n" * 9])
def test_the_end_of_a_prompt_has_a_quarter_of_the_line_in_any_script(prompt):
    newest = LatestSamplesPanel(SessionState())
    newest.state.samples = [sample(1, prompt=prompt, response="warm " * 20)]
    shown = plain_text(newest.rows(80, 5)[1:], 80)
    asked = shown[shown.index("…") : shown.index("│")]
    assert 19 <= cell_len(asked) <= 20


@pytest.mark.parametrize("response", ["warm", "电影"])
def test_a_short_response_leaves_its_room_to_the_prompt(response):
    newest = LatestSamplesPanel(SessionState())
    newest.state.samples = [sample(1, prompt="how was the film " * 9, response=response)]
    row = newest.rows(46, 5)[1]
    assert row_width(row) == 46
    assert plain_text([row], 46).rstrip().endswith(f"│{response}")


def test_responses_of_older_weights_say_of_which():
    state = SessionState("run")
    for version, said in ((None, False), (2, False), (1, True)):
        row = sample(3, weights_version=version)
        state.take(SessionUpdate(samples=[row]))
        rows = [*LatestSamplesPanel(state).rows(80, 5), *body(row, None, VIEWS[0], 70)]
        assert sum("weights of step 1" in line for line in lines_of(rows)) == 2 * said


def test_the_kl_of_an_earlier_step_is_not_shown_as_the_last_one_s():
    settings = {"beta": 0.05, "controller": "adaptive", "target": 6.0}
    state = SessionState("run")
    head = SessionSummary("running", 2, 9, settings, "", [], 1, "box")
    state.take(SessionUpdate(head=head, curves={"objective/kl": [(1, 6.6), (2, None)]}))
    kl = next(row for row in lines_of(SteeringPanel(state).rows(100, 12)) if row.startswith(" KL"))
    assert kl.split() == ["KL", "–", "target", "6", "nats"]


@pytest.mark.parametrize("mode", VIEWS[1:])
def test_a_response_without_token_values_is_read_nevertheless_and_says_which_have_them(mode):
    row = sample(3, index=7, response="all of its words")
    lines = lines_of(body(row, None, mode, 70, [0, 1, 2, 5]))
    assert "all of its words" in lines
    assert "token values of #7 were not kept; kept are #0–2 #5 (log.arrays)" in lines
    assert "are of this step" in " ".join(lines_of(body(row, None, mode, 200, [])))
    assert not any("kept" in line for line in lines_of(body(row, None, mode, 60)))


def test_a_legend_that_nearly_fits_has_one_row_without_its_name():
    scale = HeatScale.of([-4.32, -1.0, 3.98])
    (wide,) = lines_of(scale.legend(80))
    assert wide.split()[0] == "scale"
    width = len(" ".join(wide.split()[1:])) + 1
    (row,) = lines_of(scale.legend(width))
    assert row.split() == wide.split()[1:]
    assert lines_of(scale.legend(width - 1))[0].split()[0] == "scale"


def test_a_legend_that_is_too_wide_has_more_rows_and_keeps_the_largest_value():
    rows = HeatScale.of([-4.32, -1.0, 3.98]).legend(24)
    assert len(rows) > 1
    assert all(sum(len(text) for text, _ in row) <= 24 for row in rows)
    assert rows[-1][-1][0].strip() == "3.98"
