"""Inputs of layers wait on the host for the backward pass (`parallel.activations: offload`)."""

import gc
from functools import partial

import pytest
import torch

from engine.train.experience.generation import generate_rollout
from engine.train.ppo.forward import rollout_forward
from tests.train.gpu.pretend import GPU, GpuTensor, pretend_gpu

CHECKPOINTING = "parallel.activation_checkpointing=true"
OFFLOAD = "parallel.activations=offload"


def bytes_on_gpu():
    """Of all tensors there; tensors that share memory count once."""
    gc.collect()
    tensors = [x.real_tensor for x in gc.get_objects() if type(x) is GpuTensor]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


@pytest.fixture
def run_on_gpu(make_run, few_prompts):
    keys = (f"data.prompts={few_prompts}", "launch.device=cpu", "ppo.micro_batch_size=8",
            "rollout.batch_size=8", "rollout.max_new_tokens=12")  # fmt: skip
    return partial(make_run, *keys, device=GPU)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_keeps_no_inputs_of_layers_and_the_gradients_are_the_same(run_on_gpu, dtype):
    with pretend_gpu():
        found = []
        for keys in ((CHECKPOINTING,), (CHECKPOINTING, OFFLOAD)):
            run, _ = run_on_gpu(f"model.dtype={dtype}", *keys)
            rollout = generate_rollout(run, 1)
            run.learner.train()
            before = bytes_on_gpu()
            outputs = rollout_forward(run.learner, rollout, rollout.rows, 1.0)
            kept = bytes_on_gpu() - before
            (outputs.logprobs.sum() + outputs.values.sum()).backward()
            gradients = [p.grad.cpu() for p in run.policy.parameters()]
            found.append((kept, gradients))
        shape = run.policy.lm.config
        tokens = len(rollout.ids) * (int(rollout.host_lengths.sum(0).max()) - 1)
        (kept, gradients), (moved, same) = found
        assert kept - moved >= shape.num_hidden_layers * tokens * 4 * shape.hidden_size
        assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))


def test_an_offloaded_model_computes_on_a_cpu_what_it_computes_without(make_run):
    found = []
    for keys in ((CHECKPOINTING,), (CHECKPOINTING, OFFLOAD)):
        run, _ = make_run(*keys)
        rollout = generate_rollout(run, 1)
        run.learner.train()
        outputs = rollout_forward(run.learner, rollout, rollout.rows, 1.0)
        outputs.logprobs.sum().backward()
        found.append([p.grad for p in run.policy.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
