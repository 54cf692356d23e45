"""The learning rate of each step: warm-up and schedule."""

import math

import pytest
import torch
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from engine import starter
from engine.config import file as config_file
from engine.config.sections.train import TrainConfig
from engine.config.settings import change_settings
from engine.train.ppo.adamw import learning_rate


def train_config(schedule="constant", warmup=0, steps=10, **others):
    return TrainConfig(
        learning_rate=2e-3, schedule=schedule, warmup_steps=warmup, steps=steps, **others
    )


def rates(**of_train):
    config = train_config(**of_train)
    return [learning_rate(config, step) for step in range(1, config.steps + 1)]


def test_the_constant_schedule_stays_at_the_configured_rate():
    assert rates() == [2e-3] * 10


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [1, 4])
def test_warm_up_rises_linearly_to_the_full_rate_from_the_first_step(schedule, warmup):
    warm = rates(schedule=schedule, warmup=warmup)[:warmup]
    assert warm == pytest.approx([2e-3 * (k + 1) / warmup for k in range(warmup)])


@pytest.mark.parametrize("warmup", [0, 4])
def test_the_linear_schedule_falls_linearly_towards_zero(warmup):
    falling = rates(schedule="linear", warmup=warmup, steps=20)[warmup:]
    n = len(falling)
    assert falling == pytest.approx([2e-3 * (1 - k / n) for k in range(n)])


@pytest.mark.parametrize("warmup", [0, 4])
def test_the_cosine_schedule_falls_over_half_a_period(warmup):
    falling = rates(schedule="cosine", warmup=warmup, steps=20)[warmup:]
    n = len(falling)
    want = [2e-3 * 0.5 * (1 + math.cos(math.pi * k / n)) for k in range(n)]
    assert falling == pytest.approx(want)


@pytest.mark.parametrize("final_rate", [0.1, 1.0])
def test_the_linear_schedule_falls_to_its_final_rate(final_rate):
    falling = rates(schedule="linear", warmup=4, steps=20, final_rate=final_rate)[4:]
    want = [2e-3 * (final_rate + (1 - final_rate) * (1 - k / 16)) for k in range(16)]
    assert falling == pytest.approx(want)


@pytest.mark.parametrize("final_rate", [0.0, 0.1, 1.0])
def test_the_cosine_schedule_with_a_final_rate_is_that_of_transformers(final_rate):
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-3)
    theirs = get_cosine_with_min_lr_schedule_with_warmup(optimiser, 0, 20, min_lr_rate=final_rate)
    want = []
    for _ in range(20):
        want += theirs.get_last_lr()
        optimiser.step()
        theirs.step()
    assert rates(schedule="cosine", steps=20, final_rate=final_rate) == pytest.approx(want)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_rate_changed_live_scales_the_whole_schedule(schedule):
    config = config_file.load(
        starter.FOLDER / "demo.yaml",
        ["train.learning_rate=2e-3", f"train.schedule={schedule}", "train.warmup_steps=3",
         "train.steps=10"],
    )  # fmt: skip
    changed = change_settings(config, {"learning_rate": 4e-3})
    got = [learning_rate(changed.train, step) for step in range(1, 11)]
    assert got == pytest.approx([2 * x for x in rates(schedule=schedule, warmup=3)])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_warm_up_as_long_as_the_run_stays_between_zero_and_the_full_rate(schedule):
    for warmup in (9, 10, 30):
        assert all(0 <= x <= 2e-3 for x in rates(schedule=schedule, warmup=warmup))
