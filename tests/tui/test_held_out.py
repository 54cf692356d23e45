"""A run with held-out evaluations: curves, responses, phases, status and best checkpoint."""

import contextlib
import json
import math
import random
import sqlite3
from pathlib import Path

import pytest
from click.testing import CliRunner

from engine.config.session_file import enclose
from engine.journal.judgements.labels import LabelReader, Response, set_label
from engine.journal.reader import JournalReader
from engine.journal.samples import SampleQuery, SampleReader
from engine.journal.writer import JournalWriter
from engine.metrics import SCORE
from engine.protocol.rank_messages import Phase, Sample, StepReport
from engine.session.folder import SessionFolder, create
from rlhf_tui.app.app import RlhfApp
from rlhf_tui.cli import cli
from rlhf_tui.format import size
from rlhf_tui.state.feeds.updates import SessionUpdate
from rlhf_tui.state.runs.session_row import read_session_row
from rlhf_tui.state.series import Series
from rlhf_tui.widgets.charts.axis import GUTTER
from rlhf_tui.widgets.charts.chart import Chart
from rlhf_tui.widgets.charts.plot import POINT, Line, Plot, paint
from rlhf_tui.widgets.panels.phases import PhaseStrip
from rlhf_tui.widgets.samples.sample_view import SampleView
from rlhf_tui.widgets.table import Table
from tests.tui.conftest import NOW, config_of, freeze, metrics_of, sample_of
from tests.tui.panels import make_state, text
from tests.tui.screen import cells, notices

EVERY = 20
PROMPTS = ("The best thing about it was", "Nobody told me that")
KEPT = ("I", "never", "saw", "a", "better", "film", "than", "this", "one", "it", "was", "loved")


def evaluation(step: int) -> tuple[dict[str, float], list[Sample]]:
    """Metrics and responses of an evaluation; in each one another word of a response is new."""
    rise = 1 - math.exp(-step / 50)
    metrics = {
        "eval/score": -0.5 + 1.6 * rise, "eval/score_ci": 0.3 - 0.1 * rise, "eval/kl": 8 * rise,
        "time/evaluate": 3.0,
    }  # fmt: skip
    samples = []
    for index, prompt in enumerate(PROMPTS):
        words = [" " + word for word in KEPT]
        words[step // EVERY] = f" really{step}"
        samples.append(
            Sample(
                index=index, prompt=prompt, response="".join(words), score=rise + index,
                kl=8 * rise, length=len(words), ended=True, parts={"judge": 0.5},
            )
        )  # fmt: skip
    return metrics, samples


def make_evaluated(root: Path, steps: int = 60, name: str = "evaluated") -> SessionFolder:
    """A finished run that was evaluated before the first step and every 20."""
    config = config_of(
        **{"train.steps": steps, "train.save_every": EVERY, "eval.every": EVERY,
           "eval.holdout": len(PROMPTS), "train.best_metric": "eval/score"}
    )  # fmt: skip
    session, rng = create(root, name, config), random.Random(5)  # noqa: S311 - no secret
    journal = JournalWriter(session)
    journal.begin_attempt(0, fresh=False)
    journal.set_meta(total_steps=steps, state="running", message="", settings={"beta": 0.05})
    journal.record_evaluation(0, *evaluation(0))
    for step in range(1, steps + 1):
        metrics, samples = metrics_of(step, rng, 0.05), []
        if step % EVERY == 0:
            found, samples = evaluation(step)
            metrics |= found
        trained = [sample_of(i, rng, arrays=False) for i in range(2)]
        journal.record_step(
            StepReport(
                step=step, metrics=metrics, samples=trained, settings={"beta": 0.05},
                evaluated=samples,
            )
        )  # fmt: skip
        if step % EVERY == 0:
            journal.checkpoints.record(step, 49_000_000, -step, 7.5)
            journal.checkpoints.complete(step)
    journal.set_meta(state="finished")
    journal.record_event("state", {"state": "finished", "text": ""})
    journal.close()
    freeze(session)
    return session


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One folder for the tests that only read."""
    root = tmp_path_factory.mktemp("evaluated") / "sessions"
    make_evaluated(root)
    return root


@pytest.fixture
def opened(folder, running):
    """Opens the app on the evaluated run."""

    @contextlib.asynccontextmanager
    async def open_app(size=(120, 40), keys=()):
        app = RlhfApp(folder, "evaluated", now=lambda: NOW, follow=False)
        async with running(app, size) as pilot:
            await pilot.press(*keys)
            yield app, pilot

    return open_app


@pytest.fixture
def held_out(opened, until):
    """Opens the app on the responses to held-out prompts."""

    @contextlib.asynccontextmanager
    async def open_samples(size=(120, 40)):
        async with opened(size, ["3"]) as (app, pilot):
            await until(pilot, lambda: app.screen.query_one(SampleView).sample is not None)
            await pilot.press("E")
            await until(pilot, lambda: app.screen.query_one(Table).count() == 2 * 4)
            yield app, pilot

    return open_samples


# -- charts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(80, 24), (120, 40)])
async def test_held_out_curves_are_beside_those_of_training_from_step_0_on(opened, until, size):
    async with opened(size) as (app, pilot):
        await until(pilot, lambda: "0–60" in app.screen.query(Chart).first().text())
        score, kl, clip = (chart.text() for chart in list(app.screen.query(Chart))[:3])
        last = evaluation(60)[0]
        assert f"{last['eval/score']:.2f} ± {last['eval/score_ci']:.2f}" in score
        assert f"· {POINT}{last['eval/kl']:.2f}" in kl
        for text in (score, kl):
            assert text.splitlines()[-1].strip().startswith("0–60")
            assert sum(row.count(POINT) for row in text.splitlines()[1:]) == 4
        assert POINT not in clip


async def test_the_crosshair_shows_the_evaluation_before_the_first_step(opened, until):
    async with opened(keys=["g"]) as (app, pilot):
        chart = app.screen.query(Chart).first()
        await until(pilot, lambda: "-0.50 ± 0.30" in chart.text())
        assert "step 0" in app.screen.query_one("#cursor").text()


async def test_a_run_without_evaluations_begins_with_step_1_unless_another_is_overlaid(
    run_app, until
):
    async with run_app() as (app, pilot):
        chart = app.screen.query(Chart).first()
        await until(pilot, lambda: "1–200" in chart.text())
        assert POINT not in chart.text()
        chart.view.others["evaluated"] = {"eval/score": Series([(0, 0.5), (100, 1.0)])}
        chart.update()
        assert chart.text().count(POINT) == 2
        assert chart.text().splitlines()[-1].strip().startswith("0–200")
        chart.view.others.clear()
        await pilot.press("3", "E")
        await until(pilot, lambda: any("eval.every" in text for text in notices(app)))


def test_a_sparse_curve_is_connected_also_where_the_window_has_no_point():
    series = Series([(0, 0.0), (50, 1.0), (100, 2.0)])
    lines = [Line(series, "s2", sparse=True)]
    whole = paint(Plot("x", "", 0, 100, lines), 80, 12)
    assert all(any(row[x] != " " for row in whole.chars[1:11]) for x in range(GUTTER, GUTTER + 71))
    assert sum(row.count(POINT) for row in whole.chars) == 3
    between = paint(Plot("x", "", 60, 90, lines), 80, 12)
    assert all(
        any(row[x] != " " for row in between.chars[1:11]) for x in range(GUTTER, GUTTER + 71)
    )
    assert sum(row.count(POINT) for row in between.chars) == 0


def test_intervals_are_bars_that_fit_the_scale_unless_there_is_no_room_between_them():
    points = [(s, 1.0) for s in range(0, 101, 25)]
    wide = Series([(s, 0.8) for s, _ in points])
    line = Line(Series(points), "s2", sparse=True, interval=wide)
    painted = paint(Plot("x", "", 0, 100, [line]), 80, 22)
    assert painted.row_text(1).split()[0] == "2.0"
    assert sum(row[GUTTER] != " " for row in painted.chars[1:21]) > 10
    dense = Series([(s, 1.0) for s in range(101)])
    line = Line(dense, "s2", sparse=True, interval=Series([(s, 0.8) for s in range(101)]))
    painted = paint(Plot("x", "", 0, 100, [line]), 80, 22)
    assert sum(row[GUTTER] != " " for row in painted.chars[1:21]) == 1


def test_an_outline_keeps_the_evaluation_before_the_first_step(folder):
    with JournalReader(SessionFolder(folder / "evaluated")) as reader:
        found = reader.metrics.downsampled(["eval/score", "objective/scores"], 10)
    assert found["eval/score"][0] == (0, pytest.approx(-0.5))
    assert found["eval/score"][-1][0] == 60
    assert found["objective/scores"][0][0] == 1


# -- responses -------------------------------------------------------------------------------------


async def test_one_key_switches_between_held_out_responses_and_those_of_training(held_out, until):
    async with held_out() as (app, pilot):
        table, view = app.screen.query_one(Table), app.screen.query_one(SampleView)
        await until(pilot, lambda: view.sample is not None and view.sample.held_out)
        assert {key[1] for key in table.keys} == {0, 20, 40, 60}
        assert view.sample.prompt in PROMPTS
        assert "judge" in view.text()
        await pilot.press("E")
        await until(pilot, lambda: table.count() == 60 * 2)
        await until(pilot, lambda: view.sample is not None and not view.sample.held_out)
        assert view.sample.prompt not in PROMPTS


async def test_a_held_out_prompt_is_followed_through_time_and_compared_with_the_first(
    held_out, until
):
    async with held_out() as (app, pilot):
        table, view = app.screen.query_one(Table), app.screen.query_one(SampleView)
        await until(pilot, lambda: view.sample is not None and view.sample.held_out)
        await pilot.press("j", "equals_sign")
        await until(pilot, lambda: table.count() == 4)
        assert [key[1:] for key in table.keys] == [(step, 1) for step in (0, 20, 40, 60)]
        await pilot.press("G", "d")
        await until(pilot, lambda: "OTHER, step 40 #1 (1/3)" in view.text())
        await pilot.press("L")
        await until(pilot, lambda: "OTHER, step 0 #1 (3/3)" in view.text())
        assert "y this is better" not in " ".join(view.text().split())
        await pilot.press("escape", "equals_sign")
        await until(pilot, lambda: table.count() == 8)


async def test_held_out_responses_are_not_judged_and_keep_the_labels_of_training_safe(
    running, until, tmp_path
):
    session = make_evaluated(tmp_path / "sessions", 20)
    with JournalReader(session) as reader:
        (trained,) = [r for r in reader.samples.newest() if (r.step, r.index) == (20, 0)]
    set_label(session, trained.prompt, Response.of(trained), "good", "ana on pts/1")
    app = RlhfApp(session.folder.parent, "evaluated", now=lambda: NOW, follow=False)
    async with running(app) as pilot:
        await pilot.press("3", "E")
        view = app.screen.query_one(SampleView)
        await until(pilot, lambda: view.sample is not None and view.sample.held_out)
        sample = view.sample
        assert (sample.attempt, sample.step, sample.index) == (1, 20, 0)  # that of the label, too
        assert sample.judgement is None
        await pilot.press("minus")
        await until(pilot, lambda: any("cannot be judged" in text for text in notices(app)))
        await pilot.press("W", "y", "v")
        await pilot.pause()
        assert view.mode == "text"
    with LabelReader(session) as labels:
        assert [j.judgement.label for j in labels.judgements().values()] == ["good"]


def test_a_session_of_an_earlier_version_has_no_held_out_responses(folder, tmp_path):
    session = make_evaluated(tmp_path / "sessions", 20)
    with contextlib.closing(sqlite3.connect(session.samples_file)) as db, db:
        db.execute("DROP TABLE evaluated")
        db.execute("DROP TABLE evaluated_past")
        db.execute("PRAGMA user_version = 1")
    with SampleReader(session) as samples:
        query = SampleQuery(held_out=True)
        assert samples.page(query, 10) == []
        assert samples.count_after(query, 0) == 0
        assert samples.newest_step(held_out=True) == 0
        assert samples.newest_step() == 20


# -- phases, status, checkpoints -------------------------------------------------------------------


def test_the_strip_has_the_evaluation_in_the_steps_that_have_one():
    state = make_state()
    state.progress.eval_every = 25
    state.take(SessionUpdate(phases=[Phase(rank=0, step=51, name="generate")]))
    assert "evaluate" not in text(PhaseStrip(state), 120, 1)
    state.take(SessionUpdate(phases=[Phase(rank=0, step=75, name="generate")]))
    assert "· optimise · evaluate" in text(PhaseStrip(state), 120, 1)
    curves = {"time/evaluate": [(50, 7.0)]}
    evaluating = Phase(rank=0, step=75, name="evaluate", done=1, total=4)
    state.take(SessionUpdate(phases=[evaluating], curves=curves))
    assert "▶ evaluate  25%" in text(PhaseStrip(state), 120, 1)
    state.take(SessionUpdate(phases=[Phase(rank=0, step=75, name="checkpoint")]))
    assert "✓ evaluate 7.0s" in text(PhaseStrip(state), 120, 1)
    state.take(SessionUpdate(phases=[Phase(rank=0, step=0, name="evaluate", done=1, total=4)]))
    assert "▶ evaluate" in text(PhaseStrip(state), 120, 1)
    assert "generate" not in text(PhaseStrip(state), 120, 1)


def test_the_status_has_the_last_held_out_score(folder):
    result = CliRunner().invoke(cli, ["status", "evaluated", "--sessions", str(folder)])
    last = evaluation(60)[0]
    score = f"{last['eval/score']:.2f} ± {last['eval/score_ci']:.2f}"
    assert f"held-out    {score} (step 60)" in result.output
    arguments = ["status", "evaluated", "--sessions", str(folder), "--json"]
    found = json.loads(CliRunner().invoke(cli, arguments).output)["held_out"]
    assert found["step"] == 60
    assert found["score"] == pytest.approx(last["eval/score"])


def test_the_status_names_the_best_checkpoint_and_the_size_of_the_session(folder):
    arguments = ["status", "evaluated", "--sessions", str(folder)]
    found = json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).output)
    files = [path for path in (folder / "evaluated").rglob("*") if path.is_file()]
    assert found["size"] == sum(path.stat().st_size for path in files)
    assert found["best_checkpoint"] == max(found["checkpoints"])  # the scores rise
    shown = CliRunner().invoke(cli, arguments).output
    assert f"{found['best_checkpoint']} (best)" in shown
    assert size(found["size"]) in shown


def test_the_best_checkpoint_is_listed_without_reading_the_configuration(tmp_path):
    """Of 300 sessions that takes a second and a half."""
    session = make_evaluated(tmp_path, 60, "a")
    row = read_session_row(session, best=True)
    with contextlib.closing(JournalWriter(session)) as journal:
        journal.set_meta(best_metric=session.config().train.best_metric)
    session.config_file.write_text(enclose("no: [configuration\n"))
    assert read_session_row(session, best=True).best_checkpoint == row.best_checkpoint
    assert row.best_checkpoint is not None


def test_several_runs_are_compared_at_the_last_step_that_all_have(tmp_path):
    for name, steps in (("a", 60), ("b", 60), ("c", 50)):
        make_evaluated(tmp_path, steps, name)
    arguments = ["diff", "a", "b", "c", "--sessions", str(tmp_path)]
    found = json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).output)
    assert found["config"] == {"train.steps": [60, 60, 50]}
    assert (found["step"], len(set(found["metrics"][SCORE]))) == (50, 1)
    score = evaluation(40)[0]["eval/score"]
    assert found["held_out"] == {"step": 40, "scores": [pytest.approx(score)] * 3}
    shown = CliRunner().invoke(cli, arguments).output
    assert shown.splitlines()[1].split() == ["train.steps", "60", "60", "50"]
    assert shown.splitlines()[-1].split() == ["eval/score", "@", "40", *[f"{score:.3f}"] * 3]


def test_entries_of_lists_are_compared_key_by_key(tmp_path):
    def mix(*entries):
        return f"[{', '.join(f'{{function: a:b, weight: {w}, name: {n}}}' for n, w in entries)}]"

    for name, entries in (("a", [("x", 1)]), ("b", [("x", 2), ("y", 1)])):
        create(tmp_path, name, config_of(**{"reward.model": "null", "reward.mix": mix(*entries)}))
    shown = CliRunner().invoke(cli, ["diff", "a", "b", "--sessions", str(tmp_path)]).output
    rows = {line.split()[0]: line.split(maxsplit=1)[1] for line in shown.splitlines()[1:]}
    assert rows["reward.mix[0].weight"].split() == ["1", "2"]
    assert rows["reward.mix[1]"].split(maxsplit=1) == ["–", "{function: a:b, name: y}"]
    assert "reward.mix[0].name" not in rows


async def test_the_best_checkpoint_is_marked_by_the_metric_of_the_configuration(opened, until):
    async with opened((80, 24), ["4"]) as (app, pilot):
        table = app.screen.query_one(Table)
        await until(pilot, lambda: table.count() == 3)
        assert [cells(table, i)[-1] for i in range(3)] == ["last, best", "", ""]
        assert "best by held-out score: step 60" in app.screen.query_one("#best").text()


def test_guard_rails_are_evaluated_beyond_the_evaluation_before_the_first_step(folder, tmp_path):
    rules = tmp_path / "rules.yaml"
    rules.write_text("defaults: false\nrules: [{name: often, metric: lr, above: 0.0}]\n")
    given = ["guardrails", "evaluated", "--rules", str(rules), "--sessions", str(folder)]
    assert "step 1  often" in CliRunner().invoke(cli, given).output
