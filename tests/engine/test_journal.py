"""The journal: what was written is read, a later attempt replaces, nothing is forgotten."""

import gc
import itertools
import json
import math
import sqlite3
import threading
import time
from contextlib import closing

import pytest

from engine.journal import database, schema
from engine.journal.database import open_read_only
from engine.journal.fork import copy_until
from engine.journal.history.recording import Recording
from engine.journal.reader import JournalReader
from engine.journal.rows import AlertEvent, MetricRow, SampleRow, engine_died_before
from engine.journal.samples import SampleQuery, SampleReader, with_judgements
from engine.journal.writer import JournalWriter
from engine.metrics import SCORE
from engine.protocol.rank_messages import REWARD_CHANGED, StepReport


def scores(session):
    with JournalReader(session) as reader:
        return dict(reader.metrics.series("objective/scores"))


def test_a_step_is_read_as_it_was_written(writer):
    writer.steps(1, 2)
    with JournalReader(writer.session) as reader:
        rows = reader.metrics.rows()
        assert [(r.step, r.attempt, r.values["lr"]) for r in rows] == [(1, 1, 1e-5), (2, 1, 1e-5)]
        assert reader.metrics.rows(last=1) == rows[1:]
        assert reader.last_step() == 2
        assert reader.meta().settings == {"beta": 0.1}


def test_the_samples_of_a_step_are_read_as_they_were_written(writer):
    writer.steps(1, 2)
    with JournalReader(writer.session) as reader:
        samples = reader.samples.newest()
        assert [(s.step, s.index) for s in samples] == [(1, 0), (1, 1), (2, 0), (2, 1)]
        assert samples[0].parts == {"reward": 1.0}
        assert (samples[0].ended, samples[1].ended) == (True, False)


def test_arrays_are_those_of_a_step_an_index_and_an_attempt(writer):
    writer.steps(1, 2)
    with JournalReader(writer.session) as reader:
        assert reader.samples.arrays(1, 0, 1).ref_logprob == [-1.0, -2.5]
        assert reader.samples.arrays(1, 1, 1) is None
        assert reader.samples.arrays(1, 0, 2) is None


def test_rows_of_some_metrics_have_these_and_no_others(writer):
    writer.steps(1, 2, late=3.0)
    with JournalReader(writer.session) as reader:
        rows = reader.metrics.rows(only=("late", "unheard of"))
    assert [(r.step, r.values) for r in rows] == [(1, {"late": 3.0}), (2, {"late": 3.0})]


@pytest.mark.parametrize("version", range(1, len(schema.SAMPLES)))
def test_responses_of_an_earlier_version_lack_what_it_did_not_record(writer, version):
    writer.steps(1)
    writer.session.samples_file.unlink()
    with closing(sqlite3.connect(writer.session.samples_file)) as old:
        schema.migrate(old, schema.SAMPLES[:version], writer.session.samples_file)
        old.execute(
            "INSERT INTO samples (step, idx, attempt, prompt, response, length, ended, parts) "
            "VALUES (1, 0, 1, 'p', 'r', 1, 1, '{}')"
        )
        old.commit()
    recording = Recording(writer.session)
    past = writer.session.at(recording.position_at(recording.duration))
    for session in (writer.session, past):
        with SampleReader(session) as samples:
            (row,) = samples.newest()
        assert (row.response, row.weights_version, row.replies) == ("r", None, None)
        assert row.turn_scores == {}


def test_scores_of_turns_are_read_as_they_were_reported(writer):
    given = [{}, {"game": [0.5, -1.0]}, {"a": [0.0], "b": [1.0, 2.0, 3.0]}]
    samples = [writer.sample(1, i, turn_scores=scores) for i, scores in enumerate(given)]
    writer.journal.record_step(StepReport(step=1, metrics={}, samples=samples, settings={}))
    with SampleReader(writer.session) as reader:
        rows = reader.of_step(1)
    assert [row.turn_scores for row in rows] == given
    assert [row.as_json()["turn_scores"] for row in rows] == given


def test_a_metric_that_begins_later_is_null_before(writer):
    writer.steps(1)
    writer.steps(2, late=3.0)
    with JournalReader(writer.session) as reader:
        assert [r.values["late"] for r in reader.metrics.rows()] == [None, 3.0]
        assert reader.metrics.series("late") == [(2, 3.0)]
        assert reader.metrics.series("unheard of") == []


def test_a_metric_that_a_run_never_has_is_null_in_json(writer):
    writer.steps(1)
    with JournalReader(writer.session) as reader:
        (row,) = reader.metrics.rows()
    assert "loss/value_avg" not in row.values
    assert row.as_json()["loss/value_avg"] is None
    assert row.as_json()["lr"] == row.values["lr"]


def test_a_step_that_is_written_while_metrics_are_read_is_whole_or_not_there(writer, monkeypatch):
    def write_a_step(_query):
        step = writer.journal.step + 1
        writer.steps(step, **{f"only_{step}": 1.0})

    def open_interrupted(path, newest):
        db = open_read_only(path, newest)
        db.set_trace_callback(write_a_step)  # called before each query
        return db

    writer.steps(1, only_1=1.0)
    monkeypatch.setattr(database, "open_read_only", open_interrupted)
    with JournalReader(writer.session) as reader:
        for _ in range(3):
            written = writer.journal.step
            rows = reader.metrics.rows()
            assert writer.journal.step >= written + 3, "steps are written between the queries"
            for row in rows:
                assert row.values[f"only_{row.step}"] == 1.0


def test_what_is_not_finite_is_null_everywhere(writer):
    writer.steps(1, nan=math.nan, inf=math.inf)
    odd = writer.sample(2, 0, score=math.inf, kl=math.nan, parts={"reward": -math.inf})
    report = {
        "step": 2,
        "metrics": {},
        "samples": [odd],
        "evaluated": [],
        "settings": {"beta": math.nan},
    }
    writer.journal.record_step(type("Report", (), report))
    writer.journal.record_event("alert", {"window": [1.0, math.nan], "deep": {"a": math.inf}})
    writer.order("nan", "beta", value=math.nan)
    with JournalReader(writer.session) as reader:
        rows = [*reader.metrics.rows(), *reader.samples.newest(), *reader.events()]
        everything = [*(row.as_json() for row in rows), reader.meta().settings]
        text = json.dumps(everything, allow_nan=False)
    assert "null" in text
    # Written without a value is not the same as never written: a replay can tell.
    with JournalReader(writer.session) as reader:
        assert reader.metrics.series("inf") == [(1, None)]


def test_a_resume_takes_over_the_timeline_and_keeps_the_past(writer):
    writer.steps(1, 2, 3)
    writer.journal.begin_attempt(1, fresh=False)
    assert writer.journal.step == 1
    writer.steps(2)
    assert scores(writer.session) == {1: 1.1, 2: 2.2}
    with JournalReader(writer.session) as reader:
        assert reader.metrics.past_series("objective/scores") == [(1, 2, 2.1), (1, 3, 3.1)]
        assert [a.from_step for a in reader.attempts()] == [0, 1]
        assert [(s.step, s.attempt) for s in reader.samples.newest()] == [
            (1, 1), (1, 1), (2, 2), (2, 2),
        ]  # fmt: skip
        assert reader.samples.arrays(3, 0, 1) is None


def test_a_timeline_can_be_replaced_again_and_again(writer):
    for _ in range(3):
        writer.steps(1, 2)
        writer.journal.begin_attempt(0, fresh=True)
    with JournalReader(writer.session) as reader:
        assert len(reader.metrics.past_series("lr")) == 6
        assert reader.metrics.rows() == []


def test_the_next_attempt_is_told_where_the_last_one_computed(writer):
    assert writer.journal.placed() is None
    for info in ({"ranks": 2, "strategy": "fsdp", "device": "cuda:0"}, {"ranks": 1}):
        writer.journal.record_event("ready", info)
        placed = writer.journal.placed()
        if "strategy" in info:
            assert (placed.ranks, placed.strategy, placed.device) == (2, "fsdp", "cuda:0")
        else:  # of an earlier version
            assert placed is None


def test_checkpoints_after_a_resume_belong_to_the_past(writer):
    writer.checkpoint(2)
    writer.checkpoint(4)
    writer.journal.begin_attempt(2, fresh=False)
    with JournalReader(writer.session) as reader:
        assert [c.step for c in reader.checkpoints(("complete",))] == [2]
        assert [c.step for c in reader.checkpoints()] == [2, 4]
    writer.journal.checkpoints.record(4, 1000, math.nan, math.nan)
    writer.journal.checkpoints.complete(4, removed=[2])
    with JournalReader(writer.session) as reader:
        assert [(c.step, c.attempt) for c in reader.checkpoints(("complete",))] == [(4, 2)]


def test_the_best_checkpoint_is_the_newest_of_those_with_the_highest_value(writer):
    for step, value in enumerate((1.0, 3.0, 3.0, 9.0, 2.0), start=1):
        writer.steps(step, aim=value)
    for step in (1, 2, 3, 5):
        writer.checkpoint(step)
    with JournalReader(writer.session) as reader:
        assert reader.best_checkpoint("aim") == 3
        assert reader.best_checkpoint("lr") == 5
        assert reader.best_checkpoint("none") is None


def test_the_best_checkpoint_is_one_of_the_reward_in_force(writer):
    for step, value in enumerate((9.0, 1.0, 2.0), start=1):
        if step == 2:
            writer.journal.record_event("alert", {"rule": REWARD_CHANGED, "text": ""}, 1)
        writer.steps(step, **{SCORE: value, "aim": value})
        writer.checkpoint(step)
    with JournalReader(writer.session) as reader:
        assert [reader.best_checkpoint(name) for name in (SCORE, "aim")] == [3, 1]


def test_a_checkpoint_that_is_resumed_from_is_complete_although_no_rank_reported_it(writer):
    writer.journal.checkpoints.record(2, 1000, 1.0, 2.0)
    writer.journal.checkpoints.record(4, 1000, 1.5, 2.5)
    writer.journal.begin_attempt(4, fresh=False)
    with JournalReader(writer.session) as reader:
        assert [c.step for c in reader.checkpoints(("complete",))] == [4]
        (told,) = [e for e in reader.events() if e.kind == "checkpoint"]
        assert (told.step, told.payload.score) == (4, 1.5)


def test_an_engine_has_died_though_the_next_one_has_its_process_id_and_host(writer, write_in):
    """As after a restart of a container, here by two writers of this process."""
    writer.journal.begin_attempt(0, fresh=False)  # its ranks have started again
    another = write_in(writer.session)
    another.journal.begin_attempt(0, fresh=False)
    another.journal.close()
    with JournalReader(writer.session) as reader:
        begun = [e.payload for e in reader.events() if e.kind == "attempt"]
        attempts = {row.attempt: row for row in reader.attempts()}
    assert attempts[1].pid == attempts[2].pid == attempts[3].pid
    assert [engine_died_before(each, attempts) for each in begun] == [False, False, True]


def test_one_folder_is_one_checkpoint_although_its_rank_died_before_reporting_it(writer):
    writer.checkpoint(2)
    writer.checkpoint(4)
    writer.journal.begin_attempt(2, fresh=True)
    writer.journal.checkpoints.record(4, 1000, 1.5, 2.5)
    writer.journal.begin_attempt(4, fresh=False)
    with JournalReader(writer.session) as reader:
        assert [(c.step, c.attempt) for c in reader.checkpoints()] == [(2, 1), (4, 2)]


@pytest.fixture
def clock(monkeypatch):
    """A wall clock that runs backwards: each reading is a minute before the last one."""
    readings = itertools.count(2_000_000_000, -60)
    monkeypatch.setattr(time, "time", lambda: float(next(readings)))


@pytest.mark.usefixtures("clock")
def test_a_clock_that_is_set_back_changes_no_order(writer):
    writer.change("a", 5, 0.1, 0.111)
    writer.change("b", 5, 0.111, 0.333)
    for command_id, score in (("first", 1.0), ("second", 2.0)):
        writer.order(command_id, "probe", text="p")
        result = {"reference": {"response": command_id, "score": score}}
        writer.journal.commands.apply(command_id, 5, [], result)
    changed = [c.changes[0].new for c in writer.journal.commands.changes_after(4)]
    assert changed == [0.111, 0.333]
    assert [changes[0].new for changes in writer.journal.commands.undoable(5)] == [0.111, 0.333]
    with JournalReader(writer.session) as reader:
        assert [c.id for c in reader.commands()] == ["a", "b", "first", "second"]
        assert reader.last_reference_probe("p").response == "second"


def test_an_old_journals_commands_keep_the_order_of_their_events(tmp_path):
    """Version 1 has no numbers, and its clock may have been set back."""
    path = tmp_path / "journal.db"
    db = sqlite3.connect(path)
    schema.migrate(db, schema.JOURNAL[:1], path)
    for event, (command_id, status, queued) in enumerate(
        [("first", "applied", 90.0), ("second", "rejected", 60.0), ("third", "applied", 30.0)], 1
    ):
        db.execute(
            "INSERT INTO events VALUES (?, ?, 1, 4, 'command', ?)",
            (event, queued, json.dumps({"id": command_id})),
        )
        db.execute(
            "INSERT INTO commands (id, command, args, who, status, queued, ended, attempt, "
            "applied_step, changes) VALUES (?, 'set', '{}', 'me', ?, ?, ?, 1, 5, '[]')",
            (command_id, status, queued, queued + 1),
        )
    db.commit()
    schema.migrate(db, schema.JOURNAL, path)
    rows = db.execute("SELECT id, seq, applied_seq FROM commands ORDER BY seq").fetchall()
    db.close()
    assert rows == [("first", 1, 1), ("second", 2, None), ("third", 3, 3)]


def test_an_event_of_another_version_is_printed_whole_and_known_as_far_as_it_can_be(writer):
    more = {"rule": "kl", "text": "high", "of_a_later_version": [1]}
    writer.journal.record_event("alert", more)
    writer.journal.record_event("unheard of", {"x": 1})
    writer.journal.record_event("checkpoint", {"size": "of another form"})
    with JournalReader(writer.session) as reader:
        alert, unknown, other = reader.events()[-3:]
    assert alert.payload == AlertEvent(rule="kl", text="high")
    assert alert.as_json().items() >= more.items()
    assert (unknown.payload, unknown.as_json()["x"]) == (None, 1)
    assert (other.payload, other.as_json()["size"]) == (None, "of another form")


def test_a_fork_takes_the_past_and_leaves_the_rest(writer, make_session):
    writer.steps(1)
    writer.change("early", 2, 0.1, 0.2)
    writer.steps(2)
    writer.change("late", 3, 0.2, 0.3)
    writer.checkpoint(2)
    writer.steps(3)
    writer.order("open", "pause")
    writer.checkpoint(3)
    child = make_session("child")
    copy_until(writer.session, child, 2)
    assert scores(child) == {1: 1.1, 2: 2.1}
    with JournalReader(child) as reader:
        assert {c.id for c in reader.commands()} == {"early"}
        assert [c.step for c in reader.checkpoints()] == [2]
        assert [e.command.id for e in reader.events() if e.kind == "command"] == ["early"]
        assert {s.step for s in reader.samples.newest()} == {1, 2}
        assert (reader.meta().state, reader.meta().total_steps) == ("starting", 0)
    # The source is as it was.
    assert scores(writer.session) == {1: 1.1, 2: 2.1, 3: 3.1}


def test_a_fork_has_no_events_of_what_its_source_went_through_after_the_checkpoint(
    writer, make_session
):
    writer.steps(1, 2)
    writer.checkpoint(2)
    writer.journal.record_event("error", {"text": "out of memory"})
    writer.journal.record_event("alert", {"rule": "restart", "text": "out of memory; restarted"})
    writer.journal.record_event("note", {"text": "fork from here"})
    writer.journal.begin_attempt(2, fresh=False)
    child = make_session("child")
    copy_until(writer.session, child, 2)
    with JournalReader(child) as reader:
        assert [e.kind for e in reader.events()] == ["attempt", "checkpoint", "note"]


def test_samples_are_searched_and_ordered(writer):
    writer.steps(1, 2, 3)
    with JournalReader(writer.session) as reader:
        page = reader.samples.page(SampleQuery(order="score", descending=False), limit=3)
        assert [s.score for s in page] == [1.0, 1.0, 2.0]
        found = reader.samples.page(SampleQuery(text="ANSWER 2"), limit=10)
        assert {s.step for s in found} == {2}
        assert len(reader.samples.page(SampleQuery(cut_off=True), limit=10)) == 3
        assert len(reader.samples.page(SampleQuery(score_from=2, score_to=2), limit=10)) == 2
        evil = SampleQuery(order="score; DROP TABLE samples", text="%'\"")
        assert reader.samples.page(evil, limit=1) == []


def test_an_evaluation_before_the_first_step_is_repeated_by_an_attempt_from_step_0(writer):
    sample = writer.sample(0, 0)
    writer.journal.record_evaluation(0, {"eval/score": 1.0, "eval/kl": 0.5}, [sample])
    writer.steps(1)
    writer.journal.begin_attempt(0, fresh=False)
    with JournalReader(writer.session) as reader:
        assert reader.metrics.series("eval/score") == []
        assert reader.metrics.past_series("eval/score") == [(1, 0, 1.0)]
        assert reader.samples.evaluated() == []
    writer.journal.record_evaluation(0, {"eval/score": 2.0}, [])
    with JournalReader(writer.session) as reader:
        assert reader.metrics.series("eval/score") == [(0, 2.0)]
        assert reader.metrics.series("eval/kl") == []


def test_an_evaluation_before_the_first_step_is_a_row_of_step_0(writer):
    with JournalReader(writer.session) as reader:
        assert reader.metrics.rows() == []
    writer.journal.record_evaluation(0, {"eval/score": 1.0}, [])
    writer.steps(1, 2)
    with JournalReader(writer.session) as reader:
        first, *steps = reader.metrics.rows()
        assert (first.step, first.attempt, first.time) == (0, 1, None)
        assert (first.values["eval/score"], first.values["lr"]) == (1.0, None)
        assert [row.step for row in steps] == [1, 2]
        assert [row.step for row in reader.metrics.rows(last=2)] == [1, 2]


def test_the_rows_of_all_steps_are_made_one_at_a_time(writer):
    writer.steps(*range(1, 51))
    with JournalReader(writer.session) as reader:
        rows = reader.metrics.iter_rows()
    assert next(rows).step == 1
    assert sum(type(o) is MetricRow for o in gc.get_objects()) <= 1
    assert [row.step for row in rows] == list(range(2, 51))


@pytest.fixture
def small_pages(monkeypatch):
    """Samples are read three at a time."""
    monkeypatch.setattr("engine.journal.samples.PAGE_SIZE", 3)


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("last", [None, 0, 1, 3, 5, 8, 100])
def test_samples_that_are_read_in_pages_are_complete_and_in_order(writer, last):
    writer.steps(*range(1, 5))
    keys = [(step, index) for step in range(1, 5) for index in range(2)]
    with JournalReader(writer.session) as reader:
        found = [(s.step, s.index) for s in reader.samples.iter_newest(last)]
    assert found == keys[len(keys) - (len(keys) if last is None else min(last, len(keys))) :]


def samples_in_memory():
    return sum(type(o) is SampleRow for o in gc.get_objects())


@pytest.mark.usefixtures("small_pages")
def test_only_a_page_of_samples_is_in_memory(writer):
    writer.steps(*range(1, 51))
    with JournalReader(writer.session) as reader:
        rows = with_judgements(writer.session, reader.samples.iter_newest())
        before = samples_in_memory()  # other tests may have left some
        for row in rows:
            assert row.step <= 50
            assert samples_in_memory() - before <= 3


@pytest.mark.usefixtures("small_pages")
def test_samples_that_are_recorded_while_others_are_read_are_left_out(writer):
    writer.steps(1, 2, 3)
    with JournalReader(writer.session) as reader:
        rows = reader.samples.iter_newest()
        first = next(rows)
        writer.journal.begin_attempt(2, fresh=True)
        writer.steps(3, 4)
        found = [(s.step, s.attempt) for s in (first, *rows)]
    assert found == [(1, 1), (1, 1), (2, 1), (2, 1)]


def test_readers_at_all_times_do_not_make_a_file_grow_without_end(writer, monkeypatch):
    monkeypatch.setattr("engine.journal.write_ahead_log.WAL_LIMIT", 1_000_000)
    journal, file = JournalWriter(writer.session), writer.session.samples_file
    journal.begin_serving()
    ended, sizes = threading.Event(), []

    def read():
        db = sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)
        db.execute("BEGIN")
        db.execute("SELECT count(*) FROM samples").fetchall()
        return db

    def read_all_the_time():
        current = read()
        while not ended.is_set():
            later = read()
            current.close()
            current = later
        current.close()

    reader = threading.Thread(target=read_all_the_time)
    reader.start()
    try:
        for step in range(1, 201):
            sample = writer.sample(step, 1, response="x" * 100_000)
            journal.record_step(StepReport(step=step, metrics={}, samples=[sample], settings={}))
            sizes.append(file.with_name("samples.db-wal").stat().st_size)
    finally:
        ended.set()
        reader.join()
        journal.close()
    assert max(sizes) < 10_000_000
