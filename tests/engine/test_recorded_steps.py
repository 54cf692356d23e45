"""Guard rails over recorded steps: as the engine that recorded them, whatever came in between."""

import contextlib
import dataclasses
import math
import random
import sqlite3
import tracemalloc

import pytest
from msgspec.structs import replace

from engine.config import file as config_file
from engine.config.sections.supervision import GuardrailConfig, Rule
from engine.journal.reader import JournalReader
from engine.launch.start_options import StartOptions
from engine.metrics import BETA, EVAL_KL, EVAL_SCORE, LEARNING_RATE, STEP_TIME
from engine.monitoring import recorded_steps
from engine.monitoring.guardrails import Guardrails
from engine.monitoring.recorded_steps import evaluate, rebuild
from engine.protocol.commands import Stop
from engine.protocol.rank_messages import REWARD_CHANGED, EvaluationReport, Notice, StepReport
from tests.engine.supervised import Engine, starting_attempt

RULES = (
    Rule(name="bound", metric="m", above=6.0, clears_after=2),
    Rule(name="fall", metric="m", falls=0.5, window=3),
    Rule(name="drift", metric="m", drifts_up=0.5, window=4),
    Rule(name="action", metric="m", above=6.0, action="pause"),
)
JUDGES = (EVAL_SCORE,)
SERIES = [4.0, 4.2, 4.0, 4.2, 7.0, 4.0, 7.5, 1.0, 4.0, 7.0, 7.0, 13.0, 13.0, 13.0, 4.0, 4.0, 7.0]


@pytest.fixture
def run(make_session, write_in):
    """A supervisor without ranks, and its journal, in which an attempt has begun."""
    overrides = ("guardrails.defaults=false", "log.tensorboard=false")
    rule = "{name: high, metric: reward/m, above: 2, of: target}"
    writer = write_in(make_session("watched", *overrides, f"guardrails.rules=[{rule}]"))
    writer.journal.begin_attempt(0, fresh=False)
    yield writer
    writer.journal.close()


def take(engine, first, *values, settings=None, **metrics):
    """Hands steps to a supervisor, as its rank 0 reports them."""
    for step, value in enumerate(values, start=first):
        reported = {"reward/m": value, BETA: 0.1, LEARNING_RATE: 1e-5, STEP_TIME: 1.0} | metrics
        settings = settings or engine.shared.settings
        engine.receive(StepReport(step=step, metrics=reported, samples=[], settings=settings))


def start_again(engine, run, step):
    """What a supervisor does when ranks start from a checkpoint."""
    run.journal.begin_attempt(step, fresh=False)
    with JournalReader(run.session) as reader:
        engine.supervisor.rank_messages.guardrails = rebuild(reader, run.session.config(), step)


def recorded(run):
    """Rule and step of each alert of the current timeline, and whether evaluation agrees."""
    with JournalReader(run.session) as reader:
        config = run.session.config()
        again = [(alert.rule, alert.step) for alert in evaluate(reader, config.guardrails, config)]
        raised = reader.raised_alerts()
    assert again == [(rule, step) for step in sorted(raised) for rule in sorted(raised[step])]
    return again


def record(run, config, steps, new_rewards=()):
    """Writes steps and the alerts on them as an engine does; returns the alerts.

    `steps`: (metrics, settings) of each, from step 1; `new_rewards`: steps with another reward.
    """
    rails, alerts = Guardrails(config, JUDGES), []
    for step, (metrics, settings) in enumerate(steps, start=1):
        if step in new_rewards:
            rails.forget_steps()
            run.journal.record_event("alert", {"rule": REWARD_CHANGED, "text": ""}, step - 1)
        report = StepReport(step=step, metrics=metrics, samples=[], settings=settings)
        run.journal.record_step(report)
        for alert in rails.check(step, metrics, settings):
            run.journal.record_event("alert", alert.as_data(), step)
            alerts.append(alert)
    return alerts


def taken_again(config, steps, last, alerts, new_rewards=()):
    """Guard rails that observe every step up to `last`, with the alerts that were raised then."""
    rails = Guardrails(config, JUDGES)
    for step, (metrics, settings) in enumerate(steps[:last], start=1):
        if step in new_rewards:
            rails.forget_steps()
        for state in rails.states:
            breach = state.observe(step, metrics, settings) if state.is_known(metrics) else None
            if (state.rule.name, step) in alerts:
                state.raised(step, breach)
    rails.begin_attempt()
    return rails


def later(rails, steps, last):
    """The alerts on the steps after `last`, without where they began.

    Of a rule that was changed, the journal has where the alerts of the rule as it was began.
    """
    following = enumerate(steps[last:], start=last + 1)
    alerts = [alert for step, taken in following for alert in rails.check(step, *taken)]
    return [dataclasses.replace(alert, began=0) for alert in alerts]


def test_rebuilt_rules_continue_as_if_they_had_seen_every_step(run):
    config = GuardrailConfig(defaults=False, rules=list(RULES))
    steps = [({"m": value, BETA: 0.1}, {}) for value in SERIES]
    alerts = record(run, config, steps)
    assert {alert.rule for alert in alerts} == {rule.name for rule in RULES}
    taken = {(alert.rule, alert.step) for alert in alerts}
    alerts = [dataclasses.replace(alert, began=0) for alert in alerts]
    run_config = replace(run.session.config(), guardrails=config)
    with JournalReader(run.session) as reader:
        for last in range(len(SERIES)):
            expected = [alert for alert in alerts if alert.step > last and alert.action == "notify"]
            found = later(rebuild(reader, run_config, last), steps, last)
            assert [alert for alert in found if alert.action == "notify"] == expected
            observed = taken_again(config, steps, last, taken)
            assert rebuild(reader, run_config, last).first_alerts() == observed.first_alerts()


def random_rule(rng, name):
    """A rule with a random condition, over a metric that is not there at each step."""
    keys = {
        "above": rng.choice([0.5, 1.0, 2.0]), "below": rng.choice([-1.0, 0.0]), "rises": 0.5,
        "falls": 0.5, "drifts_up": 0.3, "drifts_down": 0.3, "predicted_above": 1.5, "diverges": 0.5,
    }  # fmt: skip
    key = rng.choice([*keys])
    bound = key in ("above", "below", "predicted_above")
    window = rng.randint(3, 8)
    return Rule(
        name=name, metric=rng.choice(["m", "n"]), window=window,
        lasts=rng.randint(1, 3) if key in ("above", "below") else 1,
        of=rng.choice([None, "target", "beta"]) if bound else None,
        clears_after=rng.choice([None, 1, 2, 5]), action=rng.choice(["notify", "notify", "pause"]),
        **{key: keys[key]},
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_rebuilt_rules_are_those_that_have_seen_every_step(run, monkeypatch, seed):
    rng = random.Random(seed)  # noqa: S311 - no secret
    monkeypatch.setattr(recorded_steps, "CHUNK_STEPS", rng.choice([1, 7, 1000]))
    rules = [random_rule(rng, f"rule {n}") for n in range(12)]
    rules += [Rule(name="any", metric="*"), Rule(name="all", metric="*", action="pause")]
    changed = [random_rule(rng, r.name) if rng.random() < 0.5 else r for r in rules]
    steps, level, count = [], 1.0, rng.randint(20, 120)
    for _ in range(count):
        level += rng.gauss(0, 0.3)
        value = math.nan if rng.random() < 0.05 else level + rng.gauss(0, 0.2)
        metrics = {"m": value, BETA: rng.choice([0.5, 1.0])}
        metrics |= {"n": -level} if rng.random() < 0.4 else {}
        metrics |= {EVAL_SCORE: 2 - level} if rng.random() < 0.4 else {}
        # As in the journal: that of the configuration, and beta from its metric.
        steps.append((metrics, {"target": 2.0, "beta": metrics[BETA]}))
    new_rewards = {rng.randint(2, count)} if rng.random() < 0.5 else set()
    raised = record(run, GuardrailConfig(defaults=False, rules=rules), steps, new_rewards)
    alerts = {(alert.rule, alert.step) for alert in raised}
    config = GuardrailConfig(defaults=False, rules=changed)
    changed_run = replace(run.session.config(), guardrails=config)
    changed_run = replace(changed_run, kl=replace(changed_run.kl, target=2.0))
    for last in {rng.randint(0, count) for _ in range(8)}:
        with JournalReader(run.session) as reader:
            rails = rebuild(reader, changed_run, last)
        expected = taken_again(config, steps, last, alerts, new_rewards)
        assert later(rails, steps, last) == later(expected, steps, last)


async def test_a_resume_neither_repeats_an_alert_nor_forgets_when_it_clears(run, monkeypatch):
    monkeypatch.setattr(recorded_steps, "CHUNK_STEPS", 4)
    engine = Engine(run)
    take(engine, 1, 9, 13, *[1] * 18)
    start_again(engine, run, 20)
    take(engine, 21, 1, 13, *[1] * 20, 13)
    assert recorded(run) == [("high", 2), ("high", 43)]


async def begun(run):
    """An engine that has begun an attempt after step 1, and was stopped at once."""
    engine = Engine(run)
    attempt = await starting_attempt(engine, StartOptions(from_step=1))
    engine.send(Stop(now=True))
    await attempt
    return engine


async def test_steps_evaluated_again_show_their_worst_samples_and_never_hold_all_of_them(run):
    engine, size = Engine(run), 20_000
    for step in range(1, 201):
        samples = [run.sample(step, i, kl=float(i), response=f"{i}" * size) for i in range(2)]
        metrics = {"reward/m": 13.0 * (step == 50), BETA: 0.1, STEP_TIME: 1.0}
        report = StepReport(
            step=step, metrics=metrics, samples=samples, settings=engine.shared.settings
        )
        engine.receive(report)
    config = run.session.config()
    with JournalReader(run.session) as reader:
        (first,) = (e.as_json() for e in reader.events() if e.kind == "alert")
        tracemalloc.start()
        try:
            (again,) = evaluate(reader, config.guardrails, config)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert again.evidence["samples"] == first["samples"]
    assert len(first["samples"]) == 2
    assert peak < 100 * size


async def test_an_attempt_begins_with_what_its_timeline_has_raised(run):
    take(Engine(run), 1, 13, 13)
    engine = await begun(run)
    assert (
        engine.supervisor.rank_messages.guardrails.check(2, {"reward/m": 13.0}, {"target": 5.0})
        == []
    )


async def test_an_alert_of_an_abandoned_branch_does_not_silence_the_next_one(run):
    engine = Engine(run)
    take(engine, 1, 13, *[1] * 20, 13, 13)
    start_again(engine, run, 21)
    take(engine, 22, 1, 14)
    assert recorded(run) == [("high", 1), ("high", 23)]


async def test_a_rule_that_is_new_raises_its_first_alert_although_it_has_held_for_long(run):
    engine = Engine(run)
    take(engine, 1, 1, 1, 1)
    run.journal.begin_attempt(3, fresh=False)
    new = Rule(name="new", metric="reward/m", above=0.0)
    config = run.session.config()
    with JournalReader(run.session) as reader:
        config.guardrails.rules.append(new)
        rails = rebuild(reader, config, 3)
    (alert,) = rails.check(4, {"reward/m": 1.0}, {"target": 6.0})
    assert (alert.rule, alert.count) == ("new", 1)


def test_a_rule_with_an_action_acts_again_on_ranks_that_start_and_others_stay_quiet():
    rules = [Rule(name=name, metric="m", above=1.0, action=name) for name in ("notify", "pause")]
    rails = Guardrails(GuardrailConfig(defaults=False, rules=rules))
    rails.check(1, {"m": 2.0}, {})
    rails.begin_attempt()
    assert [(a.rule, a.count) for a in rails.check(2, {"m": 2.0}, {})] == [("pause", 2)]


async def test_a_rule_sees_an_evaluation_that_was_made_up_for(make_session, write_in):
    rules = "guardrails.rules=[{name: held_out, metric: eval/score, below: 0}]"
    writer = write_in(make_session("late", "guardrails.defaults=false", rules))
    writer.journal.begin_attempt(0, fresh=False)
    engine = Engine(writer)
    take(engine, 1, 1.0, **{EVAL_SCORE: 1.0})
    take(engine, 2, 1.0)
    engine.receive(EvaluationReport(metrics={EVAL_SCORE: -1.0}, samples=[], step=2))
    take(engine, 3, 1.0, **{EVAL_SCORE: -1.0})
    assert recorded(writer) == [("held_out", 2)]
    writer.journal.close()


async def test_a_made_up_evaluation_is_judged_by_the_settings_of_its_step(make_session, write_in):
    rules = "guardrails.rules=[{name: held_out, metric: eval/kl, above: 1, of: target}]"
    writer = write_in(make_session("late", "guardrails.defaults=false", rules))
    writer.journal.begin_attempt(0, fresh=False)
    engine = Engine(writer)
    target = engine.shared.settings["target"]
    take(engine, 1, 1.0, settings=engine.shared.settings | {"target": target / 4})
    writer.change("c", 2, target, target / 4, "target")
    engine.receive(EvaluationReport(metrics={EVAL_KL: target / 2}, samples=[], step=1))
    assert recorded(writer) == []
    writer.journal.close()


async def test_the_scores_of_another_reward_begin_anew(run):
    engine = Engine(run)
    take(engine, 1, 13, 13)
    start_again(engine, run, 2)
    engine.receive(Notice(step=2, rule=REWARD_CHANGED, text="another one"))
    take(engine, 3, 13, 13)
    assert recorded(run) == [("high", 1), ("high", 3)]


async def test_a_bound_is_that_of_the_setting_in_each_step(run):
    engine = Engine(run)
    target = engine.shared.settings["target"]
    take(engine, 1, 1.5 * target)
    run.change("c", 2, target, target / 2, "target")
    engine.shared.settings = engine.shared.settings | {"target": target / 2}
    take(engine, 2, 1.5 * target)
    resumed = config_file.override(run.session.config(), [f"kl.target={target / 2}"])
    run.session.write_config(resumed)
    assert recorded(run) == [("high", 2)]


async def test_a_bound_of_a_setting_that_was_changed_twice_begins_with_its_first_value(run):
    engine = Engine(run)
    target = engine.shared.settings["target"]
    for step, part, score in ((1, 1, 1.5), (2, 2, 0.9), (3, 4, 0.9)):
        if step > 1:
            run.change(f"c{step}", step, 2 * target / part, target / part, "target")
            engine.shared.settings = engine.shared.settings | {"target": target / part}
        take(engine, step, score * target)
    resumed = config_file.override(run.session.config(), [f"kl.target={target / 4}"])
    run.session.write_config(resumed)
    assert recorded(run) == [("high", 3)]


async def test_a_reward_of_an_abandoned_branch_is_no_other_one_in_the_timeline(run):
    engine = Engine(run)
    take(engine, 1, 1, 1, 13)
    start_again(engine, run, 3)
    engine.receive(Notice(step=3, rule=REWARD_CHANGED, text="another one"))
    take(engine, 4, 1, 1)
    start_again(engine, run, 2)
    take(engine, 3, 13, 13, 13)
    assert recorded(run) == [("high", 3)]


async def test_a_bound_is_not_that_of_a_setting_that_only_an_abandoned_branch_had(run):
    engine = Engine(run)
    target = engine.shared.settings["target"]
    take(engine, 1, 1.5 * target)
    run.change("c", 2, target, target / 2, "target")
    resumed = config_file.override(run.session.config(), [f"kl.target={target / 2}"])
    run.session.write_config(resumed)
    run.journal.begin_attempt(1, fresh=True)
    take(engine, 2, 1.5 * target)
    assert recorded(run) == []


async def test_a_multiple_of_the_learning_rate_is_one_of_the_setting_whatever_the_schedule(run):
    take(Engine(run), 1, 1)
    rule = Rule(name="r", metric=LEARNING_RATE, above=0.9, of="learning_rate")
    config = config_file.override(run.session.config(), ["train.learning_rate=2e-5"])
    with JournalReader(run.session) as reader:
        alerts = evaluate(reader, GuardrailConfig(defaults=False, rules=[rule]), config)
        assert list(alerts) == []


async def test_steps_that_cannot_be_read_do_not_end_a_run(run):
    take(Engine(run), 1, 13)
    connection = sqlite3.connect(run.session.journal_file)
    with contextlib.closing(connection), connection:
        connection.execute("INSERT INTO events SELECT 99, 0.0, 1, 1, 'alert', '{'")
    await begun(run)
    with JournalReader(run.session) as reader:
        alert = reader.last_alert()
    assert alert is not None
    assert "guard rails begin without the steps before" in alert.data
