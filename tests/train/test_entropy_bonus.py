"""The weight of the entropy bonus follows the policy's entropy (`ppo.entropy_target`)."""

import math

import pytest
from msgspec.structs import replace

from engine.config.sections.ppo import PPOConfig
from engine.config.settings import change_settings
from engine.train.ppo.entropy import adapt, with_weight
from engine.train.step import train_step

CONFIG = PPOConfig(
    entropy_coef=0.01, entropy_target=0.5, entropy_coef_step=0.004, entropy_coef_max=0.02
)
TARGET = ("ppo.entropy_coef=0.01", "ppo.entropy_coef_step=0.004")


def weights(entropies, config=CONFIG):
    bonus, found = None, []
    for entropy in entropies:
        bonus = adapt(bonus, entropy, config)
        found.append(bonus.weight)
    return found


def test_the_weight_rises_below_the_target_and_falls_from_it_on():
    assert weights([0.4, 0.45, 0.5, 0.6]) == pytest.approx([0.014, 0.018, 0.014, 0.01])


def test_the_weight_stays_between_its_limits():
    assert weights([0.1] * 4)[-1] == 0.02
    assert weights([0.9] * 4)[-1] == 0.0
    assert weights([0.9] * 4, replace(CONFIG, entropy_coef_min=0.003))[-1] == 0.003


def test_an_entropy_that_is_not_a_number_changes_nothing():
    assert weights([0.4, math.nan]) == pytest.approx([0.014, 0.014])


def test_from_the_target_on_the_loss_has_no_bonus():
    bonus = adapt(None, 0.4, CONFIG)
    assert with_weight(CONFIG, bonus, 0.4).entropy_coef == pytest.approx(0.014)
    for entropy in (0.5, 0.6, math.nan):
        assert with_weight(CONFIG, bonus, entropy).entropy_coef == 0


def test_the_weight_begins_again_from_what_an_operator_sets():
    bonus = adapt(adapt(None, 0.4, CONFIG), 0.4, CONFIG)
    changed = replace(CONFIG, entropy_coef=0.002)
    assert adapt(bonus, 0.4, changed).weight == pytest.approx(0.006)


def test_a_step_with_a_low_entropy_trains_as_one_with_the_risen_weight(make_run):
    adapted, _ = make_run(*TARGET, "ppo.entropy_target=1e6")
    fixed, _ = make_run("ppo.entropy_coef=0.014")
    ours, theirs = train_step(adapted, 1)[0], train_step(fixed, 1)[0]
    assert ours.pop("policy/entropy_coef") == pytest.approx(0.014)
    for name, number in theirs.items():
        if not name.startswith(("time/", "perf/")):
            assert ours[name] == pytest.approx(number, rel=1e-6), name


def test_a_step_with_a_high_entropy_trains_without_a_bonus(make_run):
    adapted, _ = make_run(*TARGET, "ppo.entropy_target=1e-6")
    metrics, _ = train_step(adapted, 1)
    assert metrics["policy/entropy_coef"] == 0
    assert "loss/entropy_avg" not in metrics
    assert adapted.state.entropy_bonus.weight == pytest.approx(0.006)
    assert adapted.config.ppo.entropy_coef == 0.01  # the setting is the operator's


def test_the_weight_of_a_run_goes_on_after_a_change_of_the_target(make_run):
    run, _ = make_run(*TARGET, "ppo.entropy_target=1e6")
    train_step(run, 1)
    run.config = change_settings(run.config, {"entropy_target": 1e-6})
    train_step(run, 2)
    assert run.state.entropy_bonus.weight == pytest.approx(0.01)
