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


def forward_and_backward(run):
    """Bytes that the forward pass leaves on the GPU, those of one layer's input, and gradients."""
    rollout = generate_rollout(run, 1)
    run.learner.train()
    before = bytes_on_gpu()
    outputs = rollout_forward(run.learner, rollout, rollout.rows, 1.0)
    kept = bytes_on_gpu() - before
    (outputs.logprobs.sum() + outputs.values.sum()).backward()
    shape = run.policy.lm.config
    tokens = len(rollout.ids) * (int(rollout.host_lengths.sum(0).max()) - 1)
    return kept, 4 * tokens * shape.hidden_size, [p.grad.cpu() for p in run.policy.parameters()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_keeps_no_inputs_of_layers_and_the_gradients_are_the_same(run_on_gpu, dtype):
    with pretend_gpu():
        run, _ = run_on_gpu(f"model.dtype={dtype}", CHECKPOINTING)
        kept, layer_input, gradients = forward_and_backward(run)
        moved, _, same = forward_and_backward(
            run_on_gpu(f"model.dtype={dtype}", CHECKPOINTING, OFFLOAD)[0]
        )
    # And what the last norm keeps: its input and its normalised input.
    assert kept - moved == (run.policy.lm.config.num_hidden_layers + 2) * layer_input
    assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))


def test_an_offloaded_model_computes_on_a_cpu_what_it_computes_without(make_run):
    found = [forward_and_backward(make_run(CHECKPOINTING, *keys)[0])[2] for keys in ([], [OFFLOAD])]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
