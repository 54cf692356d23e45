"""How a run stands and what happened, in a line or two each."""

import math
import shlex
import time

import pytest
from rich.cells import cell_len

from engine.config.settings import SettingChange
from engine.journal.rows import EventRow, decode_payload
from engine.protocol.rank_messages import WAIT_FOR, Phase
from rlhf_tui.screens.modes import MODES
from rlhf_tui.state.feeds.updates import SessionUpdate
from rlhf_tui.state.runs.listing import spark
from rlhf_tui.state.session_state import SessionState
from rlhf_tui.state.timeline import in_app
from rlhf_tui.state.viewport import Viewport
from rlhf_tui.widgets.panels.cursor import CursorPanel
from rlhf_tui.widgets.panels.latest_samples import LatestSamplesPanel
from rlhf_tui.widgets.panels.phases import PhaseStrip
from rlhf_tui.widgets.panels.steering import SteeringPanel
from rlhf_tui.widgets.panels.timeline import TimelinePanel
from rlhf_tui.widgets.status_lines import StatusLine, Tabs
from tests.tui.panels import command, head, make_state, text

# -- top lines -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"state": "crashed", "pid": None}, "rlhf-tui resume run"),
        ({"state": "failed", "pid": None, "message": "out of memory\nmore"}, "out of memory"),
        ({"state": "finished", "pid": None, "step": 100}, "-o train.steps=200"),
        ({"state": "paused"}, "p unpauses"),
    ],
)
def test_a_state_says_what_helps(given, words):
    assert words in text(StatusLine(make_state(**given)))


@pytest.mark.parametrize("reason", ["the reward function raised " + "again " * 30, "奖励" * 40])
def test_a_long_reason_of_a_pause_leaves_room_for_the_step_and_the_key(reason):
    line = StatusLine(make_state(state="paused", pause_reason=reason))
    shown = text(line, 80)
    assert shown.startswith(" step 50/100 ")
    assert shown.rstrip().endswith("…; p unpauses")
    assert f"paused by {reason[:20]}" in shown
    assert cell_len(shown) == 80


def test_a_run_that_waits_does_not_say_that_it_runs():
    state = make_state()
    state.take(SessionUpdate(phases=[Phase(rank=0, step=51, name=f"{WAIT_FOR}room on the disk")]))
    assert "⧗ waiting" in text(Tabs(state, "dashboard", tuple(MODES)))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"state": "crashed", "pid": None}, "engine died; resume with r"),
        ({"state": "finished", "pid": None, "step": 100}, "extend with r"),
    ],
)
def test_a_key_takes_the_place_of_a_command_that_does_not_fit(given, words):
    line = StatusLine(make_state(**given))
    line.resume_key = "r"
    assert text(line, 44).rstrip().endswith(words)
    assert "rlhf-tui resume run" in text(line, 100)


@pytest.mark.parametrize(
    "given",
    [
        {"state": "crashed", "pid": None},
        {"state": "failed", "pid": None, "message": "out of memory " * 9},
    ],
)
def test_the_step_is_never_cut_off_for_what_stands_beside_it(given):
    line = StatusLine(make_state(**given))  # with --read-only: no key resumes
    for width in (30, 44, 80):
        shown = text(line, width)
        assert shown.startswith(" step 50/100")
        assert len(shown) <= width


@pytest.mark.parametrize("program", ["rlhf-tui", "/opt/venv/bin/rlhf-tui", "'/a b/rlhf-tui'"])
def test_the_top_line_of_a_failed_run_names_the_screen_of_the_log(program):
    died = "rank 0 ended with status 3"
    message = f"{died}; see {program} logs run --sessions {50 * 'x'}"
    line = StatusLine(make_state(state="failed", message=message))
    assert text(line, 80).rstrip().endswith(f"failed: {died}; see 5 Log")


@pytest.mark.parametrize("rest", ["", "; no checkpoint is there", ": restart from step 4, from 9"])
@pytest.mark.parametrize("root", ["/home/me/runs:2", "/it's here/my runs", "/a; b/runs"])
def test_what_follows_the_command_that_prints_the_log_is_told_in_the_app_too(root, rest):
    see = shlex.join(["/opt/rlhf-tui", "logs", "run", "--sessions", root])
    assert in_app(f"rank 0 died; see {see}{rest}") == f"rank 0 died; see 5 Log{rest}"


def test_a_long_name_leaves_room_for_the_screens_and_the_state():
    state = make_state()
    state.name = f"sweep-{70 * 'x'}-seed-42"
    shown = text(Tabs(state, "samples", tuple(MODES)), 80, 1)
    assert shown.startswith(" 1  2  3 Samples  4  5 ")
    assert "sweep-x" in shown and "x-seed-42  ● running" in shown
    narrow = text(Tabs(state, "samples", tuple(MODES)), 40, 1)
    assert "3 Samples" in narrow and "sweep…  ● running" in narrow


def test_time_left_is_reckoned_from_the_last_steps():
    assert "8m20s left" in text(StatusLine(make_state()))


def test_the_status_line_says_by_when_the_run_saves():
    deadline = time.mktime(time.strptime("2031-02-03 14:05", "%Y-%m-%d %H:%M"))
    assert "saves before Feb 03 14:05" in text(StatusLine(make_state(deadline=deadline)), width=140)


def test_a_problem_takes_the_line():
    state = make_state()
    state.take(SessionUpdate(problem="the journal is gone"))
    assert "the journal is gone" in text(StatusLine(state))


@pytest.mark.parametrize(("problem", "shown"), [("", "reading …"), ("no", "cannot be read")])
def test_a_session_of_which_nothing_was_read_is_not_said_to_start(problem, shown):
    state = SessionState("run")
    state.take(SessionUpdate(problem=problem))
    tabs = text(Tabs(state, "dashboard", tuple(MODES)))
    assert "starting" not in tabs
    assert ("✗ unreadable" in tabs) == bool(problem)
    for panel in (PhaseStrip(state), SteeringPanel(state), TimelinePanel(state, Viewport())):
        assert shown in text(panel)


def test_a_panel_does_not_say_that_a_run_has_nothing_before_its_steps_were_read():
    state = SessionState("run")
    state.take(SessionUpdate(head=head(state="crashed")))
    for panel in (PhaseStrip(state), SteeringPanel(state), TimelinePanel(state, Viewport())):
        assert "reading …" in text(panel)
    assert "first step" not in text(LatestSamplesPanel(state))


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120])
def test_where_one_is_and_the_state_are_always_there(width):
    shown = text(Tabs(make_state(), "samples", tuple(MODES)), width, 1)
    assert "running" in shown
    assert "Samples" in shown or width < 60


# -- what happened ---------------------------------------------------------------------------------


def test_an_intervention_s_effect_is_the_means_before_and_after():
    state = make_state()
    change = [SettingChange(key="beta", old=0.04, new=0.05)]
    done = command("applied", applied_step=21, changes=change, ended=2.0)
    state.take(SessionUpdate(commands=[done]))
    shown = text(CursorPanel(state, Viewport()), 120, 2)
    assert "beta 0.04 → 0.05" in shown
    # Scores are step/50: the mean of steps 11-20 is 0.31, of 21-30 it is 0.51.
    assert "0.310→0.510" in shown


def test_before_the_first_step_an_event_only_has_the_means_after_it():
    state, view = make_state(), Viewport()
    note = EventRow(
        event=9, time=900.0, attempt=1, step=0, kind="note",
        payload=decode_payload("note", '{"text": "begun", "who": "ana"}'),
    )  # fmt: skip
    state.take(SessionUpdate(events=[note]))
    view.select(state, next(m for m in state.timeline.entries() if m.step == 0))
    # Scores are step/50: the mean of steps 1-9 is 0.1.
    assert "10 steps after:   score 0.100  KL" in text(CursorPanel(state, view), 120, 2)
    assert "+10 steps  score 0.100  KL" in text(CursorPanel(state, view), 80, 2)


def test_the_crosshair_reads_the_values_of_its_step():
    assert "score 0.500" in text(CursorPanel(make_state(), Viewport(cursor=25)), 120, 2)


@pytest.mark.parametrize("width", [50, 60, 70, 80])
def test_no_value_at_the_crosshair_is_cut_off(width):
    rows = text(CursorPanel(make_state(), Viewport(cursor=25)), width, 2).splitlines()
    assert all(len(row) <= width for row in rows)
    shown = " ".join(rows).split()
    assert [w for w in shown if w.isalpha()] == ["step", "score", "KL", "clip", "length", "beta"]


def test_the_keys_of_a_new_run_fit_beside_the_panels_in_110_columns():
    (row,) = text(CursorPanel(make_state(), Viewport()), 63, 2).splitlines()
    assert row.endswith("enlarge")
    assert len(row) <= 63


def test_an_update_of_the_reference_is_marked_on_the_charts():
    state = make_state()
    payload = decode_payload("reference", '{"mix": 0.6}')
    update = EventRow(event=9, time=900.0, attempt=1, step=40, kind="reference", payload=payload)
    state.take(SessionUpdate(events=[update]))
    (marker,) = [m for m in state.timeline.markers() if m.step == 40]
    assert marker.text == "reference: 60% policy"


def test_a_sparkline_rises_with_its_values():
    assert spark([float(i) for i in range(100)], 8) == "▁▂▃▄▅▆▇█"
    assert spark([]) == ""
    assert len(set(spark([1.0, 1.0, 1.0]))) == 1
    assert spark([-1.7e308, math.inf, 0.0]) == "▁█▅"
