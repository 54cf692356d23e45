"""Guard rails: when a rule raises an alert, what the alert holds, and that it is not repeated."""

import math
import pickle
from typing import get_args, get_type_hints

import msgspec
import pytest

from engine.config.mistakes import raise_mistakes
from engine.config.rules.supervision import rule_mistakes
from engine.config.schema import RunConfig
from engine.config.sections.supervision import RULE_CONDITIONS, GuardrailConfig, Rule
from engine.config.settings import LIVE_SETTINGS
from engine.errors import ConfigError
from engine.monitoring.conditions import CONDITIONS
from engine.monitoring.divergence import judges_of
from engine.monitoring.guardrails import (
    DEFAULT_RULES,
    Alert,
    Guardrails,
    sample_evidence,
    worst_samples,
)
from engine.protocol.rank_messages import Sample
from engine.supervisor.commands.command_handler import ACTIONS


def rails(*rules, defaults=False):
    return Guardrails(GuardrailConfig(defaults=defaults, rules=list(rules)))


def config_of(reward, evaluation):
    """A configuration with a reward and an evaluation."""
    run = {"model": {"policy": "p"}, "data": {"prompts": "d"}}
    return msgspec.convert(run | {"reward": reward, "eval": evaluation}, RunConfig)


def alert_steps(guardrails, values, metric="m", settings=None):
    """The steps at which a series of values raised an alert."""
    return [
        step
        for step, value in enumerate(values, start=1)
        if guardrails.check(step, {metric: value}, settings or {})
    ]


def sample(index, score=0.0, kl=0.0, length=1):
    return Sample(
        index=index, prompt="p", response="r", score=score, kl=kl, length=length, ended=True
    )


def test_a_metric_that_swings_around_its_limit_raises_one_alert_until_it_is_well_for_a_while():
    rule = Rule(name="high", metric="m", above=1.0, clears_after=3)
    assert alert_steps(rails(rule), [0, 2, 1, 0, 2, 0, 0, 2, 0, 0, 0, 2]) == [2, 12]
    default = rails(Rule(name="high", metric="m", above=1.0))
    assert alert_steps(default, [2, *[0] * 19, 2, *[0] * 20, 2]) == [1, 42]


def test_a_metric_that_swings_wider_and_wider_raises_another_alert():
    rule = Rule(name="high", metric="m", above=6.0)
    assert alert_steps(rails(rule), [7, 0, 11, 0, 13, 0, 19, 0, 30]) == [1, 5, 9]


def test_the_first_of_the_alerts_that_have_not_cleared_is_known():
    rule = Rule(name="high", metric="m", above=6.0, clears_after=2)
    pausing = Rule(name="pauses", metric="m", above=20.0, action="pause")
    guardrails = rails(rule, pausing)
    alerts = {}
    for step, value in enumerate([7, 13, 30, 0, 0, 30, 7], start=1):
        if step == 4:
            guardrails.begin_attempt()  # after the pause; the alert is still the same
        for alert in guardrails.check(step, {"m": value}, {}):
            alerts[alert.rule, step] = alert.as_data().get("began")
        alerts[step] = guardrails.first_alerts()
    assert [alerts[step] for step in range(1, 8)] == [[1], [1], [1, 3], [1], [], [6], [6]]
    assert (alerts["high", 1], alerts["high", 2]) == (None, 1)


@pytest.mark.parametrize("action", ["checkpoint", "pause", "stop"])
def test_a_rule_with_an_action_acts_whenever_its_condition_begins_to_hold(action):
    rule = Rule(name="high", metric="m", above=1.0, action=action)
    assert alert_steps(rails(rule), [2, 2, 0, 2]) == [1, 4]
    patient = Rule(name="high", metric="m", above=1.0, action=action, clears_after=2)
    assert alert_steps(rails(patient), [2, 0, 2, 0, 0, 2]) == [1, 6]


def test_steps_without_the_metric_neither_end_a_condition_nor_clear_its_alert():
    rule = Rule(name="high", metric="eval/kl", above=1.0, clears_after=2)
    values = [2, None, 2, 0, None, math.nan, 2, 0, None, 0, 2]
    assert alert_steps(rails(rule), values, metric="eval/kl") == [1, 11]


def test_a_later_alert_says_which_one_it_is_and_when_the_last_one_was():
    guardrails = rails(Rule(name="high", metric="m", above=6.0, clears_after=1))
    alerts = [
        alert
        for step, value in enumerate([7, 12, 0, 7], start=1)
        for alert in guardrails.check(step, {"m": value}, {})
    ]
    assert [alert.text for alert in alerts] == [
        "m is 7, above 6",
        "m is 12, above 6; alert 2, twice as far beyond the limit as at step 1",
        "m is 7, above 6; alert 3, the last one was at step 2",
    ]
    assert [alert.as_data()["count"] for alert in alerts] == [1, 2, 3]
    assert alerts[2].cause == "high at step 4: m 7 > 6"


@pytest.mark.parametrize(
    ("rule", "values", "steps"),
    [
        (
            Rule(name="r", metric="m", above=6.0),
            [7, 11.9, 12, 17, 18, 29, 30, 30, 44],
            [1, 3, 5, 7],
        ),
        (Rule(name="r", metric="m", above=6.0), [6.001, 6.01, 6.1, 8, 11], [1]),
        (Rule(name="r", metric="m", below=4.0), [3, 1, 0, -4, -4], [1, 3, 4]),
        (Rule(name="r", metric="m", above=0.0), [1, 1, 2, 3, 4], [1, 3, 5]),
        (Rule(name="r", metric="m", rises=0.5, window=2), [4, 4, 8, 18], [3, 4]),
        (Rule(name="r", metric="m", below=0.0), [0.1, 0, -0.001, 0.1, -0.01, -0.1, -0.2], [3, 7]),
        (
            Rule(name="r", metric="m", below=0.05, lasts=3),
            [0.049, 0.048, 0.047, -0.1, 0.03, 0.02, -0.1, -0.1],
            [3, 8],
        ),
    ],
)
def test_a_rule_alerts_again_when_the_distance_beyond_its_limit_has_doubled(rule, values, steps):
    assert alert_steps(rails(rule), values) == steps


def test_an_alert_says_in_brief_what_a_status_line_shows():
    rule = Rule(name="kl_runs_away", metric="objective/kl", above=2.0, of="target")
    (alert,) = rails(rule).check(4, {"objective/kl": 7.261}, {"target": 3.0})
    assert alert.text == "objective/kl is 7.261, above 2 × target (3)"
    assert alert.cause == "kl_runs_away at step 4: KL 7.261 > 6"
    assert alert.as_data()["brief"] == "KL 7.261 > 6"


def test_a_value_equal_to_a_threshold_raises_no_alert():
    assert alert_steps(rails(Rule(name="r", metric="m", above=1.0, below=-1.0)), [1, -1, -1.1]) == [
        3
    ]


def test_a_bound_may_be_a_multiple_of_a_setting():
    rule = Rule(name="kl", metric="m", above=2.0, of="target")
    assert alert_steps(rails(rule), [11, 13], settings={"target": 6.0}) == [2]


@pytest.mark.parametrize(("value", "state"), [(None, "unset"), (0, "0"), (0.0, "0")])
def test_a_bound_relative_to_an_unset_setting_is_not_an_absolute_one(value, state):
    guardrails = rails(Rule(name="kl", metric="m", above=2.0, of="stop_kl", action="stop"))
    (notice,) = guardrails.check(1, {"m": 9.0}, {"stop_kl": value})
    assert (notice.rule, notice.action) == ("kl", "notify")
    assert "rule kl cannot be evaluated" in notice.text
    assert notice.text.endswith(f"it is relative to stop_kl, which is {state}")
    assert guardrails.check(2, {"m": 9.0}, {"stop_kl": value}) == []
    (alert,) = guardrails.check(3, {"m": 9.0}, {"stop_kl": 1.0})
    assert (alert.action, "above 2" in alert.text) == ("stop", True)


def test_ranks_that_start_are_told_again_of_a_rule_that_cannot_be_evaluated():
    guardrails = rails(Rule(name="kl", metric="m", above=2.0, of="stop_kl"))
    taken = {"m": 9.0}, {"stop_kl": None}
    assert [len(guardrails.check(step, *taken)) for step in (1, 2)] == [1, 0]
    guardrails.begin_attempt()
    assert [len(guardrails.check(step, *taken)) for step in (3, 4)] == [1, 0]


def test_a_condition_that_needs_no_setting_is_evaluated_without_it():
    rule = Rule(name="r", metric="m", above=9.0, of="beta", falls=0.5, window=2)
    assert alert_steps(rails(rule), [4, 4, 1], settings={"beta": 0.0}) == [1, 3]


@pytest.mark.parametrize("setting", LIVE_SETTINGS)
def test_a_bound_may_be_a_multiple_of_every_setting_that_is_a_number(setting):
    rule = Rule(name="r", metric="m", above=1.0, of=setting)
    if setting in ("controller", "loss_aggregation"):
        with pytest.raises(ConfigError, match="must be one of"):
            raise_mistakes(rule_mistakes(rule))
    else:
        raise_mistakes(rule_mistakes(rule))


def test_each_condition_of_a_rule_has_its_key_and_its_function():
    assert set(CONDITIONS) == set(RULE_CONDITIONS)
    assert set(CONDITIONS) <= set(Rule.__struct_fields__)
    for key in CONDITIONS:
        raise_mistakes(rule_mistakes(Rule(name="r", metric="m", **{key: 1.0})))


def test_every_action_of_a_rule_but_to_notify_is_a_command():
    assert set(get_args(get_type_hints(Rule)["action"])) == {"notify", *ACTIONS}
    with pytest.raises(ConfigError, match="needs one of above, below, predicted_above, falls"):
        raise_mistakes(rule_mistakes(Rule(name="r", metric="m")))


@pytest.mark.parametrize(
    ("rule", "values", "steps"),
    [
        (Rule(name="r", metric="m", falls=0.5, window=3), [4, 4, 4, 2.1, 1.0], [5]),
        (Rule(name="r", metric="m", rises=0.5, window=3), [4, 4, 4, 5.9, 8.0], [5]),
        (Rule(name="r", metric="m", falls=0.5, window=3), [4, 4, 1], []),
        (Rule(name="r", metric="m", falls=0.5, window=2), [-4, -4, -8.0], [3]),
        (Rule(name="r", metric="m", rises=0.5, window=2), [0, 0, 9], []),
    ],
)
def test_a_change_is_measured_against_the_mean_of_a_full_window(rule, values, steps):
    assert alert_steps(rails(rule), values) == steps


def test_a_missing_or_non_finite_value_raises_no_alert_and_enters_no_window():
    rule = Rule(name="r", metric="m", falls=0.5, window=2)
    assert alert_steps(rails(rule), [4, math.nan, None, 4, 1]) == [5]


def test_any_metric_that_is_not_finite_pauses_by_default():
    (alert,) = Guardrails(GuardrailConfig()).check(3, {"a": 1.0, "b": math.inf, "c": math.nan}, {})
    assert (alert.rule, alert.action, alert.step) == ("non_finite", "pause", 3)
    assert "b, c not finite" in alert.text


def test_by_default_only_non_finite_values_do_more_than_notify():
    acting = {r.metric for r in DEFAULT_RULES if r.action != "notify"}
    assert acting <= {"*", "policy/nonfinite_updates"}


def test_a_configured_rule_replaces_the_default_of_its_name():
    rule = Rule(name="kl_high", metric="objective/kl", above=100.0, action="stop")
    rules = {r.name: r for r in rails(rule, defaults=True).rules}
    assert rules["kl_high"] == rule
    assert set(rules) == {r.name for r in DEFAULT_RULES}


def test_an_alert_holds_metric_value_window_and_the_samples():
    guardrails = rails(Rule(name="r", metric="m", above=2.0, window=2))
    samples = [sample(i, score=float(-i)) for i in range(8)]
    for step, value in enumerate([0.5, 1.0, 1.5], start=1):
        assert not guardrails.check(step, {"m": value}, {}, samples)
    (alert,) = guardrails.check(4, {"m": 3.0}, {}, samples)
    data = alert.as_data()
    assert (data["metric"], data["value"], data["window"]) == ("m", 3.0, [1.0, 1.5])
    assert [s["index"] for s in data["samples"]] == [7, 6, 5, 4, 3]
    assert alert.text == "m is 3, above 2"


def test_the_samples_are_those_that_explain_the_metric():
    samples = [sample(i, score=i, kl=10 - i, length=i) for i in range(8)]
    assert [s.index for s in worst_samples("objective/kl", samples)] == [0, 1, 2, 3, 4]
    assert [s.index for s in worst_samples("tokens/response_len_mean", samples)] == [7, 6, 5, 4, 3]
    assert [s.index for s in worst_samples("objective/scores", samples)] == [0, 1, 2, 3, 4]


def test_the_samples_of_an_alert_tell_where_replies_are():
    samples = [msgspec.structs.replace(sample(i), replies=r) for i, r in enumerate([[(1, 2)], []])]
    one, other = sample_evidence("objective/scores", samples)
    assert one["replies"] == [(1, 2)]
    assert "replies" not in other


def test_a_replay_raises_the_same_alerts():
    rules = (Rule(name="a", metric="m", above=1.0), Rule(name="b", metric="m", falls=0.3, window=2))
    values = [0.5, 2.0, 2.0, 0.4, 3.0, math.nan, 3.0]
    assert alert_steps(rails(*rules), values) == alert_steps(rails(*rules), values)


def drifting(values, **keys):
    """Steps of alerts of a rule that learns from four steps, and those from which it was so."""
    guardrails = rails(Rule(name="r", metric="m", window=4, **keys))
    return [
        (step, alert.evidence["from_step"])
        for step, value in enumerate(values, start=1)
        for alert in guardrails.check(step, {"m": value}, {})
    ]


def test_a_steady_rise_raises_an_alert_before_its_bound_and_noise_and_what_is_above_do_not():
    rule = Rule(name="r", metric="m", predicted_above=10.0, window=5)
    rise = [0.1 * step for step in range(1, 150)]
    assert alert_steps(rails(rule), rise) == [91]  # 9.1, and 10.1 ten steps later
    swings = [(3.0, 5.0, 2.0, 6.0)[step % 4] for step in range(40)]
    assert alert_steps(rails(rule), swings) == []
    assert alert_steps(rails(rule), [11.0 + step for step in range(20)]) == []
    assert alert_steps(rails(rule), [-1e200, -1e300, -1e200, -1e300, -1e308, 1.0]) == []
    with pytest.raises(ConfigError, match="window must be at least 4 with predicted_above"):
        raise_mistakes(rule_mistakes(Rule(name="r", metric="m", predicted_above=1.0, window=3)))


FIRST = [10.0, 10.5, 10.0, 10.5]
"""Of median 10.25; their noise is 0.52."""


def test_a_slow_drift_that_a_moving_mean_follows_raises_an_alert_with_its_steps():
    slow = [10 - 0.05 * step for step in range(150)]
    assert alert_steps(rails(Rule(name="r", metric="m", falls=0.5)), slow) == []
    ((step, since), *_) = drifting(FIRST + slow, drifts_down=0.5)
    assert 100 < since < step < since + 25


def test_a_drift_the_other_way_and_one_that_is_allowed_raise_no_alert():
    assert drifting([*FIRST, *[20.0] * 50], drifts_down=0.5) == []
    assert drifting([*FIRST, *[6.0] * 50], drifts_down=0.5) == []
    assert drifting([*FIRST, *[15.0] * 50], drifts_up=0.5) == []
    assert drifting([*FIRST, *[17.0] * 50], drifts_up=0.5) != []


def test_one_bad_step_is_no_drift_and_a_bad_first_step_no_baseline():
    assert drifting([*FIRST, 17.5, *[10.0] * 20], drifts_up=0.5) == []
    assert drifting([90.0, 10.0, 10.5, 10.0, *[18.0] * 20], drifts_up=0.5) != []


def test_a_drift_that_was_long_ends_soon_after_the_recovery():
    values = [*FIRST, *[20.0] * 100, *[10.0] * 10, *[20.0] * 10]
    steps = [step for step, _ in drifting(values, drifts_up=0.5, clears_after=5)]
    assert [step for step in steps if step > 114] != []


def test_a_drift_from_zero_is_not_a_multiple_of_it():
    assert drifting([0.0] * 4 + [5.0] * 20, drifts_up=0.5) == []


def test_a_bound_may_have_to_hold_for_several_steps():
    rule = Rule(name="r", metric="m", above=1.0, lasts=3)
    assert alert_steps(rails(rule), [2, 2, 0, 2, 2, 2, 2, 0, 2]) == [6]
    with pytest.raises(ConfigError, match="lasts must be at most its window"):
        raise_mistakes(rule_mistakes(Rule(name="r", metric="m", above=1.0, window=3, lasts=9)))


def diverging(judge, every, values):
    """Alerts of a run whose trained score rises, with another judge's values."""
    rule = Rule(name="r", metric="objective/scores", diverges=3.0)
    guardrails = Guardrails(GuardrailConfig(defaults=False, rules=[rule]), [judge])
    alerts = []
    for step, value in enumerate(values, start=1):
        noise = 0.02 * (step * 7 % 5)
        metrics = {"objective/scores": step / 20 + noise}
        metrics[judge] = value + noise if step % every == 0 else None
        alerts += guardrails.check(step, metrics, {})
    return alerts


@pytest.mark.parametrize(("judge", "every"), [("reward/watched", 1), ("eval/score", 5)])
def test_a_judge_that_falls_while_the_trained_score_rises_raises_an_alert(judge, every):
    rising = [step / 40 for step in range(60)]
    assert diverging(judge, every, [*rising, *[1.5] * 60]) == []
    (alert, *_) = diverging(judge, every, [*rising, *(1.5 - step / 40 for step in range(60))])
    assert 55 <= alert.evidence["from_step"] <= 65
    assert "while" in alert.text and "falls from" in alert.text


def test_a_judge_that_falls_in_one_evaluation_alone_raises_no_alert():
    after = [1.4] * 60
    rising = [step / 40 for step in range(60)]
    assert diverging("eval/score", 5, [*rising, *after]) == []
    after[34] = -5.0
    assert diverging("eval/score", 5, [*rising, *after]) == []
    after[39] = -5.0
    assert diverging("eval/score", 5, [*rising, *after]) != []


def test_the_steps_of_a_run_without_an_evaluation_are_not_kept():
    guardrails = Guardrails(GuardrailConfig(), ["eval/score"])
    sizes = []
    for steps in (range(1, 101), range(101, 2001)):
        for step in steps:
            guardrails.check(step, {"objective/scores": 0.1 * step}, {})
        sizes.append(len(pickle.dumps(guardrails)))
    assert sizes[1] < 1.1 * sizes[0]


def test_the_judges_of_a_run_are_those_that_it_is_not_trained_on():
    mix = [
        {"model": "a", "name": "trained"},
        {"model": "b", "name": "watched", "weight": 0.0},
    ]
    config = config_of({"mix": mix}, {"rewards": [{"model": "c", "name": "other"}]})
    assert judges_of(config) == {"eval/score", "eval/reward/other", "reward/watched"}


@pytest.mark.parametrize("rule", DEFAULT_RULES, ids=lambda rule: rule.name)
def test_every_default_rule_is_valid_and_has_advice_of_one_line(rule):
    raise_mistakes(rule_mistakes(rule))
    assert 0 < len(rule.advice) < 100
    data = Alert(rule.name, rule.action, "text", 1, advice=rule.advice).as_data()
    assert data["advice"] == rule.advice
