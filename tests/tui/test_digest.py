"""The digest that an operator gets on return."""

import msgspec
import pytest

from engine.config.settings import SettingChange
from engine.journal.rows import AlertEvent, CheckpointEvent, CommandEvent, EventRow
from engine.journal.writer import JournalWriter
from rlhf_tui.app import digest as digest_module
from rlhf_tui.app.app import RlhfApp
from rlhf_tui.app.digest import digest
from rlhf_tui.dialogs.digest import DigestDialog
from rlhf_tui.state import preferences as prefs
from rlhf_tui.state.feeds.updates import SessionUpdate
from rlhf_tui.state.preferences import Seen
from rlhf_tui.widgets.lines import Lines
from tests.tui.conftest import NOW
from tests.tui.panels import command, lines_of, make_state


def shown(app):
    """The text of the screen or dialog in front."""
    return "\n".join(widget.text() for widget in app.screen.query(Lines))


def lines(state, seen):
    return lines_of(digest(state, seen))


def test_a_digest_lists_what_has_happened_since_the_last_visit():
    state = make_state()
    payload = AlertEvent(rule="kl", text="KL is high")
    alert = EventRow(event=9, time=900.0, attempt=1, step=40, kind="alert", payload=payload)
    state.take(SessionUpdate(events=[alert]))
    shown = "\n".join(lines(state, Seen(time=500.0, step=20, event=3)))
    assert "steps 20 → 50" in shown
    assert "KL is high" in shown
    assert "8m20s" in shown


def test_a_digest_has_what_is_new_although_the_clock_was_set_back():
    state = make_state()  # its clock shows 1,000

    def alert(event, time, text):
        payload = AlertEvent(rule="kl", text=text)
        return EventRow(event=event, time=time, attempt=1, step=40, kind="alert", payload=payload)

    state.take(
        SessionUpdate(events=[alert(8, 5000.0, "it was seen"), alert(9, 900.0, "it is new")])
    )
    shown = lines(state, Seen(time=4990.0, step=20, event=8))
    assert shown[0] == "the run is running"
    assert [line for line in shown if "it is new" in line or "it was seen" in line] == [
        "    40 ! kl: it is new"
    ]


def test_an_alert_is_in_the_digest_however_many_checkpoints_followed():
    state = make_state()
    alert = AlertEvent(rule="kl", text="KL is high")
    rows = [EventRow(event=9, time=600.0, attempt=1, step=21, kind="alert", payload=alert)]
    for step in range(22, 40):
        saved = CheckpointEvent(score=1.0, kl=2.0)
        event = EventRow(
            event=step, time=600.0 + step, attempt=1, step=step, kind="checkpoint", payload=saved
        )
        rows.append(event)
    state.take(SessionUpdate(events=rows))
    shown = lines(state, Seen(time=500.0, step=20, event=3))
    assert any("KL is high" in line for line in shown)
    assert sum("▲ checkpoint" in line for line in shown) == 1
    assert "       and 17 earlier checkpoints" in shown


def test_a_digest_has_the_values_of_beta_and_the_means_of_what_is_measured():
    state = make_state()
    curves = {"objective/scores": [(s, float(s)) for s in range(1, 51)]}
    curves["objective/kl_coef"] = [(s, 0.1 if s < 45 else 0.3) for s in range(1, 51)]
    state.take(SessionUpdate(curves=curves))
    shown = lines(state, Seen(time=500.0, step=40, event=3))
    assert "  score 35.500 → 45.500" in shown
    assert "  beta  0.100 → 0.300" in shown


def test_a_run_that_goes_on_from_an_earlier_step_need_not_have_been_rolled_back():
    shown = lines(make_state(), Seen(time=500.0, step=60, event=3))  # as after a crash
    assert "back to step 50, from step 60" in shown


def test_there_is_no_digest_of_a_session_that_had_the_folder_before():
    state = make_state()
    started = EventRow(event=1, time=600.0, attempt=1, step=0, kind="started", payload=None)
    state.take(SessionUpdate(events=[started]))
    assert digest(state, Seen(time=500.0, step=90, event=3, began=400.0)) == []
    assert digest(state, Seen(time=500.0, step=20, event=1, began=600.0))
    assert digest(state, Seen(time=500.0, step=20, event=1))  # as earlier versions saved it


def test_there_is_no_digest_for_who_was_not_away():
    state = make_state()
    assert digest(state, Seen(time=990.0, step=20, event=3)) == []
    assert digest(state, Seen(time=100.0, step=50, event=3)) == []


LEFT = Seen(time=500.0, step=50, event=3, pending=["1"])
"""What an operator has seen who left when a command was pending."""
BETA = [SettingChange(key="beta", old=0.05, new=0.1)]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (
            {"status": "applied", "applied_step": 51, "changes": BETA},
            "    51 ◆ beta 0.05 → 0.1  applied  by ana on pts/1",
        ),
        (
            {"status": "applied", "applied_step": 51, "command": "checkpoint", "args": {}},
            "    51 ◆ checkpoint  step 50 saved  by ana on pts/1",
        ),
        (
            {"status": "rejected", "reason": "beta is too high"},
            "       ✗ beta 0.1  rejected: beta is too high  by ana on pts/1",
        ),
        ({"status": "accepted"}, "       ⧗ beta 0.1  still pending  by ana on pts/1"),
    ],
)
def test_a_digest_says_what_became_of_a_command_that_was_pending(given, line):
    state = make_state()
    event = EventRow(
        event=2, time=400.0, attempt=1, step=50, kind="command", payload=CommandEvent(id="1")
    )
    state.take(SessionUpdate(events=[event], commands=[command(**given)]))
    assert [shown for shown in lines(state, LEFT) if " by ana" in shown] == [line]


def test_a_command_that_is_pending_is_not_carried_out_by_an_engine_that_has_ended():
    state = make_state(state="crashed", pid=None)
    state.take(SessionUpdate(commands=[command("accepted")]))
    (line,) = (shown for shown in lines(state, LEFT) if "beta 0.1" in shown)
    assert "not carried out: the engine has ended" in line


def test_of_the_commands_that_others_sent_the_digest_has_those_without_an_entry():
    state = make_state()
    rows = [
        command("rejected", id="2", accepted=600.0, reason="cannot save"),
        command("rejected", id="3", reason="a mistake that its sender was told of"),
        command("accepted", id="4", accepted=600.0),
        command("applied", id="5", accepted=600.0, applied_step=50, changes=BETA),
    ]
    events = [
        EventRow(
            event=4 + i, time=600.0, attempt=1, step=49, kind="command",
            payload=CommandEvent(id=row.id),
        )
        for i, row in enumerate(rows)
    ]  # fmt: skip
    state.take(SessionUpdate(events=events, commands=rows))
    shown = lines(state, msgspec.structs.replace(LEFT, pending=[]))
    assert [line.partition("  by")[0] for line in shown if " by ana" in line] == [
        "       ✗ beta 0.1  rejected: cannot save",
        "       ⧗ beta 0.1  still pending",
        "    50 ◆ beta 0.05 → 0.1",
    ]


async def test_who_returns_sees_what_became_of_the_command_that_was_pending(
    session_maker, running, tmp_path, until, monkeypatch
):
    monkeypatch.setattr(digest_module, "SAVE_INTERVAL", -1.0)  # at each tick
    session = session_maker(tmp_path, "run", 10)
    journal = JournalWriter(session)
    journal.commands.record("id", "beta", {"value": 0.1}, "ana on pts/1")
    journal.commands.accept("id")

    def saved():
        return prefs.load_seen().get(str(session.folder))

    async with running(RlhfApp(tmp_path, "run", now=lambda: NOW - 3600)) as pilot:
        await until(pilot, lambda: saved() and saved().pending == ["id"])
    journal.commands.apply("id", 11, [SettingChange(key="beta", old=0.05, new=0.1)])
    journal.close()
    async with running(RlhfApp(tmp_path, "run", now=lambda: NOW)) as pilot:
        await until(pilot, lambda: isinstance(pilot.app.screen, DigestDialog))
        await until(pilot, lambda: "11 ◆ beta 0.05 → 0.1  applied" in shown(pilot.app))
