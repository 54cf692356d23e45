"""A session at a moment of its history: every reader returns what it returned at that moment."""

import itertools
import time

import pytest

from engine.errors import NoSuchSessionError
from engine.journal.history.recording import MAX_GAP, Recording
from engine.journal.judgements.labels import LabelReader, Response, set_label
from engine.journal.reader import JournalReader
from engine.journal.samples import SampleQuery
from engine.protocol.client import Client
from engine.session.folder import SessionFolder
from engine.session.position import StepRange, step_ranges
from rlhf_tui.state.feeds.journal_changes import JournalChanges
from rlhf_tui.state.feeds.output import UpdateOutput
from rlhf_tui.state.feeds.updates import SessionUpdate
from rlhf_tui.state.session_state import SessionState

SCORE = "objective/scores"


@pytest.fixture(autouse=True)
def a_second_a_call(monkeypatch):
    """A clock that advances with every look, so that nothing has the time of something else."""
    ticks = itertools.count(1_700_000_000.0)
    monkeypatch.setattr(time, "time", lambda: next(ticks))


def read(session):
    """Everything that readers give of a session."""
    with JournalReader(session) as reader, LabelReader(session) as labels:
        meta = reader.meta()
        newest = reader.samples.newest(6)
        return {
            "state": (meta.state, meta.message, meta.pause_reason),
            "step": reader.last_step(),
            "rows": [(r.step, r.attempt, r.time, r.values[SCORE]) for r in reader.metrics.rows()],
            "series": reader.metrics.series(SCORE),
            "downsampled": reader.metrics.downsampled([SCORE], 3),
            "past": reader.metrics.past_series(SCORE),
            "events": reader.events(),
            "commands": reader.commands(),
            "attempts": [(a.attempt, a.from_step, a.started) for a in reader.attempts()],
            "checkpoints": reader.checkpoints(),
            "samples": newest,
            "page": reader.samples.page(SampleQuery(order="score"), 50),
            "earlier": reader.samples.earlier(newest[-1]) if newest else [],
            "judgements": labels.judgements(),
        }


class History:
    """Takes down what is read of a session at several moments."""

    def __init__(self, session):
        self.session = session
        self.moments = []

    def look(self):
        """Takes it down at the item that was just written."""
        recording = Recording(self.session)
        position = recording.position_at(recording.duration)
        self.moments.append(((position.attempt, position.step, position.event), read(self.session)))

    def replayed(self):
        """The same moments, read afterwards."""
        recording = Recording(self.session)
        found = {}
        for offset in recording.offsets:
            position = recording.position_at(offset)
            place = position.attempt, position.step, position.event
            found[place] = self.session.at(position)
        return [(place, read(found[place])) for place, _ in self.moments]


@pytest.fixture
def history(writer):
    return History(writer.session)


def at_each_step(session, value):
    """A value of the reader at the last moment of each step of a replay, by attempt and step."""
    recording, found = Recording(session), {}
    for position in map(recording.position_at, recording.offsets):
        with JournalReader(session.at(position)) as reader:
            found[position.attempt, position.step] = value(reader)
    return found


def judge(session, label):
    with JournalReader(session) as reader:
        row = reader.samples.newest(1)[0]
    set_label(session, row.prompt, Response.of(row), label, "ana")


def live_through(writer, history):
    """A run that is steered, rolled back to a checkpoint and to the start, and killed."""
    journal = writer.journal
    journal.record_event("state", {"state": "starting", "text": ""})
    journal.set_meta(state="starting", message="")
    history.look()
    for state, text in (("running", ""), ("paused", "kl_high at step 0: KL 9 > 6")):
        paused = state == "paused"
        journal.set_meta(
            state=state, message="" if paused else text, pause_reason=text if paused else None
        )
        journal.record_event("state", {"state": state, "text": text})
        history.look()
    journal.set_meta(state="running", message="", pause_reason=None)
    journal.record_event("state", {"state": "running", "text": ""})
    writer.steps(1, 2, 3)
    history.look()
    judge(writer.session, "good")
    journal.checkpoints.record(3, 100, 1.0, 0.5)
    journal.checkpoints.complete(3)
    history.look()
    writer.steps(4)
    history.look()
    writer.change("c1", 5, 0.1, 0.2)
    writer.steps(5)
    history.look()
    journal.record_event("alert", {"rule": "kl_high", "text": "KL is high"}, 5)
    history.look()
    journal.checkpoints.record(5, 100, 1.0, 0.5)
    journal.checkpoints.complete(5)
    writer.steps(6)
    history.look()
    journal.begin_attempt(3, fresh=True)  # a roll back
    history.look()
    writer.steps(4, 5)
    history.look()
    judge(writer.session, "bad")
    journal.begin_attempt(0, fresh=True)
    writer.steps(1, 2)
    history.look()
    writer.change("c2", 3, 0.1, 0.3)
    writer.steps(3)
    history.look()
    journal.begin_attempt(0, fresh=False)  # after a crash, c2 is to be repeated
    history.look()
    writer.steps(1)
    writer.change("c3", 2, 0.1, 0.4)  # and is overridden before
    writer.steps(2, 3)
    history.look()


def test_at_every_moment_readers_give_what_they_gave_then(writer, history):
    live_through(writer, history)
    assert len(history.moments) > 10
    for (place, then), (_, afterwards) in zip(history.moments, history.replayed(), strict=True):
        for what in then:
            assert afterwards[what] == then[what], (place, what)


def replayed_commands(session):
    """Yields the commands that a replay shows at each moment, and those that there were."""
    state = SessionState(session.name)
    changes, recording = JournalChanges([SCORE], UpdateOutput(state.take)), Recording(session)
    for offset in recording.offsets:
        there = session.at(recording.position_at(offset))
        with JournalReader(there) as reader:
            changes.read(there, reader, (), SessionUpdate())
            yield state.timeline.commands, reader.commands()


def test_a_replay_has_the_commands_of_each_moment(writer, history):
    live_through(writer, history)
    for shown, commands in replayed_commands(writer.session):
        assert shown == commands


def test_a_replay_does_not_read_commands_again_that_have_ended(writer, monkeypatch):
    for step in range(1, 31):
        writer.change(f"c{step}", step, 0.1, 0.2)
        writer.steps(step)
    numbered, read = JournalReader.numbered_commands, []

    def counted(*arguments):
        found = numbered(*arguments)
        read.append(len(found))
        return found

    monkeypatch.setattr(JournalReader, "numbered_commands", counted)
    for shown, commands in replayed_commands(writer.session):
        assert shown == commands
        read.pop()  # of the line above
        assert max(read, default=0) <= 2


def test_a_judgement_is_shown_from_its_time_on(writer):
    writer.steps(1)
    judge(writer.session, "good")
    writer.steps(2)
    recording = Recording(writer.session)
    at = {p.step: p for p in map(recording.position_at, recording.offsets)}
    for step, count in ((1, 0), (2, 1)):
        with LabelReader(writer.session.at(at[step])) as labels:
            assert labels.count() == count


def test_a_command_is_pending_until_it_is_applied(writer):
    writer.steps(1)
    writer.order("c1", "set", key="beta", value=0.2)
    writer.steps(2)
    writer.journal.commands.apply("c1", 3, [])
    writer.steps(3)
    statuses = at_each_step(writer.session, lambda reader: [c.status for c in reader.commands()])
    assert statuses == {(1, 0): [], (1, 1): ["queued"], (1, 2): ["accepted"], (1, 3): ["applied"]}


def test_the_settings_are_those_that_were_in_force(writer):
    journal = writer.journal
    writer.steps(1)
    writer.change("c1", 2, 1e-5, 2e-5, key="learning_rate")
    writer.steps(2, 3)
    journal.begin_attempt(1, fresh=True)
    writer.steps(2)
    writer.change("c2", 3, 1e-5, 5e-5, key="learning_rate")
    writer.steps(3)
    journal.set_meta(settings={"beta": 0.1, "learning_rate": 5e-5})
    rates = at_each_step(writer.session, lambda reader: reader.meta().settings["learning_rate"])
    assert rates == {
        (1, 0): 1e-5, (1, 1): 1e-5, (1, 2): 2e-5, (1, 3): 2e-5, (2, 1): 1e-5, (2, 2): 1e-5,
        (2, 3): 5e-5,
    }  # fmt: skip


def test_the_total_of_steps_is_that_which_was_in_force(writer):
    journal = writer.journal  # its first attempt is like one of an earlier version
    journal.begin_attempt(0, fresh=True, total_steps=2)
    writer.steps(1, 2)
    journal.set_meta(total_steps=4)  # the run was resumed with train.steps=4
    journal.begin_attempt(2, fresh=False, total_steps=4)
    writer.steps(3, 4)
    totals = at_each_step(writer.session, lambda reader: reader.meta().total_steps)
    assert totals == {
        (1, 0): 4, (2, 0): 2, (2, 1): 2, (2, 2): 2, (3, 2): 4, (3, 3): 4, (3, 4): 4,
    }  # fmt: skip


def test_after_a_crash_a_setting_changes_again_at_its_step_unless_it_was_overridden(writer):
    journal = writer.journal
    writer.steps(1, 2)
    writer.change("c1", 3, 1e-5, 2e-5, key="learning_rate")
    writer.change("c2", 3, 3, 4, key="epochs")
    writer.steps(3, 4)
    journal.begin_attempt(1, fresh=False)
    writer.change("c3", 2, 1e-5, 5e-5, key="learning_rate")
    writer.steps(2, 3)
    journal.set_meta(settings={"beta": 0.1, "learning_rate": 5e-5, "epochs": 4})
    settings = at_each_step(writer.session, lambda reader: reader.meta().settings)
    seen = {step: (found["learning_rate"], found["epochs"]) for step, found in settings.items()}
    assert seen == {
        (1, 0): (1e-5, 3), (1, 1): (1e-5, 3), (1, 2): (2e-5, 3), (1, 3): (2e-5, 4),
        (1, 4): (2e-5, 4), (2, 1): (1e-5, 3), (2, 2): (5e-5, 4), (2, 3): (5e-5, 4),
    }  # fmt: skip


def test_a_session_of_the_past_has_no_engine(writer):
    writer.steps(1)
    lock = writer.session.acquire()
    recording = Recording(writer.session)
    session = writer.session.at(recording.position_at(0.0))
    assert writer.session.is_live()
    assert not session.is_live()
    with pytest.raises(NoSuchSessionError):
        Client(session, "me")
    lock.release()


def test_what_is_not_on_todays_timeline_belonged_to_that_of_then():
    starts = [(1, 0), (2, 100), (3, 40)]
    assert step_ranges(starts, 1, 117) == (40, (StepRange(1, 40, 117),), ())
    kept, current, abandoned = step_ranges(starts, 2, 130)
    assert kept == 40
    assert current == (StepRange(1, 40, 100), StepRange(2, 40, 130))
    assert [(r.attempt, r.after) for r in abandoned] == [(1, 100)]
    kept, current, abandoned = step_ranges(starts, 3, 60)
    assert (kept, current) == (60, ())
    assert [(r.attempt, r.after) for r in abandoned] == [(1, 40), (2, 40)]


def test_pauses_are_shortened_and_a_clock_that_was_set_back_stops_nothing(writer, monkeypatch):
    now = [1_700_000_000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    for step in range(1, 6):
        now[0] += 4.0
        writer.steps(step)
    now[0] += 8 * 3600
    writer.journal.begin_attempt(5, fresh=False)
    now[0] -= 24 * 3600
    writer.steps(6)
    now[0] += 4.0
    writer.steps(7)
    recording = Recording(writer.session)
    assert sorted(recording.offsets) == list(recording.offsets)
    assert recording.duration <= (6 + MAX_GAP) * 4.0
    assert recording.position_at(recording.duration).step == 7
    assert recording.position_at(recording.offset_of_step(6)).step == 6


def test_an_empty_session_has_no_items(writer):
    assert len(Recording(SessionFolder(writer.session.folder.parent / "none"))) == 0


def test_changes_are_in_the_order_in_which_they_were_applied_whatever_the_clock(
    writer, monkeypatch
):
    writer.steps(1)
    beginning = Recording(writer.session).position_at(0.0)
    writer.change("c1", 2, 1e-5, 2e-5, key="learning_rate")
    earlier = itertools.count(1_600_000_000.0)
    monkeypatch.setattr(time, "time", lambda: next(earlier))
    writer.change("c2", 2, 2e-5, 5e-5, key="learning_rate")
    writer.steps(2, 3)
    writer.journal.set_meta(settings={"beta": 0.1, "learning_rate": 5e-5})
    with JournalReader(writer.session.at(beginning)) as reader:
        assert reader.meta().settings["learning_rate"] == 1e-5


@pytest.mark.parametrize("keep_last", [1, 3])
def test_a_removed_checkpoint_is_shown_until_as_many_later_ones_were_saved_as_are_kept(
    make_session, write_in, keep_last
):
    writer = write_in(make_session("kept", f"train.keep_last={keep_last}"))
    checkpoints = writer.journal.checkpoints
    writer.journal.begin_attempt(0, fresh=False)
    then, counted = {}, []
    for step in range(1, 7):
        writer.steps(step)
        checkpoints.record(step, 100, 1.0, 0.5)
        if step == 2:
            checkpoints.keep(step)
        else:
            counted.append(step)
        checkpoints.complete(step, counted[-keep_last - 1 : -keep_last])
        with JournalReader(writer.session) as reader:
            then[step] = [c.step for c in reader.checkpoints()]
    found = at_each_step(writer.session, lambda reader: [c.step for c in reader.checkpoints()])
    writer.journal.close()
    assert {step: found[1, step] for step in then} == then


def test_what_happened_at_a_step_stays_there_when_the_clock_was_set_back(writer, monkeypatch):
    journal = writer.journal
    writer.steps(1, 2)
    earlier = itertools.count(1_600_000_000.0)
    monkeypatch.setattr(time, "time", lambda: next(earlier))
    happened = []
    for step in (2, 3, 4):
        if step > 2:
            writer.steps(step)
        if step == 3:
            journal.record_event("alert", {"rule": "kl_high", "text": "KL is high"}, step)
        else:
            writer.order(f"c{step}", "pause")
        happened.append((step, journal.last_event))
    writer.steps(5)
    recording = Recording(writer.session)
    first = {}
    for position in map(recording.position_at, recording.offsets):
        first.setdefault(position.event, position.step)
    assert [(first[event], event) for _, event in happened] == happened
