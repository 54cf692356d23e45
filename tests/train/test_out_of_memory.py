"""A step that runs out of memory is repeated with a halved micro-batch, or says why it is not."""

import contextlib

import pytest
import torch

from engine.config.settings import change_settings
from engine.errors import RlhfError
from engine.train.experience import targets
from engine.train.failure import failed_message
from engine.train.out_of_memory import StepOutOfMemoryError, run_step, smaller_micro_batch
from engine.train.ppo import forward, optimise
from tests.train.gpu.pretend import GPU, pretend_gpu
from tests.variants import some_of

STATISTICS = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 80 GiB."


@pytest.fixture
def memory_for(monkeypatch):
    """Returns a function: from then on a forward pass of more rows runs out of memory."""

    def limit(most, after=0):
        passes, compute = [], forward.rollout_forward

        def limited(model, rollout, rows, *args, **named):
            passes.append(len(rows))
            if len(rows) > most and len(passes) > after:
                raise torch.OutOfMemoryError(STATISTICS)
            return compute(model, rollout, rows, *args, **named)

        for module in (forward, optimise):
            monkeypatch.setattr(module, "rollout_forward", limited)

    return limit


def adjusting(run, said):
    def adjust(change, text):
        said.append(text)
        run.config = change_settings(run.config, {change.key: change.new})

    return adjust


@pytest.mark.parametrize("device", some_of({"cpu": None, "gpu": GPU}, "cpu"))
def test_a_repeated_step_has_the_numbers_of_a_run_with_that_micro_batch(
    make_run, memory_for, device
):
    keys = ("ppo.advantage=reward", "ppo.baseline=running", "ppo.epochs=1", "rollout.batch_size=4")
    with contextlib.nullcontext() if device is None else pretend_gpu():
        run, _ = make_run(*keys, "launch.device=cpu", device=device)
        expected, _ = make_run(*keys, "ppo.micro_batch_size=1", "launch.device=cpu", device=device)
        ours, _ = run_step(expected, 1, adjusting(expected, []))
        memory_for(1)
        said = []
        theirs, _ = run_step(run, 1, adjusting(run, said))
        weights = [p.detach().cpu() for p in run.policy.parameters()]
        others = [p.detach().cpu() for p in expected.policy.parameters()]
    assert [text.rpartition("with ")[2] for text in said] == [
        "ppo.micro_batch_size 2 instead of 4",
        "ppo.micro_batch_size 1 instead of 2",
    ]
    assert said[0].startswith("step 1 ran out of memory in the phase 'reference': CUDA out of")
    assert "total capacity" not in said[0]
    for name, number in ours.items():
        if not name.startswith(("time/", "perf/")):
            assert theirs[name] == number, name
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
    assert run.state == expected.state


def test_after_an_update_the_ranks_start_again_with_the_halved_micro_batch(make_run, memory_for):
    run, _ = make_run()
    memory_for(2, after=5)  # two of the reference, one of the check, and the first minibatch
    with pytest.raises(StepOutOfMemoryError) as caught:
        run_step(run, 1, adjusting(run, []))
    failed = failed_message(caught.value, run.ranks, 0)
    (change,) = failed.changes
    assert (failed.step, change.key, change.old, change.new) == (1, "micro_batch_size", 4, 2)
    assert not failed.echo


def test_memory_lost_in_the_fit_of_the_value_function_halves_nothing(make_run, monkeypatch):
    def fit(*_arguments):
        raise torch.OutOfMemoryError(STATISTICS)

    monkeypatch.setattr(targets, "fit_linear_value", fit)
    run, _ = make_run("model.value=reward_model")
    with pytest.raises(StepOutOfMemoryError, match="in the phase 'fit'") as caught:
        run_step(run, 1, adjusting(run, []))
    assert caught.value.change is None


def test_a_micro_batch_of_one_response_is_not_halved(make_run, memory_for):
    run, _ = make_run("ppo.micro_batch_size=1")
    memory_for(0)
    with pytest.raises(RlhfError, match=r"in the phase 'reference'.*activation_checkpointing") as e:
        run_step(run, 1, adjusting(run, []))
    failed = failed_message(e.value, run.ranks, 0)
    assert failed.final
    assert not failed.changes


def test_a_halved_micro_batch_is_smaller_than_what_a_rank_has(make_run):
    run, _ = make_run("rollout.batch_size=8", "ppo.minibatches=2", "ppo.micro_batch_size=16")
    assert smaller_micro_batch(run.config, 1, "reference") == 4
    assert smaller_micro_batch(run.config, 1, "optimise") == 2
    assert smaller_micro_batch(run.config, 2, "optimise") == 1
    assert smaller_micro_batch(run.config, 4, "optimise") is None
    assert smaller_micro_batch(run.config, 1, "generate") is None


class TwoRanks:
    """The store of a group of two ranks, seen from one of them."""

    size = 2

    def __init__(self):
        self.left = []

    def leave_error(self, error):
        self.left.append(error)

    def errors_left(self):
        return self.left


def test_the_other_ranks_report_the_one_that_ran_out_of_memory():
    peer = RuntimeError("[gloo] Connection closed by peer")
    ranks, nccl = TwoRanks(), RuntimeError("NCCL error: ncclUnhandledCudaError: out of memory")
    from_nccl = failed_message(nccl, ranks, 1)
    assert from_nccl.final
    assert not from_nccl.echo
    assert "out of memory" in from_nccl.text
    assert failed_message(peer, ranks, 0) == from_nccl
