"""How the journal is followed: growing, restarted, replaced, gone."""

import asyncio
import os
import random
import shutil

import pytest

from engine.config.settings import SettingChange
from engine.journal.reader import JournalReader
from engine.journal.writer import JournalWriter
from engine.protocol import sockets
from engine.protocol.client_messages import JournalAdvanced, Status, Telemetry
from engine.protocol.rank_messages import Phase, StepReport
from engine.supervisor import server as server_module
from engine.supervisor.server import Server
from rlhf_tui.app.digest import curves_are_read
from rlhf_tui.state.feeds import feed as feeds
from rlhf_tui.state.feeds import journal_changes
from rlhf_tui.state.feeds.feed import Feed
from rlhf_tui.state.feeds.first_read import FirstRead
from rlhf_tui.state.feeds.journal_changes import JournalChanges
from rlhf_tui.state.feeds.output import UpdateOutput
from rlhf_tui.state.feeds.updates import SessionUpdate
from rlhf_tui.state.session_state import SessionState
from rlhf_tui.widgets.status_lines import StatusLine
from tests.tui.panels import text
from tests.waiting import LONG, until

NAMES = ("objective/scores", "objective/kl")


@pytest.fixture
def following(monkeypatch):
    """A state that a feed keeps up to date, as quick as it can."""
    monkeypatch.setattr(feeds, "MIN_INTERVAL", 0.01)
    monkeypatch.setattr(feeds, "IDLE_INTERVAL", 0.02)
    running = []

    def follow(session):
        state = SessionState(session.name)
        feed = Feed(session, "tester", NAMES, state.take)
        running.append(feed)
        feed.start()
        return state, feed

    yield follow
    for feed in running:
        feed.stop()


@pytest.fixture
def session(session_maker, tmp_path):
    return session_maker(tmp_path / "s", "run", 20)


def report(step, score=1.0):
    return StepReport(
        step=step, metrics={NAMES[0]: score, NAMES[1]: 2.0}, samples=[], settings={"beta": 0.05}
    )


def test_a_finished_session_is_read_whole(following, session):
    state, _ = following(session)
    until(lambda: len(state.curves.series(NAMES[1])) == 20 and state.samples)
    assert state.head.state == "finished"
    assert state.head.step == 20


def test_each_new_step_comes_once(following, session):
    state, _ = following(session)
    until(lambda: len(state.curves.series(NAMES[0])) == 20)
    journal = JournalWriter(session)
    journal.begin_attempt(20, fresh=False)
    for step in range(21, 41):
        journal.record_step(report(step))
    journal.close()
    until(lambda: len(state.curves.series(NAMES[0])) == 40)
    assert list(state.curves.series(NAMES[0]).steps) == list(range(1, 41))


def test_another_timeline_replaces_the_curve_and_leaves_a_ghost(following, session):
    state, _ = following(session)
    until(lambda: len(state.curves.series(NAMES[0])) == 20)
    journal = JournalWriter(session)
    journal.begin_attempt(10, fresh=True)
    journal.record_step(report(11, score=-7.0))
    journal.close()
    until(lambda: state.curves.series(NAMES[0]).last == -7.0 and state.curves.past.get(NAMES[0]))
    assert state.head.step == 11
    assert list(state.curves.past[NAMES[0]][0].steps) == list(range(11, 21))


def test_a_replaced_journal_is_read_anew(following, session, session_maker, tmp_path):
    other = session_maker(tmp_path / "t", "run", 7)
    state, _ = following(session)
    until(lambda: len(state.curves.series(NAMES[0])) == 20)
    for name in ("journal.db", "samples.db"):
        (other.folder / name).replace(session.folder / name)
    until(lambda: len(state.curves.series(NAMES[0])) == 7)
    assert state.head.step == 7


def test_a_folder_that_is_gone_is_reported_and_its_return_is_noticed(following, session, tmp_path):
    state, _ = following(session)
    until(lambda: state.known and state.head.step == 20)
    shutil.move(session.folder, tmp_path / "away")
    until(lambda: "1 Sessions lists what is left" in text(StatusLine(state), 80))
    shutil.move(tmp_path / "away", session.folder)
    until(lambda: state.problem == "" and state.head.step == 20)


def test_a_damaged_journal_is_reported(following, session):
    session.journal_file.write_bytes(random.Random(1).randbytes(8192))  # noqa: S311 - no secret
    state, _ = following(session)
    until(lambda: "journal" in state.problem)


def test_further_metrics_are_read_when_wanted(following, session):
    state, feed = following(session)
    until(lambda: state.known)
    feed.want(["grad_norm"])
    until(lambda: len(state.curves.series("grad_norm")) == 20)


@pytest.mark.parametrize("written", [0, 2**33])  # long ago; before the clock was set back
def test_a_session_without_a_journal_is_starting_at_first_and_then_has_crashed(
    following, session, written
):
    session.journal_file.unlink()
    state, _ = following(session)
    until(lambda: state.known)
    assert state.head.state == "starting"
    os.utime(session.config_file, (written, written))
    until(lambda: state.head.state == "crashed")


def test_files_that_have_no_tables_yet_are_read_once_they_have(session):
    files = (session.journal_file, session.samples_file)
    written = [file.read_bytes() for file in files]
    for file in files:
        file.write_bytes(b"")  # as their writer has them at first
    state = SessionState(session.name)
    feed = Feed(session, "tester", NAMES, state.take)
    feed.read_all()
    assert state.head.step == 0
    for file, content in zip(files, written, strict=True):
        file.write_bytes(content)
    feed.read_all()
    assert (state.head.state, state.head.step) == ("finished", 20)
    assert state.samples


def test_a_long_curve_is_shown_in_outline_until_it_is_read(following, session, monkeypatch):
    monkeypatch.setattr(journal_changes, "LONG_RUN_STEPS", 10)
    seen = []
    feed = Feed(session, "tester", NAMES, seen.append)
    feed.read_all()
    state = SessionState(session.name)
    places = [i for i, update in enumerate(seen) if update.downsampled]
    for update in seen[: places[0] + 1]:
        state.take(update)
    assert len(state.curves.downsampled(NAMES[0])) == 20
    for update in seen[places[0] + 1 :]:
        state.take(update)
    assert state.curves.downsampled(NAMES[0]) is None
    assert len(state.curves.series(NAMES[0])) == 20


def test_a_first_read_has_the_head_and_the_outlines(session):
    update = FirstRead(session, NAMES).update()
    assert update.head.state == "finished"
    assert update.downsampled.keys() == set(NAMES)


def test_a_first_read_of_what_cannot_be_read_is_empty(session):
    session.journal_file.write_bytes(b"no database at all" * 100)
    assert not FirstRead(session, NAMES).update()


def test_many_checkpoints_do_not_push_out_notes_and_alerts(following, session):
    journal = JournalWriter(session)
    journal.record_event("note", {"text": "odd", "who": "ana"}, 1)
    journal.record_event("alert", {"rule": "kl", "text": "high"}, 1)
    for step in range(2, 700):
        journal.record_event("checkpoint", {"size": 1, "score": 1.0, "kl": 1.0}, step)
    state, _ = following(session)
    until(lambda: any(e.step == 699 for e in state.timeline.events))
    for step in range(700, 2700):
        journal.record_event("checkpoint", {"size": 1, "score": 1.0, "kl": 1.0}, step)
    journal.close()
    until(lambda: any(e.step == 2699 for e in state.timeline.events))
    assert {"note", "alert"} <= {m.kind for m in state.timeline.markers()}


@pytest.fixture
def reading(session):
    """A state, a writer of its journal, and a function that reads what is new in it."""
    state, journal = SessionState(session.name), JournalWriter(session)
    changes = JournalChanges(NAMES, UpdateOutput(state.take))
    with JournalReader(session) as reader:
        yield state, journal, lambda: changes.read(session, reader, (), SessionUpdate())
    journal.close()


def statuses(state):
    return {c.id: (c.status, c.live) for c in state.timeline.commands}


def test_commands_that_have_ended_are_not_read_again(reading, monkeypatch):
    state, journal, read = reading
    for number in range(9):
        journal.commands.record(f"a{number}", "pause", {}, "ana")
        journal.commands.reject(f"a{number}", "no")
    journal.commands.record("late", "checkpoint", {}, "ana")
    read()
    known, found, numbered = len(state.timeline.commands), [], JournalReader.numbered_commands

    def remembered(*arguments):
        found.append(numbered(*arguments))
        return found[-1]

    monkeypatch.setattr(JournalReader, "numbered_commands", remembered)
    journal.commands.record("next", "note", {"text": "odd"}, "ben")
    journal.commands.apply("next", 21, [])
    read()
    assert [[c.id for c in commands.values()] for commands in found] == [["late", "next"]]
    journal.commands.apply("late", 21, [])
    read()
    assert len(state.timeline.commands) == known + 1
    assert [c.id for c in state.timeline.commands[-2:]] == ["late", "next"]
    assert statuses(state)["late"] == statuses(state)["next"] == ("applied", True)


def test_a_command_that_a_later_attempt_overrides_is_read_again(reading):
    state, journal, read = reading
    journal.commands.record("early", "set", {}, "ana")
    journal.commands.apply("early", 18, [SettingChange(key="epochs", old=4, new=2)])
    journal.begin_attempt(10, fresh=False)
    read()
    assert statuses(state)["early"] == ("applied", True)
    journal.commands.record("other", "set", {}, "ben")
    journal.commands.apply("other", 12, [SettingChange(key="epochs", old=4, new=3)])
    read()
    assert statuses(state)["early"] == ("applied", False)


def test_the_machine_of_an_engine_that_has_ended_is_not_shown():
    state = SessionState("run")
    machine = Telemetry(time=1.0, cpu=5.0, memory_used=1, memory_total=2, disk_free=3)
    state.take(SessionUpdate(telemetry=machine, connected=True))
    assert state.telemetry == machine
    state.take(SessionUpdate(connected=False))
    assert state.telemetry is None


def test_a_digest_waits_for_all_its_curves():
    state = SessionState("run")
    names = ("objective/scores", "objective/kl", "objective/kl_coef")
    state.take(SessionUpdate(names=[*names, "lr"]))
    for name in names:
        assert not curves_are_read(state)
        state.take(SessionUpdate(curves={name: [(1, 1.0)]}))
    assert curves_are_read(state)


class Engine:
    """What a server asks of a supervisor, for one session."""

    def __init__(self, step):
        self.step = step

    def journal_position(self):
        return JournalAdvanced(step=self.step, event=0, state="running")

    def status(self):
        return Status(
            state="running", step=self.step, total_steps=40, attempt=1, settings={}, phases=[],
            boundary_in=None, telemetry=None, watchers=1, pid=os.getpid(),
        )  # fmt: skip


@pytest.fixture
def serving(session):
    """Runs a test with the server of an engine in step 21, and its journal."""
    lock, journal = session.acquire(), JournalWriter(session)
    journal.begin_attempt(20, fresh=False)

    def run(test):
        async def serve():
            listener, path = sockets.listen(session.folder)
            session.write_engine(str(path), "1")
            server = Server()
            await server.start(listener, None, Engine(20), None)
            await test(server, journal)
            server.close()

        asyncio.run(serve())

    yield run
    journal.close()
    lock.release()


def test_a_phase_is_shown_without_a_reading_of_the_journal(
    session, following, serving, monkeypatch
):
    async def test(server, journal):
        monkeypatch.setattr(feeds, "IDLE_INTERVAL", 2 * LONG)
        state, _ = await asyncio.to_thread(following, session)
        await asyncio.to_thread(until, lambda: server.watchers and state.connected and state.known)
        for name in ("generate", "score", "optimise"):
            if name == "optimise":  # what it reads as it connects, it has read by now
                journal.record_step(report(21))
            phase = Phase(rank=0, step=21, name=name)
            server.send_to_watchers(phase)
            await asyncio.to_thread(until, lambda p=phase: state.progress.phases == [p])
        assert state.head.step == 20
        server.notify_watchers()
        await asyncio.to_thread(until, lambda: state.head.step == 21)

    serving(test)


def test_a_viewer_too_many_is_refused_with_the_reason_until_another_one_leaves(
    session, following, serving, monkeypatch
):
    async def test(server, journal):
        journal.set_meta(state="running")
        monkeypatch.setattr(server_module, "MAX_WATCHERS", 0)
        state, _ = await asyncio.to_thread(following, session)
        line = StatusLine(state)
        told = "0 viewers are connected already, the limit: close one of them"
        await asyncio.to_thread(until, lambda: told in text(line, width=80))
        monkeypatch.setattr(server_module, "MAX_WATCHERS", 1)
        await asyncio.to_thread(until, lambda: state.connected and told not in text(line, width=80))

    serving(test)
