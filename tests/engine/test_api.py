"""The Python API on sessions that have no engine; docs/python.md is run against a live one."""

import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import engine
from engine.api import Session, attach, fork, resume, sessions, start
from engine.errors import (
    CommandRejectedError,
    ConfigError,
    NoSuchSessionError,
    SessionError,
    UserInputError,
)
from engine.journal.metric_reader import MetricReader
from engine.journal.reader import JournalReader
from engine.journal.samples import SampleQuery
from engine.session.registry import announce


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_TUI_SESSIONS", str(tmp_path / "sessions"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def run(writer):
    """A session of three steps; the second has no score."""
    writer.steps(1)
    writer.steps(2, **{"objective/scores": math.nan, "objective/kl": 0.5})
    writer.steps(3)
    writer.journal.set_meta(state="finished")
    return Session(writer.session.folder, who="a test")


def test_an_empty_name_of_the_operator_is_none(run):
    assert Session(run.folder, who="").who == Session(run.folder).who != ""


def test_the_package_exports_what_its_stub_declares():
    stub = Path(engine.__file__).with_suffix(".pyi").read_text(encoding="utf-8")
    declared = re.findall(r"import \w+ as (\w+)", stub)
    assert declared == engine.api.__all__
    assert all(getattr(engine, name) is getattr(engine.api, name) for name in declared)
    assert set(declared) < set(dir(engine))
    with pytest.raises(AttributeError, match="'engine' has no attribute 'begin'"):
        _ = engine.begin


def test_a_curve_has_the_steps_with_a_point_and_nan_for_what_was_not_finite(run):
    curve = run.curve("objective/scores", after=1)
    assert (curve.name, curve.steps.tolist()) == ("objective/scores", [2, 3])
    assert math.isnan(curve.values[0])
    assert curve.values[1] == pytest.approx(3.1)


def test_arrays_lie_over_the_same_steps(run):
    table = run.as_arrays("objective/scores", "objective/kl")
    assert table["step"].tolist() == [1, 2, 3]
    assert [math.isnan(v) for v in table["objective/kl"]] == [True, False, True]
    assert memoryview(table["objective/kl"]).format == "d"


def test_a_step_that_ends_while_arrays_are_read_is_in_none_of_them(run, writer, monkeypatch):
    read = MetricReader.series

    def beside_a_run(metrics, *arguments):
        points = read(metrics, *arguments)
        writer.steps(writer.journal.step + 1)
        return points

    monkeypatch.setattr(MetricReader, "series", beside_a_run)
    table = run.as_arrays("objective/scores", "lr")
    assert table["step"].tolist() == [1, 2, 3]
    assert table["lr"].tolist() == [1e-5] * 3


def test_all_metrics_are_read_by_default(run):
    assert set(run.as_arrays()) == {"step", *run.metric_names()}


def test_a_metric_without_a_value_is_nan_and_one_that_cannot_be_is_an_error(run):
    assert math.isnan(run.metric("eval/score"))
    for name in ("objective/kll", "kl"):
        with pytest.raises(UserInputError, match="did you mean 'objective/kl'"):
            run.metric(name)


def test_samples_are_the_newest_or_those_of_a_query(run):
    assert [s.step for s in run.samples(2)] == [3, 3]
    lowest = run.samples(1, query=SampleQuery(order="score", descending=False))
    assert [s.score for s in lowest] == [1.0]
    assert len(run.samples(query=SampleQuery())) == 6


def test_waiting_on_a_run_that_has_ended_raises_instead_of_waiting(run):
    assert run.wait_for_step(3) == 3
    with pytest.raises(
        SessionError, match="is finished at step 3, so the awaited condition can no longer"
    ):
        run.wait_for_step(4)
    assert run.wait_for_end() == "finished"


def test_waiting_for_step_0_does_not_wait_for_the_first_step(make_session, write_in):
    session = make_session()
    write_in(session).journal.begin_attempt(0, fresh=False)
    assert Session(session.folder).wait_for_step(0) == 0


def test_waiting_has_a_limit(run):
    lock = run.files.acquire()  # as if an engine lived
    with pytest.raises(TimeoutError, match=r"at step 3; waited for 0\.1 s"):
        run.wait(lambda run: run.step > 3, timeout=0.1)
    lock.release()


def test_a_run_without_an_engine_takes_notes_and_no_other_command(run):
    assert run.note("seen") == 3
    assert [e.payload.who for e in run.events() if e.kind == "note"] == ["a test"]
    with pytest.raises(CommandRejectedError, match="1 to 10000 characters"):
        run.note(" ")
    with pytest.raises(NoSuchSessionError, match="has no live engine"):
        run.pause()


@pytest.mark.parametrize(
    ("send", "problem"),
    [
        (lambda run: run.set_beta("high"), "beta: value must be a number, not .high."),
        (lambda run: run.set_kl("adaptiv"), "kl: Invalid enum value 'adaptiv'"),
        (lambda run: run.set(5, 5), "set: key must be text, not 5"),
        (lambda run: run.set("epochs", 2**70), "set: can't serialize ints"),
        (lambda run: run.set_beta(np.float32(0.1)), "beta: Encoding objects of type numpy.float32"),
    ],
)
def test_an_argument_of_a_wrong_type_is_told_before_anything_is_sent(run, send, problem):
    with pytest.raises(UserInputError, match=problem):
        send(run)


def test_a_note_does_not_end_the_attempt_of_an_engine_that_died(run):
    run.note("seen")
    with JournalReader(run.files) as reader:
        assert [attempt.ended for attempt in reader.attempts()] == [None]


def test_a_session_that_was_deleted_meanwhile_is_told(run):
    shutil.rmtree(run.folder)
    reads = (lambda: run.state, lambda: run.samples(last=1), lambda: run.wait_for_end(timeout=1))
    for read in reads:
        with pytest.raises(NoSuchSessionError, match="there is no session in "):
            read()


def test_a_session_is_found_by_its_name(run):
    shutil.copytree(run.folder, run.folder.with_name("by hand"))  # no name that we would give
    assert [s.name for s in sessions()] == ["by hand", "run"]
    assert attach("run").folder == run.folder
    with pytest.raises(NoSuchSessionError, match="no session is live"):
        attach()


def test_attaching_in_a_folder_finds_no_session_of_another(run, tmp_path):
    lock = run.files.acquire()
    announce(run.files)
    assert attach().folder == run.folder
    assert attach(sessions=run.folder.parent).folder == run.folder
    with pytest.raises(NoSuchSessionError, match="no session is live"):
        attach(sessions=tmp_path / "other")
    with pytest.raises(NoSuchSessionError, match="no session 'run' in"):
        attach("run", sessions=tmp_path / "other")
    lock.release()


@pytest.mark.parametrize(
    ("config", "overrides", "reason"),
    [
        ({"model": {"polcy": "x"}}, {}, "unknown key 'model.polcy'"),
        ({"model": {"policy": "a"}, "data": {"prompts": "./none.jsonl"}}, {}, "reward"),
        ("starter:demo", {"train.steps": 0}, "train.steps must be"),
        ("starter:demo", {"data.prompts": "./none.jsonl"}, "no file at .*none.jsonl"),
        ("none.yaml", {}, "no configuration file at none.yaml"),
    ],
)
def test_a_configuration_that_cannot_be_used_leaves_no_session(config, overrides, reason, tmp_path):
    with pytest.raises(ConfigError, match=reason):
        start(config, overrides=overrides)
    assert not list((tmp_path / "sessions").glob("*"))


def test_a_mapping_stays_as_it_was(tmp_path):
    config = {"model": {"policy": "./p"}, "data": {"prompts": "./none.jsonl"}}
    config["reward"] = {"model": "./r"}
    before = repr(config)
    with pytest.raises(ConfigError, match=r"no file at .*/none\.jsonl"):
        start(config, overrides={"kl.beta": 1})
    assert repr(config) == before


def test_overrides_are_plain_values():
    with pytest.raises(UserInputError, match="overrides must be plain values"):
        start("starter:demo", overrides={"kl.beta": {1}})


def test_a_finished_run_is_resumed_only_for_more_steps(run, writer):
    writer.checkpoint(3)
    with pytest.raises(UserInputError, match="has finished its 3 steps"):
        resume(run, overrides={"train.steps": 3})
    with pytest.raises(UserInputError, match=r"has finished its 2 steps.*'train.steps': 6"):
        resume(run, overrides={"train.steps": 2})


def test_a_session_is_resumed_and_forked_by_its_name(run, writer):
    writer.checkpoint(3)
    with pytest.raises(UserInputError, match="has finished its 3 steps"):
        resume(run.name, overrides={"train.steps": 3})
    with pytest.raises(NoSuchSessionError, match="checkpoint"):
        fork(run.name, "second", from_step=7)
    with pytest.raises(NoSuchSessionError, match="'absent'"):
        resume("absent")


@pytest.mark.parametrize("text", ["a\x85b", "a \u2028 b", "\x7f", "\U0001f600 é"])
def test_a_text_of_any_characters_is_the_value_of_an_override(run, text):
    with pytest.raises(ConfigError) as caught:
        resume(run, overrides={"model.value": text})
    assert str(caught.value).endswith(f", not {text!r}")
