"""Responses that are generated beside the step before, with weights that are one update old.

The engine is a stand-in here; tests/vllm has the same with vLLM.
"""

import copy

import pytest
import torch

from engine.config.settings import change_settings
from engine.errors import RlhfError
from engine.progress import report_nothing
from engine.protocol.rollout.messages import Generate
from engine.train.evaluation.evaluate import evaluate_if_due
from engine.train.experience.generation import generate_rollout
from engine.train.experience.rollout_check import check_weights
from engine.train.rewards.source import RewardCallError
from engine.train.step import train_step

AHEAD = (
    "rollout.engine=vllm", "rollout.ahead=1", "ppo.rollout_correction=truncate",
    "train.save_every=0", "train.learning_rate=1e-3",
)  # fmt: skip


def steps(run, count, first=1):
    """Metrics and responses of some steps."""
    found = []
    for step in range(first, first + count):
        metrics, samples = train_step(run, step)
        run.state.step = step
        found.append((metrics, [s.response for s in samples], samples))
    return found


@pytest.fixture(scope="module")
def computed():
    """What is computed once for several tests."""
    return {}


@pytest.fixture
def undisturbed(computed, make_run, engine):
    """Three steps of a run whose engine works."""
    if not computed:
        computed["steps"] = steps(make_run(*AHEAD)[0], 3)
    return computed["steps"]


def numbers(found):
    return [
        {k: v for k, v in metrics.items() if not k.startswith(("time/", "perf/"))}
        for metrics, _, _ in found
    ]


def test_each_step_but_the_first_trains_on_responses_of_the_weights_before_the_last_update(
    make_run, engine
):
    run, _ = make_run(*AHEAD)
    native, _ = make_run("train.learning_rate=1e-3")
    expected = generate_rollout(native, 2)  # with the weights of the beginning
    first, second, third = steps(run, 3)
    assert second[1] == expected.texts[: len(second[1])]
    assert [m["rollout/version_lag"] for m, _, _ in (first, second, third)] == [0, 1, 1]
    assert [s[0].weights_version for _, _, s in (first, second, third)] == [0, 0, 1]
    assert first[0]["val/rollout_logprob_gap"] < 1e-4 < second[0]["val/rollout_logprob_gap"]
    assert engine.messages.count("LoadWeights") == 3  # of steps 0, 1 and 2


def test_responses_of_other_settings_than_those_of_the_step_are_dropped(make_run, engine):
    run, _ = make_run(*AHEAD)
    steps(run, 1)
    run.config = change_settings(run.config, {"temperature": 0.5})
    rollout = generate_rollout(run, 2)
    ((metrics, responses, _),) = steps(run, 1, first=2)
    assert metrics["rollout/version_lag"] == 0
    assert responses == rollout.texts[: len(responses)]
    ((metrics, _, _),) = steps(run, 1, first=3)
    assert metrics["rollout/version_lag"] == 1


def dies_at_the_second_batch():
    """The faults of a stand-in: it ends once, at the second request for responses."""
    seen = []

    def fault(message):
        seen.extend([1] * isinstance(message, Generate))
        if len(seen) == 2:
            seen.append(1)
            raise ConnectionError

    return iter([fault])


def test_an_engine_that_ends_while_it_generates_ahead_is_given_the_old_weights_again(
    make_run, engine, undisturbed
):
    engine.faults = dies_at_the_second_batch()
    before = engine.engines
    run, _ = make_run(*AHEAD)
    assert numbers(steps(run, 3)) == numbers(undisturbed)
    assert engine.engines == before + 2


def test_of_two_engines_that_generate_ahead_one_ends_and_gets_the_old_weights_again(
    make_run, engine, second_engine, undisturbed
):
    before = engine.engines
    second_engine.faults = dies_at_the_second_batch()
    run, _ = make_run(*AHEAD, "rollout.engines=2")
    assert [s[1] for s in steps(run, 3)] == [s[1] for s in undisturbed]
    assert (engine.engines - before, second_engine.engines) == (1, 2)


def fail_once(run, step):
    """Runs a step whose reward fails, as it does before a pause."""
    rewards = run.rewards

    def fails(*_arguments, **_options):
        raise RewardCallError("the reward failed")

    run.rewards = fails
    with pytest.raises(RewardCallError):
        train_step(run, step)
    run.rewards = rewards


def test_a_step_whose_reward_fails_is_repeated_with_the_same_responses(make_run, undisturbed):
    run, _ = make_run(*AHEAD)
    steps(run, 1)
    fail_once(run, 2)
    again = steps(run, 2, first=2)
    assert numbers(again) == numbers(undisturbed)[1:]


def test_a_step_that_is_repeated_after_a_checkpoint_has_responses_of_its_weights(make_run, engine):
    run, _ = make_run(*AHEAD)
    steps(run, 1)
    fail_once(run, 2)
    run.ahead.drop()  # a checkpoint by command, while the run is paused
    assert [m["rollout/version_lag"] for m, _, _ in steps(run, 1, first=2)] == [0]


def test_what_follows_a_checkpoint_is_generated_with_its_weights(make_run, engine):
    run, _ = make_run(*AHEAD, "train.save_every=2")
    assert [m["rollout/version_lag"] for m, _, _ in steps(run, 4)] == [0, 1, 0, 1]
    asked, _ = make_run(*AHEAD)
    steps(asked, 1)
    asked.ahead.drop()  # a checkpoint by command
    assert [m["rollout/version_lag"] for m, _, _ in steps(asked, 2, first=2)] == [0, 1]


def test_an_evaluation_waits_for_the_responses_ahead_and_loses_none(make_run, engine):
    keys = ("eval.every=1", "eval.holdout=2")
    run, _ = make_run(*AHEAD, *keys)
    alone, _ = make_run(*AHEAD, *keys)
    expected = numbers(steps(alone, 3))
    found = []
    for step in (1, 2, 3):
        found += steps(run, 1, first=step)
        assert evaluate_if_due(run, step).metrics["eval/score"]
    assert numbers(found) == expected


def test_prompts_that_are_drawn_again_are_of_the_present_weights(make_run, engine):
    keys = ("rollout.per_prompt=2", "rollout.dynamic=true", "rollout.dynamic_limit=1")
    run, _ = make_run(*AHEAD, *keys)
    steps(run, 1)
    scores, original = [], run.rewards

    def the_first_prompt_is_constant(inputs, report=report_nothing, **_options):
        found = original(inputs, report)
        if not scores:
            found.total[:2] = 0.0
        scores.append(found)
        return found

    run.rewards = the_first_prompt_is_constant
    ((metrics, _, samples),) = steps(run, 1, first=2)
    assert metrics["val/redrawn_prompts"] >= 1
    assert [s.weights_version for s in samples[:4]] == [1, 1, 0, 0]
    assert metrics["rollout/version_lag"] == 1  # of the oldest


def test_nothing_is_generated_ahead_after_the_last_step(make_run, engine):
    run, _ = make_run(*AHEAD, "train.steps=2")
    steps(run, 2)
    assert engine.messages.count("LoadWeights") == 1  # of step 0, for both steps


def test_a_run_does_not_train_on_responses_of_still_older_weights(make_run, engine):
    run, _ = make_run(*AHEAD)
    rollout = generate_rollout(run, 1)
    logprobs = rollout.logprobs
    check_weights(run, 2, rollout, logprobs - 1)  # a gap is to be expected
    with pytest.raises(RlhfError, match="weights that are 2 updates old"):
        check_weights(run, 3, rollout, logprobs)
    newer = copy.copy(rollout)
    newer.versions = torch.ones_like(rollout.versions)
    with pytest.raises(RlhfError, match="weights that are -1 updates old"):
        check_weights(run, 1, newer, logprobs)
