"""The replay of a session: its clock, what it reveals when, and its keys."""

import pytest
from click.testing import CliRunner
from msgspec import structs

from engine.errors import UserInputError
from engine.session.folder import SessionFolder
from rlhf_tui.app.app import RlhfApp
from rlhf_tui.commands import view
from rlhf_tui.screens import log as log_screen
from rlhf_tui.screens.log import read_part, written_until
from rlhf_tui.state.feeds.feed import Feed
from rlhf_tui.state.replay.feed import FRAME_INTERVAL, ReplayFeed
from rlhf_tui.state.replay.player import Player, ReplayOptions
from rlhf_tui.state.session_state import SessionState
from rlhf_tui.widgets.charts.grid import ChartGrid
from rlhf_tui.widgets.replay_line import ReplayLine
from rlhf_tui.widgets.table import Table
from tests.tui.panels import text
from tests.tui.screen import notices

NAMES = ("objective/scores", "objective/kl")


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def replay(root, clock):
    """A replay of the frozen session at a speed: its player, feed and state."""

    def make(speed=60.0, from_step=0):
        session, player = SessionFolder(root / "frozen"), Player(speed, clock)
        state = SessionState("frozen")
        feed = ReplayFeed(session, player, NAMES, state.take, from_step)
        feed.read_all()
        return player, feed, state

    return make


def markers_of(state):
    return [(m.step, m.kind, m.text, m.who, m.abandoned) for m in state.timeline.markers()]


def as_it_is(root):
    state = SessionState("frozen")
    Feed(SessionFolder(root / "frozen"), "tester", NAMES, state.take).read_all()
    return state


def test_at_60_times_no_marker_is_dropped_and_none_comes_before_its_time(replay, root, clock):
    player, feed, state = replay(speed=60.0)
    assert state.head.step == 0
    frames = 0
    while player.read()[2]:
        clock.now += FRAME_INTERVAL
        feed.read_all()
        frames += 1
        reached = state.replay.position
        # What was left behind by a start from an earlier step lies ahead of it.
        left = [m.step for m in state.timeline.markers() if not (m.abandoned or m.kind == "crash")]
        assert max(left, default=0) <= reached.step + 1
        assert all(e.event <= reached.event for e in state.timeline.events)
    assert frames > 10
    now = as_it_is(root)
    assert markers_of(state) == markers_of(now)
    assert state.curves.series(NAMES[0]).values == now.curves.series(NAMES[0]).values
    assert state.samples == now.samples
    assert state.checkpoints == now.checkpoints
    assert state.head.settings == now.head.settings


def test_a_replay_shows_the_abandoned_branch_while_it_was_the_run(replay, clock):
    player, feed, state = replay()
    while state.head.step < 110:
        clock.now += FRAME_INTERVAL / 4
        feed.read_all()
    assert len(state.head.attempts) == 1
    assert not state.curves.past
    assert state.curves.series(NAMES[0]).steps[-1] == state.head.step
    assert {s.attempt for s in state.samples} == {1}
    while player.read()[2]:
        clock.now += FRAME_INTERVAL
        feed.read_all()
    assert state.curves.past[NAMES[0]][0].steps[-1] == 117


def test_jumps_lead_from_marker_to_marker_and_back(replay):
    player, feed, state = replay()
    player.toggle()
    ahead = []
    while (marker := feed.jump(1)) is not None:
        feed.read_all()
        ahead.append(state.replay.share)
        assert marker.key in [m.key for m in state.timeline.entries()]
    assert {m.marker.key for m in feed.markers} <= {m.key for m in state.timeline.entries()}
    assert ahead == sorted(set(ahead))
    back = []
    while feed.jump(-1) is not None:
        feed.read_all()
        back.append(state.replay.share)
    assert back == [*reversed(ahead[:-1]), 0.0]
    assert state.head.step == 0
    assert not state.curves.series(NAMES[0])


def test_a_jump_back_while_it_plays_skips_the_marker_that_it_has_just_passed(replay, clock):
    _, feed, _ = replay()
    first, second = feed.jump(1), feed.jump(1)
    clock.now += 0.01
    assert feed.jump(-1) == first
    assert feed.jump(1) == second


def test_it_begins_after_the_step_that_was_asked_for(replay):
    _, _, state = replay(from_step=150)
    assert state.head.step == 150
    assert state.head.state == "running"
    assert state.live


def test_phases_follow_the_seconds_that_each_took(replay, clock):
    _, feed, state = replay(speed=1.0, from_step=40)
    seen = []
    for _ in range(16):
        clock.now += 0.25
        feed.read_all()
        seen += [(p.step, p.name) for p in state.progress.phases]
    assert list(dict.fromkeys(seen))[:4] == [
        (41, name) for name in ("generate", "score", "reference", "optimise")
    ]


def test_the_clock_of_a_replay_pauses_changes_speed_and_ends(clock):
    player = Player(20.0, clock)
    player.load(100.0, 10.0)
    clock.now += 2
    assert player.read() == (50.0, 20.0, True)
    player.toggle()
    clock.now += 2
    assert player.read() == (50.0, 20.0, False)
    player.toggle()
    player.change_speed(-1)
    clock.now += 1
    assert player.read() == (60.0, 10.0, True)
    player.change_speed(1)
    clock.now += 10
    assert player.read() == (100.0, 20.0, False)
    player.toggle()  # at the end it plays again from the beginning
    assert player.read() == (0.0, 20.0, True)


@pytest.mark.parametrize("width", [80, 120])
def test_the_line_of_a_replay_says_where_it_is(replay, width):
    _, _, state = replay(speed=20.0, from_step=150)
    shown = text(ReplayLine(state), width, 1)
    assert "replay, step 150 of 200, 20×" in shown
    assert len(shown) <= width
    slider = shown[-(width - 60) :]
    assert "●" in slider
    assert "◆" in slider


def test_a_moving_replay_does_not_look_at_all_markers_again(replay):
    looked = []

    class Marks(tuple):
        def __iter__(self):
            looked.append(len(self))
            return super().__iter__()

    _, _, state = replay(speed=20.0, from_step=150)
    marks = Marks(state.replay.marks)
    line = ReplayLine(state)
    for step in (150, 160, 170):
        state.replay = structs.replace(state.replay, share=step / 200, marks=marks)
        shown = text(line, 120, 1)
        assert "◆" in shown
    assert len(looked) == 1


async def test_the_keys_of_a_replay_act_on_every_screen_and_nothing_is_sent(
    root, engine, running, until
):
    app = RlhfApp(root, "frozen", replay=ReplayOptions(speed=0.5, from_step=70))
    async with running(app) as pilot:
        await until(pilot, lambda: app.state.replay is not None)
        line = app.screen.query_one(ReplayLine)
        assert "step 70 of 200, 0.5×" in line.text()
        await pilot.press("space", "right_square_bracket")
        await until(pilot, lambda: "1×" in line.text())
        assert "‖" in line.text()
        await pilot.press("right_curly_bracket")
        await until(pilot, lambda: app.state.replay.position.step > 70)
        step = app.state.head.step
        assert app.screen.query_one(ChartGrid).charts[0].plot().lines[-1].series.steps[-1] == step
        await pilot.press("3")
        table = app.screen.query_one(Table)
        await until(pilot, lambda: table.count() > 0)
        assert max(key[1] for key in table.keys) == step
        await pilot.press("p")
        await until(pilot, lambda: notices(app))
        assert notices(app) == ["read-only: commands are disabled"]
        assert engine == []


def test_an_impossible_beginning_is_an_error_of_one_line(root):
    given = ["frozen", "--sessions", str(root), "--from", "999"]
    result = CliRunner().invoke(view.replay, given, standalone_mode=False)
    assert isinstance(result.exception, UserInputError)
    assert "has 200 steps" in str(result.exception)


def test_of_the_log_only_what_was_written_by_then_is_shown():
    log = (
        b"2026-01-02 10:00:00,123 INFO loading\nprogress 10%\n"
        b"2026-01-02 10:00:05,000 INFO step 1\n  more of it\n2026-01-02 10:00:09,9 INFO step 2\n"
    )
    assert log[: written_until(log, "2026-01-02 10:00:05")].endswith(b"more of it\n")
    assert written_until(log, "2026-01-02 09:00:00") == 0
    assert written_until(log, "2027-01-02 09:00:00") == len(log)


def test_of_a_log_nothing_is_read_again_until_it_grows_or_the_time_goes_on(tmp_path):
    path = tmp_path / "engine.log"
    path.write_text("2026-01-02 10:00:00 one\n2026-01-02 10:00:09 two\nthe begin")
    part = read_part(path, 0, 0, None)
    assert part.lines == ["2026-01-02 10:00:00 one", "2026-01-02 10:00:09 two"]
    assert read_part(path, part.at, part.seen, None) is None
    early = read_part(path, 0, 0, "2026-01-02 10:00:05")
    assert early.lines == ["2026-01-02 10:00:00 one"]
    assert read_part(path, early.at, early.seen, "2026-01-02 10:00:05") is None
    with path.open("a") as file:
        file.write("ning\n")
    assert read_part(path, part.at, part.seen, None).lines == ["the beginning"]
    later = read_part(path, early.at, early.at, "2026-01-02 10:00:10")
    assert later.lines == ["2026-01-02 10:00:09 two", "the beginning"]


def test_of_a_log_a_line_that_is_too_long_to_be_read_at_once_is_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(log_screen, "MAX_BYTES", 20)
    path = tmp_path / "engine.log"
    path.write_text("short\n")
    at = read_part(path, 0, 0, None).at
    with path.open("a") as file:
        file.write(30 * "x" + "\nend\n")
    lines, part = [], read_part(path, at, at, None)
    while part is not None:
        lines += part.lines
        part = read_part(path, part.at, part.seen, None)
    assert lines == [20 * "x", 10 * "x", "end"]


def test_of_a_log_only_whole_lines_of_the_end_are_shown_and_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(log_screen, "MAX_BYTES", 20)
    path = tmp_path / "engine.log"
    path.write_text("the first line\nthe second\nthird\n")
    part = read_part(path, 0, 0, None)
    assert (part.lines, part.cut) == (["the second", "third"], True)
    path.write_text("whole\n")
    part = read_part(path, 0, 0, None)
    assert (part.lines, part.cut) == (["whole"], False)
