"""What happened to a run, by time: crashes, abandoned branches, and why it is paused."""

import msgspec
import pytest

from engine.config.settings import SettingChange
from engine.journal.rows import (
    AlertEvent,
    AttemptEvent,
    AttemptRow,
    CheckpointEvent,
    CommandEvent,
    ErrorEvent,
    EventRow,
    ForkedFrom,
    NoteEvent,
    ReadyEvent,
    StateEvent,
)
from rlhf_tui.state.feeds.updates import SessionUpdate
from rlhf_tui.state.timeline import DIED, effect_text, short_condition
from rlhf_tui.state.viewport import Viewport
from rlhf_tui.widgets.panels.timeline import TimelinePanel
from rlhf_tui.widgets.status_lines import StatusLine
from tests.tui.panels import SETTINGS, command, make_state, text


def attempts(*from_steps, each_killed=False):
    """Attempts of one engine, or of an engine each that was killed."""
    return [
        AttemptRow(
            attempt=number, from_step=step, fresh=False, started=1.0, ended=None,
            pid=number if each_killed else 7, host="box", version="1",
        )
        for number, step in enumerate(from_steps, start=1)
    ]  # fmt: skip


def events(*given):
    """Events of (attempt, step, payload), numbered in order; the clock runs backwards."""
    kinds = {"StateEvent": "state", "ErrorEvent": "error"}
    return [
        EventRow(
            event=number, time=900.0 - number, attempt=attempt, step=step, payload=payload,
            kind=kinds.get(type(payload).__name__, type(payload).__name__.lower()[:-5]),
        )
        for number, (attempt, step, payload) in enumerate(given, start=1)
    ]  # fmt: skip


def beta(step, *, live=True, command_id="beta", **given):
    return command(
        "applied", id=command_id, applied_step=step, ended=2.0, live=live,
        changes=[SettingChange(key="beta", old=0.1, new=0.2)], **given,
    )  # fmt: skip


def rolled_back():
    """A run that was changed, alerted and saved up to step 60, and then rolled back to step 25."""
    back = command(
        "applied", id="back", command="rollback", args={"step": 25}, applied_step=26, ended=3.0,
        live=False,
    )  # fmt: skip
    state = make_state(attempts=attempts(0, 25), step=30)
    found = events(
        (1, 0, AttemptEvent(attempt=1)),
        (1, 20, CommandEvent(id="early")),
        (1, 25, CheckpointEvent(score=1.0, kl=2.0)),
        (1, 40, CommandEvent(id="beta")),
        (1, 50, AlertEvent(rule="kl_high", text="objective/kl is 9, above 6")),
        (1, 60, NoteEvent(text="odd", who="ana")),
        (1, 60, CommandEvent(id="back")),
        (2, 25, AttemptEvent(attempt=2, from_step=25)),
        (2, 28, AlertEvent(rule="kl_high", text="objective/kl is 8, above 6")),
    )
    commands = [beta(21, command_id="early"), beta(41, live=False), back]
    state.take(SessionUpdate(events=found, commands=commands))
    return state


def test_a_roll_back_keeps_what_happened_on_the_abandoned_branch_and_marks_it():
    abandoned = [(m.kind, m.step) for m in rolled_back().timeline.entries() if m.abandoned]
    assert abandoned == [("command", 41), ("alert", 50), ("note", 60)]


def test_the_timeline_is_in_the_journal_s_order_whatever_step_and_clock_say():
    assert [m.step for m in rolled_back().timeline.entries()] == [0, 21, 25, 41, 50, 60, 25, 25, 28]


def test_the_effect_of_the_newest_change_is_not_that_of_an_abandoned_one():
    assert "step 21" in rolled_back().timeline.beta_source()


def saved(*steps):
    return [(1, step, CheckpointEvent(score=1.25, kl=2.5)) for step in steps]


def timeline_of(*given):
    state = make_state()
    state.take(SessionUpdate(events=events(*given)))
    return TimelinePanel(state, Viewport())


def test_what_is_noted_at_the_start_is_an_entry_that_is_no_alert():
    plain, noted = (1, 0, ReadyEvent()), (1, 0, ReadyEvent(notes=["a slow controller"]))
    assert timeline_of(plain).count() == 0
    (entry,) = timeline_of(noted).state.timeline.entries()
    assert (entry.kind, entry.text) == ("attempt", "a slow controller")


def test_checkpoints_with_nothing_between_them_are_one_entry():
    note = (1, 30, NoteEvent(text="odd", who="ana"))
    panel = timeline_of(*saved(10, 20, 30), note, *saved(40))
    assert panel.count() == 3
    shown = text(panel, 39)
    assert "  30 ▲ checkpoints at 10, 20, 30" in shown
    assert "  40 ▲ checkpoint, score 1.250, KL 2.50" in shown


def test_of_many_checkpoints_the_first_and_the_newest_are_named():
    panel = timeline_of(*saved(*range(10, 1000, 10)))
    assert text(panel, 39, 2).endswith("990 ▲ checkpoints at 10, … 980, 990")
    assert text(panel, 20, 2).endswith("990 ▲ checkpoints at 10, … 990")
    assert text(timeline_of(*saved(10, 20)), 20, 2).endswith("checkpoints at 10, 20")


def test_where_the_numbers_of_a_checkpoint_do_not_fit_none_is_cut():
    assert text(timeline_of(*saved(10)), 38, 2).endswith("checkpoint, score 1.250")


def test_checkpoints_of_an_abandoned_branch_are_an_entry_of_their_own():
    state = make_state(attempts=attempts(0, 20))
    state.take(SessionUpdate(events=events(*saved(10, 20, 30, 40))))
    assert [[m.step for m in e] for e in TimelinePanel(state, Viewport()).entries()] == [
        [30, 40],
        [10, 20],
    ]


def test_entries_are_put_together_once_until_something_happens():
    """Panels ask for them whenever they are drawn, and there may be thousands."""
    state = timeline_of(*saved(10, 20)).state
    before = state.timeline.folded()
    state.take(SessionUpdate(curves={"objective/kl": [(51, 1.0)]}))
    assert state.timeline.folded() is before
    state.take(SessionUpdate(events=events(*saved(10, 20, 30))[2:]))
    assert [[m.step for m in e] for e in state.timeline.folded()] == [[10, 20, 30]]


def test_an_engine_that_died_is_in_the_timeline_where_its_attempt_ended():
    state = make_state(attempts=attempts(0, 20, each_killed=True))
    state.take(
        SessionUpdate(
            events=events(
                (1, 0, AttemptEvent(attempt=1)),
                (1, 20, CheckpointEvent()),
                (2, 20, AttemptEvent(attempt=2, from_step=20)),
            ),
            past={"objective/kl": [(1, 21, 1.0), (1, 22, 1.0)]},
        )
    )
    told = [(m.step, m.kind, m.text) for m in state.timeline.entries()[2:]]
    assert told == [
        (22, "crash", "engine died (no exit message)"),
        (20, "attempt", "resumed from step 20"),
    ]


def restarted(rows, event):
    """The timeline of a run with an event at step 20, from which a second attempt starts."""
    state = make_state(attempts=rows)
    found = events(
        (1, 0, AttemptEvent(attempt=1)),
        (1, 20, event),
        (2, 20, AttemptEvent(attempt=2, from_step=20)),
    )
    state.take(SessionUpdate(events=found))
    return state.timeline.entries()


def test_an_engine_that_starts_its_ranks_again_without_an_error_has_not_died():
    timeline = restarted(
        attempts(0, 20), AlertEvent(rule="machines", text="starts again with another machine")
    )
    assert [m.kind for m in timeline] == ["attempt", "alert", "attempt"]


def test_an_engine_that_was_killed_between_an_error_and_its_restart_has_died():
    timeline = restarted(
        attempts(0, 20, each_killed=True), ErrorEvent(text="rank 0 was ended by SIGKILL")
    )
    assert [m.text for m in timeline[2:]] == [DIED, "resumed from step 20"]


def test_an_engine_that_is_dead_now_is_the_newest_entry():
    state = make_state(state="crashed", pid=None)
    state.take(SessionUpdate(events=events((1, 0, AttemptEvent(attempt=1)))))
    assert (state.timeline.entries()[-1].kind, state.timeline.entries()[-1].step) == ("crash", 50)


def test_a_restart_is_one_entry_with_its_error():
    state = make_state(attempts=attempts(0, 20))
    error = "rank 0 was ended by SIGKILL"
    state.take(
        SessionUpdate(
            events=events(
                (1, 0, AttemptEvent(attempt=1)),
                (1, 30, ErrorEvent(text=error)),
                (1, 30, AlertEvent(rule="restart", text=f"{error}: restart 1 of 3 from step 20")),
                (2, 20, AttemptEvent(attempt=2, from_step=20)),
            )
        )
    )
    told = [m.text for m in state.timeline.entries()[1:]]
    assert told == [error, "restarted from step 20"]


def test_the_rule_of_an_alert_is_not_named_twice():
    state, text = make_state(), "reward 'score' at step 6: RuntimeError: no"
    rows = (AlertEvent(rule="reward", text=text), AlertEvent(rule="kl_high", text="KL is 7"))
    state.take(SessionUpdate(events=events(*((1, 6, row) for row in rows))))
    assert [m.text for m in state.timeline.entries()] == [text, "kl_high: KL is 7"]


def test_an_engine_that_stopped_did_not_die():
    state = make_state(attempts=attempts(0, 30))
    state.take(
        SessionUpdate(
            events=events(
                (1, 0, AttemptEvent(attempt=1)),
                (1, 30, StateEvent(state="stopped")),
                (2, 30, AttemptEvent(attempt=2, from_step=30)),
            )
        )
    )
    told = [m.text for m in state.timeline.entries()]
    assert told == ["started", "stopped", "resumed from step 30"]


def test_the_reason_of_an_end_that_names_the_state_stands_alone():
    state = make_state()
    ends = [(1, 30, StateEvent(state="stopped", text="stopped at once, nothing was saved")),
            (1, 30, StateEvent(state="failed", text="out of memory"))]  # fmt: skip
    state.take(SessionUpdate(events=events(*ends)))
    told = [m.text for m in state.timeline.entries()]
    assert told == ["stopped at once, nothing was saved", "failed: out of memory"]


def test_an_engine_died_after_the_last_step_of_its_branch_once_that_is_read():
    state = make_state(attempts=attempts(0, 20, each_killed=True))
    begun = (1, 0, AttemptEvent()), (2, 20, AttemptEvent(attempt=2, from_step=20))
    state.take(SessionUpdate(events=events(*begun)))
    assert [m.step for m in state.timeline.entries() if m.text == DIED] == [20]
    state.take(SessionUpdate(past={"objective/kl": [(1, 21, 0.5), (1, 31, 0.5)]}))
    assert [m.step for m in state.timeline.entries() if m.text == DIED] == [31]


def test_a_fork_does_not_show_its_parent_s_end_as_a_crash():
    state = make_state(attempts=attempts(0, 20, each_killed=True))
    first, second = events((1, 0, AttemptEvent()), (2, 20, AttemptEvent(attempt=2, from_step=20)))
    origin = ForkedFrom(source="run-1", step=20)
    forked = msgspec.structs.replace(second.payload, fork=origin)
    second = msgspec.structs.replace(second, payload=forked)
    state.take(SessionUpdate(events=[first, second]))
    assert [m.text for m in state.timeline.entries()] == ["started", "forked from run-1 at step 20"]


def test_a_change_that_a_resume_repeats_later_is_not_beta_s_source_yet():
    state = make_state(attempts=attempts(0, 20), step=22)
    state.take(SessionUpdate(commands=[beta(41)]))
    assert state.timeline.beta_source() == "controller"


def test_who_fixes_a_beta_that_the_controller_moved_is_its_source():
    state = make_state(step=50, settings=SETTINGS | {"controller": "fixed"})
    fixed = [SettingChange(key="controller", old="adaptive", new="fixed")]
    later = command("applied", id="later", applied_step=41, ended=3.0, live=True, changes=fixed)
    state.take(SessionUpdate(commands=[beta(21), later]))
    assert state.timeline.beta_source().endswith("at step 41")


@pytest.mark.parametrize(
    ("who", "words"),
    [
        ("guard rail kl_high", "paused by kl_high at step 50: KL 9 > 6"),
        ("ana on pts/1", "paused after step 50"),
    ],
)
def test_the_top_line_says_what_paused_the_run(who, words):
    state = make_state(state="paused")
    alert = AlertEvent(rule="kl_high", text="objective/kl is 9, above 6", action="pause")
    pause = command("applied", command="pause", args={}, who=who, applied_step=51, ended=2.0)
    state.take(SessionUpdate(events=events((1, 50, alert)), commands=[pause]))
    assert words in text(StatusLine(state))


def test_a_reason_that_the_engine_recorded_is_taken_as_it_is():
    assert "paused by disk full" in text(
        StatusLine(make_state(state="paused", pause_reason="disk full"))
    )


def test_an_alert_is_shown_by_the_brief_text_of_its_rule():
    state = make_state()
    long = "tokens/response_len_mean drifted by +60% to 64 since step 20: it stays above …"
    first = AlertEvent(
        rule="length_drifts", text=long, brief="length drifted by +60% to 64", count=1
    )
    again = AlertEvent(
        rule="length_drifts", text=long, brief="length drifted by +90% to 76", count=2
    )
    state.take(SessionUpdate(events=events((1, 40, first), (1, 50, again))))
    assert [marker.text for marker in state.timeline.entries()] == [
        "length_drifts: length drifted by +60% to 64",
        "length_drifts: length drifted by +90% to 76 (alert 2)",
    ]


def test_conditions_that_are_no_bounds_are_not_shortened():
    assert short_condition("a fell by 50% to 1") == "a fell by 50% to 1"
    assert short_condition("objective/kl is 7, above 2 × target (3)") == "KL 7 > 2 × target (3)"


def test_what_is_predicted_is_shortened():
    text = "objective/kl is 6.175 and rises: 8.994 in 10 steps is above 2.2 × target (3)"
    short = "KL 6.175, in 10 steps 8.994 > 2.2 × target (3)"
    assert short_condition(text) == short
    assert short_condition(f"{text}; alert 2, the last one was at step 9") == f"{short} (alert 2)"


def test_a_later_alert_says_in_brief_which_one_it_is():
    text = "objective/kl is 7, above 6; alert 3, the last one was at step 2"
    assert short_condition(text) == "KL 7 > 6 (alert 3)"


@pytest.mark.parametrize(
    ("command", "step", "words"),
    [
        ("checkpoint", 76, "step 75 saved"),
        ("pause", 76, "paused after step 75"),
        ("pause", 1, "paused before the first step"),
        ("stop", 76, "stopped after step 75"),
        ("beta", 76, ""),
    ],
)
def test_what_a_command_did_after_a_step_names_that_step(command, step, words):
    assert effect_text(command, step) == words


def test_a_stop_is_an_entry_at_the_step_after_which_the_run_stopped():
    state = make_state(attempts=attempts(0), step=137)
    stop = command("applied", id="stop", command="stop", applied_step=138, ended=3.0)
    state.take(
        SessionUpdate(
            events=events(
                (1, 0, AttemptEvent(attempt=1)),
                (1, 136, CommandEvent(id="stop")),
                (1, 137, StateEvent(state="stopped")),
            ),
            commands=[stop],
        )
    )
    assert [(m.step, m.text) for m in state.timeline.entries()][1:] == [
        (137, "stop"),
        (137, "stopped"),
    ]
