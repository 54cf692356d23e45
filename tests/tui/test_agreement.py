"""The agreement of scores with judgements: in the app, in reports and in commands."""

import contextlib
import json
import shlex
import sqlite3
from pathlib import Path

import pytest
from click.testing import CliRunner
from textual.screen import Screen

from engine.agreement import Agreement, Point
from engine.config import file as config_file
from engine.config.sections.reward import SOURCE_KEYS
from engine.journal.judgements.labels import Response, set_label
from engine.journal.reader import JournalReader
from engine.metrics import AGREEMENT
from engine.protocol.programs.reward_training import (
    Calibration,
    HeldOutAgreement,
    ScoreScale,
    TrainedReward,
)
from rlhf_tui.cli import cli
from rlhf_tui.commands.reward.training import fork_command
from rlhf_tui.report import html, markdown
from rlhf_tui.report.data import read_report
from rlhf_tui.screens.parts.sample_list import PAGE_SIZE, SampleList
from rlhf_tui.screens.parts.sample_query_line import not_shown_yet, query_line
from rlhf_tui.state.feeds.updates import SessionUpdate
from rlhf_tui.widgets.charts.chart import Chart
from rlhf_tui.widgets.lines import Lines, row_width
from tests.tui.conftest import NOW
from tests.tui.panels import lines_of, make_state

STEPS = 24


@pytest.fixture
def session(session_maker, tmp_path):
    """A session whose labels agree with the scores up to step 12, and contradict them after it."""
    session = session_maker(tmp_path / "sessions", "judged", STEPS)
    with JournalReader(session) as reader:
        rows = reader.samples.newest()
    by_step = {}
    for row in rows:
        by_step.setdefault(row.step, []).append(row)
    for step, responses in by_step.items():
        ranked = sorted(responses, key=lambda r: r.score)
        low, high = ("bad", "good") if step <= 12 else ("good", "bad")
        for row, label in ((ranked[0], low), (ranked[-1], high)):
            set_label(session, row.prompt, Response.of(row), label, "ana")
    return session


def run(session, *arguments):
    where = ["--sessions", str(session.folder.parent)]
    return CliRunner().invoke(cli, [*arguments, *where])


def test_the_command_prints_the_agreement_and_where_it_falls(session):
    found = json.loads(run(session, "reward", "agreement", "judged", "--json").output)
    assert found["judgements"] == 2 * STEPS
    assert found["fall"]["step"] == 13
    assert found["fall"]["before"] > found["fall"]["after"]
    assert [p["step"] for p in found["curve"]] == list(range(1, STEPS + 1))
    lines = run(session, "reward", "agreement", "judged").output.splitlines()
    assert "of 48 judgements" in lines[0] and "less from step 13 on" in lines[0]
    assert lines[-1].split()[0] == "24"


def test_without_judgements_the_command_says_how_to_make_some(session_maker, tmp_path):
    session = session_maker(tmp_path / "sessions", "plain", 3)
    found = run(session, "reward", "agreement", "plain")
    assert found.exit_code == 1
    assert "no judgements to compare" in str(found.exception)
    empty = json.loads(run(session, "reward", "agreement", "plain", "--json").output)
    assert empty == {"judgements": 0, "agreement": None, "fall": None, "curve": []}


def test_a_report_has_the_agreement_as_a_sentence_and_as_a_curve(session):
    report = read_report(session, lambda: NOW)
    for page in (html.page(report), markdown.page(report)):
        assert "of 48 judgements" in page
        assert "less from step 13 on" in page
    assert report.curves[-1].name == AGREEMENT


async def test_the_app_shows_it_on_samples_and_as_a_chart(make_app, running, session, until):
    app = make_app("judged", root=session.folder.parent)
    app.preferences.charts = [AGREEMENT]
    async with running(app) as pilot:
        chart = app.screen.query_one(Chart)
        await until(pilot, lambda: "falls from 13" in chart.text())
        assert "agreement" in chart.text()
        assert AGREEMENT in app.state.curves.drawable
        await pilot.press("3")
        line = app.screen.query_one("#filter", Lines)
        await until(pilot, lambda: "of 48, less from step 13" in line.text())


def test_the_app_shows_it_above_a_full_page_in_80_columns(make_app, session):
    samples = SampleList(Screen(), make_app("judged", root=session.folder.parent))
    samples.new.number = 320
    state = make_state()
    state.take(SessionUpdate(agreement=Agreement(points=[Point(20, 0.5)] * 37)))
    room = 80 - row_width(not_shown_yet(samples, live=True))
    line = query_line(
        samples, state, cursor=0, count=PAGE_SIZE, mode="text", full_screen=False, room=room
    )
    assert row_width(line) <= room
    (shown,) = lines_of([line])
    assert "by step▾   1/500" in shown and "agrees 50% of 37" in shown


async def test_a_damaged_file_of_judgements_hides_nothing_else(make_app, running, session, until):
    session.labels_file.write_bytes(b"no database" * 200)
    app = make_app("judged", root=session.folder.parent)
    app.preferences.charts = [AGREEMENT]
    async with running(app) as pilot:
        await until(pilot, lambda: app.state.head.step == STEPS)
        assert "cannot read" in app.state.agreement.problem
        assert app.state.problem == ""
        await until(pilot, lambda: "cannot read" in app.screen.query_one(Chart).text())


async def test_nothing_of_a_file_of_judgements_reaches_the_terminal_raw(
    make_app, running, session, until
):
    with contextlib.closing(sqlite3.connect(session.labels_file)) as db, db:
        db.execute("PRAGMA writable_schema = ON")
        db.execute("UPDATE sqlite_schema SET name = ?, sql = 'nothing'", ("\x1b]0;映\x07",))
    app = make_app("judged", root=session.folder.parent)
    app.preferences.charts = [AGREEMENT]
    async with running(app, (500, 40)) as pilot:
        chart = app.screen.query_one(Chart)
        await until(pilot, lambda: "cannot read" in chart.text())
        assert "\x1b" in app.state.agreement.problem
        assert "\x1b" not in chart.text()


# -- reward train refuses before anything is loaded ------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "epoch=3"], "did you mean 'epochs'"),
        (["-o", f"{__file__}/deep/out"], "is not a folder"),
    ],
)
def test_wrong_options_are_refused_in_one_line(session, options, message, tmp_path):
    given = ["reward", "train", "judged", "-o", str(tmp_path / "out"), *options]
    found = run(session, *given)
    assert message in str(found.exception)
    assert found.exception.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_not_written_over(session, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    found = run(session, "reward", "train", "judged", "-o", str(tmp_path / "out"))
    assert "exists already" in str(found.exception)


def test_too_few_judgements_are_refused(session_maker, tmp_path):
    session = session_maker(tmp_path / "sessions", "plain", 3)
    found = run(session, "reward", "train", "plain", "-o", str(tmp_path / "out"))
    assert "at least 20 judgements and there are 0" in str(found.exception)
    assert found.exception.exit_code == 2


REWARDS = (
    {"model": "starter:reward"},
    {"model": "org/other", "revision": "main", "label": 3, "pair": True},
    {"function": "rewards:score"},
    {"service": "http://localhost:1/score", "protocol": "openrlhf", "http": {"label_column": "a"}},
    {"judge": "http://localhost:1/v1", "judging": {"model": "judge", "scale": [1, 10]}},
    {"environment": "solved"},
    {"mix": [{"model": "starter:reward"}, {"function": "rewards:score", "weight": 0.5}]},
)


def test_the_rewards_below_are_of_every_kind():
    assert {next(iter(reward)) for reward in REWARDS} == {*SOURCE_KEYS, "mix"}


@pytest.mark.parametrize("reward", REWARDS, ids=lambda reward: next(iter(reward)))
@pytest.mark.parametrize("label", [None, 2])
def test_the_next_command_can_be_pasted_and_names_the_trained_model(
    session, reward, label, tmp_path, monkeypatch
):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    out = str(tmp_path / "rewards, new: #2")
    tree = config_file.to_tree(session.config())
    if "environment" in reward:
        tree |= {"environment": {"factory": "games:Game"}}
    config = config_file.from_mapping(tree | {"reward": reward}, tmp_path)
    held_out = HeldOutAgreement(judgements=5, agreement=0.8, low=0.6, high=0.9)
    result = TrainedReward(
        out=out, base="starter:policy", device="cpu", preferences=20, good=0, other=0,
        trained_on=10, validated_on=5, held_out=5, split_by="prompt", epochs=1, best_epoch=1,
        losses=[], in_force=None, at_start=None, trained=held_out, old_scale=None,
        calibration=Calibration(comparisons=5, stated=0.7, right=0.8, log_loss=0.5),
        new_scale=ScoreScale(0.0, 1.0), label=label, pair=True,
    )  # fmt: skip
    words = shlex.split(fork_command(session, config.reward, result))
    program, verb, name, *options, flag, root = words
    assert (Path(program).name, verb, name, flag) == ("rlhf-tui", "fork", "judged", "--sessions")
    assert root == str(session.folder.parent)
    given = [options[i + 1] for i, word in enumerate(options) if word == "-o"]
    (model,) = config_file.override(config, given).reward.models()
    assert (model.model, model.label, model.pair, model.revision) == (out, label, True, None)
