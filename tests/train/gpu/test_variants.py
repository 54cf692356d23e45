"""Every variant of a step runs on a GPU: no operator over two devices, and the CPU's numbers."""

from pathlib import Path

import pytest
import torch

from engine.config.sections.launch import LaunchConfig
from engine.train.boundary import update_reference
from engine.train.distributed.ranks import RankGroup
from engine.train.evaluation.evaluate import evaluate_if_due
from engine.train.reports.probe import answer_probe
from engine.train.rollout.native import backend as native
from engine.train.rollout.native.schedule import Schedule
from engine.train.step import train_step
from tests.train.arithmetic import CHATTING
from tests.train.gpu.pretend import GPU, MixedDevicesError, pretend_gpu
from tests.variants import some_of

SMALLEST = (
    "rollout.batch_size=4",
    "rollout.max_new_tokens=6",
    "ppo.epochs=1",
    "ppo.minibatches=1",
    "ppo.micro_batch_size=2",
    "launch.device=cpu",
)
REPEATING = Path(__file__).parent.parent
IN_CHUNKS = 20_000
"""Logits at a time: a few tokens."""
VARIANTS = {
    "gae, value head on the trunk": ["ppo.whiten_rewards=true", "ppo.value_clip=0.2"],
    "gae, separate value trunk": ["model.value=separate", "ppo.value_warmup=1"],
    "rloo, 8-bit moments": [
        "ppo.advantage=rloo", "rollout.per_prompt=2", "train.optimiser=adamw_8bit",
    ],
    "reward, running baseline, sequence ratio": [
        "ppo.advantage=reward", "ppo.baseline=running", "ppo.ratio=sequence",
    ],
    "bfloat16": ["model.dtype=bfloat16"],
    "bfloat16 but for the logits": ["model.dtype=bfloat16", "model.float32_logits=true"],
    "LoRA": ["lora.rank=2"],
    "LoRA in bfloat16, separate value trunk": [
        "lora.rank=2", "model.dtype=bfloat16", "model.value=separate",
    ],
    "DoRA in bfloat16, averaged policy, evaluation": [
        "lora={rank: 2, dora: true}", "model.dtype=bfloat16", "train.ema.decay=0.5",
        "eval={every: 1, holdout: 2, max_new_tokens: 4}",
    ],
    "frozen models and activations on the host": [
        "parallel.frozen=offload", "parallel.activation_checkpointing=true",
        "parallel.activations=offload",
    ],
    "normalised rewards, a value function on their model's states": [
        "reward.normalise=reference", "reward.normalise_samples=2",
        "reward.missing_eos_penalty=1", "model.value=reward_model",
    ],
    "stop strings": ["rollout.stop=[' the', 'e']", "ppo.stop_kl=10"],
    "grpo, entropy bonus, KL in the loss": [
        "ppo.advantage=grpo", "rollout.per_prompt=2", "ppo.entropy_coef=0.01", "kl.place=loss",
        "kl.estimator=k3", "ppo.loss_aggregation=sequence",
    ],
    "remax, averaged policy, evaluation": [
        "ppo.advantage=remax", "train.ema.decay=0.5",
        "eval={every: 1, holdout: 2, max_new_tokens: 4}",
    ],
    "opo, a reference that follows, both on the host": [
        "ppo.advantage=opo", "rollout.per_prompt=2", "parallel.frozen=offload",
        "kl.reference_update={every: 1, mix: 0.5}", "train.ema={decay: 0.5, offload: true}",
    ],
    "dynamic sampling, pass@k": [
        "ppo.advantage=grpo_passk", "rollout.per_prompt=2", "rollout.dynamic=true",
        "rollout.dynamic_limit=2",
    ],
    "reinforce++, importance weights of the KL, corrected rollouts": [
        "ppo.advantage=reinforce_plus_plus", "kl.place=loss", "kl.importance_weighted=true",
        "model.dtype=bfloat16", "ppo.rollout_correction=sequence_mean_mask",
    ],
    "two responses at once, micro-batches by tokens": [
        "rollout.at_once=2", "rollout.max_new_tokens=12", "ppo.micro_batch_by=tokens",
    ],
    "an environment, two responses to each prompt": [
        "environment.factory=repeating:Repeating", f"environment.path={REPEATING}",
        "environment.max_tokens=40", "rollout.stop=[' the', 'e']", "rollout.per_prompt=2",
        "rollout.max_new_tokens=12", "eval={every: 1, holdout: 2}",
        "reward={model: null, environment: by_turn}",
    ],
    "an environment, remax, bfloat16, all that can be on the host": [
        "environment.factory=repeating:Repeating", f"environment.path={REPEATING}",
        "environment.max_tokens=40", "rollout.stop=[' the', 'e']", "rollout.max_new_tokens=12",
        "reward.model=null", "reward.environment=letters", "ppo.advantage=remax",
        "model.dtype=bfloat16", "parallel.frozen=offload", "train.ema={decay: 0.5, offload: true}",
        "kl.reference_update={every: 1, mix: 0.5}", "eval={every: 1, holdout: 2}",
    ],
    "an environment, dynamic sampling, two responses at once, LoRA": [
        "environment.factory=repeating:Repeating", f"environment.path={REPEATING}",
        "environment.max_tokens=40", "rollout.stop=[' the', 'e']", "rollout.max_new_tokens=12",
        "ppo.advantage=grpo", "rollout.per_prompt=2", "rollout.dynamic=true", "rollout.at_once=2",
        "lora.rank=2", "reward.normalise=reference", "reward.normalise_samples=2",
    ],
    "an environment, a separate value trunk, micro-batches by tokens": [
        "environment.factory=repeating:Repeating", f"environment.path={REPEATING}",
        "environment.max_tokens=40", "rollout.stop=[' the', 'e']", "rollout.max_new_tokens=12",
        "model.value=separate", "ppo.micro_batch_by=tokens",
    ],
    "tools, in a chat": [*CHATTING, "rollout.max_new_tokens=12"],
    "optimal token baseline, tokens of high covariance left out": [
        "ppo.advantage=optimal_token_baseline", "rollout.per_prompt=2", "ppo.clip_cov=0.2",
        "ppo.clip_cov_range=[-100, 100]", "rollout.sampling=inverse_cdf",
    ],
    "tokens of high covariance held back, those of high entropy, off-policy ones left out": [
        "ppo.advantage=grpo", "rollout.per_prompt=2", "ppo.kl_cov=0.2", "ppo.top_entropy=0.5",
        "ppo.off_policy_mask=0.1", "ppo.entropy_target=2",
    ],
    "rejected rollouts, a value function with a norm of its own": [
        "model.dtype=bfloat16", "ppo.rollout_rejection=sequence_mean_k3",
        "ppo.rollout_rejection_limit=0.5", "ppo.rollout_correction=sequence_truncate",
        "ppo.value_max_grad_norm=0.5", "model.value=separate", "ppo.lam_alpha=0.5",
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    "overrides",
    some_of(
        VARIANTS,
        "gae, value head on the trunk",
        "LoRA in bfloat16, separate value trunk",
        "normalised rewards, a value function on their model's states",
        "grpo, entropy bonus, KL in the loss",
        "remax, averaged policy, evaluation",
        "two responses at once, micro-batches by tokens",
        "an environment, two responses to each prompt",
    ),
)
def test_a_step_on_a_gpu_has_the_numbers_of_the_cpu(
    make_run, tiny_model, few_prompts, overrides, monkeypatch, caplog
):
    compare_step(make_run, tiny_model, few_prompts, overrides, monkeypatch)
    assert "without CUDA graphs" not in caplog.text


@pytest.mark.parametrize(
    "overrides",
    some_of(
        {
            "float32, shared value head": [],
            "bfloat16, separate value trunk": ["model.dtype=bfloat16", "model.value=separate"],
            "LoRA": ["lora.rank=2"],
        },
        "float32, shared value head",
    ),
)
def test_losses_in_chunks_on_a_gpu_have_the_numbers_of_the_cpu(
    make_run, tiny_model, few_prompts, overrides, monkeypatch
):
    for limit in ("MAX_LOGITS", "MAX_LOGITS_ON_GPU"):
        monkeypatch.setattr(f"engine.train.ppo.chunked_loss.{limit}", IN_CHUNKS)
    # In float32 the CPU has a product of its own for the output layer.
    compare_step(make_run, tiny_model, few_prompts, overrides, monkeypatch, tolerance=1e-5)


def compare_step(make_run, tiny_model, few_prompts, overrides, monkeypatch, tolerance=0.0):
    """Compares a step, and what can follow it, on the CPU and on the pretended GPU."""
    # With fixed shapes and few looks on the CPU too, since sums of other shapes are rounded
    # otherwise; every third token, so that most of the few tokens here come from CUDA graphs.
    monkeypatch.setattr(native, "schedule_for", lambda _device: Schedule(3, fixed_shapes=True))
    # The CPU's own layers round otherwise.
    for module in ("models.pretrained", "rewards.kinds.model"):
        monkeypatch.setattr(f"engine.train.{module}.use_cpu_layers", lambda *_: None)
    keys = [*SMALLEST, f"model.policy={tiny_model}", f"data.prompts={few_prompts}", *overrides]
    run, _ = make_run(*keys)
    ours, samples = numbers_of_a_step(run)
    with pretend_gpu():
        there, _ = make_run(*keys, device=GPU)
        theirs, their_samples = numbers_of_a_step(there)
        weights = {k: v.detach().cpu() for k, v in there.policy.named_parameters()}
    for name, number in ours.items():
        if not name.startswith(("time/", "perf/")):
            assert theirs[name] == pytest.approx(number, rel=tolerance, abs=tolerance), name
    assert [s.response for s in their_samples] == [s.response for s in samples]
    if not tolerance:
        assert their_samples == samples
    for name, weight in run.policy.named_parameters():
        torch.testing.assert_close(weights[name], weight, rtol=0.0, atol=tolerance)


def numbers_of_a_step(run):
    """The metrics of a step, of an evaluation if one is due, and of a probe; and the samples."""
    metrics, samples = train_step(run, 1)
    run.state.step = 1
    update_reference(run)
    evaluation = evaluate_if_due(run, 1)
    assert not evaluation.failed
    return metrics | evaluation.metrics | answer_probe(run, "hello")["policy"], samples


def test_the_pretend_gpu_refuses_what_a_gpu_refuses():
    with pretend_gpu():
        x, y = torch.ones(3, device=GPU), torch.ones(3)
        assert (x * y.sum()).tolist() == [3.0] * 3  # a number may come from the host
        assert x[torch.tensor([0, 2])].tolist() == [1.0] * 2  # and so may indices
        for mixed in (torch.add, torch.dot, lambda *both: torch.cat(both)):
            with pytest.raises(MixedDevicesError):
                mixed(x, y)
        with pytest.raises(TypeError):
            x.numpy()


def test_the_pretend_gpu_is_found_by_a_rank_and_leaves_nothing_behind():
    assert RankGroup(LaunchConfig(device="cpu")).device.type == "cpu"
    with pretend_gpu():
        assert RankGroup(LaunchConfig()).device.type == "cuda"
    assert RankGroup(LaunchConfig(device="cpu")).device.type == "cpu"


def test_the_pretend_gpu_replays_operators_on_the_memory_of_their_capture():
    with pretend_gpu():
        x, total = torch.ones(2, device=GPU), torch.zeros(2, device=GPU)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            total.add_(torch.zeros(2, device=GPU).add_(x * 2)[:1])
        for value in (1, 10, 100):  # the first one as captured
            x.fill_(value)
            graph.replay()
        assert total.tolist() == [2.0 + 20.0 + 200.0] * 2
        with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(graph):
            total.tolist()


def test_the_pretend_gpu_counts_launches_waits_copies_and_casts_of_weights():
    with pretend_gpu() as gpu:
        layer = torch.nn.Linear(2, 2, bias=False).to(GPU)
        before = gpu.counts()
        assert bool((layer(torch.ones(1, 2, device=GPU)) > -100).all())  # ones, mm, gt, all
        assert (gpu.counts() - before).launches == 4
        assert (gpu.counts() - before).syncs == 1
        before = gpu.counts()
        layer.weight.to(torch.bfloat16).cpu()
        found = gpu.counts() - before
    assert (found.launches, found.syncs, found.copies, found.casts) == (1, 1, 1, 1)
