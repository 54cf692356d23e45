"""Guard rails over recorded steps: as the engine that recorded them, whatever came in between."""

import asyncio
import contextlib
import sqlite3

import pytest

from engine.config import file as config_file
from engine.config.sections.supervision import GuardrailConfig, Rule
from engine.journal.reader import JournalReader
from engine.launch.start import StartOptions
from engine.metrics import BETA, LEARNING_RATE, STEP_TIME
from engine.monitoring import recorded_steps
from engine.monitoring.guardrails import Guardrails
from engine.monitoring.recorded_steps import evaluate, rebuild
from engine.protocol.commands import Stop
from engine.protocol.rank_messages import REWARD_CHANGED, Notice, StepReport
from tests.engine.supervised import Engine

RULES = (
    Rule(name="bound", metric="m", above=6.0, clears_after=2),
    Rule(name="fall", metric="m", falls=0.5, window=3),
    Rule(name="drift", metric="m", drifts_up=0.5, window=4),
    Rule(name="action", metric="m", above=6.0, action="pause"),
)
SERIES = [4.0, 4.2, 4.0, 4.2, 7.0, 4.0, 7.5, 1.0, 4.0, 7.0, 7.0, 13.0, 13.0, 13.0, 4.0, 4.0, 7.0]


@pytest.fixture
def run(make_session, write_in):
    """A supervisor without ranks, and its journal, in which an attempt has begun."""
    overrides = ("guardrails.defaults=false", "log.tensorboard=false")
    rule = "{name: high, metric: m, above: 2, of: target}"
    writer = write_in(make_session("watched", *overrides, f"guardrails.rules=[{rule}]"))
    writer.journal.begin_attempt(0, fresh=False)
    yield writer
    writer.journal.close()


def take(engine, first, *values, settings=None, **metrics):
    """Hands steps to a supervisor, as its rank 0 reports them."""
    for step, value in enumerate(values, start=first):
        reported = {"m": value, BETA: 0.1, LEARNING_RATE: 1e-5, STEP_TIME: 1.0} | metrics
        settings = settings or engine.shared.settings
        engine.receive(StepReport(step=step, metrics=reported, samples=[], settings=settings))


def start_again(engine, run, step):
    """What a supervisor does when ranks start from a checkpoint."""
    run.journal.begin_attempt(step, fresh=False)
    with JournalReader(run.session) as record:
        engine.supervisor.rank_messages.guardrails = rebuild(record, run.session.config(), step)


def recorded(run):
    """Rule and step of each alert of the current timeline, and whether evaluation agrees."""
    with JournalReader(run.session) as record:
        config = run.session.config()
        again = [(alert.rule, alert.step) for alert in evaluate(record, config.guardrails, config)]
        raised = record.raised_alerts()
    assert again == [(rule, step) for step in sorted(raised) for rule in sorted(raised[step])]
    return again


@pytest.mark.parametrize("last", range(len(SERIES)))
def test_steps_that_are_taken_again_leave_the_state_that_they_left_before(last):
    steps = list(enumerate(SERIES, start=1))
    config = GuardrailConfig(defaults=False, rules=list(RULES))
    before, after = Guardrails(config), Guardrails(config)
    alerts = [a for step, value in steps for a in before.check(step, {"m": value}, {})]
    for step, value in steps[:last]:
        raised = [alert.rule for alert in alerts if alert.step == step]
        after.repeat(step, {"m": value}, {}, raised)
    later = [a for step, value in steps[last:] for a in after.check(step, {"m": value}, {})]
    assert {alert.rule for alert in alerts} == {rule.name for rule in RULES}
    assert later == [alert for alert in alerts if alert.step > last]


async def test_a_resume_neither_repeats_an_alert_nor_forgets_when_it_clears(run, monkeypatch):
    monkeypatch.setattr(recorded_steps, "CHUNK", 4)
    engine = Engine(run)
    take(engine, 1, 9, 13, *[1] * 18)
    start_again(engine, run, 20)
    take(engine, 21, 1, 13, *[1] * 20, 13)
    assert recorded(run) == [("high", 2), ("high", 43)]


async def begun(run):
    """An engine that has begun an attempt after step 1, and was stopped at once."""
    engine = Engine(run)
    attempt = asyncio.create_task(engine.supervisor.attempt(StartOptions(from_step=1)))
    async with asyncio.timeout(60):
        while not engine.supervisor.ranks.token:  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0)
    engine.send(Stop(now=True))
    await attempt
    return engine


async def test_an_attempt_begins_with_what_its_timeline_has_raised(run):
    take(Engine(run), 1, 13, 13)
    engine = await begun(run)
    assert engine.supervisor.rank_messages.guardrails.check(2, {"m": 13.0}, {"target": 5.0}) == []


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
    new = Rule(name="new", metric="m", above=0.0)
    config = run.session.config()
    with JournalReader(run.session) as record:
        config.guardrails.rules.append(new)
        rails = rebuild(record, config, 3)
    (alert,) = rails.check(4, {"m": 1.0}, {"target": 6.0})
    assert (alert.rule, alert.count) == ("new", 1)


def test_a_rule_with_an_action_acts_again_on_ranks_that_start_and_others_stay_quiet():
    rules = [Rule(name=name, metric="m", above=1.0, action=name) for name in ("notify", "pause")]
    rails = Guardrails(GuardrailConfig(defaults=False, rules=rules))
    rails.check(1, {"m": 2.0}, {})
    rails.begin_attempt()
    assert [(a.rule, a.count) for a in rails.check(2, {"m": 2.0}, {})] == [("pause", 2)]


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
    with JournalReader(run.session) as record:
        alerts = evaluate(record, GuardrailConfig(defaults=False, rules=[rule]), config)
        assert list(alerts) == []


async def test_steps_that_cannot_be_read_do_not_end_a_run(run):
    take(Engine(run), 1, 13)
    connection = sqlite3.connect(run.session.journal_file)
    with contextlib.closing(connection), connection:
        connection.execute("INSERT INTO events SELECT 99, 0.0, 1, 1, 'alert', '{'")
    await begun(run)
    with JournalReader(run.session) as record:
        alert = record.last_alert()
    assert alert is not None
    assert "guard rails begin without the steps before" in alert.data
