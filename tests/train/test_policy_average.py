"""The averaged policy: it is the average of the steps, changes nothing, and survives a resume."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.protocol.rank_messages import Begin
from engine.train.checkpoints.policy_folder import policy_tensors
from engine.train.distributed.ranks import RankGroup
from engine.train.evaluation.evaluate import evaluate_if_due
from engine.train.load import load_run
from engine.train.step import train_step
from tests.train.checkpoints import save_checkpoint
from tests.variants import some_of

DECAY = 0.75
ON = f"train.ema.decay={DECAY}"
EVALUATED = ("eval={every: 1, holdout: 6, max_new_tokens: 8}", "train.learning_rate=1e-3")
KINDS = {
    "shared trunk": (),
    "adapters and a separate value trunk": ("lora.rank=4", "model.value=separate"),
    "on the host": ("train.ema.offload=true",),
}


def copies(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def resumed(session, config, step):
    begin = Begin(attempt=2, from_step=step)
    return load_run(session, config, begin, RankGroup(config.launch))


@pytest.mark.parametrize("kind", some_of(KINDS, "adapters and a separate value trunk"))
def test_the_average_of_a_resumed_run_is_that_of_all_steps(make_run, assert_same_step, kind):
    run, session = make_run(ON, *kind)
    mean = copies(policy_tensors(run.policy))
    for step in (1, 2):
        train_step(run, step)
        run.state.step = step
        for name, weight in policy_tensors(run.policy).items():
            mean[name] = DECAY * mean[name].double() + (1 - DECAY) * weight.double()
    average = run.average.tensors(run.policy)
    assert average.keys() == mean.keys()
    for name, weight in average.items():
        torch.testing.assert_close(weight.double(), mean[name], rtol=1e-6, atol=1e-7)

    save_checkpoint(run, session)
    again = resumed(session, session.config(), 2)
    assert_same_step(run, again, 3)
    theirs = again.average.tensors(again.policy)
    for name, weight in run.average.tensors(run.policy).items():
        assert torch.equal(weight, theirs[name]), name


def test_the_policy_and_its_average_are_evaluated_and_training_does_not_change(
    make_run, assert_same_step
):
    run, _ = make_run(ON, *EVALUATED)
    plain, _ = make_run(*EVALUATED)
    for step in (1, 2):
        train_step(run, step)
        train_step(plain, step)
    found, alone = (evaluate_if_due(r, 2).metrics for r in (run, plain))
    for name, value in alone.items():
        assert name.startswith("time/") or found[name] == value
    assert found["eval/ema_kl"] != found["eval/kl"]

    # An evaluation of a policy that has the averaged weights.
    for name, weight in policy_tensors(plain.policy).items():
        weight.copy_(run.average.tensors(run.policy)[name])
    averaged = evaluate_if_due(plain, 2).metrics
    for name in ("score", "score_ci", "kl", "response_len_mean"):
        assert found[f"eval/ema_{name}"] == averaged[f"eval/{name}"]
    again, _ = make_run(ON, *EVALUATED)
    for step in (1, 2):
        train_step(again, step)
    assert_same_step(run, again, 3)  # one with an evaluation in between, one without


def test_a_checkpoint_has_the_average_as_a_model_and_a_fork_can_begin_with_it(make_run):
    run, session = make_run(ON, "train.learning_rate=1e-3")
    train_step(run, 1)
    run.state.step = 1
    lm = AutoModelForCausalLM.from_pretrained(save_checkpoint(run, session) / "policy-ema")
    begin, config = Begin(attempt=2, from_step=1, average=True), session.config()
    forked = load_run(session, config, begin, RankGroup(config.launch))
    average = run.average.tensors(run.policy)
    for name, weight in lm.named_parameters():
        assert torch.equal(weight, average[name]), name
        assert torch.equal(weight, forked.policy.lm.get_parameter(name)), name


def test_an_average_that_is_turned_on_by_a_resume_starts_from_the_policy(make_run):
    run, session = make_run()
    train_step(run, 1)
    run.state.step = 1
    assert not (save_checkpoint(run, session) / "policy-ema").exists()
    with_average, _ = make_run(ON)
    again = resumed(session, with_average.config, 1)
    for name, weight in again.average.tensors(again.policy).items():
        assert torch.equal(weight, policy_tensors(again.policy)[name])
